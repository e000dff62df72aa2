package acomm_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
)

// The processes of the soak, what their requests ask for, and what they hold.

func init() {
	roles["soak provider"] = soakProvider
	roles["soak coordinator"] = soakCoordinator
}

// What a request of the soak asks for.
const (
	soakEcho   = "echo"
	soakFail   = "error"
	soakSilent = "time-out" // the provider never answers
	soakStream = "stream"
)

// soakJob is what a request asks for.
type soakJob struct {
	Seq     int
	Kind    string
	Timeout time.Duration
	Size    int64 // of the stream
	Slow    bool  // the stream's source
	Data    []byte
}

// soakData is the stream that belongs to a sequence number.
func soakData(seq int, size int64, slow bool) io.Reader {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], uint64(seq))
	var src io.Reader = rand.NewChaCha8(seed)
	if slow {
		src = slowReader{src}
	}
	return io.LimitReader(src, size)
}

// slowReader hands out little at a time, so that a stream takes some, in which to
// cut it off.
type slowReader struct{ io.Reader }

func (r slowReader) Read(p []byte) (int, error) {
	return r.Reader.Read(p[:min(len(p), 256)])
}

// droppedResponses takes from the log which responses a tracker has dropped
// because their requests were over, and how many more lines it has left out.
type droppedResponses struct {
	mu         sync.Mutex // guards the fields below
	ids        map[string]bool
	suppressed int
}

// watchDropped begins to read the log of this process, until the end is called.
func watchDropped() (d *droppedResponses, end func()) {
	d = &droppedResponses{ids: make(map[string]bool)}
	hooks := logrus.LevelHooks{}
	hooks.Add(d)
	old := logrus.StandardLogger().ReplaceHooks(hooks)
	return d, func() { logrus.StandardLogger().ReplaceHooks(old) }
}

func (d *droppedResponses) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel} }

func (d *droppedResponses) Fire(line *logrus.Entry) error {
	id, _ := line.Data["id"].(string)
	number, _ := line.Data["suppressed"].(int)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ids[id] = true
	d.suppressed += number
	return nil
}

func (d *droppedResponses) has(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ids[id]
}

// flush has the tracker say how many lines it has left out since its last one.
func (d *droppedResponses) flush(tracker *acomm.Tracker) {
	const last = "flushed"
	for !d.has(last) {
		d.add(-1) // this one, unless it is logged
		tracker.HandleResponse(&acomm.Response{ID: last})
		runtime.Gosched()
	}
	d.add(1)
}

func (d *droppedResponses) add(number int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suppressed += number
}

// String is for readDropped, in another process.
func (d *droppedResponses) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprint("dropped ", d.suppressed, " ", strings.Join(slices.Collect(maps.Keys(d.ids)), ","))
}

// readDropped adds what another process has dropped.
func (d *droppedResponses) readDropped(line string) error {
	var number int
	var ids string
	if _, err := fmt.Sscanf(line, "dropped %d %s", &number, &ids); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.suppressed += number
	for id := range strings.SplitSeq(ids, ",") {
		d.ids[id] = true
	}
	return nil
}

// soakProvider prints the number of each request before it acknowledges it. It
// ends with a command, after which it prints what it leaves behind.
func soakProvider() {
	tracker, err := acomm.NewTracker("", nil, 0)
	orExit(err)
	ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
	before := measure()
	orExit(tracker.Start())
	orExit(ul.Start())
	fmt.Println("ready")
	var working sync.WaitGroup
	working.Go(func() {
		<-commands
		ul.Stop(0)
	})
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		working.Go(func() {
			var job soakJob
			req, err := takeRequest(ul, conn, func(req *acomm.Request) {
				orExit(req.UnmarshalArgs(&job))
				fmt.Println("took", job.Seq)
			})
			if err == nil && job.Kind != soakSilent {
				err = soakAnswer(tracker, req, &job)
			}
			switch {
			case err != nil:
				fmt.Println("failed", strconv.Quote(err.Error()))
			case job.Kind != soakSilent:
				fmt.Println("answered", job.Seq)
			}
		})
	}
	working.Wait()
	tracker.Stop()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	fmt.Println("left", settle(before).since(before))
}

func soakAnswer(tracker *acomm.Tracker, req *acomm.Request, job *soakJob) error {
	var result any
	var addr *url.URL
	var failure, err error
	switch job.Kind {
	case soakFail:
		failure = errors.New(soakError)
	case soakStream:
		addr, err = tracker.NewStreamUnix("", io.NopCloser(soakData(job.Seq, job.Size, job.Slow)))
	default:
		result = job.Data
	}
	if err != nil {
		return err
	}
	resp, err := acomm.NewResponse(req, result, addr, failure)
	if err != nil {
		return err
	}
	return req.Respond(resp)
}

// soakCoordinator takes requests over HTTP and passes them to the provider that
// is their task. To each command it answers with what it holds; "end" ends it.
func soakCoordinator() {
	transport := soakTransport()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	orExit(err)
	base := &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/stream"}
	dropped, _ := watchDropped()
	tracker, err := acomm.NewTracker("", base, 0)
	orExit(err)
	orExit(tracker.Start())
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	mux.HandleFunc("/request", func(w http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		var job soakJob
		err := json.NewDecoder(r.Body).Decode(req)
		if err == nil {
			err = req.UnmarshalArgs(&job)
		}
		if err == nil {
			err = passOn(tracker, req, unixURL(filepath.Join(os.Getenv("DIR"), req.Task)), job.Timeout)
		}
		_ = json.NewEncoder(w).Encode(&acomm.Response{ID: req.ID, Error: err})
	})
	server := &http.Server{Handler: mux}
	served := async(func() { _ = server.Serve(l) })
	fmt.Println(l.Addr())
	for command := range commands {
		if command == "end" {
			break
		}
		transport.CloseIdleConnections()
		fmt.Println("requests", tracker.NumRequests(), measure())
	}
	tracker.Stop()
	orExit(server.Shutdown(context.Background()))
	<-served
	transport.CloseIdleConnections()
	dropped.flush(tracker)
	fmt.Println(dropped)
}

// soakTransport lets http.DefaultTransport keep the connections it needs: a busy
// service that opens one for each request runs out of ports.
func soakTransport() *http.Transport {
	transport := http.DefaultTransport.(*http.Transport)
	transport.MaxIdleConnsPerHost = soakRequesters
	return transport
}

// usage is what a process holds.
type usage struct{ goroutines, files, heap int }

func (u usage) fits(before usage) bool {
	return u.goroutines <= before.goroutines && u.files <= before.files && u.heap <= before.heap+soakHeap
}

func (u usage) since(before usage) usage {
	return usage{u.goroutines - before.goroutines, u.files - before.files, u.heap - before.heap}
}

func (u usage) String() string {
	return fmt.Sprintf("goroutines %d descriptors %d heap %d", u.goroutines, u.files, u.heap)
}

func measure() usage {
	runtime.GC()
	runtime.GC() // what pools hold survives the first
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	entries, _ := os.ReadDir("/proc/self/fd") // without it, files is always 0
	return usage{runtime.NumGoroutine(), len(entries), int(mem.HeapAlloc)}
}

// settle measures until nothing is left that was not there before, or for as
// long as it is worth waiting.
func settle(before usage) usage {
	deadline := time.Now().Add(patience / 2)
	now := measure()
	for !now.fits(before) && time.Now().Before(deadline) {
		runtime.Gosched() // measuring takes milliseconds
		now = measure()
	}
	return now
}

func readUsage(line string) (u usage, err error) {
	_, rest, _ := strings.Cut(line, "goroutines ")
	_, err = fmt.Sscanf(rest, "%d descriptors %d heap %d", &u.goroutines, &u.files, &u.heap)
	return u, err
}
