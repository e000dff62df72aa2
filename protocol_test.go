package acomm_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What PROTOCOL.md says is held against the library here: the frames, messages
// and tables of PROTOCOL.md, the programs and numbers of README.md. So are the
// frames in testdata/wire, which are the protocol as it was always spoken.

const frameHeader = 4 // bytes

// readFrom has the library read bytes that a peer sends.
func readFrom(t *testing.T, sent []byte, dest any) {
	t.Helper()
	ours, peer := net.Pipe()
	writing := async(func() {
		_, _ = peer.Write(sent)
		_ = peer.Close()
	})
	err := acomm.UnmarshalConnData(ours, dest)
	require.NoError(t, ours.Close())
	within(t, writing, "the peer's write")
	require.NoError(t, err)
}

// written returns what the library sends a peer.
func written(t *testing.T, payload any) []byte {
	t.Helper()
	ours, peer := net.Pipe()
	var sent []byte
	reading := async(func() { sent, _ = io.ReadAll(peer) })
	err := acomm.SendConnData(ours, payload)
	require.NoError(t, ours.Close())
	within(t, reading, "the peer's read")
	require.NoError(t, err)
	return sent
}

// checkFrame reads a frame as the message it is and writes that again: the same
// JSON has to come out, its members in the same order, and, where no URL is in
// it, the same bytes. (The members of a URL are url.URL's and grow with Go.)
func checkFrame(t *testing.T, data []byte) {
	t.Helper()
	require.Greater(t, len(data), frameHeader)
	payload := data[frameHeader:]
	require.EqualValues(t, len(payload), binary.BigEndian.Uint32(data), "length in the header")

	var again []byte
	var hasURL bool
	if bytes.Contains(payload, []byte(`"task"`)) {
		req := &acomm.Request{}
		readFrom(t, data, req)
		require.NoError(t, req.Validate())
		again, hasURL = written(t, req), true
	} else {
		resp := &acomm.Response{}
		readFrom(t, data, resp)
		again, hasURL = written(t, resp), resp.StreamURL != nil
	}
	require.JSONEq(t, string(payload), string(again[frameHeader:]))
	require.Equal(t, memberNames(t, payload), memberNames(t, again[frameHeader:]), "order of the members")
	if !hasURL {
		require.Equal(t, string(data), string(again))
	}
}

// memberNames returns the names of an object's members in their order.
func memberNames(t *testing.T, object []byte) []string {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(object))
	_, err := decoder.Token() // {
	require.NoError(t, err)
	var names []string
	for decoder.More() {
		name, err := decoder.Token()
		require.NoError(t, err)
		names = append(names, name.(string))
		var value json.RawMessage
		require.NoError(t, decoder.Decode(&value))
	}
	return names
}

// document reads one of the texts that come with the library.
func document(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(data)
}

// codeBlocks returns the fenced blocks of a document with the language given.
func codeBlocks(text, language string) []string {
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		if m[1] == language {
			blocks = append(blocks, m[2])
		}
	}
	return blocks
}

// dumpedBytes turns a hex dump into the bytes it shows, and checks its offsets
// and the text in its last column.
func dumpedBytes(t *testing.T, dump string) []byte {
	t.Helper()
	var data []byte
	for line := range strings.Lines(dump) {
		offset, rest, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		require.True(t, ok, line)
		require.Equal(t, fmt.Sprintf("%08x", len(data)), offset)
		digits, text, ok := strings.Cut(rest, "  ")
		require.True(t, ok, line)
		shown, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
		require.NoError(t, err)
		printable := bytes.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return '.'
			}
			return r
		}, shown)
		require.Equal(t, string(printable), strings.TrimLeft(text, " "), line)
		data = append(data, shown...)
	}
	return data
}

// tableNames returns the names in the first column of the first table after a
// heading in bold, each of them in backquotes.
func tableNames(t *testing.T, text, heading string) []string {
	t.Helper()
	_, text, ok := strings.Cut(text, "**"+heading+"**")
	require.True(t, ok, heading)
	_, text, ok = strings.Cut(text, "\n|---")
	require.True(t, ok, heading)
	var names []string
	for _, row := range strings.Split(text, "\n")[1:] {
		if !strings.HasPrefix(row, "|") {
			break
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Split(row, "|")[1], -1) {
			names = append(names, m[1])
		}
	}
	return names
}

func TestWire_FramesOf2016RoundTrip(t *testing.T) {
	files, err := filepath.Glob("testdata/wire/*.bin")
	require.NoError(t, err)
	require.Len(t, files, 8)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			checkFrame(t, []byte(document(t, file)))
		})
	}
}

func TestProtocolDocument_HexDumpsAreFrames(t *testing.T) {
	dumps := 0
	for _, block := range codeBlocks(document(t, "PROTOCOL.md"), "") {
		if !strings.HasPrefix(block, "00000000: ") {
			continue // a diagram
		}
		dumps++
		checkFrame(t, dumpedBytes(t, block))
	}
	require.Equal(t, 2, dumps)
	text := strings.Join(strings.Fields(document(t, "PROTOCOL.md")), " ")
	require.Contains(t, text, "(0x34 = 52 bytes of JSON)")
	require.Len(t, written(t, &acomm.Response{}), frameHeader+0x34, "the acknowledgement shown is the library's own")
}

// sessionDumps returns what PROTOCOL.md shows of a session: the acknowledgement before
// it, and all that its sender and its listener write.
func sessionDumps(t *testing.T) (offer, sender, listener []byte) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("there are sessions on Linux only")
	}
	dumps := codeBlocks(document(t, "PROTOCOL.md"), "hexdump")
	require.Len(t, dumps, 3)
	return dumpedBytes(t, dumps[0]), dumpedBytes(t, dumps[1]), dumpedBytes(t, dumps[2])
}

const (
	sessionGreeting = "\xffacomm\x00\x03"
	greeted         = len(sessionGreeting) + 16 // bytes: and a token
	senderSocket    = "@acomm-3/"               // Go's spelling of the zero byte
	sessionSocket   = "@acomm-3s/"
	plainMessage    = `{"error":"","id":"a1","result":3,"stream_url":null}`
)

// dialDocumented is a listener of the library and a socket of the test's, connected.
func dialDocumented(t *testing.T, name string) (*acomm.UnixListener, *net.UnixConn) {
	t.Helper()
	listener := acomm.NewUnixListener(filepath.Join(shortDir(t), "l.sock"), 0)
	require.NoError(t, listener.Start())
	t.Cleanup(func() { listener.Stop(time.Nanosecond) })
	return listener, dialAs(t, listener.Addr(), name)
}

// dialAs connects to the path from a socket with the name, if there is one.
func dialAs(t *testing.T, path, name string) *net.UnixConn {
	t.Helper()
	if name == "" {
		return dialFrom(t, nil, path)
	}
	return dialFrom(t, &net.UnixAddr{Net: "unix", Name: name}, path)
}

// acceptNext reads the next message and acknowledges it, as a provider does.
func acceptNext(t *testing.T, listener *acomm.UnixListener) *acomm.Response {
	t.Helper()
	conn, message := listener.NextConn(), &acomm.Response{}
	require.NotNil(t, conn)
	require.NoError(t, acomm.UnmarshalConnData(conn, message))
	require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
	listener.DoneConn(conn)
	return message
}

// requireBytes reads as many bytes as are wanted.
func requireBytes(t *testing.T, want []byte, from io.Reader) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(from, got)
	require.Equal(t, hex.Dump(want), hex.Dump(got[:n]))
	require.NoError(t, err)
}

// A sender that follows the document, byte for byte, at the library's listener.
func TestProtocolDocument_SessionSender(t *testing.T) {
	offer, sender, answers := sessionDumps(t)
	require.Equal(t, sessionGreeting, string(sender[:len(sessionGreeting)]))
	require.Contains(t, document(t, "PROTOCOL.md"), fmt.Sprintf("`% x`", sessionGreeting))
	listener, plain := dialDocumented(t, senderSocket+rand.Text())
	_, err := plain.Write(plainFrame(plainMessage))
	require.NoError(t, err)
	require.Equal(t, "a1", acceptNext(t, listener).ID)
	got, err := io.ReadAll(plain)
	require.NoError(t, err)
	require.Equal(t, hex.Dump(offer), hex.Dump(got), "and that connection is closed")

	conn := dialAs(t, listener.Addr(), sessionSocket+rand.Text())
	requireBytes(t, answers[:len(sessionGreeting)], conn) // before anything was said
	token := make([]byte, greeted-len(sessionGreeting))
	_, err = io.ReadFull(conn, token)
	require.NoError(t, err)
	require.NotEqual(t, string(answers[len(sessionGreeting):greeted]), string(token), "it is random")
	_, err = conn.Write(sender)
	require.NoError(t, err)
	require.Equal(t, "a2", acceptNext(t, listener).ID)
	requireBytes(t, answers[greeted:], conn)

	// Message 2 is given up, message 3 is not handed to a handler before the stop.
	text := document(t, "PROTOCOL.md")
	require.Contains(t, text, "A cancel of message 2 is `90000000 00000002`. A stop after message 1 is `b0000000 00000001`.")
	_, err = conn.Write([]byte("\x80\x00\x00\x02\x00\x00\x00\x02{}\x90\x00\x00\x00\x00\x00\x00\x02"))
	require.NoError(t, err)
	cancelled := listener.NextConn()
	frame := make([]byte, frameHeader+2)
	_, err = io.ReadFull(cancelled, frame)
	require.NoError(t, err)
	require.Equal(t, "\x00\x00\x00\x02{}", string(frame), "a handler reads a plain frame")
	_, err = cancelled.Read(frame)
	require.ErrorIs(t, err, io.EOF, "as if the sender had closed")
	listener.DoneConn(cancelled)

	_, err = conn.Write([]byte("\x80\x00\x00\x02\x00\x00\x00\x03{}"))
	require.NoError(t, err)
	listener.Stop(time.Nanosecond)
	rest, err := io.ReadAll(conn)
	require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err) // where message 3 was not read
	var last string
	for ; len(rest) > 0; rest = rest[8:] { // what has been read, perhaps, what was handed out, an empty answer
		if last == "" || rest[0] == 0xb0 {
			last = string(rest[:8])
		}
	}
	require.Equal(t, "\xb0\x00\x00\x00\x00\x00\x00\x02", last, "stop: 2 was the last")
	_, err = conn.Write([]byte{0x80})
	require.ErrorIs(t, err, syscall.EPIPE)
}

// A listener that follows the document, byte for byte, for the library's Send.
func TestProtocolDocument_SessionListener(t *testing.T) {
	offer, sender, answers := sessionDumps(t)
	newTracker(t) // a process without one has no sessions
	addr := &net.UnixAddr{Net: "unix", Name: filepath.Join(shortDir(t), "l.sock")}
	listener, err := net.ListenUnix("unix", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	send := func(id string, result string) <-chan error {
		done, raw := make(chan error, 1), json.RawMessage(result)
		go func() {
			done <- acomm.Send(&url.URL{Scheme: "unix", Path: addr.Name}, &acomm.Response{ID: id, Result: &raw})
		}()
		return done
	}
	accept := func(name string) *net.UnixConn {
		conn, err := listener.AcceptUnix()
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		require.Regexp(t, "^"+name+"[0-9A-Z]{26}$", conn.RemoteAddr().String())
		return conn
	}

	first := send("a1", "3")
	plain := accept(senderSocket)
	requireBytes(t, plainFrame(plainMessage), plain)
	_, err = plain.Write(offer)
	require.NoError(t, err)
	require.NoError(t, within(t, first, "Send"))
	rest, err := io.ReadAll(plain)
	require.NoError(t, err)
	require.Empty(t, rest, "it is closed, as ever")

	conn := accept(sessionSocket)
	_, err = conn.Write(answers[:greeted])
	require.NoError(t, err)
	requireBytes(t, sender[:len(sessionGreeting)], conn)
	_, err = io.ReadFull(conn, make([]byte, greeted-len(sessionGreeting)))
	require.NoError(t, err)

	// Until the library has read the greeting, messages come on plain connections.
	accepting := async(func() {
		for {
			alone, err := listener.AcceptUnix()
			if err != nil {
				return
			}
			_ = acomm.UnmarshalConnData(alone, &acomm.Response{})
			_ = acomm.SendConnData(alone, &acomm.Response{})
			_ = alone.Close()
		}
	})
	message := make([]byte, len(sender)-greeted)
	arrived := async(func() { _, err = io.ReadFull(conn, message) })
	var second <-chan error
	for waiting := true; waiting; {
		second = send("a2", "4")
		select {
		case err := <-second:
			require.NoError(t, err)
		case <-arrived:
			waiting = false
		}
	}
	require.NoError(t, err)
	require.Equal(t, hex.Dump(sender[greeted:]), hex.Dump(message))
	_, err = conn.Write(answers[greeted:])
	require.NoError(t, err)
	require.NoError(t, within(t, second, "Send"))
	require.NoError(t, listener.Close())
	within(t, accepting, "the accept loop")
}

// Nothing of it reaches a sender that has not said that it can have sessions.
func TestProtocolDocument_OtherSendersSeeNothingOfSessions(t *testing.T) {
	for _, name := range []string{"", "@acomm-2/" + rand.Text(), "@acomm-4s/" + rand.Text(), "@" + rand.Text()} {
		listener, conn := dialDocumented(t, name)
		_, err := conn.Write(plainFrame(plainMessage))
		require.NoError(t, err)
		acceptNext(t, listener)
		answer, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Equal(t, string(written(t, &acomm.Response{})), string(answer), name)
	}
}

// What the document calls a broken session is closed, whoever sends it, and
// what is at a limit is not.
func TestProtocolDocument_SessionLimits(t *testing.T) {
	_, sender, answers := sessionDumps(t)
	header := func(kind, length, number uint32) string {
		b := binary.BigEndian.AppendUint32(nil, kind<<28|length)
		return string(binary.BigEndian.AppendUint32(b, number))
	}
	largest := `"` + strings.Repeat("x", 65_534) + `"`
	many := func(n uint32) string {
		var b strings.Builder
		for number := range n {
			b.WriteString(header(8, 2, number+1) + "{}")
		}
		return b.String()
	}
	for name, c := range map[string]struct {
		sent string
		ends bool
	}{
		"largest message":         {sent: header(8, 65_536, 1) + largest},
		"longer message":          {sent: header(8, 65_537, 1) + largest + " ", ends: true},
		"not the next number":     {sent: header(8, 2, 2) + "{}", ends: true},
		"unknown kind":            {sent: header(14, 0, 1), ends: true},
		"a plain frame":           {sent: string(plainFrame("{}    ")), ends: true},
		"an answer of the sender": {sent: header(10, 0, 1), ends: true},
		"a stop of the sender":    {sent: header(11, 0, 1), ends: true},
		"cancel with a length":    {sent: header(8, 2, 1) + "{}" + header(9, 1, 1) + "x", ends: true},
		"cancel of nothing":       {sent: header(9, 0, 7)},
		"1,024 messages":          {sent: many(1024)},
		"1,025 messages":          {sent: many(1025), ends: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, conn := dialDocumented(t, sessionSocket+rand.Text())
			requireBytes(t, answers[:len(sessionGreeting)], conn)
			_, err := io.ReadFull(conn, make([]byte, greeted-len(sessionGreeting)))
			require.NoError(t, err)
			_, err = conn.Write(sender[:greeted])
			require.NoError(t, err)
			_, err = io.WriteString(conn, c.sent)
			require.True(t, err == nil || c.ends && errors.Is(err, syscall.EPIPE), "%v", err)
			wait := patience
			if !c.ends { // nothing is to come, which only time can show
				wait = 50 * time.Millisecond
			}
			require.NoError(t, conn.SetReadDeadline(time.Now().Add(wait)))
			_, err = conn.Read(make([]byte, 1))
			if c.ends {
				require.Error(t, err)
				require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
			} else {
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			}
		})
	}
}

func TestProtocolDocument_MessagesAreRead(t *testing.T) {
	blocks := codeBlocks(document(t, "PROTOCOL.md"), "json")
	require.Len(t, blocks, 2)
	for _, block := range blocks {
		checkFrame(t, plainFrame(block))
	}
}

func TestProtocolDocument_TablesNameTheMembers(t *testing.T) {
	text := document(t, "PROTOCOL.md")
	req, err := acomm.NewRequest("task", "unix:///run/a.sock", nil, nil, nil)
	require.NoError(t, err)
	require.Equal(t, memberNames(t, written(t, req)[frameHeader:]), tableNames(t, text, "Request"))
	require.Equal(t, memberNames(t, written(t, &acomm.Response{})[frameHeader:]), tableNames(t, text, "Response"))

	for _, name := range tableNames(t, text, "URL object.") {
		field, ok := reflect.TypeFor[url.URL]().FieldByName(name)
		require.True(t, ok && field.IsExported(), name)
	}
}

func TestProtocolDocument_BothFormsOfAURL(t *testing.T) {
	text := document(t, "PROTOCOL.md")
	for _, form := range []string{`{"Scheme":"unix","Path":"/run/a.sock"}`, `"unix:///run/a.sock"`} {
		require.Contains(t, text, "`"+form+"`")
		resp := &acomm.Response{}
		readFrom(t, plainFrame(`{"id":"x","stream_url":`+form+`}`), resp)
		require.Equal(t, &url.URL{Scheme: "unix", Path: "/run/a.sock"}, resp.StreamURL)
		req := &acomm.Request{}
		readFrom(t, plainFrame(`{"id":"x","task":"t","responsehook":`+form+`}`), req)
		require.Equal(t, resp.StreamURL, req.ResponseHook)
	}
}

func TestProtocolDocument_URLCarriesNoCredentials(t *testing.T) {
	req, err := acomm.NewRequest("task", "http://name:secret@host/hook", nil, nil, nil)
	require.NoError(t, err)
	sent := written(t, req)
	require.NotContains(t, string(sent), "secret")
	require.NotContains(t, string(sent), "name")
	require.Contains(t, string(sent), `"User":{}`)
}
