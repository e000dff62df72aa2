package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// serveEndless runs a program whose stream has no end, as the task's one provider
// and with one place. Its first request, with the argument 1, takes two seconds.
func serveEndless(t *testing.T, path string, args ...string) *running {
	t.Helper()
	args = append([]string{"serve", "--stream", "--concurrency", "1", "-v"}, args...)
	serve := startAcomm(t, append(args, path, "--", "sh", "-c", `read n; test "$n" = 1 && sleep 2; exec cat /dev/zero`)...)
	serve.waitLine("listening on")
	t.Cleanup(func() { // its streams have ended
		serve.signal(syscall.SIGTERM)
		require.Equal(t, 0, serve.wait(), serve.said())
	})
	return serve
}

// requireStream sends requests until one has got the place, and reads of its stream.
func (g *gatewayRun) requireStream(task string) {
	t := g.t
	t.Helper()
	hook, responses := gwHook(t)
	var resp *acomm.Response
	for began := time.Now(); resp == nil || resp.Error != nil; {
		require.Less(t, time.Since(began), patience, "the program never runs again")
		require.NoError(t, acomm.Send(g.url, gwRequest(t, task, hook, 2)))
		resp = gwWithin(t, responses)
	}
	answer, err := http.Get(resp.StreamURL.String())
	require.NoError(t, err)
	defer answer.Body.Close()
	_, err = io.ReadFull(answer.Body, make([]byte, 1000))
	require.NoError(t, err)
}

// Hazard: a program whose response comes after the time-out of the gateway keeps its
// place for an hour.
func TestGateway_StreamOfALateResponseIsEndedAtOnce(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "1s")
	serveEndless(t, filepath.Join(g.dir, "zero", "1.sock"), "--unread-duration", "1h")
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "zero", hook, 1)))
	require.EqualError(t, gwWithin(t, responses).Error, "response timeout")
	g.requireStream("zero")
	g.stop()
}

// Hazard: so does one whose requester has gone.
func TestGateway_StreamThatTheHookDoesNotTakeIsEndedAtOnce(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "2s")
	serveEndless(t, filepath.Join(g.dir, "zero", "1.sock"), "--unread-duration", "1h")
	no := httptest.NewUnstartedServer(http.NotFoundHandler())
	no.Config.SetKeepAlivesEnabled(false) // on a connection that ends meanwhile it might have been taken
	no.Start()
	defer no.Close()
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "zero", no.URL, 2)))
	g.requireStream("zero")
	no.Close() // tried again until the time-out
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "zero", no.URL, 2)))
	g.requireStream("zero")
	g.stop()
}

func TestGateway_StreamThatNobodyReadsIsEnded(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--unread-duration", "2s")
	serveEndless(t, filepath.Join(g.dir, "zero", "1.sock"), "--unread-duration", "1h")
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "zero", hook, 2)))
	resp := gwWithin(t, responses)
	g.requireStream("zero")
	answer, err := http.Get(resp.StreamURL.String())
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, http.StatusNotFound, answer.StatusCode)
	g.stop()
}

// Hazard: the bound for unread streams ends one that is being read.
func TestGateway_StreamThatIsReadOutlivesTheBoundForUnreadOnes(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--unread-duration", "2s")
	source, w := io.Pipe()
	stream := g.provideStream("read", source)
	go func() { _, _ = w.Write([]byte{1}) }()
	answer, err := http.Get(stream.String())
	require.NoError(t, err)
	defer answer.Body.Close()
	buf := make([]byte, 1)
	_, err = io.ReadFull(answer.Body, buf)
	require.NoError(t, err)
	left := newSilentSource()
	g.provideStream("left", left) // and nobody reads it: the bound passes for both
	gwWithin(t, (<-chan struct{})(left.closed))
	go func() { _, _ = w.Write([]byte{2}); _ = w.Close() }()
	rest, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	require.Equal(t, []byte{2}, rest)
	g.stop()
}

// silentSource is a source that is silent, and tells when it is closed.
type silentSource struct {
	closed chan struct{}
	once   sync.Once
}

func newSilentSource() *silentSource { return &silentSource{closed: make(chan struct{})} }

func (c *silentSource) Read([]byte) (int, error) {
	<-c.closed
	return 0, io.EOF
}

func (c *silentSource) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// requestStream sends a request to the service, and returns the stream of its
// response.
func requestStream(t *testing.T, path string) *acomm.Response {
	t.Helper()
	hook, responses := gwHook(t)
	target := gwRequest(t, "x", "unix://"+path, nil).ResponseHook
	require.NoError(t, acomm.Send(target, gwRequest(t, "zero", hook, 2)))
	return gwWithin(t, responses)
}

// Hazard: a client that never reads its streams keeps all others waiting.
func TestServe_StreamThatNobodyReadsIsEnded(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "s.sock")
	serve := serveEndless(t, path, "--unread-duration", "200ms")
	for range 2 {
		require.NoError(t, requestStream(t, path).Error)
	}
	serve.waitLines("nobody has read", 2)
}

// pausedReader reads some of a stream, and returns what reads the next of it.
func pausedReader(t *testing.T, stream *url.URL) (more func() error) {
	t.Helper()
	conn, err := net.Dial("unix", stream.Path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = conn.Write([]byte{0})
	require.NoError(t, err)
	buf := make([]byte, 1<<20)
	more = func() error { _, err := io.ReadFull(conn, buf); return err }
	require.NoError(t, more())
	return more
}

// A reader that pauses keeps its stream, until another request waits for the place.
func TestServe_StreamWhoseReaderTakesNothingGivesItsPlaceToTheNext(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "s.sock")
	serve := serveEndless(t, path, "--unread-duration", "1s", "--concurrency", "2")
	more := pausedReader(t, requestStream(t, path).StreamURL)
	require.NoError(t, requestStream(t, path).Error)
	serve.waitLines("nobody has read", 1) // the second one: the bound has passed for both
	require.NoError(t, more(), "nobody needs the place")

	pausedReader(t, requestStream(t, path).StreamURL) // now both places are taken
	require.NoError(t, requestStream(t, path).Error)
}

// Hazard: a provider that sends its response again, unsure of the first, has its own
// stream ended.
func TestGateway_ASecondCopyOfAResponseLeavesTheStream(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	g.provide("read", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		u, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("data")))
		resp := &acomm.Response{ID: req.ID, StreamURL: u}
		go func() { _ = req.Respond(resp); _ = req.Respond(resp) }()
		return nil, err
	})
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "read", hook, nil)))
	resp := gwWithin(t, responses)
	g.waitLine("nobody waits for")
	var got strings.Builder
	require.NoError(t, acomm.Stream(&got, resp.StreamURL))
	require.Equal(t, "data", got.String())

	// So it is with a response that waits to be fetched.
	answer, _ := g.task("/tasks/read", "null", "Prefer", "respond-async")
	require.Equal(t, http.StatusAccepted, answer.StatusCode)
	g.waitLines("nobody waits for", 2)
	answer, body := g.task(answer.Header.Get("Location"), "")
	require.Equal(t, http.StatusOK, answer.StatusCode)
	require.Equal(t, "data", body)
	g.stop()
}
