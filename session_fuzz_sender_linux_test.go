package acomm_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// senderModel is what comes of the bytes that a listener writes to a sender with so many
// messages in flight.
type senderModel struct {
	outcome map[uint32]string // "" is accepted; of a message that has one before the end
	again   map[uint32]bool   // goes elsewhere
	targets int               // that are refused
	drained bool              // no further message is sent
	broken  bool              // the sender closes
}

func (m *senderModel) take(stream []byte, number uint32) (part bool) {
	m.outcome, m.again = make(map[uint32]string), make(map[uint32]bool)
	frames, bad, part := fuzzFrames(stream)
	for _, f := range frames {
		switch f.kind {
		case frameMessage, frameCancel: // is skipped where there was a target
			m.broken = m.targets == 0
		case frameTarget:
			m.targets++
			m.broken = m.targets > 16
		case frameAnswer:
			if _, ok := m.outcome[f.number]; !ok && f.number >= 1 && f.number <= number {
				m.outcome[f.number] = answerText(f.data)
			}
		case frameStop:
			m.drained = true
			for n := uint32(1); n <= number; n++ {
				if _, ok := m.outcome[n]; !ok && int32(n-f.number) > 0 {
					m.outcome[n], m.again[n] = "", true
				}
			}
		}
		if m.broken {
			return false
		}
	}
	m.broken = bad
	return part
}

// answerText is the text of what Send returns after an answer.
func answerText(answer []byte) string {
	payload, err := payloadIn(answer)
	var ack acomm.Response
	if err == nil && json.Unmarshal(payload, &ack) != nil {
		return "no JSON"
	}
	return outcomeText(errors.Join(err, ack.Error))
}

func outcomeText(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "EOF"
	case errors.Is(err, syscall.EMSGSIZE):
		return "too long"
	case strings.HasPrefix(err.Error(), "send to "):
		return "no JSON"
	}
	return err.Error()
}

// FuzzSessionSender has a listener of its own that writes what it likes, while up to four
// messages are in flight.
func FuzzSessionSender(f *testing.F) {
	processWithSessions(f)
	hub := newFuzzHub(f)
	for _, input := range [][]byte{
		{3, opAnswer, 0x42, opAnswer, 0x10, opAnswer, 0x31, opAnswer, 0x23},
		{3, opAnswer, 0x14, opAnswer, 0x25, opAnswer, 0x36, opAnswer, 0x47}, {3, opAnswer, 0x18, opAnswer, 0x29, opAnswer, 0x3a, opAnswer, 0x12},
		{2, opStop, 2, opAnswer, 0x30, opAnswer, 0x10}, {2, opStop, 0}, {1, opStop, 9, opStop, 1}, {3, opStop, 0xff}, {2, opAnswer, 0x10, opStop, 0, opAnswer, 0x21},
		{2, opStop, 1, opAnswer, 0x12, opTarget, 0, opMessage, 0, opCancel, 1}, {1, opTarget, 0, opMessage, 0, opAnswer, 0x10, opTarget, 0},
		append([]byte{1}, strings.Repeat("\x08\x00", 16)...), append([]byte{1}, strings.Repeat("\x08\x00", 17)...),
		{1, opAnswer, 0x10, opMessage, 0, opAnswer, 0x20}, {1, opCancel, 1}, {1, opFrame, 0xb1}, {1, opAnswer, 0x20, opFrame, 0x70}, {1, opFrame, 0xa5, opBytes, 3, 0, 0, 0},
		{1, opAnswer, 0x90, opAnswer, 0, opAnswer, 0x10, opAnswer, 0x12}, {0}, {4 | 1, opAnswer, 0x13}, {4 | 3, opStop, 2, opAnswer, 0x10, opBytes, 3, 0xa0, 0, 0},
	} {
		for _, sizes := range []string{"", "\x01", "\x07\x02\x00"} {
			f.Add(input, []byte(sizes))
		}
	}
	f.Fuzz(func(t *testing.T, input, sizes []byte) {
		how := byte(0)
		if len(input) > 0 {
			how, input = input[0], input[1:]
		}
		number := uint32(how&3 + 1)
		conn, first := hub.open(t), int(fuzzIDs.Add(10))
		send := func(n uint32) <-chan error {
			text := note{ID: first + int(n)}
			if n == 2 {
				text.Data = strings.Repeat("large", 1000) // is not copied
			}
			sent := sendAsync(hub.addr, text)
			require.JSONEq(t, string(encode(text)), requireFrame(t, conn, frameMessage, n))
			return sent
		}
		sent := make(map[uint32]<-chan error)
		for n := uint32(1); n <= number; n++ {
			sent[n] = send(n)
		}
		stream := fuzzStream(input)
		var m senderModel
		part := m.take(stream, number)
		barrier := !m.broken && !part && m.targets < 16
		if barrier { // when that is answered, all before has been read
			stream = append(stream, rawFrame(frameTarget, 16, 0, strings.Repeat("b", 16))...)
			m.targets++
		}
		writeErr := writePieces(conn, stream, sizes)
		require.True(t, writeErr == nil || m.broken, "%v", writeErr)
		over := m.drained && len(m.outcome) == int(number)
		stops := m.targets // each is answered by one, and so is the end
		if over {
			stops++
		}
		readStop := func() (err error) {
			kind, at, _, err := readFrame(conn)
			if err == nil {
				require.Equal(t, []uint32{frameStop, 0}, []uint32{kind, at}, "nothing else is written")
				stops--
			}
			return err
		}
		for !m.broken && stops > 0 {
			require.NoError(t, readStop())
		}
		requireOutcome := func(n uint32, want string) {
			require.Equal(t, want, outcomeText(within(t, sent[n], "an outcome")), "message %d", n)
			served := 0
			if m.again[n] {
				served = 1
			}
			require.Equal(t, served, hub.servedAlone(first+int(n)), "message %d, on connections of its own", n)
		}
		for n, want := range m.outcome {
			requireOutcome(n, want)
		}
		if barrier && !m.drained {
			require.Equal(t, int(number)-len(m.outcome), acomm.SessionTo(hub.addr.Path).InFlight, "the others wait")
			number++
			sent[number] = send(number)
			hub.write(t, conn, rawFrame(frameAnswer, uint32(len(fuzzRefusal)), number, fuzzRefusal))
			m.outcome[number] = "no"
			requireOutcome(number, "no")
		}
		hard := how&4 != 0 && !m.broken
		if hard {
			require.NoError(t, conn.Close())
		} else {
			if !m.broken {
				require.NoError(t, conn.(*net.UnixConn).CloseWrite())
			}
			err := readStop()
			for err == nil {
				err = readStop()
			}
			require.True(t, err == io.EOF || m.broken && errors.Is(err, syscall.ECONNRESET), "%v", err)
			require.True(t, stops == 0 || m.broken && stops > 0, "%d stops are missing", stops)
			require.NoError(t, conn.Close())
		}
		gone := func() bool {
			st := acomm.SessionTo(hub.addr.Path)
			return st.Opened == 0 && !st.Known
		}
		if hard && !barrier { // an answer that comes too early may be read yet, and be the next message's
			soon(t, "the end of the session", gone)
		}
		require.NoError(t, acomm.Send(hub.addr, note{ID: first}))
		require.Equal(t, 1, hub.servedAlone(first))
		for n := range sent {
			if _, ok := m.outcome[n]; !ok {
				requireOutcome(n, "EOF")
			}
		}
		soon(t, "the end of the session", gone)
	})
}

var fuzzIDs atomic.Int64

// fuzzHub is a listener that accepts whatever comes on a connection of its own, and leaves
// sessions to the test.
type fuzzHub struct {
	*rawListener
	sessions chan net.Conn
	offering atomic.Bool

	mu     sync.Mutex
	served map[int]int // by id
}

func newFuzzHub(f *testing.F) *fuzzHub {
	h := &fuzzHub{rawListener: newRawListenerAlone(f), sessions: make(chan net.Conn, 1), served: make(map[int]int)}
	accepting := async(func() {
		for conn, err := h.Accept(); err == nil; conn, err = h.Accept() {
			if strings.HasPrefix(conn.RemoteAddr().String(), acomm.SessionName) {
				h.sessions <- conn
				continue
			}
			var n note
			if acomm.UnmarshalConnData(conn, &n) == nil {
				h.mu.Lock()
				h.served[n.ID]++
				h.mu.Unlock()
				answer := accepted
				if h.offering.Load() {
					answer = offering
				}
				_, _ = io.WriteString(conn, answer)
			}
			_ = conn.Close()
		}
	})
	f.Cleanup(func() {
		_ = h.Close()
		<-accepting
	})
	return h
}

// open has the library open a session.
func (h *fuzzHub) open(t *testing.T) net.Conn {
	h.offering.Store(true)
	require.NoError(t, acomm.Send(h.addr, note{ID: -1}))
	h.offering.Store(false)
	conn := within(t, h.sessions, "the session")
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	greetSender(t, conn, lesserToken)
	soon(t, "the session", func() bool { return acomm.SessionTo(h.addr.Path).Open })
	return conn
}

func (h *fuzzHub) write(t *testing.T, conn net.Conn, data []byte) {
	t.Helper()
	_, err := conn.Write(data)
	require.NoError(t, err)
}

// servedAlone returns how often a message came on a connection of its own.
func (h *fuzzHub) servedAlone(id int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.served[id]
}
