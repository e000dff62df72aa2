package acomm

import (
	"encoding/binary"
	"net"
	"sync/atomic"
	"time"
)

const (
	// maxUnsentAnswers limits the bytes of answers that wait to be written. A peer that
	// leaves more unread gets a stop: the session serves nothing further.
	maxUnsentAnswers = 20 << 20

	// maxAhead limits the bytes of the messages that wait for NextConn; each message
	// counts for exchangeCost bytes more. At most maxInFlightBytes of them are in
	// flight, so the peer has cancelled the others.
	maxAhead     = 2 * maxInFlightBytes
	exchangeCost = 512

	maxTargets = 16 // target frames that a peer may send on a session
)

// exchanges is the half of a session that this end serves. The session's mu guards it.
type exchanges struct {
	state      halfState
	feed       *feed                // nil: none, or its acceptQueue was told that it has left
	received   uint64               // number of messages, for all listeners
	last       uint32               // number of the last message
	pending    map[uint32]*exchange // not answered, by number
	size       int                  // bytes of their messages
	adding     bool                 // the reader is about to add exchanges to the acceptQueue
	toldNoMore bool                 // the acceptQueue was told that no further message arrives
	end        uint64               // frameWriter.queued after the last answer or stop was added
	graceOver  bool                 // Stop no longer waits for unwritten answers
	grace      *time.Timer          // sets graceOver
}

// feed connects a session to the acceptQueue of the listener that its messages are for.
// The queue knows it from join to left. A session has one at a time.
type feed struct {
	session *session
	queue   *acceptQueue
	local   net.Addr // addresses of the session that the peer opened to the listener,
	remote  net.Addr // which may be another one than session

	ahead  atomic.Int64  // bytes of the messages that wait for NextConn; see maxAhead
	handed atomic.Uint32 // number of the last message that NextConn has returned
}

// serveLocked opens the half for messages to the listener of the queue. The caller lets
// the returned feed join the queue.
func (s *session) serveLocked(queue *acceptQueue, local, remote net.Addr) *feed {
	x := &s.exchanges
	x.feed = &feed{session: s, queue: queue, local: local, remote: remote}
	x.state, x.toldNoMore, x.graceOver = halfOpen, false, false
	x.last = firstMessage - 1
	x.feed.handed.Store(x.last)
	x.pending = make(map[uint32]*exchange)
	return x.feed
}

// messageLocked handles a message frame: it makes an exchange of it. The reader adds that
// to the acceptQueue after unlocking.
func (s *session) messageLocked(f sessionFrame) error {
	x := &s.exchanges
	size := len(f.data)
	switch {
	case x.state == halfOpen && (s.out.answers > maxUnsentAnswers || x.feed.ahead.Load() > maxAhead):
		// The reader must not wait until there is room: it would delay the other
		// direction, for which the handlers may be waiting. So the peer is told to send
		// this message elsewhere.
		s.stopServingLocked()
		return nil
	case x.state != halfOpen && (!s.opened || s.targets > 0):
		return nil // not served: the peer sent it before it read our stop
	case x.state != halfOpen || f.number != x.last+1 || len(x.pending) >= maxInFlight || x.size+size > maxInFlightBytes:
		return errBadFrame
	}
	frame := make([]byte, headerSize+size) // a plain frame, for the handler to read
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

// cancelLocked handles a cancel frame: it ends the exchange.
func (s *session) cancelLocked(number uint32) error {
	if s.opened && s.targets == 0 {
		return errBadFrame
	}
	if e := s.exchanges.pending[number]; e != nil {
		e.endLocked()
	}
	return nil
}

// parseTarget returns the socket file that a target frame names.
func parseTarget(data []byte) *fileID {
	return &fileID{device: binary.BigEndian.Uint64(data), inode: binary.BigEndian.Uint64(data[8:])}
}

// retarget handles a target frame: it opens the half for messages to the listener that
// the frame names. The peer must have a session of its own to that listener. Otherwise it
// gets a stop, and none of these messages is served.
func (s *session) retarget(to fileID) error {
	s.targets++
	s.mu.Lock()
	s.exchanges.adding = false // the exchanges before the target are in the acceptQueue
	s.unlock()
	s.mu.Lock()
	x := &s.exchanges
	if !s.opened || s.targets > maxTargets || x.state != halfClosed {
		s.mu.Unlock()
		return errBadFrame
	}
	before := x.feed // over: the peer has read our stop, else it would not name another target
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
	f.join()
	return nil
}

// join lets the acceptQueue know of the feed, which has begun. The caller is the reader.
func (f *feed) join() {
	if !f.queue.join(f) {
		f.drain()
		return
	}
	f.session.mu.Lock()
	over := f.session.exchanges.feed != f
	f.session.mu.Unlock()
	if over { // by finish, say, and the acceptQueue was told before it knew of the feed
		f.queue.left(f)
	}
}

// serving returns the acceptQueue that messages go to, and the addresses of their sender;
// nil if no further message may arrive.
func (s *session) serving() (queue *acceptQueue, local, remote net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &s.exchanges
	if x.state != halfOpen {
		return nil, nil, nil
	}
	return x.feed.queue, x.feed.local, x.feed.remote
}

// stopServingLocked sends the peer a stop after the last message that has arrived. Those
// before it are served.
func (s *session) stopServingLocked() {
	x := &s.exchanges
	if x.state != halfOpen {
		return
	}
	x.state = halfDraining
	s.queueFrameLocked(frameStop, x.last, nil)
	if !s.opened {
		// The peer will open another session. Calls move to that one.
		s.calls.drainLocked()
	}
}

// queueFrameLocked queues an answer or a stop, which Stop of the listener waits for.
func (s *session) queueFrameLocked(kind frameKind, number uint32, data []byte) {
	s.out.addCopy(kind, number, data)
	s.exchanges.end = s.out.queued
}

// drain lets no further message be sent to the listener.
func (f *feed) drain() {
	s := f.session
	s.mu.Lock()
	if s.exchanges.feed == f {
		s.stopServingLocked()
	}
	s.unlock()
}

// abort stops serving at once: messages that NextConn has not returned are not served,
// and the peer is told so. Answers that are queued are still written, for abortGrace at
// most.
func (f *feed) abort() {
	s := f.session
	s.mu.Lock()
	x := &s.exchanges
	if x.feed == f {
		s.stopServingLocked()
		if len(x.pending) > 0 { // else the peer may have named another target already
			handed := f.handed.Load()
			s.queueFrameLocked(frameStop, handed, nil)
			for number, e := range x.pending {
				if int32(number-handed) > 0 {
					e.endLocked() // without an answer: the stop says that it was not served
				}
			}
		}
		s.limitGraceLocked(abortGrace)
	}
	s.unlock()
}

// limitGraceLocked limits how long Stop waits for queued answers to be written.
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

// abandonLocked ends all exchanges, without answers: the connection can't carry any.
func (x *exchanges) abandonLocked() {
	if x.state == halfOpen {
		x.state = halfDraining
	}
	for _, e := range x.pending {
		e.endLocked()
	}
}
