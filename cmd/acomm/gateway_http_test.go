package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"
)

// countingListener accepts at once, as often as it is asked.
type countingListener struct{ net.Listener }

// closable is a connection that is open or closed.
type closable struct {
	net.Conn
	closed bool
}

func (c *closable) Close() error { c.closed = true; return nil }

func (l countingListener) Accept() (net.Conn, error) { return &closable{}, nil }
func (l countingListener) Close() error              { return nil }

func TestLimitedListener_HandsOutOnlyWhileFewerAreOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimitedListener(countingListener{}, 2)
		ended := make(chan error)
		var conns []*closable
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				conns = append(conns, conn.(*closable))
			}
		}()
		synctest.Wait()
		require.Len(t, conns, 2)
		l.connState(conns[0], http.StateActive)
		l.connState(conns[1], http.StateActive)
		synctest.Wait()
		require.Len(t, conns, 2)
		l.connState(conns[0], http.StateClosed)
		synctest.Wait()
		require.Len(t, conns, 3)
		l.connState(conns[1], http.StateHijacked)
		synctest.Wait()
		require.Len(t, conns, 4)
		require.False(t, conns[2].closed || conns[3].closed)

		l.connState(conns[3], http.StateIdle)
		l.connState(conns[2], http.StateIdle)
		synctest.Wait()
		require.True(t, conns[3].closed, "the longest idle one makes room")
		require.False(t, conns[2].closed, "one is enough")
		require.Len(t, conns, 4, "it may still be in use")
		l.connState(conns[3], http.StateClosed)
		synctest.Wait()
		require.Len(t, conns, 5)

		require.NoError(t, l.Close(), "ends an Accept that waits")
		require.NoError(t, l.Close())
		require.ErrorIs(t, <-ended, net.ErrClosed)
	})
}

// Hazard: the place of a connection that ended in the middle of a header is never
// free again.
func TestGateway_PlaceOfABrokenConnectionIsFreeAgain(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-connections", "1")
	silent, err := net.Dial("tcp", g.url.Host)
	require.NoError(t, err)
	_, err = silent.Write([]byte("GET /healthz HTTP/1.1\r\nHost: x\r\n"))
	require.NoError(t, err)
	require.NoError(t, silent.Close())
	status, _ := g.get("healthz")
	require.Equal(t, http.StatusOK, status)
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	g.stop()
}

// startHTTP serves the HTTP front alone, with time-outs of the test's own.
func startHTTP(t *testing.T, timeouts httpTimeouts) (addr string) {
	t.Helper()
	_, addr = startHTTPWith(t, timeouts, &gatewayOptions{})
	return addr
}

// startHTTPWith also takes options, and returns the gateway. It has no sockets: the test
// hands it the responses of its providers.
func startHTTPWith(t *testing.T, timeouts httpTimeouts, opts *gatewayOptions) (*gateway, string) {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	opts.maxBody, opts.maxHeader, opts.maxOutstanding = 1<<20, 64<<10, 10
	base := &url.URL{Scheme: "http", Host: tcp.Addr().String(), Path: "/stream"}
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "r.sock"), base, patience)
	require.NoError(t, err)
	g := &gateway{
		opts: opts, access: &access{opts: opts}, timeouts: timeouts, lines: rate.NewLimiter(10, 10),
		tracker: tracker, hook: tracker.URL(), ending: make(chan struct{}),
	}
	g.metrics = newGatewayMetrics(g.pending.Load)
	front := newLimitedListener(tcp, 10)
	server := g.newServer(front, io.Discard)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(front) }()
	t.Cleanup(func() { _ = server.Close(); <-served })
	return g, tcp.Addr().String()
}

func dialHTTP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	return conn.(*net.TCPConn)
}

func TestGateway_BodyHasToArriveInTime(t *testing.T) {
	t.Parallel()
	conn := dialHTTP(t, startHTTP(t, httpTimeouts{body: 50 * time.Millisecond, answer: patience}))
	_, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
	require.NoError(t, err)
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	defer answer.Body.Close()
	require.Equal(t, http.StatusRequestTimeout, answer.StatusCode)
	resp := &acomm.Response{}
	require.NoError(t, json.NewDecoder(answer.Body).Decode(resp))
	require.EqualError(t, resp.Error, "the request did not arrive within 50ms")
}

// Hazard: a client that takes no answers holds its place for ever.
func TestGateway_AnswersHaveToBeTakenInTime(t *testing.T) {
	t.Parallel()
	conn := dialHTTP(t, startHTTP(t, httpTimeouts{body: patience, answer: 200 * time.Millisecond}))
	require.NoError(t, conn.SetReadBuffer(4<<10))
	var err error
	for err == nil { // until the answers fill all buffers
		_, err = io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the connection is open")
}

func TestHTTPTimeouts_AreThoseOfTheHelp(t *testing.T) {
	require.Equal(t, httpTimeouts{body: time.Minute, answer: 2 * time.Minute}, defaultHTTPTimeouts)
}

func TestGateway_HeadersOverTheLimitAreRefused(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-header", "1KiB")
	conn := dialHTTP(t, g.url.Host)
	_, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 8<<10)+"\r\n\r\n")
	require.NoError(t, err)
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	defer answer.Body.Close()
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, answer.StatusCode)
	g.stop()
}

// Hazard: idle connections take all places, and a look at the health waits a minute.
func TestLimitedListener_ClosesTheLongestIdle(t *testing.T) {
	l := newLimitedListener(nil, 2)
	first, firstPeer := net.Pipe()
	second, secondPeer := net.Pipe()
	require.True(t, l.enter())
	require.True(t, l.enter())
	for _, change := range []struct {
		conn  net.Conn
		state http.ConnState
	}{{first, http.StateIdle}, {second, http.StateIdle}, {first, http.StateActive}, {first, http.StateIdle}} {
		l.connState(change.conn, change.state)
	}
	require.NoError(t, secondPeer.SetReadDeadline(time.Now().Add(patience)))
	require.False(t, l.enter(), "there is a place once it is closed")
	_, err := secondPeer.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "it is idle for longer")
	require.False(t, l.enter(), "no other is closed for the same one")
	require.NoError(t, firstPeer.SetReadDeadline(time.Now()))
	_, err = firstPeer.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	l.connState(second, http.StateClosed)
	require.True(t, l.enter())
	require.NoError(t, first.Close())
}

func TestGateway_LongestIdleConnectionGivesItsPlaceToANewOne(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-connections", "3")
	source, w := io.Pipe()
	stream := g.provideStream("read", source)
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	ask := func(conn net.Conn, path string) *http.Response {
		_, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
		require.NoError(t, err)
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, answer.StatusCode)
		return answer
	}
	busy := dialHTTP(t, g.url.Host)
	go func() { _, _ = io.WriteString(w, "a") }()
	reading := ask(busy, stream.RequestURI())
	var idle [4]*net.TCPConn
	for i := range idle {
		idle[i] = dialHTTP(t, g.url.Host)
		answer := ask(idle[i], "/healthz")
		_, _ = io.Copy(io.Discard, answer.Body)
		_ = answer.Body.Close()
	}
	// Two of the first three were closed. Which, is for the next test: the server notes
	// that one is idle a moment after its client could see it.
	closed := make(chan error, 3)
	for _, conn := range idle[:3] {
		go func() { // ends with its connection, or with the answer below
			_, err := conn.Read(make([]byte, 1))
			closed <- err
		}()
	}
	require.ErrorIs(t, gwWithin(t, closed), io.EOF)
	require.ErrorIs(t, gwWithin(t, closed), io.EOF)
	for _, conn := range idle[:3] {
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
	}
	require.NoError(t, gwWithin(t, closed), "the third is served")
	answer := ask(idle[3], "/healthz")
	_, _ = io.Copy(io.Discard, answer.Body)
	_ = answer.Body.Close()
	go func() { _, _ = io.WriteString(w, "b"); _ = w.Close() }()
	got, err := io.ReadAll(reading.Body)
	require.NoError(t, err, "one that is in use stays")
	require.Equal(t, "ab", string(got))
	for _, conn := range idle {
		_ = conn.Close()
	}
	g.stop()
}
