package acomm_test

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mistifyio/acomm"
)

// sendAtOnce sends a number of payloads and waits until all are acknowledged.
func sendAtOnce(t testing.TB, addr *url.URL, number int) {
	t.Helper()
	errs := make(chan error, number)
	for i := range number {
		go func() { errs <- acomm.Send(addr, i) }()
	}
	for range number {
		require.NoError(t, within(t, errs, "the acknowledgement"))
	}
}

// countingHook is a hook that takes so long, and counts its connections.
func countingHook(t testing.TB, takes time.Duration) (addr *url.URL, opened *counter) {
	t.Helper()
	opened = &counter{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		time.Sleep(takes) // it orders nothing: it is what the hook is like
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.add()
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	addr, err := url.Parse(server.URL)
	require.NoError(t, err)
	return addr, opened
}

// Hazard: each burst opens a connection for each of its posts, and throws all but two
// away; whether it does depends on how fast the hook is.
func TestSend_BurstsKeepTheirConnectionsHoweverSlowTheHookIs(t *testing.T) {
	for _, takes := range []time.Duration{0, 5 * time.Millisecond, 50 * time.Millisecond} {
		t.Run(takes.String(), func(t *testing.T) {
			newTransport(t)
			addr, opened := countingHook(t, takes)
			bursts := 40
			if takes > 5*time.Millisecond {
				bursts = 10
			}
			for range bursts {
				sendAtOnce(t, addr, 32)
			}
			require.LessOrEqual(t, opened.load(), acomm.MaxPosts)
		})
	}
}

// hangingHook is a hook that answers nobody until it is told to, or the test ends.
func hangingHook(t testing.TB) (addr *url.URL, arrived *counter, answer func()) {
	t.Helper()
	arrived = &counter{}
	told := make(chan struct{})
	addr = httpPeer(t, func(http.ResponseWriter, *http.Request) {
		arrived.add()
		<-told
	})
	answer = sync.OnceFunc(func() { close(told) })
	t.Cleanup(answer) // before the server is closed, which waits for its handlers
	return addr, arrived, answer
}

// Hazard: a hook that hangs takes a descriptor for each response, until there is none
// for the others.
func TestSend_AHookThatHangsTakesItsShareAndNoMore(t *testing.T) {
	newTransport(t)
	const number = 3 * acomm.MaxPosts
	hung, arrived, answer := hangingHook(t)
	sent := async(func() { sendAtOnce(t, hung, number) })
	requireReached(t, arrived, acomm.MaxPosts, "the hook that hangs")
	healthy := httpPeer(t, func(http.ResponseWriter, *http.Request) {})
	sendAtOnce(t, healthy, 200)
	require.Equal(t, acomm.MaxPosts, arrived.load(), "the others wait")
	answer()
	within(t, sent, "the hook that hung")
	require.Equal(t, number, arrived.load())
	require.Zero(t, acomm.HostsPostedTo())
}

// Who waits for a turn is bounded as everybody, and nobody has the payload.
func TestSend_WaitingForATurnEndsInTime(t *testing.T) {
	newTransport(t)
	hung, arrived, answer := hangingHook(t)
	sent := async(func() { sendAtOnce(t, hung, acomm.MaxPosts) })
	requireReached(t, arrived, acomm.MaxPosts, "the hook")
	err := sendSoon(t, hung, 1, 20*time.Millisecond)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.True(t, acomm.NotDelivered(err))
	answer()
	within(t, sent, "the hook")
}

// A service that asks for more connections posts as many at a time.
func TestSend_MoreIdleConnectionsAreMorePosts(t *testing.T) {
	const number = acomm.MaxPosts + 50
	for name, set := range map[string]func(*http.Transport){
		"more":     func(transport *http.Transport) { transport.MaxIdleConnsPerHost = number },
		"no limit": func(transport *http.Transport) { transport.MaxIdleConnsPerHost = 1 << 62 },
	} {
		t.Run(name, func(t *testing.T) {
			set(newTransport(t))
			var missing sync.WaitGroup
			missing.Add(number)
			sendAtOnce(t, httpPeer(t, func(http.ResponseWriter, *http.Request) {
				missing.Done()
				missing.Wait()
			}), number)
		})
	}
}

// What a service sets on http.DefaultTransport applies, before the first post and after.
func TestSend_SettingsOfTheDefaultTransportApply(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	transport := newTransport(t)

	require.Error(t, acomm.Send(addr, 1), "the server's certificate is unknown")
	transport.TLSClientConfig = &tls.Config{RootCAs: secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	require.NoError(t, acomm.Send(addr, 1), "it is known now, and HTTP/2 is spoken")

	var dialled [2]atomic.Int32
	peer := httpPeer(t, func(http.ResponseWriter, *http.Request) {})
	for i := range dialled { // closures of the same code
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled[i].Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
		require.NoError(t, acomm.Send(peer, 1))
		require.NoError(t, acomm.Send(peer, 1))
		require.EqualValues(t, 1, dialled[i].Load(), "a new connection with the new setting, kept for the second post")
	}

	proxied := make(chan string, 1)
	proxy := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) { proxied <- r.URL.Host })
	transport.Proxy = http.ProxyURL(proxy)
	require.NoError(t, acomm.Send(&url.URL{Scheme: "http", Host: "hook.test"}, 1))
	require.Equal(t, "hook.test", <-proxied)

	denied := errors.New("denied")
	for name, guard := range map[string]http.RoundTripper{
		"a type of the service": roundTripper(func(*http.Request) (*http.Response, error) { return nil, denied }),
		"a Transport": &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, denied
		}},
	} {
		registered := newTransport(t)
		registered.RegisterProtocol("http", guard)
		require.ErrorIs(t, acomm.Send(peer, 1), denied, name)
		registered = &http.Transport{} // one that has not spoken HTTP/2
		replaceTransport(t, registered)
		registered.RegisterProtocol("https", guard)
		require.ErrorIs(t, acomm.Send(&url.URL{Scheme: "https", Host: peer.Host}, 1), denied, name)
	}

	replaced := errors.New("replaced")
	http.DefaultTransport = roundTripper(func(*http.Request) (*http.Response, error) { return nil, replaced })
	require.ErrorIs(t, acomm.Send(peer, 1), replaced)
}

// Hazard: a Transport with no settings speaks HTTP/2, and its clone offers it without
// speaking it; what is changed inside of its settings is not the clone's.
func TestSend_PlainTransportSpeaksHTTP2AndKeepsItsSettings(t *testing.T) {
	protos := make(chan int, 10)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { protos <- r.ProtoMajor }))
	secure.EnableHTTP2 = true
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	transport := &http.Transport{}
	replaceTransport(t, transport)
	require.Error(t, acomm.Send(addr, 1), "the certificate is unknown")
	transport.TLSClientConfig.RootCAs = secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	require.NoError(t, acomm.Send(addr, 1))
	require.Equal(t, 2, <-protos)
	answer, err := http.Post(secure.URL, "text/plain", nil)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, 2, <-protos, "as the transport itself")
}

// Hazard: nobody but Send knows the connections that it keeps, so without a time-out
// they, and their goroutines, stay for good.
func TestSend_IdleConnectionsAreClosedInTime(t *testing.T) {
	for name, timeout := range map[string]time.Duration{"not set": 0, "set": 10 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				closed := make(chan time.Time, 1)
				replaceTransport(t, &http.Transport{
					IdleConnTimeout: timeout,
					DialContext: func(context.Context, string, string) (net.Conn, error) {
						conn, far := net.Pipe()
						go func() { acceptOne(far); closed <- time.Now() }()
						return conn, nil
					},
				})
				require.NoError(t, acomm.Send(&url.URL{Scheme: "http", Host: "hook.test"}, 1))
				sent := time.Now()
				require.Equal(t, cmp.Or(timeout, 90*time.Second), (<-closed).Sub(sent))
			})
		})
	}
}

// acceptOne acknowledges one post, and returns when the connection is closed.
func acceptOne(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, req.Body)
	_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
	_, _ = io.Copy(io.Discard, in)
}

// Hazard: the first use of a clone writes into the TLS settings that the service's own
// requests read meanwhile. It shows only under -race.
func TestSend_DoesNotRaceWithTheServicesOwnRequests(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	get := func() error { // on a new connection, so that it reads the settings
		req, err := http.NewRequest(http.MethodGet, secure.URL, nil)
		if err != nil {
			return err
		}
		req.Close = true
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		return answer.Body.Close()
	}
	for range 5 {
		newTransport(t).TLSClientConfig = &tls.Config{RootCAs: secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
		require.NoError(t, get(), "the transport is complete")
		start, errs := make(chan struct{}), make(chan error, 5)
		for range 4 {
			go func() { <-start; errs <- get() }()
		}
		go func() { <-start; errs <- acomm.Send(addr, 1) }()
		close(start)
		for range 5 {
			require.NoError(t, within(t, errs, "the requests"))
		}
	}
}

// Strangers choose hooks: a host has as many turns however it is spelled.
func TestSend_TurnsAreOfAHostHoweverItIsSpelled(t *testing.T) {
	for _, pair := range [][2]string{
		{"http://Hook.test/a", "http://hook.test.:80/b"}, {"https://hook.test", "https://hook.test:443/"}, {"http://[::1]/", "http://[::1]:80/"},
	} {
		one, err := url.Parse(pair[0])
		require.NoError(t, err)
		other, err := url.Parse(pair[1])
		require.NoError(t, err)
		require.Equal(t, acomm.HostOf(one), acomm.HostOf(other))
	}
	one, other := url.URL{Scheme: "http", Host: "a:81"}, url.URL{Scheme: "http", Host: "a:82"}
	require.NotEqual(t, acomm.HostOf(&one), acomm.HostOf(&other))
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
func TestForward_AfterARedirect(t *testing.T) {
	captureLog(t)
	for name, test := range map[string]struct {
		location string
		again    bool
	}{
		"nobody listens":    {"http://" + freePort(t) + "/", true},
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

// freePort is an address where nobody listens.
func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

// Hazard: a gateway has passed the response on, and answers 503 because what came back
// broke off: the hook handles it three times.
func TestForward_A503WithoutRetryAfterIsNoReasonToTryAgain(t *testing.T) {
	captureLog(t)
	for name, test := range map[string]struct {
		status     int
		retryAfter string
		tries      int
	}{
		"503":                   {http.StatusServiceUnavailable, "", 1},
		"503 with a wrong time": {http.StatusServiceUnavailable, "soon", 1},
		"503 with a time":       {http.StatusServiceUnavailable, "0", 3},
		"429":                   {http.StatusTooManyRequests, "", 3},
	} {
		t.Run(name, func(t *testing.T) {
			var tries counter
			hook := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
				tries.add()
				if tries.load() == 3 {
					return
				}
				if test.retryAfter != "" {
					w.Header().Set("Retry-After", test.retryAfter)
				}
				w.WriteHeader(test.status)
			})
			forwardOnce(t, hook)
			require.Equal(t, test.tries, tries.load())
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

// Hazard: the race detector does not see what writev reads, so a variable that is
// written before Send and read in a handler of the same process is reported as a race,
// and so is one that is written before the acknowledgement. They show only under -race.
func TestSend_HappensBeforeItsHandlerAndItsAcknowledgementAfter(t *testing.T) {
	ul := startListener(t, "", 0)
	for _, size := range []int{1, 5_000, 5_000, 100_000} { // the second and third on a session
		sent, read := 0, 0
		go func() {
			conn := ul.NextConn()
			defer ul.DoneConn(conn)
			var payload string
			if acomm.UnmarshalConnData(conn, &payload) == nil {
				read = sent
				_ = acomm.SendConnData(conn, &acomm.Response{})
			}
		}()
		sent = size
		require.NoError(t, acomm.Send(ul.URL(), string(make([]byte, size))))
		require.Equal(t, size, read)
	}
}
