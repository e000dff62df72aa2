package acomm

import (
	"sync"
	"time"
)

const (
	logBurst    = 10 // lines
	logInterval = time.Second
)

// logLimit keeps a flood of events, which a peer may cause, from flooding the
// log: it allows ten lines a second. The zero value is ready.
type logLimit struct {
	mu         sync.Mutex // guards the fields below
	since      time.Time  // beginning of the interval
	lines      int        // allowed in it
	suppressed int        // refused since the last line that was allowed
}

// allow reports whether a line may be logged, and how many were not since the
// last one that was.
func (l *logLimit) allow() (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.since) >= logInterval {
		l.since, l.lines = now, 0
	}
	if l.lines == logBurst {
		l.suppressed++
		return 0, false
	}
	l.lines++
	suppressed, l.suppressed = l.suppressed, 0
	return suppressed, true
}
