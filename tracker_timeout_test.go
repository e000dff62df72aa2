package acomm_test

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The time-outs of requests.

func TestTracker_TimeoutRunsErrorHandler(t *testing.T) {
	tracker := newTracker(t)
	failed := make(chan *acomm.Response, 2)
	req, err := acomm.NewRequest("test", tracker.URL().String(), nil,
		func(*acomm.Request, *acomm.Response) { t.Error("a time-out is no success") },
		func(_ *acomm.Request, resp *acomm.Response) { failed <- resp })
	require.NoError(t, err)
	require.NoError(t, tracker.TrackRequest(req, time.Millisecond))

	resp := within(t, failed, "the time-out")
	require.Equal(t, req.ID, resp.ID)
	require.EqualError(t, resp.Error, "response timeout")
	require.ErrorIs(t, resp.Error, os.ErrDeadlineExceeded)
	require.Nil(t, resp.Result)
	require.Zero(t, tracker.NumRequests())
	require.False(t, tracker.RemoveRequest(req))

	require.NoError(t, req.Respond(answerTo(t, req, "late", nil)), "a late response is acknowledged")
	tracker.Stop()
	requireSilent(t, failed)
}

// Hazard: the time-out of a removed request ends the next one with its id.
func TestTracker_TimeoutEndsItsOwnRequestOnly(t *testing.T) {
	tracker := newTracker(t)
	for i := range 20000 {
		req := &acomm.Request{ID: "again"}
		if err := tracker.TrackRequest(req, time.Duration(1+i%50)*100*time.Nanosecond); err != nil {
			require.NoError(t, err)
		}
		for range i % 7 {
			runtime.Gosched()
		}
		if !tracker.RemoveRequest(req) {
			continue // timed out in time
		}
		require.NoError(t, tracker.TrackRequest(req, patience))
		runtime.Gosched()
		require.True(t, tracker.RemoveRequest(req), "attempt %d", i)
	}
}

func TestTracker_NoTimeoutMeansTheDefault(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, time.Millisecond)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	for _, timeout := range []time.Duration{0, -1, -time.Hour} {
		req, responses := newRequest(t, tracker.URL(), nil)
		require.NoError(t, tracker.TrackRequest(req, timeout))
		require.EqualError(t, within(t, responses, "the time-out").Error, "response timeout")
	}
}

func TestTracker_NoDefaultMeansAMinute(t *testing.T) {
	for _, defaultTimeout := range []time.Duration{0, -1} {
		tracker, err := acomm.NewTracker("", nil, defaultTimeout)
		require.NoError(t, err)
		require.NoError(t, tracker.Start())
		// The socket is made outside the bubble, whose clock moves the time-out.
		synctest.Test(t, func(t *testing.T) {
			defer tracker.Stop()
			req, responses := newRequest(t, tracker.URL(), nil)
			require.NoError(t, tracker.TrackRequest(req, 0))
			time.Sleep(time.Minute - time.Nanosecond)
			synctest.Wait()
			requireSilent(t, responses)
			require.Equal(t, 1, tracker.NumRequests())
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			require.ErrorIs(t, (<-responses).Error, os.ErrDeadlineExceeded)
		})
	}
}

// Hazard: requests with the same time-out share a timer. Whichever of them are
// gone, each of the others times out when its own time is up, once.
func TestTracker_SharedTimeoutsStrikeEachInItsTime(t *testing.T) {
	const number = 6 // of each time-out
	timeouts := []time.Duration{10 * time.Second, 20 * time.Second}
	for gone := range 1 << number { // each set of them
		inBubble(t, func(t *testing.T, tracker *acomm.Tracker) {
			start := time.Now()
			type strike struct {
				id   string
				time time.Duration
			}
			strikes := make(chan strike, 100)
			handle := func(req *acomm.Request, resp *acomm.Response) {
				require.ErrorIs(t, resp.Error, os.ErrDeadlineExceeded)
				strikes <- strike{req.ID, time.Since(start)}
			}
			var leaving []*acomm.Request
			expected := make(map[string]time.Duration)
			for i := range number {
				for _, timeout := range timeouts {
					req := &acomm.Request{ID: fmt.Sprint(i, timeout), ErrorHandler: handle}
					require.NoError(t, tracker.TrackRequest(req, timeout))
					switch {
					case gone&(1<<i) == 0:
						expected[req.ID] = time.Since(start) + timeout
					case i%2 == 0: // it is the last one
						require.True(t, tracker.RemoveRequest(req))
					default:
						leaving = append(leaving, req)
					}
				}
				time.Sleep(time.Duration(i%3) * time.Second) // some share their moment
			}
			for _, req := range leaving {
				require.True(t, tracker.RemoveRequest(req))
			}
			require.Equal(t, len(expected), tracker.NumRequests())
			time.Sleep(time.Minute)
			synctest.Wait()
			close(strikes)
			for s := range strikes {
				require.Equal(t, expected[s.id], s.time, s.id)
				delete(expected, s.id)
			}
			require.Empty(t, expected)
			require.Zero(t, tracker.NumRequests())
		})
	}
}

// Hazard: time-outs that one timer sets off wait for each other's handlers.
func TestTracker_SlowHandlerDelaysNoTimeout(t *testing.T) {
	tracker := newTracker(t)
	const number = 10
	var running sync.WaitGroup // until all of them do
	running.Add(number)
	allRun := async(running.Wait)
	handle := func(*acomm.Request, *acomm.Response) {
		running.Done()
		<-allRun
	}
	for i := range number {
		req := &acomm.Request{ID: fmt.Sprint(i), ErrorHandler: handle}
		require.NoError(t, tracker.TrackRequest(req, time.Millisecond))
	}
	within(t, allRun, "the handlers")
}
