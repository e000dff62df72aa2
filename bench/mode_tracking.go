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
	handled := 0
	requests := newRequests(n, tracker.URL(), func(*acomm.Request, *acomm.Response) { handled++ })
	each := func(f func(*acomm.Request)) float64 {
		start := time.Now()
		for _, req := range requests {
			f(req)
		}
		return float64(time.Since(start)) / float64(n)
	}
	trackAll := func() (float64, error) {
		var failed error
		took := each(func(req *acomm.Request) { failed = errors.Join(failed, tracker.TrackRequest(req, trackingTimeout)) })
		if outstanding := tracker.NumRequests(); failed == nil && outstanding != n {
			failed = fmt.Errorf("%d requests outstanding, not %d", outstanding, n)
		}
		return took, failed
	}
	removeAll := func() { each(func(req *acomm.Request) { tracker.RemoveRequest(req) }) }
	defer removeAll() // before Stop, which waits for them

	before := liveBytes()
	if result.track, err = trackAll(); err != nil {
		return result, err
	}
	result.heap = float64(liveBytes()-before) / float64(n)
	result.count = timeNumRequests(tracker)
	resp := &acomm.Response{}
	result.complete = each(func(req *acomm.Request) {
		resp.ID = req.ID
		tracker.HandleResponse(resp)
	})
	if handled != n || tracker.NumRequests() != 0 {
		return result, fmt.Errorf("%d of %d handlers ran, %d requests outstanding", handled, n, tracker.NumRequests())
	}

	if _, err := trackAll(); err != nil {
		return result, err
	}
	start := time.Now()
	stopped := make(chan struct{})
	go func() { // ends when all are removed
		tracker.Stop()
		close(stopped)
	}()
	late := &acomm.Request{ID: "late", Task: echoTask, ResponseHook: tracker.URL()}
	for !errors.Is(tracker.TrackRequest(late, trackingTimeout), net.ErrClosed) { // Stop has begun
		tracker.RemoveRequest(late)
		runtime.Gosched()
	}
	removeAll()
	<-stopped
	result.stop = float64(time.Since(start)) / float64(n)
	return result, nil
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
