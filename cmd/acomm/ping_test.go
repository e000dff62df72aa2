package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestPing_IsAcknowledgedAndRunsNothing(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"-v"}, sh(`echo running >&2`)...)
	got := runAcomm(t, "ping", path)
	require.Equal(t, exitDone, got.code, got.stderr)
	require.Regexp(t, `^(unix://`+path+`: acknowledged in \S+s\n){3}3 acknowledged: least \S+, mean \S+, most \S+\n$`, got.stdout)
	require.Empty(t, got.stderr)
	got = runAcomm(t, "ping", "-v", "--count", "1", "unix://"+path)
	require.Regexp(t, `^unix://`+path+`: acknowledged in \S+s: .*has no task.*\n$`, got.stdout)
	r.stop()
	require.NotContains(t, r.said(), "running")

	tracker, err := acomm.NewTracker("", nil, 0) // where responses go
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	got = runAcomm(t, "ping", "--count", "1", tracker.URL().String())
	require.Equal(t, exitDone, got.code, got.stderr)

	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	got = runAcomm(t, "ping", "-v", "--count", "2", g.url.String())
	require.Equal(t, exitDone, got.code, got.stderr)
	require.Contains(t, got.stdout, "2 acknowledged")
	require.Contains(t, got.stdout, "no task")
}

func TestPing_OfWhatDoesNotAcknowledge(t *testing.T) {
	t.Parallel()
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	closing, err := net.Listen("unix", filepath.Join(shortDir(t), "c.sock"))
	require.NoError(t, err)
	defer closing.Close()
	go func() { // ends with the listener
		for conn, err := closing.Accept(); err == nil; conn, err = closing.Accept() {
			_ = conn.Close()
		}
	}()
	silent, err := net.Listen("unix", filepath.Join(shortDir(t), "s.sock"))
	require.NoError(t, err)
	defer silent.Close()
	for target, code := range map[string]int{
		filepath.Join(shortDir(t), "none.sock"): exitNotSent,
		"http://" + closedPort(t) + "/":         exitNotSent,
		"nats://" + closedPort(t) + "/tasks.x":  exitNotSent,
		web.URL:                                 exitNotSent,
		closing.Addr().String():                 exitNotSent,
		silent.Addr().String():                  exitTimeout,
		"127.0.0.1:80":                          exitUsage,
	} {
		got := runAcomm(t, "ping", "--timeout", "2s", target)
		require.Equal(t, code, got.code, "%s: %s%s", target, got.stdout, got.stderr)
		require.NotContains(t, got.stdout, "acknowledged")
		require.Contains(t, got.stderr, "acomm ping: ")
	}
	for _, args := range [][]string{{}, {"./x.sock", "y"}, {"--count", "0", "./x.sock"}, {"--timeout", "0s", "./x.sock"}} {
		require.Equal(t, exitUsage, runAcomm(t, append([]string{"ping"}, args...)...).code)
	}
}

func TestVersion_SaysVersionCommitAndGo(t *testing.T) {
	t.Parallel()
	got := runAcomm(t, "--version")
	require.Zero(t, got.code)
	require.Regexp(t, `^acomm \S+, commit (unknown|[0-9a-f]{40}( \(modified\))?), `+runtime.Version(), got.stdout)
	require.Contains(t, got.stdout, runtime.GOOS+"/"+runtime.GOARCH+"\n")
}
