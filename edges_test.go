package acomm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mistifyio/acomm"
)

// What services of 2016 and public bug reports have taught at the edges: which
// paths, ids and values work, and that those that can't are refused.

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
	coordinator := httptest.NewServer(http.HandlerFunc(acomm.ProxyStreamHandler))
	defer coordinator.Close()
	base, err := url.Parse(coordinator.URL + "/stream")
	require.NoError(t, err)
	tracker, err := acomm.NewTracker("", base, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
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
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		require.ErrorIs(t, acomm.SendContext(ctx, hook, 1), fs.ErrNotExist)
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
	conn := take(t, meant)
	require.NoError(t, acomm.UnmarshalConnData(conn, &acomm.Response{}))
	require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
	meant.DoneConn(conn)
	require.NoError(t, within(t, sent, "Send"))
	other.Stop(0)
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
	req := &acomm.Request{ID: "1", Task: "task", ResponseHook: &url.URL{Scheme: "unix", Path: "r.sock"}}
	require.ErrorIs(t, req.Validate(), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Send(tracker.URL(), req), fs.ErrInvalid)
	require.ErrorIs(t, req.Respond(&acomm.Response{ID: "1"}), fs.ErrInvalid, "it would be taken from the provider's directory")
}

// Hazard: what is no hook, because it depends on the process's directory, is still an
// address that a process may send to.
func TestSend_RelativePathIsTakenFromTheDirectoryOfNow(t *testing.T) {
	dir := shortDir(t)
	ul := startListener(t, filepath.Join(dir, "a.sock"), 0)
	t.Chdir(dir)
	require.NoError(t, exchange(ul, unixURL("a.sock")))
}

// Hazard: the peer's decoder allows 10,000 levels, of which the envelope is one.
func TestSend_RefusesWhatIsNestedTooDeepToRead(t *testing.T) {
	hook := unixURL("/run/a.sock")
	nested := func(open, inner, end string, depth int) *json.RawMessage {
		raw := json.RawMessage(strings.Repeat(open, depth) + inner + strings.Repeat(end, depth))
		return &raw
	}
	ul := startListener(t, "", 0)
	go serveAll(ul)
	for depth, ok := range map[int]bool{9_999: true, 10_000: false, 10_001: false, 50_000: false} {
		for _, raw := range []*json.RawMessage{
			nested("[", "", "]", depth), nested(`{"a":`, "1", "}", depth), nested(" [", "", "]", depth), nested("[", `"<"`, "]", depth),
		} {
			for _, payload := range []any{
				&acomm.Request{ID: "1", Task: "task", ResponseHook: hook, Args: raw},
				&acomm.Response{ID: "1", Result: raw},
				acomm.Response{ID: "1", Result: raw},
				acomm.Request{ID: "1", Task: "task", ResponseHook: hook, Args: raw},
			} {
				err := acomm.Send(ul.URL(), payload)
				if ok {
					require.NoError(t, err, "%d levels", depth)
					continue
				}
				require.ErrorIs(t, err, fs.ErrInvalid, "%d levels", depth)
				require.ErrorContains(t, err, "levels deep")
			}
		}
	}
	var other any
	for range 10_001 { // no envelope takes a level here
		other = []any{other}
	}
	require.Error(t, acomm.Send(ul.URL(), other))
}

// Hazard: a loop on NextConn that begins before Start is over at once, and nobody
// serves.
func TestUnixListener_NextConnWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	require.NoError(t, ul.Start())
	require.NoError(t, acomm.Send(ul.URL(), &acomm.Response{ID: "1"}))
	ul.Stop(0)
	within(t, served, "the loop, after Stop")
	require.Nil(t, ul.NextConn(), "after Stop")
}

func TestUnixListener_StopReleasesWhoWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	ul.Stop(0)
	within(t, served, "the loop, after a Stop without a Start")
}

// wrapped is a connection with something around it, which counts its calls.
type wrapped struct {
	net.Conn
	reads, writes, closes *counter
}

func wrap(conn net.Conn) wrapped { return wrapped{conn, &counter{}, &counter{}, &counter{}} }

func (w wrapped) NetConn() net.Conn { return w.Conn }

func (w wrapped) Read(p []byte) (int, error) {
	w.reads.add()
	return w.Conn.Read(p)
}

func (w wrapped) Write(p []byte) (int, error) {
	w.writes.add()
	return w.Conn.Write(p)
}

func (w wrapped) Close() error {
	w.closes.add()
	return w.Conn.Close()
}

// wrapsItself is what DoneConn must not follow for ever.
type wrapsItself struct{ net.Conn }

func (w wrapsItself) NetConn() net.Conn { return w }

// Hazard: the connection stays open, and Stop waits for it for ever.
func TestUnixListener_DoneConnCompletesWhatAWrapperWraps(t *testing.T) {
	for name, senders := range map[string]func(*acomm.UnixListener){
		"a connection of its own": func(ul *acomm.UnixListener) {
			conn, err := net.Dial("unix", ul.Addr())
			require.NoError(t, err)
			t.Cleanup(func() { _ = conn.Close() })
		},
		"a sender of this library": func(ul *acomm.UnixListener) {
			go func() { _ = acomm.Send(ul.URL(), &acomm.Response{ID: "1"}) }()
		},
	} {
		t.Run(name, func(t *testing.T) {
			ul, other := startListener(t, "", 0), startListener(t, "", 0)
			senders(ul)
			conn := take(t, ul)
			ul.DoneConn(wrapsItself{conn})
			ul.DoneConn(wrap(nil))
			other.DoneConn(wrap(conn))
			require.NoError(t, stillOpen(conn))
			outer := wrap(wrap(conn))
			ul.DoneConn(outer)
			ul.DoneConn(outer)
			require.ErrorIs(t, stillOpen(conn), net.ErrClosed)
			require.Equal(t, 1, outer.closes.load(), "as in 2016: it may have something to write yet")
			within(t, async(func() { ul.Stop(0) }), "Stop")
		})
	}
}

// What the migration notes say of services that were written on the library of 2016.
func TestMigrationNotes_MayNeedAChange(t *testing.T) {
	text := strings.Join(strings.Fields(document(t, "CHANGELOG.md")), " ")
	_, text, _ = strings.Cut(text, "### What may need a change in a service")
	notes, _, _ := strings.Cut(text, "###")
	for note, check := range map[string]func(*testing.T){
		"Returned errors are wrapped":                           returnedErrorsAreWrapped,
		"Settings of `http.DefaultClient` itself are not used":  defaultClientIsNotUsed,
		"`MultiRequest.AddRequest` refuses a name that is used": namesAreUsedOnce,
		"handlers that are set after it don't run":              handlersSetAfterAddRequestDoNotRun,
		"A failed acknowledgement is returned by `Send`":        failedAcknowledgementIsReturned,
	} {
		t.Run(note, func(t *testing.T) {
			require.True(t, strings.Contains(notes, note), "the note is missing")
			check(t)
		})
	}
}

func returnedErrorsAreWrapped(t *testing.T) {
	near, far := connPair(t)
	require.NoError(t, near.SetReadDeadline(time.Unix(1, 0)))
	err := acomm.UnmarshalConnData(near, new(any))
	require.NotImplements(t, (*net.Error)(nil), err)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout())

	require.NoError(t, far.Close())
	require.NoError(t, near.SetReadDeadline(time.Time{}))
	err = acomm.UnmarshalConnData(near, new(any))
	require.NotEqual(t, io.EOF, err)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)

	err = acomm.Send(unixURL(filepath.Join(shortDir(t), "none.sock")), 1)
	require.False(t, os.IsNotExist(err))
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// refusingTransport answers every request with an error.
type refusingTransport struct{}

func (refusingTransport) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, fs.ErrPermission
}

func defaultClientIsNotUsed(t *testing.T) {
	hooks := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer hooks.Close()
	hook, err := url.Parse(hooks.URL)
	require.NoError(t, err)
	client, transport := *http.DefaultClient, http.DefaultTransport
	defer func() { *http.DefaultClient, http.DefaultTransport = client, transport }()
	*http.DefaultClient = http.Client{Transport: refusingTransport{}, Timeout: time.Nanosecond}
	require.NoError(t, acomm.Send(hook, 1))
	http.DefaultTransport = refusingTransport{}
	require.ErrorIs(t, acomm.Send(hook, 1), fs.ErrPermission)
}

func namesAreUsedOnce(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "a")
	other, _ := newRequest(t, tracker.URL(), nil)
	require.ErrorIs(t, multi.AddRequest("a", other), fs.ErrExist)
	multi.RemoveRequest(req)
}

func handlersSetAfterAddRequestDoNotRun(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "a")
	req.SuccessHandler = func(*acomm.Request, *acomm.Response) { t.Error("the handler runs") }
	tracker.HandleResponse(answerTo(t, req, 1, nil))
	require.Contains(t, allResponses(t, multi), "a")
}

func failedAcknowledgementIsReturned(t *testing.T) {
	log := captureLog(t)
	ul := startListener(t, "", 0)
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(ul.URL(), 1) }()
	conn := take(t, ul)
	require.NoError(t, acomm.UnmarshalConnData(conn, new(any)))
	ul.DoneConn(conn)
	require.ErrorIs(t, within(t, sent, "Send"), io.ErrUnexpectedEOF)
	require.Error(t, acomm.SendConnData(conn, &acomm.Response{}))
	require.Empty(t, log.String())
}
