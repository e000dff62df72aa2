package acomm_test

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mistifyio/acomm"
)

func sendNumbers(t testing.TB, addr *url.URL, number int) {
	t.Helper()
	sendAtOnce(t, addr, number, func(i int) any { return i })
}

// countingHook is a hook that answers once so many posts have arrived, and counts its
// connections.
func countingHook(t testing.TB, together int) (addr *url.URL, opened *counter) {
	t.Helper()
	opened = &counter{}
	arrived := &counter{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		arrived.add()
		n, _ := arrived.next() // not over the last of its burst, which waits for this one
		reach(arrived, (n+together-1)/together*together, r.Context().Done())
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.add()
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	addr, err := url.Parse(server.URL)
	require.NoError(t, err)
	return addr, opened
}

// Hazard: each burst opens a connection for each of its posts, and throws all but two
// away; whether it does depends on how fast the hook is.
func TestSend_BurstsKeepTheirConnectionsHoweverSlowTheHookIs(t *testing.T) {
	const burst = 32
	for name, together := range map[string]int{"answers at once": 1, "answers a whole burst": burst} {
		t.Run(name, func(t *testing.T) {
			newTransport(t)
			addr, opened := countingHook(t, together)
			for range 40 {
				sendNumbers(t, addr, burst)
			}
			require.LessOrEqual(t, opened.load(), acomm.MaxPosts)
		})
	}
}

// hangingHook is a hook that answers nobody until it is told to, or the test ends.
func hangingHook(t testing.TB) (addr *url.URL, arrived *counter, answer func()) {
	t.Helper()
	arrived = &counter{}
	told := make(chan struct{})
	addr = httpPeer(t, func(http.ResponseWriter, *http.Request) {
		arrived.add()
		<-told
	})
	answer = sync.OnceFunc(func() { close(told) })
	t.Cleanup(answer) // before the server is closed, which waits for its handlers
	return addr, arrived, answer
}

// Hazard: a hook that hangs takes a descriptor for each response, until there is none
// for the others.
func TestSend_AHookThatHangsTakesItsShareAndNoMore(t *testing.T) {
	newTransport(t)
	const number = 3 * acomm.MaxPosts
	hung, arrived, answer := hangingHook(t)
	sent := async(func() { sendNumbers(t, hung, number) })
	requireReached(t, arrived, acomm.MaxPosts, "the hook that hangs")
	healthy := httpPeer(t, func(http.ResponseWriter, *http.Request) {})
	sendNumbers(t, healthy, 200)
	require.Equal(t, acomm.MaxPosts, arrived.load(), "the others wait")
	answer()
	within(t, sent, "the hook that hung")
	require.Equal(t, number, arrived.load())
}

// A service that asks for more connections posts as many at a time.
func TestSend_MoreIdleConnectionsAreMorePosts(t *testing.T) {
	const number = acomm.MaxPosts + 50
	for name, set := range map[string]func(*http.Transport){
		"more":     func(transport *http.Transport) { transport.MaxIdleConnsPerHost = number },
		"no limit": func(transport *http.Transport) { transport.MaxIdleConnsPerHost = 1 << 62 },
	} {
		t.Run(name, func(t *testing.T) {
			set(newTransport(t))
			var missing sync.WaitGroup
			missing.Add(number)
			sendNumbers(t, httpPeer(t, func(http.ResponseWriter, *http.Request) {
				missing.Done()
				missing.Wait()
			}), number)
		})
	}
}
