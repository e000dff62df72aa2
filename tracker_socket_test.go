package acomm_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a tracker answers on its socket, and to whom.

// requireClosed fails unless the tracker closes the connection without a word. It
// is a reset where the tracker has not read all of what it was sent.
func requireClosed(t testing.TB, conn net.Conn) {
	t.Helper()
	n, err := conn.Read(make([]byte, 1))
	require.Zero(t, n)
	require.True(t, errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET), err)
}

func TestTracker_SilentPeerIsClosedInTime(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	tracker.SetExchangeTimeout(10 * time.Millisecond)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	silent, half := dial(t, tracker.Addr()), dial(t, tracker.Addr())
	_, _ = half.Write([]byte{0, 0}) // fails if the time is up already
	requireClosed(t, silent)
	requireClosed(t, half)
}

func TestTracker_SlowHandlerDelaysNobody(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	tracker := newTracker(t)
	releaseOnce := sync.OnceFunc(func() { close(release) })
	t.Cleanup(releaseOnce)
	handle := func(*acomm.Request, *acomm.Response) {
		close(started)
		<-release
	}
	slow, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
	require.NoError(t, err)
	require.NoError(t, tracker.TrackRequest(slow, patience))
	sent := make(chan error, 1)
	go func() { sent <- slow.Respond(answerTo(t, slow, nil, nil)) }()
	within(t, started, "the slow handler")
	require.NoError(t, within(t, sent, "its acknowledgement"))
	requireWorking(t, tracker)

	hurried, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(hurried, time.Millisecond))
	within(t, responses, "a time-out")
	releaseOnce()
}

func TestTracker_UnknownIDIsAcknowledgedLoggedDropped(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	stranger, strangers := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	log := captureLog(t)
	require.NoError(t, stranger.Respond(answerTo(t, stranger, "result", nil)))
	require.Equal(t, 1, tracker.NumRequests())
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop() // waits for the exchange
	requireSilent(t, responses)
	requireSilent(t, strangers)
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
	require.Contains(t, log.String(), "id="+stranger.ID)
	require.Contains(t, log.String(), "addr="+tracker.Addr())
}

func TestTracker_BrokenFrameIsAnsweredByClosing(t *testing.T) {
	for name, frame := range map[string][]byte{
		"nothing":        {},
		"half a header":  {0, 0},
		"cut payload":    plainFrame(`{"id":"x"}`)[:8],
		"empty payload":  plainFrame(""),
		"bad JSON":       plainFrame(`{"id":`),
		"not an object":  plainFrame(`["id"]`),
		"a wrong member": plainFrame(`{"id":7}`),
		"not a URL":      plainFrame(`{"id":"x","stream_url":"http://%zz"}`),
		"too large":      binary.BigEndian.AppendUint32(nil, acomm.MaxPayload+1),
		"4 GiB":          {255, 255, 255, 255},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := newTracker(t)
			conn := dial(t, tracker.Addr())
			_, err := conn.Write(frame)
			require.NoError(t, err)
			if !strings.HasPrefix(name, "too") && name != "4 GiB" { // these are refused without an end
				require.NoError(t, conn.CloseWrite())
			}
			answer, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Empty(t, answer)
			requireWorking(t, tracker)
		})
	}
}

// Hazard: a null frame panics.
func TestTracker_NullFrameIsAnEmptyResponse(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	log := captureLog(t)
	for _, text := range []string{"null", "{}", `{"id":null,"result":null,"error":null,"stream_url":null}`} {
		conn := dial(t, tracker.Addr())
		_, err := conn.Write(plainFrame(text))
		require.NoError(t, err)
		var ack acomm.Response
		require.NoError(t, acomm.UnmarshalConnData(conn, &ack))
		require.NoError(t, ack.Error)
		rest, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Empty(t, rest)
	}
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop()
	requireSilent(t, responses)
	require.Equal(t, 3, strings.Count(log.String(), "\n"), log)
}

func TestTracker_ExchangesLeaveNothingBehind(t *testing.T) {
	const workers, each = 20, 500
	tracker := newTracker(t)
	requireWorking(t, tracker)
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for i := range each {
				req, responses := newRequest(t, tracker.URL(), i)
				if err := tracker.TrackRequest(req, patience); err != nil {
					t.Error(err)
					return
				}
				if err := req.Respond(&acomm.Response{ID: req.ID}); err != nil {
					t.Error(err)
					return
				}
				if resp := <-responses; resp.Error != nil {
					t.Error(resp.Error)
					return
				}
			}
		})
	}
	within(t, async(working.Wait), "all exchanges")
	require.Zero(t, tracker.NumRequests())
	// A goroutine that has done its work takes a moment to go.
	require.Eventually(t, func() bool { return openFiles(t) <= files }, patience, time.Millisecond)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+2 }, patience, time.Millisecond,
		"there were %d goroutines", goroutines)
}
