package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Services as users write them, for the tests of sessions, and those who send to them.

// note is what these tests send. How names what its handler does with it.
type note struct {
	ID   int    `json:"id"`
	How  string `json:"how"`
	Data string `json:"data"`
}

// handling is what a handler does with a note before its connection is done.
type handling func(conn net.Conn, n note)

// noteService is a listener served as documented, which notes by which connection
// each message came.
type noteService struct {
	*acomm.UnixListener
	served <-chan struct{} // closed when NextConn has nothing more

	mu    sync.Mutex
	peers map[string]int // messages by the name of the peer's socket; none: a plain one
	ids   map[int]int    // how often each was handled
	order []string       // peers as they came
}

// startNotes starts a listener whose handlers acknowledge, except for notes that
// say how they are handled.
func startNotes(t testing.TB, path string, limit int, how map[string]handling) *noteService {
	t.Helper()
	s := &noteService{
		UnixListener: acomm.NewUnixListener(path, limit),
		peers:        make(map[string]int),
		ids:          make(map[int]int),
	}
	require.NoError(t, s.Start())
	s.serve(how)
	t.Cleanup(func() { s.Stop(time.Nanosecond) })
	return s
}

func (s *noteService) serve(how map[string]handling) {
	var handlers sync.WaitGroup
	s.served = async(func() {
		for conn := s.NextConn(); conn != nil; conn = s.NextConn() {
			handlers.Go(func() {
				defer s.DoneConn(conn)
				var n note
				if acomm.UnmarshalConnData(conn, &n) != nil {
					return
				}
				s.mu.Lock()
				s.peers[conn.RemoteAddr().String()]++
				s.order = append(s.order, conn.RemoteAddr().String())
				s.ids[n.ID]++
				s.mu.Unlock()
				if handle := how[n.How]; handle != nil {
					handle(conn, n)
					return
				}
				_ = acomm.SendConnData(conn, &acomm.Response{})
			})
		}
		handlers.Wait()
	})
}

// peersNow returns how many messages came by each connection.
func (s *noteService) peersNow() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.peers)
}

func (s *noteService) handled(id int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ids[id]
}

// openTo sends until there is a session to the listener.
func openTo(t testing.TB, addr *url.URL) {
	t.Helper()
	for attempt := 0; !acomm.SessionTo(addr.Path).Open; attempt++ {
		require.Less(t, attempt, 100, "there is no session")
		require.NoError(t, acomm.Send(addr, note{ID: -1}))
		await(t, "the session, or none", func() bool {
			st := acomm.SessionTo(addr.Path)
			return st.Open || !st.Opening
		})
	}
	require.NoError(t, acomm.Send(addr, note{ID: -1}))
}

// sendMany sends notes with ids from first on at the same time. Errors fail the
// test.
func sendMany(t testing.TB, addr *url.URL, first, number int) {
	t.Helper()
	sendAtOnce(t, addr, number, func(i int) any { return note{ID: first + i} })
}

// processWithSessions lets this process have sessions while the test runs: it has a
// listener.
func processWithSessions(t testing.TB) {
	t.Helper()
	startListener(t, "", 0)
}

// holdThenAccept is what a handler does that waits to be released.
func holdThenAccept() (hold handling, release func()) {
	released := make(chan struct{})
	hold = func(conn net.Conn, _ note) {
		<-released
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	return hold, sync.OnceFunc(func() { close(released) })
}

// conclude sends what a handler has found to the test.
func conclude(found chan<- error, errs ...error) { found <- errors.Join(errs...) }

// expect is nil if the error is what it should be.
func expect(what string, err, want error) error {
	if want == nil && err == nil || want != nil && (err == want || errors.Is(err, want)) {
		return nil
	}
	return fmt.Errorf("%s: got %v, want %v", what, err, want)
}

func peerIsSelf(conn net.Conn) error {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *syscall.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return err
	}
	if int(cred.Pid) != os.Getpid() || int(cred.Uid) != os.Getuid() {
		return fmt.Errorf("peer is %+v", cred)
	}
	return nil
}

// responder is the listener of B. It acknowledges requests, then sends to their hooks.
type responder struct {
	*acomm.UnixListener
	served  <-chan struct{} // closed when NextConn has nothing more
	replied chan error      // what came of what it has sent to hooks
}

func (r *responder) handle(conn net.Conn, reply func(*acomm.Request) error, how map[string]func(net.Conn)) {
	defer r.DoneConn(conn)
	req := &acomm.Request{}
	if acomm.UnmarshalConnData(conn, req) != nil {
		return
	}
	if do := how[req.Task]; do != nil {
		do(conn)
		return
	}
	err := acomm.SendConnData(conn, &acomm.Response{ID: req.ID})
	r.DoneConn(conn)
	if err == nil && req.ResponseHook != nil {
		r.replied <- reply(req)
	}
}

// respond is what a process does that has nothing else to say.
func respond(req *acomm.Request) error {
	resp, err := acomm.NewResponse(req, req.Args, nil, nil)
	if err != nil {
		return err
	}
	return req.Respond(resp)
}

// replyNote is for hooks that are served by startNotes.
func replyNote(req *acomm.Request) error { return acomm.Send(req.ResponseHook, note{ID: -1}) }

// startResponder starts a listener of B. Tasks that are named are handled in another
// way.
func startResponder(t testing.TB, reply func(*acomm.Request) error, how map[string]func(net.Conn)) *responder {
	t.Helper()
	r := &responder{
		UnixListener: acomm.NewUnixListener(filepath.Join(shortDir(t), "r.sock"), 0),
		replied:      make(chan error, 1<<16),
	}
	require.NoError(t, r.Start())
	var handlers sync.WaitGroup
	r.served = async(func() {
		for conn := r.NextConn(); conn != nil; conn = r.NextConn() {
			handlers.Go(func() { r.handle(conn, reply, how) })
		}
		handlers.Wait()
	})
	t.Cleanup(func() { r.Stop(time.Nanosecond) })
	return r
}

// requestTo is a request whose response goes to the hook.
func requestTo(hook *url.URL, task, data string) *acomm.Request {
	args := json.RawMessage(strconv.Quote(data))
	return &acomm.Request{ID: "1", Task: task, ResponseHook: hook, Args: &args}
}

// openRequests sends requests until there is a session for them.
func openRequests(t testing.TB, r *responder) {
	t.Helper()
	await(t, "the session of the requests", func() bool {
		require.NoError(t, acomm.Send(r.URL(), requestTo(nil, "open", "")))
		return acomm.SessionTo(r.URL().Path).Open
	})
}

// carryBoth sends requests until one session carries them and what goes to their hook:
// that of the two which was opened first, as all are of this process. It reports whether
// that is the session of the requests.
func carryBoth(t testing.TB, r *responder, hook *url.URL) (requests bool) {
	t.Helper()
	openRequests(t, r)
	await(t, "a session to carry both directions", func() bool {
		require.NoError(t, acomm.Send(r.URL(), requestTo(hook, "both", "")))
		require.NoError(t, within(t, r.replied, "the reply"))
		requests = acomm.SessionTo(hook.Path).Carried
		return requests || acomm.SessionTo(r.URL().Path).Carried
	})
	return requests
}

// cameBy returns the path to which the socket of a connection was connected; none
// if it was accepted.
func cameBy(conn net.Conn) (path string, err error) {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return "", err
	}
	var nameErr error
	err = raw.Control(func(fd uintptr) {
		var peer syscall.Sockaddr
		if peer, nameErr = syscall.Getpeername(int(fd)); nameErr == nil {
			path = peer.(*syscall.SockaddrUnix).Name
		}
	})
	if strings.HasPrefix(path, acomm.SessionName) {
		path = ""
	}
	return path, errors.Join(err, nameErr)
}

// sending is what many goroutines send until an error, or until they are told to end.
type sending struct {
	next    atomic.Int64
	acks    counter
	senders sync.WaitGroup
	ended   chan struct{}
	stop    func() // closes ended

	mu   sync.Mutex
	errs map[int]error // by id
}

func sendOn(t testing.TB, addr *url.URL, payload func(id int) any) *sending {
	o := &sending{ended: make(chan struct{}), errs: make(map[int]error)}
	o.stop = sync.OnceFunc(func() { close(o.ended) })
	t.Cleanup(o.stop)
	for range 16 {
		o.senders.Go(func() { o.send(addr, payload) })
	}
	return o
}

func (o *sending) send(addr *url.URL, payload func(id int) any) {
	for {
		select {
		case <-o.ended:
			return
		default:
		}
		id := int(o.next.Add(1))
		err := acomm.Send(addr, payload(id))
		o.mu.Lock()
		o.errs[id] = err
		o.mu.Unlock()
		if err != nil {
			return
		}
		o.acks.add()
	}
}

// end ends the sending, and returns what became of each.
func (o *sending) end(t testing.TB) map[int]error {
	t.Helper()
	o.stop()
	within(t, async(o.senders.Wait), "the senders")
	return o.errs
}

func noteOf(id int) any { return note{ID: id} }

// requireStopped checks what became of a message to a listener that stopped.
func requireStopped(t testing.TB, err error, handled int) {
	t.Helper()
	if err == nil {
		require.Equal(t, 1, handled, "acknowledged")
		return
	}
	require.Zero(t, handled, "handled, but %v", err)
	require.True(t, errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), "%v", err)
}

// lookEnds waits until a look at a path is good no more.
func lookEnds() { time.Sleep(10 * acomm.CheckedFor) }

// setIdleTimeout shortens the time that sessions may be idle. Call it before anything is started.
func setIdleTimeout(t testing.TB, timeout time.Duration) {
	old := acomm.SetSessionIdleTimeout(timeout)
	t.Cleanup(func() { acomm.SetSessionIdleTimeout(old) })
}

// setPatience sets how long a peer may take nothing of what is written to it.
func setWriteTimeout(t testing.TB, d time.Duration) {
	old := acomm.SetSessionWriteTimeout(d)
	t.Cleanup(func() { acomm.SetSessionWriteTimeout(old) })
}
