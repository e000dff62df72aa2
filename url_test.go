package acomm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Which paths and URLs lead where, and that those that can't work are refused.

// oddNames are file names of which url.Parse takes a part for something else.
var oddNames = []string{
	"a?b.sock", "a%41.sock", "a#b.sock", "a b.sock", "a%3Fb?c%41#d.sock", "ä?.sock", "a?", "a%20b.sock", "ä%C3%A4.sock",
	"a b?c.sock", "a#b c.sock", "a?b?", "a?b=%41&c#%41", "a+b?.sock",
}

// Services have always written "unix://" + path.
func TestSend_PathsBehindUnixSlashSlashAreFound(t *testing.T) {
	for _, name := range oddNames {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			path := filepath.Join(dir, name)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), nil, 0o600), "a file is no socket")
			tracker, err := acomm.NewTracker(path, nil, patience)
			require.NoError(t, err)
			require.NoError(t, tracker.Start())
			t.Cleanup(tracker.Stop)

			addr, err := url.Parse("unix://" + path)
			require.NoError(t, err)
			req, handled := newRequest(t, tracker.URL(), nil)
			require.NoError(t, tracker.TrackRequest(req, patience))
			require.NoError(t, acomm.Send(addr, answerTo(t, req, 1, nil)))
			within(t, handled, "the response, sent to what was parsed")

			// As a hook, and over the wire.
			hooked, err := acomm.NewRequest("task", "unix://"+path, nil, nil, nil)
			require.NoError(t, err)
			data, err := json.Marshal(hooked)
			require.NoError(t, err)
			received := &acomm.Request{}
			require.NoError(t, json.Unmarshal(data, received))
			req, handled = newRequest(t, tracker.URL(), nil)
			require.NoError(t, tracker.TrackRequest(req, patience))
			require.NoError(t, received.Respond(answerTo(t, req, 1, nil)))
			within(t, handled, "the response, sent to the hook")
		})
	}
}

func TestStream_PathsBehindUnixSlashSlashAreFound(t *testing.T) {
	tracker, _ := streamProxy(t)
	direct := func(addr *url.URL) (*url.URL, error) { return addr, nil }
	for _, name := range oddNames {
		t.Run(name, func(t *testing.T) {
			for what, read := range map[string]func(*url.URL) (*url.URL, error){"direct": direct, "published": tracker.ProxyStreamHTTPURL} {
				dir := filepath.Join(shortDir(t), name)
				require.NoError(t, os.Mkdir(dir, 0o700))
				made, err := tracker.NewStreamUnix(dir, bytesSource([]byte("the data")))
				require.NoError(t, err)
				addr, err := url.Parse("unix://" + made.Path)
				require.NoError(t, err)
				addr, err = read(addr)
				require.NoError(t, err, what)
				var got bytes.Buffer
				require.NoError(t, acomm.Stream(&got, addr), what)
				require.Equal(t, "the data", got.String(), what)
			}
		})
	}
}

// Hazard: a service that looks at the Path of a hook allows one that leads elsewhere
// by its RawPath.
func TestSend_RawPathOfAnotherPathLeadsNowhere(t *testing.T) {
	dir := shortDir(t)
	other := startListener(t, filepath.Join(dir, "other.sock"), 0)
	for _, raw := range []string{other.Addr(), strings.Replace(other.Addr(), "other", "o%74her", 1)} {
		hook := &url.URL{Scheme: "unix", Path: filepath.Join(dir, "allowed.sock"), RawPath: raw}
		require.ErrorIs(t, sendSoon(hook, 1, patience), fs.ErrNotExist)
		require.ErrorIs(t, acomm.Stream(io.Discard, hook), fs.ErrNotExist)
	}
}

// Hazard: the handler looks at one path and opens another.
func TestProxyStreamHandler_OpensThePathItHasLookedAt(t *testing.T) {
	dir := shortDir(t)
	tracker := newStreamTracker(t, &url.URL{Scheme: "http", Host: "localhost", Path: "/stream"})
	published, err := tracker.ProxyStreamHTTPURL(unixURL(filepath.Join(dir, "a%41")))
	require.NoError(t, err)
	other := acomm.NewUnixListener(filepath.Join(dir, "a%2541"), 0) // is the text of that URL
	require.NoError(t, other.Start())
	t.Cleanup(func() { other.Stop(0) })
	go func() {
		for conn := other.NextConn(); conn != nil; conn = other.NextConn() {
			other.DoneConn(conn)
		}
	}()
	answer := httptest.NewRecorder()
	acomm.ProxyStreamHandler(answer, httptest.NewRequest(http.MethodGet, published.String(), nil))
	require.Equal(t, http.StatusNotFound, answer.Code)
}

// Hazard: the text behind the question mark leads away from the socket that is meant.
func TestSend_PathOfTheURLComesFirst(t *testing.T) {
	dir := shortDir(t)
	meant := startListener(t, filepath.Join(dir, "a"), 0)
	other := startListener(t, filepath.Join(dir, "a?b"), 0)
	addr, err := url.Parse("unix://" + filepath.Join(dir, "a?b"))
	require.NoError(t, err)
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(addr, &acomm.Response{ID: "1"}) }()
	go serveOne(meant)
	require.NoError(t, within(t, sent, "Send"))
	other.Stop(0)
}

// Hazard: what is no hook, because it depends on the process's directory, is still an
// address that a process may send to.
func TestSend_RelativePathIsTakenFromTheDirectoryOfNow(t *testing.T) {
	dir := shortDir(t)
	ul := startListener(t, filepath.Join(dir, "a.sock"), 0)
	t.Chdir(dir)
	require.NoError(t, exchange(ul, unixURL("a.sock")))
}

// JSON would change it: the response would go to another id, or another path.
func TestNotUTF8_IsRefused(t *testing.T) {
	hook := unixURL("/run/a.sock")
	bad := "job-\xff"
	listener := startListener(t, "", 0)
	tracker := newTracker(t)
	for name, req := range map[string]*acomm.Request{
		"id":         {ID: bad, Task: "task", ResponseHook: hook},
		"task":       {ID: "1", Task: bad, ResponseHook: hook},
		"hook":       {ID: "1", Task: "task", ResponseHook: unixURL("/run/caf\xe9.sock")},
		"HTTP hook":  {ID: "1", Task: "task", ResponseHook: &url.URL{Scheme: "http", Host: "localhost", Path: "/caf\xe9"}},
		"hook query": {ID: "1", Task: "task", ResponseHook: &url.URL{Scheme: "http", Host: "localhost", RawQuery: "a=\xe9"}},
	} {
		t.Run(name, func(t *testing.T) {
			require.ErrorIs(t, req.Validate(), fs.ErrInvalid)
			require.ErrorIs(t, tracker.TrackRequest(req, patience), fs.ErrInvalid)
			require.ErrorIs(t, second(tracker.ProxyUnix(req, patience)), fs.ErrInvalid)
			require.ErrorIs(t, acomm.NewMultiRequest(tracker, patience).AddRequest("a", req), fs.ErrInvalid)
			require.ErrorIs(t, acomm.Send(listener.URL(), req), fs.ErrInvalid)
			require.ErrorIs(t, acomm.Send(listener.URL(), *req), fs.ErrInvalid, "by value")
			require.Zero(t, tracker.NumRequests())
		})
	}
	for name, resp := range map[string]*acomm.Response{
		"response id": {ID: bad},
		"stream URL":  {ID: "1", StreamURL: unixURL("/run/caf\xe9.sock")},
	} {
		require.ErrorIs(t, acomm.Send(listener.URL(), resp), fs.ErrInvalid, name)
		require.ErrorIs(t, acomm.Send(listener.URL(), *resp), fs.ErrInvalid, name)
	}
	require.ErrorIs(t, second(acomm.NewRequest(bad, hook.String(), nil, nil, nil)), fs.ErrInvalid)
	require.ErrorIs(t, second(acomm.NewRequest("task", "unix:///run/caf%E9.sock", nil, nil, nil)), fs.ErrInvalid)
	require.ErrorIs(t, second(acomm.NewTracker(filepath.Join(shortDir(t), "caf\xe9.sock"), nil, patience)), fs.ErrInvalid)
	require.ErrorIs(t, second(tracker.NewStreamUnix(filepath.Join(shortDir(t), "caf\xe9"), bytesSource(nil))), fs.ErrInvalid)
}

// Hazard: what is taken for a host, or not for a path at all, is found out when the
// response is late by a minute.
func TestUnixHook_IsAnAbsolutePathAndNothingElse(t *testing.T) {
	tracker := newTracker(t)
	for _, hook := range []string{"unix://tmp/r.sock", "unix:tmp/r.sock", "unix://localhost/tmp/r.sock"} {
		err := second(acomm.NewRequest("task", hook, nil, nil, nil))
		require.ErrorIs(t, err, fs.ErrInvalid, hook)
		require.ErrorContains(t, err, "unix:///run/a.sock", "how it is written")
		addr, err := url.Parse(hook)
		require.NoError(t, err)
		req := &acomm.Request{ID: "1", Task: "task", ResponseHook: addr}
		require.ErrorIs(t, req.Validate(), fs.ErrInvalid)
		require.ErrorIs(t, tracker.TrackRequest(req, patience), fs.ErrInvalid)
		require.ErrorIs(t, acomm.Send(tracker.URL(), req), fs.ErrInvalid)
		require.ErrorIs(t, acomm.Send(addr, &acomm.Response{ID: "1"}), fs.ErrInvalid)
		require.ErrorIs(t, acomm.Stream(&bytes.Buffer{}, addr), fs.ErrInvalid)
	}
	req := &acomm.Request{ID: "1", Task: "task", ResponseHook: unixURL("r.sock")}
	require.ErrorIs(t, req.Validate(), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Send(tracker.URL(), req), fs.ErrInvalid)
	require.ErrorIs(t, req.Respond(&acomm.Response{ID: "1"}), fs.ErrInvalid, "it would be taken from the provider's directory")
}

// Hazard: base.JoinPath of a base without a path makes a URL whose path lacks its
// slash; its text looks right, and requests are answered with 400.
func TestURLWithoutASlash_IsRequestedAsItsTextSays(t *testing.T) {
	requests := make(chan string, 10)
	peer := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) { requests <- r.RequestURI })
	base := &url.URL{Scheme: "http", Host: peer.Host}
	for _, joined := range []*url.URL{
		base,
		base.JoinPath("stream"),
		base.JoinPath("a b", "ü%2F"),
		base.JoinPath("%2Fstream"), // whose Path has a slash, the escaped one
	} {
		plain, err := http.NewRequestWithContext(context.Background(), http.MethodGet, joined.String(), nil)
		require.NoError(t, err)
		given := *joined

		require.NoError(t, acomm.Send(joined, &acomm.Response{ID: "1"}))
		require.Equal(t, plain.URL.RequestURI(), <-requests)
		require.NoError(t, acomm.Stream(io.Discard, joined))
		require.Equal(t, plain.URL.RequestURI(), <-requests)

		tracker, err := acomm.NewTracker("", joined, 0)
		require.NoError(t, err)
		published, err := tracker.ProxyStreamHTTPURL(unixURL("/a"))
		require.NoError(t, err)
		again, err := url.Parse(published.String())
		require.NoError(t, err)
		require.Equal(t, again.RequestURI(), published.RequestURI())
		require.Equal(t, given, *joined, "it stays the caller's")
	}
}

// The URL of a stream is what gives access to it, and a hook's may hold a token.
func TestRedirects_CarryNoReferer(t *testing.T) {
	referers := make(chan string, 10)
	last := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		referers <- r.Header.Get("Referer")
		if r.URL.Path == "/on" {
			http.Redirect(w, r, "/end?token=SECOND", http.StatusTemporaryRedirect)
		}
	}))
	t.Cleanup(last.Close)
	for _, status := range []int{http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect} {
		first := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, last.URL+"/on", status)
		})
		first.RawQuery = "addr=x&signature=SECRET"
		require.NoError(t, acomm.Stream(io.Discard, first))
		require.Empty(t, <-referers)
		require.Empty(t, <-referers)
		if status == http.StatusFound {
			continue // it would lose a payload
		}
		require.NoError(t, acomm.Send(first, &acomm.Response{ID: "1"}))
		require.Empty(t, <-referers)
		require.Empty(t, <-referers)
	}
}
