// Demo shows the library at work between three processes on this machine: a
// coordinator, a provider and a requester.
//
//	go run ./examples/demo [FILE|DIR]
//
// The requester asks the provider to hash and to read the given file, or all files
// of the given directory, and checks all results. Without an argument it takes the
// sources of the library.
//
// Read and copy the three roles: coordinator.go, provider.go and requester.go, with
// exchange.go, which the first two share. The other files are the frame around them.
// main.go and child.go start, supervise and stop the processes, input.go finds the
// files, and show.go prints what happens.
//
// The exit status is 0 if everything was right, 1 if not, 2 for wrong arguments, and
// 128 plus the number of the signal that ended the demo.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

const usage = `Usage: demo [FILE|DIR]

Starts three processes on this machine: a coordinator, a provider and a
requester. It shows requests and streams between them, for the file or for all
files of the directory. Without an argument it takes the sources of the acomm
module, which it looks for from the current directory upwards.

Exit status: 0 everything was right, 1 something was not, 2 wrong arguments,
128 plus the signal's number when it was interrupted.
`

// dirPrefix marks the directories of the demo: nothing else is ever removed.
const dirPrefix = "acomm-demo-"

func main() {
	// Without this, a reader that closes the output would end the process before it
	// has cleaned up. Now the next write returns an error.
	signal.Ignore(syscall.SIGPIPE)
	if os.Getenv(roleEnv) != "" {
		os.Exit(runRole())
	}
	os.Exit(run())
}

// run is the process that the user starts. It returns the exit status.
func run() int {
	target, err := parseArgs(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return 0
	case err == nil:
		_, err = readInput(target) // told here, before anything has been started
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n(demo -h shows the usage)\n", err)
		return 2
	}

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go cancelOnSignal(cancel) // ends with the process
	err = demonstrate(ctx, target)
	if err == nil {
		_, err = fmt.Println("All three processes have ended, and no socket file is left.")
	}
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "demo: %v\n", err)
	var interrupted signalError
	if errors.As(err, &interrupted) {
		return 128 + int(interrupted.signal)
	}
	return 1
}

// parseArgs returns the file or directory to work on.
func parseArgs(args []string) (string, error) {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // run prints the error
	if err := flags.Parse(args); err != nil {
		return "", err
	}
	switch flags.NArg() {
	case 0:
		return findModule()
	case 1:
		return flags.Arg(0), nil
	}
	return "", fmt.Errorf("one file or directory at most, not %d", flags.NArg())
}

// signalError is the signal that has ended the demo.
type signalError struct{ signal syscall.Signal }

func (e signalError) Error() string { return "ended by a signal (" + e.signal.String() + ")" }

// cancelOnSignal cancels when the user or the system wants the demo to end. Further
// signals change nothing: the end takes a bounded time, and some supervisors send
// each signal twice.
func cancelOnSignal(cancel context.CancelCauseFunc) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as under nohup
		signal.Notify(signals, syscall.SIGHUP)
	}
	got := <-signals
	cancel(signalError{got.(syscall.Signal)})
}

// demonstrate starts the three processes, waits for the requester, stops the
// others and removes what they have used. If the error is only a signalError, the
// demo was interrupted and has cleaned up.
func demonstrate(ctx context.Context, target string) error {
	dir, err := makeDir()
	if err != nil {
		return err
	}
	var children []*child
	err = startRoles(ctx, dir, target, &children)
	ended := stopAll(children)
	if ended == nil {
		ended = checkNoSocket(dir)
	}
	if removed := os.RemoveAll(dir); removed != nil {
		ended = errors.Join(ended, removed)
	}
	var interrupted signalError
	if err != nil && !errors.As(err, &interrupted) {
		return err // what comes after that is no surprise
	}
	return errors.Join(err, ended)
}

// startRoles starts one process after the other, adds them to children, and
// waits until the requester is done.
func startRoles(ctx context.Context, dir, target string, children *[]*child) error {
	begin := func(r role) (*child, error) {
		c, err := startChild(r)
		if err == nil {
			*children = append(*children, c)
		}
		return c, err
	}
	coordinator, err := begin(role{name: "coordinator", dir: dir})
	if err != nil {
		return err
	}
	front, err := coordinator.waitReady(ctx)
	if err != nil {
		return err
	}
	provider, err := begin(role{name: "provider", dir: dir})
	if err != nil {
		return err
	}
	if _, err := provider.waitReady(ctx); err != nil {
		return err
	}
	fmt.Printf("The coordinator is process %d, the provider %d.\n", coordinator.pid(), provider.pid())
	requester, err := begin(role{name: "requester", dir: dir, front: front, target: target})
	if err != nil {
		return err
	}
	select {
	case <-requester.done:
		return requester.exitError()
	case <-coordinator.done:
		return fmt.Errorf("ended before the requester: %w", coordinator.exitError())
	case <-provider.done:
		return fmt.Errorf("ended before the requester: %w", provider.exitError())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// makeDir makes the directory for the sockets, which only this user can enter.
// The path of a socket can't be longer than 107 bytes, 103 on some systems, so
// where the directory for temporary files has a long name /tmp has to do.
func makeDir() (string, error) {
	const longest = 103 - len("/"+dirPrefix+"1234567890"+"/stream-26-letters-of-the-alphabet.sock")
	base := os.TempDir()
	if len(base) > longest {
		base = "/tmp"
	}
	base, err := filepath.Abs(base)
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(base, dirPrefix)
}

// checkNoSocket reports a socket that a process has left.
func checkNoSocket(dir string) error {
	var left []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type() == fs.ModeSocket {
			left = append(left, d.Name())
		}
		return err
	})
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("sockets were left behind: %s", strings.Join(left, ", "))
	}
	return err
}
