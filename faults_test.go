package acomm_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// These tests break what the library stands on: processes, sockets, hooks,
// descriptors, disks. Each ends with a count of what went in and what came out,
// in which nothing may be missing.

func init() {
	roles["fault provider"] = faultProvider
	roles["fault coordinator"] = faultCoordinator
	roles["fault few descriptors"] = faultFewDescriptors
	roles["fault service"] = faultService
	roles["fault stream"] = faultStream
	roles["fault disk"] = faultDisk
	roles["fault disk, in a namespace"] = faultDiskInNamespace
}

// quickExit is for a process with the race detector, which takes a second to end.
var quickExit = "GORACE=atexit_sleep_ms=0 " + os.Getenv("GORACE")

// whySendFailed names the documented reason of a failed send; empty: it has none.
func whySendFailed(err error) string {
	for _, sentinel := range []error{
		syscall.ECONNREFUSED, fs.ErrNotExist, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded, net.ErrClosed, fs.ErrInvalid,
	} {
		if errors.Is(err, sentinel) {
			return sentinel.Error()
		}
	}
	return ""
}

// faultProvider prints the id of each request it takes. It answers those whose
// argument is not "never", and prints what came of it. It ends with a command.
func faultProvider() {
	ul := acomm.NewUnixListener(filepath.Join(os.Getenv("DIR"), "provider.sock"), 0)
	orExit(ul.Start())
	fmt.Println("ready")
	var working sync.WaitGroup
	working.Go(func() {
		<-commands
		ul.Stop(0)
	})
	slots := make(chan struct{}, 64)
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		slots <- struct{}{}
		working.Go(func() {
			defer func() { <-slots }()
			req, err := takeRequest(ul, conn, func(req *acomm.Request) { fmt.Println("took", req.ID) })
			if err != nil {
				return
			}
			fmt.Println("acknowledged", req.ID)
			var args string
			orExit(req.UnmarshalArgs(&args))
			if args == "never" {
				return
			}
			resp, err := acomm.NewResponse(req, args, nil, nil)
			orExit(err)
			if req.Respond(resp) == nil {
				fmt.Println("answered", req.ID)
			} else {
				fmt.Println("failed", req.ID)
			}
		})
	}
	working.Wait()
}

func TestFault_KilledProviderMeansOneTimeout(t *testing.T) {
	const requests = 50
	dir := shortDir(t)
	provider := startProcess(t, "fault provider", "DIR="+dir)
	require.Equal(t, "ready", provider.ReadLine())
	tracker := newTracker(t)

	var handled tally // by id
	ended := make(chan error, 10*requests)
	handle := func(req *acomm.Request, resp *acomm.Response) {
		handled.add(req.ID)
		ended <- resp.Error
	}
	var ids []string
	sent := make(chan error, requests)
	for i := range requests {
		args, timeout := "answer", patience
		if i%2 == 0 {
			args, timeout = "never", time.Second
		}
		req, err := acomm.NewRequest("test", tracker.URL().String(), args, handle, handle)
		require.NoError(t, err)
		ids = append(ids, req.ID)
		require.NoError(t, tracker.TrackRequest(req, timeout))
		go func() { sent <- acomm.Send(unixURL(filepath.Join(dir, "provider.sock")), req) }()
	}
	for range requests {
		require.NoError(t, within(t, sent, "an acknowledgement"))
	}
	var said tally
	for said.total() < 2*requests+requests/2 {
		said.add(strings.Fields(provider.ReadLine())[0])
	}
	require.Equal(t, requests, said.get("acknowledged"))
	require.Equal(t, requests/2, said.get("answered"), "the others wait for their response")
	provider.Kill()
	require.ErrorContains(t, provider.Wait(), "killed")

	var outcomes tally
	for range requests {
		switch err := within(t, ended, "a handler"); {
		case err == nil:
			outcomes.add("responses")
		default:
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.EqualError(t, err, "response timeout")
			outcomes.add("time-outs")
		}
	}
	for _, id := range ids { // whoever is late is heard, and no handler runs
		require.NoError(t, acomm.Send(tracker.URL(), &acomm.Response{ID: id}))
	}
	tracker.Stop()
	require.Empty(t, ended, "each once")
	for _, id := range ids {
		require.Equal(t, 1, handled.get(id))
	}
	require.Equal(t, requests/2, outcomes.get("responses"))
	require.Equal(t, requests/2, outcomes.get("time-outs"))
	t.Logf("requests in: %d; out: %s; handlers run: %d; late responses dropped: %d",
		requests, &outcomes, handled.total(), requests)
}

// faultCoordinator passes requests on to the provider, until a command.
func faultCoordinator() {
	dir := os.Getenv("DIR")
	tracker, err := acomm.NewTracker(filepath.Join(dir, "responses.sock"), nil, coordinatorTimeout)
	orExit(err)
	orExit(tracker.Start())
	ul := acomm.NewUnixListener(filepath.Join(dir, "requests.sock"), 0)
	orExit(ul.Start())
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = 100
	fmt.Println("ready")
	go func() {
		<-commands
		ul.Stop(0)
	}()
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		go func() {
			defer ul.DoneConn(conn)
			req := &acomm.Request{}
			if acomm.UnmarshalConnData(conn, req) != nil {
				return
			}
			err := passOn(tracker, req, unixURL(filepath.Join(dir, "provider.sock")), 0)
			_ = acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: err})
		}()
	}
	ul.Stop(0) // the other call may still be on its way
	tracker.Stop()
}

const coordinatorTimeout = 2 * time.Second

// passOn is what a coordinator does with a request.
func passOn(tracker *acomm.Tracker, req *acomm.Request, provider *url.URL, timeout time.Duration) error {
	proxied, err := tracker.ProxyUnix(req, timeout)
	if err != nil {
		return err
	}
	if err := acomm.Send(provider, proxied); err != nil {
		tracker.RemoveRequest(req)
		return err
	}
	return nil
}

// faultCall is a request on its way through a coordinator that may be killed.
type faultCall struct {
	id       string
	last     bool  // sent after the last restart
	sent     error // what Send returned
	removed  bool  // after that, before it was handled
	handlers atomic.Int32
	answer   atomic.Pointer[acomm.Response]
}

func TestFault_KilledCoordinatorResumesAndHandlesNothingTwice(t *testing.T) {
	const (
		requesters = 50
		each       = 100 // requests handled between two kills
	)
	kills := 4
	if *long {
		kills = 40
	}
	dir := shortDir(t)
	provider := startProcess(t, "fault provider", "DIR="+dir, quickExit)
	require.Equal(t, "ready", provider.ReadLine())
	var took, posts tally // by id
	var count counter
	collected := async(func() {
		for line := range provider.Lines() {
			if id, ok := strings.CutPrefix(line, "took "); ok {
				took.add(id)
				count.add()
			}
		}
	})
	tracker := newTracker(t)
	hook := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if json.NewDecoder(r.Body).Decode(resp) == nil {
			posts.add(resp.ID)
			tracker.HandleResponse(resp)
		}
	})

	// The requesters: they never wait for a response, and only end when told to.
	var last, stop atomic.Bool
	var failed, answered counter // sends; responses to requests of the last phase
	var mu sync.Mutex
	var calls []*faultCall
	call := func() *faultCall {
		c := &faultCall{last: last.Load()}
		timeout := coordinatorTimeout
		if c.last {
			timeout = patience
		}
		handle := func(_ *acomm.Request, resp *acomm.Response) {
			c.handlers.Add(1)
			c.answer.Store(resp)
			if c.last {
				answered.add()
			}
		}
		req, err := acomm.NewRequest("test", hook.String(), "answer", handle, handle)
		if err == nil {
			c.id = req.ID
			err = tracker.TrackRequest(req, timeout)
		}
		if err != nil {
			panic(err)
		}
		if c.sent = acomm.Send(unixURL(filepath.Join(dir, "requests.sock")), req); c.sent != nil {
			c.removed = tracker.RemoveRequest(req)
			failed.add()
		}
		return c
	}
	// A requester that has found nobody a few times in a row rests until the
	// coordinator is back: the machine is needed elsewhere.
	var starts counter
	send := func() {
		for found := 0; !stop.Load(); {
			up, started := starts.next()
			c := call()
			mu.Lock()
			calls = append(calls, c)
			mu.Unlock()
			if found++; c.sent == nil {
				found = 0
			}
			if found >= 20 && starts.load() == up && !stop.Load() {
				<-started
				found = 0
			}
		}
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	defer starts.add()
	defer stop.Store(true)

	before := 0
	for killed := range kills + 1 {
		if killed == 0 {
			for range requesters {
				sending.Go(send)
			}
		}
		requireReached(t, &failed, before+requesters, "senders to find nobody")
		coordinator := startProcess(t, "fault coordinator", "DIR="+dir, quickExit)
		require.Equal(t, "ready", coordinator.ReadLine(), "on the paths of the one killed")
		starts.add()
		if killed < kills {
			requireReached(t, &count, count.load()+each, "the service to resume")
			before = failed.load()
			coordinator.Kill()
			require.ErrorContains(t, coordinator.Wait(), "killed")
			require.Equal(t, fs.ModeSocket, mode(t, filepath.Join(dir, "requests.sock")).Type(), "left behind")
			require.Equal(t, fs.ModeSocket, mode(t, filepath.Join(dir, "responses.sock")).Type(), "left behind")
			continue
		}
		last.Store(true)
		requireReached(t, &answered, 2*each, "the service to resume for good")
		stop.Store(true)
		sending.Wait()
		tracker.Stop() // all have a response or a time-out
		require.NoError(t, coordinator.WriteLine("end"))
		require.NoError(t, coordinator.Wait())
	}
	require.NoError(t, provider.WriteLine("end"))
	require.NoError(t, provider.Wait())
	within(t, collected, "the provider's last words")

	var sends, ends tally
	for _, c := range calls {
		require.LessOrEqual(t, took.get(c.id), 1, "a request taken twice")
		require.LessOrEqual(t, posts.get(c.id), 1, "a response forwarded twice")
		switch {
		case c.sent == nil:
			sends.add("acknowledged")
			require.Equal(t, 1, took.get(c.id), "acknowledged means taken")
		default:
			why := whySendFailed(c.sent)
			require.NotEmpty(t, why, "an error that does not say why: %v", c.sent)
			sends.add("failed: " + why)
		}
		answer := c.answer.Load()
		switch {
		case c.removed:
			ends.add("removed")
			require.Zero(t, c.handlers.Load(), "removed and handled")
			continue
		case answer == nil:
			ends.add("LOST")
		case answer.Error == nil:
			ends.add("responses")
			require.Equal(t, 1, took.get(c.id))
		default:
			require.EqualError(t, answer.Error, "response timeout")
			ends.add("time-outs")
		}
		require.EqualValues(t, 1, c.handlers.Load(), "handled once")
		if c.last && c.sent == nil {
			require.NoError(t, answer.Error, "nothing was killed any more")
		}
		require.False(t, c.last && c.sent != nil, "nothing was killed any more: %v", c.sent)
	}
	t.Logf("coordinator killed %d times; requests in: %d (%s); out: %s; provider's handlers run: %d; forwards: %d",
		kills, len(calls), &sends, &ends, took.total(), posts.total())
	require.Equal(t, len(calls), ends.get("removed")+ends.get("responses")+ends.get("time-outs"))
}

// hookStep is what a hook does with a connection. It returns whether it has
// taken the response, as it would see it.
// hookCall is a connection to a hook.
type hookCall struct {
	conn    *net.TCPConn
	read    func() bool     // the response; false: there is none
	expired <-chan struct{} // closed when a request with a short time-out would have timed out
}

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

const (
	fewDescriptors = 64
	manyPeers      = 300
)

// faultFewDescriptors is a service whose descriptors run out. It prints how long
// it took to log as often as it is told to that they have, and what that cost,
// and each request it handles.
func faultFewDescriptors() {
	number, err := strconv.Atoi(os.Getenv("LINES"))
	orExit(err)
	var lines counter
	logrus.SetOutput(writerFunc(func(p []byte) (int, error) {
		lines.add()
		return len(p), nil
	}))
	var limit syscall.Rlimit
	orExit(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	limit.Cur = fewDescriptors
	orExit(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))

	stop := startFewDescriptors()
	fmt.Println("ready")
	reach(&lines, 1, commands)
	before, begin := cpuTime(), time.Now()
	reach(&lines, number, commands)
	fmt.Println(int64(time.Since(begin)), int64(cpuTime()-before))
	<-commands
	stop()
	fmt.Println("stopped")
}

// startFewDescriptors starts a provider, or a tracker that awaits responses.
func startFewDescriptors() (stop func()) {
	socket := os.Getenv("SOCKET")
	if os.Getenv("KIND") == "tracker" {
		tracker, err := acomm.NewTracker(socket, nil, patience)
		orExit(err)
		orExit(tracker.Start())
		handle := func(req *acomm.Request, resp *acomm.Response) {
			if resp.Error == nil {
				fmt.Println("handled", req.ID)
			} else {
				fmt.Println("failed", req.ID)
			}
		}
		for i := range manyPeers {
			orExit(tracker.TrackRequest(&acomm.Request{ID: strconv.Itoa(i), SuccessHandler: handle, ErrorHandler: handle}, 0))
		}
		return tracker.Stop
	}
	ul := acomm.NewUnixListener(socket, 0)
	orExit(ul.Start())
	go func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			go func() {
				_, _ = takeRequest(ul, conn, func(req *acomm.Request) { fmt.Println("handled", req.ID) })
			}()
		}
	}()
	return func() { ul.Stop(0) }
}

// Hazard: with the descriptors used up the accept loop burnt a core, flooded the
// log, and did not come back.
func TestFault_ServiceOutOfDescriptorsIsQuietAndResumes(t *testing.T) {
	// It waits 5 ms after the first failure, then twice as long each time, up to
	// a second: so many lines in the log take 1.3 s and 10.3 s.
	lines := 9
	if *long {
		lines = 18
	}
	for _, kind := range []string{"listener", "tracker"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(shortDir(t), "s.sock")
			child := startProcess(t, "fault few descriptors", "KIND="+kind, "SOCKET="+path, "LINES="+strconv.Itoa(lines))
			require.Equal(t, "ready", child.ReadLine())
			var conns []net.Conn
			for range manyPeers {
				conn, err := net.Dial("unix", path)
				require.NoError(t, err)
				defer conn.Close()
				require.NoError(t, conn.SetDeadline(time.Now().Add(2*patience)))
				conns = append(conns, conn)
			}
			var window, cpu time.Duration
			_, err := fmt.Sscan(child.ReadLine(), &window, &cpu)
			require.NoError(t, err)
			require.Greater(t, window, time.Second, "for %d lines in the log", lines)
			require.Less(t, cpu, window/20, "CPU time")

			acknowledged := make(chan error, manyPeers)
			for i, conn := range conns {
				go func() {
					hook := unixURL(path)
					err := acomm.SendConnData(conn, &acomm.Request{ID: strconv.Itoa(i), Task: "test", ResponseHook: hook})
					ack := &acomm.Response{}
					if err == nil {
						err = acomm.UnmarshalConnData(conn, ack)
					}
					acknowledged <- errors.Join(err, ack.Error)
				}()
			}
			for range manyPeers {
				require.NoError(t, within(t, acknowledged, "the service to resume"))
			}
			var handled tally
			for range manyPeers {
				handled.add(child.ReadLine())
			}
			for i := range manyPeers {
				require.Equal(t, 1, handled.get("handled "+strconv.Itoa(i)))
			}
			require.NoError(t, child.WriteLine("stop"))
			require.Equal(t, "stopped", child.ReadLine(), "and nothing else was handled")
			t.Logf("%d lines in the log, %s of CPU time in %s; requests in: %d; acknowledgements out: %d; handlers run: %d",
				lines, cpu, window, manyPeers, manyPeers, handled.total())
		})
	}
}

// faultService is a listener or a tracker that is started and stopped as it is
// told, and counts what it has handled.
func faultService() {
	var handled atomic.Int64
	var start func() error
	var stop func()
	var addr string
	count := func(*acomm.Request, *acomm.Response) { handled.Add(1) }
	track := func(string) error { return nil }
	if os.Getenv("KIND") == "tracker" {
		tracker, err := acomm.NewTracker(os.Getenv("SOCKET"), nil, patience)
		orExit(err)
		start, stop, addr = tracker.Start, tracker.Stop, tracker.Addr()
		track = func(id string) error {
			return tracker.TrackRequest(&acomm.Request{ID: id, SuccessHandler: count}, 0)
		}
	} else {
		ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
		addr = ul.Addr()
		start = func() error {
			if err := ul.Start(); err != nil {
				return err
			}
			go func() {
				for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
					go func() { _, _ = takeRequest(ul, conn, func(req *acomm.Request) { count(nil, nil) }) }()
				}
			}()
			return nil
		}
		stop = func() { ul.Stop(0) }
	}
	fmt.Println(addr)
	for command := range commands {
		var err error
		switch verb, id, _ := strings.Cut(command, " "); verb {
		case "start":
			err = start()
		case "track":
			err = track(id)
		case "stop":
			stop()
			fmt.Println("stopped after", handled.Load())
			continue
		}
		switch {
		case err == nil:
			fmt.Println("done")
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println("in use")
		default:
			fmt.Println(err)
		}
	}
}

// remoteService is a process in the role of faultService.
type remoteService struct {
	*process
	addr      string
	exchanges int
}

func startService(t testing.TB, kind, path string) *remoteService {
	t.Helper()
	s := &remoteService{process: startProcess(t, "fault service", "KIND="+kind, "SOCKET="+path)}
	s.addr = s.ReadLine()
	return s
}

func (s *remoteService) command(line, answer string) {
	s.t.Helper()
	require.NoError(s.t, s.WriteLine(line))
	require.Equal(s.t, answer, s.ReadLine())
}

// exchange sends the service what it handles, a request or a response.
func (s *remoteService) exchange() {
	s.t.Helper()
	s.exchanges++
	id := fmt.Sprint("exchange-", s.exchanges)
	s.command("track "+id, "done")
	require.NoError(s.t, acomm.Send(unixURL(s.addr), &acomm.Response{ID: id}))
}

// stop stops the service, which has handled what it was sent.
func (s *remoteService) stop() {
	s.t.Helper()
	s.command("stop", fmt.Sprint("stopped after ", s.exchanges))
}

func TestFault_RemovedDirectoryIsMadeAgain(t *testing.T) {
	for _, kind := range []string{"listener", "tracker"} {
		for _, given := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, path given %t", kind, given), func(t *testing.T) {
				t.Parallel()
				path := ""
				if given {
					path = filepath.Join(shortDir(t), "a", "b", "s.sock")
				}
				service := startService(t, kind, path)
				dir := filepath.Dir(service.addr)
				service.command("start", "done")
				service.exchange()
				held, err := net.Dial("unix", service.addr) // accepted or not, it does no harm
				require.NoError(t, err)
				require.NoError(t, os.RemoveAll(dir))
				require.ErrorIs(t, acomm.Send(unixURL(service.addr), &acomm.Response{}), fs.ErrNotExist)
				require.NoError(t, held.Close())
				service.stop()
				require.NoDirExists(t, dir)

				service.command("start", "done")
				service.exchange()
				service.stop()
				require.NoFileExists(t, service.addr)
				t.Logf("requests in: %d; acknowledgements out and handlers run: %d", service.exchanges, service.exchanges)
			})
		}
	}
}

func TestFault_ReplacedSocketFileIsItsOwners(t *testing.T) {
	for _, kind := range []string{"listener", "tracker"} {
		for _, how := range []string{"removed", "renamed over"} {
			t.Run(kind+", "+how, func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(shortDir(t), "s.sock")
				old := startService(t, kind, path)
				old.command("start", "done")
				old.exchange()

				// Somebody who knows no better makes room for the second process.
				second := startService(t, kind, path)
				second.command("start", "in use")
				if how == "removed" {
					require.NoError(t, os.Remove(path))
					second.command("start", "done")
				} else {
					second.CloseInput()
					second = startService(t, kind, path+".new")
					second.command("start", "done")
					require.NoError(t, os.Rename(path+".new", path))
					second.addr = path
				}
				second.exchange()
				old.stop() // not theirs by us
				second.exchange()
				old.command("start", "in use")

				// And the other way: a file that nobody of them made.
				require.NoError(t, os.Rename(path, path+".aside"))
				foreign, err := net.Listen("unix", path)
				require.NoError(t, err)
				second.stop() // not ours by them
				conn, err := net.Dial("unix", path)
				require.NoError(t, err)
				require.NoError(t, conn.Close())
				second.command("start", second.inUseOrDone(how))
				require.NoError(t, foreign.Close())
				t.Logf("requests in: %d; acknowledgements out and handlers run: %d",
					old.exchanges+second.exchanges, old.exchanges+second.exchanges)
			})
		}
	}
}

// inUseOrDone is what starting again says: the socket that was renamed has its
// own path, where nobody is.
func (s *remoteService) inUseOrDone(how string) string {
	if how == "removed" {
		return "in use"
	}
	return "done"
}

// faultStream offers streams in directories, one for each command, as a user who
// may not write everywhere. It prints why it could not.
func faultStream() {
	tracker, err := acomm.NewTracker("", nil, 0)
	orExit(err)
	orExit(tracker.Start())
	if os.Geteuid() == 0 {
		if err := syscall.Setuid(65534); err != nil {
			fmt.Println("can't be another user:", err)
			return
		}
	}
	fmt.Println("ready")
	for dir := range commands {
		fmt.Println(offerStream(tracker, dir))
	}
}

// offerStream offers a stream in the directory and says what came of it.
func offerStream(tracker *acomm.Tracker, dir string) string {
	src := newSource()
	u, err := tracker.NewStreamUnix(dir, src)
	switch {
	case err == nil:
		conn, err := net.Dial("unix", u.Path)
		if err != nil {
			return err.Error()
		}
		_ = conn.Close()
		<-src.closed
		return "streamed"
	case len(src.closed) > 0:
		return "the source was closed: " + err.Error()
	case errors.Is(err, fs.ErrPermission):
		return "not permitted"
	case errors.Is(err, syscall.ENOTDIR):
		return "not a directory"
	case errors.Is(err, syscall.ENOSPC):
		return "no space"
	case errors.Is(err, syscall.EROFS):
		return "read only"
	}
	return err.Error()
}

func TestFault_StreamThatCanNotBeOfferedIsAnError(t *testing.T) {
	dir := shortDir(t)
	require.NoError(t, os.Chmod(dir, 0o755))
	for name, mode := range map[string]fs.FileMode{"closed": 0o555, "open": 0o777} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, name), mode))
		require.NoError(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	writeFile(t, filepath.Join(dir, "file"))
	child := startProcess(t, "fault stream")
	if line := child.ReadLine(); line != "ready" {
		t.Skip(line)
	}
	var offered, streamed int
	for range 3 {
		for name, want := range map[string]string{
			"closed": "not permitted", "closed/new": "not permitted", "file": "not a directory",
			"open": "streamed", "open/new": "streamed",
		} {
			require.NoError(t, child.WriteLine(filepath.Join(dir, name)))
			require.Equal(t, want, child.ReadLine(), name)
			offered++
			if want == "streamed" {
				streamed++
			}
		}
	}
	for _, name := range []string{"closed", "open", "open/new"} {
		for _, entry := range list(t, filepath.Join(dir, name)) {
			require.True(t, entry.IsDir(), "left behind: %s", entry.Name())
		}
	}
	t.Logf("streams offered: %d; claimed and their sources closed: %d; refused with an error, the source the caller's: %d",
		offered, streamed, offered-streamed)
}

// faultDisk becomes faultDiskInNamespace in a mount namespace of its own, so that
// nothing is left of what it mounts.
func faultDisk() {
	unshare, err := exec.LookPath("unshare")
	if err == nil {
		err = exec.Command(unshare, "--mount", "--map-root-user", "true").Run()
	}
	if err != nil {
		fmt.Println("no namespace:", err)
		return
	}
	self, err := os.Executable()
	orExit(err)
	orExit(os.Setenv(roleEnv, "fault disk, in a namespace"))
	orExit(syscall.Exec(unshare, []string{"unshare", "--mount", "--map-root-user",
		self, "-test.run=^TestProcessRole$", "-test.timeout=0"}, os.Environ()))
}

// faultDiskInNamespace mounts a disk with room for a few files and goes through
// what may happen on it.
func faultDiskInNamespace() {
	dir := os.Getenv("DIR")
	mount := func(args ...string) bool { return exec.Command("mount", append(args, dir)...).Run() == nil }
	if !mount("-t", "tmpfs", "-o", "nr_inodes=8,size=64k", "tmpfs") {
		fmt.Println("no mount")
		return
	}
	fmt.Println("ready")
	socket := filepath.Join(dir, "s.sock")
	ul := acomm.NewUnixListener(socket, 0)
	var exchanges int
	works := func() {
		orExit(exchange(ul, ul.URL()))
		exchanges++
	}
	refused := func(err, want error) {
		if !errors.Is(err, want) {
			orExit(fmt.Errorf("got %v, want %v", err, want))
		}
	}
	offered := func(tracker *acomm.Tracker, want string) {
		if got := offerStream(tracker, dir); got != want {
			orExit(fmt.Errorf("stream: got %s, want %s", got, want))
		}
	}
	tracker, err := acomm.NewTracker("", nil, 0)
	orExit(err)
	orExit(tracker.Start())
	orExit(ul.Start())
	works()

	// Full: what is there works on, what would be new gives an error.
	filler := filepath.Join(dir, "filler")
	orExit(os.Mkdir(filler, 0o700))
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(filler, strconv.Itoa(i)), nil, 0o600)
	}
	refused(err, syscall.ENOSPC)
	works()
	second := acomm.NewUnixListener(filepath.Join(dir, "second.sock"), 0)
	refused(second.Start(), syscall.ENOSPC)
	offered(tracker, "no space")
	orExit(os.RemoveAll(filler))
	orExit(second.Start())
	second.Stop(0)
	offered(tracker, "streamed")
	ul.Stop(0)
	orExit(ul.Start())
	works()

	// Read only: Stop can't remove the file, and Start not replace it.
	if mount("-o", "remount,ro") {
		works()
		ul.Stop(0)
		refused(ul.Start(), syscall.EROFS)
		refused(second.Start(), syscall.EROFS)
		offered(tracker, "read only")
		if !mount("-o", "remount,rw") {
			orExit(errors.New("the disk is read only for ever"))
		}
		orExit(ul.Start())
		works()
	} else {
		fmt.Println("no remount")
	}
	ul.Stop(0)
	_, err = os.Lstat(socket)
	refused(err, fs.ErrNotExist)
	tracker.Stop()
	fmt.Println("survived", exchanges)
}

func TestFault_FullDiskIsAnError(t *testing.T) {
	child := startProcess(t, "fault disk", "DIR="+shortDir(t), quickExit)
	if line := child.ReadLine(); line != "ready" {
		t.Skip("can't mount a small disk here: " + line)
	}
	line := child.ReadLine()
	if line == "no remount" {
		t.Log("the disk can't be made read only here")
		line = child.ReadLine()
	}
	require.Contains(t, line, "survived")
	t.Logf("exchanges in and out on a full and a read-only disk: %s", strings.TrimPrefix(line, "survived "))
	require.NoError(t, child.Wait())
}

// stopRounds is how often, and in the middle of how many exchanges, a service is
// stopped.
func stopRounds() (rounds, exchanges int) {
	if *long {
		return 200, 1000
	}
	return 10, 200
}

func TestFault_ListenerStopAccountsForEachExchange(t *testing.T) {
	rounds, exchanges := stopRounds()
	dir := shortDir(t)
	ul := acomm.NewUnixListener(filepath.Join(dir, "s.sock"), 0)
	var sends tally
	var handlers int
	for range rounds {
		require.NoError(t, ul.Start())
		var handled tally // by id
		var count atomic.Int64
		half := make(chan struct{})
		var serving sync.WaitGroup
		serving.Go(func() {
			for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
				serving.Go(func() {
					_, _ = takeRequest(ul, conn, func(req *acomm.Request) {
						handled.add(req.ID)
						if count.Add(1) == int64(exchanges/2) {
							close(half)
						}
					})
				})
			}
		})
		results := make([]error, exchanges)
		start := make(chan struct{})
		var sending sync.WaitGroup
		for i := range results {
			req := &acomm.Request{ID: strconv.Itoa(i), Task: "test", ResponseHook: ul.URL()}
			sending.Go(func() {
				<-start
				results[i] = acomm.Send(ul.URL(), req)
			})
		}
		close(start)
		within(t, half, "half of the exchanges")
		within(t, async(func() { ul.Stop(0) }), "Stop")
		within(t, async(sending.Wait), "the senders")
		within(t, async(serving.Wait), "the provider")
		for i, err := range results {
			if err == nil {
				sends.add("acknowledged")
				require.Equal(t, 1, handled.get(strconv.Itoa(i)), "acknowledged, so handled once")
				continue
			}
			why := whySendFailed(err)
			require.NotEmpty(t, why, "an error that does not say why: %v", err)
			sends.add("failed: " + why)
			require.Zero(t, handled.get(strconv.Itoa(i)), "handled, but: %v", err)
		}
		handlers += handled.total()
	}
	t.Logf("stopped %d times; requests in: %d; out: %s; handlers run: %d", rounds, rounds*exchanges, &sends, handlers)
	require.Equal(t, rounds*exchanges, sends.total())
	require.Equal(t, handlers, sends.get("acknowledged"))
}

func TestFault_TrackerStopAccountsForEachExchange(t *testing.T) {
	rounds, exchanges := stopRounds()
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "s.sock"), nil, patience/2)
	require.NoError(t, err)
	var sends tally
	var handlers int
	for range rounds {
		require.NoError(t, tracker.Start())
		var handled tally // by id
		var count atomic.Int64
		start, quarter := make(chan struct{}), make(chan struct{})
		handle := func(req *acomm.Request, resp *acomm.Response) {
			if resp.Error == nil {
				handled.add(req.ID)
			}
			if count.Add(1) == int64(exchanges/4) {
				close(quarter)
			}
		}
		type result struct{ tracked, sent, stray error }
		results := make([]result, exchanges)
		var sending sync.WaitGroup
		for i := range results {
			req := &acomm.Request{ID: strconv.Itoa(i), SuccessHandler: handle, ErrorHandler: handle}
			begin := start
			if i%2 == 0 {
				begin = quarter // together with Stop
			}
			sending.Go(func() {
				<-begin
				r := &results[i]
				if r.tracked = tracker.TrackRequest(req, 0); r.tracked == nil {
					r.sent = acomm.Send(tracker.URL(), &acomm.Response{ID: req.ID})
				}
				// Once more, to be dropped, whatever Stop is at.
				r.stray = acomm.Send(tracker.URL(), &acomm.Response{ID: req.ID})
			})
		}
		close(start)
		within(t, quarter, "a quarter of the exchanges")
		within(t, async(tracker.Stop), "Stop")
		ran := int(count.Load())
		within(t, async(sending.Wait), "the senders")
		require.EqualValues(t, ran, count.Load(), "a handler ran after Stop")
		for i, r := range results {
			ended := handled.get(strconv.Itoa(i))
			if r.tracked != nil {
				require.ErrorIs(t, r.tracked, net.ErrClosed)
				require.Zero(t, ended)
				sends.add("not tracked")
			} else {
				require.NoError(t, r.sent, "Stop waits for it")
				require.Equal(t, 1, ended, "acknowledged, so handled once")
				sends.add("acknowledged")
			}
			if r.stray != nil {
				require.NotEmpty(t, whySendFailed(r.stray), "an error that does not say why: %v", r.stray)
				sends.add("strays refused")
			} else {
				sends.add("strays dropped")
			}
		}
		handlers += ran
	}
	t.Logf("stopped %d times; requests in: %d; out: %s; handlers run: %d", rounds, rounds*exchanges, &sends, handlers)
	require.Equal(t, 2*rounds*exchanges, sends.total())
	require.Equal(t, handlers, sends.get("acknowledged"))
}

// Hazard: Stop was told that the last request is gone a moment before it could
// know that its handler is yet to run.
func TestFault_TrackerStopWaitsForTheLastHandler(t *testing.T) {
	rounds := 500
	if *long {
		rounds = 20000
	}
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "s.sock"), nil, patience)
	require.NoError(t, err)
	var handled atomic.Int64
	count := func(*acomm.Request, *acomm.Response) {
		for range 100 { // a handler that takes its time
			runtime.Gosched()
		}
		handled.Add(1)
	}
	for i := range rounds {
		require.NoError(t, tracker.Start())
		req := &acomm.Request{ID: strconv.Itoa(i), SuccessHandler: count, ErrorHandler: count}
		timeout := patience
		if i%2 == 0 {
			timeout = time.Microsecond
		}
		require.NoError(t, tracker.TrackRequest(req, timeout))
		answered := async(func() {
			if i%2 != 0 {
				tracker.HandleResponse(&acomm.Response{ID: req.ID})
			}
		})
		tracker.Stop()
		require.EqualValues(t, i+1, handled.Load(), "Stop returned before the handler")
		within(t, answered, "the response")
	}
	t.Logf("stopped %d times; requests in: %d; handlers run: %d", rounds, rounds, handled.Load())
}
