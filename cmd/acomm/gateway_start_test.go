package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// listenTCP listens, and accepts nothing.
func listenTCP(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

// Hazard: the gateway is half there for ten seconds, and then says something vague.
func TestGateway_UsedPortIsAnErrorAtOnceAndNothingIsStarted(t *testing.T) {
	used := listenTCP(t).Addr().String()
	for _, args := range [][]string{
		{"--listen", "127.0.0.1:0", "--nats", "embedded", "--nats-listen", used},
		{"--listen", used, "--nats", "embedded", "--nats-listen", "127.0.0.1:0"},
		{"--listen", used},
	} {
		dir := shortDir(t)
		began := time.Now()
		r := runAcomm(t, append([]string{"gateway", "--socket-dir", dir}, args...)...)
		require.Equal(t, exitTask, r.code, r.stderr)
		require.Less(t, time.Since(began), 5*time.Second)
		require.Contains(t, r.stderr, "address already in use")
		require.Contains(t, r.stderr, used)
		require.Empty(t, r.stdout)
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

// Hazard: it does not hear a signal while it waits for NATS, and clients wait for it.
func TestGateway_SignalEndsTheStartAndNothingListensBefore(t *testing.T) {
	silent := listenTCP(t)
	front := listenTCP(t)
	addr := front.Addr().String()
	require.NoError(t, front.Close()) // free again
	dir := shortDir(t)
	g := startAcomm(t, "gateway", "--socket-dir", dir, "--listen", addr, "--nats", "nats://"+silent.Addr().String())
	conn, err := silent.Accept() // it waits for the server's first words
	require.NoError(t, err)
	defer conn.Close()
	_, err = net.Dial("tcp", addr)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	began := time.Now()
	g.signal(syscall.SIGTERM)
	require.Equal(t, 0, g.wait(), g.said())
	require.Less(t, time.Since(began), time.Second)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// serveHTTP serves with the function, and returns the URL.
func serveHTTP(t *testing.T, handle http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handle)
	t.Cleanup(server.Close)
	return server.URL
}
