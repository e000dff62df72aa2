package acomm_test

import (
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: a frame goes past the wrapper, which may count, encrypt or log it.
func TestConnData_GoesThroughWrappersOfEveryConnection(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	require.NoError(t, ul.Start())
	handling := make(chan func(net.Conn) net.Conn, 1)
	conns := make(chan net.Conn, 1)
	served := async(func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			conn = (<-handling)(conn)
			var n note
			if acomm.UnmarshalConnData(conn, &n) == nil {
				_ = acomm.SendConnData(conn, &acomm.Response{})
			}
			ul.DoneConn(conn)
			conns <- conn
		}
	})
	send := func(handle func(net.Conn) net.Conn) net.Conn {
		handling <- handle
		require.NoError(t, acomm.Send(ul.URL(), note{}))
		return within(t, conns, "the handler")
	}
	asWrapped := func(conn net.Conn) net.Conn { return wrap(wrap(conn)) }
	asItIs := func(conn net.Conn) net.Conn { return conn }

	first := send(asWrapped).(wrapped)
	for !acomm.SessionTo(ul.Addr()).Open {
		send(asItIs)
		await(t, "the session, or none", func() bool { return acomm.SessionTo(ul.Addr()).Open || !acomm.SessionTo(ul.Addr()).Opening })
	}
	exchange := send(asWrapped).(wrapped)
	require.True(t, acomm.SessionTo(ul.Addr()).Open)
	inner := func(w wrapped) net.Conn { return w.Conn.(wrapped).Conn }
	require.NotEqual(t, fmt.Sprintf("%T", inner(first)), fmt.Sprintf("%T", inner(exchange)), "one of each kind")
	for _, conn := range []wrapped{first, exchange} {
		require.NotZero(t, conn.reads.load(), "%T", inner(conn))
		require.Equal(t, 1, conn.writes.load(), "%T", inner(conn))
	}
	within(t, async(func() { ul.Stop(0) }), "Stop")
	within(t, served, "the end of the loop")
}
