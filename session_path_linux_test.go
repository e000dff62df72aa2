package acomm_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The path and the rights of the sender decide where a message goes, whatever sessions there are.

const nobody = 65534

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

func TestSession_PathDecides(t *testing.T) {
	dir := shortDir(t)
	first := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
	second := startNotes(t, filepath.Join(dir, "other.sock"), 0, nil)
	openTo(t, first.URL())
	sendMany(t, first.URL(), 0, 10)

	require.NoError(t, os.Rename(second.URL().Path, first.URL().Path))
	lookEnds()
	for i := range 10 {
		require.NoError(t, acomm.Send(first.URL(), note{ID: 100 + i}))
		require.Equal(t, 0, first.handled(100+i))
		require.Equal(t, 1, second.handled(100+i))
	}
	openTo(t, first.URL())
	require.NoError(t, os.Remove(first.URL().Path))
	for range 3 {
		lookEnds()
		require.ErrorIs(t, acomm.Send(first.URL(), note{ID: 200}), fs.ErrNotExist)
	}
	require.Equal(t, 0, first.handled(200)+second.handled(200))
	require.NoError(t, os.WriteFile(first.URL().Path, nil, 0o600))
	require.ErrorIs(t, acomm.Send(first.URL(), note{ID: 200}), syscall.ECONNREFUSED)
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
