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

const checkLong = `Check tests whether the peer at URL follows the protocol of acomm. For each
rule that PROTOCOL.md has for a provider, it prints a line with the section
and a line with the observation. The peer may be written in any language.

URL is unix:///PATH, the path of a socket (/PATH, ./PATH) or http(s)://HOST/.

TASK is a task of the peer, so its requests must be accepted. Check calls it
some dozens of times, with null and with long strings as arguments. Name a
task that may be called so. The task itself may fail. Without TASK, check asks
for a task that the peer most likely does not have. If the peer refuses it,
the rules that need a response are not tested.

Check sends requests of all valid forms, and broken ones. Use a peer that
nobody depends on at the moment.

PEERS OF 2016
A peer of 2016 reads a header and a payload with one read each, and has no
limits. So it can't follow every rule of today. --of-2016 leaves out the rules
that it can't follow.

EXIT STATUS
  0  the peer follows all rules that were tested
  1  it breaks a rule, or went away during the test
  2  usage
  3  nobody listens`

const checkExample = `  acomm check ./echo.sock echo
  acomm check http://127.0.0.1:8080/ echo
  acomm check --of-2016 unix:///run/old.sock echo`

func newCheckCommand() *cobra.Command {
	c := &checker{out: os.Stdout}
	cmd := &cobra.Command{
		Use:     "check URL [TASK]",
		Short:   "Test whether a peer follows the protocol",
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
	flags.DurationVar(&c.timeout, "timeout", 10*time.Second, "how long to wait for each answer")
	flags.BoolVar(&c.of2016, "of-2016", false, "leave out the rules that a peer of 2016 can't follow")
	flags.StringVar(&c.hookListen, "hook-listen", "127.0.0.1:0", "`ADDR` to listen on for responses over HTTP")
	flags.StringVar(&c.hookURL, "hook-url", "", "`URL` of the --hook-listen address as the peer sees it")
	return cmd
}

func (c *checker) parse(args []string) (err error) {
	if c.target, err = parseTarget(args[0]); err != nil {
		return err
	}
	if c.target.Scheme == "nats" {
		return errors.New("URL: check does not work over NATS: give the URL of the peer itself")
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
				return &exitError{exitTask, errors.New("the peer has gone; the remaining rules were not tested")}
			}
			if i == 0 {
				return &exitError{exitTask, errors.New("the first rule failed; the remaining rules were not tested")}
			}
		}
	}
	fmt.Fprintf(c.out, "%d passed, %d failed, %d not tested\n", held, failed, left)
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
