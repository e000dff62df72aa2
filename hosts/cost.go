package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
)

// measureCost measures what a gateway costs, as the kernel counts it for the process.
// Each number has a gateway of its own.
func measureCost(ctx context.Context, procs *processes, gateway string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = 64
	for i, measure := range []func(*bed) error{
		(*bed).requests, (*bed).outstanding, (*bed).connections, (*bed).openStreams, (*bed).streamed,
	} {
		b, err := newBed(ctx, procs, self, gateway, i)
		if err == nil {
			err = measure(b)
		}
		if err != nil {
			return err
		}
		b.close()
	}
	return nil
}

// bed is a gateway on the loopback interface, its providers, and a requester, which
// is this process.
type bed struct {
	gateway *process
	rest    []*process
	url     *url.URL
	hook    net.Listener
	tracker *acomm.Tracker
}

func newBed(ctx context.Context, procs *processes, self, gateway string, i int) (*bed, error) {
	dir := filepath.Join(procs.dir, fmt.Sprintf("cost%d", i))
	b := &bed{}
	for _, task := range []string{"echo", "blob"} {
		p, err := procs.start(ctx, "", "cost-"+task, "ready", self, "provider", "-dir", dir, "-task", task,
			"-handled", filepath.Join(procs.dir, "handled"))
		if err != nil {
			return nil, err
		}
		b.rest = append(b.rest, p)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := free.Addr().String()
	_ = free.Close() // for the gateway
	b.url = &url.URL{Scheme: "http", Host: addr}
	if b.gateway, err = procs.start(ctx, "", "cost-gateway", "listening on", gateway, "gateway", "--socket-dir", dir,
		"--name", "cost", "--listen", addr, "--timeout", "2m"); err != nil {
		return nil, err
	}
	if b.hook, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	if b.tracker, err = acomm.NewTracker(filepath.Join(dir, "requester.sock"), nil, time.Minute); err != nil {
		return nil, err
	}
	r := &requester{tracker: b.tracker, file: io.Discard}
	go func() { _ = http.Serve(b.hook, http.HandlerFunc(r.handleHook)) }() // ends with the listener
	return b, b.tracker.Start()
}

func (b *bed) close() {
	b.gateway.kill()
	for _, p := range b.rest {
		p.kill()
	}
	b.tracker.Stop()
	_ = b.hook.Close()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// send sends a request whose response runs the handler. With nil nobody waits for it.
func (b *bed) send(task string, job work, handle acomm.ResponseHandler) error {
	req, err := acomm.NewRequest(task, "http://"+b.hook.Addr().String(), job, handle, handle)
	if err != nil {
		return err
	}
	if handle != nil {
		if err := b.tracker.TrackRequest(req, time.Minute); err != nil {
			return err
		}
	}
	return acomm.Send(b.url, req)
}

// ask sends a request and waits for the response.
func (b *bed) ask(task string, job work) (*acomm.Response, error) {
	responses := make(chan *acomm.Response, 1)
	if err := b.send(task, job, func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }); err != nil {
		return nil, err
	}
	resp := <-responses
	return resp, resp.Error
}

func (b *bed) requests() error {
	const n, callers = 20000, 32
	if err := each(1000, callers, func() error { _, err := b.ask("echo", work{}); return err }); err != nil {
		return err
	}
	before, start := b.usage(), time.Now()
	if err := each(n, callers, func() error { _, err := b.ask("echo", work{}); return err }); err != nil {
		return err
	}
	took, after := time.Since(start), b.usage()
	fmt.Printf("a request and its response, over HTTP: %v of CPU in the gateway (%d requests, %d callers, %v each on the clock, all processes here)\n",
		((after.cpu - before.cpu) / n).Round(time.Microsecond), n, callers, (took / n).Round(time.Microsecond))
	return nil
}

func (b *bed) outstanding() error {
	const n = 20000
	if err := each(1000, 32, func() error { _, err := b.ask("echo", work{}); return err }); err != nil {
		return err
	}
	before := b.usage()
	if err := each(n, 32, func() error {
		return b.send("echo", work{Millis: 100_000}, nil)
	}); err != nil {
		return err
	}
	b.print("an outstanding request", n, before)
	return nil
}

func (b *bed) connections() error {
	const n = 900
	before := b.usage()
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	for range n {
		conn, err := net.Dial("tcp", b.url.Host)
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			return err
		}
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return err
		}
		_ = answer.Body.Close()
	}
	b.print("an idle connection over HTTP", n, before)
	return nil
}

func (b *bed) openStreams() error {
	const n = 400
	before := b.usage()
	err := each(n, n, func() error {
		resp, err := b.ask("blob", work{Millis: 100_000, Bytes: 1000 * piece})
		if err != nil {
			return err
		}
		begun := make(chan struct{}, 1000)
		ended := make(chan error, 1)
		go func() { ended <- acomm.Stream(signalWriter(begun), resp.StreamURL) }() // ends when the gateway is killed
		select {
		case <-begun:
			return nil
		case err := <-ended:
			return errors.Join(errors.New("a stream ended early"), err)
		}
	})
	if err != nil {
		return err
	}
	b.print("a stream under way", n, before)
	return nil
}

// signalWriter tells of each write for which there is room.
type signalWriter chan struct{}

func (w signalWriter) Write(p []byte) (int, error) {
	select {
	case w <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (b *bed) streamed() error {
	const size = 1 << 30
	before, start := b.usage(), time.Now()
	resp, err := b.ask("blob", work{Bytes: size})
	if err != nil {
		return err
	}
	n := counter{}
	if err := acomm.Stream(&n, resp.StreamURL); err != nil {
		return err
	}
	if n.Load() != size {
		return fmt.Errorf("stream of %d bytes, not %d", n.Load(), size)
	}
	fmt.Printf("1 GiB streamed: %v of CPU in the gateway (%v on the clock, in pieces of %d KiB that the source makes)\n",
		(b.usage().cpu - before.cpu).Round(10*time.Millisecond), time.Since(start).Round(10*time.Millisecond), piece>>10)
	return nil
}

type counter struct{ atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

// each calls f n times, with a number of callers.
func each(n, callers int, f func() error) error {
	var left atomic.Int64
	left.Store(int64(n))
	errs := make([]error, callers)
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			for errs[i] == nil && left.Add(-1) >= 0 {
				errs[i] = f()
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// usage is what a process has of the machine.
type usage struct {
	cpu         time.Duration
	resident    int // bytes
	descriptors int
}

func (b *bed) usage() usage {
	dir := fmt.Sprintf("/proc/%d/", b.gateway.cmd.Process.Pid)
	u := usage{}
	stat, _ := os.ReadFile(dir + "stat") // without it the numbers are zero
	if _, rest, ok := bytes.Cut(stat, []byte(") ")); ok {
		fields := strings.Fields(string(rest))
		for _, ticks := range fields[11:13] { // utime and stime, in hundredths of a second
			n, _ := strconv.Atoi(ticks)
			u.cpu += time.Duration(n) * 10 * time.Millisecond
		}
		pages, _ := strconv.Atoi(fields[21])
		u.resident = pages * os.Getpagesize()
	}
	open, _ := os.ReadDir(dir + "fd")
	u.descriptors = len(open)
	return u
}

func (b *bed) print(what string, n int, before usage) {
	after := b.usage()
	fmt.Printf("%s: %.1f KiB resident, %.2f descriptors in the gateway (%d of them)\n", what,
		float64(after.resident-before.resident)/float64(n)/1024, float64(after.descriptors-before.descriptors)/float64(n), n)
}
