package main

// This file repeats what the library has and does not export. The exported surface of
// package acomm is fixed: it is that of the original (surface_test.go). The commands need
// more: whether a message was taken, whether a response is late, whether a stream moves.
// Each piece follows a function, type or constant of the library. A change there is made
// here too; library_test.go holds the names and the constants to this table.
//
//	here                     follows                           in
//	maxPayload               maxPayload                        frame.go
//	maxAnswer                maxAnswer                         send_http.go
//	sendTimeout              sendTimeout                       send.go
//	exchangeTimeout          exchangeTimeout                   tracker.go
//	minForwardDelay          minForwardDelay                   forward.go
//	maxForwardDelay          maxForwardDelay                   forward.go
//	streamStall              streamStall                       stream.go
//	streamAddrParam          streamAddrParam                   stream_proxy.go
//	maxSubject               maxSubject                        natshook/natshook.go
//	isRefusal                send                              send.go
//	isNotConnected           notDelivered                      send_http.go
//	unsentError              unsentError                       send_http.go
//	answerError              statusError                       send_http.go
//	retryAfter               newStatusError                    send_http.go
//	hookTransport.RoundTrip  traceConnections, newStatusError  send_http.go
//	postWatcher.RoundTrip    traceConnections                  send_http.go
//	answerWatcher.RoundTrip  sendHTTP                          send_http.go
//	sendResponse             Tracker.tryForward                forward.go
//	responseTimeout          timeoutError                      tracker.go
//	outstanding.add          Tracker.track                     tracker.go
//	outstanding.remove       Tracker.removeLocked              tracker.go
//	outstanding.complete     Tracker.complete                  tracker.go
//	outstanding.respond      Tracker.HandleResponse            tracker.go
//	outstanding.stop         Tracker.Stop                      tracker.go
//	gateway.serveResponses   Tracker.serve                     tracker.go
//	gateway.receiveResponse  Tracker.receive                   tracker.go
//	movement.touch           unixStream.touch                  stream.go
//	movement.ends            unixStream.end                    stream.go
//	streamKey                parseStreamQuery                  stream_proxy.go
//	leaveStream              socketPath                        socket.go
//	isSocket                 isSocket                          socket.go
//	listenWithMode           bind                              socket.go
//	removeDeadSocket         removeDead                        socket.go
//	isSubject                checkSubject                      natshook/natshook.go
//
// acomm check is no part of this. It reads and writes frames itself (check_peer.go), as it
// holds a peer to PROTOCOL.md, not to the library.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mistifyio/acomm"
)

const (
	maxPayload      = 64 << 20         // bytes of JSON that a message can carry
	maxAnswer       = 1 << 20          // bytes that are read of an HTTP answer
	sendTimeout     = time.Minute      // for sending a message
	exchangeTimeout = time.Minute      // for receiving a response
	streamStall     = 10 * time.Second // for a stream to move while the process is ending
	streamAddrParam = "addr"           // in the URL of a stream that is published
	maxSubject      = 1024             // bytes of a subject of NATS

	// A response that did not arrive is sent again after a delay from the first of
	// these to the second, doubling.
	minForwardDelay = 10 * time.Millisecond
	maxForwardDelay = time.Second

	leaveTimeout = time.Second // for connecting to a stream that is to be ended
)

// isRefusal reports whether an error of Send is the peer's own: those are returned
// as they came, all others are wrapped.
func isRefusal(err error) bool { return errors.Unwrap(err) == nil }

// isNotConnected reports whether an error of Send proves that there was nobody to
// connect to.
func isNotConnected(err error) bool {
	if errors.Is(err, errHookDenied) {
		return false // for good
	}
	if unsent := (unsentError{}); errors.As(err, &unsent) {
		return true
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	dns := (*net.DNSError)(nil)
	return errors.As(err, &dns) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) ||
		errors.Is(err, syscall.ENAMETOOLONG)
}

// unsentError is the error of a POST for which there was no connection.
type unsentError struct{ error }

func (e unsentError) Unwrap() error { return e.error }

// answerError is the answer of a hook that has not taken a response.
type answerError struct {
	status string
	words  string        // the hook's own, empty if it sent none
	later  bool          // it may take it later
	after  time.Duration // then; zero if it did not say
}

func (e *answerError) Error() string {
	if e.words == "" {
		return "answered " + e.status
	}
	return "answered " + e.status + ": " + e.words
}

// retryAfter reads a Retry-After. It reports false if there is none.
func retryAfter(header string) (time.Duration, bool) {
	header = strings.TrimSpace(header)
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, true
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, time.Until(at)), true
	}
	return 0, false
}

// hookTransport bounds a POST, and tells of it what the library tells nobody but its
// own forwarding: that there was no connection, and which answers prove that the hook
// has not taken it.
type hookTransport struct {
	http.RoundTripper
	timeout time.Duration // to the end of the answer
}

func (t hookTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPost {
		return t.RoundTripper.RoundTrip(r)
	}
	var asked, got atomic.Bool // a transport that does not tell, such as that of NATS, leaves both false
	trace := &httptrace.ClientTrace{
		GetConn: func(string) { asked.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { got.Store(true) },
	}
	ctx, cancel := context.WithTimeout(r.Context(), t.timeout)
	answer, err := t.RoundTripper.RoundTrip(r.WithContext(httptrace.WithClientTrace(ctx, trace)))
	if err != nil {
		cancel()
		if asked.Load() && !got.Load() {
			return nil, unsentError{err}
		}
		return nil, err
	}
	after, ok := retryAfter(answer.Header.Get("Retry-After"))
	later := answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode == http.StatusServiceUnavailable && ok
	answer.Body = cancelBody{answer.Body, cancel}
	if !later && !isRefusedWith(answer.StatusCode) {
		return answer, nil
	}
	body, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10)) // to its end, so that the connection can be kept
	_ = answer.Body.Close()
	refused := &answerError{status: answer.Status, later: later, after: after}
	if resp := (acomm.Response{}); json.Unmarshal(body, &resp) == nil && resp.Error != nil {
		refused.words = resp.Error.Error()
	}
	return nil, refused
}

// cancelBody ends the time of an answer when it is closed.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// postWatcher is a transport that knows how far the last POST through it has come.
type postWatcher struct {
	http.RoundTripper
	connected atomic.Bool  // there was a connection for it
	status    atomic.Int32 // of its answer; 0: none
	comeBack  atomic.Bool  // the answer had a Retry-After
}

func (p *postWatcher) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPost { // a stream
		return p.RoundTripper.RoundTrip(r)
	}
	p.connected.Store(r.URL.Scheme == "nats") // it does not tell
	p.status.Store(0)
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { p.connected.Store(true) }}
	answer, err := p.RoundTripper.RoundTrip(r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
	if err == nil {
		p.status.Store(int32(answer.StatusCode))
		_, comeBack := retryAfter(answer.Header.Get("Retry-After"))
		p.comeBack.Store(comeBack)
	}
	return answer, err
}

// answerWatcher is a transport that looks whether the last answer to a POST is a
// response, whatever its status. One to a client that may not ask is none to the message.
type answerWatcher struct {
	http.RoundTripper
	response atomic.Bool
}

func (w *answerWatcher) RoundTrip(r *http.Request) (*http.Response, error) {
	w.response.Store(false)
	answer, err := w.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	_ = answer.Body.Close()
	if err != nil {
		return nil, err
	}
	answer.Body = io.NopCloser(bytes.NewReader(body))
	var members struct {
		Error *string `json:"error"`
	}
	mayAsk := answer.StatusCode != http.StatusUnauthorized && answer.StatusCode != http.StatusForbidden
	w.response.Store(mayAsk && json.Unmarshal(body, &members) == nil && members.Error != nil)
	return answer, nil
}

// isResponse reports whether the last answer was one. It may be called on nil.
func (w *answerWatcher) isResponse() bool { return w != nil && w.response.Load() }

// sendResponse sends the response, and again where it certainly did not arrive, the
// last time at the deadline. It is what a proxying Tracker does, which does not
// tell how it went.
func sendResponse(hook *url.URL, resp *acomm.Response, deadline time.Time) error {
	for delay := minForwardDelay; ; delay = min(2*delay, maxForwardDelay) {
		err := acomm.Send(hook, resp)
		answered := (*answerError)(nil)
		later := errors.As(err, &answered) && answered.later
		left := time.Until(deadline)
		if err == nil || left <= 0 || !later && !isNotConnected(err) {
			return err
		}
		wait := delay
		if later {
			wait = max(wait, answered.after)
		}
		time.Sleep(min(wait, left))
	}
}

// responseTimeout is the error of a request without a response in time. Its text is
// the library's.
type responseTimeout struct{}

func (responseTimeout) Error() string { return "response timeout" }
func (responseTimeout) Unwrap() error { return os.ErrDeadlineExceeded }

// isResponseTimeout reports whether the error of a response is the time-out of who
// forwards it. The protocol has nothing but this text for it.
func isResponseTimeout(err error) bool { return err.Error() == responseTimeout{}.Error() }

// outstanding holds the requests that wait for their response. A Tracker does not
// tell which responses come too late, and what becomes of their streams.
type outstanding struct {
	mu        sync.Mutex // guards the fields below
	byID      map[string]*waiting
	ending    bool
	finishing sync.WaitGroup // those in the map, and those whose finish runs
}

// waiting is a request in the map. Whoever removes it there completes it.
type waiting struct {
	id     string
	taken  func(*acomm.Response) // nil: nothing; called under the lock, before another copy of the response is looked at
	finish func(*acomm.Response)
	timer  *time.Timer
}

// add has the response to the id, or the time-out, finished, unless it is removed
// before that.
func (o *outstanding) add(id string, timeout time.Duration, taken, finish func(*acomm.Response)) (*waiting, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ending {
		return nil, net.ErrClosed
	}
	if o.byID[id] != nil {
		return nil, fmt.Errorf("the id %.256q: %w", id, fs.ErrExist)
	}
	w := &waiting{id: id, taken: taken, finish: finish}
	w.timer = time.AfterFunc(timeout, func() {
		if o.remove(w) {
			o.complete(w, &acomm.Response{ID: id, Error: responseTimeout{}})
		}
	})
	if o.byID == nil {
		o.byID = make(map[string]*waiting)
	}
	o.byID[id] = w
	o.finishing.Add(1)
	return w, nil
}

// remove reports whether the request was still waiting. The caller then completes
// or drops it.
func (o *outstanding) remove(w *waiting) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID[w.id] != w {
		return false
	}
	o.removeLocked(w)
	return true
}

func (o *outstanding) removeLocked(w *waiting) {
	delete(o.byID, w.id)
	w.timer.Stop()
}

// complete finishes a request that was removed.
func (o *outstanding) complete(w *waiting, resp *acomm.Response) {
	defer o.finishing.Done()
	w.finish(resp)
}

// drop forgets a request that was removed.
func (o *outstanding) drop() { o.finishing.Done() }

// respond finishes the request with the response. It reports false if none waits
// for that.
func (o *outstanding) respond(resp *acomm.Response) bool {
	o.mu.Lock()
	w := o.byID[resp.ID]
	if w != nil {
		o.removeLocked(w)
		if w.taken != nil {
			w.taken(resp)
		}
	}
	o.mu.Unlock()
	if w == nil {
		return false
	}
	o.complete(w, resp)
	return true
}

// stop takes no more requests and waits until all are finished.
func (o *outstanding) stop() {
	o.mu.Lock()
	o.ending = true
	o.mu.Unlock()
	o.finishing.Wait()
}

// serveResponses takes the responses of providers until the listener is stopped.
func (g *gateway) serveResponses(listener *acomm.UnixListener) {
	var exchanges sync.WaitGroup
	defer exchanges.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		exchanges.Go(func() { g.receiveResponse(listener, conn) })
	}
}

// receiveResponse acknowledges a response, and only then handles it.
func (g *gateway) receiveResponse(listener *acomm.UnixListener, conn net.Conn) {
	defer listener.DoneConn(conn)
	if err := conn.SetDeadline(time.Now().Add(exchangeTimeout)); err != nil {
		return
	}
	resp := &acomm.Response{}
	if err := acomm.UnmarshalConnData(conn, resp); err != nil {
		return // closing tells its sender
	}
	// It is here, whether or not its sender stays to be told so.
	_ = acomm.SendConnData(conn, &acomm.Response{})
	listener.DoneConn(conn)
	g.handleResponse(resp)
}

// movement knows when a stream last moved.
type movement struct {
	born time.Time
	last atomic.Int64 // nanoseconds from born
}

func newMovement() *movement { return &movement{born: time.Now()} }

func (m *movement) touch() { m.last.Store(int64(time.Since(m.born))) }

// ends waits until the stream is done, and reports true, or until it has stood
// still for streamStall or is cut, and reports false.
func (m *movement) ends(done, cut <-chan struct{}) bool {
	for {
		idle := time.Since(m.born) - time.Duration(m.last.Load())
		if idle >= streamStall {
			return false
		}
		timer := time.NewTimer(streamStall - idle)
		select {
		case <-done:
			timer.Stop()
			return true
		case <-cut:
			timer.Stop()
			return false
		case <-timer.C:
		}
	}
}

// streamKey names the stream that is published at the URL.
func streamKey(published *url.URL) string { return published.Query().Get(streamAddrParam) }

// leaveStream ends a stream on a unix socket, as a consumer that leaves at once,
// also while its source is silent. What was wrong with it is its provider's concern.
func leaveStream(addr *url.URL) {
	if addr == nil || addr.Scheme != "unix" {
		return
	}
	for _, path := range []string{addr.Path, addr.RequestURI()} { // as the library looks for it
		if conn, err := net.DialTimeout("unix", path, leaveTimeout); err == nil {
			_ = conn.Close()
			return
		}
	}
}

// isSocket reports whether a file is a socket, or a link to one.
func isSocket(path string, mode fs.FileMode) bool {
	if mode&fs.ModeSymlink != 0 {
		target, err := os.Stat(path)
		if err != nil {
			return false // a provider that does not run
		}
		mode = target.Mode()
	}
	return mode&fs.ModeSocket != 0
}

// listenWithMode listens on a unix socket whose file has the mode. That of a process that
// has ended is replaced.
func listenWithMode(path string, mode fs.FileMode) (net.Listener, error) {
	if err := removeDeadSocket(path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// On Linux the file has the mode from the start; elsewhere there is the chmod.
		return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), uint32(mode)) })
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask took away
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// removeDeadSocket removes a socket whose process has ended. Anything else stays.
func removeDeadSocket(path string) error {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return nil // the system says what is wrong, if anything is
	}
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return fmt.Errorf("listen on %s: another process listens there already", path)
	}
	return os.Remove(path)
}

// isSubject reports whether natshook sends messages to the subject.
func isSubject(subject string) bool {
	bad := func(r rune) bool { return r == '*' || r == '>' || unicode.IsSpace(r) || unicode.IsControl(r) }
	if len(subject) > maxSubject || !utf8.ValidString(subject) || strings.ContainsFunc(subject, bad) {
		return false
	}
	if first, _, _ := strings.Cut(subject, "."); first == "_INBOX" || strings.HasPrefix(first, "$") {
		return false // the servers' own
	}
	for token := range strings.SplitSeq(subject, ".") {
		if token == "" {
			return false
		}
	}
	return true
}
