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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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

// TestMisuse_IsAnErrorOrANoOp has rows for each exported function and method.
// Left out are nil receivers of Tracker, UnixListener and MultiRequest, handlers
// that panic, and nil pointers in a caller's own interface values: these are
// what they are anywhere in Go.
func TestMisuse_IsAnErrorOrANoOp(t *testing.T) {
	rows := misuses(t)
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

// misuses returns the rows by function. What they need is made here, so that
// none of them can fail for another reason than its own.
func misuses(t *testing.T) map[string][]misuse {
	live := newTracker(t)
	stopped := newTracker(t)
	stopped.Stop()
	fresh := func() *acomm.Tracker {
		tracker, err := acomm.NewTracker("", nil, patience)
		require.NoError(t, err)
		return tracker
	}
	streams, _ := streamProxy(t)
	ul := startListener(t, "", 0)
	closed, _ := connPair(t)
	require.NoError(t, closed.Close())
	_, open := connPair(t)
	hook := &url.URL{Scheme: "http", Host: "hook.invalid", Path: "/"}
	request := func() *acomm.Request {
		req, err := acomm.NewRequest("test", hook.String(), nil, nil, nil)
		require.NoError(t, err)
		return req
	}
	tracked := request()
	require.NoError(t, live.TrackRequest(tracked, time.Hour))
	t.Cleanup(func() { live.RemoveRequest(tracked) })
	none := filepath.Join(shortDir(t), "none")
	proxied := func(tracker *acomm.Tracker, req *acomm.Request) error {
		out, err := tracker.ProxyUnix(req, 0)
		if err != nil && out != nil {
			return nil // both: not what was promised
		}
		return err
	}
	offered := func(tracker *acomm.Tracker, dir string, src io.ReadCloser) error {
		out, err := tracker.NewStreamUnix(dir, src)
		if err != nil && out != nil {
			return nil
		}
		return err
	}
	status := func(r *http.Request) int {
		w := httptest.NewRecorder()
		acomm.ProxyStreamHandler(w, r)
		return w.Code
	}

	return map[string][]misuse{
		"NewRequest": {
			{"no task", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("", hook.String(), nil, nil, nil)) }},
			{"no hook", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "", nil, nil, nil)) }},
			{"hook that is no URL", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "http://[::1", nil, nil, nil)) }},
			{"relative hook", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewRequest("test", "hook", nil, nil, nil)) }},
			{"args that are no JSON", errAny, func(*testing.T) error {
				return second(acomm.NewRequest("test", hook.String(), make(chan int), nil, nil))
			}},
			{"args that are broken JSON", errAny, func(*testing.T) error { return second(acomm.NewRequest("test", hook.String(), badJSON, nil, nil)) }},
		},
		"Request.Validate": {
			{"nil", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Request)(nil).Validate() }},
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Request).Validate() }},
			{"no id", fs.ErrInvalid, func(*testing.T) error { return (&acomm.Request{Task: "t", ResponseHook: hook}).Validate() }},
			{"no task", fs.ErrInvalid, func(*testing.T) error { return (&acomm.Request{ID: "i", ResponseHook: hook}).Validate() }},
			{"no hook", fs.ErrInvalid, func(*testing.T) error { return (&acomm.Request{ID: "i", Task: "t"}).Validate() }},
		},
		"Request.UnmarshalArgs": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return (*acomm.Request)(nil).UnmarshalArgs(new(any)) }},
			{"zero value", nil, func(*testing.T) error { return new(acomm.Request).UnmarshalArgs(new(any)) }},
			{"nil destination", fs.ErrInvalid, func(*testing.T) error { return request().UnmarshalArgs(nil) }},
			{"nil pointer", fs.ErrInvalid, func(*testing.T) error { return request().UnmarshalArgs((*int)(nil)) }},
			{"no pointer", fs.ErrInvalid, func(*testing.T) error { return request().UnmarshalArgs(map[string]any{}) }},
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
				req := request()
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
			{"nil response", fs.ErrInvalid, func(*testing.T) error { return request().Respond(nil) }},
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
			{"result and error", fs.ErrInvalid, func(*testing.T) error { return second(acomm.NewResponse(request(), 1, nil, fs.ErrExist)) }},
			{"result that is no JSON", errAny, func(*testing.T) error { return second(acomm.NewResponse(request(), func() {}, nil, nil)) }},
			{"result that is not finite", errAny, func(*testing.T) error { return second(acomm.NewResponse(request(), math.NaN(), nil, nil)) }},
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
		"Send": {
			{"nil URL", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(nil, 1) }},
			{"nil payload", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(live.URL(), nil) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(live.URL(), (*acomm.Request)(nil)) }},
			{"nil response", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(live.URL(), (*acomm.Response)(nil)) }},
			{"payload that is no JSON", errAny, func(*testing.T) error { return acomm.Send(live.URL(), make(chan int)) }},
			{"zero URL", errors.ErrUnsupported, func(*testing.T) error { return acomm.Send(&url.URL{}, 1) }},
			{"unknown scheme", errors.ErrUnsupported, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "gopher", Host: "h"}, 1) }},
			{"unix without a path", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(unixURL(""), 1) }},
			{"unix with an opaque path", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "unix", Opaque: ul.Addr()}, 1) }},
			{"http without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "http", Path: "/"}, 1) }},
			{"https without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(&url.URL{Scheme: "https", Opaque: "x"}, 1) }},
			{"NUL in the path", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(unixURL(none+"\x00"), 1) }},
			{"abstract socket", fs.ErrInvalid, func(*testing.T) error { return acomm.Send(unixURL("@none"), 1) }},
			{"long path", syscall.ENAMETOOLONG, func(*testing.T) error { return acomm.Send(unixURL(none+strings.Repeat("x", 200)), 1) }},
			{"nobody there", fs.ErrNotExist, func(*testing.T) error { return acomm.Send(unixURL(none), 1) }},
			{"stopped tracker", fs.ErrNotExist, func(*testing.T) error { return acomm.Send(stopped.URL(), &acomm.Response{}) }},
			{"request to a tracker", nil, func(*testing.T) error { return acomm.Send(live.URL(), request()) }}, // reads as a response nobody waits for
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
			{"nil destination", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(nil, unixURL(none)) }},
			{"nil URL", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(io.Discard, nil) }},
			{"zero URL", errors.ErrUnsupported, func(*testing.T) error { return acomm.Stream(io.Discard, &url.URL{}) }},
			{"unix without a path", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(io.Discard, unixURL("")) }},
			{"http without a host", fs.ErrInvalid, func(*testing.T) error { return acomm.Stream(io.Discard, &url.URL{Scheme: "http", Path: "/"}) }},
			{"unknown scheme", errors.ErrUnsupported, func(*testing.T) error { return acomm.Stream(io.Discard, &url.URL{Scheme: "gopher", Host: "h"}) }},
			{"nobody there", fs.ErrNotExist, func(*testing.T) error { return acomm.Stream(io.Discard, unixURL(none)) }},
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
			{"zero request", nil, func(t *testing.T) error { return wantNumber(status(&http.Request{}), 405) }},
			{"no query", nil, func(t *testing.T) error {
				return wantNumber(status(&http.Request{Method: "GET", URL: &url.URL{}}), 400)
			}},
			{"foreign address", nil, func(t *testing.T) error {
				return wantNumber(status(httptest.NewRequest("GET", "/?addr="+url.QueryEscape(ul.URL().String()), nil)), 403)
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
				return wantNumber(status(httptest.NewRequest("GET", u.String(), nil)), 404)
			}},
		},
		"NewMultiRequest": {
			{"nil tracker", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(nil, 0).AddRequest("a", request()) }},
			{"zero tracker", net.ErrClosed, func(*testing.T) error {
				return acomm.NewMultiRequest(new(acomm.Tracker), 0).AddRequest("a", request())
			}},
			{"negative timeout", nil, func(*testing.T) error {
				multi, req := acomm.NewMultiRequest(live, -1), request()
				defer multi.RemoveRequest(req)
				return multi.AddRequest("a", req)
			}},
		},
		"MultiRequest.AddRequest": {
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.MultiRequest).AddRequest("a", request()) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", nil) }},
			{"no id", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", new(acomm.Request)) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", tracked) }},
			{"tracker not started", net.ErrClosed, func(*testing.T) error { return acomm.NewMultiRequest(fresh(), 0).AddRequest("a", request()) }},
			{"tracker stopped", net.ErrClosed, func(*testing.T) error { return acomm.NewMultiRequest(stopped, 0).AddRequest("a", request()) }},
			{"name used", fs.ErrExist, func(t *testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), request()
				if err := multi.AddRequest("a", req); err != nil {
					t.Error(err)
				}
				defer multi.RemoveRequest(req)
				return multi.AddRequest("a", request())
			}},
			{"id used", fs.ErrExist, func(t *testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), request()
				if err := multi.AddRequest("a", req); err != nil {
					t.Error(err)
				}
				defer multi.RemoveRequest(req)
				return multi.AddRequest("b", req)
			}},
		},
		"MultiRequest.RemoveRequest": {
			{"zero value", nil, func(*testing.T) error { new(acomm.MultiRequest).RemoveRequest(request()); return nil }},
			{"nil", nil, func(*testing.T) error { acomm.NewMultiRequest(live, 0).RemoveRequest(nil); return nil }},
			{"never added", nil, func(t *testing.T) error {
				acomm.NewMultiRequest(live, 0).RemoveRequest(tracked)
				if live.NumRequests() != 1 {
					return fs.ErrNotExist // another's request is gone
				}
				return nil
			}},
			{"twice", nil, func(*testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), request()
				err := multi.AddRequest("a", req)
				multi.RemoveRequest(req)
				multi.RemoveRequest(req)
				return err
			}},
		},
		"MultiRequest.Responses": {
			{"zero value", nil, func(*testing.T) error { return wantEmpty(new(acomm.MultiRequest).Responses()) }},
			{"nothing added", nil, func(*testing.T) error { return wantEmpty(acomm.NewMultiRequest(live, 0).Responses()) }},
			{"nil tracker", nil, func(*testing.T) error { return wantEmpty(acomm.NewMultiRequest(nil, 0).Responses()) }},
			{"all removed", nil, func(*testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), request()
				if err := multi.AddRequest("a", req); err != nil {
					return err
				}
				multi.RemoveRequest(req)
				return wantEmpty(multi.Responses())
			}},
		},
		"NewTracker": {
			{"long path", syscall.ENAMETOOLONG, func(*testing.T) error { return tryTracker(strings.Repeat("/x", 200)) }},
			{"NUL in the path", fs.ErrInvalid, func(*testing.T) error { return tryTracker(none + "\x00") }},
			{"abstract socket", fs.ErrInvalid, func(*testing.T) error { return tryTracker("@none") }},
			{"path of a directory", syscall.EADDRINUSE, func(*testing.T) error { return tryTracker(filepath.Dir(none)) }},
			{"path in a file", syscall.ENOTDIR, func(*testing.T) error { return tryTracker(filepath.Join(os.Args[0], "x.sock")) }},
			{"negative timeout", nil, func(*testing.T) error {
				tracker, err := acomm.NewTracker("", nil, -1)
				if err != nil {
					return err
				}
				return errors.Join(tracker.Start(), tracker.TrackRequest(tracked, 0), removeAndStop(tracker, tracked))
			}},
		},
		"Tracker.Start": {
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.Tracker).Start() }},
			{"started", nil, func(*testing.T) error { return live.Start() }},
			{"path of another", syscall.EADDRINUSE, func(*testing.T) error { return tryTracker(live.Addr()) }},
		},
		"Tracker.Stop": {
			{"zero value", nil, func(*testing.T) error { new(acomm.Tracker).Stop(); return nil }},
			{"not started", nil, func(*testing.T) error { fresh().Stop(); return nil }},
			{"twice", nil, func(*testing.T) error { stopped.Stop(); stopped.Stop(); return nil }},
		},
		"Tracker.Addr": {
			{"zero value", nil, func(*testing.T) error { return wantText("", new(acomm.Tracker).Addr()) }},
			{"stopped", nil, func(*testing.T) error { return wantText(stopped.URL().Path, stopped.Addr()) }},
		},
		"Tracker.URL": {
			{"zero value", nil, func(*testing.T) error { return wantText("unix:", new(acomm.Tracker).URL().String()) }},
			{"stopped", nil, func(*testing.T) error { return wantText(stopped.Addr(), stopped.URL().Path) }},
		},
		"Tracker.NumRequests": {
			{"zero value", nil, func(*testing.T) error { return wantNumber(new(acomm.Tracker).NumRequests(), 0) }},
			{"stopped", nil, func(*testing.T) error { return wantNumber(stopped.NumRequests(), 0) }},
		},
		"Tracker.TrackRequest": {
			{"zero value", net.ErrClosed, func(*testing.T) error { return new(acomm.Tracker).TrackRequest(request(), 0) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return fresh().TrackRequest(request(), 0) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return stopped.TrackRequest(request(), 0) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return live.TrackRequest(nil, 0) }},
			{"zero request", fs.ErrInvalid, func(*testing.T) error { return live.TrackRequest(new(acomm.Request), 0) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return live.TrackRequest(tracked, 0) }},
			{"another with its id", fs.ErrExist, func(*testing.T) error { return live.TrackRequest(&acomm.Request{ID: tracked.ID}, 0) }},
			{"endless timeout", nil, func(*testing.T) error {
				req := request()
				defer live.RemoveRequest(req)
				return live.TrackRequest(req, math.MaxInt64)
			}},
		},
		"Tracker.RemoveRequest": {
			{"zero value", nil, func(*testing.T) error { return wantFalse(new(acomm.Tracker).RemoveRequest(request())) }},
			{"nil request", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(nil)) }},
			{"zero request", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(new(acomm.Request))) }},
			{"never tracked", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(request())) }},
			{"tracked by another", nil, func(*testing.T) error { return wantFalse(streams.RemoveRequest(tracked)) }},
			{"stopped", nil, func(*testing.T) error { return wantFalse(stopped.RemoveRequest(tracked)) }},
		},
		"Tracker.HandleResponse": {
			{"zero value", nil, func(*testing.T) error { new(acomm.Tracker).HandleResponse(&acomm.Response{ID: "x"}); return nil }},
			{"nil response", nil, func(*testing.T) error { live.HandleResponse(nil); return nil }},
			{"zero response", nil, func(*testing.T) error { live.HandleResponse(new(acomm.Response)); return nil }},
			{"unknown id", nil, func(*testing.T) error { live.HandleResponse(&acomm.Response{ID: "x"}); return nil }},
			{"stopped", nil, func(*testing.T) error { stopped.HandleResponse(&acomm.Response{ID: tracked.ID}); return nil }},
			{"request without handlers", nil, func(*testing.T) error {
				req := request()
				err := live.TrackRequest(req, 0)
				live.HandleResponse(&acomm.Response{ID: req.ID})
				return errors.Join(err, wantFalse(live.RemoveRequest(req)))
			}},
		},
		"Tracker.ProxyUnix": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return proxied(live, nil) }},
			{"zero request", fs.ErrInvalid, func(*testing.T) error { return proxied(live, new(acomm.Request)) }},
			{"zero value", net.ErrClosed, func(*testing.T) error { return proxied(new(acomm.Tracker), request()) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return proxied(fresh(), request()) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return proxied(stopped, request()) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return proxied(live, tracked) }},
			{"unix hook, stopped", nil, func(*testing.T) error {
				return proxied(stopped, &acomm.Request{ID: "x", Task: "t", ResponseHook: unixURL(none)})
			}},
		},
		"Tracker.ProxyStreamHTTPURL": {
			{"nil address", fs.ErrInvalid, func(*testing.T) error { return second(streams.ProxyStreamHTTPURL(nil)) }},
			{"no stream URL", fs.ErrInvalid, func(*testing.T) error { return second(live.ProxyStreamHTTPURL(unixURL(none))) }},
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return second(new(acomm.Tracker).ProxyStreamHTTPURL(unixURL(none))) }},
			{"zero address", nil, func(*testing.T) error {
				u, err := streams.ProxyStreamHTTPURL(&url.URL{})
				if err != nil {
					return err
				}
				return wantNumber(status(httptest.NewRequest("GET", u.String(), nil)), 400)
			}},
		},
		"Tracker.NewStreamUnix": {
			{"nil source", fs.ErrInvalid, func(*testing.T) error { return offered(live, "", nil) }},
			{"zero value", net.ErrClosed, func(*testing.T) error { return offered(new(acomm.Tracker), "", newSource()) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return offered(fresh(), "", newSource()) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return offered(stopped, "", newSource()) }},
			{"abstract socket", fs.ErrInvalid, func(*testing.T) error { return offered(live, "@none", newSource()) }},
			{"long directory", syscall.ENAMETOOLONG, func(*testing.T) error { return offered(live, strings.Repeat("/x", 100), newSource()) }},
			{"NUL in the directory", fs.ErrInvalid, func(*testing.T) error { return offered(live, "/\x00", newSource()) }},
			{"directory is a file", syscall.ENOTDIR, func(t *testing.T) error {
				file := filepath.Join(shortDir(t), "file")
				writeFile(t, file)
				return offered(live, file, newSource())
			}},
		},
		"NewUnixListener": {
			{"long path", syscall.ENAMETOOLONG, func(*testing.T) error { return acomm.NewUnixListener(strings.Repeat("/x", 200), 0).Start() }},
			{"NUL in the path", fs.ErrInvalid, func(*testing.T) error { return acomm.NewUnixListener(none+"\x00", 0).Start() }},
			{"abstract socket", fs.ErrInvalid, func(*testing.T) error { return acomm.NewUnixListener("@none", 0).Start() }},
			{"root", syscall.EADDRINUSE, func(*testing.T) error { return acomm.NewUnixListener("/", 0).Start() }},
			{"negative limit", nil, func(*testing.T) error {
				limited := acomm.NewUnixListener("", math.MinInt)
				defer limited.Stop(0)
				return errors.Join(limited.Start(), exchange(limited, limited.URL()))
			}},
		},
		"UnixListener.Addr": {
			{"zero value", nil, func(*testing.T) error { return wantText("", new(acomm.UnixListener).Addr()) }},
		},
		"UnixListener.URL": {
			{"zero value", nil, func(*testing.T) error { return wantText("unix:", new(acomm.UnixListener).URL().String()) }},
		},
		"UnixListener.Start": {
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.UnixListener).Start() }},
			{"started", syscall.EADDRINUSE, func(*testing.T) error { return ul.Start() }},
			{"path of another", syscall.EADDRINUSE, func(*testing.T) error { return acomm.NewUnixListener(ul.Addr(), 0).Start() }},
			{"limit reached", syscall.EADDRINUSE, func(t *testing.T) error {
				limited := startListener(t, "", 1)
				return errors.Join(exchange(limited, limited.URL()), limited.Start())
			}},
		},
		"UnixListener.NextConn": {
			{"zero value", nil, func(*testing.T) error { return wantNoConn(new(acomm.UnixListener)) }},
			{"stopped before Start", nil, func(*testing.T) error {
				listener := acomm.NewUnixListener("", 0)
				listener.Stop(0)
				return wantNoConn(listener)
			}},
			{"stopped", nil, func(t *testing.T) error {
				listener := startListener(t, "", 0)
				listener.Stop(0)
				return wantNoConn(listener)
			}},
			{"limit reached", nil, func(t *testing.T) error {
				limited := startListener(t, "", 1)
				return errors.Join(exchange(limited, limited.URL()), wantNoConn(limited))
			}},
		},
		"UnixListener.DoneConn": {
			{"zero value", nil, func(*testing.T) error { new(acomm.UnixListener).DoneConn(open); return stillOpen(open) }},
			{"not started", nil, func(*testing.T) error { acomm.NewUnixListener("", 0).DoneConn(open); return stillOpen(open) }},
			{"nil", nil, func(*testing.T) error { ul.DoneConn(nil); return nil }},
			{"nil pointer", nil, func(*testing.T) error { ul.DoneConn((*net.UnixConn)(nil)); return nil }},
			{"foreign connection", nil, func(*testing.T) error { ul.DoneConn(open); return stillOpen(open) }},
			{"foreign type", nil, func(*testing.T) error { ul.DoneConn(unhashableConn{Conn: open}); return stillOpen(open) }},
			{"twice", nil, func(t *testing.T) error {
				listener := startListener(t, "", 0)
				dial(t, listener.Addr())
				conn := listener.NextConn()
				listener.DoneConn(conn)
				listener.DoneConn(conn)
				listener.Stop(0)
				listener.DoneConn(conn)
				return nil
			}},
		},
		"UnixListener.Stop": {
			{"zero value", nil, func(*testing.T) error { new(acomm.UnixListener).Stop(0); return nil }},
			{"not started", nil, func(*testing.T) error { acomm.NewUnixListener("", 0).Stop(-1); return nil }},
			{"twice", nil, func(t *testing.T) error {
				listener := startListener(t, "", 0)
				listener.Stop(math.MaxInt64)
				listener.Stop(math.MinInt64)
				return nil
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
