package acomm

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"
)

// calls is the half of a session that this end sends. The session's mu guards it; a
// method whose name ends in Locked needs that.
type calls struct {
	state   halfState
	named   int    // targets, on a session that was accepted
	to      fileID // the socket file of the listener that the messages are for
	retired bool   // the pool knows that it is not open
	stopped bool   // by the peer
	refused bool   // that, before any message was served
	sent    uint64 // messages, ever
	last    uint32 // the number of the last message
	pending map[uint32]*call
	size    int // bytes of the messages that are pending
	timer   *time.Timer
	expires time.Time // when timer is set for; zero: it is not

	// Of a call that was given up the answer may yet come, to a number that begins anew
	// with another target.
	cancelled bool
}

// call is a message whose answer is waited for.
type call struct {
	size     int    // of its frame, in bytes
	end      uint64 // of its frame, in bytes added to the frameWriter
	deadline time.Time
	outcome  chan outcome
	answered outcome // until the reader tells it
}

var callPool = sync.Pool{New: func() any { return &call{outcome: make(chan outcome, 1)} }}

// outcome is how a call ends.
type outcome struct {
	answer []byte // nil: the message is accepted
	err    error
	free   bool // the memory of the message is not needed any more
}

// openLocked lets messages be sent to a listener.
func (c *calls) openLocked(to fileID) {
	*c = calls{
		state: halfOpen, to: to, named: c.named, sent: c.sent, last: firstMessage - 1,
		pending: make(map[uint32]*call), timer: c.timer, expires: c.expires,
	}
}

// mayCarryLocked reports whether messages to another listener of the peer may travel on the
// session, which was accepted.
func (s *session) mayCarryLocked() bool {
	c := &s.calls
	again := c.named == 0 || c.stopped && !c.cancelled && c.named < maxTargets
	return s.exchanges.state == halfOpen && c.state == halfClosed && again
}

// mayCarry is mayCarryLocked.
func (s *session) mayCarry() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mayCarryLocked()
}

// carry lets messages to another listener of the peer travel on the session, too. It
// reports whether they may; the peer may still refuse them.
func (s *session) carry(to fileID) bool {
	s.mu.Lock()
	if !s.mayCarryLocked() {
		s.mu.Unlock()
		return false
	}
	s.calls.named++
	s.calls.openLocked(to)
	var t [targetSize]byte
	binary.BigEndian.PutUint64(t[:], to.device)
	binary.BigEndian.PutUint64(t[8:], to.inode)
	s.out.addCopy(frameTarget, 0, t[:])
	s.unlock()
	return true
}

// call sends a message to a listener, behind room for a header, and returns what becomes
// of it. With errUnsent it was not served.
func (s *session) call(deadline time.Time, to fileID, frame []byte) outcome {
	c := callPool.Get().(*call)
	s.mu.Lock()
	if !s.mayCallLocked(to, len(frame)) {
		s.mu.Unlock()
		callPool.Put(c)
		return outcome{err: errUnsent, free: true}
	}
	h := &s.calls
	h.last++
	h.sent++
	s.out.add(frameMessage, h.last, frame)
	c.size, c.end, c.deadline = len(frame), s.out.queued, deadline
	h.pending[h.last] = c
	h.size += c.size
	s.expireLocked(deadline)
	s.unlock()
	o := <-c.outcome
	c.answered = outcome{} // not to hold the answer
	callPool.Put(c)
	return o
}

// mayCallLocked reports whether a message of that size may be sent now.
func (s *session) mayCallLocked(to fileID, size int) bool {
	h := &s.calls
	return h.state == halfOpen && h.to == to && s.out.err == nil && len(h.pending) < maxInFlight &&
		h.size+size <= maxInFlightBytes && s.out.unwritten() <= maxInFlightBytes
}

// isCalling reports whether messages may be sent to the listener.
func (s *session) isCalling(to fileID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls.state == halfOpen && s.calls.to == to
}

// stopCalling lets no further message be sent to the listener.
func (s *session) stopCalling(to fileID) {
	s.mu.Lock()
	if s.calls.to == to {
		s.calls.drainLocked()
	}
	s.unlock()
}

// expireLocked sees to it that a call is given up at its deadline. One timer serves
// all: most deadlines never pass, and the first to be set is the first to pass.
func (s *session) expireLocked(deadline time.Time) {
	h := &s.calls
	if !h.expires.IsZero() && !deadline.Before(h.expires) {
		return
	}
	h.expires = deadline
	if h.timer == nil {
		h.timer = time.AfterFunc(time.Until(deadline), s.expire)
		return
	}
	h.timer.Reset(time.Until(deadline))
}

// expire gives up the calls that have taken too long.
func (s *session) expire() {
	s.mu.Lock()
	h := &s.calls
	h.expires = time.Time{}
	for number, c := range h.pending {
		if !passed(c.deadline) {
			s.expireLocked(c.deadline)
			continue
		}
		s.out.addCopy(frameCancel, number, nil)
		h.cancelled = true
		h.settleLocked(number, outcome{err: fmt.Errorf("acknowledgement: %w", os.ErrDeadlineExceeded)})
	}
	s.unlock()
}

// takeLocked removes a call, if it is pending. The caller tells its outcome.
func (c *calls) takeLocked(number uint32) *call {
	call := c.pending[number]
	if call != nil {
		delete(c.pending, number)
		c.size -= call.size
	}
	return call
}

// settleLocked ends a call.
func (c *calls) settleLocked(number uint32, o outcome) {
	if call := c.takeLocked(number); call != nil {
		call.outcome <- o
	}
}

// refuseLocked ends those calls that were not served.
func (c *calls) refuseLocked(unserved func(uint32, *call) bool) {
	for number, call := range c.pending {
		if unserved(number, call) {
			c.settleLocked(number, outcome{err: errUnsent})
		}
	}
}

// drainLocked lets no further message be sent.
func (c *calls) drainLocked() {
	if c.state == halfOpen {
		c.state = halfDraining
	}
}

// failLocked ends all calls, after so many bytes were written: the connection is closed.
func (c *calls) failLocked(written uint64) {
	c.drainLocked()
	c.refuseLocked(func(_ uint32, call *call) bool { return call.end > written })
	for number := range c.pending {
		c.settleLocked(number, outcome{err: errNoAnswer})
	}
	if c.timer != nil {
		c.timer.Stop()
	}
}

// answerLocked takes an answer. One that nobody waits for is skipped.
func (s *session) answerLocked(f sessionFrame) error {
	if s.calls.pending == nil { // nothing was ever sent
		return errBadFrame
	}
	call := s.calls.takeLocked(f.number)
	if call == nil {
		return nil
	}
	o := outcome{free: call.end <= s.out.written} // the peer need not have waited for all of it
	switch {
	case isAcceptedFrame(f.data):
	case f.owned:
		o.answer = f.data
	default:
		o.answer = append([]byte{}, f.data...) // not nil, also where it is empty
	}
	call.answered = o
	s.answered = append(s.answered, call)
	if s.unanswered.Load() {
		s.unanswered.Store(false)
		s.pair = s.opened
	}
	return nil
}

// isAcceptedFrame reports whether an answer is the frame that most are.
func isAcceptedFrame(answer []byte) bool {
	whole, err := frameLength(answer)
	return err == nil && whole > 0 && whole == len(answer) && isAcceptance(answer[headerSize:])
}

// stopLocked lets the messages go elsewhere that the peer does not serve. Where it has
// served none, a target may be named again.
func (s *session) stopLocked(number uint32) error {
	h := &s.calls
	if h.state == halfClosed && !s.opened && number == firstMessage-1 {
		s.stopServingLocked() // it answers no target: the session is over
		return nil
	}
	if h.pending == nil {
		return errBadFrame
	}
	h.refused = h.refused || h.state == halfOpen && number == firstMessage-1
	h.stopped = true
	s.pair = !s.opened // with another target
	h.drainLocked()
	h.refuseLocked(func(n uint32, _ *call) bool { return int32(n-number) > 0 })
	return nil
}

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
