package acomm_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// dribble is a connection on which the bytes arrive in pieces. It fails the test
// if its reader makes room for more than it has been given reason to.
type dribble struct {
	net.Conn
	t     *testing.T
	rest  []byte
	piece int // bytes; 0: as many as are asked for
	read  int
}

func (c *dribble) Read(p []byte) (int, error) {
	require.LessOrEqual(c.t, len(p), max(4<<10, c.read), "room for what has not arrived")
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	if c.piece > 0 {
		p = p[:min(len(p), c.piece)]
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	c.read += n
	return n, nil
}

// payloadIn returns the payload of the frame that the data begins with, or what
// is wrong with it. It is the frame as PROTOCOL.md has it, not as the library.
func payloadIn(data []byte) ([]byte, error) {
	if len(data) < 4 {
		return nil, io.ErrUnexpectedEOF
	}
	size := int64(binary.BigEndian.Uint32(data))
	switch {
	case size > 64<<20:
		return nil, syscall.EMSGSIZE
	case size > int64(len(data)-4):
		return nil, io.ErrUnexpectedEOF
	}
	return data[4 : 4+size], nil
}

// FuzzUnmarshalConnData feeds bytes to the reader of frames, in pieces of any
// size. It reads one frame and not a byte more, into whatever destination.
func FuzzUnmarshalConnData(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte, piece byte) {
		payload, want := payloadIn(data)
		for _, dest := range []any{new(any), new(acomm.Request), new(acomm.Response), new(string)} {
			conn := &dribble{t: t, rest: data, piece: int(piece)}
			err := acomm.UnmarshalConnData(conn, dest)
			if want != nil {
				require.ErrorIs(t, err, want)
				continue
			}
			require.Equal(t, 4+len(payload), conn.read)
			require.Equal(t, json.Unmarshal(payload, dest) == nil, err == nil, "%v", err)
			for _, other := range []error{io.ErrUnexpectedEOF, syscall.EMSGSIZE, fs.ErrInvalid} {
				require.NotErrorIs(t, err, other)
			}
		}
	})
}

// FuzzResponseJSON decodes and encodes Responses, and encodes and decodes the
// text of an error.
func FuzzResponseJSON(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		resp := &acomm.Response{ID: "old", Error: fs.ErrExist, StreamURL: &url.URL{}}
		if err := resp.UnmarshalJSON(data); err != nil {
			require.Equal(t, acomm.Response{}, *resp, "what it held is gone")
		} else {
			requireStable(t, resp)
		}

		failed := requireStable(t, &acomm.Response{ID: "id", Error: errors.New(text)})
		require.Error(t, failed.Error, "a failure never arrives as success")
		if text == "" {
			text = "unspecified error"
		}
		require.EqualError(t, failed.Error, string([]rune(text)), "but for bytes that are not UTF-8")
	})
}

// requireStable encodes the Response, and what that decodes to again, and
// returns the latter. Nothing may change on the way.
func requireStable(t *testing.T, resp *acomm.Response) *acomm.Response {
	t.Helper()
	once, err := json.Marshal(resp)
	require.NoError(t, err)
	require.Equal(t, resp.Error == nil, strings.HasPrefix(string(once), `{"error":"",`), "%s", once)
	again := &acomm.Response{}
	require.NoError(t, json.Unmarshal(once, again))
	require.Equal(t, string([]rune(resp.ID)), again.ID)
	require.Equal(t, resp.Error == nil, again.Error == nil)
	require.Equal(t, resp.Result == nil, again.Result == nil)
	require.Equal(t, resp.StreamURL == nil, again.StreamURL == nil)
	twice, err := json.Marshal(again)
	require.NoError(t, err)
	// What is not UTF-8 is written in one way and read as a character that is
	// written in another.
	require.Equal(t, strings.ReplaceAll(string(once), `\ufffd`, "\ufffd"), string(twice))
	return again
}

// FuzzTrackerSocket writes bytes to the socket of a tracker that waits for a
// response. Only a well-formed response with its id is one to the request, each
// connection is acknowledged or closed without a word, and others are served.
func FuzzTrackerSocket(f *testing.F) {
	tracker := newTracker(f)
	waiting, responses := newRequest(f, tracker.URL(), nil)
	waiting.ID = "2f0c8e9e-6f1c-4f3c-9f5a-0d9c5f3c7a11" // as in testdata/wire
	track := func(t testing.TB) { require.NoError(t, tracker.TrackRequest(waiting, time.Hour)) }
	track(f)
	f.Cleanup(func() {
		require.True(f, tracker.RemoveRequest(waiting), "it is still waited for")
		require.Empty(f, responses)
	})
	accepted, err := json.Marshal(&acomm.Response{})
	require.NoError(f, err)

	f.Fuzz(func(t *testing.T, data []byte) {
		resp := &acomm.Response{}
		payload, err := payloadIn(data)
		if err == nil {
			err = json.Unmarshal(payload, resp)
		}

		conn := dialTracker(t, tracker)
		_, _ = conn.Write(data) // it may be closed before all is written
		_ = conn.CloseWrite()
		answer, readErr := io.ReadAll(conn)
		if readErr != nil { // bytes behind the frame are left unread
			require.ErrorIs(t, readErr, syscall.ECONNRESET)
		}
		if err != nil {
			require.Empty(t, answer, "%v", err)
		} else {
			require.Equal(t, string(frame(string(accepted))), string(answer))
		}
		if err == nil && resp.ID == waiting.ID {
			require.Equal(t, resp, within(t, responses, "the response"))
			track(t)
		}
		requireWorking(t, tracker)
		require.Equal(t, 1, tracker.NumRequests())
		require.Empty(t, responses)
	})
}

// published is what the handler may be asked for.
type published struct {
	addr      *url.URL
	signature string
	status    int // with the signature; 0: the connection is aborted
}

// FuzzProxyStreamHandler asks the handler for streams. In the query a name in
// braces stands for an address, and with "-sig" for the signature of it: the
// fuzzer could not guess them.
func FuzzProxyStreamHandler(f *testing.F) {
	tracker, _ := streamProxy(f)
	var touched atomic.Int64
	dir := shortDir(f)
	l, err := net.Listen("unix", filepath.Join(dir, "target.sock"))
	require.NoError(f, err)
	served := async(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			touched.Add(1)
			_, _ = io.WriteString(conn, "data")
			conn.Close()
		}
	})
	f.Cleanup(func() {
		l.Close()
		<-served
	})
	server := httpPeer(f, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hook/missing":
			http.NotFound(w, r)
		case "/hook/cut":
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		default:
			_, _ = io.WriteString(w, "data")
		}
	})
	targets := map[string]*published{
		"unix":    {addr: &url.URL{Scheme: "unix", Path: l.Addr().String()}, status: http.StatusOK},
		"gone":    {addr: &url.URL{Scheme: "unix", Path: filepath.Join(dir, "gone")}, status: http.StatusNotFound},
		"long":    {addr: &url.URL{Scheme: "unix", Path: dir + strings.Repeat("x", 200)}, status: http.StatusBadGateway},
		"http":    {addr: server, status: http.StatusOK},
		"missing": {addr: server.JoinPath("missing"), status: http.StatusNotFound},
		"cut":     {addr: server.JoinPath("cut")},
	}
	var names []string
	for name, target := range targets {
		u, err := tracker.ProxyStreamHTTPURL(target.addr)
		require.NoError(f, err)
		target.signature = u.Query().Get("signature")
		names = append(names,
			"{"+name+"}", url.QueryEscape(target.addr.String()),
			"{"+name+"-sig}", url.QueryEscape(target.signature))
	}
	// Nothing leaves the test, whatever the handler may be talked into.
	transport := http.DefaultTransport
	replaceTransport(f, roundTripper(func(r *http.Request) (*http.Response, error) {
		touched.Add(1)
		if r.URL.Host != server.Host {
			return nil, errors.New("there is no way there")
		}
		return transport.RoundTrip(r)
	}))

	f.Fuzz(func(t *testing.T, method, query string) {
		replace, own := names, (*url.URL)(nil)
		if strings.Contains(query, "{own}") {
			addr, err := tracker.NewStreamUnix("", bytesSource([]byte("data")))
			require.NoError(t, err)
			defer func() { _ = acomm.Stream(io.Discard, addr) }() // whoever is first
			own = addr
			replace = append([]string{"{own}", url.QueryEscape(own.String())}, names...)
		}
		query = strings.NewReplacer(replace...).Replace(query)
		before := touched.Load()
		status, aborted := callProxy(t, method, query)

		var addr, signature string
		values, err := url.ParseQuery(query)
		if err == nil && len(query) <= 8<<10 && len(values["addr"]) == 1 {
			addr, signature = values.Get("addr"), values.Get("signature")
		}
		var target *published
		for _, each := range targets {
			if addr == each.addr.String() && signature == each.signature {
				target = each
			}
		}
		parsed, err := url.ParseRequestURI(addr)
		isOwn := own != nil && err == nil && parsed.Scheme == "unix" && parsed.Path == own.Path
		require.Equal(t, aborted, method == http.MethodGet && target != nil && target.status == 0)
		switch {
		case method != http.MethodGet:
			require.Equal(t, http.StatusMethodNotAllowed, status)
		case target != nil && aborted:
		case target != nil:
			require.Equal(t, target.status, status)
		case isOwn:
			require.Equal(t, http.StatusOK, status)
		case addr == "" || err != nil:
			require.Equal(t, http.StatusBadRequest, status)
		default:
			require.Equal(t, http.StatusForbidden, status)
		}
		if target == nil || method != http.MethodGet {
			require.Equal(t, before, touched.Load(), "what is not signed is not touched")
		}
	})
}

// callProxy calls the handler and returns the status, and whether it aborted the
// connection. It must not panic otherwise.
func callProxy(t *testing.T, method, query string) (status int, aborted bool) {
	t.Helper()
	w := httptest.NewRecorder()
	defer func() {
		if err := recover(); err != nil {
			require.Equal(t, any(http.ErrAbortHandler), err)
			status, aborted = w.Code, true
		}
	}()
	acomm.ProxyStreamHandler(w, &http.Request{Method: method, URL: &url.URL{Path: "/stream", RawQuery: query}})
	return w.Code, false
}
