package acomm_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Directories and disks on which nothing can be made.

func init() {
	roles["fault stream"] = faultStream
	roles["fault disk"] = faultDisk
	roles["fault disk, in a namespace"] = faultDiskInNamespace
}

// faultStream offers streams in directories, one for each command, as a user who
// may not write everywhere. It prints why it could not.
func faultStream() {
	tracker, err := acomm.NewTracker("", nil, 0)
	orExit(err)
	orExit(tracker.Start())
	if os.Geteuid() == 0 {
		if err := syscall.Setuid(65534); err != nil {
			fmt.Println("can't be another user:", err)
			return
		}
	}
	fmt.Println("ready")
	for dir := range commands {
		fmt.Println(offerStream(tracker, dir))
	}
}

// offerStream offers a stream in the directory and says what came of it.
func offerStream(tracker *acomm.Tracker, dir string) string {
	src := newSource()
	u, err := tracker.NewStreamUnix(dir, src)
	switch {
	case err == nil:
		conn, err := net.Dial("unix", u.Path)
		if err != nil {
			return err.Error()
		}
		_ = conn.Close()
		<-src.closed
		return "streamed"
	case len(src.closed) > 0:
		return "the source was closed: " + err.Error()
	case errors.Is(err, fs.ErrPermission):
		return "not permitted"
	case errors.Is(err, syscall.ENOTDIR):
		return "not a directory"
	case errors.Is(err, syscall.ENOSPC):
		return "no space"
	case errors.Is(err, syscall.EROFS):
		return "read only"
	}
	return err.Error()
}

func TestFault_StreamThatCanNotBeOfferedIsAnError(t *testing.T) {
	dir := shortDir(t)
	require.NoError(t, os.Chmod(dir, 0o755))
	for name, mode := range map[string]fs.FileMode{"closed": 0o555, "open": 0o777} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, name), mode))
		require.NoError(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	writeFile(t, filepath.Join(dir, "file"))
	child := startProcess(t, "fault stream")
	if line := child.ReadLine(); line != "ready" {
		t.Skip(line)
	}
	var offered, streamed int
	for range 3 {
		for name, want := range map[string]string{
			"closed": "not permitted", "closed/new": "not permitted", "file": "not a directory",
			"open": "streamed", "open/new": "streamed",
		} {
			require.NoError(t, child.WriteLine(filepath.Join(dir, name)))
			require.Equal(t, want, child.ReadLine(), name)
			offered++
			if want == "streamed" {
				streamed++
			}
		}
	}
	for _, name := range []string{"closed", "open", "open/new"} {
		for _, entry := range list(t, filepath.Join(dir, name)) {
			require.True(t, entry.IsDir(), "left behind: %s", entry.Name())
		}
	}
	t.Logf("streams offered: %d; claimed and their sources closed: %d; refused with an error, the source the caller's: %d",
		offered, streamed, offered-streamed)
}

// faultDisk becomes faultDiskInNamespace in a mount namespace of its own, so that
// nothing is left of what it mounts.
func faultDisk() {
	unshare, err := exec.LookPath("unshare")
	if err == nil {
		err = exec.Command(unshare, "--mount", "--map-root-user", "true").Run()
	}
	if err != nil {
		fmt.Println("no namespace:", err)
		return
	}
	self, err := os.Executable()
	orExit(err)
	orExit(os.Setenv(roleEnv, "fault disk, in a namespace"))
	orExit(syscall.Exec(unshare, []string{"unshare", "--mount", "--map-root-user",
		self, "-test.run=^TestProcessRole$", "-test.timeout=0"}, os.Environ()))
}

// faultDiskInNamespace mounts a disk with room for a few files and goes through
// what may happen on it.
func faultDiskInNamespace() {
	dir := os.Getenv("DIR")
	mount := func(args ...string) bool { return exec.Command("mount", append(args, dir)...).Run() == nil }
	if !mount("-t", "tmpfs", "-o", "nr_inodes=8,size=64k", "tmpfs") {
		fmt.Println("no mount")
		return
	}
	fmt.Println("ready")
	socket := filepath.Join(dir, "s.sock")
	ul := acomm.NewUnixListener(socket, 0)
	var exchanges int
	works := func() {
		orExit(exchange(ul, ul.URL()))
		exchanges++
	}
	refused := func(err, want error) {
		if !errors.Is(err, want) {
			orExit(fmt.Errorf("got %v, want %v", err, want))
		}
	}
	offered := func(tracker *acomm.Tracker, want string) {
		if got := offerStream(tracker, dir); got != want {
			orExit(fmt.Errorf("stream: got %s, want %s", got, want))
		}
	}
	tracker, err := acomm.NewTracker("", nil, 0)
	orExit(err)
	orExit(tracker.Start())
	orExit(ul.Start())
	works()

	// Full: what is there works on, what would be new gives an error.
	filler := filepath.Join(dir, "filler")
	orExit(os.Mkdir(filler, 0o700))
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(filler, strconv.Itoa(i)), nil, 0o600)
	}
	refused(err, syscall.ENOSPC)
	works()
	second := acomm.NewUnixListener(filepath.Join(dir, "second.sock"), 0)
	refused(second.Start(), syscall.ENOSPC)
	offered(tracker, "no space")
	orExit(os.RemoveAll(filler))
	orExit(second.Start())
	second.Stop(0)
	offered(tracker, "streamed")
	ul.Stop(0)
	orExit(ul.Start())
	works()

	// Read only: Stop can't remove the file, and Start not replace it.
	if mount("-o", "remount,ro") {
		works()
		ul.Stop(0)
		refused(ul.Start(), syscall.EROFS)
		refused(second.Start(), syscall.EROFS)
		offered(tracker, "read only")
		if !mount("-o", "remount,rw") {
			orExit(errors.New("the disk is read only for ever"))
		}
		orExit(ul.Start())
		works()
	} else {
		fmt.Println("no remount")
	}
	ul.Stop(0)
	_, err = os.Lstat(socket)
	refused(err, fs.ErrNotExist)
	tracker.Stop()
	fmt.Println("survived", exchanges)
}

func TestFault_FullDiskIsAnError(t *testing.T) {
	child := startProcess(t, "fault disk", "DIR="+shortDir(t))
	if line := child.ReadLine(); line != "ready" {
		t.Skip("can't mount a small disk here: " + line)
	}
	line := child.ReadLine()
	if line == "no remount" {
		t.Log("the disk can't be made read only here")
		line = child.ReadLine()
	}
	require.Contains(t, line, "survived")
	t.Logf("exchanges in and out on a full and a read-only disk: %s", strings.TrimPrefix(line, "survived "))
	require.NoError(t, child.Wait())
}
