package acomm_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Streams can't be cut off unnoticed: what the processes of a stream do to its
// consumer by dying, failing and finishing.

// cut is a point of a stream at which a process is killed.
type cut struct {
	hold   int64 // of the source: what is sent is known
	at     int64 // or once so many bytes have been consumed; before the connection with -1
	inStep bool  // the consumer reads on only when the process is gone
}

// cuts are the points that are special, and then random ones.
func cuts(size int64, number int, more ...cut) []cut {
	points := append([]cut{
		{hold: noHold, at: -1, inStep: true},
		{hold: noHold, at: -1},
		{hold: 0},
		{hold: 1},
		{hold: size - 1},
		{hold: size}, // all is sent, the source has not ended
		{hold: noHold, at: 1, inStep: true},
		{hold: noHold, at: size},
		{hold: noHold, at: size, inStep: true},
	}, more...)
	for len(points) < number {
		at := rand.Int64N(size + 1)
		if len(points)%4 == 0 {
			at = size - rand.Int64N(256<<10) // in what may be sent already
		}
		points = append(points, cut{hold: noHold, at: at, inStep: rand.IntN(2) == 0})
	}
	return points
}

// consume reads the stream while the victim is killed at the point given. The
// provider is the process that says it is holding.
func (c cut) consume(t *testing.T, consume consumer, u *url.URL, provider, victim *process) (*sink, error) {
	t.Helper()
	got := newSink()
	kill := func() {
		victim.Kill()
		if c.inStep {
			<-victim.exited
		}
	}
	switch {
	case c.hold != noHold:
	case c.at < 0:
		kill()
	default:
		got.at, got.then = c.at, kill
	}
	var err error
	done := async(func() { err = consume(got, u) })
	if c.hold != noHold {
		require.Equal(t, "holding", provider.ReadLine())
		kill()
	}
	within(t, done, "the consumer")
	return got, err
}

func TestStream_KilledProviderNeverLooksFinished(t *testing.T) {
	onlyLinux(t)
	size, number := full[int64](64<<20, 4<<20), full(200, 16)
	eachWay(t, func(t *testing.T, consume consumer) {
		var counted outcomes
		for i, c := range cuts(size, number, cut{hold: holdInClose}, cut{hold: holdInClose, inStep: true}) {
			t.Run(fmt.Sprintf("%d,hold=%d,at=%d", i, c.hold, c.at), func(t *testing.T) {
				spec := streamSpec{Size: size, Hold: c.hold}
				provider := startProcess(t, "stream provider")
				u := provider.offer(spec)
				got, err := c.consume(t, consume, u, provider, provider)
				counted.addCut(t, c, spec, got, err)
			})
		}
		counted.log(t, "provider killed")
	})
}

func TestStream_KilledCoordinatorNeverLooksFinished(t *testing.T) {
	size, number := full[int64](64<<20, 4<<20), full(200, 12)
	provider := startProcess(t, "stream provider")
	var counted outcomes
	for i, c := range cuts(size, number) {
		t.Run(fmt.Sprintf("%d,hold=%d,at=%d", i, c.hold, c.at), func(t *testing.T) {
			spec := streamSpec{Size: size, Hold: c.hold}
			coordinator := startProcess(t, "stream coordinator")
			u := coordinator.ask(provider.offer(spec).String())
			got, err := c.consume(t, httpGet, u, provider, coordinator)
			counted.addCut(t, c, spec, got, err)
		})
	}
	counted.log(t, "coordinator killed")
}

func TestStream_FailedSourceNeverLooksFinished(t *testing.T) {
	onlyLinux(t)
	size, number := full[int64](64<<20, 4<<20), full(200, 20)
	eachWay(t, func(t *testing.T, consume consumer) {
		provider := startProcess(t, "stream provider")
		var counted outcomes
		points := []int64{0, 0, 1, 32 << 10, size, size}
		for i := range number {
			if i >= len(points) {
				points = append(points, rand.Int64N(size+1))
			}
			spec := streamSpec{Size: points[i], Fails: true, AtOnce: i%2 == 0, Hold: noHold}
			u, got := provider.offer(spec), newSink()
			var err error
			within(t, async(func() { err = consume(got, u) }), "the consumer")
			counted.add(t, spec, got, err) // never whole
		}
		counted.log(t, "source failed")
	})
}

// Hazard: a consumer in the backlog of a provider that dies before it accepts.
func TestStream_ProviderKilledBeforeItAcceptsNeverLooksFinished(t *testing.T) {
	onlyLinux(t)
	var counted outcomes
	for range full(200, 5) {
		t.Run("", func(t *testing.T) {
			provider := startProcess(t, "stream provider")
			u, got := provider.offer(whole(1)), newSink()
			provider.freeze()
			var err error
			done := async(func() { err = acomm.Stream(got, u) })
			require.Eventually(t, func() bool {
				sockets, err := os.ReadFile("/proc/net/unix")
				return err == nil && strings.Count(string(sockets), u.Path) == 2 // the listener, and one to be accepted
			}, patience, time.Millisecond)
			provider.Kill()
			within(t, done, "the consumer")
			counted.add(t, whole(1), got, err)
			require.Error(t, err)
		})
	}
	counted.log(t, "killed before accept")
}

func TestStream_CutOffByStopNeverLooksFinished(t *testing.T) {
	onlyLinux(t)
	eachWay(t, func(t *testing.T, consume consumer) {
		tracker, err := acomm.NewTracker("", nil, 0)
		require.NoError(t, err)
		tracker.SetStreamStall(time.Millisecond)
		require.NoError(t, tracker.Start())
		defer tracker.Stop()
		src := newSource()
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		got, begun := newSink(), make(chan struct{})
		got.then = func() { close(begun) }
		done := async(func() { err = consume(got, u) })
		_, feedErr := src.feed.Write([]byte("x"))
		require.NoError(t, feedErr)
		within(t, begun, "the first byte")
		within(t, async(tracker.Stop), "Stop")
		within(t, done, "the consumer")
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	})
}

// Hazard: the bytes go to files and sockets without passing through the process,
// by other system calls.
func TestStream_CutOffIsSeenWithEveryDestination(t *testing.T) {
	onlyLinux(t)
	tracker := newTracker(t)
	for name, open := range map[string]func(*testing.T) io.Writer{
		"buffer": func(*testing.T) io.Writer { return new(bytes.Buffer) },
		"file": func(t *testing.T) io.Writer {
			f, err := os.Create(filepath.Join(t.TempDir(), "dest"))
			require.NoError(t, err)
			t.Cleanup(func() { f.Close() })
			return f
		},
		"tcp":  func(t *testing.T) io.Writer { return drainedConn(t, "tcp", "127.0.0.1:0") },
		"unix": func(t *testing.T) io.Writer { return drainedConn(t, "unix", filepath.Join(shortDir(t), "dest")) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int64{0, 1, 1 << 20} {
				for _, fails := range []bool{true, false} {
					spec := streamSpec{Size: size, Fails: fails, Hold: noHold}
					u, err := tracker.NewStreamUnix("", newPatternSource(spec, nil))
					require.NoError(t, err)
					err = acomm.Stream(open(t), u)
					if fails {
						require.ErrorIs(t, err, io.ErrUnexpectedEOF)
					} else {
						require.NoError(t, err)
					}
				}
			}
		})
	}
}

// Hazard: in HTTP/1.0, which reverse proxies speak to what is behind them, the
// end of the connection is the end of the data. Only a reset tells.
func TestProxyStreamHandler_CutOffIsSeenByHTTP10(t *testing.T) {
	onlyLinux(t)
	tracker, _ := streamProxy(t)
	for _, size := range []int64{1, 32 << 10, 4 << 20} {
		for _, fails := range []bool{true, false} {
			addr, err := tracker.NewStreamUnix("", newPatternSource(streamSpec{Size: size, Fails: fails, Hold: noHold}, nil))
			require.NoError(t, err)
			u, err := tracker.ProxyStreamHTTPURL(addr)
			require.NoError(t, err)
			conn, err := net.Dial("tcp", u.Host)
			require.NoError(t, err)
			_, err = fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n\r\n", u.RequestURI())
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			var body []byte
			if err == nil {
				body, err = io.ReadAll(resp.Body)
			}
			conn.Close()
			if !fails {
				require.NoError(t, err)
				require.Len(t, body, int(size))
			} else if err == nil { // failed before it was connected to
				require.Equal(t, http.StatusBadGateway, resp.StatusCode, "%d bytes look like all there were", len(body))
			}
		}
	}
}

func TestStream_FinishedIsNeverReportedAsFailed(t *testing.T) {
	tracker, _ := streamProxy(t)
	var counted outcomes
	for range full(40, 4) { // processes that end right after Stop
		t.Run("", func(t *testing.T) {
			provider := startProcess(t, "stream provider")
			consumeAll(t, provider, finishedSizes(50), &counted, acomm.Stream, proxied(tracker))
		})
	}
	counted.log(t, "finished")
	require.Equal(t, full(2000, 200), counted.whole)
}

// Hazard: a consumer so slow that the provider stopped and ended long before it
// has read to the end.
func TestStream_IsWholeAfterItsProviderIsGone(t *testing.T) {
	const number, size = 20, 64 << 10 // what a socket's buffer holds
	provider := startProcess(t, "stream provider")
	var counted outcomes
	var sizes []int64
	for i := range number {
		sizes = append(sizes, size-int64(i))
	}
	urls := provider.offerAll(sizes)
	done := async(func() {
		var reading sync.WaitGroup
		defer reading.Wait()
		for i, u := range urls {
			reading.Go(func() {
				got := newSink()
				got.then = func() { <-provider.exited }
				counted.add(t, whole(sizes[i]), got, acomm.Stream(got, u))
			})
		}
	})
	require.NoError(t, provider.Wait())
	within(t, done, "the consumers")
	counted.log(t, "provider gone")
	require.Equal(t, number, counted.whole)
}

func TestStream_ConsumerOf2016ReadsAProviderOfToday(t *testing.T) {
	var counted outcomes
	for range full(10, 2) {
		t.Run("", func(t *testing.T) {
			provider := startProcess(t, "stream provider")
			consumeAll(t, provider, finishedSizes(50), &counted, consumer2016)
		})
	}
	counted.log(t, "consumer of 2016")

	// Its old guarantee: it gets what was sent, and can't tell why that was all.
	for _, sent := range []int64{0, 1, 1 << 20} {
		provider := startProcess(t, "stream provider")
		u := provider.offer(streamSpec{Size: 2 << 20, Hold: sent})
		got, err := cut{hold: sent}.consume(t, consumer2016, u, provider, provider)
		require.NoError(t, err)
		require.Equal(t, sent, got.n)
	}
}

func TestStream_ConsumerOfTodayReadsAProviderOf2016(t *testing.T) {
	tracker, _ := streamProxy(t)
	var counted outcomes
	for range full(10, 2) {
		t.Run("", func(t *testing.T) {
			provider := startProcess(t, "stream provider of 2016")
			consumeAll(t, provider, finishedSizes(50), &counted, acomm.Stream, proxied(tracker))
		})
	}
	counted.log(t, "provider of 2016")

	// Its old guarantee: the end of its process looks like the end of its data.
	for _, sent := range []int64{0, 1, 1 << 20} {
		provider := startProcess(t, "stream provider of 2016")
		u := provider.offer(streamSpec{Size: 2 << 20, Hold: sent})
		got, err := cut{hold: sent}.consume(t, acomm.Stream, u, provider, provider)
		require.NoError(t, err)
		require.Equal(t, sent, got.n)
	}

	provider := startProcess(t, "stream provider of 2016")
	require.NoError(t, acomm.Stream(io.Discard, provider.ask("listen")))
	require.Equal(t, "0 <nil>", provider.ReadLine(), "what the provider was sent")
}
