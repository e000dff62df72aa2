package acomm

import (
	"fmt"
	"io/fs"
	"maps"
	"sync"
	"time"
)

// MultiRequest provides a way to manage multiple parallel requests: it tracks
// any number of them, each under a name, and collects their responses. All
// methods may be called from any goroutine.
type MultiRequest struct {
	tracker *Tracker
	timeout time.Duration

	mu        sync.Mutex                 // guards the fields below
	names     map[string]string          // request id -> name, of all requests added
	requests  map[string]*pendingRequest // name -> request
	responses map[string]*Response       // name -> response, of those accounted for
	answered  *sync.Cond                 // responses or requests have changed
}

// NewMultiRequest creates and initializes a new MultiRequest, which tracks its
// requests with the tracker, each for the timeout; zero or less means the
// tracker's default.
func NewMultiRequest(tracker *Tracker, timeout time.Duration) *MultiRequest {
	m := &MultiRequest{
		tracker:   tracker,
		timeout:   timeout,
		names:     make(map[string]string),
		requests:  make(map[string]*pendingRequest),
		responses: make(map[string]*Response),
	}
	m.answered = sync.NewCond(&m.mu)
	return m
}

// AddRequest adds a request to the MultiRequest under a name and tracks it; the
// request's handlers are replaced. Sending the request is still the
// responsibility of the caller. Requests may also be added while Responses
// waits, and after.
//
// Any name will do, the empty one too, but each once. A nil request, and one that
// [Tracker.TrackRequest] refuses as invalid, give an error that matches
// [io/fs.ErrInvalid], a name that is used or an id that is tracked already
// [io/fs.ErrExist], a tracker that is not running [net.ErrClosed]. After an error
// neither the MultiRequest nor the request has changed.
func (m *MultiRequest) AddRequest(name string, req *Request) error {
	if m.tracker == nil || req == nil {
		return fmt.Errorf("add request %q: tracker or request is missing: %w", name, fs.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.requests[name]; ok {
		return fmt.Errorf("add request %q: name is used already: %w", name, fs.ErrExist)
	}
	if _, ok := m.names[req.ID]; ok {
		return fmt.Errorf("add request %q: id %s is used already: %w", name, req.ID, fs.ErrExist)
	}
	// A response can't overtake the entry: its handling waits for mu.
	collect := func(p *pendingRequest, resp *Response) { m.handle(p.req, resp) }
	p, err := m.tracker.track(req, m.timeout, collect)
	if err != nil {
		return fmt.Errorf("add request %q: %w", name, err)
	}
	req.SuccessHandler, req.ErrorHandler = m.handle, m.handle
	m.names[req.ID] = name
	m.requests[name] = p
	return nil
}

// RemoveRequest removes a request from the MultiRequest and from the tracker.
// Useful if the send fails. Responses does not wait for it any more and leaves it
// out. A response or time-out that came first stays: where a Send has failed, only
// the acknowledgement may have been lost. A request that was not added, and nil, is
// ignored.
func (m *MultiRequest) RemoveRequest(req *Request) {
	if req == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	name, ok := m.names[req.ID]
	if !ok {
		return
	}
	removed := m.tracker.remove(m.requests[name])
	if _, answered := m.responses[name]; answered || !removed {
		return // its response is here, or waits for mu
	}
	delete(m.names, req.ID)
	delete(m.requests, name)
	m.answered.Broadcast()
}

// Responses returns responses for all of the requests, keyed on the request name
// (as opposed to request id). It blocks until all requests are accounted for:
// answered, timed out or removed with RemoveRequest of the MultiRequest (not of
// the tracker, which leaves it waiting). It may be called more than once, and from
// several goroutines; each call returns a map of its own with the same
// responses.
func (m *MultiRequest) Responses() map[string]*Response {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.responses) < len(m.requests) {
		m.answered.Wait()
	}
	responses := make(map[string]*Response, len(m.responses))
	maps.Copy(responses, m.responses)
	return responses
}

// handle keeps the response of a request that was added.
func (m *MultiRequest) handle(req *Request, resp *Response) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name, ok := m.names[req.ID]
	if !ok || m.requests[name].req != req {
		return // removed in the meantime
	}
	m.responses[name] = resp
	m.answered.Broadcast()
}
