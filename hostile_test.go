package acomm_test

import (
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

const (
	attackers   = 1000
	memoryGrown = 64 << 20 // bytes that an attack may cost
)

// someThenAll is in how many attackers come. If few cost too much already, the
// machine is spared the many.
var someThenAll = []int{10, attackers}

// attacks are what each attacker sends before it falls silent. Whether it is
// closed at once or sits there is up to the frame.
var attacks = map[string]string{
	"announces 4 GiB, sends a byte":   "\xff\xff\xff\xff{",
	"announces 64 MiB, sends a byte":  "\x04\x00\x00\x00{",
	"sends half a header":             "\x00\x00",
	"connects and says nothing":       "",
	"sends half of a small payload":   "\x00\x00\x00\x20" + `{"id":"half`,
	"sends what is no message at all": "GET / HTTP/1.1\r\n",
}

// attack opens that many connections and sends something on each. They are closed
// with the test.
func attack(t testing.TB, path, sends string, number int) []net.Conn {
	t.Helper()
	raiseFileLimit(t, 2*attackers+500)
	conns := make([]net.Conn, number)
	for i := range conns {
		await(t, "the backlog", func() bool { // it may be full for a moment
			conn, err := net.Dial("unix", path)
			conns[i] = conn
			return err == nil
		})
		t.Cleanup(func() { _ = conns[i].Close() })
		if _, err := io.WriteString(conns[i], sends); err != nil {
			require.ErrorIs(t, err, syscall.EPIPE, "closed already, its time is up")
		}
	}
	return conns
}

// raiseFileLimit makes room for that many descriptors.
func raiseFileLimit(t testing.TB, number uint64) {
	t.Helper()
	var limit syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if uint64(limit.Cur) >= number {
		return
	}
	old := limit
	limit.Cur = limit.Max
	if uint64(limit.Cur) < number {
		t.Skipf("%d descriptors are needed, the system allows %d", number, limit.Max)
	}
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
	t.Cleanup(func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old) })
}

// memoryInUse is what heap and stacks take, without garbage.
func memoryInUse() int64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapInuse + stats.StackInuse)
}

// servedMeanwhile has four requesters carry out exchanges, all of which have to
// succeed. How long they take is judged in the long run only.
func servedMeanwhile(t *testing.T, exchange func() error) {
	t.Helper()
	each := 50
	if *long {
		each = 1000
	}
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var requesters sync.WaitGroup
	for range 4 {
		requesters.Go(func() {
			for range each {
				begin := time.Now()
				err := exchange()
				mu.Lock()
				took = append(took, time.Since(begin))
				if err != nil {
					failed = err
				}
				mu.Unlock()
			}
		})
	}
	within(t, async(requesters.Wait), "the exchanges")
	require.NoError(t, failed)
	slices.Sort(took)
	p99 := took[len(took)*99/100]
	t.Logf("%d exchanges: p50 %s, p99 %s, max %s", len(took), took[len(took)/2], p99, took[len(took)-1])
	if *long {
		require.Less(t, p99, 50*time.Millisecond)
	}
}

// requireStops waits for stop to return.
func requireStops(t *testing.T, stop func()) {
	t.Helper()
	begin := time.Now()
	within(t, async(stop), "Stop")
	t.Logf("stopped in %s", time.Since(begin))
	if *long {
		require.Less(t, time.Since(begin), 5*time.Second)
	}
}

// requireAllClosed fails unless each connection is closed without an answer.
func requireAllClosed(t *testing.T, conns []net.Conn) {
	t.Helper()
	for _, conn := range conns {
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
		answer, err := io.ReadAll(conn)
		if err != nil {
			require.ErrorIs(t, err, syscall.ECONNRESET, "bytes were left unread")
		}
		require.Empty(t, answer)
	}
}

// trackedExchange tracks a request, answers it over the tracker's socket, and
// waits for its handler.
func trackedExchange(tracker *acomm.Tracker) error {
	answered := make(chan error, 1)
	handle := func(_ *acomm.Request, resp *acomm.Response) { answered <- resp.Error }
	req, err := acomm.NewRequest("test", tracker.URL().String(), nil, handle, handle)
	if err != nil {
		return err
	}
	if err := tracker.TrackRequest(req, patience); err != nil {
		return err
	}
	if err := req.Respond(&acomm.Response{ID: req.ID}); err != nil {
		return err
	}
	return <-answered
}

func TestHostile_TrackerServesOthersDuringAnAttack(t *testing.T) {
	for name, sends := range attacks {
		t.Run(name, func(t *testing.T) {
			for _, number := range someThenAll {
				tracker := newTracker(t)
				require.NoError(t, trackedExchange(tracker))
				before := memoryInUse()
				conns := attack(t, tracker.Addr(), sends, number)
				servedMeanwhile(t, func() error { return trackedExchange(tracker) })
				grown := memoryInUse() - before
				t.Logf("%d attackers: memory grew by %d KiB", number, grown>>10)
				require.Less(t, grown, int64(memoryGrown))
				require.Zero(t, tracker.NumRequests())
				requireStops(t, tracker.Stop)
				requireAllClosed(t, conns)
			}
		})
	}
}

func TestHostile_ProviderServesOthersDuringAnAttack(t *testing.T) {
	for name, sends := range attacks {
		t.Run(name, func(t *testing.T) {
			for _, number := range someThenAll {
				ul := startListener(t, "", 0)
				served := provide(ul, time.Minute)
				req, err := acomm.NewRequest("test", ul.URL().String(), nil, nil, nil)
				require.NoError(t, err)
				require.NoError(t, acomm.Send(ul.URL(), req))
				before := memoryInUse()
				conns := attack(t, ul.Addr(), sends, number)
				servedMeanwhile(t, func() error { return acomm.Send(ul.URL(), req) })
				grown := memoryInUse() - before
				t.Logf("%d attackers: memory grew by %d KiB", number, grown>>10)
				require.Less(t, grown, int64(memoryGrown))
				requireStops(t, func() { ul.Stop(50 * time.Millisecond) })
				within(t, served, "the provider")
				requireAllClosed(t, conns)
			}
		})
	}
}

// Hazard: a provider without a deadline never gets rid of a peer that is silent.
func TestHostile_DeadlineRidsAProviderOfSilentPeers(t *testing.T) {
	for _, name := range []string{"sends half a header", "connects and says nothing", "sends half of a small payload"} {
		t.Run(name, func(t *testing.T) {
			ul := startListener(t, "", 0)
			served := provide(ul, 10*time.Millisecond)
			conns := attack(t, ul.Addr(), attacks[name], attackers)
			requireAllClosed(t, conns)
			within(t, async(func() { ul.Stop(0) }), "Stop, which closes nothing itself")
			within(t, served, "the provider")
		})
	}
}

func TestHostile_ForgedResponseIsDropped(t *testing.T) {
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, patience))
	defer tracker.RemoveRequest(req) // if the test fails
	for _, id := range []string{
		"", " ", "*", "%", "null", req.ID[:35], req.ID + " ", req.ID + "\x00", " " + req.ID,
		strings.ToUpper(req.ID), "{" + req.ID + "}", strings.ReplaceAll(req.ID, "-", ""), rand.Text(),
	} {
		require.NoError(t, acomm.Send(tracker.URL(), &acomm.Response{ID: id}), "acknowledged: %q", id)
	}
	requireWorking(t, tracker)
	require.Equal(t, 1, tracker.NumRequests())
	require.Empty(t, responses)
	require.NoError(t, req.Respond(answerTo(t, req, "genuine", nil)))
	require.JSONEq(t, `"genuine"`, string(*within(t, responses, "the response").Result))
	tracker.Stop() // waits for the exchanges
	require.Empty(t, responses)
}

func TestHostile_ReplayedResponseRunsTheHandlerOnce(t *testing.T) {
	tracker := newTracker(t)
	for range 100 {
		req, responses := newRequest(t, tracker.URL(), nil)
		require.NoError(t, tracker.TrackRequest(req, patience))
		var replaying sync.WaitGroup
		for range 20 {
			replaying.Go(func() {
				if err := req.Respond(&acomm.Response{ID: req.ID}); err != nil {
					t.Errorf("not acknowledged: %v", err)
				}
			})
		}
		replaying.Wait()
		within(t, responses, "the response")
		defer func() { require.Empty(t, responses) }()
	}
	tracker.Stop() // waits for the exchanges
}

func TestHostile_FloodOfUnknownIDsCostsNothing(t *testing.T) {
	number := 10_000
	if *long {
		number = 100_000
	}
	lines := captureLog(t)
	tracker := newTracker(t)
	req, responses := newRequest(t, tracker.URL(), nil)
	require.NoError(t, tracker.TrackRequest(req, time.Hour))
	defer tracker.RemoveRequest(req) // if the test fails
	requireWorking(t, tracker)
	before, files, begin := memoryInUse(), openFiles(t), time.Now()
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() {
			var failed error
			for i := range number / cap(errs) {
				id := rand.Text() + strings.Repeat("x", 1<<10)
				if i < 10 {
					id += strings.Repeat("\n", 4<<10) // for the log
				}
				if err := acomm.Send(tracker.URL(), &acomm.Response{ID: id}); err != nil {
					failed = fmt.Errorf("not acknowledged: %w", err)
				}
			}
			errs <- failed
		}()
	}
	for range cap(errs) {
		require.NoError(t, <-errs)
	}
	requireWorking(t, tracker)
	grown, seconds := memoryInUse()-before, int(time.Since(begin)/time.Second)
	written := lines.String()
	t.Logf("%d responses in %d s: memory grew by %d KiB, %d lines of log", number, seconds, grown>>10, strings.Count(written, "\n"))
	require.Less(t, grown, int64(4<<20), "nothing is kept of them")
	require.LessOrEqual(t, strings.Count(written, "\n"), 10*(seconds+2), "ten lines a second")
	require.Less(t, len(written), 10*(seconds+2)<<10, "1 KiB each")
	require.Equal(t, 1, tracker.NumRequests())
	require.True(t, tracker.RemoveRequest(req))
	tracker.Stop()
	require.Empty(t, responses)
	require.LessOrEqual(t, openFiles(t), files)
}
