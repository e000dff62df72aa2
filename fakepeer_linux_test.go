package acomm_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Peers of sessions that the tests play themselves, frame by frame. Where sessions carry
// messages both ways, A and B are those of PROTOCOL.md: A has opened the session X to a
// listener of B, and B the session Y to a listener of A, which is the hook of A's requests.

// rawFrame is a frame on a session.
func rawFrame(kind, size, number uint32, payload string) []byte {
	frame := binary.BigEndian.AppendUint32(nil, kind<<28|size)
	frame = binary.BigEndian.AppendUint32(frame, number)
	return append(frame, payload...)
}

const (
	frameMessage = 8
	frameCancel  = 9
	frameAnswer  = 10
	frameStop    = 11
	frameTarget  = 12

	// The tokens of processes of these tests: one is less than that of the library's
	// process, nearly always, and one greater.
	lesserToken  = "\x00\x0023456789abcdef"
	greaterToken = "\xff\xff23456789abcdef"
)

// readFrame reads a frame.
func readFrame(conn net.Conn) (kind, number uint32, payload string, err error) {
	var header [8]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return 0, 0, "", err
	}
	word := binary.BigEndian.Uint32(header[:])
	data := make([]byte, word&(1<<28-1))
	_, err = io.ReadFull(conn, data)
	return word >> 28, binary.BigEndian.Uint32(header[4:]), string(data), err
}

// targetFrame names a listener.
func targetFrame(file socketFile) []byte {
	f := rawFrame(frameTarget, 16, 0, "")
	f = binary.BigEndian.AppendUint64(f, file.device)
	return binary.BigEndian.AppendUint64(f, file.inode)
}

// socketFile is what names a socket file in a target.
type socketFile struct{ device, inode uint64 }

func fileAt(t testing.TB, path string) socketFile {
	t.Helper()
	var st syscall.Stat_t
	require.NoError(t, syscall.Stat(path, &st))
	return socketFile{uint64(st.Dev), st.Ino}
}

// writeMessage writes a message.
func writeMessage(t testing.TB, conn net.Conn, number uint32, text string) {
	t.Helper()
	_, err := conn.Write(rawFrame(frameMessage, uint32(len(text)), number, text))
	require.NoError(t, err)
}

// acceptMessage answers a message.
func acceptMessage(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	_, err := conn.Write(rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, err)
}

// Plain frames that acknowledge; the other one says that there may be a session.
var (
	accepted = string(plainFrame(`{"error":""}`))
	offering = string(plainFrame(`{"error":"","sessions":1}`))
)

// requireFrame reads a frame and returns its payload.
func requireFrame(t testing.TB, conn net.Conn, kind, number uint32) string {
	t.Helper()
	k, n, payload, err := readFrame(conn)
	require.NoError(t, err)
	require.Equal(t, []uint32{kind, number}, []uint32{k, n}, "with %q", payload)
	return payload
}

// requireAccepted reads the answer that accepts a message.
func requireAccepted(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	require.Contains(t, requireFrame(t, conn, frameAnswer, number), `"error":""`)
}

// requireClosing reads that the session is over, and closes it.
func requireClosing(t testing.TB, conn net.Conn) {
	t.Helper()
	requireFrame(t, conn, frameStop, 0)
	require.NoError(t, conn.Close())
}

// accepted2016 is the frame that acknowledges, to the byte, as of 2016.
func accepted2016(t testing.TB) string {
	t.Helper()
	golden, err := os.ReadFile(filepath.Join("testdata", "wire", "ack-accepted.bin"))
	require.NoError(t, err)
	return string(golden)
}

// requirePlain has an exchange as of 2016, to the byte.
func requirePlain(t testing.TB, conn net.Conn) {
	t.Helper()
	_, err := conn.Write(plainFrame(`{"id":1}`))
	require.NoError(t, err)
	all, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, accepted2016(t), string(all))
}

var socketNames atomic.Int64

// dialNamed connects as a sender that can have sessions, or with the other name, as one
// that opens a session.
func dialNamed(t testing.TB, path, name string) *net.UnixConn {
	t.Helper()
	name = fmt.Sprintf("%stest-%d-%d", name, os.Getpid(), socketNames.Add(1))
	return dialFrom(t, &net.UnixAddr{Name: name, Net: "unix"}, path)
}

// openRaw opens a session to the listener, as PROTOCOL.md says.
func openRaw(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	return openRawWith(t, path, lesserToken)
}

// openRawWith is openRaw with another token.
func openRawWith(t testing.TB, path, own string) *net.UnixConn {
	t.Helper()
	conn := dialNamed(t, path, acomm.SessionName)
	token, err := greet(conn, own)
	require.NoError(t, err)
	require.NotEqual(t, strings.Repeat("\x00", len(token)), token)
	return conn
}

// greet reads the listener's greeting, and returns the sender's.
func greet(conn net.Conn, own string) (token string, err error) {
	greeting := make([]byte, len(acomm.Greeting)+len(lesserToken))
	if _, err := io.ReadFull(conn, greeting); err != nil {
		return "", err
	}
	if string(greeting[:len(acomm.Greeting)]) != acomm.Greeting {
		return "", fmt.Errorf("greeted with %q", greeting)
	}
	_, err = io.WriteString(conn, acomm.Greeting+own)
	return string(greeting[len(acomm.Greeting):]), err
}

// greetSender writes the listener's greeting, and reads the sender's.
func greetSender(t testing.TB, conn net.Conn, own string) {
	t.Helper()
	_, err := io.WriteString(conn, acomm.Greeting+own)
	require.NoError(t, err)
	greeting := make([]byte, len(acomm.Greeting)+len(own))
	_, err = io.ReadFull(conn, greeting)
	require.NoError(t, err)
	require.Equal(t, acomm.Greeting, string(greeting[:len(acomm.Greeting)]))
}

// rawListener is a listener of the test that speaks the protocol, as it likes.
type rawListener struct {
	t testing.TB
	net.Listener
	addr *url.URL
}

// newRawListener lets this process have sessions, too.
func newRawListener(t testing.TB) *rawListener {
	t.Helper()
	processWithSessions(t)
	return newRawListenerAlone(t)
}

// newRawListenerAlone is where the test, or another process, sees to that.
func newRawListenerAlone(t testing.TB) *rawListener {
	t.Helper()
	path := filepath.Join(shortDir(t), "s.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return &rawListener{t, l, unixURL(path)}
}

// accept takes a connection and its first message.
func (l *rawListener) accept() (net.Conn, note) {
	l.t.Helper()
	require.NoError(l.t, l.Listener.(*net.UnixListener).SetDeadline(time.Now().Add(patience)))
	conn, err := l.Accept()
	require.NoError(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	require.NoError(l.t, conn.SetDeadline(time.Now().Add(patience)))
	var n note
	require.NoError(l.t, acomm.UnmarshalConnData(conn, &n))
	return conn, n
}

// offer has a plain exchange, and acknowledges that there may be a session.
func (l *rawListener) offer() {
	l.t.Helper()
	sent := sendAsync(l.addr, note{ID: -1})
	conn, _ := l.accept()
	l.write(conn, []byte(offering))
	require.NoError(l.t, within(l.t, sent, "the plain exchange"))
	require.ErrorIs(l.t, readOne(conn), io.EOF, "that connection stays a plain one")
	require.NoError(l.t, conn.Close())
}

// acceptSession takes the connection that is to be a session.
func (l *rawListener) acceptSession() net.Conn {
	l.t.Helper()
	require.NoError(l.t, l.Listener.(*net.UnixListener).SetDeadline(time.Now().Add(patience)))
	conn, err := l.Accept()
	require.NoError(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	require.NoError(l.t, conn.SetDeadline(time.Now().Add(patience)))
	require.True(l.t, strings.HasPrefix(conn.RemoteAddr().String(), acomm.SessionName), conn.RemoteAddr())
	return conn
}

// open has a plain exchange, and the session that follows.
func (l *rawListener) open() net.Conn {
	l.t.Helper()
	return l.openWith(lesserToken)
}

// openNext is open after another session has ended.
func (l *rawListener) openNext() net.Conn {
	l.t.Helper()
	await(l.t, "the end of the session before", func() bool { return !acomm.SessionTo(l.addr.Path).Known })
	return l.open()
}

// openWith is open with another token.
func (l *rawListener) openWith(token string) net.Conn {
	l.t.Helper()
	l.offer()
	conn := l.acceptSession()
	greetSender(l.t, conn, token)
	await(l.t, "the session", func() bool { return acomm.SessionTo(l.addr.Path).Open })
	return conn
}

// message reads a message.
func (l *rawListener) message(conn net.Conn) (number uint32, payload string) {
	l.t.Helper()
	kind, number, payload, err := readFrame(conn)
	require.NoError(l.t, err)
	require.EqualValues(l.t, frameMessage, kind)
	return number, payload
}

func (l *rawListener) write(conn net.Conn, data []byte) {
	l.t.Helper()
	_, err := conn.Write(data)
	require.NoError(l.t, err)
}

// serveAlone answers one message on a connection of its own.
func (l *rawListener) serveAlone() note {
	l.t.Helper()
	conn, n := l.accept()
	l.write(conn, []byte(accepted))
	conn.Close()
	return n
}

// rawB is a test that plays B.
type rawB struct {
	l *rawListener // of B
	s *noteService // of A
	x net.Conn
	y *net.UnixConn
}

func newRawB(t testing.TB, how map[string]handling) *rawB {
	t.Helper()
	b := &rawB{l: newRawListener(t)}
	b.s = startNotes(t, filepath.Join(shortDir(t), "a.sock"), 0, how)
	b.x = b.l.openWith(greaterToken)
	b.openY(t)
	return b
}

// openY opens Y, and has an exchange there: so the greeting was read.
func (b *rawB) openY(t testing.TB) {
	t.Helper()
	b.y = openRawWith(t, b.s.Addr(), greaterToken)
	b.settle(t, b.y, 1)
}

// settle has an exchange on Y.
func (b *rawB) settle(t testing.TB, y net.Conn, number uint32) {
	t.Helper()
	writeMessage(t, y, number, `{"id":-1}`)
	requireAccepted(t, y, number)
}

// target names the listener of A on X.
func (b *rawB) target(t testing.TB) {
	t.Helper()
	b.l.write(b.x, targetFrame(fileAt(t, b.s.Addr())))
}

// requireRefused sends a message on X, and reads that it is not served.
func (b *rawB) requireRefused(t testing.TB) {
	t.Helper()
	writeMessage(t, b.x, 1, `{}`)
	requireFrame(t, b.x, frameStop, 0)
}

// requireBackward has an exchange on X in the direction of those that made it.
func (b *rawB) requireBackward(t testing.TB) {
	t.Helper()
	sent := sendAsync(b.l.addr, note{})
	number, _ := b.l.message(b.x)
	acceptMessage(t, b.x, number)
	require.NoError(t, within(t, sent, "the acknowledgement"))
}

// rawA is a test that plays A.
type rawA struct {
	l    *rawListener // of A, the hook
	r    *responder   // of B
	x    *net.UnixConn
	y    net.Conn
	last uint32 // number of the last request
}

func newRawA(t testing.TB) *rawA {
	t.Helper()
	a := &rawA{l: newRawListener(t)}
	a.r = startResponder(t, respond, nil)
	a.y = a.l.open()
	a.x = openRaw(t, a.r.Addr())
	return a
}

// request sends one on X and reads its acknowledgement.
func (a *rawA) request(t testing.TB) {
	t.Helper()
	text, err := json.Marshal(requestTo(a.l.addr, "task", ""))
	require.NoError(t, err)
	a.last++
	writeMessage(t, a.x, a.last, string(text))
	requireAccepted(t, a.x, a.last)
}

// requireResponse takes a response and acknowledges it.
func (a *rawA) requireResponse(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	var resp acomm.Response
	require.NoError(t, json.Unmarshal([]byte(requireFrame(t, conn, frameMessage, number)), &resp))
	require.Equal(t, "1", resp.ID)
	acceptMessage(t, conn, number)
	require.NoError(t, within(t, a.r.replied, "the responder"))
}

// target has the library name the listener of A on X.
func (a *rawA) target(t testing.TB) {
	t.Helper()
	a.request(t)
	a.requireResponse(t, a.y, 1)
	a.requireTarget(t)
}

// requireTarget reads that what follows on X is for the listener of A.
func (a *rawA) requireTarget(t testing.TB) {
	t.Helper()
	require.Equal(t, string(targetFrame(fileAt(t, a.l.addr.Path))[8:]), requireFrame(t, a.x, frameTarget, 0))
	require.True(t, acomm.SessionTo(a.l.addr.Path).Carried)
}
