package acomm_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// Services whose descriptors run out, and whose socket files are taken away.

func init() {
	roles["fault few descriptors"] = faultFewDescriptors
	roles["fault service"] = faultService
}

const manyPeers = 300

// faultFewDescriptors is a service whose descriptors run out. It prints how long
// it took to log as often as it is told to that they have, and what that cost,
// and each request it handles.
func faultFewDescriptors() {
	number, err := strconv.Atoi(os.Getenv("LINES"))
	orExit(err)
	var lines counter
	logrus.SetOutput(writerFunc(func(p []byte) (int, error) {
		lines.add()
		return len(p), nil
	}))
	leaveFewDescriptors()

	stop := startFewDescriptors()
	fmt.Println("ready")
	reach(&lines, 1, commands)
	before, begin := cpuTime(), time.Now()
	reach(&lines, number, commands)
	fmt.Println(int64(time.Since(begin)), int64(cpuTime()-before))
	<-commands
	stop()
	fmt.Println("stopped")
}

// startFewDescriptors starts a provider, or a tracker that awaits responses.
func startFewDescriptors() (stop func()) {
	socket := os.Getenv("SOCKET")
	if os.Getenv("KIND") == "tracker" {
		tracker, err := acomm.NewTracker(socket, nil, patience)
		orExit(err)
		orExit(tracker.Start())
		handle := func(req *acomm.Request, resp *acomm.Response) {
			if resp.Error == nil {
				fmt.Println("handled", req.ID)
			} else {
				fmt.Println("failed", req.ID)
			}
		}
		for i := range manyPeers {
			orExit(tracker.TrackRequest(&acomm.Request{ID: strconv.Itoa(i), SuccessHandler: handle, ErrorHandler: handle}, 0))
		}
		return tracker.Stop
	}
	ul := acomm.NewUnixListener(socket, 0)
	orExit(ul.Start())
	go func() {
		for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
			go func() {
				_, _ = takeRequest(ul, conn, func(req *acomm.Request) { fmt.Println("handled", req.ID) })
			}()
		}
	}()
	return func() { ul.Stop(0) }
}

func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Hazard: with the descriptors used up the accept loop burnt a core, flooded the
// log, and did not come back.
func TestFault_ServiceOutOfDescriptorsIsQuietAndResumes(t *testing.T) {
	// It waits 5 ms after the first failure, then twice as long each time, up to
	// a second: so many lines in the log take 1.3 s and 10.3 s.
	lines := 9
	if *long {
		lines = 18
	}
	for _, kind := range []string{"listener", "tracker"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(shortDir(t), "s.sock")
			child := startProcess(t, "fault few descriptors", "KIND="+kind, "SOCKET="+path, "LINES="+strconv.Itoa(lines))
			require.Equal(t, "ready", child.ReadLine())
			var conns []net.Conn
			for range manyPeers {
				conn := dial(t, path)
				require.NoError(t, conn.SetDeadline(time.Now().Add(2*patience)))
				conns = append(conns, conn)
			}
			var window, cpu time.Duration
			_, err := fmt.Sscan(child.ReadLine(), &window, &cpu)
			require.NoError(t, err)
			require.Greater(t, window, time.Second, "for %d lines in the log", lines)
			require.Less(t, cpu, window/20, "CPU time")

			acknowledged := make(chan error, manyPeers)
			for i, conn := range conns {
				go func() {
					hook := unixURL(path)
					err := acomm.SendConnData(conn, &acomm.Request{ID: strconv.Itoa(i), Task: "test", ResponseHook: hook})
					ack := &acomm.Response{}
					if err == nil {
						err = acomm.UnmarshalConnData(conn, ack)
					}
					acknowledged <- errors.Join(err, ack.Error)
				}()
			}
			for range manyPeers {
				require.NoError(t, within(t, acknowledged, "the service to resume"))
			}
			var handled tally
			for range manyPeers {
				handled.add(child.ReadLine())
			}
			for i := range manyPeers {
				require.Equal(t, 1, handled.get("handled "+strconv.Itoa(i)))
			}
			require.NoError(t, child.WriteLine("stop"))
			require.Equal(t, "stopped", child.ReadLine(), "and nothing else was handled")
			t.Logf("%d lines in the log, %s of CPU time in %s; requests in: %d; acknowledgements out: %d; handlers run: %d",
				lines, cpu, window, manyPeers, manyPeers, handled.total())
		})
	}
}

// faultService is a listener or a tracker that is started and stopped as it is
// told, and counts what it has handled.
func faultService() {
	var handled atomic.Int64
	var start func() error
	var stop func()
	var addr string
	count := func(*acomm.Request, *acomm.Response) { handled.Add(1) }
	track := func(string) error { return nil }
	if os.Getenv("KIND") == "tracker" {
		tracker, err := acomm.NewTracker(os.Getenv("SOCKET"), nil, patience)
		orExit(err)
		start, stop, addr = tracker.Start, tracker.Stop, tracker.Addr()
		track = func(id string) error {
			return tracker.TrackRequest(&acomm.Request{ID: id, SuccessHandler: count}, 0)
		}
	} else {
		ul := acomm.NewUnixListener(os.Getenv("SOCKET"), 0)
		addr = ul.Addr()
		start = func() error {
			if err := ul.Start(); err != nil {
				return err
			}
			go func() {
				for conn := ul.NextConn(); conn != nil; conn = ul.NextConn() {
					go func() { _, _ = takeRequest(ul, conn, func(req *acomm.Request) { count(nil, nil) }) }()
				}
			}()
			return nil
		}
		stop = func() { ul.Stop(0) }
	}
	fmt.Println(addr)
	for command := range commands {
		var err error
		switch verb, id, _ := strings.Cut(command, " "); verb {
		case "start":
			err = start()
		case "track":
			err = track(id)
		case "stop":
			stop()
			fmt.Println("stopped after", handled.Load())
			continue
		}
		switch {
		case err == nil:
			fmt.Println("done")
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println("in use")
		default:
			fmt.Println(err)
		}
	}
}

// remoteService is a process in the role of faultService.
type remoteService struct {
	*process
	addr      string
	exchanges int
}

func startService(t testing.TB, kind, path string) *remoteService {
	t.Helper()
	s := &remoteService{process: startProcess(t, "fault service", "KIND="+kind, "SOCKET="+path)}
	s.addr = s.ReadLine()
	return s
}

func (s *remoteService) command(line, answer string) {
	s.t.Helper()
	require.NoError(s.t, s.WriteLine(line))
	require.Equal(s.t, answer, s.ReadLine())
}

// exchange sends the service what it handles, a request or a response.
func (s *remoteService) exchange() {
	s.t.Helper()
	s.exchanges++
	id := fmt.Sprint("exchange-", s.exchanges)
	s.command("track "+id, "done")
	require.NoError(s.t, acomm.Send(unixURL(s.addr), &acomm.Response{ID: id}))
}

// stop stops the service, which has handled what it was sent.
func (s *remoteService) stop() {
	s.t.Helper()
	s.command("stop", fmt.Sprint("stopped after ", s.exchanges))
}

// inUseOrDone is what starting again says: the socket that was renamed has its
// own path, where nobody is.
func (s *remoteService) inUseOrDone(how string) string {
	if how == "removed" {
		return "in use"
	}
	return "done"
}

func TestFault_RemovedDirectoryIsMadeAgain(t *testing.T) {
	for _, kind := range []string{"listener", "tracker"} {
		for _, given := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, path given %t", kind, given), func(t *testing.T) {
				t.Parallel()
				path := ""
				if given {
					path = filepath.Join(shortDir(t), "a", "b", "s.sock")
				}
				service := startService(t, kind, path)
				dir := filepath.Dir(service.addr)
				service.command("start", "done")
				service.exchange()
				held := dial(t, service.addr) // accepted or not, it does no harm
				require.NoError(t, os.RemoveAll(dir))
				require.ErrorIs(t, acomm.Send(unixURL(service.addr), &acomm.Response{}), fs.ErrNotExist)
				require.NoError(t, held.Close())
				service.stop()
				require.NoDirExists(t, dir)

				service.command("start", "done")
				service.exchange()
				service.stop()
				require.NoFileExists(t, service.addr)
				t.Logf("requests in: %d; acknowledgements out and handlers run: %d", service.exchanges, service.exchanges)
			})
		}
	}
}

func TestFault_ReplacedSocketFileIsItsOwners(t *testing.T) {
	for _, kind := range []string{"listener", "tracker"} {
		for _, how := range []string{"removed", "renamed over"} {
			t.Run(kind+", "+how, func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(shortDir(t), "s.sock")
				old := startService(t, kind, path)
				old.command("start", "done")
				old.exchange()

				// Somebody who knows no better makes room for the second process.
				second := startService(t, kind, path)
				second.command("start", "in use")
				if how == "removed" {
					require.NoError(t, os.Remove(path))
					second.command("start", "done")
				} else {
					second.CloseInput()
					second = startService(t, kind, path+".new")
					second.command("start", "done")
					require.NoError(t, os.Rename(path+".new", path))
					second.addr = path
				}
				second.exchange()
				old.stop() // not theirs by us
				second.exchange()
				old.command("start", "in use")

				// And the other way: a file that nobody of them made.
				require.NoError(t, os.Rename(path, path+".aside"))
				foreign, err := net.Listen("unix", path)
				require.NoError(t, err)
				second.stop() // not ours by them
				require.NoError(t, dial(t, path).Close())
				second.command("start", second.inUseOrDone(how))
				require.NoError(t, foreign.Close())
				t.Logf("requests in: %d; acknowledgements out and handlers run: %d",
					old.exchanges+second.exchanges, old.exchanges+second.exchanges)
			})
		}
	}
}
