package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	requestTimeout = 30 * time.Second
	maxResponse    = 1 << 20 // bytes of a response over HTTP
	maxSending     = 16      // requests being sent at the same time
	slowestHashing = 5 << 20 // bytes a second; the fan-out waits accordingly
)

// requester makes requests. Responses reach it in two ways: on the unix socket of
// its tracker, and on an HTTP hook of its own.
type requester struct {
	tracker  *acomm.Tracker
	server   *http.Server
	unixHook *url.URL
	httpHook *url.URL
}

// newRequester starts a requester. Close has to be called in the end.
func newRequester(dir string) (*requester, error) {
	tracker, err := acomm.NewTracker(filepath.Join(dir, "requester.sock"), nil, requestTimeout)
	if err != nil {
		return nil, err
	}
	if err := tracker.Start(); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tracker.Stop()
		return nil, err
	}
	r := &requester{
		tracker:  tracker,
		unixHook: tracker.URL(),
		httpHook: &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/responses"},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /responses", r.handleResponse)
	r.server = &http.Server{Handler: mux, ReadTimeout: exchangeTimeout}
	go func() { // ends with the server
		if err := r.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Printf("HTTP hook: %v", err)
		}
	}()
	return r, nil
}

// Close stops the requester. Requests that are still tracked are waited for.
func (r *requester) Close() error {
	r.tracker.Stop()
	return r.server.Close()
}

// handleResponse takes a response on the HTTP hook. An empty answer with the
// status 200 acknowledges it.
func (r *requester) handleResponse(w http.ResponseWriter, req *http.Request) {
	resp := &acomm.Response{}
	body := http.MaxBytesReader(w, req.Body, maxResponse)
	if err := json.NewDecoder(body).Decode(resp); err != nil {
		http.Error(w, "not a response", http.StatusBadRequest)
		return
	}
	r.tracker.HandleResponse(resp)
}

// reply is a response and how it came.
type reply struct {
	*acomm.Response
	handler  string        // the one that ran: success or error
	accepted time.Duration // from the request to its acknowledgement
	took     time.Duration // from the request to its handler
}

// call sends a request to addr and waits for its handler. An error means that the
// request was not accepted; an error in the response is in the reply.
func (r *requester) call(ctx context.Context, addr, hook *url.URL, task string, args any, timeout time.Duration) (*reply, error) {
	replies := make(chan *reply, 1) // exactly one handler runs, once
	start := time.Now()
	handle := func(name string) acomm.ResponseHandler {
		return func(_ *acomm.Request, resp *acomm.Response) {
			replies <- &reply{Response: resp, handler: name, took: time.Since(start)}
		}
	}
	req, err := acomm.NewRequest(task, hook.String(), args, handle("success"), handle("error"))
	if err != nil {
		return nil, err
	}
	// Tracked before it is sent: the response may overtake the acknowledgement.
	if err := r.tracker.TrackRequest(req, timeout); err != nil {
		return nil, err
	}
	if err := acomm.Send(addr, req); err != nil {
		r.tracker.RemoveRequest(req) // no response will come
		return nil, err
	}
	accepted := time.Since(start)
	select {
	case rep := <-replies:
		rep.accepted = accepted
		return rep, nil
	case <-ctx.Done():
		r.tracker.RemoveRequest(req)
		return nil, ctx.Err()
	}
}

// hashAll sends a request for the hash of each file to addr and returns the
// responses by path. An error means that not all could be asked for. Meanwhile
// accepted counts the requests that have been acknowledged.
func (r *requester) hashAll(ctx context.Context, addr *url.URL, files []file, accepted *atomic.Int64) (map[string]*acomm.Response, error) {
	var size int64
	for _, f := range files {
		size += f.size
	}
	multi := acomm.NewMultiRequest(r.tracker, requestTimeout+time.Duration(size/slowestHashing)*time.Second)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex // guards sent
	var sent []*acomm.Request
	each(ctx, maxSending, files, func(f file) {
		req, err := r.sendHash(multi, addr, f.path)
		if err != nil {
			cancel(fmt.Errorf("ask for %s: %w", f.name, err)) // the first cause wins
			return
		}
		mu.Lock()
		sent = append(sent, req)
		mu.Unlock()
		accepted.Add(1)
	})
	// Responses waits for all. After a failure there is nothing to wait for.
	stop := context.AfterFunc(ctx, func() {
		for _, req := range sent {
			multi.RemoveRequest(req)
		}
	})
	defer stop()
	return multi.Responses(), context.Cause(ctx)
}

// sendHash sends one request of many.
func (r *requester) sendHash(multi *acomm.MultiRequest, addr *url.URL, path string) (*acomm.Request, error) {
	req, err := acomm.NewRequest("file.hash", r.unixHook.String(), fileArgs{Path: path}, nil, nil)
	if err != nil {
		return nil, err
	}
	if err := multi.AddRequest(path, req); err != nil {
		return nil, err
	}
	if err := acomm.Send(addr, req); err != nil {
		multi.RemoveRequest(req)
		return nil, err
	}
	return req, nil
}

// readStream reads the stream to its end and returns its size and hash.
func readStream(ctx context.Context, addr *url.URL) (fileHash, error) {
	hash := sha256.New()
	dest := &countingWriter{ctx: ctx, w: hash}
	if err := acomm.Stream(dest, addr); err != nil {
		return fileHash{}, err
	}
	return fileHash{Size: dest.n, SHA256: hex.EncodeToString(hash.Sum(nil))}, nil
}

// countingWriter counts the bytes it passes on, until the context ends.
type countingWriter struct {
	ctx context.Context
	w   io.Writer
	n   int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// each calls f for every item, in several goroutines, and returns when all calls
// have. Once the context has ended no further call is made.
func each[T any](ctx context.Context, goroutines int, items []T, f func(T)) {
	next := make(chan T)
	var working sync.WaitGroup
	for range goroutines {
		working.Go(func() {
			for item := range next {
				f(item)
			}
		})
	}
	for _, item := range items {
		if ctx.Err() != nil {
			break
		}
		next <- item
	}
	close(next)
	working.Wait()
}
