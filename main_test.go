package acomm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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

// gate lets goroutines wait until it is open. It begins shut.
type gate struct {
	mu     sync.Mutex
	opened chan struct{} // closed while it is open
}

func (g *gate) channelLocked() chan struct{} {
	if g.opened == nil {
		g.opened = make(chan struct{})
	}
	return g.opened
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.channelLocked())
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened = nil
}

func (g *gate) wait(ctx context.Context) {
	g.mu.Lock()
	opened := g.channelLocked()
	g.mu.Unlock()
	select {
	case <-opened:
	case <-ctx.Done():
	}
}

// moment is long enough for what must not happen to happen. No order depends on
// it: where it is too short, a fault is missed, and nothing fails.
const moment = 30 * time.Millisecond

// second is the error of two results.
func second[T any](_ T, err error) error { return err }

// full is the number of the proof, or of its small version.
func full[T any](number, small T) T {
	if *long {
		return number
	}
	return small
}

// tally counts by name.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
}

func (c *tally) add(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[string]int)
	}
	c.counts[what]++
}

func (c *tally) get(what string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[what]
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var total int
	for _, n := range c.counts {
		total += n
	}
	return total
}

func (c *tally) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var parts []string
	for _, what := range slices.Sorted(maps.Keys(c.counts)) {
		parts = append(parts, fmt.Sprintf("%s %d", what, c.counts[what]))
	}
	return strings.Join(parts, ", ")
}

// await asks again and again until the answer is yes.
func await(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "timed out waiting for %s", what)
	}
}

// awaitBlocked waits until the number of goroutines wait inside the function.
func awaitBlocked(t testing.TB, function string, number int) {
	t.Helper()
	await(t, fmt.Sprintf("%d goroutines blocked in %s", number, function), func() bool {
		return blockedIn(function) == number
	})
}

// blockedIn counts the goroutines that wait inside the function.
func blockedIn(function string) (number int) {
	buf := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		head, rest, _ := strings.Cut(stack, "\n")
		if strings.Contains(rest, function+"(") && !strings.Contains(head, "[run") && !strings.Contains(head, "[sync.Mutex") {
			number++
		}
	}
	return number
}

// readByte reads one byte, within patience.
func readByte(conn net.Conn) (byte, error) {
	var b [1]byte
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(conn, b[:])
	return b[0], err
}

func readOne(conn net.Conn) error {
	n, err := conn.Read(make([]byte, 1))
	if n > 0 {
		return fmt.Errorf("read %d bytes", n)
	}
	return err
}

// setUmask sets the umask of the process until the test ends.
func setUmask(t *testing.T, mask int) {
	old := syscall.Umask(mask)
	t.Cleanup(func() { syscall.Umask(old) })
}

func mode(t testing.TB, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	require.NoError(t, err)
	return info.Mode()
}

func list(t testing.TB, dir string) []os.DirEntry {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	return entries
}

func writeFile(t *testing.T, path string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
}

func onlyLinux(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux reports what was left unread")
	}
}

func encode(v any) json.RawMessage {
	data, err := json.Marshal(v)
	orExit(err)
	return data
}
