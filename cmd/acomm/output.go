package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// download is a file that is written beside its place and moved there when it is
// complete. What is no regular file, such as /dev/null, is written in place.
type download struct {
	*os.File
	path string      // where it belongs; empty: it is there already
	mode os.FileMode // of the file it replaces; 0: there is none

	once sync.Once // guards the end
}

// newDownload opens a file for what belongs at the path.
func newDownload(path string) (*download, error) {
	path = followLinks(path)
	d := &download{path: path}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, fmt.Errorf("%s is a directory", path)
	case err == nil && !info.Mode().IsRegular():
		d.path = ""
		d.File, err = os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0) // a pipe that nobody reads is an error
		return d, err
	case err == nil:
		d.mode = info.Mode().Perm()
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	// Not with the file's name in it, which may be as long as a name can be.
	name := filepath.Join(filepath.Dir(path), ".acomm-"+rand.Text()[:8]+".part")
	d.File, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	return d, err
}

// maxLinks is how many links to one another are followed, as by the system.
const maxLinks = 40

// followLinks returns where a file is, or would be if it is not there: a link to it
// stays. What it can't make out it leaves to the system.
func followLinks(path string) string {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			return real
		}
		return path // such as /dev/stdout, whose target is no path
	}
	for at, links := path, 0; links < maxLinks; links++ {
		dir, name := filepath.Split(at) // not Dir, which cleans: before a .. there may be a link
		dir, err := filepath.EvalSymlinks(dir + ".")
		if err != nil {
			break
		}
		at = filepath.Join(dir, name)
		target, err := os.Readlink(at)
		if err != nil {
			return at
		}
		if !filepath.IsAbs(target) {
			target = dir + string(filepath.Separator) + target
		}
		at = target
	}
	return path
}

// complete closes the file and moves it to its place. After an error nothing of
// it is left.
func (d *download) complete() (err error) {
	d.once.Do(func() {
		if d.path == "" {
			err = d.Close()
			return
		}
		if d.mode != 0 {
			err = d.Chmod(d.mode)
		}
		// Synced first: after a crash the name must not stand for a part.
		err = errors.Join(err, d.Sync(), d.Close())
		if err == nil {
			err = os.Rename(d.Name(), d.path)
		}
		if err != nil {
			_ = os.Remove(d.Name())
		}
	})
	return err
}

// abort removes what has been written, unless it is complete.
func (d *download) abort() {
	d.once.Do(func() {
		_ = d.Close()
		if d.path != "" {
			_ = os.Remove(d.Name())
		}
	})
}
