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

// exchange is the net.Conn that a handler gets for a message of a session. The handler
// reads the message from it as a plain frame. What it writes, up to the end of one frame,
// is the answer.
type exchange struct {
	session *session // immutable, as the next three
	number  uint32
	size    int // bytes of the message
	feed    *feed

	over atomic.Bool // answered, cancelled or abandoned: no answer is sent any more; set under the session's mu

	// Guarded by the session's mu.
	unread        []byte // the part of the frame that the handler has not read
	answer        []byte // written by the handler, not yet a whole frame
	closed        bool   // by the handler
	readDeadline  time.Time
	writeDeadline time.Time
	changed       chan struct{} // a Read that waits makes it; wakeLocked closes it
}

// handedOut records that NextConn returns the exchange.
func (e *exchange) handedOut() {
	e.feed.handed.Store(e.number)
	e.feed.ahead.Add(-int64(e.size + exchangeCost))
}

// takeFrame returns the payload of the message without copying it. If a part of it was
// read, or Read would fail, it returns nil.
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

// Read reads the message. Then it blocks until the exchange is over, and returns io.EOF.
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

// readLocked reads without blocking. If there is nothing to return yet, it returns a
// channel that is closed when readLocked should be called again.
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

// wakeLocked wakes the Reads that wait.
func (e *exchange) wakeLocked() {
	if e.changed != nil {
		close(e.changed)
		e.changed = nil
	}
}

// endLocked ends the exchange: it was answered, or its sender does not wait any more.
func (e *exchange) endLocked() {
	if e.over.Swap(true) {
		return
	}
	x := &e.session.exchanges
	delete(x.pending, e.number)
	x.size -= e.size
	e.wakeLocked()
}

// answerLocked queues the answer and ends the exchange.
func (e *exchange) answerLocked(answer []byte) {
	e.session.queueFrameLocked(frameAnswer, e.number, answer)
	e.endLocked()
}

// Write collects the answer and queues it when its frame is whole. Bytes after the frame
// are dropped; later writes fail with EPIPE.
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

// writeLocked returns the answer once its frame is whole; nil until then.
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
	case err != nil: // too long: the header alone lets the peer report that
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

// Close ends the exchange. If it has no answer, what was written of one is sent, often
// nothing, which tells the peer that there is none.
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

// SyscallConn gives access to the session's socket, for the peer's credentials.
func (e *exchange) SyscallConn() (syscall.RawConn, error) {
	raw, err := e.session.conn.SyscallConn()
	return controlOnly{raw}, err
}

// controlOnly refuses to wait for the socket: a handler that did would block all
// exchanges of the session.
type controlOnly struct{ syscall.RawConn }

func (controlOnly) Read(func(uintptr) bool) error  { return errShared }
func (controlOnly) Write(func(uintptr) bool) error { return errShared }

var errShared = fmt.Errorf("the exchanges of a session share the socket; use the methods of the connection: %w", errors.ErrUnsupported)

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
