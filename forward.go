package acomm

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"time"

	"github.com/sirupsen/logrus"
)

// The delay between two tries of a forward: it begins with the first and doubles up to
// the second.
const (
	minForwardDelay = 10 * time.Millisecond
	maxForwardDelay = time.Second
)

// ProxyUnix makes the tracker the response hook of a request, so that a provider can
// answer over a unix socket. It tracks the request and returns a new one with the same
// id, task and args, and with the tracker's socket as its hook. Send that one to the
// provider. A request whose hook is a unix socket already is returned as it is, and not
// tracked. The original request is not modified and its handlers do not run. A timeout of
// zero or less means the tracker's default.
//
// The tracker forwards the response, or the time-out, to the original hook. A stream in
// it is published with [Tracker.ProxyStreamHTTPURL]. If the tracker has no stream URL,
// the response is forwarded without its stream, and that is logged.
//
// A response is forwarded at most once. A failed forward is tried again, after 10 ms to 1
// s, only if the response certainly did not arrive:
//
//   - There was no connection: nobody listens, or DNS, the TLS handshake or a proxy
//     failed.
//   - The hook answered with the status 429, or with 503 and a Retry-After. A 503 without
//     one may come from a gateway that has passed the response on.
//
// A Retry-After delays the next try. The last try is made when the request would have
// timed out. A forward that fails for good is logged.
//
// The errors match:
//
//   - [io/fs.ErrInvalid]: [Request.Validate] refuses the request
//   - [io/fs.ErrExist]: the id is tracked already
//   - [net.ErrClosed]: the tracker is not started, or it is stopping
func (t *Tracker) ProxyUnix(req *Request, timeout time.Duration) (*Request, error) {
	if err := req.Validate(); err != nil {
		return nil, fmt.Errorf("proxy request: %w", err)
	}
	if req.ResponseHook.Scheme == "unix" {
		return req, nil
	}
	if _, err := t.track(req, timeout, t.forward); err != nil {
		return nil, err
	}
	return &Request{ID: req.ID, Task: req.Task, ResponseHook: t.URL(), Args: req.Args}, nil
}

// forward sends the response of a proxied request to the original hook. The tracker's
// Stop waits for it, as for a handler.
func (t *Tracker) forward(p *pendingRequest, resp *Response) {
	if err := t.tryForward(p, resp); err != nil {
		t.failures.log(logrus.ErrorLevel, "failed to forward a response", err, p.id, p.req.ResponseHook.Redacted())
	}
}

// tryForward sends the response. After an error that proves that it did not arrive, it
// sends it again, the last time at the deadline of the request.
func (t *Tracker) tryForward(p *pendingRequest, resp *Response) error {
	out := *resp // a copy: the caller of HandleResponse owns resp
	out.StreamURL = t.publish(resp)
	for delay := minForwardDelay; ; delay = min(2*delay, maxForwardDelay) {
		err := Send(p.req.ResponseHook, &out)
		left := time.Until(p.deadline)
		if err == nil || !notDelivered(err) || left <= 0 {
			return err
		}
		wait := delay
		var status *statusError
		if errors.As(err, &status) {
			wait = max(wait, status.retryAfter)
		}
		time.Sleep(min(wait, left))
	}
}

// publish returns the HTTP URL of the response's stream; nil if it has none, or none can
// be published.
func (t *Tracker) publish(resp *Response) *url.URL {
	if resp.StreamURL == nil {
		return nil
	}
	u, err := t.ProxyStreamHTTPURL(resp.StreamURL)
	if err != nil {
		t.failures.log(logrus.ErrorLevel, "forwarding a response without its stream", err, resp.ID, resp.StreamURL.Redacted())
		return nil
	}
	return u
}

// ProxyStreamHTTPURL publishes a stream: it returns a URL at which the
// [ProxyStreamHandler] of this process, and no other, serves it over HTTP. The URL is the
// tracker's HTTP stream URL with the address of the stream and a signature of this
// process as query parameters. Anyone with the URL can read the stream. The address is
// readable in it, so it must not hold a password.
//
// A unix address is resolved as by [Send], in this call and not when the stream is read.
//
// A nil address, a unix address with a host, and a tracker without an HTTP stream URL
// give an error that matches [io/fs.ErrInvalid].
func (t *Tracker) ProxyStreamHTTPURL(addr *url.URL) (*url.URL, error) {
	if addr == nil {
		return nil, fmt.Errorf("proxy stream: address is nil: %w", fs.ErrInvalid)
	}
	if t.streamURL == nil {
		return nil, fmt.Errorf("proxy stream %s: the tracker has no HTTP stream URL; pass one to NewTracker: %w", addr.Redacted(), fs.ErrInvalid)
	}
	located, err := locate(addr)
	if err != nil {
		return nil, fmt.Errorf("proxy stream: %w", err)
	}
	u := *t.streamURL
	query := u.Query()
	bare := *located
	bare.Fragment, bare.RawFragment = "", "" // HTTP does not send it
	text := bare.String()
	query.Set(streamAddrParam, text)
	query.Set(streamSignatureParam, signStream(text))
	u.RawQuery = query.Encode()
	return &u, nil
}
