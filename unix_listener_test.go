package acomm_test

import (
	"encoding/json"
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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// How a UnixListener starts and stops, and whose connections are whose.

func TestUnixListener_RelativePathKeepsAddrAndGetsAbsoluteURL(t *testing.T) {
	dir := shortDir(t)
	t.Chdir(dir)
	ul := acomm.NewUnixListener("sub/../s.sock", 0)
	require.Equal(t, "sub/../s.sock", ul.Addr())
	require.Equal(t, unixURL(filepath.Join(dir, "s.sock")), ul.URL())

	// It is the directory of then that counts.
	t.Chdir(shortDir(t))
	require.NoError(t, ul.Start())
	defer ul.Stop(0)
	require.Equal(t, "sub/../s.sock", ul.Addr())
	require.NoError(t, exchange(ul, ul.URL()))
	require.FileExists(t, filepath.Join(dir, "s.sock"))
}

func TestUnixListener_URLIsTheCallers(t *testing.T) {
	ul := acomm.NewUnixListener("/somewhere/s.sock", 0)
	ul.URL().Path = "/elsewhere"
	require.Equal(t, "unix:///somewhere/s.sock", ul.URL().String())
	require.Equal(t, "/somewhere/s.sock", ul.Addr())
}

func TestUnixListener_PathsOfAnyCharactersWorkEndToEnd(t *testing.T) {
	// Known fault: socket paths with spaces didn't work, nor with what means
	// something in a URL.
	for _, name := range []string{
		"a b", " ", "100%", "%41", "%2F", "q?x=1&y", "h#f", "a+b", "a:b", "a@b", "ü☃", `back\slash`, `"quoted"`, "new\nline", "~", "-rf", "\xff",
	} {
		t.Run(strconv.Quote(name), func(t *testing.T) {
			path := filepath.Join(shortDir(t), name, name+".sock")
			ul := startListener(t, path, 0)
			require.Equal(t, path, ul.Addr())
			require.Equal(t, path, ul.URL().Path)
			require.NoError(t, exchange(ul, ul.URL()))

			byText, err := acomm.NewRequest("test", ul.URL().String(), nil, nil, nil)
			if name == "\xff" {
				require.ErrorIs(t, err, fs.ErrInvalid, "no JSON string can hold it")
				return
			}
			require.NoError(t, err)
			require.NoError(t, exchange(ul, byText.ResponseHook))

			data, err := json.Marshal(byText)
			require.NoError(t, err)
			overWire := &acomm.Request{}
			require.NoError(t, json.Unmarshal(data, overWire))
			require.NoError(t, exchange(ul, overWire.ResponseHook))
		})
	}
}

func TestUnixListener_StartTwiceIsAnError(t *testing.T) {
	path := filepath.Join(shortDir(t), "s.sock")
	ul := startListener(t, path, 2)
	require.ErrorIs(t, ul.Start(), syscall.EADDRINUSE)
	require.NoError(t, exchange(ul, ul.URL()), "the listener goes on")
	require.NoError(t, exchange(ul, ul.URL()))
	require.Nil(t, ul.NextConn())
	require.ErrorIs(t, ul.Start(), syscall.EADDRINUSE, "at its accept limit it is still started")
}

func TestUnixListener_OneOfManyStartsWins(t *testing.T) {
	dir := shortDir(t)
	t.Setenv("TMPDIR", dir)
	for _, path := range []string{filepath.Join(dir, "s.sock"), ""} {
		ul := acomm.NewUnixListener(path, 0)
		for range 20 {
			errs := make(chan error, 8)
			for range 8 {
				go func() { errs <- ul.Start() }()
			}
			var won int
			for range 8 {
				if err := within(t, errs, "Start"); err != nil {
					require.ErrorIs(t, err, syscall.EADDRINUSE)
					continue
				}
				won++
			}
			require.Equal(t, 1, won)
			require.NoError(t, exchange(ul, ul.URL()))
			ul.Stop(0)
		}
	}
}

func TestUnixListener_StartWhileStoppingIsAnError(t *testing.T) {
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	dial(t, ul.Addr())
	conn := take(t, ul)
	stopped := async(func() { ul.Stop(0) })
	require.Nil(t, ul.NextConn(), "Stop has begun")
	require.ErrorIs(t, ul.Start(), net.ErrClosed)
	ul.DoneConn(conn)
	within(t, stopped, "Stop")
	require.NoError(t, ul.Start())
}

func TestUnixListener_StopWithoutARunDoesNoHarm(t *testing.T) {
	// Known fault: Stop panicked before Start, after a failed one, and a second
	// time.
	dir := shortDir(t)
	path := filepath.Join(dir, "s.sock")
	ul := acomm.NewUnixListener(path, 0)
	ul.Stop(0)
	ul.Stop(time.Nanosecond)

	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.Error(t, ul.Start())
	ul.Stop(0)
	require.FileExists(t, path, "what was in the way")

	require.NoError(t, os.Remove(path))
	require.NoError(t, ul.Start())
	require.NoError(t, exchange(ul, ul.URL()))
	ul.Stop(0)
	ul.Stop(0)
	ul.Stop(time.Nanosecond)
	require.NoFileExists(t, path)
}

func TestUnixListener_SecondStopWaitsForTheFirst(t *testing.T) {
	// Known fault: two calls of Stop panicked, or the second didn't wait.
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	dial(t, ul.Addr())
	conn := take(t, ul)

	const callers = 5
	var done atomic.Bool
	early := make(chan bool, callers)
	for i := range callers {
		timeout := []time.Duration{0, time.Nanosecond}[min(i, 1)]
		go func() {
			ul.Stop(timeout) // the timeout of the first is what counts
			early <- !done.Load()
		}()
		awaitBlocked(t, "acomm.(*UnixListener).Stop", i+1)
	}
	done.Store(true)
	ul.DoneConn(conn)
	for range callers {
		require.False(t, within(t, early, "Stop"), "returned before the connection was done")
	}
}

func TestUnixListener_RestartsAfterStop(t *testing.T) {
	path := filepath.Join(shortDir(t), "s.sock")
	ul := acomm.NewUnixListener(path, 0)
	for range 5 {
		require.NoError(t, ul.Start())
		require.Equal(t, path, ul.Addr())
		require.NoError(t, exchange(ul, ul.URL()))
		require.NoError(t, exchange(ul, ul.URL()))
		ul.Stop(0)
		require.NoFileExists(t, path)
		require.ErrorIs(t, acomm.Send(ul.URL(), "anybody?"), fs.ErrNotExist)
	}
}

func TestUnixListener_IdleStopIsQuick(t *testing.T) {
	// Known fault: an idle Stop took a second. These would take a minute.
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	within(t, async(func() {
		for range 60 {
			if err := ul.Start(); err != nil {
				t.Error(err)
				return
			}
			ul.Stop(0)
		}
	}), "60 times Start and Stop")
}

func TestUnixListener_StopEndsEveryBlockedNextConn(t *testing.T) {
	const callers = 5
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	conns := make(chan net.Conn, callers)
	for range callers {
		go func() { conns <- ul.NextConn() }()
	}
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", callers)
	within(t, async(func() { ul.Stop(0) }), "Stop")
	for range callers {
		require.Nil(t, within(t, conns, "NextConn"))
	}
}

func TestUnixListener_StopHandsOutWhatWasAccepted(t *testing.T) {
	// Known fault: connections accepted but not yet taken at Stop were dropped,
	// and Stop hung.
	const number = 3
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	for i := range number {
		_, err := dial(t, ul.Addr()).Write([]byte{byte(i)})
		require.NoError(t, err)
	}
	awaitAccepted(t, ul, number)
	stopped := async(func() { ul.Stop(0) })
	awaitBlocked(t, "acomm.(*UnixListener).Stop", 1)
	_, err := net.Dial("unix", ul.Addr())
	require.Error(t, err, "Stop has begun")

	var conns []net.Conn
	for i := range number {
		conn := take(t, ul)
		var b [1]byte
		_, err := io.ReadFull(conn, b[:])
		require.NoError(t, err)
		require.Equal(t, byte(i), b[0], "in the order of their arrival")
		conns = append(conns, conn)
	}
	require.Nil(t, ul.NextConn(), "none is left, none can come")
	for _, conn := range conns {
		select {
		case <-stopped:
			require.FailNow(t, "Stop did not wait")
		case <-time.After(moment):
		}
		ul.DoneConn(conn)
	}
	within(t, stopped, "Stop")
}

func TestUnixListener_StopClosesWhatIsOpenAfterItsTimeout(t *testing.T) {
	// Known fault: the timeout was ignored, one silent peer blocked Stop for ever.
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	peers := []net.Conn{dial(t, ul.Addr()), dial(t, ul.Addr())}
	awaitAccepted(t, ul, len(peers))
	taken := take(t, ul) // the other one nobody takes
	read := make(chan error)
	go func() {
		_, err := taken.Read(make([]byte, 1))
		read <- err
	}()

	began := time.Now()
	within(t, async(func() { ul.Stop(moment) }), "Stop")
	require.GreaterOrEqual(t, time.Since(began), moment, "the time it was given")
	require.ErrorIs(t, within(t, read, "Read"), net.ErrClosed)
	for _, peer := range peers {
		_, err := readByte(peer)
		require.ErrorIs(t, err, io.EOF)
	}
	require.Nil(t, ul.NextConn())
	ul.DoneConn(taken)
	require.NoFileExists(t, ul.Addr())
	require.NoError(t, ul.Start())
	require.NoError(t, exchange(ul, ul.URL()))
}

func TestUnixListener_StopReturnsBeforeItsTimeoutWhenAllIsDone(t *testing.T) {
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	dial(t, ul.Addr())
	conn := take(t, ul)
	stopped := async(func() { ul.Stop(100 * patience) })
	awaitBlocked(t, "acomm.(*UnixListener).Stop", 1)
	ul.DoneConn(conn)
	within(t, stopped, "Stop")
}

func TestUnixListener_StopWithANegativeTimeoutWaits(t *testing.T) {
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	peer := dial(t, ul.Addr())
	conn := take(t, ul)
	stopped := async(func() { ul.Stop(-time.Second) })
	awaitBlocked(t, "acomm.(*UnixListener).Stop", 1)
	_, err := conn.Write([]byte{7})
	require.NoError(t, err, "the connection is open")
	b, err := readByte(peer)
	require.NoError(t, err)
	require.Equal(t, byte(7), b)
	ul.DoneConn(conn)
	within(t, stopped, "Stop")
}

// unhashableConn can't be the key of a map.
type unhashableConn struct {
	net.Conn
	_ []int
}

func TestUnixListener_DoneConnIgnoresWhatIsNotItsOwn(t *testing.T) {
	// Known fault: a second DoneConn, or one of a foreign connection, upset the
	// count that Stop waits for.
	dir := shortDir(t)
	ul := startListener(t, filepath.Join(dir, "s.sock"), 0)
	other := startListener(t, filepath.Join(dir, "other.sock"), 0)
	peer, otherPeer := dial(t, ul.Addr()), dial(t, other.Addr())
	conn, foreign := take(t, ul), take(t, other)
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()

	done := func() {
		ul.DoneConn(nil)
		ul.DoneConn((*net.UnixConn)(nil))
		ul.DoneConn(near)
		ul.DoneConn(unhashableConn{Conn: near})
		ul.DoneConn(unhashableConn{Conn: conn})
		ul.DoneConn(foreign)
		ul.DoneConn(peer)
	}
	done()
	stopped := async(func() { ul.Stop(0) })
	awaitBlocked(t, "acomm.(*UnixListener).Stop", 1)
	done()
	for from, to := range map[net.Conn]net.Conn{conn: peer, foreign: otherPeer, near: far} {
		go from.Write([]byte{7})
		b, err := readByte(to)
		require.NoError(t, err, "it is still open")
		require.Equal(t, byte(7), b)
	}
	select {
	case <-stopped:
		require.FailNow(t, "Stop did not wait")
	case <-time.After(moment):
	}

	var finish sync.WaitGroup
	for range 4 {
		finish.Go(func() { ul.DoneConn(conn) })
	}
	finish.Wait()
	within(t, stopped, "Stop")
	_, err := readByte(peer)
	require.ErrorIs(t, err, io.EOF, "DoneConn closes")
	ul.DoneConn(conn)
	done()
	other.DoneConn(foreign)
}

func TestUnixListener_DoneConnOfAnEarlierRunIsIgnored(t *testing.T) {
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	dial(t, ul.Addr())
	old := take(t, ul)
	ul.Stop(time.Nanosecond)
	require.NoError(t, ul.Start())
	peer := dial(t, ul.Addr())
	conn := take(t, ul)
	stopped := async(func() { ul.Stop(0) })
	awaitBlocked(t, "acomm.(*UnixListener).Stop", 1)
	ul.DoneConn(old)
	select {
	case <-stopped:
		require.FailNow(t, "Stop did not wait")
	case <-time.After(moment):
	}
	ul.DoneConn(conn)
	within(t, stopped, "Stop")
	_, err := readByte(peer)
	require.ErrorIs(t, err, io.EOF)
}

func TestUnixListener_ConnsGiveAccessToTheirSocket(t *testing.T) {
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 0)
	dial(t, ul.Addr())
	conn := take(t, ul)
	defer ul.DoneConn(conn)
	raw, ok := conn.(syscall.Conn)
	require.True(t, ok)
	_, err := raw.SyscallConn()
	require.NoError(t, err)
}

func TestUnixListener_ParentDirectoriesAreCreated(t *testing.T) {
	dir := shortDir(t)
	ul := startListener(t, filepath.Join(dir, "a", "b", "s.sock"), 0)
	require.NoError(t, exchange(ul, ul.URL()))
	ul.Stop(0)
	require.DirExists(t, filepath.Join(dir, "a", "b"), "they may serve others by now")

	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	blocked := acomm.NewUnixListener(filepath.Join(dir, "file", "s.sock"), 0)
	require.ErrorIs(t, blocked.Start(), syscall.ENOTDIR)
}

func TestUnixListener_IsSafeFromAnyGoroutine(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 3)
	var callers sync.WaitGroup
	for i := range 4 {
		callers.Go(func() {
			for range 100 {
				if err := ul.Start(); err != nil && !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				if conn, err := net.Dial("unix", ul.URL().Path); err == nil {
					defer conn.Close()
				}
				if i%2 == 0 {
					ul.Stop(time.Microsecond)
				}
			}
		})
		callers.Go(func() {
			for range 100 {
				conn := ul.NextConn()
				if conn == nil {
					runtime.Gosched()
					continue
				}
				ul.DoneConn(conn)
				ul.DoneConn(conn)
			}
		})
	}
	finished := async(callers.Wait)
	for done := false; !done; { // whoever waits for a connection is let go
		ul.Stop(time.Microsecond)
		select {
		case <-finished:
			done = true
		case <-time.After(time.Millisecond):
		}
	}
	ul.Stop(0)
	require.NoFileExists(t, ul.Addr())
}

func TestUnixListener_LeaksNoDescriptors(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("descriptors are counted in /proc")
	}
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	run := func(n int) {
		for range n {
			require.NoError(t, ul.Start())
			require.NoError(t, exchange(ul, ul.URL()))
			conn := dial(t, ul.Addr())
			take(t, ul) // nobody is done with it
			ul.Stop(time.Nanosecond)
			require.NoError(t, conn.Close())
			require.Error(t, acomm.NewUnixListener(filepath.Dir(ul.Addr()), 0).Start())
		}
	}
	run(1)
	before := openFiles(t)
	run(50)
	require.LessOrEqual(t, openFiles(t), before)
}

// awaitAccepted waits until the listener has accepted, in all, the number of
// connections that are still open. The kernel knows: it lists them under the
// listener's path, connected as opposed to connecting.
func awaitAccepted(t testing.TB, ul *acomm.UnixListener, number int) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("what is accepted shows in /proc")
	}
	await(t, fmt.Sprintf("%d accepted connections", number), func() bool {
		sockets, err := os.ReadFile("/proc/net/unix")
		require.NoError(t, err)
		var accepted int
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			if len(fields) == 8 && fields[5] == "03" && fields[7] == ul.URL().Path {
				accepted++
			}
		}
		return accepted == number
	})
}

// Hazard: a loop on NextConn that begins before Start is over at once, and nobody
// serves.
func TestUnixListener_NextConnWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	require.NoError(t, ul.Start())
	require.NoError(t, acomm.Send(ul.URL(), &acomm.Response{ID: "1"}))
	ul.Stop(0)
	within(t, served, "the loop, after Stop")
	require.Nil(t, ul.NextConn(), "after Stop")
}

func TestUnixListener_StopReleasesWhoWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	ul.Stop(0)
	within(t, served, "the loop, after a Stop without a Start")
}

// wrapped is a connection with something around it, which counts its calls.
type wrapped struct {
	net.Conn
	reads, writes, closes *counter
}

func (w wrapped) NetConn() net.Conn { return w.Conn }

func (w wrapped) Read(p []byte) (int, error) {
	w.reads.add()
	return w.Conn.Read(p)
}

func (w wrapped) Write(p []byte) (int, error) {
	w.writes.add()
	return w.Conn.Write(p)
}

func (w wrapped) Close() error {
	w.closes.add()
	return w.Conn.Close()
}

func wrap(conn net.Conn) wrapped { return wrapped{conn, &counter{}, &counter{}, &counter{}} }

// wrapsItself is what DoneConn must not follow for ever.
type wrapsItself struct{ net.Conn }

func (w wrapsItself) NetConn() net.Conn { return w }

// Hazard: the connection stays open, and Stop waits for it for ever.
func TestUnixListener_DoneConnCompletesWhatAWrapperWraps(t *testing.T) {
	for name, senders := range map[string]func(*acomm.UnixListener){
		"a connection of its own": func(ul *acomm.UnixListener) { dial(t, ul.Addr()) },
		"a sender of this library": func(ul *acomm.UnixListener) {
			go func() { _ = acomm.Send(ul.URL(), &acomm.Response{ID: "1"}) }()
		},
	} {
		t.Run(name, func(t *testing.T) {
			ul, other := startListener(t, "", 0), startListener(t, "", 0)
			senders(ul)
			conn := take(t, ul)
			ul.DoneConn(wrapsItself{conn})
			ul.DoneConn(wrap(nil))
			other.DoneConn(wrap(conn))
			require.NoError(t, stillOpen(conn))
			outer := wrap(wrap(conn))
			ul.DoneConn(outer)
			ul.DoneConn(outer)
			require.ErrorIs(t, stillOpen(conn), net.ErrClosed)
			require.Equal(t, 1, outer.closes.load(), "as in 2016: it may have something to write yet")
			within(t, async(func() { ul.Stop(0) }), "Stop")
		})
	}
}
