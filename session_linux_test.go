package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// A session: many exchanges on one connection.

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
	l := newRawListenerAlone(t)
	sent := sendAsync(l.addr, note{})
	conn, _ := l.accept()
	require.Empty(t, strings.TrimPrefix(conn.RemoteAddr().String(), "@"), "not named")
	require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
	require.NoError(t, within(t, sent, "the acknowledgement"))
	require.ErrorIs(t, readOne(conn), io.EOF)
}

func TestSession_PeersOf2016NoticeNothing(t *testing.T) {
	t.Run("sender", func(t *testing.T) {
		s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, nil)
		requirePlain(t, dial(t, s.Addr()))
	})
	t.Run("named sender, accept limit", func(t *testing.T) {
		s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 2, nil)
		requirePlain(t, dialNamed(t, s.URL().Path, acomm.SenderName))
		require.NoError(t, acomm.Send(s.URL(), note{}))
		require.Zero(t, acomm.SessionTo("").Opened)
		require.ErrorIs(t, acomm.Send(s.URL(), note{}), fs.ErrNotExist)
	})
	t.Run("listener", func(t *testing.T) {
		l := newRawListener(t)
		for range 3 {
			sent := sendAsync(l.addr, note{})
			conn, _ := l.accept()
			require.True(t, strings.HasPrefix(conn.RemoteAddr().String(), acomm.SenderName))
			l.write(conn, []byte(accepted2016(t)))
			require.NoError(t, within(t, sent, "the acknowledgement"))
			rest, err := io.ReadAll(conn) // until the sender has closed
			require.NoError(t, err)
			require.Empty(t, rest)
			conn.Close()
			require.False(t, acomm.SessionTo(l.addr.Path).Opening, "and there is no other connection")
			require.Zero(t, acomm.SessionTo("").Opened)
		}
	})
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
	setWriteTimeout(t, limit)
	text := strings.Repeat("y", 1<<20)
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{
		"large": func(conn net.Conn, _ note) {
			_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(text)})
		},
	})
	defer s.Stop(0) // before the limit is what it was
	conn := openRaw(t, s.URL().Path)
	ask := func(number uint32, text string) {
		writeMessage(t, conn, number, text)
	}
	ask(1, `{"id":1,"how":"large"}`)
	awaitBlocked(t, "acomm.(*session).writeRest", 1)
	require.Greater(t, len(requireFrame(t, conn, frameAnswer, 1)), len(text))
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(limit)))
	require.ErrorIs(t, readOne(conn), os.ErrDeadlineExceeded, "it stays open while the limit passes")
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	ask(2, `{"id":2}`)
	requireFrame(t, conn, frameAnswer, 2)
	require.NoError(t, conn.Close())
}

// Hazard: a message that is given up while it waits to be written lends its memory
// to the next ones, and arrives as something else.
func TestSession_MemoryOfAMessageThatWaitsIsNotUsedAgain(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	const number = 12
	response := func(letter byte) *acomm.Response {
		raw := json.RawMessage(`"` + strings.Repeat(string(letter), 30<<10) + `"`)
		return &acomm.Response{ID: string(letter), Result: &raw}
	}
	var sent []<-chan error
	for i := range number {
		sent = append(sent, sendWithin(l.addr, response('a'+byte(i)), time.Second))
	}
	await(t, "all", func() bool { return acomm.SessionTo(l.addr.Path).InFlight == number })
	awaitBlocked(t, "acomm.(*session).writeRest", 1) // what fits is in the socket
	for _, result := range sent {
		require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
	}

	const others = 3 * number // that hold what memory they find
	var holding sync.WaitGroup
	defer holding.Wait()
	for range others {
		a, b := net.Pipe()
		defer a.Close() // all of them before the Wait
		holding.Go(func() { _ = acomm.SendConnData(b, response('!')) })
	}
	awaitBlocked(t, "net.(*pipe).write", others)

	for range number {
		_, payload := l.message(conn)
		var resp acomm.Response
		require.NoError(t, json.Unmarshal([]byte(payload), &resp))
		require.NotContains(t, payload, "!")
		require.Equal(t, string(*response(resp.ID[0]).Result), string(*resp.Result))
	}
}

// Hazard: the time of a write is that of a whole answer, so a peer that takes something
// all the time is cut off.
func TestSession_SlowReaderOfALargeAnswerIsServed(t *testing.T) {
	const pause = 50 * time.Millisecond
	setWriteTimeout(t, 10*pause)
	answer := errors.New(strings.Repeat("y", 3<<20))
	large := func(conn net.Conn, _ note) { _ = acomm.SendConnData(conn, &acomm.Response{Error: answer}) }
	s := startNotes(t, filepath.Join(shortDir(t), "s.sock"), 0, map[string]handling{"large": large})
	conn := openRaw(t, s.Addr())
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	message := `{"how":"large"}`
	writeMessage(t, conn, 1, message)
	buf := make([]byte, 128<<10)
	for read := 0; read < 3<<20; {
		time.Sleep(pause) // a slow peer: it takes longer in all than the patience
		n, err := conn.Read(buf)
		require.NoError(t, err, "after %d bytes", read)
		read += n
	}
}
