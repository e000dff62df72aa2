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
	// maxSocketPath is the limit of a socket address, without the NUL at its end.
	maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

	// lockTimeout bounds the wait for a process that replaces a dead socket in the
	// same directory. That takes milliseconds.
	lockTimeout = 5 * time.Second

	// insideBind is the time another process may need inside bind. The kernel makes the
	// file a moment before it binds the socket to it. Until then the file looks dead.
	// Between bind and listen it looks alive.
	insideBind = 20 * time.Millisecond
)

// socket is a listening unix socket and its file.
type socket struct {
	*net.UnixListener
	path string
	file fs.FileInfo // the socket's own file, even if the path leads to another one now
	dir  string      // private directory that close removes; empty: none

	closing sync.Once
}

// fileID identifies a state of a socket file. It differs between two files, and also
// between a file before and after a change of its mode, owner or name. The inode number
// of a removed file may be used again; then the time differs.
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

// randomSocketPath returns the path of a socket in a private directory with a name that
// nobody can guess.
func randomSocketPath(name string) string {
	return filepath.Join(os.TempDir(), "acomm-"+rand.Text(), name)
}

// socketPath returns the path of the socket that a unix URL leads to: its Path, if there
// is a socket. In "unix://" + path, the URL parser takes ? for a query, # for a fragment
// and %41 for an A. So if no socket is at Path but one is at the text as it was written,
// it returns that.
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

// asWritten returns the text that was parsed: raw if it decodes to decoded, else escaped.
// A peer may send raw text that does not: to fool a check that looks at the path only.
func asWritten(decoded, raw, escaped string) string {
	if text, err := url.PathUnescape(raw); raw != "" && err == nil && text == decoded {
		return raw
	}
	return escaped
}

// locate returns a unix URL with only the path of its socket. It returns other URLs as
// they are.
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

// checkSocketPath refuses what can't be the path of a socket file.
func checkSocketPath(path string) error {
	switch {
	case path == "":
		return fmt.Errorf("socket path is empty: %w", fs.ErrInvalid)
	case strings.ContainsRune(path, 0):
		return fmt.Errorf("socket path %q contains NUL: %w", path, fs.ErrInvalid)
	case path[0] == '@':
		return fmt.Errorf("socket path %q names an abstract socket, not a file: %w", path, fs.ErrInvalid)
	case len(path) > maxSocketPath:
		return fmt.Errorf("socket path %q has %d bytes, the limit is %d: %w", path, len(path), maxSocketPath, syscall.ENAMETOOLONG)
	}
	return nil
}

// listenPrivate makes a socket that only this user can reach, in a new directory of its
// own.
func listenPrivate(path string) (*socket, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	err := os.Chmod(dir, 0o700) // the umask may have removed bits
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

// listenUnclaimed makes a socket under a random name, which no other process uses. The
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

// listenAt makes a socket at a path that other processes may use too. It replaces the
// socket file of a dead process. The process's umask decides the permissions.
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
	unlock, err := lockDir(dir) // needed only to remove a file
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeDead(path); err != nil {
		return nil, err
	}
	return bind(path, 0)
}

// bind makes the socket and its file. If mode is not zero, the file has that mode: on
// Linux from the start, elsewhere from a moment later.
func bind(path string, mode fs.FileMode) (*socket, error) {
	var config net.ListenConfig
	if mode != 0 {
		config.Control = func(_, _ string, c syscall.RawConn) error {
			// On Linux the file inherits the mode of the socket. Other systems refuse
			// this; for them there is the chmod below.
			return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), uint32(mode)) })
		}
	}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	s := &socket{UnixListener: l.(*net.UnixListener), path: path}
	s.SetUnlinkOnClose(false) // it would also remove a file that has replaced ours
	if s.file, err = os.Lstat(path); err == nil && mode != 0 && s.file.Mode().Perm() != mode {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// id returns the fileID of the socket's file at the time it was made.
func (s *socket) id() fileID {
	st, ok := s.file.Sys().(*syscall.Stat_t)
	if !ok {
		return fileID{}
	}
	return newFileID(st)
}

// accept waits for a connection. If the process has no descriptor left, it closes idle
// sessions and tries again.
func (s *socket) accept() (*net.UnixConn, error) {
	for {
		conn, err := s.AcceptUnix()
		if err == nil || !lacksDescriptor(err) || !sessions.makeRoom() {
			return conn, err
		}
	}
}

// close removes the socket's file and its private directory and ends accept. Only the
// first call does something.
func (s *socket) close() {
	s.closing.Do(func() {
		// While the socket is open, the inode number of its file can't be used again. So
		// an equal number means that the file is still ours. Close comes last.
		if now, err := os.Lstat(s.path); err == nil && s.file != nil && os.SameFile(now, s.file) {
			_ = os.Remove(s.path)
		}
		if s.dir != "" {
			_ = os.Remove(s.dir)
		}
		_ = s.UnixListener.Close()
	})
}

// removeDead removes the socket file of a dead process. The caller holds the directory's
// lock.
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

// checkDead returns an error unless the socket file is dead, or gone.
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

// isDead reports whether nobody listens on the socket file. It connects a datagram socket
// to it. The kernel refuses that: with EPROTOTYPE if the listener is alive, with
// ECONNREFUSED if it is dead. The listener does not notice.
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
		return false, conn.Close() // a datagram socket, and in use
	case errors.Is(err, syscall.ECONNREFUSED):
		return true, nil
	case errors.Is(err, syscall.EPROTOTYPE):
		return false, nil
	}
	return false, fmt.Errorf("can't tell that the owner of socket %s is dead, so it stays: %w: %w", path, syscall.EADDRINUSE, err)
}

// lockDir locks the directory against other processes that want to remove a dead socket
// in it. Of several that find the same dead file, one replaces it and the others then
// find a live one. If the file system has no locks, or the process may not read the
// directory, it does without.
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
			return nil, fmt.Errorf("lock directory %s: %w", dir, err)
		case time.Now().After(deadline):
			_ = f.Close()
			return nil, fmt.Errorf("lock directory %s: another process holds the lock: %w", dir, os.ErrDeadlineExceeded)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// dialUnix connects a socket with the name, if any, to the listener at the path. While
// the listener's backlog is full it tries again until the context ends.
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
			return nil, fmt.Errorf("the listener's backlog is full: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// bindName names a socket that is about to connect. If that fails, the socket connects
// without a name, and no session will be opened.
func bindName(name string) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			_ = syscall.Bind(int(fd), &syscall.SockaddrUnix{Name: name})
		})
	}
}
