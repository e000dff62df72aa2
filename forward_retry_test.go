package acomm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// When a response is forwarded again, and when it is not.

// refusals tells of connections that http.DefaultTransport could not make because
// nobody listens.
type refusals struct {
	mu    sync.Mutex
	addrs map[string]chan struct{}
}

func watchRefusals(t testing.TB) *refusals {
	r := &refusals{addrs: make(map[string]chan struct{})}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	dial := transport.DialContext
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if errors.Is(err, syscall.ECONNREFUSED) {
			r.of(addr) <- struct{}{}
		}
		return conn, err
	}
	t.Cleanup(transport.CloseIdleConnections)
	replaceTransport(t, transport)
	return r
}

// of returns the channel that has a value for each refusal at the address.
func (r *refusals) of(addr string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.addrs[addr] == nil {
		r.addrs[addr] = make(chan struct{}, 1000)
	}
	return r.addrs[addr]
}

func TestForward_WaitsForAHookThatNobodyServesYet(t *testing.T) {
	addr, listen := unboundPort(t)
	refused := watchRefusals(t).of(addr)
	tracker := newTracker(t)
	log := captureLog(t)
	req, proxied := proxy(t, tracker, &url.URL{Scheme: "http", Host: addr, Path: "/"}, patience)
	require.NoError(t, proxied.Respond(answerTo(t, proxied, "patient", nil)))
	for range 3 {
		within(t, refused, "an attempt")
	}

	hook := &forwardHook{bodies: make(chan []byte, 10)}
	server := &httptest.Server{Listener: listen(), Config: &http.Server{Handler: hook.handler(nil)}}
	server.Start()
	defer server.Close()
	want := `{"error":"","id":"` + req.ID + `","result":"patient","stream_url":null}`
	require.JSONEq(t, want, string(within(t, hook.bodies, "the response")))
	tracker.Stop()
	require.Empty(t, hook.bodies, "exactly once")
	require.Empty(t, log.String())
}

func TestForward_TriesAgainWhenToldTo(t *testing.T) {
	httpTime := func(in time.Duration) string { return time.Now().Add(in).UTC().Format(http.TimeFormat) }
	for name, c := range map[string]struct {
		status     int
		retryAfter func() string
		atLeast    time.Duration // from the first attempt to the last
		attempts   int
	}{
		"429":             {http.StatusTooManyRequests, nil, 30 * time.Millisecond, 3},
		"503 at once":     {http.StatusServiceUnavailable, func() string { return "0" }, 30 * time.Millisecond, 3},
		"429 in no time":  {http.StatusTooManyRequests, func() string { return "0" }, 30 * time.Millisecond, 3},
		"429 unreadable":  {http.StatusTooManyRequests, func() string { return "soon" }, 30 * time.Millisecond, 3},
		"503 in a second": {http.StatusServiceUnavailable, func() string { return "1" }, time.Second, 2},
		"429 at a time":   {http.StatusTooManyRequests, func() string { return httpTime(2 * time.Second) }, time.Second, 2},
		"503 in the past": {http.StatusServiceUnavailable, func() string { return httpTime(-time.Hour) }, 30 * time.Millisecond, 3},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var times []time.Time
			hook := newForwardHook(t, func(w http.ResponseWriter, _ *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				times = append(times, time.Now())
				if len(times) == c.attempts {
					return // accepted
				}
				if c.retryAfter != nil {
					w.Header().Set("Retry-After", c.retryAfter())
				}
				w.WriteHeader(c.status)
			})
			tracker := newTracker(t)
			log := captureLog(t)
			_, proxied := proxy(t, tracker, hook.url, patience)
			require.NoError(t, proxied.Respond(answerTo(t, proxied, "again", nil)))
			tracker.Stop()
			require.Len(t, times, c.attempts)
			require.GreaterOrEqual(t, times[c.attempts-1].Sub(times[0]), c.atLeast)
			require.Empty(t, log.String())
			first := <-hook.bodies
			for range c.attempts - 1 {
				require.Equal(t, string(first), string(<-hook.bodies))
			}
		})
	}
}

func TestForward_LastAttemptIsAtTheDeadline(t *testing.T) {
	const timeout = 400 * time.Millisecond
	for name, last := range map[string]int{"back": http.StatusOK, "not back": http.StatusServiceUnavailable} {
		t.Run(name, func(t *testing.T) {
			attempts := make(chan time.Time, 10)
			hook := newForwardHook(t, func(w http.ResponseWriter, _ *http.Request) {
				attempts <- time.Now()
				if len(attempts) == 1 {
					w.Header().Set("Retry-After", "3600")
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				w.WriteHeader(last)
			})
			tracker := newTracker(t)
			log := captureLog(t)
			tracked := time.Now()
			_, proxied := proxy(t, tracker, hook.url, timeout)
			within(t, async(func() { tracker.HandleResponse(answerTo(t, proxied, nil, nil)) }), "the end of the forward")
			require.Len(t, attempts, 2)
			require.Less(t, (<-attempts).Sub(tracked), timeout, "at once")
			require.GreaterOrEqual(t, (<-attempts).Sub(tracked), timeout, "at the deadline")
			require.Equal(t, last != http.StatusOK, strings.Contains(log.String(), "failed to forward"))
		})
	}
}

func TestForward_GivesUpAtTheDeadlineAndLogs(t *testing.T) {
	const timeout = 300 * time.Millisecond
	nobody, _ := unboundPort(t)
	busy := newForwardHook(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) })
	for name, host := range map[string]string{"nobody listens": nobody, "busy": busy.url.Host} {
		t.Run(name, func(t *testing.T) {
			tracker := newTracker(t)
			log := captureLog(t)
			tracked := time.Now()
			req, proxied := proxy(t, tracker, &url.URL{
				Scheme: "http", User: url.UserPassword("user", "password"), Host: host, Path: "/hook",
			}, timeout)
			within(t, async(func() { tracker.HandleResponse(answerTo(t, proxied, "result", nil)) }), "the end of the forward")
			require.GreaterOrEqual(t, time.Since(tracked), timeout)
			require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
			for _, part := range []string{"level=error", "error=", "id=" + req.ID, "addr=", "user:xxxxx@" + host} {
				require.Contains(t, log.String(), part)
			}
			require.NotContains(t, log.String(), "password")
		})
	}
	require.Greater(t, len(busy.bodies), 1, "attempts")
}

func TestForward_ATimeoutIsTriedOnce(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	hook := newForwardHook(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	proxy(t, tracker, hook.url, time.Millisecond)
	within(t, hook.bodies, "the attempt")
	tracker.Stop()
	require.Empty(t, hook.bodies)
	require.Contains(t, log.String(), "503")
}

// Hazards: 404 and 500 with a JSON body count as delivered, 302 silently loses
// the payload; a forward that may have arrived is sent a second time.
func TestForward_WhatMayHaveArrivedIsNotSentAgain(t *testing.T) {
	cut := func(linger int, answer string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			conn, buf, err := w.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			_, _ = buf.WriteString(answer)
			_ = buf.Flush()
			if linger == 0 {
				_ = conn.(*net.TCPConn).SetLinger(0)
			}
			_ = conn.Close()
		}
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		logged string
	}{
		"200 refused": {func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"error":"not mine"}`)
		}, "not mine"},
		"200 unreadable": {func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "thanks")
		}, "200 OK"},
		"500": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"error":""}`)
		}, "500 Internal Server Error"},
		"404": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"error":"no such hook"}`)
		}, "404 Not Found: no such hook"},
		"302": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "302 Found"},
		"503 of a gateway, which has passed it on": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
		}, "503 Service Unavailable"},
		"503 with a wrong Retry-After": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "soon")
			w.WriteHeader(http.StatusServiceUnavailable)
		}, "503 Service Unavailable"},
		"502 with Retry-After": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusBadGateway)
		}, "502 Bad Gateway"},
		"reset":            {cut(0, ""), "reset"},
		"no answer":        {cut(-1, ""), "EOF"},
		"half a header":    {cut(-1, "HTTP/1.1 200"), "EOF"},
		"half an answer":   {cut(-1, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "EOF"},
		"what is not HTTP": {cut(-1, "hello\r\n\r\n"), "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			var attempts atomic.Int32
			hook := newForwardHook(t, func(w http.ResponseWriter, r *http.Request) {
				// The first one leaves a connection for the second: on a used
				// connection too, nothing is sent again.
				if attempts.Add(1) > 1 {
					c.answer(w, r)
				}
			})
			tracker := newTracker(t)
			log := captureLog(t)
			_, proxied := proxy(t, tracker, hook.url, time.Minute)
			tracker.HandleResponse(answerTo(t, proxied, "first", nil))
			require.Empty(t, log.String())

			req, proxied := proxy(t, tracker, hook.url, time.Minute)
			forwarded := async(func() { tracker.HandleResponse(answerTo(t, proxied, "second", nil)) })
			within(t, forwarded, "the end of the forward")
			require.EqualValues(t, 2, attempts.Load())
			require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
			require.Contains(t, log.String(), "id="+req.ID)
			require.Contains(t, log.String(), c.logged)
		})
	}
}

// forwardOnce has a tracker forward a response to the hook, and returns when that has
// come to an end.
func forwardOnce(t *testing.T, hook *url.URL) {
	t.Helper()
	tracker := newTracker(t)
	req := &acomm.Request{ID: "1", Task: "task", ResponseHook: hook}
	_, err := tracker.ProxyUnix(req, patience)
	require.NoError(t, err)
	within(t, async(func() { tracker.HandleResponse(&acomm.Response{ID: "1"}) }), "the forward")
}

// Hazard: where no connection was got, nothing was sent, and the response is given up
// all the same.
func TestForward_TriesAgainWhereNoConnectionWasGot(t *testing.T) {
	t.Run("the hook resets the TLS handshake", func(t *testing.T) {
		captureLog(t)
		hook, taken := handshakeResettingHook(t)
		forwardOnce(t, hook)
		require.Equal(t, 1, taken.load())
	})
	t.Run("the hook of a redirect resets the TLS handshake", func(t *testing.T) {
		captureLog(t)
		hook, taken := handshakeResettingHook(t)
		forwardOnce(t, redirectingHook(t, hook))
		require.Equal(t, 1, taken.load())
	})
	t.Run("a proxy refuses to connect", func(t *testing.T) {
		captureLog(t)
		var taken, asked counter
		hook := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { taken.add() }))
		defer hook.Close()
		proxy := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
			asked.add()
			if asked.load() <= 2 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			relay(w, r.Host)
		})
		transport := newTransport(t)
		transport.TLSClientConfig = hook.Client().Transport.(*http.Transport).TLSClientConfig
		transport.Proxy = http.ProxyURL(proxy)
		addr, err := url.Parse(hook.URL)
		require.NoError(t, err)
		forwardOnce(t, addr)
		require.Equal(t, 1, taken.load())
		require.Equal(t, 3, asked.load())
	})
}

// handshakeResettingHook is a hook that resets its first two TLS handshakes, and a
// transport that trusts it.
func handshakeResettingHook(t *testing.T) (addr *url.URL, taken *counter) {
	t.Helper()
	taken = &counter{}
	hook := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { taken.add() }))
	hook.Listener = &failingListener{Listener: hook.Listener, failures: 2}
	hook.StartTLS()
	t.Cleanup(hook.Close)
	newTransport(t).TLSClientConfig = hook.Client().Transport.(*http.Transport).TLSClientConfig
	addr, err := url.Parse(hook.URL)
	require.NoError(t, err)
	return addr, taken
}

// redirectingHook is a hook that sends posts on, with their payload.
func redirectingHook(t *testing.T, location *url.URL) *url.URL {
	return httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, location.String(), http.StatusTemporaryRedirect)
	})
}

// failingListener reads a byte from its first connections, and closes them.
type failingListener struct {
	net.Listener
	failures int
}

func (l *failingListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.failures == 0 {
			return conn, err
		}
		l.failures--
		_, _ = io.ReadFull(conn, make([]byte, 1))
		_ = conn.Close()
	}
}

// relay is a proxy's part after CONNECT.
func relay(w http.ResponseWriter, host string) {
	far, err := net.Dial("tcp", host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer far.Close()
	near, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer near.Close()
	_, _ = io.WriteString(near, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		_, _ = io.Copy(far, bufio.NewReader(buf))
		_ = far.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(near, far)
}

// Who redirects a post has not kept it, so what follows decides: a hook that nobody can
// connect to may come back, a redirect that leads nowhere is given up.
func TestForward_AfterARedirectTheLastHostDecides(t *testing.T) {
	captureLog(t)
	nobody, _ := unboundPort(t)
	for name, test := range map[string]struct {
		location string
		again    bool
	}{
		"nobody listens":    {"http://" + nobody + "/", true},
		"in a circle":       {"/", false},
		"to another scheme": {"ftp://localhost/", false},
	} {
		t.Run(name, func(t *testing.T) {
			var posts counter
			taken := httpPeer(t, func(http.ResponseWriter, *http.Request) {})
			hook := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
				posts.add()
				location := test.location
				if test.again && posts.load() == 3 {
					location = taken.String()
				}
				http.Redirect(w, r, location, http.StatusTemporaryRedirect)
			})
			newTransport(t)
			forwardOnce(t, hook)
			switch {
			case test.again:
				require.Equal(t, 3, posts.load())
			case test.location == "/":
				require.Equal(t, 11, posts.load(), "one post, ten redirects")
			default:
				require.Equal(t, 1, posts.load())
			}
		})
	}
}

// Hazard: a transport that does not say whether it had a connection is taken to have
// had none, and a response is forwarded twice.
func TestForward_ATransportThatSaysNothingIsNotTriedAgain(t *testing.T) {
	captureLog(t)
	var tries counter
	replaceTransport(t, roundTripper(func(*http.Request) (*http.Response, error) {
		tries.add()
		return nil, errors.New("broken off")
	}))
	forwardOnce(t, &url.URL{Scheme: "http", Host: "hook.test"})
	require.Equal(t, 1, tries.load())
}

// Hazard: what the transport of a redirect's first host has said of its connection is
// taken for a word of the second's, and a response is forwarded twice.
func TestForward_ARedirectToATransportThatSaysNothingIsNotTriedAgain(t *testing.T) {
	captureLog(t)
	var tries counter
	newTransport(t).RegisterProtocol("quiet", roundTripper(func(*http.Request) (*http.Response, error) {
		tries.add()
		return nil, errors.New("broken off")
	}))
	forwardOnce(t, redirectingHook(t, &url.URL{Scheme: "quiet", Host: "hook.test"}))
	require.Equal(t, 1, tries.load())
}
