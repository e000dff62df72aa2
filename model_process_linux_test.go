package acomm_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
)

func init() { roles["model"] = modelProcess }

// modelLineSize is the size of a line of a ledger. It divides a page: the write of
// a process that is killed can end where a page of the file does.
const modelLineSize = 64

// The sockets of a process, in its directory.
const (
	modelSteady        = "s"  // a listener that runs as long as its process
	modelHook          = "h"  // the same, for responses
	modelSteadyTracker = "ts" // a tracker that runs as long as its process
	modelWildTracker   = "tw" // a tracker that stops now and then
	modelWild          = "w"  // and a number: listeners that stop, move and vanish
)

const modelWilds = 3

// modelTimeouts are those of tracked requests, by tracker.
var modelTimeouts = map[string]time.Duration{modelSteadyTracker: 5 * time.Second, modelWildTracker: 300 * time.Millisecond}

// modelHows is what a message can ask its handler to do, as often as it is here.
var modelHows = strings.Fields(strings.Repeat("accept ", 20) + strings.Repeat("respond ", 40) + strings.Repeat("refuse ", 8) +
	strings.Repeat("late0 ", 4) + strings.Repeat("late5 ", 4) + strings.Repeat("silent ", 5) + strings.Repeat("early ", 5) +
	"late50 late50 linger linger readon readon pieces pieces hang")

// modelBacks is the same for responses to a listener.
var modelBacks = strings.Fields(strings.Repeat("accept ", 12) + "refuse silent late5 readon")

// modelArgs is what a message carries.
type modelArgs struct {
	Back string // how the response is to be handled
	Data string // belongs to the message's id
}

// modelData is the data of a message.
func modelData(id string, size int) string {
	return strings.Repeat(id+" ", size/(len(id)+1)+1)[:size]
}

// modelMember is one of the processes that send to each other.
type modelMember struct {
	dir    string // of all of them
	place  string // the name of its own directory
	others []string
	number string // of the process; ids begin with it
	seed   uint64
	begun  int64 // microseconds; the ledgers count from there
	ledger *os.File

	last     atomic.Int64               // number of a message or listener
	hangs    chan struct{}              // has room for messages that hang
	calm     sync.RWMutex               // locked: no new messages
	trackers map[string]*acomm.Tracker  // by socket
	running  chan *modelListener        // those that are started when the actors end
	actors   sync.WaitGroup             // act until the context ends
	after    sync.WaitGroup             // what stopped listeners leave to be done
	mu       sync.Mutex                 // guards the field below
	tracked  map[string]*modelTrackedAt // by id, those that are not completed
	ctx      context.Context            // of the actors
	end      func()
}

type modelTrackedAt struct {
	tracker *acomm.Tracker
	req     *acomm.Request
}

// modelProcess plays its part until it is told to end, then says what it leaves.
func modelProcess() {
	m := newModelMember()
	before := modelUsage()
	for _, name := range []string{modelSteady, modelHook} {
		m.running <- m.start(acomm.NewUnixListener(m.path(name), 0), name)
	}
	m.startTrackers()
	for i := range modelWilds {
		m.actors.Go(func() { m.beWild(modelWild+strconv.Itoa(i), m.newRand(i)) })
	}
	fmt.Println("ready")
	<-commands
	for i := range 4 + m.newRand(99).IntN(40) {
		m.actors.Go(func() { m.work(m.newRand(100 + i)) })
	}
	for command := range commands {
		switch command {
		case "calm":
			m.calm.Lock()
			continue
		case "go on":
			m.calm.Unlock()
			continue
		}
		break
	}

	// First what is being sent by anybody, then what is still being answered.
	m.end()
	m.actors.Wait()
	close(m.running)
	listeners := make(map[string]*modelListener)
	for l := range m.running {
		listeners[l.name] = l
	}
	fmt.Println("idle")
	<-commands
	for name, l := range listeners {
		if name != modelHook {
			m.stop(l, 0)
		}
	}
	m.after.Wait()
	fmt.Println("stopped")
	<-commands
	m.removeAll()
	m.stop(listeners[modelHook], 0)
	m.after.Wait()
	for _, tracker := range m.trackers {
		tracker.Stop()
	}
	fmt.Println(m.left(before))
	<-commands // ends with its parent's end of the input
}

func newModelMember() *modelMember {
	m := &modelMember{
		dir:      os.Getenv("DIR"),
		place:    os.Getenv("PLACE"),
		others:   strings.Fields(os.Getenv("OTHERS")),
		number:   os.Getenv("NUMBER"),
		ledger:   openModelLedger(os.Getenv("LEDGER")),
		hangs:    make(chan struct{}, 16),
		trackers: make(map[string]*acomm.Tracker),
		running:  make(chan *modelListener, 2+modelWilds),
		tracked:  make(map[string]*modelTrackedAt),
	}
	var err error
	m.seed, err = strconv.ParseUint(os.Getenv("SEED"), 10, 64)
	orExit(err)
	m.begun, err = strconv.ParseInt(os.Getenv("BEGUN"), 10, 64)
	orExit(err)
	m.ctx, m.end = context.WithCancel(context.Background())
	return m
}

func openModelLedger(path string) *os.File {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	orExit(err)
	return f
}

// newRand is for one of the goroutines.
func (m *modelMember) newRand(actor int) *rand.Rand {
	number, err := strconv.ParseUint(m.number, 10, 32)
	orExit(err)
	return rand.New(rand.NewPCG(m.seed, number<<32|uint64(actor)))
}

func (m *modelMember) path(name string) string { return filepath.Join(m.dir, m.place, name) }

// note writes a line to the ledger.
func (m *modelMember) note(event string, fields ...any) {
	line := fmt.Sprintf("%d %s %s", time.Now().UnixMicro()-m.begun, event, fmt.Sprintln(fields...))
	line = fmt.Sprintf("%-*s\n", modelLineSize-1, strings.TrimSpace(line))
	if len(line) != modelLineSize {
		orExit(fmt.Errorf("line of the ledger has %d bytes: %s", len(line), line))
	}
	_, err := m.ledger.WriteString(line)
	orExit(err)
}

// odd notes what must never happen, with the reason for the parent to show.
func (m *modelMember) odd(id string, why ...any) {
	fmt.Fprintln(os.Stderr, append([]any{"odd:", id}, why...)...)
	m.note("odd", id)
}

// pause lets a random time pass, and reports whether to go on.
func (m *modelMember) pause(rng *rand.Rand, most time.Duration) bool {
	select {
	case <-time.After(time.Duration(rng.Int64N(int64(most)))):
	case <-m.ctx.Done():
	}
	return m.ctx.Err() == nil
}

// work sends messages.
func (m *modelMember) work(rng *rand.Rand) {
	for m.pause(rng, 8*time.Millisecond) {
		m.calm.RLock()
		to := m.pick(rng)
		m.calm.RUnlock()
		switch n := rng.IntN(200); {
		case rng.IntN(30_000) == 0:
			m.send(m.newMessage(rng, to, acomm.MaxPayload))
		case n == 0:
			m.burst(rng, to, 1500, 0)
		case n < 4:
			m.burst(rng, to, 10+rng.IntN(60), 60<<10)
		case n < 12:
			m.burst(rng, to, 10+rng.IntN(100), 0)
		case n < 30:
			for range rng.IntN(30) {
				m.send(m.newMessage(rng, to, 0))
			}
		case n < 36:
			m.send(m.newMessage(rng, to, 60<<10+rng.IntN(10<<10)))
		default:
			m.send(m.newMessage(rng, to, rng.IntN(200)))
		}
	}
}

// pick chooses a listener.
func (m *modelMember) pick(rng *rand.Rand) string {
	place := m.others[rng.IntN(len(m.others))]
	if rng.IntN(50) == 0 {
		place = m.place
	}
	if rng.IntN(2) == 0 {
		return filepath.Join(place, modelSteady)
	}
	return filepath.Join(place, modelWild+strconv.Itoa(rng.IntN(modelWilds)))
}

// burst sends a number of messages at the same time.
func (m *modelMember) burst(rng *rand.Rand, to string, number, size int) {
	var sending sync.WaitGroup
	for range number {
		msg := m.newMessage(rng, to, size+rng.IntN(200))
		sending.Go(func() { m.send(msg) })
	}
	sending.Wait()
}

// modelRequest is a request that is about to be sent.
type modelRequest struct {
	*acomm.Request
	to   string
	hook string // name of the socket
	keep bool   // where it fails, it stays tracked
}

func (m *modelMember) newMessage(rng *rand.Rand, to string, size int) *modelRequest {
	how := modelHows[rng.IntN(len(modelHows))]
	hooks := []string{modelHook, modelSteadyTracker, modelSteadyTracker, modelWildTracker}
	msg := &modelRequest{to: to, hook: hooks[rng.IntN(len(hooks))], keep: rng.IntN(2) == 0}
	id := fmt.Sprint(m.number, ".", m.last.Add(1))
	args := &modelArgs{Back: modelBacks[rng.IntN(len(modelBacks))], Data: modelData(id, size)}
	if how == "early" {
		args.Back = "accept" // its handler waits for it
	}
	var err error
	msg.Request, err = acomm.NewRequest(how, unixURL(m.path(msg.hook)).String(), args, m.complete, m.complete)
	orExit(err)
	msg.ID = id
	return msg
}

// send sends a message, tracked where its hook is a tracker. One that hangs does
// not hold up the caller.
func (m *modelMember) send(msg *modelRequest) {
	if msg.Task == "hang" {
		select {
		case m.hangs <- struct{}{}:
			m.actors.Go(func() {
				m.sendTracked(msg)
				<-m.hangs
			})
			return
		default:
			msg.Task = "silent"
		}
	}
	m.sendTracked(msg)
}

func (m *modelMember) sendTracked(msg *modelRequest) {
	tracked := msg.hook != modelHook && m.track(msg)
	class := m.deliver(msg.ID, msg.Task, msg.to, msg.Request)
	if tracked && class != "ok" && !msg.keep {
		m.remove(msg.ID)
	}
}

// deliver notes a message, sends it and notes the outcome.
func (m *modelMember) deliver(id, how, to string, payload any) (class string) {
	m.note("send", id, how, to)
	begun := time.Now()
	err := acomm.Send(unixURL(filepath.Join(m.dir, to)), payload)
	class = modelClass(id, err)
	if class == "odd" {
		m.odd(id, err)
	}
	m.note("sent", id, class, time.Since(begun).Milliseconds())
	return class
}

// modelClass names what an error of Send says.
func modelClass(id string, err error) string {
	if err == nil {
		return "ok"
	}
	if err.Error() == "refused "+id {
		return "refused"
	}
	for _, class := range []struct {
		name     string
		sentinel error
	}{
		{"absent", fs.ErrNotExist}, {"nobody", syscall.ECONNREFUSED}, {"denied", fs.ErrPermission},
		{"size", syscall.EMSGSIZE}, {"eof", io.ErrUnexpectedEOF}, {"late", os.ErrDeadlineExceeded},
	} {
		if errors.Is(err, class.sentinel) {
			return class.name
		}
	}
	return "odd"
}

func (m *modelMember) startTrackers() {
	for name, timeout := range modelTimeouts {
		tracker, err := acomm.NewTracker(m.path(name), nil, timeout)
		orExit(err)
		orExit(tracker.Start())
		m.trackers[name] = tracker
	}
	rng := m.newRand(50)
	m.actors.Go(func() {
		tracker := m.trackers[modelWildTracker]
		for m.pause(rng, 600*time.Millisecond) {
			tracker.Stop()
			m.pause(rng, 50*time.Millisecond)
			orExit(tracker.Start())
		}
	})
}

// track reports whether the tracker has taken the request.
func (m *modelMember) track(msg *modelRequest) bool {
	m.mu.Lock()
	m.tracked[msg.ID] = &modelTrackedAt{m.trackers[msg.hook], msg.Request}
	m.mu.Unlock()
	m.note("track", msg.ID, msg.hook)
	err := m.trackers[msg.hook].TrackRequest(msg.Request, modelTimeouts[msg.hook])
	if err == nil {
		return true
	}
	if msg.hook != modelWildTracker || !errors.Is(err, net.ErrClosed) {
		m.odd(msg.ID, err)
	}
	m.note("untrack", msg.ID)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tracked, msg.ID)
	return false
}

// complete is the handler of requests.
func (m *modelMember) complete(req *acomm.Request, resp *acomm.Response) {
	var what string
	var result modelArgs
	switch {
	case resp.Error == nil && resp.ID == req.ID && resp.UnmarshalResult(&result) == nil && result.Data == modelData(req.ID, len(result.Data)):
		what = "response"
	case resp.Error == nil:
		what = "wrong"
		m.odd(req.ID, resp)
	case errors.Is(resp.Error, os.ErrDeadlineExceeded):
		what = "timeout"
	case resp.Error.Error() == "failed "+req.ID:
		what = "failed"
	default:
		what = "wrong"
		m.odd(req.ID, resp.Error)
	}
	m.note("done", req.ID, what)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tracked, req.ID)
}

// remove ends the tracking of a request, unless it is completed.
func (m *modelMember) remove(id string) {
	m.mu.Lock()
	at := m.tracked[id]
	m.mu.Unlock()
	if at != nil && at.tracker.RemoveRequest(at.req) {
		m.note("removed", id)
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.tracked, id)
	}
}

// removeAll removes what no response can come to any more.
func (m *modelMember) removeAll() {
	m.mu.Lock()
	var ids []string
	for id := range m.tracked {
		ids = append(ids, id)
	}
	m.mu.Unlock()
	for _, id := range ids {
		m.remove(id)
	}
}

// modelUsage is what the process holds. A garbage collection would close what is lost.
func modelUsage() usage {
	entries, err := os.ReadDir("/proc/self/fd")
	orExit(err)
	return usage{goroutines: runtime.NumGoroutine(), files: len(entries)}
}

// left says what the process has more than before.
func (m *modelMember) left(before usage) string {
	more := modelUsage().since(before)
	for deadline := time.Now().Add(patience / 4); more.goroutines > 0 || more.files > 0; more = modelUsage().since(before) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			_, _ = os.Stderr.Write(buf[:runtime.Stack(buf, true)])
			break
		}
		runtime.Gosched()
	}
	sockets, err := os.ReadDir(filepath.Join(m.dir, m.place))
	orExit(err)
	return fmt.Sprintf("left: goroutines %d, descriptors %d, sockets %v", max(0, more.goroutines), max(0, more.files), sockets)
}
