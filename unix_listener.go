package acomm

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
)

// The accept loop waits between failed attempts, for example while the process
// has no descriptor left: from the first of these to the second, doubling.
const (
	minAcceptDelay = 5 * time.Millisecond
	maxAcceptDelay = time.Second
)

const maxWrapped = 100 // wrappers around a connection; more must be one that wraps itself

// UnixListener is a wrapper for a unix socket. It handles creation and
// listening for new connections, as well as graceful shutdown. After Stop it can
// be started again. All methods may be called from any goroutine. The zero value
// can't be started: use [NewUnixListener].
type UnixListener struct {
	addr   string // as given
	path   string // absolute
	limit  int    // connections accepted in a run; 0 and below: no limit
	listen func(path string) (*socket, error)

	starting sync.Mutex // one Start at a time; taken before mu

	mu    sync.Mutex
	run   *listenerRun  // from Start to the end of Stop, else nil
	begun chan struct{} // closed by the first Start or Stop, which NextConn waits for
}

// listenerRun is what a listener has between Start and Stop.
type listenerRun struct {
	socket   *socket
	queue    *acceptQueue
	stopping chan struct{} // closed when Stop begins
	stopped  chan struct{} // closed when Stop is done
	refused  chan struct{} // closed when the accept loop has ended
}

// NewUnixListener creates and initializes a new UnixListener; nothing is touched
// before Start. AcceptLimit controls how many connections it will listen for
// before stopping; 0 and below is unlimited.
//
// A relative socketPath is taken from the directory the process is in now. If
// it is empty, the listener uses a socket with a random name in a directory of
// its own below [os.TempDir], which Start makes and Stop removes and only the
// process's user can enter.
func NewUnixListener(socketPath string, acceptLimit int) *UnixListener {
	if socketPath == "" {
		return newListener(randomSocketPath("acomm.sock"), acceptLimit, listenPrivate)
	}
	return newListener(socketPath, acceptLimit, listenAt)
}

// newListener is a listener with its own way to make the socket.
func newListener(addr string, limit int, listen func(string) (*socket, error)) *UnixListener {
	path := addr
	if !strings.HasPrefix(addr, "@") { // a name of another kind, which Start refuses
		if abs, err := filepath.Abs(addr); err == nil {
			path = abs
		}
	}
	return &UnixListener{addr: addr, path: path, limit: limit, listen: listen, begun: make(chan struct{})}
}

// Addr returns the string representation of the unix address: the socket path
// as it was given, or the one the library chose.
func (ul *UnixListener) Addr() string {
	return ul.addr
}

// URL returns the URL representation of the unix address: scheme unix and the
// absolute path. The caller owns it.
func (ul *UnixListener) URL() *url.URL {
	return &url.URL{Scheme: "unix", Path: ul.path}
}

// Start prepares the listener and starts listening for new connections. Missing
// parent directories are created, a socket file whose owner is dead is replaced.
//
// On a started listener, and where the path belongs to a live listener or to a
// file that is not a socket, the error matches [syscall.EADDRINUSE]; while Stop
// is under way [net.ErrClosed]; with a path that is too long
// [syscall.ENAMETOOLONG]; with one that is no path of a socket
// [io/fs.ErrInvalid]. After an error the listener is as it was. It blocks for
// milliseconds; at most 5 s, when a dead socket file is to be replaced and another
// process holds a lock on the directory.
func (ul *UnixListener) Start() error {
	ul.starting.Lock()
	defer ul.starting.Unlock()
	if err := ul.checkStopped(); err != nil {
		return fmt.Errorf("start listener %s: %w", ul.addr, err)
	}
	if ul.listen == nil {
		return fmt.Errorf("start listener: not made by NewUnixListener: %w", fs.ErrInvalid)
	}
	socket, err := ul.listen(ul.path)
	if err != nil {
		return fmt.Errorf("start listener %s: %w", ul.addr, err)
	}

	run := &listenerRun{
		socket:   socket,
		queue:    newAcceptQueue(socket, ul.limit <= 0),
		stopping: make(chan struct{}),
		stopped:  make(chan struct{}),
		refused:  make(chan struct{}),
	}
	ul.mu.Lock()
	defer ul.mu.Unlock()
	ul.run = run
	ul.beginLocked()
	go ul.accept(run) // ends with the socket; Stop waits for refused
	return nil
}

// beginLocked lets NextConn go on that was called before the first Start. The caller
// holds mu.
func (ul *UnixListener) beginLocked() {
	select {
	case <-ul.begun:
	default:
		close(ul.begun)
	}
}

// checkStopped gives the reason why the listener can't be started, if any.
func (ul *UnixListener) checkStopped() error {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	if ul.run == nil {
		return nil
	}
	select {
	case <-ul.run.stopping:
		return fmt.Errorf("it is stopping: %w", net.ErrClosed)
	default:
		return fmt.Errorf("it is started already: %w", syscall.EADDRINUSE)
	}
}

// NextConn blocks and returns the next connection, in the order of their
// arrival. It returns nil when there is none and none can come: the listener is
// stopped and all connections accepted before have been handed out, or the accept
// limit is reached and all were. Before the first Start it waits for that; a Stop
// ends the wait. Connections should be handled in a goroutine to take advantage of
// concurrency. When done, the connection MUST be finished with a call to DoneConn.
//
// The connection has no deadline. A peer may connect and stay silent, so set one
// before reading. It has the SyscallConn method of [net.UnixConn], for the peer's
// credentials. It may be of another type.
//
// On Linux, and without an accept limit, a sender that has this library too opens a
// session, 256 to a listener: one connection that carries many exchanges. Each of them
// is returned as a connection of its own, and used in the same way. Its LocalAddr and
// RemoteAddr are those of the session by which its sender came (it has a random name that
// begins with @acomm-3s/), its deadlines bound this exchange alone. What is written up
// to the end of a frame is the answer; Write queues it without blocking, and what is
// written after it gives an error that matches [syscall.EPIPE]. Read gives the sender's
// frame, then blocks until the exchange is answered or the sender has given up, and
// returns [io.EOF]. Of SyscallConn, Control works; Read and Write give an error that
// matches [errors.ErrUnsupported], as the socket is shared. A listener has at most 4 MiB
// of messages of each session ahead of NextConn, half of which the sender has given up
// on; it serves no others on that session.
//
// Any number of goroutines may call it; each connection goes to one of them.
func (ul *UnixListener) NextConn() net.Conn {
	if ul.begun == nil {
		return nil // not made by NewUnixListener, can't be started
	}
	<-ul.begun
	run := ul.current()
	if run == nil {
		return nil
	}
	return run.queue.next()
}

// DoneConn completes the handling of a connection and closes it. A wrapper whose
// method NetConn() net.Conn returns what it wraps, as that of [crypto/tls.Conn] does,
// is closed and completes what is inside, through up to 100 wrappers. With nil, a
// connection that is done already or one that is not from this listener it does
// nothing. It does not block, unless the Close of a wrapper does.
//
// Of a session only the exchange ends. A sender that was not answered learns it at once.
func (ul *UnixListener) DoneConn(conn net.Conn) {
	inner := unwrap(conn)
	run := ul.current()
	if run == nil || !run.queue.isOpen(inner) {
		return
	}
	closeWrapped(conn, inner) // before Stop can learn that nothing is open
	run.queue.done(inner)
}

// current returns the run of a listener that is started, else nil.
func (ul *UnixListener) current() *listenerRun {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	return ul.run
}

// unwrap returns what is wrapped in a connection, or itself.
func unwrap(conn net.Conn) net.Conn {
	for range maxWrapped {
		wrapper, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = wrapper.NetConn()
	}
	return conn
}

// closeWrapped closes a connection, first by the wrapper around it if there is one,
// which may have something to write before the end.
func closeWrapped(conn, inner net.Conn) {
	if conn != inner {
		_ = conn.Close()
	}
	_ = inner.Close()
}

// Stop stops listening for new connections, removes the socket file if it is
// still this listener's, and waits until every connection accepted before has
// been handed out by NextConn and finished with DoneConn. With a positive
// timeout it closes what is still open once the timeout has passed; with zero
// or less it waits as long as that takes. It is safe to call more than once,
// before Start, and from several goroutines: each call returns when the listener
// is down, and the timeout is that of the first.
//
// On sessions nothing more is served from now on, and the senders are told. Messages that
// were read count as accepted connections do: NextConn returns them. The senders may send
// the rest elsewhere. When the timeout has passed they are told which of the messages no
// handler has got; a sender that does not read then holds Stop up for 200 ms at most. Idle
// sessions don't delay it. When the process's last listener or tracker stops, the
// sessions that it has opened close too: idle ones at once, busy ones after their last
// exchange, for which Stop does not wait.
func (ul *UnixListener) Stop(timeout time.Duration) {
	ul.mu.Lock()
	run := ul.run
	if run == nil {
		if ul.begun != nil {
			ul.beginLocked()
		}
		ul.mu.Unlock()
		return
	}
	select {
	case <-run.stopping: // another call does the work
		ul.mu.Unlock()
		<-run.stopped
		return
	default:
	}
	close(run.stopping)
	ul.mu.Unlock()

	run.socket.close()
	<-run.refused
	run.queue.drain()
	run.waitDrained(timeout)
	run.queue.abort()
	<-run.queue.drained

	ul.mu.Lock()
	ul.run = nil
	ul.mu.Unlock()
	run.queue.leave()
	close(run.stopped)
}

// refuse ends the accepting of connections. Those accepted before are still
// handed out.
func (ul *UnixListener) refuse() {
	if run := ul.current(); run != nil {
		run.socket.close()
	}
}

// waitDrained waits for the open connections, for as long as Stop's timeout says.
func (run *listenerRun) waitDrained(timeout time.Duration) {
	if timeout <= 0 {
		<-run.queue.drained
		return
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-run.queue.drained:
	case <-timer.C:
	}
}

// accept takes connections from the socket until it is closed or the limit is
// reached.
func (ul *UnixListener) accept(run *listenerRun) {
	var failures logLimit
	delay := minAcceptDelay
	for accepted := 0; ul.limit <= 0 || accepted < ul.limit; {
		conn, err := run.socket.accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			failures.log(logrus.ErrorLevel, "failed to accept a connection", err, "", ul.addr)
			run.waitToAccept(delay)
			delay = min(2*delay, maxAcceptDelay)
			continue
		}
		delay = minAcceptDelay
		if accepted++; accepted == ul.limit {
			run.socket.close() // first, so that whoever comes after this one finds nobody
		}
		run.queue.accept(conn)
	}
	run.socket.close()
	run.queue.close()
	close(run.refused)
}

// waitToAccept lets the delay pass, or the listener stop.
func (run *listenerRun) waitToAccept(delay time.Duration) {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-run.stopping:
	case <-timer.C:
	}
}
