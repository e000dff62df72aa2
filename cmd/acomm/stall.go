package main

import (
	"sync/atomic"
	"time"
)

// streamStall is how long a stream may stand still while the process is ending.
// The library's tracker allows it as much.
const streamStall = 10 * time.Second

// movement knows when a stream last moved.
type movement struct {
	born time.Time
	last atomic.Int64 // nanoseconds from born
}

func newMovement() *movement { return &movement{born: time.Now()} }

func (m *movement) touch() { m.last.Store(int64(time.Since(m.born))) }

// ends waits until the stream is done, and reports true, or until it has stood
// still for streamStall or is cut, and reports false.
func (m *movement) ends(done, cut <-chan struct{}) bool {
	for {
		idle := time.Since(m.born) - time.Duration(m.last.Load())
		if idle >= streamStall {
			return false
		}
		timer := time.NewTimer(streamStall - idle)
		select {
		case <-done:
			timer.Stop()
			return true
		case <-cut:
			timer.Stop()
			return false
		case <-timer.C:
		}
	}
}
