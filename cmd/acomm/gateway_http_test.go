package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"
)

// countingListener accepts at once, as often as it is asked.
type countingListener struct {
	net.Listener
	accepted int
}

func (l *countingListener) Accept() (net.Conn, error) { l.accepted++; return nil, nil }
func (l *countingListener) Close() error              { return nil }

func TestLimitedListener_AcceptsOnlyWhileFewerAreOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := &countingListener{}
		l := newLimitedListener(inner, 2)
		ended := make(chan error)
		go func() {
			for {
				if _, err := l.Accept(); err != nil {
					ended <- err
					return
				}
			}
		}()
		synctest.Wait()
		require.Equal(t, 2, inner.accepted)
		l.connState(nil, http.StateActive)
		l.connState(nil, http.StateIdle)
		synctest.Wait()
		require.Equal(t, 2, inner.accepted)
		l.connState(nil, http.StateClosed)
		synctest.Wait()
		require.Equal(t, 3, inner.accepted)
		l.connState(nil, http.StateHijacked)
		synctest.Wait()
		require.Equal(t, 4, inner.accepted)
		require.NoError(t, l.Close(), "ends an Accept that waits")
		require.NoError(t, l.Close())
		require.ErrorIs(t, <-ended, net.ErrClosed)
	})
}

// Hazard: the place of a connection that ended in the middle of a header is never
// free again.
func TestGateway_PlaceOfABrokenConnectionIsFreeAgain(t *testing.T) {
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
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := &gateway{opts: &gatewayOptions{maxBody: 1 << 20, maxHeader: 64 << 10}, timeouts: timeouts, lines: rate.NewLimiter(10, 10)}
	g.metrics = newGatewayMetrics(g.pending.Load)
	front := newLimitedListener(tcp, 10)
	server := g.newServer(front, io.Discard)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(front) }()
	t.Cleanup(func() { _ = server.Close(); <-served })
	return tcp.Addr().String()
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
