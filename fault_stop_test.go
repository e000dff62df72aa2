package acomm_test

import (
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Stop in the middle of exchanges: each is accounted for.

// stopRounds is how often, and in the middle of how many exchanges, a service is
// stopped.
func stopRounds() (rounds, exchanges int) {
	if *long {
		return 200, 1000
	}
	return 10, 200
}

func TestFault_ListenerStopAccountsForEachExchange(t *testing.T) {
	rounds, exchanges := stopRounds()
	dir := shortDir(t)
	ul := acomm.NewUnixListener(filepath.Join(dir, "s.sock"), 0)
	var sends tally
	var handlers int
	for range rounds {
		require.NoError(t, ul.Start())
		var handled tally // by id
		var count atomic.Int64
		half := make(chan struct{})
		var serving sync.WaitGroup
		serving.Go(func() {
			for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
				serving.Go(func() {
					_, _ = takeRequest(ul, conn, func(req *acomm.Request) {
						handled.add(req.ID)
						if count.Add(1) == int64(exchanges/2) {
							close(half)
						}
					})
				})
			}
		})
		results := make([]error, exchanges)
		start := make(chan struct{})
		var sending sync.WaitGroup
		for i := range results {
			req := &acomm.Request{ID: strconv.Itoa(i), Task: "test", ResponseHook: ul.URL()}
			sending.Go(func() {
				<-start
				results[i] = acomm.Send(ul.URL(), req)
			})
		}
		close(start)
		within(t, half, "half of the exchanges")
		within(t, async(func() { ul.Stop(0) }), "Stop")
		within(t, async(sending.Wait), "the senders")
		within(t, async(serving.Wait), "the provider")
		for i, err := range results {
			if err == nil {
				sends.add("acknowledged")
				require.Equal(t, 1, handled.get(strconv.Itoa(i)), "acknowledged, so handled once")
				continue
			}
			why := whySendFailed(err)
			require.NotEmpty(t, why, "an error that does not say why: %v", err)
			sends.add("failed: " + why)
			require.Zero(t, handled.get(strconv.Itoa(i)), "handled, but: %v", err)
		}
		handlers += handled.total()
	}
	t.Logf("stopped %d times; requests in: %d; out: %s; handlers run: %d", rounds, rounds*exchanges, &sends, handlers)
	require.Equal(t, rounds*exchanges, sends.total())
	require.Equal(t, handlers, sends.get("acknowledged"))
}

func TestFault_TrackerStopAccountsForEachExchange(t *testing.T) {
	rounds, exchanges := stopRounds()
	tracker, err := acomm.NewTracker(filepath.Join(shortDir(t), "s.sock"), nil, patience/2)
	require.NoError(t, err)
	var sends tally
	var handlers int
	for range rounds {
		require.NoError(t, tracker.Start())
		var handled tally // by id
		var count atomic.Int64
		start, quarter := make(chan struct{}), make(chan struct{})
		handle := func(req *acomm.Request, resp *acomm.Response) {
			if resp.Error == nil {
				handled.add(req.ID)
			}
			if count.Add(1) == int64(exchanges/4) {
				close(quarter)
			}
		}
		type result struct{ tracked, sent, stray error }
		results := make([]result, exchanges)
		var sending sync.WaitGroup
		for i := range results {
			req := &acomm.Request{ID: strconv.Itoa(i), SuccessHandler: handle, ErrorHandler: handle}
			begin := start
			if i%2 == 0 {
				begin = quarter // together with Stop
			}
			sending.Go(func() {
				<-begin
				r := &results[i]
				if r.tracked = tracker.TrackRequest(req, 0); r.tracked == nil {
					r.sent = acomm.Send(tracker.URL(), &acomm.Response{ID: req.ID})
				}
				// Once more, to be dropped, whatever Stop is at.
				r.stray = acomm.Send(tracker.URL(), &acomm.Response{ID: req.ID})
			})
		}
		close(start)
		within(t, quarter, "a quarter of the exchanges")
		within(t, async(tracker.Stop), "Stop")
		ran := int(count.Load())
		within(t, async(sending.Wait), "the senders")
		require.EqualValues(t, ran, count.Load(), "a handler ran after Stop")
		for i, r := range results {
			ended := handled.get(strconv.Itoa(i))
			if r.tracked != nil {
				require.ErrorIs(t, r.tracked, net.ErrClosed)
				require.Zero(t, ended)
				sends.add("not tracked")
			} else {
				require.NoError(t, r.sent, "Stop waits for it")
				require.Equal(t, 1, ended, "acknowledged, so handled once")
				sends.add("acknowledged")
			}
			if r.stray != nil {
				require.NotEmpty(t, whySendFailed(r.stray), "an error that does not say why: %v", r.stray)
				sends.add("strays refused")
			} else {
				sends.add("strays dropped")
			}
		}
		handlers += ran
	}
	t.Logf("stopped %d times; requests in: %d; out: %s; handlers run: %d", rounds, rounds*exchanges, &sends, handlers)
	require.Equal(t, 2*rounds*exchanges, sends.total())
	require.Equal(t, handlers, sends.get("acknowledged"))
}
