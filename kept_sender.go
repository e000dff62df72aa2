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

// The sending side of kept connections.

// errUnsent is the outcome of an exchange whose message has certainly not been
// read: it may be sent again.
var errUnsent = errors.New("not sent")

// keptSender sends to a listener on a connection that is kept: one that this process
// has made for it, or one that the listener's process has made to a listener of
// this one.
type keptSender struct {
	*keptConn
	file fileID
	as   threadID // who connected
	made bool     // for it, by this process

	// Guarded by out.mu.
	agreed   bool // by the listener
	retired  bool // no further exchange
	last     uint32
	waiting  map[uint32]*waiter
	size     int // bytes of the messages that are waiting
	expiry   *time.Timer
	expires  time.Time // when expiry is set for; zero: it is not
	linking  *keptConn // the listener is asked for
	linkings int       // times it was asked
}

// waiter is a message whose acknowledgement is waited for.
type waiter struct {
	size     int    // of its frame, in bytes
	end      uint64 // of its frame, in bytes added to the batch
	deadline time.Time
	outcome  chan outcome
}

var waiters = sync.Pool{New: func() any { return &waiter{outcome: make(chan outcome, 1)} }}

type outcome struct {
	answer  []byte // nil: the message is accepted
	err     error
	written bool // the message; it is not looked at any more
}

// route is a path that leads to the socket of a sender's listener, as one that is spelled
// otherwise may, too.
type route struct {
	*keptSender
	path   string
	looked time.Time // when a look had found that it does; guarded by out.mu
}

// exchange sends a message, behind room for a header, and returns its
// acknowledgement. The error is errUnsent where the message can't have been read;
// in all other cases it is released.
func (r *route) exchange(deadline time.Time, m *message) (*Response, error) {
	o := errNoRoute
	if r.leads() {
		o = r.await(deadline, m.text)
	}
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

var errNoRoute = outcome{err: errUnsent}

// leads reports whether the path leads to the listener's socket still. A look that found
// that is good for a moment.
func (r *route) leads() bool {
	r.out.mu.Lock()
	now := time.Now()
	good := now.Sub(r.looked) < keptLook
	r.out.mu.Unlock()
	if good {
		return true
	}
	if file, err := statFile(r.path); err != nil || file != r.file {
		if kept.drop(r) {
			r.retire()
		}
		return false
	}
	r.out.mu.Lock()
	defer r.out.mu.Unlock()
	r.looked = now // before the look: what it found was so after that
	return true
}

// await sends a message and returns what becomes of it.
func (c *keptSender) await(deadline time.Time, frame []byte) outcome {
	w := waiters.Get().(*waiter)
	c.out.mu.Lock()
	full := len(c.waiting) >= keptShare || c.size+len(frame) > keptWindow || c.out.queued-c.out.written > keptWindow
	if !c.agreed || c.retired || c.out.err != nil || full {
		c.out.mu.Unlock()
		return outcome{err: errUnsent}
	}
	c.last++
	flush := c.out.addLocked(keptMessage, c.last, frame)
	w.size, w.end, w.deadline = len(frame), c.out.queued, deadline
	c.waiting[c.last] = w
	c.size += w.size
	c.expireLocked(deadline)
	company := len(c.waiting) > 1 && len(frame) <= keptSmall
	c.out.mu.Unlock()
	if flush {
		c.out.flush(company)
	}
	o := <-w.outcome
	waiters.Put(w)
	return o
}

// expireLocked sees to it that what has passed its deadline is given up then. One
// timer serves all: most deadlines never pass, and the first to be set is the first
// to pass. The caller holds out.mu.
func (c *keptSender) expireLocked(deadline time.Time) {
	if !c.expires.IsZero() && !deadline.Before(c.expires) {
		return
	}
	c.expires = deadline
	if c.expiry == nil {
		c.expiry = time.AfterFunc(time.Until(deadline), c.giveUp)
		return
	}
	c.expiry.Reset(time.Until(deadline))
}

// giveUp ends the exchanges that have taken too long.
func (c *keptSender) giveUp() {
	c.out.mu.Lock()
	c.expires = time.Time{}
	flush := false
	for number, w := range c.waiting {
		if !passed(w.deadline) {
			c.expireLocked(w.deadline)
			continue
		}
		flush = c.out.addCopyLocked(keptCancel, number, nil) || flush
		c.settleLocked(number, outcome{err: fmt.Errorf("acknowledgement: %w", os.ErrDeadlineExceeded)})
	}
	c.out.mu.Unlock()
	if flush {
		c.out.flush(false)
	}
}

// settleLocked ends an exchange. The caller holds out.mu.
func (c *keptSender) settleLocked(number uint32, o outcome) {
	if w := c.waiting[number]; w != nil {
		c.takeLocked(number, w) // first: with the outcome, w is another one's
		w.outcome <- o
	}
}

// takeLocked takes a message out of those that are waiting. The caller holds out.mu,
// and tells the outcome.
func (c *keptSender) takeLocked(number uint32, w *waiter) {
	delete(c.waiting, number)
	c.size -= w.size
	if c.retired {
		c.checkDoneLocked()
	}
}

// doneLocked reports whether nothing is sent any more, nor waited for. The caller
// holds out.mu.
func (c *keptSender) doneLocked() bool { return c.retired && len(c.waiting) == 0 }

// retire lets nothing further be sent. It reports whether the connection is closed
// thereby.
func (c *keptSender) retire() bool {
	kept.forget(c)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.retired = true
	return c.checkDoneLocked()
}

// writeFailedLocked lets the messages that were not written go elsewhere. Those
// before may yet be answered. The caller holds out.mu.
func (c *keptSender) writeFailedLocked() {
	c.retired = true
	for number, w := range c.waiting {
		if w.end > c.out.written {
			c.settleLocked(number, outcome{err: errUnsent})
		}
	}
}

// endLocked ends all exchanges: the connection is closed. The caller holds out.mu.
func (c *keptSender) endLocked() {
	c.writeFailedLocked()
	for number := range c.waiting {
		c.settleLocked(number, outcome{err: fmt.Errorf("acknowledgement: %w", io.ErrUnexpectedEOF)})
	}
	if c.expiry != nil {
		c.expiry.Stop()
	}
}

// awaitAgreement waits for the listener's word that it keeps the connection.
func (c *keptSender) awaitAgreement(r *bufio.Reader) error {
	if err := c.conn.SetReadDeadline(time.Now().Add(keptAgree)); err != nil {
		return err
	}
	hello := make([]byte, len(keptHello)+len(c.token))
	if _, err := io.ReadFull(r, hello); err != nil {
		return err
	}
	if string(hello[:len(keptHello)]) != keptHello {
		return errors.New("not the agreement to keep a connection")
	}
	if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	kept.agreed(c, keptToken(hello[len(keptHello):]))
	return nil
}

// readAnswer reads an answer of so many bytes.
func (c *keptSender) readAnswer(r *bufio.Reader, size int, number uint32) error {
	answer, err := readAnswer(r, size)
	if err != nil {
		return err
	}
	c.out.mu.Lock()
	w := c.waiting[number]
	if w == nil {
		c.out.mu.Unlock()
		return nil
	}
	o := outcome{answer: answer, written: w.end <= c.out.written} // it need not have waited for all of the message
	c.takeLocked(number, w)
	c.out.held = true
	c.out.mu.Unlock()
	w.outcome <- o // not under the lock: whoever gets it wants that
	return nil
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
	c.checkDoneLocked()
}

// link asks the listener whether messages to it may come by another connection, one
// that a listener of this process has accepted: they may if the listener's process
// is the one that has made it. It reports whether the question was asked.
func (c *keptSender) link(on *keptConn, file fileID) bool {
	question := make([]byte, 0, linkSize)
	question = append(question, on.token[:]...)
	question = binary.BigEndian.AppendUint64(question, file.device)
	question = binary.BigEndian.AppendUint64(question, file.inode)
	c.out.mu.Lock()
	if c.linking != nil || c.linkings == keptConns || c.retired || !c.agreed {
		c.out.mu.Unlock()
		return false
	}
	c.linking = on
	c.linkings++
	flush := c.out.addCopyLocked(keptLink, 0, question)
	c.out.mu.Unlock()
	if flush {
		c.out.flush(false)
	}
	return true
}

// linked takes the listener's answer to link.
func (c *keptSender) linked(yes bool) error {
	c.out.mu.Lock()
	on := c.linking
	c.linking = nil
	c.out.mu.Unlock()
	switch {
	case on == nil:
		return errors.New("an answer without a question")
	case yes:
		kept.sendOn(on, c)
	}
	return nil
}

// keeper has what this process sends on kept connections, while it has a listener
// or tracker.
type keeper struct {
	mu    sync.Mutex                // guards the fields below; taken before out.mu
	users int                       // listeners that are started
	conns map[string]*route         // by path; messages go there
	live  map[*keptSender]struct{}  // not ended yet, those that only wait for answers included
	made  int                       // of them, on connections of their own
	named map[keptToken]*keptSender // those by what their listeners call the connection
}

var kept = keeper{
	conns: make(map[string]*route),
	live:  make(map[*keptSender]struct{}),
	named: make(map[keptToken]*keptSender),
}

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

// to returns what sends to the socket at the path, if there is something.
func (k *keeper) to(path string) *keptSender {
	if r := k.route(path); r != nil {
		return r.keptSender
	}
	return nil
}

func (k *keeper) route(path string) *route {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.conns[path]
}

// find returns the route of another path to the same socket as one for this path, too.
func (k *keeper) find(path string) *route {
	k.mu.Lock()
	none := len(k.conns) == 0 || len(k.conns) >= keptRoutes
	k.mu.Unlock()
	if none {
		return nil
	}
	file, err := statFile(path)
	if err != nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.conns {
		if r.file == file {
			k.conns[path] = &route{keptSender: r.keptSender, path: path}
			return k.conns[path]
		}
	}
	return nil
}

// drop forgets that a path leads to a sender. It reports whether no other does.
func (k *keeper) drop(r *route) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.conns[r.path] == r {
		delete(k.conns, r.path)
	}
	for _, other := range k.conns {
		if other.keptSender == r.keptSender {
			return false
		}
	}
	return true
}

// forThread returns the route of the path, unless the calling thread has other rights
// than the one that connected: the kernel would have asked for them.
func (k *keeper) forThread(path string) *route {
	r := k.route(path)
	if r == nil {
		r = k.find(path)
	}
	if r == nil || r.as != thisThread() {
		return nil
	}
	return r
}

// wants reports whether a connection to the path would be kept.
func (k *keeper) wants(path string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.wantsLocked(path)
}

func (k *keeper) wantsLocked(path string) bool {
	return keepsConns && k.users > 0 && k.made < mostKept() && k.conns[path] == nil
}

// mostKept is how many connections are kept, as sender or by a listener.
func mostKept() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return keptConns
	}
	return int(min(keptConns, limit.Cur/8))
}

// makeRoom closes the connections that are at rest, where a descriptor is needed. It
// reports whether there were any.
func (k *keeper) makeRoom() bool {
	k.mu.Lock()
	var resting []*keptSender
	for c := range k.live {
		c.out.mu.Lock()
		if c.made && len(c.waiting) == 0 {
			resting = append(resting, c)
		}
		c.out.mu.Unlock()
	}
	k.mu.Unlock()
	room := false
	for _, c := range resting {
		if c.retire() {
			<-c.ended
			room = true
		}
	}
	return room
}

// lacksDescriptor reports whether an error says that there is no descriptor left.
func lacksDescriptor(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// keep tells the listener that the connection is kept, if it is, and reports so.
func (k *keeper) keep(path string, file fileID, conn *net.UnixConn) bool {
	on, err := newKeptConn(conn, keptRest)
	if err != nil {
		return false
	}
	c := &keptSender{keptConn: on, file: file, as: thisThread(), made: true, waiting: make(map[uint32]*waiter)}
	on.sends.Store(c)
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.wantsLocked(path) || !writeAtOnce(conn, []byte(keptHello)) {
		return false
	}
	k.conns[path], k.live[c] = &route{keptSender: c, path: path}, struct{}{}
	k.made++
	go on.read(c.awaitAgreement) // ends with the connection; leave, and the time of rest, close it
	return true
}

// agreed lets messages go to a connection whose listener has agreed to keep it, and
// calls it so.
func (k *keeper) agreed(c *keptSender, token keptToken) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.named[token] = c
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.token, c.agreed = token, true
}

// called returns what sends on the connection that its listener calls so.
func (k *keeper) called(token keptToken) *keptSender {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.named[token]
}

// sendOn lets the messages of a sender go out on another connection from now on,
// at whose other end its listener serves, too.
func (k *keeper) sendOn(on *keptConn, instead *keptSender) {
	k.mu.Lock()
	defer k.mu.Unlock()
	on.out.mu.Lock()
	defer on.out.mu.Unlock()
	serves := on.serves.Load()
	over := on.finishing || on.stopped || serves == nil || serves.refusing
	if k.users == 0 || over || on.sends.Load() != nil {
		return
	}
	c := &keptSender{
		keptConn: on, file: instead.file, as: instead.as, agreed: true, waiting: make(map[uint32]*waiter),
	}
	for path, r := range k.conns {
		if r.keptSender == instead {
			k.conns[path] = &route{keptSender: c, path: path}
			k.live[c] = struct{}{}
		}
	}
	if _, ok := k.live[c]; ok { // a path leads to instead still
		on.sends.Store(c)
	}
}

// forget lets no message go to a sender any more.
func (k *keeper) forget(c *keptSender) {
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.conns, func(_ string, r *route) bool { return r.keptSender == c })
}

// gone forgets a sender whose connection is closed.
func (k *keeper) gone(c *keptSender) {
	k.forget(c)
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.live, c)
	if c.made {
		k.made--
		if k.named[c.token] == c {
			delete(k.named, c.token)
		}
	}
}

// keepsConns says whether the system has what keeping connections needs: names for
// sockets without a file.
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

// fileID tells socket files apart, and a file before its mode, owner or name changed
// from the same file after it. The number of a file that is gone is used again, the
// time is then another.
type fileID struct {
	device, inode uint64
	changed       syscall.Timespec
}

// isFile reports whether it is the file with these numbers.
func (f fileID) isFile(device, inode uint64) bool { return f.device == device && f.inode == inode }

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

// threadID is what the kernel asks for when a thread opens a file.
type threadID struct{ fsuid, fsgid uintptr }

// peerID is a process and its rights.
type peerID struct {
	pid      int32
	uid, gid uint32
	groups   string // the supplementary ones, as the kernel writes them
}

// keptToken is what a listener calls a kept connection, and tells nobody but who
// has made it. Its sender, when it is asked by the listener's process on a connection
// of the other direction, can tell thereby that the two lead to the same process.
type keptToken [16]byte

const linkSize = len(keptToken{}) + 8 + 8 // bytes: and the listener's file, device and inode

// offersToKeep reports whether the acknowledgement says that its sender can keep
// the connection.
func offersToKeep(ack []byte) bool {
	var offer struct {
		Keep int `json:"keep"`
	}
	return json.Unmarshal(ack, &offer) == nil && offer.Keep >= 1
}
