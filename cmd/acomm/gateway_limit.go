package main

import (
	"container/list"
	"net"
	"net/http"
	"sync"
)

// limitedListener hands out a connection only while less than a number of them are
// open. The next one has the connection closed that has been idle for longest, and
// waits for that, or while none is idle. Unlike netutil's it returns them as they are:
// ProxyStreamHandler needs a TCP connection to cut off a client of HTTP/1.0.
type limitedListener struct {
	net.Listener
	limit     int
	changed   chan struct{} // holds a value when Accept should look again
	closed    chan struct{}
	closeOnce sync.Once

	mu      sync.Mutex // guards the fields below
	open    int
	idle    *list.List                 // of net.Conn, the longest idle one first
	byConn  map[net.Conn]*list.Element // in idle
	closing map[net.Conn]bool          // to make room, and not seen to be closed yet
}

func newLimitedListener(l net.Listener, limit int) *limitedListener {
	return &limitedListener{
		Listener: l, limit: limit, changed: make(chan struct{}, 1), closed: make(chan struct{}),
		idle: list.New(), byConn: make(map[net.Conn]*list.Element), closing: make(map[net.Conn]bool),
	}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	for !l.enter() {
		select {
		case <-l.changed:
		case <-l.closed:
			_ = conn.Close()
			return nil, net.ErrClosed
		}
	}
	return conn, nil
}

// enter takes a place if there is one. If not, it has one made, if it can.
func (l *limitedListener) enter() bool {
	l.mu.Lock()
	if l.open < l.limit {
		l.open++
		l.mu.Unlock()
		return true
	}
	oldest := l.idle.Front()
	if oldest == nil || len(l.closing) > 0 {
		l.mu.Unlock()
		return false
	}
	conn := oldest.Value.(net.Conn)
	l.useLocked(conn)
	l.closing[conn] = true
	l.mu.Unlock()
	_ = conn.Close()
	return false
}

func (l *limitedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// connState is to be the server's: each connection ends in one of the last states.
func (l *limitedListener) connState(conn net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch state {
	case http.StateIdle:
		if !l.closing[conn] {
			l.byConn[conn] = l.idle.PushBack(conn)
		}
	case http.StateActive:
		l.useLocked(conn)
	case http.StateClosed, http.StateHijacked:
		l.useLocked(conn)
		delete(l.closing, conn)
		l.open--
	}
	select {
	case l.changed <- struct{}{}:
	default: // it is going to look
	}
}

// useLocked notes that the connection is not idle.
func (l *limitedListener) useLocked(conn net.Conn) {
	if e := l.byConn[conn]; e != nil {
		l.idle.Remove(e)
		delete(l.byConn, conn)
	}
}
