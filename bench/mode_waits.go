package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

// waits are exchanges of many callers with messages near the limit of a session.
type waits struct {
	callers int
	size    int // bytes of JSON, about
}

var fullWaits = []waits{{64, 128}, {200, 60_000}, {1024, 16 << 10}}

// runWaits shows how long a Send waits when many callers share a session, and when each
// has a connection of its own. The buffer size of sockets decides that: lower
// /proc/sys/net/core/wmem_default (4608 is the least) to see it with small buffers.
func runWaits(o options) error {
	room, err := os.ReadFile("/proc/sys/net/core/wmem_default")
	if err != nil {
		return err
	}
	t := &table{
		title: fmt.Sprintf("waits for an acknowledgement, sockets of %s bytes", strings.TrimSpace(string(room))),
		head:  []string{"callers, size, way", "p50", "p99", "longest", "p99 / own connections"},
	}
	for _, w := range o.waits {
		var own time.Duration
		for _, way := range []struct {
			name  string
			limit int // of accepting: with one there is no session
		}{{"connections of their own", 1 << 30}, {"one session", 0}} {
			o.report("waits, %d callers, %s, %s", w.callers, formatSize(w.size), way.name)
			h, longest, err := o.measureWaits(w, way.limit)
			if err != nil {
				return err
			}
			p99 := h.quantile(0.99)
			if own == 0 {
				own = p99
			}
			t.add(fmt.Sprintf("%d, %s, %s", w.callers, formatSize(w.size), way.name), formatTime(float64(h.quantile(0.5))),
				formatTime(float64(p99)), formatTime(float64(longest)), fmt.Sprintf("%.2f", float64(p99)/float64(own)))
		}
	}
	return o.write(t)
}

// measureWaits has callers send for the time of all rounds.
func (o options) measureWaits(w waits, limit int) (*histogram, time.Duration, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, 0, err
	}
	defer os.RemoveAll(dir)
	ul := acomm.NewUnixListener(filepath.Join(dir, "s"), limit)
	if err := ul.Start(); err != nil {
		return nil, 0, err
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			serving.Go(func() {
				defer ul.DoneConn(conn)
				if acomm.UnmarshalConnData(conn, &acomm.Request{}) == nil {
					_ = acomm.SendConnData(conn, &acomm.Response{})
				}
			})
		}
	})
	defer serving.Wait()
	defer ul.Stop(0)

	args := json.RawMessage(`"` + strings.Repeat("x", w.size) + `"`)
	req := &acomm.Request{ID: "1", Task: "task", Args: &args}
	end := time.Now().Add(o.benchtime * time.Duration(o.rounds))
	times, longest, errs := make([]histogram, w.callers), make([]time.Duration, w.callers), make([]error, w.callers)
	var callers sync.WaitGroup
	for i := range w.callers {
		callers.Go(func() {
			for time.Now().Before(end) && errs[i] == nil {
				begin := time.Now()
				errs[i] = acomm.Send(ul.URL(), req)
				took := time.Since(begin)
				times[i].add(took)
				longest[i] = max(longest[i], took)
			}
		})
	}
	callers.Wait()
	var all histogram
	var worst time.Duration
	for i := range w.callers {
		if errs[i] != nil {
			return nil, 0, errs[i]
		}
		all.merge(&times[i])
		worst = max(worst, longest[i])
	}
	return &all, worst, nil
}
