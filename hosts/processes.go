package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// startTimeout is for a process to say that it is ready.
const startTimeout = 15 * time.Second

// processes are those this program has started; it ends no others.
type processes struct {
	dir string // for logs

	mu  sync.Mutex // guards the field below
	all []*process
}

// process is a process that this program has started.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how; read after done
}

// start starts a command, in a namespace unless that is empty, and waits until it
// has written a line that begins with ready to its output.
func (p *processes) start(ctx context.Context, netns, name, ready string, argv ...string) (*process, error) {
	if netns != "" { // ip replaces itself with the command, so the pid is the command's
		argv = append([]string{"ip", "netns", "exec", netns}, argv...)
	}
	log, err := os.OpenFile(filepath.Join(p.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = log
	cmd.SysProcAttr = ownGroup()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	proc := &process{name: name, cmd: cmd, done: make(chan struct{})}
	p.mu.Lock()
	p.all = append(p.all, proc)
	p.mu.Unlock()

	isReady := make(chan struct{})
	go func() { // ends with the process, which killAll waits for
		defer close(proc.done)
		lines, told := bufio.NewScanner(out), false
		for lines.Scan() {
			if !told && strings.HasPrefix(lines.Text(), ready) {
				told = true
				close(isReady)
			}
		}
		_, _ = io.Copy(io.Discard, out)
		proc.err = cmd.Wait()
	}()
	select {
	case <-isReady:
		return proc, nil
	case <-proc.done:
		return nil, fmt.Errorf("%s ended before it was ready: %w: %s", name, errors.Join(proc.err), lastLine(log.Name()))
	case <-time.After(startTimeout):
		return nil, fmt.Errorf("%s is not ready after %v", name, startTimeout)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// wait waits for the end of the process.
func (proc *process) wait(ctx context.Context) error {
	select {
	case <-proc.done:
		if proc.err != nil {
			return fmt.Errorf("%s: %w", proc.name, proc.err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", proc.name, ctx.Err())
	}
}

// kill ends the process as a loss of power does, and waits for that.
func (proc *process) kill() {
	_ = proc.cmd.Process.Kill() // it has ended already: fine
	<-proc.done
}

// killAll ends all that are left.
func (p *processes) killAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, proc := range p.all {
		proc.kill()
	}
	p.all = nil
}

// buildGateway builds the command whose gateways are tried.
func buildGateway(ctx context.Context, dir string) (string, error) {
	path := filepath.Join(dir, "acomm")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, ".")
	cmd.Dir = filepath.Join("..", "cmd", "acomm")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the acomm command: %w\n%s", err, out)
	}
	return path, nil
}

func lastLine(path string) string {
	data, _ := os.ReadFile(path) // only words for an error
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return lines[len(lines)-1]
}
