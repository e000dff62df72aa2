package acomm_test

import (
	"errors"
	"io/fs"
	"math"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
)

// The rows of misuse_test.go for trackers and listeners.

// ofTrackers are the rows of Tracker and MultiRequest.
func (m *misused) ofTrackers() map[string][]misuse {
	live, stopped, streams, tracked, none := m.live, m.stopped, m.streams, m.tracked, m.none
	return map[string][]misuse{
		"NewMultiRequest": {
			{"nil tracker", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(nil, 0).AddRequest("a", m.request()) }},
			{"zero tracker", net.ErrClosed, func(*testing.T) error {
				return acomm.NewMultiRequest(new(acomm.Tracker), 0).AddRequest("a", m.request())
			}},
			{"negative timeout", nil, func(*testing.T) error {
				multi, req := acomm.NewMultiRequest(live, -1), m.request()
				defer multi.RemoveRequest(req)
				return multi.AddRequest("a", req)
			}},
		},
		"MultiRequest.AddRequest": {
			{"zero value", fs.ErrInvalid, func(*testing.T) error { return new(acomm.MultiRequest).AddRequest("a", m.request()) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", nil) }},
			{"no id", fs.ErrInvalid, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", new(acomm.Request)) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return acomm.NewMultiRequest(live, 0).AddRequest("a", tracked) }},
			{"tracker not started", net.ErrClosed, func(*testing.T) error { return acomm.NewMultiRequest(m.fresh(), 0).AddRequest("a", m.request()) }},
			{"tracker stopped", net.ErrClosed, func(*testing.T) error { return acomm.NewMultiRequest(stopped, 0).AddRequest("a", m.request()) }},
			{"name used", fs.ErrExist, func(t *testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), m.request()
				if err := multi.AddRequest("a", req); err != nil {
					t.Error(err)
				}
				defer multi.RemoveRequest(req)
				return multi.AddRequest("a", m.request())
			}},
			{"id used", fs.ErrExist, func(t *testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), m.request()
				if err := multi.AddRequest("a", req); err != nil {
					t.Error(err)
				}
				defer multi.RemoveRequest(req)
				return multi.AddRequest("b", req)
			}},
		},
		"MultiRequest.RemoveRequest": {
			{"zero value", nil, func(*testing.T) error { new(acomm.MultiRequest).RemoveRequest(m.request()); return nil }},
			{"nil", nil, func(*testing.T) error { acomm.NewMultiRequest(live, 0).RemoveRequest(nil); return nil }},
			{"never added", nil, func(t *testing.T) error {
				acomm.NewMultiRequest(live, 0).RemoveRequest(tracked)
				if live.NumRequests() != 1 {
					return fs.ErrNotExist // another's request is gone
				}
				return nil
			}},
			{"twice", nil, func(*testing.T) error {
				multi, req := acomm.NewMultiRequest(live, 0), m.request()
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
				multi, req := acomm.NewMultiRequest(live, 0), m.request()
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
			{"not started", nil, func(*testing.T) error { m.fresh().Stop(); return nil }},
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
			{"zero value", net.ErrClosed, func(*testing.T) error { return new(acomm.Tracker).TrackRequest(m.request(), 0) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return m.fresh().TrackRequest(m.request(), 0) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return stopped.TrackRequest(m.request(), 0) }},
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return live.TrackRequest(nil, 0) }},
			{"zero request", fs.ErrInvalid, func(*testing.T) error { return live.TrackRequest(new(acomm.Request), 0) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return live.TrackRequest(tracked, 0) }},
			{"another with its id", fs.ErrExist, func(*testing.T) error { return live.TrackRequest(&acomm.Request{ID: tracked.ID}, 0) }},
			{"endless timeout", nil, func(*testing.T) error {
				req := m.request()
				defer live.RemoveRequest(req)
				return live.TrackRequest(req, math.MaxInt64)
			}},
		},
		"Tracker.RemoveRequest": {
			{"zero value", nil, func(*testing.T) error { return wantFalse(new(acomm.Tracker).RemoveRequest(m.request())) }},
			{"nil request", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(nil)) }},
			{"zero request", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(new(acomm.Request))) }},
			{"never tracked", nil, func(*testing.T) error { return wantFalse(live.RemoveRequest(m.request())) }},
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
				req := m.request()
				err := live.TrackRequest(req, 0)
				live.HandleResponse(&acomm.Response{ID: req.ID})
				return errors.Join(err, wantFalse(live.RemoveRequest(req)))
			}},
		},
		"Tracker.ProxyUnix": {
			{"nil request", fs.ErrInvalid, func(*testing.T) error { return tryProxy(live, nil) }},
			{"zero request", fs.ErrInvalid, func(*testing.T) error { return tryProxy(live, new(acomm.Request)) }},
			{"zero value", net.ErrClosed, func(*testing.T) error { return tryProxy(new(acomm.Tracker), m.request()) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return tryProxy(m.fresh(), m.request()) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return tryProxy(stopped, m.request()) }},
			{"tracked already", fs.ErrExist, func(*testing.T) error { return tryProxy(live, tracked) }},
			{"unix misuseHook, stopped", nil, func(*testing.T) error {
				return tryProxy(stopped, &acomm.Request{ID: "x", Task: "t", ResponseHook: unixURL(none)})
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
				return wantNumber(proxyStatus(httptest.NewRequest("GET", u.String(), nil)), 400)
			}},
		},
		"Tracker.NewStreamUnix": {
			{"nil source", fs.ErrInvalid, func(*testing.T) error { return tryOffer(live, "", nil) }},
			{"zero value", net.ErrClosed, func(*testing.T) error { return tryOffer(new(acomm.Tracker), "", newSource()) }},
			{"not started", net.ErrClosed, func(*testing.T) error { return tryOffer(m.fresh(), "", newSource()) }},
			{"stopped", net.ErrClosed, func(*testing.T) error { return tryOffer(stopped, "", newSource()) }},
			{"abstract socket", fs.ErrInvalid, func(*testing.T) error { return tryOffer(live, "@none", newSource()) }},
			{"long directory", syscall.ENAMETOOLONG, func(*testing.T) error { return tryOffer(live, strings.Repeat("/x", 100), newSource()) }},
			{"NUL in the directory", fs.ErrInvalid, func(*testing.T) error { return tryOffer(live, "/\x00", newSource()) }},
			{"directory is a file", syscall.ENOTDIR, func(t *testing.T) error {
				file := filepath.Join(shortDir(t), "file")
				writeFile(t, file)
				return tryOffer(live, file, newSource())
			}},
		},
	}
}

// ofListeners are the rows of UnixListener.
func (m *misused) ofListeners() map[string][]misuse {
	ul, open, none := m.ul, m.open, m.none
	return map[string][]misuse{
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
