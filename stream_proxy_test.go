package acomm_test

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What ProxyStreamHandler serves, and ProxyStreamHTTPURL publishes.

// streamProxy is a tracker and a server with the handler it publishes streams on.
func streamProxy(t testing.TB) (*acomm.Tracker, *httptest.Server) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	base, err := url.Parse(server.URL + "/stream?keep=1")
	require.NoError(t, err)
	return newStreamTracker(t, base), server
}

// get returns the status and the body of a GET.
func get(t testing.TB, u *url.URL) (int, []byte, error) {
	t.Helper()
	resp, err := http.Get(u.String())
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

func TestProxyStreamHTTPURL_AddsToTheTrackersURL(t *testing.T) {
	tracker, server := streamProxy(t)
	addr := unixURL("/a b?c#d%")
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(u.String(), server.URL+"/stream?"), u)
	require.Equal(t, "1", u.Query().Get("keep"))
	again, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	require.Equal(t, u, again)

	_, err = tracker.ProxyStreamHTTPURL(nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = newTracker(t).ProxyStreamHTTPURL(addr)
	require.ErrorIs(t, err, fs.ErrInvalid)
}

func TestProxyStreamHTTPURL_FragmentStaysBehind(t *testing.T) {
	tracker, _ := streamProxy(t)
	paths := make(chan string, 1)
	peer := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) { paths <- r.URL.Path })
	peer.Fragment = "part"
	u, err := tracker.ProxyStreamHTTPURL(peer)
	require.NoError(t, err)
	status, _, _ := get(t, u)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "/hook", within(t, paths, "the request"))
}

func TestProxyStreamHandler_CarriesAllBytes(t *testing.T) {
	tracker, _ := streamProxy(t)
	dir := filepath.Join(shortDir(t), "a b%c?d#e")
	for _, size := range []int{0, 1, 32 << 10, 1<<20 + 1} {
		want := randomBytes(size)
		addr, err := tracker.NewStreamUnix(dir, bytesSource(want))
		require.NoError(t, err)
		u, err := tracker.ProxyStreamHTTPURL(addr)
		require.NoError(t, err)
		resp, err := http.Get(u.String())
		require.NoError(t, err)
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Equal(t, "application/octet-stream", resp.Header.Get("Content-Type"))
		require.Equal(t, "nosniff", resp.Header.Get("X-Content-Type-Options"))
		require.True(t, bytes.Equal(want, got))

		status, _, _ := get(t, u)
		require.Equal(t, http.StatusNotFound, status, "it was for one consumer")
	}
}

// Hazard: HEAD consumed a stream.
func TestProxyStreamHandler_OnlyGetReadsAStream(t *testing.T) {
	tracker, _ := streamProxy(t)
	addr, err := tracker.NewStreamUnix("", bytesSource([]byte("still here")))
	require.NoError(t, err)
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	for _, method := range []string{"HEAD", "POST", "PUT", "DELETE", "OPTIONS"} {
		req, err := http.NewRequest(method, u.String(), nil)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, http.StatusMethodNotAllowed, resp.StatusCode)
		require.Equal(t, "GET", resp.Header.Get("Allow"))
	}
	_, body, err := get(t, u)
	require.NoError(t, err)
	require.Equal(t, "still here", string(body))
}

// Hazard: net/http does not see a client leave that sent a body nobody reads, and
// the source would be held until it speaks.
func TestProxyStreamHandler_RefusesABody(t *testing.T) {
	tracker, _ := streamProxy(t)
	addr, err := tracker.NewStreamUnix("", bytesSource([]byte("still here")))
	require.NoError(t, err)
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	for _, body := range []io.Reader{strings.NewReader("body"), io.MultiReader(strings.NewReader("chunked"))} {
		req, err := http.NewRequest("GET", u.String(), body)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, http.StatusBadRequest, resp.StatusCode)
	}
	_, body, err := get(t, u)
	require.NoError(t, err)
	require.Equal(t, "still here", string(body))
}

func TestProxyStreamHandler_StatusOfTheSourceDecides(t *testing.T) {
	tracker, _ := streamProxy(t)
	for status, want := range map[int]int{200: 200, 404: 404, 410: 404, 403: 502, 500: 502} {
		peer := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "data")
		})
		u, err := tracker.ProxyStreamHTTPURL(peer)
		require.NoError(t, err)
		got, body, err := get(t, u)
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, want == 200, string(body) == "data")
	}
	for _, addr := range []*url.URL{{Scheme: "gopher", Host: "h"}, {Scheme: "unix", Path: "/" + strings.Repeat("x", 200)}} {
		u, err := tracker.ProxyStreamHTTPURL(addr)
		require.NoError(t, err)
		got, _, _ := get(t, u)
		require.Equal(t, http.StatusBadGateway, got)
	}
}

// Hazard: a signed address that redirects leads to one that nobody signed.
func TestProxyStreamHandler_FollowsNoRedirect(t *testing.T) {
	tracker, _ := streamProxy(t)
	touched := make(chan struct{}, 10)
	internal := httpPeer(t, func(http.ResponseWriter, *http.Request) { touched <- struct{}{} })
	for _, status := range []int{301, 302, 303, 307, 308} {
		outside := httpPeer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, internal.String(), status) })
		u, err := tracker.ProxyStreamHTTPURL(outside)
		require.NoError(t, err)
		got, _, err := get(t, u)
		require.NoError(t, err)
		require.Equal(t, http.StatusBadGateway, got)
	}
	require.Empty(t, touched)
}

// Hazard: a stream that was cut off looked complete.
func TestProxyStreamHandler_FailureAbortsTheConnection(t *testing.T) {
	tracker, _ := streamProxy(t)
	peer := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery == "" {
			_, _ = io.WriteString(w, "half")
		}
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	u, err := tracker.ProxyStreamHTTPURL(peer)
	require.NoError(t, err)
	status, body, err := get(t, u)
	require.Equal(t, http.StatusOK, status)
	require.Error(t, err)
	require.Equal(t, "half", string(body))

	peer.RawQuery = "fail=at-once"
	u, err = tracker.ProxyStreamHTTPURL(peer)
	require.NoError(t, err)
	status, _, err = get(t, u)
	require.NoError(t, err)
	require.Equal(t, http.StatusBadGateway, status, "before the first byte")
}

func TestProxyStreamHandler_FlushesEachPieceAndReleasesTheSource(t *testing.T) {
	tracker, _ := streamProxy(t)
	src := newSource()
	addr, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	ctx, leave := context.WithCancel(context.Background())
	defer leave()
	req, err := http.NewRequestWithContext(ctx, "GET", u.String(), nil)
	require.NoError(t, err)
	fed := async(func() { _, _ = src.feed.Write([]byte("piece")) })
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	piece := make([]byte, 5)
	_, err = io.ReadFull(resp.Body, piece) // the source goes on, the piece is here
	require.NoError(t, err)
	require.Equal(t, "piece", string(piece))
	within(t, fed, "the feeder")
	leave()
	src.requireClosedOnce(t)
}

// holdingWriter holds back what is written until it is flushed, as what compresses
// an answer does.
type holdingWriter struct {
	header  http.Header
	write   func() // runs before each write
	held    []byte
	flushed chan []byte
}

func (w *holdingWriter) Header() http.Header { return w.header }

func (w *holdingWriter) WriteHeader(int) {}

func (w *holdingWriter) Write(p []byte) (int, error) {
	w.write()
	w.held = append(w.held, p...)
	return len(p), nil
}

func (w *holdingWriter) Flush() {
	w.flushed <- w.held
	w.held = nil
}

// serveHeld has the handler answer to a writer that holds back. The channel gets
// what the handler panicked with, if anything.
func serveHeld(t testing.TB, tracker *acomm.Tracker, addr *url.URL, write func()) (*holdingWriter, <-chan any) {
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	w := &holdingWriter{header: make(http.Header), write: write, flushed: make(chan []byte, 100)}
	ended := make(chan any, 1)
	go func() {
		defer func() { ended <- recover() }()
		acomm.ProxyStreamHandler(w, httptest.NewRequest("GET", u.String(), nil))
	}()
	return w, ended
}

// Hazard: a source that has filled the buffer, to the byte, looks as if there were
// more to come at once; if it pauses then, its consumer must see it all.
func TestProxyStreamHandler_FlushesBeforeEachPause(t *testing.T) {
	const buffer = 32 << 10
	tracker, _ := streamProxy(t)
	for _, size := range []int{1, buffer - 1, buffer, buffer + 1, 2 * buffer, 9 * buffer} {
		src := newSource()
		addr, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		w, ended := serveHeld(t, tracker, addr, func() {})
		for range 3 {
			data := randomBytes(size)
			fed := async(func() { _, _ = src.feed.Write(data) })
			var got []byte
			for len(got) < size {
				got = append(got, within(t, w.flushed, "all that was read")...)
			}
			require.True(t, bytes.Equal(data, got))
			within(t, fed, "the feeder")
		}
		require.NoError(t, src.feed.Close())
		require.Nil(t, within(t, ended, "the handler"))
	}
}

// Hazards: what came before a failure is held back; a failure that is found while
// there is nothing to wait for is taken for a pause, and the stream looks complete.
func TestProxyStreamHandler_FailureBehindDataIsSeen(t *testing.T) {
	onlyLinux(t)
	tracker, _ := streamProxy(t)
	addr := unixURL(filepath.Join(shortDir(t), "x.eof"))
	l, err := net.Listen("unix", addr.Path)
	require.NoError(t, err)
	defer l.Close()
	failed := make(chan struct{})
	w, ended := serveHeld(t, tracker, addr, func() { <-failed })
	conn, err := l.Accept()
	require.NoError(t, err)
	require.NoError(t, awaitBytes(conn, 1), "the consumer's byte is there, and stays")
	_, err = conn.Write([]byte("half"))
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	close(failed)
	require.Equal(t, http.ErrAbortHandler, within(t, ended, "the handler"))
	require.Equal(t, "half", string(within(t, w.flushed, "what came before")))
}
