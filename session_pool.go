package acomm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	maxRoutes   = 4 * maxSessions  // paths that lead to listeners with a session
	maxRefusals = 3                // of a target, until a listener's own session is left alone with its messages
	checkedFor  = time.Millisecond // that a path is taken to lead to the same socket
)

// sessionPool has the sessions of the process. It opens them while the process has a
// listener or tracker that is started.
type sessionPool struct {
	mu       sync.Mutex      // guards the fields below
	users    int             // listeners that are started
	opening  context.Context // ends with the last user
	cancel   context.CancelFunc
	openers  *sync.WaitGroup // goroutines that open sessions; the last leave waits. Add only under mu, while there are users
	all      map[*session]peer
	pending  int                  // sessions that are being opened
	admitted int                  // sessions that were opened
	routes   map[string]*route    // by path
	avoid    map[string]time.Time // paths to which no session is opened until then
}

var sessions = sessionPool{
	all:    make(map[*session]peer),
	routes: make(map[string]*route),
	avoid:  make(map[string]time.Time),
}

// peer is the process at the other end of a session: what it says, and what the kernel
// says of it.
type peer struct {
	token processToken
	creds peerCreds
}

func (p peer) isKnown() bool { return p.token != processToken{} && p.creds != peerCreds{} }

// peerCreds is what the kernel says of the process at the other end of a connection.
type peerCreds struct {
	pid      int32
	uid, gid uint32
	groups   string // the supplementary ones, as the kernel writes them
}

// threadID is what the kernel asks for when a thread opens a file.
type threadID struct{ fsuid, fsgid uintptr }

// destination is a listener that this process has opened a session to.
type destination struct {
	own     *session // to it
	carrier *session // nil, or one that the listener's process has opened, and that carries messages to it, too

	ownOver  bool
	refusals int // of carriers
}

// route is a path that leads to a destination.
type route struct {
	*destination
	path    string
	checked atomic.Int64 // when it was found to do so, in nanoseconds since processStart
}

var processStart = time.Now()

// join counts a listener that has started.
func (p *sessionPool) join() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users++; p.users == 1 {
		p.opening, p.cancel = context.WithCancel(context.Background())
		p.openers = &sync.WaitGroup{}
	}
}

// leave closes the sessions with the last listener, and waits for those that are idle.
// The others end after their last exchange.
func (p *sessionPool) leave() {
	p.mu.Lock()
	p.users--
	last := p.users == 0
	cancel, openers := p.cancel, p.openers
	if last {
		clear(p.avoid)
	}
	p.mu.Unlock()
	if !last {
		return
	}
	cancel()
	openers.Wait()
	finish(p.opened())
}

// finish finishes sessions, and waits for those that end now. It reports whether there
// were any.
func finish(all []*session) bool {
	all = slices.DeleteFunc(all, func(s *session) bool { return !s.finish() })
	for _, s := range all {
		<-s.ended
	}
	return len(all) > 0
}

// opened returns the sessions that this process has opened, if it has no listener.
func (p *sessionPool) opened() (opened []*session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.all {
		if s.opened && p.users == 0 {
			opened = append(opened, s)
		}
	}
	return opened
}

// makeRoom closes the sessions that are idle, where a descriptor is needed. It reports
// whether there were any.
func (p *sessionPool) makeRoom() bool {
	p.mu.Lock()
	all := slices.Collect(maps.Keys(p.all))
	p.mu.Unlock()
	return finish(slices.DeleteFunc(all, func(s *session) bool { return !s.isIdle() }))
}

// lacksDescriptor reports whether an error says that there is no descriptor left.
func lacksDescriptor(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// mostSessions is how many sessions the process opens, or a listener accepts.
func mostSessions() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return maxSessions
	}
	return int(min(maxSessions, limit.Cur/8))
}

// send sends a message to the listener at the path by a session, behind room for a
// header, and returns its acknowledgement. With errUnsent it was not served and is the
// caller's still; else the message is released.
func (p *sessionPool) send(deadline time.Time, path string, m *message) (*Response, error) {
	r, carrier := p.route(path)
	if r == nil || r.own.as != thisThread() || !r.leads() {
		return nil, errUnsent
	}
	to := r.own.file
	var o outcome
	if carrier != nil {
		o = carrier.send(deadline, to, m)
	}
	if carrier == nil || o.err == errUnsent && !carrier.isCalling(to) {
		o = r.own.send(deadline, to, m)
	}
	switch {
	case o.err != nil:
		return nil, o.err
	case o.answer == nil:
		return accepted, nil
	}
	return parseAck(o.answer)
}

// send is call for a message. With errUnsent it is the caller's still.
func (s *session) send(deadline time.Time, to fileID, m *message) outcome {
	o := s.call(deadline, to, m.text)
	free := o.free || len(m.text) <= maxCopied
	switch {
	case o.err != errUnsent && free:
		m.release()
	case o.err == errUnsent && !free:
		m.text = bytes.Clone(m.text) // that one may yet be written
	}
	return o
}

// route returns where messages to the path go, if there is a session, and the one that
// carries them if it is not the listener's own.
func (p *sessionPool) route(path string) (*route, *session) {
	p.mu.Lock()
	r := p.routes[path]
	if r == nil && (len(p.routes) == 0 || len(p.routes) >= maxRoutes) {
		p.mu.Unlock()
		return nil, nil
	}
	if r == nil {
		p.mu.Unlock()
		file, err := statFile(path)
		if err != nil {
			return nil, nil
		}
		p.mu.Lock()
		r = p.addRouteLocked(path, file)
	}
	defer p.mu.Unlock()
	if r == nil {
		return nil, nil
	}
	return r, r.carrier
}

// addRouteLocked adds a path that leads to the socket file of a destination, if there is
// one. The caller holds mu.
func (p *sessionPool) addRouteLocked(path string, file fileID) *route {
	for _, r := range p.routes {
		if r.own.file == file {
			p.routes[path] = &route{destination: r.destination, path: path}
			return p.routes[path]
		}
	}
	return nil
}

// leads reports whether the path leads to the same socket file still, unchanged. That it
// did is good for a moment.
func (r *route) leads() bool {
	now := int64(time.Since(processStart))
	if checked := r.checked.Load(); checked != 0 && now-checked < int64(checkedFor) {
		return true
	}
	if file, err := statFile(r.path); err != nil || file != r.own.file {
		sessions.drop(r)
		return false
	}
	r.checked.Store(now) // what was found was so after that
	return true
}

// drop forgets that a path leads to a destination. Without any path its sessions
// finish.
func (p *sessionPool) drop(r *route) {
	p.mu.Lock()
	if p.routes[r.path] == r {
		delete(p.routes, r.path)
	}
	own, carrier := r.own, r.carrier
	for _, other := range p.routes {
		if other.destination == r.destination {
			own, carrier = nil, nil
		}
	}
	p.mu.Unlock()
	if own != nil {
		own.finish()
	}
	if carrier != nil {
		carrier.stopCalling(r.own.file)
	}
}

// wants reports whether a session to the path would be opened.
func (p *sessionPool) wants(path string) bool {
	if !hasSessions {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wantsLocked(path)
}

func (p *sessionPool) wantsLocked(path string) bool {
	if p.users == 0 || p.routes[path] != nil {
		return false
	}
	if until, ok := p.avoid[path]; ok && time.Now().Before(until) {
		return false
	}
	opened := 0
	for s := range p.all {
		if s.opened {
			opened++
		}
	}
	return opened+p.pending < mostSessions()
}

// open opens a session to the path in the background, unless that is being done or was
// done in vain a moment ago.
func (p *sessionPool) open(path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.wantsLocked(path) || !p.avoidLocked(path) {
		return
	}
	ctx := p.opening
	p.pending++
	p.openers.Go(func() {
		s, err := openSession(ctx, path)
		if p.admit(path, s, err) {
			go s.read() // ends with the session; leave, and the idle time, end it
		} else if err == nil {
			_ = s.conn.Close()
		}
	})
}

// avoidLocked has no session opened to the path for a while. The caller holds mu.
func (p *sessionPool) avoidLocked(path string) bool {
	now := time.Now()
	if len(p.avoid) >= maxRoutes {
		maps.DeleteFunc(p.avoid, func(_ string, until time.Time) bool { return now.After(until) })
	}
	if len(p.avoid) >= maxRoutes {
		return false
	}
	p.avoid[path] = now.Add(openBackoff)
	return true
}

// admit ends an opening. It lets messages to the path go by the session that was opened,
// if one was, unless another one leads to the same socket already.
func (p *sessionPool) admit(path string, s *session, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending--
	if err == nil || isGone(err) {
		delete(p.avoid, path)
	}
	if s == nil || p.users == 0 {
		return false
	}
	if p.routes[path] != nil || p.addRouteLocked(path, s.file) != nil {
		return false
	}
	p.admitted++
	s.order = p.admitted
	p.all[s] = peer{s.token, s.creds}
	p.routes[path] = &route{destination: &destination{own: s}, path: path}
	return true
}

// isGone reports whether an error says that the listener is gone: the next one at the path
// may greet.
func isGone(err error) bool {
	return errors.Is(asUnexpectedEOF(err), io.ErrUnexpectedEOF) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// add notes a session that was accepted.
func (p *sessionPool) add(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all[s] = peer{}
}

// setPeer notes what the peer of a session calls its process.
func (p *sessionPool) setPeer(s *session, token processToken) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.all[s]; ok {
		p.all[s] = peer{token, s.creds}
	}
}

// gone forgets a session that is over.
func (p *sessionPool) gone(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.all, s)
}

// forget notes that no further message may be sent by a session: its peer has refused
// to carry some, or it ends.
func (p *sessionPool) forget(s *session, refused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for path, r := range p.routes {
		switch s {
		case r.own:
			r.ownOver = true
		case r.carrier:
			r.carrier = nil
			if refused {
				r.refusals++
				r.own.unanswered.Store(true) // it is tried again after the next answer
			}
		}
		if r.ownOver && r.carrier == nil {
			delete(p.routes, path)
		}
	}
}

// pair looks for sessions with the peer of this one that can carry what is sent to its
// listeners, so that an acknowledgement and the response after it share a write.
func (p *sessionPool) pair(s *session) {
	for {
		d, carrier := p.choose(s)
		if d == nil {
			return
		}
		if !carrier.carry(d.own.file) {
			p.forget(carrier, false)
			return
		}
	}
}

// choose returns a listener of the session's peer that has none yet, and the session
// that may carry what is sent to it.
func (p *sessionPool) choose(s *session) (*destination, *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	with := p.all[s]
	if !with.isKnown() {
		return nil, nil
	}
	carrying := make(map[*session]bool)
	for _, r := range p.routes {
		carrying[r.carrier] = true
	}
	for _, r := range p.routes {
		if r.carrier != nil || r.ownOver || p.all[r.own] != with || r.own.unanswered.Load() || r.refusals > maxRefusals {
			continue
		}
		for carrier, at := range p.all {
			if at == with && !carrier.opened && !carrying[carrier] && p.carriesLocked(carrier, r.own) && carrier.mayCarry() {
				r.carrier = carrier
				return r.destination, carrier
			}
		}
	}
	return nil, nil
}

// carriesLocked reports whether a session that was accepted carries the messages of one
// that was opened to the same peer, and not the other way round. Both ends have to see
// that in the same way: the token tells, or the order where the peer is this process.
// The caller holds mu.
func (p *sessionPool) carriesLocked(accepted, own *session) bool {
	token, self := p.all[own].token, ownToken()
	if token != self {
		return bytes.Compare(token[:], self[:]) < 0
	}
	for s := range p.all {
		if s.opened && s.name == accepted.name {
			return s.order < own.order
		}
	}
	return false
}

// feedOf returns the queue of a listener of this process to which the peer of the session
// has opened one, and the addresses of that.
func (p *sessionPool) feedOf(s *session, to fileID) (queue *acceptQueue, local, remote net.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	with := p.all[s]
	for via, peer := range p.all {
		if with.isKnown() && peer == with && !via.opened && via.file.isSame(to) {
			if queue, local, remote = via.serving(); queue != nil {
				break
			}
		}
	}
	return queue, local, remote
}
