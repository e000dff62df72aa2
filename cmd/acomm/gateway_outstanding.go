package main

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

// responseTimeout is the error of a request without a response in time. Its text is
// the library's.
type responseTimeout struct{}

func (responseTimeout) Error() string { return "response timeout" }
func (responseTimeout) Unwrap() error { return os.ErrDeadlineExceeded }

// isResponseTimeout reports whether the error of a response is the time-out of who
// forwards it. The protocol has nothing but this text for it.
func isResponseTimeout(err error) bool { return err.Error() == responseTimeout{}.Error() }

// outstanding holds the requests that wait for their response. A Tracker does not
// tell which responses come too late, and what becomes of their streams.
type outstanding struct {
	mu        sync.Mutex // guards the fields below
	byID      map[string]*waiting
	ending    bool
	finishing sync.WaitGroup // those in the map, and those whose finish runs
}

// waiting is a request in the map. Whoever removes it there completes it.
type waiting struct {
	id     string
	finish func(*acomm.Response)
	timer  *time.Timer
}

// add has the response to the id, or the time-out, finished, unless it is removed
// before that.
func (o *outstanding) add(id string, timeout time.Duration, finish func(*acomm.Response)) (*waiting, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ending {
		return nil, net.ErrClosed
	}
	if o.byID[id] != nil {
		return nil, fmt.Errorf("the id %.256q: %w", id, fs.ErrExist)
	}
	w := &waiting{id: id, finish: finish}
	w.timer = time.AfterFunc(timeout, func() {
		if o.remove(w) {
			o.complete(w, &acomm.Response{ID: id, Error: responseTimeout{}})
		}
	})
	if o.byID == nil {
		o.byID = make(map[string]*waiting)
	}
	o.byID[id] = w
	o.finishing.Add(1)
	return w, nil
}

// remove reports whether the request was still waiting. The caller then completes
// or drops it.
func (o *outstanding) remove(w *waiting) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID[w.id] != w {
		return false
	}
	delete(o.byID, w.id)
	w.timer.Stop()
	return true
}

// complete finishes a request that was removed.
func (o *outstanding) complete(w *waiting, resp *acomm.Response) {
	defer o.finishing.Done()
	w.finish(resp)
}

// drop forgets a request that was removed.
func (o *outstanding) drop() { o.finishing.Done() }

// respond finishes the request with the response. It reports false if none waits
// for that.
func (o *outstanding) respond(resp *acomm.Response) bool {
	o.mu.Lock()
	w := o.byID[resp.ID]
	o.mu.Unlock()
	if w == nil || !o.remove(w) {
		return false
	}
	o.complete(w, resp)
	return true
}

// stop takes no more requests and waits until all are finished.
func (o *outstanding) stop() {
	o.mu.Lock()
	o.ending = true
	o.mu.Unlock()
	o.finishing.Wait()
}
