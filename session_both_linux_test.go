package acomm_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Sessions that carry messages both ways.

func TestSessionBoth_TrackersResponsesTravelOnTheSessionOfTheRequests(t *testing.T) {
	startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil).Stop(0) // the runtime opens what it needs
	before := openFiles(t)
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "t.sock"), nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	r := startResponder(t, respond, nil)
	call := func(text string) error {
		req, responses := newRequest(t, tracker.URL(), text)
		if err := tracker.TrackRequest(req, patience); err != nil {
			return err
		}
		if err := acomm.Send(r.URL(), req); err != nil {
			return err
		}
		resp := <-responses
		var back string
		if err := resp.UnmarshalResult(&back); err != nil || back != text || len(responses) > 0 {
			return fmt.Errorf("%q came back as %q, %w, and %d more", text, back, err, len(responses))
		}
		return nil
	}
	openRequests(t, r)
	await(t, "the target", func() bool {
		require.NoError(t, call("first"))
		require.NoError(t, within(t, r.replied, "its acknowledgement"))
		return acomm.SessionTo(tracker.URL().Path).Carried
	})
	files := openFiles(t)
	const callers, calls = 32, 20
	results := make(chan error, callers*calls)
	for c := range callers {
		go func() {
			for i := range calls {
				results <- call(fmt.Sprint(c, i))
			}
		}()
	}
	for range callers * calls {
		require.NoError(t, within(t, results, "a response"))
		require.NoError(t, within(t, r.replied, "its acknowledgement"))
	}
	require.LessOrEqual(t, openFiles(t), files, "no connection in addition")
	require.True(t, acomm.SessionTo(tracker.URL().Path).Carried, "still")
	require.Equal(t, 2, acomm.SessionTo("").Opened, "one each way")
	require.Empty(t, r.replied)

	r.Stop(0)
	within(t, r.served, "the end of serving")
	tracker.Stop()
	require.Zero(t, acomm.SessionTo("").Opened)
	require.LessOrEqual(t, openFiles(t), before)
}

// Not only is the other connection there: everything goes by it.
func TestSessionBoth_AllMessagesTravelOnTheSessionThatCarries(t *testing.T) {
	ways := make(chan string, 1000)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]handling{
		"way": func(conn net.Conn, _ note) {
			way, err := cameBy(conn)
			ways <- fmt.Sprint(way, err)
			_ = acomm.SendConnData(conn, &acomm.Response{})
		},
	})
	r := startResponder(t, replyNote, nil)
	carryBoth(t, r, h.URL())
	peers := h.peersNow()
	const number = 300
	sent := make(chan error, number)
	for i := range number {
		go func() { sent <- acomm.Send(h.URL(), note{ID: i, How: "way"}) }()
	}
	for range number {
		require.NoError(t, within(t, sent, "an acknowledgement"))
		require.Equal(t, fmt.Sprint(r.URL().Path, error(nil)), within(t, ways, "a message"))
	}
	for i := range number {
		require.Equal(t, 1, h.handled(i))
	}
	require.Len(t, h.peersNow(), len(peers), "to handlers it is the session that is theirs")
}

func TestSessionBoth_ConnectionThatIsLostLosesWhatWasWrittenOnly(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	first, second := sendAsync(a.l.addr, note{ID: 1}), sendAsync(a.l.addr, note{ID: 2})
	requireFrame(t, a.x, frameMessage, 1)
	requireFrame(t, a.x, frameMessage, 2)
	require.NoError(t, a.x.Close())
	require.ErrorIs(t, within(t, first, "an outcome"), io.ErrUnexpectedEOF)
	require.ErrorIs(t, within(t, second, "an outcome"), io.ErrUnexpectedEOF)
	later := sendAsync(a.l.addr, note{ID: 3})
	require.Contains(t, requireFrame(t, a.y, frameMessage, 2), `"id":3`, "it goes elsewhere")
	acceptMessage(t, a.y, 2)
	require.NoError(t, within(t, later, "the next one"))
}

func TestSessionBoth_IdleMeansNeitherDirectionIsUsed(t *testing.T) {
	const rest = 60 * time.Millisecond
	setIdleTimeout(t, rest)
	hold, release := holdThenAccept()
	defer release()
	b := newRawB(t, map[string]handling{"hold": hold})
	b.target(t)
	writeMessage(t, b.x, 1, `{"id":1,"how":"hold"}`)
	await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
	require.NoError(t, b.x.SetReadDeadline(time.Now().Add(4*rest)))
	require.ErrorIs(t, readOne(b.x), os.ErrDeadlineExceeded, "it is in use, if not by those who made it")
	require.NoError(t, b.x.SetReadDeadline(time.Now().Add(patience)))
	release()
	requireAccepted(t, b.x, 1)
	requireFrame(t, b.x, frameStop, 1)
	requireClosing(t, b.x)
	await(t, "it to be forgotten", func() bool { return !acomm.SessionTo(b.l.addr.Path).Known })
	b.x = b.l.open() // the next
	b.requireBackward(t)
}

func TestSessionBoth_AfterIdlenessBothOpenAnew(t *testing.T) {
	setIdleTimeout(t, 50*time.Millisecond)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	r := startResponder(t, replyNote, nil)
	for range 2 {
		carryBoth(t, r, h.URL())
		sendMany(t, h.URL(), 1, 10)
		await(t, "the rest", func() bool { return acomm.SessionTo("").Opened == 0 })
	}
	require.False(t, acomm.SessionTo(h.URL().Path).Known || acomm.SessionTo(r.URL().Path).Known)
	require.Equal(t, 2, h.handled(1))
}

// What was written before a write failed may yet be answered, on a connection that
// carries both directions as on any other.
func TestSessionBoth_AfterAFailedWriteAnswersAreRead(t *testing.T) {
	b := newRawB(t, nil)
	b.target(t)
	first := sendAsync(b.l.addr, note{ID: 1})
	number, _ := b.l.message(b.x)
	require.NoError(t, b.x.(*net.UnixConn).CloseRead())
	second := sendAsync(b.l.addr, note{ID: 2})
	require.Equal(t, 2, b.l.serveAlone().ID, "it goes elsewhere")
	require.NoError(t, within(t, second, "the second"))
	acceptMessage(t, b.x, number)
	require.NoError(t, within(t, first, "the first"))
}
