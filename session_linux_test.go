package acomm_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestSession_ManySendsUseOneConnection(t *testing.T) {
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
	openTo(t, s.URL())
	before, files := s.peersNow(), openFiles(t)
	for i := range 300 {
		require.NoError(t, acomm.Send(s.URL(), note{ID: i}))
	}
	require.Equal(t, files, openFiles(t), "no connection in addition")
	for round := range 10 {
		sendMany(t, s.URL(), 1000*(round+1), 64)
	}
	after := s.peersNow()
	require.Len(t, after, 2, "a plain one, and the session: %v", after)
	var by []int
	for peer, n := range after {
		by = append(by, n-before[peer])
	}
	require.Contains(t, by, 300+640, "all came by one connection: %v", after)
	for i := range 300 {
		require.Equal(t, 1, s.handled(i))
	}
}

func TestSession_NoneIsOpenedWithoutAListener(t *testing.T) {
	path := filepath.Join(shortDir(t), "s.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer l.Close()
	sent := sendAsync(unixURL(path), note{})
	conn, err := l.Accept()
	require.NoError(t, err)
	defer conn.Close()
	require.Empty(t, strings.TrimPrefix(conn.RemoteAddr().String(), "@"), "not named")
	require.NoError(t, acomm.UnmarshalConnData(conn, &note{}))
	require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
	require.NoError(t, within(t, sent, "the acknowledgement"))
	_, err = readByte(conn)
	require.ErrorIs(t, err, io.EOF)
}

// plainFrame is a frame with JSON of the text.
func plainFrame(text string) []byte {
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(text)))
	return append(frame, text...)
}

func TestSession_PeersOf2016NoticeNothing(t *testing.T) {
	golden, err := os.ReadFile(filepath.Join("testdata", "wire", "ack-accepted.bin"))
	require.NoError(t, err)

	t.Run("sender", func(t *testing.T) {
		s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
		requirePlain(t, dial(t, s.UnixListener), golden)
	})
	t.Run("named sender, accept limit", func(t *testing.T) {
		s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 2, nil)
		requirePlain(t, dialNamed(t, s.URL().Path, acomm.SenderName), golden)
		require.NoError(t, acomm.Send(s.URL(), note{}))
		require.Zero(t, acomm.SessionTo("").Opened)
		require.ErrorIs(t, acomm.Send(s.URL(), note{}), fs.ErrNotExist)
	})
	t.Run("listener", func(t *testing.T) {
		processWithSessions(t)
		path := filepath.Join(shortDir(t), "s.sock")
		l, err := net.Listen("unix", path)
		require.NoError(t, err)
		defer l.Close()
		for range 3 {
			sent := sendAsync(unixURL(path), note{})
			conn, err := l.Accept()
			require.NoError(t, err)
			require.True(t, strings.HasPrefix(conn.RemoteAddr().String(), acomm.SenderName))
			require.NoError(t, acomm.UnmarshalConnData(conn, &note{}))
			_, err = conn.Write(golden)
			require.NoError(t, err)
			require.NoError(t, within(t, sent, "the acknowledgement"))
			rest, err := io.ReadAll(conn) // until the sender has closed
			require.NoError(t, err)
			require.Empty(t, rest)
			conn.Close()
			require.False(t, acomm.SessionTo(path).Opening, "and there is no other connection")
			require.Zero(t, acomm.SessionTo("").Opened)
		}
	})
}

// behaviours is what handlers do, and what comes of it at the sender.
var behaviours = []struct {
	name string
	want error // of the sender
	sent time.Duration
	do   func(ul *acomm.UnixListener, conn net.Conn, others <-chan struct{}) error // closed when others were served
}{
	{name: "reads on after the acknowledgement", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		err := acomm.SendConnData(conn, &acomm.Response{})
		return errors.Join(err, expect("read", readOne(conn), io.EOF), expect("again", readOne(conn), io.EOF))
	}},
	{name: "reads before it, until its deadline", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{conn.SetReadDeadline(time.Now().Add(moment))}
		errs = append(errs, expect("read", readOne(conn), os.ErrDeadlineExceeded))
		errs = append(errs, expect("again", readOne(conn), os.ErrDeadlineExceeded))
		errs = append(errs, conn.SetReadDeadline(time.Time{}))
		errs = append(errs, acomm.SendConnData(conn, &acomm.Response{}))
		return errors.Join(append(errs, expect("after", readOne(conn), io.EOF))...)
	}},
	{name: "changes the deadline of its read", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{conn.SetReadDeadline(time.Now().Add(time.Hour))}
		read := make(chan error, 1)
		go func() { read <- readOne(conn) }()
		errs = append(errs, handlerReads())
		errs = append(errs, conn.SetDeadline(time.Unix(1, 0)), expect("read", <-read, os.ErrDeadlineExceeded))
		_, err := conn.Write([]byte("x"))
		errs = append(errs, expect("write", err, os.ErrDeadlineExceeded), conn.SetDeadline(time.Time{}))
		go func() { read <- readOne(conn) }()
		errs = append(errs, handlerReads())
		errs = append(errs, conn.SetReadDeadline(time.Unix(1, 0)), expect("second read", <-read, os.ErrDeadlineExceeded))
		return errors.Join(append(errs, acomm.SendConnData(conn, &acomm.Response{}))...)
	}},
	{name: "writes header and payload", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(frame[:4])
		_, err2 := conn.Write(frame[4:])
		return errors.Join(err, err2)
	}},
	{name: "writes byte by byte, and on", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		var errs []error
		for _, b := range plainFrame(`{"error":""}`) {
			n, err := conn.Write([]byte{b})
			if n != 1 || err != nil {
				errs = append(errs, fmt.Errorf("%d, %w", n, err))
			}
		}
		_, err := conn.Write([]byte{0})
		return errors.Join(append(errs, expect("write on", err, syscall.EPIPE))...)
	}},
	{name: "writes two frames at once", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(append(frame, frame...))
		_, again := conn.Write(frame)
		return errors.Join(err, expect("write on", again, syscall.EPIPE))
	}},
	{name: "acknowledges twice", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		err := acomm.SendConnData(conn, &acomm.Response{})
		err2 := expect("read", readOne(conn), io.EOF)
		return errors.Join(err, err2, expect("second", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))
	}},
	{name: "writes what is no frame", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		_, err := conn.Write([]byte("\x00\x00"))
		return err
	}},
	{name: "writes half a frame", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		frame := plainFrame(`{"error":""}`)
		_, err := conn.Write(frame[:len(frame)-1])
		return err
	}},
	{name: "announces too much", want: syscall.EMSGSIZE, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		_, err := conn.Write([]byte("HTTP/1.1 200 OK\r\n"))
		return err
	}},
	{name: "closes", want: io.ErrUnexpectedEOF, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		return conn.Close()
	}},
	{name: "is done at once", want: io.ErrUnexpectedEOF, do: func(ul *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		ul.DoneConn(conn)
		var errs []error
		for _, f := range []func() error{
			func() error { return readOne(conn) },
			func() error { _, err := conn.Write([]byte("x")); return err },
			func() error { return conn.SetDeadline(time.Time{}) },
			func() error { return conn.SetReadDeadline(time.Time{}) },
			func() error { return conn.SetWriteDeadline(time.Time{}) },
			conn.Close,
		} {
			errs = append(errs, expect("after DoneConn", f(), net.ErrClosed))
		}
		return errors.Join(errs...)
	}},
	{name: "is done after it", do: func(ul *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{acomm.SendConnData(conn, &acomm.Response{})}
		ul.DoneConn(conn)
		_, err := conn.Write([]byte("x"))
		errs = append(errs, expect("write", err, net.ErrClosed), expect("read", readOne(conn), net.ErrClosed))
		errs = append(errs, expect("set", conn.SetDeadline(time.Time{}), net.ErrClosed), expect("close", conn.Close(), net.ErrClosed))
		return errors.Join(errs...)
	}},
	{name: "never acknowledges", sent: moment, want: os.ErrDeadlineExceeded, do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		errs := []error{expect("read", readOne(conn), io.EOF)}
		return errors.Join(append(errs, expect("too late", acomm.SendConnData(conn, &acomm.Response{}), syscall.EPIPE))...)
	}},
	{name: "acknowledges late", do: func(_ *acomm.UnixListener, conn net.Conn, others <-chan struct{}) error {
		<-others
		return acomm.SendConnData(conn, &acomm.Response{})
	}},
	{name: "asks who is there", do: func(_ *acomm.UnixListener, conn net.Conn, _ <-chan struct{}) error {
		var errs []error
		if conn.LocalAddr() == nil || conn.RemoteAddr() == nil || conn.LocalAddr().Network() != "unix" {
			errs = append(errs, fmt.Errorf("addresses: %v, %v", conn.LocalAddr(), conn.RemoteAddr()))
		}
		errs = append(errs, peerIsSelf(conn))
		return errors.Join(append(errs, acomm.SendConnData(conn, &acomm.Response{}))...)
	}},
}

// handlerReads waits until a handler waits for something to read.
func handlerReads() error {
	for deadline := time.Now().Add(patience); blockedIn("acomm.(*exchange).Read") == 0; {
		if time.Now().After(deadline) {
			return errors.New("the read does not wait")
		}
		runtime.Gosched()
	}
	return nil
}

func TestSession_HandlersDoAsTheyLike(t *testing.T) {
	found, release := make(chan error, 10), make(chan struct{})
	others := make(map[string]chan struct{})
	how := map[string]handling{
		"holds it for ever": func(conn net.Conn, _ note) {
			_ = acomm.SendConnData(conn, &acomm.Response{})
			<-release
		},
		"holds it unanswered": func(net.Conn, note) { <-release },
	}
	var s *noteService
	for _, b := range behaviours {
		served := make(chan struct{})
		others[b.name] = served
		how[b.name] = func(conn net.Conn, _ note) { conclude(found, b.do(s.UnixListener, conn, served)) }
	}
	s = startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, how)
	defer close(release) // before Stop
	openTo(t, s.URL())
	before := s.peersNow()

	require.NoError(t, acomm.Send(s.URL(), note{How: "holds it for ever"}))
	unanswered := sendAsync(s.URL(), note{How: "holds it unanswered"})
	for i, b := range behaviours {
		t.Run(b.name, func(t *testing.T) {
			sent := sendWithin(s.URL(), note{How: b.name}, b.sent)
			sendMany(t, s.URL(), 1000*(i+1), 20)
			close(others[b.name])
			require.NoError(t, within(t, found, "the handler"))
			err := within(t, sent, "the sender")
			if b.want == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, b.want)
			}
			sendMany(t, s.URL(), 1000*(i+1)+100, 20)
		})
	}
	require.Len(t, s.peersNow(), len(before), "all on the same connection")
	require.True(t, acomm.SessionTo(s.URL().Path).Open)
	require.Empty(t, unanswered)
}

func TestSession_LargeMessagesGoAlone(t *testing.T) {
	digest := func(s string) string { return fmt.Sprintf("%d-%s-%s", len(s), s[:3], s[len(s)-3:]) }
	answer := func(conn net.Conn, n note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(digest(n.Data))})
	}
	release := make(chan struct{})
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{
		"digest": answer,
		"late":   func(conn net.Conn, n note) { <-release; answer(conn, n) },
	})
	openTo(t, s.URL())
	before := s.peersNow()
	var large []<-chan error
	var want []string
	for i, size := range []int{64 << 10, 65 << 10, 1 << 20, 1 << 20} {
		data := fmt.Sprintf("%d<<", i) + strings.Repeat("x", size-6) + fmt.Sprintf(">>%d", i)
		data = strings.NewReplacer("<", "(", ">", ")").Replace(data)
		large = append(large, sendAsync(s.URL(), note{How: "late", Data: data}))
		want = append(want, digest(data))
	}
	await(t, "the large ones", func() bool { return len(s.peersNow()) > len(before) && s.peersNow()["@"]+s.peersNow()[""] >= 4 })
	sendMany(t, s.URL(), 1, 200) // while the large ones are in hand
	close(release)
	for i := range large {
		require.EqualError(t, within(t, large[i], "the answer"), want[i])
	}
	var mixed sync.WaitGroup
	errs := make(chan string, 1000)
	for g := range 8 {
		mixed.Go(func() {
			for i := range 20 {
				size := []int{10, 3 << 10, 5 << 10, 30 << 10, 63 << 10, 65 << 10, 300 << 10}[(g+i)%7]
				data := fmt.Sprintf("%03d", g) + strings.Repeat(string(rune('a'+g)), size) + fmt.Sprintf("%03d", i)
				if err := acomm.Send(s.URL(), note{How: "digest", Data: data}); err == nil || err.Error() != digest(data) {
					errs <- fmt.Sprint(err, " not ", digest(data))
				}
			}
		})
	}
	mixed.Wait()
	require.Empty(t, errs)
	require.True(t, acomm.SessionTo(s.URL().Path).Open)
}

// The answer of a handler may be long, and on a session it goes with others.
func TestSession_LargeAnswersArrive(t *testing.T) {
	text := strings.Repeat("y", 1<<20)
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{
		"large": func(conn net.Conn, n note) {
			_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(fmt.Sprint(n.ID, text))})
		},
		"garbage": func(conn net.Conn, _ note) {
			_, _ = conn.Write([]byte(strings.Repeat("z", acomm.MaxPayload+100)))
		},
	})
	openTo(t, s.URL())
	before := s.peersNow()
	var sent []<-chan error
	for i := range 16 {
		sent = append(sent, sendAsync(s.URL(), note{ID: i, How: "large"}))
	}
	sendMany(t, s.URL(), 1000, 100)
	for i := range sent {
		require.EqualError(t, within(t, sent[i], "an answer"), fmt.Sprint(i, text))
	}
	// Hazard: more garbage than a frame can be long ended the connection of all.
	require.ErrorIs(t, acomm.Send(s.URL(), note{How: "garbage"}), syscall.EMSGSIZE)
	sendMany(t, s.URL(), 2000, 10)
	require.Len(t, s.peersNow(), len(before), "still the same connection")
}

// Hazard: answers that the socket did not take at once were written with a
// deadline, which stayed: a minute later the listener could answer nothing more on
// that connection, whose senders waited in vain.
func TestSession_AFullSocketIsForgotten(t *testing.T) {
	const limit = 2 * time.Second // of a write; the socket is empty long before
	defer acomm.SetSessionWriteTimeout(acomm.SetSessionWriteTimeout(limit))
	text := strings.Repeat("y", 1<<20)
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{
		"large": func(conn net.Conn, _ note) {
			_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(text)})
		},
	})
	defer s.Stop(0) // before the limit is what it was
	conn := openRaw(t, s.URL().Path)
	ask := func(number uint32, text string) {
		_, err := conn.Write(rawFrame(frameMessage, uint32(len(text)), number, text))
		require.NoError(t, err)
	}
	ask(1, `{"id":1,"how":"large"}`)
	awaitBlocked(t, "acomm.(*session).writeRest", 1)
	_, _, payload, err := readFrame(conn)
	require.NoError(t, err)
	require.Greater(t, len(payload), len(text))
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(limit)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded, "it stays open while the limit passes")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	ask(2, `{"id":2}`)
	_, answered, _, err := readFrame(conn)
	require.NoError(t, err)
	require.EqualValues(t, 2, answered)
	require.NoError(t, conn.Close())
}

func TestSession_StopUnderLoadLosesNothing(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s.sock")
	rounds := 15
	if *long {
		rounds = 500
	}
	processWithSessions(t)
	s := startNotes(t, path, 0, nil)
	var next atomic.Int64
	for range rounds {
		type result struct {
			id  int
			err error
		}
		results := make(chan result, 100000)
		var acks counter
		var senders sync.WaitGroup
		for range 32 {
			senders.Go(func() {
				for range 3000 {
					id := int(next.Add(1))
					err := acomm.Send(s.URL(), note{ID: id})
					results <- result{id, err}
					if err != nil {
						return
					}
					acks.add()
				}
			})
		}
		requireReached(t, &acks, 200, "acknowledgements")
		within(t, async(func() { s.Stop(0) }), "Stop")
		within(t, s.served, "the end of serving")
		within(t, async(senders.Wait), "the senders")
		close(results)
		for r := range results {
			if r.err == nil {
				require.Equal(t, 1, s.handled(r.id), "acknowledged")
			} else {
				require.Equal(t, 0, s.handled(r.id), "handled, but %v", r.err)
				// The last two are for who connected and was not accepted, which it learns
				// from its read or already from its write.
				require.True(t, errors.Is(r.err, fs.ErrNotExist) || errors.Is(r.err, syscall.ECONNREFUSED) ||
					errors.Is(r.err, syscall.ECONNRESET) || errors.Is(r.err, syscall.EPIPE), "%v", r.err)
			}
		}
		require.NoError(t, s.Start())
		s.serve(nil)
		require.NoError(t, acomm.Send(s.URL(), note{ID: int(next.Add(1))}), "found at once")
	}
}

// Those that nobody has taken are told that they were not read.
func TestSession_StopWithATimeoutTellsWhatWasNotRead(t *testing.T) {
	processWithSessions(t)
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	sent := sendAsync(ul.URL(), note{})
	conn := take(t, ul)
	require.NoError(t, acomm.UnmarshalConnData(conn, &note{}))
	require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
	ul.DoneConn(conn)
	require.NoError(t, within(t, sent, "the first"))
	await(t, "the session", func() bool { return acomm.SessionTo(ul.URL().Path).Open })

	const number, handed = 20, 7
	outcomes := make(map[int]<-chan error)
	for id := range number {
		outcomes[id] = sendAsync(ul.URL(), note{ID: id})
	}
	await(t, "all", func() bool { return acomm.SessionTo(ul.URL().Path).InFlight == number })
	taken := make(map[int]bool)
	for range handed {
		conn := take(t, ul)
		var n note
		require.NoError(t, acomm.UnmarshalConnData(conn, &n))
		taken[n.ID] = true
	}
	within(t, async(func() { ul.Stop(moment) }), "Stop")
	require.Nil(t, ul.NextConn())
	for id, outcome := range outcomes {
		err := within(t, outcome, "an outcome")
		if taken[id] {
			require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%d", id)
		} else {
			require.ErrorIs(t, err, fs.ErrNotExist, "%d", id)
		}
	}
	require.Len(t, taken, handed)
	await(t, "the connection to be forgotten", func() bool { return acomm.SessionTo("").Opened == 0 })
}

func TestSession_ConnectionLostBeforeAMessageIsReplaced(t *testing.T) {
	l := newRawListener(t)
	for i := range 20 {
		conn := l.openNext()
		conn.Close()
		sent := sendAsync(l.addr, note{ID: i})
		require.Equal(t, i, l.serveAlone().ID)
		require.NoError(t, within(t, sent, "the acknowledgement"))
	}
}

func TestSession_MessageIsNotSentAgainOnceItMayHaveBeenRead(t *testing.T) {
	l := newRawListener(t)
	for read := range 2 { // with and without having read it
		conn := l.openNext()
		sent := sendAsync(l.addr, note{ID: 1})
		if read == 1 {
			l.message(conn)
		} else {
			await(t, "the message", func() bool { return acomm.SessionTo(l.addr.Path).InFlight == 1 })
			require.NoError(t, readable(conn))
		}
		conn.Close()
		require.ErrorIs(t, within(t, sent, "an outcome"), io.ErrUnexpectedEOF)
	}
	next := sendAsync(l.addr, note{ID: 2})
	require.Equal(t, 2, l.serveAlone().ID, "the first that comes")
	require.NoError(t, within(t, next, "an acknowledgement"))
}

// What did not get as far as the socket can't have been read, and goes elsewhere.
func TestSession_WhatTheSocketDidNotTakeIsSentAgainOnce(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	const number = 30
	data := strings.Repeat("x", 30<<10)
	results := make(map[int]<-chan error)
	for i := range number {
		results[i] = sendAsync(l.addr, note{ID: i, Data: data})
	}
	await(t, "all", func() bool { return acomm.SessionTo(l.addr.Path).InFlight == number })
	awaitBlocked(t, "acomm.(*session).writeRest", 1) // what fits is in the socket
	conn.Close()
	again := make(map[int]int)
	lost := make(chan int, number)
	served := async(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var n note
			if acomm.UnmarshalConnData(conn, &n) == nil {
				again[n.ID]++
				_, _ = io.WriteString(conn, accepted)
			}
			conn.Close()
		}
	})
	for i, result := range results {
		err := within(t, result, "an outcome")
		if err != nil {
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			lost <- i
		}
	}
	require.NoError(t, l.Close())
	within(t, served, "the end of accepting")
	require.NotEmpty(t, again)
	require.NotEmpty(t, lost)
	require.Len(t, again, number-len(lost))
	for range len(lost) {
		require.NotContains(t, again, <-lost, "it may have been read")
	}
	for id, n := range again {
		require.Equal(t, 1, n, "%d", id)
	}
}

// A listener that reads no further still serves what is in its socket: that is not
// sent again, all the rest is.
func TestSession_WhatIsInTheSocketIsServedAndTheRestSentAgain(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	const number = 30
	data := strings.Repeat("x", 30<<10)
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(l.addr, note{ID: i, Data: data}) }()
	}
	await(t, "all", func() bool { return acomm.SessionTo(l.addr.Path).InFlight == number })
	awaitBlocked(t, "acomm.(*session).writeRest", 1) // what fits is in the socket
	require.NoError(t, conn.(*net.UnixConn).CloseRead())
	handled := make(map[int]int)
	for {
		kind, n, payload, err := readFrame(conn)
		if err != nil { // nothing more, or a part of a message
			break
		}
		require.EqualValues(t, frameMessage, kind)
		var message note
		require.NoError(t, json.Unmarshal([]byte(payload), &message))
		handled[message.ID]++
		l.write(conn, rawFrame(frameAnswer, uint32(len(accepted)), n, accepted))
	}
	require.NotEmpty(t, handled)
	require.Less(t, len(handled), number)
	for range number - len(handled) {
		handled[l.serveAlone().ID]++
	}
	for range number {
		require.NoError(t, within(t, results, "an acknowledgement"))
	}
	for i := range number {
		require.Equal(t, 1, handled[i], "%d", i)
	}
	_, _, _, err := readFrame(conn)
	require.ErrorIs(t, err, io.EOF)
}

// readable waits until there is something to read, and leaves it.
func readable(conn net.Conn) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peekErr error
	err = raw.Read(func(fd uintptr) bool {
		_, _, peekErr = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK)
		return peekErr != syscall.EAGAIN
	})
	return errors.Join(err, peekErr)
}

func TestSession_WhatWasStoppedBeforeIsSentAgainOnce(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	const number, served = 10, 4
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(l.addr, note{ID: i}) }()
	}
	var ids []string
	for range number {
		_, payload := l.message(conn)
		ids = append(ids, payload)
	}
	l.write(conn, rawFrame(frameStop, 0, served, ""))
	again := make(map[string]int)
	for range number - served {
		n := l.serveAlone()
		again[fmt.Sprintf(`{"id":%d,"how":"","data":""}`, n.ID)]++
	}
	for range number - served {
		require.NoError(t, within(t, results, "those sent again"))
	}
	require.Empty(t, results, "the others wait")
	for i := range served {
		l.write(conn, rawFrame(frameAnswer, uint32(len(accepted)), uint32(i+1), accepted))
		require.NoError(t, within(t, results, "an answer after the stop"))
	}
	want := make(map[string]int)
	for _, id := range ids[served:] {
		want[id] = 1
	}
	require.Equal(t, want, again)
	requireClosing(t, conn)
}

func TestSession_ListenersOfIllWillDoNoHarm(t *testing.T) {
	answer := func(number uint32) []byte {
		return rawFrame(frameAnswer, uint32(len(accepted)), number, accepted)
	}
	t.Run("answers nobody waits for", func(t *testing.T) {
		l := newRawListener(t)
		conn := l.open()
		l.write(conn, slices.Concat(answer(0), answer(77), answer(1<<32-1), answer(1)))
		sent := sendAsync(l.addr, note{})
		number, _ := l.message(conn)
		other := sendAsync(l.addr, note{})
		second, _ := l.message(conn)
		l.write(conn, slices.Concat(answer(number), answer(number), answer(number)))
		require.NoError(t, within(t, sent, "an answer"))
		require.Empty(t, other)
		l.write(conn, answer(second))
		require.NoError(t, within(t, other, "an answer"))
	})
	for name, bytes := range map[string][]byte{
		"garbage":             []byte("garbage, garbage"),
		"zeros":               make([]byte, 64),
		"a message":           rawFrame(frameMessage, 2, 1, "{}"),
		"too many targets":    bytes.Repeat(rawFrame(frameTarget, 16, 0, strings.Repeat("x", 16)), 17),
		"a cancel":            rawFrame(frameCancel, 0, 1, ""),
		"kind 15":             rawFrame(15, 0, 1, ""),
		"stop with a payload": rawFrame(frameStop, 1, 1, "x"),
		"too long an answer":  rawFrame(frameAnswer, acomm.MaxPayload+5, 1, "x"),
		"longest of all":      rawFrame(frameAnswer, 1<<28-1, 1, "x"),
	} {
		t.Run(name, func(t *testing.T) {
			l := newRawListener(t)
			conn := l.open()
			first, second := sendAsync(l.addr, note{}), sendAsync(l.addr, note{})
			l.message(conn)
			l.message(conn)
			l.write(conn, bytes)
			require.ErrorIs(t, within(t, first, "an outcome"), io.ErrUnexpectedEOF)
			require.ErrorIs(t, within(t, second, "an outcome"), io.ErrUnexpectedEOF)
			next := sendAsync(l.addr, note{})
			l.serveAlone()
			require.NoError(t, within(t, next, "an acknowledgement"))
		})
	}
	for name, payload := range map[string]string{"empty": "", "no JSON": string(plainFrame("{")), "too short": "\x00", "announces more": "\x00\x00\x00\x09{}", "too long": "\xff\xff\xff\xff"} {
		t.Run("answer "+name, func(t *testing.T) {
			l := newRawListener(t)
			conn := l.open()
			first, second := sendAsync(l.addr, note{}), sendAsync(l.addr, note{})
			l.message(conn)
			l.message(conn)
			l.write(conn, rawFrame(frameAnswer, uint32(len(payload)), 1, payload))
			l.write(conn, answer(2))
			one, other := within(t, first, "an outcome"), within(t, second, "an outcome")
			require.True(t, (one == nil) != (other == nil), "%v, %v", one, other)
		})
	}
	t.Run("half an answer", func(t *testing.T) {
		l := newRawListener(t)
		conn := l.open()
		sent := sendWithin(l.addr, note{}, 3*moment)
		l.message(conn)
		l.write(conn, answer(1)[:13])
		require.ErrorIs(t, within(t, sent, "the time-out"), os.ErrDeadlineExceeded)
		kind, number, payload, err := readFrame(conn)
		require.NoError(t, err)
		require.Equal(t, []any{uint32(frameCancel), uint32(1), ""}, []any{kind, number, payload})
	})
	for name, greeting := range map[string]string{"wrong": "\xffacomm\x00\x02" + lesserToken, "silent": "", "closing": "-"} {
		t.Run("greeting "+name, func(t *testing.T) {
			l := newRawListener(t)
			l.offer()
			conn := l.acceptSession()
			if greeting == "-" {
				conn.Close()
			} else {
				l.write(conn, []byte(greeting))
			}
			for i := range 3 { // does not wait for the greeting, nor asks for another one
				next := sendAsync(l.addr, note{ID: i})
				require.Equal(t, i, l.serveAlone().ID)
				require.NoError(t, within(t, next, "an acknowledgement"))
			}
			if greeting != "-" {
				_, err := readByte(conn)
				require.ErrorIs(t, err, io.EOF, "it is given up, and nothing was said")
			}
			require.False(t, acomm.SessionTo(l.addr.Path).Open)
		})
	}
}

func TestSession_SendersOfIllWillDoNoHarm(t *testing.T) {
	release := make(chan struct{})
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{
		"hold": func(net.Conn, note) { <-release },
	})
	path := s.URL().Path
	openTo(t, s.URL())
	message := func(number uint32, text string) []byte {
		return rawFrame(frameMessage, uint32(len(text)), number, text)
	}
	var tooMany []byte
	for i := range uint32(acomm.MaxInFlight + 1) {
		tooMany = append(tooMany, message(i+1, `{"how":"hold"}`)...)
	}
	for name, bytes := range map[string][]byte{
		"number 0":            message(0, `{}`),
		"number 2 first":      message(2, `{}`),
		"a number again":      slices.Concat(message(1, `{}`), message(1, `{}`)),
		"a number left out":   slices.Concat(message(1, `{}`), message(3, `{}`)),
		"kind 0":              rawFrame(0, 2, 1, "{}"),
		"kind 7":              rawFrame(7, 2, 1, "{}"),
		"kind 14":             rawFrame(14, 0, 1, ""),
		"a target too short":  rawFrame(frameTarget, 15, 0, strings.Repeat("x", 15)),
		"a target":            rawFrame(frameTarget, 16, 0, strings.Repeat("x", 16)),
		"an answer":           rawFrame(frameAnswer, 2, 1, "{}"),
		"a stop":              rawFrame(frameStop, 0, 1, ""),
		"too long":            rawFrame(frameMessage, acomm.MaxMessage+1, 1, "{}"+strings.Repeat(" ", acomm.MaxMessage-1)),
		"longest":             rawFrame(frameMessage, 1<<28-1, 1, "{}"),
		"cancel with payload": rawFrame(frameCancel, 1, 1, "x"),
		"too many":            tooMany,
		"the greeting again":  []byte(acomm.Greeting),
		"a plain frame":       plainFrame(`{"id":1}`),
	} {
		t.Run(name, func(t *testing.T) {
			conn := openRaw(t, path)
			require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second))) // at rest it would be closed after 10
			_, err := conn.Write(bytes)
			require.True(t, err == nil || errors.Is(err, syscall.EPIPE), "%v", err)
			_, err = io.Copy(io.Discard, conn) // until the listener has closed
			require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
			sendMany(t, s.URL(), 1000, 10)
		})
	}
	t.Run("cancels of nothing", func(t *testing.T) {
		conn := openRaw(t, path)
		_, err := conn.Write(slices.Concat(rawFrame(frameCancel, 0, 9, ""), rawFrame(frameCancel, 0, 0, ""), message(1, "{}"), rawFrame(frameCancel, 0, 2, ""), message(2, "not JSON"), message(3, "")))
		require.NoError(t, err)
		answers := make(map[uint32]string)
		for range 3 {
			kind, number, payload, err := readFrame(conn)
			require.NoError(t, err)
			require.EqualValues(t, frameAnswer, kind)
			answers[number] = payload
		}
		golden, err := os.ReadFile(filepath.Join("testdata", "wire", "ack-accepted.bin"))
		require.NoError(t, err)
		require.Equal(t, map[uint32]string{1: string(golden), 2: "", 3: ""}, answers)
	})
	t.Run("half a frame, half a greeting, none", func(t *testing.T) {
		half := openRaw(t, path)
		_, err := half.Write(message(1, "{}")[:9])
		require.NoError(t, err)
		for _, greeting := range []string{"", acomm.Greeting[:3], acomm.Greeting} {
			conn := dialNamed(t, path, acomm.SessionName)
			_, err := io.WriteString(conn, greeting)
			require.NoError(t, err)
		}
		for _, greeting := range []string{"\xffnot it" + lesserToken, string(plainFrame(`{"id":1}`)) + lesserToken} {
			conn := dialNamed(t, path, acomm.SessionName)
			require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
			_, err = io.WriteString(conn, greeting)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, conn)
			require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "closed: %v", err)
		}
		sendMany(t, s.URL(), 2000, 10)
		close(release) // those that are held
		within(t, async(func() { s.Stop(0) }), "Stop, with half a frame there")
		within(t, s.served, "the end of serving")
	})
}

// Hazard: a connection was still open when the last listener had stopped.
func TestSession_NothingIsLeftAfterTheLastStop(t *testing.T) {
	dir := shortDir(t)
	startNotes(t, filepath.Join(dir, "s.sock"), 0, nil).Stop(0) // the runtime opens what it needs
	before := openFiles(t)
	rounds := 200
	for i := range rounds {
		s := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
		openTo(t, s.URL())
		sendMany(t, s.URL(), 0, 4)
		s.Stop(0)
		await(t, fmt.Sprintf("all descriptors to be closed, after %d", i), func() bool { return openFiles(t) <= before })
		require.Zero(t, acomm.SessionTo("").Opened)
		within(t, s.served, "the end of serving")
	}
}

// The same for a process that keeps connections to others only.
func TestSession_NothingIsLeftAfterTheLastTracker(t *testing.T) {
	l := newRawListenerOf(t)
	before := openFiles(t)
	for i := range 50 {
		tracker, err := acomm.NewTracker("", nil, patience)
		require.NoError(t, err)
		require.NoError(t, tracker.Start())
		conn := l.open()
		stopped := async(tracker.Stop)
		requireClosing(t, conn)
		within(t, stopped, "Stop")
		await(t, fmt.Sprintf("all descriptors to be closed, round %d", i), func() bool { return openFiles(t) <= before })
		require.Zero(t, acomm.SessionTo("").Opened)
	}
}

func TestSession_PathDecides(t *testing.T) {
	dir := shortDir(t)
	first := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
	second := startNotes(t, filepath.Join(dir, "other.sock"), 0, nil)
	openTo(t, first.URL())
	sendMany(t, first.URL(), 0, 10)

	require.NoError(t, os.Rename(second.URL().Path, first.URL().Path))
	lookEnds()
	for i := range 10 {
		require.NoError(t, acomm.Send(first.URL(), note{ID: 100 + i}))
		require.Equal(t, 0, first.handled(100+i))
		require.Equal(t, 1, second.handled(100+i))
	}
	openTo(t, first.URL())
	require.NoError(t, os.Remove(first.URL().Path))
	for range 3 {
		lookEnds()
		require.ErrorIs(t, acomm.Send(first.URL(), note{ID: 200}), fs.ErrNotExist)
	}
	require.Equal(t, 0, first.handled(200)+second.handled(200))
	require.NoError(t, os.WriteFile(first.URL().Path, nil, 0o600))
	require.ErrorIs(t, acomm.Send(first.URL(), note{ID: 200}), syscall.ECONNREFUSED)
}
