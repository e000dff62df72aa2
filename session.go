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
	maxInFlight      = 1024    // messages in one direction of a session
	maxInFlightBytes = 2 << 20 // bytes of JSON in them
	maxSessions      = 256     // a process opens, or a listener accepts; an eighth of its descriptors, if that is less
	writePart        = 64 << 10

	// abortGrace is how long a session that is aborted may go on writing.
	abortGrace = 200 * time.Millisecond
)

// Variables for the tests.
var (
	sessionWriteTimeout = sendTimeout     // for a peer to take 64 KiB; for all that is left, once a session is finishing
	sessionIdleTimeout  = 5 * time.Second // of who has opened a session; who has accepted it waits twice as long
	sessionCloseTimeout = time.Second     // for the peer to close what is over
	firstMessage        = uint32(1)       // the number of a session's first message, in each direction
)

// session is a connection that carries many exchanges at a time, in both directions.
// Both ends have the same type. Its two halves are calls, what this end has sent, and
// exchanges, what it serves.
//
// How a message travels: Send (send.go) asks the sessionPool for the session to the
// path, and call (session_calls.go) queues the message in the frameWriter. Whoever
// releases mu then writes what is queued (flush, below), unless the reader is about to.
// At the other end the reader (read, below) makes an exchange (exchange.go) of it and
// puts that into the listener's acceptQueue, where NextConn finds it. The handler's
// answer is queued in the frameWriter of that end, and the reader of this one gives it
// to the caller.
//
// Order of locks: sessionPool.mu, then session.mu; a session and an acceptQueue, whose
// mutex is taken alone, are never locked together.
type session struct {
	conn   *net.UnixConn
	opened bool // by this process; else accepted
	name   string
	file   fileID   // of the socket file at which it was opened
	as     threadID // whose right to open that was asked for, if opened
	creds  peerCreds
	idle   time.Duration
	token  processToken  // of the peer, if opened; later the pool knows it
	order  int           // of the sessions that were opened; the pool's
	ended  chan struct{} // closed when nothing of the session is left

	// The reader's.
	in       frameReader
	greeted  bool       // by the peer
	arrived  []net.Conn // exchanges of this read, for the queue
	answered []*call    // in this read
	targets  int        // that the peer has named
	target   *fileID    // of them, the one that is to be looked at
	pair     bool       // to look for a session that can carry the calls of another one, too

	unanswered atomic.Bool // no call was answered yet, or since a target was refused

	write attempt // of the goroutine that has set writing

	mu        sync.Mutex // guards the fields below, and those of exchanges
	out       frameWriter
	calls     calls
	exchanges exchanges
	writing   bool        // a goroutine writes, and takes along what is added
	corked    bool        // the reader is about to flush
	finishBy  time.Time   // until then all has to be written, once nothing else is left to do
	failed    bool        // a write did
	closing   bool        // the peer was told that the session is over, and is to close it
	ending    bool        // the reader was told to end
	closed    bool        // the connection is
	over      bool        // ended is closed, or about to be
	timer     *time.Timer // of idleness
	closer    *time.Timer // for the peer to close
	seen      uint64      // messages, when the timer looked
}

// halfState is how far one direction of a session is.
type halfState int

const (
	halfClosed   halfState = iota // has not begun, or is over
	halfOpen                      // messages may be sent
	halfDraining                  // no further message; those before are being answered
)

// newSession makes the session of a connection. Nothing happens before read.
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

// read is the session's goroutine: it reads until the connection ends, or the session
// has nothing left to do, and ends it. It waits inside one call, so that nobody asks
// the system for what is not there; Close would wait for that call, so nobody else
// closes the connection.
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

// readable reads what is there, does what its frames say, lets the goroutines run that
// have got something by it, and flushes what they have queued: in one write, so that
// the other end is woken once. It reports whether reading is over.
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
			// That was all, and the peer had not closed by then: its end would come with
			// what has been read, and no further notice.
			s.in.release()
			return false
		}
	}
}

// handle does what the frames say that have arrived. An error breaks the session.
func (s *session) handle() error {
	s.mu.Lock()
	err := s.handleLocked()
	s.corked = s.corked || len(s.arrived)+len(s.answered) > 0
	s.exchanges.adding = len(s.arrived) > 0
	f := s.exchanges.feed
	if err == nil && s.ending {
		err = net.ErrClosed // a peer that goes on writing holds up nobody
	}
	s.unlock()
	for _, c := range s.answered {
		c.outcome <- c.answered // not under the lock: whoever gets it wants that
	}
	if len(s.arrived) > 0 && !f.queue.add(s.arrived) {
		s.abandon()
	}
	clear(s.arrived)
	clear(s.answered)
	s.arrived, s.answered = s.arrived[:0], s.answered[:0]
	return err
}

// handleLocked does what the frames say, up to a target.
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

// handleAll does what the frames say that have arrived, and what needs the pool.
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

// takeGreeting takes the peer's greeting, which comes before its first frame. It reports
// whether it has come.
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

// uncork ends the time in which the reader is about to flush. It reports whether it has
// written something.
func (s *session) uncork() bool {
	if !s.corked { // which only the reader sets
		return false
	}
	runtime.Gosched()
	s.mu.Lock()
	s.corked = false
	s.exchanges.adding = false
	return s.unlock()
}

// endings is what a change has brought about, to be done without mu.
type endings struct {
	retired bool  // no further message may be sent
	refused bool  // that is since a target was refused
	feed    *feed // of the two below
	noMore  bool  // no further message arrives for its listener
	left    bool  // all is answered, and written
	end     bool  // the reader has to close the connection
	over    bool  // nothing of the session is left
	flush   bool  // the caller has to write
	yield   bool  // after others, who are likely to queue frames at this moment
}

// unlock releases mu after a change. Here, and nowhere else, it is decided what has
// ended by it: a half, the connection, the session; and whether the caller has to
// write. It reports whether it has written something.
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

// decideLocked decides what has ended, and notes it, so that it is decided once.
func (s *session) decideLocked() (e endings) {
	c, x := &s.calls, &s.exchanges
	s.checkFailedLocked()
	if s.closed && !s.writing && !s.over { // only then it is known what was written
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

// decideFeedLocked decides what a listener is to be told of its messages.
func (s *session) decideFeedLocked(e *endings) {
	x := &s.exchanges
	if x.feed == nil || x.state == halfOpen {
		return
	}
	e.feed = x.feed
	e.noMore = !x.adding && !x.toldNoMore
	x.toldNoMore = x.toldNoMore || e.noMore
	said := s.out.written >= x.end || s.out.err != nil || x.graceOver || s.closed
	e.left = x.state == halfClosed && said && (s.calls.state != halfClosed || s.over) // not before the connection is closed, if that is next
	switch {
	case e.left:
		x.feed = nil
		x.stopGraceLocked()
	case x.state == halfClosed && x.grace == nil:
		s.limitGraceLocked(sessionWriteTimeout)
	}
}

// decideCloseLocked ends the connection if both halves are over and all is written. It
// reports whether the caller has to do that. Who has opened it says so first, and waits
// for the peer to close: until then that may name a target, and has to be told that
// nothing is served.
func (s *session) decideCloseLocked() bool {
	written := s.out.unwritten() == 0
	switch {
	case s.calls.state != halfClosed || s.exchanges.state != halfClosed || s.ending || s.closed:
	case !s.opened && (written || s.exchanges.graceOver):
		s.ending = true
		return true
	case s.opened && !s.closing && s.out.err == nil && written:
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

// end lets the reader return, who closes the connection.
func (s *session) end() {
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	_ = s.conn.SetReadDeadline(time.Unix(1, 0))
}

// checkFailedLocked lets the messages go elsewhere that a failed write has not written,
// and ends what this end serves. What was written may yet be answered. The caller holds
// mu.
func (s *session) checkFailedLocked() {
	if s.out.err == nil || s.failed {
		return
	}
	s.failed = true
	s.calls.drainLocked()
	s.calls.refuseLocked(func(_ uint32, c *call) bool { return c.end > s.out.written })
	s.exchanges.abandonLocked()
	if !errors.Is(s.out.err, syscall.EPIPE) && !errors.Is(s.out.err, syscall.ECONNRESET) {
		s.ending = true // the other end is there, and could not be told
		_ = s.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// finish lets nothing begin any more, in either direction. The connection is closed
// after the last exchange; finish reports whether that is about to happen.
func (s *session) finish() bool {
	s.mu.Lock()
	s.calls.drainLocked()
	s.stopServingLocked()
	s.unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing || s.ending || s.closed
}

// isIdle reports whether no exchange is under way.
func (s *session) isIdle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls.pending)+len(s.exchanges.pending) == 0
}

// checkIdle finishes the session if it has not been used for the idle time.
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

// flush writes what is queued, and what is queued meanwhile. With yield, that is where
// other goroutines are likely to queue frames at this moment, it lets them run first.
// It does not block: what the socket does not take is left to a goroutine. It reports
// whether the socket has taken something.
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

// nextChunk returns what is to be written next. If there is nothing, writing has
// ended.
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
	if x := &s.exchanges; err != nil || x.state == halfClosed && x.feed != nil { // the queue waits for that
		s.unlock()
		return
	}
	s.mu.Unlock()
}

// writeRest writes what the socket did not take at once, and what is queued meanwhile.
func (s *session) writeRest(c chunk, from int) {
	for ok := true; ok; c, ok = s.nextChunk() {
		n, err := s.writeSlowly(c.data[from:])
		s.wrote(c, from+n, err)
		from = 0
	}
}

// writeSlowly writes the data in parts, each of which may take its time.
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

// writeDeadline returns until when the peer has to take what is written next: all that
// is left, once the session has nothing else to do.
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

// attempt writes without waiting. It is made once, as each write would otherwise need
// memory of its own.
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

// errUnsent is the outcome of a message that was certainly not served: it may be sent
// again.
var errUnsent = errors.New("not sent")

// errNoAnswer is the outcome of a message that may have been served.
var errNoAnswer = fmt.Errorf("acknowledgement: %w", io.ErrUnexpectedEOF)
