package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// task sends arguments to the plain HTTP door, and returns the answer.
func (g *gatewayRun) task(path, args string, header ...string) (*http.Response, string) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	g.t.Cleanup(cancel)
	method := http.MethodPost
	if strings.HasPrefix(path, resultsPath) {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(g.url.String(), "/")+path, strings.NewReader(args))
	require.NoError(g.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(req)
	require.NoError(g.t, err)
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	require.NoError(g.t, err)
	return answer, string(data)
}

func TestGatewayTasks_TheResultIsTheAnswer(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	for args, want := range map[string]string{`{"a":[1,"<&>"]}`: `{"a":[1,"<&>"]}`, "": "null", `"x"`: `"x"`} {
		answer, body := g.task("/tasks/echo", args)
		require.Equal(t, http.StatusOK, answer.StatusCode)
		require.Equal(t, "application/json", answer.Header.Get("Content-Type"))
		require.JSONEq(t, want, body)
	}
	g.hasMetric(`acomm_gateway_responses_total{result="success",task="echo"} 3`)
}

func TestGatewayTasks_StatusesSayWhatWentWrong(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "1m", "--max-body", "1000")
	g.provide("fail", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		return &acomm.Response{ID: req.ID, Error: errors.New("no <such> thing")}, nil
	})
	g.provide("refuse", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, errors.New("not now") })
	g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
	g.provide("broken", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, errGwNoAck })
	for path, want := range map[string]struct {
		args   string
		status int
		text   string
	}{
		"/tasks/fail":                {"{}", 422, `{"error":"no <such> thing"}`},
		"/tasks/refuse":              {"{}", 503, `{"error":"not now"}`},
		"/tasks/silent?wait=50ms":    {"{}", 504, `{"error":"response timeout"}`},
		"/tasks/broken":              {"{}", 502, `may or may not have taken`},
		"/tasks/nobody":              {"{}", 404, `nobody provides`},
		"/tasks/coordinator":         {"{}", 400, `not the name of a task`},
		"/tasks/fail?wait=soon":      {"{}", 400, `not a time`},
		"/tasks/fail?wait=-1s":       {"{}", 400, `not a time`},
		"/tasks/silent":              {"{", 400, `not JSON`},
		"/tasks/fail?long":           {`"` + strings.Repeat("x", 1000) + `"`, 413, `larger than 1000`},
		resultsPath + "AAAA":         {"", 404, `no such response`},
		resultsPath + "AAAA?wait=1x": {"", 400, `not a time`},
	} {
		answer, body := g.task(path, want.args)
		require.Equal(t, want.status, answer.StatusCode, "%s: %s", path, body)
		require.Contains(t, body, want.text, path)
	}
	status, body := g.get("tasks/fail")
	require.Equal(t, http.StatusMethodNotAllowed, status, body)
}

func TestGatewayTasks_AStreamIsTheBody(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	data := strings.Repeat("stream", 100_000)
	g.provideStream("stream", io.NopCloser(strings.NewReader(data))) // over a hook
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	g.provide("body", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		u, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader(data)))
		return &acomm.Response{ID: req.ID, StreamURL: u}, err
	})
	answer, body := g.task("/tasks/body", "")
	require.Equal(t, http.StatusOK, answer.StatusCode)
	require.Equal(t, "application/octet-stream", answer.Header.Get("Content-Type"))
	require.Equal(t, data, body)
}

func TestGatewayTasks_AnAsyncResponseIsFetchedOnce(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	release := make(chan struct{})
	g.provide("late", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		<-release
		return gwEcho(req)
	})
	// The provider acknowledges when it is released.
	accepted := make(chan *http.Response, 1)
	go func() {
		answer, _ := g.task("/tasks/late", "7", "Prefer", "wait=5, respond-async")
		accepted <- answer
	}()
	close(release)
	answer := gwWithin(t, accepted)
	require.Equal(t, http.StatusAccepted, answer.StatusCode)
	location := answer.Header.Get("Location")
	require.Regexp(t, "^/responses/[A-Z0-9]{26}$", location)
	answer, body := g.task(location+"?wait=10s", "")
	require.Equal(t, http.StatusOK, answer.StatusCode, body)
	require.Equal(t, "7", body)
	answer, _ = g.task(location, "")
	require.Equal(t, http.StatusNotFound, answer.StatusCode)

	g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
	answer, _ = g.task("/tasks/silent", "7", "Prefer", "respond-async")
	require.Equal(t, http.StatusAccepted, answer.StatusCode)
	location = answer.Header.Get("Location")
	answer, _ = g.task(location+"?wait=20ms", "")
	require.Equal(t, http.StatusAccepted, answer.StatusCode, "not yet")
	require.Equal(t, location, answer.Header.Get("Location"))
}

// A requester that leaves takes its request along: what comes is dropped.
func TestGatewayTasks_ARequesterThatLeavesIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	taken := make(chan *acomm.Request, 1)
	g.provide("silent", "a.sock", func(req *acomm.Request) (*acomm.Response, error) { taken <- req; return nil, nil })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url.JoinPath("tasks", "silent").String(), strings.NewReader("{}"))
		if err == nil {
			_, err = http.DefaultClient.Do(req)
		}
		ended <- err
	}()
	req := gwWithin(t, taken)
	cancel()
	require.Error(t, gwWithin(t, ended))
	g.hasMetric("acomm_gateway_outstanding 0")
	require.NoError(t, req.Respond(&acomm.Response{ID: req.ID}), "it is acknowledged, and dropped")
	g.stop()
}

// What the two READMEs show works with the curl that is there.
func TestGatewayTasks_CurlOfTheREADME(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("no curl here")
	}
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	library, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	g := startGateway(t)
	g.provide("wc", "a.sock", gwEcho)
	var outputs []string
	for line := range strings.Lines(string(readme) + string(library)) {
		if !strings.HasPrefix(line, "curl ") {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, "sh", "-c", strings.ReplaceAll(line, "127.0.0.1:8080", g.url.Host)).Output()
		require.NoError(t, err, line)
		outputs = append(outputs, string(out))
	}
	require.Len(t, outputs, 3)
	require.JSONEq(t, `{"text": "hello"}`, outputs[0])
	require.JSONEq(t, outputs[0], outputs[2])
	require.Regexp(t, `(?s)^HTTP/1.1 202 .*\r\nLocation: /responses/`, outputs[1])
}

func TestList_ShowsTheTasksOfAGateway(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("wc", "a.sock", gwEcho)
	g.provide("echo", "a.sock", gwEcho)
	g.provide("echo", "b.sock", gwEcho)
	require.NoError(t, os.Mkdir(filepath.Join(g.dir, "empty"), 0o700))
	got := runAcomm(t, "list", g.url.String())
	require.Equal(t, 0, got.code, got.stderr)
	require.Equal(t, "TASK  PROVIDERS\necho  2\nwc    1\n", got.stdout)
	got = runAcomm(t, "list", "--json", g.url.String())
	require.JSONEq(t, `{"tasks":[{"task":"echo","providers":2},{"task":"wc","providers":1}]}`, got.stdout)
	g.stop()
	for code, target := range map[int]string{3: g.url.String(), 2: filepath.Join(g.dir, "x.sock")} {
		got = runAcomm(t, "list", target)
		require.Equal(t, code, got.code, got.stderr)
		require.Empty(t, got.stdout)
	}
}

// Hazard: responses that nobody fetches fill the memory.
func TestGatewayTasks_SoManyResponsesWaitAndNoMore(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-outstanding", "3")
	g.provide("echo", "a.sock", gwEcho)
	var location string
	for range 3 {
		answer, _ := g.task("/tasks/echo", "1", "Prefer", "respond-async")
		require.Equal(t, http.StatusAccepted, answer.StatusCode)
		location = answer.Header.Get("Location")
	}
	g.hasMetric(`acomm_gateway_responses_total{result="success",task="echo"} 3`)
	answer, body := g.task("/tasks/echo", "1", "Prefer", "respond-async")
	require.Equal(t, http.StatusTooManyRequests, answer.StatusCode)
	require.Contains(t, body, "wait to be fetched")
	answer, _ = g.task("/tasks/echo", "1")
	require.Equal(t, http.StatusOK, answer.StatusCode, "who waits is served")
	answer, _ = g.task(location+"?wait=10s", "")
	require.Equal(t, http.StatusOK, answer.StatusCode)
	answer, _ = g.task("/tasks/echo", "1", "Prefer", "respond-async")
	require.Equal(t, http.StatusAccepted, answer.StatusCode, "there is room again")
}
