package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	forwardCallers = 64
	forwardBursts  = 40
	forwardBurst   = 32 // responses
)

// forwardDelays is how long hooks take to answer.
var forwardDelays = []time.Duration{0, 5 * time.Millisecond, 50 * time.Millisecond}

// runForward shows what it costs to forward responses to HTTP hooks that answer at once,
// and to slower ones. A call is one response there and its acknowledgement.
func runForward(o options) error {
	for _, delay := range forwardDelays {
		if err := runForwardTo(o, delay); err != nil {
			return fmt.Errorf("hook of %v: %w", delay, err)
		}
	}
	return nil
}

func runForwardTo(o options, delay time.Duration) error {
	connections := new(atomic.Int64)
	bare := func(c *http.Client) func(*hookServer) client {
		return func(hook *hookServer) client { return &postingClient{hook, c} }
	}
	keeping := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: forwardCallers}}
	ways := []candidate{
		{"bare", "bare http.Client that keeps 64 connections", peer, "", startHook(connections, delay, bare(keeping))},
		{"default", "bare http.Client as it comes", floor, "", startHook(connections, delay, bare(http.DefaultClient))},
		{"handed", "acomm, response handed in", subject, "", startForward(connections, delay, handIn)},
		{"socket", "acomm, response over the socket", subject, "", startForward(connections, delay, sendIn)},
	}
	var cells []cell
	for _, way := range ways {
		cells = append(cells, cell{way, column{128, forwardCallers}})
	}
	results, err := o.measure(cells)
	if err != nil {
		return err
	}
	t := &table{
		title: fmt.Sprintf("responses of 128 B to an HTTP hook that takes %v, %d callers (goals: speed 0.80, %d bursts of %d open 200 connections)",
			delay, forwardCallers, o.bursts, forwardBurst),
		head: []string{"", "wall", "CPU", "p99", "allocations", "speed", "connections, bursts"},
	}
	for i, way := range ways {
		opened, err := o.countConnections(way, connections)
		if err != nil {
			return fmt.Errorf("%s, bursts: %w", way.name, err)
		}
		r := results[i]
		t.add(way.title, formatTime(r.wall), formatTime(r.cpu), formatTime(r.p99), fmt.Sprintf("%.0f", r.allocs),
			formatRatio(results[0].wall/r.wall), fmt.Sprint(opened))
	}
	return o.write(t)
}

// countConnections returns how many connections the hook sees in the bursts.
func (o options) countConnections(way candidate, connections *atomic.Int64) (int64, error) {
	s, err := o.newSession(cell{way, column{128, forwardBurst}})
	if err != nil {
		return 0, err
	}
	before := connections.Load()
	for range o.bursts {
		if _, _, err := s.drive(forwardBurst, s.shape.newMessage(s.size), once(forwardBurst)); err != nil {
			return 0, s.giveUp(err)
		}
	}
	return connections.Load() - before, s.close()
}

// hookServer is an HTTP hook that takes responses, and hands their results to the
// callers they are for.
type hookServer struct {
	server  *http.Server
	hooks   []*url.URL // by caller
	results []chan *Message
	handle  handler
	delay   time.Duration // until it answers
	serving sync.WaitGroup
}

// startHook starts a hook, which counts its connections, and a client of it.
func startHook(connections *atomic.Int64, delay time.Duration, newClient func(*hookServer) client) func(string, int, handler) (client, error) {
	return func(_ string, callers int, handle handler) (client, error) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		h := &hookServer{handle: handle, delay: delay}
		for caller := range callers {
			h.hooks = append(h.hooks, &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/" + strconv.Itoa(caller)})
			h.results = append(h.results, make(chan *Message, 1))
		}
		mux := http.NewServeMux()
		mux.HandleFunc("POST /{caller}", h.take)
		h.server = &http.Server{Handler: mux, ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				connections.Add(1)
			}
		}}
		h.serving.Go(func() { _ = h.server.Serve(l) }) // until close
		return newClient(h), nil
	}
}

// take acknowledges a response with an empty answer.
func (h *hookServer) take(w http.ResponseWriter, r *http.Request) {
	caller, err := strconv.Atoi(r.PathValue("caller"))
	if err != nil || caller < 0 || caller >= len(h.results) {
		http.NotFound(w, r)
		return
	}
	resp, result := &wireResponse{}, &Message{}
	err = json.NewDecoder(r.Body).Decode(resp)
	if err == nil && (resp.Result == nil || resp.Error != "") {
		err = fmt.Errorf("response without a result, error %q", resp.Error)
	}
	if err == nil {
		err = json.Unmarshal(*resp.Result, result)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	time.Sleep(h.delay)
	select {
	case h.results[caller] <- h.handle(result):
	default:
		http.Error(w, "a response too many", http.StatusConflict)
	}
}

func (h *hookServer) close() error {
	err := h.server.Shutdown(context.Background())
	h.serving.Wait()
	return err
}

// postingClient posts responses by itself.
type postingClient struct {
	*hookServer
	client *http.Client
}

func (c *postingClient) call(caller int, args *Message) (*Message, error) {
	result, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(wireResponse{ID: callID(caller, args), Result: (*json.RawMessage)(&result)})
	if err != nil {
		return nil, err
	}
	resp, err := c.client.Post(c.hooks[caller].String(), "application/json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	return <-c.results[caller], nil
}

func (c *postingClient) close() error {
	c.client.CloseIdleConnections()
	return c.hookServer.close()
}

// forwardingClient has a tracker forward responses.
type forwardingClient struct {
	*hookServer
	tracker *acomm.Tracker
	deliver func(*acomm.Tracker, *acomm.Request, *acomm.Response) error
}

// startForward starts a tracker that is given responses by deliver, and a hook.
func startForward(connections *atomic.Int64, delay time.Duration, deliver func(*acomm.Tracker, *acomm.Request, *acomm.Response) error) func(string, int, handler) (client, error) {
	return func(dir string, callers int, handle handler) (client, error) {
		tracker, err := acomm.NewTracker("", nil, requestTimeout)
		if err != nil {
			return nil, err
		}
		if err := tracker.Start(); err != nil {
			return nil, err
		}
		c, err := startHook(connections, delay, func(h *hookServer) client {
			return &forwardingClient{h, tracker, deliver}
		})(dir, callers, handle)
		if err != nil {
			tracker.Stop()
		}
		return c, err
	}
}

// handIn is for a response that is in the coordinator already.
func handIn(t *acomm.Tracker, _ *acomm.Request, resp *acomm.Response) error {
	t.HandleResponse(resp)
	return nil
}

// sendIn is what a provider does.
func sendIn(_ *acomm.Tracker, proxied *acomm.Request, resp *acomm.Response) error {
	return proxied.Respond(resp)
}

// call tracks a request as it has come over the wire, and waits for its response
// at the hook. One that gets lost is logged by the tracker.
func (c *forwardingClient) call(caller int, args *Message) (*Message, error) {
	req := &acomm.Request{ID: callID(caller, args), Task: echoTask, ResponseHook: c.hooks[caller]}
	proxied, err := c.tracker.ProxyUnix(req, requestTimeout)
	if err != nil {
		return nil, err
	}
	resp, err := acomm.NewResponse(proxied, args, nil, nil)
	if err != nil {
		return nil, err
	}
	if err := c.deliver(c.tracker, proxied, resp); err != nil {
		return nil, err
	}
	return <-c.results[caller], nil
}

func (c *forwardingClient) close() error {
	c.tracker.Stop()
	http.DefaultClient.CloseIdleConnections() // the transport is the library's, too
	return c.hookServer.close()
}
