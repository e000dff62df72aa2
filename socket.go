package acomm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// maxSocketPath is what fits a socket address, with its closing NUL.
	maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

	// lockTimeout bounds the wait for another process that is replacing a dead
	// socket in the same directory, which takes it milliseconds.
	lockTimeout = 5 * time.Second

	// insideBind is how long a process is given inside bind. The kernel makes the
	// file a moment before it ties the socket to it, which looks dead until then; a
	// socket that has yet to listen looks alive.
	insideBind = 20 * time.Millisecond
)

// socket is a listening unix socket with its file.
type socket struct {
	*net.UnixListener
	path string
	file fs.FileInfo // the socket's own file, whatever the path leads to now
	dir  string      // private directory that goes with the socket, or ""

	closing sync.Once
}

// fileID tells socket files apart, and a file before its mode, owner or name changed
// from the same file after it. The number of a file that is gone is used again, the
// time is then another.
type fileID struct {
	device, inode uint64
	changed       syscall.Timespec
}

// isSame reports whether it is the same file, changed or not.
func (f fileID) isSame(other fileID) bool {
	return f.device == other.device && f.inode == other.inode
}

func statFile(path string) (fileID, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fileID{}, err
	}
	return newFileID(&st), nil
}

func newFileID(st *syscall.Stat_t) fileID {
	return fileID{uint64(st.Dev), uint64(st.Ino), changeTime(st)}
}

// randomSocketPath names a socket in a private directory. Nobody can guess it.
func randomSocketPath(name string) string {
	return filepath.Join(os.TempDir(), "acomm-"+rand.Text(), name)
}

// socketPath returns the path of the socket that a URL of the scheme unix leads to.
// Where the parser took a part of "unix://" + path for a query, a fragment or an
// escape, and no socket is at what is left, it is the text as it was written.
func socketPath(u *url.URL) string {
	written := asWritten(u.Path, u.RawPath, u.EscapedPath())
	if u.RawQuery != "" || u.ForceQuery {
		written += "?" + u.RawQuery
	}
	if u.Fragment != "" {
		written += "#" + asWritten(u.Fragment, u.RawFragment, u.EscapedFragment())
	}
	if written == u.Path || isSocket(u.Path) || !isSocket(written) {
		return u.Path
	}
	return written
}

// asWritten returns the text that was parsed: raw, or else escaped. Raw text that
// decodes to something else was never parsed: a peer has made it up, for those who
// look at the path and not at it.
func asWritten(decoded, raw, escaped string) string {
	if text, err := url.PathUnescape(raw); raw != "" && err == nil && text == decoded {
		return raw
	}
	return escaped
}

// locate returns a URL of the scheme unix with nothing but the path of its socket;
// others as they are.
func locate(u *url.URL) (*url.URL, error) {
	if u.Scheme != "unix" {
		return u, nil
	}
	if err := checkUnixURL(u); err != nil {
		return nil, err
	}
	return &url.URL{Scheme: u.Scheme, Path: socketPath(u)}, nil
}

func isSocket(path string) bool {
	file, err := os.Stat(path)
	return err == nil && file.Mode().Type() == fs.ModeSocket
}

// checkSocketPath refuses what is no path of a socket file.
func checkSocketPath(path string) error {
	switch {
	case path == "":
		return fmt.Errorf("socket path is empty: %w", fs.ErrInvalid)
	case strings.ContainsRune(path, 0):
		return fmt.Errorf("socket path %q contains NUL: %w", path, fs.ErrInvalid)
	case path[0] == '@':
		return fmt.Errorf("socket path %q is the name of an abstract socket: %w", path, fs.ErrInvalid)
	case len(path) > maxSocketPath:
		return fmt.Errorf("socket path %q has %d bytes, limit %d: %w", path, len(path), maxSocketPath, syscall.ENAMETOOLONG)
	}
	return nil
}

// listenPrivate makes a socket that only this user can reach, in a new
// directory of its own that goes with it.
func listenPrivate(path string) (*socket, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	err := os.Chmod(dir, 0o700) // whatever the umask took away
	var s *socket
	if err == nil {
		s, err = bind(path, 0o600)
	}
	if err != nil {
		_ = os.Remove(dir)
		return nil, err
	}
	s.dir = dir
	return s, nil
}

// listenUnclaimed makes a socket at a path that nobody else knows of. The
// process's umask decides its permissions.
func listenUnclaimed(path string) (*socket, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return nil, err
	}
	return bind(path, 0)
}

// listenAt makes a socket at a path that others may want as well. The socket
// file of a dead process is replaced. The process's umask decides the
// permissions.
func listenAt(path string) (*socket, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	s, err := bind(path, 0)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return s, err
	}
	if err := checkDead(path); err != nil {
		return nil, err
	}
	unlock, err := lockDir(dir) // only who removes a file needs the others to wait
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeDead(path); err != nil {
		return nil, err
	}
	return bind(path, 0)
}

// bind makes the socket and its file. With a mode other than zero the file has
// that mode from the start; elsewhere than on Linux, from a moment later.
func bind(path string, mode fs.FileMode) (*socket, error) {
	var config net.ListenConfig
	if mode != 0 {
		config.Control = func(_, _ string, c syscall.RawConn) error {
			// The file inherits the mode of the socket on Linux; other systems
			// refuse this, and have the chmod below.
			return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), uint32(mode)) })
		}
	}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	s := &socket{UnixListener: l.(*net.UnixListener), path: path}
	s.SetUnlinkOnClose(false) // it would remove whatever is there by then
	if s.file, err = os.Lstat(path); err == nil && mode != 0 && s.file.Mode().Perm() != mode {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// id returns what tells the socket's file from others.
func (s *socket) id() fileID {
	st, ok := s.file.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}
	}
	return newFileID(st)
}

// accept waits for a connection. Where a descriptor is lacking, idle sessions give way.
func (s *socket) accept() (*net.UnixConn, error) {
	for {
		conn, err := s.AcceptUnix()
		if err == nil || !lacksDescriptor(err) || !sessions.makeRoom() {
			return conn, err
		}
	}
}

// close removes the socket's file and its private directory and ends Accept.
// Once is enough, more does no harm.
func (s *socket) close() {
	s.closing.Do(func() {
		// While the socket is open its file's inode can't be used again, so an
		// equal number means that the file is still ours. That ends with Close.
		if now, err := os.Lstat(s.path); err == nil && s.file != nil && os.SameFile(now, s.file) {
			_ = os.Remove(s.path)
		}
		if s.dir != "" {
			_ = os.Remove(s.dir)
		}
		_ = s.UnixListener.Close()
	})
}

// removeDead removes the socket file of a process that is gone. The caller holds
// the directory's lock.
func removeDead(path string) error {
	if err := checkDead(path); err != nil {
		return err
	}
	time.Sleep(insideBind)
	if err := checkDead(path); err != nil {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// checkDead returns an error unless the file is a dead socket's, or gone.
func checkDead(path string) error {
	dead, err := isDead(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && !dead {
		err = fmt.Errorf("socket %s has a live listener: %w", path, syscall.EADDRINUSE)
	}
	return err
}

// isDead reports whether nobody listens on the socket file. It asks with a
// datagram socket, which the kernel refuses in two ways, and a live listener
// never sees.
func isDead(path string) (bool, error) {
	file, err := os.Lstat(path)
	if err != nil {
		return false, err
	}
	if file.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("%s is not a socket: %w", path, syscall.EADDRINUSE)
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	switch {
	case err == nil:
		return false, conn.Close() // somebody's datagram socket
	case errors.Is(err, syscall.ECONNREFUSED):
		return true, nil
	case errors.Is(err, syscall.EPROTOTYPE):
		return false, nil
	}
	return false, fmt.Errorf("socket %s is in use or not ours to replace: %w: %w", path, syscall.EADDRINUSE, err)
}

// lockDir keeps other processes from removing dead sockets in the directory, so
// that of several that find the same dead file one replaces it and the others
// find that one alive. File systems without locks do without, and so do
// directories that the process may write to but not read.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrPermission) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(lockTimeout)
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOLCK):
			return func() { _ = f.Close() }, nil
		case !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR):
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		case time.Now().After(deadline):
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: held by another process: %w", dir, os.ErrDeadlineExceeded)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// dialUnix connects to a stream socket at the path, by a socket with the name. Where its
// backlog is full it tries again until the context ends.
func dialUnix(ctx context.Context, path, name string) (*net.UnixConn, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dialer := &net.Dialer{}
	if name != "" {
		dialer.Control = bindName(name)
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if lacksDescriptor(err) && sessions.makeRoom() {
			continue
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("backlog is full: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// bindName names a socket that is about to connect. Without the name it connects as
// well, but there will be no session.
func bindName(name string) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			_ = syscall.Bind(int(fd), &syscall.SockaddrUnix{Name: name})
		})
	}
}
