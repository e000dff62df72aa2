package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// healthInterval is the time between looks whether the gateway can work.
const healthInterval = 2 * time.Second

// health knows what the gateway needs to take requests and to get responses. Its
// errors name neither directories nor servers: everybody may ask for them.
type health struct {
	dir     string // of the sockets; for the log
	sockets []ownSocket
	nats    *natsFront // nil without NATS

	mu  sync.Mutex // guards the field below
	bad string     // what was wrong when it was last looked at; empty: nothing
}

// ownSocket is a socket file that was made by this process.
type ownSocket struct {
	name, path string
	file       os.FileInfo
}

// own adds the socket at the path, which has just been made.
func (h *health) own(path string) error {
	name, err := filepath.Rel(h.dir, path)
	if err != nil {
		return err
	}
	file, err := os.Lstat(path)
	if err != nil {
		return err
	}
	h.sockets = append(h.sockets, ownSocket{name, path, file})
	return nil
}

// check returns what is wrong, and logs it when that changes.
func (h *health) check() error {
	var found []error
	for _, s := range h.sockets {
		switch file, err := os.Lstat(s.path); {
		case err != nil:
			found = append(found, fmt.Errorf("the socket %s is gone", s.name))
		case !os.SameFile(file, s.file): // the number of ours is not used again while it is open
			found = append(found, fmt.Errorf("the socket %s was replaced", s.name))
		}
	}
	if h.nats != nil && !h.nats.conn.IsConnected() {
		found = append(found, errors.New("there is no connection to NATS"))
	}
	err, bad := errors.Join(found...), ""
	if err != nil {
		bad = err.Error()
	}
	h.mu.Lock()
	changed := bad != h.bad
	h.bad = bad
	h.mu.Unlock()
	switch {
	case changed && err != nil:
		entry := logrus.WithFields(logrus.Fields{"error": err, "dir": h.dir})
		if h.nats != nil {
			entry = entry.WithField("nats", h.nats.hosts())
		}
		entry.Error("gateway: not healthy")
	case changed:
		logrus.Info("gateway: healthy again")
	}
	return err
}

// watch looks now and then until the channel is closed.
func (h *health) watch(done <-chan struct{}) {
	ticks := time.NewTicker(healthInterval)
	defer ticks.Stop()
	for {
		select {
		case <-done:
			return
		case <-ticks.C:
			_ = h.check() // it is logged
		}
	}
}

// handleHealth answers whether the gateway can work.
func (g *gateway) handleHealth(w http.ResponseWriter, _ *http.Request) {
	if g.draining.Load() {
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	if err := g.health.check(); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}
