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

// shorten cuts off a long text, so that a peer can't fill the log with one line.
func shorten(text string) string {
	if len(text) <= maxLogText {
		return text
	}
	return text[:maxLogText] + "..."
}

// logLimit writes log lines about failures that no caller is told of. It writes ten a
// second at most, since a peer may cause any number of failures. The zero value is ready
// to use.
type logLimit struct {
	mu         sync.Mutex // guards the fields below
	since      time.Time  // beginning of the interval
	lines      int        // written in it
	suppressed int        // not written since the last line that was
}

// log writes a line, with a field for each argument that is not nil or empty.
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

// allow reports whether a line may be written, and how many were suppressed since the
// last one.
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
