package acomm_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What handlers do with the connection of a message that came on a session.

// behaviours is what handlers do, and what comes of it at the sender.
var behaviours = []struct {
	name string
	want error // of the sender
	sent time.Duration
	do   func(ul *acomm.UnixListener, conn net.Conn, others <-chan struct{}) error // closed when others were served
}{
	{name: "reads on after the acknowledgement", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		err := acomm.SendConnData(conn, &acomm.Response{})
		return errors.Join(err, expect("read", readOne(conn), io.EOF), expect("again", readOne(conn), io.EOF))
	}},
	{name: "reads before it, until its deadline", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{conn.SetReadDeadline(time.Now().Add(moment))}
		errs = append(errs, expect("read", readOne(conn), os.ErrDeadlineExceeded))
		errs = append(errs, expect("again", readOne(conn), os.ErrDeadlineExceeded))
		errs = append(errs, conn.SetReadDeadline(time.Time{}))
		errs = append(errs, acomm.SendConnData(conn, &acomm.Response{}))
		return errors.Join(append(errs, expect("after", readOne(conn), io.EOF))...)
	}},
	{name: "changes the deadline of its read", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{conn.SetReadDeadline(time.Now().Add(time.Hour))}
		read := make(chan error, 1)
		go func() { read <- readOne(conn) }()
		errs = append(errs, handlerReads())
		errs = append(errs, conn.SetDeadline(time.Unix(1, 0)), expect("read", <-read, os.ErrDeadlineExceeded))
		_, err := conn.Write([]byte("x"))
		errs = append(errs, expect("write", err, os.ErrDeadlineExceeded), conn.SetDeadline(time.Time{}))
		go func() { read <- readOne(conn) }()
		errs = append(errs, handlerReads())
		errs = append(errs, conn.SetReadDeadline(time.Unix(1, 0)), expect("second read", <-read, os.ErrDeadlineExceeded))
		return errors.Join(append(errs, acomm.SendConnData(conn, &acomm.Response{}))...)
	}},
	{name: "writes header and payload", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(frame[:4])
		_, err2 := conn.Write(frame[4:])
		return errors.Join(err, err2)
	}},
	{name: "writes byte by byte, and on", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		var errs []error
		for _, b := range plainFrame(`{"error":""}`) {
			n, err := conn.Write([]byte{b})
			if n != 1 || err != nil {
				errs = append(errs, fmt.Errorf("%d, %w", n, err))
			}
		}
		_, err := conn.Write([]byte{0})
		return errors.Join(append(errs, expect("write on", err, syscall.EPIPE))...)
	}},
	{name: "writes two frames at once", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(append(frame, frame...))
		_, again := conn.Write(frame)
		return errors.Join(err, expect("write on", again, syscall.EPIPE))
	}},
	{name: "acknowledges twice", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		err := acomm.SendConnData(conn, &acomm.Response{})
		err2 := expect("read", readOne(conn), io.EOF)
		return errors.Join(err, err2, expect("second", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))
	}},
	{name: "writes what is no frame", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		_, err := conn.Write([]byte("\x00\x00"))
		return err
	}},
	{name: "writes half a frame", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(frame[:len(frame)-1])
		return err
	}},
	{name: "announces too much", want: syscall.EMSGSIZE, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		_, err := conn.Write([]byte("HTTP/1.1 200 OK\r\n"))
		return err
	}},
	{name: "closes", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		return conn.Close()
	}},
	{name: "is done at once", want: io.ErrUnexpectedEOF, do: func(ul *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		ul.DoneConn(conn)
		var errs []error
		for _, f := range []func() error{
			func() error { return readOne(conn) },
			func() error { _, err := conn.Write([]byte("x")); return err },
			func() error { return conn.SetDeadline(time.Time{}) },
			func() error { return conn.SetReadDeadline(time.Time{}) },
			func() error { return conn.SetWriteDeadline(time.Time{}) },
			conn.Close,
		} {
			errs = append(errs, expect("after DoneConn", f(), net.ErrClosed))
		}
		return errors.Join(errs...)
	}},
	{name: "is done after it", do: func(ul *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{acomm.SendConnData(conn, &acomm.Response{})}
		ul.DoneConn(conn)
		_, err := conn.Write([]byte("x"))
		errs = append(errs, expect("write", err, net.ErrClosed), expect("read", readOne(conn), net.ErrClosed))
		errs = append(errs, expect("set", conn.SetDeadline(time.Time{}), net.ErrClosed), expect("close", conn.Close(), net.ErrClosed))
		return errors.Join(errs...)
	}},
	{name: "never acknowledges", sent: moment, want: os.ErrDeadlineExceeded, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{expect("read", readOne(conn), io.EOF)}
		return errors.Join(append(errs, expect("too late", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))...)
	}},
	{name: "acknowledges late", do: func(_ *acomm.UnixListener, conn net.Conn, others <-chan struct{}) error {
		<-others
		return acomm.SendConnData(conn, &acomm.Response{})
	}},
	{name: "asks who is there", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		var errs []error
		if conn.LocalAddr() == nil || conn.RemoteAddr() == nil || conn.LocalAddr().Network() != "unix" {
			errs = append(errs, fmt.Errorf("addresses: %v, %v", conn.LocalAddr(), conn.RemoteAddr()))
		}
		errs = append(errs, peerIsSelf(conn))
		return errors.Join(append(errs, acomm.SendConnData(conn, &acomm.Response{}))...)
	}},
}

// handlerReads waits until a handler waits for something to read.
func handlerReads() error {
	for deadline := time.Now().Add(patience); blockedIn("acomm.(*exchange).Read") == 0; {
		if time.Now().After(deadline) {
			return errors.New("the read does not wait")
		}
		runtime.Gosched()
	}
	return nil
}

func TestSession_HandlersDoAsTheyLike(t *testing.T) {
	found, release := make(chan error, 10), make(chan struct{})
	others := make(map[string]chan struct{})
	how := map[string]handling{
		"holds it for ever": func(conn net.Conn, _ note) {
			_ = acomm.SendConnData(conn, &acomm.Response{})
			<-release
		},
		"holds it unanswered": func(net.Conn, note) { <-release },
	}
	var s *noteService
	for _, b := range behaviours {
		served := make(chan struct{})
		others[b.name] = served
		how[b.name] = func(conn net.Conn, _ note) { conclude(found, b.do(s.UnixListener, conn, served)) }
	}
	s = startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, how)
	defer close(release) // before Stop
	openTo(t, s.URL())
	before := s.peersNow()

	require.NoError(t, acomm.Send(s.URL(), note{How: "holds it for ever"}))
	unanswered := sendAsync(s.URL(), note{How: "holds it unanswered"})
	for i, b := range behaviours {
		t.Run(b.name, func(t *testing.T) {
			sent := sendWithin(s.URL(), note{How: b.name}, b.sent)
			sendMany(t, s.URL(), 1000*(i+1), 20)
			close(others[b.name])
			require.NoError(t, within(t, found, "the handler"))
			err := within(t, sent, "the sender")
			if b.want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, b.want)
			}
			sendMany(t, s.URL(), 1000*(i+1)+100, 20)
		})
	}
	require.Len(t, s.peersNow(), len(before), "all on the same connection")
	require.True(t, acomm.SessionTo(s.URL().Path).Open)
	require.Empty(t, unanswered)
}

// Hazard: a handler that waits for the socket itself holds it up for all others.
func TestSession_NobodyWaitsForTheSocketItself(t *testing.T) {
	results := make(chan error, 10)
	waits := func(conn net.Conn, _ note) {
		raw, err := conn.(syscall.Conn).SyscallConn()
		if err != nil {
			results <- err
			return
		}
		results <- raw.Read(func(uintptr) bool { return false })
		results <- raw.Write(func(uintptr) bool { return false })
		results <- raw.Control(func(uintptr) {})
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"waits": waits})
	processWithSessions(t)
	openTo(t, s.URL())
	sent := sendAsync(s.URL(), note{How: "waits"})
	require.ErrorIs(t, within(t, results, "Read"), errors.ErrUnsupported)
	require.ErrorIs(t, within(t, results, "Write"), errors.ErrUnsupported)
	require.NoError(t, within(t, results, "Control"))
	require.NoError(t, within(t, sent, "the acknowledgement"))
}

// Hazard: a handler that reads on, also before it acknowledges, is given what begins a
// session as data.
func TestSession_AHandlerThatReadsOnSeesTheEnd(t *testing.T) {
	type end struct {
		n   int
		err error
	}
	ends := make(chan end, 1)
	reading := make(chan struct{})
	readsOn := func(conn net.Conn, _ note) {
		read := async(func() {
			close(reading)
			n, err := conn.Read(make([]byte, 100))
			ends <- end{n, err}
		})
		<-reading
		_ = acomm.SendConnData(conn, &acomm.Response{})
		<-read
	}
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"reads on": readsOn})
	processWithSessions(t)
	require.NoError(t, acomm.Send(s.URL(), note{How: "reads on"}))
	require.Equal(t, end{0, io.EOF}, within(t, ends, "the end"))
	await(t, "the session", func() bool { return acomm.SessionTo(s.Addr()).Open })
}

// Hazard: a frame goes past the wrapper, which may count, encrypt or log it.
func TestConnData_GoesThroughWrappersOfEveryConnection(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	handling := make(chan func(net.Conn) net.Conn, 1)
	conns := make(chan net.Conn, 1)
	served := async(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			conn = (<-handling)(conn)
			var n note
			if acomm.UnmarshalConnData(conn, &n) == nil {
				_ = acomm.SendConnData(conn, &acomm.Response{})
			}
			ul.DoneConn(conn)
			conns <- conn
		}
	})
	send := func(handle func(net.Conn) net.Conn) net.Conn {
		handling <- handle
		require.NoError(t, acomm.Send(ul.URL(), note{}))
		return within(t, conns, "the handler")
	}
	asWrapped := func(conn net.Conn) net.Conn { return wrap(wrap(conn)) }
	asItIs := func(conn net.Conn) net.Conn { return conn }

	first := send(asWrapped).(wrapped)
	for !acomm.SessionTo(ul.Addr()).Open {
		send(asItIs)
		await(t, "the session, or none", func() bool { return acomm.SessionTo(ul.Addr()).Open || !acomm.SessionTo(ul.Addr()).Opening })
	}
	exchange := send(asWrapped).(wrapped)
	require.True(t, acomm.SessionTo(ul.Addr()).Open)
	inner := func(w wrapped) net.Conn { return w.Conn.(wrapped).Conn }
	require.NotEqual(t, fmt.Sprintf("%T", inner(first)), fmt.Sprintf("%T", inner(exchange)), "one of each kind")
	for _, conn := range []wrapped{first, exchange} {
		require.NotZero(t, conn.reads.load(), "%T", inner(conn))
		require.Equal(t, 1, conn.writes.load(), "%T", inner(conn))
	}
	within(t, async(func() { ul.Stop(0) }), "Stop")
	within(t, served, "the end of the loop")
}

func init() { roles["other groups"] = otherGroups }

// otherGroups listens with a supplementary group, and gives it up before it serves.
func otherGroups() {
	ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
	orExit(syscall.Setgroups([]int{4242}))
	orExit(ul.Start())
	orExit(syscall.Setgroups(nil))
	fmt.Println("ready")
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		req, err := takeRequest(ul, conn, func(*acomm.Request) {})
		if err == nil {
			err = req.Respond(&acomm.Response{ID: req.ID})
		}
		orExit(err)
	}
}

// Hazard: on a connection that goes the other way the kernel names the groups that a
// process had when it began to listen, not those of the sender of the message.
func TestSessionBoth_HandlersSeeTheGroupsOfTheSender(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can set its groups")
	}
	const soPeerGroups = 59
	groups := make(chan int, 1)
	hook := startListener(t, filepath.Join(shortDir(t), "hook.sock"), 0)
	go func() {
		for conn := hook.NextConn(); conn != nil; conn = hook.NextConn() {
			number := -1
			raw, err := conn.(syscall.Conn).SyscallConn()
			if err == nil {
				_ = raw.Control(func(fd uintptr) {
					var buf [64]byte
					size := uint32(len(buf))
					_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, soPeerGroups,
						uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&size)), 0)
					if errno == 0 {
						number = int(size) / 4
					}
				})
			}
			if acomm.UnmarshalConnData(conn, &acomm.Response{}) == nil {
				_ = acomm.SendConnData(conn, &acomm.Response{})
			}
			hook.DoneConn(conn)
			groups <- number
		}
	}()
	socket := filepath.Join(shortDir(t), "s.sock")
	provider := startProcess(t, "other groups", "SOCKET="+socket)
	require.Equal(t, "ready", provider.ReadLine())
	for i := range 30 {
		require.NoError(t, acomm.Send(unixURL(socket), &acomm.Request{ID: strconv.Itoa(i), Task: "task", ResponseHook: hook.URL()}))
		require.Zero(t, within(t, groups, "the response"), "response %d", i)
	}
}
