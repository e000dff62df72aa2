package main

import (
	"net/http"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: a script takes the time-out of a gateway for a task that has failed, and
// not for one that may have run.
func TestCall_TimeoutOfAGatewayIsATimeout(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--timeout", "200ms", "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	g.provide("silent", "a.sock", func(*acomm.Request) (*acomm.Response, error) { return nil, nil })
	g.waitLine("tasks.silent")
	for _, target := range []string{g.url.String(), g.natsURL() + "/tasks.silent"} {
		got := runAcomm(t, "call", "--timeout", "15s", target, "silent")
		require.Equal(t, exitTimeout, got.code, got.stderr)
		require.Contains(t, got.stderr, "no response to silent")
		require.Empty(t, got.stdout)
	}
	g.stop()
}

// Hazard: a server that knows no POST costs the whole time-out.
func TestCall_ServerThatTakesNoPOSTIsNoTarget(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusNotImplemented, http.StatusHTTPVersionNotSupported, http.StatusMethodNotAllowed, http.StatusNetworkAuthenticationRequired} {
		url := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
		began := time.Now()
		got := runAcomm(t, "call", "--timeout", "15s", url, "echo")
		require.Equal(t, exitNotSent, got.code, "%d: %s", status, got.stderr)
		require.Less(t, time.Since(began), 10*time.Second)
	}
	url := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	got := runAcomm(t, "call", "--timeout", "500ms", url, "echo")
	require.Equal(t, exitTimeout, got.code, "it may have been passed on: %s", got.stderr)
}
