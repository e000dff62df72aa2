package acomm

import (
	"encoding/binary"
	"net"
	"sync/atomic"
	"time"
)

const (
	// maxUnsentAnswers is how many bytes of answers may wait to be written. With more
	// of them the session serves nothing further: its peer does not read.
	maxUnsentAnswers = 20 << 20

	// maxAhead is how many bytes of messages may wait for NextConn, each with
	// exchangeCost. The peer has given up on half of them, as it keeps to
	// maxInFlightBytes.
	maxAhead     = 2 * maxInFlightBytes
	exchangeCost = 512

	maxTargets = 16 // that a peer names on a session
)

// exchanges is the half of a session that this end serves. The session's mu guards it,
// but for what is atomic.
type exchanges struct {
	state      halfState
	queue      *acceptQueue // of the listener that the messages are for; nil: none, or it knows that it is over
	local      net.Addr     // the addresses of the session that the peer has opened to the listener
	remote     net.Addr
	received   uint64               // messages, ever
	last       uint32               // the number of the last message
	pending    map[uint32]*exchange // not answered
	size       int                  // bytes of their messages
	adding     bool                 // the reader is about to add some to the queue
	toldNoMore bool                 // the queue knows that no more come
	graceOver  bool                 // what is not written by now is not waited for

	ahead  atomic.Int64  // bytes of those that wait in the queue
	handed atomic.Uint32 // the number of the last one that NextConn has returned
}

// serveLocked lets the peer send messages to the listener of the queue. The caller
// holds mu, and has told the queue.
func (s *session) serveLocked(queue *acceptQueue, local, remote net.Addr) {
	x := &s.exchanges
	x.state, x.queue, x.local, x.remote, x.toldNoMore = halfOpen, queue, local, remote, false
	x.graceOver = false
	x.last = firstMessage - 1
	x.handed.Store(x.last)
	x.pending = make(map[uint32]*exchange)
}

// messageLocked takes a message. It is added to the queue later, without the lock.
func (s *session) messageLocked(f sessionFrame) error {
	x := &s.exchanges
	size := len(f.data)
	switch {
	case x.state == halfOpen && (s.out.answers > maxUnsentAnswers || x.ahead.Load() > maxAhead):
		// To wait would hold up what comes in the other direction, which may be what
		// the handlers wait for. The peer will send it elsewhere.
		s.stopServingLocked()
		return nil
	case x.state != halfOpen && (!s.opened || s.targets > 0):
		return nil // the peer is told so
	case x.state != halfOpen || f.number != x.last+1 || len(x.pending) >= maxInFlight || x.size+size > maxInFlightBytes:
		return errBadFrame
	}
	frame := make([]byte, headerSize+size) // a plain frame, as the handler expects it
	binary.BigEndian.PutUint32(frame, uint32(size))
	copy(frame[headerSize:], f.data)
	e := &exchange{session: s, number: f.number, size: size, unread: frame, local: x.local, remote: x.remote}
	x.last = f.number
	x.received++
	x.pending[f.number] = e
	x.size += size
	x.ahead.Add(int64(size + exchangeCost))
	s.arrived = append(s.arrived, e)
	return nil
}

// cancelLocked ends an exchange whose peer has given up.
func (s *session) cancelLocked(number uint32) error {
	if s.opened && s.targets == 0 {
		return errBadFrame
	}
	if e := s.exchanges.pending[number]; e != nil {
		e.endLocked()
	}
	return nil
}

// target names a listener by its socket file.
type target struct{ device, inode uint64 }

// retarget lets the peer's messages go to the listener that it names, if it may send to
// that: it has a session to it. Else it is told that none of them is served.
func (s *session) retarget(to target) error {
	via := sessions.find(s, to)
	s.targets++
	s.mu.Lock()
	x := &s.exchanges
	x.adding = false // it was
	s.unlock()
	s.mu.Lock()
	if !s.opened || s.targets > maxTargets || x.state != halfClosed {
		s.mu.Unlock()
		return errBadFrame
	}
	before := x.queue // the peer knows that it is not served there, as it names another
	x.queue = nil
	s.mu.Unlock()
	if before != nil {
		before.left(s)
	}
	var queue *acceptQueue
	var local, remote net.Addr
	if via != nil {
		queue, local, remote = via.serving()
	}
	s.mu.Lock()
	if queue == nil || s.calls.state != halfOpen {
		s.out.addCopy(frameStop, firstMessage-1, nil)
		s.unlock()
		return nil
	}
	s.serveLocked(queue, local, remote)
	s.unlock()
	if !queue.join(s) {
		s.drain()
	}
	return nil
}

// serving returns the queue for which messages may arrive, and whose they are; nil if
// there is none.
func (s *session) serving() (queue *acceptQueue, local, remote net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &s.exchanges
	if x.state != halfOpen {
		return nil, nil, nil
	}
	return x.queue, x.local, x.remote
}

// stopServingLocked lets the peer send no further message, and tells it so. Those that
// have arrived are served.
func (s *session) stopServingLocked() {
	x := &s.exchanges
	if x.state != halfOpen {
		return
	}
	x.state = halfDraining
	s.out.addCopy(frameStop, x.last, nil)
	if !s.opened {
		// What goes the other way moves, too: the peer's next session is a better one.
		s.calls.drainLocked()
	}
}

// drain lets nothing more be sent to the listener of the queue.
func (s *session) drain() {
	s.mu.Lock()
	s.stopServingLocked()
	s.unlock()
}

// abort ends the serving, whatever is open: of the messages that have arrived only those
// are served that NextConn has returned. What was answered is still written, for a
// moment.
func (s *session) abort() {
	s.mu.Lock()
	s.stopServingLocked()
	x := &s.exchanges
	if x.state == halfDraining {
		handed := x.handed.Load()
		s.out.addCopy(frameStop, handed, nil)
		for number, e := range x.pending {
			if int32(number-handed) > 0 {
				e.endLocked() // no answer: that is said
			}
		}
	}
	queue := x.queue
	s.unlock()
	time.AfterFunc(abortGrace, func() {
		s.mu.Lock()
		x.graceOver = x.graceOver || queue != nil && x.queue == queue
		s.unlock()
	})
}

// abandon ends the exchanges that the queue has not taken.
func (s *session) abandon() {
	s.mu.Lock()
	for _, conn := range s.arrived {
		conn.(*exchange).endLocked()
	}
	s.unlock()
}

// abandonLocked ends all exchanges: nobody waits for answers any more.
func (x *exchanges) abandonLocked() {
	if x.state == halfOpen {
		x.state = halfDraining
	}
	for _, e := range x.pending {
		e.endLocked()
	}
}
