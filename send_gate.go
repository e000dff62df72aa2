package acomm

import (
	"math"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	postPatience = 20 * time.Millisecond // for a turn to post to a host
	slowHost     = time.Second           // for which nobody waits after that was in vain
)

// gates let as many posts to a host pass at a time as the transport keeps
// connections to it (two, unless the service has asked for more), and one more, so
// that those are busy while one goes from a post to the next. A burst would
// otherwise open a connection for each post, and throw all but two away. Where
// posts are answered quickly the turn comes sooner than a connection would. Where
// they are not, waiting ends soon, and the next ones do not even begin to.
var gates = postGates{byHost: make(map[string]*postGate), patience: postPatience}

type postGates struct {
	mu       sync.Mutex // guards the fields below, and those of the gates
	byHost   map[string]*postGate
	patience time.Duration
}

// postGate is the gate to one host.
type postGate struct {
	turns chan struct{} // holds a value for each post that has its turn
	posts int           // with or without; the last one drops the gate
	slow  time.Time     // until then, nobody waits
}

// enter waits for a turn to post to the URL's host, for a moment at most. The
// caller calls leave when it has read the answer.
func (g *postGates) enter(addr *url.URL) (leave func()) {
	kept := keptConnections()
	if kept <= 0 || addr.Scheme != "http" && addr.Scheme != "https" {
		return func() {}
	}
	host := addr.Scheme + "://" + addr.Host
	g.mu.Lock()
	gate := g.byHost[host]
	if gate == nil {
		gate = &postGate{turns: make(chan struct{}, min(kept, math.MaxInt-1)+1)}
		g.byHost[host] = gate
	}
	gate.posts++
	patience := g.patience
	if time.Now().Before(gate.slow) {
		patience = 0
	}
	g.mu.Unlock()

	hasTurn := gate.wait(patience)

	g.mu.Lock()
	defer g.mu.Unlock()
	if !hasTurn && patience > 0 {
		gate.slow = time.Now().Add(slowHost)
	}
	return func() {
		if hasTurn {
			<-gate.turns
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if gate.posts--; gate.posts == 0 {
			delete(g.byHost, host)
		}
	}
}

// wait waits for a turn and reports whether there was one in time.
func (g *postGate) wait(patience time.Duration) bool {
	select {
	case g.turns <- struct{}{}:
		return true
	default:
	}
	if patience <= 0 {
		return false
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case g.turns <- struct{}{}:
		return true
	case <-timer.C:
		return false
	}
}

// keptConnections returns how many idle connections http.DefaultTransport keeps to
// a host; 0 if it keeps none, or can't tell.
func keptConnections() int {
	transport, ok := http.DefaultTransport.(*http.Transport)
	switch {
	case !ok || transport.DisableKeepAlives:
		return 0
	case transport.MaxIdleConnsPerHost == 0:
		return http.DefaultMaxIdleConnsPerHost
	}
	return max(0, transport.MaxIdleConnsPerHost)
}
