package main

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	idleTrackers  = 100
	idleExchanges = 1000
	idlePatience  = time.Minute
)

// runIdle shows what is held by what waits.
func runIdle(o options) error {
	t := &table{title: "what waits, each", head: []string{"", "goroutines", "bytes", "goal"}}
	goroutines, bytes, err := measureIdleTrackers()
	if err != nil {
		return err
	}
	t.add("a started tracker", fmt.Sprintf("%.2f", goroutines), formatBytes(bytes), "3 goroutines, 16 KiB")

	goroutines, bytes, err = measureWaitingResponses()
	if err != nil {
		return err
	}
	t.add("an acknowledged request", fmt.Sprintf("%.2f", goroutines), formatBytes(bytes), "no goroutine")

	goroutines, bytes, err = measureHeldExchanges()
	if err != nil {
		return err
	}
	t.add("an exchange held by its handler (the caller of Send is one)", fmt.Sprintf("%.2f", goroutines), formatBytes(bytes), "1 goroutine")
	return o.write(t)
}

// snapshot begins to measure what is held, and returns what ends it: it returns
// what was added since, divided by n.
func snapshot() (added func(n int) (goroutines, bytes float64)) {
	bytesBefore, goroutinesBefore := liveBytes(), runtime.NumGoroutine()
	return func(n int) (float64, float64) {
		settle()
		bytes, goroutines := liveBytes(), runtime.NumGoroutine()
		return float64(goroutines-goroutinesBefore) / float64(n), float64(bytes-bytesBefore) / float64(n)
	}
}

// settle waits until the number of goroutines has not changed for a while: those
// that are about to end are not held.
func settle() {
	const calm = 10
	last := runtime.NumGoroutine()
	for same, deadline := 0, time.Now().Add(idlePatience); same < calm && time.Now().Before(deadline); same++ {
		time.Sleep(5 * time.Millisecond)
		if now := runtime.NumGoroutine(); now != last {
			last, same = now, 0
		}
	}
}

func measureIdleTrackers() (goroutines, bytes float64, err error) {
	one, err := newIdleTracker() // what is made once in a process
	if err != nil {
		return 0, 0, err
	}
	defer one.Stop()
	added := snapshot()
	var trackers []*acomm.Tracker
	for range idleTrackers {
		tracker, err := newIdleTracker()
		if err != nil {
			return 0, 0, err
		}
		defer tracker.Stop()
		trackers = append(trackers, tracker)
	}
	goroutines, bytes = added(idleTrackers)
	runtime.KeepAlive(trackers)
	return goroutines, bytes, nil
}

func newIdleTracker() (*acomm.Tracker, error) {
	tracker, err := acomm.NewTracker("", nil, 0)
	if err != nil {
		return nil, err
	}
	return tracker, tracker.Start()
}

// measureWaitingResponses sends requests that are acknowledged and not answered.
func measureWaitingResponses() (goroutines, bytes float64, err error) {
	tracker, err := newIdleTracker()
	if err != nil {
		return 0, 0, err
	}
	defer tracker.Stop()
	listener := acomm.NewUnixListener("", 0)
	if err := listener.Start(); err != nil {
		return 0, 0, err
	}
	defer listener.Stop(0)
	go func() { // ends with the listener
		for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
			if _, err := receiveRequest(listener, conn); err != nil {
				return // the request goes unacknowledged, so its Send fails
			}
		}
	}()
	requests := newRequests(idleExchanges+1, tracker.URL(), nil)
	defer func() { // before Stop, which waits for them
		for _, req := range requests {
			tracker.RemoveRequest(req)
		}
	}()
	exchange := func(req *acomm.Request) error {
		if err := tracker.TrackRequest(req, trackingTimeout); err != nil {
			return err
		}
		return acomm.Send(listener.URL(), req)
	}
	if err := exchange(requests[idleExchanges]); err != nil { // what is kept for an address
		return 0, 0, err
	}
	added := snapshot()
	for _, req := range requests[:idleExchanges] {
		if err := exchange(req); err != nil {
			return 0, 0, err
		}
	}
	goroutines, bytes = added(idleExchanges)
	return goroutines, bytes, nil
}

// measureHeldExchanges sends requests that are not even acknowledged. Their
// senders wait in goroutines of their own, one goroutine holds all connections.
func measureHeldExchanges() (goroutines, bytes float64, err error) {
	listener := acomm.NewUnixListener("", 0)
	if err := listener.Start(); err != nil {
		return 0, 0, err
	}
	defer listener.Stop(time.Nanosecond)
	requests := newRequests(idleExchanges, listener.URL(), nil)
	sent := make(chan error, idleExchanges)
	added := snapshot()
	for _, req := range requests {
		go func() { sent <- acomm.Send(listener.URL(), req) }() // ends with the answer below
	}
	var held []net.Conn
	for range idleExchanges {
		conn := listener.NextConn()
		if conn == nil {
			return 0, 0, errors.New("the listener ended")
		}
		held = append(held, conn)
	}
	goroutines, bytes = added(idleExchanges)
	for _, conn := range held {
		err = errors.Join(err, acomm.UnmarshalConnData(conn, &acomm.Request{}), acomm.SendConnData(conn, &acomm.Response{}))
		listener.DoneConn(conn)
	}
	for range requests {
		err = errors.Join(err, <-sent)
	}
	return goroutines, bytes, err
}
