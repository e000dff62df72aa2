package acomm_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// proxy has the tracker proxy a new request with the hook and returns both.
func proxy(t testing.TB, tracker *acomm.Tracker, hook *url.URL, timeout time.Duration) (req, proxied *acomm.Request) {
	t.Helper()
	req, responses := newRequest(t, hook, nil)
	proxied, err := tracker.ProxyUnix(req, timeout)
	require.NoError(t, err)
	t.Cleanup(func() { requireSilent(t, responses) }) // a proxied request's handlers are not run
	return req, proxied
}

func TestProxyUnix_UnixHookReturnsTheRequest(t *testing.T) {
	tracker := newTracker(t)
	req, _ := newRequest(t, unixURL("/provider.sock"), nil)
	proxied, err := tracker.ProxyUnix(req, patience)
	require.NoError(t, err)
	require.Same(t, req, proxied)
	require.Zero(t, tracker.NumRequests())
}

func TestProxyUnix_HTTPHookIsReplaced(t *testing.T) {
	tracker := newTracker(t)
	for _, hook := range []string{"http://localhost:1/hook?a=b", "https://localhost:1/", "other://localhost:1/"} {
		req, err := acomm.NewRequest("test", hook, map[string]string{"some": "args"}, nil, nil)
		require.NoError(t, err)
		before, address := *req, *req.ResponseHook
		proxied, err := tracker.ProxyUnix(req, patience)
		require.NoError(t, err)
		require.Equal(t, 1, tracker.NumRequests())

		require.NotSame(t, req, proxied)
		require.Equal(t, &acomm.Request{ID: req.ID, Task: "test", ResponseHook: tracker.URL(), Args: req.Args}, proxied)
		require.Equal(t, before, *req, "the original")
		require.Equal(t, address, *req.ResponseHook, "the original's hook")
		require.True(t, tracker.RemoveRequest(proxied))
	}
}

func TestProxyUnix_RefusesWhatItCannotTrack(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	hook := &url.URL{Scheme: "http", Host: "localhost:1"}
	valid := acomm.Request{ID: "id", Task: "test", ResponseHook: hook}
	_, err = tracker.ProxyUnix(&valid, patience)
	require.ErrorIs(t, err, net.ErrClosed, "not started")
	require.NoError(t, tracker.Start())

	for name, req := range map[string]*acomm.Request{
		"nil":     nil,
		"no id":   {Task: "test", ResponseHook: hook},
		"no task": {ID: "id", ResponseHook: hook},
		"no hook": {ID: "id", Task: "test"},
	} {
		proxied, err := tracker.ProxyUnix(req, patience)
		require.ErrorIs(t, err, fs.ErrInvalid, name)
		require.Nil(t, proxied, name)
	}
	require.Zero(t, tracker.NumRequests())

	_, err = tracker.ProxyUnix(&valid, patience)
	require.NoError(t, err)
	proxied, err := tracker.ProxyUnix(&valid, patience)
	require.ErrorIs(t, err, fs.ErrExist)
	require.Nil(t, proxied)
	require.Equal(t, 1, tracker.NumRequests())

	stopped := async(tracker.Stop)
	waitStopping(t, tracker)
	another := acomm.Request{ID: "another", Task: "test", ResponseHook: hook}
	_, err = tracker.ProxyUnix(&another, patience)
	require.ErrorIs(t, err, net.ErrClosed, "stopping")
	require.True(t, tracker.RemoveRequest(&valid))
	within(t, stopped, "Stop")
	_, err = tracker.ProxyUnix(&another, patience)
	require.ErrorIs(t, err, net.ErrClosed, "stopped")
}

func TestForward_ResponseArrivesAtTheHook(t *testing.T) {
	for name, c := range map[string]struct {
		result any
		err    error
		want   string
	}{
		"result": {map[string]int{"size": 7}, nil, `{"error":"","id":"ID","result":{"size":7},"stream_url":null}`},
		"none":   {nil, nil, `{"error":"","id":"ID","result":null,"stream_url":null}`},
		"error":  {nil, errors.New("no such file"), `{"error":"no such file","id":"ID","result":null,"stream_url":null}`},
	} {
		t.Run(name, func(t *testing.T) {
			tracker, hook := newTracker(t), newForwardHook(t, nil)
			req, proxied := proxy(t, tracker, hook.url, patience)
			require.NoError(t, proxied.Respond(answerTo(t, proxied, c.result, c.err)))
			want := strings.Replace(c.want, "ID", req.ID, 1)
			require.JSONEq(t, want, string(within(t, hook.bodies, "the response")))
			require.Zero(t, tracker.NumRequests())
			require.NoError(t, proxied.Respond(answerTo(t, proxied, "again", nil)))
			tracker.Stop()
			require.Empty(t, hook.bodies)
		})
	}
}

// Hazard: a proxied request that times out early is never forwarded.
func TestForward_TimeoutArrivesAtTheHook(t *testing.T) {
	tracker, hook := newTracker(t), newForwardHook(t, nil)
	req, proxied := proxy(t, tracker, hook.url, time.Millisecond)
	want := `{"error":"response timeout","id":"` + req.ID + `","result":null,"stream_url":null}`
	require.JSONEq(t, want, string(within(t, hook.bodies, "the time-out")))
	require.NoError(t, proxied.Respond(answerTo(t, proxied, "late", nil)))
	tracker.Stop()
	require.Empty(t, hook.bodies)
}

func TestForward_StreamIsPublished(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	server := httptest.NewServer(mux)
	defer server.Close()
	streamURL, err := url.Parse(server.URL + "/stream?tenant=7")
	require.NoError(t, err)
	given := *streamURL
	tracker, hook := newStreamTracker(t, streamURL), newForwardHook(t, nil)
	streamURL.Host = "elsewhere" // ours again, since NewTracker has returned

	_, proxied := proxy(t, tracker, hook.url, patience)
	stream, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("the data")))
	require.NoError(t, err)
	resp := answerTo(t, proxied, "see the stream", nil)
	resp.StreamURL = stream
	before, address := *resp, *stream
	tracker.HandleResponse(resp)
	require.Equal(t, before, *resp, "the response stays its sender's")
	require.Same(t, stream, resp.StreamURL)
	require.Equal(t, address, *stream)

	var forwarded acomm.Response
	require.NoError(t, json.Unmarshal(within(t, hook.bodies, "the response"), &forwarded))
	require.JSONEq(t, `"see the stream"`, string(*forwarded.Result))
	require.Equal(t, given.Host, forwarded.StreamURL.Host)
	require.Equal(t, given.Path, forwarded.StreamURL.Path)
	require.Equal(t, "7", forwarded.StreamURL.Query().Get("tenant"))
	want, err := tracker.ProxyStreamHTTPURL(stream)
	require.NoError(t, err)
	require.Equal(t, want.String(), forwarded.StreamURL.String())

	var data strings.Builder
	require.NoError(t, acomm.Stream(&data, forwarded.StreamURL))
	require.Equal(t, "the data", data.String())
}

func TestForward_StreamThatCannotBePublishedIsLeftOutAndLogged(t *testing.T) {
	tracker, hook := newTracker(t), newForwardHook(t, nil)
	log := captureLog(t)
	req, proxied := proxy(t, tracker, hook.url, patience)
	resp := answerTo(t, proxied, "result", nil)
	resp.StreamURL = &url.URL{Scheme: "http", User: url.UserPassword("user", "password"), Host: "localhost:1"}
	tracker.HandleResponse(resp)
	require.NotNil(t, resp.StreamURL, "the response stays its sender's")

	want := `{"error":"","id":"` + req.ID + `","result":"result","stream_url":null}`
	require.JSONEq(t, want, string(within(t, hook.bodies, "the response")))
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
	require.Contains(t, log.String(), "error=")
	require.Contains(t, log.String(), "id="+req.ID)
	require.Contains(t, log.String(), "addr=")
	require.NotContains(t, log.String(), "password")
}

func TestForward_RemovedRequestIsNotForwarded(t *testing.T) {
	tracker, hook := newTracker(t), newForwardHook(t, nil)
	for _, which := range []string{"original", "proxied"} {
		req, proxied := proxy(t, tracker, hook.url, patience)
		removed := req
		if which == "proxied" {
			removed = proxied
		}
		require.True(t, tracker.RemoveRequest(removed), which)
		require.False(t, tracker.RemoveRequest(removed), which)
		require.NoError(t, proxied.Respond(answerTo(t, proxied, nil, nil)))
	}
	tracker.Stop()
	require.Empty(t, hook.bodies)
}

func TestForward_StopWaitsForIt(t *testing.T) {
	release := make(chan struct{})
	releaseOnce := sync.OnceFunc(func() { close(release) })
	hook := newForwardHook(t, func(http.ResponseWriter, *http.Request) { <-release })
	tracker := newTracker(t)
	t.Cleanup(releaseOnce)
	log := captureLog(t)
	_, proxied := proxy(t, tracker, hook.url, patience)
	require.NoError(t, proxied.Respond(answerTo(t, proxied, nil, nil)))
	within(t, hook.bodies, "the forward")
	stopped := async(tracker.Stop)
	waitStopping(t, tracker)
	require.Zero(t, tracker.NumRequests())
	requireStopping(t, tracker)
	releaseOnce()
	within(t, stopped, "Stop")
	require.NotContains(t, log.String(), "failed to forward")
}

func TestForward_SlowHookDelaysNobody(t *testing.T) {
	release := make(chan struct{})
	releaseOnce := sync.OnceFunc(func() { close(release) })
	slow := newForwardHook(t, func(http.ResponseWriter, *http.Request) { <-release })
	quick := newForwardHook(t, nil)
	tracker := newTracker(t)
	t.Cleanup(releaseOnce)
	_, first := proxy(t, tracker, slow.url, patience)
	_, second := proxy(t, tracker, quick.url, patience)
	require.NoError(t, first.Respond(answerTo(t, first, nil, nil)))
	within(t, slow.bodies, "the slow forward")
	require.NoError(t, second.Respond(answerTo(t, second, nil, nil)))
	within(t, quick.bodies, "the quick forward")
	requireWorking(t, tracker)
	releaseOnce()
}
