package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/fatih/color"
	"github.com/spf13/cobra"
)

const checkLong = `Check holds the peer at URL to the protocol of acomm. It prints a line for each
thing that PROTOCOL.md asks of a provider, with the section, and what was seen.
The peer may be written in any language.

URL is unix:///PATH, the path of a socket (/PATH, ./PATH) or http(s)://HOST/.

TASK is a task that the peer takes. Its requests must be accepted then. Check
calls it some dozens of times, with null and with long strings as arguments:
name one that may be called so. Whether it fails is its own affair. Without TASK
a task is asked for that has probably nobody. The peer may refuse that, and what
only a response can show is then not looked at.

Besides sound requests of all forms the peer is sent broken ones: try it on a
peer that nobody else depends on at the moment.

PEERS OF 2016
read a header and a payload with one read each, and know no limit. They can't do
all that PROTOCOL.md asks today. With --of-2016 it is not asked of them.

EXIT STATUS
  0  all that was looked at holds
  1  something does not, or the peer has gone meanwhile
  2  usage
  3  nobody is there`

const checkExample = `  acomm check ./echo.sock echo
  acomm check http://127.0.0.1:8080/ echo
  acomm check --of-2016 unix:///run/old.sock echo`

func newCheckCommand() *cobra.Command {
	c := &checker{out: os.Stdout}
	cmd := &cobra.Command{
		Use:     "check URL [TASK]",
		Short:   "Hold a peer to the protocol",
		Long:    checkLong,
		Example: checkExample,
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := c.parse(args); err != nil {
				return &exitError{exitUsage, err}
			}
			return c.run()
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&c.timeout, "timeout", 10*time.Second, "how long to wait for each thing")
	flags.BoolVar(&c.of2016, "of-2016", false, "ask no more than a peer of 2016 can do")
	flags.StringVar(&c.hookListen, "hook-listen", "127.0.0.1:0", "`ADDR` for responses over HTTP")
	flags.StringVar(&c.hookURL, "hook-url", "", "`URL` of that address as the peer sees it")
	return cmd
}

func (c *checker) parse(args []string) (err error) {
	if c.target, err = parseTarget(args[0]); err != nil {
		return err
	}
	if c.target.Scheme == "nats" {
		return errors.New("URL: over NATS there is nothing to check; take the peer behind it")
	}
	if len(args) > 1 {
		if c.task = args[1]; c.task == "" {
			return errors.New("TASK is empty")
		}
		c.mustAccept = true
	} else {
		c.task = "acomm.check"
	}
	if c.timeout <= 0 {
		return fmt.Errorf("--timeout %v is not positive", c.timeout)
	}
	return nil
}

// notSeen is why a check was not made: this peer gives no occasion for it.
type notSeen string

func (n notSeen) Error() string { return string(n) }

// run makes all checks and prints what they have shown.
func (c *checker) run() error {
	ctx, stop := signalContext()
	defer stop()
	c.ctx = ctx
	var err error
	if c.hook, err = openCheckHook(c); err != nil {
		return err
	}
	defer c.hook.close()
	held, failed, left := 0, 0, 0
	for i, check := range peerChecks(c.target) {
		seen, err := c.look(check)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case i == 0 && isNotConnected(err):
			return &exitError{exitNotSent, err}
		case err == nil:
			held++
			c.print(okLabel("ok  "), check, seen)
		case errors.As(err, new(notSeen)):
			left++
			c.print("--  ", check, err.Error())
		default:
			failed++
			c.print(failLabel("FAIL"), check, err.Error())
			if isNotConnected(err) {
				return &exitError{exitTask, errors.New("the peer has gone; nothing more was looked at")}
			}
			if i == 0 {
				return &exitError{exitTask, errors.New("not even this holds; nothing more was looked at")}
			}
		}
	}
	fmt.Fprintf(c.out, "%d hold, %d do not, %d not looked at\n", held, failed, left)
	if failed > 0 {
		return &exitError{code: exitTask}
	}
	return nil
}

// look makes a check, if the peer gives occasion for it.
func (c *checker) look(check peerCheck) (seen string, err error) {
	switch {
	case c.of2016 && check.not2016:
		return "", notSeen("not asked of peers of 2016")
	case check.sound && !c.accepts:
		return "", notSeen("no request was accepted")
	}
	return check.look(c)
}

func (c *checker) print(verdict string, check peerCheck, seen string) {
	fmt.Fprintf(c.out, "%s  PROTOCOL.md %-6s %s\n        seen: %s\n", verdict, check.section, check.asks, printable(seen))
}

var (
	okLabel   = stdoutLabel(color.FgGreen)
	failLabel = stdoutLabel(color.FgRed, color.Bold)
)

// stdoutLabel colours as the package decides, which is about standard output.
func stdoutLabel(attributes ...color.Attribute) func(...any) string {
	return color.New(attributes...).SprintFunc()
}
