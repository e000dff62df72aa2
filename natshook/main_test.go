package natshook_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// TestMain fails on a goroutine left over by any test.
func TestMain(m *testing.M) {
	if name := os.Getenv(nodeVariable); name != "" {
		if err := runNode(name); err != nil {
			fmt.Fprintln(os.Stderr, name, err)
			os.Exit(1)
		}
		return
	}
	logrus.SetOutput(io.Discard)
	code := m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, "leaked goroutines:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

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

// startServer starts a NATS server; the options may set limits.
func startServer(t testing.TB, opts server.Options) *server.Server {
	t.Helper()
	opts.Host, opts.Port, opts.NoLog, opts.NoSigs = "127.0.0.1", server.RANDOM_PORT, true, true
	s, err := server.NewServer(&opts)
	require.NoError(t, err)
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	require.True(t, s.ReadyForConnections(patience))
	return s
}

// connect connects to the servers, the first one first, and quickly to the next.
func connect(t testing.TB, servers ...*server.Server) *nats.Conn {
	t.Helper()
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.ClientURL())
	}
	return connectTo(t, strings.Join(urls, ","))
}

func connectTo(t testing.TB, urls string, more ...nats.Option) *nats.Conn {
	t.Helper()
	closed := make(chan struct{})
	nc, err := nats.Connect(urls, append(more, nats.DontRandomize(), nats.MaxReconnects(-1),
		nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }))...)
	require.NoError(t, err)
	t.Cleanup(func() {
		nc.Close()
		within(t, closed, "the connection to close")
	})
	return nc
}

// register registers a connection with a transport that is the default one for as
// long as the test runs.
func register(t testing.TB, nc *nats.Conn) {
	t.Helper()
	old := http.DefaultTransport
	http.DefaultTransport = &http.Transport{}
	t.Cleanup(func() { http.DefaultTransport = old })
	require.NoError(t, natshook.Register(nc))
}

// serve serves until the test ends.
func serve(t testing.TB, nc *nats.Conn, subject, queue string, h http.HandlerFunc) io.Closer {
	t.Helper()
	closer, err := natshook.Serve(nc, subject, queue, h)
	require.NoError(t, err)
	t.Cleanup(func() { _ = closer.Close() })
	return closer
}

// pair returns a connection that is registered and one to serve on, of one server.
func pair(t testing.TB) (requester, provider *nats.Conn) {
	t.Helper()
	s := startServer(t, server.Options{})
	requester, provider = connect(t, s), connect(t, s)
	register(t, requester)
	return requester, provider
}

func newRequest(t testing.TB, hook *url.URL, args any) (*acomm.Request, <-chan *acomm.Response) {
	t.Helper()
	responses := make(chan *acomm.Response, 100)
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest("test", hook.String(), args, handle, handle)
	require.NoError(t, err)
	return req, responses
}

func newTracker(t testing.TB) *acomm.Tracker {
	t.Helper()
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	return tracker
}

// acknowledge answers as a handler of HTTP hooks does.
func acknowledge(w http.ResponseWriter, err error) {
	_ = json.NewEncoder(w).Encode(&acomm.Response{Error: err})
}
