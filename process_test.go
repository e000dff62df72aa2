package acomm_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What a process does to others by dying can only be shown with processes. They
// are this test binary again, in a role.

var long = flag.Bool("long", false, "run the proofs with their full numbers")

// roleEnv names the role that a process started by startProcess plays.
const roleEnv = "ACOMM_TEST_ROLE"

// roles is what a process can do, by name; a file adds its own in an init. The
// process ends when its role returns, and at the end of its standard input, so
// none outlives its parent. What it prints on its standard output goes to
// process.ReadLine, what process.WriteLine writes comes from commands. Its
// standard error is shown if the test fails.
var roles = map[string]func(){
	"echo": func() { // the helper's own test
		fmt.Println(os.Getenv("ECHO"))
		for line := range commands {
			fmt.Println(line)
		}
	},
}

// commands has the lines that the parent writes.
var commands = make(chan string, 1000) // so that the end behind them is seen

// TestProcessRole is no test: it is where a process in a role begins.
func TestProcessRole(t *testing.T) {
	name, ok := os.LookupEnv(roleEnv)
	if !ok {
		return
	}
	role := roles[name]
	if role == nil {
		fmt.Fprintln(os.Stderr, "no such role:", name)
		os.Exit(2)
	}
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			commands <- lines.Text()
		}
		os.Exit(0)
	}()
	role()
	os.Exit(0)
}

// process is a process in a role. It is killed at the end of its test.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string   // closed at the end of its standard output
	ended  chan struct{} // closed at the end of the test
	exited chan struct{} // closed when the process is gone and err is set
	err    error
	stderr bytes.Buffer // to be read once it is gone
}

// startProcess starts a process in a role, with a temporary directory of its own
// and further environment variables ("NAME=value"). It may be called from the
// test's goroutine only.
func startProcess(t testing.TB, role string, env ...string) *process {
	t.Helper()
	return startProcessAs(t, nil, role, env...)
}

// startProcessAs is startProcess with attributes of the process.
func startProcessAs(t testing.TB, attr *syscall.SysProcAttr, role string, env ...string) *process {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	p := &process{
		t:      t,
		cmd:    exec.Command(self, "-test.run=^TestProcessRole$", "-test.timeout=0", fmt.Sprintf("-long=%t", *long)),
		lines:  make(chan string),
		ended:  make(chan struct{}),
		exited: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), roleEnv+"="+role, "TMPDIR="+shortDir(t),
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // or each takes a second to end
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = attr
	p.stdin, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	out, in, err := os.Pipe() // Wait would close a StdoutPipe with lines still in it
	require.NoError(t, err)
	p.cmd.Stdout = in
	err = p.cmd.Start()
	in.Close()
	if err != nil {
		out.Close()
		require.NoError(t, err)
	}

	var working sync.WaitGroup
	working.Go(func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	})
	working.Go(func() { p.scan(out) })
	t.Cleanup(func() {
		p.Kill()
		close(p.ended)
		out.Close()
		working.Wait()
		if bytes.Contains(p.stderr.Bytes(), []byte("DATA RACE")) {
			t.Errorf("data race in a process: %s", role)
		}
		if t.Failed() && p.stderr.Len() > 0 {
			t.Logf("stderr of %s: %s", role, p.stderr.String())
		}
	})
	return p
}

// scan takes the lines of the standard output until it or the test ends.
func (p *process) scan(out io.Reader) {
	defer close(p.lines)
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		select {
		case p.lines <- lines.Text():
		case <-p.ended:
			return
		}
	}
}

// Lines has the lines the process prints, and is closed behind the last one.
func (p *process) Lines() <-chan string { return p.lines }

// ReadLine returns the next line that the process prints.
func (p *process) ReadLine() string {
	p.t.Helper()
	select {
	case line, ok := <-p.lines:
		require.True(p.t, ok, "the process ended its output")
		return line
	case <-time.After(patience):
		require.FailNow(p.t, "timed out", "waiting for a line of the process")
		panic("unreachable")
	}
}

// WriteLine sends the process a line.
func (p *process) WriteLine(line string) error {
	_, err := io.WriteString(p.stdin, line+"\n")
	return err
}

// CloseInput ends the process in good order.
func (p *process) CloseInput() { _ = p.stdin.Close() }

// Pid is the process's id.
func (p *process) Pid() int { return p.cmd.Process.Pid }

// Signal sends the process a signal. One that is gone already gives an error
// that matches os.ErrProcessDone.
func (p *process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill sends the process SIGKILL; Wait tells when it is gone.
func (p *process) Kill() { _ = p.cmd.Process.Kill() }

// Wait waits until the process is gone; nil means with the exit code 0.
func (p *process) Wait() error {
	p.t.Helper()
	within(p.t, p.exited, "the end of a process")
	return p.err
}

func TestProcess_IsDrivenAndEnds(t *testing.T) {
	p := startProcess(t, "echo", "ECHO=from the environment")
	require.Equal(t, "from the environment", p.ReadLine())
	require.NoError(t, p.WriteLine("from the parent"))
	require.Equal(t, "from the parent", p.ReadLine())
	p.CloseInput()
	require.NoError(t, p.Wait())
	_, more := <-p.Lines()
	require.False(t, more)

	p = startProcess(t, "echo")
	require.Empty(t, p.ReadLine())
	p.Kill()
	require.ErrorContains(t, p.Wait(), "killed")

	require.ErrorContains(t, startProcess(t, "no such role").Wait(), "exit status 2")
}

// orExit ends a process in which nothing may go wrong.
func orExit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const fewDescriptors = 64

// leaveFewDescriptors leaves a process few descriptors.
func leaveFewDescriptors() {
	var limit syscall.Rlimit
	orExit(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	limit.Cur = fewDescriptors
	orExit(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
}
