package acomm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// source is a stream's source that counts its closing. Reads come from a pipe,
// so a test decides what the source says and when.
type source struct {
	*io.PipeReader
	feed   *io.PipeWriter
	closed chan struct{} // a value for each Close
}

func newSource() *source {
	r, w := io.Pipe()
	return &source{PipeReader: r, feed: w, closed: make(chan struct{}, 10)}
}

func (s *source) Close() error {
	s.closed <- struct{}{}
	return s.PipeReader.Close()
}

// requireClosedOnce waits for the source to be closed.
func (s *source) requireClosedOnce(t testing.TB) {
	t.Helper()
	within(t, s.closed, "the source to be closed")
	require.Empty(t, s.closed, "closed once")
}

func bytesSource(data []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(data)) }

func randomBytes(n int) []byte {
	data := make([]byte, n)
	_, _ = rand.Read(data)
	return data
}

func TestStream_CarriesAllBytes(t *testing.T) {
	tracker := newTracker(t)
	for _, size := range []int{0, 1, 32 << 10, 32<<10 + 1, 4 << 20} {
		want := randomBytes(size)
		u, err := tracker.NewStreamUnix("", bytesSource(want))
		require.NoError(t, err)
		var got bytes.Buffer
		require.NoError(t, acomm.Stream(&got, u))
		require.True(t, bytes.Equal(want, got.Bytes()), "size %d", size)
	}
}

func TestNewStreamUnix_SocketIsPrivateOrWhereAsked(t *testing.T) {
	tracker := newTracker(t)
	private, err := tracker.NewStreamUnix("", newSource())
	require.NoError(t, err)
	dir, err := os.Stat(filepath.Dir(private.Path))
	require.NoError(t, err)
	require.Equal(t, fs.ModeDir|0o700, dir.Mode())
	file, err := os.Stat(private.Path)
	require.NoError(t, err)
	require.Equal(t, fs.ModeSocket|0o600, file.Mode())

	given := filepath.Join(shortDir(t), "a b", "c")
	names := map[string]bool{}
	for range 10 {
		u, err := tracker.NewStreamUnix(given, newSource())
		require.NoError(t, err)
		require.Equal(t, given, filepath.Dir(u.Path))
		require.Len(t, filepath.Base(u.Path), 15, "66 random bits and the marker")
		names[u.Path] = true
	}
	require.Len(t, names, 10)
	tracker.Stop()
	left, err := os.ReadDir(given)
	require.NoError(t, err)
	require.Empty(t, left)
	require.NoDirExists(t, filepath.Dir(private.Path))
}

func TestNewStreamUnix_RefusalLeavesTheSourceToItsOwner(t *testing.T) {
	src := newSource()
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	_, err = tracker.NewStreamUnix("", src)
	require.ErrorIs(t, err, net.ErrClosed)
	require.NoError(t, tracker.Start())
	_, err = tracker.NewStreamUnix("", nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = tracker.NewStreamUnix(filepath.Join(t.TempDir(), strings.Repeat("x", acomm.MaxPath)), src)
	require.ErrorIs(t, err, syscall.ENAMETOOLONG)
	tracker.Stop()
	_, err = tracker.NewStreamUnix("", src)
	require.ErrorIs(t, err, net.ErrClosed)
	require.Empty(t, src.closed)
}

func TestNewStreamUnix_OneConsumer(t *testing.T) {
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	first := dialStream(t, u)
	_, err = src.feed.Write([]byte("x")) // taken, so the first has been accepted
	require.NoError(t, err)
	require.Error(t, acomm.Stream(io.Discard, u))
	require.NoFileExists(t, u.Path)
	src.feed.Close()
	got, err := io.ReadAll(first)
	require.NoError(t, err)
	require.Equal(t, "x", string(got))
	src.requireClosedOnce(t)
}

func TestNewStreamUnix_SourceIsReleasedWhenTheConsumerLeaves(t *testing.T) {
	tracker := newTracker(t)
	for _, sends := range []bool{false, true} { // consumers may leave a byte behind
		src := newSource() // silent: nothing is ever fed
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		conn := dialStream(t, u)
		if sends {
			_, err := conn.Write([]byte{1})
			require.NoError(t, err)
		}
		conn.Close()
		src.requireClosedOnce(t)
	}
}

// Hazard: where the consumer is not looked at each time it takes something, it may
// leave at a time when nobody looks, and the source says nothing any more.
func TestNewStreamUnix_SourceIsReleasedWhenTheConsumerLeavesInTheMiddle(t *testing.T) {
	tracker := newTracker(t)
	piece := make([]byte, 64<<10)
	for range 20 {
		src := newSource()
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		conn := dialStream(t, u)
		_, err = conn.Write([]byte{0})
		require.NoError(t, err)
		fed := async(func() {
			for range 10 {
				_, _ = src.feed.Write(piece)
			}
		})
		_, err = io.CopyN(io.Discard, conn, 10*int64(len(piece)))
		require.NoError(t, err)
		within(t, fed, "the feeder")
		conn.Close()
		src.requireClosedOnce(t)
	}
}

func TestNewStreamUnix_FailedSourceIsClosedAndLogged(t *testing.T) {
	lines := captureLog(t)
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	done := async(func() { _ = acomm.Stream(io.Discard, u) })
	src.feed.CloseWithError(errors.New("disk on fire"))
	src.requireClosedOnce(t)
	within(t, done, "the consumer")
	tracker.Stop()
	require.Contains(t, lines.String(), "disk on fire")
}

func TestNewStreamUnix_UnclaimedIsClosedInTime(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	tracker.SetStreamClaim(time.Millisecond)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	src.requireClosedOnce(t)
	require.Error(t, acomm.Stream(io.Discard, u))
}

// Hazard: streams created while the tracker stops were never closed.
func TestTracker_StopEndsStreamsNobodyClaimed(t *testing.T) {
	for range 20 {
		tracker := newTracker(t)
		var offering sync.WaitGroup
		for range 8 {
			offering.Go(func() {
				for {
					src := newSource()
					if _, err := tracker.NewStreamUnix("", src); err != nil {
						require.ErrorIs(t, err, net.ErrClosed)
						require.Empty(t, src.closed)
						return
					}
					defer src.requireClosedOnce(t)
				}
			})
		}
		tracker.Stop()
		offering.Wait()
	}
}

func TestTracker_StopWaitsForStreamsThatMove(t *testing.T) {
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	conn := dialStream(t, u)
	_, err = src.feed.Write([]byte("a"))
	require.NoError(t, err)
	stopped := async(tracker.Stop)
	for tracker.Start() == nil { // until Stop has begun
	}
	_, err = src.feed.Write([]byte("b"))
	require.NoError(t, err)
	require.NotPanics(t, func() {
		select {
		case <-stopped:
			panic("stopped before the stream ended")
		default:
		}
	})
	src.feed.Close()
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "ab", string(got))
	within(t, stopped, "Stop")
	src.requireClosedOnce(t)
}

func TestTracker_StopCutsOffStreamsThatStall(t *testing.T) {
	lines := captureLog(t)
	stall := func(t *testing.T, prepare func(*source, net.Conn)) {
		tracker, err := acomm.NewTracker("", nil, 0)
		require.NoError(t, err)
		tracker.SetStreamStall(10 * time.Millisecond)
		require.NoError(t, tracker.Start())
		src := newSource()
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		prepare(src, dialStream(t, u))
		within(t, async(tracker.Stop), "Stop")
		src.requireClosedOnce(t)
	}
	t.Run("silent source", func(t *testing.T) {
		stall(t, func(src *source, _ net.Conn) { _, _ = src.feed.Write([]byte("x")) })
	})
	t.Run("consumer that does not read", func(t *testing.T) {
		stall(t, func(src *source, _ net.Conn) {
			go func() {
				for {
					if _, err := src.feed.Write(make([]byte, 1<<20)); err != nil {
						return
					}
				}
			}()
		})
	})
	require.NotContains(t, lines.String(), "source failed", "it was cut off, it did not fail")
}

// slowToClose is a source whose Close waits.
type slowToClose struct {
	*source
	closing, release chan struct{}
}

func (s slowToClose) Close() error {
	close(s.closing)
	<-s.release
	return s.source.Close()
}

// Hazard: a source that was silent for longer than a whole stream is given to
// end, and then ended, was cut off at its end.
func TestTracker_StopLetsAWholeStreamEnd(t *testing.T) {
	tracker, clock := newTracker(t), newTracker(t)
	src := slowToClose{newSource(), make(chan struct{}), make(chan struct{})}
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	conn := dialStream(t, u)
	_, err = conn.Write([]byte{0})
	require.NoError(t, err)
	_, err = src.feed.Write([]byte("x"))
	require.NoError(t, err)
	stopped := async(tracker.Stop)
	// A request on another tracker tells when the source was silent for so long.
	req, expired := newRequest(t, clock.URL(), nil)
	require.NoError(t, clock.TrackRequest(req, acomm.StreamEnd+acomm.StreamEnd/10))
	within(t, expired, "the time-out")
	src.feed.Close()
	within(t, src.closing, "the end of the source")
	for range 30 { // time enough to be cut off in
		require.NoError(t, acomm.Send(clock.URL(), &acomm.Response{ID: "nobody's"}))
	}
	close(src.release)
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "x", string(got))
	conn.Close()
	within(t, stopped, "Stop")
}

// stubborn is a source whose Read does not end with Close.
type stubborn struct {
	reading, release chan struct{}
}

func (s stubborn) Read([]byte) (int, error) {
	close(s.reading)
	<-s.release
	return 0, io.EOF
}

func (stubborn) Close() error { return nil }

func TestTracker_StopDoesNotHangOnAStubbornSource(t *testing.T) {
	lines := captureLog(t)
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	tracker.SetStreamStall(time.Millisecond)
	tracker.SetStreamEnd(time.Millisecond)
	require.NoError(t, tracker.Start())
	src := stubborn{make(chan struct{}), make(chan struct{})}
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	dialStream(t, u)
	within(t, src.reading, "the first read")
	within(t, async(tracker.Stop), "Stop")
	require.Contains(t, lines.String(), "does not return from Read")
	close(src.release)
}

func TestStream_ErrorsMatchTheirSentinel(t *testing.T) {
	gone := &url.URL{Scheme: "unix", Path: filepath.Join(t.TempDir(), "gone.sock")}
	var got bytes.Buffer
	require.ErrorIs(t, acomm.Stream(nil, gone), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Stream(&got, nil), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Stream(&got, gone), fs.ErrNotExist)
	require.ErrorIs(t, acomm.Stream(&got, &url.URL{Scheme: "gopher", Host: "h"}), errors.ErrUnsupported)
	require.ErrorIs(t, acomm.Stream(&got, &url.URL{Scheme: "unix", Path: "@x"}), fs.ErrInvalid)

	tracker := newTracker(t)
	u, err := tracker.NewStreamUnix("", bytesSource(make([]byte, 1<<20)))
	require.NoError(t, err)
	r, w := io.Pipe()
	r.CloseWithError(fs.ErrPermission)
	require.ErrorIs(t, acomm.Stream(w, u), fs.ErrPermission, "the destination's error")
	require.Empty(t, got.Bytes())
}

// Hazard: a stream's error page was written into the data.
func TestStream_WritesNothingUnlessTheSourceAnswers200(t *testing.T) {
	for _, status := range []int{201, 204, 206, 404, 500} {
		peer := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			if status != 204 {
				_, _ = io.WriteString(w, "<html>error page</html>")
			}
		})
		var got bytes.Buffer
		require.ErrorContains(t, acomm.Stream(&got, peer), "answered")
		require.Empty(t, got.Bytes())
	}
}

func TestStream_CutOffOverHTTPIsAnError(t *testing.T) {
	for _, length := range []string{"", "100"} {
		peer := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			if length != "" {
				w.Header().Set("Content-Length", length)
			}
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		})
		var got bytes.Buffer
		require.ErrorIs(t, acomm.Stream(&got, peer), io.ErrUnexpectedEOF)
		require.Equal(t, "half", got.String())
	}
}

// streamProxy is a tracker and a server with the handler it publishes streams on.
func streamProxy(t testing.TB) (*acomm.Tracker, *httptest.Server) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	base, err := url.Parse(server.URL + "/stream?keep=1")
	require.NoError(t, err)
	tracker, err := acomm.NewTracker("", base, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	return tracker, server
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
	addr := &url.URL{Scheme: "unix", Path: "/a b?c#d%"}
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

// Hazard: any unix socket and any internal URL could be read through the handler.
func TestProxyStreamHandler_ServesWhatThisProcessPublished(t *testing.T) {
	tracker, server := streamProxy(t)
	touched := make(chan struct{}, 100)
	other := unixPeer(t, func(net.Conn) { touched <- struct{}{} })
	internal := httpPeer(t, func(http.ResponseWriter, *http.Request) { touched <- struct{}{} })
	signed, err := tracker.ProxyStreamHTTPURL(&url.URL{Scheme: "unix", Path: "/other"})
	require.NoError(t, err)
	signature := signed.Query().Get("signature")

	for query, want := range map[string]int{
		"":                              400,
		"addr=":                         400,
		"addr=%zz":                      400,
		"addr=://":                      400,
		"addr=a;b=c":                    400,
		"signature=xx":                  400,
		"addr=unix:///a&addr=unix:///b": 400,
		"addr=unix:///" + strings.Repeat("x", 9<<10):                          400,
		"addr=" + url.QueryEscape(other.String()):                             403,
		"addr=" + url.QueryEscape(internal.String()):                          403,
		"addr=" + url.QueryEscape(other.String()) + "&signature=" + signature: 403,
		"addr=unix://host/other&signature=" + signature:                       403,
	} {
		u, err := url.Parse(server.URL + "/stream")
		require.NoError(t, err)
		u.RawQuery = query
		status, _, err := get(t, u)
		require.NoError(t, err)
		require.Equal(t, want, status, query)
	}
	require.Empty(t, touched)

	// A stream that a tracker of this process serves needs no signature.
	addr, err := tracker.NewStreamUnix("", bytesSource([]byte("own")))
	require.NoError(t, err)
	u, err := url.Parse(server.URL + "/stream?addr=" + url.QueryEscape(addr.String()))
	require.NoError(t, err)
	status, body, err := get(t, u)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "own", string(body))
}

func TestProxyStreamHandler_SourceOverHTTP(t *testing.T) {
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
	addr := &url.URL{Scheme: "unix", Path: filepath.Join(shortDir(t), "x.eof")}
	l, err := net.Listen("unix", addr.Path)
	require.NoError(t, err)
	defer l.Close()
	failed := make(chan struct{})
	w, ended := serveHeld(t, tracker, addr, func() { <-failed })
	conn, err := l.Accept()
	require.NoError(t, err)
	raw, err := conn.(*net.UnixConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Read(func(fd uintptr) bool { // the consumer's byte is there, and stays
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK)
		return n == 1 || err != syscall.EAGAIN
	}))
	_, err = conn.Write([]byte("half"))
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	close(failed)
	require.Equal(t, http.ErrAbortHandler, within(t, ended, "the handler"))
	require.Equal(t, "half", string(within(t, w.flushed, "what came before")))
}

func TestStreams_LeakNothing(t *testing.T) {
	tracker, _ := streamProxy(t)
	exchange := func() {
		addr, err := tracker.NewStreamUnix("", bytesSource([]byte("x")))
		require.NoError(t, err)
		u, err := tracker.ProxyStreamHTTPURL(addr)
		require.NoError(t, err)
		require.NoError(t, acomm.Stream(io.Discard, u))
	}
	exchange()
	before := openFiles(t)
	for range 200 {
		exchange()
	}
	tracker.Stop()
	require.LessOrEqual(t, openFiles(t), before)
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

// failingWriter is a destination with an error that a source may have as well.
type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// Hazard: a destination that failed was taken for a source that was cut off.
func TestStream_DestinationsErrorIsNotTheSources(t *testing.T) {
	tracker := newTracker(t)
	for _, dest := range []error{syscall.EPIPE, syscall.ECONNRESET, io.EOF} {
		u, err := tracker.NewStreamUnix("", bytesSource([]byte("x")))
		require.NoError(t, err)
		err = acomm.Stream(failingWriter{dest}, u)
		require.ErrorIs(t, err, dest)
		require.NotErrorIs(t, err, io.ErrUnexpectedEOF)
	}
}
