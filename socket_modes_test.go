package acomm_test

import (
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Who can find and open a socket: its name, its mode, and its directory's.

func TestUnixListener_PrivateSocketIsTheUsersOnly(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o077, 0o777} {
		t.Run(fmt.Sprintf("umask %03o", mask), func(t *testing.T) {
			temp := shortDir(t)
			t.Setenv("TMPDIR", temp)
			setUmask(t, mask)
			ul := acomm.NewUnixListener("", 0)
			require.Empty(t, list(t, temp), "nothing is touched before Start")
			path := ul.Addr()
			require.Equal(t, path, ul.URL().Path)
			require.Equal(t, temp, filepath.Dir(filepath.Dir(path)))
			for range 2 {
				require.NoError(t, ul.Start())
				require.Equal(t, path, ul.Addr())
				require.Equal(t, fs.ModeDir|0o700, mode(t, filepath.Dir(path)))
				require.Equal(t, fs.ModeSocket|0o600, mode(t, path))
				require.NoError(t, exchange(ul, ul.URL()))
				ul.Stop(0)
				require.Empty(t, list(t, temp), "Stop removes what Start made")
			}
		})
	}
}

// inOwnPlace lists what the library makes where the caller names no place.
func inOwnPlace(t *testing.T, tracker *acomm.Tracker) map[string]func() (path string, remove func()) {
	return map[string]func() (string, func()){
		"listener": func() (string, func()) {
			ul := acomm.NewUnixListener("", 0)
			require.NoError(t, ul.Start())
			return ul.Addr(), func() { ul.Stop(0) }
		},
		"tracker": func() (string, func()) {
			tracker, err := acomm.NewTracker("", nil, 0)
			require.NoError(t, err)
			require.NoError(t, tracker.Start())
			return tracker.Addr(), tracker.Stop
		},
		"stream": func() (string, func()) {
			u, err := tracker.NewStreamUnix("", bytesSource(nil))
			require.NoError(t, err)
			return u.Path, func() { require.NoError(t, acomm.Stream(io.Discard, u)) }
		},
	}
}

// Hazard: what is made with the umask's permissions and narrowed a moment later
// can be opened in between.
func TestSocket_OwnPlaceIsTheUsersOnlyFromTheFirstMoment(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere only the directory keeps others out from the first moment")
	}
	for _, mask := range []int{0, 0o022, 0o077} {
		temp := shortDir(t)
		t.Setenv("TMPDIR", temp)
		tracker := newTracker(t)
		for what, make := range inOwnPlace(t, tracker) {
			t.Run(fmt.Sprintf("%s, umask %03o", what, mask), func(t *testing.T) {
				setUmask(t, mask)
				widest := watchModes(temp)
				rounds := 300
				if mask != 0 {
					rounds = 20 // it is the umask that hides a slip
				}
				for range rounds {
					path, remove := make()
					require.Equal(t, fs.ModeSocket|0o600, mode(t, path))
					require.Equal(t, fs.ModeDir|0o700, mode(t, filepath.Dir(path)))
					require.Equal(t, temp, filepath.Dir(filepath.Dir(path)))
					remove()
				}
				require.Zero(t, widest()&0o077, "group and others")
			})
		}
	}
}

// watchModes looks at all files below the directory again and again. The
// function it returns ends that and tells all permissions ever seen.
func watchModes(dir string) (widest func() fs.FileMode) {
	var seen fs.FileMode
	quit := make(chan struct{})
	done := async(func() {
		look := func(path string) {
			if info, err := os.Lstat(path); err == nil {
				seen |= info.Mode().Perm()
			}
		}
		for {
			select {
			case <-quit:
				return
			default:
			}
			f, err := os.Open(dir)
			if err != nil {
				return
			}
			names, _ := f.Readdirnames(-1)
			f.Close()
			for _, name := range names {
				look(filepath.Join(dir, name))
				look(filepath.Join(dir, name, "acomm.sock"))
				look(filepath.Join(dir, name, "stream.eof"))
			}
		}
	})
	return func() fs.FileMode {
		close(quit)
		<-done
		return seen
	}
}

func TestSocket_NamesOfTheLibraryCantBeGuessed(t *testing.T) {
	t.Setenv("TMPDIR", shortDir(t))
	tracker := newTracker(t)
	makers := inOwnPlace(t, tracker)
	given := shortDir(t)
	makers["stream in a directory of the caller"] = func() (string, func()) {
		u, err := tracker.NewStreamUnix(given, bytesSource(nil))
		require.NoError(t, err)
		return u.Path, func() { require.NoError(t, acomm.Stream(io.Discard, u)) }
	}
	all := map[string]bool{}
	for what, make := range makers {
		t.Run(what, func(t *testing.T) {
			const names = 200
			var columns []map[byte]bool // the characters seen at each place
			for range names {
				path, remove := make()
				remove()
				require.False(t, all[path], "a name came twice")
				all[path] = true
				for i := range len(path) {
					if i == len(columns) {
						columns = append(columns, map[byte]bool{})
					}
					columns[i][path[i]] = true
				}
			}
			var bits float64
			for _, column := range columns {
				if len(column) > 1 {
					require.Greater(t, len(column), 20, "a place that varies little")
					bits += math.Log2(float64(len(column)))
				}
			}
			want := 128.0
			if what == "stream in a directory of the caller" {
				want = 64 // 66, of which 200 names show less: the bytes of its path are scarce
			}
			require.GreaterOrEqual(t, bits, want)
		})
	}
}

// In a place of the caller's, the umask decides. Who wants it narrower makes the
// directory before, with the mode and group that suit: nobody else gets in,
// whatever the socket's mode.
func TestSocket_DirectoryOfTheCallerRestrictsWhoGetsIn(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the permissions of a new socket differ")
	}
	for mask, want := range map[int]fs.FileMode{0: 0o777, 0o022: 0o755, 0o027: 0o750, 0o077: 0o700} {
		t.Run(fmt.Sprintf("umask %03o", mask), func(t *testing.T) {
			narrow := filepath.Join(shortDir(t), "narrow")
			require.NoError(t, os.Mkdir(narrow, 0o750))
			require.NoError(t, os.Chmod(narrow, 0o710))
			setUmask(t, mask)
			ul := startListener(t, filepath.Join(narrow, "s.sock"), 0)
			tracker := newTracker(t)
			stream, err := tracker.NewStreamUnix(narrow, bytesSource(nil))
			require.NoError(t, err)
			for _, path := range []string{ul.Addr(), stream.Path} {
				require.Equal(t, fs.ModeSocket|want, mode(t, path))
			}
			require.Equal(t, fs.ModeDir|0o710, mode(t, narrow), "it stays as the caller made it")
			made, err := tracker.NewStreamUnix(filepath.Join(narrow, "made"), bytesSource(nil))
			require.NoError(t, err)
			dirs := []string{filepath.Dir(made.Path), filepath.Join(narrow, "a"), filepath.Join(narrow, "a", "b")}
			above := startListener(t, filepath.Join(dirs[2], "s.sock"), 0)
			require.Equal(t, fs.ModeSocket|want, mode(t, above.Addr()))
			for _, dir := range dirs {
				require.Equal(t, fs.ModeDir|want, mode(t, dir), "what the library makes follows the umask")
			}
		})
	}
}
