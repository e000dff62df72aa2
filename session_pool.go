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
	maxRoutes   = 4 * maxSessions  // paths to listeners with a session; also paths in avoid
	maxRefusals = 3                // of targets for a listener; after more, messages to it stay on its own session
	checkedFor  = time.Millisecond // after a check, a path is taken to lead to the same socket file
)

// sessionPool holds the sessions of the process, by path. It opens sessions while a
// listener or tracker of the process is started.
type sessionPool struct {
	mu       sync.Mutex           // guards the fields below, and those of each destination
	users    int                  // listeners that are started, those of trackers included
	opening  context.Context      // for openSession; cancelled when the last user leaves
	cancel   context.CancelFunc   // of opening
	openers  *sync.WaitGroup      // goroutines that open sessions; Add only under mu and while there are users; the last leave waits
	all      map[*session]peer    // opened and accepted sessions that are not over
	pending  int                  // sessions that are being opened
	admitted int                  // number of sessions ever opened; numbers session.order
	routes   map[string]*route    // by path
	avoid    map[string]time.Time // back-off: no session is opened to the path before that time
}

var sessions = sessionPool{
	all:    make(map[*session]peer),
	routes: make(map[string]*route),
	avoid:  make(map[string]time.Time),
}

// peer identifies the process at the other end of a session: by the token that it sent,
// and by what the kernel says of it.
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

// threadID is the user and group of a thread that the kernel checks when it opens or
// connects to a file.
type threadID struct{ fsuid, fsgid uintptr }

// destination is a listener that this process has opened a session to.
type destination struct {
	own     *session // the session that was opened to the listener
	carrier *session // a session that the listener's process opened and that carries messages to the listener too; nil: none

	ownOver  bool // no further message may be sent on own
	refusals int  // number of targets refused by the peer
}

// route is a path that leads to a destination. Several may lead to the same one.
type route struct {
	*destination
	path    string
	checked atomic.Int64 // time of the last check that succeeded, in nanoseconds since processStart
}

var processStart = time.Now()

// join counts a listener that starts.
func (p *sessionPool) join() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users++; p.users == 1 {
		p.opening, p.cancel = context.WithCancel(context.Background())
		p.openers = &sync.WaitGroup{}
	}
}

// leave counts a listener that has stopped. After the last one it finishes all sessions
// that the process opened, and waits for those that are idle. The others close after
// their last exchange.
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

// finish drains sessions and waits for those that close now. It reports whether there
// were any.
func finish(all []*session) bool {
	all = slices.DeleteFunc(all, func(s *session) bool { return !s.finish() })
	for _, s := range all {
		<-s.ended
	}
	return len(all) > 0
}

// opened returns the sessions that the process opened; none if a listener has started
// again.
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

// makeRoom closes idle sessions because a descriptor is needed. It reports whether it
// closed any.
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

// mostSessions returns how many sessions the process opens, and how many a listener
// accepts: 256, or an eighth of the descriptor limit if that is less.
func mostSessions() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return maxSessions
	}
	return int(min(maxSessions, limit.Cur/8))
}

// send sends a message on the session to the path and returns its acknowledgement. With
// errUnsent the message was not served and still belongs to the caller; otherwise send
// has released it. The message begins with room for a session header.
func (p *sessionPool) send(deadline time.Time, path string, m *message) (*Response, error) {
	r, carrier := p.route(path)
	if r == nil || r.own.as != thisThread() || !r.revalidate() {
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

// send is call for a message. With errUnsent the message still belongs to the caller;
// otherwise send has released it where that is safe.
func (s *session) send(deadline time.Time, to fileID, m *message) outcome {
	o := s.call(deadline, to, m.text)
	free := o.free || len(m.text) <= maxCopied
	switch {
	case o.err != errUnsent && free:
		m.release()
	case o.err == errUnsent && !free:
		m.text = bytes.Clone(m.text) // the frameWriter may yet read the old memory
	}
	return o
}

// route returns the route of the path, and its carrier; nil if there is no session to the
// path. The carrier is nil if messages travel on the listener's own session.
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

// addRouteLocked adds a route from the path to the destination with that socket file; nil
// if there is none. The caller holds mu.
func (p *sessionPool) addRouteLocked(path string, file fileID) *route {
	for _, r := range p.routes {
		if r.own.file == file {
			p.routes[path] = &route{destination: r.destination, path: path}
			return p.routes[path]
		}
	}
	return nil
}

// revalidate reports whether the path still leads to the socket file of the session, and
// the file is unchanged. If not, it drops the route. For checkedFor after a success it
// does not look at the file.
func (r *route) revalidate() bool {
	now := int64(time.Since(processStart))
	if checked := r.checked.Load(); checked != 0 && now-checked < int64(checkedFor) {
		return true
	}
	if file, err := statFile(r.path); err != nil || file != r.own.file {
		sessions.drop(r)
		return false
	}
	r.checked.Store(now) // the time before the check: what it found was true after that
	return true
}

// drop removes a route. If it was the last one to its destination, no further message is
// sent on the destination's sessions.
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

// mayOpen reports whether open would open a session to the path.
func (p *sessionPool) mayOpen(path string) bool {
	if !hasSessions {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mayOpenLocked(path)
}

func (p *sessionPool) mayOpenLocked(path string) bool {
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

// open opens a session to the path in the background, if mayOpen says so.
func (p *sessionPool) open(path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.mayOpenLocked(path) || !p.backOffLocked(path) {
		return
	}
	ctx := p.opening
	p.pending++
	p.openers.Go(func() {
		s, err := openSession(ctx, path)
		if p.admit(path, s, err) {
			go s.read() // ends with the session, which leave or the idle time-out finishes
		} else if err == nil {
			_ = s.conn.Close()
		}
	})
}

// backOffLocked has no session opened to the path for openBackoff. It reports false if
// too many paths are in back-off. The caller holds mu.
func (p *sessionPool) backOffLocked(path string) bool {
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

// admit ends an opening. If it succeeded, messages to the path travel on the new session
// from now on. If another session leads to the same socket already, the new one is not
// needed. It reports whether the session was taken.
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

// isGone reports whether an error says that the listener is gone. Then there is no reason
// for a back-off: the path's next listener may accept sessions.
func isGone(err error) bool {
	return errors.Is(asUnexpectedEOF(err), io.ErrUnexpectedEOF) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// add adds an accepted session, whose peer is not known yet.
func (p *sessionPool) add(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all[s] = peer{}
}

// setPeer records the token that the peer of a session has sent.
func (p *sessionPool) setPeer(s *session, token processToken) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.all[s]; ok {
		p.all[s] = peer{token, s.creds}
	}
}

// gone removes a session that is over.
func (p *sessionPool) gone(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.all, s)
}

// forget records that no further message may be sent on a session: it ends, or its peer
// has refused the target.
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
				r.own.unanswered.Store(true) // the next answer on own leads to another try
			}
		}
		if r.ownOver && r.carrier == nil {
			delete(p.routes, path)
		}
	}
}

// pair looks for two sessions with the same peer, of which one can carry the messages of
// both, and sends the target. An acknowledgement and the response after it can then share
// a write.
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

// choose returns a listener of the session's peer without a carrier, and a session that
// may become its carrier; nil if there is no such pair.
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

// carriesLocked reports whether, of an accepted session and an own session with the same
// peer, the accepted one carries the messages of both. Both ends have to come to the same
// result without asking. So the lesser token decides, or the order of opening if the peer
// is this process. The caller holds mu.
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

// feedOf returns the acceptQueue of the listener that a target names, and the addresses
// of the session that the target's sender has opened to that listener. If there is no
// such session, the queue is nil.
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
