package acomm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxInFlight      = 1024     // messages in flight in one direction of a session
	maxInFlightBytes = 2 << 20  // bytes of JSON in them
	maxSessions      = 256      // that a process opens or a listener accepts; mostSessions may lower it
	writePart        = 64 << 10 // bytes, for each sessionWriteTimeout

	// abortGrace is how long an aborted session may go on writing.
	abortGrace = 200 * time.Millisecond
)

// Variables, so that tests can set them.
var (
	sessionWriteTimeout = sendTimeout     // for the peer to take 64 KiB; at the end of a session, to take all that is left
	sessionIdleTimeout  = 5 * time.Second // of the end that opened the session; the other end waits twice as long
	sessionCloseTimeout = time.Second     // for the peer to close a session that is over
	firstMessage        = uint32(1)       // number of a session's first message, in each direction
)

// session is a multiplexed connection: it carries many exchanges at a time, in both
// directions. Both ends have the same type. It has two halves: calls, the messages that
// this end sends, and exchanges, the messages that this end serves.
//
// How a message travels:
//
//  1. Send (send.go) asks the sessionPool for the session to the path.
//  2. call (session_calls.go) queues the message in the frameWriter. The goroutine that
//     then releases mu writes the queue (flush, below), unless the reader is about to.
//  3. At the other end the reader (read, below) makes an exchange (exchange.go) of the
//     message and adds it to the listener's acceptQueue, where NextConn finds it.
//  4. The handler's answer is queued in the frameWriter of that end. The reader of the
//     sending end gives it to the waiting call.
//
// Order of locks: sessionPool.mu before session.mu; a session and an acceptQueue are
// never locked together.
type session struct {
	// Set before the session is shared, then immutable.
	conn   *net.UnixConn
	opened bool     // by this process; false: accepted
	name   string   // of the socket of the end that opened the session
	file   fileID   // socket file of the listener that accepted the session
	as     threadID // opened: the thread that the kernel let connect
	creds  peerCreds
	idle   time.Duration // idle time-out
	token  processToken  // opened: the peer's; sessionPool.all has it for all sessions
	ended  chan struct{} // closed when the session is over

	order int // opened: sequence number in the process; guarded by sessionPool.mu

	// Owned by the reader.
	in       frameReader
	greeted  bool       // the peer's greeting has arrived
	arrived  []net.Conn // exchanges of this read, to be added to the acceptQueue
	answered []*call    // calls of this read, to be given their outcome
	targets  int        // number of target frames that have arrived
	target   *fileID    // target frame to be handled; nil: none
	pair     bool       // sessions.pair is to be called

	unanswered atomic.Bool // no call was answered since the opening, or since a target was refused

	write attempt // owned by the goroutine that has set writing

	mu        sync.Mutex // guards the fields below, and those of each exchange that say so
	out       frameWriter
	calls     calls
	exchanges exchanges
	writing   bool        // a goroutine writes the queue, and what is added to it meanwhile
	corked    bool        // the reader will write the queue; nobody else does
	finishBy  time.Time   // deadline for all that is still to be written; zero: a half is not closed
	failed    bool        // a write has failed, and checkFailedLocked has acted on it
	closing   bool        // opened: the last stop is queued, the peer is to close the connection
	ending    bool        // the reader has to return
	closed    bool        // the connection is closed
	over      bool        // ended is closed, or about to be
	timer     *time.Timer // idle time-out
	closer    *time.Timer // runs from closing: sessionCloseTimeout
	seen      uint64      // number of messages at the last checkIdle
}

// halfState is the state of one direction of a session.
type halfState int

const (
	halfClosed   halfState = iota // not yet opened, or over
	halfOpen                      // messages may be sent
	halfDraining                  // no further message may be sent; earlier ones are being answered
)

// newSession makes a session of a connection. Nothing is read or written before read.
func newSession(conn *net.UnixConn, opened bool, name string, file fileID) (*session, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &session{
		conn: conn, opened: opened, name: name, file: file, creds: peerCredsOf(conn),
		idle: sessionIdleTimeout, ended: make(chan struct{}),
	}
	if !opened {
		s.idle *= 2
	}
	s.unanswered.Store(true)
	s.calls.retired = true
	s.write.init(raw)
	s.out.addBytes(ownGreeting())
	return s, nil
}

// read is the session's goroutine: it reads until the connection ends or the session has
// nothing left to do, and then closes the connection. It reads inside one RawConn.Read
// call, which saves the read that finds nothing. Close would wait for that call, so no
// other goroutine closes the connection.
func (s *session) read() {
	s.mu.Lock()
	s.timer = time.AfterFunc(s.idle, s.checkIdle)
	s.unlock() // which writes the greeting
	if raw, err := s.conn.SyscallConn(); err == nil {
		_ = raw.Read(s.readable)
	}
	s.in.release()
	_ = s.conn.Close()
	s.mu.Lock()
	s.closed = true
	s.unlock()
}

// readable reads what has arrived and handles its frames. Then it lets the goroutines run
// that the frames have woken, and flushes what they have queued, in one write: so the
// peer is woken once. It reports whether reading is over.
func (s *session) readable(fd uintptr) bool {
	for {
		space := s.in.space()
		n, err := syscall.Read(int(fd), space)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			s.in.release()
			return false
		case err != nil || n == 0:
			return true
		}
		s.in.added(n)
		err = s.handleAll()
		written := s.uncork()
		if err != nil {
			return true
		}
		if n < len(space) && written {
			// The socket is empty, so another read is saved. The write shows that the
			// peer had not closed by then. Had it closed earlier, no further event
			// would tell.
			s.in.release()
			return false
		}
	}
}

// handle handles the frames that have arrived, up to a target. An error breaks the
// session.
func (s *session) handle() error {
	s.mu.Lock()
	err := s.handleLocked()
	s.corked = s.corked || len(s.arrived)+len(s.answered) > 0
	s.exchanges.adding = len(s.arrived) > 0
	f := s.exchanges.feed
	if err == nil && s.ending {
		err = net.ErrClosed // else a peer that goes on writing would delay the end
	}
	s.unlock()
	for _, c := range s.answered {
		c.outcome <- c.answered // after unlocking: the goroutine that it wakes may need mu next
	}
	if len(s.arrived) > 0 && !f.queue.add(s.arrived) {
		f.abort() // here, while they are pending: the peer is told that they are not served
	}
	clear(s.arrived)
	clear(s.answered)
	s.arrived, s.answered = s.arrived[:0], s.answered[:0]
	return err
}

// handleLocked handles the frames that have arrived, up to a target. The caller holds mu.
func (s *session) handleLocked() error {
	for s.target == nil {
		f, ok, err := s.in.next()
		if !ok || err != nil {
			return err
		}
		switch f.kind {
		case frameMessage:
			err = s.messageLocked(f)
		case frameCancel:
			err = s.cancelLocked(f.number)
		case frameAnswer:
			err = s.answerLocked(f)
		case frameStop:
			err = s.stopLocked(f.number)
		case frameTarget:
			s.target = parseTarget(f.data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// handleAll handles the frames that have arrived. In between it makes the calls to the
// pool, which must not be made under mu.
func (s *session) handleAll() error {
	if ok, err := s.takeGreeting(); !ok || err != nil {
		return err
	}
	for {
		if err := s.handle(); err != nil {
			return err
		}
		if s.pair {
			s.pair = false
			sessions.pair(s)
		}
		if s.target == nil {
			return nil
		}
		to := *s.target
		s.target = nil
		if err := s.retarget(to); err != nil {
			return err
		}
	}
}

// takeGreeting reads the peer's greeting, which comes before its first frame. It reports
// whether the greeting has arrived.
func (s *session) takeGreeting() (bool, error) {
	if s.greeted {
		return true, nil
	}
	data, ok := s.in.skip(len(greeting) + len(processToken{}))
	if !ok {
		return false, nil
	}
	token, err := parseGreeting(data)
	if err != nil {
		return false, err
	}
	s.greeted, s.pair = true, true
	sessions.setPeer(s, token)
	return true, nil
}

// uncork lets the woken goroutines run once and then flushes. It reports whether it has
// written something.
func (s *session) uncork() bool {
	if !s.corked { // needs no lock: only the reader sets it
		return false
	}
	runtime.Gosched()
	s.mu.Lock()
	s.corked = false
	s.exchanges.adding = false
	return s.unlock()
}

// endings lists what follows from a change and has to be done after unlocking.
type endings struct {
	retired bool  // tell the pool: no further message may be sent
	refused bool  // with retired: because a target was refused
	feed    *feed // the one that noMore and left are about
	noMore  bool  // tell the acceptQueue: no further message arrives by the feed
	left    bool  // tell the acceptQueue: each message of the feed is answered, each answer written
	end     bool  // let the reader return and close the connection
	over    bool  // the session is over: tell the pool, close ended
	flush   bool  // write the queue
	yield   bool  // with flush: let goroutines run first that probably queue frames now
}

// unlock releases mu after a change. Here, and nowhere else, it is decided what follows
// from a change: which half has ended, whether the connection or the session has, and
// whether the caller has to write. It reports whether it has written something.
func (s *session) unlock() bool {
	e := s.decideLocked()
	s.mu.Unlock()
	if e.retired {
		sessions.forget(s, e.refused)
	}
	if e.noMore {
		e.feed.queue.noMore(e.feed)
	}
	if e.left {
		e.feed.queue.left(e.feed)
	}
	if e.end {
		s.end()
	}
	if e.over {
		sessions.gone(s)
		close(s.ended)
	}
	return e.flush && s.flush(e.yield)
}

// decideLocked decides what follows from a change, and records each decision, so that it
// is made once. The caller holds mu.
func (s *session) decideLocked() (e endings) {
	c, x := &s.calls, &s.exchanges
	s.checkFailedLocked()
	if s.closed && !s.writing && !s.over { // no write is under way, so out.written is final
		s.over, e.over = true, true
		s.stopTimersLocked()
		c.failLocked(s.out.written)
		x.abandonLocked()
	}
	if c.state == halfDraining && len(c.pending) == 0 {
		c.state = halfClosed
	}
	if x.state == halfDraining && len(x.pending) == 0 && !x.adding {
		x.state = halfClosed
	}
	e.retired, e.refused = c.state != halfOpen && !c.retired, c.refused
	c.retired = c.retired || e.retired
	s.decideFeedLocked(&e)
	e.end = s.decideCloseLocked()
	e.flush = !s.writing && !s.corked && !s.closed && len(s.out.queue) > 0
	s.writing = s.writing || e.flush
	e.yield = e.flush && len(c.pending)+len(x.pending) > 1 && s.out.unwritten() <= maxCopied
	return e
}

// decideFeedLocked decides what the listener's acceptQueue has to be told. The caller
// holds mu.
func (s *session) decideFeedLocked(e *endings) {
	x := &s.exchanges
	if x.feed == nil || x.state == halfOpen {
		return
	}
	e.feed = x.feed
	e.noMore = !x.adding && !x.toldNoMore
	x.toldNoMore = x.toldNoMore || e.noMore
	written := s.out.written >= x.end || s.out.err != nil || x.graceOver || s.closed
	// If the connection is about to close, Stop waits for that as well, but not for a peer
	// that has let the grace pass.
	closes := s.calls.state == halfClosed && !(s.opened && x.graceOver)
	e.left = x.state == halfClosed && written && (!closes || s.over)
	switch {
	case e.left:
		x.feed = nil
		x.stopGraceLocked()
	case x.state == halfClosed && x.grace == nil:
		s.limitGraceLocked(sessionWriteTimeout)
	}
}

// decideCloseLocked ends the connection if both halves are closed and everything is
// written. It reports whether the caller has to call end.
//
// The end that opened the session does not close at once: it sends a stop and waits for
// the peer to close. Until then the peer may name a target, and has to learn that its
// messages are not served. The caller holds mu.
func (s *session) decideCloseLocked() bool {
	written := s.out.unwritten() == 0
	switch {
	case s.calls.state != halfClosed || s.exchanges.state != halfClosed || s.ending || s.closed:
	case !s.opened && (written || s.exchanges.graceOver), s.opened && s.out.err != nil:
		s.ending = true
		return true
	case s.opened && !s.closing && written:
		s.closing = true
		s.out.addCopy(frameStop, firstMessage-1, nil)
		s.closer = time.AfterFunc(sessionCloseTimeout, s.end)
	}
	return false
}

func (s *session) stopTimersLocked() {
	s.timer.Stop()
	if s.closer != nil {
		s.closer.Stop()
	}
}

// end lets the reader return, which then closes the connection.
func (s *session) end() {
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	_ = s.conn.SetReadDeadline(time.Unix(1, 0))
}

// checkFailedLocked acts on the first failed write. Calls that were not wholly written
// are released to be sent elsewhere; those that were may yet be answered. The exchanges
// of this end are over. The caller holds mu.
func (s *session) checkFailedLocked() {
	if s.out.err == nil || s.failed {
		return
	}
	s.failed = true
	s.calls.drainLocked()
	s.calls.refuseLocked(func(_ uint32, c *call) bool { return c.end > s.out.written })
	s.exchanges.abandonLocked()
	if !errors.Is(s.out.err, syscall.EPIPE) && !errors.Is(s.out.err, syscall.ECONNRESET) {
		s.ending = true // the peer is alive but can't be told: close, so that it notices
		_ = s.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// finish drains both halves: no further message begins, and the connection closes after
// the last exchange. It reports whether the connection is closing now.
func (s *session) finish() bool {
	s.mu.Lock()
	s.calls.drainLocked()
	s.stopServingLocked()
	s.unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing || s.ending || s.closed
}

// isIdle reports whether nothing is in flight in either direction.
func (s *session) isIdle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls.pending)+len(s.exchanges.pending) == 0
}

// checkIdle finishes the session if it was idle since the last check.
func (s *session) checkIdle() {
	s.mu.Lock()
	messages := s.calls.sent + s.exchanges.received
	used := s.seen != messages || len(s.calls.pending)+len(s.exchanges.pending) > 0
	s.seen = messages
	if used && !s.over {
		s.timer.Reset(s.idle)
	}
	s.mu.Unlock()
	if !used {
		s.finish()
	}
}

// flush writes the queue, and what is added to it meanwhile. With yield it first lets
// other goroutines run, which probably queue frames at this moment. It does not block: a
// goroutine writes what the socket does not take. It reports whether the socket has taken
// something.
func (s *session) flush(yield bool) (written bool) {
	if yield {
		runtime.Gosched()
	}
	for c, ok := s.nextChunk(); ok; c, ok = s.nextChunk() {
		n, err := s.write.write(c.data)
		written = written || n > 0
		if err == nil && n < len(c.data) {
			go s.writeRest(c, n) // ends with the session, if not before
			return written
		}
		s.wrote(c, n, err)
	}
	return written
}

// nextChunk returns the chunk to be written next. If there is none, it clears writing and
// returns false.
func (s *session) nextChunk() (chunk, bool) {
	s.mu.Lock()
	c, ok := s.out.next()
	if ok {
		s.mu.Unlock()
		return c, true
	}
	s.writing = false
	s.unlock()
	return chunk{}, false
}

func (s *session) wrote(c chunk, n int, err error) {
	s.mu.Lock()
	s.out.wrote(c, n, err)
	if x := &s.exchanges; err != nil || x.state == halfClosed && x.feed != nil { // the acceptQueue may wait for this write
		s.unlock()
		return
	}
	s.mu.Unlock()
}

// writeRest writes what the socket did not take at once, and what is added to the queue
// meanwhile. It may block.
func (s *session) writeRest(c chunk, from int) {
	for ok := true; ok; c, ok = s.nextChunk() {
		n, err := s.writeSlowly(c.data[from:])
		s.wrote(c, from+n, err)
		from = 0
	}
}

// writeSlowly writes the data in parts of 64 KiB, each with a deadline of its own.
func (s *session) writeSlowly(data []byte) (n int, err error) {
	defer func() { _ = s.conn.SetWriteDeadline(time.Time{}) }()
	for n < len(data) && err == nil {
		if err := s.conn.SetWriteDeadline(s.writeDeadline()); err != nil {
			return n, err
		}
		var part int
		part, err = s.conn.Write(data[n:min(len(data), n+writePart)])
		n += part
	}
	return n, err
}

// writeDeadline returns the deadline for the next write. Once both halves are closed, one
// deadline applies to all that is left.
func (s *session) writeDeadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := time.Now().Add(sessionWriteTimeout)
	if s.calls.state != halfClosed || s.exchanges.state != halfClosed {
		return end
	}
	if s.finishBy.IsZero() {
		s.finishBy = end
	}
	return s.finishBy
}

// attempt writes without blocking. A session has one and uses it again for each write: a
// new closure for each write would cost an allocation.
type attempt struct {
	raw  syscall.RawConn
	try  func(fd uintptr) bool
	data []byte
	n    int
	err  error
}

func (a *attempt) init(raw syscall.RawConn) { a.raw, a.try = raw, a.once }

// write writes as much as the socket takes at once.
func (a *attempt) write(data []byte) (n int, err error) {
	a.data = data
	err = a.raw.Write(a.try)
	a.data = nil
	switch {
	case err != nil:
		return 0, err
	case a.err == syscall.EAGAIN:
		return 0, nil
	}
	return max(a.n, 0), a.err
}

func (a *attempt) once(fd uintptr) bool {
	for {
		a.n, a.err = syscall.Write(int(fd), a.data)
		if a.err != syscall.EINTR {
			return true
		}
	}
}

// errUnsent is the outcome of a message that was certainly not served. It may be sent
// again.
var errUnsent = errors.New("not sent")

// errNoAnswer is the outcome of a message that may have been served. It must not be sent
// again.
var errNoAnswer = fmt.Errorf("read acknowledgement: %w", io.ErrUnexpectedEOF)
