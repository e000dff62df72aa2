package acomm

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The turns that posts to a host take.

// takeTurns takes all turns of a URL's host until the function is called, or the test
// ends.
func takeTurns(t *testing.T, addr *url.URL) (leave func()) {
	t.Helper()
	var leaves []func()
	leave = func() {
		for _, each := range leaves {
			each()
		}
		leaves = nil
	}
	t.Cleanup(leave)
	for range maxPosts {
		each, err := posts.enter(t.Context(), addr)
		require.NoError(t, err)
		leaves = append(leaves, each)
	}
	return leave
}

// hostsPostedTo returns to how many hosts posts are under way.
func hostsPostedTo() int {
	posts.mu.Lock()
	defer posts.mu.Unlock()
	return len(posts.byHost)
}

// Strangers choose hooks: a host has as many turns however it is spelled.
func TestSend_TurnsAreOfAHostHoweverItIsSpelled(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct{ one, other, another string }{
		{"http://Hook.test/a", "http://hook.test.:80/b", "http://hook.test:81/a"},
		{"https://hook.test", "https://hook.test:443/", "https://hook.test:80/"},
		{"http://[::1]/", "http://[::1]:80/", "http://[::2]/"},
		{"http://a:81", "http://A:81", "http://a:82"},
	} {
		t.Run(test.one, func(t *testing.T) {
			var addrs []*url.URL
			for _, text := range []string{test.one, test.other, test.another} {
				addr, err := url.Parse(text)
				require.NoError(t, err)
				addrs = append(addrs, addr)
			}
			leave := takeTurns(t, addrs[0])
			for range 20 { // where there was a turn, it would be taken by chance
				for _, addr := range addrs[:2] {
					_, err := posts.enter(over, addr)
					require.ErrorIs(t, err, context.Canceled, "%s has no turn left", addr)
				}
			}
			leaveAnother, err := posts.enter(t.Context(), addrs[2])
			require.NoError(t, err, "it is another host")
			leaveAnother()
			leave()
			require.Zero(t, hostsPostedTo())
		})
	}
}

// Who waits for a turn is bounded as everybody, and nobody has the payload.
func TestSend_WaitingForATurnEndsInTime(t *testing.T) {
	reached := make(chan struct{}, 1)
	hook := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached <- struct{}{} }))
	defer hook.Close()
	addr, err := url.Parse(hook.URL)
	require.NoError(t, err)
	leave := takeTurns(t, addr)
	err = send(time.Now().Add(20*time.Millisecond), addr, 1)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.True(t, notDelivered(err))
	require.Empty(t, reached)
	leave()
	require.NoError(t, Send(addr, 1))
	require.Len(t, reached, 1)
}

// Hazard: a turn that is not given back is missing for good.
func TestSend_TurnsAreGivenBackWhateverComesOfThePost(t *testing.T) {
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/refused":
			w.WriteHeader(http.StatusTooManyRequests)
		case "/cut":
			panic(http.ErrAbortHandler)
		case "/circle":
			http.Redirect(w, r, "/circle", http.StatusTemporaryRedirect)
		case "/silent":
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		}
	}))
	defer hook.Close()
	nobody := httptest.NewServer(nil)
	nobody.Close()
	sent := make(chan error, 3*maxPosts)
	var failed []error
	for _, text := range []string{hook.URL + "/refused", hook.URL + "/cut", hook.URL + "/circle", hook.URL + "/silent", nobody.URL} {
		addr, err := url.Parse(text)
		require.NoError(t, err)
		failed = append(failed, send(time.Now().Add(200*time.Millisecond), addr, 1))
	}
	addr, err := url.Parse(hook.URL)
	require.NoError(t, err)
	for range cap(sent) {
		go func() { sent <- Send(addr, 1) }()
	}
	for range cap(sent) {
		require.NoError(t, <-sent)
	}
	for _, err := range failed {
		require.Error(t, err)
	}
	require.Zero(t, hostsPostedTo())
}
