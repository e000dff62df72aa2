package acomm

import (
	"fmt"
	"hash/maphash"
	"io/fs"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/sirupsen/logrus"
)

const (
	defaultTimeout  = time.Minute // of a request, if neither it nor the tracker has one
	exchangeTimeout = time.Minute // for reading a response and acknowledging it
	maxIdle         = 2           // goroutines that wait for the next connection

	// atOnce makes Stop of a listener close open connections without waiting for them.
	// Zero would mean no time limit.
	atOnce = time.Nanosecond
)

// Tracker keeps track of requests that wait for a response. It listens on a unix socket
// for the responses, matches them by id, and completes each request exactly once: with
// its response, with a time-out, or by removal.
//
// Make one with [NewTracker] and start it with Start. After Stop it can be started again.
// [Tracker.ProxyUnix] forwards responses to other hooks, [Tracker.NewStreamUnix] serves
// streams while the tracker runs. All methods may be called from any goroutine.
type Tracker struct {
	responses      *UnixListener // started and stopped with the tracker
	streamURL      *url.URL      // immutable; nil: streams are not proxied
	defaultTimeout time.Duration // immutable

	// Constants, except in tests, which set them before Start.
	exchangeTimeout time.Duration
	streamClaim     time.Duration
	streamStall     time.Duration
	streamEnd       time.Duration
	hashMask        uint64 // bits of an id's hash that count: all

	unknown  logLimit       // for responses to requests that are not tracked
	failures logLimit       // for failed forwards and streams
	starting sync.Mutex     // one Start at a time; taken before mu
	serving  sync.WaitGroup // goroutines in serve; Stop waits
	idle     atomic.Int32   // goroutines in serve that wait for a connection

	mu       sync.Mutex // guards the fields below
	state    trackerState
	pending  map[uint64]*pendingRequest     // by hash of the id; the goroutine that removes an entry completes it
	tracked  int                            // number of pending requests
	timeouts map[time.Duration]*timeoutList // of the pending requests, by time-out
	drained  chan struct{}                  // made by Stop, closed when pending is empty
	stopped  chan struct{}                  // made by Stop, closed when Stop is done
	handlers sync.WaitGroup                 // requests being completed; Add only under mu; Stop waits
	streams  map[*unixStream]struct{}       // streams that are not done
}

type trackerState int

const (
	trackerStopped trackerState = iota
	trackerRunning
	trackerStopping // Stop is running; new requests and streams are refused
)

// pendingRequest is a tracked request.
type pendingRequest struct {
	// Immutable.
	id       string // a copy: the caller might change req.ID
	req      *Request
	handle   func(*pendingRequest, *Response) // completes the request
	deadline time.Time

	// Guarded by the tracker's mu.
	taken      bool            // removed from the table to be completed
	timeout    *timeoutList    // the list that this is in; nil: removed
	prev, next *pendingRequest // in that list
	same       *pendingRequest // next one whose id has the same hash; almost always nil
}

var idSeed = maphash.MakeSeed()

// hash returns the key of an id in the table. A table with ids as keys would be larger
// and slower: with a million requests, most of the time goes into memory that is in no
// cache.
func (t *Tracker) hash(id string) uint64 { return maphash.String(idSeed, id) & t.hashMask }

// timeoutList holds the pending requests with the same time-out. They expire in the order
// in which they were tracked, so one timer serves all. A timer for each request would
// cost more than the rest of tracking.
type timeoutList struct {
	length      time.Duration
	first, last *pendingRequest // not nil while the list is in Tracker.timeouts
	timer       *time.Timer     // fires at the deadline of first, or of a removed one before it; takeDue resets it
}

// timeoutError is the error in the response of a request that has timed out.
type timeoutError struct{}

func (timeoutError) Error() string        { return "response timeout" }
func (timeoutError) Timeout() bool        { return true }
func (timeoutError) Is(target error) bool { return target == os.ErrDeadlineExceeded }

// NewTracker creates a tracker. It touches nothing on disk before Start.
//
// The response socket is made at socketPath, as by [NewUnixListener]; empty means a
// random name in a directory that only the process's user can enter. The httpStreamURL is
// the URL at which others reach this service's [ProxyStreamHandler]; with nil, streams
// can't be proxied. The defaultTimeout applies to requests that are tracked without one;
// zero or less means a minute.
//
// A path or URL that is not UTF-8 gives an error that matches [io/fs.ErrInvalid]: JSON
// would change it, and responses would not arrive.
func NewTracker(socketPath string, httpStreamURL *url.URL, defaultTimeout time.Duration) (*Tracker, error) {
	responses := NewUnixListener(socketPath, 0)
	if !utf8.ValidString(responses.path) {
		return nil, fmt.Errorf("new tracker: socket path %q is not UTF-8: %w", responses.path, fs.ErrInvalid)
	}
	t := &Tracker{
		responses:       responses,
		defaultTimeout:  defaultTimeout,
		exchangeTimeout: exchangeTimeout,
		streamClaim:     streamClaim,
		streamStall:     streamStall,
		streamEnd:       streamEnd,
		hashMask:        ^uint64(0),
		pending:         make(map[uint64]*pendingRequest),
		timeouts:        make(map[time.Duration]*timeoutList),
		streams:         make(map[*unixStream]struct{}),
	}
	if err := checkURL(httpStreamURL); err != nil {
		return nil, fmt.Errorf("new tracker: stream URL: %w", err)
	}
	if httpStreamURL != nil {
		u := *withSlash(httpStreamURL)
		t.streamURL = &u
	}
	return t, nil
}

// Start opens the response socket and begins to accept requests to track, responses and
// streams. On a started tracker it does nothing. It blocks for milliseconds, 5 s at most
// (see [UnixListener.Start]).
//
// A call during Stop gives an error that matches [net.ErrClosed]. A tracker that was not
// made by [NewTracker] gives one that matches [io/fs.ErrInvalid]. The other errors are
// those of [UnixListener.Start]. After an error the tracker is as it was.
func (t *Tracker) Start() error {
	if t.responses == nil {
		return fmt.Errorf("start tracker: not made by NewTracker: %w", fs.ErrInvalid)
	}
	t.starting.Lock()
	defer t.starting.Unlock()
	t.mu.Lock()
	state := t.state
	t.mu.Unlock()
	switch state {
	case trackerRunning:
		return nil
	case trackerStopping:
		return fmt.Errorf("start tracker %s: the last Stop has not returned yet: %w", t.Addr(), net.ErrClosed)
	}
	if err := t.responses.Start(); err != nil {
		return fmt.Errorf("start tracker: %w", err)
	}
	t.idle.Store(maxIdle)
	for range maxIdle {
		t.serving.Go(t.serve)
	}
	t.mu.Lock()
	t.state = trackerRunning
	t.mu.Unlock()
	return nil
}

// Addr returns the path of the response socket: as it was given to [NewTracker], or as
// the library chose it.
func (t *Tracker) Addr() string {
	if t.responses == nil {
		return ""
	}
	return t.responses.Addr()
}

// URL returns the URL of the response socket: the response hook for requests that this
// tracker tracks. The caller owns the result.
func (t *Tracker) URL() *url.URL {
	if t.responses == nil {
		return &url.URL{Scheme: "unix"}
	}
	return t.responses.URL()
}

// NumRequests returns the number of tracked requests: those that were not yet answered,
// timed out or removed.
func (t *Tracker) NumRequests() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tracked
}

// TrackRequest tracks a request until its response arrives, its timeout passes, or
// [Tracker.RemoveRequest] removes it. Call it before you send the request: the response
// can arrive before the acknowledgement. A request that was given to [Tracker.ProxyUnix]
// needs no call. A timeout of zero or less means the tracker's default.
//
// The response goes to one of the request's handlers, once. After the timeout the handler
// gets a Response whose error has the text "response timeout" and matches
// [os.ErrDeadlineExceeded].
//
// The errors match:
//
//   - [io/fs.ErrInvalid]: the request is nil or has no id, or its id, task or hook is one
//     that [Request.Validate] refuses (task and hook may be missing)
//   - [io/fs.ErrExist]: the id is tracked already
//   - [net.ErrClosed]: the tracker is not started, or it is stopping
func (t *Tracker) TrackRequest(req *Request, timeout time.Duration) error {
	_, err := t.track(req, timeout, (*pendingRequest).runHandler)
	return err
}

// track adds a request to the table. The function handle completes it.
func (t *Tracker) track(req *Request, timeout time.Duration, handle func(*pendingRequest, *Response)) (*pendingRequest, error) {
	if req == nil {
		return nil, fmt.Errorf("track request: request is nil: %w", fs.ErrInvalid)
	}
	if req.ID == "" {
		return nil, fmt.Errorf("track request: request has no id: %w", fs.ErrInvalid)
	}
	if err := req.checkText(); err != nil {
		return nil, fmt.Errorf("track request: %w", err)
	}
	if timeout <= 0 {
		timeout = t.defaultTimeout
	}
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != trackerRunning {
		return nil, fmt.Errorf("track request %s: tracker is not started, or is stopping: %w", req.ID, net.ErrClosed)
	}
	hash := t.hash(req.ID)
	same := t.pending[hash]
	if find(same, req.ID) != nil {
		return nil, fmt.Errorf("track request %s: already tracked: %w", req.ID, fs.ErrExist)
	}
	p := &pendingRequest{id: req.ID, req: req, handle: handle, deadline: time.Now().Add(timeout), same: same}
	t.pending[hash] = p
	t.tracked++
	t.setTimeoutLocked(p, timeout)
	return p, nil
}

// find returns the entry with the id, from a list of entries with the same hash.
func find(p *pendingRequest, id string) *pendingRequest {
	for p != nil && p.id != id {
		p = p.same
	}
	return p
}

// unlink removes an entry from a list of entries with the same hash, and returns the
// list.
func unlink(first, p *pendingRequest) *pendingRequest {
	if first == p {
		return p.same
	}
	before := first
	for before.same != p {
		before = before.same
	}
	before.same = p.same
	return first
}

// RemoveRequest stops tracking a request, for example because sending it failed. It
// reports whether the request was still tracked. If so, no handler runs and nothing is
// forwarded. If not, a response or time-out came first, and its handler has run, is
// running or is about to.
func (t *Tracker) RemoveRequest(req *Request) bool {
	if req == nil {
		return false
	}
	t.mu.Lock()
	p := find(t.pending[t.hash(req.ID)], req.ID)
	if p != nil {
		t.removeLocked(p)
	}
	t.mu.Unlock()
	return p != nil
}

// remove removes an entry if it is still in the table. It reports false if the request
// was taken from the table to be completed.
func (t *Tracker) remove(p *pendingRequest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if find(t.pending[t.hash(p.id)], p.id) == p {
		t.removeLocked(p)
	}
	return !p.taken
}

// HandleResponse completes the tracked request with the response's id: it runs the
// request's handler, or forwards the response if the request was proxied, and returns
// when that is done. If no such request is tracked (any more), or the response is nil, it
// logs that and drops the response.
//
// The tracker itself calls it for each response on its socket, in a goroutine of its own.
// Call it for responses that arrive otherwise, for example on an HTTP hook of the
// service.
func (t *Tracker) HandleResponse(resp *Response) {
	if resp == nil {
		t.unknown.log(logrus.WarnLevel, "dropped a response that is nil", nil, "", t.Addr())
		return
	}
	p := t.take(resp.ID)
	if p == nil {
		t.unknown.log(logrus.WarnLevel, "dropped a response to a request that is not tracked", nil, resp.ID, t.Addr())
		return
	}
	t.complete(p, resp)
}

// Stop refuses new requests and streams and blocks until everything that is under way has
// ended:
//
//   - Each tracked request ends with its response, its time-out or its removal. Then its
//     handler or forward returns.
//   - The response socket closes. Exchanges that are then under way on it are closed
//     without an acknowledgement.
//   - Streams without a consumer end. Streams in transfer continue while they move, and
//     are cut off after 10 s without a byte.
//
// It may be called more than once, before Start, and from several goroutines: each call
// returns when the tracker is stopped. A handler must not call it: it would wait for
// itself.
func (t *Tracker) Stop() {
	t.mu.Lock()
	switch t.state {
	case trackerStopped:
		t.mu.Unlock()
		return
	case trackerStopping:
		stopped := t.stopped
		t.mu.Unlock()
		<-stopped
		return
	}
	t.state = trackerStopping
	t.drained, t.stopped = make(chan struct{}), make(chan struct{})
	t.checkDrainedLocked()
	t.mu.Unlock()

	<-t.drained
	t.handlers.Wait()
	t.responses.Stop(atOnce)
	t.serving.Wait()
	t.endStreams()

	t.mu.Lock()
	t.state = trackerStopped
	close(t.stopped) // under mu: a later Stop makes a new channel
	t.mu.Unlock()
}

// serve handles connections of the response socket until the socket is closed. A
// connection delays no other one: when no goroutine is left that waits for the next
// connection, serve starts one.
func (t *Tracker) serve() {
	for conn := t.responses.NextConn(); conn != nil; conn = t.responses.NextConn() {
		if t.idle.Add(-1) == 0 {
			t.idle.Add(1)
			t.serving.Go(t.serve)
		}
		t.receive(conn)
		if !t.waitsAgain() {
			return
		}
	}
}

// waitsAgain counts the goroutine as idle again. It reports false if enough goroutines
// are idle already.
func (t *Tracker) waitsAgain() bool {
	for {
		n := t.idle.Load()
		if n >= maxIdle {
			return false
		}
		if t.idle.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// receive reads a response from the connection, acknowledges it, closes the connection,
// and then handles the response. A broken frame gets no acknowledgement, which tells its
// sender.
func (t *Tracker) receive(conn net.Conn) {
	defer t.responses.DoneConn(conn)
	if err := conn.SetDeadline(time.Now().Add(t.exchangeTimeout)); err != nil {
		return
	}
	resp := &Response{}
	if err := UnmarshalConnData(conn, resp); err != nil {
		return
	}
	// If the acknowledgement fails, the response has arrived all the same.
	_ = SendConnData(conn, accepted)
	t.responses.DoneConn(conn)
	t.HandleResponse(resp)
}

// take removes the request with the id from the table. The caller has to complete it; no
// other goroutine will.
func (t *Tracker) take(id string) *pendingRequest {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := find(t.pending[t.hash(id)], id)
	if p != nil {
		t.takeLocked(p)
	}
	return p
}

// takeLocked removes an entry that the caller will complete. The caller holds mu.
func (t *Tracker) takeLocked(p *pendingRequest) {
	p.taken = true
	t.handlers.Add(1) // before Stop can learn that the table is empty
	t.removeLocked(p)
}

// removeLocked removes an entry from the table. The caller holds mu.
func (t *Tracker) removeLocked(p *pendingRequest) {
	hash := t.hash(p.id)
	if left := unlink(t.pending[hash], p); left != nil {
		t.pending[hash] = left
	} else {
		delete(t.pending, hash)
	}
	p.same = nil
	t.tracked--
	t.clearTimeoutLocked(p)
	t.checkDrainedLocked()
}

// checkDrainedLocked tells Stop when no request is tracked any more. The caller holds mu.
func (t *Tracker) checkDrainedLocked() {
	if t.state == trackerStopping && t.tracked == 0 {
		close(t.drained)
	}
}

// setTimeoutLocked adds an entry to the list of its time-out. The caller has held mu
// since it set the entry's deadline, so the list stays in the order of deadlines.
func (t *Tracker) setTimeoutLocked(p *pendingRequest, length time.Duration) {
	o := t.timeouts[length]
	if o == nil {
		o = &timeoutList{length: length, first: p}
		o.timer = time.AfterFunc(length, func() { t.timeOut(o) })
		t.timeouts[length] = o
	} else {
		p.prev, o.last.next = o.last, p
	}
	o.last, p.timeout = p, o
}

// clearTimeoutLocked removes an entry from the list of its time-out. It stops the timer
// only with the last entry: a timer that fires too early is set again. The caller holds
// mu.
func (t *Tracker) clearTimeoutLocked(p *pendingRequest) {
	o := p.timeout
	if p.prev != nil {
		p.prev.next = p.next
	} else {
		o.first = p.next
	}
	if p.next != nil {
		p.next.prev = p.prev
	} else {
		o.last = p.prev
	}
	p.prev, p.next, p.timeout = nil, nil, nil // else a slow handler would keep them in memory
	if o.first == nil {
		o.timer.Stop()
		delete(t.timeouts, o.length)
	}
}

// timeOut completes the requests whose deadline has passed, each in a goroutine of its
// own, so that a slow handler does not delay the others.
func (t *Tracker) timeOut(o *timeoutList) {
	for p := t.takeDue(o); p != nil; p = t.takeDue(o) {
		go t.complete(p, &Response{ID: p.id, Error: timeoutError{}}) // Stop waits for handlers
	}
}

// takeDue takes the first request of a list if its deadline has passed. If not, it resets
// the timer.
func (t *Tracker) takeDue(o *timeoutList) *pendingRequest {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := o.first
	if p == nil { // the last request was removed after the timer had fired
		return nil
	}
	if left := time.Until(p.deadline); left > 0 {
		o.timer.Reset(left)
		return nil
	}
	t.takeLocked(p)
	return p
}

// complete completes a request that was taken from the table.
func (t *Tracker) complete(p *pendingRequest, resp *Response) {
	defer t.handlers.Done()
	p.handle(p, resp)
}

// runHandler completes a request that is not proxied.
func (p *pendingRequest) runHandler(resp *Response) {
	p.req.HandleResponse(resp)
}
