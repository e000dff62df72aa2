package acomm_test

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hooks that fail in every way: a response is forwarded at most once.

// hookCall is a connection to a hook.
type hookCall struct {
	conn    *net.TCPConn
	read    func() bool     // the response; false: there is none
	expired <-chan struct{} // closed when a request with a short time-out would have timed out
}

// hookStep is what a hook does with a connection. It returns whether it has
// taken the response, as it would see it.
type hookStep func(call hookCall) (taken bool)

// answers reads the response and writes the answer.
func answers(answer string, taken bool) hookStep {
	return func(call hookCall) bool {
		ok := call.read()
		_, _ = io.WriteString(call.conn, "HTTP/1.1 "+answer)
		return taken && ok
	}
}

func TestFault_HookIsForwardedToAtMostOnce(t *testing.T) {
	const headers = "\r\nConnection: close\r\nContent-Length: "
	accept := answers("204 No Content"+headers+"0\r\n\r\n", true)
	busy := answers("503 Service Unavailable\r\nRetry-After: 1"+headers+"0\r\n\r\n", false)
	busyNow := answers("503 Service Unavailable\r\nRetry-After: 0"+headers+"0\r\n\r\n", false)
	gateway := answers("503 Service Unavailable"+headers+"0\r\n\r\n", true) // of one that has passed it on
	full := answers("429 Too Many Requests"+headers+"0\r\n\r\n", false)
	garbage := func(call hookCall) bool {
		ok := call.read()
		_, _ = io.WriteString(call.conn, "this is no HTTP\r\n\r\n")
		return ok
	}
	hang := func(call hookCall) bool {
		ok := call.read()
		<-call.expired
		return ok
	}
	reset := func(call hookCall) bool {
		ok := call.read()
		_ = call.conn.SetLinger(0)
		return ok
	}
	resetUnread := func(call hookCall) bool {
		_ = call.conn.SetLinger(0)
		return false
	}
	const soon = 200 * time.Millisecond

	refusals := watchRefusals(t)
	var total struct{ requests, attempts, taken atomic.Int64 }
	t.Run("hook", func(t *testing.T) { // returns when all rows are done
		for name, row := range map[string]struct {
			refuses int        // attempts while nobody listens; below 0: all
			script  []hookStep // for each connection; the last for all that follow
			timeout time.Duration
			silent  bool // the provider never answers
			taken   int
			posts   int // at least
		}{
			"accepts":                        {script: []hookStep{accept}, timeout: patience, taken: 1},
			"refuses":                        {refuses: -1, timeout: soon},
			"refuses, comes back":            {refuses: 3, script: []hookStep{accept}, timeout: patience, taken: 1},
			"503":                            {script: []hookStep{busy}, timeout: soon, posts: 2},
			"503 of a gateway":               {script: []hookStep{gateway, accept}, timeout: patience, taken: 1, posts: 1},
			"503, comes back":                {script: []hookStep{busy, accept}, timeout: patience, taken: 1, posts: 2},
			"429 and 503, comes back":        {script: []hookStep{full, full, busyNow, full, accept}, timeout: patience, taken: 1, posts: 5},
			"refuses, 503, comes back":       {refuses: 3, script: []hookStep{busyNow, accept}, timeout: patience, taken: 1, posts: 2},
			"hangs, comes back":              {script: []hookStep{hang, accept}, timeout: soon, taken: 1},
			"hangs, time is left":            {script: []hookStep{hang, accept}, timeout: patience, taken: 1},
			"resets, comes back":             {script: []hookStep{reset, accept}, timeout: patience, taken: 1},
			"garbage, comes back":            {script: []hookStep{garbage, accept}, timeout: patience, taken: 1},
			"garbage in the answer":          {script: []hookStep{answers("200 OK"+headers+"6\r\n\r\n<html>", true), accept}, timeout: patience, taken: 1},
			"answer cut off":                 {script: []hookStep{answers("200 OK"+headers+"9\r\n\r\n{", true), accept}, timeout: patience, taken: 1},
			"500, comes back":                {script: []hookStep{answers("500 Oops"+headers+"0\r\n\r\n", true), accept}, timeout: patience, taken: 1},
			"refuses, 503, resets":           {refuses: 3, script: []hookStep{full, reset, accept}, timeout: patience, taken: 1, posts: 2},
			"provider silent":                {script: []hookStep{accept}, timeout: soon, silent: true, taken: 1},
			"provider silent, hook 503":      {script: []hookStep{full, accept}, timeout: soon, silent: true},
			"resets unread: may be repeated": {script: []hookStep{resetUnread}, timeout: soon},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				addr, listen := unboundPort(t)
				var attempts, taken, posts atomic.Int64
				ids := make(chan string, 100)
				expired := make(chan struct{})
				serve := func(l net.Listener) {
					var serving sync.WaitGroup
					defer serving.Wait()
					for {
						conn, err := l.Accept()
						if err != nil {
							return
						}
						step := row.script[min(int(attempts.Add(1)), len(row.script))-1]
						serving.Go(func() {
							defer conn.Close()
							took := step(hookCall{conn: conn.(*net.TCPConn), expired: expired, read: func() bool {
								req, err := http.ReadRequest(bufio.NewReader(conn))
								if err != nil {
									return false
								}
								var resp acomm.Response
								if json.NewDecoder(req.Body).Decode(&resp) != nil {
									return false
								}
								posts.Add(1)
								ids <- resp.ID
								return true
							}})
							if took {
								taken.Add(1)
							}
						})
					}
				}
				tracker := newTracker(t)
				req, err := acomm.NewRequest("test", "http://"+addr+"/hook", nil, nil, nil)
				require.NoError(t, err)
				refused := refusals.of(addr)
				proxied, err := tracker.ProxyUnix(req, row.timeout)
				require.NoError(t, err)
				clock := &acomm.Request{ID: "clock", ErrorHandler: func(*acomm.Request, *acomm.Response) { close(expired) }}
				require.NoError(t, tracker.TrackRequest(clock, soon))
				if !row.silent {
					require.NoError(t, proxied.Respond(&acomm.Response{ID: req.ID}))
				}
				total.requests.Add(1)
				served := async(func() {})
				if row.refuses >= 0 {
					for range row.refuses {
						within(t, refused, "an attempt while nobody listens")
					}
					l := listen()
					defer l.Close()
					served = async(func() { serve(l) })
					within(t, async(tracker.Stop), "the forward")
					l.Close()
				}
				within(t, async(tracker.Stop), "the forward")
				within(t, served, "the hook")

				require.EqualValues(t, row.taken, taken.Load())
				require.GreaterOrEqual(t, posts.Load(), int64(max(row.posts, row.taken)))
				if row.posts == 0 && row.taken > 0 {
					require.EqualValues(t, 1, attempts.Load(), "not again")
				}
				close(ids)
				for id := range ids {
					require.Equal(t, req.ID, id)
				}
				total.attempts.Add(attempts.Load())
				total.taken.Add(taken.Load())
			})
		}
	})
	t.Logf("requests in: %d; connections to the hooks: %d; responses out, taken by a hook: %d",
		total.requests.Load(), total.attempts.Load(), total.taken.Load())
}
