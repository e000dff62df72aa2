package acomm

import (
	"io"
	"math"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The numbers of messages go on with zero behind the greatest.

// setFirstMessage has sessions begin with another number. Call it before anything is
// started.
func setFirstMessage(t *testing.T, number uint32) {
	t.Helper()
	old := firstMessage
	firstMessage = number
	t.Cleanup(func() { firstMessage = old })
}

func TestSession_NumbersGoOnWithZero(t *testing.T) {
	setFirstMessage(t, math.MaxUint32-50)
	ul := NewUnixListener(filepath.Join(t.TempDir(), "s"), 0)
	require.NoError(t, ul.Start())
	var mu sync.Mutex
	peers := make(map[string]int) // messages by the name of the peer's socket
	served := make(chan struct{})
	go func() {
		defer close(served)
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			mu.Lock()
			peers[conn.RemoteAddr().String()]++
			mu.Unlock()
			if UnmarshalConnData(conn, new(any)) == nil {
				_ = SendConnData(conn, &Response{})
			}
			ul.DoneConn(conn)
		}
	}()
	defer func() {
		ul.Stop(0)
		<-served
	}()
	number := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(peers)
	}
	require.Eventually(t, func() bool {
		require.NoError(t, Send(ul.URL(), 0))
		return SessionTo(ul.Addr()).Open
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, Send(ul.URL(), 0))
	before := number()
	sent := make(chan error, 100)
	for i := range cap(sent) {
		go func() { sent <- Send(ul.URL(), i) }()
	}
	for range cap(sent) {
		require.NoError(t, <-sent)
	}
	require.Equal(t, before, number(), "all on one session")
}

func TestSession_StopIsUnderstoodAcrossZero(t *testing.T) {
	setFirstMessage(t, math.MaxUint32-1)
	s, peer := pairedSession(t)
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		s.read()
	}()
	_, err := io.CopyN(io.Discard, peer, int64(len(ownGreeting())))
	require.NoError(t, err)
	numbers := []uint32{math.MaxUint32 - 1, math.MaxUint32, 0, 1, 2, 3}
	outcomes := make(map[uint32]chan outcome)
	for _, number := range numbers {
		outcomes[number] = make(chan outcome, 1)
		go func() {
			frame := append(make([]byte, sessionHeaderSize), "{}"...)
			outcomes[number] <- s.call(time.Now().Add(10*time.Second), fileID{}, frame)
		}()
		got := make([]byte, sessionHeaderSize+2)
		_, err := io.ReadFull(peer, got)
		require.NoError(t, err)
		require.Equal(t, sessionFrameOf(frameMessage, number, []byte("{}")), got)
	}
	write := func(kind frameKind, number uint32, data []byte) {
		_, err := peer.Write(sessionFrameOf(kind, number, data))
		require.NoError(t, err)
	}
	write(frameStop, 0, nil)
	for _, number := range numbers[3:] {
		require.Equal(t, errUnsent, (<-outcomes[number]).err, "%d goes elsewhere", number)
	}
	for _, number := range numbers[:3] {
		require.Empty(t, outcomes[number], "%d is served where it is", number)
		write(frameAnswer, number, []byte("answer"))
		o := <-outcomes[number]
		require.NoError(t, o.err)
		require.Equal(t, "answer", string(o.answer))
	}
	requireEnd(t, peer)
	<-s.ended
	<-reading
}

// requireEnd reads that the session is over, and closes it.
func requireEnd(t *testing.T, peer net.Conn) {
	t.Helper()
	last := make([]byte, sessionHeaderSize)
	_, err := io.ReadFull(peer, last)
	require.NoError(t, err)
	require.Equal(t, sessionFrameOf(frameStop, firstMessage-1, nil), last)
	require.NoError(t, peer.Close())
}
