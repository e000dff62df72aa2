package acomm_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func init() {
	roles["session provider"] = sessionProvider
	roles["session requester"] = sessionRequester
}

// sessionCallers is how many goroutines of the requester send at a time.
const sessionCallers = 16

// appendLine writes a line with one system call, so it is there or not. All are of
// 16 bytes: the write of a process that is killed can end where a page of the file
// does, and what is written next would continue the line.
func appendLine(f *os.File, id int) {
	_, err := fmt.Fprintf(f, "%15d\n", id)
	orExit(err)
}

func openLog(path string) *os.File {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	orExit(err)
	return f
}

// readLog returns how often each id is in the file.
func readLog(t testing.TB, path string) map[int]int {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	ids := make(map[int]int)
	for line := range strings.Lines(string(data)) {
		id, err := strconv.Atoi(strings.TrimSpace(line))
		require.NoError(t, err)
		ids[id]++
	}
	return ids
}

// sessionProvider notes each message in a file, then acknowledges it.
func sessionProvider() {
	log := openLog(filepath.Join(os.Getenv("DIR"), "handled"))
	ul := acomm.NewUnixListener(filepath.Join(os.Getenv("DIR"), "s.sock"), 0)
	orExit(ul.Start())
	fmt.Println("ready")
	for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
		go func(conn net.Conn) {
			defer ul.DoneConn(conn)
			var n note
			if acomm.UnmarshalConnData(conn, &n) != nil {
				return
			}
			appendLine(log, n.ID)
			_ = acomm.SendConnData(conn, &acomm.Response{})
		}(conn)
	}
}

// sessionRequester sends messages and notes those that were acknowledged.
func sessionRequester() {
	ul := acomm.NewUnixListener("", 0) // so that there are sessions
	orExit(ul.Start())
	log := openLog(filepath.Join(os.Getenv("DIR"), "acknowledged"))
	first, err := strconv.Atoi(os.Getenv("FIRST"))
	orExit(err)
	var next atomic.Int64
	var senders sync.WaitGroup
	for range sessionCallers {
		senders.Go(func() {
			for {
				id := first + int(next.Add(1))
				orExit(acomm.Send(unixURL(os.Getenv("SERVICE")), note{ID: id}))
				appendLine(log, id)
			}
		})
	}
	senders.Wait()
}

// A provider is killed in the middle of its work, again and again: of each message
// is known what became of it, and none is handled twice.
func TestSession_KilledProvidersHandleNothingTwice(t *testing.T) {
	processWithSessions(t)
	rounds := 20
	if *long {
		rounds = 500
	}
	dir := shortDir(t)
	addr := unixURL(filepath.Join(dir, "s.sock"))
	var up gate // while a provider is there
	start := func() *process {
		p := startProcess(t, "session provider", "DIR="+dir)
		require.Equal(t, "ready", p.ReadLine())
		up.open()
		return p
	}
	provider := start()

	var (
		mu      sync.Mutex
		results = make(map[int]error)
		next    atomic.Int64
		acks    counter
		open    counter // rounds in which there was a session when it ended
		senders sync.WaitGroup
	)
	ctx, cancel := context.WithCancel(context.Background())
	defer func() {
		cancel()
		senders.Wait()
	}()
	for range sessionCallers {
		senders.Go(func() {
			for ctx.Err() == nil {
				id := int(next.Add(1))
				err := sendSoon(addr, note{ID: id}, patience)
				mu.Lock()
				results[id] = err
				mu.Unlock()
				if err == nil {
					acks.add()
				} else {
					up.wait(ctx)
				}
			}
		})
	}
	for range rounds {
		requireReached(t, &acks, acks.load()+1+rand.IntN(400), "acknowledgements")
		if acomm.SessionTo(addr.Path).Open {
			open.add()
		}
		up.shut()
		provider.Kill()
		require.ErrorContains(t, provider.Wait(), "killed")
		provider = start()
	}
	requireReached(t, &acks, acks.load()+100, "acknowledgements of the last one")
	cancel()
	within(t, async(senders.Wait), "the senders")

	handled := readLog(t, filepath.Join(dir, "handled"))
	var outcomes tally
	for id, err := range results {
		switch {
		case err == nil:
			require.Equal(t, 1, handled[id], "acknowledged")
			outcomes.add("acknowledged")
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
			require.Equal(t, 0, handled[id], "handled, but %v", err)
			outcomes.add("not sent")
		default:
			require.LessOrEqual(t, handled[id], 1, "handled twice")
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "it hung")
			require.NotEmpty(t, whySendFailed(err), "an error that does not say why: %v", err)
			outcomes.add(fmt.Sprintf("unknown, handled %d times", handled[id]))
		}
		delete(handled, id)
	}
	require.Empty(t, handled, "messages that nobody has sent")
	require.NotZero(t, open.load())
	t.Logf("killed %d times, %d with a session; %s", rounds, open.load(), &outcomes)
}

// A requester is killed in the middle of its work: what was acknowledged to it was
// handled, nothing twice, and the provider goes on without a trace of it.
func TestSession_KilledRequestersLeaveNothing(t *testing.T) {
	rounds := 10
	if *long {
		rounds = 300
	}
	dir := shortDir(t)
	s := startNotes(t, filepath.Join(dir, "s.sock"), 0, nil)
	openTo(t, s.URL())
	handled := func() (n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.ids)
	}
	before := openFiles(t)
	for round := range rounds {
		enough := handled() + 100 + rand.IntN(1000)
		requester := startProcess(t, "session requester", "DIR="+dir, "SERVICE="+s.URL().Path, fmt.Sprintf("FIRST=%d", (round+1)<<24))
		await(t, "messages", func() bool { return handled() >= enough })
		requester.Kill()
		require.ErrorContains(t, requester.Wait(), "killed")
		require.NoError(t, acomm.Send(s.URL(), note{ID: -1}))
	}
	await(t, "the end of their connections", func() bool { return openFiles(t) <= before+rounds }) // each process has a pipe
	within(t, async(func() { s.Stop(0) }), "Stop")
	within(t, s.served, "the end of serving")
	for id, n := range s.ids {
		require.True(t, n == 1 || id == -1, "%d handled %d times", id, n)
	}
	acknowledged := readLog(t, filepath.Join(dir, "acknowledged"))
	for id, n := range acknowledged {
		require.Equal(t, 1, n)
		require.Equal(t, 1, s.handled(id))
	}
	require.NotEmpty(t, acknowledged)
	t.Logf("killed %d times: handled %d, of them acknowledged %d", rounds, handled(), len(acknowledged))
}
