package acomm_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
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

// Kept connections that carry messages both ways. As in PROTOCOL.md, A has made the
// connection X to a listener of B, and B the connection Y to a listener of A, which
// is the hook of A's requests.

// responder is the listener of B. It acknowledges requests, then sends to their hooks.
type responder struct {
	*acomm.UnixListener
	served  <-chan struct{} // closed when NextConn has nothing more
	replied chan error      // what came of what it has sent to hooks
}

// respond is what a process does that has nothing else to say.
func respond(req *acomm.Request) error {
	resp, err := acomm.NewResponse(req, req.Args, nil, nil)
	if err != nil {
		return err
	}
	return req.Respond(resp)
}

// replyNote is for hooks that are served by startKept.
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

// requestTo is a request whose response goes to the hook.
func requestTo(hook *url.URL, task, data string) *acomm.Request {
	args := json.RawMessage(strconv.Quote(data))
	return &acomm.Request{ID: "1", Task: task, ResponseHook: hook, Args: &args}
}

// linkUp sends requests until what goes to their hook takes their connection.
func linkUp(t testing.TB, r *responder, hook *url.URL) {
	t.Helper()
	await(t, "the connection to carry both directions", func() bool {
		require.NoError(t, acomm.Send(r.URL(), requestTo(hook, "link", "")))
		require.NoError(t, within(t, r.replied, "the reply"))
		return acomm.KeptLinked(hook.Path)
	})
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
	if strings.HasPrefix(path, acomm.KeptName) {
		path = ""
	}
	return path, errors.Join(err, nameErr)
}

func TestKeptBoth_ResponsesTakeTheConnectionOfTheirRequests(t *testing.T) {
	startKept(t, filepath.Join(shortDir(t), "s.sock"), 0, nil).Stop(0) // the runtime opens what it needs
	before := openFiles(t)
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "t.sock"), nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	r := startResponder(t, respond, nil)
	call := func(text string) error {
		req, responses := newRequest(t, tracker.URL(), text)
		if err := tracker.TrackRequest(req, patience); err != nil {
			return err
		}
		if err := acomm.Send(r.URL(), req); err != nil {
			return err
		}
		resp := <-responses
		var back string
		if err := resp.UnmarshalResult(&back); err != nil || back != text || len(responses) > 0 {
			return fmt.Errorf("%q came back as %q, %w, and %d more", text, back, err, len(responses))
		}
		return nil
	}
	await(t, "the link", func() bool {
		require.NoError(t, call("first"))
		require.NoError(t, within(t, r.replied, "its acknowledgement"))
		return acomm.KeptLinked(tracker.URL().Path)
	})
	files := openFiles(t)
	const callers, calls = 32, 20
	results := make(chan error, callers*calls)
	for c := range callers {
		go func() {
			for i := range calls {
				results <- call(fmt.Sprint(c, i))
			}
		}()
	}
	for range callers * calls {
		require.NoError(t, within(t, results, "a response"))
		require.NoError(t, within(t, r.replied, "its acknowledgement"))
	}
	require.Equal(t, files, openFiles(t), "no connection in addition")
	require.True(t, acomm.KeptLinked(tracker.URL().Path), "still")
	require.Equal(t, 3, acomm.KeptConns(), "one each way, and what goes back on the first")
	require.Empty(t, r.replied)

	r.Stop(0)
	within(t, r.served, "the end of serving")
	tracker.Stop()
	require.Zero(t, acomm.KeptConns())
	require.Equal(t, before, openFiles(t))
}

// Not only is the other connection there: everything goes by it.
func TestKeptBoth_EverythingGoesByTheLinkedConnection(t *testing.T) {
	ways := make(chan string, 1000)
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]keptHandling{
		"way": func(conn net.Conn, _ note) {
			way, err := cameBy(conn)
			ways <- fmt.Sprint(way, err)
			_ = acomm.SendConnData(conn, &acomm.Response{})
		},
	})
	r := startResponder(t, replyNote, nil)
	linkUp(t, r, h.URL())
	peers := h.peersNow()
	const number = 300
	sent := make(chan error, number)
	for i := range number {
		go func() { sent <- acomm.Send(h.URL(), note{ID: i, How: "way"}) }()
	}
	for range number {
		require.NoError(t, within(t, sent, "an acknowledgement"))
		require.Equal(t, fmt.Sprint(r.URL().Path, error(nil)), within(t, ways, "a message"))
	}
	for i := range number {
		require.Equal(t, 1, h.handled(i))
	}
	require.Len(t, h.peersNow(), len(peers), "to handlers it is the connection that asked")
}

// socketFile is what names a socket file in a link.
type socketFile struct{ device, inode uint64 }

func fileAt(t testing.TB, path string) socketFile {
	t.Helper()
	var st syscall.Stat_t
	require.NoError(t, syscall.Stat(path, &st))
	return socketFile{uint64(st.Dev), st.Ino}
}

// question is what follows the header of a link.
func question(token string, file socketFile) string {
	q := binary.BigEndian.AppendUint64([]byte(token), file.device)
	return string(binary.BigEndian.AppendUint64(q, file.inode))
}

func linkFrame(token string, file socketFile) []byte {
	return keptFrame(keptLink, uint32(len(question(token, file))), 0, question(token, file))
}

// askLink asks on Y, and returns the answer.
func askLink(t testing.TB, y net.Conn, token string, file socketFile) uint32 {
	t.Helper()
	_, err := y.Write(linkFrame(token, file))
	require.NoError(t, err)
	kind, number, payload, err := readKept(y)
	require.NoError(t, err)
	require.Equal(t, []any{uint32(keptLinked), ""}, []any{kind, payload})
	return number
}

// writeMessage writes a message.
func writeMessage(t testing.TB, conn net.Conn, number uint32, text string) {
	t.Helper()
	_, err := conn.Write(keptFrame(keptMessage, uint32(len(text)), number, text))
	require.NoError(t, err)
}

// acceptMessage answers a message.
func acceptMessage(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	_, err := conn.Write(keptFrame(keptAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, err)
}

// requireKept reads a frame and returns its payload.
func requireKept(t testing.TB, conn net.Conn, kind, number uint32) string {
	t.Helper()
	k, n, payload, err := readKept(conn)
	require.NoError(t, err)
	require.Equal(t, []uint32{kind, number}, []uint32{k, n}, "with %q", payload)
	return payload
}

// requireAccepted reads the answer that accepts a message.
func requireAccepted(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	require.Contains(t, requireKept(t, conn, keptAnswer, number), `"error":""`)
}

// rawB is a test that plays B.
type rawB struct {
	l *rawListener // of B
	s *keptService // of A
	x net.Conn
	y *net.UnixConn
}

func newRawB(t testing.TB, how map[string]keptHandling) *rawB {
	t.Helper()
	b := &rawB{l: newRawListener(t)}
	b.s = startKept(t, filepath.Join(shortDir(t), "a.sock"), 0, how)
	b.x, b.y = b.l.keep(), keepRaw(t, b.s.Addr())
	return b
}

// holdThenAccept is what a handler does that waits to be released.
func holdThenAccept() (hold keptHandling, release func()) {
	released := make(chan struct{})
	hold = func(conn net.Conn, _ note) {
		<-released
		_ = acomm.SendConnData(conn, &acomm.Response{})
	}
	return hold, sync.OnceFunc(func() { close(released) })
}

// link asks for the connection that the test has.
func (b *rawB) link(t testing.TB) uint32 {
	t.Helper()
	return askLink(t, b.y, rawToken, fileAt(t, b.l.addr.Path))
}

// requireBackward has an exchange on X in the direction of those that made it.
func (b *rawB) requireBackward(t testing.TB) {
	t.Helper()
	sent := sendAsync(b.l.addr, note{})
	number, _ := b.l.message(b.x)
	acceptMessage(t, b.x, number)
	require.NoError(t, within(t, sent, "the acknowledgement"))
}

func TestKeptBoth_LinkedMessagesAreThoseOfTheConnectionThatAsked(t *testing.T) {
	found := make(chan error, 1)
	var b *rawB
	linked := make(chan struct{})
	b = newRawB(t, map[string]keptHandling{"look": func(conn net.Conn, _ note) {
		<-linked
		var errs []error
		if local, remote := conn.LocalAddr().String(), conn.RemoteAddr().String(); local != b.s.Addr() || remote != b.y.LocalAddr().String() {
			errs = append(errs, fmt.Errorf("addresses: %s, %s", local, remote))
		}
		way, err := cameBy(conn)
		if way != b.l.addr.Path {
			err = errors.Join(err, fmt.Errorf("it came by %q", way))
		}
		conclude(found, append(errs, err, peerIsSelf(conn), acomm.SendConnData(conn, &acomm.Response{}))...)
	}})
	require.EqualValues(t, 1, b.link(t))
	close(linked)
	b.requireBackward(t)
	for number := uint32(1); number <= 3; number++ {
		writeMessage(t, b.x, number, `{"id":1,"how":"look"}`)
		require.NoError(t, within(t, found, "the handler"))
		requireAccepted(t, b.x, number)
		b.requireBackward(t)
	}
	writeMessage(t, b.y, 1, `{"id":2}`) // Y stays as it is
	requireAccepted(t, b.y, 1)
	require.Equal(t, []int{3, 1}, []int{b.s.handled(1), b.s.handled(2)})
}

func TestKeptBoth_LinkedMessagesAreCancelled(t *testing.T) {
	inHand, ended := make(chan struct{}), make(chan error, 1)
	b := newRawB(t, map[string]keptHandling{"wait": func(conn net.Conn, _ note) {
		close(inHand)
		ended <- errors.Join(
			expect("read", readOne(conn), io.EOF),
			expect("answer", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))
	}})
	require.EqualValues(t, 1, b.link(t))
	sent := sendAsync(b.l.addr, note{}) // of the same number, in the other direction
	b.l.message(b.x)
	writeMessage(t, b.x, 1, `{"how":"wait"}`)
	within(t, inHand, "the handler")
	b.l.write(b.x, keptFrame(keptCancel, 0, 1, ""))
	require.NoError(t, within(t, ended, "the handler's read"))
	require.Empty(t, sent)
	acceptMessage(t, b.x, 1)
	require.NoError(t, within(t, sent, "the other one"))
	writeMessage(t, b.x, 2, `{}`)
	requireAccepted(t, b.x, 2)
}

func TestKeptBoth_LinkedMessagesBreakTheConnectionAsOthersDo(t *testing.T) {
	for name, frame := range map[string][]byte{
		"number 0":   keptFrame(keptMessage, 2, 0, "{}"),
		"number 2":   keptFrame(keptMessage, 2, 2, "{}"),
		"too long":   keptFrame(keptMessage, acomm.KeptLimit+1, 1, "{}"), // the header is enough
		"kind 14":    keptFrame(14, 0, 1, ""),
		"no kind":    plainFrame("{}    "),
		"not linked": nil,
	} {
		t.Run(name, func(t *testing.T) {
			b := newRawB(t, nil)
			if frame == nil {
				frame = keptFrame(keptMessage, 2, 1, "{}")
			} else {
				require.EqualValues(t, 1, b.link(t))
			}
			sent := sendAsync(b.l.addr, note{})
			b.l.message(b.x)
			b.l.write(b.x, frame)
			require.ErrorIs(t, within(t, sent, "an outcome"), io.ErrUnexpectedEOF)
			writeMessage(t, b.y, 1, `{}`)
			requireAccepted(t, b.y, 1)
		})
	}
}

func TestKeptBoth_WrongLinksAreRefused(t *testing.T) {
	for name, wrong := range map[string]func(token string, file socketFile) (string, socketFile){
		"token":  func(_ string, f socketFile) (string, socketFile) { return "fedcba9876543210", f },
		"zeros":  func(_ string, f socketFile) (string, socketFile) { return strings.Repeat("\x00", tokenSize), f },
		"inode":  func(s string, f socketFile) (string, socketFile) { f.inode++; return s, f },
		"device": func(s string, f socketFile) (string, socketFile) { f.device++; return s, f },
	} {
		t.Run(name, func(t *testing.T) {
			b := newRawB(t, nil)
			token, file := wrong(rawToken, fileAt(t, b.l.addr.Path))
			require.Zero(t, askLink(t, b.y, token, file))
			require.EqualValues(t, 1, b.link(t), "the right one")
			writeMessage(t, b.x, 1, `{}`)
			requireAccepted(t, b.x, 1)
		})
	}
	t.Run("twice", func(t *testing.T) {
		b := newRawB(t, nil)
		require.EqualValues(t, 1, b.link(t))
		require.Zero(t, b.link(t))
		other := keepRaw(t, b.s.Addr())
		require.Zero(t, askLink(t, other, rawToken, fileAt(t, b.l.addr.Path)), "on another connection")
		writeMessage(t, b.x, 1, `{}`)
		requireAccepted(t, b.x, 1)
	})
	t.Run("of a connection that is gone", func(t *testing.T) {
		b := newRawB(t, nil)
		require.NoError(t, b.x.Close())
		await(t, "its end", func() bool { return acomm.KeptConns() == 0 })
		require.Zero(t, b.link(t))
	})
	t.Run("of the connection it comes by", func(t *testing.T) {
		s := startKept(t, filepath.Join(shortDir(t), "a.sock"), 0, nil)
		y, token := keepToken(t, s.Addr())
		require.Zero(t, askLink(t, y, token, fileAt(t, s.Addr())))
	})
	t.Run("while the listener stops", func(t *testing.T) {
		hold, release := holdThenAccept()
		defer release() // before the stop
		b := newRawB(t, map[string]keptHandling{"hold": hold})
		writeMessage(t, b.y, 1, `{"how":"hold"}`)
		await(t, "the handler", func() bool { return b.s.handled(0) == 1 })
		stopped := async(func() { b.s.Stop(0) })
		requireKept(t, b.y, keptStop, 1)
		require.Zero(t, b.link(t))
		release()
		requireAccepted(t, b.y, 1)
		within(t, stopped, "Stop")
	})
}

func TestKeptBoth_SoManyLinksAndNoMore(t *testing.T) {
	b := newRawB(t, nil)
	for range acomm.KeptMost - 1 {
		require.Zero(t, askLink(t, b.y, "fedcba9876543210", socketFile{}))
	}
	require.EqualValues(t, 1, b.link(t), "the last one")
	b.l.write(b.y, linkFrame(rawToken, socketFile{}))
	require.ErrorIs(t, readOne(b.y), io.EOF)
	writeMessage(t, b.x, 1, `{}`)
	requireAccepted(t, b.x, 1)
}

// keepToken is keepRaw, and returns what the listener calls the connection.
func keepToken(t testing.TB, path string) (conn *net.UnixConn, token string) {
	t.Helper()
	conn = dialNamed(t, path)
	token, err := keepDialled(conn)
	require.NoError(t, err)
	return conn, token
}

// keepDialled has a first exchange and keeps the connection.
func keepDialled(conn net.Conn) (token string, err error) {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := conn.Write(plainFrame(`{}`)); err != nil {
		return "", err
	}
	if err := acomm.UnmarshalConnData(conn, &struct{}{}); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, acomm.KeptHello); err != nil {
		return "", err
	}
	hello := make([]byte, len(acomm.KeptHello)+tokenSize)
	_, err = io.ReadFull(conn, hello)
	return string(hello[len(acomm.KeptHello):]), err
}

func init() { roles["kept linker"] = keptLinker }

// keptLinker asks for a link of whose connection it has only heard.
func keptLinker() {
	name := fmt.Sprintf("%slinker-%d", acomm.KeptName, os.Getpid())
	conn, err := net.DialUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}, &net.UnixAddr{Name: os.Getenv("SERVICE"), Net: "unix"})
	orExit(err)
	_, err = keepDialled(conn)
	orExit(err)
	device, err := strconv.ParseUint(os.Getenv("DEVICE"), 10, 64)
	orExit(err)
	inode, err := strconv.ParseUint(os.Getenv("INODE"), 10, 64)
	orExit(err)
	_, err = conn.Write(linkFrame(rawToken, socketFile{device, inode}))
	orExit(err)
	kind, number, _, err := readKept(conn)
	orExit(err)
	fmt.Println(kind, number)
}

func TestKeptBoth_OtherProcessesAreRefusedWhateverTheyKnow(t *testing.T) {
	b := newRawB(t, nil)
	file := fileAt(t, b.l.addr.Path)
	other := startProcess(t, "kept linker", "SERVICE="+b.s.Addr(),
		fmt.Sprintf("DEVICE=%d", file.device), fmt.Sprintf("INODE=%d", file.inode))
	require.Equal(t, fmt.Sprint(keptLinked, 0), other.ReadLine())
	require.NoError(t, other.Wait())
	require.EqualValues(t, 1, b.link(t), "the same from the process that has the connection")
}

// rawA is a test that plays A.
type rawA struct {
	l     *rawListener // of A, the hook
	r     *responder   // of B
	x     *net.UnixConn
	token string // of X
	y     net.Conn
	last  uint32 // number of the last request
}

func newRawA(t testing.TB) *rawA {
	t.Helper()
	a := &rawA{l: newRawListener(t)}
	a.r = startResponder(t, respond, nil)
	a.y = a.l.keep()
	a.x, a.token = keepToken(t, a.r.Addr())
	return a
}

// request sends one on X and reads its acknowledgement.
func (a *rawA) request(t testing.TB) {
	t.Helper()
	text, err := json.Marshal(requestTo(a.l.addr, "task", ""))
	require.NoError(t, err)
	a.last++
	writeMessage(t, a.x, a.last, string(text))
	requireAccepted(t, a.x, a.last)
}

// requireResponse takes a response and acknowledges it.
func (a *rawA) requireResponse(t testing.TB, conn net.Conn, number uint32) {
	t.Helper()
	var resp acomm.Response
	require.NoError(t, json.Unmarshal([]byte(requireKept(t, conn, keptMessage, number)), &resp))
	require.Equal(t, "1", resp.ID)
	acceptMessage(t, conn, number)
	require.NoError(t, within(t, a.r.replied, "the responder"))
}

// link lets the library ask, and allows it.
func (a *rawA) link(t testing.TB) {
	t.Helper()
	a.request(t)
	requireKept(t, a.y, keptLink, 0)
	a.requireResponse(t, a.y, 1)
	a.l.write(a.y, keptFrame(keptLinked, 0, 1, ""))
	await(t, "the link", func() bool { return acomm.KeptLinked(a.l.addr.Path) })
}

func TestKeptBoth_ResponsesTakeTheConnectionOnceTheyMay(t *testing.T) {
	a := newRawA(t)
	a.request(t)
	want := question(a.token, fileAt(t, a.r.Addr()))
	require.Equal(t, want, requireKept(t, a.y, keptLink, 0), "asked for the connection of the request")
	a.requireResponse(t, a.y, 1)
	a.request(t)
	a.requireResponse(t, a.y, 2) // as long as there is no answer
	a.l.write(a.y, keptFrame(keptLinked, 0, 1, ""))
	await(t, "the link", func() bool { return acomm.KeptLinked(a.l.addr.Path) })
	for number := uint32(1); number <= 3; number++ {
		a.request(t)
		a.requireResponse(t, a.x, number)
	}
	sent := sendAsync(a.l.addr, note{ID: 7}) // not only responses
	require.Equal(t, `{"id":7,"how":"","data":""}`, requireKept(t, a.x, keptMessage, 4))
	acceptMessage(t, a.x, 4)
	require.NoError(t, within(t, sent, "the acknowledgement"))
}

func TestKeptBoth_RefusedLinksAreNotAskedForAgain(t *testing.T) {
	a := newRawA(t)
	a.request(t)
	requireKept(t, a.y, keptLink, 0)
	a.l.write(a.y, keptFrame(keptLinked, 0, 0, ""))
	for number := uint32(1); number <= 5; number++ { // the first shows that the answer was read
		a.requireResponse(t, a.y, number)
		a.request(t)
	}
	a.requireResponse(t, a.y, 6)
	require.False(t, acomm.KeptLinked(a.l.addr.Path))
	other := *a
	other.last = 0
	other.x, other.token = keepToken(t, a.r.Addr())
	other.request(t)
	want := question(other.token, fileAt(t, a.r.Addr()))
	require.Equal(t, want, requireKept(t, a.y, keptLink, 0), "another connection is another question")
	other.requireResponse(t, a.y, 7)
}

func TestKeptBoth_OneLinkIsOnTheWay(t *testing.T) {
	a := newRawA(t)
	other := *a
	other.x, other.token = keepToken(t, a.r.Addr())
	a.request(t)
	require.Equal(t, a.token, requireKept(t, a.y, keptLink, 0)[:tokenSize])
	a.requireResponse(t, a.y, 1)
	other.request(t)
	other.requireResponse(t, a.y, 2) // and no link before it
	a.l.write(a.y, keptFrame(keptLinked, 0, 0, ""))
	a.request(t)
	a.requireResponse(t, a.y, 3) // the answer is read
	other.request(t)
	require.Equal(t, other.token, requireKept(t, a.y, keptLink, 0)[:tokenSize], "its turn")
	other.requireResponse(t, a.y, 4)
}

func TestKeptBoth_AnswersToNoLinkBreakTheConnection(t *testing.T) {
	for number := range uint32(2) {
		a := newRawA(t)
		a.request(t)
		requireKept(t, a.y, keptLink, 0)
		a.requireResponse(t, a.y, 1)
		a.l.write(a.y, keptFrame(keptLinked, 0, number, ""))
		a.l.write(a.y, keptFrame(keptLinked, 0, number, ""))
		require.ErrorIs(t, readOne(a.y), io.EOF)
		require.Equal(t, number == 1, acomm.KeptLinked(a.l.addr.Path), "the first one counts")
	}
}

func init() { roles["hook requester"] = hookRequester }

// hookRequester sends requests whose hook is another process's.
func hookRequester() {
	name := fmt.Sprintf("%srequester-%d", acomm.KeptName, os.Getpid())
	conn, err := net.DialUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}, &net.UnixAddr{Name: os.Getenv("SERVICE"), Net: "unix"})
	orExit(err)
	_, err = keepDialled(conn)
	orExit(err)
	text, err := json.Marshal(requestTo(unixURL(os.Getenv("HOOK")), "task", ""))
	orExit(err)
	for number := range uint32(3) {
		_, err := conn.Write(keptFrame(keptMessage, uint32(len(text)), number+1, string(text)))
		orExit(err)
		_, _, _, err = readKept(conn)
		orExit(err)
	}
	fmt.Println("done")
}

// Hazard: whoever named a hook of another process had that one told what its own
// connection is called, and could have the messages for it sent there.
func TestKeptBoth_OtherProcessesAreNotAsked(t *testing.T) {
	l := newRawListener(t)
	r := startResponder(t, respond, nil)
	y := l.keep()
	other := startProcess(t, "hook requester", "SERVICE="+r.Addr(), "HOOK="+l.addr.Path)
	for number := range uint32(3) {
		requireKept(t, y, keptMessage, number+1) // and no link before it
		acceptMessage(t, y, number+1)
		require.NoError(t, within(t, r.replied, "the responder"))
	}
	require.Equal(t, "done", other.ReadLine())
	require.NoError(t, other.Wait())
}

// Hazard: a stop that was read before the answer to the link was forgotten, and
// messages went where nobody served them.
func TestKeptBoth_StoppedBeforeItIsLinkedIsNotUsed(t *testing.T) {
	a := newRawA(t)
	a.request(t)
	requireKept(t, a.y, keptLink, 0)
	a.requireResponse(t, a.y, 1)
	a.l.write(a.x, keptFrame(keptStop, 0, 0, ""))
	a.request(t) // its acknowledgement shows that the stop was read
	a.requireResponse(t, a.y, 2)
	a.l.write(a.y, keptFrame(keptLinked, 0, 1, ""))
	for number := uint32(3); number <= 5; number++ {
		a.request(t)
		a.requireResponse(t, a.y, number)
	}
}

// Hazard: a handler that sends waited for an acknowledgement behind messages that
// nobody took as long as it waited: each cost it a minute.
func TestKeptBoth_GivenUpMessagesDelayNoAcknowledgement(t *testing.T) {
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	held, release := make(chan struct{}, 1), make(chan struct{})
	replied := make(chan error, 1<<10)
	ul := serveEach(t, true, func(ul *acomm.UnixListener, conn net.Conn) {
		req := &acomm.Request{}
		err := acomm.UnmarshalConnData(conn, req)
		if err == nil {
			_ = acomm.SendConnData(conn, &acomm.Response{})
		}
		ul.DoneConn(conn)
		switch {
		case err != nil:
		case req.Task == "hold":
			held <- struct{}{}
			<-release
		default:
			replied <- <-sendWithin(req.ResponseHook, note{}, patience/2)
		}
	})
	await(t, "the connection to carry both directions", func() bool {
		require.NoError(t, acomm.Send(ul.URL(), requestTo(h.URL(), "link", "")))
		require.NoError(t, within(t, replied, "the reply"))
		return acomm.KeptLinked(h.URL().Path)
	})
	require.NoError(t, acomm.Send(ul.URL(), requestTo(nil, "hold", "")))
	within(t, held, "the handler")
	const windows = 3 // one more than the listener takes
	data := strings.Repeat("x", 60<<10)
	for range windows {
		var sent []<-chan error
		for range keptWindow / (60 << 10) {
			sent = append(sent, sendWithin(ul.URL(), requestTo(h.URL(), "task", data), 100*time.Millisecond))
		}
		for _, result := range sent {
			require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
		}
	}
	close(release)
	for range 2 * keptWindow / (60 << 10) / 2 {
		require.NoError(t, within(t, replied, "a reply"))
	}
	within(t, async(func() { ul.Stop(time.Nanosecond) }), "Stop") // hazard: it waited for the reader
}

// Where the responses are for nobody who is connected, nothing is asked.
func TestKeptBoth_HooksElsewhereAreNotAsked(t *testing.T) {
	a := newRawA(t)
	elsewhere := newRawListenerOf(t)
	text, err := json.Marshal(requestTo(elsewhere.addr, "task", ""))
	require.NoError(t, err)
	a.last++
	writeMessage(t, a.x, a.last, string(text))
	requireAccepted(t, a.x, a.last)
	conn, _ := acceptResponse(t, elsewhere)
	elsewhere.write(conn, []byte(accepted))
	require.NoError(t, within(t, a.r.replied, "the responder"))
	sent := sendAsync(a.l.addr, note{})
	requireKept(t, a.y, keptMessage, 1) // and no link before it
	acceptMessage(t, a.y, 1)
	require.NoError(t, within(t, sent, "the acknowledgement"))
	a.request(t)
	requireKept(t, a.y, keptLink, 0)
	a.requireResponse(t, a.y, 2)
}

// acceptResponse takes a connection and its response.
func acceptResponse(t testing.TB, l *rawListener) (net.Conn, *acomm.Response) {
	t.Helper()
	require.NoError(t, l.Listener.(*net.UnixListener).SetDeadline(time.Now().Add(patience)))
	conn, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	resp := &acomm.Response{}
	require.NoError(t, acomm.UnmarshalConnData(conn, resp))
	return conn, resp
}

func TestKeptBoth_ListenerThatStopsSaysSoOnTheLinkedConnection(t *testing.T) {
	hold, release := holdThenAccept()
	defer release() // before the stop
	b := newRawB(t, map[string]keptHandling{"hold": hold})
	require.EqualValues(t, 1, b.link(t))
	writeMessage(t, b.x, 1, `{"id":1,"how":"hold"}`)
	await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
	stopped := async(func() { b.s.Stop(0) })
	requireKept(t, b.x, keptStop, 1)
	writeMessage(t, b.x, 2, `{"id":2}`) // it has crossed the stop
	b.requireBackward(t)                // each direction stops by itself
	select {
	case <-stopped:
		require.Fail(t, "Stop waits for the handler")
	default:
	}
	release()
	requireAccepted(t, b.x, 1)
	within(t, stopped, "Stop")
	require.Zero(t, b.s.handled(2))
	b.requireBackward(t)
}

func TestKeptBoth_ListenerOutOfTimeSaysWhatWasHandedOut(t *testing.T) {
	l, ul := newRawListener(t), startListener(t, filepath.Join(shortDir(t), "a.sock"), 0)
	x := l.keep()
	first := async(func() {
		conn := ul.NextConn()
		_ = acomm.UnmarshalConnData(conn, &note{})
		_ = acomm.SendConnData(conn, &acomm.Response{})
		ul.DoneConn(conn)
	})
	b := &rawB{l: l, x: x, y: keepRaw(t, ul.Addr())}
	within(t, first, "the first exchange")
	require.EqualValues(t, 1, b.link(t))
	var messages []byte
	for n := range uint32(3) {
		messages = append(messages, keptFrame(keptMessage, 2, n+1, "{}")...)
	}
	b.l.write(b.x, messages)
	take(t, ul) // and nobody the others
	stopped := async(func() { ul.Stop(moment) })
	kind, read, _, err := readKept(b.x) // with the last one that it has read
	require.NoError(t, err)
	require.EqualValues(t, keptStop, kind)
	requireKept(t, b.x, keptStop, 1)
	for range read { // for the others it makes no difference any more
		kind, _, payload, err := readKept(b.x)
		require.NoError(t, err)
		require.EqualValues(t, keptAnswer, kind)
		require.Empty(t, payload, "nobody will answer it")
	}
	within(t, stopped, "Stop")
	b.requireBackward(t)
}

func TestKeptBoth_StoppedMessagesGoElsewhereOnce(t *testing.T) {
	a := newRawA(t)
	a.link(t)
	const number, served = 6, 2
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(a.l.addr, note{ID: i}) }()
	}
	handled := make(map[int]int)
	for n := range uint32(number) {
		var message note
		require.NoError(t, json.Unmarshal([]byte(requireKept(t, a.x, keptMessage, n+1)), &message))
		if n < served {
			handled[message.ID]++
		}
	}
	a.l.write(a.x, keptFrame(keptStop, 0, served, ""))
	for range number - served {
		handled[a.l.serveAlone().ID]++
		require.NoError(t, within(t, results, "those sent again"))
	}
	require.Empty(t, results, "the others wait")
	later := sendAsync(a.l.addr, note{ID: number})
	require.Equal(t, number, a.l.serveAlone().ID)
	require.NoError(t, within(t, later, "the next one"))
	for n := range uint32(served) {
		acceptMessage(t, a.x, n+1)
		require.NoError(t, within(t, results, "an answer after the stop"))
	}
	for i := range number {
		require.Equal(t, 1, handled[i], "%d", i)
	}
	a.last++
	writeMessage(t, a.x, a.last, `{}`) // the other direction goes on
	requireAccepted(t, a.x, a.last)
}

func TestKeptBoth_ConnectionThatIsLostLosesWhatWasWrittenOnly(t *testing.T) {
	a := newRawA(t)
	a.link(t)
	first, second := sendAsync(a.l.addr, note{ID: 1}), sendAsync(a.l.addr, note{ID: 2})
	requireKept(t, a.x, keptMessage, 1)
	requireKept(t, a.x, keptMessage, 2)
	require.NoError(t, a.x.Close())
	require.ErrorIs(t, within(t, first, "an outcome"), io.ErrUnexpectedEOF)
	require.ErrorIs(t, within(t, second, "an outcome"), io.ErrUnexpectedEOF)
	later := sendAsync(a.l.addr, note{ID: 3})
	require.Equal(t, 3, a.l.serveAlone().ID)
	require.NoError(t, within(t, later, "the next one"))
}

// The path decides, whoever has made the connection.
func TestKeptBoth_PathDecides(t *testing.T) {
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	other := startKept(t, filepath.Join(shortDir(t), "o.sock"), 0, nil)
	r := startResponder(t, replyNote, nil)
	linkUp(t, r, h.URL())
	sendMany(t, h.URL(), 1, 10)
	require.NoError(t, os.Rename(other.URL().Path, h.URL().Path))
	lookEnds()
	sendMany(t, h.URL(), 100, 1)
	sendMany(t, h.URL(), 101, 9)
	for i := range 10 {
		require.Equal(t, []int{1, 0}, []int{h.handled(1 + i), h.handled(100 + i)})
		require.Equal(t, []int{0, 1}, []int{other.handled(1 + i), other.handled(100 + i)})
	}
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

// The listener of A stops, under load.
func TestKeptBoth_StopOfTheHookLosesNothing(t *testing.T) {
	keepingProcess(t)
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		r := startResponder(t, replyNote, nil) // a new X each time
		linkUp(t, r, h.URL())
		there := sendOn(t, h.URL(), noteOf)
		back := sendOn(t, r.URL(), func(int) any { return requestTo(nil, "task", "") })
		requireReached(t, &there.acks, 100, "acknowledgements")
		requireReached(t, &back.acks, 100, "acknowledgements")
		within(t, async(func() { h.Stop(0) }), "Stop")
		within(t, h.served, "the end of serving")
		requireReached(t, &back.acks, back.acks.load()+100, "the other direction")
		for id, err := range there.end(t) {
			requireStopped(t, err, h.handled(id))
		}
		for _, err := range back.end(t) {
			require.NoError(t, err)
		}
		require.NotEmpty(t, h.ids, "handled")
		clear(h.ids)
		r.Stop(0)
		within(t, r.served, "the end of serving")
		require.NoError(t, h.Start())
		h.serve(nil)
	}
}

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

// The listener of B stops, under load: what B sends is delivered all the same.
func TestKeptBoth_StopOfTheResponderLosesNothing(t *testing.T) {
	keepingProcess(t)
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		var mu sync.Mutex
		served := make(map[string]int) // requests, by their task
		r := startResponder(t, func(req *acomm.Request) error {
			mu.Lock()
			served[req.Task]++
			mu.Unlock()
			return replyNote(req)
		}, nil)
		linkUp(t, r, h.URL())
		there := sendOn(t, h.URL(), noteOf)
		back := sendOn(t, r.URL(), func(id int) any { return requestTo(h.URL(), strconv.Itoa(id), "") })
		requireReached(t, &there.acks, 100, "acknowledgements")
		requireReached(t, &back.acks, 100, "acknowledgements")
		within(t, async(func() { r.Stop(0) }), "Stop")
		requireReached(t, &there.acks, there.acks.load()+100, "the other direction")
		for id, err := range there.end(t) {
			require.NoError(t, err)
			require.Equal(t, 1, h.handled(id))
		}
		within(t, r.served, "the end of serving")
		for id, err := range back.end(t) {
			requireStopped(t, err, served[strconv.Itoa(id)])
		}
		for len(r.replied) > 0 {
			require.NoError(t, <-r.replied)
		}
		clear(h.ids)
	}
}

func TestKeptBoth_ConnectionAtRestEndsForBoth(t *testing.T) {
	const rest = 60 * time.Millisecond
	setRest(t, rest)
	hold, release := holdThenAccept()
	defer release()
	b := newRawB(t, map[string]keptHandling{"hold": hold})
	require.EqualValues(t, 1, b.link(t))
	writeMessage(t, b.x, 1, `{"id":1,"how":"hold"}`)
	await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
	require.NoError(t, b.x.SetReadDeadline(time.Now().Add(4*rest)))
	require.ErrorIs(t, readOne(b.x), os.ErrDeadlineExceeded, "it is in use, if not by those who made it")
	require.NoError(t, b.x.SetReadDeadline(time.Now().Add(patience)))
	release()
	requireAccepted(t, b.x, 1)
	requireKept(t, b.x, keptStop, 1)
	require.ErrorIs(t, readOne(b.x), io.EOF)
	await(t, "it to be forgotten", func() bool { return !acomm.KeptTo(b.l.addr.Path) })
	b.x = b.l.keep() // the next
	b.requireBackward(t)
}

func TestKeptBoth_AfterTheRestBothConnectAnew(t *testing.T) {
	setRest(t, 50*time.Millisecond)
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	r := startResponder(t, replyNote, nil)
	for range 2 {
		linkUp(t, r, h.URL())
		sendMany(t, h.URL(), 1, 10)
		await(t, "the rest", func() bool { return acomm.KeptConns() == 0 })
	}
	require.False(t, acomm.KeptTo(h.URL().Path) || acomm.KeptTo(r.URL().Path))
	require.Equal(t, 2, h.handled(1))
}

// Hazard: the responses stayed on the connection of a listener that had stopped, and
// kept it, while the requests came by the next one.
func TestKeptBoth_AfterAStopTheNextConnectionCarriesBoth(t *testing.T) {
	h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 3 {
		r := startResponder(t, replyNote, nil)
		linkUp(t, r, h.URL())
		r.Stop(0)
		require.False(t, acomm.KeptLinked(h.URL().Path))
		require.NoError(t, acomm.Send(h.URL(), note{ID: 1}), "another way")
	}
	require.Equal(t, 3, h.handled(1))
}

// What was written before a write failed may yet be answered, on a connection that
// carries both directions as on any other.
func TestKeptBoth_AfterAFailedWriteAnswersAreRead(t *testing.T) {
	b := newRawB(t, nil)
	require.EqualValues(t, 1, b.link(t))
	first := sendAsync(b.l.addr, note{ID: 1})
	number, _ := b.l.message(b.x)
	require.NoError(t, b.x.(*net.UnixConn).CloseRead())
	second := sendAsync(b.l.addr, note{ID: 2})
	require.Equal(t, 2, b.l.serveAlone().ID, "it goes elsewhere")
	require.NoError(t, within(t, second, "the second"))
	b.l.write(b.x, keptFrame(keptAnswer, uint32(len(accepted)), number, accepted))
	require.NoError(t, within(t, first, "the first"))
}

// Hazard: a process that takes nothing, and goes on living, kept a connection open
// that nothing could be written to, and those who waited for answers on it.
func TestKeptBoth_TakingNothingEndsTheConnection(t *testing.T) {
	const limit = 200 * time.Millisecond
	defer acomm.SetKeptPatience(acomm.SetKeptPatience(limit))
	refusal := strings.Repeat("y", 1<<20) // more than a socket holds
	b := newRawB(t, map[string]keptHandling{"large": func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)})
	}})
	defer b.s.Stop(0) // before the limit is what it was
	require.EqualValues(t, 1, b.link(t))
	first := sendAsync(b.l.addr, note{ID: 1})
	b.l.message(b.x)
	writeMessage(t, b.x, 1, `{"how":"large"}`)
	require.ErrorIs(t, within(t, first, "the message that was read"), io.ErrUnexpectedEOF)
	await(t, "the connection to be gone", func() bool { return !acomm.KeptTo(b.l.addr.Path) })
	written, err := io.Copy(io.Discard, b.x)
	require.Positive(t, written)
	require.Less(t, written, int64(len(refusal)))
	if err != nil {
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	second := sendAsync(b.l.addr, note{ID: 2})
	require.Equal(t, 2, b.l.serveAlone().ID, "it goes on elsewhere")
	require.NoError(t, within(t, second, "the second"))
}

const keptWindow = 2 << 20 // bytes of JSON that may be unanswered

// dataUpTo is what makes a note have so many bytes of JSON.
func dataUpTo(how string, size int) string {
	text, err := json.Marshal(note{ID: 1, How: how})
	if err != nil {
		panic(err)
	}
	return strings.Repeat("x", size-len(text))
}

func TestKeptBoth_TooMuchUnansweredBreaksTheConnection(t *testing.T) {
	for _, linked := range []bool{false, true} {
		t.Run(fmt.Sprint("linked ", linked), func(t *testing.T) {
			b := newRawB(t, map[string]keptHandling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
			var conn net.Conn = b.y
			if linked {
				require.EqualValues(t, 1, b.link(t))
				conn = b.x
			}
			const number = keptWindow / acomm.KeptLimit
			text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.KeptLimit)})
			require.NoError(t, err)
			for n := range uint32(number) {
				writeMessage(t, conn, n+1, string(text))
			}
			await(t, "all that may be unanswered", func() bool { return b.s.handled(1) == number })
			writeMessage(t, conn, number+1, `{}`)
			_, err = io.Copy(io.Discard, conn) // until it is closed
			require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
			require.Equal(t, number, b.s.handled(1))
		})
	}
}

// The same with an answer in between, and a message that is given up.
func TestKeptBoth_WhatIsAnsweredOrCancelledCountsNoMore(t *testing.T) {
	b := newRawB(t, map[string]keptHandling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
	require.EqualValues(t, 1, b.link(t))
	const number = keptWindow / acomm.KeptLimit // may be unanswered
	text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.KeptLimit)})
	require.NoError(t, err)
	const more = number + 3
	for n := range uint32(more) {
		writeMessage(t, b.x, n+1, string(text))
		b.l.write(b.x, keptFrame(keptCancel, 0, n+1, ""))
	}
	text, err = json.Marshal(note{ID: 1, Data: dataUpTo("", acomm.KeptLimit)})
	require.NoError(t, err)
	for n := range uint32(more) {
		writeMessage(t, b.x, more+n+1, string(text))
		requireAccepted(t, b.x, more+n+1)
	}
}

func TestKeptBoth_WhatIsOverTheLimitGoesAlone(t *testing.T) {
	for _, linked := range []bool{false, true} {
		t.Run(fmt.Sprint("linked ", linked), func(t *testing.T) {
			var l *rawListener
			var conn net.Conn
			if linked {
				a := newRawA(t)
				a.link(t)
				l, conn = a.l, a.x
			} else {
				l = newRawListener(t)
				conn = l.keep()
			}
			const number, size = 50, 60 << 10
			const most = keptWindow / size
			results := make(chan error, number)
			data := dataUpTo("", size)
			for range number {
				go func() { results <- acomm.Send(l.addr, note{ID: 1, Data: data}) }()
			}
			for range most {
				_, payload := l.message(conn)
				require.Len(t, payload, size)
			}
			for range number - most {
				l.serveAlone()
				require.NoError(t, within(t, results, "one that went alone"))
			}
			require.Equal(t, most, acomm.KeptWaiting(l.addr.Path))
			for n := range uint32(most) {
				acceptMessage(t, conn, n+1)
				require.NoError(t, within(t, results, "one that did not"))
			}
		})
	}
}

// Hazard: an end that reads nothing while its answers are not read waits for ever
// for another that does the same.
func TestKeptBoth_LargeRefusalsBothWaysEnd(t *testing.T) {
	for size, callers := range map[int]int{acomm.KeptLimit: 34, 17 * acomm.KeptLimit: 4} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			refusal := strings.Repeat("y", size)
			refuse := func(conn net.Conn) { _ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)}) }
			h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]keptHandling{
				"refuse": func(conn net.Conn, _ note) { refuse(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"refuse": refuse})
			linkUp(t, r, h.URL())
			data := strings.Repeat("x", 60<<10)
			const calls = 2
			results := make(chan error, 2*callers*calls)
			call := func(addr *url.URL, payload any) {
				for range calls {
					err := <-sendWithin(addr, payload, 5*time.Second) // it takes a moment, or a minute
					if err != nil && err.Error() == refusal {
						err = nil
					} else {
						err = fmt.Errorf("refused with: %w", err)
					}
					results <- err
				}
			}
			for range callers {
				go call(h.URL(), note{How: "refuse", Data: data})
				go call(r.URL(), requestTo(nil, "refuse", data))
			}
			for range cap(results) {
				require.NoError(t, within(t, results, "a refusal"))
			}
		})
	}
}

// serveEach handles connections at the same time, or one after the other.
func serveEach(t testing.TB, oneByOne bool, handle func(ul *acomm.UnixListener, conn net.Conn)) *acomm.UnixListener {
	t.Helper()
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "e.sock"), 0)
	require.NoError(t, ul.Start())
	var handlers sync.WaitGroup
	served := async(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			if oneByOne {
				handle(ul, conn)
			} else {
				handlers.Go(func() { handle(ul, conn) })
			}
		}
		handlers.Wait()
	})
	t.Cleanup(func() {
		ul.Stop(time.Nanosecond)
		within(t, served, "the end of serving")
	})
	return ul
}

// One end serves one message after the other, and sends to the other end in between;
// there is more to be sent than may be under way.
func TestKeptBoth_ServingOneByOneEndsWithFullWindows(t *testing.T) {
	for _, slow := range []string{"requests", "responses"} {
		t.Run(slow, func(t *testing.T) {
			const callers = keptWindow/(60<<10) + 8
			data := strings.Repeat("x", 60<<10)
			replied, refused := make(chan error, callers+1), make(chan error, callers+1)
			r := serveEach(t, slow == "requests", func(ul *acomm.UnixListener, conn net.Conn) {
				req, ack := &acomm.Request{}, &acomm.Response{}
				if acomm.UnmarshalConnData(conn, req) != nil || req.Task == "refuse" {
					ack.Error = errors.New(data)
				}
				_ = acomm.SendConnData(conn, ack)
				ul.DoneConn(conn)
				if req.ResponseHook != nil {
					replied <- acomm.Send(req.ResponseHook, note{How: req.Task, Data: data})
				}
			})
			h := serveEach(t, slow == "responses", func(ul *acomm.UnixListener, conn net.Conn) {
				var n note
				_ = acomm.UnmarshalConnData(conn, &n)
				_ = acomm.SendConnData(conn, &acomm.Response{})
				ul.DoneConn(conn)
				if n.How == "large" {
					err := acomm.Send(r.URL(), requestTo(nil, "refuse", data))
					if err != nil && err.Error() == data {
						err = nil
					} else {
						err = fmt.Errorf("refused with %w", err)
					}
					refused <- err
				}
			})
			linkUp(t, &responder{UnixListener: r, replied: replied}, h.URL())
			sent := make(chan error, callers)
			for range callers {
				go func() { sent <- acomm.Send(r.URL(), requestTo(h.URL(), "large", data)) }()
			}
			for range callers {
				require.NoError(t, within(t, sent, "a request"))
				require.NoError(t, within(t, replied, "its response"))
				require.NoError(t, within(t, refused, "what the handler of that sends"))
			}
		})
	}
}

// Hazard: an acknowledgement waits to be written together with others, of a handler
// that waits for the one who waits for it.
func TestKeptBoth_AcknowledgementsWaitForNoHandler(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	for _, busy := range []time.Duration{0, 200 * time.Millisecond} {
		t.Run(busy.String(), func(t *testing.T) {
			var returned gate // open once the senders have returned
			hold := func(conn net.Conn) {
				_ = acomm.SendConnData(conn, &acomm.Response{})
				for end := time.Now().Add(busy); time.Now().Before(end); {
				}
				returned.wait(t.Context())
			}
			h := startKept(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]keptHandling{
				"hold": func(conn net.Conn, _ note) { hold(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"hold": hold})
			defer returned.open() // before the stops
			linkUp(t, r, h.URL())
			rounds, each := 50, 4
			if busy > 0 {
				rounds, each = 1, 2
			}
			for range rounds {
				var sent []<-chan error
				for range each {
					sent = append(sent,
						sendWithin(h.URL(), note{How: "hold"}, 5*time.Second),
						sendWithin(r.URL(), requestTo(nil, "hold", ""), 5*time.Second))
				}
				for _, result := range sent {
					require.NoError(t, within(t, result, "an acknowledgement"))
				}
				returned.open()
				returned.shut()
			}
		})
	}
}
