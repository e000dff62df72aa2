package acomm_test

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// How a tracker starts and stops, and what Stop waits for.

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
				require.Equal(t, unixURL(addr), tracker.URL())
				requireWorking(t, tracker)
				tracker.Stop()
				require.NoFileExists(t, addr)
			}
		})
	}
}

// Hazard: Stop before Start, twice, from two goroutines or after a failed Start
// panics or hangs.
func TestTracker_StopDoesNoHarmAtAnyTime(t *testing.T) {
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

// Hazard: Stop is told that the last request is gone a moment before it can know that
// its handler is yet to run, and overtakes it.
func TestTracker_StopWaitsForTheLastHandler(t *testing.T) {
	rounds := full(20000, 900)
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "s.sock"), nil, patience)
	require.NoError(t, err)
	var handled atomic.Int64
	count := func(*acomm.Request, *acomm.Response) {
		for range 100 { // a handler that takes its time
			runtime.Gosched()
		}
		handled.Add(1)
	}
	for i := range rounds {
		require.NoError(t, tracker.Start())
		req := &acomm.Request{ID: strconv.Itoa(i), SuccessHandler: count, ErrorHandler: count}
		timeout := patience
		if i%3 == 0 {
			timeout = time.Microsecond
		}
		require.NoError(t, tracker.TrackRequest(req, timeout))
		ran := make(chan int64, 1) // handlers, when Stop returned
		stop := func() {
			tracker.Stop()
			ran <- handled.Load()
		}
		answer := func() { tracker.HandleResponse(&acomm.Response{ID: req.ID}) }
		answered := async(func() {})
		switch i % 3 {
		case 0: // it times out
			stop()
		case 1: // the response comes together with Stop
			answered = async(answer)
			stop()
		case 2: // it comes once Stop has begun
			go stop()
			waitStopping(t, tracker)
			answer()
		}
		require.EqualValues(t, i+1, within(t, ran, "Stop"), "Stop returned before the handler")
		within(t, answered, "the response")
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

// Hazard: a Stop that ends while another Start and Stop begin closed the channel
// of the latter.
func TestTracker_StartsAndStopsFromManyGoroutinesDoNoHarm(t *testing.T) {
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

// Hazard: streams created while the tracker stops were never closed.
func TestTracker_StopEndsStreamsNobodyClaimed(t *testing.T) {
	for range 20 {
		tracker := newTracker(t)
		var offering sync.WaitGroup
		for range 8 {
			offering.Go(func() {
				for {
					src := newSource()
					if _, err := tracker.NewStreamUnix("", src); err != nil {
						require.ErrorIs(t, err, net.ErrClosed)
						require.Empty(t, src.closed)
						return
					}
					defer src.requireClosedOnce(t)
				}
			})
		}
		tracker.Stop()
		offering.Wait()
	}
}

func TestTracker_StopWaitsForStreamsThatMove(t *testing.T) {
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	conn := dial(t, u.Path)
	_, err = src.feed.Write([]byte("a"))
	require.NoError(t, err)
	stopped := async(tracker.Stop)
	for tracker.Start() == nil { // until Stop has begun
	}
	_, err = src.feed.Write([]byte("b"))
	require.NoError(t, err)
	require.NotPanics(t, func() {
		select {
		case <-stopped:
			panic("stopped before the stream ended")
		default:
		}
	})
	src.feed.Close()
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "ab", string(got))
	within(t, stopped, "Stop")
	src.requireClosedOnce(t)
}

func TestTracker_StopCutsOffStreamsThatStall(t *testing.T) {
	lines := captureLog(t)
	stall := func(t *testing.T, prepare func(*source, net.Conn)) {
		tracker, err := acomm.NewTracker("", nil, 0)
		require.NoError(t, err)
		tracker.SetStreamStall(10 * time.Millisecond)
		require.NoError(t, tracker.Start())
		src := newSource()
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		prepare(src, dial(t, u.Path))
		within(t, async(tracker.Stop), "Stop")
		src.requireClosedOnce(t)
	}
	t.Run("silent source", func(t *testing.T) {
		stall(t, func(src *source, _ net.Conn) { _, _ = src.feed.Write([]byte("x")) })
	})
	t.Run("consumer that does not read", func(t *testing.T) {
		stall(t, func(src *source, _ net.Conn) {
			go func() {
				for {
					if _, err := src.feed.Write(make([]byte, 1<<20)); err != nil {
						return
					}
				}
			}()
		})
	})
	require.NotContains(t, lines.String(), "source failed", "it was cut off, it did not fail")
}

// slowToClose is a source whose Close waits.
type slowToClose struct {
	*source
	closing, release chan struct{}
}

func (s slowToClose) Close() error {
	close(s.closing)
	<-s.release
	return s.source.Close()
}

// Hazard: a source that was silent for longer than a whole stream is given to
// end, and then ended, was cut off at its end.
func TestTracker_StopLetsAWholeStreamEnd(t *testing.T) {
	tracker, clock := newTracker(t), newTracker(t)
	src := slowToClose{newSource(), make(chan struct{}), make(chan struct{})}
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	conn := dial(t, u.Path)
	_, err = conn.Write([]byte{0})
	require.NoError(t, err)
	_, err = src.feed.Write([]byte("x"))
	require.NoError(t, err)
	stopped := async(tracker.Stop)
	// A request on another tracker tells when the source was silent for so long.
	req, expired := newRequest(t, clock.URL(), nil)
	require.NoError(t, clock.TrackRequest(req, acomm.StreamEnd+acomm.StreamEnd/10))
	within(t, expired, "the time-out")
	src.feed.Close()
	within(t, src.closing, "the end of the source")
	for range 30 { // time enough to be cut off in
		require.NoError(t, acomm.Send(clock.URL(), &acomm.Response{ID: "nobody's"}))
	}
	close(src.release)
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "x", string(got))
	conn.Close()
	within(t, stopped, "Stop")
}

// stubborn is a source whose Read does not end with Close.
type stubborn struct {
	reading, release chan struct{}
}

func (s stubborn) Read([]byte) (int, error) {
	close(s.reading)
	<-s.release
	return 0, io.EOF
}

func (stubborn) Close() error { return nil }

func TestTracker_StopDoesNotHangOnAStubbornSource(t *testing.T) {
	lines := captureLog(t)
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	tracker.SetStreamStall(time.Millisecond)
	tracker.SetStreamEnd(time.Millisecond)
	require.NoError(t, tracker.Start())
	src := stubborn{make(chan struct{}), make(chan struct{})}
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	dial(t, u.Path)
	within(t, src.reading, "the first read")
	within(t, async(tracker.Stop), "Stop")
	require.Contains(t, lines.String(), "does not return from Read")
	close(src.release)
}
