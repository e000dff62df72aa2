package acomm_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// patience is how long a test waits for what must happen. It is no measure of
// anything: reaching it is a failure.
const patience = 20 * time.Second

// TestMain fails on a goroutine left over by any test.
func TestMain(m *testing.M) {
	logrus.SetOutput(io.Discard)
	code := m.Run()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, "leaked goroutines:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// within returns what comes from the channel, or fails the test.
func within[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		require.FailNow(t, "timed out", "waiting for %s", what)
		panic("unreachable")
	}
}

// async runs f and returns a channel that is closed when it has returned.
func async(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

// logLines collects what the library logs during a test.
type logLines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func captureLog(t testing.TB) *logLines {
	lines := &logLines{}
	logrus.SetOutput(lines)
	t.Cleanup(func() { logrus.SetOutput(io.Discard) })
	return lines
}

// shortDir returns a new directory whose path is short, as those of sockets have
// to be. It is removed with the test.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	dir, err = filepath.EvalSymlinks(dir)
	require.NoError(t, err)
	return dir
}

// counter counts events and lets a test wait for a number of them.
type counter struct {
	mu      sync.Mutex    // guards the fields below
	n       int           // events so far
	changed chan struct{} // closed by the next event; nil: nobody waits
}

func (c *counter) add() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

func (c *counter) load() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// next returns the number of events, and a channel that the next one closes.
func (c *counter) next() (int, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.n, c.changed
}

// reach waits for the number of events, or until there is something to read from
// the other channel. It reports whether the number was reached.
func reach[T any](c *counter, number int, giveUp <-chan T) bool {
	for {
		n, changed := c.next()
		if n >= number {
			return true
		}
		select {
		case <-changed:
		case <-giveUp:
			return false
		}
	}
}

// requireReached fails the test if the number is not reached.
func requireReached(t testing.TB, c *counter, number int, what string) {
	t.Helper()
	require.True(t, reach(c, number, time.After(patience)), "timed out waiting for %s", what)
}

// openFiles counts this process's descriptors.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}

// newTracker returns a started tracker on a socket of its own; it is stopped
// with the test.
func newTracker(t testing.TB) *acomm.Tracker {
	t.Helper()
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	return tracker
}

// newRequest returns a request with a hook; both handlers send to the channel.
func newRequest(t testing.TB, hook *url.URL, args any) (*acomm.Request, <-chan *acomm.Response) {
	t.Helper()
	responses := make(chan *acomm.Response, 100)
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest("test", hook.String(), args, handle, handle)
	require.NoError(t, err)
	return req, responses
}
