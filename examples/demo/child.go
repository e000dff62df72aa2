package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// What a process is told by the one that starts it.
	roleEnv  = "ACOMM_DEMO_ROLE"
	dirEnv   = "ACOMM_DEMO_DIR"
	frontEnv = "ACOMM_DEMO_FRONT"

	startTimeout = 10 * time.Second // for a process to be ready
	stopTimeout  = 5 * time.Second  // for a process to end by itself
	killTimeout  = 7 * time.Second  // after which it is killed
)

// role is what one of the three processes is to do.
type role struct {
	name   string
	dir    string // for the sockets
	front  string // URL of the coordinator's HTTP front; only for the requester
	target string // file or directory; only for the requester
}

// child is one of the three processes, seen from the one that has started them.
type child struct {
	name  string
	cmd   *exec.Cmd
	stop  context.CancelFunc // asks it to end, and has it killed if it does not
	ready chan string        // what it says when it is ready; closed when it says no more
	done  chan struct{}      // closed when it has ended
}

// startChild runs this program again, in the role. The other end of the
// process's standard input stays here: should this process be killed, the child
// reads the end of the file, and ends as well.
func startChild(r role) (*child, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, r.target)
	cmd.Env = append(os.Environ(), roleEnv+"="+r.name, dirEnv+"="+r.dir, frontEnv+"="+r.front)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = killTimeout
	cmd.Stderr = os.Stderr
	c := &child{name: r.name, cmd: cmd, stop: stop, ready: make(chan string, 1), done: make(chan struct{})}
	if err := c.start(r.name == "requester"); err != nil {
		stop()
		return nil, fmt.Errorf("start the %s: %w", r.name, err)
	}
	return c, nil
}

// start connects the pipes and starts the process. Its output is shown, or else
// read for the line that says it is ready.
func (c *child) start(shown bool) error {
	if _, err := c.cmd.StdinPipe(); err != nil {
		return err
	}
	output := io.NopCloser(strings.NewReader(""))
	if shown {
		c.cmd.Stdout = os.Stdout
	} else {
		var err error
		if output, err = c.cmd.StdoutPipe(); err != nil {
			return err
		}
	}
	if err := c.cmd.Start(); err != nil {
		return err
	}
	go func() { // ends with the process; stopAll waits for done
		defer close(c.done)
		if line, err := bufio.NewReader(output).ReadString('\n'); err == nil {
			c.ready <- strings.TrimSuffix(line, "\n")
		}
		close(c.ready)
		_ = c.cmd.Wait() // exitError tells
	}()
	return nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// waitReady waits until the process can be used, and returns what it said then.
func (c *child) waitReady(ctx context.Context) (string, error) {
	select {
	case line, ok := <-c.ready:
		if ok {
			return line, nil
		}
		<-c.done
		return "", fmt.Errorf("ended before it was ready: %w", c.exitError())
	case <-time.After(startTimeout):
		return "", fmt.Errorf("%s: not ready after %v", c.name, startTimeout)
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// exitError tells how the process has ended, nil if well. It has to have ended.
func (c *child) exitError() error {
	if c.cmd.ProcessState.Success() {
		return nil
	}
	return fmt.Errorf("%s: %v", c.name, c.cmd.ProcessState)
}

// stopAll ends the processes, in the reverse of the order they were started in,
// and waits for each. It reports those that have not ended well.
func stopAll(children []*child) error {
	var errs []error
	for _, c := range slices.Backward(children) {
		c.stop()
		<-c.done
		if c.name != "requester" { // that one's result is known already
			errs = append(errs, c.exitError())
		}
	}
	return errors.Join(errs...)
}

// runRole is one of the three processes. It returns the exit status.
func runRole() int {
	r := role{name: os.Getenv(roleEnv), dir: os.Getenv(dirEnv), front: os.Getenv(frontEnv), target: os.Args[1]}
	log.SetFlags(0)
	log.SetPrefix(r.name + ": ")
	if !strings.HasPrefix(filepath.Base(r.dir), dirPrefix) {
		log.Printf("%s=%q is no directory of the demo", dirEnv, r.dir)
		return 2
	}
	// Ctrl-C at a terminal reaches all processes of the demo. The first one
	// decides what happens then.
	signal.Ignore(os.Interrupt, syscall.SIGHUP)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	orphaned := make(chan struct{})
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(orphaned)
		cancel()
	}()
	// Whatever keeps a role from ending, it does not outlive the demo for long.
	context.AfterFunc(ctx, func() {
		time.AfterFunc(stopTimeout, func() {
			log.Printf("not finished %v after it was told to stop", stopTimeout)
			removeIfOrphaned(orphaned, r.dir)
			os.Exit(1)
		})
	})
	err := r.run(ctx)
	removeIfOrphaned(orphaned, r.dir)
	if err != nil && ctx.Err() == nil {
		log.Print(err)
	}
	if err != nil {
		return 1
	}
	return 0
}

// run does what the role is to do, until that is done or the context ends.
func (r role) run(ctx context.Context) error {
	ready := func(line string) error {
		_, err := fmt.Println(line)
		return err
	}
	switch r.name {
	case "coordinator":
		return coordinate(ctx, r.dir, ready)
	case "provider":
		return provide(ctx, r.dir, ready)
	case "requester":
		front, err := url.Parse(r.front)
		if err != nil {
			return err
		}
		return runShow(ctx, r.dir, front, r.target)
	}
	return fmt.Errorf("unknown role %q", r.name)
}

// removeIfOrphaned removes the directory in place of the process that has made
// it, if that was killed. The others do the same, the last one has success.
func removeIfOrphaned(orphaned <-chan struct{}, dir string) {
	select {
	case <-orphaned:
		_ = os.RemoveAll(dir) // there is nobody to tell
	default:
	}
}
