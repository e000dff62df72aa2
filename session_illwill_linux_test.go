package acomm_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Peers that keep to nothing: who is on other sessions, or sends elsewhere, is not harmed.

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
		require.Empty(t, requireFrame(t, conn, frameCancel, 1))
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
		require.Equal(t, map[uint32]string{1: accepted2016(t), 2: "", 3: ""}, answers)
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

// Hazard: where a write had failed, the session stayed until the peer closed: for ever.
func TestSession_PeerThatNeitherReadsNorClosesKeepsNoSession(t *testing.T) {
	setIdleTimeout(t, 50*time.Millisecond)
	l := newRawListener(t)
	x := l.open()
	require.NoError(t, x.(*net.UnixConn).CloseRead())
	sent := sendAsync(l.addr, note{ID: 2}) // its write fails
	l.serveAlone()
	require.NoError(t, within(t, sent, "the message on a connection of its own"))
	await(t, "the end of the session", func() bool { return acomm.SessionTo("").Opened == 0 })
}
