package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// askAs sends a request to the gateway under another name, as a browser does that
// has been told that the name is this machine (DNS rebinding).
func (g *gatewayRun) askAs(host, method, path string) (status int, resp *acomm.Response) {
	g.t.Helper()
	req, err := http.NewRequest(method, g.url.JoinPath(path).String(), strings.NewReader("{}"))
	require.NoError(g.t, err)
	req.Host = host
	if method == http.MethodPost {
		req.Header.Set("Origin", "http://"+host)
		req.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	answer, err := http.DefaultClient.Do(req)
	require.NoError(g.t, err)
	defer answer.Body.Close()
	resp = &acomm.Response{}
	_ = json.NewDecoder(answer.Body).Decode(resp) // not of all paths
	return answer.StatusCode, resp
}

// Hazard: a web page whose name leads to the loopback sends requests, and reads the
// answers.
func TestGateway_OnTheLoopbackServesOnlyItsNames(t *testing.T) {
	t.Parallel()
	port := func(g *gatewayRun) string { return ":" + g.url.Port() }
	g := startGateway(t, "--allow-host", "Box.example,other.example", "--stream-url", "https://public.example/stream")
	for _, host := range []string{
		"evil.example", "evil.example" + port(g), "127.0.0.1.evil.example", "localhost.evil.example",
		"192.0.2.1", "[2001:db8::1]" + port(g), "box.example.evil.example", "notlocalhost", "0.0.0.0",
	} {
		status, resp := g.askAs(host, "POST", "/")
		require.Equal(t, http.StatusForbidden, status, host)
		require.ErrorContains(t, resp.Error, "--allow-host", host)
		for _, path := range []string{"healthz", "metrics", "stream"} {
			status, _ = g.askAs(host, "GET", path)
			require.Equal(t, http.StatusForbidden, status, "%s of %s", path, host)
		}
	}
	for _, host := range []string{
		"127.0.0.1", "127.0.0.1" + port(g), "127.1.2.3:80", "[::1]" + port(g), "[::1]", "localhost", "LOCALHOST." + port(g),
		"acomm.localhost", "box.example", "BOX.example:443", "other.example", "public.example",
	} {
		status, resp := g.askAs(host, "POST", "/")
		require.Equal(t, http.StatusBadRequest, status, "%s: %v", host, resp.Error) // it has no id
		status, _ = g.askAs(host, "GET", "healthz")
		require.Equal(t, http.StatusOK, status, host)
	}
	g.hasMetric(`acomm_gateway_refused_total{reason="invalid",task=""} 21`)
	g.stop()
}

func TestGateway_OnOtherAddressesServesAnyNameUnlessTold(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "--listen", "0.0.0.0:0")
	status, _ := g.askAs("any.example", "GET", "healthz")
	require.Equal(t, http.StatusOK, status)
	g.stop()

	g = startGateway(t, "--listen", "0.0.0.0:0", "--allow-host", "box.example")
	for host, want := range map[string]int{
		"any.example": http.StatusForbidden, "192.0.2.1": http.StatusForbidden,
		"box.example": http.StatusOK, "localhost": http.StatusOK, g.url.Host: http.StatusOK,
	} {
		status, _ := g.askAs(host, "GET", "healthz")
		require.Equal(t, want, status, host)
	}
	g.stop()

	g = startGateway(t, "--allow-host", "*")
	status, _ = g.askAs("any.example", "GET", "healthz")
	require.Equal(t, http.StatusOK, status)
	g.stop()
}

func TestGateway_AllowedHostsAreNames(t *testing.T) {
	t.Parallel()
	for _, host := range []string{"http://box.example", "box.example:80", "box.example/x", "*.example", "box,,x"} {
		r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0", "--allow-host", host)
		require.Equal(t, exitUsage, r.code, host)
		require.Contains(t, r.stderr, "--allow-host", host)
	}
}
