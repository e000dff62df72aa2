package acomm

import (
	"bytes"
	"context"
	"encoding/binary"
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
	"sync/atomic"
	"syscall"
	"time"
)

const (
	sendTimeout  = time.Minute // bounds a Send: dial, write and acknowledgement together
	maxAnswer    = 1 << 20     // bytes read of an HTTP answer
	maxRedirects = 10
)

// Send attempts to send the payload, usually a [Request] or a [Response], to the
// specified URL and waits until the peer has acknowledged it, for a minute at
// most: dial, write and acknowledgement together. Acknowledged means received
// and well-formed, not done. An error means that the payload may not have
// arrived; where the acknowledgement itself was lost, it may have.
//
// Any number of goroutines may call it, also with the same URL and payload. Nobody
// may change the payload before it returns. It works in every process, also after
// the Stop of all trackers and listeners.
//
// A URL with the scheme unix is the socket at the URL's Path, or, where none is there,
// at the path as it was written: in "unix://" + path a question mark begins a query for
// the parser, and %41 is an A. On Linux, while a
// [Tracker] or [UnixListener] of this process is started, the connection to a
// socket whose process has this library too is kept, and shared by all goroutines:
// one for each path, 256 of them, each with up to 1,024 exchanges at a time of up
// to 64 KiB of JSON, together 2 MiB. What is over that goes on a connection of its
// own. Where that process keeps a connection to this one, and requests have come by it
// whose hook is the path, messages to the path take that one. A kept
// connection is closed after 5 to 10 s without an exchange, and when the last
// tracker and listener have stopped. When it ends, a message that can't have been
// read is sent again, on a new connection and within the same minute; one that may
// have been is not. A socket file that was replaced or removed is noticed at each
// Send; while others are under way, within a millisecond.
//
// Everything else goes out as an HTTP POST with the JSON as its body, through
// [net/http.DefaultTransport] as it is at that moment, so its settings for TLS,
// proxies and further schemes (RegisterProtocol) apply. There a status of 2xx is
// delivered: with an empty body, or with a Response that accepts or refuses it.
// Any other answer is an error. Redirects are followed where they keep the
// payload (307 and 308), without a Referer. At most 1 MiB of the answer is read. Up to
// 100 posts go to a host at a time, more if MaxIdleConnsPerHost of that transport is
// more; others wait for their turn, within their minute. A redirect counts for the first
// host. If MaxIdleConnsPerHost is not set, up to 100 idle connections to a host are kept
// for posts. They are closed after the transport's IdleConnTimeout, or 90 s if it has
// none; its CloseIdleConnections does not close them. A hook should keep idle
// connections open for longer than that: a post that meets one as it is closed may be
// lost.
//
// The peer's refusal is returned with its text unchanged. The other errors match
// [io/fs.ErrInvalid] (nil URL or payload, no host in an HTTP URL or one in a unix URL, a
// path that is no socket path, an id, task, hook or stream URL that is not UTF-8, a
// unix hook without an absolute path, JSON nested more than 10,000 levels deep),
// [syscall.EMSGSIZE] (over 64 MiB of JSON), [errors.ErrUnsupported] (a scheme
// nobody handles), [io/fs.ErrNotExist] (no such socket), [syscall.ECONNREFUSED]
// (nobody listens), [syscall.ENAMETOOLONG] (the socket's path),
// [io.ErrUnexpectedEOF] (the peer closed without acknowledging) and
// [os.ErrDeadlineExceeded] (the minute has passed).
func Send(addr *url.URL, payload interface{}) error {
	return send(time.Now().Add(sendTimeout), addr, payload)
}

// send is Send with a deadline.
func send(deadline time.Time, addr *url.URL, payload interface{}) error {
	if addr == nil {
		return fmt.Errorf("send: URL is nil: %w", fs.ErrInvalid)
	}
	if err := checkUnixURL(addr); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	const room = keptHeaderSize - headerSize
	m, err := encodeFrame(room, payload)
	if err != nil {
		return fmt.Errorf("send to %s: %w", addr.Redacted(), err)
	}
	var ack *Response
	if addr.Scheme == "unix" {
		ack, err = sendUnix(deadline, socketPath(addr), m)
	} else {
		ack, err = sendHTTP(deadline, addr, m.text[keptHeaderSize:])
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", addr.Redacted(), timedOut(closedEarly(err)))
	}
	return ack.Error
}

// sendUnix carries out one exchange with the listener at the path, on the
// connection that is kept to it or else on one of its own, and returns the
// acknowledgement. In front of the frame there is room for the longer header of a
// kept connection.
func sendUnix(deadline time.Time, path string, m *message) (*Response, error) {
	if len(m.text) <= keptHeaderSize+keptLimit {
		if c := kept.to(path); c != nil {
			ack, err := c.exchange(deadline, m)
			if err != errUnsent {
				return ack, err
			}
			m = &message{text: bytes.Clone(m.text)} // the other one may yet be looked at
		}
	}
	defer m.release()
	const room = keptHeaderSize - headerSize
	binary.BigEndian.PutUint32(m.text[room:], uint32(len(m.text)-keptHeaderSize))
	return sendAlone(deadline, path, m.text[room:])
}

// sendAlone carries out one exchange on a new connection, which is closed after
// it, or kept if the listener offers that.
func sendAlone(deadline time.Time, path string, frame []byte) (*Response, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	var file fileID
	var statErr error
	keep := kept.wants(path)
	if keep {
		file, statErr = statFile(path)
	}
	var dialer net.Dialer
	if keep {
		dialer.Control = nameKeeper
	}
	conn, err := dialUnix(ctx, &dialer, path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if conn != nil {
			_ = conn.Close()
		}
	}()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	// A peer may refuse a frame before it has read all of it. Its word says more
	// than our broken pipe, so it is looked for even if the write failed.
	_, writeErr := conn.Write(frame) // all of it: a peer of 2016 reads it with one read
	data, err := readFrame(conn)
	ack := &Response{}
	if err == nil {
		err = decodeFrame(data, ack)
	}
	if writeErr != nil && (err != nil || ack.Error == nil) {
		return nil, writeErr
	}
	if err != nil {
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	if keep && statErr == nil && writeErr == nil && offersToKeep(data) {
		if now, err := statFile(path); err == nil && now == file && kept.keep(path, file, conn) {
			conn = nil
		}
	}
	return ack, nil
}

// accepted is the acknowledgement that nearly all are.
var accepted = &Response{}

// parseAck returns the acknowledgement in what a listener has written.
func parseAck(answer []byte) (*Response, error) {
	data, err := parseFrame(answer)
	ack := &Response{}
	if err == nil {
		err = decodeFrame(data, ack)
	}
	if err != nil {
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	return ack, nil
}

// dialUnix connects to a stream socket. Where its backlog is full it tries again
// until the context ends.
func dialUnix(ctx context.Context, dialer *net.Dialer, path string) (*net.UnixConn, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("backlog is full: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// postClient uses http.DefaultTransport, whatever it is at the time of a request.
var postClient = http.Client{Transport: &postTransport, CheckRedirect: keepPayload}

// keepPayload follows the redirects that send the payload again; of the others
// the answer itself is returned, which is no success.
func keepPayload(req *http.Request, via []*http.Request) error {
	switch req.Response.StatusCode {
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		req.Header.Del("Referer") // a hook's URL may hold a secret
		if err := checkRedirects(via); err != nil {
			return err
		}
		connectionsOf(req.Context()).reset() // who answered so did not keep the payload
		return nil
	}
	return http.ErrUseLastResponse
}

// sendHTTP posts the payload and returns what the answer acknowledges.
func sendHTTP(deadline time.Time, addr *url.URL, payload []byte) (*Response, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	leave, err := posts.enter(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, connections := traceConnections(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "", bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	req.URL = requestURL(addr)
	req.Header.Set("Content-Type", "application/json")
	answer, err := doHTTP(req, &postClient)
	if err != nil {
		if connections.asked.Load() && !connections.got.Load() {
			err = unsentError{err}
		}
		return nil, err
	}
	defer answer.Body.Close()
	var body []byte
	if answer.Body != http.NoBody {
		body, err = io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	}
	ack := &Response{}
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return nil, newStatusError(answer, body)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("answer: %w", err)
	case len(body) > maxAnswer:
		return nil, fmt.Errorf("answer is over the limit of %d bytes: %w", maxAnswer, syscall.EMSGSIZE)
	case len(bytes.TrimSpace(body)) == 0:
		return ack, nil
	}
	if err := json.Unmarshal(body, ack); err != nil {
		return nil, fmt.Errorf("answer %s: %w", answer.Status, err)
	}
	return ack, nil
}

// unsentError is the error of a post for which there was no connection: nobody has the
// payload.
type unsentError struct{ error }

func (e unsentError) Unwrap() error { return e.error }

// connections is what is known of the connections for a post. A transport that does
// not say leaves both false.
type connections struct{ asked, got atomic.Bool }

func (c *connections) reset() {
	c.asked.Store(false)
	c.got.Store(false)
}

type connectionsKey struct{}

// traceConnections returns a context in which it is noted whether a request has a
// connection.
func traceConnections(ctx context.Context) (context.Context, *connections) {
	c := &connections{}
	trace := &httptrace.ClientTrace{
		GetConn: func(string) { c.asked.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { c.got.Store(true) },
	}
	return httptrace.WithClientTrace(context.WithValue(ctx, connectionsKey{}, c), trace), c
}

func connectionsOf(ctx context.Context) *connections {
	return ctx.Value(connectionsKey{}).(*connections)
}

// doHTTP sends the request through http.DefaultTransport. Its errors say nothing
// of the URL: the caller does.
func doHTTP(req *http.Request, client *http.Client) (*http.Response, error) {
	if isHTTP(req.URL) && req.URL.Host == "" {
		return nil, fmt.Errorf("URL has no host: %w", fs.ErrInvalid)
	}
	answer, err := client.Do(req)
	if err == nil {
		return answer, nil
	}
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	if !isHTTP(req.URL) && unsupported(req.URL, err) {
		return nil, fmt.Errorf("scheme %q: %w", req.URL.Scheme, errors.ErrUnsupported)
	}
	return nil, err
}

// unsupported tells the lack of a transport for a scheme from an error of that
// transport. The standard library has no error value for it, so a transport with
// nothing registered is asked what it says of the scheme.
func unsupported(addr *url.URL, err error) bool {
	_, lack := new(http.Transport).RoundTrip(&http.Request{URL: addr, Header: http.Header{}})
	return lack != nil && err.Error() == lack.Error()
}

// requestURL returns the URL as net/http's client would have parsed it from its text.
// The user information that a URL has after it has come over the wire is empty, and
// would be sent as a login without a name.
func requestURL(addr *url.URL) *url.URL {
	u := *withSlash(addr)
	if u.User != nil && u.User.String() == "" {
		u.User = nil
	}
	return &u
}

// withSlash returns a URL with a host and a relative path, as url.JoinPath makes it of
// a base without a path, with the slash that its text has between the two.
func withSlash(u *url.URL) *url.URL {
	path := u.EscapedPath() // its slash counts: that of %2Fa is another one
	if u.Host == "" || path == "" || path[0] == '/' {
		return u
	}
	rooted := *u
	rooted.Path = "/" + u.Path
	if u.RawPath != "" {
		rooted.RawPath = "/" + u.RawPath
	}
	return &rooted
}

// statusError is an HTTP answer that is no success.
type statusError struct {
	code       int
	status     string        // code and text
	words      string        // the peer's error, if it sent a Response
	comeBack   bool          // the peer said when, with Retry-After
	retryAfter time.Duration // then
}

func newStatusError(answer *http.Response, body []byte) *statusError {
	e := &statusError{code: answer.StatusCode, status: answer.Status}
	var resp Response
	if json.Unmarshal(body, &resp) == nil && resp.Error != nil {
		e.words = resp.Error.Error()
	}
	after := strings.TrimSpace(answer.Header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(after, 10, 31); err == nil {
		e.comeBack, e.retryAfter = true, time.Duration(seconds)*time.Second
	} else if at, err := http.ParseTime(after); err == nil {
		e.comeBack, e.retryAfter = true, max(0, time.Until(at))
	}
	return e
}

func (e *statusError) Error() string {
	if e.words == "" {
		return "answered " + e.status
	}
	return "answered " + e.status + ": " + e.words
}

// timedOut gives everything that took too long one name.
func timedOut(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
	}
	return err
}

// notDelivered reports whether an error of send proves that the peer has not
// taken the payload and might take it later: no connection was got for it, or the
// peer itself said to come back. A 503 that does not say when may come from a gateway
// that has passed the payload on.
func notDelivered(err error) bool {
	var status *statusError
	if errors.As(err, &status) {
		return status.code == http.StatusTooManyRequests || status.code == http.StatusServiceUnavailable && status.comeBack
	}
	var unsent unsentError
	if errors.As(err, &unsent) {
		return true
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	var dns *net.DNSError
	return errors.As(err, &dns) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}
