package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/spf13/cobra"
)

const pingLong = `Ping tests whether a peer takes a message and acknowledges it, and how fast.
It sends a request without a task, which nobody can do. A service refuses it.
A tracker, whose socket takes responses, drops it. Both answers count as an
acknowledgement.

URL is as for acomm call. Do not ping the socket of a stream: a stream serves
one reader only.

EXIT STATUS
  0  each message was acknowledged
  2  usage
  3  a message was not acknowledged: nobody listens, the peer speaks another
     protocol, or asks for a certificate or token
  4  a message was not acknowledged in time`

const pingExample = `  acomm ping ./echo.sock
  acomm ping --count 1 --timeout 1s http://127.0.0.1:8080/`

// pinger sends messages that ask for no more than an acknowledgement.
type pinger struct {
	call    call // that none of them makes
	count   int
	verbose bool
	name    string         // of the peer
	answer  *answerWatcher // nil: they go over a unix socket
}

func newPingCommand() *cobra.Command {
	p := &pinger{}
	cmd := &cobra.Command{
		Use:     "ping [flags] URL",
		Short:   "Test whether a peer acknowledges messages, and how fast",
		Long:    pingLong,
		Example: pingExample,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return fmt.Errorf("unexpected argument %q: ping takes only a URL", args[1])
			}
			return missingArgs("URL")(cmd, args)
		},
		RunE: func(_ *cobra.Command, args []string) error {
			var err error
			if p.call.target, err = parseTarget(args[0]); err == nil {
				err = p.check()
			}
			if err != nil {
				return &exitError{exitUsage, err}
			}
			return p.run()
		},

		DisableFlagsInUseLine: true,
	}
	flags := cmd.Flags()
	flags.IntVarP(&p.count, "count", "c", 3, "how many messages to send, one after another")
	flags.DurationVar(&p.call.timeout, "timeout", 5*time.Second, "how long to wait for each acknowledgement")
	flags.BoolVarP(&p.verbose, "verbose", "v", false, "print the error in each acknowledgement")
	p.call.client.addTo(flags)
	return cmd
}

func (p *pinger) check() error {
	switch {
	case p.count < 1:
		return fmt.Errorf("--count %d is not positive", p.count)
	case p.call.timeout <= 0:
		return fmt.Errorf("--timeout %v is not positive", p.call.timeout)
	}
	return p.call.client.check(p.call.target)
}

// run sends the messages, until one is not acknowledged.
func (p *pinger) run() error {
	ctx, stop := signalContext()
	defer stop()
	tracker, err := p.call.startTracker() // a peer that does not look may respond
	if err != nil {
		return &exitError{exitNotSent, err}
	}
	defer tracker.Stop()
	p.name = place(p.call.target)
	if u := p.call.target; u.Scheme == "nats" { // the path is the subject
		p.name = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	}
	p.call.hookListen = "127.0.0.1:0"
	hook, closeHook, err := p.call.openHook(tracker)
	if err != nil {
		return err
	}
	defer closeHook()
	if p.call.client.isUsed() {
		if http.DefaultTransport, err = p.call.client.transport(p.call.target); err != nil {
			return usageError("%w", err)
		}
	}
	if p.call.target.Scheme != "unix" {
		p.answer = &answerWatcher{RoundTripper: http.DefaultTransport}
		http.DefaultTransport = p.answer
	}
	var least, most, sum time.Duration
	for n := range p.count {
		took, err := p.ping(ctx, hook)
		if err != nil {
			return err
		}
		if n == 0 || took < least {
			least = took
		}
		most, sum = max(most, took), sum+took
	}
	if p.count > 1 {
		mean := sum / time.Duration(p.count)
		_, err = fmt.Printf("%d acknowledged: least %v, mean %v, most %v\n", p.count,
			least.Round(time.Microsecond), mean.Round(time.Microsecond), most.Round(time.Microsecond))
	}
	return wrapOutput(err)
}

// wrapOutput is an error of writing, or nil.
func wrapOutput(err error) error {
	if err == nil {
		return nil
	}
	return outputError(err)
}

// ping sends a message and returns how long the acknowledgement took.
func (p *pinger) ping(ctx context.Context, hook *url.URL) (took time.Duration, err error) {
	req := &acomm.Request{ID: rand.Text(), ResponseHook: hook}
	sent, start := make(chan error, 1), time.Now()
	go func() { sent <- acomm.Send(p.call.target, req) }() // ends with the process, if not before
	select {
	case err = <-sent:
		took = time.Since(start)
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-time.After(p.call.timeout):
		return 0, &exitError{exitTimeout, fmt.Errorf("%s has not acknowledged within %v", p.name, p.call.timeout)}
	}
	if err != nil && !isRefusal(err) && !p.answer.isResponse() {
		code := exitNotSent
		if errors.Is(err, os.ErrDeadlineExceeded) {
			code = exitTimeout
		}
		return 0, &exitError{code, sendError(p.call.target, err)}
	}
	words := ""
	if p.verbose && err != nil {
		words = ": " + printable(withoutURL(err).Error())
	}
	_, err = fmt.Printf("%s: acknowledged in %v%s\n", p.name, took.Round(time.Microsecond), words)
	return took, wrapOutput(err)
}
