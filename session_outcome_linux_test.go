package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a sender knows when a session ends: what was answered, what may have been read,
// and what goes elsewhere.

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
			require.NoError(t, awaitBytes(conn, 1))
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
		acceptMessage(t, conn, n)
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
		acceptMessage(t, conn, uint32(i+1))
		require.NoError(t, within(t, results, "an answer after the stop"))
	}
	want := make(map[string]int)
	for _, id := range ids[served:] {
		want[id] = 1
	}
	require.Equal(t, want, again)
	requireClosing(t, conn)
}

// Hazard: a listener that says stop and does not close left the sender's
// connection open for ever, beyond the last Stop of the process.
func TestSession_StoppedWithoutAClosedConnectionIsClosed(t *testing.T) {
	l := newRawListener(t)
	conn := l.open()
	sent := sendAsync(l.addr, note{})
	number, _ := l.message(conn)
	acceptMessage(t, conn, number)
	require.NoError(t, within(t, sent, "an exchange"))
	l.write(conn, rawFrame(frameStop, 0, number, ""))
	requireFrame(t, conn, frameStop, 0)
	require.ErrorIs(t, readOne(conn), io.EOF, "it does not wait for ever for the listener to close")
	await(t, "the connection to be forgotten", func() bool { return acomm.SessionTo("").Opened == 0 })
}

// Hazard: the end of a connection that came together with its last bytes was not
// noticed, as the system tells of both at once: who waited for an answer waited on.
func TestSession_EndThatComesWithTheLastAnswerIsSeen(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // nobody reads between the two calls
	l := newRawListener(t)
	for range 10 {
		conn := l.openNext()
		first := sendAsync(l.addr, note{ID: 1})
		l.message(conn)
		second := sendAsync(l.addr, note{ID: 2})
		l.message(conn)
		_, err := conn.Write(rawFrame(frameAnswer, uint32(len(accepted)), 1, accepted))
		closed := conn.Close()
		require.NoError(t, errors.Join(err, closed))
		one, two := within(t, first, "the first"), within(t, second, "the second")
		require.NoError(t, one)
		require.ErrorIs(t, two, io.ErrUnexpectedEOF)
	}
}
