package acomm_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Streams can't be cut off unnoticed: what the processes of a stream do to its
// consumer by dying, failing and finishing.

func init() {
	roles["stream provider"] = streamProvider
	roles["stream provider of 2016"] = streamProvider2016
	roles["stream coordinator"] = streamCoordinator
}

// streamSpec describes a source, to the process that serves it.
type streamSpec struct {
	Size   int64
	Fails  bool // at the end, instead of ending
	AtOnce bool // the end is told with the last bytes, not behind them
	Hold   int64
	// where the source stays silent until it is closed: after so many bytes, not
	// at all (noHold), or in Close (holdInClose); it prints "holding"
}

const (
	noHold      = -1
	holdInClose = -2
)

func whole(size int64) streamSpec { return streamSpec{Size: size, Hold: noHold} }

// patternSource has bytes that repeat only after a distance that is no multiple
// of any buffer's size.
type patternSource struct {
	streamSpec
	pos     int64
	claimed func() // called by the first Read, if not nil
	closed  chan struct{}
	closing sync.Once
}

var pattern = sync.OnceValue(func() []byte {
	data := make([]byte, 1_000_003)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	return data
})

var errDisk = errors.New("disk on fire")

func newPatternSource(spec streamSpec, claimed func()) *patternSource {
	return &patternSource{streamSpec: spec, claimed: claimed, closed: make(chan struct{})}
}

func (s *patternSource) Read(b []byte) (int, error) {
	if s.claimed != nil {
		s.claimed()
		s.claimed = nil
	}
	until := s.Size
	if s.Hold >= s.pos {
		until = s.Hold
	}
	if s.Hold == s.pos {
		fmt.Println("holding")
		<-s.closed
		return 0, os.ErrClosed
	}
	n := copy(b[:min(int64(len(b)), until-s.pos)], pattern()[s.pos%int64(len(pattern())):])
	s.pos += int64(n)
	if s.pos < s.Size || s.Hold == s.pos || n > 0 && !s.AtOnce {
		return n, nil
	}
	if s.Fails {
		return n, errDisk
	}
	return n, io.EOF
}

func (s *patternSource) Close() error {
	if s.Hold == holdInClose {
		fmt.Println("holding")
		select {} // to be killed
	}
	s.closing.Do(func() { close(s.closed) })
	return nil
}

// sums has the SHA-256 of each size, once it was asked for.
var sums sync.Map

func patternSum(size int64) string {
	sum, ok := sums.Load(size)
	if !ok {
		h := sha256.New()
		_, _ = io.Copy(h, newPatternSource(whole(size), nil))
		sum = hex.EncodeToString(h.Sum(nil))
		sums.Store(size, sum)
	}
	return sum.(string)
}

// streamProvider serves a stream for each command, a streamSpec, and prints its
// URL. At the command "stop" it waits until all have been claimed, and ends as
// soon as the tracker has stopped.
func streamProvider() {
	tracker, err := acomm.NewTracker("", nil, 0)
	if err == nil {
		err = tracker.Start()
	}
	var claims sync.WaitGroup
	for err == nil {
		line := <-commands
		if line == "stop" {
			break
		}
		var spec streamSpec
		if err = json.Unmarshal([]byte(line), &spec); err == nil {
			var u *url.URL
			claims.Add(1)
			u, err = tracker.NewStreamUnix("", newPatternSource(spec, claims.Done))
			fmt.Println(u)
		}
	}
	if err != nil {
		panic(err)
	}
	claims.Wait()
	tracker.Stop()
}

// streamProvider2016 does the same as a provider that knows only the protocol of
// 2016: bare bytes, then the end of the connection, and nothing is read from it.
// At "listen" instead of a streamSpec it reads after all, to print what came.
func streamProvider2016() {
	var serving sync.WaitGroup
	for i := 0; ; i++ {
		line := <-commands
		if line == "stop" {
			break
		}
		path := filepath.Join(os.TempDir(), fmt.Sprintf("stream-%d.sock", i))
		l, err := net.Listen("unix", path)
		if err != nil {
			panic(err)
		}
		fmt.Println(&url.URL{Scheme: "unix", Path: path})
		serving.Go(func() {
			conn, err := l.Accept()
			l.Close()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			if line == "listen" {
				_ = conn.(*net.UnixConn).CloseWrite()
				n, err := io.Copy(io.Discard, conn)
				fmt.Println(n, err)
				return
			}
			var spec streamSpec
			if err := json.Unmarshal([]byte(line), &spec); err != nil {
				panic(err)
			}
			_, _ = io.Copy(conn, newPatternSource(spec, nil))
		})
	}
	serving.Wait()
}

// streamCoordinator publishes each URL it is given over HTTP and prints the
// result.
func streamCoordinator() {
	server := httptest.NewServer(http.HandlerFunc(acomm.ProxyStreamHandler))
	base, err := url.Parse(server.URL)
	if err != nil {
		panic(err)
	}
	tracker, err := acomm.NewTracker("", base, 0)
	if err != nil {
		panic(err)
	}
	for line := range commands {
		addr, err := url.Parse(line)
		if err != nil {
			panic(err)
		}
		u, err := tracker.ProxyStreamHTTPURL(addr)
		if err != nil {
			panic(err)
		}
		fmt.Println(u)
	}
}

// offer has the process serve a stream.
func (p *process) offer(spec streamSpec) *url.URL {
	p.t.Helper()
	line, err := json.Marshal(spec)
	require.NoError(p.t, err)
	return p.ask(string(line))
}

// ask sends the process a command that is answered with a URL.
func (p *process) ask(command string) *url.URL {
	p.t.Helper()
	require.NoError(p.t, p.WriteLine(command))
	u, err := url.Parse(p.ReadLine())
	require.NoError(p.t, err)
	return u
}

// sink is where a consumer puts a stream.
type sink struct {
	sum  hash.Hash
	n    int64
	at   int64  // of bytes, after which then is called, once
	then func() // or nil
}

func newSink() *sink { return &sink{sum: sha256.New()} }

func (s *sink) Write(b []byte) (int, error) {
	s.sum.Write(b)
	s.n += int64(len(b))
	if s.then != nil && s.n >= s.at {
		s.then()
		s.then = nil
	}
	return len(b), nil
}

// slowSink takes its time: it reads the stream in small pieces.
type slowSink struct{ *sink }

func (s slowSink) ReadFrom(r io.Reader) (n int64, err error) {
	buf := make([]byte, 512)
	for err == nil {
		var got int
		got, err = r.Read(buf)
		_, _ = s.Write(buf[:got])
		n += int64(got)
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// consumer reads a stream in one of the ways there are.
type consumer func(io.Writer, *url.URL) error

// httpGet is a consumer that is any HTTP client.
func httpGet(dest io.Writer, u *url.URL) error {
	resp, err := http.Get(u.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	_, err = io.Copy(dest, resp.Body)
	return err
}

// eachWay runs a test with a consumer on the unix socket itself, and one behind
// the HTTP proxy of this process.
func eachWay(t *testing.T, test func(t *testing.T, consume consumer)) {
	t.Run("unix", func(t *testing.T) { test(t, acomm.Stream) })
	t.Run("http", func(t *testing.T) {
		tracker, _ := streamProxy(t)
		test(t, proxied(tracker))
	})
}

// proxied is an HTTP client behind the tracker's stream proxy.
func proxied(tracker *acomm.Tracker) consumer {
	return func(dest io.Writer, addr *url.URL) error {
		u, err := tracker.ProxyStreamHTTPURL(addr)
		if err != nil {
			return err
		}
		return httpGet(dest, u)
	}
}

// outcomes counts how streams ended.
type outcomes struct {
	mu                   sync.Mutex
	whole, failed, short int
	bytes                int64
}

// add checks the one thing that must not be: the end of a stream that was not its
// end.
func (o *outcomes) add(t testing.TB, spec streamSpec, got *sink, err error) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.bytes += got.n
	switch {
	case err == nil && !spec.Fails && got.n == spec.Size && hex.EncodeToString(got.sum.Sum(nil)) == patternSum(spec.Size):
		o.whole++
	case err == nil:
		o.short++
		t.Errorf("a stream of %d bytes ended after %d without an error", spec.Size, got.n)
	default:
		o.failed++
	}
}

func (o *outcomes) log(t testing.TB, what string) {
	t.Logf("%s: %d streams, %d bytes read; %d ended with an error, %d whole with their SHA-256, %d short without an error",
		what, o.whole+o.failed+o.short, o.bytes, o.failed, o.whole, o.short)
}

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

// addCut adds a stream that was cut.
func (o *outcomes) addCut(t *testing.T, c cut, spec streamSpec, got *sink, err error) {
	t.Helper()
	o.add(t, spec, got, err)
	if c.hold >= 0 {
		require.Error(t, err, "the source had not ended")
	}
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

// freeze stops each of the process's threads.
func (p *process) freeze() {
	p.t.Helper()
	require.NoError(p.t, p.Signal(syscall.SIGSTOP))
	require.Eventually(p.t, func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Pid()))
		return len(threads) > 0 && !slices.ContainsFunc(threads, func(name string) bool {
			stat, err := os.ReadFile(name)
			_, state, ok := strings.Cut(string(stat), ") ") // behind the name
			return err != nil || !ok || state[0] != 'T'
		})
	}, patience, time.Millisecond)
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

// finishedSizes are sizes from 0 B to 4 MiB, small ones as likely as large ones.
func finishedSizes(number int) []int64 {
	sizes := []int64{0, 1, 32<<10 - 1, 32 << 10, 32<<10 + 1, 4 << 20}
	for len(sizes) < number {
		sizes = append(sizes, rand.Int64N(1<<rand.IntN(23)))
	}
	return sizes[:number]
}

// offerAll has the process serve whole streams and end when they are read.
func (p *process) offerAll(sizes []int64) []*url.URL {
	p.t.Helper()
	var urls []*url.URL
	for _, size := range sizes {
		spec := whole(size)
		spec.AtOnce = size%2 == 1
		urls = append(urls, p.offer(spec))
	}
	require.NoError(p.t, p.WriteLine("stop"))
	return urls
}

// consumeAll reads whole streams, all at once and half of them slowly, with the
// consumers in turn, and waits for the provider to end.
func consumeAll(t *testing.T, provider *process, sizes []int64, counted *outcomes, consumers ...consumer) {
	t.Helper()
	urls := provider.offerAll(sizes)
	done := async(func() {
		var reading sync.WaitGroup
		defer reading.Wait()
		for i, u := range urls {
			reading.Go(func() {
				got := newSink()
				var dest io.Writer = got
				if i/len(consumers)%2 == 0 {
					dest = slowSink{got}
				}
				err := consumers[i%len(consumers)](dest, u)
				counted.add(t, whole(sizes[i]), got, err)
				if err != nil {
					t.Errorf("a whole stream of %d bytes: %v", sizes[i], err)
				}
			})
		}
	})
	within(t, done, "the consumers")
	require.NoError(t, provider.Wait())
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
