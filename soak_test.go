package acomm_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"hash"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

var soak = flag.Duration("soak", 3*time.Second, "how long TestSoak runs")

const (
	soakRequesters = 64 // each has one request outstanding
	soakProviders  = 4
	soakHeap       = 4 << 20 // bytes that it may have more at the end
	soakError      = "failed as asked"
)

// latencies is a histogram with 16 steps for each doubling.
type latencies struct {
	steps [16 * 40]atomic.Int64
	max   atomic.Int64
}

func (l *latencies) add(d time.Duration) {
	us := max(d.Microseconds(), 1)
	l.steps[min(int(math.Log2(float64(us))*16), len(l.steps)-1)].Add(1)
	for old := l.max.Load(); int64(d) > old && !l.max.CompareAndSwap(old, int64(d)); old = l.max.Load() {
	}
}

func (l *latencies) quantile(q float64) time.Duration {
	var total, seen int64
	for i := range l.steps {
		total += l.steps[i].Load()
	}
	for i := range l.steps {
		if seen += l.steps[i].Load(); seen > 0 && float64(seen) >= q*float64(total) {
			return time.Duration(math.Exp2(float64(i+1)/16)) * time.Microsecond
		}
	}
	return 0
}

// scope is a part of a test that has its own end.
type scope struct {
	testing.TB
	cleanups []func()
}

func newScope(t testing.TB) *scope {
	s := &scope{TB: t}
	t.Cleanup(s.end)
	return s
}

func (s *scope) Cleanup(f func()) { s.cleanups = append(s.cleanups, f) }

func (s *scope) end() {
	for len(s.cleanups) > 0 {
		last := s.cleanups[len(s.cleanups)-1]
		s.cleanups = s.cleanups[:len(s.cleanups)-1]
		last()
	}
	s.cleanups = nil // the test keeps the scope, and would keep all that was in it
}

// soakPeer is a provider, in all the lives it has.
type soakPeer struct {
	name  string
	state atomic.Int64 // counts its deaths and its births; odd: it is up

	process   *process
	scope     *scope
	collected <-chan struct{}
	left      string // its last words, if it ended in good order
}

func (p *soakPeer) killedAfter(state int64) bool { return p.state.Load() != state }

// soakEntry is what the books have about a request.
type soakEntry struct {
	overHTTP     bool
	acknowledged bool
	taken        uint8 // how often by a provider
	answered     bool  // the provider's response was acknowledged
	posted       bool  // the coordinator forwarded it, or its time-out
}

// lateCall is a request that timed out while its provider was alive.
type lateCall struct {
	seq   int
	id    string
	peer  *soakPeer
	state int64 // the provider's, then
}

// soakRun is the state of a soak.
type soakRun struct {
	t           testing.TB
	dir         string
	timeout     time.Duration // of requests that are answered, unless somebody dies
	tracker     *acomm.Tracker
	hook        *url.URL // leads to the tracker as well
	coordinator *url.URL
	peers       []*soakPeer

	ended    chan struct{} // closed when no more requests are to be made
	requests counter
	dropped  *droppedResponses // by the tracker, in the end by the coordinator's too
	twice    atomic.Int64      // requests whose handlers ran twice
	latency  latencies
	counts   tally // of outcomes
	wrong    tally // of what must not be

	mu    sync.Mutex
	books []soakEntry // by number
	late  []lateCall
}

func (s *soakRun) nextSeq() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.books = append(s.books, soakEntry{})
	return len(s.books) - 1
}

// book changes the entry of a request.
func (s *soakRun) book(seq int, change func(*soakEntry)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.books[seq])
}

// start starts a provider, again or for the first time.
func (s *soakRun) start(p *soakPeer) {
	p.scope = newScope(s.t)
	p.process = startProcess(p.scope, "soak provider", "SOCKET="+filepath.Join(s.dir, p.name))
	require.Equal(s.t, "ready", p.process.ReadLine())
	proc := p.process
	p.collected = async(func() { s.collect(p, proc.Lines()) })
	p.state.Add(1)
}

// collect takes what a provider says in one life.
func (s *soakRun) collect(p *soakPeer, lines <-chan string) {
	for line := range lines {
		what, rest, _ := strings.Cut(line, " ")
		switch seq, err := strconv.Atoi(rest); {
		case what == "took" && err == nil:
			s.book(seq, func(e *soakEntry) { e.taken++ })
		case what == "answered" && err == nil:
			s.book(seq, func(e *soakEntry) { e.answered = true })
		case what == "left":
			p.left = rest
		default:
			s.wrong.add("a provider's answer " + line)
		}
	}
}

func (s *soakRun) kill(p *soakPeer) {
	p.state.Add(1) // before it is done, so that whatever comes of it is explained
	p.process.Kill()
	require.ErrorContains(s.t, p.process.Wait(), "killed")
	within(s.t, p.collected, "the provider's last words")
	p.scope.end()
}

// stop ends a provider in good order.
func (s *soakRun) stop(p *soakPeer) {
	require.NoError(s.t, p.process.WriteLine("end"))
	require.NoError(s.t, p.process.Wait())
	within(s.t, p.collected, "the provider's last words")
	p.scope.end()
	left, err := readUsage(p.left)
	require.NoError(s.t, err, "%q", p.left)
	if !left.fits(usage{}) {
		s.wrong.add("leaked by a provider: " + p.left)
	}
}

// killSome kills providers at random, each after a random number of requests,
// until the time is over. In the middle of it it measures.
func (s *soakRun) killSome(d time.Duration) (kills int, middle usage) {
	over, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	after := func(requests int) bool { return reach(&s.requests, s.requests.load()+requests, over.Done()) }
	begin := time.Now()
	for after(rand.IntN(4 * soakRequesters)) {
		if middle == (usage{}) && time.Since(begin) > d/2 {
			middle = measure()
		}
		p := s.peers[rand.IntN(len(s.peers))]
		s.kill(p)
		after(rand.IntN(soakRequesters)) // while nobody is there
		s.start(p)
		kills++
	}
	if middle == (usage{}) { // a slow machine
		middle = measure()
	}
	return kills, middle
}

// soakSize is a size of a payload: mostly small, 1 MiB at most.
func soakSize(rng *rand.Rand) int {
	switch n := rng.IntN(100); {
	case n < 5:
		return 0
	case n < 70:
		return rng.IntN(1 << 10)
	case n < 95:
		return rng.IntN(32 << 10)
	case n < 99:
		return rng.IntN(256 << 10)
	}
	return rng.IntN(1<<20 + 1)
}

// newJob decides what a request asks for.
func (s *soakRun) newJob(rng *rand.Rand) *soakJob {
	job := &soakJob{Seq: s.nextSeq(), Kind: soakEcho, Timeout: s.timeout}
	switch n := rng.IntN(100); {
	case n < 5:
		job.Kind = soakFail
	case n < 10:
		job.Kind = soakSilent
		job.Timeout = time.Duration(50+rng.IntN(200)) * time.Millisecond
	case n < 15:
		job.Kind = soakStream
		job.Size = rng.Int64N(1 << 20)
		if rng.IntN(4) == 0 {
			job.Size, job.Slow = 8*job.Size, true
		}
	}
	job.Data = make([]byte, soakSize(rng))
	for i := range job.Data {
		job.Data[i] = byte(job.Seq + i)
	}
	return job
}

// request makes a request, of any kind to any provider over either way, and waits
// for what comes of it.
func (s *soakRun) request(rng *rand.Rand) {
	job := s.newJob(rng)
	peer := s.peers[rng.IntN(len(s.peers))]
	state := peer.state.Load()
	var id string
	// Whatever goes wrong is the death of its provider, or wrong.
	explain := func(what string) {
		now := peer.state.Load()
		switch {
		case now != state || now%2 == 0:
			s.counts.add(what + ", its provider was killed")
		case what == "time-out":
			s.mu.Lock()
			s.late = append(s.late, lateCall{job.Seq, id, peer, now})
			s.mu.Unlock()
		default:
			s.wrong.add(what + ", for no reason")
		}
	}
	to, hook, way := unixURL(filepath.Join(s.dir, peer.name)), s.tracker.URL(), "unix"
	if rng.IntN(2) == 0 {
		to, way = s.coordinator, "HTTP"
		hook = s.hook.JoinPath(strconv.Itoa(job.Seq))
		s.book(job.Seq, func(e *soakEntry) { e.overHTTP = true })
	}
	var handled atomic.Int32
	responses := make(chan *acomm.Response, 1)
	handle := func(_ *acomm.Request, resp *acomm.Response) {
		if handled.Add(1) == 1 {
			responses <- resp
		} else {
			s.twice.Add(1)
		}
	}
	req, err := acomm.NewRequest(peer.name, hook.String(), job, handle, handle)
	if err == nil {
		id = req.ID
		err = s.tracker.TrackRequest(req, job.Timeout)
	}
	if err != nil {
		s.wrong.add("not tracked: " + err.Error())
		return
	}
	s.requests.add()
	begin := time.Now()
	if err := acomm.Send(to, req); err != nil {
		why := whySendFailed(err)
		if why == "" && way == "HTTP" {
			why = "the coordinator's refusal"
		}
		explain("send failed: " + why)
		if s.tracker.RemoveRequest(req) {
			s.counts.add("removed")
			return
		}
	} else {
		s.counts.add("sent: " + way)
		s.book(job.Seq, func(e *soakEntry) { e.acknowledged = true })
	}
	select {
	case resp := <-responses:
		s.check(job, resp, explain)
		if job.Kind == soakEcho && resp.Error == nil {
			s.latency.add(time.Since(begin))
		}
	case <-time.After(job.Timeout + patience):
		s.counts.add("LOST")
	}
}

// check looks at what a request has come to.
func (s *soakRun) check(job *soakJob, resp *acomm.Response, explain func(string)) {
	isTimeout := resp.Error != nil && resp.Error.Error() == "response timeout"
	if !isTimeout {
		s.counts.add("response: " + job.Kind)
	}
	switch {
	case isTimeout && job.Kind == soakSilent:
		s.counts.add("time-out, as asked")
	case isTimeout:
		explain("time-out")
	case job.Kind == soakFail:
		if resp.Error == nil || resp.Error.Error() != soakError {
			s.wrong.add("another error than asked for")
		}
	case resp.Error != nil || job.Kind == soakSilent:
		s.wrong.add("a response nobody sent")
	case job.Kind == soakStream:
		s.checkStream(job, resp, explain)
	default:
		var data []byte
		if resp.UnmarshalResult(&data) != nil || !bytes.Equal(data, job.Data) {
			s.wrong.add("another result than sent")
		}
	}
}

func (s *soakRun) checkStream(job *soakJob, resp *acomm.Response, explain func(string)) {
	sum := func(fill func(hash.Hash) error) (string, error) {
		h := sha256.New()
		err := fill(h)
		return string(h.Sum(nil)), err
	}
	if resp.StreamURL == nil {
		s.wrong.add("a stream without its URL")
		return
	}
	got, err := sum(func(h hash.Hash) error { return acomm.Stream(h, resp.StreamURL) })
	if err != nil {
		explain("stream failed with an error")
		return
	}
	want, _ := sum(func(h hash.Hash) error {
		_, err := io.Copy(h, soakData(job.Seq, job.Size, false))
		return err
	})
	if got != want {
		s.counts.add("stream WRONG")
		return
	}
	s.counts.add("stream whole, SHA-256 right")
}

// audit compares the books of all sides when all is over, and closes them.
func (s *soakRun) audit() {
	for _, entry := range s.books {
		switch {
		case entry.taken > 1:
			s.counts.add("TAKEN TWICE")
		case entry.taken == 0 && entry.acknowledged:
			s.counts.add("ACKNOWLEDGED, NOT TAKEN")
		}
	}
	for range s.twice.Load() {
		s.counts.add("HANDLED TWICE")
	}
	suppressed := s.dropped.suppressed
	for _, call := range s.late {
		why := s.whyLate(call)
		if why == "LOST" && s.books[call.seq].answered && suppressed > 0 {
			why, suppressed = "time-out, the response came later, it seems: the log left out a line", suppressed-1
		}
		s.counts.add(why)
	}
	s.books, s.late = nil, nil
}

// whyLate tells a response that was too slow, which is no fault, from one that
// went astray: the tracker that it was too late for has dropped it, and says so.
func (s *soakRun) whyLate(call lateCall) string {
	entry := s.books[call.seq]
	switch {
	case !entry.answered && call.peer.killedAfter(call.state):
		return "time-out, its provider was killed later"
	case entry.answered && entry.posted == entry.overHTTP && s.dropped.has(call.id):
		return "time-out, the response came later"
	}
	s.t.Logf("request %d: over HTTP %t, acknowledged %t, taken %d, answered %t, forwarded %t, dropped %t",
		call.seq, entry.overHTTP, entry.acknowledged, entry.taken, entry.answered, entry.posted, s.dropped.has(call.id))
	return "LOST"
}

func TestSoak(t *testing.T) {
	s := &soakRun{t: t, dir: shortDir(t), timeout: min(max(*soak, 3*time.Second), 10*time.Second), ended: make(chan struct{})}
	old := http.DefaultTransport
	replaceTransport(t, old.(*http.Transport).Clone())
	transport := soakTransport()
	dropped, end := watchDropped()
	defer end()
	s.dropped = dropped
	s.tracker = newTracker(t)
	hooks := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if err := json.NewDecoder(r.Body).Decode(resp); err != nil {
			http.Error(w, "no response", http.StatusBadRequest)
			return
		}
		if seq, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/")); err == nil {
			s.book(seq, func(e *soakEntry) { e.posted = true })
		}
		s.tracker.HandleResponse(resp)
	}))
	defer hooks.Close()
	var err error
	s.hook, err = url.Parse(hooks.URL)
	require.NoError(t, err)
	start := measure()

	processes := newScope(t)
	coordinator := startProcess(processes, "soak coordinator", "DIR="+s.dir)
	s.coordinator = &url.URL{Scheme: "http", Host: coordinator.ReadLine(), Path: "/request"}
	askCoordinator := func() (pending string, u usage) {
		transport.CloseIdleConnections()
		require.NoError(t, coordinator.WriteLine("usage"))
		line := coordinator.ReadLine()
		u, err := readUsage(line)
		require.NoError(t, err, "%q", line)
		return strings.Fields(line)[1], u
	}
	_, coordinatorStart := askCoordinator()
	for i := range soakProviders {
		p := &soakPeer{name: fmt.Sprint("provider-", i)}
		s.peers = append(s.peers, p)
		s.start(p)
	}

	var requesters sync.WaitGroup
	for range soakRequesters {
		requesters.Go(func() {
			rng := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
			for {
				select {
				case <-s.ended:
					return
				default:
					s.request(rng)
				}
			}
		})
	}
	begin := time.Now()
	kills, middle := s.killSome(*soak)
	close(s.ended)
	requesters.Wait() // each waits for its request, which has a time-out
	elapsed := time.Since(begin)

	for _, p := range s.peers {
		s.stop(p)
	}
	var coordinatorEnd usage
	await(t, "the coordinator to settle", func() bool {
		var pending string
		pending, coordinatorEnd = askCoordinator()
		// What it holds for requests that time out goes when they do.
		return pending == "0" && coordinatorEnd.fits(coordinatorStart)
	})
	require.NoError(t, coordinator.WriteLine("end"))
	s.dropped.flush(s.tracker)
	require.NoError(t, s.dropped.readDropped(coordinator.ReadLine()))
	require.NoError(t, coordinator.Wait())
	processes.end()
	transport.CloseIdleConnections()
	if n := s.tracker.NumRequests(); n > 0 {
		s.wrong.add(fmt.Sprint("requests still tracked: ", n))
	}
	s.audit()
	after := settle(start)

	t.Log("\n" + s.table(elapsed, kills, []usage{start, middle, after}, []usage{coordinatorStart, coordinatorEnd}))
	require.True(t, after.fits(start), "leaked or growing")
	for _, never := range []string{"LOST", "TAKEN TWICE", "HANDLED TWICE", "ACKNOWLEDGED, NOT TAKEN", "stream WRONG"} {
		require.Zero(t, s.counts.get(never), never)
	}
	require.Zero(t, s.wrong.total(), "%s", &s.wrong)
	for _, must := range []string{"sent: unix", "sent: HTTP", "response: echo", "response: error", "time-out, as asked", "stream whole, SHA-256 right"} {
		require.Positive(t, s.counts.get(must), "it shows nothing without: %s", must)
	}
}

// table is what the soak has come to.
func (s *soakRun) table(elapsed time.Duration, kills int, here, coordinator []usage) string {
	var buf bytes.Buffer
	w := bufio.NewWriter(&buf)
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(format string, args ...any) { fmt.Fprintf(tab, format+"\n", args...) }
	row("duration\t%s", elapsed.Round(time.Millisecond))
	row("requests\t%d\t%.0f/s", s.requests.load(), float64(s.requests.load())/elapsed.Seconds())
	row("providers killed\t%d", kills)
	counts := map[string]int{"HANDLED TWICE": 0, "TAKEN TWICE": 0, "LOST": 0, "stream WRONG": 0}
	maps.Copy(counts, s.counts.counts)
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		row("%s\t%d", what, counts[what])
	}
	row("wrong\t%d\t%s", s.wrong.total(), &s.wrong)
	row("latency (echo)\tp50 %s\tp99 %s\tmax %s", s.latency.quantile(0.5).Round(10*time.Microsecond),
		s.latency.quantile(0.99).Round(10*time.Microsecond), time.Duration(s.latency.max.Load()).Round(10*time.Microsecond))
	row("\tgoroutines\tdescriptors\theap")
	for i, when := range []string{"start", "middle", "end"} {
		row("requesters, %s\t%d\t%d\t%d KiB", when, here[i].goroutines, here[i].files, here[i].heap>>10)
	}
	for i, when := range []string{"start", "end"} {
		row("coordinator, %s\t%d\t%d\t%d KiB", when, coordinator[i].goroutines, coordinator[i].files, coordinator[i].heap>>10)
	}
	_ = tab.Flush()
	_ = w.Flush()
	return buf.String()
}
