package acomm_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a reviewer found in kept connections: each test is for one hazard.

// Hazard: two acknowledgements at once on a first connection both made the offer,
// and the second one's end closed a channel that was closed.
func TestKept_TwoAcknowledgementsAtOnceMakeOneOffer(t *testing.T) {
	both := func(conn net.Conn, _ note) {
		var writing sync.WaitGroup
		for range 2 {
			writing.Go(func() { _ = acomm.SendConnData(conn, &acomm.Response{}) })
		}
		writing.Wait()
	}
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]keptHandling{"both": both})
	for range 200 {
		conn := dialNamed(t, s.Addr())
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		require.NoError(t, acomm.SendConnData(conn, note{How: "both"}))
		_, _ = conn.Write([]byte(acomm.KeptHello)) // the offer may be off already
		require.NoError(t, acomm.UnmarshalConnData(conn, &acomm.Response{}))
		require.NoError(t, conn.Close())
	}
	require.NoError(t, acomm.Send(s.URL(), note{}))
}

// Hazard: a listener that says stop and does not close left the sender's
// connection open for ever, beyond the last Stop of the process.
func TestKept_StoppedWithoutAClosedConnectionIsClosed(t *testing.T) {
	l := newRawListener(t)
	conn := l.keep()
	sent := sendAsync(l.addr, note{})
	number, _ := l.message(conn)
	l.write(conn, keptFrame(keptAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, sent, "an exchange"))
	l.write(conn, keptFrame(keptStop, 0, number, ""))
	_, _, _, err := readKept(conn)
	require.ErrorIs(t, err, io.EOF)
	await(t, "the connection to be forgotten", func() bool { return acomm.KeptConns() == 0 })
}

// Hazard: a listener that stops can't be told that a sender has given up, and
// waited for ever for a handler that waits for it.
func TestKept_StopEndsWithAHandlerThatWaitsForItsSender(t *testing.T) {
	inHand, ended := make(chan struct{}), make(chan error, 1)
	wait := func(conn net.Conn, _ note) {
		close(inHand)
		_, err := conn.Read(make([]byte, 1))
		ended <- err
	}
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]keptHandling{"wait": wait})
	keepingProcess(t)
	keep(t, s.URL())
	sent := sendWithin(s.URL(), note{How: "wait"}, time.Second)
	within(t, inHand, "the handler")
	stopped := async(func() { s.Stop(0) })
	require.Error(t, within(t, sent, "the sender to give up"))
	require.ErrorIs(t, within(t, ended, "the handler's read"), io.EOF)
	within(t, stopped, "Stop")
}

// Hazard: a peer that acknowledges what it has not read left no room in the
// socket for the sender's word, which was written without a deadline and under
// the lock of all connections.
func TestKept_NoRoomForTheSendersWordBlocksNobody(t *testing.T) {
	l := newRawListener(t)
	for size := 180; size <= 240; size += 4 { // KiB, around what fits a socket
		sent := sendWithin(l.addr, note{Data: strings.Repeat("x", size<<10)}, 200*time.Millisecond)
		conn, err := l.Accept()
		require.NoError(t, err)
		_, err = conn.Write(plainFrame(`{"error":"","keep":1}`))
		require.NoError(t, err)
		<-sent // delivered, or too late: it ends
		other := acomm.NewUnixListener("", 0)
		within(t, async(func() { err = other.Start() }), "Start of another listener")
		require.NoError(t, err)
		other.Stop(0)
		require.NoError(t, conn.Close())
	}
}

// Hazard: answers that the sender does not read were kept without bound. Hazard:
// where their number was bounded by reading no further, two ends that did so waited
// for each other.
func TestKept_SenderThatReadsNothingIsServedNoFurther(t *testing.T) {
	refusal := errors.New(strings.Repeat("y", 32<<10))
	answered := make(chan struct{})
	large := func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: refusal})
		answered <- struct{}{}
	}
	s := startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]keptHandling{"large": large})
	conn := keepRaw(t, s.Addr())
	message := `{"how":"large","data":"` + strings.Repeat("x", 8<<10) + `"}`
	sent := uint32(0)
	send := func() {
		sent++
		_, err := conn.Write(keptFrame(keptMessage, uint32(len(message)), sent, message))
		require.NoError(t, err)
	}
	require.Equal(t, 20<<20, acomm.KeptQueue)
	for s.KeptAnswers() <= acomm.KeptQueue {
		send()
		within(t, answered, "an answer")
	}
	served := int(sent)
	for range acomm.KeptWindow / 2 / len(message) { // more than a socket holds: it is taken from there
		send()
	}
	answers, stopped := 0, -1
	for {
		kind, n, payload, err := readKept(conn)
		if err != nil {
			if !errors.Is(err, syscall.ECONNRESET) { // something of the last messages was not taken
				require.ErrorIs(t, err, io.EOF, "closed when all was said")
			}
			break
		}
		if kind == keptStop {
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
func TestKept_CancelledMessagesAheadOfHandlersAreBounded(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	t.Cleanup(func() { ul.Stop(time.Nanosecond) })
	go func() { // the first exchange, and no other
		conn := ul.NextConn()
		_ = acomm.UnmarshalConnData(conn, &note{})
		_ = acomm.SendConnData(conn, &acomm.Response{})
		ul.DoneConn(conn)
	}()
	conn := keepRaw(t, ul.Addr())
	message := strings.Repeat("x", 60<<10)
	const number = 3 * acomm.KeptWindow / (60 << 10)
	for n := range uint32(number) { // until the listener has closed: nothing waits for an answer
		frames := slices.Concat(keptFrame(keptMessage, uint32(len(message)), n+1, message), keptFrame(keptCancel, 0, n+1, ""))
		if _, err := conn.Write(frames); err != nil {
			require.ErrorIs(t, err, syscall.EPIPE)
			break
		}
	}
	kind, last, _, err := readKept(conn)
	require.NoError(t, err)
	require.EqualValues(t, keptStop, kind)
	require.Greater(t, int(last)*len(message), acomm.KeptWindow)
	require.Less(t, int(last)*len(message), 2*acomm.KeptWindow+2*acomm.KeptLimit)
}

// Hazard: what was given up stayed in the queue of a listener that reads nothing, and
// further messages joined it.
func TestKept_QueueToAListenerThatReadsNothingIsBounded(t *testing.T) {
	l := newRawListener(t)
	l.keep()
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
	require.Less(t, acomm.KeptUnwritten(l.addr.Path), uint64(acomm.KeptWindow+acomm.KeptLimit+1<<10))
}

// Hazard: a message that is given up while it waits to be written lends its memory
// to the next ones, and arrives as something else.
func TestKept_MemoryOfAMessageThatWaitsIsNotUsedAgain(t *testing.T) {
	l := newRawListener(t)
	conn := l.keep()
	const number = 12
	response := func(letter byte) *acomm.Response {
		raw := json.RawMessage(`"` + strings.Repeat(string(letter), 30<<10) + `"`)
		return &acomm.Response{ID: string(letter), Result: &raw}
	}
	var sent []<-chan error
	for i := range number {
		sent = append(sent, sendWithin(l.addr, response('a'+byte(i)), time.Second))
	}
	await(t, "all", func() bool { return acomm.KeptWaiting(l.addr.Path) == number })
	awaitBlocked(t, "acomm.(*batch).writeRest", 1) // what fits is in the socket
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
