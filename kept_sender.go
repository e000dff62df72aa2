package acomm

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Connections to listeners of this library are kept and shared: after the first
// exchange on a connection the two sides agree on it, and from then on messages
// and their acknowledgements travel on it with a number each, those of the same
// moment in one system call. PROTOCOL.md has the rules. This file is the sending
// side, and what both sides need; kept_listener.go is the listening side.

const (
	keptName       = "@acomm-keep-1/"    // begins the name of a socket whose owner can keep connections
	keptHello      = "\xffacomm\x00\x01" // the sender wants to keep the connection; the listener agrees
	keptHeaderSize = 8                   // bytes: kind and length, number
	keptLimit      = 64 << 10            // bytes of JSON in a message; a longer one gets a connection of its own
	keptSmall      = 4 << 10             // bytes of a frame that is written together with others
	keptShare      = 1024                // exchanges at a time on a connection; one more gets a connection of its own
	keptConns      = 256                 // connections a process, or a listener, keeps
	keptAgree      = time.Second         // the listener has to agree in
	keptLook       = time.Millisecond    // between looks whether a path still leads to the same socket
)

// keptKind is what a frame on a kept connection is. Its highest bit is set, so
// that its header can't be one of a plain frame.
type keptKind uint32

const (
	keptMessage keptKind = 8 + iota // of the sender: a message
	keptCancel                      // of the sender: it has given up on the message of that number
	keptAnswer                      // of the listener: what it wrote, up to a whole frame or until it closed
	keptStop                        // of the listener: no message after that number will be read
)

// Variables for the tests.
var (
	keptPatience = sendTimeout     // for a peer to take something of what is written to it
	keptRest     = 5 * time.Second // without an exchange until the sender closes a connection; the listener takes twice that
)

// errUnsent is the outcome of an exchange whose message has certainly not been
// read: it may be sent again.
var errUnsent = errors.New("not sent")

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

// batch writes the frames of many goroutines to one connection, small ones of
// about the same moment in one system call.
type batch struct {
	conn   *net.UnixConn
	now    *attempt // of the goroutine that flushes
	failed func()   // called once, when a write has failed

	mu      sync.Mutex // guards the fields below, and more of the connection's owner
	idle    sync.Cond  // tells that something was written, or writing has ended
	queue   []piece    // nobody has begun to write these
	spare   [][]byte   // for small frames, two at most
	queued  uint64     // bytes ever added
	written uint64     // bytes the system has taken
	writing bool       // a goroutine writes, and takes along what is added
	err     error      // of a write; nothing is written after it
}

// piece is what is written with one system call.
type piece struct {
	data  []byte
	small bool // small frames, copied; else a frame of somebody else's
}

func newBatch(conn *net.UnixConn, failed func()) (*batch, error) {
	now, err := newAttempt(conn)
	if err != nil {
		return nil, err
	}
	b := &batch{conn: conn, now: now, failed: failed}
	b.idle.L = &b.mu
	return b, nil
}

// addLocked adds a frame, which begins with room for its header and must not be
// changed from then on. It reports whether the caller has to flush: otherwise
// somebody else is about to. The caller holds mu.
func (b *batch) addLocked(kind keptKind, number uint32, frame []byte) bool {
	if b.err != nil {
		return false
	}
	putKeptHeader(frame, kind, len(frame)-keptHeaderSize, number)
	if len(frame) <= keptSmall {
		small := b.smallLocked()
		small.data = append(small.data, frame...)
	} else {
		b.queue = append(b.queue, piece{data: frame})
	}
	return b.addedLocked(len(frame))
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
	return b.addedLocked(size)
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

// addedLocked counts so many bytes, and reports whether the caller has to flush.
// The caller holds mu.
func (b *batch) addedLocked(size int) bool {
	b.queued += uint64(size)
	flush := !b.writing
	b.writing = true
	return flush
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
// meanwhile. It ends after a minute in which the peer takes nothing, or when the
// connection is closed.
func (b *batch) writeRest(p piece, from int) {
	for ok := true; ok; p, ok = b.begin() {
		n := 0
		err := b.conn.SetWriteDeadline(time.Now().Add(keptPatience))
		if err == nil {
			n, err = b.conn.Write(p.data[from:])
			_ = b.conn.SetWriteDeadline(time.Time{})
		}
		b.end(p, from+n, err)
		from = 0
	}
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
	b.idle.Broadcast()
	if p.small && len(b.spare) < 2 {
		b.spare = append(b.spare, p.data[:0])
	}
	first := err != nil && b.err == nil
	if first {
		b.err = err
	}
	b.mu.Unlock()
	if first && b.failed != nil {
		b.failed()
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

// writeHello writes what begins the life of a kept connection. It reports whether
// the socket took it at once.
func writeHello(conn *net.UnixConn) bool {
	a, err := newAttempt(conn)
	if err != nil {
		return false
	}
	n, _ := a.write([]byte(keptHello))
	return n == len(keptHello)
}

// keptSender is a connection to a listener that this process keeps.
type keptSender struct {
	path  string
	file  fileID
	conn  *net.UnixConn
	out   *batch
	rest  *time.Timer
	ended chan struct{} // closed when nothing of the connection is left

	// Guarded by out.mu.
	agreed  bool // by the listener
	retired bool // no further exchange; closed with the last one
	last    uint32
	seen    uint32 // last, when rest looked
	waiting map[uint32]*waiter
	looked  time.Time // when the path led to the listener's socket
}

// waiter is a message whose acknowledgement is waited for.
type waiter struct {
	end     uint64 // of its frame, in bytes added to the batch
	outcome chan outcome
	timer   *time.Timer // until it has taken too long
}

var waiters = sync.Pool{New: func() any {
	w := &waiter{outcome: make(chan outcome, 1), timer: time.NewTimer(time.Hour)}
	w.timer.Stop()
	return w
}}

type outcome struct {
	answer  []byte // nil: the message is accepted
	err     error
	written bool // the message; it is not looked at any more
}

// exchange sends a message, behind room for a header, and returns its
// acknowledgement. The error is errUnsent where the message can't have been read;
// in all other cases it is released.
func (c *keptSender) exchange(deadline time.Time, m *message) (*Response, error) {
	o := c.await(deadline, m.text)
	if o.err != errUnsent && (o.written || len(m.text) <= keptSmall) {
		m.release()
	}
	switch {
	case o.err != nil:
		return nil, o.err
	case o.answer == nil:
		return accepted, nil
	}
	return parseAck(o.answer)
}

// await sends a message and returns what becomes of it.
func (c *keptSender) await(deadline time.Time, frame []byte) outcome {
	w := waiters.Get().(*waiter)
	c.out.mu.Lock()
	full := len(c.waiting) >= keptShare || c.out.queued-c.out.written > keptQueue
	if !c.agreed || c.retired || c.out.err != nil || full {
		c.out.mu.Unlock()
		return outcome{err: errUnsent}
	}
	c.last++
	number := c.last
	flush := c.out.addLocked(keptMessage, number, frame)
	w.end = c.out.queued
	c.waiting[number] = w
	company := len(c.waiting) > 1 && len(frame) <= keptSmall
	c.out.mu.Unlock()
	if flush {
		c.out.flush(company)
	}
	w.timer.Reset(time.Until(deadline))
	select {
	case o := <-w.outcome:
		w.timer.Stop()
		waiters.Put(w)
		return o
	case <-w.timer.C:
	}
	c.out.mu.Lock()
	if c.waiting[number] == nil { // the outcome came first
		c.out.mu.Unlock()
		return <-w.outcome
	}
	flush = c.out.addCopyLocked(keptCancel, number, nil)
	c.settleLocked(number, outcome{})
	c.out.mu.Unlock()
	if flush {
		c.out.flush(false)
	}
	return outcome{err: fmt.Errorf("acknowledgement: %w", os.ErrDeadlineExceeded)}
}

// settleLocked ends an exchange. The caller holds out.mu.
func (c *keptSender) settleLocked(number uint32, o outcome) {
	w := c.waiting[number]
	if w == nil {
		return
	}
	delete(c.waiting, number)
	w.outcome <- o
	c.closeIfDoneLocked()
}

// answeredLocked ends an exchange with its answer, which need not have waited for
// all of the message. The caller holds out.mu.
func (c *keptSender) answeredLocked(number uint32, answer []byte) {
	if w := c.waiting[number]; w != nil {
		c.settleLocked(number, outcome{answer: answer, written: w.end <= c.out.written})
	}
}

// closeIfDoneLocked closes the connection after its last exchange, which ends
// read. The caller holds out.mu.
func (c *keptSender) closeIfDoneLocked() {
	if c.retired && len(c.waiting) == 0 {
		_ = c.conn.Close()
	}
}

// retire lets the connection begin no further exchange, and closes it after the
// last one. It reports whether there is none.
func (c *keptSender) retire() bool {
	kept.forget(c)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.retired = true
	c.closeIfDoneLocked()
	return len(c.waiting) == 0
}

// writeFailed lets the messages that were not written go elsewhere. Those before
// may yet be answered: a listener that stops reads no further, but serves what it
// has.
func (c *keptSender) writeFailed() {
	kept.forget(c)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.retired = true
	for number, w := range c.waiting {
		if w.end > c.out.written {
			c.settleLocked(number, outcome{err: errUnsent})
		}
	}
	c.closeIfDoneLocked()
}

// rested closes the connection if it has not been used for the time of rest.
func (c *keptSender) rested() {
	c.out.mu.Lock()
	used := c.seen != c.last || len(c.waiting) > 0
	c.seen = c.last
	if used && !c.retired {
		c.rest.Reset(keptRest)
	}
	c.out.mu.Unlock()
	if !used {
		c.retire()
	}
}

// read waits for the listener to agree and hands its answers out, until the
// connection is closed.
func (c *keptSender) read() {
	defer close(c.ended)
	defer kept.gone(c)
	r := bufio.NewReaderSize(c.conn, 16<<10)
	if err := c.awaitAgreement(r); err == nil {
		for c.readFrame(r) == nil {
		}
	}
	kept.forget(c)
	_ = c.conn.Close()
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.retired = true
	c.rest.Stop()
	if c.out.err == nil {
		c.out.err = net.ErrClosed
	}
	for c.out.writing {
		c.out.idle.Wait()
	}
	for number, w := range c.waiting {
		o := outcome{err: fmt.Errorf("acknowledgement: %w", io.ErrUnexpectedEOF)}
		if w.end > c.out.written {
			o.err = errUnsent
		}
		c.settleLocked(number, o)
	}
}

func (c *keptSender) awaitAgreement(r *bufio.Reader) error {
	if err := c.conn.SetReadDeadline(time.Now().Add(keptAgree)); err != nil {
		return err
	}
	hello, err := r.Peek(len(keptHello))
	if err != nil {
		return err
	}
	if string(hello) != keptHello {
		return errors.New("not the agreement to keep a connection")
	}
	_, _ = r.Discard(len(keptHello))
	c.out.mu.Lock()
	c.agreed = true
	c.out.mu.Unlock()
	return c.conn.SetReadDeadline(time.Time{})
}

// readFrame reads a frame of the listener and does what it says.
func (c *keptSender) readFrame(r *bufio.Reader) error {
	kind, size, number, err := readKeptHeader(r)
	if err != nil {
		return err
	}
	switch {
	case kind == keptAnswer && size <= headerSize+maxPayload:
		answer, err := readAnswer(r, size)
		if err != nil {
			return err
		}
		c.out.mu.Lock()
		c.answeredLocked(number, answer)
		c.out.mu.Unlock()
		return nil
	case kind == keptStop && size == 0:
		c.stopAfter(number)
		return nil
	}
	return errors.New("not a frame of a listener")
}

// readAnswer reads an answer of so many bytes; nil if it accepts the message.
func readAnswer(r *bufio.Reader, size int) ([]byte, error) {
	if size <= keptSmall {
		answer, err := r.Peek(size)
		if err != nil {
			return nil, err
		}
		if whole, err := frameLength(answer); err == nil && whole > 0 && whole == size && isAcceptance(answer[headerSize:]) {
			_, err := r.Discard(size)
			return nil, err
		}
	}
	return readPayload(r, size)
}

// stopAfter lets the messages go elsewhere that the listener will not read.
func (c *keptSender) stopAfter(number uint32) {
	kept.forget(c)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.retired = true
	for n := range c.waiting {
		if int32(n-number) > 0 {
			c.settleLocked(n, outcome{err: errUnsent})
		}
	}
	c.closeIfDoneLocked()
}

// keeper has the connections that this process keeps, while it has a listener or
// tracker.
type keeper struct {
	mu    sync.Mutex               // guards the fields below
	users int                      // listeners that are started
	conns map[string]*keptSender   // by path; messages go there
	live  map[*keptSender]struct{} // not closed yet, those that only wait for answers included
}

var kept = keeper{conns: make(map[string]*keptSender), live: make(map[*keptSender]struct{})}

// join counts a listener that has started.
func (k *keeper) join() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.users++
}

// leave closes the connections that are at rest with the last listener, and
// returns when they are. The others are closed after their last exchange.
func (k *keeper) leave() {
	k.mu.Lock()
	k.users--
	var left []*keptSender
	if k.users == 0 {
		left = slices.Collect(maps.Keys(k.live))
	}
	k.mu.Unlock()
	for _, c := range left {
		if c.retire() {
			<-c.ended
		}
	}
}

// find returns the connection to the socket at the path, if there is one and the
// path still leads to that socket.
func (k *keeper) find(path string) *keptSender {
	k.mu.Lock()
	c := k.conns[path]
	k.mu.Unlock()
	if c == nil {
		return nil
	}
	if !c.isThere() {
		c.retire()
		return nil
	}
	return c
}

// isThere reports whether the path still leads to the listener's socket. Among
// messages sent at the same time one in keptLook looks.
func (c *keptSender) isThere() bool {
	now := time.Now()
	c.out.mu.Lock()
	trust := len(c.waiting) > 0 && now.Sub(c.looked) < keptLook
	if !trust {
		c.looked = now
	}
	c.out.mu.Unlock()
	if trust {
		return true
	}
	file, err := statFile(c.path)
	return err == nil && file == c.file
}

// wants reports whether a connection to the path would be kept.
func (k *keeper) wants(path string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wantsLocked(path)
}

func (k *keeper) wantsLocked(path string) bool {
	return keepsConns && k.users > 0 && len(k.live) < keptConns && k.conns[path] == nil
}

// keep tells the listener that the connection is kept, if it is, and reports so.
func (k *keeper) keep(path string, file fileID, conn *net.UnixConn) bool {
	c := &keptSender{path: path, file: file, conn: conn, ended: make(chan struct{}), waiting: make(map[uint32]*waiter)}
	var err error
	if c.out, err = newBatch(conn, c.writeFailed); err != nil {
		return false
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.wantsLocked(path) {
		return false
	}
	if !writeHello(conn) {
		return false
	}
	k.conns[path], k.live[c] = c, struct{}{}
	c.out.mu.Lock()
	c.rest = time.AfterFunc(keptRest, c.rested)
	c.out.mu.Unlock()
	go c.read() // ends with the connection; leave, and the time of rest, close it
	return true
}

// forget lets no message go to a connection any more.
func (k *keeper) forget(c *keptSender) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.conns[c.path] == c {
		delete(k.conns, c.path)
	}
}

// gone forgets a connection that is closed.
func (k *keeper) gone(c *keptSender) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.live, c)
}

// keepsConns says whether the system has what keeping connections needs: a
// listener that shuts down its reading side must let later writes fail with
// nothing written, and earlier ones be read.
const keepsConns = runtime.GOOS == "linux"

// nameKeeper names a socket that is about to connect, so that the listener knows
// that its sender can keep the connection. Without the name nothing is kept.
func nameKeeper(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = syscall.Bind(int(fd), &syscall.SockaddrUnix{Name: keptName + rand.Text()})
	})
}

// namedKeeper reports whether the connection's sender can keep it.
func namedKeeper(conn *net.UnixConn) bool {
	addr, ok := conn.RemoteAddr().(*net.UnixAddr)
	return ok && strings.HasPrefix(addr.Name, keptName)
}

// fileID tells the socket files that exist at one time apart. A connection keeps
// the file of its listener's socket in existence, so its number is not used again.
type fileID struct{ device, inode uint64 }

func statFile(path string) (fileID, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fileID{}, err
	}
	return fileID{uint64(st.Dev), uint64(st.Ino)}, nil
}

// offersToKeep reports whether the acknowledgement says that its sender can keep
// the connection.
func offersToKeep(ack []byte) bool {
	var offer struct {
		Keep int `json:"keep"`
	}
	return json.Unmarshal(ack, &offer) == nil && offer.Keep >= 1
}
