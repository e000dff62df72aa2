package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	proxyTimeout    = time.Minute     // for the response to a request that came over HTTP
	shutdownTimeout = 2 * time.Second // for what is being received when the coordinator stops
	maxRequest      = 1 << 20         // bytes of a request over HTTP
)

// coordinator takes requests over HTTP and over a unix socket and forwards them
// to the provider of the task.
type coordinator struct {
	tracker *acomm.Tracker // of the requests with a hook that is no unix socket
	tasks   string         // holds a directory for each task, and that the provider's socket
}

// coordinatorURL is where the coordinator takes requests from inside.
func coordinatorURL(dir string) *url.URL {
	return &url.URL{Scheme: "unix", Path: filepath.Join(dir, "coordinator.sock")}
}

// taskDir is where the providers of a task have their sockets.
func taskDir(dir, task string) string { return filepath.Join(dir, "tasks", task) }

// coordinate runs a coordinator until the context ends. It calls ready with the
// URL of its HTTP front once both fronts take requests.
func coordinate(ctx context.Context, dir string, ready func(string) error) error {
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer front.Close()
	frontURL := &url.URL{Scheme: "http", Host: front.Addr().String(), Path: "/"}

	tracker, err := acomm.NewTracker(filepath.Join(dir, "responses.sock"), frontURL.JoinPath("stream"), proxyTimeout)
	if err != nil {
		return err
	}
	if err := tracker.Start(); err != nil {
		return err
	}
	defer tracker.Stop()

	c := &coordinator{tracker: tracker, tasks: taskDir(dir, "")}
	listener := acomm.NewUnixListener(coordinatorURL(dir).Path, 0)
	if err := listener.Start(); err != nil {
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { c.serveUnix(listener) })
	defer serving.Wait()
	defer listener.Stop(shutdownTimeout)

	return c.serveHTTP(ctx, front, func() error { return ready(frontURL.String()) })
}

// serveHTTP serves the HTTP front until the context ends.
func (c *coordinator) serveHTTP(ctx context.Context, front net.Listener, ready func() error) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{$}", c.handleRequest)
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	// No WriteTimeout: a stream takes as long as it takes.
	server := &http.Server{Handler: mux, ReadHeaderTimeout: exchangeTimeout, IdleTimeout: time.Minute}
	defer server.Close()

	served := make(chan error, 1)
	go func() { served <- server.Serve(front) }() // ends with the server
	if err := ready(); err != nil {
		return err
	}
	select {
	case err := <-served:
		return fmt.Errorf("HTTP front: %w", err)
	case <-ctx.Done():
	}
	shutdown, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	err := server.Shutdown(shutdown)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // Close cuts off what is left
	}
	return err
}

// serveUnix takes requests from the unix socket until the listener is stopped.
func (c *coordinator) serveUnix(listener *acomm.UnixListener) {
	var exchanges sync.WaitGroup
	defer exchanges.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		exchanges.Go(func() {
			// The sender is told of a refusal: nothing is left to be done.
			_, _ = receive(listener, conn, c.forward)
		})
	}
}

// handleRequest takes a request over HTTP. As on a unix socket, the answer is a
// Response without an error if the request is accepted, else with the reason.
func (c *coordinator) handleRequest(w http.ResponseWriter, r *http.Request) {
	status := http.StatusOK
	req := &acomm.Request{}
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(req)
	if err == nil {
		err = req.Validate()
	}
	if err != nil {
		status = http.StatusBadRequest
	} else {
		err = c.forward(req)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(&acomm.Response{ID: req.ID, Error: err}); err != nil {
		log.Printf("answer request %q: %v", req.ID, err)
	}
}

// forward sends the request to the provider of its task. An error means that it
// was not accepted, and that there will be no response.
func (c *coordinator) forward(req *acomm.Request) error {
	provider, err := c.findProvider(req.Task)
	if err != nil {
		return err
	}
	// A provider answers on unix sockets. Where the hook is another one, the
	// response comes to the tracker, which forwards it.
	local, err := c.tracker.ProxyUnix(req, proxyTimeout)
	if err != nil {
		return err
	}
	if err := acomm.Send(provider, local); err != nil {
		if local != req { // else it is not tracked here
			c.tracker.RemoveRequest(req)
		}
		return fmt.Errorf("forward to the provider of %q: %w", req.Task, err)
	}
	return nil
}

// findProvider returns the socket of a provider of the task: the first in the
// task's directory.
func (c *coordinator) findProvider(task string) (*url.URL, error) {
	if !fs.ValidPath(task) || task == "." || strings.Contains(task, "/") {
		return nil, fmt.Errorf("%q is not the name of a task", task)
	}
	dir := filepath.Join(c.tasks, task)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for a provider of %q: %w", task, err)
	}
	for _, entry := range entries {
		if entry.Type() == fs.ModeSocket {
			return &url.URL{Scheme: "unix", Path: filepath.Join(dir, entry.Name())}, nil
		}
	}
	return nil, fmt.Errorf("nobody provides the task %q", task)
}
