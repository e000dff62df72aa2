package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/mistifyio/acomm"
)

const (
	streamBuffer  = 32 << 10 // bytes, the library's
	streamBlock   = 64 << 10 // bytes, the unit of what is streamed
	minStreamSize = 1 << 20  // bytes
	maxStreams    = 16       // at once
	streamRate    = 1 << 30  // bytes a second; what is sent in a turn goes by it
)

// streamPath carries all of a source to a destination.
type streamPath struct {
	title string
	carry func(dest io.Writer, src net.Conn) error
}

// runStreams shows what the library's streams make of the sockets.
func runStreams(o options) error {
	s, err := newStreamBench()
	if err != nil {
		return err
	}
	defer s.close()
	t := &table{
		title: "streams from a unix connection (goal: ratio 0.95)",
		head:  []string{"", "acomm", "io.Copy", "ratio in a round", "CPU per GiB", "io.Copy", "allocated, each", "io.Copy"},
	}
	for _, streams := range []int{1, maxStreams} {
		for _, pair := range s.pairs() {
			ours, base, ratio, err := o.measureStreams(s, pair, streams)
			if err != nil {
				return err
			}
			title := fmt.Sprintf("%s, %d at once", pair[0].title, streams)
			t.add(title, formatBytes(ours.rate)+"/s", formatBytes(base.rate)+"/s", formatRatio(ratio),
				formatTime(ours.cpu), formatTime(base.cpu), formatBytes(ours.bytes), formatBytes(base.bytes))
		}
	}
	return o.write(t)
}

// streamResult is what a number of streams have given in a turn.
type streamResult struct {
	rate  float64 // bytes a second, of all together
	cpu   float64 // ns a GiB
	bytes float64 // allocated for each stream
}

// measureStreams gives the library's path and its counterpart their turns, each of
// them the first in every other round. The ratio is that of a round: the machine's
// speed may change from one to the next.
func (o options) measureStreams(s *streamBench, pair [2]streamPath, streams int) (ours, base streamResult, ratio float64, err error) {
	size := max(minStreamSize, int(o.benchtime.Seconds()*streamRate)/streams)
	var turns [2][]streamResult
	var ratios []float64
	for round := range o.rounds {
		for turn := range pair {
			i := (round + turn) % len(pair)
			o.report("round %d of %d: %s, %d at once", round+1, o.rounds, pair[i].title, streams)
			result, err := s.turn(pair[i], streams, size)
			if err != nil {
				return ours, base, 0, fmt.Errorf("%s, %d at once: %w", pair[i].title, streams, err)
			}
			turns[i] = append(turns[i], result)
		}
		ratios = append(ratios, turns[0][round].rate/turns[1][round].rate)
	}
	return medianStreams(turns[0]), medianStreams(turns[1]), median(ratios), nil
}

func medianStreams(turns []streamResult) streamResult {
	var rates, cpus, allocated []float64
	for _, turn := range turns {
		rates, cpus, allocated = append(rates, turn.rate), append(cpus, turn.cpu), append(allocated, turn.bytes)
	}
	return streamResult{median(rates), median(cpus), median(allocated)}
}

// streamBench has both ways to stream, over unix and over HTTP.
type streamBench struct {
	dir     string
	tracker *acomm.Tracker
	server  *http.Server
	base    *url.URL // of the server
	client  http.Client
	serving sync.WaitGroup
	sockets atomic.Int64 // made so far, for their names
}

func newStreamBench() (*streamBench, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	s := &streamBench{dir: dir}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	s.base = &url.URL{Scheme: "http", Host: l.Addr().String()}
	mux := http.NewServeMux()
	mux.HandleFunc("/acomm", acomm.ProxyStreamHandler)
	mux.HandleFunc("/copy", proxyByCopy)
	s.server = &http.Server{Handler: mux}
	s.client.Transport = &http.Transport{MaxIdleConnsPerHost: maxStreams}
	s.serving.Go(func() { _ = s.server.Serve(l) }) // until close
	if s.tracker, err = acomm.NewTracker("", s.base.JoinPath("acomm"), 0); err == nil {
		err = s.tracker.Start()
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *streamBench) close() {
	if s.tracker != nil {
		s.tracker.Stop()
	}
	s.client.CloseIdleConnections()
	_ = s.server.Close()
	s.serving.Wait()
	_ = os.RemoveAll(s.dir)
}

// pairs returns the library's paths, each with what the standard library does
// between the same connections.
func (s *streamBench) pairs() [][2]streamPath {
	return [][2]streamPath{
		{{"unix to unix", s.streamUnix}, {"io.Copy, unix to unix", s.copyUnix}},
		{{"through ProxyStreamHandler", s.streamHTTP}, {"io.Copy, through HTTP", s.copyHTTP}},
	}
}

// turn carries a number of streams at once, each of the size, and checks what
// arrives.
func (s *streamBench) turn(path streamPath, streams, size int) (streamResult, error) {
	block := []byte(newText(streamBlock))
	var carrying sync.WaitGroup
	errs := make([]error, streams)
	stop := meter()
	for i := range streams {
		carrying.Go(func() { errs[i] = s.carryOne(path, block, size) })
	}
	carrying.Wait()
	used := stop()
	total := float64(streams) * float64(size)
	return streamResult{
		rate:  total / used.wall.Seconds(),
		cpu:   float64(used.cpu) * (1 << 30) / total,
		bytes: float64(used.bytes) / float64(streams),
	}, errors.Join(errs...)
}

// carryOne makes a source, which repeats the block, and has it carried.
func (s *streamBench) carryOne(path streamPath, block []byte, size int) error {
	near, src, err := connect(s.newDir())
	if err != nil {
		return err
	}
	var producing sync.WaitGroup
	producing.Go(func() {
		defer near.Close()
		for sent := 0; sent < size; {
			n, err := near.Write(block[:min(len(block), size-sent)])
			if sent += n; err != nil {
				return // the consumer misses it
			}
		}
	})
	dest := &streamCheck{block: block}
	if err := path.carry(dest, src); err != nil {
		return err
	}
	producing.Wait()
	if dest.n != size {
		return fmt.Errorf("%d of %d bytes have arrived", dest.n, size)
	}
	return nil
}

// newDir returns a directory for a socket; close removes all.
func (s *streamBench) newDir() string {
	dir := filepath.Join(s.dir, strconv.FormatInt(s.sockets.Add(1), 10))
	_ = os.Mkdir(dir, 0o700) // else the socket in it fails
	return dir
}

// streamCheck is a destination that knows what is to come.
type streamCheck struct {
	block []byte
	n     int
}

func (c *streamCheck) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		expected := c.block[c.n%len(c.block):]
		size := min(len(rest), len(expected))
		if !bytes.Equal(rest[:size], expected[:size]) {
			return 0, fmt.Errorf("other data than was sent, at byte %d or after", c.n)
		}
		c.n += size
		rest = rest[size:]
	}
	return len(p), nil
}

func (s *streamBench) streamUnix(dest io.Writer, src net.Conn) error {
	addr, err := s.tracker.NewStreamUnix("", src)
	if err != nil {
		return err
	}
	return acomm.Stream(dest, addr)
}

func (s *streamBench) streamHTTP(dest io.Writer, src net.Conn) error {
	addr, err := s.tracker.NewStreamUnix("", src)
	if err != nil {
		return err
	}
	if addr, err = s.tracker.ProxyStreamHTTPURL(addr); err != nil {
		return err
	}
	return s.get(dest, addr)
}

func (s *streamBench) copyUnix(dest io.Writer, src net.Conn) error {
	path, err := s.offer(src)
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	return copyStream(dest, conn)
}

func (s *streamBench) copyHTTP(dest io.Writer, src net.Conn) error {
	path, err := s.offer(src)
	if err != nil {
		return err
	}
	addr := s.base.JoinPath("copy")
	addr.RawQuery = url.Values{"path": {path}}.Encode()
	return s.get(dest, addr)
}

// offer copies the source to whoever connects to the socket at the path first.
func (s *streamBench) offer(src net.Conn) (path string, err error) {
	path = filepath.Join(s.newDir(), "stream.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", err
	}
	s.serving.Go(func() {
		defer src.Close()
		conn, err := l.Accept()
		_ = l.Close()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = copyStream(conn, src) // the consumer misses it
	})
	return path, nil
}

// proxyByCopy is what a handler without the library's promises does.
func proxyByCopy(w http.ResponseWriter, r *http.Request) {
	conn, err := net.Dial("unix", r.FormValue("path"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer conn.Close()
	_ = copyStream(w, conn) // the client misses it
}

// get reads the body at the URL.
func (s *streamBench) get(dest io.Writer, addr *url.URL) error {
	resp, err := s.client.Get(addr.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return copyStream(dest, resp.Body)
}

// copyStream is io.Copy with a buffer of the library's size. The interfaces by
// which io.Copy would leave the copying to the kernel are hidden: the library
// must see the bytes go by.
func copyStream(dest io.Writer, src io.Reader) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{dest}, struct{ io.Reader }{src}, make([]byte, streamBuffer))
	return err
}
