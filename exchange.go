package acomm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// exchange is a message of a session, for its handler a connection of its own: the
// message's plain frame can be read from it, and what is written to it, up to the end
// of a frame, answers the message.
type exchange struct {
	session *session
	number  uint32
	size    int // bytes of the message
	feed    *feed
	over    atomic.Bool // nothing more goes to the peer; set under the session's mu

	// Guarded by the session's mu.
	unread        []byte // of the message
	answer        []byte // written, not yet a frame
	closed        bool   // by the handler
	readDeadline  time.Time
	writeDeadline time.Time
	changed       chan struct{} // made by a Read that waits, closed to tell it to look again
}

// handedOut notes that NextConn returns the exchange.
func (e *exchange) handedOut() {
	e.feed.handed.Store(e.number)
	e.feed.ahead.Add(-int64(e.size + exchangeCost))
}

// takeFrame returns the payload of the message if nothing of it has been read; else
// nil, and Read says why.
func (e *exchange) takeFrame() []byte {
	e.session.mu.Lock()
	defer e.session.mu.Unlock()
	whole, err := frameLength(e.unread)
	if err != nil || whole == 0 || whole != len(e.unread) || e.closed || passed(e.readDeadline) {
		return nil
	}
	data := e.unread[headerSize:]
	e.unread = nil
	return data
}

// Read reads the message, then waits for the peer to be answered or to give up.
func (e *exchange) Read(p []byte) (int, error) {
	for {
		e.session.mu.Lock()
		n, again, err := e.readLocked(p)
		deadline := e.readDeadline
		e.session.mu.Unlock()
		if again == nil {
			return n, err
		}
		if deadline.IsZero() {
			<-again
			continue
		}
		timer := time.NewTimer(time.Until(deadline))
		select {
		case <-again:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// readLocked reads what is there. If it has to wait it returns a channel that is
// closed when it should be called again.
func (e *exchange) readLocked(p []byte) (int, <-chan struct{}, error) {
	switch {
	case e.closed:
		return 0, nil, opError("read", e, net.ErrClosed)
	case passed(e.readDeadline):
		return 0, nil, opError("read", e, os.ErrDeadlineExceeded)
	case len(p) == 0:
		return 0, nil, nil
	case len(e.unread) > 0:
		n := copy(p, e.unread)
		e.unread = e.unread[n:]
		return n, nil, nil
	case e.over.Load():
		return 0, nil, io.EOF
	}
	if e.changed == nil {
		e.changed = make(chan struct{})
	}
	return 0, e.changed, nil
}

// wakeLocked lets a Read that waits look again.
func (e *exchange) wakeLocked() {
	if e.changed != nil {
		close(e.changed)
		e.changed = nil
	}
}

// endLocked notes that nothing more goes to the peer, who has been answered or waits
// no more.
func (e *exchange) endLocked() {
	if e.over.Swap(true) {
		return
	}
	x := &e.session.exchanges
	delete(x.pending, e.number)
	x.size -= e.size
	e.wakeLocked()
}

// answerLocked queues the answer.
func (e *exchange) answerLocked(answer []byte) {
	e.session.sayLocked(frameAnswer, e.number, answer)
	e.endLocked()
}

// Write takes the answer. It goes to the peer with the end of its frame; there is
// nobody for what comes after.
func (e *exchange) Write(p []byte) (int, error) {
	e.session.mu.Lock()
	answer, err := e.writeLocked(p)
	if err != nil || answer == nil {
		e.session.mu.Unlock()
		if err != nil {
			return 0, opError("write", e, err)
		}
		return len(p), nil
	}
	e.answerLocked(answer)
	e.session.unlock()
	return len(p), nil
}

// writeLocked returns the answer if what is written makes it whole.
func (e *exchange) writeLocked(p []byte) ([]byte, error) {
	switch {
	case e.closed:
		return nil, net.ErrClosed
	case passed(e.writeDeadline):
		return nil, os.ErrDeadlineExceeded
	case e.over.Load():
		return nil, syscall.EPIPE
	}
	answer := p
	if len(e.answer) > 0 {
		e.answer = append(e.answer, p...)
		answer = e.answer
	}
	whole, err := frameLength(answer)
	switch {
	case err != nil: // the peer will say what is wrong with it
		e.answer = nil
		return answer[:headerSize], nil
	case whole > 0 && whole <= len(answer):
		e.answer = nil
		return answer[:whole], nil
	case len(e.answer) == 0:
		e.answer = append(e.answer, p...)
	}
	return nil, nil
}

// Close ends the exchange. A peer that was not answered is told so.
func (e *exchange) Close() error {
	e.session.mu.Lock()
	if e.closed {
		e.session.mu.Unlock()
		return opError("close", e, net.ErrClosed)
	}
	e.closed = true
	part := e.answer
	e.unread, e.answer = nil, nil
	e.wakeLocked()
	if e.over.Load() {
		e.session.mu.Unlock()
		return nil
	}
	e.answerLocked(part)
	e.session.unlock()
	return nil
}

func (e *exchange) LocalAddr() net.Addr  { return e.feed.local }
func (e *exchange) RemoteAddr() net.Addr { return e.feed.remote }

// SyscallConn gives access to the socket that the exchange shares with others, for
// the peer's credentials.
func (e *exchange) SyscallConn() (syscall.RawConn, error) {
	raw, err := e.session.conn.SyscallConn()
	return controlOnly{raw}, err
}

// controlOnly refuses to wait for the socket: whoever does keeps all others from it.
type controlOnly struct{ syscall.RawConn }

func (controlOnly) Read(func(uintptr) bool) error  { return errShared }
func (controlOnly) Write(func(uintptr) bool) error { return errShared }

var errShared = fmt.Errorf("the socket is shared with other exchanges, use the connection's own methods: %w", errors.ErrUnsupported)

func (e *exchange) SetDeadline(t time.Time) error      { return e.setDeadlines(t, true, true) }
func (e *exchange) SetReadDeadline(t time.Time) error  { return e.setDeadlines(t, true, false) }
func (e *exchange) SetWriteDeadline(t time.Time) error { return e.setDeadlines(t, false, true) }

func (e *exchange) setDeadlines(t time.Time, read, write bool) error {
	e.session.mu.Lock()
	defer e.session.mu.Unlock()
	if e.closed {
		return opError("set", e, net.ErrClosed)
	}
	if read {
		e.readDeadline = t
		e.wakeLocked()
	}
	if write {
		e.writeDeadline = t
	}
	return nil
}

// passed reports whether a deadline is set and has passed.
func passed(deadline time.Time) bool {
	return !deadline.IsZero() && !time.Now().Before(deadline)
}

func opError(op string, conn net.Conn, err error) error {
	return &net.OpError{Op: op, Net: "unix", Source: conn.LocalAddr(), Addr: conn.RemoteAddr(), Err: err}
}
