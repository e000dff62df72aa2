package main

import (
	"errors"
	"io/fs"
	"net"
	"net/http"
	"syscall"
)

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
