package main

import (
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// startServeWith starts the service from a shell that runs the script before, and
// returns it and the path of its socket.
func startServeWith(t *testing.T, script string, options []string, command ...string) (*running, string) {
	t.Helper()
	path := filepath.Join(shortDir(t), "s.sock")
	args := append([]string{"serve"}, options...)
	cmd := acommCmd(t, append(append(args, path, "--"), command...)...)
	cmd.Args = append([]string{"sh", "-c", script + `; exec "$0" "$@"`}, cmd.Args...)
	var err error
	cmd.Path, err = exec.LookPath("sh")
	require.NoError(t, err)
	r := startCmd(t, cmd)
	r.waitLine("listening on")
	return r, path
}

// callFrom calls the task from a hook of its own, as a process of its own does, and
// returns the response.
func callFrom(path, hookPath string) (*acomm.Response, error) {
	tracker, err := acomm.NewTracker(hookPath, nil, patience)
	if err != nil {
		return nil, err
	}
	if err := tracker.Start(); err != nil {
		return nil, err
	}
	defer tracker.Stop()
	responses := make(chan *acomm.Response, 1)
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest("work", tracker.URL().String(), 1, handle, handle)
	if err != nil {
		return nil, err
	}
	if err := tracker.TrackRequest(req, patience); err != nil {
		return nil, err
	}
	conn, err := acommDial(path)
	if err != nil {
		tracker.RemoveRequest(req)
		return nil, err
	}
	defer conn.Close()
	ack := &acomm.Response{}
	if err = acomm.SendConnData(conn, req); err == nil {
		err = acomm.UnmarshalConnData(conn, ack)
	}
	if err == nil {
		err = ack.Error
	}
	if err != nil {
		tracker.RemoveRequest(req)
		return nil, err
	}
	return <-responses, nil
}

// Hazard: a service without a free descriptor fails tasks it could do a moment later,
// and forgets results it can't send at once.
func TestServe_OutOfDescriptorsEachCallIsAnswered(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]string{
		"results":          {"--concurrency", "4"},
		"many at a time":   {"--concurrency", "40"},
		"streams":          {"--concurrency", "4", "--stream"},
		"streams, at once": {"--concurrency", "40", "--stream"},
	} {
		t.Run(name, func(t *testing.T) {
			r, path := startServeWith(t, "ulimit -n 40", options, "cat")
			dir := shortDir(t)
			var calls sync.WaitGroup
			failures := make(chan string, 40)
			for i := range 40 {
				calls.Go(func() {
					resp, err := callFrom(path, filepath.Join(dir, fmt.Sprint(i)))
					switch {
					case err != nil:
						failures <- err.Error()
					case resp.Error != nil:
						failures <- resp.Error.Error()
					case resp.StreamURL != nil:
						if err := acomm.Stream(io.Discard, resp.StreamURL); err != nil {
							failures <- err.Error()
						}
					}
				})
			}
			calls.Wait()
			close(failures)
			for failure := range failures {
				t.Error(failure)
			}
			require.False(t, t.Failed(), r.said())
			r.stop()
		})
	}
}
