package acomm

import (
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	maxLogText = 256 // bytes of a text that may come from a peer

	logBurst    = 10 // lines
	logInterval = time.Second
)

// shorten keeps a peer from filling the log with one line.
func shorten(text string) string {
	if len(text) <= maxLogText {
		return text
	}
	return text[:maxLogText] + "..."
}

// logLimit writes the log lines about failures that no caller is told of. It
// keeps a flood of them, which a peer may cause, from flooding the log: it
// writes ten a second. The zero value is ready.
type logLimit struct {
	mu         sync.Mutex // guards the fields below
	since      time.Time  // beginning of the interval
	lines      int        // allowed in it
	suppressed int        // refused since the last line that was allowed
}

// log writes what of a failure is not nil or empty.
func (l *logLimit) log(level logrus.Level, message string, err error, id, addr string) {
	suppressed, ok := l.allow()
	if !ok {
		return
	}
	fields := logrus.Fields{}
	if err != nil {
		fields["error"] = shorten(err.Error())
	}
	if id != "" {
		fields["id"] = shorten(id)
	}
	if addr != "" {
		fields["addr"] = shorten(addr)
	}
	if suppressed > 0 {
		fields["suppressed"] = suppressed
	}
	logrus.WithFields(fields).Log(level, message)
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
