package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// patience is how long a test waits for what must happen. It is no measure of
// anything: reaching it is a failure.
const patience = 30 * time.Second

// during is a line after which a request is under way for a while.
const during = "3. A request that times out"

// noRaceDelay keeps programs with the race detector from sleeping at their end.
const noRaceDelay = "GORACE=atexit_sleep_ms=0"

// demo is a run of the program in a directory for temporary files of its own.
type demo struct {
	*exec.Cmd
	t      *testing.T
	tmp    string
	stdout *bufio.Reader
	stderr *os.File // ends when no process of the demo is left: all have inherited it
	shown  strings.Builder
}

// build makes the program, with the race detector if the test has it.
func build(t *testing.T) string {
	t.Helper()
	// What the test looks at decides whether go test takes an old result; it does
	// not see what go build looks at.
	for _, pattern := range []string{"*.go", "../../*.go", "../../go.mod"} {
		sources, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, source := range sources {
			_, err := os.Stat(source)
			require.NoError(t, err)
		}
	}
	args := []string{"build", "-o", filepath.Join(t.TempDir(), "demo")}
	info, _ := debug.ReadBuildInfo()
	for _, setting := range info.Settings {
		if setting.Key == "-race" && setting.Value == "true" {
			args = append(args, "-race")
		}
	}
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return args[2]
}

// start runs the program, in a process group of its own, as a shell does.
func start(t *testing.T, program, dir string, args ...string) *demo {
	t.Helper()
	d := &demo{Cmd: exec.Command(program, args...), t: t, tmp: shortDir(t)}
	d.Dir = dir
	d.Env = append(os.Environ(), "TMPDIR="+d.tmp, noRaceDelay)
	d.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := d.StdoutPipe()
	require.NoError(t, err)
	d.stdout = bufio.NewReader(stdout)
	stderr, w, err := os.Pipe()
	require.NoError(t, err)
	d.stderr, d.Stderr = stderr, w
	t.Cleanup(func() { stderr.Close() })
	require.NoError(t, d.Start())
	require.NoError(t, w.Close())
	hung := time.AfterFunc(patience, func() {
		t.Errorf("processes are left after %v", patience)
		_ = syscall.Kill(-d.Process.Pid, syscall.SIGKILL)
	})
	t.Cleanup(func() { hung.Stop() })
	return d
}

// shortDir is a directory whose path leaves room for the names of sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "d-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// until reads what the program shows up to a line that begins with the text.
func (d *demo) until(text string) {
	d.t.Helper()
	for {
		line, err := d.stdout.ReadString('\n')
		d.shown.WriteString(line)
		require.NoError(d.t, err, "no line %q in:\n%s", text, &d.shown)
		if strings.HasPrefix(line, text) {
			return
		}
	}
}

// end waits until all processes have ended and returns the exit status of the
// first one and the error output of all.
func (d *demo) end() (status int, stderr string) {
	d.t.Helper()
	_, err := io.Copy(&d.shown, d.stdout)
	require.NoError(d.t, err)
	require.NoError(d.t, d.stderr.SetReadDeadline(time.Now().Add(2*patience)))
	all, err := io.ReadAll(d.stderr)
	require.NoError(d.t, err, "a process is left; so far:\n%s%s", &d.shown, all)
	_ = d.Wait() // the state tells
	return d.ProcessState.ExitCode(), string(all)
}

// requireNothingLeft checks that no file is left, sockets in particular.
func (d *demo) requireNothingLeft() {
	d.t.Helper()
	var left []string
	require.NoError(d.t, filepath.WalkDir(d.tmp, func(path string, _ fs.DirEntry, err error) error {
		left = append(left, path)
		return err
	}))
	require.Equal(d.t, []string{d.tmp}, left)
}

// writeInput makes a directory with files of all kinds, and returns the content
// of the largest.
func writeInput(t *testing.T) (dir string, sample []byte) {
	t.Helper()
	dir = t.TempDir()
	sample = bytes.Repeat([]byte("sample "), 100_000)
	for name, content := range map[string][]byte{
		"largest":          sample,
		"empty":            nil,
		"two spaces here":  []byte("spaces"),
		"100%?#1&a=b.txt":  []byte("percent"),
		"new\nline":        []byte("line"),
		"sub/ünïcode":      []byte("unicode"),
		"sub/.hidden":      []byte("hidden"),
		".git/not/this":    []byte("git"),
		"not UTF-8 \xff":   []byte("bytes"),
		"not for everyone": []byte("secret"),
	} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, content, 0o600))
	}
	require.NoError(t, os.Chmod(filepath.Join(dir, "not for everyone"), 0))
	require.NoError(t, os.Symlink("largest", filepath.Join(dir, "link")))
	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	return dir, sample
}

func TestDemo_ShowsThatEverythingIsRight(t *testing.T) {
	input, sample := writeInput(t)
	d := start(t, build(t), "", input)
	status, stderr := d.end()
	shown := d.shown.String()
	require.Zero(t, status, "%s%s", shown, stderr)
	require.Empty(t, stderr)

	right := "8 files: size and SHA-256"
	if f, err := os.Open(filepath.Join(input, "not for everyone")); err != nil {
		right = "7 files: size and SHA-256"
		require.Contains(t, shown, "1 file: not readable, which the provider has answered with an error")
	} else { // a superuser's test
		require.NoError(t, f.Close())
	}
	for _, sentence := range []string{
		"It works on 8 files",
		"Left out: symbolic links and special files (2).",
		"Left out: files with a name that is not UTF-8, which JSON can't carry (1).",
		`Sent file.hash for "largest" to the coordinator's unix socket, accepted after`,
		"The success handler ran after",
		"no such file or directory",
		`refused after`,
		`nobody provides the task \"file.shred\"`,
		`with the error "response timeout"`,
		"All 8 were answered after",
		right,
		`Posted file.hash for "largest" to http://127.0.0.1:`,
		"The response was posted to http://127.0.0.1:",
		"The stream is at unix://",
		"/stream?addr=unix",
		"Everything shown here was right.",
		"All three processes have ended, and no socket file is left.",
	} {
		require.Contains(t, shown, sentence)
	}
	sum := sha256.Sum256(sample)
	require.Equal(t, 4, strings.Count(shown, "SHA-256 "+hex.EncodeToString(sum[:])), "over unix, HTTP and two streams:\n%s", shown)
	require.Equal(t, 4, strings.Count(shown, "The requester has read the file itself, and comes to the same."), "%s", shown)
	require.NotContains(t, shown, "WRONG")
	d.requireNothingLeft()
}

func TestDemo_TakesTheModuleByDefault(t *testing.T) {
	root, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	sub := filepath.Join(root, "examples", "other")
	require.NoError(t, os.MkdirAll(sub, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "go.mod"), []byte("module github.com/mistifyio/acomm\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(sub, "go.mod"), []byte("module example.com/other\n"), 0o600))
	d := start(t, build(t), sub)
	status, stderr := d.end()
	require.Zero(t, status, "%s%s", &d.shown, stderr)
	require.Contains(t, d.shown.String(), fmt.Sprintf("It works on 2 files, 59 bytes, in %q.", root))
	d.requireNothingLeft()
}

func TestDemo_LeavesNothingWhenInterrupted(t *testing.T) {
	program := build(t)
	input, _ := writeInput(t)
	for name, test := range map[string]struct {
		signal syscall.Signal
		group  bool // as a terminal does
		status int
	}{
		"SIGINT":                {syscall.SIGINT, false, 130},
		"SIGINT from terminal":  {syscall.SIGINT, true, 130},
		"SIGTERM":               {syscall.SIGTERM, false, 143},
		"SIGHUP, terminal gone": {syscall.SIGHUP, true, 129},
	} {
		t.Run(name, func(t *testing.T) {
			if signal.Ignored(test.signal) {
				t.Skip("ignored here, as under nohup, and so it is by the demo")
			}
			d := start(t, program, "", input)
			d.until(during)
			pid := d.Process.Pid
			if test.group {
				pid = -pid
			}
			require.NoError(t, syscall.Kill(pid, test.signal))
			status, stderr := d.end()
			require.Equal(t, test.status, status, "%s%s", &d.shown, stderr)
			// Nothing of a process that was killed, or of a socket that was left.
			require.Equal(t, "demo: ended by a signal ("+test.signal.String()+")\n", stderr)
			require.NotContains(t, d.shown.String(), "WRONG")
			d.requireNothingLeft()
		})
	}
}

func TestDemo_LeavesNothingWhenKilled(t *testing.T) {
	input, _ := writeInput(t)
	d := start(t, build(t), "", input)
	d.until(during)
	require.NoError(t, d.Process.Kill())
	_, stderr := d.end() // all processes have ended
	require.Equal(t, syscall.SIGKILL, d.ProcessState.Sys().(syscall.WaitStatus).Signal(), "%s%s", &d.shown, stderr)
	d.requireNothingLeft()
}

func TestDemo_FailsWithoutProvider(t *testing.T) {
	input, _ := writeInput(t)
	d := start(t, build(t), "", input)
	d.until(during)
	found := regexp.MustCompile(`the provider (\d+)\.`).FindStringSubmatch(d.shown.String())
	require.NotNil(t, found, "%s", &d.shown)
	provider, err := strconv.Atoi(found[1])
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(provider, syscall.SIGKILL))
	status, stderr := d.end()
	require.Equal(t, 1, status, "%s%s", &d.shown, stderr)
	require.Contains(t, stderr, "demo: ended before the requester: provider: signal: killed\n")
	d.requireNothingLeft()
}

func TestDemo_FailsWhenItsOutputIsLost(t *testing.T) {
	input, _ := writeInput(t)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	require.NoError(t, r.Close())
	defer w.Close()
	cmd := exec.Command(build(t), input)
	tmp := shortDir(t)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, noRaceDelay)
	cmd.Stdout = w
	require.Error(t, cmd.Run())
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	(&demo{t: t, tmp: tmp}).requireNothingLeft()
}

func TestDemo_ExplainsWrongArguments(t *testing.T) {
	program := build(t)
	input, _ := writeInput(t)
	for name, test := range map[string]struct {
		args   []string
		status int
		says   string
	}{
		"missing file":    {[]string{filepath.Join(input, "missing")}, 2, "missing: no such file or directory\n"},
		"no file in it":   {[]string{t.TempDir()}, 2, "there is no file to work on in"},
		"pipe":            {[]string{filepath.Join(input, "pipe")}, 2, "is neither a file nor a directory"},
		"empty":           {[]string{""}, 2, "is empty"},
		"too many":        {[]string{input, input}, 2, "one file or directory at most, not 2"},
		"unknown flag":    {[]string{"-x"}, 2, "-x"},
		"none, no module": {nil, 2, "name a file or directory"},
		"help":            {[]string{"-h"}, 0, "Usage: demo [FILE|DIR]"},
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t, program, t.TempDir(), test.args...)
			status, stderr := d.end()
			require.Equal(t, test.status, status)
			if status == 0 {
				require.Contains(t, d.shown.String(), test.says)
				require.Empty(t, stderr)
			} else {
				require.Contains(t, stderr, test.says)
				require.Contains(t, stderr, "demo -h shows the usage")
				require.Empty(t, d.shown.String())
			}
			d.requireNothingLeft()
		})
	}
}

// startCoordinator runs a coordinator in this process and returns its URL over
// HTTP. It is stopped with the test.
func startCoordinator(t *testing.T, dir string) *url.URL {
	t.Helper()
	front, err := url.Parse(startRole(t, dir, coordinate))
	require.NoError(t, err)
	return front
}

// startProvider runs a provider in this process. It is stopped with the test.
func startProvider(t *testing.T, dir string) {
	t.Helper()
	startRole(t, dir, provide)
}

func startRole(t *testing.T, dir string, role func(context.Context, string, func(string) error) error) string {
	t.Helper()
	ready, ended := make(chan string, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		err := role(ctx, dir, func(line string) error { ready <- line; return nil })
		close(ready)
		ended <- err
	}()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	line, ok := <-ready
	require.True(t, ok, "ended before it was ready")
	return line
}

// startTask serves one task until the test ends.
func startTask(t *testing.T, dir, name string, do task) {
	t.Helper()
	listener := acomm.NewUnixListener(filepath.Join(taskDir(dir, name), "test.sock"), 0)
	require.NoError(t, listener.Start())
	var serving sync.WaitGroup
	serving.Go(func() { serveTask(context.Background(), listener, name, do) })
	t.Cleanup(func() {
		listener.Stop(0)
		serving.Wait()
	})
}

// startRequester returns a show whose output is thrown away.
func startRequester(t *testing.T, dir string, front *url.URL) *show {
	t.Helper()
	input, _ := writeInput(t)
	in, err := readInput(input)
	require.NoError(t, err)
	r, err := newRequester(dir)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return &show{requester: r, dir: dir, unix: coordinatorURL(dir), http: front, in: in, out: io.Discard}
}

// A demo that is always content shows nothing.
func TestShow_FindsWhatIsWrong(t *testing.T) {
	dir := shortDir(t)
	s := startRequester(t, dir, startCoordinator(t, dir))
	streams, err := acomm.NewTracker(filepath.Join(dir, "streams.sock"), nil, 0)
	require.NoError(t, err)
	require.NoError(t, streams.Start())
	t.Cleanup(streams.Stop)

	startTask(t, dir, "file.hash", func(context.Context, *acomm.Request) (any, *url.URL, error) {
		return fileHash{Size: s.in.sample.size, SHA256: strings.Repeat("0", 64)}, nil, nil
	})
	startTask(t, dir, "file.read", func(context.Context, *acomm.Request) (any, *url.URL, error) {
		other := bytes.Repeat([]byte("x"), int(s.in.sample.size))
		stream, err := streams.NewStreamUnix(dir, io.NopCloser(bytes.NewReader(other)))
		return nil, stream, err
	})
	startTask(t, dir, "sleep", func(context.Context, *acomm.Request) (any, *url.URL, error) {
		return nil, nil, errors.New("not tired")
	})
	ctx := t.Context()
	require.ErrorContains(t, s.showSuccess(ctx), "the file has")
	require.ErrorContains(t, s.showHTTP(ctx), "the file has")
	require.ErrorContains(t, s.showError(ctx), "the error handler should have run")
	require.ErrorContains(t, s.showTimeout(ctx), "should have timed out")
	require.ErrorContains(t, s.showFanOut(ctx), "8 wrong responses")
	require.ErrorContains(t, s.showUnixStream(ctx), "the file has")
	require.ErrorContains(t, s.showHTTPStream(ctx), "the file has")
	require.ErrorContains(t, s.run(ctx), "6. A file as a stream")
}

func TestCoordinator_RefusesWhatItCantForward(t *testing.T) {
	dir := shortDir(t)
	front := startCoordinator(t, dir)
	s := startRequester(t, dir, front)
	// The socket of a provider that was killed.
	require.NoError(t, os.MkdirAll(taskDir(dir, "dead"), 0o700))
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: filepath.Join(taskDir(dir, "dead"), "test.sock")}))
	require.NoError(t, syscall.Close(fd))

	for task, says := range map[string]string{
		"unknown":         `nobody provides the task "unknown"`,
		"dead":            "connection refused",
		"../coordinator":  "is not the name of a task",
		"..":              "is not the name of a task",
		".":               "is not the name of a task",
		"/":               "is not the name of a task",
		"file.hash/../..": "is not the name of a task",
	} {
		// Twice the same id: a request that was refused is not tracked any more.
		req, err := acomm.NewRequest(task, s.httpHook.String(), nil, nil, nil)
		require.NoError(t, err)
		for range 2 {
			for _, addr := range []*url.URL{s.unix, front} {
				require.ErrorContains(t, acomm.Send(addr, req), says, "task %q to %s", task, addr)
			}
		}
	}
	require.ErrorContains(t, acomm.Send(front, &acomm.Request{ID: "1"}), "400 Bad Request: request 1 has no task")
	require.ErrorContains(t, acomm.Send(s.unix, &acomm.Request{ID: "1"}), "request 1 has no task")
}

func TestRequester_EndsWithItsContext(t *testing.T) {
	logrus.SetOutput(io.Discard) // of the responses that come too late
	t.Cleanup(func() { logrus.SetOutput(os.Stderr) })
	dir := shortDir(t)
	s := startRequester(t, dir, startCoordinator(t, dir))
	for name, show := range map[string]func(context.Context) error{"one": s.showSuccess, "many": s.showFanOut} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			startTask(t, dir, "file.hash", func(context.Context, *acomm.Request) (any, *url.URL, error) {
				cancel() // with requests under way, and with many others not yet sent
				<-t.Context().Done()
				return nil, nil, errStopping
			})
			ended := make(chan error, 1)
			go func() { ended <- show(ctx) }()
			select {
			case err := <-ended:
				require.ErrorIs(t, err, context.Canceled)
			case <-time.After(patience):
				require.FailNow(t, "still waiting for responses")
			}
			require.Zero(t, s.tracker.NumRequests())
		})
	}
}

// Everything that is shown is right, but nobody sees it.
func TestShow_FailsWhenItsOutputIsLost(t *testing.T) {
	dir := shortDir(t)
	s := startRequester(t, dir, startCoordinator(t, dir))
	startProvider(t, dir)
	r, w := io.Pipe()
	require.NoError(t, r.Close())
	s.out = w
	require.Equal(t, io.ErrClosedPipe, s.run(t.Context()))
}
