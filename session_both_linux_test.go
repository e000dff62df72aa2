package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Sessions that carry messages both ways. As in PROTOCOL.md, A has opened the session X
// to a listener of B, and B the session Y to a listener of A, which is the hook of A's
// requests.

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

func TestSessionBoth_TargetedMessagesAreThoseOfTheSessionToTheirListener(t *testing.T) {
	found := make(chan error, 1)
	var b *rawB
	linked := make(chan struct{})
	b = newRawB(t, map[string]handling{"look": func(conn net.Conn, _ note) {
		<-linked
		var errs []error
		if local, remote := conn.LocalAddr().String(), conn.RemoteAddr().String(); local != b.s.Addr() || remote != b.y.LocalAddr().String() {
			errs = append(errs, fmt.Errorf("addresses: %s, %s", local, remote))
		}
		way, err := cameBy(conn)
		if way != b.l.addr.Path {
			err = errors.Join(err, fmt.Errorf("it came by %q", way))
		}
		conclude(found, append(errs, err, peerIsSelf(conn), acomm.SendConnData(conn, &acomm.Response{}))...)
	}})
	b.target(t)
	close(linked)
	b.requireBackward(t)
	for number := uint32(1); number <= 3; number++ {
		writeMessage(t, b.x, number, `{"id":1,"how":"look"}`)
		require.NoError(t, within(t, found, "the handler"))
		requireAccepted(t, b.x, number)
		b.requireBackward(t)
	}
	writeMessage(t, b.y, 2, `{"id":2}`) // Y stays as it is
	requireAccepted(t, b.y, 2)
	require.Equal(t, []int{3, 1}, []int{b.s.handled(1), b.s.handled(2)})
}

func TestSessionBoth_TargetedMessagesAreCancelled(t *testing.T) {
	inHand, ended := make(chan struct{}), make(chan error, 1)
	b := newRawB(t, map[string]handling{"wait": func(conn net.Conn, _ note) {
		close(inHand)
		ended <- errors.Join(
			expect("read", readOne(conn), io.EOF),
			expect("answer", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))
	}})
	b.target(t)
	sent := sendAsync(b.l.addr, note{}) // of the same number, in the other direction
	b.l.message(b.x)
	writeMessage(t, b.x, 1, `{"how":"wait"}`)
	within(t, inHand, "the handler")
	b.l.write(b.x, rawFrame(frameCancel, 0, 1, ""))
	require.NoError(t, within(t, ended, "the handler's read"))
	require.Empty(t, sent)
	acceptMessage(t, b.x, 1)
	require.NoError(t, within(t, sent, "the other one"))
	writeMessage(t, b.x, 2, `{}`)
	requireAccepted(t, b.x, 2)
}

func TestSessionBoth_TargetedMessagesBreakTheSessionAsOthersDo(t *testing.T) {
	for name, frame := range map[string][]byte{
		"number 0":    rawFrame(frameMessage, 2, 0, "{}"),
		"number 2":    rawFrame(frameMessage, 2, 2, "{}"),
		"too long":    rawFrame(frameMessage, acomm.MaxMessage+1, 1, "{}"), // the header is enough
		"kind 14":     rawFrame(14, 0, 1, ""),
		"no kind":     plainFrame("{}    "),
		"no target":   nil,
		"two targets": targetFrame(socketFile{}),
	} {
		t.Run(name, func(t *testing.T) {
			b := newRawB(t, nil)
			if frame == nil {
				frame = rawFrame(frameMessage, 2, 1, "{}")
			} else {
				b.target(t)
			}
			sent := sendAsync(b.l.addr, note{})
			b.l.message(b.x)
			b.l.write(b.x, frame)
			require.ErrorIs(t, within(t, sent, "an outcome"), io.ErrUnexpectedEOF)
			b.settle(t, b.y, 2)
		})
	}
}

// What comes after a target that is refused is not served. Another one may be named.
func TestSessionBoth_WrongTargetsAreRefused(t *testing.T) {
	for name, wrong := range map[string]func(f socketFile) socketFile{
		"inode":  func(f socketFile) socketFile { f.inode++; return f },
		"device": func(f socketFile) socketFile { f.device++; return f },
		"zeros":  func(socketFile) socketFile { return socketFile{} },
	} {
		t.Run(name, func(t *testing.T) {
			b := newRawB(t, nil)
			b.l.write(b.x, targetFrame(wrong(fileAt(t, b.s.Addr()))))
			writeMessage(t, b.x, 1, `{"id":5}`)
			writeMessage(t, b.x, 2, `{"id":5}`)
			b.requireRefused(t)
			b.l.write(b.x, rawFrame(frameCancel, 0, 2, ""))
			b.target(t)
			writeMessage(t, b.x, 1, `{"id":6}`)
			requireAccepted(t, b.x, 1)
			require.Equal(t, []int{0, 1}, []int{b.s.handled(5), b.s.handled(6)})
			b.requireBackward(t)
		})
	}
	t.Run("listener of another peer", func(t *testing.T) { // a forged token, or a token of one's own
		b := &rawB{l: newRawListener(t)}
		b.s = startNotes(t, filepath.Join(shortDir(t), "a.sock"), 0, nil)
		b.x = b.l.openWith(greaterToken)
		y := dialNamed(t, b.s.Addr(), acomm.SessionName)
		require.NoError(t, y.SetDeadline(time.Now().Add(patience)))
		_, err := greet(y, "fedcba9876543210")
		require.NoError(t, err)
		b.settle(t, y, 1)
		b.target(t)
		b.requireRefused(t)
	})
	t.Run("without a session", func(t *testing.T) {
		b := &rawB{l: newRawListener(t)}
		b.s = startNotes(t, filepath.Join(shortDir(t), "a.sock"), 0, nil)
		b.x = b.l.openWith(greaterToken)
		b.target(t)
		b.requireRefused(t)
	})
	t.Run("session that is over", func(t *testing.T) {
		b := newRawB(t, nil)
		require.NoError(t, b.y.Close())
		await(t, "its end", func() bool { return acomm.SessionTo(b.s.Addr()).Accepted == 0 })
		b.target(t)
		b.requireRefused(t)
	})
	t.Run("on a session to the listener", func(t *testing.T) {
		b := newRawB(t, nil)
		b.l.write(b.y, targetFrame(fileAt(t, b.s.Addr())))
		require.ErrorIs(t, readOne(b.y), io.EOF)
		b.requireBackward(t)
	})
	t.Run("while the listener stops", func(t *testing.T) {
		hold, release := holdThenAccept()
		defer release() // before the stop
		b := newRawB(t, map[string]handling{"hold": hold})
		writeMessage(t, b.y, 2, `{"how":"hold"}`)
		await(t, "the handler", func() bool { return b.s.handled(0) == 1 })
		target := targetFrame(fileAt(t, b.s.Addr()))
		stopped := async(func() { b.s.Stop(0) })
		requireFrame(t, b.y, frameStop, 2)
		b.l.write(b.x, target)
		b.requireRefused(t)
		release()
		requireAccepted(t, b.y, 2)
		within(t, stopped, "Stop")
	})
}

func TestSessionBoth_SoManyTargetsAndNoMore(t *testing.T) {
	b := newRawB(t, nil)
	for range 15 {
		b.l.write(b.x, targetFrame(socketFile{}))
		b.requireRefused(t)
	}
	b.target(t) // the last one
	writeMessage(t, b.x, 1, `{}`)
	requireAccepted(t, b.x, 1)
	b.s.Stop(0)
	requireFrame(t, b.x, frameStop, 1)
	b.l.write(b.x, targetFrame(socketFile{}))
	require.ErrorIs(t, readOne(b.x), io.EOF)
}

// A listener that stops leaves the session to another, and numbers begin anew.
func TestSessionBoth_AnotherTargetMayFollow(t *testing.T) {
	b := newRawB(t, nil)
	for served := range uint32(3) {
		b.target(t)
		for n := range served {
			writeMessage(t, b.x, n+1, `{"id":7}`)
			requireAccepted(t, b.x, n+1)
		}
		b.requireBackward(t) // so the target was read
		b.s.Stop(0)
		requireFrame(t, b.x, frameStop, served)
		requireFrame(t, b.y, frameStop, 1)
		require.ErrorIs(t, readOne(b.y), io.EOF)
		require.NoError(t, b.s.Start())
		b.s.serve(nil)
		b.openY(t)
	}
	require.Equal(t, 3, b.s.handled(7))
}

func init() { roles["session opener"] = sessionOpener }

// sessionOpener opens a session with a token of another process.
func sessionOpener() {
	name := fmt.Sprintf("%sopener-%d", acomm.SessionName, os.Getpid())
	conn, err := net.DialUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}, &net.UnixAddr{Name: os.Getenv("SERVICE"), Net: "unix"})
	orExit(err)
	_, err = greet(conn, map[string]string{"lesser": lesserToken, "greater": greaterToken}[os.Getenv("TOKEN")])
	orExit(err)
	text := os.Getenv("MESSAGE")
	_, err = conn.Write(rawFrame(frameMessage, uint32(len(text)), 1, text))
	orExit(err)
	_, _, _, err = readFrame(conn)
	orExit(err)
	fmt.Println("answered")
	for line := range commands {
		fmt.Println(line)
	}
}

// The kernel says who the peer is, whatever token it has heard of.
func TestSessionBoth_OtherProcessesAreRefusedWhateverTheyKnow(t *testing.T) {
	b := &rawB{l: newRawListener(t)}
	b.s = startNotes(t, filepath.Join(shortDir(t), "a.sock"), 0, nil)
	b.x = b.l.openWith(greaterToken)
	other := startProcess(t, "session opener", "SERVICE="+b.s.Addr(), "MESSAGE={}", "TOKEN=greater")
	require.Equal(t, "answered", other.ReadLine())
	b.target(t)
	b.requireRefused(t)
	b.openY(t)
	b.target(t) // the same from the process that has the session
	writeMessage(t, b.x, 1, `{}`)
	requireAccepted(t, b.x, 1)
}

func init() { roles["isolated sender"] = isolatedSender }

// isolatedSender serves notes, and sends one for each line.
func isolatedSender() {
	ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
	orExit(ul.Start())
	go func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			_ = acomm.UnmarshalConnData(conn, &note{})
			_ = acomm.SendConnData(conn, &acomm.Response{})
			ul.DoneConn(conn)
		}
	}()
	fmt.Println("ready")
	for line := range commands {
		fmt.Println(acomm.Send(unixURL(line), note{}))
	}
}

// A process in another pid namespace is seen without a pid. All such processes look the
// same, so none of them is taken for the peer of another session.
func TestSessionBoth_PeersWithoutAPidAreNeverThePeer(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a pid namespace")
	}
	l := newRawListenerOf(t)
	socket := filepath.Join(shortDir(t), "a.sock")
	isolated := startProcessAs(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "isolated sender", "SOCKET="+socket)
	require.Equal(t, "ready", isolated.ReadLine())
	require.NoError(t, isolated.WriteLine(l.addr.Path))
	plain, _ := l.accept()
	l.write(plain, plainFrame(`{"error":"","sessions":1}`))
	require.Equal(t, "<nil>", isolated.ReadLine())
	b := &rawB{l: l, x: l.acceptSession()}
	l.write(b.x, []byte(acomm.Greeting+greaterToken))
	_, err := io.ReadFull(b.x, make([]byte, len(acomm.Greeting)+len(greaterToken)))
	require.NoError(t, err)
	b.y = openRawWith(t, socket, greaterToken)
	b.settle(t, b.y, 1)
	b.l.write(b.x, targetFrame(fileAt(t, socket)))
	b.requireRefused(t)
}

func TestSessionBoth_ResponsesTakeTheSessionOfTheirRequests(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	for number := uint32(1); number <= 3; number++ {
		a.request(t)
		a.requireResponse(t, a.x, number)
	}
	sent := sendAsync(a.l.addr, note{ID: 7}) // not only responses
	require.Equal(t, `{"id":7,"how":"","data":""}`, requireFrame(t, a.x, frameMessage, 4))
	acceptMessage(t, a.x, 4)
	require.NoError(t, within(t, sent, "the acknowledgement"))
}

// X may as well be opened after Y.
func TestSessionBoth_ASessionThatComesLaterCarriesBoth(t *testing.T) {
	l := newRawListener(t)
	r := startResponder(t, respond, nil)
	a := &rawA{l: l, r: r, y: l.open()}
	sent := sendAsync(l.addr, note{})
	requireFrame(t, a.y, frameMessage, 1)
	acceptMessage(t, a.y, 1)
	require.NoError(t, within(t, sent, "the acknowledgement"))
	a.x = openRaw(t, r.Addr())
	a.requireTarget(t)
	a.request(t)
	a.requireResponse(t, a.x, 1)
}

// What was sent behind a target that is refused goes to its listener all the same, and
// another one is named a few times.
func TestSessionBoth_RefusedTargetsAreNamedAFewTimes(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	onY := uint32(1)
	answerOnY := func(sent <-chan error) {
		onY++
		require.Equal(t, `{"id":1,"how":"","data":""}`, requireFrame(t, a.y, frameMessage, onY))
		acceptMessage(t, a.y, onY)
		require.NoError(t, within(t, sent, "the acknowledgement"))
	}
	for again := range 4 {
		for again > 0 && !acomm.SessionTo(a.l.addr.Path).Carried {
			answerOnY(sendAsync(a.l.addr, note{ID: 1}))
		}
		if again > 0 {
			a.requireTarget(t)
		}
		sent := sendAsync(a.l.addr, note{ID: 1})
		requireFrame(t, a.x, frameMessage, 1)
		a.l.write(a.x, rawFrame(frameStop, 0, 0, ""))
		answerOnY(sent)
	}
	for range 3 {
		answerOnY(sendAsync(a.l.addr, note{ID: 1}))
		a.request(t) // and no target before its acknowledgement
		onY++
		a.requireResponse(t, a.y, onY)
	}
}

// Hazard: who had left a target by itself, as its socket file was replaced, named another
// one, and a stop of the first was taken for one of the second.
func TestSessionBoth_NoOtherTargetBeforeAStop(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	require.NoError(t, os.Chmod(a.l.addr.Path, 0o700))
	lookEnds()
	a.y = a.l.open() // the kernel is asked again
	for number := uint32(1); number <= 5; number++ {
		a.request(t) // and no target before its acknowledgement
		a.requireResponse(t, a.y, number)
	}
	a.l.write(a.x, rawFrame(frameStop, 0, 5, ""))
	a.requireTarget(t)
}

// Sessions of other processes carry nothing, and so do those that the token decides
// against.
func TestSessionBoth_OnlyAPeersOwnSessionsCarryItsMessages(t *testing.T) {
	t.Run("another process", func(t *testing.T) {
		l := newRawListener(t)
		r := startResponder(t, respond, nil)
		y := l.open()
		text, err := json.Marshal(requestTo(l.addr, "task", ""))
		require.NoError(t, err)
		other := startProcess(t, "session opener", "SERVICE="+r.Addr(), "MESSAGE="+string(text), "TOKEN=lesser")
		require.Equal(t, "answered", other.ReadLine())
		requireFrame(t, y, frameMessage, 1)
		acceptMessage(t, y, 1)
		require.NoError(t, within(t, r.replied, "the responder"))
		require.False(t, acomm.SessionTo(l.addr.Path).Carried)
	})
	t.Run("greater token", func(t *testing.T) {
		l := newRawListener(t)
		r := startResponder(t, respond, nil)
		a := &rawA{l: l, r: r, y: l.openWith(greaterToken), x: openRawWith(t, r.Addr(), greaterToken)}
		for number := uint32(1); number <= 5; number++ {
			a.request(t)
			a.requireResponse(t, a.y, number)
		}
		require.False(t, acomm.SessionTo(l.addr.Path).Carried)
	})
}

// Hazard: a handler that sends waited for an acknowledgement behind messages that
// nobody took as long as it waited: each cost it a minute.
func TestSessionBoth_GivenUpMessagesDelayNoAcknowledgement(t *testing.T) {
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	held, release := make(chan struct{}, 1), make(chan struct{})
	replied := make(chan error, 1<<10)
	ul := serveEach(t, true, func(ul *acomm.UnixListener, conn net.Conn) {
		req := &acomm.Request{}
		err := acomm.UnmarshalConnData(conn, req)
		if err == nil {
			_ = acomm.SendConnData(conn, &acomm.Response{})
		}
		ul.DoneConn(conn)
		switch {
		case err != nil:
		case req.Task == "hold":
			held <- struct{}{}
			<-release
		case req.ResponseHook != nil:
			replied <- <-sendWithin(req.ResponseHook, note{}, patience/2)
		}
	})
	carryBoth(t, &responder{UnixListener: ul, replied: replied}, h.URL())
	require.NoError(t, acomm.Send(ul.URL(), requestTo(nil, "hold", "")))
	within(t, held, "the handler")
	const windows = 3 // one more than the listener takes
	data := strings.Repeat("x", 60<<10)
	for range windows {
		var sent []<-chan error
		for range inFlightBytes / (60 << 10) {
			sent = append(sent, sendWithin(ul.URL(), requestTo(h.URL(), "task", data), 100*time.Millisecond))
		}
		for _, result := range sent {
			require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
		}
	}
	close(release)
	for range 2 * inFlightBytes / (60 << 10) / 2 {
		require.NoError(t, within(t, replied, "a reply"))
	}
	within(t, async(func() { ul.Stop(time.Nanosecond) }), "Stop") // hazard: it waited for the reader
}

func TestSessionBoth_ListenerThatStopsSaysSoOnTheSessionThatCarries(t *testing.T) {
	hold, release := holdThenAccept()
	defer release() // before the stop
	b := newRawB(t, map[string]handling{"hold": hold})
	b.target(t)
	writeMessage(t, b.x, 1, `{"id":1,"how":"hold"}`)
	await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
	stopped := async(func() { b.s.Stop(0) })
	requireFrame(t, b.x, frameStop, 1)
	writeMessage(t, b.x, 2, `{"id":2}`) // it has crossed the stop
	b.requireBackward(t)                // each direction stops by itself
	select {
	case <-stopped:
		require.Fail(t, "Stop waits for the handler")
	default:
	}
	release()
	requireAccepted(t, b.x, 1)
	within(t, stopped, "Stop")
	require.Zero(t, b.s.handled(2))
	b.requireBackward(t)
}

func TestSessionBoth_ListenerOutOfTimeSaysWhatWasHandedOut(t *testing.T) {
	l, ul := newRawListener(t), startListener(t, filepath.Join(shortDir(t), "a.sock"), 0)
	b := &rawB{l: l, x: l.openWith(greaterToken), y: openRawWith(t, ul.Addr(), greaterToken)}
	await(t, "the session", func() bool { return acomm.SessionTo(ul.Addr()).Accepted == 1 })
	first := async(func() {
		conn := ul.NextConn()
		_ = acomm.UnmarshalConnData(conn, &note{})
		_ = acomm.SendConnData(conn, &acomm.Response{})
		ul.DoneConn(conn)
	})
	b.settle(t, b.y, 1)
	within(t, first, "the first exchange")
	b.l.write(b.x, targetFrame(fileAt(t, ul.Addr())))
	var messages []byte
	for n := range uint32(3) {
		messages = append(messages, rawFrame(frameMessage, 2, n+1, "{}")...)
	}
	b.l.write(b.x, messages)
	take(t, ul) // and nobody the others
	stopped := async(func() { ul.Stop(moment) })
	kind, read, _, err := readFrame(b.x) // with the last one that it has read
	require.NoError(t, err)
	require.EqualValues(t, frameStop, kind)
	requireFrame(t, b.x, frameStop, 1)
	require.EqualValues(t, 3, read)
	require.Empty(t, requireFrame(t, b.x, frameAnswer, 1), "nobody will answer it")
	within(t, stopped, "Stop")
	b.requireBackward(t)
}

func TestSessionBoth_StoppedMessagesGoElsewhereOnce(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	const number, served = 6, 2
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(a.l.addr, note{ID: i}) }()
	}
	handled := make(map[int]int)
	for n := range uint32(number) {
		var message note
		require.NoError(t, json.Unmarshal([]byte(requireFrame(t, a.x, frameMessage, n+1)), &message))
		if n < served {
			handled[message.ID]++
		}
	}
	a.l.write(a.x, rawFrame(frameStop, 0, served, ""))
	onY := uint32(1)
	serveOnY := func() (n note) {
		onY++
		require.NoError(t, json.Unmarshal([]byte(requireFrame(t, a.y, frameMessage, onY)), &n))
		acceptMessage(t, a.y, onY)
		return n
	}
	for range number - served {
		handled[serveOnY().ID]++
		require.NoError(t, within(t, results, "those sent again"))
	}
	require.Empty(t, results, "the others wait")
	later := sendAsync(a.l.addr, note{ID: number})
	require.Equal(t, number, serveOnY().ID)
	require.NoError(t, within(t, later, "the next one"))
	for n := range uint32(served) {
		acceptMessage(t, a.x, n+1)
		require.NoError(t, within(t, results, "an answer after the stop"))
	}
	for i := range number {
		require.Equal(t, 1, handled[i], "%d", i)
	}
	a.last++
	writeMessage(t, a.x, a.last, `{}`) // the other direction goes on
	requireAccepted(t, a.x, a.last)
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

// The path decides, whoever has made the connection.
func TestSessionBoth_PathDecides(t *testing.T) {
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	other := startNotes(t, filepath.Join(shortDir(t), "o.sock"), 0, nil)
	r := startResponder(t, replyNote, nil)
	carryBoth(t, r, h.URL())
	sendMany(t, h.URL(), 1, 10)
	require.NoError(t, os.Rename(other.URL().Path, h.URL().Path))
	lookEnds()
	sendMany(t, h.URL(), 100, 1)
	sendMany(t, h.URL(), 101, 9)
	for i := range 10 {
		require.Equal(t, []int{1, 0}, []int{h.handled(1 + i), h.handled(100 + i)})
		require.Equal(t, []int{0, 1}, []int{other.handled(1 + i), other.handled(100 + i)})
	}
}

// The listener of A stops, under load.
func TestSessionBoth_StopOfTheHookLosesNothing(t *testing.T) {
	processWithSessions(t)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		r := startResponder(t, replyNote, nil) // a new X each time
		carryBoth(t, r, h.URL())
		there := sendOn(t, h.URL(), noteOf)
		back := sendOn(t, r.URL(), func(int) any { return requestTo(nil, "task", "") })
		requireReached(t, &there.acks, 100, "acknowledgements")
		requireReached(t, &back.acks, 100, "acknowledgements")
		within(t, async(func() { h.Stop(0) }), "Stop")
		within(t, h.served, "the end of serving")
		requireReached(t, &back.acks, back.acks.load()+100, "the other direction")
		for id, err := range there.end(t) {
			requireStopped(t, err, h.handled(id))
		}
		for _, err := range back.end(t) {
			require.NoError(t, err)
		}
		require.NotEmpty(t, h.ids, "handled")
		clear(h.ids)
		r.Stop(0)
		within(t, r.served, "the end of serving")
		require.NoError(t, h.Start())
		h.serve(nil)
	}
}

// The listener of B stops, under load: what B sends is delivered all the same.
func TestSessionBoth_StopOfTheResponderLosesNothing(t *testing.T) {
	processWithSessions(t)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		var mu sync.Mutex
		served := make(map[string]int) // requests, by their task
		r := startResponder(t, func(req *acomm.Request) error {
			mu.Lock()
			served[req.Task]++
			mu.Unlock()
			return replyNote(req)
		}, nil)
		carryBoth(t, r, h.URL())
		there := sendOn(t, h.URL(), noteOf)
		back := sendOn(t, r.URL(), func(id int) any { return requestTo(h.URL(), strconv.Itoa(id), "") })
		requireReached(t, &there.acks, 100, "acknowledgements")
		requireReached(t, &back.acks, 100, "acknowledgements")
		within(t, async(func() { r.Stop(0) }), "Stop")
		requireReached(t, &there.acks, there.acks.load()+100, "the other direction")
		for id, err := range there.end(t) {
			require.NoError(t, err)
			require.Equal(t, 1, h.handled(id))
		}
		within(t, r.served, "the end of serving")
		for id, err := range back.end(t) {
			requireStopped(t, err, served[strconv.Itoa(id)])
		}
		for len(r.replied) > 0 {
			require.NoError(t, <-r.replied)
		}
		clear(h.ids)
	}
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

// Hazard: the responses stayed on the connection of a listener that had stopped, and
// kept it, while the requests came by the next one.
func TestSessionBoth_AfterAStopTheNextConnectionCarriesBoth(t *testing.T) {
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 3 {
		r := startResponder(t, replyNote, nil)
		carryBoth(t, r, h.URL())
		r.Stop(0)
		require.False(t, acomm.SessionTo(h.URL().Path).Carried)
		require.NoError(t, acomm.Send(h.URL(), note{ID: 1}), "another way")
	}
	require.Equal(t, 3, h.handled(1))
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
	b.l.write(b.x, rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, first, "the first"))
}

// Hazard: a process that takes nothing, and goes on living, kept a connection open
// that nothing could be written to, and those who waited for answers on it.
func TestSessionBoth_TakingNothingEndsTheConnection(t *testing.T) {
	const limit = 200 * time.Millisecond
	defer acomm.SetSessionWriteTimeout(acomm.SetSessionWriteTimeout(limit))
	refusal := strings.Repeat("y", 1<<20) // more than a socket holds
	b := newRawB(t, map[string]handling{"large": func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)})
	}})
	defer b.s.Stop(0) // before the limit is what it was
	b.target(t)
	first := sendAsync(b.l.addr, note{ID: 1})
	b.l.message(b.x)
	writeMessage(t, b.x, 1, `{"how":"large"}`)
	require.ErrorIs(t, within(t, first, "the message that was read"), io.ErrUnexpectedEOF)
	await(t, "the connection to be gone", func() bool { return !acomm.SessionTo(b.l.addr.Path).Known })
	written, err := io.Copy(io.Discard, b.x)
	require.Positive(t, written)
	require.Less(t, written, int64(len(refusal)))
	if err != nil {
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	second := sendAsync(b.l.addr, note{ID: 2})
	require.Equal(t, 2, b.l.serveAlone().ID, "it goes on elsewhere")
	require.NoError(t, within(t, second, "the second"))
}

const inFlightBytes = 2 << 20 // bytes of JSON that may be unanswered

// dataUpTo is what makes a note have so many bytes of JSON.
func dataUpTo(how string, size int) string {
	text, err := json.Marshal(note{ID: 1, How: how})
	if err != nil {
		panic(err)
	}
	return strings.Repeat("x", size-len(text))
}

func TestSessionBoth_TooMuchUnansweredBreaksTheConnection(t *testing.T) {
	for _, targeted := range []bool{false, true} {
		t.Run(fmt.Sprint("targeted ", targeted), func(t *testing.T) {
			b := newRawB(t, map[string]handling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
			var conn net.Conn = b.y
			first := uint32(2)
			if targeted {
				b.target(t)
				conn, first = b.x, 1
			}
			const number = inFlightBytes / acomm.MaxMessage
			text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.MaxMessage)})
			require.NoError(t, err)
			for n := range uint32(number) {
				writeMessage(t, conn, first+n, string(text))
			}
			await(t, "all that may be unanswered", func() bool { return b.s.handled(1) == number })
			writeMessage(t, conn, first+number, `{}`)
			_, err = io.Copy(io.Discard, conn) // until it is closed
			require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
			require.Equal(t, number, b.s.handled(1))
		})
	}
}

// The same with an answer in between, and a message that is given up.
func TestSessionBoth_WhatIsAnsweredOrCancelledCountsNoMore(t *testing.T) {
	b := newRawB(t, map[string]handling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
	b.target(t)
	const number = inFlightBytes / acomm.MaxMessage // may be unanswered
	text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.MaxMessage)})
	require.NoError(t, err)
	const more = number + 3
	for n := range uint32(more) {
		writeMessage(t, b.x, n+1, string(text))
		b.l.write(b.x, rawFrame(frameCancel, 0, n+1, ""))
	}
	text, err = json.Marshal(note{ID: 1, Data: dataUpTo("", acomm.MaxMessage)})
	require.NoError(t, err)
	for n := range uint32(more) {
		writeMessage(t, b.x, more+n+1, string(text))
		requireAccepted(t, b.x, more+n+1)
	}
}

func TestSessionBoth_WhatIsOverTheLimitGoesAlone(t *testing.T) {
	for _, targeted := range []bool{false, true} {
		t.Run(fmt.Sprint("targeted ", targeted), func(t *testing.T) {
			var l *rawListener
			var conn net.Conn
			if targeted {
				a := newRawA(t)
				a.target(t)
				l, conn = a.l, a.x
			} else {
				l = newRawListener(t)
				conn = l.open()
			}
			const number, size = 50, 60 << 10
			const most = inFlightBytes / size
			results := make(chan error, number)
			data := dataUpTo("", size)
			for range number {
				go func() { results <- acomm.Send(l.addr, note{ID: 1, Data: data}) }()
			}
			for range most {
				_, payload := l.message(conn)
				require.Len(t, payload, size)
			}
			for range number - most {
				l.serveAlone()
				require.NoError(t, within(t, results, "one that went alone"))
			}
			require.Equal(t, most, acomm.SessionTo(l.addr.Path).InFlight)
			for n := range uint32(most) {
				acceptMessage(t, conn, n+1)
				require.NoError(t, within(t, results, "one that did not"))
			}
		})
	}
}

// Hazard: an end that reads nothing while its answers are not read waits for ever
// for another that does the same.
func TestSessionBoth_LargeRefusalsBothWaysEnd(t *testing.T) {
	for size, callers := range map[int]int{acomm.MaxMessage: 34, 17 * acomm.MaxMessage: 4} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			refusal := strings.Repeat("y", size)
			refuse := func(conn net.Conn) { _ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)}) }
			h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]handling{
				"refuse": func(conn net.Conn, _ note) { refuse(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"refuse": refuse})
			carryBoth(t, r, h.URL())
			data := strings.Repeat("x", 60<<10)
			const calls = 2
			results := make(chan error, 2*callers*calls)
			call := func(addr *url.URL, payload any) {
				for range calls {
					err := <-sendWithin(addr, payload, 5*time.Second) // it takes a moment, or a minute
					if err != nil && err.Error() == refusal {
						err = nil
					} else {
						err = fmt.Errorf("refused with: %w", err)
					}
					results <- err
				}
			}
			for range callers {
				go call(h.URL(), note{How: "refuse", Data: data})
				go call(r.URL(), requestTo(nil, "refuse", data))
			}
			for range cap(results) {
				require.NoError(t, within(t, results, "a refusal"))
			}
		})
	}
}

// One end serves one message after the other, and sends to the other end in between;
// there is more to be sent than may be under way.
func TestSessionBoth_ServingOneByOneEndsWithFullWindows(t *testing.T) {
	for _, slow := range []string{"requests", "responses"} {
		t.Run(slow, func(t *testing.T) {
			const callers = inFlightBytes/(60<<10) + 8
			data := strings.Repeat("x", 60<<10)
			replied, refused := make(chan error, callers+1), make(chan error, callers+1)
			r := serveEach(t, slow == "requests", func(ul *acomm.UnixListener, conn net.Conn) {
				req, ack := &acomm.Request{}, &acomm.Response{}
				if acomm.UnmarshalConnData(conn, req) != nil || req.Task == "refuse" {
					ack.Error = errors.New(data)
				}
				_ = acomm.SendConnData(conn, ack)
				ul.DoneConn(conn)
				if req.ResponseHook != nil {
					replied <- acomm.Send(req.ResponseHook, note{How: req.Task, Data: data})
				}
			})
			h := serveEach(t, slow == "responses", func(ul *acomm.UnixListener, conn net.Conn) {
				var n note
				_ = acomm.UnmarshalConnData(conn, &n)
				_ = acomm.SendConnData(conn, &acomm.Response{})
				ul.DoneConn(conn)
				if n.How == "large" {
					err := acomm.Send(r.URL(), requestTo(nil, "refuse", data))
					if err != nil && err.Error() == data {
						err = nil
					} else {
						err = fmt.Errorf("refused with %w", err)
					}
					refused <- err
				}
			})
			carryBoth(t, &responder{UnixListener: r, replied: replied}, h.URL())
			sent := make(chan error, callers)
			for range callers {
				go func() { sent <- acomm.Send(r.URL(), requestTo(h.URL(), "large", data)) }()
			}
			for range callers {
				require.NoError(t, within(t, sent, "a request"))
				require.NoError(t, within(t, replied, "its response"))
				require.NoError(t, within(t, refused, "what the handler of that sends"))
			}
		})
	}
}

// Hazard: an acknowledgement waits to be written together with others, of a handler
// that waits for the one who waits for it.
func TestSessionBoth_AcknowledgementsWaitForNoHandler(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	for _, busy := range []time.Duration{0, 200 * time.Millisecond} {
		t.Run(busy.String(), func(t *testing.T) {
			var returned gate // open once the senders have returned
			hold := func(conn net.Conn) {
				_ = acomm.SendConnData(conn, &acomm.Response{})
				for end := time.Now().Add(busy); time.Now().Before(end); {
				}
				returned.wait(t.Context())
			}
			h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]handling{
				"hold": func(conn net.Conn, _ note) { hold(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"hold": hold})
			defer returned.open() // before the stops
			carryBoth(t, r, h.URL())
			rounds, each := 50, 4
			if busy > 0 {
				rounds, each = 1, 2
			}
			for range rounds {
				var sent []<-chan error
				for range each {
					sent = append(sent,
						sendWithin(h.URL(), note{How: "hold"}, 5*time.Second),
						sendWithin(r.URL(), requestTo(nil, "hold", ""), 5*time.Second))
				}
				for _, result := range sent {
					require.NoError(t, within(t, result, "an acknowledgement"))
				}
				returned.open()
				returned.shut()
			}
		})
	}
}

// Hazard: a session was closed by who had opened it while a target and messages were on
// their way: what became of them was not known.
func TestSessionBoth_TargetThatCrossesTheEndIsRefused(t *testing.T) {
	setIdleTimeout(t, 50*time.Millisecond)
	b := newRawB(t, nil)
	requireFrame(t, b.x, frameStop, 0)
	for range 3 { // as often as it is named
		b.target(t)
		b.requireRefused(t)
	}
	require.NoError(t, b.x.Close())
	await(t, "its end", func() bool { return acomm.SessionTo("").Opened == 0 })
}

// A stop at number 0 that answers no target says that the session is over: who has
// accepted it closes it.
func TestSessionBoth_WhoHasAcceptedClosesWhatIsOver(t *testing.T) {
	a := newRawA(t)
	a.l.write(a.x, rawFrame(frameStop, 0, 0, ""))
	requireFrame(t, a.x, frameStop, 0)
	require.ErrorIs(t, readOne(a.x), io.EOF)
}
