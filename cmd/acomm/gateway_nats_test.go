package main

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
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
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// natsURL is where the server is that the gateway has started.
func (g *gatewayRun) natsURL() string {
	g.t.Helper()
	line := g.waitLine("NATS server started")
	_, text, ok := strings.Cut(line, "url=")
	require.True(g.t, ok, line)
	return strings.Trim(strings.Fields(text)[0], `"`)
}

// natsRequester has acomm.Send send to nats URLs until the test ends. The responses
// to the hook that it returns are given to the function.
func natsRequester(t *testing.T, server string, take func(*acomm.Response)) (hook string) {
	t.Helper()
	nc, err := nats.Connect(server)
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	before := http.DefaultTransport
	http.DefaultTransport = &http.Transport{} // the scheme can't be unregistered
	t.Cleanup(func() { http.DefaultTransport = before })
	require.NoError(t, natshook.Register(nc))
	closer, err := natshook.Serve(nc, "answers.test", "", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if json.NewDecoder(r.Body).Decode(resp) == nil {
			take(resp)
		}
	}))
	require.NoError(t, err)
	t.Cleanup(func() { _ = closer.Close() })
	return natshook.URL("answers.test").String()
}

func TestGateway_TakesRequestsOverNATSAndSharesTasks(t *testing.T) {
	first, second := newGatewayRun(t, shortDir(t)), newGatewayRun(t, shortDir(t))
	first.provide("echo", "a.sock", gwEcho)
	first.start("--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	first.waitLine("tasks.echo")
	second.provide("other", "a.sock", gwEcho) // a task that the first has no provider for
	second.start("--nats", first.natsURL())
	second.waitLine("tasks.other")

	responses := make(chan *acomm.Response, 4)
	hook := natsRequester(t, first.natsURL(), func(resp *acomm.Response) { responses <- resp })
	for _, task := range []string{"echo", "other"} {
		req := gwRequest(t, task, hook, task)
		require.NoError(t, acomm.Send(natshook.URL("tasks."+task), req))
		resp := gwWithin(t, responses)
		require.Equal(t, req.ID, resp.ID)
		require.JSONEq(t, `"`+task+`"`, string(*resp.Result))
	}
	first.hasMetric(`acomm_gateway_requests_total{task="echo"} 1`)
	second.hasMetric(`acomm_gateway_requests_total{task="other"} 1`)

	unix := gwRequest(t, "echo", "unix:///run/x.sock", nil)
	require.ErrorContains(t, acomm.Send(natshook.URL("tasks.echo"), unix), "unix hook")
	require.ErrorIs(t, acomm.Send(natshook.URL("tasks.nobody"), unix), syscall.ECONNREFUSED)

	second.stop()
	require.ErrorIs(t, acomm.Send(natshook.URL("tasks.other"), unix), syscall.ECONNREFUSED, "unsubscribed")
	first.stop()
}

func TestGateway_TakesRequestsOnTheNATSSubjectItIsGiven(t *testing.T) {
	g := newGatewayRun(t, shortDir(t))
	g.provide("echo", "a.sock", gwEcho)
	g.start("--nats", "embedded", "--nats-listen", "127.0.0.1:0", "--nats-subject", "other")
	g.waitLine("other.echo")
	responses := make(chan *acomm.Response, 1)
	hook := natsRequester(t, g.natsURL(), func(resp *acomm.Response) { responses <- resp })
	req := gwRequest(t, "echo", hook, 1)
	require.NoError(t, acomm.Send(natshook.URL("other.echo"), req))
	require.Equal(t, req.ID, gwWithin(t, responses).ID)
	require.ErrorIs(t, acomm.Send(natshook.URL("tasks.echo"), req), syscall.ECONNREFUSED)
	g.stop()
}

// A gateway is killed under load. Each request ends once: with its response, with
// Send's error, or with the requester's time-out. None is handled twice, and the
// other gateway takes all that come afterwards.
func TestGateway_OneOfTwoThatShareTasksIsKilledUnderLoad(t *testing.T) {
	broker, err := startNATSServer("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { broker.Shutdown(); broker.WaitForShutdown() })
	victim, survivor := newGatewayRun(t, shortDir(t)), newGatewayRun(t, shortDir(t))
	load := newNATSLoad(t, broker.ClientURL())

	// The victim dies with requests that it has given to its provider, with some that
	// the provider has not acknowledged, and with others that come in.
	killed, died := make(chan struct{}), make(chan struct{})
	dead := sync.OnceFunc(func() { close(died) })
	var byVictim atomic.Int64
	victim.provide("echo", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		load.handled.add(req.ID)
		switch n := byVictim.Add(1); {
		case n <= 20:
			return gwEcho(req)
		case n <= 24:
			return nil, nil // works for longer than the gateway lives
		case n <= 28:
			<-died
			return nil, errGwNoAck
		case n == 40:
			close(killed)
		}
		return gwEcho(req)
	})
	t.Cleanup(dead)
	bySurvivor := &natsTally{}
	survivor.provide("echo", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		load.handled.add(req.ID)
		bySurvivor.add(req.ID)
		return gwEcho(req)
	})
	for _, g := range []*gatewayRun{victim, survivor} {
		g.start("--nats", broker.ClientURL())
		g.waitLine("tasks.echo")
	}

	const senders, after = 16, 20
	noticed := make(chan struct{})
	var sending sync.WaitGroup
	for range senders {
		sending.Go(func() {
			for isOpen := true; isOpen; {
				load.request(3 * time.Second) // for what is lost
				select {
				case <-noticed:
					isOpen = false
				default:
				}
			}
			for range after {
				id, resp, err := load.request(patience)
				if !assert.NoError(t, err) || !assert.NoError(t, resp.Error) {
					return
				}
				assert.Equal(t, 1, bySurvivor.of(id))
			}
		})
	}
	gwWithin(t, killed)
	answered := load.answered.Load()
	require.NoError(t, victim.Process.Kill())
	victim.wait()
	dead()
	require.Eventually(t, func() bool { // the server has noticed
		subs, err := broker.Subsz(&server.SubszOptions{Subscriptions: true, Test: "tasks.echo"})
		return err == nil && subs.Total == 1
	}, patience, time.Millisecond)
	load.acks.nanoseconds.Store(int64(patience))
	close(noticed)
	sending.Wait()
	load.tracker.Stop() // waits for handlers, so that a second end would be seen

	ids := load.ended.ids()
	t.Logf("%d requests: %d answered (%d before the kill), %d not acknowledged, %d not answered in time",
		len(ids), load.answered.Load(), answered, load.failed.Load(), load.timedOut.Load())
	require.Len(t, ids, int(load.sent.Load()))
	for _, id := range ids {
		require.Equal(t, 1, load.ended.of(id), "each request ends once")
		require.LessOrEqual(t, load.handled.of(id), 1, "handled")
		require.LessOrEqual(t, load.arrived.of(id), 1, "responses")
	}
	require.NotZero(t, answered)
	require.GreaterOrEqual(t, load.answered.Load(), answered+senders*after)
	require.NotZero(t, load.failed.Load())
	require.NotZero(t, load.timedOut.Load())
	survivor.stop()
}

// natsLoad is requests over NATS, and how they have ended.
type natsLoad struct {
	t       *testing.T
	hook    string
	tracker *acomm.Tracker
	acks    *ackWithin

	sent, answered, failed, timedOut atomic.Int64
	handled, arrived, ended          natsTally // requests, responses, ends by id
}

func newNATSLoad(t *testing.T, server string) *natsLoad {
	t.Helper()
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	l := &natsLoad{t: t, tracker: tracker}
	l.hook = natsRequester(t, server, func(resp *acomm.Response) {
		l.arrived.add(resp.ID)
		l.tracker.HandleResponse(resp)
	})
	l.acks = &ackWithin{RoundTripper: http.DefaultTransport}
	l.acks.nanoseconds.Store(int64(time.Second)) // for what is lost
	http.DefaultTransport = l.acks               // until natsRequester undoes it
	return l
}

// request sends a request and returns its end: Send's error, or a response, which
// may be the time-out.
func (l *natsLoad) request(forResponse time.Duration) (id string, resp *acomm.Response, err error) {
	responses := make(chan *acomm.Response, 2)
	end := func(req *acomm.Request, resp *acomm.Response) {
		l.ended.add(req.ID)
		responses <- resp
	}
	req, err := acomm.NewRequest("echo", l.hook, nil, end, end)
	if !assert.NoError(l.t, err) || !assert.NoError(l.t, l.tracker.TrackRequest(req, forResponse)) {
		return "", nil, err
	}
	l.sent.Add(1)
	if err := acomm.Send(natshook.URL("tasks.echo"), req); err != nil {
		assert.ErrorIs(l.t, err, os.ErrDeadlineExceeded, "the only error that a gateway's end causes")
		if l.tracker.RemoveRequest(req) {
			l.ended.add(req.ID)
			l.failed.Add(1)
			return req.ID, nil, err
		}
	}
	resp = <-responses // within forResponse
	if errors.Is(resp.Error, os.ErrDeadlineExceeded) {
		l.timedOut.Add(1)
	} else if assert.NoError(l.t, resp.Error) {
		l.answered.Add(1)
		assert.Equal(l.t, 1, l.handled.of(req.ID), "answered, so handled once")
	}
	return req.ID, resp, nil
}

// ackWithin bounds the exchanges of acomm.Send, which end after a minute at the
// latest.
type ackWithin struct {
	http.RoundTripper
	nanoseconds atomic.Int64
}

func (a *ackWithin) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(r.Context(), time.Duration(a.nanoseconds.Load()))
	defer cancel() // what natshook returns is in memory
	return a.RoundTripper.RoundTrip(r.WithContext(ctx))
}

// natsTally counts by id.
type natsTally struct {
	mu   sync.Mutex
	byID map[string]int
}

func (c *natsTally) add(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byID == nil {
		c.byID = make(map[string]int)
	}
	c.byID[id]++
}

func (c *natsTally) of(id string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

func (c *natsTally) ids() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.byID))
}

// Hazard: an error quotes the password in the URL of the NATS server.
func TestGateway_NATSThatCantBeReachedIsAnError(t *testing.T) {
	t.Parallel()
	r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0",
		"--nats", (&url.URL{Scheme: "nats", User: url.UserPassword("user", "secret"), Host: "127.0.0.1:1"}).String())
	require.Equal(t, exitTask, r.code, r.stderr)
	require.Contains(t, r.stderr, "connect to NATS")
	require.NotContains(t, r.stderr, "secret")
}
