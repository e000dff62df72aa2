package main

import (
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// requireHealth asks once, and returns what is said.
func (g *gatewayRun) requireHealth(want int) string {
	g.t.Helper()
	status, body := g.get("healthz")
	require.Equal(g.t, want, status, body)
	return body
}

// Hazard: a gateway that can take no request, or get no response, says it is well.
func TestGateway_HealthSaysThatASocketIsGone(t *testing.T) {
	t.Parallel()
	for _, socket := range []string{"response/gw.sock", "coordinator/gw.sock"} {
		g := startGateway(t)
		path := filepath.Join(g.dir, socket)
		require.Equal(t, "ok\n", g.requireHealth(http.StatusOK))
		moved := path + ".moved"
		require.NoError(t, os.Rename(path, moved))
		status, body := g.get("healthz")
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.Contains(t, body, socket)
		require.NotContains(t, body, g.dir, "of no concern to strangers")
		require.Contains(t, g.waitLine("not healthy"), socket)

		other, err := net.Listen("unix", path)
		require.NoError(t, err)
		status, body = g.get("healthz")
		require.Equal(t, http.StatusServiceUnavailable, status, "another's socket")
		require.Contains(t, body, socket)
		require.NotContains(t, body, g.dir, "of no concern to strangers")
		require.NoError(t, other.Close())

		require.NoError(t, os.Rename(moved, path))
		status, _ = g.get("healthz")
		require.Equal(t, http.StatusOK, status)
		g.waitLine("healthy again")
		g.stop()
	}
}

// The log tells also where nobody asks.
func TestGateway_LogSaysUnaskedThatASocketIsGone(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	require.NoError(t, os.Remove(filepath.Join(g.dir, "response", "gw.sock")))
	g.waitLine("not healthy")
	g.stop()
}

func TestGateway_HealthSaysThatNATSIsGone(t *testing.T) {
	t.Parallel()
	addr := closedPort(t)
	broker, err := startNATSServer(addr)
	require.NoError(t, err)
	g := startGateway(t, "--nats", broker.ClientURL())
	g.requireHealth(http.StatusOK)
	broker.Shutdown()
	broker.WaitForShutdown()
	require.Contains(t, g.waitLine("not healthy"), (&url.URL{Scheme: "nats", Host: addr}).Host)
	require.Contains(t, g.requireHealth(http.StatusServiceUnavailable), "NATS")
	broker, err = startNATSServer(addr)
	require.NoError(t, err)
	defer func() { broker.Shutdown(); broker.WaitForShutdown() }()
	g.waitLine("healthy again")
	g.requireHealth(http.StatusOK)
	g.stop()
}
