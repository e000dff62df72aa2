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

const rootLong = `acomm calls tasks of services, and turns programs into services.

A request names a task, its arguments and a hook, the address for the
response. The receiver acknowledges a request at once, does the work, and then
sends the response to the hook. Large data travels as a stream beside the
response.

  acomm call     sends a request and waits for its response
  acomm serve    serves a task with a program, on a unix socket
  acomm gateway  takes requests over HTTP and forwards them to such sockets
  acomm ping     tests whether a peer acknowledges messages, and how fast
  acomm list     lists the tasks of a gateway
  acomm check    tests whether a peer, in any language, follows the protocol

EXIT STATUS
  0  done
  1  the task or the server failed; the error is on standard error
  2  usage: the command line is wrong, or names something unusable
  3  the request was not taken: it could not be sent, or it was refused
  4  timed out; the request may have been taken
  An interrupted call exits with 128 plus the number of the signal: 130 for
  SIGINT (Ctrl-C), 143 for SIGTERM.

On a terminal the messages of acomm are coloured, unless NO_COLOR is set.`

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
	root.Flags().Bool("version", false, "print version, commit and Go release")
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
