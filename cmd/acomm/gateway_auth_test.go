package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// authority signs certificates in a directory.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.sign("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

// sign writes NAME.pem and NAME.key.
func (a *authority) sign(name string, cert *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	cert.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	require.NoError(a.t, err)
	cert.Subject = pkix.Name{CommonName: name}
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	by, byKey := a.cert, a.key
	if by == nil {
		by, byKey = cert, key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, by, &key.PublicKey, byKey)
	require.NoError(a.t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(a.t, err)
	for file, block := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		require.NoError(a.t, os.WriteFile(a.file(file), pem.EncodeToMemory(block), 0o600))
	}
	signed, err := x509.ParseCertificate(der)
	require.NoError(a.t, err)
	return signed, key
}

func (a *authority) signServer(name string) {
	a.sign(name, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
}

func (a *authority) signClient(name string) {
	a.sign(name, &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
}

func TestGateway_TLSIsForThoseWithACertificate(t *testing.T) {
	t.Parallel()
	ours, other := newAuthority(t), newAuthority(t)
	ours.signServer("server")
	ours.signClient("client")
	other.signClient("client")
	g := startGateway(t, "--tls-cert", ours.file("server.pem"), "--tls-key", ours.file("server.key"), "--client-ca", ours.file("ca.pem"))
	g.provide("echo", "a.sock", gwEcho)
	target := "https://" + g.url.Host + "/"
	call := func(args ...string) result {
		return runAcomm(t, append(append([]string{"call"}, args...), target, "echo", "n=5")...)
	}
	got := call("--cacert", ours.file("ca.pem"), "--cert", ours.file("client.pem"), "--key", ours.file("client.key"))
	require.Equal(t, 0, got.code, got.stderr)
	require.JSONEq(t, `{"n":5}`, got.stdout)
	for what, args := range map[string][]string{
		"no certificate":      {"--cacert", ours.file("ca.pem")},
		"another's":           {"--cacert", ours.file("ca.pem"), "--cert", other.file("client.pem"), "--key", other.file("client.key")},
		"the service unknown": {"--cacert", other.file("ca.pem"), "--cert", ours.file("client.pem"), "--key", ours.file("client.key")},
		"none at all":         {},
	} {
		got := call(args...)
		require.NotEqual(t, 0, got.code, what)
		require.Empty(t, got.stdout, what)
		require.NotEmpty(t, got.stderr, what)
	}
	g.stop()
}

func TestGateway_TokensDecideAndAreReadAgain(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "tokens")
	write := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text), 0o600)) }
	write("# ours\nfirst-token\n\nsecond\n")
	g := startGateway(t, "--token-file", file)
	g.provide("echo", "a.sock", gwEcho)
	status := func(path, authorization string) int {
		header := []string{"Authorization", authorization}
		if authorization == "" {
			header = nil
		}
		answer, _ := g.task(path, "1", header...)
		return answer.StatusCode
	}
	require.Equal(t, 200, status("/tasks/echo", "Bearer first-token"))
	require.Equal(t, 200, status("/tasks/echo", "bearer second"))
	for _, wrong := range []string{"", "Bearer", "Bearer first", "Bearer first-token2", "Basic second", "second", "Bearer # ours"} {
		require.Equal(t, 401, status("/tasks/echo", wrong), wrong)
	}
	require.Equal(t, 401, status("/metrics", ""))
	require.Equal(t, 401, status("/", ""))
	healthy, _ := g.get("healthz")
	require.Equal(t, 200, healthy)

	got := runAcomm(t, "call", "--token-file", file, g.url.String(), "echo", "n=5")
	require.Equal(t, 0, got.code, got.stderr)
	got = runAcomm(t, "call", g.url.String(), "echo", "n=5")
	require.Equal(t, 3, got.code, "not taken")
	require.Contains(t, got.stderr, "401")

	write("third\n")
	g.signal(syscall.SIGHUP)
	g.waitLine("read again")
	require.Equal(t, 401, status("/tasks/echo", "Bearer second"))
	require.Equal(t, 200, status("/tasks/echo", "Bearer third"))
	write("")
	g.signal(syscall.SIGHUP)
	g.waitLine("the old ones stay in use")
	require.Equal(t, 200, status("/tasks/echo", "Bearer third"))
	g.stop()
}

func TestGateway_StreamsNeedNoToken(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "tokens")
	require.NoError(t, os.WriteFile(file, []byte("token\n"), 0o600))
	g := startGateway(t, "--token-file", file)
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	t.Cleanup(tracker.Stop)
	g.provide("stream", "a.sock", func(req *acomm.Request) (*acomm.Response, error) {
		u, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("data")))
		return &acomm.Response{ID: req.ID, StreamURL: u}, err
	})
	got := runAcomm(t, "call", "--token-file", file, g.url.String(), "stream")
	require.Equal(t, 0, got.code, got.stderr)
	require.Equal(t, "data", got.stdout)
}

func TestGateway_ListensOnASocketWithAMode(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "http.sock")
	dir := shortDir(t)
	start := func() *running {
		r := startCmd(t, acommCmd(t, "gateway", "--socket-dir", dir, "--listen", "unix:"+path, "--listen-mode", "0600", "--stream-url", "http://box.example/stream", "--name", "gw"))
		r.waitLine("ready")
		return r
	}
	r := start()
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	defer client.CloseIdleConnections()
	healthz := func() {
		answer, err := client.Get("http://gateway/healthz")
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, 200, answer.StatusCode)
	}
	healthz()
	second := runAcomm(t, "gateway", "--socket-dir", dir, "--listen", "unix:"+path, "--stream-url", "http://box.example/stream", "--name", "gw2")
	require.Equal(t, 1, second.code)
	require.Contains(t, second.stderr, "another process listens there")
	require.NoError(t, r.Process.Kill())
	<-r.done
	client.CloseIdleConnections()
	r = start() // in place of the dead one's
	healthz()
	r.signal(syscall.SIGTERM)
	require.Equal(t, 0, r.wait(), r.said())
	require.NoFileExists(t, path)
}

// Hazard: a token goes to wherever a redirect or a stream leads.
func TestCall_HeadersGoToTheServiceAndNowhereElse(t *testing.T) {
	t.Parallel()
	seen := make(chan string, 10)
	see := func(name string, r *http.Request) {
		seen <- name + ": " + r.Header.Get("Authorization") + r.Header.Get("X-Name")
	}
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { see("other", r) }))
	t.Cleanup(other.Close)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		see("service", r)
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(service.Close)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte("secret\n"), 0o600))
	got := runAcomm(t, "call", "--timeout", "2s", "--token-file", file, "--header", "X-Name: me", service.URL, "echo")
	require.NotEqual(t, 0, got.code)
	require.Equal(t, "service: Bearer secretme", gwWithin(t, seen))
	require.Equal(t, "other: ", gwWithin(t, seen))
}

// Hazard: a redirect led to another host, which got the client certificate.
func TestCall_CertificateGoesToTheServiceAndNowhereElse(t *testing.T) {
	ours := newAuthority(t)
	ours.signClient("client")
	seen := make(chan string, 10)
	start := func(name string, handle http.HandlerFunc) *httptest.Server {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen <- fmt.Sprint(name, ": ", len(r.TLS.PeerCertificates))
			handle(w, r)
		}))
		server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		server.StartTLS()
		t.Cleanup(server.Close)
		return server
	}
	other := start("other", func(http.ResponseWriter, *http.Request) {})
	service := start("service", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	})
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: service.Certificate().Raw} // of both
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(block), 0o600))
	got := runAcomm(t, "call", "--timeout", "500ms", "--cacert", ca,
		"--cert", ours.file("client.pem"), "--key", ours.file("client.key"), service.URL, "echo")
	require.NotEqual(t, 0, got.code)
	require.Equal(t, "service: 1", gwWithin(t, seen))
	require.Equal(t, "other: 0", gwWithin(t, seen))
}

func TestAccess_WrongUsage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	empty, text := filepath.Join(dir, "empty"), filepath.Join(dir, "text")
	require.NoError(t, os.WriteFile(empty, []byte("# nothing\n"), 0o600))
	require.NoError(t, os.WriteFile(text, []byte("a token\n"), 0o600))
	u := (&url.URL{Scheme: "https", Host: "127.0.0.1:1"}).String()
	for _, args := range [][]string{
		{"--tls-cert", text}, {"--tls-key", text}, {"--tls-cert", text, "--tls-key", text}, {"--client-ca", text},
		{"--token-file", empty}, {"--token-file", text}, {"--token-file", filepath.Join(dir, "none")}, {"--listen-mode", "rw"},
		{"--listen", "unix:" + filepath.Join(dir, "s")},
	} {
		got := runAcomm(t, append([]string{"gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0"}, args...)...)
		require.Equal(t, 2, got.code, "%s: %s", args, got.stderr)
		require.Contains(t, got.stderr, args[0])
	}
	for _, args := range [][]string{{"--cert", text}, {"--cacert", text}, {"--token-file", empty}, {"--header", "no"}, {"--header", "a b: c"}} {
		got := runAcomm(t, append([]string{"call"}, append(args, u, "echo")...)...)
		require.Equal(t, 2, got.code, "%s: %s", args, got.stderr)
	}
	got := runAcomm(t, "call", "--header", "a: b", filepath.Join(dir, "s.sock"), "echo")
	require.Equal(t, 2, got.code)
}
