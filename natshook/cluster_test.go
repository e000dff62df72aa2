package natshook_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/stretchr/testify/require"
)

var lastID atomic.Int64

func newID() string { return fmt.Sprint("id-", lastID.Add(1)) }

// readID returns the id in a request: its whole payload.
func readID(r *http.Request) (id string) {
	_ = json.NewDecoder(r.Body).Decode(&id)
	return id
}

// tally counts how often each id was handled.
type tally struct {
	mu   sync.Mutex
	byID map[string]int
}

func newTally() *tally { return &tally{byID: make(map[string]int)} }

func (c *tally) add(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byID[id]++
}

func (c *tally) of(id string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, times := range c.byID {
		n += times
	}
	return n
}

func (c *tally) most() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, times := range c.byID {
		n = max(n, times)
	}
	return n
}

// cluster starts three servers that know each other.
func cluster(t *testing.T) [3]*server.Server {
	t.Helper()
	var nodes [3]*server.Server
	for i := range nodes {
		opts := server.Options{
			ServerName: fmt.Sprint("node-", i),
			Cluster:    server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: server.RANDOM_PORT},
		}
		if i > 0 {
			opts.Routes = server.RoutesFromStr("nats://" + nodes[0].ClusterAddr().String())
		}
		nodes[i] = startServer(t, opts)
	}
	return nodes
}

// Under load something is killed. Every Send returns, what was acknowledged was
// handled once, nothing was handled twice, and it goes on afterwards.
func TestCluster_NothingIsLostUnnoticedNorHandledTwice(t *testing.T) {
	type scene struct {
		nodes     [3]*server.Server
		providers [2]provider
	}
	for name, kill := range map[string]func(*scene){
		"the requester's node":            func(s *scene) { s.nodes[0].Shutdown() },
		"a provider's node":               func(s *scene) { s.nodes[1].Shutdown() },
		"a provider is closed":            func(s *scene) { _ = s.providers[0].Close() },
		"a provider's connection is gone": func(s *scene) { s.providers[0].cut() },
	} {
		t.Run(name, func(t *testing.T) {
			defer natshook.SetMaxWait(2 * time.Second)() // for what is lost
			s := &scene{nodes: cluster(t)}
			register(t, connect(t, s.nodes[0], s.nodes[1], s.nodes[2]))
			handled := newTally()
			for i, order := range [][]int{{1, 2, 0}, {2, 0, 1}} {
				nc := connect(t, s.nodes[order[0]], s.nodes[order[1]], s.nodes[order[2]])
				s.providers[i].cut = nc.Close
				s.providers[i].Closer = serve(t, nc, "tasks", "workers", func(_ http.ResponseWriter, r *http.Request) {
					s.providers[i].handled.Add(1)
					handled.add(readID(r))
				})
			}
			// The requester's node learns of the others in its own time, and neither a
			// server nor a client tells when it has: only what arrives does.
			for deadline := time.Now().Add(patience); s.providers[0].handled.Load() == 0 || s.providers[1].handled.Load() == 0; {
				_ = acomm.Send(natshook.URL("tasks"), newID())
				require.True(t, time.Now().Before(deadline), "both providers are found")
			}

			const senders, before, after = 8, 40, 40
			var load, wg sync.WaitGroup
			killed := make(chan struct{})
			type outcome struct {
				id  string
				err error
			}
			var outcomes [senders][]outcome
			load.Add(senders)
			for i := range senders {
				wg.Go(func() {
					send := func() error {
						id := newID()
						err := acomm.Send(natshook.URL("tasks"), id)
						outcomes[i] = append(outcomes[i], outcome{id, err})
						return err
					}
					for range before {
						_ = send()
					}
					load.Done()
					for isOpen := true; isOpen; {
						_ = send()
						select {
						case <-killed:
							isOpen = false
						default:
						}
					}
					for n := 0; n < after; { // until so many have been acknowledged again
						if send() == nil {
							n++
						}
					}
				})
			}
			load.Wait() // all are at it
			kill(s)
			close(killed)
			wg.Wait()
			acknowledged, failed := 0, 0
			for _, o := range slices.Concat(outcomes[:]...) {
				if o.err == nil {
					acknowledged++
					require.Equal(t, 1, handled.of(o.id), "acknowledged, so handled once")
					continue
				}
				failed++
				require.True(t, errors.Is(o.err, io.ErrUnexpectedEOF) || errors.Is(o.err, os.ErrDeadlineExceeded) ||
					errors.Is(o.err, syscall.ECONNREFUSED), "%v", o.err)
				if errors.Is(o.err, syscall.ECONNREFUSED) {
					require.Zero(t, handled.of(o.id), "refused, so handled by nobody")
				}
			}
			require.Equal(t, 1, handled.most())
			require.GreaterOrEqual(t, acknowledged, senders*after)
			t.Logf("%d acknowledged, %d failed", acknowledged, failed)
		})
	}
}

// provider is one of those that serve the subject.
type provider struct {
	io.Closer
	cut     func()
	handled atomic.Int64
}
