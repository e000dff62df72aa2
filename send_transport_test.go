package acomm_test

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a service sets on http.DefaultTransport applies to Send.

// What a service sets on http.DefaultTransport applies, before the first post and after.
func TestSend_SettingsOfTheDefaultTransportApply(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	transport := newTransport(t)

	require.Error(t, acomm.Send(addr, 1), "the server's certificate is unknown")
	transport.TLSClientConfig = &tls.Config{RootCAs: secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	require.NoError(t, acomm.Send(addr, 1), "it is known now, and HTTP/2 is spoken")

	var dialled [2]atomic.Int32
	peer := httpPeer(t, func(http.ResponseWriter, *http.Request) {})
	for i := range dialled { // closures of the same code
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled[i].Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
		require.NoError(t, acomm.Send(peer, 1))
		require.NoError(t, acomm.Send(peer, 1))
		require.EqualValues(t, 1, dialled[i].Load(), "a new connection with the new setting, kept for the second post")
	}

	proxied := make(chan string, 1)
	proxy := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) { proxied <- r.URL.Host })
	transport.Proxy = http.ProxyURL(proxy)
	require.NoError(t, acomm.Send(&url.URL{Scheme: "http", Host: "hook.test"}, 1))
	require.Equal(t, "hook.test", <-proxied)

	denied := errors.New("denied")
	for name, guard := range map[string]http.RoundTripper{
		"a type of the service": roundTripper(func(*http.Request) (*http.Response, error) { return nil, denied }),
		"a Transport": &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, denied
		}},
	} {
		registered := newTransport(t)
		registered.RegisterProtocol("http", guard)
		require.ErrorIs(t, acomm.Send(peer, 1), denied, name)
		registered = &http.Transport{} // one that has not spoken HTTP/2
		replaceTransport(t, registered)
		registered.RegisterProtocol("https", guard)
		require.ErrorIs(t, acomm.Send(&url.URL{Scheme: "https", Host: peer.Host}, 1), denied, name)
	}

	replaced := errors.New("replaced")
	http.DefaultTransport = roundTripper(func(*http.Request) (*http.Response, error) { return nil, replaced })
	require.ErrorIs(t, acomm.Send(peer, 1), replaced)
}

func TestSend_RegisteredSchemeIsUsed(t *testing.T) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	bodies := make(chan string, 1)
	transport.RegisterProtocol("carrier-pigeon", roundTripper(func(r *http.Request) (*http.Response, error) {
		body, err := io.ReadAll(r.Body)
		bodies <- string(body)
		if r.URL.Path == "/lost" {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		return &http.Response{StatusCode: 204, Body: http.NoBody, Request: r}, err
	}))
	replaceTransport(t, transport)
	require.NoError(t, acomm.Send(&url.URL{Scheme: "carrier-pigeon", Path: "/home"}, "coo"))
	require.Equal(t, `"coo"`, within(t, bodies, "the payload"))
	err := acomm.Send(&url.URL{Scheme: "carrier-pigeon", Path: "/lost"}, "coo")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.NotErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorIs(t, acomm.Send(&url.URL{Scheme: "carrier-crow", Path: "/home"}, 1), errors.ErrUnsupported)
}

// Hazard: a Transport with no settings speaks HTTP/2, and its clone offers it without
// speaking it; what is changed inside of its settings is not the clone's.
func TestSend_PlainTransportSpeaksHTTP2AndKeepsItsSettings(t *testing.T) {
	protos := make(chan int, 10)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { protos <- r.ProtoMajor }))
	secure.EnableHTTP2 = true
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	transport := &http.Transport{}
	replaceTransport(t, transport)
	require.Error(t, acomm.Send(addr, 1), "the certificate is unknown")
	transport.TLSClientConfig.RootCAs = secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	require.NoError(t, acomm.Send(addr, 1))
	require.Equal(t, 2, <-protos)
	answer, err := http.Post(secure.URL, "text/plain", nil)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, 2, <-protos, "as the transport itself")
}

// Hazard: nobody but Send knows the connections that it keeps, so without a time-out
// they, and their goroutines, stay for good.
func TestSend_IdleConnectionsAreClosedInTime(t *testing.T) {
	for name, timeout := range map[string]time.Duration{"not set": 0, "set": 10 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				closed := make(chan time.Time, 1)
				replaceTransport(t, &http.Transport{
					IdleConnTimeout: timeout,
					DialContext: func(context.Context, string, string) (net.Conn, error) {
						conn, far := net.Pipe()
						go func() { acceptOne(far); closed <- time.Now() }()
						return conn, nil
					},
				})
				require.NoError(t, acomm.Send(&url.URL{Scheme: "http", Host: "hook.test"}, 1))
				sent := time.Now()
				require.Equal(t, cmp.Or(timeout, 90*time.Second), (<-closed).Sub(sent))
			})
		})
	}
}

// acceptOne acknowledges one post, and returns when the connection is closed.
func acceptOne(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, req.Body)
	_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
	_, _ = io.Copy(io.Discard, in)
}

// Hazard: the first use of a clone writes into the TLS settings that the service's own
// requests read meanwhile. It shows only under -race.
func TestSend_DoesNotRaceWithTheServicesOwnRequests(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	addr, err := url.Parse(secure.URL)
	require.NoError(t, err)
	get := func() error { // on a new connection, so that it reads the settings
		req, err := http.NewRequest(http.MethodGet, secure.URL, nil)
		if err != nil {
			return err
		}
		req.Close = true
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		return answer.Body.Close()
	}
	for range 5 {
		newTransport(t).TLSClientConfig = &tls.Config{RootCAs: secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
		require.NoError(t, get(), "the transport is complete")
		start, errs := make(chan struct{}), make(chan error, 5)
		for range 4 {
			go func() { <-start; errs <- get() }()
		}
		go func() { <-start; errs <- acomm.Send(addr, 1) }()
		close(start)
		for range 5 {
			require.NoError(t, within(t, errs, "the requests"))
		}
	}
}
