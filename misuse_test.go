package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// misuse is a wrong way to call a function.
type misuse struct {
	how  string
	want error // what the error matches; nil: it is a no-op, do checks the rest
	do   func(t *testing.T) error
}

var (
	errAny  = errors.New("any error") // one of another package, that has no sentinel
	badJSON = json.RawMessage("{")
	noJSON  = json.RawMessage{}
)

// TestMisuse_IsAnErrorOrANoOp has rows for each exported function and method. What a
// function's own tests have in a table of errors is not repeated. Left out are nil
// receivers of Tracker, UnixListener and MultiRequest, handlers that panic, and nil
// pointers in a caller's own interface values: these are what they are anywhere in Go.
func TestMisuse_IsAnErrorOrANoOp(t *testing.T) {
	m := newMisused(t)
	rows := m.ofMessages()
	for _, more := range []map[string][]misuse{m.ofSending(), m.ofTrackers(), m.ofListeners()} {
		maps.Copy(rows, more)
	}
	require.Equal(t, exportedFuncs(t), slices.Sorted(maps.Keys(rows)), "each exported function has its rows, and no other")
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		require.NotEmpty(t, rows[name], name)
		for _, row := range rows[name] {
			t.Run(name+"/"+row.how, func(t *testing.T) {
				done := make(chan error, 1)
				go func() {
					defer func() {
						if r := recover(); r != nil {
							t.Errorf("panic: %v", r)
							done <- nil
						}
					}()
					done <- row.do(t)
				}()
				err := within(t, done, "the call to return")
				if t.Failed() {
					return
				}
				if row.want == nil {
					require.NoError(t, err)
					return
				}
				require.Error(t, err)
				if row.want != errAny {
					require.ErrorIs(t, err, row.want)
				}
			})
		}
	}
}

// exportedFuncs returns the names of the package's exported functions and
// methods, sorted.
func exportedFuncs(t *testing.T) []string {
	t.Helper()
	var names []string
	sources, err := filepath.Glob("*.go")
	require.NoError(t, err)
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), source, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || !f.Name.IsExported() {
				continue
			}
			name := f.Name.Name
			if f.Recv != nil {
				receiver := f.Recv.List[0].Type
				if star, ok := receiver.(*ast.StarExpr); ok {
					receiver = star.X
				}
				if !ast.IsExported(receiver.(*ast.Ident).Name) {
					continue
				}
				name = receiver.(*ast.Ident).Name + "." + name
			}
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

var misuseHook = &url.URL{Scheme: "http", Host: "hook.invalid", Path: "/"}

// misused is what the rows need. It is made before them, so that none of them can fail
// for another reason than its own.
type misused struct {
	t                      *testing.T
	live, stopped, streams *acomm.Tracker
	ul                     *acomm.UnixListener
	closed, open           *net.UnixConn
	tracked                *acomm.Request // by live
	none                   string         // a path where nothing is
}

func newMisused(t *testing.T) *misused {
	m := &misused{t: t, live: newTracker(t), stopped: newTracker(t), ul: startListener(t, "", 0)}
	m.stopped.Stop()
	m.streams, _ = streamProxy(t)
	m.closed, _ = connPair(t)
	require.NoError(t, m.closed.Close())
	_, m.open = connPair(t)
	m.tracked = m.request()
	require.NoError(t, m.live.TrackRequest(m.tracked, time.Hour))
	t.Cleanup(func() { m.live.RemoveRequest(m.tracked) })
	m.none = filepath.Join(shortDir(t), "none")
	return m
}

func (m *misused) fresh() *acomm.Tracker {
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(m.t, err)
	return tracker
}

func (m *misused) request() *acomm.Request {
	req, err := acomm.NewRequest("test", misuseHook.String(), nil, nil, nil)
	require.NoError(m.t, err)
	return req
}

// tryProxy has a tracker proxy a request.
func tryProxy(tracker *acomm.Tracker, req *acomm.Request) error {
	out, err := tracker.ProxyUnix(req, 0)
	if err != nil && out != nil {
		return nil // both: not what was promised
	}
	return err
}

// tryOffer has a tracker offer a stream.
func tryOffer(tracker *acomm.Tracker, dir string, src io.ReadCloser) error {
	out, err := tracker.NewStreamUnix(dir, src)
	if err != nil && out != nil {
		return nil
	}
	return err
}

// proxyStatus is what ProxyStreamHandler answers.
func proxyStatus(r *http.Request) int {
	w := httptest.NewRecorder()
	acomm.ProxyStreamHandler(w, r)
	return w.Code
}

// ofMessages are the rows of requests and responses.
func (m *misused) ofMessages() map[string][]misuse {
	live, stopped := m.live, m.stopped
	return map[string][]misuse{
		"NewRequest": {
			{"no task", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("", misuseHook.String(), nil, nil, nil)) }},
			{"no hook", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "", nil, nil, nil)) }},
			{"hook that is no URL", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "http://[::1", nil, nil, nil)) }},
			{"relative hook", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "hook", nil, nil, nil)) }},
			{"args that are no JSON", errAny, func(*testing.T) error {
				return second(acomm.NewRequest("test", misuseHook.String(), make(chan int), nil, nil))
			}},
			{"args that are broken JSON", errAny, func(*testing.T) error {
				return second(acomm.NewRequest("test", misuseHook.String(), badJSON, nil, nil))
			}},
		},
		"Request.Validate": {
			{"nil", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Request)(nil).Validate() }},
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Request).Validate() }},
		},
		"Request.UnmarshalArgs": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Request)(nil).UnmarshalArgs(new(any)) }},
			{"zero value", nil, func(*testing.T) error { return new(acomm.Request).UnmarshalArgs(new(any)) }},
			{"nil destination", fs.ErrInvalid, func(*testing.T) error { return m.request().UnmarshalArgs(nil) }},
			{"nil pointer", fs.ErrInvalid, func(*testing.T) error { return m.request().UnmarshalArgs((*int)(nil)) }},
			{"no pointer", fs.ErrInvalid, func(*testing.T) error { return m.request().UnmarshalArgs(map[string]any{}) }},
			{"destination of another type", errAny, func(*testing.T) error {
				text := json.RawMessage(`"text"`)
				return (&acomm.Request{Args: &text}).UnmarshalArgs(new(int))
			}},
			{"broken JSON", errAny, func(*testing.T) error { return (&acomm.Request{Args: &badJSON}).UnmarshalArgs(new(any)) }},
			{"args of no bytes", errAny, func(*testing.T) error { return (&acomm.Request{Args: &noJSON}).UnmarshalArgs(new(any)) }},
		},
		"Request.HandleResponse": {
			{"nil request", nil, func(*testing.T) error { (*acomm.Request)(nil).HandleResponse(&acomm.Response{}); return nil }},
			{"nil response", nil, func(t *testing.T) error {
				req := m.request()
				req.SuccessHandler = func(*acomm.Request, *acomm.Response) { t.Error("a handler ran") }
				req.ErrorHandler = req.SuccessHandler
				req.HandleResponse(nil)
				return nil
			}},
			{"no handlers", nil, func(*testing.T) error {
				new(acomm.Request).HandleResponse(&acomm.Response{})
				new(acomm.Request).HandleResponse(&acomm.Response{Error: fs.ErrExist})
				return nil
			}},
		},
		"Request.Respond": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Request)(nil).Respond(&acomm.Response{}) }},
			{"nil response", fs.ErrInvalid, func(*testing.T) error { return m.request().Respond(nil) }},
			{"no hook", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Request).Respond(&acomm.Response{}) }},
			{"empty hook", errors.ErrUnsupported, func(*testing.T) error {
				return (&acomm.Request{ResponseHook: &url.URL{}}).Respond(&acomm.Response{})
			}},
			{"hook of a stopped tracker", fs.ErrNotExist, func(*testing.T) error {
				return (&acomm.Request{ResponseHook: stopped.URL()}).Respond(&acomm.Response{})
			}},
			{"result that is no JSON", errAny, func(*testing.T) error {
				return (&acomm.Request{ResponseHook: live.URL()}).Respond(&acomm.Response{Result: &badJSON})
			}},
		},
		"NewResponse": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewResponse(nil, 1, nil, nil)) }},
			{"result and error", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewResponse(m.request(), 1, nil, fs.ErrExist)) }},
			{"result that is no JSON", errAny, func(*testing.T) error { return second(acomm.NewResponse(m.request(), func() {}, nil, nil)) }},
			{"result that is not finite", errAny, func(*testing.T) error { return second(acomm.NewResponse(m.request(), math.NaN(), nil, nil)) }},
			{"nothing at all", nil, func(*testing.T) error { return second(acomm.NewResponse(new(acomm.Request), nil, nil, nil)) }},
		},
		"Response.UnmarshalResult": {
			{"nil response", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Response)(nil).UnmarshalResult(new(any)) }},
			{"zero value", nil, func(*testing.T) error { return new(acomm.Response).UnmarshalResult(new(any)) }},
			{"nil destination", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Response).UnmarshalResult(nil) }},
			{"nil pointer", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Response).UnmarshalResult((*string)(nil)) }},
			{"no pointer", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Response).UnmarshalResult("") }},
			{"broken JSON", errAny, func(*testing.T) error { return (&acomm.Response{Result: &badJSON}).UnmarshalResult(new(any)) }},
		},
		"Response.MarshalJSON": {
			{"nil", nil, func(*testing.T) error {
				data, err := (*acomm.Response)(nil).MarshalJSON()
				if string(data) != "null" {
					return fs.ErrInvalid
				}
				return err
			}},
			{"zero value", nil, func(*testing.T) error { return second(new(acomm.Response).MarshalJSON()) }},
			{"result that is no JSON", errAny, func(*testing.T) error { return second((&acomm.Response{Result: &badJSON}).MarshalJSON()) }},
		},
		"Response.UnmarshalJSON": {
			{"nil", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Response)(nil).UnmarshalJSON([]byte("{}")) }},
			{"nothing", errAny, func(*testing.T) error { return new(acomm.Response).UnmarshalJSON(nil) }},
			{"broken JSON", errAny, func(*testing.T) error { return new(acomm.Response).UnmarshalJSON([]byte("{")) }},
			{"other JSON", errAny, func(*testing.T) error { return new(acomm.Response).UnmarshalJSON([]byte("[]")) }},
			{"null", nil, func(*testing.T) error { return new(acomm.Response).UnmarshalJSON([]byte("null")) }},
		},
	}
}

// ofSending are the rows of what sends, reads and streams.
func (m *misused) ofSending() map[string][]misuse {
	live, stopped, ul, closed, open := m.live, m.stopped, m.ul, m.closed, m.open
	return map[string][]misuse{
		"Send": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(live.URL(), (*acomm.Request)(nil)) }},
			{"nil response", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(live.URL(), (*acomm.Response)(nil)) }},
			{"payload that is no JSON", errAny, func(*testing.T) error { return acomm.Send(live.URL(), make(chan int)) }},
			{"zero URL", errors.ErrUnsupported, func(*testing.T) error { return acomm.Send(&url.URL{}, 1) }},
			{"unix with an opaque path", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "unix", Opaque: ul.Addr()}, 1) }},
			{"http without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "http", Path: "/"}, 1) }},
			{"https without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "https", Opaque: "x"}, 1) }},
			{"stopped tracker", fs.ErrNotExist, func(*testing.T) error { return acomm.Send(stopped.URL(), &acomm.Response{}) }},
			{"request to a tracker", nil, func(*testing.T) error { return acomm.Send(live.URL(), m.request()) }}, // reads as a response nobody waits for
		},
		"SendConnData": {
			{"nil connection", fs.ErrInvalid, func(*testing.T) error { return acomm.SendConnData(nil, 1) }},
			{"nil payload", fs.ErrInvalid, func(*testing.T) error { return acomm.SendConnData(open, nil) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return acomm.SendConnData(open, (*acomm.Request)(nil)) }},
			{"payload that is no JSON", errAny, func(*testing.T) error { return acomm.SendConnData(open, func() {}) }},
			{"closed connection", net.ErrClosed, func(*testing.T) error { return acomm.SendConnData(closed, 1) }},
		},
		"UnmarshalConnData": {
			{"nil connection", fs.ErrInvalid, func(*testing.T) error { return acomm.UnmarshalConnData(nil, new(any)) }},
			{"nil destination", fs.ErrInvalid, func(*testing.T) error { return acomm.UnmarshalConnData(open, nil) }},
			{"nil pointer", fs.ErrInvalid, func(*testing.T) error { return acomm.UnmarshalConnData(open, (*acomm.Request)(nil)) }},
			{"no pointer", fs.ErrInvalid, func(*testing.T) error { return acomm.UnmarshalConnData(open, acomm.Request{}) }},
			{"closed connection", net.ErrClosed, func(*testing.T) error { return acomm.UnmarshalConnData(closed, new(any)) }},
		},
		"Stream": {
			{"zero URL", errors.ErrUnsupported, func(*testing.T) error { return acomm.Stream(io.Discard, &url.URL{}) }},
			{"unix without a path", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(io.Discard, unixURL("")) }},
			{"http without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(io.Discard, &url.URL{Scheme: "http", Path: "/"}) }},
			{"a second time", fs.ErrNotExist, func(t *testing.T) error {
				u, err := live.NewStreamUnix("", bytesSource(nil))
				if err != nil {
					t.Error(err)
				}
				if err := acomm.Stream(io.Discard, u); err != nil {
					t.Error(err)
				}
				return acomm.Stream(io.Discard, u)
			}},
		},
		"ProxyStreamHandler": {
			{"zero request", nil, func(t *testing.T) error { return wantNumber(proxyStatus(&http.Request{}), 405) }},
			{"no query", nil, func(t *testing.T) error {
				return wantNumber(proxyStatus(&http.Request{Method: "GET", URL: &url.URL{}}), 400)
			}},
			{"foreign address", nil, func(t *testing.T) error {
				return wantNumber(proxyStatus(httptest.NewRequest("GET", "/?addr="+url.QueryEscape(ul.URL().String()), nil)), 403)
			}},
			{"stream of a stopped tracker", nil, func(t *testing.T) error {
				tracker, _ := streamProxy(t)
				addr, err := tracker.NewStreamUnix("", newSource())
				if err != nil {
					return err
				}
				u, err := tracker.ProxyStreamHTTPURL(addr)
				if err != nil {
					return err
				}
				tracker.Stop()
				return wantNumber(proxyStatus(httptest.NewRequest("GET", u.String(), nil)), 404)
			}},
		},
	}
}

func wantNumber(got, want int) error {
	if got != want {
		return fmt.Errorf("got %d, not %d", got, want)
	}
	return nil
}

func wantText(want, got string) error {
	if got != want {
		return errors.New("got " + got)
	}
	return nil
}

func wantFalse(got bool) error {
	if got {
		return errors.New("got true")
	}
	return nil
}

func wantEmpty(got map[string]*acomm.Response) error {
	if got == nil || len(got) > 0 {
		return errors.New("not an empty map")
	}
	return nil
}

func wantNoConn(ul *acomm.UnixListener) error {
	if conn := ul.NextConn(); conn != nil {
		return errors.New("got a connection")
	}
	return nil
}

// stillOpen tells whether somebody has closed the connection.
func stillOpen(conn net.Conn) error { return conn.SetDeadline(time.Time{}) }

// tryTracker starts a tracker at a path, and stops it again.
func tryTracker(path string) error {
	tracker, err := acomm.NewTracker(path, nil, 0)
	if err != nil {
		return err
	}
	defer tracker.Stop()
	return tracker.Start()
}

func removeAndStop(tracker *acomm.Tracker, req *acomm.Request) error {
	defer tracker.Stop()
	return wantFalse(!tracker.RemoveRequest(req))
}
