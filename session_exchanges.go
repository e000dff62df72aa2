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

// exchanges is the half of a session that this end serves. The session's mu guards it.
type exchanges struct {
	state      halfState
	feed       *feed                // to a listener; nil: none, or the listener knows that it is over
	received   uint64               // messages, ever
	last       uint32               // the number of the last message
	pending    map[uint32]*exchange // not answered
	size       int                  // bytes of their messages
	adding     bool                 // the reader is about to add some to the queue
	toldNoMore bool                 // the queue knows that no more come
	end        uint64               // of what was said of them, in bytes added to the frameWriter
	graceOver  bool                 // what is not written by now is not waited for
	grace      *time.Timer          // until that
}

// feed is how messages of a session come to a listener: the queue knows it from join to
// left. A session has one at a time.
type feed struct {
	session *session
	queue   *acceptQueue
	local   net.Addr // the addresses of the session that the peer has opened to the listener
	remote  net.Addr

	ahead  atomic.Int64  // bytes of the messages that wait in the queue
	handed atomic.Uint32 // the number of the last one that NextConn has returned
}

// serveLocked lets the peer send messages to the listener of the queue, which is to join
// the feed.
func (s *session) serveLocked(queue *acceptQueue, local, remote net.Addr) *feed {
	x := &s.exchanges
	x.feed = &feed{session: s, queue: queue, local: local, remote: remote}
	x.state, x.toldNoMore, x.graceOver = halfOpen, false, false
	x.last = firstMessage - 1
	x.feed.handed.Store(x.last)
	x.pending = make(map[uint32]*exchange)
	return x.feed
}

// messageLocked takes a message. It is added to the queue later, without the lock.
func (s *session) messageLocked(f sessionFrame) error {
	x := &s.exchanges
	size := len(f.data)
	switch {
	case x.state == halfOpen && (s.out.answers > maxUnsentAnswers || x.feed.ahead.Load() > maxAhead):
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
	e := &exchange{session: s, number: f.number, size: size, unread: frame, feed: x.feed}
	x.last = f.number
	x.received++
	x.pending[f.number] = e
	x.size += size
	x.feed.ahead.Add(int64(size + exchangeCost))
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

// parseTarget returns which socket file a target names.
func parseTarget(data []byte) *fileID {
	return &fileID{device: binary.BigEndian.Uint64(data), inode: binary.BigEndian.Uint64(data[8:])}
}

// retarget lets the peer's messages go to the listener that it names, if it may send to
// that: it has a session to it. Else it is told that none of them is served.
func (s *session) retarget(to fileID) error {
	s.targets++
	s.mu.Lock()
	s.exchanges.adding = false // it was
	s.unlock()
	s.mu.Lock()
	x := &s.exchanges
	if !s.opened || s.targets > maxTargets || x.state != halfClosed {
		s.mu.Unlock()
		return errBadFrame
	}
	before := x.feed // the peer knows that it is not served there, as it names another
	x.feed = nil
	x.stopGraceLocked()
	s.mu.Unlock()
	if before != nil {
		before.queue.left(before)
	}
	queue, local, remote := sessions.feedOf(s, to)
	s.mu.Lock()
	if queue == nil || s.calls.state != halfOpen {
		s.out.addCopy(frameStop, firstMessage-1, nil)
		s.unlock()
		return nil
	}
	f := s.serveLocked(queue, local, remote)
	s.unlock()
	if !queue.join(f) {
		f.drain()
	}
	return nil
}

// serving returns the queue to which messages may come, and whose they are; nil if there
// is none.
func (s *session) serving() (queue *acceptQueue, local, remote net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &s.exchanges
	if x.state != halfOpen {
		return nil, nil, nil
	}
	return x.feed.queue, x.feed.local, x.feed.remote
}

// stopServingLocked lets the peer send no further message, and tells it so. Those that
// have arrived are served.
func (s *session) stopServingLocked() {
	x := &s.exchanges
	if x.state != halfOpen {
		return
	}
	x.state = halfDraining
	s.sayLocked(frameStop, x.last, nil)
	if !s.opened {
		// What goes the other way moves, too: the peer's next session is a better one.
		s.calls.drainLocked()
	}
}

// sayLocked queues a frame about the exchanges.
func (s *session) sayLocked(kind frameKind, number uint32, data []byte) {
	s.out.addCopy(kind, number, data)
	s.exchanges.end = s.out.queued
}

// drain lets nothing more be sent to the listener.
func (f *feed) drain() {
	s := f.session
	s.mu.Lock()
	if s.exchanges.feed == f {
		s.stopServingLocked()
	}
	s.unlock()
}

// abort ends the serving, whatever is open: of the messages that have arrived only those
// are served that NextConn has returned. What was answered is still written, for a
// moment.
func (f *feed) abort() {
	s := f.session
	s.mu.Lock()
	x := &s.exchanges
	if x.feed == f {
		s.stopServingLocked()
		if x.state == halfDraining {
			handed := f.handed.Load()
			s.sayLocked(frameStop, handed, nil)
			for number, e := range x.pending {
				if int32(number-handed) > 0 {
					e.endLocked() // no answer: that is said
				}
			}
		}
		s.limitGraceLocked(abortGrace)
	}
	s.unlock()
}

// limitGraceLocked limits how long what is to be written about the exchanges is waited
// for.
func (s *session) limitGraceLocked(grace time.Duration) {
	x := &s.exchanges
	x.stopGraceLocked()
	f := x.feed
	x.grace = time.AfterFunc(grace, func() {
		s.mu.Lock()
		x.graceOver = x.graceOver || f != nil && x.feed == f
		s.unlock()
	})
}

func (x *exchanges) stopGraceLocked() {
	if x.grace != nil {
		x.grace.Stop()
		x.grace = nil
	}
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
