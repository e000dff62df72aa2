package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// limitDescriptors lets the program open no descriptor, and returns what lifts that.
func (r *running) limitDescriptors() (lift func()) {
	r.t.Helper()
	old := unix.Rlimit{}
	require.NoError(r.t, unix.Prlimit(r.Process.Pid, unix.RLIMIT_NOFILE, nil, &old))
	require.NoError(r.t, unix.Prlimit(r.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}, nil))
	return func() { require.NoError(r.t, unix.Prlimit(r.Process.Pid, unix.RLIMIT_NOFILE, &old, nil)) }
}

// Hazard: a result that can't be sent for want of a descriptor is dropped, and its
// caller waits in vain; a task that can't be started has failed.
func TestServe_ResultIsKeptUntilThereIsADescriptor(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]string{"result": nil, "stream": {"--stream"}} {
		t.Run(name, func(t *testing.T) {
			gate := fifo(t)
			options := append(options, "--concurrency", "1")
			r, path := startServe(t, options, sh(`echo running >&2; read line <"`+gate+`"; cat`)...)
			first := startAcomm(t, "call", path, "work", "1")
			r.waitLine("running")
			second := startAcomm(t, "call", "-v", path, "work", "2")
			second.waitLine("acknowledged")
			lift := r.limitDescriptors()
			openGate(t, gate, 2)
			r.waitLine("too many open files")
			if options[0] != "--stream" { // its place is held by the stream
				r.waitLines("too many open files", 2)
			}
			r.signal(syscall.SIGTERM) // what is acknowledged is done all the same
			r.waitLine("finishing the acknowledged tasks")
			lift()
			require.Zero(t, first.wait(), first.said())
			require.Equal(t, "1", first.said())
			require.Zero(t, second.wait(), second.said())
			require.Zero(t, r.wait(), r.said())
		})
	}
}

// Hazard: a hook over HTTP that is away for a moment never gets its response.
func TestServe_ResponseWaitsForItsHook(t *testing.T) {
	t.Parallel()
	hook := closedPort(t)
	r, path := startServe(t, nil, "cat")
	conn, err := acommDial(path)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, acomm.SendConnData(conn, raw(`{"id":"1","task":"work","responsehook":{"Scheme":"http","Host":"`+hook+`","Path":"/"},"args":5}`)))
	require.NoError(t, acomm.UnmarshalConnData(conn, &acomm.Response{}))
	r.waitLine("connection refused")
	got := make(chan string, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- string(body)
	}))
	require.NoError(t, server.Listener.Close())
	server.Listener, err = net.Listen("tcp", hook)
	require.NoError(t, err)
	server.Start()
	defer server.Close()
	var body string
	select {
	case body = <-got:
	case <-time.After(patience):
	}
	require.Contains(t, body, `"result":5`)
	r.stop()
}

// Hazard: while a hook is away, its responses keep the room or the places of others.
func TestServe_HookThatIsAwayKeepsNothing(t *testing.T) {
	t.Parallel()
	for _, option := range []string{"--stream", "-v"} {
		hook := closedPort(t)
		r, path := startServeWith(t, "ulimit -n 24", []string{"--concurrency", "1", option}, "cat") // room for one or two
		for range 5 {
			conn, err := acommDial(path)
			require.NoError(t, err)
			require.NoError(t, acomm.SendConnData(conn, raw(`{"id":"1","task":"work","responsehook":{"Scheme":"http","Host":"`+hook+`","Path":"/"},"args":5}`)))
			require.NoError(t, acomm.UnmarshalConnData(conn, &acomm.Response{}))
			require.NoError(t, conn.Close())
		}
		require.Equal(t, result{stdout: "5\n"}, runAcomm(t, "call", "--timeout", "30s", path, "work", "5"))
		r.stop()
	}
}
