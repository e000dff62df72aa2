package acomm_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// namedRequest returns a request without handlers and adds it under the name.
func namedRequest(t testing.TB, multi *acomm.MultiRequest, tracker *acomm.Tracker, name string) *acomm.Request {
	t.Helper()
	req, err := acomm.NewRequest("test", tracker.URL().String(), nil, nil, nil)
	require.NoError(t, err)
	require.NoError(t, multi.AddRequest(name, req))
	return req
}

// allResponses is Responses, which may block.
func allResponses(t testing.TB, multi *acomm.MultiRequest) map[string]*acomm.Response {
	t.Helper()
	got := make(chan map[string]*acomm.Response, 1)
	go func() { got <- multi.Responses() }()
	return within(t, got, "Responses")
}

// Hazard: more than 100 responses deadlock.
func TestMultiRequest_AnyNumberOfResponsesBeforeAnybodyAsks(t *testing.T) {
	const requests = 300
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	answered := async(func() {
		for i := range requests {
			req := namedRequest(t, multi, tracker, fmt.Sprint(i))
			tracker.HandleResponse(answerTo(t, req, i, nil))
		}
	})
	within(t, answered, "the handling of all responses")
	require.Zero(t, tracker.NumRequests())
	responses := allResponses(t, multi)
	require.Len(t, responses, requests)
	for i := range requests {
		var got int
		require.NoError(t, responses[fmt.Sprint(i)].UnmarshalResult(&got))
		require.Equal(t, i, got)
	}
}

func TestMultiRequest_ThousandRequestsFromManyGoroutinesAreAnswered(t *testing.T) {
	const workers, each = 50, 20
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	var working sync.WaitGroup
	for w := range workers {
		working.Go(func() {
			for i := range each {
				name := fmt.Sprint(w, "-", i)
				req, err := acomm.NewRequest("test", tracker.URL().String(), nil, nil, nil)
				if err == nil {
					err = multi.AddRequest(name, req)
				}
				if err != nil {
					t.Error(err)
					return
				}
				resp := &acomm.Response{ID: req.ID}
				if i%2 == 1 {
					resp.Error = errors.New(name)
				}
				if err := req.Respond(resp); err != nil {
					t.Error(err)
				}
			}
		})
	}
	within(t, async(working.Wait), "the workers")
	responses := allResponses(t, multi)
	require.Len(t, responses, workers*each)
	for w := range workers {
		for i := range each {
			name := fmt.Sprint(w, "-", i)
			require.NotNil(t, responses[name], name)
			if i%2 == 1 {
				require.EqualError(t, responses[name].Error, name)
			} else {
				require.NoError(t, responses[name].Error)
			}
		}
	}
}

// Hazard: after a failed AddRequest, Responses waits for ever.
func TestMultiRequest_FailedAddLeavesNoTrace(t *testing.T) {
	tracker := newTracker(t)
	stopped, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	for name, c := range map[string]struct {
		tracker *acomm.Tracker
		name    string
		id      string
		isNil   bool
		want    error
	}{
		"nil request":       {tracker: tracker, name: "new", isNil: true, want: fs.ErrInvalid},
		"no id":             {tracker: tracker, name: "new", id: "", want: fs.ErrInvalid},
		"name used":         {tracker: tracker, name: "used", id: "new", want: fs.ErrExist},
		"id used":           {tracker: tracker, name: "new", id: "used", want: fs.ErrExist},
		"id tracked":        {tracker: tracker, name: "new", id: "tracked", want: fs.ErrExist},
		"tracker not there": {tracker: nil, name: "new", id: "new", want: fs.ErrInvalid},
		"tracker stopped":   {tracker: stopped, name: "new", id: "new", want: net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			multi := acomm.NewMultiRequest(c.tracker, patience)
			expected := 0
			if c.tracker == tracker {
				used := &acomm.Request{ID: "used"}
				require.NoError(t, multi.AddRequest("used", used))
				defer multi.RemoveRequest(used)
				tracked := &acomm.Request{ID: "tracked"}
				require.NoError(t, tracker.TrackRequest(tracked, patience))
				defer tracker.RemoveRequest(tracked)
				expected = 1
			}
			before := tracker.NumRequests()

			handled := make(chan string, 2)
			var req *acomm.Request
			if !c.isNil {
				req = &acomm.Request{
					ID:             c.id,
					SuccessHandler: func(*acomm.Request, *acomm.Response) { handled <- "success" },
					ErrorHandler:   func(*acomm.Request, *acomm.Response) { handled <- "error" },
				}
			}
			require.ErrorIs(t, multi.AddRequest(c.name, req), c.want)
			require.Equal(t, before, tracker.NumRequests())

			if expected > 0 {
				tracker.HandleResponse(&acomm.Response{ID: "used"})
			}
			require.Len(t, allResponses(t, multi), expected)
			if req != nil {
				req.HandleResponse(&acomm.Response{})
				req.HandleResponse(&acomm.Response{Error: errors.New("failed")})
				require.Equal(t, "success", within(t, handled, "the request's own handler"))
				require.Equal(t, "error", within(t, handled, "the request's own handler"))
			}
			if c.tracker == tracker { // the name and the request are free still
				again := &acomm.Request{ID: "again"}
				require.NoError(t, multi.AddRequest("new", again))
				multi.RemoveRequest(again)
			}
		})
	}
}

// Hazard: a failed AddRequest takes over the handlers of a request that the
// tracker has already.
func TestMultiRequest_FailedAddLeavesTheTrackedRequestAlone(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	require.ErrorIs(t, multi.AddRequest("mine", req), fs.ErrExist)
	multi.RemoveRequest(req)
	require.Equal(t, 1, tracker.NumRequests())
	require.NoError(t, req.Respond(answerTo(t, req, "mine", nil)))
	require.JSONEq(t, `"mine"`, string(*within(t, responses, "the user's handler").Result))
	require.Empty(t, allResponses(t, multi))
}

// Hazard: a second Responses panics or hangs.
func TestMultiRequest_ResponsesGivesTheSameAnswerAgain(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	require.Empty(t, allResponses(t, multi))
	require.NotNil(t, allResponses(t, multi))

	for i := range 10 {
		req := namedRequest(t, multi, tracker, fmt.Sprint(i))
		tracker.HandleResponse(answerTo(t, req, i, nil))
	}
	first := allResponses(t, multi)
	require.Len(t, first, 10)
	second := allResponses(t, multi)
	require.Equal(t, first, second)
	for name := range first {
		require.Same(t, first[name], second[name])
	}

	clear(first) // each map is its caller's
	second["0"] = nil
	second["foreign"] = &acomm.Response{}
	third := allResponses(t, multi)
	require.Len(t, third, 10)
	require.NotNil(t, third["0"])
}

func TestMultiRequest_ConcurrentResponsesAllGetAll(t *testing.T) {
	const callers = 20
	inBubble(t, func(t *testing.T, tracker *acomm.Tracker) {
		multi := acomm.NewMultiRequest(tracker, patience)
		first, second := namedRequest(t, multi, tracker, "first"), namedRequest(t, multi, tracker, "second")
		got := make(chan map[string]*acomm.Response, callers)
		for range callers {
			go func() { got <- multi.Responses() }()
		}
		tracker.HandleResponse(answerTo(t, first, nil, nil))
		synctest.Wait()
		require.Empty(t, got, "one is not accounted for")
		tracker.HandleResponse(answerTo(t, second, nil, nil))
		for range callers {
			responses := within(t, got, "Responses")
			require.Len(t, responses, 2)
			require.Equal(t, first.ID, responses["first"].ID)
			require.Equal(t, second.ID, responses["second"].ID)
			clear(responses)
		}
	})
}

// Hazard: a response is faster than the rest of AddRequest, and gets lost.
func TestMultiRequest_ResponseIsKeptAsSoonAsItsRequestIsTracked(t *testing.T) {
	const workers, each = 10, 200
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	var working sync.WaitGroup
	for w := range workers {
		working.Go(func() {
			for i := range each {
				req, err := acomm.NewRequest("test", tracker.URL().String(), nil, nil, nil)
				if err != nil {
					t.Error(err)
					return
				}
				added := make(chan struct{})
				responded := async(func() {
					for waiting := true; waiting; runtime.Gosched() {
						select {
						case <-added:
							waiting = false
						default:
						}
						tracker.HandleResponse(&acomm.Response{ID: req.ID})
					}
				})
				if err := multi.AddRequest(fmt.Sprint(w, "-", i), req); err != nil {
					t.Error(err)
				}
				close(added)
				<-responded
			}
		})
	}
	within(t, async(working.Wait), "the workers")
	require.Len(t, allResponses(t, multi), workers*each)
}

func TestMultiRequest_RemovedRequestIsNotWaitedForNorReported(t *testing.T) {
	inBubble(t, func(t *testing.T, tracker *acomm.Tracker) {
		multi := acomm.NewMultiRequest(tracker, patience)
		kept := namedRequest(t, multi, tracker, "kept")
		unsent := namedRequest(t, multi, tracker, "unsent")
		answered := namedRequest(t, multi, tracker, "answered")
		tracker.HandleResponse(answerTo(t, kept, nil, nil))
		tracker.HandleResponse(answerTo(t, answered, nil, nil))

		got := make(chan map[string]*acomm.Response, 1)
		go func() { got <- multi.Responses() }()
		synctest.Wait()
		multi.RemoveRequest(answered) // too late
		synctest.Wait()
		require.Empty(t, got, "one is not accounted for")
		multi.RemoveRequest(unsent)
		responses := within(t, got, "Responses, after the removal")
		require.Len(t, responses, 2)
		require.Equal(t, kept.ID, responses["kept"].ID)
		require.Equal(t, answered.ID, responses["answered"].ID)
		require.Zero(t, tracker.NumRequests())

		multi.RemoveRequest(unsent) // twice does no harm
		require.NoError(t, multi.AddRequest("unsent", unsent), "name and id are free again")
		tracker.HandleResponse(answerTo(t, unsent, nil, nil))
		require.Len(t, allResponses(t, multi), 3)
	})
}

// Hazard: a response that is left behind without its request counts for another one.
func TestMultiRequest_RemovalAfterAResponseThatTheTrackerHasNotSeen(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req, other := namedRequest(t, multi, tracker, "handled"), namedRequest(t, multi, tracker, "other")
	req.HandleResponse(answerTo(t, req, nil, nil))
	multi.RemoveRequest(req)
	require.Equal(t, 1, tracker.NumRequests())
	got := make(chan map[string]*acomm.Response, 1)
	go func() { got <- multi.Responses() }()
	awaitBlocked(t, "acomm.(*MultiRequest).Responses", 1)
	tracker.HandleResponse(answerTo(t, other, nil, nil))
	require.Len(t, within(t, got, "Responses"), 2)
}

// Hazard: a request that the user has taken from the tracker is waited for for ever.
func TestMultiRequest_RemovalFromBothLeavesNothing(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "unsent")
	require.True(t, tracker.RemoveRequest(req))
	multi.RemoveRequest(req)
	require.Empty(t, allResponses(t, multi))
}

func TestMultiRequest_TheEmptyNameIsOne(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "")
	other, _ := newRequest(t, tracker.URL(), nil)
	require.ErrorIs(t, multi.AddRequest("", other), fs.ErrExist)
	tracker.HandleResponse(answerTo(t, req, nil, nil))
	require.Contains(t, allResponses(t, multi), "")
}

func TestMultiRequest_RemovalOfAForeignRequestIsIgnored(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	own := namedRequest(t, multi, tracker, "own")
	foreign, handled := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(foreign, patience))
	multi.RemoveRequest(nil)
	multi.RemoveRequest(foreign)
	require.Equal(t, 2, tracker.NumRequests())
	tracker.HandleResponse(answerTo(t, foreign, nil, nil))
	within(t, handled, "the foreign one's handler")
	tracker.HandleResponse(answerTo(t, own, nil, nil))
	require.Len(t, allResponses(t, multi), 1)
}

func TestMultiRequest_RemovalAndResponseRaceToOneAnswer(t *testing.T) {
	tracker := newTracker(t)
	for range 500 {
		multi := acomm.NewMultiRequest(tracker, patience)
		kept, raced := namedRequest(t, multi, tracker, "kept"), namedRequest(t, multi, tracker, "raced")
		resp := answerTo(t, raced, nil, nil)
		removed := async(func() { multi.RemoveRequest(raced) })
		handled := async(func() { tracker.HandleResponse(resp) })
		tracker.HandleResponse(answerTo(t, kept, nil, nil))
		within(t, removed, "the removal")
		within(t, handled, "the response")
		responses := allResponses(t, multi)
		if raced := responses["raced"]; raced != nil {
			require.Same(t, resp, raced)
			delete(responses, "raced")
		}
		require.Len(t, responses, 1)
		require.Zero(t, tracker.NumRequests())
	}
}

func TestMultiRequest_TimeoutsAreResponses(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, 10*time.Millisecond)
	silent := namedRequest(t, multi, tracker, "silent")
	answered := namedRequest(t, multi, tracker, "answered")
	tracker.HandleResponse(answerTo(t, answered, nil, nil))
	responses := allResponses(t, multi)
	require.Len(t, responses, 2)
	require.Equal(t, silent.ID, responses["silent"].ID)
	require.EqualError(t, responses["silent"].Error, "response timeout")
	require.ErrorIs(t, responses["silent"].Error, os.ErrDeadlineExceeded)

	require.NoError(t, silent.Respond(answerTo(t, silent, "late", nil)))
	tracker.Stop()
	require.Equal(t, responses, allResponses(t, multi), "a late response changes nothing")
}

func TestMultiRequest_NoTimeoutMeansTheTrackersDefault(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, time.Millisecond)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	for _, timeout := range []time.Duration{0, -1} {
		multi := acomm.NewMultiRequest(tracker, timeout)
		namedRequest(t, multi, tracker, "silent")
		require.ErrorIs(t, allResponses(t, multi)["silent"].Error, os.ErrDeadlineExceeded)
	}
}

func TestMultiRequest_RequestsMayBeAddedLater(t *testing.T) {
	inBubble(t, func(t *testing.T, tracker *acomm.Tracker) {
		multi := acomm.NewMultiRequest(tracker, patience)
		first := namedRequest(t, multi, tracker, "first")
		got := make(chan map[string]*acomm.Response, 1)
		go func() { got <- multi.Responses() }()
		synctest.Wait()
		second := namedRequest(t, multi, tracker, "second") // while Responses waits
		tracker.HandleResponse(answerTo(t, first, nil, nil))
		synctest.Wait()
		require.Empty(t, got)
		tracker.HandleResponse(answerTo(t, second, nil, nil))
		require.Len(t, within(t, got, "Responses"), 2)

		third := namedRequest(t, multi, tracker, "third") // after it
		go func() { got <- multi.Responses() }()
		synctest.Wait()
		require.Empty(t, got)
		tracker.HandleResponse(answerTo(t, third, nil, errors.New("failed")))
		responses := within(t, got, "Responses")
		require.Len(t, responses, 3)
		require.EqualError(t, responses["third"].Error, "failed")
	})
}

func TestMultiRequest_ReplacesTheHandlers(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req, own := newRequest(t, tracker.URL(), nil)
	require.NoError(t, multi.AddRequest("test", req))
	for _, failure := range []error{nil, errors.New("failed")} {
		resp := answerTo(t, req, nil, failure)
		req.HandleResponse(resp)
		require.Same(t, resp, allResponses(t, multi)["test"])
	}
	resp := answerTo(t, req, nil, nil)
	tracker.HandleResponse(resp)
	require.Same(t, resp, allResponses(t, multi)["test"])
	requireSilent(t, own)
}
