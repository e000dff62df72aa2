package acomm_test

import (
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

// The two ends of the streams in the tests: sources and their processes, consumers and
// what they do with the bytes.

func init() {
	roles["stream provider"] = streamProvider
	roles["stream provider of 2016"] = streamProvider2016
	roles["stream coordinator"] = streamCoordinator
}

// source is a stream's source that counts its closing. Reads come from a pipe,
// so a test decides what the source says and when.
type source struct {
	*io.PipeReader
	feed   *io.PipeWriter
	closed chan struct{} // a value for each Close
}

func (s *source) Close() error {
	s.closed <- struct{}{}
	return s.PipeReader.Close()
}

// requireClosedOnce waits for the source to be closed.
func (s *source) requireClosedOnce(t testing.TB) {
	t.Helper()
	within(t, s.closed, "the source to be closed")
	require.Empty(t, s.closed, "closed once")
}

func newSource() *source {
	r, w := io.Pipe()
	return &source{PipeReader: r, feed: w, closed: make(chan struct{}, 10)}
}

func bytesSource(data []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(data)) }

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

var pattern = sync.OnceValue(func() []byte {
	data := make([]byte, 1_000_003)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	return data
})

var errDisk = errors.New("disk on fire")

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
	orExit(err)
	orExit(tracker.Start())
	var claims sync.WaitGroup
	for line := <-commands; line != "stop"; line = <-commands {
		var spec streamSpec
		orExit(json.Unmarshal([]byte(line), &spec))
		claims.Add(1)
		u, err := tracker.NewStreamUnix("", newPatternSource(spec, claims.Done))
		orExit(err)
		fmt.Println(u)
	}
	claims.Wait()
	tracker.Stop()
}

// streamProvider2016 does the same as a provider that knows only the protocol of
// 2016: bare bytes, then the end of the connection, and nothing is read from it.
// At "listen" instead of a streamSpec it reads after all, to print what came.
func streamProvider2016() {
	var serving []<-chan struct{}
	for line := <-commands; line != "stop"; line = <-commands {
		var u *url.URL
		var served <-chan struct{}
		name := fmt.Sprint("stream-", len(serving))
		if line == "listen" {
			u, served = serveOnce2016(name, func(conn *net.UnixConn) {
				_ = conn.CloseWrite()
				n, err := io.Copy(io.Discard, conn)
				fmt.Println(n, err)
			})
		} else {
			var spec streamSpec
			orExit(json.Unmarshal([]byte(line), &spec))
			u, served = stream2016(name, newPatternSource(spec, nil))
		}
		fmt.Println(u)
		serving = append(serving, served)
	}
	for _, served := range serving {
		<-served
	}
}

// streamCoordinator publishes each URL it is given over HTTP and prints the
// result.
func streamCoordinator() {
	server := httptest.NewServer(http.HandlerFunc(acomm.ProxyStreamHandler))
	base, err := url.Parse(server.URL)
	orExit(err)
	tracker, err := acomm.NewTracker("", base, 0)
	orExit(err)
	for line := range commands {
		addr, err := url.Parse(line)
		orExit(err)
		u, err := tracker.ProxyStreamHTTPURL(addr)
		orExit(err)
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

// ask sends the process a command that is answered with a URL.
func (p *process) ask(command string) *url.URL {
	p.t.Helper()
	require.NoError(p.t, p.WriteLine(command))
	u, err := url.Parse(p.ReadLine())
	require.NoError(p.t, err)
	return u
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

// sink is where a consumer puts a stream.
type sink struct {
	sum  hash.Hash
	n    int64
	at   int64  // of bytes, after which then is called, once
	then func() // or nil
}

func (s *sink) Write(b []byte) (int, error) {
	s.sum.Write(b)
	s.n += int64(len(b))
	if s.then != nil && s.n >= s.at {
		s.then()
		s.then = nil
	}
	return len(b), nil
}

func newSink() *sink { return &sink{sum: sha256.New()} }

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

// eachWay runs a test with a consumer on the unix socket itself, and one behind
// the HTTP proxy of this process.
func eachWay(t *testing.T, test func(t *testing.T, consume consumer)) {
	t.Run("unix", func(t *testing.T) { test(t, acomm.Stream) })
	t.Run("http", func(t *testing.T) {
		tracker, _ := streamProxy(t)
		test(t, proxied(tracker))
	})
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

// finishedSizes are sizes from 0 B to 4 MiB, small ones as likely as large ones.
func finishedSizes(number int) []int64 {
	sizes := []int64{0, 1, 32<<10 - 1, 32 << 10, 32<<10 + 1, 4 << 20}
	for len(sizes) < number {
		sizes = append(sizes, rand.Int64N(1<<rand.IntN(23)))
	}
	return sizes[:number]
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

// addCut adds a stream that was cut.
func (o *outcomes) addCut(t *testing.T, c cut, spec streamSpec, got *sink, err error) {
	t.Helper()
	o.add(t, spec, got, err)
	if c.hold >= 0 {
		require.Error(t, err, "the source had not ended")
	}
}
