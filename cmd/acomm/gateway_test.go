package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// gatewayRun is a gateway that runs as a process of its own.
type gatewayRun struct {
	*running
	dir string
	url *url.URL // of its HTTP front
}

// gwLine hands on the first line that is written to it.
type gwLine struct {
	mu   sync.Mutex
	buf  []byte
	line chan string
}

func (l *gwLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if line, _, ok := bytes.Cut(l.buf, []byte("\n")); ok && l.line != nil {
		l.line <- string(line)
		l.line = nil
	}
	return len(p), nil
}

// startGateway starts a gateway, and waits until it is ready.
func startGateway(t *testing.T, args ...string) *gatewayRun {
	t.Helper()
	g := newGatewayRun(t, shortDir(t))
	g.start(args...)
	return g
}

func startGatewayCmd(t *testing.T, cmd *exec.Cmd, dir string) *gatewayRun {
	t.Helper()
	g := newGatewayRun(t, dir)
	g.startCmd(cmd)
	return g
}

// newGatewayRun is a gateway that is not started yet. Providers may be there before.
func newGatewayRun(t *testing.T, dir string) *gatewayRun {
	t.Cleanup(http.DefaultTransport.(*http.Transport).CloseIdleConnections)
	return &gatewayRun{running: &running{t: t}, dir: dir}
}

func (g *gatewayRun) start(args ...string) {
	g.t.Helper()
	g.startCmd(acommCmd(g.t, append([]string{"gateway", "--socket-dir", g.dir, "--listen", "127.0.0.1:0", "--name", "gw"}, args...)...))
}

func (g *gatewayRun) startCmd(cmd *exec.Cmd) {
	t := g.t
	t.Helper()
	line := make(chan string, 1)
	cmd.Stdout = &gwLine{line: line}
	g.running = startCmd(t, cmd)
	select {
	case text := <-line:
		addr, ok := strings.CutPrefix(text, "listening on ")
		require.True(t, ok, text)
		g.url = &url.URL{Scheme: "http", Host: addr, Path: "/"}
	case <-g.done:
		require.FailNow(t, "ended before it was ready", g.said())
	case <-time.After(patience):
		require.FailNow(t, "not ready in time", g.said())
	}
}

// stop ends the gateway as an administrator does.
func (g *gatewayRun) stop() {
	g.t.Helper()
	g.signal(syscall.SIGTERM)
	require.Equal(g.t, 0, g.wait(), g.said())
}

// provide runs a provider in the test: it answers each request as the function
// says, which returns what refuses it, and its response, or nil for none.
func (g *gatewayRun) provide(task, name string, answer func(*acomm.Request) (resp *acomm.Response, refusal error)) {
	t := g.t
	t.Helper()
	listener := acomm.NewUnixListener(filepath.Join(g.dir, task, name), 0)
	require.NoError(t, listener.Start())
	var serving sync.WaitGroup
	serving.Go(func() {
		for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
			serving.Go(func() {
				defer listener.DoneConn(conn)
				req := &acomm.Request{}
				if acomm.UnmarshalConnData(conn, req) != nil {
					return
				}
				resp, refusal := answer(req)
				if refusal == errGwNoAck {
					return
				}
				if acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: refusal}) != nil || refusal != nil || resp == nil {
					return
				}
				listener.DoneConn(conn)
				_ = req.Respond(resp)
			})
		}
	})
	t.Cleanup(func() { listener.Stop(time.Second); serving.Wait() })
}

// errGwNoAck has a provider close the connection without an acknowledgement.
var errGwNoAck = errors.New("no acknowledgement")

func gwEcho(req *acomm.Request) (*acomm.Response, error) {
	return &acomm.Response{ID: req.ID, Result: req.Args}, nil
}

// gwHook is a hook over HTTP, and the responses that come to it.
func gwHook(t *testing.T) (hook string, responses <-chan *acomm.Response) {
	t.Helper()
	got := make(chan *acomm.Response, 16)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if err := json.NewDecoder(r.Body).Decode(resp); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		got <- resp
	}))
	t.Cleanup(server.Close)
	return server.URL, got
}

func gwRequest(t *testing.T, task, hook string, args any) *acomm.Request {
	t.Helper()
	req, err := acomm.NewRequest(task, hook, args, nil, nil)
	require.NoError(t, err)
	return req
}

// gwWithin returns what comes from the channel in time.
func gwWithin[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		require.FailNow(t, "nothing came in time")
		panic("unreachable")
	}
}

// post sends a body to the gateway and returns the answer.
func (g *gatewayRun) post(method, body string, header ...string) (status int, resp *acomm.Response) {
	g.t.Helper()
	req, err := http.NewRequest(method, g.url.String(), strings.NewReader(body))
	require.NoError(g.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(req)
	require.NoError(g.t, err)
	defer answer.Body.Close()
	resp = &acomm.Response{}
	require.NoError(g.t, json.NewDecoder(answer.Body).Decode(resp), "each answer is a Response")
	return answer.StatusCode, resp
}

func (g *gatewayRun) get(path string) (status int, body string) {
	g.t.Helper()
	answer, err := http.Get(g.url.JoinPath(path).String())
	require.NoError(g.t, err)
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	require.NoError(g.t, err)
	return answer.StatusCode, string(data)
}

// hasMetric asks until the metrics have the line: what is counted may come a
// moment after what the test could see.
func (g *gatewayRun) hasMetric(line string) {
	g.t.Helper()
	metrics := ""
	for began := time.Now(); !strings.Contains("\n"+metrics, "\n"+line+"\n"); _, metrics = g.get("metrics") {
		require.Less(g.t, time.Since(began), patience, "%s is not in:\n%s", line, metrics)
	}
}

func TestGateway_RequestOverHTTPIsAnsweredAtItsHook(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	hook, responses := gwHook(t)
	req := gwRequest(t, "echo", hook, "hello")
	require.NoError(t, acomm.Send(g.url, req))
	resp := gwWithin(t, responses)
	require.Equal(t, req.ID, resp.ID)
	require.JSONEq(t, `"hello"`, string(*resp.Result))
	status, body := g.get("healthz")
	require.Equal(t, http.StatusOK, status, body)
	g.stop()
	for _, socket := range []string{"coordinator/gw.sock", "response/gw.sock"} {
		require.NoFileExists(t, filepath.Join(g.dir, socket))
	}
}

func TestGateway_RequestsOverTheUnixSocket(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	hooks := make(chan string, 2)
	g.provide("echo", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		hooks <- req.ResponseHook.String()
		return gwEcho(req)
	})
	socket := &url.URL{Scheme: "unix", Path: filepath.Join(g.dir, "coordinator", "gw.sock")}

	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(socket, gwRequest(t, "echo", hook, 1)))
	require.JSONEq(t, "1", string(*gwWithin(t, responses).Result))
	require.Equal(t, "unix://"+filepath.Join(g.dir, "response", "gw.sock"), gwWithin(t, hooks), "the gateway's hook")

	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	answered := make(chan *acomm.Response, 1)
	req := gwRequest(t, "echo", tracker.URL().String(), 2)
	req.SuccessHandler = func(_ *acomm.Request, resp *acomm.Response) { answered <- resp }
	require.NoError(t, tracker.TrackRequest(req, patience))
	require.NoError(t, acomm.Send(socket, req))
	require.JSONEq(t, "2", string(*gwWithin(t, answered).Result))
	require.Equal(t, tracker.URL().String(), gwWithin(t, hooks), "passed on unchanged")

	err = acomm.Send(socket, gwRequest(t, "nobody", hook, 3))
	require.EqualError(t, err, `nobody provides the task "nobody"`)
	g.stop()
}

// A peer that has no URL object writes the hook as text: over HTTP and in a frame.
func TestGateway_AResponseHookMayBeAString(t *testing.T) {
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	hook, responses := gwHook(t)
	text := func(id, hook string) string {
		return fmt.Sprintf(`{"id":%q,"task":"echo","responsehook":%q,"args":[1]}`, id, hook)
	}

	status, resp := g.post(http.MethodPost, text("over-http", hook))
	require.Equal(t, http.StatusOK, status, "%v", resp.Error)
	require.Equal(t, "over-http", gwWithin(t, responses).ID)

	conn, err := net.Dial("unix", filepath.Join(g.dir, "coordinator", "gw.sock"))
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, acomm.SendConnData(conn, json.RawMessage(text("in-a-frame", hook))))
	ack := &acomm.Response{}
	require.NoError(t, acomm.UnmarshalConnData(conn, ack))
	require.NoError(t, ack.Error)
	require.Equal(t, "in-a-frame", gwWithin(t, responses).ID)

	status, resp = g.post(http.MethodPost, text("broken", "http://%zz/secret"))
	require.Equal(t, http.StatusBadRequest, status)
	require.ErrorContains(t, resp.Error, "can't be parsed")
	require.NotContains(t, resp.Error.Error(), "secret")
	g.stop()
}

// Hazard: a request that some provider may have taken is given to another one too.
func TestGateway_NextProviderIsAskedOnlyIfTheRequestWasNotTaken(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	hook, responses := gwHook(t)

	// A dead socket, one that refuses, one that works.
	dead := filepath.Join(g.dir, "work", "a.sock")
	require.NoError(t, os.MkdirAll(filepath.Dir(dead), 0o700))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	g.provide("work", "b.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, errors.New("busy") })
	require.NoError(t, os.WriteFile(filepath.Join(g.dir, "work", "bb.sock"), nil, 0o600)) // no socket
	g.provide("work", "c.sock", gwEcho)
	g.provide("work", "d.sock", func(*acomm.Request) (*acomm.Response, error) {
		t.Error("the fourth was asked")
		return nil, nil
	})
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "work", hook, "x")))
	require.JSONEq(t, `"x"`, string(*gwWithin(t, responses).Result))

	// All refuse: their words are the answer.
	g.provide("refused", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, errors.New("not today") })
	require.EqualError(t, acomm.Send(g.url, gwRequest(t, "refused", hook, nil)), "not today")

	// Unclear: nobody else is asked, and nothing is tracked.
	g.provide("unclear", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, errGwNoAck })
	g.provide("unclear", "b.sock", func(*acomm.Request) (*acomm.Response, error) {
		t.Error("the second was asked after an unclear answer of the first")
		return nil, nil
	})
	err = acomm.Send(g.url, gwRequest(t, "unclear", hook, nil))
	require.ErrorContains(t, err, "502")
	socket := &url.URL{Scheme: "unix", Path: filepath.Join(g.dir, "coordinator", "gw.sock")}
	require.ErrorIs(t, acomm.Send(socket, gwRequest(t, "unclear", hook, nil)), io.ErrUnexpectedEOF)
	g.hasMetric("acomm_gateway_outstanding 0")
	g.hasMetric(`acomm_gateway_refused_total{reason="unclear",task="unclear"} 2`)
	g.stop()
}

func TestGateway_RefusesWhatItMustNotForward(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-body", "1000")
	g.provide("echo", "a.sock", gwEcho)
	body := func(task, hook string) string {
		u, err := url.Parse(hook)
		require.NoError(t, err)
		data, err := json.Marshal(&acomm.Request{ID: "id-1", Task: task, ResponseHook: u})
		require.NoError(t, err)
		return string(data)
	}
	const hook = "http://127.0.0.1:9/"
	for _, test := range []struct {
		name, method, body string
		status             int
		words              string
	}{
		{"no provider", "POST", body("nobody", hook), 200, "nobody provides"},
		{"traversal", "POST", body("../echo", hook), 400, "not the name of a task"},
		{"parent", "POST", body("..", hook), 400, "not the name of a task"},
		{"the directory itself", "POST", body(".", hook), 400, "not the name of a task"},
		{"slash", "POST", body("echo/x", hook), 400, "not the name of a task"},
		{"absolute", "POST", body("/etc", hook), 400, "not the name of a task"},
		{"NUL", "POST", body("echo\x00", hook), 400, "not the name of a task"},
		{"no task", "POST", body("", hook), 400, "no task"},
		{"long", "POST", body(strings.Repeat("x", 256), hook), 400, "not the name of a task"},
		{"the gateway's own socket", "POST", body("coordinator", hook), 400, "not the name of a task"},
		{"the tracker's socket", "POST", body("response", hook), 400, "not the name of a task"},
		{"unix hook", "POST", body("echo", "unix:///run/x.sock"), 400, "unix hook"},
		{"other scheme", "POST", body("echo", "ftp://example.com/"), 400, "scheme"},
		{"nats without NATS", "POST", body("echo", "nats:///x"), 400, "scheme"},
		{"no host", "POST", body("echo", "http:///x"), 400, "no host"},
		{"metadata", "POST", body("echo", "http://169.254.169.254/latest"), 400, "hooks may not lead"},
		{"metadata, mapped", "POST", body("echo", "http://[::ffff:169.254.169.254]/"), 400, "hooks may not lead"},
		{"no hook", "POST", `{"id":"1","task":"echo"}`, 400, "no response hook"},
		{"no JSON", "POST", "{", 400, "parse"},
		{"two requests", "POST", body("echo", hook) + body("echo", hook), 400, "parse"},
		{"too large", "POST", `{"args":"` + strings.Repeat("x", 1000) + `"}`, 413, "larger than 1000 bytes"},
		{"GET", "GET", "", 405, "POST"},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, resp := g.post(test.method, test.body)
			require.Equal(t, test.status, status, "%v", resp.Error)
			require.ErrorContains(t, resp.Error, test.words)
		})
	}
	status, resp := g.post("POST", body("echo", hook), "Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site")
	require.Equal(t, http.StatusForbidden, status)
	require.Error(t, resp.Error)
	g.stop()
}

func TestGateway_StreamsAreServedOverHTTP(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	data := strings.Repeat("stream ", 100_000)
	g.provide("read", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		u, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader(data)))
		return &acomm.Response{ID: req.ID, StreamURL: u}, err
	})
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "read", hook, nil)))
	resp := gwWithin(t, responses)
	require.NoError(t, resp.Error)
	require.Equal(t, g.url.JoinPath("stream").String(), fmt.Sprintf("%s://%s%s", resp.StreamURL.Scheme, resp.StreamURL.Host, resp.StreamURL.Path))
	var got bytes.Buffer
	require.NoError(t, acomm.Stream(&got, resp.StreamURL))
	require.Equal(t, data, got.String())
	g.stop()
}

func TestGateway_MetricsCountWhatHappened(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "2s")
	g.provide("echo", "a.sock", gwEcho)
	g.provide("fail", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		return &acomm.Response{ID: req.ID, Error: errors.New("failed")}, nil
	})
	g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
	hook, responses := gwHook(t)
	for range 3 {
		require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", hook, 1)))
		require.NoError(t, gwWithin(t, responses).Error)
	}
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "fail", hook, 1)))
	require.EqualError(t, gwWithin(t, responses).Error, "failed")
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "silent", hook, 1)))
	require.EqualError(t, gwWithin(t, responses).Error, "response timeout")
	for _, task := range []string{"made-up-1", "made-up-2"} {
		require.Error(t, acomm.Send(g.url, gwRequest(t, task, hook, 1)))
	}
	// A hook that says no, and one where nobody is.
	no := httptest.NewServer(http.NotFoundHandler())
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", no.URL, 1)))
	g.hasMetric(`acomm_gateway_forward_failures_total{task="echo"} 1`)
	no.Close()
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", no.URL, 1)))
	for _, line := range []string{
		`acomm_gateway_forward_failures_total{task="echo"} 2`,
		`acomm_gateway_requests_total{task="echo"} 5`,
		`acomm_gateway_requests_total{task="fail"} 1`,
		`acomm_gateway_requests_total{task="silent"} 1`,
		`acomm_gateway_requests_total{task=""} 2`,
		`acomm_gateway_refused_total{reason="no_provider",task=""} 2`,
		`acomm_gateway_responses_total{result="success",task="echo"} 5`,
		`acomm_gateway_responses_total{result="error",task="fail"} 1`,
		`acomm_gateway_timeouts_total{task="silent"} 1`,
		`acomm_gateway_response_seconds_count{task="echo"} 5`,
		`acomm_gateway_outstanding 0`,
	} {
		g.hasMetric(line)
	}
	_, metrics := g.get("metrics")
	require.NotContains(t, metrics, "made-up")
	g.stop()
}

// Hazard: a hook leads into the machine's own network by a name, or a redirect.
func TestGateway_DeniedHooksAreNotConnectedTo(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--hook-deny", "127.0.0.0/8,::1") // not tried again until the time-out, which is after the test's
	g.provide("echo", "a.sock", gwEcho)
	_, responses := gwHook(t)
	hook, _ := gwHook(t)
	u, err := url.Parse(hook)
	require.NoError(t, err)

	require.ErrorContains(t, acomm.Send(g.url, gwRequest(t, "echo", hook, 1)), "hooks may not lead to this address")
	u.Host = net.JoinHostPort("localhost", u.Port())
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", u.String(), 1)), "known only when connecting")
	require.Contains(t, g.waitLine("failed to forward"), "hooks may not lead to this address")
	g.hasMetric(`acomm_gateway_forward_failures_total{task="echo"} 1`)
	require.Empty(t, responses)
	g.stop()
}

func TestGateway_RedirectsOfHooksAreCheckedToo(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--hook-deny", "127.0.0.2")
	g.provide("echo", "a.sock", gwEcho)
	redirect := httptest.NewServer(http.RedirectHandler("http://127.0.0.2:9/", http.StatusTemporaryRedirect))
	defer redirect.Close()
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", redirect.URL, 1)))
	require.Contains(t, g.waitLine("failed to forward"), "hooks may not lead to this address")
	g.stop()
}

func TestGateway_HooksGoThroughNoProxyOfTheEnvironment(t *testing.T) {
	t.Parallel()
	proxied := make(chan string, 1)
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		proxied <- r.Host
	}))
	defer proxy.Close()
	for _, through := range []bool{false, true} {
		dir := shortDir(t)
		cmd := acommCmd(t, "gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0", "--timeout", "100ms",
			fmt.Sprintf("--hook-proxy=%v", through))
		cmd.Env = append(cmd.Env, "HTTP_PROXY="+proxy.URL)
		g := startGatewayCmd(t, cmd, dir)
		g.provide("echo", "a.sock", gwEcho)
		require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", "http://hook.invalid/", 1)))
		if through {
			require.Equal(t, "hook.invalid", gwWithin(t, proxied))
		} else {
			g.hasMetric(`acomm_gateway_forward_failures_total{task="echo"} 1`)
			require.Empty(t, proxied)
		}
		g.stop()
	}
}

func TestGateway_ResponseIsSentAgainOnlyWhereItDidNotArrive(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	var mu sync.Mutex
	tries := map[string]int{}
	done := make(chan struct{}, 4)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		tries[r.URL.Path]++
		switch {
		case r.URL.Path == "/later" && tries[r.URL.Path] < 3:
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/fail": // as a proxy that may have passed it on
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			done <- struct{}{}
		}
	}))
	defer server.Close()
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", server.URL+"/later", 1)))
	gwWithin(t, done)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", server.URL+"/fail", 1)))
	g.hasMetric(`acomm_gateway_forward_failures_total{task="echo"} 1`)
	g.hasMetric(`acomm_gateway_outstanding 0`)
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, map[string]int{"/later": 3, "/fail": 1}, tries)
	g.stop()
}

func TestGateway_LimitOfOutstandingRequests(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-outstanding", "1", "--timeout", "10s")
	release := make(chan struct{})
	g.provide("wait", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		go func() { <-release; _ = req.Respond(&acomm.Response{ID: req.ID}) }()
		return nil, nil
	})
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "wait", hook, nil)))
	require.ErrorContains(t, acomm.Send(g.url, gwRequest(t, "wait", hook, nil)), "429")
	close(release)
	gwWithin(t, responses)
	g.hasMetric(`acomm_gateway_outstanding 0`)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "wait", hook, nil)))
	gwWithin(t, responses)
	g.stop()
}

func TestGateway_SignalWaitsForOutstandingRequests(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) { testSignalWaits(t, sig) })
	}
}

func testSignalWaits(t *testing.T, sig syscall.Signal) {
	if signal.Ignored(sig) {
		t.Skip("ignored, as with nohup")
	}
	g := startGateway(t)
	release := make(chan struct{})
	defer func() {
		select {
		case <-release:
		default:
			close(release)
		}
	}()
	g.provide("wait", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		go func() { <-release; _ = req.Respond(&acomm.Response{ID: req.ID}) }()
		return nil, nil
	})
	hook, responses := gwHook(t)
	req := gwRequest(t, "wait", hook, nil)
	require.NoError(t, acomm.Send(g.url, req))
	g.signal(sig)
	g.waitLine("draining")
	status, _ := g.get("healthz")
	require.Equal(t, http.StatusServiceUnavailable, status)
	status, resp := g.post("POST", "{}")
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.ErrorContains(t, resp.Error, "ending")
	require.Empty(t, responses)
	close(release)
	require.Equal(t, req.ID, gwWithin(t, responses).ID)
	require.Equal(t, 0, g.wait(), g.said())
}

func TestGateway_SecondSIGTERMEndsAtOnce(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
	hook, _ := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "silent", hook, nil)))
	g.signal(syscall.SIGTERM)
	g.waitLine("draining")
	g.signalUntilEnd(syscall.SIGTERM)
	require.Equal(t, exitTask, g.wait())
	require.Contains(t, g.said(), "1 requests outstanding")
	require.NoFileExists(t, filepath.Join(g.dir, "response", "gw.sock"))
}

func TestGateway_ConfigurationFileAndEnvironment(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"c.yaml": "name: from-file\ntimeout: 2s\nmax-body: 64KiB\nhook-deny: [127.0.0.2, 127.0.0.3]\nlisten: 127.0.0.1:0\n",
		"c.toml": "name = \"from-file\"\ntimeout = \"2s\"\nmax-body = 65536\nhook-deny = [\"127.0.0.2\", \"127.0.0.3\"]\nlisten = \"127.0.0.1:0\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			file := filepath.Join(dir, name)
			require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
			cmd := acommCmd(t, "gateway", "--config", file, "--timeout", "250ms")
			cmd.Env = append(cmd.Env, "ACOMM_SOCKET_DIR="+dir, "ACOMM_NAME=from-env", "ACOMM_TIMEOUT=1h")
			g := startGatewayCmd(t, cmd, dir)
			require.FileExists(t, filepath.Join(dir, "coordinator", "from-env.sock"))
			g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
			require.ErrorContains(t, acomm.Send(g.url, gwRequest(t, "silent", "http://127.0.0.3/", nil)), "hooks may not lead")
			require.ErrorContains(t, acomm.Send(g.url, gwRequest(t, "silent", "http://x/", strings.Repeat("x", 1<<16))), "413")
			hook, responses := gwHook(t)
			require.NoError(t, acomm.Send(g.url, gwRequest(t, "silent", hook, nil)))
			require.EqualError(t, gwWithin(t, responses).Error, "response timeout")
			g.stop()
		})
	}
}

// Hazard: ids and hooks are kept while requests are outstanding, so that a few
// large ones took all memory.
func TestGateway_LargeIDsAndHooksAreRefused(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	for id, hook := range map[string]string{
		strings.Repeat("x", 1025): "http://127.0.0.1:9/",
		"id":                      "http://127.0.0.1:9/" + strings.Repeat("x", 8<<10),
	} {
		u, err := url.Parse(hook)
		require.NoError(t, err)
		body, err := json.Marshal(&acomm.Request{ID: id, Task: "echo", ResponseHook: u})
		require.NoError(t, err)
		status, resp := g.post("POST", string(body))
		require.Equal(t, http.StatusBadRequest, status)
		require.ErrorContains(t, resp.Error, "(limit ")
	}
	g.stop()
}

func TestGateway_WrongUsage(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	file := filepath.Join(dir, "c.yaml")
	require.NoError(t, os.WriteFile(file, []byte("no-such-flag: 1\n"), 0o600))
	base := []string{"gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0"}
	for _, args := range [][]string{
		{"gateway"},
		{"gateway", "--socket-dir", dir},
		append(base, "--config", file),
		append(base, "--config", filepath.Join(dir, "missing.yaml")),
		append(base, "--timeout", "-1s"),
		append(base, "--max-body", "many"),
		append(base, "--hook-deny", "everything"),
		append(base, "--name", "../x"),
		append(base, "--stream-url", "nonsense"),
		{"gateway", "--socket-dir", dir, "--listen", "nonsense"},
		{"gateway", "--socket-dir", dir, "--listen", "127.0.0.1:99999"},
		append(base, "--nats", "embedded", "--nats-listen", "127.0.0.1:-7"),
	} {
		r := runAcomm(t, args...)
		require.Equal(t, exitUsage, r.code, "%v: %s", args, r.stderr)
		require.NotEmpty(t, r.stderr)
	}
	cmd := acommCmd(t, base...)
	cmd.Env = append(cmd.Env, "ACOMM_TIMEOUT=soon")
	require.Equal(t, exitUsage, runCmd(t, cmd).code, "a setting of the environment that makes no sense")
}

func TestHookRules(t *testing.T) {
	for _, test := range []struct {
		allow, deny string
		addr        string
		ok          bool
	}{
		{"", "", "93.184.216.34", true},
		{"", "", "127.0.0.1", true},
		{"", "", "169.254.169.254", false},
		{"", "", "::ffff:169.254.169.254", false},
		{"", "", "64:ff9b::a9fe:a9fe", false},
		{"", "", "64:ff9b:1::a9fe:a9fe", false},
		{"", "", "2002:a9fe:a9fe::1", false},
		{"", "", "fe80::1%eth0", false},
		{"", "", "fd00:ec2::254", false},
		{"", "", "fd20:ce::254", false},
		{"", "", "100.100.100.200", false},
		{"", "", "192.0.0.192", false},
		{"", "", "2001::a9fe:a9fe", false},
		{"", "", "0.0.0.0", false},
		{"", "", "::", false},
		{"169.254.0.0/16", "", "169.254.169.254", true},
		{"0.0.0.0/0", "", "169.254.169.254", false},
		{"169.254.1.1", "", "169.254.1.1", true},
		{"169.254.1.1", "", "169.254.1.2", false},
		{"10.1.0.0/16", "0.0.0.0/0,::/0", "10.1.2.3", true},
		{"10.1.0.0/16", "0.0.0.0/0,::/0", "10.2.2.3", false},
		{"10.1.0.0/16", "0.0.0.0/0,::/0", "2001:db8::1", false},
		{"10.0.0.0/8", "10.0.0.0/8", "10.0.0.1", false},
	} {
		split := func(s string) []string {
			return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
		}
		rules, err := newHookRules(split(test.allow), split(test.deny))
		require.NoError(t, err)
		err = rules.check(netip.MustParseAddr(test.addr))
		require.Equal(t, test.ok, err == nil, "%+v", test)
	}
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "1000": 1000, "64KiB": 64 << 10, "1 MiB": 1 << 20, "2GiB": 2 << 30} {
		var b byteSize
		require.NoError(t, b.Set(text))
		require.Equal(t, want, int64(b), text)
	}
	for _, text := range []string{"", "-1", "1k", "MiB", "9999999999GiB"} {
		require.Error(t, new(byteSize).Set(text), text)
	}
}

// provideStream runs a provider of the task whose response has the source as its
// stream, and returns where the gateway has the stream.
func (g *gatewayRun) provideStream(task string, source io.ReadCloser) *url.URL {
	t := g.t
	t.Helper()
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	g.provide(task, "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		u, err := tracker.NewStreamUnix("", source)
		return &acomm.Response{ID: req.ID, StreamURL: u}, err
	})
	hook, responses := gwHook(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, task, hook, nil)))
	resp := gwWithin(t, responses)
	require.NoError(t, resp.Error)
	return resp.StreamURL
}

// endless gives zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Hazard: a stream that stands still holds the end of the gateway up until the
// second signal. It takes the 10 s that a stream may stand still, so all are
// signalled first.
func TestGateway_StalledStreamDoesNotHoldTheEndUp(t *testing.T) {
	t.Parallel()
	var checks []func()
	for _, test := range []struct {
		source  io.ReadCloser
		version string
		reads   bool
	}{
		{stalled("data"), "1.0", true},
		{stalled("data"), "1.1", true},
		{io.NopCloser(endless{}), "1.0", false},
		{io.NopCloser(endless{}), "1.1", false},
	} {
		g := startGateway(t)
		stream := g.provideStream("read", test.source)
		conn, err := net.Dial("tcp", stream.Host)
		require.NoError(t, err)
		defer conn.Close()
		_, err = fmt.Fprintf(conn, "GET %s HTTP/%s\r\nHost: %s\r\n\r\n", stream.RequestURI(), test.version, stream.Host)
		require.NoError(t, err)
		answer := bufio.NewReader(conn)
		line, err := answer.ReadString('\n') // the stream is under way
		require.NoError(t, err)
		require.Contains(t, line, "200 OK")
		g.signal(syscall.SIGTERM)
		checks = append(checks, func() {
			if test.reads {
				got, err := io.ReadAll(answer)
				require.Contains(t, string(got), "data")
				require.NotContains(t, string(got), "\r\n0\r\n", "it is not complete")
				if test.version == "1.0" {
					require.ErrorIs(t, err, syscall.ECONNRESET)
				}
			}
			require.Equal(t, 0, g.wait(), "%s %v: %s", test.version, test.reads, g.said())
			require.Contains(t, g.said(), "drained")
		})
	}
	for _, check := range checks {
		check()
	}
}

func TestGateway_StreamThatMovesGoesOnWhileDraining(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	source, w := io.Pipe()
	stream := g.provideStream("read", source)
	dest, got := io.Pipe()
	read := make(chan error, 1)
	go func() {
		err := acomm.Stream(got, stream)
		_ = got.Close()
		read <- err
	}()
	buf := make([]byte, 1)
	for i := range 100 {
		if i == 10 {
			g.signal(syscall.SIGTERM)
			g.waitLine("draining")
		}
		_, err := w.Write([]byte{byte(i)})
		require.NoError(t, err)
		_, err = io.ReadFull(dest, buf)
		require.NoError(t, err)
		require.Equal(t, byte(i), buf[0])
	}
	require.NoError(t, w.Close())
	require.NoError(t, gwWithin(t, read))
	require.Equal(t, 0, g.wait(), g.said())
}
