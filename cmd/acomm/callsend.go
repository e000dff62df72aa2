package main

import (
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"syscall"
)

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

// mayHaveArrived reports whether an error of Send leaves open that the request has
// been taken: it is no refusal, and somebody was there.
func (c *call) mayHaveArrived(err error) bool {
	if isRefusal(err) {
		return false
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "remote error" { // an alert of TLS
		return false // with TLS 1.3 a certificate is refused once the request was sent
	}
	if c.posts != nil {
		switch status := int(c.posts.status.Load()); {
		case isRefusedWith(status):
			return false
		case status >= 500 && (status != http.StatusServiceUnavailable || !c.posts.comeBack.Load()):
			return true // a gateway's 502, or that of a proxy
		case status >= 300:
			return false
		case status != 0:
			return true // its answer is no acknowledgement
		case !c.posts.connected.Load():
			return false
		}
	}
	return !isNotConnected(err) && !errors.Is(err, syscall.EMSGSIZE) &&
		!errors.Is(err, fs.ErrInvalid) && !errors.Is(err, errors.ErrUnsupported)
}
