package acomm_test

import (
	"net"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mistifyio/acomm"
)

// What services of 2016 and public bug reports have taught at the edges: which
// paths, ids and values work, and that those that can't are refused.

// Hazard: a loop on NextConn that begins before Start is over at once, and nobody
// serves.
func TestUnixListener_NextConnWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	require.NoError(t, ul.Start())
	require.NoError(t, acomm.Send(ul.URL(), &acomm.Response{ID: "1"}))
	ul.Stop(0)
	within(t, served, "the loop, after Stop")
	require.Nil(t, ul.NextConn(), "after Stop")
}

func TestUnixListener_StopReleasesWhoWaitsForTheFirstStart(t *testing.T) {
	ul := acomm.NewUnixListener(filepath.Join(shortDir(t), "s.sock"), 0)
	served := async(func() { serveAll(ul) })
	awaitBlocked(t, "acomm.(*UnixListener).NextConn", 1)
	ul.Stop(0)
	within(t, served, "the loop, after a Stop without a Start")
}

// wrapped is a connection with something around it, which counts its calls.
type wrapped struct {
	net.Conn
	reads, writes, closes *counter
}

func wrap(conn net.Conn) wrapped { return wrapped{conn, &counter{}, &counter{}, &counter{}} }

func (w wrapped) NetConn() net.Conn { return w.Conn }

func (w wrapped) Read(p []byte) (int, error) {
	w.reads.add()
	return w.Conn.Read(p)
}

func (w wrapped) Write(p []byte) (int, error) {
	w.writes.add()
	return w.Conn.Write(p)
}

func (w wrapped) Close() error {
	w.closes.add()
	return w.Conn.Close()
}

// wrapsItself is what DoneConn must not follow for ever.
type wrapsItself struct{ net.Conn }

func (w wrapsItself) NetConn() net.Conn { return w }

// Hazard: the connection stays open, and Stop waits for it for ever.
func TestUnixListener_DoneConnCompletesWhatAWrapperWraps(t *testing.T) {
	for name, senders := range map[string]func(*acomm.UnixListener){
		"a connection of its own": func(ul *acomm.UnixListener) {
			conn, err := net.Dial("unix", ul.Addr())
			require.NoError(t, err)
			t.Cleanup(func() { _ = conn.Close() })
		},
		"a sender of this library": func(ul *acomm.UnixListener) {
			go func() { _ = acomm.Send(ul.URL(), &acomm.Response{ID: "1"}) }()
		},
	} {
		t.Run(name, func(t *testing.T) {
			ul, other := startListener(t, "", 0), startListener(t, "", 0)
			senders(ul)
			conn := take(t, ul)
			ul.DoneConn(wrapsItself{conn})
			ul.DoneConn(wrap(nil))
			other.DoneConn(wrap(conn))
			require.NoError(t, stillOpen(conn))
			outer := wrap(wrap(conn))
			ul.DoneConn(outer)
			ul.DoneConn(outer)
			require.ErrorIs(t, stillOpen(conn), net.ErrClosed)
			require.Equal(t, 1, outer.closes.load(), "as in 2016: it may have something to write yet")
			within(t, async(func() { ul.Stop(0) }), "Stop")
		})
	}
}
