package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Targets: messages to a peer's listener travel on the session that the peer has opened.

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
	go serveAll(ul)
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
	l := newRawListenerAlone(t)
	socket := filepath.Join(shortDir(t), "a.sock")
	isolated := startProcessAs(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "isolated sender", "SOCKET="+socket)
	require.Equal(t, "ready", isolated.ReadLine())
	require.NoError(t, isolated.WriteLine(l.addr.Path))
	plain, _ := l.accept()
	l.write(plain, []byte(offering))
	require.Equal(t, "<nil>", isolated.ReadLine())
	b := &rawB{l: l, x: l.acceptSession()}
	greetSender(t, b.x, greaterToken)
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
