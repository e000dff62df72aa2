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

// The accept loop waits after a failed attempt, for example while the process has no
// descriptor left. The wait begins with the first of these and doubles up to the second.
const (
	minAcceptDelay = 5 * time.Millisecond
	maxAcceptDelay = time.Second
)

const maxWrapped = 100 // wrappers around a connection; with more, one probably wraps itself

// UnixListener listens on a unix socket, hands out the accepted connections, and stops
// gracefully. Make one with [NewUnixListener] and start it with Start. After Stop it can
// be started again. All methods may be called from any goroutine.
type UnixListener struct {
	// Immutable.
	addr   string // as given to NewUnixListener
	path   string // absolute
	limit  int    // connections accepted in a run; 0 and below: no limit
	listen func(path string) (*socket, error)

	starting sync.Mutex // one Start at a time; taken before mu

	mu    sync.Mutex
	run   *listenerRun  // from Start to the end of Stop, else nil
	begun chan struct{} // closed by the first Start or Stop; NextConn waits for it
}

// listenerRun is the state of a listener between Start and Stop.
type listenerRun struct {
	socket   *socket
	queue    *acceptQueue
	stopping chan struct{} // closed when Stop begins
	stopped  chan struct{} // closed when Stop is done
	refused  chan struct{} // closed when the accept loop has ended
}

// NewUnixListener creates a listener. It touches nothing on disk before Start.
//
// A relative socketPath is taken from the current directory of this moment. If socketPath
// is empty, Start makes a directory below [os.TempDir] that only the process's user can
// enter, and in it a socket with a random name. Stop removes both.
//
// The acceptLimit is the number of connections after which the listener stops listening;
// zero or less means no limit. A listener with a limit has no sessions.
func NewUnixListener(socketPath string, acceptLimit int) *UnixListener {
	if socketPath == "" {
		return newListener(randomSocketPath("acomm.sock"), acceptLimit, listenPrivate)
	}
	return newListener(socketPath, acceptLimit, listenAt)
}

// newListener creates a listener that makes its socket with the function listen.
func newListener(addr string, limit int, listen func(string) (*socket, error)) *UnixListener {
	path := addr
	if !strings.HasPrefix(addr, "@") { // an abstract name is not a path, and Start refuses it
		if abs, err := filepath.Abs(addr); err == nil {
			path = abs
		}
	}
	return &UnixListener{addr: addr, path: path, limit: limit, listen: listen, begun: make(chan struct{})}
}

// Addr returns the path of the socket: as it was given to [NewUnixListener], or as the
// library chose it.
func (ul *UnixListener) Addr() string {
	return ul.addr
}

// URL returns the URL of the socket: the scheme unix and the absolute path. The caller
// owns the result.
func (ul *UnixListener) URL() *url.URL {
	return &url.URL{Scheme: "unix", Path: ul.path}
}

// Start makes the socket and begins to accept connections. It creates missing parent
// directories and replaces the socket file of a dead process. It blocks for milliseconds;
// for 5 s at most if it has to replace a file while another process holds a lock on the
// directory.
//
// The errors match:
//
//   - [syscall.EADDRINUSE]: the listener is started already, or the path belongs to a
//     live listener or to a file that is not a socket
//   - [net.ErrClosed]: Stop is still running
//   - [syscall.ENAMETOOLONG]: the path is too long (Linux: over 107 bytes)
//   - [io/fs.ErrInvalid]: the path can't be that of a socket, or the listener was not
//     made by [NewUnixListener]
//   - [os.ErrDeadlineExceeded]: the directory was locked for more than 5 s
//
// After an error the listener is as it was.
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

// beginLocked wakes the NextConn calls that wait for the first Start. The caller holds
// mu.
func (ul *UnixListener) beginLocked() {
	select {
	case <-ul.begun:
	default:
		close(ul.begun)
	}
}

// checkStopped returns an error if the listener is started or stopping.
func (ul *UnixListener) checkStopped() error {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	if ul.run == nil {
		return nil
	}
	select {
	case <-ul.run.stopping:
		return fmt.Errorf("the last Stop has not returned yet: %w", net.ErrClosed)
	default:
		return fmt.Errorf("it is started already: %w", syscall.EADDRINUSE)
	}
}

// NextConn returns the next connection, in the order of arrival, and blocks until there
// is one. Handle each connection in a goroutine of its own, and finish it with
// [UnixListener.DoneConn], or Stop waits for it. Any number of goroutines may call
// NextConn; each connection goes to one of them.
//
// It returns nil if no connection is left and none can come: after Stop, or after the
// accept limit. Before the first Start it waits for that Start; a Stop ends the wait.
//
// The connection has no deadline. Set one before you read: a peer may connect and stay
// silent. Besides the methods of [net.Conn] it has SyscallConn, for the peer's
// credentials (SO_PEERCRED). Its type is not always [net.UnixConn].
//
// On Linux, and without an accept limit, a sender may open a session: one connection that
// carries many exchanges. A listener accepts 256 of them at most. NextConn returns each
// exchange as a connection of its own, and you use it in the same way:
//
//   - Read gives the sender's frame. Then it blocks until the exchange has been answered
//     or the sender has given up, and returns [io.EOF].
//   - Write queues the bytes up to the end of one frame as the answer, and does not
//     block. Later writes give an error that matches [syscall.EPIPE].
//   - Deadlines apply to this exchange only. The addresses are those of the session.
//   - SyscallConn's Control works. Its Read and Write give an error that matches
//     [errors.ErrUnsupported], since the exchanges share the socket.
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

// DoneConn closes a connection of NextConn and tells the listener that it is finished. On
// a session it ends the exchange only, and a sender without an answer learns that at
// once. It does not block, unless the Close method of a wrapper does.
//
// The argument may be a wrapper whose method NetConn() net.Conn returns the wrapped
// connection, as [crypto/tls.Conn] has it. DoneConn closes the wrapper and finishes the
// connection inside, through up to 100 wrappers. It does nothing with nil, a finished
// connection, or a connection of another listener.
func (ul *UnixListener) DoneConn(conn net.Conn) {
	inner := unwrap(conn)
	run := ul.current()
	if run == nil || !run.queue.isOpen(inner) {
		return
	}
	closeWrapped(conn, inner) // before Stop can learn that nothing is open
	run.queue.done(inner)
}

// current returns the listener's run; nil if it is not started.
func (ul *UnixListener) current() *listenerRun {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	return ul.run
}

// unwrap returns the innermost connection inside of wrappers, or the connection itself.
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

// closeWrapped closes the wrapper, if there is one, and then the connection inside. A
// wrapper may have to write something first, as TLS does.
func closeWrapped(conn, inner net.Conn) {
	if conn != inner {
		_ = conn.Close()
	}
	_ = inner.Close()
}

// Stop stops listening, removes the listener's socket file, and blocks until every
// accepted connection was handed out by NextConn and finished with DoneConn. When a
// positive timeout has passed, it closes the connections that are still open and returns;
// zero or less means no time limit. If another listener has replaced the socket file, the
// file stays.
//
// On sessions, messages that were read before the call count as accepted connections.
// Later ones are not served: their senders are told so and send them elsewhere. When the
// timeout has passed, that also holds for messages that NextConn has not returned; a
// sender that does not read then delays Stop by 200 ms at most. Idle sessions do not
// delay it.
//
// When the process's last listener or tracker stops, the sessions that the process opened
// close too: idle ones at once, busy ones after their last exchange. Stop does not wait
// for the busy ones.
//
// Stop may be called more than once, before Start, and from several goroutines. Each call
// returns when the listener is down; the timeout of the first call counts.
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

// refuse lets no further connection be accepted. Earlier ones are still handed out.
func (ul *UnixListener) refuse() {
	if run := ul.current(); run != nil {
		run.socket.close()
	}
}

// waitDrained waits until no connection is open, for the timeout of Stop at most.
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

// accept accepts connections until the socket is closed or the accept limit is reached.
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
			run.socket.close() // before this connection is handed out: a later sender must find no listener
		}
		run.queue.accept(conn)
	}
	run.socket.close()
	run.queue.close()
	close(run.refused)
}

// waitToAccept waits for the delay, or until the listener stops.
func (run *listenerRun) waitToAccept(delay time.Duration) {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-run.stopping:
	case <-timer.C:
	}
}
