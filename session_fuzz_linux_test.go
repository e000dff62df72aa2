package acomm_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Both ends of a session, behind the greeting, against models that follow PROTOCOL.md,
// section 11, and know nothing of the library. The sender's is in
// session_fuzz_sender_linux_test.go.

// What the fuzz input is made of: pairs of bytes, an operation and its argument.
const (
	opMessage = iota // with the next number, handled as the argument says
	opNumber         // a message whose number is off by so much
	opText           // a message of as many bytes of the input
	opLong           // a message of the greatest length, or a byte more if odd
	opMany           // 8 times as many messages that are not answered
	opCancel         // of that number
	opAnswer         // to the number in the upper bits, of the kind in the lower ones
	opStop           // at that number, as a signed one
	opTarget         // of so many bytes, but 16 for most
	opFrame          // kind in the upper bits, length in the lower ones; bytes of the input follow
	opBytes          // as many bytes of the input
	numOps
)

// fuzzHows is what handlers do with a message, and fuzzAnswers what comes of it.
var (
	fuzzHows    = []string{"accept", "refuse", "close", "half", "twice", "wait"}
	fuzzAccept  = string(plainFrame(`{"error":"","id":"","result":null,"stream_url":null}`))
	fuzzRefusal = string(plainFrame(`{"error":"no","id":"","result":null,"stream_url":null}`))
	fuzzAnswers = map[string]string{"refuse": fuzzRefusal, "close": "", "half": fuzzAccept[:9], "wait": ""}
)

// fuzzReplies is what a listener may answer.
var fuzzReplies = []string{
	fuzzAccept, accepted, fuzzRefusal, string(plainFrame(`{"error":"` + strings.Repeat("long", 1<<15) + `"}`)),
	"", "\x00\x00\x00", accepted[:len(accepted)-1], "\xff\x00\x00\x00", accepted + "more", string(plainFrame("no JSON")), string(plainFrame("")),
}

// fuzzStream makes bytes of the input, up to 3 MiB and 1,200 messages.
func fuzzStream(input []byte) (stream []byte) {
	next := uint32(0)
	frame := func(kind, number uint32, payload string) {
		stream = append(stream, rawFrame(kind, uint32(len(payload)), number, payload)...)
	}
	message := func(how string, size int) {
		next++
		text := fmt.Sprintf(`{"id":%d,"how":%q}`, next, how)
		frame(frameMessage, next, text+strings.Repeat(" ", max(size-len(text), 0)))
	}
	for len(input) > 1 && len(stream) < 3<<20 {
		op, arg := input[0]%numOps, input[1]
		input = input[2:]
		take := func(n byte) string {
			data := input[:min(int(n), len(input))]
			input = input[len(data):]
			return string(data)
		}
		switch op {
		case opMessage:
			message(fuzzHows[int(arg)%len(fuzzHows)], 0)
		case opNumber:
			frame(frameMessage, next+1+uint32(int8(arg)), `{}`)
		case opText:
			next++
			frame(frameMessage, next, take(arg))
		case opLong:
			message("wait", 65536+int(arg&1))
		case opMany:
			for range min(8*int(arg), 1200-int(next)) {
				message("wait", 0)
			}
		case opCancel:
			frame(frameCancel, uint32(arg), "")
		case opAnswer:
			frame(frameAnswer, uint32(arg>>4), fuzzReplies[int(arg&15)%len(fuzzReplies)])
		case opStop:
			frame(frameStop, uint32(int8(arg)), "")
		case opTarget:
			size := 16
			if arg >= 240 {
				size = int(arg) - 240
			}
			frame(frameTarget, 0, strings.Repeat("t", size))
		case opFrame:
			stream = append(stream, rawFrame(uint32(arg>>4), uint32(arg&15), 1, "")...)
		case opBytes:
			stream = append(stream, take(arg)...)
		}
	}
	return stream
}

// fuzzFrame is a frame in a stream.
type fuzzFrame struct {
	kind, number uint32
	data         []byte
	start        int // in the stream
}

// fuzzFrames cuts a stream into frames. It reports whether a header follows that no
// frame has, and whether a part of a frame does.
func fuzzFrames(stream []byte) (frames []fuzzFrame, bad, part bool) {
	for at := 0; at < len(stream); {
		rest := stream[at:]
		if len(rest) < 8 {
			return frames, false, true
		}
		word := binary.BigEndian.Uint32(rest)
		f := fuzzFrame{kind: word >> 28, number: binary.BigEndian.Uint32(rest[4:]), start: at}
		size := int(word & (1<<28 - 1))
		least, most := 0, 0
		switch f.kind {
		case frameMessage:
			most = 65536
		case frameAnswer:
			most = 67108868
		case frameTarget:
			least, most = 16, 16
		case frameCancel, frameStop:
		default:
			return frames, true, false
		}
		if size < least || size > most {
			return frames, true, false
		}
		if len(rest) < 8+size {
			return frames, false, true
		}
		f.data = rest[8 : 8+size]
		frames, at = append(frames, f), at+8+size
	}
	return frames, false, false
}

// writePieces writes data in pieces of the sizes, again and again; a size of zero is all,
// and so is what is left after 100 pieces.
func writePieces(conn net.Conn, data, sizes []byte) error {
	for i := 0; len(data) > 0; i++ {
		n := len(data)
		if i < 100 && len(sizes) > 0 && sizes[i%len(sizes)] > 0 {
			n = min(n, int(sizes[i%len(sizes)]))
		}
		if _, err := conn.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// fuzzServed is a message that NextConn has returned.
type fuzzServed struct {
	id    int
	how   string
	bad   bool // no JSON of a note
	plain bool // by a connection of its own
}

func newFuzzServed(err error, n note) fuzzServed {
	if err != nil {
		return fuzzServed{bad: true}
	}
	return fuzzServed{id: n.ID, how: n.How}
}

func (s fuzzServed) answer() string {
	if answer, ok := fuzzAnswers[s.how]; ok || s.bad {
		return answer
	}
	return fuzzAccept
}

// listenerModel is what comes of the bytes that a sender writes.
type listenerModel struct {
	served     []fuzzServed
	open       map[uint32]int  // bytes of messages that are not cancelled
	due        map[uint32]bool // answers that have to come
	held       int             // messages that are open and will not be answered
	size, hold int             // bytes of JSON: of open messages, of those that are held
	over       bool            // the sender has said so: what is open is answered, then the listener closes
	overAt     uint32          // the last message before that
	broken     bool            // the listener closes
}

// take follows the stream. Where the limit depends on how fast handlers are, it returns a
// lesser length of the stream, up to which it does not.
func (m *listenerModel) take(stream []byte) int {
	m.open, m.due = make(map[uint32]int), make(map[uint32]bool)
	frames, bad, _ := fuzzFrames(stream)
	for _, f := range frames {
		size, last := len(f.data), uint32(len(m.served))
		switch {
		case f.kind == frameMessage && m.over: // is skipped
		case f.kind == frameMessage && (f.number != last+1 || m.held >= 1024 || m.hold+size > 2097152):
			m.broken = true
		case f.kind == frameMessage && (len(m.open) >= 1024 || m.size+size > 2097152):
			return f.start
		case f.kind == frameMessage:
			var n note
			s := newFuzzServed(json.Unmarshal(f.data, &n), n)
			m.served = append(m.served, s)
			m.open[f.number] = size
			m.size += size
			m.due[f.number] = s.how != "wait"
			if s.how == "wait" {
				m.held++
				m.hold += size
			}
		case f.kind == frameCancel:
			size, ok := m.open[f.number]
			if ok && !m.due[f.number] {
				m.held--
				m.hold -= size
			}
			m.size -= size
			delete(m.open, f.number)
		case f.kind == frameStop && f.number == 0:
			if !m.over {
				m.over, m.overAt = true, last
			}
		default:
			m.broken = true
		}
		if m.broken {
			return len(stream)
		}
	}
	m.broken = bad
	return len(stream)
}

// FuzzSessionListener writes what it likes to a listener's session.
func FuzzSessionListener(f *testing.F) {
	served := make(chan fuzzServed, 2000)
	var handlers atomic.Int64
	ul := acomm.NewUnixListener(filepath.Join(shortDir(f), "s.sock"), 0)
	require.NoError(f, ul.Start())
	stopped := async(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			handlers.Add(1)
			var n note
			s := newFuzzServed(acomm.UnmarshalConnData(conn, &n), n) // which has arrived
			_, s.plain = conn.(*net.UnixConn)
			served <- s
			go func() {
				defer handlers.Add(-1)
				defer ul.DoneConn(conn)
				answer := s.answer()
				for range n.ID % 3 { // some answers come with the reader's flush, some later
					runtime.Gosched()
				}
				switch {
				case s.how == "wait": // until it is cancelled, or the session ends
					_, _ = conn.Read(make([]byte, 1))
				case s.how == "twice":
					_, _ = io.WriteString(conn, answer+answer)
					_, _ = io.WriteString(conn, answer)
				case answer == fuzzAccept:
					_ = acomm.SendConnData(conn, &acomm.Response{})
				case answer == fuzzRefusal:
					_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New("no")})
				case answer != "":
					_, _ = io.WriteString(conn, answer)
				}
			}()
		}
	})
	f.Cleanup(func() {
		ul.Stop(time.Nanosecond)
		<-stopped
	})
	for _, input := range [][]byte{
		{opMessage, 0, opMessage, 1, opMessage, 2, opMessage, 3, opMessage, 4, opText, 2, '{', '}', opText, 1, '{', opText, 0},
		{opMessage, 5, opCancel, 1, opMessage, 0, opCancel, 2, opCancel, 9, opMessage, 1},
		{opMessage, 0, opMessage, 2}, {opMessage, 0, opMessage, 3}, {opMessage, 0, opNumber, 0, opNumber, 1}, {opMessage, 0, opNumber, 0xff}, {opNumber, 0xff},
		{opMessage, 0, opAnswer, 0x10}, {opMessage, 0, opStop, 1, opMessage, 0}, {opMessage, 0, opTarget, 0},
		{opMessage, 0, opMessage, 5, opStop, 0, opMessage, 0, opCancel, 2, opStop, 0}, {opStop, 0}, {opMessage, 5, opStop, 0, opFrame, 0x80},
		{opMany, 128, opCancel, 7, opText, 2, '{', '}', opMany, 1}, {opMany, 129}, {opLong, 0, opLong, 1, opMessage, 0},
		append([]byte(strings.Repeat("\x03\x00", 32)), opCancel, 7, opMessage, 0, opLong, 0), []byte(strings.Repeat("\x03\x00", 33)),
		{opMessage, 1, opFrame, 0x91}, {opMessage, 1, opFrame, 0x70}, {opMessage, 1, opFrame, 0xd0}, {opMessage, 1, opFrame, 0x82, opBytes, 1, '{'}, {opBytes, 7, 0x80},
	} {
		for _, sizes := range []string{"", "\x01", "\x07\x02\x00"} {
			f.Add(input, []byte(sizes))
		}
	}
	f.Fuzz(func(t *testing.T, input, sizes []byte) {
		stream := fuzzStream(input)
		var m listenerModel
		if end := m.take(stream); end < len(stream) {
			stream, m = stream[:end], listenerModel{}
			m.take(stream)
		}
		conn := openRaw(t, ul.Addr())
		writeErr := writePieces(conn, stream, sizes)
		require.True(t, writeErr == nil || m.broken || m.over, "%v", writeErr)
		due := 0 // of answers, and of the stop
		for number := range m.open {
			if m.due[number] {
				due++
			}
		}
		if m.over {
			due++
		}
		closes, got, stops := m.broken || m.over && m.held == 0, make(map[uint32]bool), 0
		for {
			if !closes && due == 0 {
				require.NoError(t, conn.CloseWrite())
				due = -1
			}
			kind, number, payload, err := readFrame(conn)
			if err != nil {
				require.True(t, m.broken || due <= 0, "%d frames are missing: %v", due, err)
				require.True(t, err == io.EOF || (m.broken || m.over) && errors.Is(err, syscall.ECONNRESET), "%v", err)
				break
			}
			if kind == frameStop {
				stops++
				require.True(t, m.over && stops == 1 && number == m.overAt, "stop %d", number)
				due--
				continue
			}
			require.EqualValues(t, frameAnswer, kind)
			require.False(t, got[number], "a second answer to %d", number)
			require.True(t, m.due[number], "an answer to %d", number)
			require.Equal(t, m.served[number-1].answer(), payload, "to %d", number)
			got[number] = true
			if _, ok := m.open[number]; ok {
				due--
			}
		}
		require.NoError(t, conn.Close())

		plain := dial(t, ul.Addr())
		_, err := plain.Write(plainFrame(`{}`))
		require.NoError(t, err)
		answer, err := io.ReadAll(plain)
		require.NoError(t, err)
		require.Equal(t, fuzzAccept, string(answer))
		for i, want := range append(m.served, fuzzServed{plain: true}) {
			require.Equal(t, want, within(t, served, "a message"), "message %d", i+1)
		}
		soon(t, "the end of the session", func() bool { return acomm.SessionTo(ul.Addr()).Accepted+int(handlers.Load()) == 0 })
		require.Empty(t, served)
	})
}

// soon is await for what takes microseconds.
func soon(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for range 1000 {
		if reached() {
			return
		}
		runtime.Gosched()
	}
	await(t, what, reached)
}
