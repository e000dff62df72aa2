package acomm

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pairedSession is a session as if this process had opened it, and its other end.
func pairedSession(t *testing.T) (*session, net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	peer, err := l.Accept()
	require.NoError(t, err)
	s, err := newSession(conn.(*net.UnixConn), true, "", fileID{})
	require.NoError(t, err)
	s.greeted = true
	s.calls.openLocked(fileID{})
	return s, peer
}

func newTestQueue(t *testing.T) *acceptQueue {
	t.Helper()
	s, err := bind(filepath.Join(t.TempDir(), "q"), 0)
	require.NoError(t, err)
	q := newAcceptQueue(s, true)
	t.Cleanup(func() {
		q.leave()
		s.close()
	})
	return q
}

// Hazard: a listener that stopped aborted the session that served another one by then:
// its messages were said not to be served, and handed out.
func TestFeed_AListenerThatStopsAbortsItsOwnOnly(t *testing.T) {
	first, second := newTestQueue(t), newTestQueue(t)
	s, peer := pairedSession(t)
	serve := func(q *acceptQueue) *feed {
		s.mu.Lock()
		f := s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
		s.unlock()
		require.True(t, q.join(f))
		return f
	}
	before := serve(first)
	before.drain()
	now := serve(second)
	for _, late := range []func(){before.drain, before.abort, func() { first.left(before) }, func() { first.noMore(before) }} {
		late()
	}
	s.mu.Lock()
	require.Equal(t, halfOpen, s.exchanges.state)
	require.Equal(t, now, s.exchanges.feed)
	s.unlock()
	require.True(t, second.sessions[now])
	require.Empty(t, first.sessions)
	now.drain()
	require.Empty(t, second.sessions)

	go s.read()
	require.NoError(t, peer.Close())
	<-s.ended
}

// Hazard: the second stop came when all was answered and the peer had named another
// listener by then: it took the stop for that one's.
func TestFeed_AnAbortSaysNothingFurtherWhereAllIsAnswered(t *testing.T) {
	for _, pending := range []bool{false, true} {
		q := newTestQueue(t)
		s, peer := pairedSession(t)
		s.mu.Lock()
		f := s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
		want := sessionFrameOf(frameStop, 0, nil)
		if pending {
			require.NoError(t, s.messageLocked(sessionFrame{kind: frameMessage, number: 1, data: []byte("{}")}))
			want = append(sessionFrameOf(frameStop, 1, nil), want...)
		}
		s.unlock()
		require.True(t, q.join(f))
		f.abort()
		got := make([]byte, len(ownGreeting())+len(want))
		_, err := io.ReadFull(peer, got)
		require.NoError(t, err)
		require.Equal(t, want, got[len(ownGreeting()):])
		s.mu.Lock()
		require.Equal(t, uint64(len(got)), s.out.written)
		require.Zero(t, s.out.unwritten())
		s.exchanges.stopGraceLocked()
		s.mu.Unlock()
		require.NoError(t, peer.Close())
		require.NoError(t, s.conn.Close())
	}
}

// Hazard: a peer that goes on writing kept a session open that had nothing left to do,
// and whoever waited for its end.
func TestSession_ReaderOfAnEndedSessionReadsNoFurther(t *testing.T) {
	s, peer := pairedSession(t)
	go s.read()
	require.False(t, isOver(s))
	require.NoError(t, func() error { // a stop: nothing more is sent
		_, err := peer.Write(sessionFrameOf(frameStop, 0, nil))
		return err
	}())
	<-s.ended
	require.NoError(t, peer.Close())

	s, peer = pairedSession(t)
	s.ending = true
	require.ErrorIs(t, s.handle(), net.ErrClosed)
	require.NoError(t, peer.Close())
	require.NoError(t, s.conn.Close())
}

func isOver(s *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// Hazard: that a listener's last word was written was not looked at while the same
// goroutine went on to write something else, which the peer did not take.
func TestFeed_LeavesOnceItsLastWordIsWritten(t *testing.T) {
	q := newTestQueue(t)
	s, peer := pairedSession(t)
	s.mu.Lock()
	f := s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
	s.unlock()
	require.True(t, q.join(f))
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		s.read()
	}()
	// Two frames that no socket holds, and the stop between them.
	const size = 1 << 20
	add := func() {
		s.mu.Lock()
		s.out.add(frameAnswer, 99, make([]byte, sessionHeaderSize+size))
		s.unlock()
	}
	add()
	f.drain()
	add()
	q.mu.Lock()
	require.Len(t, q.sessions, 1, "its stop waits behind a frame")
	q.mu.Unlock()
	_, err := io.CopyN(io.Discard, peer, int64(len(ownGreeting())+sessionHeaderSize+size+sessionHeaderSize+1)) // one byte of the second
	require.NoError(t, err)
	left := make(chan struct{})
	go func() { // ends when the session has left, or the test
		for {
			q.mu.Lock()
			n := len(q.sessions)
			q.mu.Unlock()
			if n == 0 {
				close(left)
				return
			}
			runtime.Gosched()
		}
	}()
	select {
	case <-left:
	case <-time.After(10 * time.Second):
		t.Error("it has not left the queue")
		q.left(f)
	}
	require.NoError(t, peer.Close())
	<-s.ended
	<-reading
	<-left
}

// Hazard: the time for the peer to close began while answers were still to be written,
// and cut them off.
func TestSession_EndsAfterAllIsWritten(t *testing.T) {
	s, peer := pairedSession(t)
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		s.read()
	}()
	const size = 1 << 20 // more than a socket holds
	s.mu.Lock()
	s.out.add(frameAnswer, 99, make([]byte, sessionHeaderSize+size))
	s.unlock()
	require.False(t, s.finish(), "it is not about to end")
	_, err := io.CopyN(io.Discard, peer, int64(len(ownGreeting())+sessionHeaderSize+size))
	require.NoError(t, err)
	last := make([]byte, sessionHeaderSize)
	_, err = io.ReadFull(peer, last)
	require.NoError(t, err)
	require.Equal(t, sessionFrameOf(frameStop, 0, nil), last, "only then it says that it is over")
	require.NoError(t, peer.Close())
	<-s.ended
	<-reading
}

// Hazard: the session finished between the beginning of a feed and its joining, so the
// queue was told of an end first and of a beginning then: a Stop waited for ever.
func TestFeed_ThatHasEndedDoesNotStayInTheQueue(t *testing.T) {
	q := newTestQueue(t)
	s, peer := pairedSession(t)
	s.mu.Lock()
	s.timer = time.AfterFunc(time.Hour, s.checkIdle)
	f := s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
	s.calls.pending[1] = &call{outcome: make(chan outcome, 1)} // so the connection stays
	s.unlock()
	require.False(t, s.finish())
	f.join()
	require.Empty(t, q.sessions)
	require.NoError(t, peer.Close())
	s.read()
}

// Hazard: the reader had read a message that the listener was to serve when it aborted,
// and the peer was told nothing else: its Send failed, where the message was not served.
func TestFeed_MessagesThatTheQueueRefusesAreSaidNotToBeServed(t *testing.T) {
	q := newTestQueue(t)
	s, peer := pairedSession(t)
	s.mu.Lock()
	f := s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
	s.unlock()
	require.True(t, q.join(f))
	sessions := q.stop(true) // as abort begins
	frame := sessionFrameOf(frameMessage, 1, []byte("{}"))
	s.in.added(copy(s.in.space(), frame))
	require.NoError(t, s.handle())
	for _, each := range sessions { // and goes on
		each.abort()
	}
	s.uncork()
	want := append(ownGreeting(), sessionFrameOf(frameStop, 1, nil)...)
	want = append(want, sessionFrameOf(frameStop, 0, nil)...)
	got := make([]byte, len(want))
	require.NoError(t, peer.SetReadDeadline(time.Now().Add(10*time.Second)))
	n, _ := io.ReadFull(peer, got)
	require.Equal(t, want, got[:n])
	require.False(t, q.add([]net.Conn{peer}), "nothing is handed out any more")
	s.mu.Lock()
	require.Zero(t, s.out.unwritten())
	s.exchanges.stopGraceLocked()
	s.mu.Unlock()
	require.NoError(t, peer.Close())
	require.NoError(t, s.conn.Close())
}

func TestAcceptQueue_NoSessionJoinsAfterTheLastConnection(t *testing.T) {
	q := newTestQueue(t)
	f := &feed{queue: q}
	require.True(t, q.join(f))
	q.left(f)
	q.close()
	require.False(t, q.join(f))
}

// Hazard: after a cancel another target was named, and the late answer was taken for that
// of a new message: an acknowledgement of what nobody had read.
func TestSession_NoOtherTargetIsNamedAfterACancel(t *testing.T) {
	for _, cancel := range []bool{false, true} {
		q := newTestQueue(t)
		s, peer := pairedSession(t)
		s.opened = false
		s.mu.Lock()
		s.calls = calls{}
		s.serveLocked(q, peer.LocalAddr(), peer.RemoteAddr())
		s.unlock()
		require.True(t, s.carry(fileID{inode: 1}))
		if cancel {
			o := s.call(time.Now(), fileID{inode: 1}, append(make([]byte, sessionHeaderSize), "{}"...))
			require.ErrorIs(t, o.err, os.ErrDeadlineExceeded)
		}
		s.mu.Lock()
		require.NoError(t, s.stopLocked(s.calls.last))
		s.unlock()
		require.Equal(t, !cancel, s.mayCarry())
		require.NoError(t, peer.Close())
		require.NoError(t, s.conn.Close())
	}
}

// Hazard: the second stop of a listener that aborts counted as a refusal, and after a few
// of them nothing travelled on that session any more.
func TestSession_OnlyAStopBeforeAnyMessageIsARefusal(t *testing.T) {
	for want, stops := range map[bool][]uint32{true: {0}, false: {1, 0}} {
		s, peer := pairedSession(t)
		s.mu.Lock()
		for _, number := range stops {
			require.NoError(t, s.stopLocked(number))
		}
		require.Equal(t, want, s.calls.refused)
		s.mu.Unlock()
		require.NoError(t, peer.Close())
		require.NoError(t, s.conn.Close())
	}
}
