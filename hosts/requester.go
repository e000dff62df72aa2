package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
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
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats.go"
)

const (
	requestTimeout = 10 * time.Second // of a requester
	gatewayTimeout = "9s"             // of a gateway: its time-out is told in time
	streamLimit    = 30 * time.Second // for a stream to end, one way or the other
)

// request is the role of a requester. It sends requests at a rate for some time, and
// waits until all have ended. It records when each was sent and how it ended.
func request(args []string) error {
	flags := flag.NewFlagSet("requester", flag.ContinueOnError)
	name := flags.String("name", "", "name")
	addr := flags.String("addr", "", "address for the hook")
	targets := flags.String("targets", "", "URLs of gateways, with commas")
	server := flags.String("nats", "", "URL of the NATS server; none if empty")
	record := flags.String("record", "", "file for the events")
	dir := flags.String("dir", "", "directory for the tracker's socket")
	lasts := flags.Duration("for", 5*time.Second, "how long to send")
	rate := flags.Int("rate", 50, "requests a second")
	if err := flags.Parse(args); err != nil {
		return err
	}
	file, err := os.OpenFile(*record, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	detectDeadPeers()
	tracker, err := acomm.NewTracker(filepath.Join(*dir, *name+".sock"), nil, requestTimeout)
	if err != nil {
		return err
	}
	if err := tracker.Start(); err != nil {
		return err
	}
	r := &requester{file: file, tracker: tracker}
	if err := r.open(*addr, *targets, *server, *name); err != nil {
		return err
	}
	fmt.Println("ready")

	ticks := time.NewTicker(time.Second / time.Duration(*rate))
	defer ticks.Stop()
	var all sync.WaitGroup
	for i, end := 0, time.Now().Add(*lasts); time.Now().Before(end); i++ {
		<-ticks.C
		route := r.routes[i%len(r.routes)]
		all.Go(func() { r.call(route) })
	}
	ended := make(chan struct{})
	go func() { // ends with the process, if not before
		defer close(ended)
		all.Wait()
	}()
	select {
	case <-ended: // every request: not every Send, which may take a minute
	case <-time.After(requestTimeout + streamLimit + 5*time.Second): // what is missing in the record is lost
	}
	return nil
}

// detectDeadPeers ends what waits for a dead host within seconds instead of Go's
// minutes. Keep-alive ends active streams; the other two settings end streams that had
// not begun. A link may be down for 5 s.
func detectDeadPeers() {
	dialer := &net.Dialer{
		Timeout:         8 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: 2 * time.Second, Count: 3},
	}
	transport := http.DefaultTransport.(*http.Transport)
	transport.DialContext = dialer.DialContext
	transport.ResponseHeaderTimeout = 15 * time.Second
	transport.MaxIdleConnsPerHost = 64
}

// route is a way to a provider, and back.
type route struct {
	via    string   // http or nats
	target *url.URL // nil: the task's subject
	hook   string
}

type requester struct {
	tracker *acomm.Tracker
	routes  []route

	mu   sync.Mutex // guards writes to the file
	file io.Writer
}

// open makes the hooks and the routes.
func (r *requester) open(addr, targets, server, name string) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		return err
	}
	go func() { _ = http.Serve(listener, http.HandlerFunc(r.handleHook)) }() // ends with the process
	for target := range strings.SplitSeq(targets, ",") {
		u, err := url.Parse(target)
		if err != nil {
			return err
		}
		r.routes = append(r.routes, route{via: "http", target: u, hook: "http://" + listener.Addr().String() + "/"})
	}
	if server == "" {
		return nil
	}
	nc, err := nats.Connect(server, nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond), nats.PingInterval(2*time.Second))
	if err != nil {
		return err
	}
	if err := natshook.Register(nc); err != nil {
		return err
	}
	hook := "hooks." + name
	if _, err := natshook.Serve(nc, hook, "", http.HandlerFunc(r.handleHook)); err != nil {
		return err
	}
	r.routes = append(r.routes, route{via: "nats", hook: natshook.URL(hook).String()})
	return nil
}

// handleHook takes a response.
func (r *requester) handleHook(w http.ResponseWriter, req *http.Request) {
	resp := &acomm.Response{}
	if err := json.NewDecoder(req.Body).Decode(resp); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.write(event{Kind: "hook", ID: resp.ID})
	w.WriteHeader(http.StatusOK)
	go r.tracker.HandleResponse(resp) // reads the stream; call waits for its end
}

// call makes a request of some kind and returns when it has ended.
func (r *requester) call(way route) {
	job, task := work{Millis: 1 + rand.IntN(20)}, "echo"
	switch dice := rand.IntN(10); {
	case dice < 2:
		job.Millis = 200 + rand.IntN(1800)
	case dice < 4:
		job, task = work{Millis: 500 + rand.IntN(2500), Bytes: 1 + rand.IntN(512<<10)}, "blob"
	}
	started := time.Now()
	ended := make(chan struct{}, 8) // room for a handler that runs too often
	handle := func(req *acomm.Request, resp *acomm.Response) {
		e := event{Kind: "end", ID: req.ID, Millis: float64(time.Since(started).Microseconds()) / 1000}
		e.Outcome, e.Stream = r.outcome(req, resp, job)
		r.write(e)
		ended <- struct{}{}
	}
	req, err := acomm.NewRequest(task, way.hook, job, handle, handle)
	if err != nil {
		panic(err) // nothing in it comes from outside
	}
	r.write(event{Kind: "sent", ID: req.ID, Via: way.via})
	target := way.target
	if target == nil {
		target = natshook.URL("tasks." + task)
	}
	if err := r.tracker.TrackRequest(req, requestTimeout); err != nil {
		r.write(event{Kind: "end", ID: req.ID, Outcome: "error: " + err.Error()})
		return
	}
	go func() { // ends when Send does, at the latest a minute later or with the process
		if err := acomm.Send(target, req); err != nil && r.tracker.RemoveRequest(req) {
			r.write(event{Kind: "end", ID: req.ID, Outcome: errorKind(err)})
			ended <- struct{}{}
		}
	}()
	<-ended
}

// outcome says how a request ended, and whether a whole stream came with it.
func (r *requester) outcome(req *acomm.Request, resp *acomm.Response, job work) (string, bool) {
	switch {
	case errors.Is(resp.Error, os.ErrDeadlineExceeded):
		return timedOut, false
	case resp.Error != nil:
		return "response: " + resp.Error.Error(), false
	}
	result := answer{}
	if err := resp.UnmarshalResult(&result); err != nil || result.ID != req.ID {
		return wrong, false
	}
	if job.Bytes == 0 {
		return answered, false
	}
	if resp.StreamURL == nil {
		return "response: without its stream", false
	}
	body, streamed := sha256.New(), make(chan error, 1)
	go func() { streamed <- acomm.Stream(body, resp.StreamURL) }() // ends with the process, if not before
	select {
	case err := <-streamed:
		if err != nil {
			return "stream: " + errorKind(err), false
		}
	case <-time.After(streamLimit):
		return silentStream, false
	}
	if fmt.Sprintf("%x", body.Sum(nil)) != digest(req.ID, job.Bytes) {
		return wrong, false
	}
	return answered, true
}

func (r *requester) write(e event) {
	line, err := json.Marshal(e)
	if err != nil {
		panic(err) // strings and numbers
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.file.Write(append(line, '\n')); err != nil {
		panic(err) // without its record a run is worth nothing
	}
}
