package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"time"

	"github.com/mistifyio/acomm"
)

const trackingTimeout = time.Hour // none strikes

// trackingResult is what a number of outstanding requests cost.
type trackingResult struct {
	heap            float64 // bytes each, beyond the Request
	track, complete float64 // ns each
	count           float64 // ns of one NumRequests with all of them outstanding
	stop            float64 // ns each, for a Stop with all of them outstanding
}

// runTracking shows what outstanding requests cost, for a hundredth of them, a
// tenth, and all.
func runTracking(o options) error {
	t := &table{
		title: "outstanding requests with time-outs (goals: 500 B each, track + complete 600 ns)",
		head:  []string{"requests", "bytes each", "track", "complete", "track + complete", "NumRequests", "Stop, each"},
	}
	for _, n := range []int{o.requests / 100, o.requests / 10, o.requests} {
		if n == 0 {
			continue
		}
		o.report("tracking %d requests", n)
		var rounds []trackingResult
		for range o.rounds {
			r, err := measureTracking(n)
			if err != nil {
				return err
			}
			rounds = append(rounds, r)
		}
		of := func(number func(trackingResult) float64) float64 {
			var numbers []float64
			for _, r := range rounds {
				numbers = append(numbers, number(r))
			}
			return median(numbers)
		}
		t.add(fmt.Sprint(n),
			formatBytes(of(func(r trackingResult) float64 { return r.heap })),
			formatTime(of(func(r trackingResult) float64 { return r.track })),
			formatTime(of(func(r trackingResult) float64 { return r.complete })),
			formatTime(of(func(r trackingResult) float64 { return r.track + r.complete })),
			formatTime(of(func(r trackingResult) float64 { return r.count })),
			formatTime(of(func(r trackingResult) float64 { return r.stop })))
	}
	return o.write(t)
}

// measureTracking tracks requests and completes them by their responses, then
// tracks them again and stops the tracker while they are removed.
func measureTracking(n int) (result trackingResult, err error) {
	tracker, err := acomm.NewTracker("", nil, trackingTimeout)
	if err != nil {
		return result, err
	}
	if err := tracker.Start(); err != nil {
		return result, err
	}
	defer tracker.Stop()
	run := &trackingRun{tracker: tracker}
	run.requests = newRequests(n, tracker.URL(), func(*acomm.Request, *acomm.Response) { run.handled++ })
	defer run.removeAll() // before Stop, which waits for them
	if err := run.measureCompletion(&result); err != nil {
		return result, err
	}
	if _, err := run.trackAll(); err != nil {
		return result, err
	}
	result.stop = run.timeStop()
	return result, nil
}

// trackingRun is a tracker and the requests it is to track.
type trackingRun struct {
	tracker  *acomm.Tracker
	requests []*acomm.Request
	handled  int
}

// each returns the time that f takes for a request.
func (r *trackingRun) each(f func(*acomm.Request)) float64 {
	start := time.Now()
	for _, req := range r.requests {
		f(req)
	}
	return float64(time.Since(start)) / float64(len(r.requests))
}

func (r *trackingRun) trackAll() (float64, error) {
	var failed error
	took := r.each(func(req *acomm.Request) {
		failed = errors.Join(failed, r.tracker.TrackRequest(req, trackingTimeout))
	})
	if outstanding := r.tracker.NumRequests(); failed == nil && outstanding != len(r.requests) {
		failed = fmt.Errorf("%d requests outstanding, not %d", outstanding, len(r.requests))
	}
	return took, failed
}

func (r *trackingRun) removeAll() {
	r.each(func(req *acomm.Request) { r.tracker.RemoveRequest(req) })
}

// measureCompletion tracks the requests and completes them by their responses.
func (r *trackingRun) measureCompletion(result *trackingResult) (err error) {
	n := len(r.requests)
	before := liveBytes()
	if result.track, err = r.trackAll(); err != nil {
		return err
	}
	result.heap = float64(liveBytes()-before) / float64(n)
	result.count = timeNumRequests(r.tracker)
	resp := &acomm.Response{}
	result.complete = r.each(func(req *acomm.Request) {
		resp.ID = req.ID
		r.tracker.HandleResponse(resp)
	})
	if outstanding := r.tracker.NumRequests(); r.handled != n || outstanding != 0 {
		return fmt.Errorf("%d of %d handlers ran, %d requests outstanding", r.handled, n, outstanding)
	}
	return nil
}

// timeStop returns the time for a request that a stop takes while all are removed.
func (r *trackingRun) timeStop() float64 {
	start := time.Now()
	stopped := make(chan struct{})
	go func() { // ends when all are removed
		r.tracker.Stop()
		close(stopped)
	}()
	late := &acomm.Request{ID: "late", Task: echoTask, ResponseHook: r.tracker.URL()}
	for !errors.Is(r.tracker.TrackRequest(late, trackingTimeout), net.ErrClosed) { // Stop has begun
		r.tracker.RemoveRequest(late)
		runtime.Gosched()
	}
	r.removeAll()
	<-stopped
	return float64(time.Since(start)) / float64(len(r.requests))
}

// newRequests makes requests as they look when they have come over the wire.
// Hook and arguments are shared, so that they do not count.
func newRequests(n int, hook *url.URL, handle acomm.ResponseHandler) []*acomm.Request {
	args := json.RawMessage(`{"path":"/etc/hosts"}`)
	requests := make([]*acomm.Request, n)
	for i := range requests {
		requests[i] = &acomm.Request{
			ID:             fmt.Sprintf("%08x-0000-4000-8000-%012x", i, i),
			Task:           echoTask,
			ResponseHook:   hook,
			Args:           &args,
			SuccessHandler: handle,
			ErrorHandler:   handle,
		}
	}
	return requests
}

// timeNumRequests returns the time of one call.
func timeNumRequests(tracker *acomm.Tracker) float64 {
	const times = 1000
	start := time.Now()
	for range times {
		tracker.NumRequests()
	}
	return float64(time.Since(start)) / times
}

// liveBytes returns what this process holds in live objects and stacks.
func liveBytes() int64 {
	var mem runtime.MemStats
	for range 2 { // what finalizers and pools hold goes with the second
		runtime.GC()
	}
	runtime.ReadMemStats(&mem)
	return int64(mem.HeapAlloc + mem.StackInuse)
}
