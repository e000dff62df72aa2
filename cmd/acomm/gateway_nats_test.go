package main

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

// natsURL is where the server is that the gateway has started.
func (g *gatewayRun) natsURL() string {
	g.t.Helper()
	line := g.waitLine("NATS server started")
	_, text, ok := strings.Cut(line, "url=")
	require.True(g.t, ok, line)
	return strings.Trim(strings.Fields(text)[0], `"`)
}

func TestGateway_TakesRequestsOverNATSAndSharesTasks(t *testing.T) {
	first := startGateway(t, "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	first.provide("echo", "a.sock", gwEcho)
	first.waitLine("tasks.echo")
	second := startGateway(t, "--nats", first.natsURL())
	second.provide("other", "a.sock", gwEcho) // a task that the first has no provider for
	second.waitLine("tasks.other")

	nc, err := nats.Connect(first.natsURL())
	require.NoError(t, err)
	defer nc.Close()
	before := http.DefaultTransport
	http.DefaultTransport = &http.Transport{} // the scheme can't be unregistered
	t.Cleanup(func() { http.DefaultTransport = before })
	require.NoError(t, natshook.Register(nc))
	responses := make(chan *acomm.Response, 4)
	hook, err := natshook.Serve(nc, "answers.test", "", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if json.NewDecoder(r.Body).Decode(resp) == nil {
			responses <- resp
		}
	}))
	require.NoError(t, err)
	defer hook.Close()

	for _, task := range []string{"echo", "other"} {
		req := gwRequest(t, task, natshook.URL("answers.test").String(), task)
		require.NoError(t, acomm.Send(natshook.URL("tasks."+task), req))
		resp := gwWithin(t, responses)
		require.Equal(t, req.ID, resp.ID)
		require.JSONEq(t, `"`+task+`"`, string(*resp.Result))
	}
	first.hasMetric(`acomm_gateway_requests_total{task="echo"} 1`)
	second.hasMetric(`acomm_gateway_requests_total{task="other"} 1`)

	unix := gwRequest(t, "echo", "unix:///run/x.sock", nil)
	require.ErrorContains(t, acomm.Send(natshook.URL("tasks.echo"), unix), "unix hook")
	require.ErrorIs(t, acomm.Send(natshook.URL("tasks.nobody"), unix), syscall.ECONNREFUSED)

	second.stop()
	require.ErrorIs(t, acomm.Send(natshook.URL("tasks.other"), unix), syscall.ECONNREFUSED, "unsubscribed")
	hook.Close()
	nc.Close()
	first.stop()
}

func TestIsSubject(t *testing.T) {
	for _, subject := range []string{"tasks", "a.b"} {
		require.True(t, isSubject(subject), subject)
	}
	for _, subject := range []string{"", ".", "a.", "a..b", "a b", "a.*", ">"} {
		require.False(t, isSubject(subject), subject)
	}
}

// Hazard: an error quotes the password in the URL of the NATS server.
func TestGateway_NATSThatCantBeReachedIsAnError(t *testing.T) {
	r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0",
		"--nats", (&url.URL{Scheme: "nats", User: url.UserPassword("user", "secret"), Host: "127.0.0.1:1"}).String())
	require.Equal(t, exitTask, r.code, r.stderr)
	require.Contains(t, r.stderr, "connect to NATS")
	require.NotContains(t, r.stderr, "secret")
}
