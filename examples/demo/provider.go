package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

// maxHashing is how many files are hashed at the same time.
const maxHashing = 8

// fileArgs are the arguments of the tasks file.hash and file.read.
type fileArgs struct {
	Path string `json:"path"` // absolute
}

// fileHash is the result of file.hash.
type fileHash struct {
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// fileSize is the result of file.read, which comes with the stream of the file.
type fileSize struct {
	Size int64 `json:"size"` // bytes, when it was opened
}

// sleepArgs are the arguments of the task sleep.
type sleepArgs struct {
	Duration string `json:"duration"` // as time.ParseDuration reads it
}

// provider does the tasks.
type provider struct {
	dir     string
	tracker *acomm.Tracker // for its streams; the provider makes no requests
	hashing chan struct{}  // holds a token for each file that is being hashed
}

// task does what a request asks for. It returns the result and, if there is one,
// the stream that comes with it.
type task func(ctx context.Context, req *acomm.Request) (result any, stream *url.URL, err error)

// provide runs a provider until the context ends, which also ends the tasks in
// progress. It calls ready once all tasks can be asked for.
func provide(ctx context.Context, dir string, ready func(string) error) error {
	tracker, err := acomm.NewTracker(filepath.Join(dir, "provider.sock"), nil, 0)
	if err != nil {
		return err
	}
	if err := tracker.Start(); err != nil {
		return err
	}
	defer tracker.Stop()

	p := &provider{dir: dir, tracker: tracker, hashing: make(chan struct{}, maxHashing)}
	var serving sync.WaitGroup
	defer serving.Wait()
	for name, do := range map[string]task{"file.hash": p.hashFile, "file.read": p.readFile, "sleep": p.sleep} {
		listener := acomm.NewUnixListener(filepath.Join(taskDir(dir, name), "provider.sock"), 0)
		if err := listener.Start(); err != nil {
			return err
		}
		defer listener.Stop(shutdownTimeout)
		serving.Go(func() { serveTask(ctx, listener, name, do) })
	}
	if err := ready("ready"); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// serveTask takes the requests for a task until its listener is stopped.
func serveTask(ctx context.Context, listener *acomm.UnixListener, name string, do task) {
	accept := func(req *acomm.Request) error {
		if req.Task != name {
			return fmt.Errorf("the task here is %q, not %q", name, req.Task)
		}
		if ctx.Err() != nil {
			return errStopping
		}
		return nil
	}
	var working sync.WaitGroup
	defer working.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		working.Go(func() {
			req, err := receive(listener, conn, accept)
			if err != nil {
				log.Print(err)
				return
			}
			if err := answer(ctx, req, do); err != nil && ctx.Err() == nil {
				log.Print(err)
			}
		})
	}
}

// answer does the task and sends the response to the request's hook.
func answer(ctx context.Context, req *acomm.Request, do task) error {
	result, stream, err := do(ctx, req)
	resp, err := acomm.NewResponse(req, result, stream, err)
	if err != nil { // the result can't be sent; the requester is to know
		dropStream(stream)
		resp = &acomm.Response{ID: req.ID, Error: err}
	}
	if err := req.Respond(resp); err != nil {
		dropStream(stream)
		return fmt.Errorf("respond to request %s for %s: %w", req.ID, req.Task, err)
	}
	return nil
}

// dropStream ends a stream whose URL nobody got: it connects and leaves at once.
// Otherwise the stream would be open for an hour.
func dropStream(stream *url.URL) {
	if stream == nil {
		return
	}
	r, w := io.Pipe()
	_ = r.Close()
	_ = acomm.Stream(w, stream) // it can't succeed
}

// hashFile is the task file.hash.
func (p *provider) hashFile(ctx context.Context, req *acomm.Request) (any, *url.URL, error) {
	select {
	case p.hashing <- struct{}{}:
		defer func() { <-p.hashing }()
	case <-ctx.Done():
		return nil, nil, errStopping
	}
	f, _, err := openArg(req)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, contextReader{ctx, f})
	if err != nil {
		return nil, nil, err
	}
	return fileHash{Size: n, SHA256: hex.EncodeToString(hash.Sum(nil))}, nil, nil
}

// readFile is the task file.read: the bytes of the file are in the stream.
func (p *provider) readFile(_ context.Context, req *acomm.Request) (any, *url.URL, error) {
	f, size, err := openArg(req)
	if err != nil {
		return nil, nil, err
	}
	stream, err := p.tracker.NewStreamUnix(p.dir, f)
	if err != nil {
		_ = f.Close() // it is still ours
		return nil, nil, err
	}
	return fileSize{Size: size}, stream, nil
}

// sleep is the task sleep.
func (p *provider) sleep(ctx context.Context, req *acomm.Request) (any, *url.URL, error) {
	var args sleepArgs
	if err := req.UnmarshalArgs(&args); err != nil {
		return nil, nil, err
	}
	d, err := time.ParseDuration(args.Duration)
	if err != nil {
		return nil, nil, err
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return args, nil, nil
	case <-ctx.Done():
		return nil, nil, errStopping
	}
}

// errStopping is the answer to requests whose task was not done to the end.
var errStopping = errors.New("the provider is stopping")

// openArg opens the file that the request names and returns its size.
func openArg(req *acomm.Request) (*os.File, int64, error) {
	var args fileArgs
	if err := req.UnmarshalArgs(&args); err != nil {
		return nil, 0, err
	}
	// Before the file is opened, since that can block on what is no regular file.
	info, err := os.Stat(args.Path)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%q is not a regular file", args.Path)
	}
	f, err := os.Open(args.Path)
	return f, info.Size(), err
}

// contextReader reads until the context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
