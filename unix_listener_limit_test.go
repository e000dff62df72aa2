package acomm_test

import (
	"math"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The accept limit of a UnixListener.

func TestUnixListener_AcceptsAsManyAsItsLimit(t *testing.T) {
	const limit = 3
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), limit)
	for range 2 { // the second run has the whole limit again
		require.NoError(t, ul.Start())
		for range limit {
			dial(t, ul.Addr())
		}
		var conns []net.Conn
		for range limit {
			conns = append(conns, take(t, ul))
		}
		require.Nil(t, ul.NextConn(), "all were taken, none can come")
		require.Nil(t, ul.NextConn())
		_, err := net.Dial("unix", ul.Addr())
		require.Error(t, err)
		require.NoFileExists(t, ul.Addr())

		stopped := async(func() { ul.Stop(0) })
		for _, conn := range conns {
			select {
			case <-stopped:
				require.FailNow(t, "Stop did not wait")
			default:
			}
			ul.DoneConn(conn)
		}
		within(t, stopped, "Stop")
	}
}

func TestUnixListener_NobodyGetsInBehindTheLast(t *testing.T) {
	// The hazard: whoever connects between the last accept and the end of
	// listening takes the listener for alive.
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 1)
	for range 300 {
		require.NoError(t, ul.Start())
		first, err := net.Dial("unix", ul.Addr())
		require.NoError(t, err)
		conn := ul.NextConn()
		second, err := net.Dial("unix", ul.Addr())
		ul.DoneConn(conn)
		ul.Stop(0)
		require.NoError(t, first.Close())
		if err == nil {
			require.NoError(t, second.Close())
		}
		require.Error(t, err)
	}
}

func TestUnixListener_StopsAtItsLimitWithNothingOpen(t *testing.T) {
	// The hazard: nobody is left to tell Stop that the last connection is done.
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), 2)
	require.NoError(t, exchange(ul, ul.URL()))
	require.NoError(t, exchange(ul, ul.URL()))
	require.Nil(t, ul.NextConn())
	within(t, async(func() { ul.Stop(0) }), "Stop")
}

func TestUnixListener_LimitTurnsAwayWhoeverComesLate(t *testing.T) {
	const limit = 2
	ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), limit)
	var served, refused atomic.Int32
	var peers sync.WaitGroup
	for range 10 {
		peers.Go(func() {
			conn, err := net.Dial("unix", ul.Addr())
			if err != nil {
				refused.Add(1)
				return
			}
			defer conn.Close()
			if _, err := readByte(conn); err != nil { // not left to wait
				refused.Add(1)
				return
			}
			served.Add(1)
		})
	}
	for range limit {
		conn := take(t, ul)
		_, err := conn.Write([]byte{7})
		require.NoError(t, err)
		ul.DoneConn(conn)
	}
	require.Nil(t, ul.NextConn())
	within(t, async(peers.Wait), "every peer's answer")
	require.EqualValues(t, limit, served.Load())
	require.EqualValues(t, 10-limit, refused.Load())
}

func TestUnixListener_WithoutALimitItGoesOn(t *testing.T) {
	for _, limit := range []int{0, -1, math.MinInt} {
		ul := startListener(t, filepath.Join(shortDir(t), "s.sock"), limit)
		for range 20 {
			require.NoError(t, exchange(ul, ul.URL()))
		}
	}
}
