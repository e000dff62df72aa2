package main

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCall_OverNATS(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	provider := startAcomm(t, "serve", filepath.Join(g.dir, "work", "1.sock"), "--", "cat")
	provider.waitLine("listening on")
	g.waitLine("tasks.work")

	require.Equal(t, result{stdout: `{"a":1}` + "\n"}, runAcomm(t, "call", g.natsURL()+"/tasks.work", "work", "a=1"))
	cmd := acommCmd(t, "call", "nats:///tasks.work", "work", "a=1")
	cmd.Env = append(cmd.Env, "NATS_URL="+g.natsURL())
	require.Equal(t, result{stdout: `{"a":1}` + "\n"}, runCmd(t, cmd))
	got := runAcomm(t, "call", g.natsURL()+"/tasks.nobody", "work")
	require.Equal(t, exitNotSent, got.code, got.stderr)
	provider.stop()
	g.stop()
}

// Hazard: the requester waits for its time-out, as its result is too large for NATS.
func TestCall_ResultTooLargeForNATSIsAnError(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	provider := startAcomm(t, append([]string{"serve", filepath.Join(g.dir, "work", "1.sock"), "--"}, sh(`head -c 2000000 /dev/zero | tr '\0' x`)...)...)
	provider.waitLine("listening on")
	g.waitLine("tasks.work")
	got := runAcomm(t, "call", g.natsURL()+"/tasks.work", "work")
	require.Equal(t, result{stderr: "acomm call: the result of 2000002 bytes is too large for the hook; use a stream\n", code: exitTask}, got)
	g.hasMetric(`acomm_gateway_forward_failures_total{task="work"} 1`)
	provider.stop()
	g.stop()
}
