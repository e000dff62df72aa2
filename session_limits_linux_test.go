package acomm_test

import (
	"encoding/json"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The limits of sessions: their number, their idle time, and the numbers of
// their messages.

func TestSession_IdleSessionIsClosedByWhoOpenedIt(t *testing.T) {
	const idle = 100 * time.Millisecond
	setIdleTimeout(t, idle)
	l := newRawListener(t)
	conn := l.open()
	sent := sendAsync(l.addr, note{})
	number, _ := l.message(conn)
	// Not as long as an exchange is under way.
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(4*idle)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded)
	require.True(t, acomm.SessionTo(l.addr.Path).Open, "the next message goes there")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	l.write(conn, rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, sent, "the acknowledgement"))
	requireClosing(t, conn)
	await(t, "the connection to be forgotten", func() bool { return !acomm.SessionTo(l.addr.Path).Known })
}

func TestSession_IdleSessionIsClosedByWhoAcceptedIt(t *testing.T) {
	const idle = 100 * time.Millisecond
	setIdleTimeout(t, idle)
	release := make(chan struct{})
	hold := func(conn net.Conn, _ note) {
		<-release
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"hold": hold})
	conn := openRaw(t, s.Addr())
	message := `{"how":"hold"}`
	_, err := conn.Write(rawFrame(frameMessage, uint32(len(message)), 1, message))
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(8*idle)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded, "an exchange is in hand")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	_, err = conn.Write(rawFrame(frameMessage, 2, 2, `{}`))
	require.NoError(t, err)
	for _, number := range []uint32{2, 1} {
		kind, answered, _, err := readFrame(conn)
		require.NoError(t, err)
		require.Equal(t, []uint32{frameAnswer, number}, []uint32{kind, answered})
		if number == 2 {
			close(release)
		}
	}
	kind, number, _, err := readFrame(conn)
	require.NoError(t, err)
	require.Equal(t, []uint32{frameStop, 2}, []uint32{kind, number}, "what comes now is not read")
	require.ErrorIs(t, readOne(conn), io.EOF)
}

func TestSession_ListenerAcceptsSoManyAndNoMore(t *testing.T) {
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	for range acomm.MaxSessions {
		openRaw(t, s.Addr())
	}
	golden, err := os.ReadFile(filepath.Join("testdata", "wire", "ack-accepted.bin"))
	require.NoError(t, err)
	requirePlain(t, dialNamed(t, s.Addr(), acomm.SenderName), golden)
}

func TestSession_ProcessOpensSoManyAndNoMore(t *testing.T) {
	dir := shortDir(t)
	var last *noteService
	for i := range acomm.MaxSessions + 1 {
		last = startNotes(t, filepath.Join(dir, strconv.Itoa(i)), 0, nil)
		if i < acomm.MaxSessions {
			openTo(t, last.URL())
		}
	}
	require.Equal(t, acomm.MaxSessions, acomm.SessionTo("").Opened)
	sendMany(t, last.URL(), 0, 10)
	require.Equal(t, acomm.MaxSessions, acomm.SessionTo("").Opened)
	for peer := range last.peersNow() {
		require.NotContains(t, peer, acomm.SenderName, "nothing is asked for that would not be used")
	}
}

// setFirstMessage has sessions begin with another number. Call it before anything is
// started.
func setFirstMessage(t testing.TB, number uint32) {
	old := acomm.SetFirstMessage(number)
	t.Cleanup(func() { acomm.SetFirstMessage(old) })
}

func TestSession_NumbersGoOnWithZero(t *testing.T) {
	setFirstMessage(t, math.MaxUint32-50)
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	openTo(t, s.URL())
	before := len(s.peersNow())
	sendMany(t, s.URL(), 0, 100)
	require.Len(t, s.peersNow(), before, "all on one session")
}

func TestSession_StopIsUnderstoodAcrossZero(t *testing.T) {
	setFirstMessage(t, math.MaxUint32-1)
	l := newRawListener(t)
	conn := l.open()
	const number = 6 // two before zero, zero, and three after it
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(l.addr, note{ID: i}) }()
	}
	before := make(map[int]uint32)
	for range number {
		n, payload := l.message(conn)
		var message note
		require.NoError(t, json.Unmarshal([]byte(payload), &message))
		if n == math.MaxUint32-1 || n == math.MaxUint32 || n == 0 {
			before[message.ID] = n
		}
	}
	require.Len(t, before, 3)
	l.write(conn, rawFrame(frameStop, 0, 0, ""))
	for range number - len(before) {
		require.NotContains(t, before, l.serveAlone().ID, "it is served where it is")
	}
	for _, n := range before {
		l.write(conn, rawFrame(frameAnswer, uint32(len(accepted)), n, accepted))
	}
	for range number {
		require.NoError(t, within(t, results, "an acknowledgement"))
	}
}
