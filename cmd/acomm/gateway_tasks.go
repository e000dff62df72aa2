package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

// The plain HTTP door: POST /tasks/TASK has the arguments as its body, and is answered
// with the result. A requester needs neither a hook nor a library.

// maxErrorText is how many bytes of an error go into an answer.
const maxErrorText = 64 << 10

// asyncTime is how long "at once" takes at most, with Prefer: respond-async.
const asyncTime = time.Second

// handleTask takes a request without a hook, and answers with its response, or with
// where that can be fetched from.
func (g *gateway) handleTask(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		g.refuseTask(w, "", refuse(http.StatusMethodNotAllowed, reasonInvalid, "send a task with POST"))
		return
	}
	wait, err := g.waitOf(r)
	if err != nil {
		g.refuseTask(w, "", &refusal{http.StatusBadRequest, reasonInvalid, err})
		return
	}
	if g.draining.Load() {
		w.Header().Set("Connection", "close") // the body is not read
		g.refuseTask(w, "", errDraining())
		return
	}
	args, refused := g.readArgs(w, r)
	if refused != nil {
		g.refuseTask(w, "", refused)
		return
	}
	req := &acomm.Request{ID: rand.Text(), Task: r.PathValue("task"), ResponseHook: g.hook, Args: args}
	task := g.task(req.Task)
	g.metrics.requests.WithLabelValues(task).Inc()
	if prefersAsync(r) && g.results.number() >= g.opts.maxOutstanding {
		g.refuseTask(w, task, refuse(http.StatusTooManyRequests, reasonBusy, "%d responses wait to be fetched: try again later", g.opts.maxOutstanding))
		return
	}
	result := newTaskResult()
	tracked, refused := g.begin(req, task, wait, result)
	if refused != nil {
		g.refuseTask(w, task, refused)
		return
	}
	if prefersAsync(r) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(asyncTime + g.timeouts.answer))
		select {
		case <-result.taken:
		case <-result.done: // refused, perhaps
		case <-time.After(asyncTime):
		case <-r.Context().Done():
		}
		if refused := result.refusal(); refused != nil {
			g.refuseTask(w, task, refused)
			return
		}
		w.Header().Set("Location", g.results.add(result, wait+g.opts.unread, g.leaveResult))
		w.Header().Set("Preference-Applied", "respond-async")
		writeJSON(w, http.StatusAccepted, map[string]string{"id": req.ID})
		return
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + g.timeouts.answer))
	select {
	case <-result.done:
		g.answerTask(w, r, result)
	case <-r.Context().Done(): // the response is dropped, and its stream ended
		if g.waiting.remove(tracked) {
			g.waiting.drop()
			g.pending.Add(-1)
			return
		}
		<-result.done
		g.leaveResult(result)
	}
}

// handleTasks tells which tasks there are providers for.
func (g *gateway) handleTasks(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		writeError(w, http.StatusMethodNotAllowed, errors.New("read the list of tasks with GET"))
		return
	}
	entries, err := os.ReadDir(g.opts.socketDir) // sorted by name
	if err != nil {
		g.warn("failed to look for tasks", err, "", "")
		writeError(w, http.StatusInternalServerError, errors.New("the directory of the tasks can't be read"))
		return
	}
	list := taskList{Tasks: []taskEntry{}}
	for _, entry := range entries {
		if g.task(entry.Name()) == "" {
			continue
		}
		if providers, err := g.providers(entry.Name()); err == nil && len(providers) > 0 {
			list.Tasks = append(list.Tasks, taskEntry{entry.Name(), len(providers)})
		}
	}
	writeJSON(w, http.StatusOK, list)
}

// waitOf is how long the requester waits: ?wait, up to --timeout, which is the default.
func (g *gateway) waitOf(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("wait")
	if text == "" {
		return g.opts.timeout, nil
	}
	wait, err := time.ParseDuration(text)
	if err != nil || wait <= 0 {
		return 0, fmt.Errorf("wait=%.64q is not a time such as 30s", text)
	}
	return min(wait, g.opts.timeout), nil
}

// prefersAsync reports whether the requester asks for an answer at once (RFC 7240).
func prefersAsync(r *http.Request) bool {
	for _, prefer := range r.Header.Values("Prefer") {
		for part := range strings.SplitSeq(prefer, ",") {
			name, _, _ := strings.Cut(part, ";")
			if strings.EqualFold(strings.TrimSpace(name), "respond-async") {
				return true
			}
		}
	}
	return false
}

// readArgs reads the arguments, one JSON value or nothing.
func (g *gateway) readArgs(w http.ResponseWriter, r *http.Request) (*json.RawMessage, *refusal) {
	body, refused := g.readBody(w, r)
	if refused != nil {
		return nil, refused
	}
	if len(body) == 0 {
		body = []byte("null")
	}
	if !json.Valid(body) {
		return nil, refuse(http.StatusBadRequest, reasonInvalid, "the arguments are not JSON")
	}
	return (*json.RawMessage)(&body), nil
}

// begin offers the request to its providers, in the background: one that listens and does
// not answer must not hold up the requester. The result is the response, the time-out, or
// what the providers have refused it with. After a refusal by begin there is none.
func (g *gateway) begin(req *acomm.Request, task string, wait time.Duration, result *taskResult) (*waiting, *refusal) {
	if err := checkTaskName(req.Task); err != nil {
		return nil, &refusal{http.StatusBadRequest, reasonInvalid, err}
	}
	providers, err := g.providers(req.Task)
	if err != nil || len(providers) == 0 {
		if err != nil {
			g.warn("failed to look for providers", err, req.ID, task)
		}
		return nil, refuse(http.StatusNotFound, reasonNoProvider, "nobody provides the task %q", req.Task)
	}
	if g.pending.Add(1) > int64(g.opts.maxOutstanding) {
		g.pending.Add(-1)
		return nil, refuse(http.StatusTooManyRequests, reasonBusy, "%d requests are waiting for responses: try again later", g.opts.maxOutstanding)
	}
	taken := time.Now()
	tracked, err := g.waiting.add(req.ID, wait, g.publish, func(resp *acomm.Response) {
		defer g.pending.Add(-1)
		g.count(resp, task, taken)
		result.set(resp, nil)
	})
	if err != nil {
		g.pending.Add(-1)
		return nil, errDraining()
	}
	go func() { // ends a minute after the last provider was asked; after the time-out there is nothing to do
		refused := g.offer(providers, req)
		if refused == nil {
			close(result.taken)
		}
		if refused == nil || !g.waiting.remove(tracked) { // the response, or the time-out, may have come first
			return
		}
		g.waiting.drop()
		g.pending.Add(-1)
		switch refused.reason {
		case reasonNoProvider, reasonRefused: // both are 200 where the answer is an acknowledgement
			refused.status = http.StatusServiceUnavailable
		}
		result.set(nil, refused)
	}()
	return tracked, nil
}

// refuseTask answers that a task was not taken, or may not have been.
func (g *gateway) refuseTask(w http.ResponseWriter, task string, r *refusal) {
	g.refused(task, "", r)
	if r.status == http.StatusServiceUnavailable || r.status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	writeError(w, r.status, r.err)
}

// answerTask answers with a refusal, or with a response: its result, its error, or its
// stream.
func (g *gateway) answerTask(w http.ResponseWriter, r *http.Request, result *taskResult) {
	resp := result.resp
	switch {
	case result.refused != nil:
		g.refuseTask(w, r.PathValue("task"), result.refused)
	case errors.Is(resp.Error, os.ErrDeadlineExceeded): // no error from outside does
		writeError(w, http.StatusGatewayTimeout, resp.Error)
	case resp.Error != nil:
		g.leaveResult(result)
		writeError(w, http.StatusUnprocessableEntity, resp.Error)
	case resp.StreamURL != nil && r.Context().Err() != nil: // its client has left meanwhile
		g.leaveResult(result)
	case resp.StreamURL != nil:
		published, err := g.tracker.ProxyStreamHTTPURL(resp.StreamURL)
		if err != nil {
			g.warn("failed to pass on the stream of a response", withoutURL(err), resp.ID, "")
			writeError(w, http.StatusBadGateway, errors.New("the stream of the response can't be passed on"))
			return
		}
		streaming := r.Clone(r.Context())
		streaming.Method, streaming.URL, streaming.Body, streaming.ContentLength = http.MethodGet, published, http.NoBody, 0
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) // it takes as long as it takes
		g.handleStream(w, streaming)
		g.streams.end(streamKey(published)) // where nobody has read it
	default:
		text := nullResult
		if resp.Result != nil {
			text = *resp.Result
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(unescapeJSON(text))
	}
}

var nullResult = json.RawMessage("null")

// leaveResult ends the stream of a response that nobody gets.
func (g *gateway) leaveResult(result *taskResult) {
	resp := result.resp
	if resp == nil || resp.StreamURL == nil {
		return
	}
	if published, err := g.tracker.ProxyStreamHTTPURL(resp.StreamURL); err == nil {
		g.streams.end(streamKey(published))
		return
	}
	leaveStream(resp.StreamURL)
}

func writeError(w http.ResponseWriter, status int, err error) {
	text := err.Error()
	writeJSON(w, status, map[string]string{"error": text[:min(len(text), maxErrorText)]})
}

func writeJSON(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(value) // a requester that has left can't be told
}

// taskResult is the response to a task, or what it was refused with, once it is there.
type taskResult struct {
	taken   chan struct{} // closed when a provider has acknowledged the request
	done    chan struct{} // closed when one of the next two is set
	resp    *acomm.Response
	refused *refusal
}

func newTaskResult() *taskResult {
	return &taskResult{taken: make(chan struct{}), done: make(chan struct{})}
}

func (t *taskResult) set(resp *acomm.Response, refused *refusal) {
	t.resp, t.refused = resp, refused
	close(t.done)
}

// refusal returns what the task was refused with by now.
func (t *taskResult) refusal() *refusal {
	select {
	case <-t.done:
		return t.refused
	default:
		return nil
	}
}

// taskResults are those that are fetched later, each once and for a bounded time.
type taskResults struct {
	mu      sync.Mutex
	byKey   map[string]*taskResult
	fetched chan struct{} // of allFetched
}

const resultsPath = "/responses/"

// add keeps a result for a time, and returns the path to fetch it from, which nobody can
// guess. A response that was not fetched by then is left.
func (t *taskResults) add(result *taskResult, d time.Duration, leave func(*taskResult)) string {
	key := rand.Text()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey == nil {
		t.byKey = make(map[string]*taskResult)
	}
	t.byKey[key] = result
	time.AfterFunc(d, func() {
		if left := t.take(key, nil); left != nil {
			go func() { // ends with the request's time-out, if not before
				<-left.done
				leave(left)
			}()
		}
	})
	return resultsPath + url.PathEscape(key)
}

// take removes a result. With another one than nil it does so only if it is that one.
func (t *taskResults) take(key string, only *taskResult) *taskResult {
	t.mu.Lock()
	defer t.mu.Unlock()
	result := t.byKey[key]
	if only != nil && result != only {
		return nil
	}
	delete(t.byKey, key)
	if len(t.byKey) == 0 && t.fetched != nil {
		close(t.fetched)
		t.fetched = nil
	}
	return result
}

// allFetched returns a channel that is closed once no result is left.
func (t *taskResults) allFetched() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	fetched := make(chan struct{})
	if len(t.byKey) == 0 {
		close(fetched)
	} else {
		t.fetched = fetched // asked for once, by drain
	}
	return fetched
}

// number returns how many results are kept.
func (t *taskResults) number() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byKey)
}

func (t *taskResults) get(key string) *taskResult {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byKey[key]
}

// handleResult answers with the response to a task that was taken before, once. As long as
// there is none it says so, after the time that the requester waits.
func (g *gateway) handleResult(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		writeError(w, http.StatusMethodNotAllowed, errors.New("fetch a response with GET"))
		return
	}
	wait := time.Duration(0)
	if r.URL.Query().Has("wait") {
		var err error
		if wait, err = g.waitOf(r); err != nil {
			writeError(w, http.StatusBadRequest, err)
			return
		}
	}
	key := r.PathValue("key")
	result := g.results.get(key)
	if result == nil {
		writeError(w, http.StatusNotFound, errors.New("no such response: it was fetched already, or its time has passed"))
		return
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + g.timeouts.answer))
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	defer cancel()
	select {
	case <-result.done:
	case <-ctx.Done():
		select {
		case <-result.done: // wait is 0
		default:
			w.Header().Set("Retry-After", "1")
			w.Header().Set("Location", resultsPath+url.PathEscape(key))
			writeJSON(w, http.StatusAccepted, map[string]string{})
			return
		}
	}
	if g.results.take(key, result) == nil { // another one was faster
		writeError(w, http.StatusNotFound, errors.New("no such response: it was fetched already"))
		return
	}
	g.answerTask(w, r, result)
}
