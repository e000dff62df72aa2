package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/fsnotify/fsnotify"
	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// callProvider is a unix socket that answers requests as the test says.
type callProvider struct {
	path     string
	listener *acomm.UnixListener
	tracker  *acomm.Tracker
}

// startCallProvider starts one. The function is given each request after it has been
// acknowledged, and returns the response; nil is none.
func startCallProvider(t *testing.T, answer func(p *callProvider, req *acomm.Request) *acomm.Response) *callProvider {
	t.Helper()
	p := &callProvider{path: filepath.Join(shortDir(t), "p.sock")}
	p.listener = acomm.NewUnixListener(p.path, 0)
	require.NoError(t, p.listener.Start())
	var err error
	p.tracker, err = acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	require.NoError(t, p.tracker.Start())
	var serving sync.WaitGroup
	serving.Go(func() {
		for conn := p.listener.NextConn(); conn != nil; conn = p.listener.NextConn() {
			serving.Go(func() {
				defer p.listener.DoneConn(conn)
				req := &acomm.Request{}
				if acomm.UnmarshalConnData(conn, req) != nil || acomm.SendConnData(conn, &acomm.Response{ID: req.ID}) != nil {
					return
				}
				if resp := answer(p, req); resp != nil {
					resp.ID = req.ID
					_ = req.Respond(resp) // the call may be gone
				}
			})
		}
	})
	t.Cleanup(func() {
		p.listener.Stop(time.Second)
		p.tracker.Stop()
		serving.Wait()
	})
	return p
}

// raw is a result.
func raw(text string) *json.RawMessage {
	data := json.RawMessage(text)
	return &data
}

// answerArgs answers with the arguments.
func answerArgs(_ *callProvider, req *acomm.Request) *acomm.Response {
	return &acomm.Response{Result: req.Args}
}

// streamOf answers with a stream, and what result says.
func streamOf(t *testing.T, result *json.RawMessage, source func() io.ReadCloser) func(*callProvider, *acomm.Request) *acomm.Response {
	return func(p *callProvider, _ *acomm.Request) *acomm.Response {
		addr, err := p.tracker.NewStreamUnix("", source())
		if err != nil {
			t.Error(err)
			return nil
		}
		return &acomm.Response{Result: result, StreamURL: addr}
	}
}

// stalled gives some data and then nothing until it is closed.
func stalled(data string) io.ReadCloser {
	r, w := io.Pipe()
	go func() { _, _ = w.Write([]byte(data)) }() // ends with Close
	return r
}

// failing gives some data and then an error.
func failing(data string) io.ReadCloser {
	r, w := io.Pipe()
	go func() { // ends with the error or Close
		_, _ = w.Write([]byte(data))
		_ = w.CloseWithError(errors.New("the disk is gone"))
	}()
	return r
}

func TestCall_ArgsInEachForm(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, answerArgs)
	file := filepath.Join(t.TempDir(), "args.json")
	require.NoError(t, os.WriteFile(file, []byte("{\n \"from\": \"file\"}\n"), 0o600))
	for _, test := range []struct {
		name  string
		args  []string
		stdin string
		want  string
	}{
		{"none", nil, "", `null`},
		{"JSON", []string{`{"a": [1, "x"]}`}, "", `{"a":[1,"x"]}`},
		{"JSON that looks like a pair", []string{`"a=b"`}, "", `"a=b"`},
		{"negative number", []string{"--", "-5"}, "", `-5`},
		{"file", []string{"@" + file}, "", `{"from":"file"}`},
		{"standard input", []string{"-"}, " [1, 2]\n", `[1,2]`},
		{"pair", []string{"name=joe"}, "", `{"name":"joe"}`},
		{"pairs", []string{"n=5", "big=12345678901234567890", "t=true", "s=x=y", `q="5"`, "o={\"k\": []}", "e=", "z=null"}, "",
			`{"n":5,"big":12345678901234567890,"t":true,"s":"x=y","q":"5","o":{"k":[]},"e":"","z":null}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := acommCmd(t, append([]string{"call", "unix://" + p.path, "echo"}, test.args...)...)
			cmd.Stdin = strings.NewReader(test.stdin)
			require.Equal(t, result{stdout: test.want + "\n"}, runCmd(t, cmd))
		})
	}
}

func TestCall_UsageIsExitCode2(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	target := "unix://" + filepath.Join(dir, "none.sock") // never reached
	bad := filepath.Join(dir, "bad.json")
	require.NoError(t, os.WriteFile(bad, []byte("{} {}"), 0o600))
	for name, args := range map[string][]string{
		"no task":            {target},
		"no arguments":       {},
		"unknown option":     {"--nope", target, "echo"},
		"empty task":         {target, ""},
		"no JSON, no pair":   {target, "echo", "hello"},
		"not all pairs":      {target, "echo", "a=1", "b"},
		"JSON and a pair":    {target, "echo", "{}", "a=1"},
		"no key":             {target, "echo", "=1"},
		"a key twice":        {target, "echo", "a=1", "a=2"},
		"no such file":       {target, "echo", "@" + filepath.Join(dir, "none")},
		"a file not JSON":    {target, "echo", "@" + bad},
		"stdin is not JSON":  {target, "echo", "-"},
		"scheme":             {"ftp://host/", "echo"},
		"no host":            {"http:///x", "echo"},
		"relative unix URL":  {"unix://x.sock", "echo"},
		"no subject":         {"nats://127.0.0.1:1/", "echo"},
		"time-out":           {"--timeout", "0s", target, "echo"},
		"time-out no number": {"--timeout", "soon", target, "echo"},
		"-o in no directory": {"-o", filepath.Join(dir, "none", "f"), target, "echo"},
		"-o a directory":     {"-o", dir, target, "echo"},
		"hook URL":           {"--hook-url", "10.0.0.5", "http://127.0.0.1:1/", "echo"},
		"hook address":       {"--hook-listen", "127.0.0.1", "http://127.0.0.1:1/", "echo"},
		"hook that is all":   {"--hook-listen", ":0", "http://127.0.0.1:1/", "echo"},
	} {
		t.Run(name, func(t *testing.T) {
			got := runAcomm(t, append([]string{"call"}, args...)...)
			require.Equal(t, exitUsage, got.code, got.stderr)
			require.True(t, strings.HasPrefix(got.stderr, "acomm call: "), got.stderr)
			require.Empty(t, got.stdout)
		})
	}
}

func TestCall_TaskErrorIsExitCode1(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response {
		return &acomm.Response{Error: errors.New("no such \x1b[31muser")}
	})
	require.Equal(t, result{stderr: "acomm call: no such \uFFFD[31muser\n", code: exitTask}, runAcomm(t, "call", p.path, "find"))
}

func TestCall_NotSentIsExitCode3(t *testing.T) {
	t.Parallel()
	got := runAcomm(t, "call", filepath.Join(shortDir(t), "none.sock"), "echo")
	require.Equal(t, exitNotSent, got.code, got.stderr)
	require.Contains(t, got.stderr, "no such file")

	refusing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"error": "not here"}`))
	}))
	defer refusing.Close()
	require.Equal(t, result{stderr: "acomm call: not here\n", code: exitNotSent}, runAcomm(t, "call", refusing.URL, "echo"))

	got = runAcomm(t, "call", "nats://127.0.0.1:1/tasks", "echo")
	require.Equal(t, exitNotSent, got.code, got.stderr)
}

// Hazard: a provider that answers and does not acknowledge; its result, which was
// taken, was dropped now and then.
func TestCall_ResultOfALostAcknowledgementIsNotDropped(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "p.sock")
	l := acomm.NewUnixListener(path, 0)
	require.NoError(t, l.Start())
	served := make(chan struct{})
	go func() {
		defer close(served)
		for conn := l.NextConn(); conn != nil; conn = l.NextConn() {
			req := &acomm.Request{}
			if acomm.UnmarshalConnData(conn, req) == nil {
				resp, _ := acomm.NewResponse(req, 42, nil, nil)
				_ = req.Respond(resp)
			}
			l.DoneConn(conn) // without a word
		}
	}()
	for range 10 {
		require.Equal(t, result{stdout: "42\n"}, runAcomm(t, "call", path, "echo"))
	}
	l.Stop(0)
	<-served
}

func TestCall_PipeThatNobodyReadsIsUsage(t *testing.T) {
	t.Parallel()
	pipe := filepath.Join(shortDir(t), "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	got := runAcomm(t, "call", "-o", pipe, filepath.Join(shortDir(t), "none.sock"), "echo")
	require.Equal(t, exitUsage, got.code, got.stderr)
}

func TestCall_TimeoutIsExitCode4(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response { return nil })
	got := runAcomm(t, "call", "--timeout", "50ms", p.path, "echo")
	require.Equal(t, result{stderr: "acomm call: no response to echo within 50ms\n", code: exitTimeout}, got)

	// Neither does a peer that does not even acknowledge hold the call up.
	silent, err := net.Listen("unix", filepath.Join(shortDir(t), "s.sock"))
	require.NoError(t, err)
	defer silent.Close()
	got = runAcomm(t, "call", "--timeout", "50ms", silent.Addr().String(), "echo")
	require.Equal(t, exitTimeout, got.code, got.stderr)
}

func TestCall_SignalEndsItCleanly(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	p := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response { asked <- struct{}{}; return nil })
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		r := startAcomm(t, "call", p.path, "echo") // its cleanup looks for what is left
		<-asked
		r.signal(sig)
		require.Equal(t, 128+int(sig), r.wait())
		require.Contains(t, r.said(), "interrupted: "+sig.String())
	}
}

func TestCall_RawIsAsItCame(t *testing.T) {
	t.Parallel()
	// Written by hand: the library would compact it.
	var once sync.Once
	var hook url.URL
	asked := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		if json.NewDecoder(r.Body).Decode(req) == nil {
			once.Do(func() {
				hook = *req.ResponseHook
				body := `{"id":"` + req.ID + `","result": {"a" :  1e3}}`
				go func() {
					defer close(asked)
					resp, err := http.Post(hook.String(), "application/json", strings.NewReader(body))
					if err == nil {
						_ = resp.Body.Close()
					}
				}()
			})
		}
	}))
	defer server.Close()
	require.Equal(t, result{stdout: `{"a" :  1e3}`}, runAcomm(t, "call", "--raw", server.URL, "echo"))
	<-asked
	http.DefaultClient.CloseIdleConnections()
}

func TestCall_HookURLIsWhatOthersSee(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := free.Addr().String()
	require.NoError(t, free.Close())
	_, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)
	hooks := make(chan *url.URL, 1)
	var answering sync.WaitGroup
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		if err := json.NewDecoder(r.Body).Decode(req); err != nil {
			t.Error(err)
			return
		}
		hooks <- req.ResponseHook
		answering.Go(func() { _ = req.Respond(&acomm.Response{ID: req.ID, Result: req.Args}) })
	}))
	defer server.Close()
	got := runAcomm(t, "call", "--hook-listen", addr, "--hook-url", "http://localhost:"+port+"/here", server.URL, "echo", "a=1")
	require.Equal(t, result{stdout: `{"a":1}` + "\n"}, got)
	require.Equal(t, "http://localhost:"+port+"/here", (<-hooks).String())
	answering.Wait()
	http.DefaultClient.CloseIdleConnections()
}

func TestCall_VerboseSaysWhatHappens(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, answerArgs)
	got := runAcomm(t, "call", "-v", p.path, "echo", "a=1")
	require.Zero(t, got.code)
	lines := strings.Split(strings.TrimSpace(got.stderr), "\n")
	require.Len(t, lines, 3, got.stderr)
	require.Regexp(t, `^\d\d:\d\d:\d\d\.\d{3} \+\d\.\d{3}s sending echo [0-9a-f-]{36} to unix://`+p.path+`, 7 bytes of arguments, hook unix:///`, lines[0])
	require.Regexp(t, `\+\d\.\d{3}s acknowledged$`, lines[1])
	require.Regexp(t, `\+\d\.\d{3}s response: 7 bytes of result$`, lines[2])
}

func TestCall_StreamToStdoutAndFile(t *testing.T) {
	t.Parallel()
	data := strings.Repeat("0123456789abcdef", 1<<16)
	p := startCallProvider(t, streamOf(t, raw(`{"size":1}`), func() io.ReadCloser { return io.NopCloser(strings.NewReader(data)) }))

	got := runAcomm(t, "call", p.path, "read")
	require.Equal(t, `{"size":1}`+"\n", got.stderr)
	require.True(t, got.stdout == data, "the stream on standard output")

	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	require.NoError(t, os.WriteFile(file, []byte("old"), 0o640))
	require.Equal(t, result{stdout: `{"size":1}` + "\n"}, runAcomm(t, "call", "-o", file, p.path, "read"))
	written, err := os.ReadFile(file)
	require.NoError(t, err)
	require.True(t, string(written) == data, "the stream in the file")
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), info.Mode().Perm())
	requireOnly(t, dir, "f")

	require.Equal(t, result{stdout: `{"size":1}` + "\n"}, runAcomm(t, "call", "-o", "/dev/null", p.path, "read"))
}

// requireOnly requires that the directory holds these names and no others.
func requireOnly(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	require.Equal(t, names, got)
}

func TestCall_FileMayBeALinkToNothingYet(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, nil, func() io.ReadCloser { return io.NopCloser(strings.NewReader("data")) }))
	dir := t.TempDir()
	deep := filepath.Join(dir, "deep", "er")
	require.NoError(t, os.MkdirAll(deep, 0o700))
	require.NoError(t, os.Symlink(deep, filepath.Join(dir, "way")))
	for link, target := range map[string]string{
		"absolute": filepath.Join(dir, "a"),
		"relative": "b",
		"link":     "relative2",
		"up":       "way/../c", // of the directory that the link way leads to
	} {
		require.NoError(t, os.Symlink(target, filepath.Join(dir, link)))
	}
	require.NoError(t, os.Symlink("deep/d", filepath.Join(dir, "relative2")))
	for link, want := range map[string]string{"absolute": "a", "relative": "b", "link": "deep/d", "up": "deep/c"} {
		file := filepath.Join(dir, link)
		require.Equal(t, result{}, runAcomm(t, "call", "-o", file, p.path, "read"), link)
		info, err := os.Lstat(file)
		require.NoError(t, err)
		require.Equal(t, os.ModeSymlink, info.Mode().Type(), "the link stays: %s", link)
		written, err := os.ReadFile(filepath.Join(dir, want))
		require.NoError(t, err)
		require.Equal(t, "data", string(written))
	}
	require.NoError(t, os.Symlink("circle", filepath.Join(dir, "circle")))
	got := runAcomm(t, "call", "-o", filepath.Join(dir, "circle"), p.path, "read")
	require.Equal(t, exitUsage, got.code, got.stderr)
	require.Equal(t, result{stdout: "data"}, runAcomm(t, "call", "-o", "/dev/stdout", p.path, "read"))
}

func TestCall_NameOfAFileMayBeAsLongAsNamesCanBe(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, nil, func() io.ReadCloser { return io.NopCloser(strings.NewReader("data")) }))
	dir, name := t.TempDir(), strings.Repeat("n", 255)
	got := runAcomm(t, "call", "-o", filepath.Join(dir, name), p.path, "read")
	require.Zero(t, got.code, got.stderr)
	requireOnly(t, dir, name)
}

func TestCall_LongDirectoryForTemporaryFiles(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("echo", "a.sock", gwEcho)
	p := startCallProvider(t, answerArgs)
	for _, target := range []string{g.url.String(), p.path} {
		cmd := acommCmd(t, "call", target, "echo", "1")
		long := filepath.Join(t.TempDir(), strings.Repeat("t", 100))
		require.NoError(t, os.Mkdir(long, 0o700))
		cmd.Env = append(cmd.Env, "TMPDIR="+long)
		require.Equal(t, result{stdout: "1\n"}, runCmd(t, cmd))
	}
	g.stop()
}

func TestCall_GoesThroughTheProxyOfTheEnvironment(t *testing.T) {
	t.Parallel()
	proxied := make(chan string, 1)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxied <- r.Host
		w.WriteHeader(http.StatusForbidden)
	}))
	defer proxy.Close()
	cmd := acommCmd(t, "call", "http://service.invalid/", "echo")
	cmd.Env = append(cmd.Env, "HTTP_PROXY="+proxy.URL)
	require.Equal(t, exitNotSent, runCmd(t, cmd).code)
	require.Equal(t, "service.invalid", gwWithin(t, proxied))
}

func TestCall_FileWithoutStreamIsAnError(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, answerArgs)
	dir := t.TempDir()
	got := runAcomm(t, "call", "-o", filepath.Join(dir, "f"), p.path, "echo", "1")
	require.Equal(t, result{stdout: "1\n", stderr: "acomm call: the response has no stream to write to the file of -o\n", code: exitTask}, got)
	requireOnly(t, dir)
}

func TestCall_CutOffStreamLeavesNoFile(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, nil, func() io.ReadCloser { return failing("half of it") }))
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	require.NoError(t, os.WriteFile(file, []byte("old"), 0o600))
	got := runAcomm(t, "call", "-o", file, p.path, "read")
	require.Equal(t, exitTask, got.code, got.stderr)
	require.NotEmpty(t, got.stderr)
	requireOnly(t, dir, "f")
	left, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "old", string(left))
}

func TestCall_InterruptedDownloadLeavesNoFile(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, nil, func() io.ReadCloser { return stalled("half of it") }))
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		dir := t.TempDir()
		wait := watchDir(t, dir)
		cmd := acommCmd(t, "call", "-v", "-o", filepath.Join(dir, "f"), p.path, "read")
		if sig == syscall.SIGKILL { // nothing can be removed then
			cmd.Env = append(cmd.Env, "TMPDIR="+shortDir(t))
		}
		r := startCmd(t, cmd)
		r.waitLine("stream at")
		part := wait(fsnotify.Write, ".acomm-*.part") // a part of it is there
		r.signal(sig)
		code := r.wait()
		if sig == syscall.SIGKILL {
			requireOnly(t, dir, filepath.Base(part))
			continue
		}
		require.Equal(t, 128+int(sig), code)
		requireOnly(t, dir)
	}
}

func TestCall_ReaderThatLeavesEndsItQuietly(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, nil, func() io.ReadCloser {
		r, w := io.Pipe()
		go func() { // ends with Close
			for _, err := w.Write(make([]byte, 1<<16)); err == nil; {
				_, err = w.Write(make([]byte, 1<<16))
			}
		}()
		return r
	}))
	cmd := acommCmd(t, "call", p.path, "read")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	r := startCmd(t, cmd)
	_, err = io.ReadFull(stdout, make([]byte, 10))
	require.NoError(t, err)
	require.NoError(t, stdout.Close())
	require.Equal(t, 128+int(syscall.SIGPIPE), r.wait())
	require.Empty(t, r.said())
}

func TestCall_FullDiskIsExitCode1(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, answerArgs)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	defer full.Close()
	cmd := acommCmd(t, "call", p.path, "echo", "1")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = full, &stderr
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, exitTask, exit.ExitCode())
	require.Contains(t, stderr.String(), "no space left")
}

// onTerminal runs the program with a terminal as its standard output and error,
// or the latter alone, and returns what has appeared on it.
func onTerminal(t *testing.T, stdout *bytes.Buffer, args ...string) string {
	t.Helper()
	cmd := acommCmd(t, args...)
	shown := cmdOnTerminal(t, cmd, stdout)
	require.Zero(t, cmd.ProcessState.ExitCode(), shown)
	return shown
}

// cmdOnTerminal runs a command on a terminal, and returns what that shows. See is called
// with all that is shown each time that something is added.
func cmdOnTerminal(t *testing.T, cmd *exec.Cmd, stdout *bytes.Buffer, see ...func(shown string)) string {
	t.Helper()
	master, slave, err := pty.Open()
	require.NoError(t, err)
	defer master.Close()
	require.NoError(t, pty.Setsize(master, &pty.Winsize{Rows: 24, Cols: 80}))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if stdout != nil {
		cmd.Stdout = stdout
	}
	require.NoError(t, cmd.Start())
	require.NoError(t, slave.Close())
	var shown bytes.Buffer
	buf := make([]byte, 4<<10)
	for { // ends with EIO when nobody has the terminal any more
		n, err := master.Read(buf)
		if err != nil {
			break
		}
		shown.Write(buf[:n])
		for _, f := range see {
			f(shown.String())
		}
	}
	_ = cmd.Wait()
	return shown.String()
}

func TestCall_TerminalIsShownColours(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response {
		return &acomm.Response{Error: errors.New("no such user")}
	})
	plain := regexp.MustCompile(`^\d\d:\d\d\S* \+\S+s sending [^\x1b]*acomm call: no such user\r?\n$`)
	for _, set := range []string{"TERM=xterm", "TERM=dumb", "NO_COLOR=1"} {
		cmd := acommCmd(t, "call", "-v", p.path, "find")
		cmd.Env = append(cmd.Env, "TERM=xterm", "NO_COLOR=", set)
		shown := cmdOnTerminal(t, cmd, nil)
		if set != "TERM=xterm" {
			require.Regexp(t, plain, shown, set)
			continue
		}
		require.Regexp(t, `^\x1b\[36m\d\d:\d\d\S* \+\S+s\x1b\[0m sending `, shown)
		require.Regexp(t, `\x1b\[31;1macomm call:\x1b\[\S*m no such user\r\n$`, shown)
	}
	cmd := acommCmd(t, "call", "-v", p.path, "find")
	cmd.Env = append(cmd.Env, "TERM=xterm", "NO_COLOR=")
	require.Regexp(t, plain, runCmd(t, cmd).stderr)
	var stdout bytes.Buffer // is no terminal, and has no say in this
	cmd = acommCmd(t, "call", "-v", p.path, "find")
	cmd.Env = append(cmd.Env, "TERM=xterm", "NO_COLOR=")
	require.Contains(t, cmdOnTerminal(t, cmd, &stdout), "\x1b[36m")
}

func TestCall_TerminalIsShownIndentedResult(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, answerArgs)
	require.Equal(t, "{\r\n  \"a\": 1,\r\n  \"b\": []\r\n}\r\n", onTerminal(t, nil, "call", p.path, "echo", "a=1", "b=[]"))
	require.Equal(t, `{"a":1}`, onTerminal(t, nil, "call", "--raw", p.path, "echo", "a=1"))
}

func TestCall_TerminalIsShownBar(t *testing.T) {
	t.Parallel()
	data := strings.Repeat("x", 3<<20)
	p := startCallProvider(t, streamOf(t, raw(`{"a":1}`), func() io.ReadCloser { return io.NopCloser(strings.NewReader(data)) }))
	file := filepath.Join(t.TempDir(), "f")
	shown := onTerminal(t, nil, "call", "-o", file, p.path, "read.it")
	require.Contains(t, shown, "{\r\n  \"a\": 1\r\n}\r\n")
	require.Contains(t, shown, "read.it: 3145728 bytes in ", "in the end")
	require.Contains(t, shown, "⠋ read.it", "the bar")

	var stdout bytes.Buffer
	shown = onTerminal(t, &stdout, "call", p.path, "read.it")
	require.Contains(t, shown, "read.it")
	require.True(t, stdout.String() == data)

	shown = onTerminal(t, nil, "call", p.path, "read.it")
	require.NotContains(t, shown, "read.it", "a bar in the middle of the data")
}

// Hazard: a call that was told nothing of its request, which may have arrived, ended
// as one that could be sent again.
func TestCall_LostAcknowledgementIsWaitedOut(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "p.sock")
	l := acomm.NewUnixListener(path, 0)
	require.NoError(t, l.Start())
	defer l.Stop(0)
	take := func() *acomm.Request { // without a word
		conn := l.NextConn()
		defer l.DoneConn(conn)
		req := &acomm.Request{}
		require.NoError(t, acomm.UnmarshalConnData(conn, req))
		return req
	}

	call := startAcomm(t, "call", path, "echo")
	req := take()
	call.waitLine("acknowledgement lost")
	resp, err := acomm.NewResponse(req, 42, nil, nil)
	require.NoError(t, err)
	require.NoError(t, req.Respond(resp))
	require.Zero(t, call.wait(), call.said())
	require.Contains(t, call.said(), "\n42")

	call = startAcomm(t, "call", "--timeout", "2s", path, "echo")
	take()
	require.Equal(t, exitTimeout, call.wait(), call.said())
	require.Regexp(t, `^acomm call: acknowledgement lost; .*EOF\nacomm call: no response to echo within 2s$`, call.said())
}

func TestCall_ExitCode3MeansThatTheRequestWasNotTaken(t *testing.T) {
	t.Parallel()
	answer := func(status int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, text)
		}
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		code    int
	}{
		"refused":     {answer(200, `{"error":"no"}`), exitNotSent},
		"redirected":  {answer(302, ""), exitNotSent},
		"bad request": {answer(400, ""), exitNotSent},
		"busy":        {answer(429, ""), exitNotSent},
		"draining": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
		}, exitNotSent},
		"a proxy's 503": {answer(503, ""), exitTimeout},
		"failed":        {answer(500, ""), exitTimeout},
		"unclear":       {answer(502, `{"error":"unclear"}`), exitTimeout},
		"no JSON":       {answer(200, "hello"), exitTimeout},
		"cut off":       {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, exitTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(test.handler)
			defer server.Close()
			got := runAcomm(t, "call", "--timeout", "2s", server.URL, "echo")
			require.Equal(t, test.code, got.code, got.stderr)
			require.Equal(t, test.code == exitTimeout, strings.Contains(got.stderr, "acknowledgement lost"), got.stderr)
		})
	}
	// There is a connection, and nothing could be sent on it.
	server := httptest.NewUnstartedServer(answer(200, ""))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	got := runAcomm(t, "call", server.URL, "echo")
	require.Equal(t, exitNotSent, got.code, got.stderr)
	require.Contains(t, got.stderr, "certificate")
}
