package main

import (
	"net"
	"net/http"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

// countingListener accepts at once, as often as it is asked.
type countingListener struct {
	net.Listener
	accepted int
}

func (l *countingListener) Accept() (net.Conn, error) { l.accepted++; return nil, nil }
func (l *countingListener) Close() error              { return nil }

func TestLimitedListener_AcceptsOnlyWhileFewerAreOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := &countingListener{}
		l := newLimitedListener(inner, 2)
		ended := make(chan error)
		go func() {
			for {
				if _, err := l.Accept(); err != nil {
					ended <- err
					return
				}
			}
		}()
		synctest.Wait()
		require.Equal(t, 2, inner.accepted)
		l.connState(nil, http.StateActive)
		l.connState(nil, http.StateIdle)
		synctest.Wait()
		require.Equal(t, 2, inner.accepted)
		l.connState(nil, http.StateClosed)
		synctest.Wait()
		require.Equal(t, 3, inner.accepted)
		l.connState(nil, http.StateHijacked)
		synctest.Wait()
		require.Equal(t, 4, inner.accepted)
		require.NoError(t, l.Close(), "ends an Accept that waits")
		require.NoError(t, l.Close())
		require.ErrorIs(t, <-ended, net.ErrClosed)
	})
}

// Hazard: the place of a connection that ended in the middle of a header is never
// free again.
func TestGateway_PlaceOfABrokenConnectionIsFreeAgain(t *testing.T) {
	g := startGateway(t, "--max-connections", "1")
	silent, err := net.Dial("tcp", g.url.Host)
	require.NoError(t, err)
	_, err = silent.Write([]byte("GET /healthz HTTP/1.1\r\nHost: x\r\n"))
	require.NoError(t, err)
	require.NoError(t, silent.Close())
	status, _ := g.get("healthz")
	require.Equal(t, http.StatusOK, status)
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	g.stop()
}
