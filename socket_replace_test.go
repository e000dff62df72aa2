package acomm_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// A dead socket file is replaced, by one of those who try; nothing else ever is.

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
	require.NoError(t, dial(t, path).Close())
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
		require.NoError(t, dial(t, path).Close(), "it can be reached")
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
