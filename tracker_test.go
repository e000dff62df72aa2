package acomm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a tracker does with requests and their responses.

func TestTracker_ResponseRunsItsHandler(t *testing.T) {
	for name, failure := range map[string]error{"success": nil, "error": errors.New("no such file")} {
		t.Run(name, func(t *testing.T) {
			tracker := newTracker(t)
			type call struct {
				req  *acomm.Request
				resp *acomm.Response
			}
			success, failed := make(chan call, 1), make(chan call, 1)
			req, err := acomm.NewRequest("test", tracker.URL().String(), nil,
				func(req *acomm.Request, resp *acomm.Response) { success <- call{req, resp} },
				func(req *acomm.Request, resp *acomm.Response) { failed <- call{req, resp} })
			require.NoError(t, err)
			require.NoError(t, tracker.TrackRequest(req, patience))
			require.Equal(t, 1, tracker.NumRequests())

			var result any
			handled := failed
			if failure == nil {
				result, handled = 7, success
			}
			require.NoError(t, req.Respond(answerTo(t, req, result, failure)))
			got := within(t, handled, "the handler")
			require.Same(t, req, got.req)
			require.Equal(t, req.ID, got.resp.ID)
			if failure == nil {
				require.NoError(t, got.resp.Error)
				require.JSONEq(t, "7", string(*got.resp.Result))
			} else {
				require.EqualError(t, got.resp.Error, failure.Error())
			}
			require.Zero(t, tracker.NumRequests())
			tracker.Stop()
			require.Empty(t, success)
			require.Empty(t, failed)
		})
	}
}

func TestTracker_RemovedRequestIsNotHandled(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	require.True(t, tracker.RemoveRequest(req))
	require.False(t, tracker.RemoveRequest(req))
	require.False(t, tracker.RemoveRequest(nil))
	require.Zero(t, tracker.NumRequests())

	tracker.HandleResponse(answerTo(t, req, nil, nil))
	require.NoError(t, req.Respond(answerTo(t, req, nil, nil)))
	require.NoError(t, tracker.TrackRequest(req, patience), "the id is free again")
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop()
	requireSilent(t, responses)
}

// Hazard: two of response, time-out and removal complete the same request.
func TestTracker_TimeoutAndResponseRaceOnce(t *testing.T) {
	const requests = 5000
	tracker := newTracker(t)
	var ended [requests]atomic.Int32 // by a handler, or by a removal that returned true
	var ways [3]atomic.Int32
	var racers sync.WaitGroup
	for i := range requests {
		handle := func(_ *acomm.Request, resp *acomm.Response) {
			ended[i].Add(1)
			if resp.Error != nil {
				ways[0].Add(1)
			} else {
				ways[1].Add(1)
			}
		}
		req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
		require.NoError(t, err)
		resp := answerTo(t, req, "response", nil)
		start := make(chan struct{})
		racers.Go(func() { <-start; tracker.HandleResponse(resp) })
		racers.Go(func() { <-start; tracker.HandleResponse(resp) })
		racers.Go(func() {
			<-start
			if tracker.RemoveRequest(req) {
				ended[i].Add(1)
				ways[2].Add(1)
			}
		})
		require.NoError(t, tracker.TrackRequest(req, time.Duration(1+i%20)*time.Microsecond))
		close(start)
	}
	racers.Wait()
	within(t, async(tracker.Stop), "Stop")
	for i := range ended {
		require.EqualValues(t, 1, ended[i].Load(), "request %d", i)
	}
	require.Zero(t, tracker.NumRequests())
	t.Logf("time-outs %d, responses %d, removals %d", ways[0].Load(), ways[1].Load(), ways[2].Load())
}

func TestTracker_TrackRequestRefusesWhatItCannotTrack(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.ErrorIs(t, tracker.TrackRequest(req, patience), net.ErrClosed, "not started")
	require.NoError(t, tracker.Start())

	require.ErrorIs(t, tracker.TrackRequest(nil, patience), fs.ErrInvalid)
	require.ErrorIs(t, tracker.TrackRequest(&acomm.Request{Task: "test"}, patience), fs.ErrInvalid)

	require.NoError(t, tracker.TrackRequest(req, patience))
	twin, twins := newRequest(t, tracker.URL(), nil)
	twin.ID = req.ID
	err = tracker.TrackRequest(twin, time.Nanosecond)
	require.ErrorIs(t, err, fs.ErrExist)
	require.ErrorContains(t, err, req.ID)
	require.ErrorIs(t, tracker.TrackRequest(req, patience), fs.ErrExist)
	require.Equal(t, 1, tracker.NumRequests())

	stopped := async(tracker.Stop)
	waitStopping(t, tracker)
	other, others := newRequest(t, tracker.URL(), nil)
	require.ErrorIs(t, tracker.TrackRequest(other, patience), net.ErrClosed, "stopping")
	tracker.HandleResponse(answerTo(t, req, "first", nil))
	require.NoError(t, within(t, responses, "the one tracked").Error)
	within(t, stopped, "Stop")
	require.ErrorIs(t, tracker.TrackRequest(other, patience), net.ErrClosed, "stopped")
	requireSilent(t, twins)
	requireSilent(t, others)
}

func TestTracker_URLIsTheCallers(t *testing.T) {
	tracker := newTracker(t)
	tracker.URL().Path = "elsewhere"
	require.Equal(t, tracker.Addr(), tracker.URL().Path)
}

// useTracker calls everything that a handler may call.
func useTracker(t testing.TB, tracker *acomm.Tracker) error {
	direct, responses := newRequest(t, tracker.URL(), nil)
	proxied, _ := newRequest(t, &url.URL{Scheme: "http", Host: "localhost:1"}, nil)
	if err := tracker.Start(); err != nil {
		return err
	}
	if err := tracker.TrackRequest(direct, patience); err != nil {
		return err
	}
	if _, err := tracker.ProxyUnix(proxied, patience); err != nil {
		return err
	}
	if n := tracker.NumRequests(); n != 2 {
		return fmt.Errorf("%d requests are tracked", n)
	}
	if !tracker.RemoveRequest(proxied) {
		return errors.New("the proxied request was not tracked")
	}
	tracker.HandleResponse(&acomm.Response{ID: direct.ID})
	if len(responses) != 1 {
		return errors.New("the response was not handled")
	}
	stream, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("data")))
	if err != nil {
		return err
	}
	var data bytes.Buffer
	if err := acomm.Stream(&data, stream); err != nil {
		return err
	}
	if data.String() != "data" {
		return fmt.Errorf("the stream has %q", &data)
	}
	return nil
}

// Hazard: a handler is run with a lock held.
func TestTracker_HandlersMayCallTheTracker(t *testing.T) {
	for name, end := range map[string]func(*acomm.Tracker, *acomm.Request) error{
		"response on the socket": func(_ *acomm.Tracker, req *acomm.Request) error {
			return req.Respond(&acomm.Response{ID: req.ID})
		},
		"response handed in": func(tracker *acomm.Tracker, req *acomm.Request) error {
			go tracker.HandleResponse(&acomm.Response{ID: req.ID})
			return nil
		},
		"time-out": func(*acomm.Tracker, *acomm.Request) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			tracker := newTracker(t)
			done := make(chan error, 1)
			handle := func(*acomm.Request, *acomm.Response) { done <- useTracker(t, tracker) }
			req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
			require.NoError(t, err)
			timeout := patience
			if name == "time-out" {
				timeout = time.Millisecond
			}
			require.NoError(t, tracker.TrackRequest(req, timeout))
			require.NoError(t, end(tracker, req))
			require.NoError(t, within(t, done, "the handler"))
		})
	}
}

func TestTracker_HandleResponseReturnsAfterTheHandler(t *testing.T) {
	tracker := newTracker(t)
	for range 100 {
		req, responses := newRequest(t, tracker.URL(), nil)
		require.NoError(t, tracker.TrackRequest(req, patience))
		tracker.HandleResponse(answerTo(t, req, nil, nil))
		require.Len(t, responses, 1)
	}
}

// Hazard: a request whose id the caller changes could not be found any more, and
// Stop would wait for it for ever.
func TestTracker_ChangedRequestStillEnds(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	id := req.ID
	require.NoError(t, tracker.TrackRequest(req, time.Hour))
	req.ID = "another"
	tracker.HandleResponse(&acomm.Response{ID: id})
	require.Equal(t, id, within(t, responses, "the response").ID)
	require.Zero(t, tracker.NumRequests())
	within(t, async(tracker.Stop), "Stop")
}
