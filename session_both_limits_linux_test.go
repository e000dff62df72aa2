package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The limits of sessions that carry messages both ways, at which nobody waits for ever.

const inFlightBytes = 2 << 20 // bytes of JSON that may be unanswered

// dataUpTo is what makes a note have so many bytes of JSON.
func dataUpTo(how string, size int) string {
	text, err := json.Marshal(note{ID: 1, How: how})
	if err != nil {
		panic(err)
	}
	return strings.Repeat("x", size-len(text))
}

func TestSessionBoth_TooMuchUnansweredBreaksTheConnection(t *testing.T) {
	for _, targeted := range []bool{false, true} {
		t.Run(fmt.Sprint("targeted ", targeted), func(t *testing.T) {
			b := newRawB(t, map[string]handling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
			var conn net.Conn = b.y
			first := uint32(2)
			if targeted {
				b.target(t)
				conn, first = b.x, 1
			}
			const number = inFlightBytes / acomm.MaxMessage
			text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.MaxMessage)})
			require.NoError(t, err)
			for n := range uint32(number) {
				writeMessage(t, conn, first+n, string(text))
			}
			await(t, "all that may be unanswered", func() bool { return b.s.handled(1) == number })
			writeMessage(t, conn, first+number, `{}`)
			_, err = io.Copy(io.Discard, conn) // until it is closed
			require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
			require.Equal(t, number, b.s.handled(1))
		})
	}
}

// The same with an answer in between, and a message that is given up.
func TestSessionBoth_WhatIsAnsweredOrCancelledCountsNoMore(t *testing.T) {
	b := newRawB(t, map[string]handling{"wait": func(conn net.Conn, _ note) { _ = readOne(conn) }})
	b.target(t)
	const number = inFlightBytes / acomm.MaxMessage // may be unanswered
	text, err := json.Marshal(note{ID: 1, How: "wait", Data: dataUpTo("wait", acomm.MaxMessage)})
	require.NoError(t, err)
	const more = number + 3
	for n := range uint32(more) {
		writeMessage(t, b.x, n+1, string(text))
		b.l.write(b.x, rawFrame(frameCancel, 0, n+1, ""))
	}
	text, err = json.Marshal(note{ID: 1, Data: dataUpTo("", acomm.MaxMessage)})
	require.NoError(t, err)
	for n := range uint32(more) {
		writeMessage(t, b.x, more+n+1, string(text))
		requireAccepted(t, b.x, more+n+1)
	}
}

func TestSessionBoth_WhatIsOverTheLimitGoesAlone(t *testing.T) {
	for _, targeted := range []bool{false, true} {
		t.Run(fmt.Sprint("targeted ", targeted), func(t *testing.T) {
			var l *rawListener
			var conn net.Conn
			if targeted {
				a := newRawA(t)
				a.target(t)
				l, conn = a.l, a.x
			} else {
				l = newRawListener(t)
				conn = l.open()
			}
			const number, size = 50, 60 << 10
			const most = inFlightBytes / size
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
			require.Equal(t, most, acomm.SessionTo(l.addr.Path).InFlight)
			for n := range uint32(most) {
				acceptMessage(t, conn, n+1)
				require.NoError(t, within(t, results, "one that did not"))
			}
		})
	}
}

// Hazard: a handler that sends waited for an acknowledgement behind messages that
// nobody took as long as it waited: each cost it a minute.
func TestSessionBoth_GivenUpMessagesDelayNoAcknowledgement(t *testing.T) {
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
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
		case req.ResponseHook != nil:
			replied <- <-sendWithin(req.ResponseHook, note{}, patience/2)
		}
	})
	carryBoth(t, &responder{UnixListener: ul, replied: replied}, h.URL())
	require.NoError(t, acomm.Send(ul.URL(), requestTo(nil, "hold", "")))
	within(t, held, "the handler")
	const windows = 3 // one more than the listener takes
	data := strings.Repeat("x", 60<<10)
	for range windows {
		var sent []<-chan error
		for range inFlightBytes / (60 << 10) {
			sent = append(sent, sendWithin(ul.URL(), requestTo(h.URL(), "task", data), 100*time.Millisecond))
		}
		for _, result := range sent {
			require.ErrorIs(t, within(t, result, "the time-out"), os.ErrDeadlineExceeded)
		}
	}
	close(release)
	for range 2 * inFlightBytes / (60 << 10) / 2 {
		require.NoError(t, within(t, replied, "a reply"))
	}
	within(t, async(func() { ul.Stop(time.Nanosecond) }), "Stop") // hazard: it waited for the reader
}

// Hazard: an end that reads nothing while its answers are not read waits for ever
// for another that does the same.
func TestSessionBoth_LargeRefusalsBothWaysEnd(t *testing.T) {
	for size, callers := range map[int]int{acomm.MaxMessage: 34, 17 * acomm.MaxMessage: 4} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			refusal := strings.Repeat("y", size)
			refuse := func(conn net.Conn) { _ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)}) }
			h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]handling{
				"refuse": func(conn net.Conn, _ note) { refuse(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"refuse": refuse})
			carryBoth(t, r, h.URL())
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

// One end serves one message after the other, and sends to the other end in between;
// there is more to be sent than may be under way.
func TestSessionBoth_ServingOneByOneEndsWithFullWindows(t *testing.T) {
	for _, slow := range []string{"requests", "responses"} {
		t.Run(slow, func(t *testing.T) {
			const callers = inFlightBytes/(60<<10) + 8
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
			carryBoth(t, &responder{UnixListener: r, replied: replied}, h.URL())
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
func TestSessionBoth_AcknowledgementsWaitForNoHandler(t *testing.T) {
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
			h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, map[string]handling{
				"hold": func(conn net.Conn, _ note) { hold(conn) },
			})
			r := startResponder(t, replyNote, map[string]func(net.Conn){"hold": hold})
			defer returned.open() // before the stops
			carryBoth(t, r, h.URL())
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

// Hazard: a process that takes nothing, and goes on living, kept a connection open
// that nothing could be written to, and those who waited for answers on it.
func TestSessionBoth_TakingNothingEndsTheConnection(t *testing.T) {
	const limit = 200 * time.Millisecond
	setWriteTimeout(t, limit)
	refusal := strings.Repeat("y", 1<<20) // more than a socket holds
	b := newRawB(t, map[string]handling{"large": func(conn net.Conn, _ note) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(refusal)})
	}})
	defer b.s.Stop(0) // before the limit is what it was
	b.target(t)
	first := sendAsync(b.l.addr, note{ID: 1})
	b.l.message(b.x)
	writeMessage(t, b.x, 1, `{"how":"large"}`)
	require.ErrorIs(t, within(t, first, "the message that was read"), io.ErrUnexpectedEOF)
	await(t, "the connection to be gone", func() bool { return !acomm.SessionTo(b.l.addr.Path).Known })
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
