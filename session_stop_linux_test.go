package acomm_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Stop of a listener or tracker that has sessions.

func TestSession_StopUnderLoadLosesNothing(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s.sock")
	rounds := 15
	if *long {
		rounds = 500
	}
	processWithSessions(t)
	s := startNotes(t, path, 0, nil)
	var next atomic.Int64
	for range rounds {
		type result struct {
			id  int
			err error
		}
		results := make(chan result, 100000)
		var acks counter
		var senders sync.WaitGroup
		for range 32 {
			senders.Go(func() {
				for range 3000 {
					id := int(next.Add(1))
					err := acomm.Send(s.URL(), note{ID: id})
					results <- result{id, err}
					if err != nil {
						return
					}
					acks.add()
				}
			})
		}
		requireReached(t, &acks, 200, "acknowledgements")
		within(t, async(func() { s.Stop(0) }), "Stop")
		within(t, s.served, "the end of serving")
		within(t, async(senders.Wait), "the senders")
		close(results)
		for r := range results {
			if r.err == nil {
				require.Equal(t, 1, s.handled(r.id), "acknowledged")
			} else {
				require.Equal(t, 0, s.handled(r.id), "handled, but %v", r.err)
				// The last two are for who connected and was not accepted, which it learns
				// from its read or already from its write.
				require.True(t, errors.Is(r.err, fs.ErrNotExist) || errors.Is(r.err, syscall.ECONNREFUSED) ||
					errors.Is(r.err, syscall.ECONNRESET) || errors.Is(r.err, syscall.EPIPE), "%v", r.err)
			}
		}
		require.NoError(t, s.Start())
		s.serve(nil)
		require.NoError(t, acomm.Send(s.URL(), note{ID: int(next.Add(1))}), "found at once")
	}
}

// Those that nobody has taken are told that they were not read.
func TestSession_StopWithATimeoutTellsWhatWasNotRead(t *testing.T) {
	processWithSessions(t)
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	sent := sendAsync(ul.URL(), note{})
	within(t, async(func() { serveOne(ul) }), "the first exchange")
	require.NoError(t, within(t, sent, "the first"))
	await(t, "the session", func() bool { return acomm.SessionTo(ul.URL().Path).Open })

	const number, handed = 20, 7
	outcomes := make(map[int]<-chan error)
	for id := range number {
		outcomes[id] = sendAsync(ul.URL(), note{ID: id})
	}
	await(t, "all", func() bool { return acomm.SessionTo(ul.URL().Path).InFlight == number })
	taken := make(map[int]bool)
	for range handed {
		conn := take(t, ul)
		var n note
		require.NoError(t, acomm.UnmarshalConnData(conn, &n))
		taken[n.ID] = true
	}
	within(t, async(func() { ul.Stop(moment) }), "Stop")
	require.Nil(t, ul.NextConn())
	for id, outcome := range outcomes {
		err := within(t, outcome, "an outcome")
		if taken[id] {
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%d", id)
		} else {
			require.ErrorIs(t, err, fs.ErrNotExist, "%d", id)
		}
	}
	require.Len(t, taken, handed)
	await(t, "the connection to be forgotten", func() bool { return acomm.SessionTo("").Opened == 0 })
}

// Hazard: a listener that stops can't be told that a sender has given up, and
// waited for ever for a handler that waits for it.
func TestSession_StopEndsWithAHandlerThatWaitsForItsSender(t *testing.T) {
	inHand, ended := make(chan struct{}), make(chan error, 1)
	wait := func(conn net.Conn, _ note) {
		close(inHand)
		_, err := conn.Read(make([]byte, 1))
		ended <- err
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"wait": wait})
	processWithSessions(t)
	openTo(t, s.URL())
	sent := sendWithin(s.URL(), note{How: "wait"}, time.Second)
	within(t, inHand, "the handler")
	stopped := async(func() { s.Stop(0) })
	require.Error(t, within(t, sent, "the sender to give up"))
	require.ErrorIs(t, within(t, ended, "the handler's read"), io.EOF)
	within(t, stopped, "Stop")
}

// Hazard: a peer that reads slowly holds up Stop for many times the patience of a write.
func TestSession_SlowReaderHoldsUpStopForOneWriteTimeout(t *testing.T) {
	const wait = 300 * time.Millisecond
	setWriteTimeout(t, wait)
	const number = 34
	answer := errors.New(strings.Repeat("y", 256<<10)) // less than is read in the patience
	answered := make(chan struct{}, number)
	large := func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: answer})
		answered <- struct{}{}
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"large": large})
	conn := openRaw(t, s.Addr())
	message := `{"how":"large"}`
	for i := range uint32(number) {
		writeMessage(t, conn, i+1, message)
	}
	for range number {
		within(t, answered, "an answer to be queued")
	}
	start := time.Now()
	stopped := async(func() { s.Stop(0) })
	reading := async(func() { // something in each patience, so that no write takes longer
		buf := make([]byte, 25<<10)
		for {
			select {
			case <-stopped:
				return
			case <-time.After(wait / 16):
			}
			if _, err := conn.Read(buf); err != nil {
				return
			}
		}
	})
	within(t, stopped, "Stop")
	require.Less(t, time.Since(start), 5*wait)
	require.NoError(t, conn.Close())
	within(t, reading, "the peer")
}

// Hazard: a connection was still open when the last listener had stopped.
func TestSession_NothingIsLeftAfterTheLastStop(t *testing.T) {
	dir := shortDir(t)
	startNotes(t, filepath.Join(dir, "s.sock"), 0, nil).Stop(0) // the runtime opens what it needs
	before := openFiles(t)
	rounds := 200
	for i := range rounds {
		s := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
		openTo(t, s.URL())
		sendMany(t, s.URL(), 0, 4)
		s.Stop(0)
		await(t, fmt.Sprintf("all descriptors to be closed, after %d", i), func() bool { return openFiles(t) <= before })
		require.Zero(t, acomm.SessionTo("").Opened)
		within(t, s.served, "the end of serving")
	}
}

// The same for a process that keeps connections to others only.
func TestSession_NothingIsLeftAfterTheLastTracker(t *testing.T) {
	l := newRawListenerAlone(t)
	before := openFiles(t)
	for i := range 50 {
		tracker, err := acomm.NewTracker("", nil, patience)
		require.NoError(t, err)
		require.NoError(t, tracker.Start())
		conn := l.open()
		stopped := async(tracker.Stop)
		requireClosing(t, conn)
		within(t, stopped, "Stop")
		await(t, fmt.Sprintf("all descriptors to be closed, round %d", i), func() bool { return openFiles(t) <= before })
		require.Zero(t, acomm.SessionTo("").Opened)
	}
}
