package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// These tests break what the library stands on: processes, sockets, hooks,
// descriptors, disks. Each ends with a count of what went in and what came out,
// in which nothing may be missing.

func init() {
	roles["fault provider"] = faultProvider
	roles["fault coordinator"] = faultCoordinator
}

// whySendFailed names the documented reason of a failed send; empty: it has none.
func whySendFailed(err error) string {
	for _, sentinel := range []error{
		syscall.ECONNREFUSED, fs.ErrNotExist, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded, net.ErrClosed, fs.ErrInvalid,
	} {
		if errors.Is(err, sentinel) {
			return sentinel.Error()
		}
	}
	return ""
}

// faultProvider prints the id of each request it takes. It answers those whose
// argument is not "never", and prints what came of it. It ends with a command.
func faultProvider() {
	ul := acomm.NewUnixListener(filepath.Join(os.Getenv("DIR"), "provider.sock"), 0)
	orExit(ul.Start())
	fmt.Println("ready")
	var working sync.WaitGroup
	working.Go(func() {
		<-commands
		ul.Stop(0)
	})
	slots := make(chan struct{}, 64)
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		slots <- struct{}{}
		working.Go(func() {
			defer func() { <-slots }()
			req, err := takeRequest(ul, conn, func(req *acomm.Request) { fmt.Println("took", req.ID) })
			if err != nil {
				return
			}
			fmt.Println("acknowledged", req.ID)
			var args string
			orExit(req.UnmarshalArgs(&args))
			if args == "never" {
				return
			}
			resp, err := acomm.NewResponse(req, args, nil, nil)
			orExit(err)
			if req.Respond(resp) == nil {
				fmt.Println("answered", req.ID)
			} else {
				fmt.Println("failed", req.ID)
			}
		})
	}
	working.Wait()
}

func TestFault_KilledProviderMeansOneTimeout(t *testing.T) {
	const requests = 50
	dir := shortDir(t)
	provider := startProcess(t, "fault provider", "DIR="+dir)
	require.Equal(t, "ready", provider.ReadLine())
	tracker := newTracker(t)

	var handled tally // by id
	ended := make(chan error, 10*requests)
	handle := func(req *acomm.Request, resp *acomm.Response) {
		handled.add(req.ID)
		ended <- resp.Error
	}
	var ids []string
	sent := make(chan error, requests)
	for i := range requests {
		args, timeout := "answer", patience
		if i%2 == 0 {
			args, timeout = "never", time.Second
		}
		req, err := acomm.NewRequest("test", tracker.URL().String(), args, handle, handle)
		require.NoError(t, err)
		ids = append(ids, req.ID)
		require.NoError(t, tracker.TrackRequest(req, timeout))
		go func() { sent <- acomm.Send(unixURL(filepath.Join(dir, "provider.sock")), req) }()
	}
	for range requests {
		require.NoError(t, within(t, sent, "an acknowledgement"))
	}
	var said tally
	for said.total() < 2*requests+requests/2 {
		said.add(strings.Fields(provider.ReadLine())[0])
	}
	require.Equal(t, requests, said.get("acknowledged"))
	require.Equal(t, requests/2, said.get("answered"), "the others wait for their response")
	provider.Kill()
	require.ErrorContains(t, provider.Wait(), "killed")

	var outcomes tally
	for range requests {
		switch err := within(t, ended, "a handler"); {
		case err == nil:
			outcomes.add("responses")
		default:
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.EqualError(t, err, "response timeout")
			outcomes.add("time-outs")
		}
	}
	for _, id := range ids { // whoever is late is heard, and no handler runs
		require.NoError(t, acomm.Send(tracker.URL(), &acomm.Response{ID: id}))
	}
	tracker.Stop()
	require.Empty(t, ended, "each once")
	for _, id := range ids {
		require.Equal(t, 1, handled.get(id))
	}
	require.Equal(t, requests/2, outcomes.get("responses"))
	require.Equal(t, requests/2, outcomes.get("time-outs"))
	t.Logf("requests in: %d; out: %s; handlers run: %d; late responses dropped: %d",
		requests, &outcomes, handled.total(), requests)
}

// faultCoordinator passes requests on to the provider, until a command.
func faultCoordinator() {
	dir := os.Getenv("DIR")
	tracker, err := acomm.NewTracker(filepath.Join(dir, "responses.sock"), nil, coordinatorTimeout)
	orExit(err)
	orExit(tracker.Start())
	ul := acomm.NewUnixListener(filepath.Join(dir, "requests.sock"), 0)
	orExit(ul.Start())
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = 100
	fmt.Println("ready")
	go func() {
		<-commands
		ul.Stop(0)
	}()
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		go func() {
			defer ul.DoneConn(conn)
			req := &acomm.Request{}
			if acomm.UnmarshalConnData(conn, req) != nil {
				return
			}
			err := passOn(tracker, req, unixURL(filepath.Join(dir, "provider.sock")), 0)
			_ = acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: err})
		}()
	}
	ul.Stop(0) // the other call may still be on its way
	tracker.Stop()
}

const coordinatorTimeout = 2 * time.Second

// passOn is what a coordinator does with a request.
func passOn(tracker *acomm.Tracker, req *acomm.Request, provider *url.URL, timeout time.Duration) error {
	proxied, err := tracker.ProxyUnix(req, timeout)
	if err != nil {
		return err
	}
	if err := acomm.Send(provider, proxied); err != nil {
		tracker.RemoveRequest(req)
		return err
	}
	return nil
}

// faultCall is a request on its way through a coordinator that may be killed.
type faultCall struct {
	id       string
	last     bool  // sent after the last restart
	sent     error // what Send returned
	removed  bool  // after that, before it was handled
	handlers atomic.Int32
	answer   atomic.Pointer[acomm.Response]
}

func TestFault_KilledCoordinatorResumesAndHandlesNothingTwice(t *testing.T) {
	const (
		requesters = 50
		each       = 100 // requests handled between two kills
	)
	kills := 4
	if *long {
		kills = 40
	}
	dir := shortDir(t)
	provider := startProcess(t, "fault provider", "DIR="+dir)
	require.Equal(t, "ready", provider.ReadLine())
	var took, posts tally // by id
	var count counter
	collected := async(func() {
		for line := range provider.Lines() {
			if id, ok := strings.CutPrefix(line, "took "); ok {
				took.add(id)
				count.add()
			}
		}
	})
	tracker := newTracker(t)
	hook := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if json.NewDecoder(r.Body).Decode(resp) == nil {
			posts.add(resp.ID)
			tracker.HandleResponse(resp)
		}
	})

	// The requesters: they never wait for a response, and only end when told to.
	var last, stop atomic.Bool
	var failed, answered counter // sends; responses to requests of the last phase
	var mu sync.Mutex
	var calls []*faultCall
	call := func() *faultCall {
		c := &faultCall{last: last.Load()}
		timeout := coordinatorTimeout
		if c.last {
			timeout = patience
		}
		handle := func(_ *acomm.Request, resp *acomm.Response) {
			c.handlers.Add(1)
			c.answer.Store(resp)
			if c.last {
				answered.add()
			}
		}
		req, err := acomm.NewRequest("test", hook.String(), "answer", handle, handle)
		if err == nil {
			c.id = req.ID
			err = tracker.TrackRequest(req, timeout)
		}
		if err != nil {
			panic(err)
		}
		if c.sent = acomm.Send(unixURL(filepath.Join(dir, "requests.sock")), req); c.sent != nil {
			c.removed = tracker.RemoveRequest(req)
			failed.add()
		}
		return c
	}
	// A requester that has found nobody a few times in a row rests until the
	// coordinator is back: the machine is needed elsewhere.
	var starts counter
	send := func() {
		for found := 0; !stop.Load(); {
			up, started := starts.next()
			c := call()
			mu.Lock()
			calls = append(calls, c)
			mu.Unlock()
			if found++; c.sent == nil {
				found = 0
			}
			if found >= 20 && starts.load() == up && !stop.Load() {
				<-started
				found = 0
			}
		}
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	defer starts.add()
	defer stop.Store(true)

	before := 0
	for killed := range kills + 1 {
		if killed == 0 {
			for range requesters {
				sending.Go(send)
			}
		}
		requireReached(t, &failed, before+requesters, "senders to find nobody")
		coordinator := startProcess(t, "fault coordinator", "DIR="+dir)
		require.Equal(t, "ready", coordinator.ReadLine(), "on the paths of the one killed")
		starts.add()
		if killed < kills {
			requireReached(t, &count, count.load()+each, "the service to resume")
			before = failed.load()
			coordinator.Kill()
			require.ErrorContains(t, coordinator.Wait(), "killed")
			require.Equal(t, fs.ModeSocket, mode(t, filepath.Join(dir, "requests.sock")).Type(), "left behind")
			require.Equal(t, fs.ModeSocket, mode(t, filepath.Join(dir, "responses.sock")).Type(), "left behind")
			continue
		}
		last.Store(true)
		requireReached(t, &answered, 2*each, "the service to resume for good")
		stop.Store(true)
		sending.Wait()
		tracker.Stop() // all have a response or a time-out
		require.NoError(t, coordinator.WriteLine("end"))
		require.NoError(t, coordinator.Wait())
	}
	require.NoError(t, provider.WriteLine("end"))
	require.NoError(t, provider.Wait())
	within(t, collected, "the provider's last words")

	var sends, ends tally
	for _, c := range calls {
		require.LessOrEqual(t, took.get(c.id), 1, "a request taken twice")
		require.LessOrEqual(t, posts.get(c.id), 1, "a response forwarded twice")
		switch {
		case c.sent == nil:
			sends.add("acknowledged")
			require.Equal(t, 1, took.get(c.id), "acknowledged means taken")
		default:
			why := whySendFailed(c.sent)
			require.NotEmpty(t, why, "an error that does not say why: %v", c.sent)
			sends.add("failed: " + why)
		}
		answer := c.answer.Load()
		switch {
		case c.removed:
			ends.add("removed")
			require.Zero(t, c.handlers.Load(), "removed and handled")
			continue
		case answer == nil:
			ends.add("LOST")
		case answer.Error == nil:
			ends.add("responses")
			require.Equal(t, 1, took.get(c.id))
		default:
			require.EqualError(t, answer.Error, "response timeout")
			ends.add("time-outs")
		}
		require.EqualValues(t, 1, c.handlers.Load(), "handled once")
		if c.last && c.sent == nil {
			require.NoError(t, answer.Error, "nothing was killed any more")
		}
		require.False(t, c.last && c.sent != nil, "nothing was killed any more: %v", c.sent)
	}
	t.Logf("coordinator killed %d times; requests in: %d (%s); out: %s; provider's handlers run: %d; forwards: %d",
		kills, len(calls), &sends, &ends, took.total(), posts.total())
	require.Equal(t, len(calls), ends.get("removed")+ends.get("responses")+ends.get("time-outs"))
}
