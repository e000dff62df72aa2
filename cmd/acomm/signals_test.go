package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// signalUntilEnd sends the signal, again and again, until the program has ended: one
// that comes within a second of the first is taken for the same.
func (r *running) signalUntilEnd(sig syscall.Signal) {
	r.t.Helper()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		_ = r.Process.Signal(sig) // it may have ended
		select {
		case <-r.done:
			return
		case <-again.C:
		}
	}
}

// Hazard: a terminal and a supervisor both send a signal, and the second of them kills
// the tasks.
func TestServe_SignalOfTwoSendersIsOne(t *testing.T) {
	t.Parallel()
	gate := fifo(t)
	r, path := startServe(t, nil, sh(`echo running >&2; read line <"`+gate+`"; cat`)...)
	call := startAcomm(t, "call", path, "work", "1")
	r.waitLine("running")
	r.signal(syscall.SIGINT)
	r.waitLine("finishing the acknowledged tasks")
	r.signal(syscall.SIGTERM)
	r.signal(syscall.SIGINT)
	openGate(t, gate, 1)
	require.Zero(t, call.wait(), call.said())
	require.Equal(t, "1", call.said())
	require.Zero(t, r.wait(), r.said())
}

// Hazard: a service that had nothing to do says that tasks were running.
func TestServe_IdleEndsWellHoweverManySignalsCome(t *testing.T) {
	t.Parallel()
	for range 10 {
		r, _ := startServe(t, nil, "cat")
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGTERM, syscall.SIGTERM} {
			_ = r.Process.Signal(sig) // it may have ended
		}
		require.Zero(t, r.wait(), r.said())
		require.NotContains(t, r.said(), "tasks were running")
	}
	// Nor where it waits for a request that does not come.
	r, path := startServe(t, nil, "cat")
	conn, err := acommDial(path)
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte{0, 0})
	require.NoError(t, err)
	r.signalUntilEnd(syscall.SIGTERM)
	require.Zero(t, r.ProcessState.ExitCode(), r.said())
}

// Hazard: of a call that is interrupted twice, files are left.
func TestCall_SignalOfTwoSendersIsOne(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"--stream"}, sh(`echo data; sleep 1000`)...)
	for range 10 {
		dir := t.TempDir()
		wait := watchDir(t, dir)
		call := startAcomm(t, "call", "-o", filepath.Join(dir, "file"), path, "work")
		wait(fsnotify.Write, ".acomm-*.part")
		call.signal(syscall.SIGINT)
		_ = call.Process.Signal(syscall.SIGTERM)                       // it may have ended
		require.Contains(t, []int{130, 143}, call.wait(), call.said()) // the first that is seen
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
	r.stop()
}

func TestGateway_SignalOfTwoSendersIsOne(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	requests := make(chan *acomm.Request, 1)
	g.provide("late", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		requests <- req
		return nil, nil
	})
	hook, responses := gwHook(t)
	req := gwRequest(t, "late", hook, nil)
	require.NoError(t, acomm.Send(g.url, req))
	g.signal(syscall.SIGTERM)
	g.waitLine("draining")
	g.signal(syscall.SIGINT)
	taken := gwWithin(t, requests)
	require.NoError(t, taken.Respond(&acomm.Response{ID: taken.ID}))
	require.Equal(t, req.ID, gwWithin(t, responses).ID)
	require.Zero(t, g.wait(), g.said())
}
