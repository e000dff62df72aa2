package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// patience is how long a test waits for what must happen. It is no measure of
// anything: reaching it is a failure.
const patience = 20 * time.Second

// lifetime is how long a program may run, which is through several such waits. It ends
// before the time-outs of a minute do that call and gateway have by default.
const lifetime = 2 * patience

// acommBinary is the program under test, built once, with the race detector if
// the tests have it.
var acommBinary string

// hasRace says that the tests have the race detector.
var hasRace bool

// plainBinary is the program without the race detector, for tests with messages of
// 64 MiB: with it their JSON takes seconds, and a service gives a request 10.
var plainBinary = sync.OnceValues(func() (string, error) {
	if !hasRace {
		return acommBinary, nil
	}
	path := acommBinary + "-plain"
	return path, buildAcomm(path)
})

func buildAcomm(path string, flags ...string) error {
	args := append([]string{"build", "-ldflags=-w", "-o", path}, flags...) // -w: no debugger comes
	if out, err := exec.Command("go", append(args, ".")...).CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "acomm-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		acommBinary = filepath.Join(dir, "acomm")
		var flags []string
		info, _ := debug.ReadBuildInfo()
		for _, setting := range info.Settings {
			if setting.Key == "-race" && setting.Value == "true" {
				hasRace, flags = true, []string{"-race"}
			}
		}
		if err := buildAcomm(acommBinary, flags...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		// Those that are parallel wait for most of their time, and need no core for that.
		_ = flag.Set("test.parallel", "10") // unless it is given
		code := m.Run()
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}())
}

// acommCmd is the program with the arguments, in a new directory for temporary
// files, which is empty again when a test with it has ended well.
func acommCmd(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return acommCmdOf(t, acommBinary, args...)
}

// acommCmdOf is acommCmd of a binary.
func acommCmdOf(t *testing.T, binary string, args ...string) *exec.Cmd {
	t.Helper()
	tmp := shortDir(t)
	ctx, cancel := context.WithTimeout(context.Background(), lifetime)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.WaitDelay = patience
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "GORACE=atexit_sleep_ms=0")
	t.Cleanup(func() {
		if t.Failed() || errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
			return
		}
		left, err := os.ReadDir(tmp)
		require.NoError(t, err)
		require.Empty(t, left, "left in the directory for temporary files")
	})
	return cmd
}

// result is what a run of the program has come to.
type result struct {
	stdout, stderr string
	code           int
}

// runAcomm runs the program to its end.
func runAcomm(t *testing.T, args ...string) result {
	t.Helper()
	return runCmd(t, acommCmd(t, args...))
}

func runCmd(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// running is a run of the program that goes on; what it says is read, which is what
// it writes to standard error, and to standard output unless that is something else.
type running struct {
	*exec.Cmd
	t    *testing.T
	done chan struct{} // closed when it has ended

	mu    sync.Mutex // guards the fields below
	lines []string
	more  chan struct{} // closed when there are more lines, or no more to come
}

// startCmd starts the program. What is left of it is killed with the test.
func startCmd(t *testing.T, cmd *exec.Cmd) *running {
	t.Helper()
	r := &running{Cmd: cmd, t: t, done: make(chan struct{}), more: make(chan struct{})}
	stderr, w := io.Pipe()
	cmd.Stderr = w
	if cmd.Stdout == nil {
		cmd.Stdout = w
	}
	require.NoError(t, cmd.Start())
	var reading sync.WaitGroup
	reading.Go(func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			r.mu.Lock()
			r.lines = append(r.lines, lines.Text())
			close(r.more)
			r.more = make(chan struct{})
			r.mu.Unlock()
		}
		_, _ = io.Copy(io.Discard, stderr)
	})
	go func() {
		_ = cmd.Wait()
		_ = w.Close()
		reading.Wait()
		close(r.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-r.done
	})
	return r
}

// startAcomm starts the program with the arguments.
func startAcomm(t *testing.T, args ...string) *running {
	t.Helper()
	return startCmd(t, acommCmd(t, args...))
}

// waitLine waits until the program has said a line that contains the text,
// and returns it.
func (r *running) waitLine(text string) string {
	r.t.Helper()
	return r.waitLines(text, 1)
}

// waitLines waits until n lines contain the text, and returns the last of them.
func (r *running) waitLines(text string, n int) string {
	r.t.Helper()
	deadline := time.After(patience)
	for {
		r.mu.Lock()
		found, more := 0, r.more
		for _, line := range r.lines {
			if strings.Contains(line, text) {
				if found++; found == n {
					r.mu.Unlock()
					return line
				}
			}
		}
		r.mu.Unlock()
		select {
		case <-more:
		case <-r.done:
			require.Contains(r.t, r.said(), text, "it has ended: %v", r.ProcessState)
			return text
		case <-deadline:
			require.FailNow(r.t, "not said in time", "%q in:\n%s", text, r.said())
		}
	}
}

// said is what the program has said so far.
func (r *running) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

// signal sends the program a signal.
func (r *running) signal(sig syscall.Signal) {
	r.t.Helper()
	require.NoError(r.t, r.Process.Signal(sig))
}

// wait waits for the end of the program and returns its exit code.
func (r *running) wait() int {
	r.t.Helper()
	select {
	case <-r.done:
	case <-time.After(patience):
		require.FailNow(r.t, "not ended in time", r.said())
	}
	return r.ProcessState.ExitCode()
}

// watchDir watches the directory. What it returns waits until something is done
// there to a file with such a name, and returns its path.
func watchDir(t *testing.T, dir string) (wait func(op fsnotify.Op, pattern string) string) {
	t.Helper()
	watcher, err := fsnotify.NewWatcher()
	require.NoError(t, err)
	t.Cleanup(func() { _ = watcher.Close() })
	require.NoError(t, watcher.Add(dir))
	return func(op fsnotify.Op, pattern string) string {
		t.Helper()
		deadline := time.After(patience)
		for {
			select {
			case event := <-watcher.Events:
				if ok, _ := filepath.Match(pattern, filepath.Base(event.Name)); ok && event.Has(op) {
					return event.Name
				}
			case err := <-watcher.Errors:
				require.NoError(t, err)
			case <-deadline:
				require.FailNow(t, "not done in time", "%v of %s", op, pattern)
			}
		}
	}
}
