package natshook_test

import (
	"io"
	"io/fs"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/stretchr/testify/require"
)

func TestServe_RefusesWhatItCannotDo(t *testing.T) {
	_, nc := pair(t)
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for _, subject := range []string{"", "a b", "a.*", ">", "a..b", "$SYS.x"} {
		_, err := natshook.Serve(nc, subject, "", h)
		require.ErrorIs(t, err, fs.ErrInvalid, subject)
	}
	_, err := natshook.Serve(nc, "a", "q q", h)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = natshook.Serve(nil, "a", "", h)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = natshook.Serve(nc, "a", "", nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
	nc.Close()
	_, err = natshook.Serve(nc, "a", "", h)
	require.ErrorIs(t, err, net.ErrClosed)
}

func TestServe_PanicAnswers500AndIsLoggedOnce(t *testing.T) {
	_, nc := pair(t)
	lines := captureLog(t)
	serve(t, nc, "panics", "", func(http.ResponseWriter, *http.Request) { panic("out of cheese") })
	serve(t, nc, "aborts", "", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	serve(t, nc, "exits", "", func(http.ResponseWriter, *http.Request) { runtime.Goexit() })
	require.ErrorContains(t, acomm.Send(natshook.URL("panics"), "x"), "answered 500 Internal Server Error: handler failed")
	require.Equal(t, 1, strings.Count(lines.String(), "out of cheese"))
	require.Equal(t, 1, strings.Count(lines.String(), "\n"))
	require.ErrorContains(t, acomm.Send(natshook.URL("aborts"), "x"), "answered 500")
	require.Equal(t, 1, strings.Count(lines.String(), "\n"))
	require.ErrorContains(t, acomm.Send(natshook.URL("exits"), "x"), "answered 500")
	require.ErrorContains(t, acomm.Send(natshook.URL("panics"), "x"), "answered 500")
}

// An answer whose header Status is 503 is NATS' way to say that nobody was there;
// were it taken for that, a forward would be handled twice.
func TestServe_StatusAndHeadersArrive(t *testing.T) {
	_, nc := pair(t)
	contentType := make(chan string, 10)
	serve(t, nc, "busy", "", func(w http.ResponseWriter, r *http.Request) {
		contentType <- r.Header.Get("Content-Type")
		w.Header().Set("Status", "503")
		w.Header().Set("Retry-After", "7")
		w.Header().Add("X-Two", "1")
		w.Header().Add("X-Two", "2")
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusTooManyRequests)
		w.WriteHeader(http.StatusOK)
	})
	answer, err := http.Post("nats:///busy", "text/plain", strings.NewReader("x"))
	require.NoError(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	require.Empty(t, body)
	require.Equal(t, "text/plain", within(t, contentType, "the request"))
	require.Equal(t, "429 Too Many Requests", answer.Status)
	require.Equal(t, "7", answer.Header.Get("Retry-After"))
	require.Equal(t, []string{"1", "2"}, answer.Header.Values("X-Two"))
}

func TestServe_AnswerOverTheLimitIsAnError(t *testing.T) {
	requester, nc := pair(t)
	limit := int(requester.MaxPayload())
	for subject, size := range map[string]int{"over": limit + 1, "with.headers": limit} {
		serve(t, nc, subject, "", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat(" ", size))
		})
		require.ErrorContains(t, acomm.Send(natshook.URL(subject), "x"), "answered 500 Internal Server Error: answer is too large")
	}
}

func TestServe_MessageWithoutReplyIsLoggedAndDropped(t *testing.T) {
	requester, nc := pair(t)
	lines := captureLog(t)
	got := make(chan string, 10)
	serve(t, nc, "tasks", "", func(_ http.ResponseWriter, r *http.Request) { got <- readID(r) })
	// Over the connection that Send uses: from another one it might arrive later.
	require.NoError(t, requester.Publish("tasks", []byte(`"lost"`)))
	require.NoError(t, acomm.Send(natshook.URL("tasks"), "asked"))
	require.Equal(t, "asked", within(t, got, "the request"))
	require.Equal(t, 1, strings.Count(lines.String(), "no reply subject"))
	require.NotContains(t, lines.String(), "lost")
}

func TestServe_SlowHandlersAreAnswered503BeyondTheBound(t *testing.T) {
	defer natshook.SetMaxHandlers(4)()
	_, nc := pair(t)
	started, release := make(chan struct{}, 100), make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	defer let()
	handled := newTally()
	serve(t, nc, "slow", "", func(_ http.ResponseWriter, r *http.Request) {
		handled.add(readID(r))
		started <- struct{}{}
		<-release
	})
	errs := make(chan error, 100)
	var wg sync.WaitGroup
	send := func(n int) {
		for range n {
			wg.Go(func() { errs <- acomm.Send(natshook.URL("slow"), newID()) })
		}
	}
	send(4)
	for range 4 {
		within(t, started, "a handler")
	}
	send(60)
	for range 60 {
		require.ErrorContains(t, within(t, errs, "Send"), "answered 503 Service Unavailable")
	}
	answer, err := http.Post("nats:///slow", "application/json", nil)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, "1", answer.Header.Get("Retry-After"))
	let()
	wg.Wait()
	for range 4 {
		require.NoError(t, within(t, errs, "Send"))
	}
	require.Equal(t, 4, handled.total())
	require.Equal(t, 1, handled.most())
	require.NoError(t, acomm.Send(natshook.URL("slow"), newID()), "turns are given back")
}

// A requester that has its answer finds the turn free for its next request.
func TestServe_TurnIsGivenBackBeforeTheAnswer(t *testing.T) {
	defer natshook.SetMaxHandlers(1)()
	_, nc := pair(t)
	serve(t, nc, "tasks", "", func(http.ResponseWriter, *http.Request) {})
	for range 2000 {
		require.NoError(t, acomm.Send(natshook.URL("tasks"), "x"))
	}
}

func TestServe_CloseWaitsForHandlersAndCancelsThem(t *testing.T) {
	_, nc := pair(t)
	started := make(chan struct{})
	var finished atomic.Bool
	closer := serve(t, nc, "tasks", "", func(_ http.ResponseWriter, r *http.Request) {
		close(started)
		<-r.Context().Done()
		for range 50 { // longer than a Close that does not wait
			_ = nc.Flush()
		}
		finished.Store(true)
	})
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(natshook.URL("tasks"), "x") }()
	within(t, started, "the handler")
	closed := make(chan error, 2)
	for range 2 {
		go func() { closed <- closer.Close() }()
	}
	for range 2 {
		require.NoError(t, within(t, closed, "Close"))
		require.True(t, finished.Load(), "Close waits for the handler")
	}
	require.NoError(t, within(t, sent, "Send"))
	require.Error(t, acomm.Send(natshook.URL("tasks"), "x"), "nobody serves it any more")
}
