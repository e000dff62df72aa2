package acomm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// waitStopping returns once Stop has begun. A request must be tracked or a
// handler run, so that it can't end.
func waitStopping(t testing.TB, tracker *acomm.Tracker) {
	t.Helper()
	for end := time.Now().Add(patience); !errors.Is(tracker.Start(), net.ErrClosed); runtime.Gosched() {
		require.True(t, time.Now().Before(end), "Stop does not begin")
	}
}

// requireStopping fails if Stop, which has begun, has closed the socket or come to
// its end.
func requireStopping(t testing.TB, tracker *acomm.Tracker) {
	t.Helper()
	for range 30 {
		require.ErrorIs(t, tracker.Start(), net.ErrClosed, "Stop did not wait")
		require.NoError(t, acomm.Send(tracker.URL(), &acomm.Response{ID: "unknown"}), "Stop did not wait")
	}
}

// requireClosed fails unless the tracker closes the connection without a word. It
// is a reset where the tracker has not read all of what it was sent.
func requireClosed(t testing.TB, conn net.Conn) {
	t.Helper()
	n, err := conn.Read(make([]byte, 1))
	require.Zero(t, n)
	require.True(t, errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET), err)
}

// requireSilent fails if the channel has anything.
func requireSilent(t testing.TB, responses <-chan *acomm.Response) {
	t.Helper()
	select {
	case resp := <-responses:
		require.FailNow(t, "handled", "%+v", resp)
	default:
	}
}

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

func TestTracker_SameResponseTwiceOverTheSocketRunsOnce(t *testing.T) {
	tracker := newTracker(t)
	for range 100 {
		req, responses := newRequest(t, tracker.URL(), nil)
		require.NoError(t, tracker.TrackRequest(req, patience))
		resp := answerTo(t, req, "once", nil)
		var senders sync.WaitGroup
		for range 3 {
			senders.Go(func() {
				if err := req.Respond(resp); err != nil {
					t.Error(err)
				}
			})
		}
		senders.Wait()
		within(t, responses, "the response")
		requireSilent(t, responses)
	}
}

// Hazard: requests whose ids have the same hash are taken for one another.
func TestTracker_IDsWithTheSameHashAreKeptApart(t *testing.T) {
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "t.sock"), nil, patience)
	require.NoError(t, err)
	tracker.SetHashMask(1)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	const number = 12
	var requests []*acomm.Request
	handled := make([]int, number)
	for i := range number {
		count := func(*acomm.Request, *acomm.Response) { handled[i]++ }
		req, err := acomm.NewRequest("task", tracker.URL().String(), nil, count, count)
		require.NoError(t, err)
		requests = append(requests, req)
		require.NoError(t, tracker.TrackRequest(req, patience))
		require.ErrorIs(t, tracker.TrackRequest(req, patience), fs.ErrExist)
	}
	want := make([]int, number)
	left := number
	for _, i := range rand.Perm(number) {
		if left--; left%2 == 0 {
			require.True(t, tracker.RemoveRequest(requests[i]))
		} else {
			tracker.HandleResponse(answerTo(t, requests[i], nil, nil))
			want[i] = 1
		}
		require.False(t, tracker.RemoveRequest(requests[i]))
		require.Equal(t, want, handled)
		require.Equal(t, left, tracker.NumRequests())
	}
}

func TestTracker_TrackRequestErrors(t *testing.T) {
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

func TestTracker_StartTwiceIsNoOp(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	var starters sync.WaitGroup
	for range 10 {
		starters.Go(func() {
			if err := tracker.Start(); err != nil {
				t.Error(err)
			}
		})
	}
	starters.Wait()
	require.Equal(t, 1, tracker.NumRequests())
	require.NoError(t, req.Respond(answerTo(t, req, nil, nil)))
	within(t, responses, "the response")
}

func TestTracker_RestartsOnTheSamePath(t *testing.T) {
	for name, path := range map[string]string{"private": "", "given": filepath.Join(t.TempDir(), "a b", "tracker.sock")} {
		t.Run(name, func(t *testing.T) {
			tracker, err := acomm.NewTracker(path, nil, patience)
			require.NoError(t, err)
			addr := tracker.Addr()
			for range 3 {
				require.NoError(t, tracker.Start())
				require.Equal(t, addr, tracker.Addr())
				require.Equal(t, &url.URL{Scheme: "unix", Path: addr}, tracker.URL())
				requireWorking(t, tracker)
				tracker.Stop()
				require.NoFileExists(t, addr)
			}
		})
	}
}

func TestTracker_URLIsTheCallers(t *testing.T) {
	tracker := newTracker(t)
	tracker.URL().Path = "elsewhere"
	require.Equal(t, tracker.Addr(), tracker.URL().Path)
}

// Hazard: Stop before Start, twice, from two goroutines or after a failed Start
// panics or hangs.
func TestTracker_StopAnyTime(t *testing.T) {
	tracker, err := acomm.NewTracker(filepath.Join(t.TempDir(), "tracker.sock"), nil, patience)
	require.NoError(t, err)
	within(t, async(tracker.Stop), "Stop before Start")
	require.NoError(t, tracker.Start())
	requireWorking(t, tracker)
	within(t, async(tracker.Stop), "Stop")
	within(t, async(tracker.Stop), "Stop, twice")

	require.NoError(t, tracker.Start())
	inUse, err := acomm.NewTracker(tracker.Addr(), nil, patience)
	require.NoError(t, err)
	require.ErrorIs(t, inUse.Start(), syscall.EADDRINUSE)
	require.ErrorIs(t, inUse.TrackRequest(&acomm.Request{ID: "id"}, patience), net.ErrClosed, "it is not started")
	within(t, async(inUse.Stop), "Stop after a failed Start")
	requireWorking(t, tracker)
	within(t, async(tracker.Stop), "Stop")
	require.NoError(t, inUse.Start(), "after the failure")
	requireWorking(t, inUse)
	within(t, async(inUse.Stop), "Stop")
}

func TestTracker_EveryStopWaitsUntilItIsDown(t *testing.T) {
	tracker := newTracker(t)
	req, _ := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	var stops sync.WaitGroup
	var early atomic.Int32
	var removed atomic.Bool
	for range 10 {
		stops.Go(func() {
			tracker.Stop()
			if !removed.Load() {
				early.Add(1)
			}
			if _, err := os.Stat(tracker.Addr()); !errors.Is(err, fs.ErrNotExist) {
				early.Add(1)
			}
		})
	}
	waitStopping(t, tracker)
	removed.Store(true)
	require.True(t, tracker.RemoveRequest(req))
	within(t, async(stops.Wait), "all of them")
	require.Zero(t, early.Load())
}

func TestTracker_StopWaitsForRequestsThenHandlers(t *testing.T) {
	tracker := newTracker(t)
	started, release := make(chan struct{}, 2), make(chan struct{})
	releaseOnce := sync.OnceFunc(func() { close(release) })
	t.Cleanup(releaseOnce)
	handle := func(*acomm.Request, *acomm.Response) {
		started <- struct{}{}
		<-release
	}
	var requests []*acomm.Request
	for range 3 {
		req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
		require.NoError(t, err)
		require.NoError(t, tracker.TrackRequest(req, patience))
		requests = append(requests, req)
	}
	stopped := async(tracker.Stop)
	waitStopping(t, tracker)
	requireStopping(t, tracker)

	require.True(t, tracker.RemoveRequest(requests[0]))
	require.NoError(t, requests[1].Respond(answerTo(t, requests[1], nil, nil)), "the socket is open still")
	within(t, started, "the first handler")
	handled := async(func() { tracker.HandleResponse(answerTo(t, requests[2], nil, nil)) })
	within(t, started, "the second handler")
	require.Zero(t, tracker.NumRequests())
	requireStopping(t, tracker)
	releaseOnce()
	within(t, stopped, "Stop")
	within(t, handled, "HandleResponse")
	require.NoFileExists(t, tracker.Addr())
}

// Hazard: the last request leaves the table, and Stop overtakes its handler.
func TestTracker_StopIsNotFasterThanTheLastHandler(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	for range 300 {
		require.NoError(t, tracker.Start())
		var handled atomic.Bool
		handle := func(*acomm.Request, *acomm.Response) {
			runtime.Gosched()
			handled.Store(true)
		}
		req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
		require.NoError(t, err)
		require.NoError(t, tracker.TrackRequest(req, patience))
		early := make(chan bool, 1)
		go func() {
			tracker.Stop()
			early <- !handled.Load()
		}()
		waitStopping(t, tracker)
		tracker.HandleResponse(answerTo(t, req, nil, nil))
		require.False(t, within(t, early, "Stop"), "Stop returned while the handler ran")
	}
}

func TestTracker_StopEndsWithTheTimeouts(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, 20*time.Millisecond))
	tracker.Stop()
	require.Len(t, responses, 1)
	require.ErrorIs(t, (<-responses).Error, os.ErrDeadlineExceeded)
}

// Hazard: a peer that connects and says nothing, or half of it, blocks Stop for
// ever.
func TestTracker_StopDoesNotWaitForSilentPeers(t *testing.T) {
	tracker := newTracker(t)
	silent, half := dialTracker(t, tracker), dialTracker(t, tracker)
	_, err := half.Write([]byte{0, 0, 0, 9, '{'})
	require.NoError(t, err)
	requireWorking(t, tracker)

	within(t, async(tracker.Stop), "Stop")
	requireClosed(t, silent)
	requireClosed(t, half)
}

func TestTracker_SilentPeerIsClosedInTime(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	tracker.SetExchangeTimeout(10 * time.Millisecond)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	silent, half := dialTracker(t, tracker), dialTracker(t, tracker)
	_, _ = half.Write([]byte{0, 0}) // fails if the time is up already
	requireClosed(t, silent)
	requireClosed(t, half)
}

func TestTracker_SlowHandlerDelaysNobody(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	tracker := newTracker(t)
	releaseOnce := sync.OnceFunc(func() { close(release) })
	t.Cleanup(releaseOnce)
	handle := func(*acomm.Request, *acomm.Response) {
		close(started)
		<-release
	}
	slow, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
	require.NoError(t, err)
	require.NoError(t, tracker.TrackRequest(slow, patience))
	sent := make(chan error, 1)
	go func() { sent <- slow.Respond(answerTo(t, slow, nil, nil)) }()
	within(t, started, "the slow handler")
	require.NoError(t, within(t, sent, "its acknowledgement"))
	requireWorking(t, tracker)

	hurried, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(hurried, time.Millisecond))
	within(t, responses, "a time-out")
	releaseOnce()
}

func TestTracker_UnknownIDIsAcknowledgedLoggedDropped(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	stranger, strangers := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	log := captureLog(t)
	require.NoError(t, stranger.Respond(answerTo(t, stranger, "result", nil)))
	require.Equal(t, 1, tracker.NumRequests())
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop() // waits for the exchange
	requireSilent(t, responses)
	requireSilent(t, strangers)
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
	require.Contains(t, log.String(), "id="+stranger.ID)
	require.Contains(t, log.String(), "addr="+tracker.Addr())
}

func TestTracker_FloodOfUnknownIDsLogsLittle(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	synctest.Test(t, func(t *testing.T) { // for its clock
		for i := range 1000 {
			tracker.HandleResponse(&acomm.Response{ID: fmt.Sprint("stranger-", i)})
		}
		require.LessOrEqual(t, strings.Count(log.String(), "\n"), 20)
		time.Sleep(time.Minute)
		before := log.String()
		tracker.HandleResponse(&acomm.Response{ID: "last"})
		last := strings.TrimPrefix(log.String(), before)
		require.Contains(t, last, "id=last")
		require.Contains(t, last, fmt.Sprint("suppressed=", 1000-strings.Count(before, "\n")))
	})
}

// Hazard: what a peer names an id fills the disk.
func TestTracker_HugeIDLogsLittle(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	tracker.HandleResponse(&acomm.Response{ID: strings.Repeat("id", 1<<20)})
	require.Contains(t, log.String(), "idididid")
	require.Less(t, len(log.String()), 4<<10)
}

func TestTracker_NilResponseIsLogged(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	tracker.HandleResponse(nil)
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
	require.Contains(t, log.String(), "nil")
}

// frameOf returns the text as a frame.
func frameOf(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestTracker_BrokenFrameIsAnsweredByClosing(t *testing.T) {
	for name, frame := range map[string][]byte{
		"nothing":        {},
		"half a header":  {0, 0},
		"cut payload":    frameOf(`{"id":"x"}`)[:8],
		"empty payload":  frameOf(""),
		"bad JSON":       frameOf(`{"id":`),
		"not an object":  frameOf(`["id"]`),
		"a wrong member": frameOf(`{"id":7}`),
		"not a URL":      frameOf(`{"id":"x","stream_url":"http://%zz"}`),
		"too large":      binary.BigEndian.AppendUint32(nil, acomm.MaxPayload+1),
		"4 GiB":          {255, 255, 255, 255},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := newTracker(t)
			conn := dialTracker(t, tracker)
			_, err := conn.Write(frame)
			require.NoError(t, err)
			if !strings.HasPrefix(name, "too") && name != "4 GiB" { // these are refused without an end
				require.NoError(t, conn.CloseWrite())
			}
			answer, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Empty(t, answer)
			requireWorking(t, tracker)
		})
	}
}

// Hazard: a null frame panics.
func TestTracker_NullFrameIsAnEmptyResponse(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	log := captureLog(t)
	for _, text := range []string{"null", "{}", `{"id":null,"result":null,"error":null,"stream_url":null}`} {
		conn := dialTracker(t, tracker)
		_, err := conn.Write(frameOf(text))
		require.NoError(t, err)
		var ack acomm.Response
		require.NoError(t, acomm.UnmarshalConnData(conn, &ack))
		require.NoError(t, ack.Error)
		rest, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Empty(t, rest)
	}
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop()
	requireSilent(t, responses)
	require.Equal(t, 3, strings.Count(log.String(), "\n"), log)
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

func TestTracker_HandlersOfAStoppingTrackerAreRefused(t *testing.T) {
	tracker := newTracker(t)
	errs := make(chan error, 4)
	handle := func(*acomm.Request, *acomm.Response) {
		another, _ := newRequest(t, tracker.URL(), nil)
		proxied, _ := newRequest(t, &url.URL{Scheme: "http", Host: "localhost:1"}, nil)
		errs <- tracker.Start()
		errs <- tracker.TrackRequest(another, patience)
		_, err := tracker.ProxyUnix(proxied, patience)
		errs <- err
		_, err = tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("")))
		errs <- err
	}
	req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
	require.NoError(t, err)
	require.NoError(t, tracker.TrackRequest(req, patience))
	stopped := async(tracker.Stop)
	waitStopping(t, tracker)
	tracker.HandleResponse(answerTo(t, req, nil, nil))
	within(t, stopped, "Stop")
	require.Len(t, errs, 4)
	for range 4 {
		require.ErrorIs(t, <-errs, net.ErrClosed)
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

// Hazard: payloads end up in the log.
func TestTracker_PayloadsStayOutOfTheLog(t *testing.T) {
	const secret = "XSECRETX"
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/garbage" {
			fmt.Fprint(w, "<p>"+secret)
			return
		}
		http.Error(w, secret, http.StatusInternalServerError)
	}))
	defer hook.Close()
	tracker := newTracker(t)
	log := captureLog(t)
	result := map[string]any{"key": secret, "padding": strings.Repeat(secret, 1000)}

	for _, text := range []string{
		`{"id":"broken","result":"` + secret + `",}`,
		`{"id":"type","error":["` + secret + `"]}`,
		`{"id":"url","stream_url":"http://` + secret + `:%zz"}`,
		`"` + secret + `"`,
		secret,
	} {
		conn := dialTracker(t, tracker)
		_, err := conn.Write(frameOf(text))
		require.NoError(t, err)
		_, err = io.ReadAll(conn)
		require.NoError(t, err)
	}

	stranger, _ := newRequest(t, tracker.URL(), secret)
	require.NoError(t, acomm.Send(tracker.URL(), stranger), "a request where a response belongs")
	require.NoError(t, stranger.Respond(answerTo(t, stranger, result, nil)))
	require.NoError(t, stranger.Respond(answerTo(t, stranger, nil, errors.New(secret))))
	stream := answerTo(t, stranger, result, nil)
	stream.StreamURL = &url.URL{Scheme: "http", User: url.UserPassword("user", secret), Host: "localhost:1"}
	tracker.HandleResponse(stream)

	user := "user:" + secret + "@"
	for _, addr := range []string{
		strings.Replace(hook.URL, "http://", "http://"+user, 1),
		hook.URL + "/garbage",
		"http://" + user + "127.0.0.1:1/", // nobody listens
		"nobody://" + user + "handles/",
	} {
		proxy := newTracker(t) // its log is not full yet
		req, err := acomm.NewRequest("test", addr, secret, nil, nil)
		require.NoError(t, err)
		for _, resp := range []*acomm.Response{
			answerTo(t, req, result, nil),
			answerTo(t, req, nil, errors.New(secret)),
			stream,
		} {
			_, err = proxy.ProxyUnix(req, time.Millisecond)
			require.NoError(t, err)
			copied := *resp
			copied.ID = req.ID
			proxy.HandleResponse(&copied)
		}
		proxy.Stop() // a time-out may have been faster
	}
	tracker.Stop()
	require.Equal(t, 12, strings.Count(log.String(), "failed to forward"))
	require.NotContains(t, log.String(), secret)
}

func TestTracker_ExchangesLeaveNothingBehind(t *testing.T) {
	const workers, each = 20, 500
	tracker := newTracker(t)
	requireWorking(t, tracker)
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for i := range each {
				req, responses := newRequest(t, tracker.URL(), i)
				if err := tracker.TrackRequest(req, patience); err != nil {
					t.Error(err)
					return
				}
				if err := req.Respond(&acomm.Response{ID: req.ID}); err != nil {
					t.Error(err)
					return
				}
				if resp := <-responses; resp.Error != nil {
					t.Error(resp.Error)
					return
				}
			}
		})
	}
	within(t, async(working.Wait), "all exchanges")
	require.Zero(t, tracker.NumRequests())
	// A goroutine that has done its work takes a moment to go.
	require.Eventually(t, func() bool { return openFiles(t) <= files }, patience, time.Millisecond)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+2 }, patience, time.Millisecond,
		"there were %d goroutines", goroutines)
}

func TestTracker_ZeroValueIsRefused(t *testing.T) {
	var tracker acomm.Tracker
	req, _ := newRequest(t, &url.URL{Scheme: "http", Host: "localhost:1"}, nil)
	require.ErrorIs(t, tracker.Start(), fs.ErrInvalid)
	require.ErrorIs(t, tracker.TrackRequest(req, patience), net.ErrClosed)
	_, err := tracker.ProxyUnix(req, patience)
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("")))
	require.ErrorIs(t, err, net.ErrClosed)
	require.False(t, tracker.RemoveRequest(req))
	require.Zero(t, tracker.NumRequests())
	require.Empty(t, tracker.Addr())
	require.Equal(t, "unix", tracker.URL().Scheme)
	tracker.HandleResponse(&acomm.Response{ID: req.ID})
	tracker.Stop()
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

// Hazard: a Stop that ends while another Start and Stop begin closed the channel
// of the latter.
func TestTracker_StartsAndStopsFromManyGoroutines(t *testing.T) {
	tracker := newTracker(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 200 {
				if err := tracker.Start(); err != nil {
					require.ErrorIs(t, err, net.ErrClosed)
				}
				tracker.Stop()
			}
		})
	}
	within(t, async(all.Wait), "the goroutines")
}
