package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// checkHook is where the responses of the peer arrive.
type checkHook struct {
	url     *url.URL
	timeout time.Duration
	ctx     context.Context // ends with close, and what is being received with it
	stop    func()
	serving sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	expected map[string]*expected
	tally    frameTally // of all responses
	stayed   bool       // a sender did not close
	strays   []string
}

// expected is a request whose response may come.
type expected struct {
	acknowledge chan struct{}                                                    // to be closed when the response may be acknowledged
	answer      func(w http.ResponseWriter, m *message, attempt int) (over bool) // nil: as usual
	responses   chan *message                                                    // with room for the one
	done        chan struct{}                                                    // closed when the exchange of the response is over

	mu       sync.Mutex // guards the fields below
	refused  bool
	arrived  int
	attempts int // over HTTP
}

// openCheckHook opens the hook that suits the target.
func openCheckHook(c *checker) (*checkHook, error) {
	h := &checkHook{timeout: c.timeout, expected: map[string]*expected{}}
	var cancel context.CancelFunc
	h.ctx, cancel = context.WithCancel(c.ctx)
	err := h.open(c)
	if err != nil {
		cancel()
		return nil, err
	}
	stop := h.stop
	h.stop = func() { stop(); cancel() }
	return h, nil
}

func (h *checkHook) open(c *checker) (err error) {
	if c.target.Scheme == "unix" {
		return h.listenUnix(os.TempDir())
	}
	if h.url, err = (&call{hookURL: c.hookURL}).publicHook(); err != nil {
		return &exitError{exitUsage, err}
	}
	listener, err := net.Listen("tcp", c.hookListen)
	if err != nil {
		return usageError("--hook-listen: %w", err)
	}
	if h.url == nil {
		h.url = &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/"}
	}
	server := &http.Server{Handler: h, ReadTimeout: c.timeout, ErrorLog: log.New(io.Discard, "", 0)}
	h.stop = func() { _ = server.Close() }
	h.serving.Go(func() { _ = server.Serve(listener) })
	return nil
}

// listenUnix listens in a directory that only this user may enter.
func (h *checkHook) listenUnix(temp string) error {
	dir, err := os.MkdirTemp(temp, "acomm-check-")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "hook.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		_ = os.RemoveAll(dir)
		if errors.Is(err, syscall.EINVAL) && temp != shortTempDir { // too long a path
			return h.listenUnix(shortTempDir)
		}
		return err
	}
	h.url = &url.URL{Scheme: "unix", Path: path}
	h.stop = func() {
		_ = listener.Close()
		_ = os.RemoveAll(dir)
	}
	h.serving.Go(func() { h.accept(listener) })
	return nil
}

// alias is another path of the hook's socket.
func (h *checkHook) alias(name string) (string, error) {
	path := filepath.Join(filepath.Dir(h.url.Path), name)
	return path, os.Link(h.url.Path, path)
}

func (h *checkHook) close() {
	h.stop()
	h.serving.Wait()
}

// expect registers a request. Its response is acknowledged after release, and after
// some time without that.
func (h *checkHook) expect(id string) *expected {
	e := &expected{acknowledge: make(chan struct{}), responses: make(chan *message, 1), done: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expected[id] = e
	return e
}

// refuse says that no response may come.
func (e *expected) refuse() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refused = true
}

// take hands a response to its request, waits until it may be acknowledged, and
// returns what is to be called then. One that should not have come is noted.
func (h *checkHook) take(m *message) (over func()) {
	e, first := h.find(m)
	if !first {
		return func() {}
	}
	e.responses <- m
	select {
	case <-e.acknowledge:
	case <-h.ctx.Done():
	case <-time.After(2 * h.timeout): // not before the request has waited in vain
	}
	return func() { close(e.done) }
}

// find returns the request of a response, and whether this is the first one to it.
func (h *checkHook) find(m *message) (e *expected, first bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e = h.expected[m.id]; e == nil {
		h.strays = append(h.strays, fmt.Sprintf("a response with the unknown id %q", m.id))
		return nil, false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.arrived++
	switch {
	case e.refused:
		h.strays = append(h.strays, "a response to a request that was refused")
	case e.arrived > 1:
		h.strays = append(h.strays, "a second response to a request")
	default:
		return e, true
	}
	return e, false
}

// note adds a response to the tally.
func (h *checkHook) note(faults ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tally.add(faults...)
}

// seen is all that has come so far, but for what arrives now.
func (h *checkHook) seen() (tally frameTally, strays []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tally, h.strays
}

// accept takes connections until the listener is closed.
func (h *checkHook) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		h.serving.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(h.ctx, func() { _ = conn.Close() })()
			h.receive(conn)
		})
	}
}

// receive takes one response, and notes what was wrong with it.
func (h *checkHook) receive(conn net.Conn) {
	over := func() {}
	faults := h.receiveOne(conn, &over)
	h.note(faults...)
	over()
}

func (h *checkHook) receiveOne(conn net.Conn, over *func()) (faults []string) {
	_ = conn.SetDeadline(time.Now().Add(h.timeout))
	data, faults, err := readCheckFrame(conn)
	if err != nil {
		return []string{"response: " + err.Error()}
	}
	m, err := parseMessage(data)
	if err != nil {
		return append(faults, "response: "+err.Error())
	}
	if m.failure != "" && string(m.result) != "null" {
		faults = append(faults, "a response with an error and a result")
	}
	*over = h.take(m)
	_ = conn.SetDeadline(time.Now().Add(h.timeout))
	if _, err := conn.Write(frameOf([]byte(`{"error":"","id":"","result":null,"stream_url":null}`))); err != nil {
		return append(faults, "the sender of a response did not wait for the acknowledgement")
	}
	h.limitStay(conn)
	switch n, err := conn.Read(make([]byte, 1)); {
	case n > 0:
		faults = append(faults, "more bytes after a response")
	case errors.Is(err, syscall.ECONNRESET):
		faults = append(faults, "the sender of a response closed before it had read the acknowledgement")
	case errors.Is(err, os.ErrDeadlineExceeded):
		h.mu.Lock()
		h.stayed = true
		h.mu.Unlock()
		faults = append(faults, "the sender of a response did not close after the acknowledgement")
	}
	return faults
}

// limitStay gives a sender less time to close if one did not before.
func (h *checkHook) limitStay(conn net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stayed {
		_ = conn.SetDeadline(time.Now().Add(pieceGap))
	}
}

// ServeHTTP takes a response over HTTP. An empty answer with the status 200
// acknowledges it.
func (h *checkHook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var faults []string
	if r.Method != http.MethodPost {
		faults = append(faults, "a response with the method "+r.Method)
	}
	if r.Header.Get("Content-Type") != "application/json" {
		faults = append(faults, fmt.Sprintf("a response with the Content-Type %q", r.Header.Get("Content-Type")))
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxFrame))
	var m *message
	if err == nil {
		m, err = parseMessage(data)
	}
	if err != nil {
		h.note(append(faults, "response: "+err.Error())...)
		http.Error(w, "the body is not a response", http.StatusBadRequest)
		return
	}
	h.mu.Lock()
	e := h.expected[m.id]
	h.mu.Unlock()
	if e != nil && e.answer != nil {
		e.mu.Lock()
		e.attempts++
		attempt := e.attempts
		e.mu.Unlock()
		if e.answer(w, m, attempt) {
			return
		}
	}
	over := h.take(m)
	h.note(faults...)
	over()
}
