package natshook_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
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

// outcome is what became of a request: its Send's error.
type outcome struct {
	id  string
	err error
}

// requireNothingLostUnnoticed requires that what was acknowledged was handled once,
// what was refused by nobody, and nothing twice, and that what failed says so in a
// way that leaves it open. It returns how many requests failed by what their errors
// match.
func requireNothingLostUnnoticed(t *testing.T, outcomes []outcome, handled *tally) (acknowledged int, failed map[error]int) {
	t.Helper()
	failed = make(map[error]int)
	for _, o := range outcomes {
		switch {
		case o.err == nil:
			acknowledged++
			require.Equal(t, 1, handled.of(o.id), "acknowledged, so handled once")
		case errors.Is(o.err, syscall.ECONNREFUSED):
			failed[syscall.ECONNREFUSED]++
			require.Zero(t, handled.of(o.id), "refused, so handled by nobody")
		case errors.Is(o.err, io.ErrUnexpectedEOF):
			failed[io.ErrUnexpectedEOF]++
		default:
			failed[os.ErrDeadlineExceeded]++
			require.ErrorIs(t, o.err, os.ErrDeadlineExceeded)
		}
	}
	require.LessOrEqual(t, handled.most(), 1)
	return acknowledged, failed
}

// nodeVariable is set in the environment of a node, a process of this program, to
// its name; routeVariable to the address of the cluster's first node.
const (
	nodeVariable  = "NATSHOOK_TEST_NODE"
	routeVariable = "NATSHOOK_TEST_ROUTE"
)

// node is a server of a cluster, in a process of its own, so that it can be killed
// as servers are: no goodbye to its clients, nothing of what it has taken sent on.
type node struct {
	URL, Route string
	kill       func() // and waits for its end
}

// runNode is the process of a node. It ends when its standard input does, so that it
// does not outlive the tests.
func runNode(name string) error {
	opts := &server.Options{
		ServerName: name, Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: server.RANDOM_PORT},
		Routes:  server.RoutesFromStr(os.Getenv(routeVariable)),
	}
	s, err := server.NewServer(opts)
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(patience) {
		return os.ErrDeadlineExceeded
	}
	if err := json.NewEncoder(os.Stdout).Encode(node{URL: s.ClientURL(), Route: "nats://" + s.ClusterAddr().String()}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func startNode(t *testing.T, name, route string) *node {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), nodeVariable+"="+name, routeVariable+"="+route)
	cmd.Stderr = os.Stderr
	_, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	n := &node{kill: sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})}
	t.Cleanup(n.kill)
	require.NoError(t, json.NewDecoder(stdout).Decode(n))
	return n
}

// cluster starts three nodes that know each other.
func cluster(t *testing.T) [3]*node {
	t.Helper()
	var nodes [3]*node
	route := ""
	for i := range nodes {
		nodes[i] = startNode(t, fmt.Sprint("node-", i), route)
		route = nodes[0].Route
	}
	return nodes
}

// connectToNodes connects to the nodes, the first one first.
func connectToNodes(t *testing.T, nodes ...*node) *nats.Conn {
	t.Helper()
	var urls []string
	for _, n := range nodes {
		urls = append(urls, n.URL)
	}
	return connectTo(t, strings.Join(urls, ","))
}

// Under load something is killed. Every Send returns, what was acknowledged was
// handled once, nothing was handled twice, and it goes on afterwards.
func TestCluster_NothingIsLostUnnoticedNorHandledTwice(t *testing.T) {
	type scene struct {
		nodes     [3]*node
		providers [2]provider
	}
	for name, kill := range map[string]func(*scene){
		"the requester's node":            func(s *scene) { s.nodes[0].kill() },
		"a provider's node":               func(s *scene) { s.nodes[1].kill() },
		"a provider is closed":            func(s *scene) { _ = s.providers[0].Close() },
		"a provider's connection is gone": func(s *scene) { s.providers[0].cut() },
	} {
		t.Run(name, func(t *testing.T) {
			defer natshook.SetMaxWait(2 * time.Second)() // for what is lost
			s := &scene{nodes: cluster(t)}
			register(t, connectToNodes(t, s.nodes[0], s.nodes[1], s.nodes[2]))
			handled := newTally()
			for i, order := range [][]int{{1, 2, 0}, {2, 0, 1}} {
				nc := connectToNodes(t, s.nodes[order[0]], s.nodes[order[1]], s.nodes[order[2]])
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
			acknowledged, failed := requireNothingLostUnnoticed(t, slices.Concat(outcomes[:]...), handled)
			require.GreaterOrEqual(t, acknowledged, senders*after)
			t.Logf("%d acknowledged, failed: %v", acknowledged, failed)
		})
	}
}

// provider is one of those that serve the subject.
type provider struct {
	io.Closer
	cut     func()
	handled atomic.Int64
}
