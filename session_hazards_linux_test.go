package acomm_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a reviewer found in sessions: each test is for one hazard.

// Hazard: a listener that says stop and does not close left the sender's
// connection open for ever, beyond the last Stop of the process.
func TestSession_StoppedWithoutAClosedConnectionIsClosed(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	sent := sendAsync(l.addr, note{})
	number, _ := l.message(conn)
	l.write(conn, rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, sent, "an exchange"))
	l.write(conn, rawFrame(frameStop, 0, number, ""))
	requireFrame(t, conn, frameStop, 0)
	require.ErrorIs(t, readOne(conn), io.EOF, "it does not wait for ever for the listener to close")
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

// Hazard: answers that the sender does not read were kept without bound. Hazard:
// where their number was bounded by reading no further, two ends that did so waited
// for each other.
func TestSession_SenderThatReadsNothingIsServedNoFurther(t *testing.T) {
	refusal := errors.New(strings.Repeat("y", 32<<10))
	answered := make(chan struct{})
	large := func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: refusal})
		answered <- struct{}{}
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"large": large})
	conn := openRaw(t, s.Addr())
	message := `{"how":"large","data":"` + strings.Repeat("x", 8<<10) + `"}`
	sent := uint32(0)
	send := func() {
		sent++
		_, err := conn.Write(rawFrame(frameMessage, uint32(len(message)), sent, message))
		require.NoError(t, err)
	}
	require.Equal(t, 20<<20, acomm.MaxUnsentAnswers)
	for acomm.SessionTo(s.Addr()).UnsentAnswers <= acomm.MaxUnsentAnswers {
		send()
		within(t, answered, "an answer")
	}
	served := int(sent)
	for range acomm.MaxInFlightBytes / 2 / len(message) { // more than a socket holds: it is taken from there
		send()
	}
	answers, stopped := 0, -1
	for {
		kind, n, payload, err := readFrame(conn)
		if err != nil {
			if !errors.Is(err, syscall.ECONNRESET) { // something of the last messages was not taken
				require.ErrorIs(t, err, io.EOF, "closed when all was said")
			}
			break
		}
		if kind == frameStop {
			stopped = int(n)
			continue
		}
		require.Greater(t, len(payload), len(refusal.Error()))
		answers++
	}
	require.Equal(t, served, stopped, "the sender knows what is not served")
	require.Equal(t, served, answers, "and has all answers to what is")
	require.Equal(t, served, s.handled(0))
	require.NoError(t, acomm.Send(s.URL(), note{}))
}

// Hazard: what its sender had given up on was kept without bound while no handler took
// it.
func TestSession_CancelledMessagesAheadOfHandlersAreBounded(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	t.Cleanup(func() { ul.Stop(time.Nanosecond) })
	go func() { // the first exchange, and no other
		conn := ul.NextConn()
		_ = acomm.UnmarshalConnData(conn, &note{})
		_ = acomm.SendConnData(conn, &acomm.Response{})
		ul.DoneConn(conn)
	}()
	conn := openRaw(t, ul.Addr())
	message := strings.Repeat("x", 60<<10)
	const number = 3 * acomm.MaxInFlightBytes / (60 << 10)
	for n := range uint32(number) { // until the listener has closed: nothing waits for an answer
		frames := slices.Concat(rawFrame(frameMessage, uint32(len(message)), n+1, message), rawFrame(frameCancel, 0, n+1, ""))
		if _, err := conn.Write(frames); err != nil {
			require.ErrorIs(t, err, syscall.EPIPE)
			break
		}
	}
	kind, last, _, err := readFrame(conn)
	require.NoError(t, err)
	require.EqualValues(t, frameStop, kind)
	require.Greater(t, int(last)*len(message), acomm.MaxInFlightBytes)
	require.Less(t, int(last)*len(message), 2*acomm.MaxInFlightBytes+2*acomm.MaxMessage)
}

// Hazard: what was given up stayed in the queue of a listener that reads nothing, and
// further messages joined it.
func TestSession_QueueToAListenerThatReadsNothingIsBounded(t *testing.T) {
	l := newRawListener(t)
	l.open()
	data := strings.Repeat("x", 60<<10)
	for range 4 {
		var sent []<-chan error
		for range 40 {
			sent = append(sent, sendWithin(l.addr, note{Data: data}, 50*time.Millisecond))
		}
		for _, result := range sent {
			require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
		}
	}
	require.Less(t, acomm.SessionTo(l.addr.Path).Unwritten, uint64(acomm.MaxInFlightBytes+acomm.MaxMessage+1<<10))
}

// Hazard: a message that is given up while it waits to be written lends its memory
// to the next ones, and arrives as something else.
func TestSession_MemoryOfAMessageThatWaitsIsNotUsedAgain(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	const number = 12
	response := func(letter byte) *acomm.Response {
		raw := json.RawMessage(`"` + strings.Repeat(string(letter), 30<<10) + `"`)
		return &acomm.Response{ID: string(letter), Result: &raw}
	}
	var sent []<-chan error
	for i := range number {
		sent = append(sent, sendWithin(l.addr, response('a'+byte(i)), time.Second))
	}
	await(t, "all", func() bool { return acomm.SessionTo(l.addr.Path).InFlight == number })
	awaitBlocked(t, "acomm.(*session).writeRest", 1) // what fits is in the socket
	for _, result := range sent {
		require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
	}

	const others = 3 * number // that hold what memory they find
	var holding sync.WaitGroup
	defer holding.Wait()
	for range others {
		a, b := net.Pipe()
		defer a.Close() // all of them before the Wait
		holding.Go(func() { _ = acomm.SendConnData(b, response('!')) })
	}
	awaitBlocked(t, "net.(*pipe).write", others)

	for range number {
		_, payload := l.message(conn)
		var resp acomm.Response
		require.NoError(t, json.Unmarshal([]byte(payload), &resp))
		require.NotContains(t, payload, "!")
		require.Equal(t, string(*response(resp.ID[0]).Result), string(*resp.Result))
	}
}

// Hazard: the number of sessions was looked at before many were opened at once, and those
// that were being opened did not count.
func TestSession_ManyAtOnceKeepToTheLimit(t *testing.T) {
	var old syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old))
	dir := shortDir(t)
	var all []*noteService
	for i := range 100 {
		all = append(all, startNotes(t, filepath.Join(dir, strconv.Itoa(i)), 0, nil))
	}
	low := old
	low.Cur = 8 * 60
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low))
	defer func() { require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old)) }()
	var sending sync.WaitGroup
	for _, s := range all {
		sending.Go(func() {
			if err := acomm.Send(s.URL(), note{ID: 1}); err != nil {
				t.Error(err)
			}
		})
	}
	sending.Wait()
	for _, s := range all {
		await(t, "the session, if there is to be one", func() bool { return !acomm.SessionTo(s.Addr()).Opening })
	}
	require.LessOrEqual(t, acomm.SessionTo("").Opened, 60)
	require.Positive(t, acomm.SessionTo("").Opened)
}

// Hazard: a listener waited at its stop for what this process sends on the session by
// which its messages came, for as long as there was something.
func TestSessionBoth_StopWaitsForNoCallsOfTheOtherDirection(t *testing.T) {
	b := newRawB(t, nil)
	b.target(t)
	writeMessage(t, b.x, 1, `{"id":7}`)
	requireAccepted(t, b.x, 1)
	require.NoError(t, b.y.Close()) // that session is not what is waited for
	var ended gate
	ctx, end := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	data := strings.Repeat("x", 60_000)
	for range 30 { // more than the peer takes at a time
		sending.Go(func() {
			for ctx.Err() == nil && acomm.Send(b.l.addr, note{Data: data}) == nil {
				continue
			}
		})
	}
	await(t, "a full session", func() bool { return acomm.SessionTo(b.l.addr.Path).InFlight == 30 })
	stopped := async(func() { b.s.Stop(0) })
	seen := make(chan struct{})
	reading := async(func() { // it reads on, and lets them send more
		for {
			kind, number, _, err := readFrame(b.x)
			if err != nil {
				return
			}
			switch kind {
			case frameStop:
				close(seen)
				ended.wait(ctx)
			case frameMessage:
				_, _ = b.x.Write(rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
			}
		}
	})
	within(t, seen, "the stop to be read")
	within(t, stopped, "Stop, with messages still unread")
	end()
	sending.Wait()
	require.NoError(t, b.x.Close())
	within(t, reading, "the peer")
}
