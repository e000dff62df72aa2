package acomm

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"slices"
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

// listenerRun is what a listener has between Start and Stop. The listener's mu
// guards the fields below changed.
type listenerRun struct {
	socket   *socket
	stopping chan struct{} // closed when Stop begins
	drained  chan struct{} // closed when Stop has begun and no connection is open
	stopped  chan struct{} // closed when Stop is done
	refused  chan struct{} // closed when the accept loop has ended
	changed  *sync.Cond    // waiting, accepting or reading have changed

	accepting bool                       // the accept loop runs
	waiting   []net.Conn                 // arrived, not yet handed out; oldest first
	open      map[net.Conn]struct{}      // arrived, not yet done; nil once Stop has closed them
	offered   map[*firstConn]struct{}    // may be kept by their senders
	kept      map[*keptListener]struct{} // are kept
	reading   int                        // of the kept ones, those on which exchanges may arrive
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
		socket:    socket,
		stopping:  make(chan struct{}),
		drained:   make(chan struct{}),
		stopped:   make(chan struct{}),
		refused:   make(chan struct{}),
		changed:   sync.NewCond(&ul.mu),
		accepting: true,
		open:      make(map[net.Conn]struct{}),
		offered:   make(map[*firstConn]struct{}),
		kept:      make(map[*keptListener]struct{}),
	}
	kept.join()
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
// credentials: Control works, and where the socket may be shared Read and Write give
// an error that matches [errors.ErrUnsupported]. It may be of another type.
//
// On Linux, and without an accept limit, senders that have this library too keep
// their connections, 256 to a listener: then what is returned stands for one
// exchange, and others may use the same socket. It is used in the same way. Its
// LocalAddr and RemoteAddr are those of the connection by which its sender came (it
// has a random name that begins with @acomm-keep-2/), its deadlines bound this exchange
// alone. What
// is written up to the end of a frame is the answer; Write hands it over without
// blocking, and what is written after it gives an error that matches
// [syscall.EPIPE]. Read gives the sender's frame, then blocks until the exchange
// is answered or the sender has given up, and returns [io.EOF]. A listener has at
// most 4 MiB of messages of each kept connection ahead of NextConn, half of which the
// sender has given up on; it serves no others on that connection.
//
// Any number of goroutines may call it; each connection goes to one of them.
func (ul *UnixListener) NextConn() net.Conn {
	if ul.begun == nil {
		return nil // not made by NewUnixListener, can't be started
	}
	<-ul.begun
	ul.mu.Lock()
	defer ul.mu.Unlock()
	run := ul.run
	if run == nil {
		return nil
	}
	for len(run.waiting) == 0 && (run.accepting || run.reading > 0) {
		run.changed.Wait()
	}
	if len(run.waiting) == 0 {
		return nil
	}
	conn := run.waiting[0]
	run.waiting[0] = nil
	run.waiting = run.waiting[1:]
	if e, ok := conn.(*exchange); ok {
		e.c.handed = e.number
		e.c.queued -= e.size + keptCost
	}
	return conn
}

// DoneConn completes the handling of a connection and closes it. A wrapper whose
// method NetConn() net.Conn returns what it wraps, as that of [crypto/tls.Conn] does,
// is closed and completes what is inside, through up to 100 wrappers. With nil, a
// connection that is done already or one that is not from this listener it does
// nothing. It does not block, unless the Close of a wrapper does.
//
// A connection that its sender keeps goes on without the handler: only the
// exchange ends, and a sender that was not answered learns it at once. One that was
// offered to its sender, with the acknowledgement, is closed 200 ms later if the
// sender does not take it. The connection is of no use to the caller in each case.
func (ul *UnixListener) DoneConn(conn net.Conn) {
	inner := unwrap(conn)
	switch c := inner.(type) { // what NextConn returns
	case *exchange:
		ul.doneExchange(c, conn)
		return
	case *firstConn, *net.UnixConn:
	default:
		return
	}
	ul.mu.Lock()
	run := ul.run
	var ok bool
	if run != nil {
		_, ok = run.open[inner]
	}
	ul.mu.Unlock()
	if !ok {
		return
	}
	closeWrapped(conn, inner) // before Stop can learn that nothing is open
	ul.mu.Lock()
	delete(run.open, inner)
	run.checkDrainedLocked()
	ul.mu.Unlock()
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

// doneExchange is DoneConn for what came on a connection that is kept. The handler
// has it as conn.
func (ul *UnixListener) doneExchange(e *exchange, conn net.Conn) {
	if e == nil || e.c.ul != ul || e.done.Swap(true) {
		return
	}
	closeWrapped(conn, e)
	ul.mu.Lock()
	defer ul.mu.Unlock()
	delete(e.c.run.open, e)
	e.c.run.checkDrainedLocked()
}

// Stop stops listening for new connections, removes the socket file if it is
// still this listener's, and waits until every connection accepted before has
// been handed out by NextConn and finished with DoneConn. With a positive
// timeout it closes what is still open once the timeout has passed; with zero
// or less it waits as long as that takes. It is safe to call more than once,
// before Start, and from several goroutines: each call returns when the listener
// is down, and the timeout is that of the first.
//
// On connections that senders keep, nothing more is read from now on, and the senders
// are told: what has been read counts as accepted connections do, NextConn returns
// it; the rest they may send elsewhere. When the timeout has passed they are told
// which of the messages no handler has got; a sender that does not read then holds
// Stop up for 200 ms at most. Connections at rest don't delay it. With the last listener
// and tracker of the process those that this process keeps as a sender are closed
// too: at once if they are at rest, else after their last exchange, for which Stop
// does not wait.
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
	ul.refuseMore(run)
	run.waitDrained(timeout)
	ul.closeOpen(run)
	<-run.drained

	ul.mu.Lock()
	ul.run = nil
	ul.mu.Unlock()
	kept.leave()
	close(run.stopped)
}

// refuseMore lets nothing more be sent on the connections that are kept.
func (ul *UnixListener) refuseMore(run *listenerRun) {
	ul.mu.Lock()
	offered, keeping := slices.Collect(maps.Keys(run.offered)), slices.Collect(maps.Keys(run.kept))
	run.checkDrainedLocked()
	ul.mu.Unlock()
	for _, f := range offered {
		f.withdraw()
	}
	for _, c := range keeping {
		c.refuse()
	}
}

// closeOpen closes what is still open.
func (ul *UnixListener) closeOpen(run *listenerRun) {
	ul.mu.Lock()
	left := run.open
	run.open, run.waiting = nil, nil
	handed := make(map[*keptListener]uint32)
	for c := range run.kept {
		handed[c] = c.handed
	}
	run.checkDrainedLocked()
	ul.mu.Unlock()
	for c, number := range handed {
		c.stop(number)
	}
	for conn := range left {
		_ = conn.Close()
	}
}

// refuse ends the accepting of connections. Those accepted before are still
// handed out.
func (ul *UnixListener) refuse() {
	ul.mu.Lock()
	run := ul.run
	ul.mu.Unlock()
	if run != nil {
		run.socket.close()
	}
}

// waitDrained waits for the open connections, for as long as Stop's timeout says.
func (run *listenerRun) waitDrained(timeout time.Duration) {
	if timeout <= 0 {
		<-run.drained
		return
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-run.drained:
	case <-timer.C:
	}
}

// checkDrainedLocked tells Stop, once it has begun and the accept loop has ended,
// when the last connection is done. The caller holds the listener's mu.
func (run *listenerRun) checkDrainedLocked() {
	if run.accepting || len(run.open)+len(run.offered)+len(run.kept) > 0 {
		return
	}
	select {
	case <-run.stopping:
	default:
		return // the accept limit is reached, nobody waits
	}
	select {
	case <-run.drained:
	default:
		close(run.drained)
	}
}

// accept takes connections from the socket until it is closed or the limit is
// reached.
func (ul *UnixListener) accept(run *listenerRun) {
	var failures logLimit
	delay := minAcceptDelay
	for accepted := 0; ul.limit <= 0 || accepted < ul.limit; {
		unixConn, err := run.socket.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil && lacksDescriptor(err) && (kept.makeRoom() || ul.makeRoom(run)) {
			continue
		}
		if err != nil {
			failures.log(logrus.ErrorLevel, "failed to accept a connection", err, "", ul.addr)
			run.waitToAccept(delay)
			delay = min(2*delay, maxAcceptDelay)
			continue
		}
		delay = minAcceptDelay
		var conn net.Conn = unixConn
		if keepsConns && ul.limit <= 0 && namedKeeper(unixConn) {
			conn = &firstConn{conn: unixConn, ul: ul, run: run}
		}
		if accepted++; accepted == ul.limit {
			run.socket.close() // first, so that whoever comes after this one finds nobody
		}
		ul.mu.Lock()
		run.open[conn] = struct{}{}
		run.waiting = append(run.waiting, conn)
		run.changed.Signal()
		ul.mu.Unlock()
	}
	run.socket.close()
	ul.mu.Lock()
	run.accepting = false
	run.changed.Broadcast()
	ul.mu.Unlock()
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

// mayOffer reports whether the connection may be kept, and counts it as one that
// may.
func (ul *UnixListener) mayOffer(f *firstConn) bool {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	if f.run.isStopping() || !f.run.mayKeepLocked() {
		return false
	}
	f.run.offered[f] = struct{}{}
	return true
}

// promote makes a connection one that is kept, unless the listener stops.
func (ul *UnixListener) promote(f *firstConn) *keptListener {
	on, err := newKeptConn(f.conn, 2*keptRest)
	if err != nil {
		return nil
	}
	_, _ = rand.Read(on.token[:]) // never fails
	c := newKeptListener(on, ul, f.run, f.conn.LocalAddr(), f.conn.RemoteAddr())
	on.serves.Store(c)
	ul.mu.Lock()
	defer ul.mu.Unlock()
	if f.run.isStopping() {
		return nil
	}
	f.run.addKeptLocked(c)
	return c
}

// serveOn lets what a sender sends to the listener come by another connection, too.
func (ul *UnixListener) serveOn(on *keptConn, like *keptListener) bool {
	on.out.mu.Lock()
	defer on.out.mu.Unlock()
	ul.mu.Lock()
	defer ul.mu.Unlock()
	if on.finishing || on.serves.Load() != nil || like.run.isStopping() || !like.run.mayKeepLocked() {
		return false
	}
	c := newKeptListener(on, ul, like.run, like.local, like.remote)
	c.settled.Store(true) // it is the sender who has been found
	on.serves.Store(c)
	like.run.addKeptLocked(c)
	return true
}

// mayKeepLocked reports whether another connection may be kept. The caller holds the
// listener's mu.
func (run *listenerRun) mayKeepLocked() bool { return len(run.offered)+len(run.kept) < mostKept() }

// makeRoom ends the connections that are kept and at rest. It reports whether there were
// any.
func (ul *UnixListener) makeRoom(run *listenerRun) bool {
	ul.mu.Lock()
	keeping := slices.Collect(maps.Keys(run.kept))
	ul.mu.Unlock()
	room := false
	for _, c := range keeping {
		if c.rests() {
			c.refuse() // which closes it, if its peer reads
			room = true
		}
	}
	return room
}

// addKeptLocked adds a connection that is kept. The caller holds the listener's mu.
func (run *listenerRun) addKeptLocked(c *keptListener) {
	run.kept[c] = struct{}{}
	run.reading++
}

// offerEnded counts a connection as one that will not be kept, or is.
func (ul *UnixListener) offerEnded(f *firstConn) {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	delete(f.run.offered, f)
	f.run.checkDrainedLocked()
}

// queuedOf returns how many bytes of the connection are in the queue for NextConn.
func (ul *UnixListener) queuedOf(c *keptListener) int {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	return c.queued
}

// handOver puts an exchange in the queue for NextConn, unless the listener has
// stopped. The caller holds the out.mu of its connection.
func (ul *UnixListener) handOver(e *exchange) bool {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	run := e.c.run
	if run.open == nil {
		return false
	}
	e.c.queued += e.size + keptCost
	run.open[e] = struct{}{}
	run.waiting = append(run.waiting, e)
	run.changed.Signal()
	return true
}

// readingEnded notes that no more exchanges arrive on a connection. The caller holds
// its out.mu.
func (ul *UnixListener) readingEnded(c *keptListener) {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	c.run.reading--
	c.run.changed.Broadcast()
}

// keptEnded forgets a connection that was kept. The caller holds its out.mu.
func (ul *UnixListener) keptEnded(c *keptListener) {
	ul.mu.Lock()
	defer ul.mu.Unlock()
	delete(c.run.kept, c)
	c.run.checkDrainedLocked()
}

func (run *listenerRun) isStopping() bool {
	select {
	case <-run.stopping:
		return true
	default:
		return false
	}
}
