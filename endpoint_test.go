package acomm_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Listeners, trackers and sends of the library, as most tests need them.

// startListener returns a started listener. It is stopped with the test.
func startListener(t testing.TB, path string, limit int) *acomm.UnixListener {
	t.Helper()
	ul := acomm.NewUnixListener(path, limit)
	require.NoError(t, ul.Start())
	t.Cleanup(func() { // also after a test that has failed halfway
		stopped := async(func() { ul.Stop(time.Nanosecond) })
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			ul.DoneConn(conn)
		}
		<-stopped
	})
	return ul
}

// take returns the next connection. It is done at the latest with the test.
func take(t testing.TB, ul *acomm.UnixListener) net.Conn {
	t.Helper()
	conns := make(chan net.Conn, 1)
	go func() { conns <- ul.NextConn() }()
	conn := within(t, conns, "a connection")
	require.NotNil(t, conn)
	t.Cleanup(func() { ul.DoneConn(conn) })
	return conn
}

// exchange sends something to the URL, where the listener has to receive it.
func exchange(ul *acomm.UnixListener, addr *url.URL) error {
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(addr, "payload") }()
	received := make(chan error, 1)
	go func() {
		conn := ul.NextConn()
		if conn == nil {
			received <- net.ErrClosed
			return
		}
		defer ul.DoneConn(conn)
		var payload string
		if err := acomm.UnmarshalConnData(conn, &payload); err != nil || payload != "payload" {
			received <- fmt.Errorf("received %q: %w", payload, err)
			return
		}
		received <- acomm.SendConnData(conn, &acomm.Response{})
	}()
	select {
	case err := <-sent:
		if err != nil {
			return err // the receiver ends with the listener
		}
	case <-time.After(patience):
		return errors.New("nothing came of sending")
	}
	return <-received
}

// newTracker returns a started tracker on a socket of its own; it is stopped
// with the test.
func newTracker(t testing.TB) *acomm.Tracker {
	t.Helper()
	return newStreamTracker(t, nil)
}

// newStreamTracker returns a started tracker with a stream URL.
func newStreamTracker(t testing.TB, streamURL *url.URL) *acomm.Tracker {
	t.Helper()
	tracker, err := acomm.NewTracker("", streamURL, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	return tracker
}

// newRequest returns a request with a hook; both handlers send to the channel.
func newRequest(t testing.TB, hook *url.URL, args any) (*acomm.Request, <-chan *acomm.Response) {
	t.Helper()
	responses := make(chan *acomm.Response, 100)
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest("test", hook.String(), args, handle, handle)
	require.NoError(t, err)
	return req, responses
}

// answerTo returns a response to the request.
func answerTo(t testing.TB, req *acomm.Request, result any, err error) *acomm.Response {
	t.Helper()
	resp, newErr := acomm.NewResponse(req, result, nil, err)
	require.NoError(t, newErr)
	return resp
}

// requireWorking fails unless a response on the socket reaches its handler. As
// connections are taken in their order, all earlier ones have been then.
func requireWorking(t testing.TB, tracker *acomm.Tracker) {
	t.Helper()
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	require.NoError(t, req.Respond(answerTo(t, req, "works", nil)))
	resp := within(t, responses, "the response")
	require.NoError(t, resp.Error)
	require.JSONEq(t, `"works"`, string(*resp.Result))
}

func unixURL(path string) *url.URL { return &url.URL{Scheme: "unix", Path: path} }

// sendSoon sends with less patience than a minute.
func sendSoon(addr *url.URL, payload any, d time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return acomm.SendContext(ctx, addr, payload)
}

// sendWithin is sendSoon from a goroutine; zero is patience.
func sendWithin(addr *url.URL, payload any, d time.Duration) <-chan error {
	sent := make(chan error, 1)
	go func() { sent <- sendSoon(addr, payload, cmp.Or(d, patience)) }()
	return sent
}

// sendAtOnce sends a number of payloads at the same time, and waits until all are
// acknowledged.
func sendAtOnce(t testing.TB, addr *url.URL, number int, payload func(i int) any) {
	t.Helper()
	errs := make(chan error, number)
	for i := range number {
		go func() { errs <- acomm.Send(addr, payload(i)) }()
	}
	for range number {
		require.NoError(t, within(t, errs, "an acknowledgement"))
	}
}

// sendAsync sends from a goroutine.
func sendAsync(addr *url.URL, payload any) <-chan error {
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(addr, payload) }()
	return sent
}

// requireSilent fails if the channel has anything.
func requireSilent(t testing.TB, responses <-chan *acomm.Response) {
	t.Helper()
	select {
	case resp := <-responses:
		require.FailNow(t, "handled", "%+v", resp)
	default:
	}
}

// inBubble runs f where synctest.Wait returns when Responses waits. The tracker's
// socket is made outside: a bubble can't wait for it.
func inBubble(t *testing.T, f func(*testing.T, *acomm.Tracker)) {
	tracker := newTracker(t)
	synctest.Test(t, func(t *testing.T) {
		defer tracker.Stop()
		f(t, tracker)
	})
}
