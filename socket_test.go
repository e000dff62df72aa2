package acomm_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Socket files: their paths, their directories, and what Stop leaves.

func init() { roles["socket lock"] = socketLock }

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
			dial(t, ul.Addr())
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
	conn := dial(t, ul.Addr())
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
