package acomm

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
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxAnswer    = 1 << 20 // bytes read of an HTTP answer
	maxRedirects = 10
)

// postClient uses http.DefaultTransport, whatever it is at the time of a request.
var postClient = http.Client{Transport: &postTransport, CheckRedirect: redirectPost}

// redirectPost allows the redirects that repeat the payload. For others it returns the
// redirect itself, whose status is an error.
func redirectPost(req *http.Request, via []*http.Request) error {
	switch req.Response.StatusCode {
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		req.Header.Del("Referer") // a hook's URL may hold a secret
		if err := checkRedirects(via); err != nil {
			return err
		}
		connectionsOf(req.Context()).reset() // the host that redirects has not taken the payload
		return nil
	}
	return http.ErrUseLastResponse
}

// sendHTTP posts the payload and returns the acknowledgement in the answer.
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
		return nil, fmt.Errorf("read answer: %w", err)
	case len(body) > maxAnswer:
		return nil, fmt.Errorf("answer is over the limit of %d bytes: %w", maxAnswer, syscall.EMSGSIZE)
	case len(bytes.TrimSpace(body)) == 0:
		return ack, nil
	}
	if err := json.Unmarshal(body, ack); err != nil {
		return nil, fmt.Errorf("answered %s with a body that is not a Response: %w", answer.Status, err)
	}
	return ack, nil
}

// unsentError is the error of a post that got no connection: the peer certainly does not
// have the payload.
type unsentError struct{ error }

func (e unsentError) Unwrap() error { return e.error }

// connections records whether a post asked for a connection and got one. Both stay false
// if the transport does not support httptrace.
type connections struct{ asked, got atomic.Bool }

func (c *connections) reset() {
	c.asked.Store(false)
	c.got.Store(false)
}

type connectionsKey struct{}

// traceConnections returns a context that records the connections of a request.
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

// doHTTP sends the request through http.DefaultTransport. Its errors do not name the URL:
// the caller adds it.
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
		return nil, fmt.Errorf("http.DefaultTransport handles no scheme %q: %w", req.URL.Scheme, errors.ErrUnsupported)
	}
	return nil, err
}

// unsupported reports whether an error says that no transport handles the scheme. The
// standard library has no error value for that. So it asks a Transport without registered
// schemes, and compares the texts.
func unsupported(addr *url.URL, err error) bool {
	_, lack := new(http.Transport).RoundTrip(&http.Request{URL: addr, Header: http.Header{}})
	return lack != nil && err.Error() == lack.Error()
}

// requestURL returns the URL as net/http's client would have parsed it from its text. A
// URL from the wire may have user information that is empty; net/http would send it as a
// login without a name.
func requestURL(addr *url.URL) *url.URL {
	u := *withSlash(addr)
	if u.User != nil && u.User.String() == "" {
		u.User = nil
	}
	return &u
}

// withSlash returns the URL with a slash before its path, as its text has it. A URL with
// a host and a relative path comes from url.JoinPath on a base without a path.
func withSlash(u *url.URL) *url.URL {
	path := u.EscapedPath() // in %2Fa the slash is escaped and does not begin a path
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

// statusError is the error for an HTTP answer without success.
type statusError struct {
	code          int
	status        string // code and text
	refusal       string // the error of the Response in the body; empty: none
	hasRetryAfter bool   // the answer has a valid Retry-After
	retryAfter    time.Duration
}

func newStatusError(answer *http.Response, body []byte) *statusError {
	e := &statusError{code: answer.StatusCode, status: answer.Status}
	var resp Response
	if json.Unmarshal(body, &resp) == nil && resp.Error != nil {
		e.refusal = resp.Error.Error()
	}
	after := strings.TrimSpace(answer.Header.Get("Retry-After"))
	if seconds, err := strconv.ParseUint(after, 10, 31); err == nil {
		e.hasRetryAfter, e.retryAfter = true, time.Duration(seconds)*time.Second
	} else if at, err := http.ParseTime(after); err == nil {
		e.hasRetryAfter, e.retryAfter = true, max(0, time.Until(at))
	}
	return e
}

func (e *statusError) Error() string {
	if e.refusal == "" {
		return "answered " + e.status
	}
	return "answered " + e.status + ": " + e.refusal
}

// notDelivered reports whether an error of send proves that the peer has not taken the
// payload and may take it later: there was no connection, or the peer's answer says so. A
// 503 without Retry-After proves nothing: a gateway may have passed the payload on.
func notDelivered(err error) bool {
	var status *statusError
	if errors.As(err, &status) {
		return status.code == http.StatusTooManyRequests || status.code == http.StatusServiceUnavailable && status.hasRetryAfter
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
