package main

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// handshakeBreaker reads a byte of its first connections, and closes them.
type handshakeBreaker struct {
	net.Listener
	breaks int
}

func (l *handshakeBreaker) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.breaks == 0 {
			return conn, err
		}
		l.breaks--
		_, _ = io.ReadFull(conn, make([]byte, 1))
		_ = conn.Close()
	}
}

// Hazard: a response that nobody got is given up, since it was not the dial that failed.
func TestSendResponse_IsTriedAgainAfterABrokenHandshake(t *testing.T) {
	var taken atomic.Int32
	hook := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { taken.Add(1) }))
	hook.Listener = &handshakeBreaker{hook.Listener, 2}
	hook.StartTLS()
	defer hook.Close()
	before := http.DefaultTransport
	defer func() { http.DefaultTransport = before }()
	front, connecting := newHookTransport(hookRules{{netip.MustParsePrefix("127.0.0.0/8"), true}}, false, time.Minute)
	http.DefaultTransport = front
	roots := x509.NewCertPool()
	roots.AddCert(hook.Certificate())
	connecting.TLSClientConfig = &tls.Config{RootCAs: roots}
	addr, err := url.Parse(hook.URL)
	require.NoError(t, err)
	require.NoError(t, sendResponse(addr, &acomm.Response{ID: "1"}, time.Now().Add(20*time.Second)))
	require.EqualValues(t, 1, taken.Load())
	connecting.CloseIdleConnections()
}
