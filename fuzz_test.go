package acomm_test

import (
	"bytes"
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
			require.Equal(t, unmarshalPlain(payload, dest) == nil, err == nil, "%v", err)
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

// FuzzFrameAsJSON holds what is written and read without encoding/json to what
// encoding/json writes and reads.
func FuzzFrameAsJSON(f *testing.F) {
	run := strings.Repeat("x", 20)
	for _, text := range []string{"", "file.hash", "a b<&>\"\\\x00\x7f", "\xff", "\x7f", "ü", "\u2028", "/run/a.sock"} {
		for _, parts := range []uint16{0, 1, 1 << 1, 1 << 2, 0x7f << 3, 1 << 10, 1 << 11, 1 << 12} {
			f.Add("id", text, text, text, parts, []byte(`{"a":"`+run+`"}`))
		}
	}
	for _, raw := range []string{
		``, `null`, ` null`, `1 `, `[1, 2]`, `{`, `1,"id":2`, `[1],[2]`, `"` + run + `<"`, `"` + run + "\u2029\"", `"` + run + "ü\"",
		`"` + run + "\xff\"", `"\u00` + run + `"`, `{"` + run + `":1,"` + run + `":2}`, `1,"stream_url":null`, "\"\n\"",
	} {
		f.Add("id", "task", "/run/a.sock", "", uint16(0), []byte(raw))
	}
	for _, data := range []string{
		`null`, `{}`, `[]`, `{"error":"","id":"","result":null,"stream_url":null,"sessions":1}`,
		`{"error":"a\u003cb","id":"1","result":1,"stream_url":"unix:///a"}`,
		`{"error":"","id":"1","result":1,"stream_url":null,"sessions":2}`,
		`{"error":"","id":"1","result":1,"stream_url":null} `,
		`{"error":"","id":"1","result":1,"stream_url":null}}`,
		`{"error":"","id":"1","result":1,"stream_url":null,"id":"2"}`,
		`{"error":"","id":"1","result":1,"stream_url":null,"stream_url":null}`,
		`{"error":"","id":"1","result":,"stream_url":null}`,
		`{"error":"","id":"1","result": 1 ,"stream_url":null}`,
		`{"error":"","id":"1","result":null,"stream_url":{"Scheme":"unix"}}`,
		`{"id":"1","task":"t","responsehook":null,"args":}`,
		`{"id":"1","task":"t","responsehook":null,"args":null,"id":"2"}`,
		`{"id":"1","task":"t","responsehook":null,"args":[1]}`,
		`{"id":"1","task":"t","responsehook":null,"args":[1]]`,
		`{"id":"a\u0041\n","task":"t","responsehook":null,"args":[1]}`,
		`{"ID":"1","task":"t","responsehook":{"Path":"/a"},"args":[1]}`,
		`{"id":"1","task":"t","responsehook":"unix:///a%41?b","args":[1]}`,
		`{"id":"1","task":"t","responsehook":"%zz","args":[1]}`,
		`{"id":1,"task":"t","responsehook":"/a","args":[1]}`,
		`{"responsehook":{"Path":"/a"},"RESPONSEHOOK":"","id":"1"}`,
	} {
		f.Add("id", "task", "", "", uint16(0), []byte(data))
	}
	for _, depth := range []int{999, 1000, 1001, 9998, 9999, 10000, 10001} {
		f.Add("id", "task", "/a", "", uint16(0), []byte(strings.Repeat("[", depth)+strings.Repeat("]", depth)))
	}

	f.Fuzz(func(t *testing.T, id, task, path, text string, parts uint16, data []byte) {
		requireDecodesAsJSON(t, data)
		raw := (*json.RawMessage)(&data)
		part := func(bit int) bool { return parts&(1<<bit) != 0 }
		if part(12) {
			raw = nil
		}
		u := &url.URL{Scheme: "unix", Path: path, ForceQuery: part(1), OmitHost: part(2)}
		for bit, field := range []*string{&u.Scheme, &u.Opaque, &u.Host, &u.Fragment, &u.RawQuery, &u.RawPath, &u.RawFragment} {
			if part(3 + bit) {
				*field = text
			}
		}
		if part(10) {
			u.User = url.User(text)
		}
		if part(11) {
			u = nil
		}
		req := &acomm.Request{ID: id, Task: task, ResponseHook: u, Args: raw}
		requireEncodesAsJSON(t, req, req)
		resp := &acomm.Response{ID: id, Result: raw, StreamURL: u}
		if part(0) {
			resp.Error = errors.New(text)
		}
		requireEncodesAsJSON(t, resp, (*plainResponse)(resp))
	})
}

// requireEncodesAsJSON compares the frame of the payload, and what it is read as,
// with encoding/json's.
func requireEncodesAsJSON(t *testing.T, payload, plain any) {
	t.Helper()
	conn := &oneFrame{}
	err := acomm.SendConnData(conn, payload)
	var want bytes.Buffer
	if wantErr := json.NewEncoder(&want).Encode(plain); wantErr != nil {
		require.Error(t, err, "%v", wantErr)
		return
	}
	data := bytes.TrimSuffix(want.Bytes(), []byte("\n"))
	if !arrives(payload, data) {
		require.ErrorIs(t, err, fs.ErrInvalid, "%s", data)
		return
	}
	require.NoError(t, err)
	require.Equal(t, string(plainFrame(string(data))), string(conn.frame))
	requireDecodesAsJSON(t, data)
}

// arrives reports whether what the message leads by is the same after it was read,
// and leads somewhere.
func arrives(payload any, data []byte) bool {
	switch sent := payload.(type) {
	case *acomm.Request:
		var got acomm.Request
		err := json.Unmarshal(data, &got)
		return err == nil && got.ID == sent.ID && got.Task == sent.Task && urlArrives(sent.ResponseHook, got.ResponseHook)
	case *acomm.Response:
		var got acomm.Response
		err := json.Unmarshal(data, &got)
		return err == nil && got.ID == sent.ID && urlArrives(sent.StreamURL, got.StreamURL)
	}
	return false
}

func urlArrives(sent, got *url.URL) bool {
	if sent == nil || got == nil {
		return sent == got
	}
	without := *sent
	without.User, got.User = nil, nil // JSON has never carried it
	if sent.Scheme == "unix" && (sent.Host != "" || sent.Opaque != "" || !strings.HasPrefix(sent.Path, "/")) {
		return false
	}
	return *got == without
}

// requireDecodesAsJSON reads data into what is empty and what is not.
func requireDecodesAsJSON(t *testing.T, data []byte) {
	t.Helper()
	hook, raw := url.URL{Scheme: "http", Fragment: "old"}, json.RawMessage(`["old"]`)
	for _, fresh := range []func() any{
		func() any { return &acomm.Request{} },
		func() any { return &acomm.Request{ID: "old", Task: "old"} },
		func() any { u := hook; return &acomm.Request{ResponseHook: &u} },
		func() any { r := bytes.Clone(raw); return &acomm.Request{Args: (*json.RawMessage)(&r)} },
		func() any { return &acomm.Response{} },
		func() any { return &acomm.Response{ID: "old", Result: &raw, StreamURL: &hook, Error: fs.ErrExist} },
	} {
		got, want := fresh(), fresh()
		err, wantErr := acomm.UnmarshalConnData(&oneFrame{frame: plainFrame(string(data))}, got), unmarshalPlain(data, want)
		require.Equal(t, wantErr == nil, err == nil, "%v, %v", wantErr, err)
		require.Equal(t, want, got)
		if wantErr != nil && !strings.Contains(err.Error(), "can't be parsed as") { // the hook
			require.ErrorContains(t, err, wantErr.Error())
		}
	}
}

// unmarshalPlain is json.Unmarshal, but for a request's hook that is a string: that one
// is read as the member of a response that may be one, too.
func unmarshalPlain(data []byte, dest any) error {
	req, isRequest := dest.(*acomm.Request)
	err := json.Unmarshal(data, dest)
	var members struct {
		ResponseHook json.RawMessage `json:"responsehook"`
	}
	if err == nil || !isRequest || json.Unmarshal(data, &members) != nil || !bytes.HasPrefix(members.ResponseHook, []byte(`"`)) {
		return err
	}
	var rest struct {
		ID           string           `json:"id"`
		Task         string           `json:"task"`
		ResponseHook any              `json:"responsehook"`
		Args         *json.RawMessage `json:"args"`
	}
	rest.ID, rest.Task, rest.Args = req.ID, req.Task, req.Args
	var resp acomm.Response
	stream := append(append([]byte(`{"stream_url":`), members.ResponseHook...), '}')
	if json.Unmarshal(data, &rest) != nil || json.Unmarshal(stream, &resp) != nil {
		return err
	}
	req.ID, req.Task, req.ResponseHook, req.Args = rest.ID, rest.Task, resp.StreamURL, rest.Args
	return nil
}

// plainResponse is a Response as encoding/json alone writes it.
type plainResponse acomm.Response

func (r *plainResponse) MarshalJSON() ([]byte, error) {
	wire := struct {
		Error     string           `json:"error"`
		ID        string           `json:"id"`
		Result    *json.RawMessage `json:"result"`
		StreamURL *url.URL         `json:"stream_url"`
	}{ID: r.ID, Result: r.Result, StreamURL: r.StreamURL}
	if r.Error != nil {
		if wire.Error = r.Error.Error(); wire.Error == "" {
			wire.Error = "unspecified error"
		}
	}
	return json.Marshal(wire)
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

		conn := dial(t, tracker.Addr())
		_, _ = conn.Write(data) // it may be closed before all is written
		_ = conn.CloseWrite()
		answer, readErr := io.ReadAll(conn)
		if readErr != nil { // bytes behind the frame are left unread
			require.ErrorIs(t, readErr, syscall.ECONNRESET)
		}
		if err != nil {
			require.Empty(t, answer, "%v", err)
		} else {
			require.Equal(t, string(plainFrame(string(accepted))), string(answer))
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
	target := unixPeer(f, func(conn net.Conn) {
		touched.Add(1)
		_, _ = io.WriteString(conn, "data")
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
		"unix":    {addr: target, status: http.StatusOK},
		"gone":    {addr: unixURL(filepath.Join(dir, "gone")), status: http.StatusNotFound},
		"long":    {addr: unixURL(dir + strings.Repeat("x", 200)), status: http.StatusBadGateway},
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
