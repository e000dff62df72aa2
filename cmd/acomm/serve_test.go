package main

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// startServe starts the service and returns it and the path of its socket. The
// last of the options are the command.
func startServe(t *testing.T, options []string, command ...string) (*running, string) {
	t.Helper()
	return startServeOf(t, acommBinary, options, command...)
}

// startServeOf is startServe of a binary.
func startServeOf(t *testing.T, binary string, options []string, command ...string) (*running, string) {
	t.Helper()
	path := filepath.Join(shortDir(t), "s.sock")
	args := append([]string{"serve"}, options...)
	r := startCmd(t, acommCmdOf(t, binary, append(append(args, path, "--"), command...)...))
	require.Equal(t, "listening on unix://"+path, r.waitLine("listening on"))
	return r, path
}

// stop tells the service to end, which it does well.
func (r *running) stop() {
	r.t.Helper()
	r.signal(syscall.SIGTERM)
	require.Zero(r.t, r.wait(), r.said())
}

// sh is a command of the shell.
func sh(script string) []string { return []string{"sh", "-c", script} }

// fifo makes a named pipe.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "fifo")
	require.NoError(t, syscall.Mkfifo(path, 0o600))
	return path
}

func TestServe_ResultIsWhatTheProgramWrites(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ script, want string }{
		"JSON":         {`cat`, `{"a":1}`},
		"text":         {`printf 'two\nlines\n'`, `"two\nlines"`},
		"nothing":      {`true`, `""`},
		"not all JSON": {`echo 1; echo 2`, `"1\n2"`},
		"names":        {`cat >/dev/null; echo "$ACOMM_TASK ${#ACOMM_ID}"`, `"work 36"`},
		"no reader":    {`exec <&-; echo 1`, `1`},
	} {
		t.Run(name, func(t *testing.T) {
			r, path := startServe(t, nil, sh(test.script)...)
			require.Equal(t, result{stdout: test.want + "\n"}, runAcomm(t, "call", path, "work", "a=1"))
			r.stop()
		})
	}
}

func TestServe_ErrorIsLastLineOfStandardError(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ script, want string }{
		"line":      {`echo first >&2; printf 'the disk is full\n\n' >&2; exit 3`, "the disk is full"},
		"cut line":  {`printf 'no newline' >&2; exit 3`, "no newline"},
		"no line":   {`echo result; exit 3`, "exit status 3"},
		"signalled": {`kill -9 $$`, "signal: killed"},
	} {
		for _, options := range [][]string{nil, {"--stream"}} {
			script := test.script
			if options != nil {
				script = strings.Replace(script, "echo result;", "", 1)
			}
			t.Run(fmt.Sprint(name, options), func(t *testing.T) {
				r, path := startServe(t, options, sh(script)...)
				require.Equal(t, result{stderr: "acomm call: " + test.want + "\n", code: exitTask}, runAcomm(t, "call", path, "work"))
				r.stop()
			})
		}
	}
}

func TestServe_RefusesInTheAcknowledgement(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"--task", "work"}, "cat")
	got := runAcomm(t, "call", path, "play")
	require.Equal(t, result{stderr: "acomm call: the task here is \"work\", not \"play\"\n", code: exitNotSent}, got)
	for text, want := range map[string]string{
		`{"id":"1","responsehook":{"Scheme":"unix","Path":"/x"}}`:                "has no task",
		`{"task":"work","responsehook":{"Scheme":"unix","Path":"/x"}}`:           "has no id",
		`{"id":"1","task":"work"}`:                                               "has no response hook",
		`{"id":"1","task":"work","responsehook":{"Scheme":"gopher","Host":"x"}}`: "unsupported",
		`5`: "cannot unmarshal",
	} {
		conn, err := net.Dial("unix", path)
		require.NoError(t, err)
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		require.NoError(t, acomm.SendConnData(conn, raw(text)))
		resp := &acomm.Response{}
		require.NoError(t, acomm.UnmarshalConnData(conn, resp))
		require.ErrorContains(t, resp.Error, want)
		require.NoError(t, conn.Close())
	}
	r.stop()
}

func TestServe_UsageAndStartErrors(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "s.sock")
	for _, args := range [][]string{
		{}, {path}, {path, "cat"}, {path, "--"}, {"--", "cat"}, {path, "x", "--", "cat"}, {"", "--", "cat"},
		{path, "--", "no-such-program"}, {"--concurrency", "0", path, "--", "cat"}, {"--timeout", "-1s", path, "--", "cat"},
	} {
		got := runAcomm(t, append([]string{"serve"}, args...)...)
		require.Equal(t, exitUsage, got.code, "%q: %s", args, got.stderr)
	}
	r, path := startServe(t, nil, "cat")
	got := runAcomm(t, "serve", path, "--", "cat")
	require.Equal(t, exitTask, got.code)
	require.Contains(t, got.stderr, "address already in use")
	r.stop()
	require.NoFileExists(t, path)
}

// grandchild is a script whose grandchild holds the named pipe open; then it goes
// on as it is told.
func grandchild(pipe, then string) []string {
	return sh(`sh -c 'exec 3>"` + pipe + `"; echo up >&3; sleep 1000 & sleep 1000; wait' & ` + then)
}

// openGrandchild waits for the grandchild.
func openGrandchild(t *testing.T, pipe string) *os.File {
	t.Helper()
	// For both: so that opening does not wait, and a reader sees no end too early.
	f, err := os.OpenFile(pipe, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// requireDead waits until nobody has the named pipe open for writing any more.
func requireDead(t *testing.T, f *os.File) {
	t.Helper()
	require.NoError(t, f.SetReadDeadline(time.Now().Add(patience)))
	_, err := io.Copy(io.Discard, f) // to the end, which is when the last of them has closed it
	require.NoError(t, err, "a process has the pipe open")
}

func TestServe_TimeoutKillsGrandchildren(t *testing.T) {
	t.Parallel()
	pipe := fifo(t)
	f := openGrandchild(t, pipe)
	r, path := startServe(t, []string{"--timeout", "2s"}, grandchild(pipe, "wait")...)
	got := runAcomm(t, "call", path, "work")
	require.Equal(t, result{stderr: "acomm call: timed out after 2s\n", code: exitTask}, got)
	up := make([]byte, 3)
	_, err := f.Read(up)
	require.NoError(t, err, "the grandchild has run")
	require.Equal(t, "up\n", string(up))
	requireDead(t, f)
	r.stop()
}

func TestServe_WhatIsLeftBehindIsKilled(t *testing.T) {
	t.Parallel()
	pipe := fifo(t)
	f := openGrandchild(t, pipe)
	ready := fifo(t)
	r, path := startServe(t, nil, sh(`sh -c 'exec 3>"`+pipe+`"; echo >"`+ready+`"; sleep 1000' & read line <"`+ready+`"; echo 7`)...)
	require.Equal(t, result{stdout: "7\n"}, runAcomm(t, "call", path, "work"))
	requireDead(t, f)
	r.stop()
}

func TestServe_SecondSignalKillsPrograms(t *testing.T) {
	t.Parallel()
	pipe := fifo(t)
	f := openGrandchild(t, pipe)
	r, path := startServe(t, nil, grandchild(pipe, "echo running >&2; wait")...)
	call := startAcomm(t, "call", path, "work")
	r.waitLine("running")
	r.signal(syscall.SIGTERM)
	r.waitLine("finishing the acknowledged tasks")
	r.signalUntilEnd(syscall.SIGTERM)
	require.Equal(t, exitTask, r.wait())
	require.Equal(t, exitTask, call.wait())
	require.Equal(t, "acomm call: the service was stopped", call.said())
	requireDead(t, f)
	require.NoFileExists(t, path)
}

func TestServe_SignalDrains(t *testing.T) {
	t.Parallel()
	gate := fifo(t)
	r, path := startServe(t, []string{"--concurrency", "1"}, sh(`echo running >&2; read line <"`+gate+`"; cat`)...)
	running := startAcomm(t, "call", path, "work", "1")
	r.waitLine("running")
	waiting := startAcomm(t, "call", "-v", path, "work", "2")
	waiting.waitLine("acknowledged")
	wait := watchDir(t, filepath.Dir(path))
	r.signal(syscall.SIGTERM)
	r.waitLine("finishing the acknowledged tasks")
	wait(fsnotify.Remove, filepath.Base(path))
	require.Equal(t, exitNotSent, runAcomm(t, "call", path, "work").code)
	openGate(t, gate, 1)
	require.Zero(t, running.wait())
	r.waitLines("running", 2)
	openGate(t, gate, 1)
	require.Zero(t, waiting.wait())
	require.Zero(t, r.wait())
	require.Equal(t, "1", running.said())
}

// Hazard: a service under nohup ends with its terminal.
func TestServe_IgnoredSIGHUPStaysIgnored(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "s.sock")
	serve := acommCmd(t, "serve", path, "--", "cat")
	serve.Args = append([]string{"sh", "-c", `trap "" HUP; exec "$0" "$@"`}, serve.Args...)
	var err error
	serve.Path, err = exec.LookPath("sh")
	require.NoError(t, err)
	r := startCmd(t, serve)
	r.waitLine("listening on")
	r.signal(syscall.SIGHUP)
	require.Equal(t, result{stdout: "1\n"}, runAcomm(t, "call", path, "work", "1"))
	r.stop()
	require.NotContains(t, r.said(), "hangup")
	require.Contains(t, r.said(), "terminated: finishing")
}

// openGate lets programs that wait at the named pipe go on, n of them.
func openGate(t *testing.T, gate string, n int) {
	t.Helper()
	for range n {
		f, err := os.OpenFile(gate, os.O_RDWR, 0) // does not wait for a reader
		require.NoError(t, err)
		_, err = f.WriteString("go\n")
		require.NoError(t, err)
		t.Cleanup(func() { f.Close() }) // not before: what is in a pipe nobody has goes
	}
}

func TestServe_ConcurrencyIsKept(t *testing.T) {
	t.Parallel()
	gate := fifo(t)
	r, path := startServe(t, []string{"--concurrency", "2"}, sh(`echo running >&2; read line <"`+gate+`"; cat`)...)
	var calls []*running
	for i := range 5 {
		calls = append(calls, startAcomm(t, "call", "-v", path, "work", fmt.Sprint(i)))
	}
	for _, call := range calls {
		call.waitLine("acknowledged") // at once, whether it runs or waits
	}
	r.waitLines("running", 2)
	require.Equal(t, 2, strings.Count(r.said(), "running"))
	for i := range 3 { // one ends, one starts
		openGate(t, gate, 1)
		r.waitLines("running", 3+i)
		require.Equal(t, 3+i, strings.Count(r.said(), "running"))
	}
	openGate(t, gate, 2)
	for _, call := range calls {
		require.Zero(t, call.wait(), call.said())
	}
	r.stop()
}

func TestServe_StreamIsWhatTheProgramWrites(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"--stream"}, sh(`cat; head -c 3000000 /dev/zero`)...)
	got := runAcomm(t, "call", path, "work", "a=1")
	require.Zero(t, got.code, got.stderr)
	require.Empty(t, got.stderr)
	require.True(t, got.stdout == `{"a":1}`+"\n"+strings.Repeat("\x00", 3000000))
	r.stop()

	r, path = startServe(t, []string{"--stream"}, "true")
	require.Equal(t, result{}, runAcomm(t, "call", path, "work"))
	r.stop()
}

// Hazard: a process that the program has left behind holds the stream open, and so
// the call and the place.
func TestServe_StreamEndsWithTheProgram(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		timeout string
		script  string
		late    string // what the process does when the program has ended
		want    string
	}{
		"no byte":       {"0s", "exit", "", ""},
		"some":          {"0s", "echo data", "", "data\n"},
		"with time-out": {"2s", "echo data", "", "data\n"},
		"late":          {"2s", "exit", "echo late;", "late\n"},
		"in the rest":   {"20s", "exit", "sleep 2.5; echo late; exit;", "late\n"}, // after pipeGrace
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ready, stop := fifo(t), fifo(t)
			gate, err := os.OpenFile(stop, os.O_RDWR, 0)
			require.NoError(t, err)
			defer gate.Close() // ends what has escaped
			escape := `setsid sh -c 'echo >"` + ready + `"; while kill -0 '$$'; do sleep .01; done; ` + test.late +
				` read line <"` + stop + `"' 2>/dev/null & read line <"` + ready + `"; `
			r, path := startServe(t, []string{"--stream", "--concurrency", "1", "--timeout", test.timeout}, sh(escape+test.script)...)
			for range 2 {
				require.Equal(t, result{stdout: test.want}, runAcomm(t, "call", path, "work"))
			}
			r.stop()
			_, err = gate.WriteString("end\nend\n")
			require.NoError(t, err)
		})
	}
}

// Hazard: what is in the pipe when the waiting for more is over is lost to a slow
// reader, who takes the stream for complete.
func TestServe_SlowReaderGetsAllOfAStreamThatIsHeldOpen(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer w.Close() // as an escaped process does
	data := strings.Repeat("x", 60000)
	_, err = w.WriteString(data)
	require.NoError(t, err)
	p := &program{ended: make(chan struct{})}
	close(p.ended) // well
	require.NoError(t, r.SetReadDeadline(time.Unix(1, 0)))
	src := &programPipe{File: r, program: p, left: maxPipe}
	got, err := io.ReadAll(src)
	require.NoError(t, err)
	require.True(t, string(got) == data)
	src.left = 3 // of a process that goes on writing
	_, err = w.WriteString("12345")
	require.NoError(t, err)
	got, err = io.ReadAll(src)
	require.NoError(t, err)
	require.Equal(t, "123", string(got))
	require.NoError(t, src.Close())
	_, err = src.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)
}

func TestServe_StreamOfFailingProgramIsCutOff(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"--stream"}, sh(`head -c 100000 /dev/zero; echo the tape is torn >&2; exit 1`)...)
	file := filepath.Join(t.TempDir(), "f")
	got := runAcomm(t, "call", "-o", file, path, "work")
	require.Equal(t, exitTask, got.code)
	require.NoFileExists(t, file)
	r.stop()
}

func TestServe_ReaderThatLeavesEndsTheProgram(t *testing.T) {
	t.Parallel()
	pipe := fifo(t)
	f := openGrandchild(t, pipe)
	r, path := startServe(t, []string{"--stream", "--concurrency", "1"}, sh(`exec 3>"`+pipe+`"; echo data; sleep 1000`)...)
	call := startAcomm(t, "call", path, "work")
	call.waitLine("data")
	call.signal(syscall.SIGINT)
	require.Equal(t, 130, call.wait())
	requireDead(t, f)
	r.stop()
}

func TestServe_ResultOverTheLimitIsAnError(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, nil, sh(`head -c 70000000 /dev/zero`)...)
	got := runAcomm(t, "call", path, "work")
	require.Equal(t, exitTask, got.code)
	require.Contains(t, got.stderr, "serve it with --stream")
	r.stop()
}

// Hazard: a stream that stands still holds the end of the service up: its program
// is silent, or its reader takes nothing, also while a request waits for its place.
// It takes the 10 s that a stream may stand still, so all are signalled first.
func TestServe_StalledStreamDoesNotHoldTheEndUp(t *testing.T) {
	t.Parallel()
	var checks []func()
	for _, test := range []struct {
		script string
		reads  bool
		waits  bool // a second request waits for its turn
	}{
		{script: "echo data; sleep 1000", reads: true},
		{script: "echo data; sleep 1000 & sleep 1000; wait", reads: true},
		{script: "yes data"},
		{script: `if [ "$(cat)" = 2 ]; then echo second; else echo data; sleep 1000; fi`, reads: true, waits: true},
	} {
		pipe := fifo(t)
		f := openGrandchild(t, pipe)
		r, path := startServe(t, []string{"--stream", "--concurrency", "1"}, sh(`exec 3>"`+pipe+`"; `+test.script)...)
		conn, err := net.Dial("unix", streamAt(t, path, "1").Path)
		require.NoError(t, err)
		defer conn.Close()
		_, err = conn.Write([]byte{0})
		require.NoError(t, err)
		_, err = io.ReadFull(conn, make([]byte, 5)) // it is claimed
		require.NoError(t, err)
		var waiting *running
		if test.waits {
			waiting = startAcomm(t, "call", "-v", path, "work", "2")
			waiting.waitLine("acknowledged")
		}
		r.signal(syscall.SIGTERM)
		checks = append(checks, func() {
			if test.reads {
				_, err := io.Copy(io.Discard, conn)
				require.ErrorIs(t, err, syscall.ECONNRESET, "cut off, not complete")
			}
			if waiting != nil {
				require.Zero(t, waiting.wait(), waiting.said())
				require.Contains(t, waiting.said(), "second")
			}
			require.Zero(t, r.wait(), "%s: %s", test.script, r.said())
			requireDead(t, f)
		})
	}
	// One that has not written anything does not stand still: it is waited for.
	gate := fifo(t)
	r, path := startServe(t, []string{"--stream"}, sh(`echo running >&2; read line <"`+gate+`"; echo late`)...)
	call := startAcomm(t, "call", path, "work")
	r.waitLine("running")
	r.signal(syscall.SIGTERM)
	checks = append(checks, func() {
		openGate(t, gate, 1)
		require.Zero(t, call.wait(), call.said())
		require.Equal(t, "late", call.said())
		require.Zero(t, r.wait(), r.said())
	})
	for _, check := range checks {
		check()
	}
}

// streamAt calls the task and returns the URL of the stream in its response.
func streamAt(t *testing.T, path, args string) *url.URL {
	t.Helper()
	tracker, err := acomm.NewTracker("", nil, patience)
	require.NoError(t, err)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	responses := make(chan *acomm.Response, 1)
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest("work", tracker.URL().String(), raw(args), handle, handle)
	require.NoError(t, err)
	require.NoError(t, tracker.TrackRequest(req, patience))
	require.NoError(t, acomm.Send(&url.URL{Scheme: "unix", Path: path}, req))
	resp := <-responses
	require.NoError(t, resp.Error)
	require.NotNil(t, resp.StreamURL)
	return resp.StreamURL
}
