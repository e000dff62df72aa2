package acomm

import (
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
)

// acceptQueue is what a listener has accepted from a Start to the Stop after it:
// connections, and exchanges of sessions, which are connections to their handlers. It
// knows what NextConn hands out next, and what Stop waits for.
type acceptQueue struct {
	file        fileID // of the listener's socket
	addr        string // of the listener's socket
	multiplexed bool   // sessions may be opened to the listener

	mu        sync.Mutex // guards the fields below; no other lock is taken under it
	changed   sync.Cond  // what next waits for
	accepting bool       // connections may still be accepted
	waiting   []net.Conn // accepted, oldest first
	handed    int        // of those that wait, how many were handed out
	open      map[net.Conn]struct{}
	sessions  map[listenerSession]bool // that are not over; true: messages may still arrive
	stopping  bool
	aborted   bool
	drained   chan struct{} // closed when the queue is stopping and nothing is left
}

// listenerSession is a session by which messages arrive for a listener.
type listenerSession interface {
	drain() // lets no further message be sent to the listener
	abort() // ends those that were not handed out, and waits for no other
}

// newAcceptQueue makes the queue of a listener that starts. It may have sessions opened to
// it; while it runs, the process opens sessions, too.
func newAcceptQueue(s *socket, multiplexed bool) *acceptQueue {
	q := &acceptQueue{
		file:        s.id(),
		addr:        s.path,
		multiplexed: multiplexed,
		accepting:   true,
		open:        make(map[net.Conn]struct{}),
		sessions:    make(map[listenerSession]bool),
		drained:     make(chan struct{}),
	}
	q.changed.L = &q.mu
	sessions.join()
	if multiplexed {
		queues.mu.Lock()
		defer queues.mu.Unlock()
		queues.byAddr[q.addr] = q
	}
	return q
}

// leave ends what newAcceptQueue has begun, once nothing is left in the queue.
func (q *acceptQueue) leave() {
	queues.mu.Lock()
	if queues.byAddr[q.addr] == q {
		delete(queues.byAddr, q.addr)
	}
	queues.mu.Unlock()
	sessions.leave()
}

// accept takes a connection that was accepted.
func (q *acceptQueue) accept(conn *net.UnixConn) {
	if q.multiplexed && isSession(conn) {
		acceptSession(conn, q)
		return
	}
	q.add([]net.Conn{conn})
}

// add puts connections into the queue. It reports false if that was aborted.
func (q *acceptQueue) add(conns []net.Conn) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.aborted {
		return false
	}
	for _, conn := range conns {
		q.open[conn] = struct{}{}
		q.changed.Signal()
	}
	q.waiting = append(q.waiting, conns...)
	return true
}

// next waits for a connection and hands it out. It returns nil when there is none and
// none can come.
func (q *acceptQueue) next() net.Conn {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.handed == len(q.waiting) && q.mayGrowLocked() {
		q.changed.Wait()
	}
	if q.handed == len(q.waiting) {
		return nil
	}
	conn := q.waiting[q.handed]
	q.waiting[q.handed] = nil
	if q.handed++; q.handed == len(q.waiting) || q.handed == cap(q.waiting)/2 {
		q.waiting = slices.Delete(q.waiting, 0, q.handed) // the memory is used again
		q.handed = 0
	}
	if e, ok := conn.(interface{ handedOut() }); ok {
		e.handedOut()
	}
	return conn
}

// mayGrowLocked reports whether a connection or a message may still arrive.
func (q *acceptQueue) mayGrowLocked() bool {
	if q.accepting {
		return true
	}
	for _, more := range q.sessions {
		if more {
			return true
		}
	}
	return false
}

// isOpen reports whether the connection was handed out or is about to be, and is not
// done.
func (q *acceptQueue) isOpen(conn net.Conn) bool {
	if !reflect.ValueOf(conn).Comparable() {
		return false // somebody else's, and no key of a map
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.open[conn]
	return ok
}

// done forgets a connection that is closed.
func (q *acceptQueue) done(conn net.Conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.open, conn)
	q.checkDrainedLocked()
}

// join notes that messages may arrive by a session, until it leaves. It reports whether
// they may.
func (q *acceptQueue) join(s listenerSession) bool {
	most := mostSessions()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stopping || !q.accepting || len(q.sessions) >= most {
		return false
	}
	q.sessions[s] = true
	return true
}

// noMore notes that no further message arrives by a session.
func (q *acceptQueue) noMore(s listenerSession) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.sessions[s]; ok {
		q.sessions[s] = false
		q.changed.Broadcast()
	}
}

// left forgets a session: all that has arrived by it is answered.
func (q *acceptQueue) left(s listenerSession) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.sessions, s)
	q.changed.Broadcast()
	q.checkDrainedLocked()
}

// close notes that no further connection is accepted.
func (q *acceptQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.accepting = false
	q.changed.Broadcast()
	q.checkDrainedLocked()
}

// drain lets no further message arrive. What was accepted is still handed out.
func (q *acceptQueue) drain() {
	for _, s := range q.stop(false) {
		s.drain()
	}
}

// abort closes what is open, and hands out nothing further.
func (q *acceptQueue) abort() {
	sessions := q.stop(true)
	for _, s := range sessions {
		s.abort()
	}
	q.mu.Lock()
	left := q.open
	q.open = nil
	q.checkDrainedLocked()
	q.mu.Unlock()
	for conn := range left {
		_ = conn.Close()
	}
}

// stop lets no session join, and with abort nothing be handed out. It returns the
// sessions that have joined.
func (q *acceptQueue) stop(abort bool) []listenerSession {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stopping = true
	q.aborted = q.aborted || abort
	if abort {
		q.accepting, q.waiting, q.handed = false, nil, 0
		q.changed.Broadcast()
	}
	sessions := make([]listenerSession, 0, len(q.sessions))
	for s := range q.sessions {
		sessions = append(sessions, s)
	}
	q.checkDrainedLocked()
	return sessions
}

// checkDrainedLocked tells Stop when nothing is left.
func (q *acceptQueue) checkDrainedLocked() {
	if !q.stopping || q.accepting || len(q.open)+len(q.sessions) > 0 {
		return
	}
	select {
	case <-q.drained:
	default:
		close(q.drained)
	}
}

// queues holds the queues of the listeners that sessions can be opened to, by the
// addresses of their sockets.
var queues = struct {
	mu     sync.Mutex
	byAddr map[string]*acceptQueue
}{byAddr: make(map[string]*acceptQueue)}

// sessionsMember ends an acknowledgement that says that its listener can have sessions.
const sessionsMember = `,"sessions":1}`

// announceSessions returns the frame of an acknowledgement: with the member that says so,
// where the listener of the connection can have one more session and its peer asks for
// that.
func announceSessions(conn net.Conn, frame []byte) []byte {
	if len(frame) > maxCopied || !mayHaveSession(conn) {
		return frame
	}
	frame = append(frame[:len(frame)-1:len(frame)-1], sessionsMember...)
	putFrameHeader(frame)
	return frame
}

// mayHaveSession reports whether the peer of a connection asks for a session, and the
// listener that has accepted it can have one more. Of somebody else's type nothing is
// asked: a user's test may have one that can do no more than write.
func mayHaveSession(conn net.Conn) bool {
	c, ok := unwrap(conn).(*net.UnixConn)
	if !ok || c == nil {
		return false
	}
	peer, ok := c.RemoteAddr().(*net.UnixAddr)
	if !ok || peer == nil || !strings.HasPrefix(peer.Name, senderName) {
		return false
	}
	local, ok := c.LocalAddr().(*net.UnixAddr)
	if !ok || local == nil {
		return false
	}
	queues.mu.Lock()
	q := queues.byAddr[local.Name]
	queues.mu.Unlock()
	if q == nil {
		return false
	}
	most := mostSessions()
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.stopping && q.accepting && len(q.sessions) < most
}
