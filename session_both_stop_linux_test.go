package acomm_test

import (
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Stop of a listener whose sessions carry messages both ways.

func TestSessionBoth_ListenerThatStopsSaysSoOnTheSessionThatCarries(t *testing.T) {
	hold, release := holdThenAccept()
	defer release() // before the stop
	b := newRawB(t, map[string]handling{"hold": hold})
	b.target(t)
	writeMessage(t, b.x, 1, `{"id":1,"how":"hold"}`)
	await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
	stopped := async(func() { b.s.Stop(0) })
	requireFrame(t, b.x, frameStop, 1)
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

func TestSessionBoth_ListenerOutOfTimeSaysWhatWasHandedOut(t *testing.T) {
	l, ul := newRawListener(t), startListener(t, filepath.Join(shortDir(t), "a.sock"), 0)
	b := &rawB{l: l, x: l.openWith(greaterToken), y: openRawWith(t, ul.Addr(), greaterToken)}
	await(t, "the session", func() bool { return acomm.SessionTo(ul.Addr()).Accepted == 1 })
	first := async(func() { serveOne(ul) })
	b.settle(t, b.y, 1)
	within(t, first, "the first exchange")
	b.l.write(b.x, targetFrame(fileAt(t, ul.Addr())))
	var messages []byte
	for n := range uint32(3) {
		messages = append(messages, rawFrame(frameMessage, 2, n+1, "{}")...)
	}
	b.l.write(b.x, messages)
	take(t, ul) // and nobody the others
	stopped := async(func() { ul.Stop(moment) })
	kind, read, _, err := readFrame(b.x) // with the last one that it has read
	require.NoError(t, err)
	require.EqualValues(t, frameStop, kind)
	requireFrame(t, b.x, frameStop, 1)
	require.EqualValues(t, 3, read)
	require.Empty(t, requireFrame(t, b.x, frameAnswer, 1), "nobody will answer it")
	within(t, stopped, "Stop")
	b.requireBackward(t)
}

func TestSessionBoth_StoppedMessagesGoElsewhereOnce(t *testing.T) {
	a := newRawA(t)
	a.target(t)
	const number, served = 6, 2
	results := make(chan error, number)
	for i := range number {
		go func() { results <- acomm.Send(a.l.addr, note{ID: i}) }()
	}
	handled := make(map[int]int)
	for n := range uint32(number) {
		var message note
		require.NoError(t, json.Unmarshal([]byte(requireFrame(t, a.x, frameMessage, n+1)), &message))
		if n < served {
			handled[message.ID]++
		}
	}
	a.l.write(a.x, rawFrame(frameStop, 0, served, ""))
	onY := uint32(1)
	serveOnY := func() (n note) {
		onY++
		require.NoError(t, json.Unmarshal([]byte(requireFrame(t, a.y, frameMessage, onY)), &n))
		acceptMessage(t, a.y, onY)
		return n
	}
	for range number - served {
		handled[serveOnY().ID]++
		require.NoError(t, within(t, results, "those sent again"))
	}
	require.Empty(t, results, "the others wait")
	later := sendAsync(a.l.addr, note{ID: number})
	require.Equal(t, number, serveOnY().ID)
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

// The listener of A stops, under load.
func TestSessionBoth_StopOfTheHookLosesNothing(t *testing.T) {
	processWithSessions(t)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		r := startResponder(t, replyNote, nil) // a new X each time
		carryBoth(t, r, h.URL())
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

// The listener of B stops, under load: what B sends is delivered all the same.
func TestSessionBoth_StopOfTheResponderLosesNothing(t *testing.T) {
	processWithSessions(t)
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 5 {
		var mu sync.Mutex
		served := make(map[string]int) // requests, by their task
		r := startResponder(t, func(req *acomm.Request) error {
			mu.Lock()
			served[req.Task]++
			mu.Unlock()
			return replyNote(req)
		}, nil)
		carryBoth(t, r, h.URL())
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

// Hazard: a listener waited at its stop for what this process sends on the session by
// which its messages came, for as long as there was something.
func TestSessionBoth_StopWaitsForNoCallsOfTheOtherDirection(t *testing.T) {
	b := newRawB(t, nil)
	b.target(t)
	writeMessage(t, b.x, 1, `{"id":7}`)
	requireAccepted(t, b.x, 1)
	require.NoError(t, b.y.Close()) // that session is not what is waited for
	var ended gate
	ctx, end := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	data := strings.Repeat("x", 60_000)
	for range 30 { // more than the peer takes at a time
		sending.Go(func() {
			for ctx.Err() == nil && acomm.Send(b.l.addr, note{Data: data}) == nil {
				continue
			}
		})
	}
	await(t, "a full session", func() bool { return acomm.SessionTo(b.l.addr.Path).InFlight == 30 })
	stopped := async(func() { b.s.Stop(0) })
	seen := make(chan struct{})
	reading := async(func() { // it reads on, and lets them send more
		for {
			kind, number, _, err := readFrame(b.x)
			if err != nil {
				return
			}
			switch kind {
			case frameStop:
				close(seen)
				ended.wait(ctx)
			case frameMessage:
				_, _ = b.x.Write(rawFrame(frameAnswer, uint32(len(accepted)), number, accepted))
			}
		}
	})
	within(t, seen, "the stop to be read")
	within(t, stopped, "Stop, with messages still unread")
	end()
	sending.Wait()
	require.NoError(t, b.x.Close())
	within(t, reading, "the peer")
}

// Hazard: the responses stayed on the connection of a listener that had stopped, and
// kept it, while the requests came by the next one.
func TestSessionBoth_AfterAStopTheNextConnectionCarriesBoth(t *testing.T) {
	h := startNotes(t, filepath.Join(shortDir(t), "h.sock"), 0, nil)
	for range 3 {
		r := startResponder(t, replyNote, nil)
		carryBoth(t, r, h.URL())
		r.Stop(0)
		require.False(t, acomm.SessionTo(h.URL().Path).Carried)
		require.NoError(t, acomm.Send(h.URL(), note{ID: 1}), "another way")
	}
	require.Equal(t, 3, h.handled(1))
}

// Hazard: a listener whose messages came on a session that its process had opened waited
// with its Stop until the peer took what was to be written, up to a minute.
func TestSessionBoth_AStalledPeerDelaysStopByTheGraceOnly(t *testing.T) {
	for name, isOver := range map[string]bool{"calls go on": false, "calls are over": true} {
		t.Run(name, func(t *testing.T) {
			big := strings.Repeat("x", 1<<20)
			b := newRawB(t, map[string]handling{"big": func(conn net.Conn, _ note) {
				_ = acomm.SendConnData(conn, map[string]string{"error": "", "more": big})
			}})
			b.target(t)
			if isOver {
				b.l.write(b.x, rawFrame(frameStop, 0, 0, "")) // A sends nothing more on X
			}
			writeMessage(t, b.x, 1, `{"id":1,"how":"big"}`)
			await(t, "the handler", func() bool { return b.s.handled(1) == 1 })
			within(t, async(func() { b.s.Stop(moment) }), "Stop") // a minute, if it waits for the peer
			require.NoError(t, b.x.Close())
		})
	}
}
