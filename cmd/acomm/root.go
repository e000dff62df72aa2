package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/fatih/color"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// The exit codes of acomm, which its help documents.
const (
	exitDone    = 0 // the task has been done; a server has been told to stop
	exitTask    = 1 // the task failed, or a server did
	exitUsage   = 2 // the command line makes no sense
	exitNotSent = 3 // the request was not taken
	exitTimeout = 4 // no response, or no end of the stream, in time
)

// exitError is an error that decides the exit code. Any other error of a
// command is one of usage if it arose before the command ran (cobra's), and
// exitTask after.
type exitError struct {
	code int
	err  error // nil: everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError is an error of usage.
func usageError(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

const rootLong = `acomm sends requests to services that speak acomm, and makes services of programs.

A request names a task, its arguments, and the hook: the address the response is
to be sent to. Whoever takes a request acknowledges it at once, works for as long
as it needs, and sends the response to the hook. Bulk data travels beside the
messages, as a stream.

  acomm call     sends a request and waits for its response
  acomm serve    serves a task with a program, on a unix socket
  acomm gateway  takes requests over HTTP and forwards them to such sockets
  acomm ping     asks whether one of these acknowledges messages, and how fast
  acomm list     lists the tasks of a gateway
  acomm check    holds a peer in any language to the protocol

EXIT STATUS
  0  done
  1  the task failed, or a server did; the error is on standard error
  2  usage: the command line, or what it names, makes no sense
  3  the request was not taken: it could not be sent, or was refused
  4  timed out; the request may have been taken
  An interrupted call exits with 128 and the number of the signal, as a shell
  reports it: 130 for SIGINT (Ctrl-C), 143 for SIGTERM.

What acomm says on standard error is coloured on a terminal, unless NO_COLOR is set.`

// errorLabel and sayLabel colour what a line on standard error begins with, if
// that is a terminal.
var (
	errorLabel = label(color.FgRed, color.Bold)
	sayLabel   = label(color.FgCyan)
)

func label(attributes ...color.Attribute) func(...any) string {
	c := color.New(attributes...)
	// The package's own decision is about standard output.
	if term.IsTerminal(int(os.Stderr.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
		c.EnableColor()
	} else {
		c.DisableColor()
	}
	return c.SprintFunc()
}

// newRootCommand makes the whole command line.
func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "acomm",
		Short:         "Call and serve acomm tasks",
		Long:          rootLong,
		Version:       versionText(),
		Args:          cobra.ArbitraryArgs, // onlySubcommands looks at them
		SilenceErrors: true,                // run says it, once
		SilenceUsage:  true,
		RunE:          onlySubcommands,
	}
	root.AddCommand(newCallCommand(), newServeCommand(), newGatewayCommand(), newPingCommand(), newListCommand(), newCheckCommand(), newManCommand())
	setUsage(root)
	root.Flags().Bool("version", false, "say version, commit and Go")
	root.SetVersionTemplate("{{.Version}}\n")
	return root
}

// run runs the command line and returns the exit code.
func run() int {
	// What the library logs belongs to standard error, in lines like acomm's own.
	logrus.SetOutput(os.Stderr)
	logrus.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})

	started := false // from here on errors are no longer cobra's
	root := newRootCommand()
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }
	cmd, err := root.ExecuteContextC(context.Background())
	if err == nil {
		return exitDone
	}
	code := exitTask
	if !started {
		code = exitUsage
	}
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
		if exit.err == nil {
			return code
		}
	}
	fmt.Fprintln(os.Stderr, errorLabel(cmd.CommandPath()+":"), printable(err.Error()))
	if !started {
		fmt.Fprintf(os.Stderr, "Try '%s --help'.\n", cmd.CommandPath())
	}
	return code
}
