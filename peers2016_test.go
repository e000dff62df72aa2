package acomm_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Peers of 2016 and of today understand each other, in every role, each in a
// process of its own. The peer of 2016 is written from PROTOCOL.md and uses
// nothing of the library: it reads a header and a payload with one read each,
// and writes a frame with one write.

func init() {
	roles["requester"] = func() { converse(requesterToday()) }
	roles["requester of 2016"] = func() { converse(requester2016()) }
	roles["provider"] = providerToday
	roles["provider of 2016"] = provider2016
	roles["coordinator"] = coordinatorToday
	roles["coordinator of 2016"] = coordinator2016
}

// The tasks that all providers know. The text of a refusal and of a failure is
// in the arguments.
const (
	taskEcho   = "echo"   // the result is the arguments
	taskRefuse = "refuse" // in the acknowledgement
	taskFail   = "fail"   // in the response
	taskStream = "stream" // the arguments are the stream's size
)

// answer is what a requester hears of a request: a refusal or a response.
type answer struct {
	refusal string
	failure string
	result  json.RawMessage
	stream  *url.URL
}

// asker sends a request with a hook of the scheme given and waits for the answer.
type asker func(target *url.URL, hookScheme, task string, args any) (answer, error)

// conversation is what a requester is told to do: a request of each kind, and
// that so many times at once, with the targets and sizes in turn.
type conversation struct {
	AtOnce     int
	HookScheme string
	Targets    []string
	Sizes      []int // of the arguments, in bytes
}

// verdict is what a requester says of a conversation.
type verdict struct {
	Answered int // requests, as they should be
	Error    string
}

// converse holds conversations and prints its verdict on each.
func converse(ask asker, read consumer) {
	for line := range commands {
		var c conversation
		orExit(json.Unmarshal([]byte(line), &c))
		errs := make([]error, c.AtOnce)
		var answered atomic.Int64
		var talking sync.WaitGroup
		for i := range errs {
			talking.Go(func() { errs[i] = c.talk(ask, read, i, &answered) })
		}
		talking.Wait()
		v := verdict{Answered: int(answered.Load())}
		if err := errors.Join(errs...); err != nil {
			v.Error = err.Error()
		}
		fmt.Printf("%s\n", encode(v))
	}
}

// talk sends one request of each kind and checks its answer.
func (c conversation) talk(ask asker, read consumer, i int, answered *atomic.Int64) error {
	target, err := url.Parse(c.Targets[i%len(c.Targets)])
	orExit(err)
	text := fmt.Sprintf("%d: %s", i, strings.Repeat("x", c.Sizes[i%len(c.Sizes)]))
	stream := int64(i * 1000)
	for task, want := range map[string]answer{
		taskEcho:   {result: encode(text)},
		taskRefuse: {refusal: text},
		taskFail:   {failure: text},
		taskStream: {result: encode(stream)},
	} {
		args := any(text)
		if task == taskStream {
			args = stream
		}
		got, err := ask(target, c.HookScheme, task, args)
		if err != nil {
			return fmt.Errorf("%s: %w", task, err)
		}
		if got.refusal != want.refusal || got.failure != want.failure || compact(got.result) != compact(want.result) {
			return fmt.Errorf("%s: got %.200q", task, fmt.Sprint(got))
		}
		if (got.stream != nil) != (task == taskStream) {
			return fmt.Errorf("%s: stream %v", task, got.stream)
		}
		if got.stream != nil {
			if err := c.checkStream(got.stream, read, stream); err != nil {
				return fmt.Errorf("%s: %w", task, err)
			}
		}
		answered.Add(1)
	}
	return nil
}

func (c conversation) checkStream(u *url.URL, read consumer, size int64) error {
	if u.Scheme != c.HookScheme {
		return fmt.Errorf("not published: %v", u)
	}
	data := newSink()
	if err := read(data, u); err != nil {
		return err
	}
	if hex.EncodeToString(data.sum.Sum(nil)) != patternSum(size) {
		return fmt.Errorf("%d bytes of %d, or others", data.n, size)
	}
	return nil
}

// compact has null and absence for the same.
func compact(data json.RawMessage) string {
	var buf bytes.Buffer
	if json.Compact(&buf, data) != nil {
		return "null"
	}
	return buf.String()
}

// eitherScheme reads streams over HTTP, or with the consumer given.
func eitherScheme(unix consumer) consumer {
	return func(dest io.Writer, u *url.URL) error {
		if u.Scheme == "unix" {
			return unix(dest, u)
		}
		return httpGet(dest, u)
	}
}

// serveHTTP starts an HTTP server of a process.
func serveHTTP(handler http.Handler) *url.URL {
	u, err := url.Parse(httptest.NewServer(handler).URL)
	orExit(err)
	return u
}

// ---- the roles of 2016

func requester2016() (asker, consumer) {
	var tracked sync.Map // of channels, by id
	handle := func(resp response2016) {
		if responses, ok := tracked.LoadAndDelete(resp.ID); ok {
			responses.(chan response2016) <- resp
		}
	}
	hooks := map[string]*url.URL{
		"unix": receive2016("requester", handle),
		"http": serveHTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var resp response2016
			orExit(json.NewDecoder(r.Body).Decode(&resp))
			_, _ = w.Write(encode(response2016{}))
			handle(resp)
		})),
	}
	ask := func(target *url.URL, hookScheme, task string, args any) (answer, error) {
		raw := encode(args)
		req := request2016{ID: rand.Text(), Task: task, ResponseHook: hooks[hookScheme], Args: &raw}
		responses := make(chan response2016, 1)
		tracked.Store(req.ID, responses)
		ack, err := send2016(target, req)
		if err != nil || ack.Error != "" {
			return answer{refusal: ack.Error}, err
		}
		resp := <-responses
		got := answer{failure: resp.Error, stream: resp.StreamURL}
		if resp.Result != nil {
			got.result = *resp.Result
		}
		return got, nil
	}
	return ask, eitherScheme(consumer2016)
}

func provider2016() {
	fmt.Println(serve2016("provider", func(conn net.Conn) {
		var req request2016
		if err := read2016(conn, &req); err != nil {
			fmt.Fprintln(os.Stderr, "misread a request:", err)
			return
		}
		if req.ID == "" || req.Task == "" || req.ResponseHook == nil {
			_ = write2016(conn, response2016{Error: "invalid request"})
			return
		}
		var text string
		if req.Args != nil {
			_ = json.Unmarshal(*req.Args, &text)
		}
		if req.Task == taskRefuse {
			_ = write2016(conn, response2016{Error: text})
			return
		}
		_ = write2016(conn, response2016{})
		resp := response2016{ID: req.ID}
		switch req.Task {
		case taskFail:
			resp.Error = text
		case taskStream:
			var size int64
			orExit(json.Unmarshal(*req.Args, &size))
			resp.StreamURL, _ = stream2016(rand.Text(), newPatternSource(whole(size), nil))
			fallthrough
		default:
			resp.Result = req.Args
		}
		_, _ = send2016(req.ResponseHook, resp)
	}))
	for range commands {
	}
}

func coordinator2016() {
	provider, err := url.Parse(os.Getenv("PROVIDER"))
	orExit(err)
	var base *url.URL
	var hooks sync.Map // the requesters', by id
	responses := receive2016("coordinator", func(resp response2016) {
		hook, ok := hooks.LoadAndDelete(resp.ID)
		if !ok {
			return
		}
		if resp.StreamURL != nil {
			u := *base
			u.Path, u.RawQuery = "/stream", url.Values{"addr": {resp.StreamURL.String()}}.Encode()
			resp.StreamURL = &u
		}
		_, _ = send2016(hook.(*url.URL), resp)
	})
	mux := http.NewServeMux()
	mux.HandleFunc("/task", func(w http.ResponseWriter, r *http.Request) {
		var req request2016
		orExit(json.NewDecoder(r.Body).Decode(&req))
		if req.ResponseHook.Scheme != "unix" {
			hooks.Store(req.ID, req.ResponseHook)
			req.ResponseHook = responses
		}
		ack, err := send2016(provider, req)
		if err != nil {
			ack.Error = err.Error()
		}
		_, _ = w.Write(encode(ack))
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		addr, err := url.Parse(r.URL.Query().Get("addr"))
		orExit(err)
		_ = consumer2016(w, addr)
	})
	base = serveHTTP(mux)
	fmt.Println(base.JoinPath("task"))
	for range commands {
	}
}

// ---- the peer of today

func startTracker(streamURL *url.URL) *acomm.Tracker {
	tracker, err := acomm.NewTracker("", streamURL, patience)
	orExit(err)
	orExit(tracker.Start())
	return tracker
}

func requesterToday() (asker, consumer) {
	tracker := startTracker(nil)
	hooks := map[string]*url.URL{
		"unix": tracker.URL(),
		"http": serveHTTP(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			resp := &acomm.Response{}
			orExit(json.NewDecoder(r.Body).Decode(resp))
			tracker.HandleResponse(resp)
		})),
	}
	ask := func(target *url.URL, hookScheme, task string, args any) (answer, error) {
		responses := make(chan *acomm.Response, 1)
		handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
		req, err := acomm.NewRequest(task, hooks[hookScheme].String(), args, handle, handle)
		orExit(err)
		orExit(tracker.TrackRequest(req, 0))
		if err := acomm.Send(target, req); err != nil {
			tracker.RemoveRequest(req)
			return answer{refusal: err.Error()}, nil
		}
		resp := <-responses
		got := answer{stream: resp.StreamURL}
		if resp.Error != nil {
			got.failure = resp.Error.Error()
		}
		if resp.Result != nil {
			got.result = *resp.Result
		}
		return got, nil
	}
	return ask, eitherScheme(acomm.Stream)
}

func providerToday() {
	tracker := startTracker(nil)
	listener := acomm.NewUnixListener("", 0)
	orExit(listener.Start())
	fmt.Println(listener.URL())
	for {
		conn := listener.NextConn()
		go func() {
			defer listener.DoneConn(conn)
			req := &acomm.Request{}
			if acomm.UnmarshalConnData(conn, req) != nil {
				return
			}
			var text string
			_ = req.UnmarshalArgs(&text)
			if req.Task == taskRefuse {
				_ = acomm.SendConnData(conn, &acomm.Response{Error: errors.New(text)})
				return
			}
			if acomm.SendConnData(conn, &acomm.Response{}) != nil {
				return
			}
			var stream *url.URL
			var result any
			var failure error
			switch req.Task {
			case taskFail:
				failure = errors.New(text)
			case taskStream:
				var size int64
				orExit(req.UnmarshalArgs(&size))
				u, err := tracker.NewStreamUnix("", newPatternSource(whole(size), nil))
				orExit(err)
				stream = u
				fallthrough
			default:
				result = req.Args
			}
			resp, err := acomm.NewResponse(req, result, stream, failure)
			orExit(err)
			_ = req.Respond(resp)
		}()
	}
}

func coordinatorToday() {
	provider, err := url.Parse(os.Getenv("PROVIDER"))
	orExit(err)
	var tracker *acomm.Tracker
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	mux.HandleFunc("/task", func(w http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		orExit(json.NewDecoder(r.Body).Decode(req))
		proxied, err := tracker.ProxyUnix(req, 0)
		if err == nil {
			if err = acomm.Send(provider, proxied); err != nil {
				tracker.RemoveRequest(req)
			}
		}
		_, _ = w.Write(encode(&acomm.Response{Error: err}))
	})
	base := serveHTTP(mux)
	tracker = startTracker(base.JoinPath("stream"))
	fmt.Println(base.JoinPath("task"))
	for range commands {
	}
}

// ---- the tests

// converse has a requester process hold conversations, all of which must go well.
// It returns the number of requests that were answered.
func (p *process) converse(c conversation) int {
	p.t.Helper()
	p.begin(c)
	return p.end(c)
}

func (p *process) begin(c conversation) {
	p.t.Helper()
	require.NoError(p.t, p.WriteLine(string(encode(c))))
}

// end waits for the requester's verdict.
func (p *process) end(c conversation) int {
	p.t.Helper()
	var v verdict
	require.NoError(p.t, json.Unmarshal([]byte(p.ReadLine()), &v))
	require.Empty(p.t, v.Error)
	require.Equal(p.t, 4*c.AtOnce, v.Answered)
	return v.Answered
}

var eras = []string{"", " of 2016"}

// inAllEras runs a test, which returns how many requests were answered, with each
// requester and each provider there is: the two of 2016 among themselves as well,
// which holds the test's own peer to what it is meant to be.
func inAllEras(t *testing.T, test func(t *testing.T, requester, provider string) int) {
	for _, r := range eras {
		for _, p := range eras {
			t.Run(fmt.Sprintf("requester%s,provider%s", r, p), func(t *testing.T) {
				t.Logf("%d requests answered as they should be", test(t, "requester"+r, "provider"+p))
			})
		}
	}
}

// mixedSizes are few large ones among many small ones.
var mixedSizes = []int{0, 1, 10, 100, 1000, 0, 10, 100, 4 << 10, 30 << 10}

func TestPeersOf2016_UnderstandEachOther(t *testing.T) {
	inAllEras(t, func(t *testing.T, requester, provider string) int {
		targets := []string{startProcess(t, provider).ReadLine()}
		requests := startProcess(t, requester)
		answered := requests.converse(conversation{1, "unix", targets, []int{100 << 10}})
		answered += requests.converse(conversation{100, "unix", targets, mixedSizes})
		if *long {
			answered += requests.converse(conversation{100, "unix", targets, []int{30 << 10}})
			answered += requests.converse(conversation{100, "unix", targets, []int{100 << 10}})
		}
		return answered
	})
}

func TestPeersOf2016_AreProxied(t *testing.T) {
	for _, era := range eras {
		t.Run("coordinator"+era, func(t *testing.T) {
			inAllEras(t, func(t *testing.T, requester, provider string) int {
				target := startProcess(t, provider).ReadLine()
				targets := []string{startProcess(t, "coordinator"+era, "PROVIDER="+target).ReadLine()}
				requests := startProcess(t, requester)
				answered := requests.converse(conversation{1, "http", targets, []int{100 << 10}})
				answered += requests.converse(conversation{full(100, 10), "http", targets, mixedSizes})
				answered += requests.converse(conversation{full(100, 5), "unix", targets, mixedSizes})
				return answered
			})
		})
	}
}

// Each of many processes has a part in it: as the provider of one requester, and
// as a requester of one provider.
func TestPeersOf2016_ManyProcessesUnderstandEachOther(t *testing.T) {
	number := full(100, 5)
	inAllEras(t, func(t *testing.T, requester, provider string) int {
		var providers []string
		for range number {
			providers = append(providers, startProcess(t, provider).ReadLine())
		}
		return startProcess(t, requester).converse(conversation{number, "unix", providers, mixedSizes})
	})
	inAllEras(t, func(t *testing.T, requester, provider string) (answered int) {
		c := conversation{full(10, 2), "unix", []string{startProcess(t, provider).ReadLine()}, mixedSizes}
		var requesters []*process
		for range number {
			requesters = append(requesters, startProcess(t, requester))
		}
		for _, r := range requesters {
			r.begin(c)
		}
		for _, r := range requesters {
			answered += r.end(c)
		}
		return answered
	})
}
