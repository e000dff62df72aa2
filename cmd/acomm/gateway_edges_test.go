package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: who is refused, and sends nothing of the body that it has announced, held a
// place for ever, and the gateway did not end.
func TestGateway_WhoIsRefusedHoldsNoPlace(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		opts         gatewayOptions
		path, header string
	}{
		"no token":     {gatewayOptions{tokenFile: "tokens"}, "/", ""},
		"another site": {gatewayOptions{}, "/", "Sec-Fetch-Site: cross-site\r\n"},
		"no such path": {gatewayOptions{}, "/nosuch", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, addr := startHTTPWith(t, httpTimeouts{body: 50 * time.Millisecond, answer: patience}, &test.opts)
			conn := dialHTTP(t, addr)
			_, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: 100\r\n\r\n", test.path, test.header)
			require.NoError(t, err)
			answer, err := io.ReadAll(conn)
			require.NoError(t, err, "it is closed in time")
			require.Regexp(t, "^HTTP/1.1 40[134] ", string(answer))
		})
	}
}

// doorway is a gateway with short times, and a task whose provider tells the test what it
// has taken.
func doorway(t *testing.T) (g *gateway, addr string, taken <-chan *acomm.Request) {
	t.Helper()
	opts := &gatewayOptions{socketDir: shortDir(t), timeout: time.Hour}
	g, addr = startHTTPWith(t, httpTimeouts{body: 50 * time.Millisecond, answer: 50 * time.Millisecond}, opts)
	listener := acomm.NewUnixListener(filepath.Join(opts.socketDir, "slow", "1.sock"), 0)
	require.NoError(t, listener.Start())
	t.Cleanup(func() { listener.Stop(0) })
	requests := make(chan *acomm.Request, 1)
	go func() { // ends with the listener
		for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
			req := &acomm.Request{}
			if err := errors.Join(acomm.UnmarshalConnData(conn, req), acomm.SendConnData(conn, &acomm.Response{})); err != nil {
				t.Error(err)
			}
			listener.DoneConn(conn)
			requests <- req
		}
	}()
	return g, addr, requests
}

// Hazard: the times that bound a request and its answer end one that waits for its
// response, and a stream.
func TestGatewayTasks_TakeAsLongAsTheyTake(t *testing.T) {
	t.Parallel()
	const longer = 200 * time.Millisecond // than all times of the doorway
	for name, async := range map[string]bool{"the answer": false, "fetched": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g, addr, taken := doorway(t)
			run := &gatewayRun{running: &running{t: t}, url: &url.URL{Scheme: "http", Host: addr, Path: "/"}}
			location, args := "/tasks/slow", "1"
			if async {
				answer, _ := run.task(location, args, "Prefer", "respond-async")
				require.Equal(t, http.StatusAccepted, answer.StatusCode)
				args = ""
				location = answer.Header.Get("Location") + "?wait=1h"
			}
			got := make(chan string, 1)
			go func() {
				answer, body := run.task(location, args)
				got <- fmt.Sprint(answer.StatusCode, " ", body)
			}()
			req := gwWithin(t, taken)
			select {
			case early := <-got:
				require.FailNow(t, "answered before there was a response", early)
			case <-time.After(longer):
			}
			streams, err := acomm.NewTracker("", nil, 0)
			require.NoError(t, err)
			require.NoError(t, streams.Start())
			t.Cleanup(streams.Stop)
			source, w := io.Pipe()
			stream, err := streams.NewStreamUnix("", source)
			require.NoError(t, err)
			g.handleResponse(&acomm.Response{ID: req.ID, StreamURL: stream})
			_, _ = io.WriteString(w, "first ") // when it is being read
			select {
			case early := <-got:
				require.FailNow(t, "ended before its stream", early)
			case <-time.After(longer):
			}
			_, _ = io.WriteString(w, "last")
			_ = w.Close()
			require.Equal(t, "200 first last", gwWithin(t, got))
		})
	}
}

// Hazard: a provider that listens and does not answer held the requester up for a minute.
func TestGatewayTasks_ASilentProviderHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "1s")
	require.NoError(t, os.MkdirAll(filepath.Join(g.dir, "silent"), 0o700))
	l, err := net.Listen("unix", filepath.Join(g.dir, "silent", "1.sock"))
	require.NoError(t, err)
	defer l.Close()
	answer, _ := g.task("/tasks/silent?wait=1h", "1")
	require.Equal(t, http.StatusGatewayTimeout, answer.StatusCode, "--timeout bounds it")
	answer, _ = g.task("/tasks/silent", "1", "Prefer", "respond-async")
	require.Equal(t, http.StatusAccepted, answer.StatusCode)
	answer, _ = g.task(answer.Header.Get("Location")+"?wait=1h", "")
	require.Equal(t, http.StatusGatewayTimeout, answer.StatusCode)
	g.stop()
}

// Hazard: a response that was to be fetched was lost when the gateway ended.
func TestGatewayTasks_ResponsesAreFetchedWhileTheGatewayEnds(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	answer, _ := g.task("/tasks/echo", `"<a>&"`, "Prefer", "respond-async")
	require.Equal(t, http.StatusAccepted, answer.StatusCode)
	g.signal(syscall.SIGTERM)
	g.waitLine("draining")
	answer, body := g.task(answer.Header.Get("Location")+"?wait=10s", "")
	require.Equal(t, http.StatusOK, answer.StatusCode, body)
	require.Equal(t, `"<a>&"`, body, "nothing is written in another way")
	require.Equal(t, 0, g.wait(), g.said())
}

// What nobody can get any more is ended: its program has a place.
func TestGatewayTasks_StreamsThatNobodyGetsAreEnded(t *testing.T) {
	t.Parallel()
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	for name, test := range map[string]struct {
		header []string
		err    error
		status int
	}{
		"not fetched":       {[]string{"Prefer", "respond-async"}, nil, http.StatusAccepted},
		"beside an error":   {nil, errors.New("no"), http.StatusUnprocessableEntity},
		"its client is off": {},
	} {
		t.Run(name, func(t *testing.T) {
			source := newSilentSource()
			stream, err := tracker.NewStreamUnix("", source)
			require.NoError(t, err)
			if test.status == 0 { // it is in time to see the response, and too late for the client
				g, _, _ := doorway(t)
				g.streams.unread = time.Hour
				g.publish(&acomm.Response{StreamURL: stream})
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				r := httptest.NewRequest(http.MethodPost, "/tasks/x", nil).WithContext(ctx)
				g.answerTask(httptest.NewRecorder(), r, &taskResult{resp: &acomm.Response{StreamURL: stream}})
				gwWithin(t, (<-chan struct{})(source.closed))
				return
			}
			g := startGateway(t, "--timeout", "2s", "--unread-duration", "1s")
			g.provide("read", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
				return &acomm.Response{ID: req.ID, StreamURL: stream, Error: test.err}, nil
			})
			answer, body := g.task("/tasks/read", "1", test.header...)
			require.Equal(t, test.status, answer.StatusCode, body)
			gwWithin(t, (<-chan struct{})(source.closed))
			g.stop()
		})
	}
}

func TestGatewayTasks_OutstandingRequestsAreLimited(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--max-outstanding", "1", "--timeout", "2s")
	taken := make(chan *acomm.Request, 1)
	g.provide("silent", "a.sock", func(req *acomm.Request) (*acomm.Response, error) { taken <- req; return nil, nil })
	first := make(chan int, 1)
	go func() {
		answer, _ := g.task("/tasks/silent", "1")
		first <- answer.StatusCode
	}()
	req := gwWithin(t, taken)
	answer, body := g.task("/tasks/silent", "1")
	require.Equal(t, http.StatusTooManyRequests, answer.StatusCode, body)
	require.NotEmpty(t, answer.Header.Get("Retry-After"))
	require.NoError(t, req.Respond(&acomm.Response{ID: req.ID}))
	require.Equal(t, http.StatusOK, gwWithin(t, first))
	g.stop()
}

// Hazard: SIGHUP ended a gateway that was connecting to NATS.
func TestGateway_HangupReadsTheTokensAlsoWhileItConnects(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer silent.Close()
	file := filepath.Join(t.TempDir(), "tokens")
	require.NoError(t, os.WriteFile(file, []byte("secret\n"), 0o600))
	cmd := startAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0", "--token-file", file, "--nats", "nats://"+silent.Addr().String())
	conn, err := silent.Accept()
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	cmd.signal(syscall.SIGHUP)
	cmd.waitLine("tokens has no token")
	cmd.signal(syscall.SIGTERM)
	require.Contains(t, cmd.waitLine("stopped before it was connected"), "terminated")
	require.Equal(t, 0, cmd.wait(), cmd.said())
}

// Hazard: strangers fill the log with handshakes that fail.
func TestGateway_FailedHandshakesLogLittle(t *testing.T) {
	t.Parallel()
	ours := newAuthority(t)
	ours.signServer("server")
	g := startGateway(t, "--tls-cert", ours.file("server.pem"), "--tls-key", ours.file("server.key"))
	for range 300 {
		conn := dialHTTP(t, g.url.Host)
		_, err := io.WriteString(conn, "no TLS at all, nor anything else\n")
		require.NoError(t, err)
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	}
	g.stop()
	require.Less(t, strings.Count(g.said(), "handshake"), 150)
}

func TestPing_NeedsTheTokenOfTheGateway(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "tokens")
	require.NoError(t, os.WriteFile(file, []byte("secret\n"), 0o600))
	g := startGateway(t, "--token-file", file)
	got := runAcomm(t, "ping", "--count", "1", g.url.String())
	require.Equal(t, exitNotSent, got.code, got.stdout+got.stderr)
	require.Contains(t, got.stderr, "401")
	got = runAcomm(t, "ping", "--count", "1", "--token-file", file, g.url.String())
	require.Equal(t, 0, got.code, got.stderr)
	require.Equal(t, http.StatusUnauthorized, func() int { answer, _ := g.task("/responses/AAAA", ""); return answer.StatusCode }())
	g.stop()
}

func TestList_ExitStatusSaysWhatEndedIt(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 2)
	stalls := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"tasks":[`)
		_ = http.NewResponseController(w).Flush()
		arrived <- struct{}{}
		<-r.Context().Done()
	}))
	t.Cleanup(stalls.Close)
	got := runAcomm(t, "list", "--timeout", "300ms", stalls.URL)
	require.Equal(t, exitTimeout, got.code, got.stderr)
	<-arrived
	cmd := startAcomm(t, "list", "--timeout", "1m", stalls.URL)
	<-arrived
	cmd.signal(syscall.SIGTERM)
	require.Equal(t, 128+int(syscall.SIGTERM), cmd.wait(), cmd.said())
}

func TestSettings_AnEmptyListIsEmpty(t *testing.T) {
	for name, text := range map[string]string{"c.yaml": "hook-allow: []\n", "c.json": `{"hook-allow": []}`} {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		values, err := readConfiguration(path)
		require.NoError(t, err)
		require.Empty(t, values["hook-allow"].text("strings"), name)
	}
}

// A redirect from https to http on the same port gets no secret.
func TestServiceTransport_OtherSchemesGetNothing(t *testing.T) {
	var seen []string
	see := func(name string) http.RoundTripper {
		return roundTrip(func(r *http.Request) (*http.Response, error) {
			seen = append(seen, name+r.Header.Get("Authorization"))
			return nil, io.EOF
		})
	}
	transport := &serviceTransport{see("service "), see("other "), "https", "h:1", http.Header{"Authorization": {"secret"}}}
	for _, target := range []string{"https://h:1/", "http://h:1/", "https://h:2/"} {
		r, err := http.NewRequest(http.MethodGet, target, nil)
		require.NoError(t, err)
		_, err = transport.RoundTrip(r)
		require.ErrorIs(t, err, io.EOF)
	}
	require.Equal(t, []string{"service secret", "other ", "other "}, seen)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
