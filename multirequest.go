package acomm

import (
	"fmt"
	"io/fs"
	"maps"
	"sync"
	"time"
)

// MultiRequest tracks any number of requests, each under a name, and collects their
// responses. Make one with [NewMultiRequest]. All methods may be called from any
// goroutine.
type MultiRequest struct {
	tracker *Tracker
	timeout time.Duration

	mu        sync.Mutex                 // guards the fields below
	names     map[string]string          // request id -> name, of the added requests
	requests  map[string]*pendingRequest // name -> request, of the added requests
	responses map[string]*Response       // name -> response, of those that were answered or timed out
	answered  *sync.Cond                 // signals that responses or requests have changed
}

// NewMultiRequest creates a MultiRequest that tracks its requests with the tracker, each
// for the timeout. A timeout of zero or less means the tracker's default.
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

// AddRequest tracks a request under a name and replaces the request's handlers. It does
// not send the request. Requests may be added at any time, also while Responses waits.
//
// Any name is good, the empty one too, but only once. The errors match:
//
//   - [io/fs.ErrInvalid]: the request is nil, or [Tracker.TrackRequest] refuses it as
//     invalid
//   - [io/fs.ErrExist]: the name is used already, or the id is tracked already
//   - [net.ErrClosed]: the tracker is not started, or it is stopping
//
// After an error, neither the MultiRequest nor the request has changed.
func (m *MultiRequest) AddRequest(name string, req *Request) error {
	if m.tracker == nil || req == nil {
		return fmt.Errorf("add request %q: tracker or request is nil: %w", name, fs.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.requests[name]; ok {
		return fmt.Errorf("add request %q: name is used already: %w", name, fs.ErrExist)
	}
	if _, ok := m.names[req.ID]; ok {
		return fmt.Errorf("add request %q: id %s is used already: %w", name, req.ID, fs.ErrExist)
	}
	// A response may arrive at once. Its handling waits for mu, until the entry is there.
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

// RemoveRequest removes a request from the MultiRequest and from the tracker, for example
// because sending it failed. Responses then neither waits for it nor returns it. If its
// response or time-out came first, that stays: after a failed Send the acknowledgement
// alone may have been lost. It ignores nil and requests that were not added.
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
		return // its response has arrived; handle may still be waiting for mu
	}
	delete(m.names, req.ID)
	delete(m.requests, name)
	m.answered.Broadcast()
}

// Responses blocks until every added request was answered, timed out or removed, and
// returns the responses by the names of their requests. A time-out is a response with an
// error. Remove requests with [MultiRequest.RemoveRequest]: after the tracker's
// RemoveRequest, Responses waits without end.
//
// It may be called more than once, and from several goroutines. Each call returns a map
// of its own with the same responses.
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

// handle stores the response of a request that was added.
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
