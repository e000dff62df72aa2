package acomm_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Both ends of a session, behind the greeting, against a model that follows
// PROTOCOL.md, section 11.

// fuzzFrames makes frames of fuzz input: each byte is one, or a few bytes of garbage.
func fuzzFrames(input []byte) (frames [][]byte, kinds []fuzzFrame) {
	number := uint32(0)
	for i := 0; i < len(input) && len(frames) < 64; i++ {
		f := fuzzFrame{kind: uint32(input[i] >> 4), how: input[i] & 3}
		switch {
		case input[i]&0x0c == 0x0c: // any number
			i++
			if i < len(input) {
				f.number = uint32(int8(input[i]))
			}
		case f.kind == frameMessage:
			number++
			f.number = number
		default: // one of before
			f.number = number - uint32(input[i]>>2&3)
		}
		switch f.kind {
		case frameMessage:
			f.payload = fmt.Sprintf(`{"id":%d,"how":%q}`, f.number, fuzzHow[f.how])
		case frameAnswer:
			f.payload = []string{accepted, string(plainFrame(`{"error":"no"}`)), "", "\x00\x00\x00\x09{}"}[f.how]
		case frameTarget:
			f.payload = strings.Repeat("x", 16)
		default:
			f.payload = strings.Repeat("x", int(f.how)/3) // a length that is wrong, now and then
		}
		frames = append(frames, rawFrame(f.kind, uint32(len(f.payload)), f.number, f.payload))
		kinds = append(kinds, f)
	}
	return frames, kinds
}

type fuzzFrame struct {
	kind, number uint32
	how          byte
	payload      string
}

// fuzzHow is what handlers do with a message.
var fuzzHow = []string{"accept", "refuse", "close", "wait"}

// writePieces writes frames cut into pieces of some length.
func writePieces(conn net.Conn, frames [][]byte, piece byte) error {
	var all []byte
	for _, f := range frames {
		all = append(all, f...)
	}
	size := len(all)
	if piece > 0 {
		size = int(piece)
	}
	for len(all) > 0 {
		n := min(size, len(all))
		if _, err := conn.Write(all[:n]); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// FuzzSessionListener writes what it likes to a listener's session. The model says which
// messages are served and how they are answered, and whether the session breaks.
func FuzzSessionListener(f *testing.F) {
	served := make(chan uint32, 1000)
	ul := acomm.NewUnixListener(filepath.Join(shortDir(f), "s.sock"), 0)
	require.NoError(f, ul.Start())
	f.Cleanup(func() { ul.Stop(time.Nanosecond) })
	go func() { // ends with the listener
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			go func() {
				defer ul.DoneConn(conn)
				var n note
				if acomm.UnmarshalConnData(conn, &n) != nil {
					return
				}
				served <- uint32(n.ID)
				switch n.How {
				case "accept":
					_ = acomm.SendConnData(conn, &acomm.Response{})
				case "refuse":
					_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New("no")})
				case "wait": // until it is cancelled, or the session ends
					_, _ = conn.Read(make([]byte, 1))
				}
			}()
		}
	}()
	f.Add([]byte{0x80, 0x81, 0x82}, byte(0))
	f.Add([]byte{0x83, 0x90, 0x80}, byte(1))
	f.Add([]byte{0x80, 0x8c, 0x05, 0x80}, byte(7))
	f.Add([]byte{0x80, 0xa0}, byte(0))
	f.Add([]byte{0x80, 0xb0}, byte(3))
	f.Add([]byte{0x80, 0xc0}, byte(0))
	f.Add([]byte{0x93, 0x80, 0x9c, 0x7f, 0x83, 0x83, 0x94, 0x90}, byte(0))
	f.Add([]byte{0x00, 0x80}, byte(9))
	f.Fuzz(func(t *testing.T, input []byte, piece byte) {
		frames, kinds := fuzzFrames(input)
		want, due := make(map[uint32]string), make(map[uint32]bool) // due: an answer comes for certain
		last, broken := uint32(0), false
		for _, k := range kinds {
			switch {
			case k.kind == frameMessage && k.number == last+1:
				last++
				want[last], due[last] = fuzzHow[k.how], fuzzHow[k.how] != "wait"
			case k.kind == frameCancel && k.payload == "":
				delete(due, k.number)
			default:
				broken = true
			}
			if broken {
				break
			}
		}
		conn := openRaw(t, ul.Addr())
		writeErr := writePieces(conn, frames, piece)
		require.True(t, writeErr == nil || broken, "%v", writeErr)
		for range last { // in any order
			number := within(t, served, "a message to be served")
			require.NotEmpty(t, want[number], "served twice, or not sent: %d", number)
			if want[number] == "wait" {
				delete(due, number)
				delete(want, number)
			}
		}
		for {
			if !broken && len(due) == 0 {
				require.NoError(t, conn.CloseWrite())
				broken = true
			}
			kind, number, payload, err := readFrame(conn)
			if err != nil {
				require.True(t, broken, "it was closed, with answers due: %v", due)
				require.True(t, errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET), "%v", err)
				break
			}
			require.EqualValues(t, frameAnswer, kind)
			how := map[bool]string{strings.Contains(payload, `"error":""`): "accept", strings.Contains(payload, `"error":"no"`): "refuse", payload == "": "close"}[true]
			require.Equal(t, want[number], how, "%d", number)
			delete(want, number)
			delete(due, number)
		}
		require.NoError(t, conn.Close())
		require.Empty(t, served)
	})
}

// FuzzSessionSender has a listener of its own that answers as it likes, while three
// messages are in flight. The model says what becomes of each.
func FuzzSessionSender(f *testing.F) {
	processWithSessions(f)
	f.Add([]byte{0xa0, 0xa4, 0xa8}, byte(0))
	f.Add([]byte{0xa9, 0xb4, 0xa0}, byte(1))
	f.Add([]byte{0xb8}, byte(0))
	f.Add([]byte{0xbc, 0x00}, byte(5))
	f.Add([]byte{0xa0, 0x80}, byte(0))
	f.Add([]byte{0xac, 0x7f, 0xa1, 0xa6, 0xab}, byte(0))
	f.Add([]byte{0xb3}, byte(0))
	f.Fuzz(func(t *testing.T, input []byte, piece byte) {
		l := newFuzzListener(t)
		conn := l.open()
		const number = 3
		var sent [number]<-chan error
		for i := range sent { // so that message i+1 has the id i+1
			sent[i] = sendAsync(l.addr, note{ID: i + 1})
			l.message(conn)
		}
		frames, kinds := fuzzFrames(append([]byte{}, fuzzAnswersOnly(input)...))
		outcome := make(map[uint32]string) // of those that have one before the end
		draining, targets := false, 0
		for _, k := range kinds {
			k.number += number // the generator counts messages
			broken := true
			switch {
			case k.kind == frameTarget: // is refused
				targets++
				broken = targets > 16
			case k.kind == frameMessage, k.kind == frameCancel && k.payload == "":
				broken = targets == 0 // else it is skipped
			case k.kind == frameAnswer:
				broken = false
				if k.number >= 1 && k.number <= number && outcome[k.number] == "" {
					outcome[k.number] = []string{"accept", "refuse", "eof", "eof"}[k.how]
				}
			case k.kind == frameStop && k.payload == "":
				draining, broken = true, false
				for n := uint32(1); n <= number; n++ {
					if int32(n-k.number) > 0 && outcome[n] == "" {
						outcome[n] = "again"
					}
				}
			}
			if broken || draining && len(outcome) == number {
				break // it is closed
			}
		}
		for i, k := range kinds {
			frames[i] = rawFrame(k.kind, uint32(len(k.payload)), k.number+number, k.payload)
		}
		_ = writePieces(conn, frames, piece) // the end may come before the last
		require.NoError(t, conn.Close())
		for i := range sent {
			err := within(t, sent[i], "an outcome")
			again := l.servedAlone(i + 1)
			switch outcome[uint32(i+1)] {
			case "accept":
				require.NoError(t, err)
				require.Zero(t, again)
			case "again":
				require.NoError(t, err)
				require.Equal(t, 1, again, "message %d goes elsewhere, once", i+1)
			case "refuse":
				require.EqualError(t, err, "no")
				require.Zero(t, again)
			default:
				require.ErrorIs(t, err, io.ErrUnexpectedEOF, "message %d", i+1)
				require.Zero(t, again)
			}
		}
		require.NoError(t, acomm.Send(l.addr, note{ID: 9}))
		require.Equal(t, 1, l.servedAlone(9))
	})
}

// fuzzAnswersOnly makes most of the frames those that a listener sends.
func fuzzAnswersOnly(input []byte) []byte {
	out := make([]byte, 0, len(input))
	for _, b := range input {
		if b>>4 != frameAnswer && b>>4 != frameStop && b&1 == 0 {
			b = b&0x0f | frameAnswer<<4
		}
		out = append(out, b)
	}
	return out
}

// fuzzListener is a raw listener that serves plain exchanges by itself.
type fuzzListener struct {
	*rawListener
	sessions chan net.Conn
	offering atomic.Bool

	mu     sync.Mutex
	served map[int]int // by id
}

func newFuzzListener(t testing.TB) *fuzzListener {
	path := filepath.Join(shortDir(t), "s.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	o := &fuzzListener{rawListener: &rawListener{t, l, unixURL(path)}, sessions: make(chan net.Conn, 1), served: make(map[int]int)}
	accepting := async(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if strings.HasPrefix(conn.RemoteAddr().String(), acomm.SessionName) {
				o.sessions <- conn
				continue
			}
			var n note
			if acomm.UnmarshalConnData(conn, &n) == nil {
				o.mu.Lock()
				o.served[n.ID]++
				o.mu.Unlock()
				answer := `{"error":""}`
				if o.offering.Load() {
					answer = `{"error":"","sessions":1}`
				}
				_, _ = conn.Write(plainFrame(answer))
			}
			_ = conn.Close()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		<-accepting
	})
	return o
}

// open has the library open a session.
func (l *fuzzListener) open() net.Conn {
	l.offering.Store(true)
	require.NoError(l.t, acomm.Send(l.addr, note{ID: -1}))
	l.offering.Store(false)
	conn := within(l.t, l.sessions, "the session")
	require.NoError(l.t, conn.SetDeadline(time.Now().Add(patience)))
	l.write(conn, []byte(acomm.Greeting+lesserToken))
	_, err := io.ReadFull(conn, make([]byte, len(acomm.Greeting)+len(lesserToken)))
	require.NoError(l.t, err)
	await(l.t, "the session", func() bool { return acomm.SessionTo(l.addr.Path).Open })
	return conn
}

// servedAlone returns how often a message came on a plain connection.
func (l *fuzzListener) servedAlone(id int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.served[id]
}
