package acomm

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"time"

	"github.com/sirupsen/logrus"
)

// A forward that did not arrive is tried again after a delay from the first of
// these to the second, doubling.
const (
	minForwardDelay = 10 * time.Millisecond
	maxForwardDelay = time.Second
)

// ProxyUnix proxies requests that have response hooks of non-unix sockets
// through one that does. If the response hook is already a unix socket, it
// returns the original request. If not, it tracks the original request, for the
// timeout (zero or less means the tracker's default), and returns a new request
// with the tracker's socket as its response hook and the same id. The purpose of
// this is so that there can be a single entry and exit point for external
// communication, while local services can reply directly to each other. The
// original request is not modified, its handlers are not run.
//
// The response is forwarded to the original hook, and so is a time-out; a stream
// in it is published with [Tracker.ProxyStreamHTTPURL], or left out, and that
// logged, if the tracker has no stream URL. Forwarding is at most once: it is
// tried again, until the request would have timed out, only where the response
// certainly has not arrived: no connection was got (nobody listens, DNS, TLS handshake,
// a proxy's refusal), or the hook answers with the status 429, or 503 with a
// Retry-After. A 503 without one may come from a gateway that has passed the response
// on. A Retry-After is heeded, but the last try comes when the request would have timed
// out. A forward that fails is logged. How long a hook should keep idle connections open
// is said at [Send].
//
// A request that is not valid gives an error that matches [io/fs.ErrInvalid], an
// id that is tracked already [io/fs.ErrExist], a tracker that is not started or
// is stopping [net.ErrClosed].
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

// forward sends the response of a proxied request to the request's hook.
func (t *Tracker) forward(p *pendingRequest, resp *Response) {
	if err := t.tryForward(p, resp); err != nil {
		t.failures.log(logrus.ErrorLevel, "failed to forward a response", err, p.id, p.req.ResponseHook.Redacted())
	}
}

// tryForward sends the response, and again where it certainly did not arrive, the
// last time when the request would have timed out.
func (t *Tracker) tryForward(p *pendingRequest, resp *Response) error {
	out := *resp // the response stays its sender's
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

// publish returns the URL under which those outside reach the response's stream.
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

// ProxyStreamHTTPURL generates the url for proxying streaming data from a unix
// socket: the tracker's HTTP stream URL, with the address and this process's
// signature of it as query parameters. Whoever has the URL can read the stream,
// through a [ProxyStreamHandler] of this process and no other. The address can
// be read from it, so it must not hold a password. A unix socket is looked for as by
// [Send], here and not when the stream is read.
//
// A nil address, a unix one with a host, and a tracker without an HTTP stream URL,
// give an error that matches [io/fs.ErrInvalid].
func (t *Tracker) ProxyStreamHTTPURL(addr *url.URL) (*url.URL, error) {
	if addr == nil {
		return nil, fmt.Errorf("proxy stream: address is nil: %w", fs.ErrInvalid)
	}
	if t.streamURL == nil {
		return nil, fmt.Errorf("proxy stream %s: the tracker has no HTTP stream URL: %w", addr.Redacted(), fs.ErrInvalid)
	}
	located, err := locate(addr)
	if err != nil {
		return nil, fmt.Errorf("proxy stream: %w", err)
	}
	u := *t.streamURL
	query := u.Query()
	bare := *located
	bare.Fragment, bare.RawFragment = "", "" // never sent over HTTP, no part of a socket's path
	text := bare.String()
	query.Set(streamAddrParam, text)
	query.Set(streamSignatureParam, signStream(text))
	u.RawQuery = query.Encode()
	return &u, nil
}
