package acomm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Connections to listeners of this library are kept and shared: after the first
// exchange on a connection the two sides agree on it, and from then on messages
// and their acknowledgements travel on it with a number each, those of the same
// moment in one system call. PROTOCOL.md has the rules. This file is the
// connection, the same at both ends; kept_sender.go is what sends on it,
// kept_listener.go is what serves. A connection begins with one of them at each
// end. If the processes turn out to be connected in both directions, it gets the
// other as well: then an acknowledgement and the response that follows are of the
// same moment.

const (
	keptName       = "@acomm-keep-2/"    // begins the name of a socket whose owner can keep connections
	keptHello      = "\xffacomm\x00\x02" // the sender wants to keep the connection; the listener agrees
	keptHeaderSize = 8                   // bytes: kind and length, number
	keptLimit      = 64 << 10            // bytes of JSON in a message; a longer one gets a connection of its own
	keptSmall      = 4 << 10             // bytes of a frame that is written together with others
	keptPart       = 64 << 10            // bytes that a slow peer is given keptPatience for
	keptShare      = 1024                // exchanges at a time in one direction; one more gets a connection of its own
	keptWindow     = 2 << 20             // bytes of JSON in them; the same
	keptConns      = 256                 // connections a process, or a listener, keeps; an eighth of its descriptors, if that is less
	keptRoutes     = 4 * keptConns       // paths that lead to them
	keptAgree      = time.Second         // the listener has to agree in
	keptLook       = time.Millisecond    // for which a look is good that found that a path leads to the same socket
)

// keptKind is what a frame on a kept connection is. Its highest bit is set, so
// that its header can't be one of a plain frame.
type keptKind uint32

const (
	keptMessage keptKind = 8 + iota // of a sender: a message
	keptCancel                      // of a sender: it has given up on the message of that number
	keptAnswer                      // of a listener: what it wrote, up to a whole frame or until it closed
	keptStop                        // of a listener: no message after that number will be read
	keptLink                        // of a sender: messages to this listener may come by another connection, too
	keptLinked                      // of a listener: whether they may
)

// Variables for the tests.
var (
	keptPatience = sendTimeout     // for a peer to take something of what is written to it
	keptRest     = 5 * time.Second // without an exchange until the sender closes a connection; the listener takes twice that
)

// putKeptHeader writes the header of a frame on a kept connection.
func putKeptHeader(header []byte, kind keptKind, size int, number uint32) {
	binary.BigEndian.PutUint32(header, uint32(kind)<<28|uint32(size))
	binary.BigEndian.PutUint32(header[4:], number)
}

// readKeptHeader reads the header of a frame on a kept connection.
func readKeptHeader(r *bufio.Reader) (kind keptKind, size int, number uint32, err error) {
	header, err := r.Peek(keptHeaderSize)
	if err != nil {
		return 0, 0, 0, err
	}
	word := binary.BigEndian.Uint32(header)
	number = binary.BigEndian.Uint32(header[4:])
	_, _ = r.Discard(keptHeaderSize)
	return keptKind(word >> 28), int(word & (1<<28 - 1)), number, nil
}

// keptConn is one end of a connection that is kept.
type keptConn struct {
	conn  *net.UnixConn
	out   *batch
	life  time.Duration // of rest
	peer  peerID        // the process at the other end
	token keptToken     // what the end that has accepted the connection calls it; the other knows it once that has agreed
	ended chan struct{} // closed when nothing of the connection is left

	// Set under out.mu, once at the most.
	sends  atomic.Pointer[keptSender]   // nil if nothing is sent from this end
	serves atomic.Pointer[keptListener] // nil if nothing is served at this end
	asked  atomic.Bool                  // the other end, whether it serves, too

	// Guarded by out.mu.
	finishing bool        // nothing begins any more, in either direction
	stopped   bool        // the other end has served, and does not any more, before anything was sent to it
	rest      *time.Timer // until rested
	seen      uint64      // messages, when rest looked
}

func newKeptConn(conn *net.UnixConn, life time.Duration) (*keptConn, error) {
	c := &keptConn{conn: conn, life: life, peer: peerOf(conn), ended: make(chan struct{})}
	now, err := newAttempt(conn)
	if err != nil {
		return nil, err
	}
	c.out = &batch{conn: conn, now: now, owner: c}
	c.out.idle.L = &c.out.mu
	return c, nil
}

// read agrees with the other end, does what its frames say, and ends what is left
// of the connection when that is closed.
func (c *keptConn) read(agree func(*bufio.Reader) error) {
	defer close(c.ended)
	c.out.mu.Lock()
	c.rest = time.AfterFunc(c.life, c.rested)
	c.out.mu.Unlock()
	r := bufio.NewReaderSize(c.out, 16<<10)
	for err := agree(r); err == nil; err = c.readFrame(r) {
	}
	c.end()
}

// end ends what is left of the connection.
func (c *keptConn) end() {
	c.out.release()
	_ = c.conn.Close()
	c.out.mu.Lock()
	c.finishing = true
	if c.rest != nil {
		c.rest.Stop()
	}
	if c.out.err == nil {
		c.out.err = net.ErrClosed
	}
	for c.out.writing { // only then it is known what was written
		c.out.idle.Wait()
	}
	sends, serves := c.sends.Load(), c.serves.Load()
	if sends != nil {
		sends.endLocked()
	}
	if serves != nil {
		serves.endLocked()
	}
	c.out.mu.Unlock()
	if sends != nil {
		kept.gone(sends)
	}
}

// readFrame reads a frame and does what it says. An error ends the connection.
func (c *keptConn) readFrame(r *bufio.Reader) error {
	kind, size, number, err := readKeptHeader(r)
	if err != nil {
		return err
	}
	sends, serves := c.sends.Load(), c.serves.Load()
	switch {
	case kind == keptMessage && size <= keptLimit && serves != nil:
		return serves.readMessage(r, size, number)
	case kind == keptCancel && size == 0 && serves != nil:
		serves.cancel(number)
		return nil
	case kind == keptLink && size == linkSize && serves != nil:
		return serves.readLink(r)
	case kind == keptAnswer && size <= headerSize+maxPayload && sends != nil:
		return sends.readAnswer(r, size, number)
	case kind == keptStop && size == 0 && sends != nil:
		sends.stopAfter(number)
		return nil
	case kind == keptStop && size == 0 && c.asked.Load():
		c.out.mu.Lock()
		defer c.out.mu.Unlock()
		c.stopped = true
		return nil
	case kind == keptLinked && size == 0 && sends != nil:
		return sends.linked(number == 1)
	}
	return errors.New("not a frame that may come")
}

// rested finishes the connection if it has not been used for the time of rest.
func (c *keptConn) rested() {
	c.out.mu.Lock()
	var messages uint64
	var waiting int
	if sends := c.sends.Load(); sends != nil {
		messages += uint64(sends.last)
		waiting += len(sends.waiting)
	}
	if serves := c.serves.Load(); serves != nil {
		messages += uint64(serves.last)
		waiting += len(serves.pending)
	}
	used := c.seen != messages || waiting > 0
	c.seen = messages
	if used && !c.finishing {
		c.rest.Reset(c.life)
	}
	c.out.mu.Unlock()
	if !used {
		c.finish()
	}
}

// finish lets nothing begin any more. The connection is closed after the last
// exchange.
func (c *keptConn) finish() {
	c.out.mu.Lock()
	c.finishing = true
	sends, serves := c.sends.Load(), c.serves.Load()
	c.out.mu.Unlock()
	if sends != nil {
		sends.retire()
	}
	if serves != nil {
		serves.refuse()
	}
}

// checkDoneLocked ends what is done: the connection, or its serving if there is
// more to be sent. It reports whether the connection is closed. The caller holds
// out.mu.
func (c *keptConn) checkDoneLocked() bool {
	sends, serves := c.sends.Load(), c.serves.Load()
	served := serves == nil || serves.doneLocked()
	sent := sends == nil || sends.doneLocked()
	if served && !sent && serves != nil {
		serves.endLocked()
	}
	if served && sent {
		_ = c.conn.Close() // which ends read, and that the rest
	}
	return served && sent
}

// onlyWritesLocked reports whether both directions are over, but for what is still to be
// written. The caller holds out.mu.
func (c *keptConn) onlyWritesLocked() bool {
	sends, serves := c.sends.Load(), c.serves.Load()
	return (sends == nil || sends.doneLocked()) && (serves == nil || serves.refusing && len(serves.pending) == 0)
}

// writeFailed lets the messages that were not written go elsewhere, and ends the
// serving. What was written may yet be answered, or was before the other end closed.
func (c *keptConn) writeFailed(err error) {
	c.out.mu.Lock()
	c.finishing = true
	sends, serves := c.sends.Load(), c.serves.Load()
	if sends != nil {
		sends.writeFailedLocked()
	}
	if serves != nil {
		serves.senderGoneLocked()
		if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			_ = c.conn.Close() // the other end is there, and could not be told
		}
	}
	c.checkDoneLocked()
	c.out.mu.Unlock()
	if sends != nil {
		kept.forget(sends)
	}
}

// batch writes the frames of many goroutines to one connection, small ones of
// about the same moment in one system call.
type batch struct {
	conn  *net.UnixConn
	now   *attempt // of the goroutine that flushes
	owner *keptConn

	mu      sync.Mutex // guards the fields below, and more of the connection's owner
	idle    sync.Cond  // tells that something was written, or writing has ended
	queue   []piece    // nobody has begun to write these
	spare   [][]byte   // for small frames, two at most
	queued  uint64     // bytes ever added
	written uint64     // bytes the system has taken
	answers uint64     // of those to be written, bytes of answers
	writing bool       // a goroutine writes, and takes along what is added
	held    bool       // the reader is about to flush, see Read
	last    time.Time  // until then all has to be written, once nothing else is left to do
	err     error      // of a write; nothing is written after it
}

// piece is what is written with one system call.
type piece struct {
	data    []byte
	small   bool   // small frames, copied; else a frame of somebody else's
	answers uint64 // bytes of answers in it
}

// addLocked adds a frame, which begins with room for its header and must not be
// changed from then on. It reports whether the caller has to flush: otherwise
// somebody else is about to. The caller holds mu.
func (b *batch) addLocked(kind keptKind, number uint32, frame []byte) bool {
	if b.err != nil {
		return false
	}
	putKeptHeader(frame, kind, len(frame)-keptHeaderSize, number)
	var p *piece
	if len(frame) <= keptSmall {
		p = b.smallLocked()
		p.data = append(p.data, frame...)
	} else {
		b.queue = append(b.queue, piece{data: frame})
		p = &b.queue[len(b.queue)-1]
	}
	return b.addedLocked(kind, p, len(frame))
}

// addCopyLocked is addLocked for what goes into a frame, or nothing.
func (b *batch) addCopyLocked(kind keptKind, number uint32, data []byte) bool {
	size := keptHeaderSize + len(data)
	if size > keptSmall {
		return b.addLocked(kind, number, append(make([]byte, keptHeaderSize, size), data...))
	}
	if b.err != nil {
		return false
	}
	var header [keptHeaderSize]byte
	putKeptHeader(header[:], kind, len(data), number)
	small := b.smallLocked()
	small.data = append(append(small.data, header[:]...), data...)
	return b.addedLocked(kind, small, size)
}

// smallLocked returns the piece that takes the next small frame. The caller holds
// mu.
func (b *batch) smallLocked() *piece {
	last := len(b.queue) - 1
	if last >= 0 && b.queue[last].small && len(b.queue[last].data) < keptLimit {
		return &b.queue[last]
	}
	p := piece{small: true}
	if n := len(b.spare); n > 0 {
		p.data, b.spare = b.spare[n-1], b.spare[:n-1]
	}
	b.queue = append(b.queue, p)
	return &b.queue[last+1]
}

// addedLocked counts so many bytes of a piece, and reports whether the caller has
// to flush. The caller holds mu.
func (b *batch) addedLocked(kind keptKind, p *piece, size int) bool {
	b.queued += uint64(size)
	if kind == keptAnswer {
		p.answers += uint64(size)
		b.answers += uint64(size)
	}
	if b.writing || b.held {
		return false
	}
	b.writing = true
	return true
}

// Read reads from the connection, for its one reader. That may take long, so it
// first lets the goroutines go on that wait for what the reader has handed out, and
// flushes what they have added: in one system call, and the other end is woken
// once.
func (b *batch) Read(p []byte) (int, error) {
	b.release()
	return b.conn.Read(p)
}

// release ends the time in which the reader is about to flush.
func (b *batch) release() {
	b.mu.Lock()
	held := b.held
	b.mu.Unlock()
	if !held {
		return
	}
	runtime.Gosched()
	b.mu.Lock()
	b.held = false
	flush := !b.writing && len(b.queue) > 0
	b.writing = b.writing || flush
	b.mu.Unlock()
	if flush {
		b.flush(false)
	}
}

// flush writes what was added, and what is added meanwhile. In company, that is
// where other goroutines are likely to add frames at this moment, it lets them go
// first. It does not block: what the socket does not take is left to a goroutine.
func (b *batch) flush(company bool) {
	if company {
		runtime.Gosched()
	}
	for p, ok := b.begin(); ok; p, ok = b.begin() {
		n, err := b.now.write(p.data)
		if err == nil && n < len(p.data) {
			go b.writeRest(p, n)
			return
		}
		b.end(p, n, err)
	}
}

// writeRest writes what the socket did not take at once, and what is added
// meanwhile. It ends after a minute in which the peer takes nothing, after a minute in
// all once nothing is left but to write, or when the connection is closed.
func (b *batch) writeRest(p piece, from int) {
	defer func() { _ = b.conn.SetWriteDeadline(time.Time{}) }()
	for ok := true; ok; p, ok = b.begin() {
		n, err := b.writeSlowly(p.data[from:])
		b.end(p, from+n, err)
		from = 0
	}
}

// writeSlowly writes the data in parts, each of which may take its time.
func (b *batch) writeSlowly(data []byte) (n int, err error) {
	for n < len(data) && err == nil {
		if err := b.conn.SetWriteDeadline(b.deadline()); err != nil {
			return n, err
		}
		var part int
		part, err = b.conn.Write(data[n:min(len(data), n+keptPart)])
		n += part
	}
	return n, err
}

// deadline is until when the peer has to take what is written next.
func (b *batch) deadline() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	end := time.Now().Add(keptPatience)
	if !b.owner.onlyWritesLocked() {
		return end
	}
	if b.last.IsZero() {
		b.last = end
	}
	return b.last
}

// begin returns what is to be written next. If there is nothing, writing has
// ended.
func (b *batch) begin() (piece, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil || len(b.queue) == 0 {
		b.queue = slices.Delete(b.queue, 0, len(b.queue))
		b.writing = false
		b.idle.Broadcast()
		b.owner.checkDoneLocked()
		return piece{}, false
	}
	p := b.queue[0]
	b.queue = slices.Delete(b.queue, 0, 1)
	return p, true
}

// end takes down how much of a piece was written.
func (b *batch) end(p piece, n int, err error) {
	b.mu.Lock()
	b.written += uint64(n)
	b.answers -= p.answers
	b.idle.Broadcast()
	if p.small && len(b.spare) < 2 {
		b.spare = append(b.spare, p.data[:0])
	}
	first := err != nil && b.err == nil
	if first {
		b.err = err
	}
	b.mu.Unlock()
	if first {
		b.owner.writeFailed(err)
	}
}

// attempt writes without waiting. It is made once for all writes of a goroutine at
// a time, as each would otherwise need memory of its own.
type attempt struct {
	raw  syscall.RawConn
	try  func(fd uintptr) bool
	data []byte
	n    int
	err  error
}

func newAttempt(conn *net.UnixConn) (*attempt, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	a := &attempt{raw: raw}
	a.try = a.tryOnce
	return a, nil
}

// write writes as much as the socket takes at once.
func (a *attempt) write(data []byte) (n int, err error) {
	a.data = data
	err = a.raw.Write(a.try)
	a.data = nil
	switch {
	case err != nil:
		return 0, err
	case a.err == syscall.EAGAIN:
		return 0, nil
	}
	return max(a.n, 0), a.err
}

func (a *attempt) tryOnce(fd uintptr) bool {
	for {
		a.n, a.err = syscall.Write(int(fd), a.data)
		if a.err != syscall.EINTR {
			return true
		}
	}
}

// writeAtOnce writes what begins the life of a kept connection. It reports whether
// the socket took it at once.
func writeAtOnce(conn *net.UnixConn, data []byte) bool {
	a, err := newAttempt(conn)
	if err != nil {
		return false
	}
	n, _ := a.write(data)
	return n == len(data)
}
