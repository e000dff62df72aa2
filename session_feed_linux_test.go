package acomm

import (
	"net"
	"path/filepath"
	"testing"

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
