package acomm

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"
)

// calls is the half of a session that this end sends. The session's mu guards it. Methods
// whose names end in Locked need that mutex.
type calls struct {
	state   halfState
	named   int              // accepted session: number of targets sent
	to      fileID           // socket file of the listener that the messages are for
	retired bool             // the pool knows that no further message may be sent
	stopped bool             // the peer has sent a stop
	refused bool             // the stop came at number 0: no message was served
	sent    uint64           // number of messages, with all targets
	last    uint32           // number of the last message
	pending map[uint32]*call // by number; the goroutine that removes an entry delivers its outcome
	size    int              // bytes of the pending frames
	timer   *time.Timer      // runs expire; one for all calls
	expires time.Time        // when timer fires; zero: it is not set

	// cancelled rules out another target: numbers begin anew with it, and the late
	// answer to a cancelled call would be taken for that to a new one.
	cancelled bool
}

// call is a pending call: a message that was sent and not answered.
type call struct {
	size     int    // bytes of its frame
	end      uint64 // frameWriter.queued after its frame was added
	deadline time.Time
	outcome  chan outcome
	answered outcome // owned by the reader until it sends it to outcome
}

var callPool = sync.Pool{New: func() any { return &call{outcome: make(chan outcome, 1)} }}

// outcome is how a call ends.
type outcome struct {
	answer []byte // nil: an acknowledgement without an error
	err    error
	free   bool // the frameWriter does not need the message's memory any more
}

// openLocked opens the half for messages to a listener. Their numbers begin anew.
func (c *calls) openLocked(to fileID) {
	*c = calls{
		state: halfOpen, to: to, named: c.named, sent: c.sent, last: firstMessage - 1,
		pending: make(map[uint32]*call), timer: c.timer, expires: c.expires,
	}
}

// mayCarryLocked reports whether a target may be sent on an accepted session, so that it
// carries messages to a listener of the peer.
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

// carry sends a target: from now on, messages to that listener of the peer travel on this
// session. It reports whether it has. The peer may still refuse the target.
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

// call sends a message to a listener and returns its outcome. The frame begins with room
// for a session header. The outcome errUnsent says that the message was not served.
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
	c.answered = outcome{} // else callPool keeps the answer in memory
	callPool.Put(c)
	return o
}

// mayCallLocked reports whether a message of that size is within the limits in flight.
func (s *session) mayCallLocked(to fileID, size int) bool {
	h := &s.calls
	return h.state == halfOpen && h.to == to && s.out.err == nil && len(h.pending) < maxInFlight &&
		h.size+size <= maxInFlightBytes && s.out.unwritten() <= maxInFlightBytes
}

// isCalling reports whether further messages may be sent to the listener.
func (s *session) isCalling(to fileID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls.state == halfOpen && s.calls.to == to
}

// stopCalling drains the half if its messages are for the listener.
func (s *session) stopCalling(to fileID) {
	s.mu.Lock()
	if s.calls.to == to {
		s.calls.drainLocked()
	}
	s.unlock()
}

// expireLocked sets the timer that cancels a call at its deadline. One timer serves all
// calls: most deadlines never pass, and the first to be set is the first to pass.
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

// expire cancels the calls whose deadline has passed.
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
		h.settleLocked(number, outcome{err: fmt.Errorf("read acknowledgement: %w", os.ErrDeadlineExceeded)})
	}
	s.unlock()
}

// takeLocked removes a pending call and returns it; nil if there is none. The caller
// delivers its outcome.
func (c *calls) takeLocked(number uint32) *call {
	call := c.pending[number]
	if call != nil {
		delete(c.pending, number)
		c.size -= call.size
	}
	return call
}

// settleLocked removes a pending call and delivers its outcome.
func (c *calls) settleLocked(number uint32, o outcome) {
	if call := c.takeLocked(number); call != nil {
		call.outcome <- o
	}
}

// refuseLocked ends the calls that were not served. They may be sent elsewhere.
func (c *calls) refuseLocked(unserved func(uint32, *call) bool) {
	for number, call := range c.pending {
		if unserved(number, call) {
			c.settleLocked(number, outcome{err: errUnsent})
		}
	}
}

// drainLocked lets no further message be sent. Pending calls go on.
func (c *calls) drainLocked() {
	if c.state == halfOpen {
		c.state = halfDraining
	}
}

// failLocked ends all calls when the connection is closed, after the number of bytes that
// were written. Calls that were not wholly written may be sent elsewhere.
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

// answerLocked handles an answer frame. An answer without a pending call is skipped: it
// may have crossed a cancel.
func (s *session) answerLocked(f sessionFrame) error {
	if s.calls.pending == nil { // no message was sent yet
		return errBadFrame
	}
	call := s.calls.takeLocked(f.number)
	if call == nil {
		return nil
	}
	o := outcome{free: call.end <= s.out.written} // a peer may answer before it has read all of a message
	switch {
	case isAcceptedFrame(f.data):
	case f.owned:
		o.answer = f.data
	default:
		o.answer = append([]byte{}, f.data...) // never nil, which would accept the message
	}
	call.answered = o
	s.answered = append(s.answered, call)
	if s.unanswered.Load() {
		s.unanswered.Store(false)
		s.pair = s.opened
	}
	return nil
}

// isAcceptedFrame reports whether an answer is the usual acknowledgement without an
// error, which needs no decoding.
func isAcceptedFrame(answer []byte) bool {
	whole, err := frameLength(answer)
	return err == nil && whole > 0 && whole == len(answer) && isAcceptance(answer[headerSize:])
}

// stopLocked handles a stop frame: calls with higher numbers are not served and may be
// sent elsewhere.
func (s *session) stopLocked(number uint32) error {
	h := &s.calls
	if h.state == halfClosed && !s.opened && number == firstMessage-1 {
		s.stopServingLocked() // no target is open, so this is the opener's last stop
		return nil
	}
	if h.pending == nil {
		return errBadFrame
	}
	h.refused = h.refused || h.state == halfOpen && number == firstMessage-1
	h.stopped = true
	s.pair = !s.opened // the session may carry the messages of another target now
	h.drainLocked()
	h.refuseLocked(func(n uint32, _ *call) bool { return int32(n-number) > 0 })
	return nil
}

// parseAck decodes the acknowledgement from the frame that the listener's handler wrote.
func parseAck(answer []byte) (*Response, error) {
	data, err := parseFrame(answer)
	ack := &Response{}
	if err == nil {
		err = decodeFrame(data, ack)
	}
	if err != nil {
		return nil, fmt.Errorf("read acknowledgement: %w", err)
	}
	return ack, nil
}
