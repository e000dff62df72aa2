package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestSend_UnixDeliversAndIsAcknowledged(t *testing.T) {
	got := make(chan acomm.Request, 1)
	peer := unixPeer(t, func(conn net.Conn) {
		var req acomm.Request
		if acomm.UnmarshalConnData(conn, &req) == nil {
			got <- req
			_ = acomm.SendConnData(conn, &acomm.Response{ID: req.ID})
		}
	})
	req, _ := newRequest(t, peer, "args")
	require.NoError(t, acomm.Send(peer, req))
	require.Equal(t, req.ID, within(t, got, "the request").ID)
}

func TestSend_RefusalKeepsItsText(t *testing.T) {
	const text = "no providers available for task"
	byUnix := unixPeer(t, func(conn net.Conn) {
		var req acomm.Request
		_ = acomm.UnmarshalConnData(conn, &req)
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(text)})
	})
	byHTTP := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"error":%q}`, text)
	})
	require.EqualError(t, acomm.Send(byUnix, "x"), text)
	require.EqualError(t, acomm.Send(byHTTP, "x"), text)
}

// Hazard: a peer that refuses a large frame before reading it breaks the pipe
// under our write; its word must not be lost in that.
func TestSend_EarlyRefusalIsHeard(t *testing.T) {
	peer := unixPeer(t, func(conn net.Conn) {
		_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New("too much")})
	})
	require.EqualError(t, acomm.Send(peer, strings.Repeat("x", 4<<20)), "too much")
}

// TestSend_ErrorsMatchTheirSentinel has a row for each failure of a Send that
// the documentation names.
func TestSend_ErrorsMatchTheirSentinel(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	leaveDeadSocket(t, dead)
	free, _ := unboundPort(t)
	silence := make(chan struct{})
	defer close(silence) // before the peers are waited for
	silent := func(conn net.Conn) { <-silence }
	long := filepath.Join(dir, strings.Repeat("x", acomm.MaxPath))
	closing := func(conn net.Conn) { _ = acomm.UnmarshalConnData(conn, new(any)) }

	for name, row := range map[string]struct {
		addr    *url.URL
		payload any
		want    error
	}{
		"nil URL":              {nil, 1, fs.ErrInvalid},
		"nil payload":          {unixURL(dead), nil, fs.ErrInvalid},
		"empty path":           {unixURL(""), 1, fs.ErrInvalid},
		"NUL in the path":      {unixURL(dead + "\x00"), 1, fs.ErrInvalid},
		"abstract socket":      {unixURL("@dead"), 1, fs.ErrInvalid},
		"unknown scheme":       {&url.URL{Scheme: "gopher", Host: "h"}, 1, errors.ErrUnsupported},
		"no scheme":            {&url.URL{Path: dead}, 1, errors.ErrUnsupported},
		"no such socket":       {unixURL(filepath.Join(dir, "none")), 1, fs.ErrNotExist},
		"nobody listens":       {unixURL(dead), 1, syscall.ECONNREFUSED},
		"nobody listens, tcp":  {&url.URL{Scheme: "http", Host: free}, 1, syscall.ECONNREFUSED},
		"path too long":        {unixURL(long), 1, syscall.ENAMETOOLONG},
		"payload too large":    {unixURL(dead), make([]byte, acomm.MaxPayload/4*3), syscall.EMSGSIZE},
		"closed without ack":   {unixPeer(t, closing), 1, io.ErrUnexpectedEOF},
		"closed while writing": {unixPeer(t, func(net.Conn) {}), make([]byte, 4<<20), io.ErrUnexpectedEOF},
		"half an ack":          {unixPeer(t, func(c net.Conn) { closing(c); _, _ = c.Write(plainFrame("{}")[:5]) }), 1, io.ErrUnexpectedEOF},
		"ack too large":        {unixPeer(t, func(c net.Conn) { closing(c); _, _ = c.Write([]byte("\xff\xff\xff\xff")) }), 1, syscall.EMSGSIZE},
		"hung up, http":        {httpPeer(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), 1, io.ErrUnexpectedEOF},
		"answer cut off, http": {httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "9")
			_, _ = w.Write([]byte("{"))
		}), 1, io.ErrUnexpectedEOF},
		"answer too large":   {httpPeer(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, acomm.MaxAnswer+1)) }), 1, syscall.EMSGSIZE},
		"no acknowledgement": {unixPeer(t, silent), 1, os.ErrDeadlineExceeded},
		"never read":         {unixPeer(t, silent), make([]byte, 4<<20), os.ErrDeadlineExceeded},
		"no answer, http":    {httpPeer(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body); <-r.Context().Done() }), 1, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			timeout := patience
			if row.want == os.ErrDeadlineExceeded {
				timeout = 50 * time.Millisecond
			}
			err := sendSoon(row.addr, row.payload, timeout)
			require.ErrorIs(t, err, row.want)
			if row.want == syscall.ENAMETOOLONG {
				require.ErrorContains(t, err, long)
				require.ErrorContains(t, err, fmt.Sprint(len(long)))
				require.ErrorContains(t, err, fmt.Sprint(acomm.MaxPath))
			}
		})
	}
}

// Hazard: a silent peer blocked Send for ever.
func TestSend_IsBoundedByAMinute(t *testing.T) {
	deadlines := make(chan time.Time, 1)
	replaceTransport(t, roundTripper(func(r *http.Request) (*http.Response, error) {
		deadline, _ := r.Context().Deadline()
		deadlines <- deadline
		return nil, fs.ErrClosed
	}))
	before := time.Now()
	require.ErrorIs(t, acomm.Send(&url.URL{Scheme: "http", Host: "h"}, 1), fs.ErrClosed)
	deadline := within(t, deadlines, "the request")
	require.Equal(t, time.Minute, acomm.SendTimeout)
	require.WithinRange(t, deadline, before.Add(time.Minute), time.Now().Add(time.Minute))
}

// Hazard: a null acknowledgement panicked.
func TestSend_NullAcknowledgementAccepts(t *testing.T) {
	peer := unixPeer(t, func(conn net.Conn) {
		_ = acomm.UnmarshalConnData(conn, new(any))
		_, _ = conn.Write(plainFrame("null"))
	})
	require.NoError(t, acomm.Send(peer, 1))
}

func TestSend_GarbageIsNoAcknowledgement(t *testing.T) {
	for _, ack := range []string{"", "{", "7", `"ok"`, "[]", "<html>"} {
		peer := unixPeer(t, func(conn net.Conn) {
			_ = acomm.UnmarshalConnData(conn, new(any))
			_, _ = conn.Write(plainFrame(ack))
		})
		require.Error(t, acomm.Send(peer, 1), ack)
	}
}

func TestSend_FullBacklogIsRetried(t *testing.T) {
	path := filepath.Join(t.TempDir(), "full.sock")
	fd := bindOnly(t, path)
	require.NoError(t, syscall.Listen(fd, 0))
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	dial(t, path) // the one that a backlog of 0 holds
	addr := unixURL(path)
	require.ErrorIs(t, sendSoon(addr, 1, 50*time.Millisecond), os.ErrDeadlineExceeded)

	sent := make(chan error, 1)
	go func() { sent <- sendSoon(addr, 1, patience) }()
	l, err := net.FileListener(f)
	require.NoError(t, err)
	defer l.Close()
	for _, send := range []bool{false, true} { // first, then the sender
		conn, err := l.Accept()
		require.NoError(t, err)
		defer conn.Close()
		if send {
			require.NoError(t, acomm.UnmarshalConnData(conn, new(any)))
			require.NoError(t, acomm.SendConnData(conn, &acomm.Response{}))
		}
	}
	require.NoError(t, within(t, sent, "the send"))
}

// Hazards: HTTP 404/500 with a JSON body counted as delivered, 302 silently lost
// the payload, an empty 2xx counted as failed.
func TestSend_HTTPStatusDecides(t *testing.T) {
	for _, row := range []struct {
		status int
		body   string
		want   string // part of the error; empty: delivered
	}{
		{200, "", ""}, {204, "", ""}, {202, " \n", ""}, {200, "{}", ""}, {200, "null", ""}, {299, `{"error":null}`, ""},
		{200, `{"error":"no"}`, "no"}, {200, "OK", "invalid character"}, {200, "[]", "cannot unmarshal"},
		{404, `{"error":""}`, "404 Not Found"}, {500, `{"error":"oops"}`, "500 Internal Server Error: oops"},
		{500, "<html>secret</html>", "500"}, {301, "", "301"}, {302, "", "302 Found"}, {303, "{}", "303"}, {304, "", "304"},
		{429, "", "429"}, {503, `{"error":"busy"}`, "503 Service Unavailable: busy"},
	} {
		t.Run(fmt.Sprint(row.status, row.body), func(t *testing.T) {
			var seen int
			peer := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
				seen++
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(row.status)
				_, _ = io.WriteString(w, row.body)
			})
			peer.User = url.UserPassword("user", "secret")
			err := acomm.Send(peer, 1)
			require.Equal(t, 1, seen)
			if row.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, row.want)
			require.NotContains(t, err.Error(), "secret")
		})
	}
}

func TestSend_HTTPPostsJSON(t *testing.T) {
	type seen struct{ method, contentType, body, auth string }
	requests := make(chan seen, 10)
	peer := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests <- seen{r.Method, r.Header.Get("Content-Type"), string(body), r.Header.Get("Authorization")}
	})
	require.NoError(t, acomm.Send(peer, map[string]int{"n": 1}))
	require.Equal(t, seen{"POST", "application/json", `{"n":1}`, ""}, within(t, requests, "the request"))

	// A URL that came over the wire has user information without a user.
	var travelled url.URL
	peer.User = url.UserPassword("user", "secret")
	data, err := json.Marshal(peer)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &travelled))
	require.NoError(t, acomm.Send(&travelled, 1))
	require.Empty(t, within(t, requests, "the request").auth)
}

func TestSend_RedirectsThatKeepThePayloadAreFollowed(t *testing.T) {
	for _, status := range []int{307, 308} {
		bodies := make(chan string, 1)
		peer := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/hook" {
				http.Redirect(w, r, "/next", status)
				return
			}
			body, _ := io.ReadAll(r.Body)
			bodies <- string(body)
		})
		require.NoError(t, acomm.Send(peer, "kept"))
		require.Equal(t, `"kept"`, within(t, bodies, "the payload"))
	}
	loop := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/hook", http.StatusTemporaryRedirect)
	})
	require.ErrorContains(t, acomm.Send(loop, 1), "redirects")
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

// Hazard: the race detector does not see what writev reads, so a variable that is
// written before Send and read in a handler of the same process is reported as a race,
// and so is one that is written before the acknowledgement. They show only under -race.
func TestSend_HappensBeforeItsHandlerAndItsAcknowledgementAfter(t *testing.T) {
	ul := startListener(t, "", 0)
	for _, size := range []int{1, 5_000, 5_000, 100_000} { // the second and third on a session
		sent, read := 0, 0
		go func() {
			conn := ul.NextConn()
			defer ul.DoneConn(conn)
			var payload string
			if acomm.UnmarshalConnData(conn, &payload) == nil {
				read = sent
				_ = acomm.SendConnData(conn, &acomm.Response{})
			}
		}()
		sent = size
		require.NoError(t, acomm.Send(ul.URL(), string(make([]byte, size))))
		require.Equal(t, size, read)
	}
}
