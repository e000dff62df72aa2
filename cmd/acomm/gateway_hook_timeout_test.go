package main

import (
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

// Hazard: one hook that takes a response and says nothing stretches the end of the
// gateway to a minute.
func TestGateway_SilentHookDoesNotStretchTheDrain(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"flag":    {"--timeout", "1h", "--hook-timeout", "300ms"},
		"default": {"--timeout", "300ms"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, args...)
			g.provide("echo", "a.sock", gwEcho)
			silent := listenTCP(t)
			require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", "http://"+silent.Addr().String(), 1)))
			conn, err := silent.Accept()
			require.NoError(t, err)
			defer conn.Close()
			began := time.Now()
			g.signal(syscall.SIGTERM)
			require.Equal(t, 0, g.wait(), g.said())
			require.Less(t, time.Since(began), 15*time.Second)
			require.Contains(t, g.said(), "failed to forward")
			require.Contains(t, g.said(), silent.Addr().String())
		})
	}
}

func TestGateway_SilentHookOverNATSDoesNotStretchTheDrain(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--hook-timeout", "300ms", "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	g.provide("echo", "a.sock", gwEcho)
	nc, err := nats.Connect(g.natsURL())
	require.NoError(t, err)
	defer nc.Close()
	silent, err := nc.SubscribeSync("silent.hook")
	require.NoError(t, err)
	require.NoError(t, nc.Flush())
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", natshook.URL("silent.hook").String(), 1)))
	_, err = silent.NextMsg(patience)
	require.NoError(t, err)
	began := time.Now()
	g.signal(syscall.SIGTERM)
	require.Equal(t, 0, g.wait(), g.said())
	require.Less(t, time.Since(began), 10*time.Second)
	require.Contains(t, g.said(), "failed to forward")
}

// A hook that answers in time is not cut off in the middle of its answer.
func TestGateway_HookTimeoutIsForOneHookAndNotShared(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--hook-timeout", "5s")
	g.provide("echo", "a.sock", gwEcho)
	hook, responses := gwHook(t)
	for range 3 {
		require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", hook, 1)))
		require.NoError(t, gwWithin(t, responses).Error)
	}
	no := startHookThatRefuses(t)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", no, 1)))
	require.Contains(t, g.waitLine("failed to forward"), "404 Not Found: not mine")
	g.stop()
}

func startHookThatRefuses(t *testing.T) string {
	t.Helper()
	return serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"error":"not mine"}`))
	})
}
