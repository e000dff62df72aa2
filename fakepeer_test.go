package acomm_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Peers that the tests play themselves, frame by frame: sockets and HTTP servers that do
// as they are told, services as users write them, and the peer of 2016, which is written
// from PROTOCOL.md and uses nothing of the library.

// plainFrame is the payload as a frame: its length in four bytes, and itself.
func plainFrame(payload string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), payload...)
}

// connPair returns the two ends of a unix stream connection.
func connPair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	ends := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conn, err := net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		t.Cleanup(func() { conn.Close() })
		ends[i] = conn.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

// dial connects to a unix socket. The connection is closed with the test.
func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	return dialFrom(t, nil, path)
}

// dialFrom is dial from a socket with an address of its own.
func dialFrom(t testing.TB, local *net.UnixAddr, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", local, &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	return conn
}

// treatEach treats the connections of a listener, one after the other, and closes them.
// The listener is closed with the test.
func treatEach(t testing.TB, l net.Listener, treat func(net.Conn)) {
	treated := async(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			treat(conn)
			conn.Close()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		<-treated
	})
}

// unixPeer is a unix socket that treats each connection as it is told.
func unixPeer(t testing.TB, treat func(net.Conn)) *url.URL {
	t.Helper()
	path := filepath.Join(t.TempDir(), "peer.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	treatEach(t, l, treat)
	return unixURL(path)
}

// listenPlain listens without the library. Close leaves the file.
func listenPlain(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	return l
}

// leaveDeadSocket makes a socket file that nobody listens on, as a process that
// was killed leaves it.
func leaveDeadSocket(t *testing.T, path string) {
	t.Helper()
	require.NoError(t, listenPlain(t, path).Close())
}

// bindOnly makes a stream socket that does not listen yet.
func bindOnly(t *testing.T, path string) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	syscall.CloseOnExec(fd)
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}))
	return fd
}

// drainedConn is a connection whose other side reads all.
func drainedConn(t *testing.T, network, address string) net.Conn {
	l, err := net.Listen(network, address)
	require.NoError(t, err)
	defer l.Close()
	conn, err := net.Dial(network, l.Addr().String())
	require.NoError(t, err)
	other, err := l.Accept()
	require.NoError(t, err)
	drained := async(func() {
		_, _ = io.Copy(io.Discard, other)
		other.Close()
	})
	t.Cleanup(func() {
		conn.Close()
		<-drained
	})
	return conn
}

// httpPeer is a real HTTP server with a handler.
func httpPeer(t testing.TB, handler http.HandlerFunc) *url.URL {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL + "/hook")
	require.NoError(t, err)
	return u
}

// forwardHook is an HTTP response hook that keeps what it is sent.
type forwardHook struct {
	url    *url.URL
	bodies chan []byte // every body it was sent
}

// newForwardHook starts a hook that answers as the handler does; nil accepts.
func newForwardHook(t testing.TB, answer http.HandlerFunc) *forwardHook {
	t.Helper()
	hook := &forwardHook{bodies: make(chan []byte, 100)}
	hook.url = httpPeer(t, hook.handler(answer))
	return hook
}

func (h *forwardHook) handler(answer http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			body = []byte(err.Error())
		}
		if r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
			body = []byte(r.Method + " " + r.Header.Get("Content-Type"))
		}
		h.bodies <- body
		if answer != nil {
			answer(w, r)
		}
	}
}

// unboundPort reserves a TCP port where nobody listens until listen is called.
func unboundPort(t testing.TB) (addr string, listen func() net.Listener) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	socket := os.NewFile(uintptr(fd), "reserved port")
	t.Cleanup(func() { _ = socket.Close() })
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	name, err := syscall.Getsockname(fd)
	require.NoError(t, err)
	addr = fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	return addr, func() net.Listener {
		require.NoError(t, syscall.Listen(fd, 16))
		listener, err := net.FileListener(socket)
		require.NoError(t, err)
		return listener
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func replaceTransport(t testing.TB, rt http.RoundTripper) {
	old := http.DefaultTransport
	http.DefaultTransport = rt
	t.Cleanup(func() { http.DefaultTransport = old })
}

// newTransport has Send use a transport of the test's own, as the default one comes.
func newTransport(t testing.TB) *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	replaceTransport(t, transport)
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

const secret = "what nobody outside may read"

// victim is a real listener that counts its connections and tells its secret to
// all of them.
type victim struct {
	t        testing.TB
	listener net.Listener
	url      *url.URL
	accepted atomic.Int64
}

func newVictim(t testing.TB, network, address string) *victim {
	t.Helper()
	l, err := net.Listen(network, address)
	require.NoError(t, err)
	v := &victim{t: t, listener: l, url: unixURL(address)}
	if network == "tcp" {
		v.url = &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/metadata"}
	}
	treatEach(t, l, func(conn net.Conn) {
		v.accepted.Add(1)
		if network == "tcp" {
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", len(secret))
		}
		_, _ = io.WriteString(conn, secret)
	})
	return v
}

// requireUntouched fails if anybody else has connected. Connections are accepted
// in their order, so ours is the last.
func (v *victim) requireUntouched() {
	v.t.Helper()
	conn, err := net.Dial(v.listener.Addr().Network(), v.listener.Addr().String())
	require.NoError(v.t, err)
	defer conn.Close()
	if v.url.Scheme == "http" {
		_, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
		require.NoError(v.t, err)
	}
	got, _ := io.ReadAll(conn)
	require.Contains(v.t, string(got), secret)
	require.EqualValues(v.t, 1, v.accepted.Load(), "%s was connected to", v.url)
}

// serveAll acknowledges everything that can be read.
func serveAll(ul *acomm.UnixListener) {
	for serveOne(ul) {
		continue
	}
}

// serveOne acknowledges the next message, if it can be read. It reports whether there was
// a connection.
func serveOne(ul *acomm.UnixListener) bool {
	conn := ul.NextConn()
	if conn == nil {
		return false
	}
	defer ul.DoneConn(conn)
	var message json.RawMessage
	if acomm.UnmarshalConnData(conn, &message) == nil {
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	return true
}

// takeRequest reads a request from the connection, does what is to be done
// before it is acknowledged, and acknowledges it.
func takeRequest(ul *acomm.UnixListener, conn net.Conn, before func(*acomm.Request)) (*acomm.Request, error) {
	defer ul.DoneConn(conn)
	req := &acomm.Request{}
	if err := acomm.UnmarshalConnData(conn, req); err != nil {
		return nil, err
	}
	before(req)
	return req, acomm.SendConnData(conn, &acomm.Response{ID: req.ID})
}

// provide serves a listener as a service does, each exchange within the time
// given. The channel is closed when the listener is stopped and all is served.
func provide(ul *acomm.UnixListener, d time.Duration) <-chan struct{} {
	return async(func() {
		var serving sync.WaitGroup
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			serving.Go(func() {
				defer ul.DoneConn(conn)
				if conn.SetDeadline(time.Now().Add(d)) != nil {
					return
				}
				req := &acomm.Request{}
				if acomm.UnmarshalConnData(conn, req) == nil {
					_ = acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: req.Validate()})
				}
			})
		}
		serving.Wait()
	})
}

// serveEach handles connections at the same time, or one after the other.
func serveEach(t testing.TB, oneByOne bool, handle func(ul *acomm.UnixListener, conn net.Conn)) *acomm.UnixListener {
	t.Helper()
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "e.sock"), 0)
	require.NoError(t, ul.Start())
	var handlers sync.WaitGroup
	served := async(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			if oneByOne {
				handle(ul, conn)
			} else {
				handlers.Go(func() { handle(ul, conn) })
			}
		}
		handlers.Wait()
	})
	t.Cleanup(func() {
		ul.Stop(time.Nanosecond)
		within(t, served, "the end of serving")
	})
	return ul
}

type request2016 struct {
	ID           string           `json:"id"`
	Task         string           `json:"task"`
	ResponseHook *url.URL         `json:"responsehook"`
	Args         *json.RawMessage `json:"args"`
}

type response2016 struct {
	ID        string           `json:"id"`
	Result    *json.RawMessage `json:"result"`
	StreamURL *url.URL         `json:"stream_url"`
	Error     string           `json:"error"`
}

// MarshalJSON writes a map, so the members are sorted.
func (r response2016) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{
		"id": r.ID, "result": r.Result, "stream_url": r.StreamURL, "error": r.Error,
	})
}

// oneSend is what Linux hands over to a reader as one from one write. A larger
// write it queues in pieces of 36 KiB, and a reader on another processor can be
// so quick that it finds the first ones only.
const oneSend = 32 << 10

// read2016 reads a frame with one read for each of its parts. What has not
// arrived by then stays zero. Where that would be left to luck, also among peers
// of 2016, it reads once the whole frame is there.
func read2016(conn net.Conn, dest any) error {
	header := make([]byte, 4)
	if _, err := conn.Read(header); err != nil {
		return err
	}
	data := make([]byte, binary.BigEndian.Uint32(header))
	if len(data) > oneSend {
		if err := awaitBytes(conn, len(data)); err != nil {
			return err
		}
	}
	if _, err := conn.Read(data); err != nil {
		return err
	}
	return json.Unmarshal(data, dest)
}

// awaitBytes waits until so many bytes can be read, or none will come, and reads none.
func awaitBytes(conn net.Conn, size int) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, size)
	var peekErr error
	err = raw.Read(func(fd uintptr) bool {
		var n int
		n, _, peekErr = syscall.Recvfrom(int(fd), buf, syscall.MSG_PEEK)
		return n == size || n == 0 && peekErr == nil || peekErr != nil && peekErr != syscall.EAGAIN
	})
	return errors.Join(err, peekErr)
}

func write2016(conn net.Conn, payload any) error {
	_, err := conn.Write(plainFrame(string(encode(payload))))
	return err
}

// send2016 returns the acknowledgement, or why there is none.
func send2016(addr *url.URL, payload any) (ack response2016, err error) {
	if addr.Scheme != "unix" {
		resp, err := http.Post(addr.String(), "application/json", bytes.NewReader(encode(payload)))
		if err != nil {
			return ack, err
		}
		defer resp.Body.Close()
		return ack, json.NewDecoder(resp.Body).Decode(&ack)
	}
	conn, err := net.Dial("unix", addr.Path)
	if err != nil {
		return ack, err
	}
	defer conn.Close()
	if err := write2016(conn, payload); err != nil {
		return ack, err
	}
	return ack, read2016(conn, &ack)
}

// serve2016 accepts connections on a socket, each with a goroutine.
func serve2016(name string, handle func(net.Conn)) *url.URL {
	path := filepath.Join(os.TempDir(), name+".sock")
	l, err := net.Listen("unix", path)
	orExit(err)
	go func() {
		for {
			conn, err := l.Accept()
			orExit(err)
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
	return unixURL(path)
}

// receive2016 is a response socket. Each response is acknowledged, then handled.
func receive2016(name string, handle func(response2016)) *url.URL {
	return serve2016(name, func(conn net.Conn) {
		var resp response2016
		if err := read2016(conn, &resp); err != nil {
			fmt.Fprintln(os.Stderr, "misread a response:", err)
			return
		}
		_ = write2016(conn, response2016{})
		handle(resp)
	})
}

// serveOnce2016 serves one connection on a socket, and closes the channel.
func serveOnce2016(name string, handle func(*net.UnixConn)) (*url.URL, <-chan struct{}) {
	path := filepath.Join(os.TempDir(), name+".sock")
	l, err := net.Listen("unix", path)
	orExit(err)
	return unixURL(path), async(func() {
		conn, err := l.Accept()
		l.Close()
		orExit(err)
		defer conn.Close()
		handle(conn.(*net.UnixConn))
	})
}

// stream2016 serves a stream to one consumer.
func stream2016(name string, src io.Reader) (*url.URL, <-chan struct{}) {
	return serveOnce2016(name, func(conn *net.UnixConn) { _, _ = io.Copy(conn, src) })
}

// consumer2016 is one that knows only the protocol of 2016: it sends nothing and
// takes the end of the connection for the end of the stream.
func consumer2016(dest io.Writer, u *url.URL) error {
	conn, err := net.Dial("unix", u.Path)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = io.Copy(dest, conn)
	return err
}
