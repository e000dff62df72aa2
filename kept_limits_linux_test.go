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

// The limits of kept connections: their number, their rest, and the numbers of
// their messages.

// setRest shortens the rest of connections. Call it before anything is started.
func setRest(t testing.TB, rest time.Duration) {
	old := acomm.SetKeptRest(rest)
	t.Cleanup(func() { acomm.SetKeptRest(old) })
}

func TestKept_SenderClosesWhatRests(t *testing.T) {
	const rest = 100 * time.Millisecond
	setRest(t, rest)
	l := newRawListener(t)
	conn := l.keep()
	sent := sendAsync(l.addr, note{})
	number, _ := l.message(conn)
	// Not as long as an exchange is under way.
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(4*rest)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded)
	require.True(t, acomm.KeptAgreed(l.addr.Path), "the next message goes there")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	l.write(conn, keptFrame(keptAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, sent, "the acknowledgement"))
	require.ErrorIs(t, readOne(conn), io.EOF)
	await(t, "the connection to be forgotten", func() bool { return !acomm.KeptTo(l.addr.Path) })
}

func TestKept_ListenerClosesWhatRests(t *testing.T) {
	const rest = 100 * time.Millisecond
	setRest(t, rest)
	release := make(chan struct{})
	hold := func(conn net.Conn, _ note) {
		<-release
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]keptHandling{"hold": hold})
	conn := keepRaw(t, s.Addr())
	message := `{"how":"hold"}`
	_, err := conn.Write(keptFrame(keptMessage, uint32(len(message)), 1, message))
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(8*rest)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded, "an exchange is in hand")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	_, err = conn.Write(keptFrame(keptMessage, 2, 2, `{}`))
	require.NoError(t, err)
	for _, number := range []uint32{2, 1} {
		kind, answered, _, err := readKept(conn)
		require.NoError(t, err)
		require.Equal(t, []uint32{keptAnswer, number}, []uint32{kind, answered})
		if number == 2 {
			close(release)
		}
	}
	kind, number, _, err := readKept(conn)
	require.NoError(t, err)
	require.Equal(t, []uint32{keptStop, 2}, []uint32{kind, number}, "what comes now is not read")
	require.ErrorIs(t, readOne(conn), io.EOF)
}

func TestKept_ListenerKeepsSoManyAndNoMore(t *testing.T) {
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	for range acomm.KeptMost {
		keepRaw(t, s.Addr())
	}
	golden, err := os.ReadFile(filepath.Join("testdata", "wire", "ack-accepted.bin"))
	require.NoError(t, err)
	requirePlain(t, dialNamed(t, s.Addr()), golden)
}

func TestKept_SenderKeepsSoManyAndNoMore(t *testing.T) {
	dir := shortDir(t)
	var last *keptService
	for i := range acomm.KeptMost + 1 {
		last = startKept(t, filepath.Join(dir, strconv.Itoa(i)), 0, nil)
		if i < acomm.KeptMost {
			keep(t, last.URL())
		}
	}
	require.Equal(t, acomm.KeptMost, acomm.KeptConns())
	sendMany(t, last.URL(), 0, 10)
	require.Equal(t, acomm.KeptMost, acomm.KeptConns())
	for peer := range last.peersNow() {
		require.NotContains(t, peer, acomm.KeptName, "nothing is asked for that would not be used")
	}
}

func TestKept_NumbersGoOnWithZero(t *testing.T) {
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	keep(t, s.URL())
	acomm.SetKeptNumber(s.URL().Path, math.MaxUint32-50)
	s.SetKeptNumbers(math.MaxUint32 - 50)
	before := len(s.peersNow())
	sendMany(t, s.URL(), 0, 100)
	require.Len(t, s.peersNow(), before, "all on the connection that is kept")
}

func TestKept_StopIsUnderstoodAcrossZero(t *testing.T) {
	l := newRawListener(t)
	conn := l.keep()
	acomm.SetKeptNumber(l.addr.Path, math.MaxUint32-2)
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
	l.write(conn, keptFrame(keptStop, 0, 0, ""))
	for range number - len(before) {
		require.NotContains(t, before, l.serveAlone().ID, "it is served where it is")
	}
	for _, n := range before {
		l.write(conn, keptFrame(keptAnswer, uint32(len(accepted)), n, accepted))
	}
	for range number {
		require.NoError(t, within(t, results, "an acknowledgement"))
	}
}
