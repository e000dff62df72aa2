package acomm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The serving side of kept connections. A connection begins as a firstConn,
// which carries one exchange as ever. If its handler acknowledges with
// SendConnData, the acknowledgement offers to keep the connection. A sender that
// wants to says so at once, and the connection becomes a keptListener, on which
// each further message is an exchange: a net.Conn of its own for its handler.

const (
	keptOffer = `,"keep":1}`           // the end of an acknowledgement that offers to keep the connection
	keptGrace = 200 * time.Millisecond // for a sender to take the offer, once the handler is done
	keptQueue = 20 << 20               // bytes of answers not yet sent; with more the listener serves nothing further
	keptAhead = 2 * keptWindow         // bytes of messages not yet handed out; the same. The sender has given up on half of them
	keptCost  = 512                    // bytes that an exchange counts for beside its message
	keptTries = 16                     // hooks, to find the one whose listener's process is the sender
)

// firstConn is a connection with its first exchange. It passes everything through
// until the offer to keep it is made.
type firstConn struct {
	conn *net.UnixConn
	ul   *UnixListener
	run  *listenerRun

	mu      sync.Mutex // guards the fields below
	reading int        // calls of Read that are under way
	read    int        // bytes read by the handler
	frame   int        // of them, a frame read by UnmarshalConnData
	written bool       // by the handler, other than the acknowledgement with the offer
	state   firstState
	decided chan struct{} // made with the offer, closed when its outcome is known
	peeked  []byte        // read while the sender's word was awaited, and not it
	closed  bool          // by the handler
}

type firstState int

const (
	firstAlone    firstState = iota // has nothing to do with keeping
	firstOffering                   // the offer is being written
	firstOffered                    // awaitSender reads
	firstKept                       // goes on as a keptListener
)

// framed notes that a frame was read with so much payload.
func (f *firstConn) framed(payload int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frame = headerSize + payload
}

// acknowledge writes the frame of a Response, with the offer to keep the
// connection if it is an answer to the one frame that was read.
func (f *firstConn) acknowledge(frame []byte) error {
	if !f.mayOffer(len(frame)) {
		_, err := f.Write(frame)
		return err
	}
	offer := append(frame[:len(frame)-1:len(frame)-1], keptOffer...)
	binary.BigEndian.PutUint32(offer, uint32(len(offer)-headerSize))
	_, err := f.conn.Write(offer)
	f.mu.Lock()
	offered := err == nil && !f.closed
	if offered {
		f.state = firstOffered
	}
	f.mu.Unlock()
	if !offered {
		f.decide(false)
		return err
	}
	go f.awaitSender() // ends with the connection, or the handler's deadline, or serves on
	return nil
}

// mayOffer reports whether the acknowledgement may offer to keep the connection,
// which it may once.
func (f *firstConn) mayOffer(size int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frame == 0 || f.frame != f.read || f.reading > 0 || f.written || f.state != firstAlone || f.closed || size > keptLimit {
		return false
	}
	if !f.ul.mayOffer(f) {
		return false
	}
	f.state, f.decided = firstOffering, make(chan struct{})
	return true
}

// awaitSender reads the sender's word that it keeps the connection, and serves
// it. If anything else comes it is for the handler.
func (f *firstConn) awaitSender() {
	word := make([]byte, 0, len(keptHello))
	for len(word) < len(keptHello) && string(word) == keptHello[:len(word)] {
		n, err := f.conn.Read(word[len(word):cap(word)])
		word = word[:len(word)+n]
		if err != nil {
			break
		}
	}
	f.mu.Lock()
	f.peeked = word
	f.mu.Unlock()
	if c := f.decide(string(word) == keptHello); c != nil {
		c.read(c.agree)
	}
}

// decide ends the time of the offer. It returns the connection as it goes on, if
// it does.
func (f *firstConn) decide(keep bool) *keptListener {
	defer f.ul.offerEnded(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	var c *keptListener
	if keep && !f.written {
		c = f.ul.promote(f)
	}
	f.state, f.written = firstAlone, true // there is no second offer
	switch {
	case c != nil:
		f.state = firstKept
		_ = f.conn.SetDeadline(time.Time{}) // whatever the handler has set
	case f.closed:
		_ = f.conn.Close()
	}
	close(f.decided)
	return c
}

// withdraw takes the offer back: the listener stops.
func (f *firstConn) withdraw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written = true
	if f.closed && f.state == firstOffered {
		_ = f.conn.Close()
	}
}

// await waits until it is known what becomes of the connection, and locks mu. It
// reports whether the handler still has it to itself.
func (f *firstConn) await() bool {
	f.mu.Lock()
	if f.state == firstOffering || f.state == firstOffered {
		decided := f.decided
		f.mu.Unlock()
		<-decided
		f.mu.Lock()
	}
	return f.state == firstAlone
}

func (f *firstConn) Read(p []byte) (int, error) {
	alone := f.await()
	if f.closed || !alone {
		defer f.mu.Unlock()
		if f.closed {
			return 0, opError("read", f, net.ErrClosed)
		}
		return 0, io.EOF // a sender that does not keep it would have closed it
	}
	if len(f.peeked) > 0 {
		defer f.mu.Unlock()
		n := copy(p, f.peeked)
		f.peeked = f.peeked[n:]
		return n, nil
	}
	f.reading++ // it would be given the sender's word
	f.mu.Unlock()
	n, err := f.conn.Read(p)
	f.mu.Lock()
	f.reading--
	f.read += n
	f.mu.Unlock()
	return n, err
}

func (f *firstConn) Write(p []byte) (int, error) {
	f.mu.Lock()
	switch {
	case f.closed:
		defer f.mu.Unlock()
		return 0, opError("write", f, net.ErrClosed)
	case f.state == firstKept:
		defer f.mu.Unlock()
		return 0, opError("write", f, syscall.EPIPE)
	}
	f.written = true // from here on it is the handler's alone
	f.mu.Unlock()
	return f.conn.Write(p)
}

// Close ends the exchange. The connection itself is left to whom it goes on with.
func (f *firstConn) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return opError("close", f, net.ErrClosed)
	}
	f.closed = true
	switch f.state {
	case firstKept:
		return nil
	case firstOffered:
		if !f.written {
			return f.conn.SetReadDeadline(time.Now().Add(keptGrace))
		}
	}
	return f.conn.Close()
}

// setDeadline sets a deadline unless the connection is the handler's no more.
func (f *firstConn) setDeadline(set func(time.Time) error, t time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return opError("set", f, net.ErrClosed)
	case f.state == firstKept:
		return nil
	}
	return set(t)
}

func (f *firstConn) LocalAddr() net.Addr  { return f.conn.LocalAddr() }
func (f *firstConn) RemoteAddr() net.Addr { return f.conn.RemoteAddr() }

// SyscallConn gives access to the socket, for the peer's credentials.
func (f *firstConn) SyscallConn() (syscall.RawConn, error) { return controlOf(f.conn) }

// controlOf returns what gives access to a socket that others read and write, too.
func controlOf(conn *net.UnixConn) (syscall.RawConn, error) {
	raw, err := conn.SyscallConn()
	return controlOnly{raw}, err
}

// controlOnly refuses to wait for the socket: whoever does keeps all others from it.
type controlOnly struct{ syscall.RawConn }

func (controlOnly) Read(func(uintptr) bool) error  { return errShared }
func (controlOnly) Write(func(uintptr) bool) error { return errShared }

var errShared = fmt.Errorf("the socket may be shared with other exchanges, use the connection's own methods: %w", errors.ErrUnsupported)

func (f *firstConn) SetDeadline(t time.Time) error {
	return f.setDeadline(f.conn.SetDeadline, t)
}

func (f *firstConn) SetReadDeadline(t time.Time) error {
	return f.setDeadline(f.conn.SetReadDeadline, t)
}

func (f *firstConn) SetWriteDeadline(t time.Time) error {
	return f.setDeadline(f.conn.SetWriteDeadline, t)
}

// keptListener serves on a connection that is kept: one that it has accepted, or
// one that this process has made, to a listener of a process that also sends to this
// one.
type keptListener struct {
	*keptConn
	ul     *UnixListener
	run    *listenerRun
	local  net.Addr // of the connection by which the sender has come
	remote net.Addr
	links  int // times the sender has asked for one; the reader's

	// Guarded by the listener's mu.
	handed uint32 // number of the last exchange that NextConn has returned
	queued int    // bytes of those it has not

	// Guarded by out.mu.
	last     uint32               // number of the last message
	pending  map[uint32]*exchange // not answered, by number
	size     int                  // bytes of their messages
	refusing bool                 // what is sent to us from now on is not served
	stopped  bool                 // nor is what was sent before
	ended    bool                 // the listener knows that
	tried    map[string]struct{}  // hooks that the sender of the connection was looked for with
	settled  atomic.Bool          // it is not looked for any more
}

func newKeptListener(on *keptConn, ul *UnixListener, run *listenerRun, local, remote net.Addr) *keptListener {
	return &keptListener{
		keptConn: on, ul: ul, run: run, local: local, remote: remote,
		pending: make(map[uint32]*exchange), tried: make(map[string]struct{}),
	}
}

// agree tells the sender that the connection is kept, and what it is called.
func (c *keptListener) agree(*bufio.Reader) error {
	if !writeAtOnce(c.conn, append([]byte(keptHello), c.token[:]...)) {
		return errors.New("no room for the agreement")
	}
	return nil
}

// readMessage reads a message of so many bytes and hands it to the listener.
func (c *keptListener) readMessage(r *bufio.Reader, size int, number uint32) error {
	frame := make([]byte, headerSize+size) // a plain frame, as the handler expects it
	binary.BigEndian.PutUint32(frame, uint32(size))
	if _, err := io.ReadFull(r, frame[headerSize:]); err != nil {
		return err
	}
	c.out.mu.Lock()
	if c.out.answers > keptQueue || c.ul.queuedOf(c) > keptAhead {
		// To wait would hold up what comes for us in the other direction, which may be
		// what the handlers wait for. The sender will go on elsewhere.
		c.out.mu.Unlock()
		c.refuse()
		return nil
	}
	defer c.out.mu.Unlock()
	switch {
	case c.refusing:
		return nil // its sender is told so, or gone
	case number != c.last+1 || len(c.pending) >= keptShare || c.size+size > keptWindow:
		return errors.New("not the next number, or too much at a time")
	}
	c.out.held = true
	e := &exchange{c: c, number: number, size: size, unread: frame}
	if c.ul.handOver(e) {
		c.last = number
		c.pending[number] = e
		c.size += size
	}
	return nil
}

// cancel ends an exchange whose sender has given up.
func (c *keptListener) cancel(number uint32) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if e := c.pending[number]; e != nil {
		e.settleLocked()
	}
}

// senderGoneLocked ends all exchanges: nobody waits for answers any more. The caller
// holds out.mu.
func (c *keptListener) senderGoneLocked() {
	c.refuseLocked()
	for _, e := range c.pending {
		e.settleLocked()
	}
}

// refuse lets nothing more be sent, and tells the sender so. What was read is served.
// What goes the other way on a connection that was accepted moves elsewhere: the next
// connection of the other process will be a better one for it.
func (c *keptListener) refuse() {
	c.out.mu.Lock()
	flush := c.refuseLocked() && c.out.addCopyLocked(keptStop, c.last, nil)
	c.checkDoneLocked()
	back := c.sends.Load()
	c.out.mu.Unlock()
	if flush {
		c.out.flush(false)
	}
	if back != nil && !back.made {
		back.retire()
	}
}

// rests reports whether nothing is served, nor sent the other way.
func (c *keptListener) rests() bool {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	sends := c.sends.Load()
	return !c.refusing && len(c.pending) == 0 && (sends == nil || len(sends.waiting) == 0)
}

// refuseLocked reports whether it was not so before. The caller holds out.mu.
func (c *keptListener) refuseLocked() bool {
	if c.refusing {
		return false
	}
	c.refusing = true
	c.ul.readingEnded(c)
	return true
}

// stop ends the serving, whatever is open, and tells the sender which messages
// nobody has seen. What was answered is still written, for a moment.
func (c *keptListener) stop(handed uint32) {
	c.out.mu.Lock()
	c.refuseLocked()
	flush := c.out.addCopyLocked(keptStop, handed, nil)
	c.out.mu.Unlock()
	time.AfterFunc(keptGrace, func() {
		c.out.mu.Lock()
		defer c.out.mu.Unlock()
		c.stopped = true
		c.checkDoneLocked()
	})
	if flush {
		c.out.flush(false)
	}
}

// doneLocked reports whether nothing is served any more, and the sender knows. The
// caller holds out.mu.
func (c *keptListener) doneLocked() bool {
	told := c.out.err != nil || len(c.out.queue) == 0 && !c.out.writing
	return c.stopped || c.refusing && len(c.pending) == 0 && told
}

// endLocked lets the listener forget the connection. The caller holds out.mu.
func (c *keptListener) endLocked() {
	c.senderGoneLocked()
	if !c.ended {
		c.ended = true
		c.ul.keptEnded(c)
	}
}

// hookIs looks for the sender of the connection: it may be the process that listens
// at the response hook of one of its requests. Then responses can go by this
// connection, together with the acknowledgements.
func (c *keptListener) hookIs(hook *url.URL) {
	if c.settled.Load() || hook == nil || hook.Scheme != "unix" {
		return
	}
	to := kept.to(hook.Path)
	if to == nil || !to.made || to.keptConn == c.keptConn || to.peer != c.peer || to.peer == (peerID{}) {
		return
	}
	c.out.mu.Lock()
	_, before := c.tried[hook.Path]
	found := c.sends.Load() != nil
	ask := !before && !found && len(c.tried) < keptTries
	if ask {
		c.tried[hook.Path] = struct{}{}
		c.asked.Store(true)
	}
	c.settled.Store(found || len(c.tried) == keptTries)
	c.out.mu.Unlock()
	if ask && !to.link(c.keptConn, c.run.socket.id()) {
		c.out.mu.Lock()
		delete(c.tried, hook.Path) // next time
		c.out.mu.Unlock()
	}
}

// readLink reads the question whether the sender's messages may come by another
// connection, too. They may by one that this process has made to a listener of the
// same process: the sender names it, and nobody else can know that name but from the
// other end of that very connection.
func (c *keptListener) readLink(r *bufio.Reader) error {
	question := make([]byte, linkSize)
	if _, err := io.ReadFull(r, question); err != nil {
		return err
	}
	if c.links++; c.links > keptConns {
		return errors.New("too many links")
	}
	var answer uint32
	const name = len(keptToken{})
	device, inode := binary.BigEndian.Uint64(question[name:]), binary.BigEndian.Uint64(question[name+8:])
	on := kept.called(keptToken(question[:name]))
	if on != nil && on.file.isFile(device, inode) && on.peer == c.peer && on.peer != (peerID{}) && c.ul.serveOn(on.keptConn, c) {
		answer = 1
	}
	c.out.mu.Lock()
	flush := c.out.addCopyLocked(keptLinked, answer, nil)
	c.out.mu.Unlock()
	if flush {
		c.out.flush(false)
	}
	return nil
}

// exchange is a message on a kept connection, for its handler a connection of its
// own: the message's plain frame can be read from it, and what is written to it, up
// to the end of a frame, answers the message.
type exchange struct {
	c      *keptListener
	number uint32
	size   int         // bytes of the message
	done   atomic.Bool // with the listener
	over   atomic.Bool // nothing more goes to the sender; set under c.out.mu

	mu            sync.Mutex // guards the fields below; taken after c.out.mu
	unread        []byte     // of the message
	answer        []byte     // written, not yet a frame
	closed        bool       // by the handler
	readDeadline  time.Time
	writeDeadline time.Time
	changed       chan struct{} // made by a Read that waits, closed to tell it to look again
}

// takeFrame returns the payload of the message if nothing of it has been read;
// else nil, and Read says why.
func (e *exchange) takeFrame() []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	whole, err := frameLength(e.unread)
	if err != nil || whole == 0 || whole != len(e.unread) || e.closed || passed(e.readDeadline) {
		return nil
	}
	data := e.unread[headerSize:]
	e.unread = nil
	return data
}

// Read reads the message, then waits for the sender to be told or to give up.
func (e *exchange) Read(p []byte) (int, error) {
	for {
		e.mu.Lock()
		n, again, err := e.readLocked(p)
		deadline := e.readDeadline
		e.mu.Unlock()
		if again == nil {
			return n, err
		}
		if deadline.IsZero() {
			<-again
			continue
		}
		timer := time.NewTimer(time.Until(deadline))
		select {
		case <-again:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// readLocked reads what is there. If it has to wait it returns a channel that is
// closed when it should be called again. The caller holds mu.
func (e *exchange) readLocked(p []byte) (int, <-chan struct{}, error) {
	switch {
	case e.closed:
		return 0, nil, opError("read", e, net.ErrClosed)
	case passed(e.readDeadline):
		return 0, nil, opError("read", e, os.ErrDeadlineExceeded)
	case len(p) == 0:
		return 0, nil, nil
	case len(e.unread) > 0:
		n := copy(p, e.unread)
		e.unread = e.unread[n:]
		return n, nil, nil
	case e.over.Load():
		return 0, nil, io.EOF
	}
	if e.changed == nil {
		e.changed = make(chan struct{})
	}
	return 0, e.changed, nil
}

// wakeLocked lets a Read that waits look again. The caller holds mu.
func (e *exchange) wakeLocked() {
	if e.changed != nil {
		close(e.changed)
		e.changed = nil
	}
}

// settleLocked notes that nothing more goes to the sender, who has been answered or
// waits no more. The caller holds c.out.mu.
func (e *exchange) settleLocked() {
	if e.over.Swap(true) {
		return
	}
	delete(e.c.pending, e.number)
	e.c.size -= e.size
	e.mu.Lock()
	e.wakeLocked()
	e.mu.Unlock()
	if e.c.refusing {
		e.c.checkDoneLocked()
	}
}

// send sends the answer, and reports so, unless the sender has one or waits no more.
func (e *exchange) send(answer []byte) bool {
	e.c.out.mu.Lock()
	if e.over.Load() {
		e.c.out.mu.Unlock()
		return false
	}
	flush := e.c.out.addCopyLocked(keptAnswer, e.number, answer)
	e.settleLocked()
	company := len(e.c.pending) > 0
	e.c.out.mu.Unlock()
	if flush {
		e.c.out.flush(company)
	}
	return true
}

// Write takes the answer. It goes to the sender with the end of its frame; there
// is nobody for what comes after.
func (e *exchange) Write(p []byte) (int, error) {
	answer, err := e.take(p)
	if err != nil {
		return 0, err
	}
	if answer != nil && !e.send(answer) {
		return 0, opError("write", e, syscall.EPIPE)
	}
	return len(p), nil
}

// take returns the answer if what is written makes it whole.
func (e *exchange) take(p []byte) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return nil, opError("write", e, net.ErrClosed)
	case passed(e.writeDeadline):
		return nil, opError("write", e, os.ErrDeadlineExceeded)
	case e.over.Load():
		return nil, opError("write", e, syscall.EPIPE)
	}
	answer := p
	if len(e.answer) > 0 {
		e.answer = append(e.answer, p...)
		answer = e.answer
	}
	whole, err := frameLength(answer)
	switch {
	case err != nil: // the sender will say what is wrong with it
		e.answer = nil
		return answer[:headerSize], nil
	case whole > 0 && whole <= len(answer):
		e.answer = nil
		return answer[:whole], nil
	case len(e.answer) == 0:
		e.answer = append(e.answer, p...)
	}
	return nil, nil
}

// Close ends the exchange. A sender that was not answered is told so.
func (e *exchange) Close() error {
	e.mu.Lock()
	if e.closed {
		defer e.mu.Unlock()
		return opError("close", e, net.ErrClosed)
	}
	e.closed = true
	part := e.answer
	e.unread, e.answer = nil, nil
	e.wakeLocked()
	e.mu.Unlock()
	if !e.over.Load() {
		e.send(part)
	}
	return nil
}

func (e *exchange) LocalAddr() net.Addr  { return e.c.local }
func (e *exchange) RemoteAddr() net.Addr { return e.c.remote }

// SyscallConn gives access to the socket that the exchange shares with others, for
// the peer's credentials.
func (e *exchange) SyscallConn() (syscall.RawConn, error) { return controlOf(e.c.conn) }

func (e *exchange) SetDeadline(t time.Time) error      { return e.setDeadlines(t, true, true) }
func (e *exchange) SetReadDeadline(t time.Time) error  { return e.setDeadlines(t, true, false) }
func (e *exchange) SetWriteDeadline(t time.Time) error { return e.setDeadlines(t, false, true) }

func (e *exchange) setDeadlines(t time.Time, read, write bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return opError("set", e, net.ErrClosed)
	}
	if read {
		e.readDeadline = t
		e.wakeLocked()
	}
	if write {
		e.writeDeadline = t
	}
	return nil
}

// passed reports whether a deadline is set and has passed.
func passed(deadline time.Time) bool {
	return !deadline.IsZero() && !time.Now().Before(deadline)
}

func opError(op string, conn net.Conn, err error) error {
	return &net.OpError{Op: op, Net: "unix", Source: conn.LocalAddr(), Addr: conn.RemoteAddr(), Err: err}
}
