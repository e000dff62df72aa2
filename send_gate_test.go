package acomm_test

import (
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// newTransport has Send use a transport of the test's own, as the default one comes.
func newTransport(t testing.TB) *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	replaceTransport(t, transport)
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// waitForTurns has posts wait for their turns however long it takes.
func waitForTurns(t testing.TB) {
	old := acomm.SetPostPatience(time.Hour)
	t.Cleanup(func() { acomm.SetPostPatience(old) })
}

// sendAtOnce sends a number of payloads and waits until all are acknowledged.
func sendAtOnce(t testing.TB, addr *url.URL, number int) {
	t.Helper()
	errs := make(chan error, number)
	for i := range number {
		go func() { errs <- acomm.Send(addr, i) }()
	}
	for range number {
		require.NoError(t, within(t, errs, "the acknowledgement"))
	}
}

// gathering is a hook that answers when a number of requests are there at once.
func gathering(t testing.TB, number int) *url.URL {
	var missing sync.WaitGroup
	missing.Add(number)
	return httpPeer(t, func(http.ResponseWriter, *http.Request) {
		missing.Done()
		missing.Wait()
	})
}

// Hazard: each burst opens a connection for each of its posts, and throws all but
// two away.
func TestSend_BurstsKeepTheirConnections(t *testing.T) {
	newTransport(t)
	waitForTurns(t)
	var opened counter
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/words" {
			_, _ = w.Write([]byte(`{"error":""}`))
		}
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.add()
		}
	}
	server.Start()
	defer server.Close()
	for _, path := range []string{"/", "/words"} {
		addr, err := url.Parse(server.URL + path)
		require.NoError(t, err)
		for range 20 {
			sendAtOnce(t, addr, 32)
		}
	}
	require.LessOrEqual(t, opened.load(), 200) // 1,280 posts; about 100 as a rule, one more than is kept in each burst
}

// Hazard: posts that take their time hold up all others to their host.
func TestSend_SlowAnswersDelayNobodyForLong(t *testing.T) {
	newTransport(t)
	sendAtOnce(t, gathering(t, 20), 20)
}

// Hazard: a host holds up the posts to another one.
func TestSend_HostsTakeNoTurnsFromEachOther(t *testing.T) {
	newTransport(t)
	waitForTurns(t)
	arrived, answer := make(chan struct{}, 2), make(chan struct{})
	slow := httpPeer(t, func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-answer
	})
	slowSent := async(func() { sendAtOnce(t, slow, 2) })
	for range 2 {
		within(t, arrived, "the requests to the slow hook")
	}
	sendAtOnce(t, httpPeer(t, func(http.ResponseWriter, *http.Request) {}), 20)
	close(answer)
	within(t, slowSent, "the slow hook")
}

func TestSend_TurnsAreAsManyAsConnectionsAreKept(t *testing.T) {
	const number = 20
	waitForTurns(t)
	for name, set := range map[string]func(*http.Transport){
		"more":     func(transport *http.Transport) { transport.MaxIdleConnsPerHost = number },
		"no limit": func(transport *http.Transport) { transport.MaxIdleConnsPerHost = math.MaxInt },
		"none":     func(transport *http.Transport) { transport.MaxIdleConnsPerHost = -1 },
		"disabled": func(transport *http.Transport) { transport.DisableKeepAlives = true },
		"another transport": func(transport *http.Transport) {
			http.DefaultTransport = roundTripper(transport.RoundTrip) // newTransport puts it back
		},
	} {
		t.Run(name, func(t *testing.T) {
			set(newTransport(t))
			sendAtOnce(t, gathering(t, number), number)
		})
	}
}

// Hazard: every post to a slow host waits in vain.
func TestSend_SlowHostIsWaitedForOnce(t *testing.T) {
	newTransport(t)
	addr := &url.URL{Scheme: "http", Host: "slow"}
	synctest.Test(t, func(t *testing.T) { // for its clock
		enter := func(expected time.Duration) (leave func()) {
			start := time.Now()
			leave = acomm.EnterHost(addr)
			require.Equal(t, expected, time.Since(start))
			return leave
		}
		leaveFirst := enter(0) // two connections are kept, and one more may post
		leaves := []func(){leaveFirst, enter(0), enter(0), enter(acomm.PostPatience), enter(0), enter(0)}
		time.Sleep(acomm.SlowHost)
		leaves = append(leaves, enter(acomm.PostPatience), enter(0))
		leaveFirst() // its turn is free
		time.Sleep(acomm.SlowHost)
		leaves = append(leaves[1:], enter(0))
		for _, leave := range leaves {
			leave()
		}
		for range 2 { // the last one to leave leaves nothing behind
			leaves = []func(){enter(0), enter(0), enter(0), enter(acomm.PostPatience)}
			for _, leave := range leaves {
				leave()
			}
		}
	})
}
