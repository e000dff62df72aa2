package acomm_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/mistifyio/acomm"
)

// asStranger runs f on a thread of its own, with the rights of another user and group.
func asStranger(t *testing.T, become func() syscall.Errno, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	within(t, async(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if errno := become(); errno != 0 {
			t.Error(errno)
			return
		}
		f()
	}), "the thread with other rights")
}

const nobody = 65534

func becomeNobody() syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, nobody, nobody, nobody)
	if errno == 0 {
		_, _, errno = syscall.RawSyscall(syscall.SYS_SETRESUID, nobody, nobody, nobody)
	}
	return errno
}

func setFileUser() syscall.Errno {
	_, _, _ = syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0)
	return 0
}

// Hazard: a thread that may not open the socket gets in on the connection of those who
// may; servers that act for their users have such threads.
func TestSession_AThreadWithoutTheRightGetsNowhere(t *testing.T) {
	for name, become := range map[string]func() syscall.Errno{"setresuid": becomeNobody, "setfsuid": setFileUser} {
		t.Run(name, func(t *testing.T) {
			s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
			require.NoError(t, os.Chmod(s.Addr(), 0o600))
			openTo(t, s.URL())
			asStranger(t, become, func() {
				for i := range 100 {
					if err := acomm.Send(s.URL(), note{ID: 1000 + i}); !errors.Is(err, fs.ErrPermission) {
						t.Errorf("message %d: %v", i, err)
					}
				}
			})
			for i := range 100 {
				require.Zero(t, s.handled(1000+i))
			}
			require.True(t, acomm.SessionTo(s.Addr()).Open, "others go on")
			require.NoError(t, acomm.Send(s.URL(), note{ID: 1}))
		})
	}
}

// Hazard: taking the right to connect away does nothing to an open session.
// Who has the right connects again, so that the kernel decides.
func TestSession_ChangedModeOrOwnerHasTheKernelAskedAgain(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"mode":  func(path string) error { return os.Chmod(path, 0o600) },
		"owner": func(path string) error { return os.Chown(path, os.Getuid(), os.Getgid()) },
	} {
		t.Run(name, func(t *testing.T) {
			s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
			openTo(t, s.URL())
			before := len(s.peersNow())
			require.NoError(t, change(s.Addr()))
			lookEnds()
			require.NoError(t, acomm.Send(s.URL(), note{ID: 2}))
			require.Greater(t, len(s.peersNow()), before)
		})
	}
}

// Hazard: a look at the path is noted before it is done, so those who send meanwhile go
// to the socket that was replaced.
func TestSession_ReplacedSocketGetsNothingFromABurst(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	for range 20 {
		dir := shortDir(t)
		inHand, release := make(chan struct{}), make(chan struct{})
		slow := func(conn net.Conn, _ note) {
			close(inHand)
			<-release
			_ = acomm.SendConnData(conn, &acomm.Response{})
		}
		old := startNotes(t, filepath.Join(dir, "s.sock"), 0, map[string]handling{"slow": slow})
		replacing := startNotes(t, filepath.Join(dir, "new.sock"), 0, nil)
		openTo(t, old.URL())
		sent := sendAsync(old.URL(), note{How: "slow"})
		within(t, inHand, "the slow exchange")
		require.NoError(t, os.Rename(replacing.Addr(), old.Addr()))
		lookEnds()
		var ready, sending sync.WaitGroup
		ready.Add(16)
		for i := range 16 {
			sending.Go(func() {
				ready.Done()
				ready.Wait()
				if err := acomm.Send(old.URL(), note{ID: 100 + i}); err != nil {
					t.Error(err)
				}
			})
		}
		sending.Wait()
		for i := range 16 {
			require.Zero(t, old.handled(100+i))
			require.Equal(t, 1, replacing.handled(100+i))
		}
		close(release)
		require.NoError(t, within(t, sent, "the slow exchange"))
		old.Stop(0)
		replacing.Stop(0)
	}
}

// Hazard: a path that led elsewhere between two looks keeps a connection made meanwhile.
func TestSession_FileThatWasElsewhereIsConnectedToAgain(t *testing.T) {
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	openTo(t, s.URL())
	before := len(s.peersNow())
	require.NoError(t, os.Rename(s.Addr(), s.Addr()+"2"))
	require.NoError(t, os.Rename(s.Addr()+"2", s.Addr()))
	lookEnds()
	require.NoError(t, acomm.Send(s.URL(), note{ID: 1}))
	require.Greater(t, len(s.peersNow()), before)
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

func init() { roles["few sender"] = fewSender }

// fewSender has few descriptors, and sends to each of many sockets.
func fewSender() {
	var limit syscall.Rlimit
	orExit(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	limit.Cur = 64
	orExit(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
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

// Hazard: the time of a write is that of a whole answer, so a peer that takes something
// all the time is cut off.
func TestSession_SlowReaderOfALargeAnswerIsServed(t *testing.T) {
	const pause = 50 * time.Millisecond
	setWriteTimeout(t, 10*pause)
	answer := errors.New(strings.Repeat("y", 3<<20))
	large := func(conn net.Conn, _ note) { _ = acomm.SendConnData(conn, &acomm.Response{Error: answer}) }
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"large": large})
	conn := openRaw(t, s.Addr())
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	message := `{"how":"large"}`
	_, err := conn.Write(rawFrame(frameMessage, uint32(len(message)), 1, message))
	require.NoError(t, err)
	buf := make([]byte, 128<<10)
	for read := 0; read < 3<<20; {
		time.Sleep(pause) // a slow peer: it takes longer in all than the patience
		n, err := conn.Read(buf)
		require.NoError(t, err, "after %d bytes", read)
		read += n
	}
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
		_, err := conn.Write(rawFrame(frameMessage, uint32(len(message)), i+1, message))
		require.NoError(t, err)
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

// Hazard: each spelling of a path has a connection of its own.
func TestSession_PathsAreComparedByWhatTheyLeadTo(t *testing.T) {
	dir := shortDir(t)
	s := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
	other := startNotes(t, filepath.Join(dir, "o.sock"), 0, nil)
	openTo(t, s.URL())
	before := len(s.peersNow())
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(s.Addr(), link))
	for i := range 50 {
		spelling := dir + strings.Repeat("/.", i) + "/s.sock"
		if len(spelling) > acomm.MaxPath {
			break
		}
		require.NoError(t, acomm.Send(unixURL(spelling), note{ID: i}))
	}
	require.NoError(t, acomm.Send(unixURL(link), note{}))
	require.Len(t, s.peersNow(), before)

	// One of them leads elsewhere by now, the others do not.
	require.NoError(t, os.Remove(link))
	require.NoError(t, os.Symlink(other.Addr(), link))
	lookEnds()
	require.NoError(t, acomm.Send(unixURL(link), note{ID: 1000}))
	require.Equal(t, 1, other.handled(1000))
	require.NoError(t, acomm.Send(s.URL(), note{ID: 1001}))
	require.Len(t, s.peersNow(), before, "the session stays for the others")
}

func init() { roles["few listener"] = fewListener }

// fewListener serves with few descriptors.
func fewListener() {
	var limit syscall.Rlimit
	orExit(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	limit.Cur = 64
	orExit(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
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
	require.Equal(t, 64/8, opened)
	require.NoError(t, acomm.Send(unixURL(socket), note{}), "one who comes after them")
}

// Hazard: the end of a connection that came together with its last bytes was not
// noticed, as the system tells of both at once: who waited for an answer waited on.
func TestSession_EndThatComesWithTheLastAnswerIsSeen(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // nobody reads between the two calls
	l := newRawListener(t)
	for range 10 {
		conn := l.openNext()
		first := sendAsync(l.addr, note{ID: 1})
		l.message(conn)
		second := sendAsync(l.addr, note{ID: 2})
		l.message(conn)
		_, err := conn.Write(rawFrame(frameAnswer, uint32(len(accepted)), 1, accepted))
		closed := conn.Close()
		require.NoError(t, errors.Join(err, closed))
		one, two := within(t, first, "the first"), within(t, second, "the second")
		require.NoError(t, one)
		require.ErrorIs(t, two, io.ErrUnexpectedEOF)
	}
}
