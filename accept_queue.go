package acomm

import (
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
)

// acceptQueue holds what a listener has accepted from a Start to its Stop: connections,
// and exchanges of sessions, which to their handlers are connections. It decides what
// NextConn returns next, and what Stop waits for.
type acceptQueue struct {
	// Immutable.
	file        fileID // of the listener's socket
	addr        string // of the listener's socket
	multiplexed bool   // sessions may be opened to the listener

	mu        sync.Mutex               // guards the fields below; no other lock is taken under it
	changed   sync.Cond                // next waits for it
	accepting bool                     // connections may still be accepted
	waiting   []net.Conn               // accepted, oldest first
	handed    int                      // the first so many of waiting were handed out
	open      map[net.Conn]struct{}    // accepted and not done
	sessions  map[listenerSession]bool // joined and not left; true: messages may still arrive
	stopping  bool                     // no session may join
	aborted   bool                     // nothing is handed out any more
	drained   chan struct{}            // closed when the queue is stopping and nothing is left
}

// listenerSession is a session that carries messages to the listener.
type listenerSession interface {
	drain() // tells the sender that no further message is served
	abort() // ends the messages that were not handed out, and leaves the queue soon
}

// newAcceptQueue makes the queue of a listener that starts. If it is multiplexed,
// sessions may be opened to the listener. While it runs, the process may open sessions
// itself.
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

// leave undoes newAcceptQueue, once the queue is drained.
func (q *acceptQueue) leave() {
	queues.mu.Lock()
	if queues.byAddr[q.addr] == q {
		delete(queues.byAddr, q.addr)
	}
	queues.mu.Unlock()
	sessions.leave()
}

// accept takes a connection that the listener has accepted: one for NextConn, or a
// session.
func (q *acceptQueue) accept(conn *net.UnixConn) {
	if q.multiplexed && isSession(conn) {
		acceptSession(conn, q)
		return
	}
	q.add([]net.Conn{conn})
}

// add queues connections for NextConn. It reports false if the queue was aborted.
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

// next blocks until there is a connection and returns it. It returns nil if there is none
// and none can come.
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
		q.waiting = slices.Delete(q.waiting, 0, q.handed) // else the slice would grow for ever
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

// isOpen reports whether the connection was accepted by this listener and is not done.
func (q *acceptQueue) isOpen(conn net.Conn) bool {
	if !reflect.ValueOf(conn).Comparable() {
		return false // not a connection of ours, and it can't be the key of a map
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.open[conn]
	return ok
}

// done removes a connection that is closed.
func (q *acceptQueue) done(conn net.Conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.open, conn)
	q.checkDrainedLocked()
}

// join adds a session. It reports false if the listener can't have one more.
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

// noMore records that no further message arrives from a session.
func (q *acceptQueue) noMore(s listenerSession) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.sessions[s]; ok {
		q.sessions[s] = false
		q.changed.Broadcast()
	}
}

// left removes a session. All its messages are answered.
func (q *acceptQueue) left(s listenerSession) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.sessions, s)
	q.changed.Broadcast()
	q.checkDrainedLocked()
}

// close records that no further connection is accepted.
func (q *acceptQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.accepting = false
	q.changed.Broadcast()
	q.checkDrainedLocked()
}

// drain tells the sessions that no further message is served. What was accepted is still
// handed out.
func (q *acceptQueue) drain() {
	for _, s := range q.stop(false) {
		s.drain()
	}
}

// abort closes all open connections. Nothing is handed out any more.
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

// stop lets no session join, and with abort hands nothing out any more. It returns the
// sessions of the queue.
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

// checkDrainedLocked tells Stop when nothing is left. The caller holds mu.
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

// queues holds the queues of the listeners that accept sessions, by the addresses of
// their sockets.
var queues = struct {
	mu     sync.Mutex
	byAddr map[string]*acceptQueue
}{byAddr: make(map[string]*acceptQueue)}

// sessionsMember ends an acknowledgement of a listener that can have sessions.
const sessionsMember = `,"sessions":1}`

// announceSessions adds the member "sessions" to the frame of an acknowledgement, if the
// connection's sender asks for it and its listener can have one more session.
func announceSessions(conn net.Conn, frame []byte) []byte {
	if len(frame) > maxCopied || !mayHaveSession(conn) {
		return frame
	}
	frame = append(frame[:len(frame)-1:len(frame)-1], sessionsMember...)
	putFrameHeader(frame)
	return frame
}

// mayHaveSession reports whether the sender of a connection asks for a session, and the
// listener that accepted it can have one more. It calls no method of types that it does
// not know: in a user's test, a connection may be unable to do more than write.
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
