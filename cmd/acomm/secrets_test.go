package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// loopbacks counts the loopback addresses that closedPort has given away.
var loopbacks atomic.Int32

// closedPort is an address where nobody is. On Linux, where all of 127.0.0.0/8 is the
// loopback, nobody else comes there: neither a test beside this one nor its programs.
func closedPort(t *testing.T) string {
	t.Helper()
	host := net.IPv4(127, 0, 0, 1)
	if runtime.GOOS == "linux" {
		n := loopbacks.Add(1)
		host = net.IPv4(127, 1, byte(n>>8), byte(n))
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: host})
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

// Hazard: what makes a URL a capability is printed, or kept in a log.
func TestSecrets_CallPrintsNone(t *testing.T) {
	t.Parallel()
	closed := closedPort(t)
	p := startCallProvider(t, answerArgs)
	cut := func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "half of it")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	server := httptest.NewServer(http.HandlerFunc(cut))
	defer server.Close()
	withStream := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response {
		u, err := url.Parse(server.URL + "/stream?addr=hidden&signature=hidden")
		if err != nil {
			t.Error(err)
		}
		return &acomm.Response{StreamURL: u}
	})
	for _, test := range []struct {
		code int
		says string
		args []string
	}{
		{exitNotSent, "send to http://" + closed, []string{"-v", "--hook-url", "http://hidden@127.0.0.1:1/hidden?hidden", "http://hidden:hidden@" + closed + "/?token=hidden#hidden", "echo"}},
		{exitTimeout, "send to " + server.URL, []string{"--timeout", "2s", server.URL + "/x?token=hidden", "echo"}},
		{exitTask, "stream from " + server.URL + ", after 10 bytes", []string{"-v", withStream.path, "read"}},
		{exitNotSent, "connect to NATS", []string{"nats://hidden:hidden@" + closed + "/tasks", "echo"}},
		{exitUsage, "nats://[HOST", []string{"nats://hidden:hidden@" + closed + "/tasks?hidden", "echo"}},
		{exitUsage, "URL is not", []string{"ftp://hidden:hidden@" + closed + "/?hidden", "echo"}},
		{exitUsage, "no host", []string{"http:hidden:hidden?hidden", "echo"}},
		{exitDone, "sending echo", []string{"-v", "unix://" + p.path + "?hidden", "echo"}},
	} {
		got := runAcomm(t, append([]string{"call"}, test.args...)...)
		require.Equal(t, test.code, got.code, got.stderr)
		require.Contains(t, got.stderr, test.says)
		require.NotContains(t, got.stderr, "hidden")
	}
	cmd := acommCmd(t, "call", "nats:///tasks", "echo")
	cmd.Env = append(cmd.Env, "NATS_URL=nats://hidden:hid den@"+closed)
	got := runCmd(t, cmd)
	require.Equal(t, exitNotSent, got.code, got.stderr)
	require.NotContains(t, got.stderr, "hidden")
}

func TestSecrets_GatewayAndServeLogNone(t *testing.T) {
	t.Parallel()
	notFound := httptest.NewServer(http.NotFoundHandler())
	defer notFound.Close()
	hook := func(host string) string { return "http://hidden:hidden@" + host + "/hidden?token=hidden" }
	place := notFound.URL

	g := startGateway(t, "--verbose")
	g.provide("echo", "a.sock", gwEcho)
	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", hook(notFound.Listener.Addr().String()), 1)))
	require.Contains(t, g.waitLine("failed to forward"), "send to "+place+": answered 404")
	g.stop()
	require.NotContains(t, g.said(), "hidden")

	r, path := startServe(t, []string{"-v"}, "cat")
	socket := &url.URL{Scheme: "unix", Path: path}
	require.NoError(t, acomm.Send(socket, gwRequest(t, "echo", hook(notFound.Listener.Addr().String()), 1)))
	require.Contains(t, r.waitLine("respond to request"), "send to "+place+": answered 404")
	r.stop()
	require.NotContains(t, r.said(), "hidden")
}

func TestPlace(t *testing.T) {
	for text, want := range map[string]string{
		"unix:///run/x.sock?a#b":        "unix:///run/x.sock",
		"https://u:p@host:1/path?q#f":   "https://host:1",
		"nats:///acomm.call.RANDOM":     "nats:///acomm.call.RANDOM",
		"nats://u:p@host/acomm.call.X":  "nats://host/acomm.call.X",
		"http://[::1]:80/?addr=x&sig=y": "http://[::1]:80",
	} {
		u, err := url.Parse(text)
		require.NoError(t, err)
		require.Equal(t, want, place(u))
	}
	refusal := errors.New("see http://host/?q")
	require.Equal(t, refusal, sendError(&url.URL{}, refusal), "a peer's own words")
}
