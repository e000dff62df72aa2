package acomm_test

import (
	"errors"
	"fmt"
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

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestSocket_FileOfAKilledProcessIsReplaced(t *testing.T) {
	// Known fault: a socket file left by a killed process blocked the restart.
	for _, kind := range []string{"hold", "hold as in 2016"} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s.sock")
			child := startProcess(t, "socket "+kind, "SOCKET="+path)
			require.Equal(t, "holding", child.ReadLine())
			require.ErrorIs(t, acomm.NewUnixListener(path, 0).Start(), syscall.EADDRINUSE, "it lives")
			child.Kill()
			require.ErrorContains(t, child.Wait(), "killed")
			require.Equal(t, fs.ModeSocket, mode(t, path).Type(), "what it left")
			_, err := net.Dial("unix", path)
			require.ErrorIs(t, err, syscall.ECONNREFUSED)

			ul := startListener(t, path, 0)
			require.NoError(t, exchange(ul, ul.URL()))
			ul.Stop(0)
			require.NoFileExists(t, path)
		})
	}
}

func init() {
	roles["socket hold"] = func() {
		orExit(acomm.NewUnixListener(os.Getenv("SOCKET"), 0).Start())
		fmt.Println("holding")
		<-commands
	}
	roles["socket hold as in 2016"] = func() {
		l, err := net.Listen("unix", os.Getenv("SOCKET"))
		orExit(err)
		defer l.Close()
		fmt.Println("holding")
		<-commands
	}
	roles["socket contend"] = socketContend
	roles["socket lock"] = socketLock
}

func TestSocket_DeadFilesOfAnyKindAreReplaced(t *testing.T) {
	for name, leave := range map[string]func(t *testing.T, path string){
		"stream": leaveDeadSocket,
		"datagram": func(t *testing.T, path string) {
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
			require.NoError(t, err)
			require.NoError(t, conn.Close())
		},
		"bound, never listened": func(t *testing.T, path string) {
			require.NoError(t, syscall.Close(bindOnly(t, path)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s.sock")
			leave(t, path)
			require.FileExists(t, path)
			ul := startListener(t, path, 0)
			require.NoError(t, exchange(ul, ul.URL()))
		})
	}
}

func TestSocket_LiveListenerIsNeverReplacedNorDisturbed(t *testing.T) {
	// The hazard: a check that connects shows up at the listener as a peer that
	// says nothing, or uses up its accept limit.
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			if network == "unixpacket" && runtime.GOOS != "linux" {
				t.Skip("not everywhere")
			}
			path := filepath.Join(shortDir(t), "s.sock")
			owner, err := net.Listen(network, path)
			require.NoError(t, err)
			defer owner.Close()
			refuseToReplace(t, path)

			peer, err := net.Dial(network, path)
			require.NoError(t, err)
			defer peer.Close()
			_, err = peer.Write([]byte{7})
			require.NoError(t, err)
			conn, err := owner.Accept()
			require.NoError(t, err)
			defer conn.Close()
			b, err := readByte(conn)
			require.NoError(t, err)
			require.Equal(t, byte(7), b, "the first connection is the peer's")
		})
	}
	t.Run("of this library", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s.sock")
		owner := startListener(t, path, 1) // a connection too many ends it
		refuseToReplace(t, path)
		require.NoError(t, exchange(owner, owner.URL()))
	})
}

func TestSocket_LiveListenerWithAFullBacklogIsNeverReplaced(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere a full backlog refuses connections as a dead socket does")
	}
	path := filepath.Join(shortDir(t), "s.sock")
	fd := bindOnly(t, path)
	defer syscall.Close(fd)
	require.NoError(t, syscall.Listen(fd, 0))
	for {
		conn, err := net.Dial("unix", path)
		if errors.Is(err, syscall.EAGAIN) {
			break
		}
		require.NoError(t, err)
		defer conn.Close()
	}
	refuseToReplace(t, path)
}

func TestSocket_LiveDatagramSocketIsNeverReplacedNorDisturbed(t *testing.T) {
	path := filepath.Join(shortDir(t), "s.sock")
	owner, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	defer owner.Close()
	refuseToReplace(t, path)

	peer, err := net.Dial("unixgram", path)
	require.NoError(t, err)
	defer peer.Close()
	_, err = peer.Write([]byte{7})
	require.NoError(t, err)
	b, err := readByte(owner)
	require.NoError(t, err)
	require.Equal(t, byte(7), b, "the first message is the peer's")
}

func TestSocket_WhatIsNotASocketIsNeverReplaced(t *testing.T) {
	// The hazard: a mistyped path costs somebody a file.
	for name, put := range map[string]func(t *testing.T, path string){
		"file":               func(t *testing.T, path string) { require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600)) },
		"empty file":         func(t *testing.T, path string) { require.NoError(t, os.WriteFile(path, nil, 0o600)) },
		"directory":          func(t *testing.T, path string) { require.NoError(t, os.Mkdir(path, 0o700)) },
		"fifo":               func(t *testing.T, path string) { require.NoError(t, syscall.Mkfifo(path, 0o600)) },
		"symlink to nothing": func(t *testing.T, path string) { require.NoError(t, os.Symlink("nothing", path)) },
		"symlink to a file": func(t *testing.T, path string) {
			require.NoError(t, os.WriteFile(path+"2", []byte("precious"), 0o600))
			require.NoError(t, os.Symlink(path+"2", path))
		},
		"symlink to a dead socket": func(t *testing.T, path string) {
			leaveDeadSocket(t, path+"2")
			require.NoError(t, os.Symlink(path+"2", path))
		},
		"symlink to a live socket": func(t *testing.T, path string) {
			startListener(t, path+"2", 0)
			require.NoError(t, os.Symlink(path+"2", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			path := filepath.Join(dir, "s.sock")
			put(t, path)
			before := snapshot(t, dir)
			refuseToReplace(t, path)
			require.Equal(t, before, snapshot(t, dir))
		})
	}
}

func TestSocket_OneThatIsYetToListenIsNeverReplaced(t *testing.T) {
	// The hazard: from bind to listen a socket refuses connections as a dead one
	// does. A process of 2016, which takes no lock, can be just there.
	path := filepath.Join(shortDir(t), "s.sock")
	fd := bindOnly(t, path)
	defer syscall.Close(fd)
	_, err := net.Dial("unix", path)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	refuseToReplace(t, path)
	require.NoError(t, syscall.Listen(fd, 1))
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}

func TestSocket_WhoeverTakesNoLockWinsOrLosesAsAWhole(t *testing.T) {
	// The hazard: a process of 2016 gets the path, and loses it at once to a check
	// that looked at its socket too early.
	dir := shortDir(t)
	for i := range 300 {
		path := filepath.Join(dir, fmt.Sprintf("%d.sock", i))
		begin := make(chan struct{})
		bound := make(chan net.Listener, 1)
		go func() {
			<-begin
			l, _ := net.Listen("unix", path) // as a process of 2016 does
			bound <- l
		}()
		ul := acomm.NewUnixListener(path, 0)
		started := make(chan error, 1)
		go func() {
			<-begin
			started <- ul.Start()
		}()
		close(begin)
		other, err := within(t, bound, "Listen"), within(t, started, "Start")
		ul.Stop(0)
		if other == nil {
			require.NoError(t, err)
			continue
		}
		requireOthers(t, path, other, err)
	}
}

// requireOthers fails unless the path was left to somebody else's listener, and
// the error says so.
func requireOthers(t *testing.T, path string, other net.Listener, err error) {
	t.Helper()
	conn, dialErr := net.Dial("unix", path)
	require.NoError(t, other.Close())
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.NoError(t, dialErr)
	require.NoError(t, conn.Close())
}

func TestSocket_WhatReplacesADeadFileMeanwhileIsNeverRemoved(t *testing.T) {
	// The hazard: the file is removed some time after the last look at it, and by
	// then it may be that of somebody who needs no lock.
	dir := shortDir(t)
	for i := range 100 {
		path := filepath.Join(dir, fmt.Sprintf("%d.sock", i))
		leaveDeadSocket(t, path)
		ul := acomm.NewUnixListener(path, 0)
		started := make(chan error, 1)
		go func() { started <- ul.Start() }()
		await(t, "a pause between two looks", func() bool {
			return len(started) > 0 || blockedIn("acomm.removeDead") > 0
		})
		if len(started) > 0 { // the pause was over before it was seen
			require.NoError(t, <-started)
			ul.Stop(0)
			continue
		}
		require.NoError(t, os.Remove(path))
		other, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if errors.Is(err, syscall.EADDRINUSE) { // the pause was over by now
			require.NoError(t, within(t, started, "Start"))
			ul.Stop(0)
			continue
		}
		require.NoError(t, err)
		other.SetUnlinkOnClose(false)
		err = within(t, started, "Start")
		ul.Stop(0)
		requireOthers(t, path, other, err)
		return
	}
	require.FailNow(t, "no pause was ever seen")
}

func TestSocket_OneOfManyProcessesReplacesADeadFile(t *testing.T) {
	// The hazard: one process removes the file that another has just made.
	const processes, rounds = 8, 20
	dir := shortDir(t)
	var children []*process
	for range processes {
		children = append(children, startProcess(t, "socket contend"))
	}
	for _, child := range children {
		require.Equal(t, "ready", child.ReadLine())
	}
	for round := range rounds {
		path := filepath.Join(dir, fmt.Sprintf("%d.sock", round))
		leaveDeadSocket(t, path)
		for _, child := range children {
			require.NoError(t, child.WriteLine(path))
		}
		var won int
		for _, child := range children {
			switch answer := child.ReadLine(); answer {
			case "won":
				won++
			case "in use":
			default:
				require.FailNow(t, "Start failed otherwise", answer)
			}
		}
		require.Equal(t, 1, won)
		conn, err := net.Dial("unix", path)
		require.NoError(t, err, "it can be reached")
		require.NoError(t, conn.Close())
		for _, child := range children {
			require.NoError(t, child.WriteLine("stop"))
		}
		for _, child := range children {
			require.Equal(t, "stopped", child.ReadLine())
		}
		require.NoFileExists(t, path)
	}
}

// socketContend starts a listener at each path it is told, until it is told to
// stop it.
func socketContend() {
	fmt.Println("ready")
	for path := range commands {
		ul := acomm.NewUnixListener(path, 0)
		switch err := ul.Start(); {
		case err == nil:
			fmt.Println("won")
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println("in use")
		default:
			fmt.Println(err)
		}
		<-commands
		ul.Stop(time.Nanosecond)
		fmt.Println("stopped")
	}
}

func TestSocket_OneOfManyListenersReplacesADeadFile(t *testing.T) {
	const listeners, rounds = 32, 20
	dir := shortDir(t)
	for round := range rounds {
		path := filepath.Join(dir, fmt.Sprintf("%d.sock", round))
		leaveDeadSocket(t, path)
		errs := make(chan error, listeners)
		uls := make(chan *acomm.UnixListener, listeners)
		begin := make(chan struct{})
		for range listeners {
			go func() {
				ul := acomm.NewUnixListener(path, 0)
				<-begin
				err := ul.Start()
				if err == nil {
					uls <- ul
				}
				errs <- err
			}()
		}
		close(begin)
		for range listeners {
			if err := within(t, errs, "Start"); err != nil {
				require.ErrorIs(t, err, syscall.EADDRINUSE)
			}
		}
		require.Len(t, uls, 1)
		ul := <-uls
		require.NoError(t, exchange(ul, ul.URL()))
		ul.Stop(0)
		require.NoFileExists(t, path)
	}
}

func TestSocket_StopLeavesWhatReplacedItsFile(t *testing.T) {
	for name, replace := range map[string]func(t *testing.T, path string){
		"another socket, renamed": func(t *testing.T, path string) {
			other := listenPlain(t, path+"2")
			require.NoError(t, os.Rename(path+"2", path))
			t.Cleanup(func() { _ = other.Close() })
		},
		"another socket": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			other := listenPlain(t, path)
			t.Cleanup(func() { _ = other.Close() })
		},
		"a dead socket": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			leaveDeadSocket(t, path)
		},
		"a file": func(t *testing.T, path string) { require.NoError(t, os.Remove(path)); writeFile(t, path) },
		"a directory": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		},
		"a symlink to our own, moved": func(t *testing.T, path string) {
			require.NoError(t, os.Rename(path, path+"2"))
			require.NoError(t, os.Symlink(path+"2", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			ul := startListener(t, filepath.Join(dir, "s.sock"), 0)
			replace(t, ul.Addr())
			before := snapshot(t, dir)
			ul.Stop(0)
			require.Equal(t, before, snapshot(t, dir))
		})
	}
}

func TestSocket_StopOfOneLeavesTheFileOfTheNext(t *testing.T) {
	// The hazard: a listener that no longer listens knows its file by the inode's
	// number, which the next one's file may have been given.
	for name, end := range map[string]func(t *testing.T, ul *acomm.UnixListener) (stop func()){
		"its file was removed": func(t *testing.T, ul *acomm.UnixListener) func() {
			require.NoError(t, os.Remove(ul.Addr()))
			return func() { ul.Stop(0) }
		},
		"it has reached its limit": func(t *testing.T, ul *acomm.UnixListener) func() {
			require.NoError(t, exchange(ul, ul.URL()))
			require.NoError(t, exchange(ul, ul.URL()))
			require.Nil(t, ul.NextConn())
			return func() { ul.Stop(0) }
		},
		"it is stopping": func(t *testing.T, ul *acomm.UnixListener) func() {
			dial(t, ul)
			conn := take(t, ul)
			stopped := async(func() { ul.Stop(0) })
			require.Nil(t, ul.NextConn(), "Stop has begun")
			return func() {
				ul.DoneConn(conn)
				within(t, stopped, "Stop")
			}
		},
		"it is stopped": func(t *testing.T, ul *acomm.UnixListener) func() {
			ul.Stop(0)
			return func() { ul.Stop(0) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s.sock")
			first := startListener(t, path, 2)
			inode := inodeOf(t, path)
			stop := end(t, first)
			second := startListener(t, path, 0)
			t.Logf("inode %d, then %d", inode, inodeOf(t, path))
			stop()
			require.NoError(t, exchange(second, second.URL()))
			second.Stop(0)
			require.NoFileExists(t, path)
		})
	}
}

func TestSocket_PathTooLongIsAnErrorThatSaysSo(t *testing.T) {
	dir := shortDir(t)
	fits := filepath.Join(dir, strings.Repeat("x", acomm.MaxPath-len(dir)-1))
	require.Len(t, fits, acomm.MaxPath)
	ul := startListener(t, fits, 0)
	require.NoError(t, exchange(ul, ul.URL()), "what fits, fits")
	ul.Stop(0)

	requireTooLong := func(err error, path string) {
		t.Helper()
		require.ErrorIs(t, err, syscall.ENAMETOOLONG)
		require.ErrorContains(t, err, path)
		require.ErrorContains(t, err, strconv.Itoa(len(path)))
		require.ErrorContains(t, err, strconv.Itoa(acomm.MaxPath))
	}
	for _, path := range []string{fits + "x", filepath.Join(dir, strings.Repeat("dir/", 100), "s.sock")} {
		requireTooLong(acomm.NewUnixListener(path, 0).Start(), path)
	}
	t.Chdir(dir)
	requireTooLong(acomm.NewUnixListener(filepath.Base(fits)+"x", 0).Start(), fits+"x")
	t.Setenv("TMPDIR", fits)
	private := acomm.NewUnixListener("", 0)
	requireTooLong(private.Start(), private.Addr())
	require.Empty(t, list(t, dir), "nothing is left")
}

func TestSocket_WhatIsNoPathOfASocketIsRefused(t *testing.T) {
	dir := shortDir(t)
	t.Chdir(dir)
	for _, path := range []string{
		"a\x00b", "\x00abstract", filepath.Join(dir, "a\x00b"),
		"@abstract", // to a socket's address another kind of name, to the library none
	} {
		ul := acomm.NewUnixListener(path, 0)
		err := ul.Start()
		ul.Stop(0)
		require.ErrorIs(t, err, fs.ErrInvalid, "%q", path)
	}
	for _, path := range []string{".", "..", "/", dir} {
		require.ErrorIs(t, acomm.NewUnixListener(path, 0).Start(), syscall.EADDRINUSE, "%q", path)
	}
	require.Empty(t, list(t, dir))

	ul := startListener(t, filepath.Join(dir, "@file"), 0)
	require.NoError(t, exchange(ul, ul.URL()), "a file may have the name")
}

func TestSocket_DirectoryLockedForLongIsAnError(t *testing.T) {
	// The hazard: whoever can open a directory can lock it, and keep it.
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	dir := shortDir(t)
	child := startProcess(t, "socket lock", "DIR="+dir)
	require.Equal(t, "locked", child.ReadLine())
	dead := filepath.Join(dir, "s.sock")
	leaveDeadSocket(t, dead)
	ul := acomm.NewUnixListener(dead, 0)
	started := make(chan error, 1)
	go func() { started <- ul.Start() }()
	awaitBlocked(t, "acomm.lockDir", 1)
	within(t, async(func() { ul.Stop(0) }), "Stop, which has nothing to wait for")
	require.Nil(t, ul.NextConn())
	err := within(t, started, "Start")
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.ErrorContains(t, err, dir)
	require.Len(t, list(t, dir), 1, "as it was")
	require.NoError(t, child.WriteLine("unlock"))
	require.Equal(t, "unlocked", child.ReadLine())
	require.NoError(t, ul.Start())
	ul.Stop(0)
}

func TestSocket_LockOfTheDirectoryDelaysNoNewName(t *testing.T) {
	// The hazard: whoever can open a directory can lock it.
	dir := shortDir(t)
	child := startProcess(t, "socket lock", "DIR="+dir)
	require.Equal(t, "locked", child.ReadLine())
	ul := startListener(t, filepath.Join(dir, "new.sock"), 0)
	require.NoError(t, exchange(ul, ul.URL()))
	err := acomm.NewUnixListener(filepath.Join(dir, "new.sock"), 0).Start()
	require.ErrorIs(t, err, syscall.EADDRINUSE, "nor to see that one is in use")
}

func TestSocket_DirectoryLockedForAMomentIsWaitedFor(t *testing.T) {
	dir := shortDir(t)
	child := startProcess(t, "socket lock", "DIR="+dir)
	require.Equal(t, "locked", child.ReadLine())
	dead := filepath.Join(dir, "s.sock")
	leaveDeadSocket(t, dead)
	ul := acomm.NewUnixListener(dead, 0)
	started := make(chan error, 1)
	go func() { started <- ul.Start() }()
	awaitBlocked(t, "acomm.lockDir", 1)
	require.NoError(t, child.WriteLine("unlock"))
	require.Equal(t, "unlocked", child.ReadLine())
	require.NoError(t, within(t, started, "Start"))
	defer ul.Stop(0)
	require.False(t, locked(t, dir), "Start keeps no lock")
	require.NoError(t, exchange(ul, ul.URL()))
}

// socketLock holds the lock on a directory until it is told to let go.
func socketLock() {
	f, err := os.Open(os.Getenv("DIR"))
	orExit(err)
	orExit(syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	fmt.Println("locked")
	<-commands
	orExit(f.Close())
	fmt.Println("unlocked")
	<-commands
}

func TestSocket_DirectoryThatCantBeReadWillDo(t *testing.T) {
	// The hazard: the lock needs an open directory, the socket doesn't.
	if os.Geteuid() == 0 {
		t.Skip("root can read it")
	}
	dir := shortDir(t)
	require.NoError(t, os.Chmod(dir, 0o300))
	defer os.Chmod(dir, 0o700)
	ul := startListener(t, filepath.Join(dir, "s.sock"), 0)
	require.NoError(t, exchange(ul, ul.URL()))
}

func TestSocket_FailedStartKeepsNothing(t *testing.T) {
	path := filepath.Join(shortDir(t), "s.sock")
	owner := listenPlain(t, path)
	defer owner.Close()
	ul := acomm.NewUnixListener(path, 0)
	require.ErrorIs(t, ul.Start(), syscall.EADDRINUSE)
	require.False(t, locked(t, filepath.Dir(path)))
	require.NoError(t, owner.Close()) // leaves its file
	require.NoError(t, ul.Start(), "the listener is as it was")
	ul.Stop(0)
}

func TestSocket_FailedStartRemovesThePrivateDirectory(t *testing.T) {
	temp := shortDir(t)
	t.Setenv("TMPDIR", temp)
	ul := startListener(t, "", 0) // the runtime needs descriptors of its own, once
	ul.Stop(0)

	var old syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old))
	few := old
	few.Cur = min(few.Cur, 100)
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few))
	var files []*os.File
	for {
		f, err := os.Open(temp)
		if err != nil {
			break
		}
		files = append(files, f)
	}
	err := ul.Start()
	for _, f := range files {
		_ = f.Close()
	}
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old))
	require.ErrorIs(t, err, syscall.EMFILE)
	require.Empty(t, list(t, temp))
	require.NoError(t, ul.Start())
}

func TestSocket_StopAfterItsDirectoryIsGone(t *testing.T) {
	dir := shortDir(t)
	ul := startListener(t, filepath.Join(dir, "a", "s.sock"), 0)
	conn := dial(t, ul)
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "a")))
	taken := take(t, ul)
	_, err := taken.Write([]byte{7})
	require.NoError(t, err)
	_, err = readByte(conn)
	require.NoError(t, err)
	ul.DoneConn(taken)
	within(t, async(func() { ul.Stop(0) }), "Stop")
	require.NoError(t, ul.Start(), "Start makes it again")
	require.NoError(t, exchange(ul, ul.URL()))
}

func TestSocket_StopLeavesWhatOthersPutIntoThePrivateDirectory(t *testing.T) {
	t.Setenv("TMPDIR", shortDir(t))
	ul := startListener(t, "", 0)
	dir := filepath.Dir(ul.Addr())
	writeFile(t, filepath.Join(dir, "file"))
	ul.Stop(0)
	require.NoFileExists(t, ul.Addr())
	require.FileExists(t, filepath.Join(dir, "file"))

	gone := startListener(t, "", 0)
	require.NoError(t, os.RemoveAll(filepath.Dir(gone.Addr())))
	within(t, async(func() { gone.Stop(0) }), "Stop")
	require.NoError(t, gone.Start())
	require.NoError(t, exchange(gone, gone.URL()))
}

func TestSocket_ManyStartAtOnceInOneDirectory(t *testing.T) {
	// The hazard: the directory's lock turns listeners away that want other paths.
	dir := shortDir(t)
	var starting sync.WaitGroup
	for i := range 32 {
		ul := acomm.NewUnixListener(filepath.Join(dir, fmt.Sprintf("%d.sock", i)), 0)
		defer ul.Stop(0)
		starting.Go(func() {
			if err := ul.Start(); err != nil {
				t.Error(err)
			}
		})
	}
	within(t, async(starting.Wait), "all to start")
}

// refuseToReplace fails the test if a listener can be started at the path, or
// trying to changes the file.
func refuseToReplace(t *testing.T, path string) {
	t.Helper()
	before, err := os.Lstat(path)
	require.NoError(t, err)
	for range 3 {
		ul := acomm.NewUnixListener(path, 0)
		err := ul.Start()
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		require.ErrorContains(t, err, path)
		ul.Stop(0)
		after, err := os.Lstat(path)
		require.NoError(t, err)
		require.True(t, os.SameFile(before, after))
	}
}

// locked reports whether somebody holds the lock on the directory.
func locked(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err != nil {
		require.ErrorIs(t, err, syscall.EWOULDBLOCK)
	}
	return err != nil
}

// snapshot tells which files there are in the directory, and what is in them.
func snapshot(t *testing.T, dir string) []string {
	t.Helper()
	var files []string
	for _, entry := range list(t, dir) {
		path := filepath.Join(dir, entry.Name())
		line := fmt.Sprintf("%s %s %d", entry.Name(), mode(t, path), inodeOf(t, path))
		if entry.Type().IsRegular() {
			text, err := os.ReadFile(path)
			require.NoError(t, err)
			line += " " + string(text)
		}
		files = append(files, line)
	}
	return files
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Lstat(path)
	require.NoError(t, err)
	return info.Sys().(*syscall.Stat_t).Ino
}
