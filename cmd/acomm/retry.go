package main

import (
	"errors"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
)

// What a shortage has prevented is tried again after a delay from the first of these
// to the second, doubling, until retryTime has passed: nobody waits for a response
// any longer, unless --timeout of call or gateway is more than its default.
const (
	minRetryDelay = 10 * time.Millisecond
	maxRetryDelay = 250 * time.Millisecond
	retryTime     = time.Minute
)

// retry does something, again while its error passes by itself. It logs the first
// such error, and stops trying when the programs are killed.
func (s *service) retry(what string, req *acomm.Request, passes func(error) bool, do func() error) error {
	deadline := time.Now().Add(retryTime)
	for delay := minRetryDelay; ; delay = min(2*delay, maxRetryDelay) {
		err := do()
		if err == nil || !passes(err) || time.Now().After(deadline) {
			return err
		}
		if delay == minRetryDelay {
			logOf(req).Warnf("%s: %s; trying again for %v", what, printable(withoutURL(err).Error()), retryTime)
		}
		select {
		case <-s.programs.killed:
			return err
		case <-time.After(delay):
		}
	}
}

// What descriptors are needed for: requests that hold some and wait for more must not
// be the only ones left.
const (
	ownDescriptors    = 16 // of the service itself
	resultDescriptors = 4  // of a program: two pipes, the process, the connection to the hook
	streamDescriptors = 6  // also the stream's socket, and its reader
)

// requestsWithDescriptors is for how many requests at a time there are descriptors.
func (s *service) requestsWithDescriptors() int {
	each := uint64(resultDescriptors)
	if s.stream {
		each = streamDescriptors
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1
	}
	const most = 1 << 20 // where there is no limit
	return int(max(1, (min(uint64(limit.Cur), most)-min(uint64(limit.Cur), ownDescriptors))/each))
}

// isShortage reports whether the process, or the system, had no descriptor left.
func isShortage(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// isStartShortage reports whether a program may be started a moment later. A new
// process moves descriptors to higher numbers; where these are over the limit the
// system says EBADF.
func isStartShortage(err error) bool {
	return isShortage(err) || errors.Is(err, syscall.EBADF) ||
		errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOMEM)
}

// respond sends the response, when there is a descriptor for it.
func (s *service) respond(req *acomm.Request, resp *acomm.Response) error {
	return s.retry("send the response", req, isShortage, func() error { return req.Respond(resp) })
}

// respondLater is respond for a request whose program has ended. It also tries again
// where, over HTTP, there is no connection to the hook, unless the service is to end. The
// first try takes the room that the request has, so that no result waits behind requests
// that came later, and calls leave, which gives it back; nil: it has none. The others
// take some for as long as they last: a hook that is away would keep all room.
func (s *service) respondLater(req *acomm.Request, resp *acomm.Response, leave func()) error {
	overHTTP := req.ResponseHook.Scheme != "unix"
	passes := func(err error) bool {
		if isShortage(err) {
			return true
		}
		select {
		case <-s.draining:
			return false
		default:
			return overHTTP && isNotConnected(err)
		}
	}
	return s.retry("send the response", req, passes, func() error {
		if leave == nil {
			s.room <- struct{}{}
			leave = func() { <-s.room }
		}
		defer func() { leave(); leave = nil }()
		return req.Respond(resp)
	})
}
