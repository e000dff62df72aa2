package natshook_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// padding makes a connection fall behind soon: the server keeps four for it, and
// the sockets some.
var padding = strings.Repeat(" ", 64<<10)

// A connection falls behind, and its server cuts it off with what was pending for
// it. Every Send returns, what was acknowledged was handled once, nothing was
// handled twice, and it goes on when the connection has been made again.
func TestSlowConsumer_NothingIsLostUnnoticedNorHandledTwice(t *testing.T) {
	for name, scene := range map[string]struct {
		maxWait   time.Duration
		requester bool    // is the slow one, else the first provider is
		providers int     // all but the slow one keep up
		lost      []error // what failed matches one of these, and each was seen
	}{
		"one of two providers": {2 * time.Second, false, 2, []error{os.ErrDeadlineExceeded}},
		"the only provider":    {2 * time.Second, false, 1, []error{os.ErrDeadlineExceeded, syscall.ECONNREFUSED}},
		"the requester":        {patience, true, 1, []error{io.ErrUnexpectedEOF}},
	} {
		t.Run(name, func(t *testing.T) {
			defer natshook.SetMaxWait(scene.maxWait)() // for what is lost
			s := startServer(t, server.Options{MaxPayload: 2 * int32(len(padding)), MaxPending: 4 * int64(len(padding)), WriteDeadline: time.Second})
			g := newGate()
			slow := connectTo(t, s.ClientURL(), nats.SetCustomDialer(g))
			defer g.open() // or it can't be closed
			load := &load{requester: slow}
			if !scene.requester {
				load.requester = connect(t, s)
				load.prompt = append(load.prompt, load.requester)
				load.padding = padding
			}
			register(t, load.requester)
			handled, bySlow := newTally(), newTally()
			for i := range scene.providers {
				nc, isSlow := slow, i == 0 && !scene.requester
				if !isSlow {
					nc = connect(t, s)
					load.prompt = append(load.prompt, nc)
				}
				serve(t, nc, "tasks", "workers", func(w http.ResponseWriter, r *http.Request) {
					id := strings.TrimSpace(readID(r))
					handled.add(id)
					if isSlow {
						bySlow.add(id)
					}
					acknowledge(w, nil)
					if scene.requester {
						_, _ = io.WriteString(w, padding)
					}
				})
			}
			load.send(t)
			load.wg.Wait()

			again := slow.StatusChanged(nats.CONNECTED)
			g.shut()
			for deadline := time.Now().Add(patience); s.NumSlowConsumers() == 0; load.send(t) {
				require.True(t, time.Now().Before(deadline), "the slow connection is cut off")
			}
			if !scene.requester && scene.providers == 1 {
				for deadline := time.Now().Add(patience); !load.refused(); load.send(t) {
					require.True(t, time.Now().Before(deadline), "nobody is left")
				}
			}
			g.open() // what had been sent is read, then the end
			within(t, again, "the connection")
			load.wg.Wait()

			acknowledged, failed := requireNothingLostUnnoticed(t, load.outcomes, handled)
			t.Logf("%d acknowledged, failed: %v", acknowledged, failed)
			for _, lost := range scene.lost {
				require.NotZero(t, failed[lost], "%v", lost)
				delete(failed, lost)
			}
			require.Empty(t, failed)
			before := bySlow.total()
			for deadline := time.Now().Add(patience); !scene.requester && bySlow.total() == before; {
				_ = acomm.Send(natshook.URL("tasks"), newID())
				require.True(t, time.Now().Before(deadline), "the slow provider serves again")
			}
			require.NoError(t, acomm.Send(natshook.URL("tasks"), newID()))
		})
	}
}

// Hazard: nats.go drops what comes while 64 MiB wait for their handlers to start.
func TestServe_NothingIsDroppedWhileItFallsBehind(t *testing.T) {
	const size, requests = 8 << 20, 10 // more than that in all
	// The server, too, would drop a reader for which 64 MiB wait.
	s := startServer(t, server.Options{MaxPayload: size + 1<<10, MaxPending: 2 * size * requests})
	requester, nc := connect(t, s), connect(t, s)
	register(t, requester)
	handled := newTally()
	serve(t, nc, "tasks", "", func(_ http.ResponseWriter, r *http.Request) {
		handled.add(r.Header.Get("X-Id"))
	})
	log := newGate()
	defer logrus.SetOutput(io.Discard)
	defer log.open()
	logrus.SetOutput(log)
	log.shut()
	require.NoError(t, requester.Publish("tasks", nil)) // no request, which is logged where requests are taken
	within(t, log.waiting, "the log")

	body, errs := strings.Repeat("x", size), make(chan error, requests)
	for range requests {
		req, err := http.NewRequest(http.MethodPost, natshook.URL("tasks").String(), strings.NewReader(body))
		require.NoError(t, err)
		req.Header.Set("X-Id", newID())
		go func() {
			_, err := http.DefaultTransport.RoundTrip(req) // a body in memory: nothing to close
			errs <- err
		}()
	}
	require.Eventually(t, func() bool { return nc.Stats().InMsgs == 1+requests }, patience, time.Millisecond)
	log.open()
	for range requests {
		require.NoError(t, within(t, errs, "the answer"))
	}
	require.Equal(t, requests, handled.total())
	require.Equal(t, 1, handled.most())
}

// load is requests under way.
type load struct {
	requester *nats.Conn
	prompt    []*nats.Conn // those that keep up; they may, before more is sent
	padding   string

	wg       sync.WaitGroup // of the Sends
	started  uint64         // what the requester has published
	mu       sync.Mutex     // guards outcomes
	outcomes []outcome
}

// send sends two requests more, and returns when they are on their way.
func (l *load) send(t *testing.T) {
	t.Helper()
	for range 2 {
		l.started++
		l.wg.Go(func() {
			id := newID()
			err := acomm.Send(natshook.URL("tasks"), id+l.padding)
			l.mu.Lock()
			defer l.mu.Unlock()
			l.outcomes = append(l.outcomes, outcome{id, err})
		})
	}
	require.Eventually(t, func() bool { return l.requester.Stats().OutMsgs >= l.started }, patience, time.Millisecond)
	for _, nc := range l.prompt {
		require.NoError(t, nc.FlushTimeout(patience))
	}
}

func (l *load) refused() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.outcomes, func(o outcome) bool { return errors.Is(o.err, syscall.ECONNREFUSED) })
}

// gate holds up what comes to it while it is shut: what is read from the connections
// it dials, and what is written to it, which is discarded.
type gate struct {
	waiting chan struct{} // has a value when something has waited

	mu     sync.Mutex // guards opened
	opened chan struct{}
}

// newGate returns an open one.
func newGate() *gate {
	g := &gate{waiting: make(chan struct{}, 1), opened: make(chan struct{})}
	close(g.opened)
	return g
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.opened:
	default:
		close(g.opened)
	}
}

func (g *gate) pass() {
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	select {
	case <-opened:
	default:
		select {
		case g.waiting <- struct{}{}:
		default:
		}
		<-opened
	}
}

func (g *gate) Write(p []byte) (int, error) {
	g.pass()
	return len(p), nil
}

func (g *gate) Dial(network, addr string) (net.Conn, error) {
	conn, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10) // it does not grow then, and falls behind soon
	return &gatedConn{conn, g}, nil
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c *gatedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.gate.pass()
	return n, err
}
