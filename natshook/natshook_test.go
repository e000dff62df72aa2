package natshook_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

func TestSend_IsAcknowledgedByTheHandler(t *testing.T) {
	requester, provider := pair(t)
	type seen struct {
		method, url, contentType string
		req                      acomm.Request
	}
	got := make(chan seen, 10)
	serve(t, provider, "worker.tasks", "workers", func(w http.ResponseWriter, r *http.Request) {
		s := seen{method: r.Method, url: r.URL.String(), contentType: r.Header.Get("Content-Type")}
		err := json.NewDecoder(r.Body).Decode(&s.req)
		got <- s
		acknowledge(w, err)
	})
	req, _ := newRequest(t, natshook.URL("answers"), "hello")
	for _, addr := range []*url.URL{
		natshook.URL("worker.tasks"),
		{Scheme: "nats", Host: requester.ConnectedAddr(), Path: "/worker.tasks"},
	} {
		require.NoError(t, acomm.Send(addr, req))
		s := within(t, got, "the request")
		require.Equal(t, "POST nats:///worker.tasks application/json", s.method+" "+s.url+" "+s.contentType)
		require.Equal(t, req.ID, s.req.ID)
		require.JSONEq(t, `"hello"`, string(*s.req.Args))
	}
	require.Empty(t, got)
}

func TestSend_KeepsTheTextOfARefusal(t *testing.T) {
	_, provider := pair(t)
	serve(t, provider, "refuses", "", func(w http.ResponseWriter, _ *http.Request) {
		acknowledge(w, errors.New("no such task: größer"))
	})
	serve(t, provider, "silent", "", func(http.ResponseWriter, *http.Request) {})
	require.EqualError(t, acomm.Send(natshook.URL("refuses"), "x"), "no such task: größer")
	require.NoError(t, acomm.Send(natshook.URL("silent"), "x"), "an empty answer accepts")
}

func TestRespond_ReachesTheRequestersTracker(t *testing.T) {
	_, nc := pair(t)
	tracker := newTracker(t)
	serve(t, nc, "answers", "", func(w http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		err := json.NewDecoder(r.Body).Decode(resp)
		if err == nil {
			tracker.HandleResponse(resp)
		}
		acknowledge(w, err)
	})
	req, responses := newRequest(t, natshook.URL("answers"), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	resp, err := acomm.NewResponse(req, "done", nil, nil)
	require.NoError(t, err)
	require.NoError(t, req.Respond(resp))
	require.JSONEq(t, `"done"`, string(*within(t, responses, "the response").Result))
}

func TestProxyUnix_ForwardsToANATSHook(t *testing.T) {
	_, nc := pair(t)
	transport, tries := http.DefaultTransport, make(chan error, 1000)
	http.DefaultTransport = roundTripperFunc(func(r *http.Request) (*http.Response, error) { // until pair undoes it
		answer, err := transport.RoundTrip(r)
		tries <- err
		return answer, err
	})
	tracker := newTracker(t)
	got := make(chan string, 10)
	req, _ := newRequest(t, natshook.URL("answers"), nil)
	proxied, err := tracker.ProxyUnix(req, patience)
	require.NoError(t, err)
	require.Equal(t, "unix", proxied.ResponseHook.Scheme)
	resp, err := acomm.NewResponse(proxied, "done", nil, nil)
	require.NoError(t, err)

	// Nobody serves the hook yet, so the forward is refused, and tried again.
	require.NoError(t, proxied.Respond(resp))
	for range 2 {
		require.ErrorIs(t, within(t, tries, "a try"), syscall.ECONNREFUSED)
	}
	serve(t, nc, "answers", "", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- string(body)
	})
	require.Contains(t, within(t, got, "the forward"), req.ID)
	tracker.Stop() // waits for the forward
	require.Empty(t, got)
}

func TestServe_QueueGroupSharesRequestsAndEachIsHandledOnce(t *testing.T) {
	s := startServer(t, server.Options{})
	register(t, connect(t, s))
	const providers, senders, each = 3, 8, 50
	var perProvider [providers]atomic.Int64
	handled := newTally()
	for i := range providers {
		serve(t, connect(t, s), "tasks", "workers", func(_ http.ResponseWriter, r *http.Request) {
			perProvider[i].Add(1)
			handled.add(readID(r))
		})
	}
	errs := make(chan error, senders*each)
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			for range each {
				errs <- acomm.Send(natshook.URL("tasks"), newID())
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	require.Equal(t, senders*each, handled.total())
	require.Equal(t, 1, handled.most())
	for i := range providers {
		require.NotZero(t, perProvider[i].Load(), "provider %d", i)
	}
}

func TestSend_Errors(t *testing.T) {
	requester, provider := pair(t)
	serve(t, provider, "tasks", "", func(http.ResponseWriter, *http.Request) {})
	release, held := make(chan struct{}), make(chan struct{}, 1)
	serve(t, provider, "slow", "", func(http.ResponseWriter, *http.Request) { held <- struct{}{}; <-release })
	t.Cleanup(func() { close(release) })
	sub, err := provider.Subscribe("stranger", func(m *nats.Msg) { _ = m.Respond([]byte(`{"stream":"s","seq":1}`)) })
	require.NoError(t, err)
	require.NoError(t, provider.Flush())
	defer func() { _ = sub.Unsubscribe() }()

	send := func(addr string) error {
		u, err := url.Parse(addr)
		require.NoError(t, err)
		return acomm.Send(u, "x")
	}
	require.NoError(t, send("nats:///tasks"))
	require.ErrorIs(t, send("nats:///nobody"), syscall.ECONNREFUSED)
	require.ErrorIs(t, send("nats:///nobody"), nats.ErrNoResponders)
	require.ErrorIs(t, send("nats:///stranger"), io.ErrUnexpectedEOF)
	for _, addr := range []string{"nats:///", "nats:", "nats:tasks", "nats:///a%20b", "nats:///a.*", "nats:///%3E",
		"nats:///a..b", "nats:///.a", "nats:///a.", "nats:///a%0d%0ab", "nats:///a%00", "nats:///%ff", "nats:///tasks?x=1", "nats:///tasks#x",
		"nats:///$SYS.REQ", "nats:///_INBOX.x", "nats:///" + strings.Repeat("a", 1025),
		"nats://elsewhere/tasks", "nats://elsewhere:4222/tasks", "nats://user:pw@" + requester.ConnectedAddr() + "/tasks"} {
		require.ErrorIs(t, send(addr), fs.ErrInvalid, addr)
	}
	require.ErrorIs(t, send("nats:///"+strings.Repeat("a", 1024)), syscall.ECONNREFUSED)
	limit := int(requester.MaxPayload())
	for _, size := range []int{limit + 1, limit - 3} { // by itself, and with its headers
		require.ErrorIs(t, acomm.Send(natshook.URL("tasks"), strings.Repeat("x", size-2)), syscall.EMSGSIZE)
	}
	require.NoError(t, acomm.Send(natshook.URL("tasks"), strings.Repeat("x", limit-1000)))

	undo := natshook.SetMaxWait(200 * time.Millisecond)
	defer undo()
	require.ErrorIs(t, send("nats:///slow"), os.ErrDeadlineExceeded)
	within(t, held, "the slow handler")

	// Only an earlier end of the caller's counts, and it is no time-out.
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "nats:///slow", nil)
	require.NoError(t, err)
	undo()
	go func() { <-held; cancel() }()
	_, err = http.DefaultTransport.RoundTrip(req)
	require.ErrorIs(t, err, context.Canceled)

	requester.Close()
	require.ErrorIs(t, send("nats:///tasks"), net.ErrClosed)
}

func TestSend_ThatWaitsEndsWhenTheConnectionIsClosed(t *testing.T) {
	requester, provider := pair(t)
	release := make(chan struct{})
	defer close(release)
	serve(t, provider, "slow", "", func(http.ResponseWriter, *http.Request) { requester.Close(); <-release })
	require.ErrorIs(t, acomm.Send(natshook.URL("slow"), "x"), net.ErrClosed)
}

// nats.go writes a large message at once, and then the socket's own error comes
// back: that it is closed must not be taken for the end of the connection.
func TestSend_LargeOneToALostServerIsCutOff(t *testing.T) {
	s := startServer(t, server.Options{})
	nc := connectTo(t, s.ClientURL(), nats.SetCustomDialer(cuttingDialer{}))
	register(t, nc)
	serve(t, connect(t, s), "tasks", "", func(http.ResponseWriter, *http.Request) {})
	require.NoError(t, acomm.Send(natshook.URL("tasks"), "x"))
	again := nc.StatusChanged(nats.CONNECTED)
	err := acomm.Send(natshook.URL("tasks"), strings.Repeat("x", 1<<19))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.NotErrorIs(t, err, net.ErrClosed)
	within(t, again, "the connection")
	require.NoError(t, acomm.Send(natshook.URL("tasks"), "x"))
}

// cuttingDialer makes connections that are closed before a large write.
type cuttingDialer struct{}

func (cuttingDialer) Dial(network, addr string) (net.Conn, error) {
	conn, err := net.Dial(network, addr)
	return cuttingConn{conn}, err
}

type cuttingConn struct{ net.Conn }

func (c cuttingConn) Write(p []byte) (int, error) {
	if len(p) >= 1<<19 {
		_ = c.Close()
	}
	return c.Conn.Write(p)
}

func TestSend_ThatWaitsEndsWhenTheServerIsLost(t *testing.T) {
	a := startServer(t, server.Options{})
	register(t, connect(t, a))
	started, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	serve(t, connect(t, a), "slow", "", func(http.ResponseWriter, *http.Request) { close(started); <-release })
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(natshook.URL("slow"), "x") }()
	within(t, started, "the request")
	a.Shutdown()
	require.ErrorIs(t, within(t, sent, "Send"), io.ErrUnexpectedEOF)

	// No server at all: nothing is sent, now or later.
	defer natshook.SetMaxWait(100 * time.Millisecond)()
	err := acomm.Send(natshook.URL("slow"), "x")
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

func TestStream_StaysOnHTTP(t *testing.T) {
	pair(t)
	err := acomm.Stream(&bytes.Buffer{}, natshook.URL("tasks"))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "streams use HTTP")
}

func TestRegister_RefusesWhatItCannotDo(t *testing.T) {
	requester, provider := pair(t)
	require.ErrorIs(t, natshook.Register(requester), fs.ErrExist)
	require.ErrorIs(t, natshook.Register(provider), fs.ErrExist)
	require.ErrorIs(t, natshook.Register(nil), fs.ErrInvalid)
	old := http.DefaultTransport
	http.DefaultTransport = roundTripperFunc(nil)
	defer func() { http.DefaultTransport = old }()
	require.ErrorIs(t, natshook.Register(requester), errors.ErrUnsupported)
	http.DefaultTransport = &http.Transport{}
	provider.Close()
	require.ErrorIs(t, natshook.Register(provider), net.ErrClosed)
	require.NoError(t, natshook.Register(requester), "nothing was registered by what failed")
}

type roundTripperFunc func(*http.Request) (*http.Response, error)

func (f roundTripperFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
