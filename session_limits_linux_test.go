package acomm_test

import (
	"errors"
	"fmt"
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

// The limits of sessions: their number, their idle time, and what they hold.

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
	acceptMessage(t, conn, number)
	require.NoError(t, within(t, sent, "the acknowledgement"))
	requireClosing(t, conn)
	await(t, "the connection to be forgotten", func() bool { return !acomm.SessionTo(l.addr.Path).Known })
}

func TestSession_IdleSessionIsClosedByWhoAcceptedIt(t *testing.T) {
	const idle = 100 * time.Millisecond
	setIdleTimeout(t, idle)
	hold, release := holdThenAccept()
	defer release()
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"hold": hold})
	conn := openRaw(t, s.Addr())
	writeMessage(t, conn, 1, `{"how":"hold"}`)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(8*idle)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded, "an exchange is in hand")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	writeMessage(t, conn, 2, `{}`)
	requireAccepted(t, conn, 2)
	release()
	requireAccepted(t, conn, 1)
	requireFrame(t, conn, frameStop, 2) // what comes now is not read
	require.ErrorIs(t, readOne(conn), io.EOF)
}

func TestSession_ListenerAcceptsSoManyAndNoMore(t *testing.T) {
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	for range acomm.MaxSessions {
		openRaw(t, s.Addr())
	}
	requirePlain(t, dialNamed(t, s.Addr(), acomm.SenderName))
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

func init() { roles["few sender"] = fewSender }

// fewSender has few descriptors, and sends to each of many sockets.
func fewSender() {
	leaveFewDescriptors()
	ul := acomm.NewUnixListener(filepath.Join(os.TempDir(), "own.sock"), 0) // so that there are sessions
	orExit(ul.Start())
	failed := 0
	for line := range commands {
		if err := acomm.Send(unixURL(line), note{}); err != nil {
			failed++
		}
		fmt.Println(failed)
	}
}

// Hazard: connections at rest use up the descriptors, and what needs one fails.
func TestSession_IdleSessionsGiveWay(t *testing.T) {
	sender := startProcess(t, "few sender")
	dir := shortDir(t)
	for i := range 120 {
		s := startNotes(t, filepath.Join(dir, strconv.Itoa(i)+".sock"), 0, nil)
		require.NoError(t, sender.WriteLine(s.Addr()))
		require.Equal(t, "0", sender.ReadLine(), "sends that failed, of %d", i+1)
	}
}

func init() { roles["few listener"] = fewListener }

// fewListener serves with few descriptors.
func fewListener() {
	leaveFewDescriptors()
	ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
	orExit(ul.Start())
	fmt.Println("ready")
	serveAll(ul)
}

// Hazard: senders that keep their connections use up the descriptors of a listener, and
// those who come after them starve.
func TestSession_ListenerUsesAnEighthOfItsDescriptors(t *testing.T) {
	socket := filepath.Join(shortDir(t), "s.sock")
	listener := startProcess(t, "few listener", "SOCKET="+socket)
	require.Equal(t, "ready", listener.ReadLine())
	opened := 0
	for range 100 { // senders that stay, if they may
		conn := dialNamed(t, socket, acomm.SenderName)
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		require.NoError(t, acomm.SendConnData(conn, note{}))
		var ack struct {
			Sessions int `json:"sessions"`
		}
		require.NoError(t, acomm.UnmarshalConnData(conn, &ack))
		require.NoError(t, conn.Close())
		if ack.Sessions == 1 {
			openRaw(t, socket)
			opened++
		}
	}
	require.Equal(t, fewDescriptors/8, opened)
	require.NoError(t, acomm.Send(unixURL(socket), note{}), "one who comes after them")
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
		writeMessage(t, conn, sent, message)
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
	go serveOne(ul) // the first exchange, and no other
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
