package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"github.com/mistifyio/acomm"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// ackGrace is how long a call that has its response waits for the
// acknowledgement that was overtaken, so that the other side can deliver it.
const ackGrace = time.Second

// lostGrace is how long a call whose acknowledgement was lost waits for a response
// that has just come, before it says so.
const lostGrace = 200 * time.Millisecond

// shortTempDir is where the socket is if the path of os.TempDir is too long for one.
const shortTempDir = "/tmp"

// call is a request from the command line.
type call struct {
	target *url.URL
	shown  string // it, in errors
	task   string
	args   json.RawMessage

	timeout    time.Duration
	hookListen string
	hookURL    string
	output     string // file for the stream; empty: standard output
	raw        bool
	json       bool
	verbose    bool
	client     httpClient

	report *callReport  // nil without --json
	posts  *postWatcher // nil: it does not go over HTTP, nor NATS
	start  time.Time    // when it was sent
}

const callLong = `Call sends a request for TASK to URL, waits for its response, and writes the
result to standard output.

URL is one of
  unix:///run/echo.sock   a unix socket; its path is enough (/run/echo.sock,
                          ./echo.sock, tasks/echo/1.sock)
  http://host:port/path   a service that takes requests over HTTP, such as a
                          gateway; also https
  nats://host:4222/tasks  a subject of a NATS server; without a host, the
                          server in NATS_URL

ARGS are the arguments of the task, in one of these forms. If several forms
fit, the first one counts.
  (nothing)               null
  '{"n": 5}'              JSON
  @FILE                   JSON in a file
  -                       JSON on standard input
  KEY=VALUE...            an object. A VALUE that is JSON stays JSON, any other
                          becomes a string: n=5 name=joe is
                          {"n":5,"name":"joe"}. Write 'n="5"' for a string.
Write -- before ARGS that begin with a dash, such as -5.

OUTPUT
On a terminal the result is indented, and characters that control a terminal
are written as \u and their number. Elsewhere the result is one line. With
--raw it is written byte for byte as it came, except that <, > and & are never
written as \u003c, \u003e and \u0026.

A stream of the response goes to standard output, and the result to standard
error. With -o FILE the stream goes to FILE, and the result to standard output.
In both cases a result that is null is not written. While a stream is read,
standard error shows a progress bar, if standard error is a terminal and the
stream does not go to a terminal.

With -o the stream is first written to a hidden file beside FILE,
.acomm-*.part. It is renamed to FILE when it is complete. After an error or an
interruption the hidden file is removed, and FILE is as it was before. If FILE
is a link, the file that it leads to is written. With -o, a response without a
stream is an error.

JSON
With --json the call writes one JSON object on a line, and nothing else. It
goes to standard output, or to standard error if a stream goes to standard
output.
  id, task   of the request
  phase      not taken     nobody has the request
             sent          interrupted; the request may have been taken
             acknowledged  interrupted after the request was taken
             answered      there is a response
             timed out     there was no response in time
  result     null if there is none
  error      a text; null if all went well
  stream     an object with bytes, complete, and file (null: standard output);
             null if the response has no stream
  times      sent, acknowledged, answered and ended. A time is null if the
             event did not happen: acknowledged is null if the acknowledgement
             was lost.
The exit status is the same as without --json. A mistake in the command line
(2) is reported as text.

HOOKS
The response is sent to the hook. The kind of hook depends on URL.
  unix  A socket in a directory that only this user can enter. The directory
        is below TMPDIR, or below /tmp if that path is too long for a socket.
  http  An address of this machine. The call listens on --hook-listen, and the
        request names that address, or --hook-url if it is given. Give
        --hook-url if the other side must use another address, because of a
        proxy or because it is on another machine. Any path is taken. Whoever
        reaches the address can only guess ids, of 122 random bits.
  nats  A subject acomm.call.RANDOM. The other side must be allowed to publish
        to it.

AUTHENTICATION
Over https the certificate of the service is checked against the authorities
of the system, or with --cacert against those in a file. --cert and --key give
a client certificate, --token-file a bearer token (Authorization), and
--header any other header. All three go only to the scheme, host and port of
URL, never to another place that a stream or a redirect leads to.

PROXIES
Requests and streams over HTTP go through the proxies in HTTP_PROXY,
HTTPS_PROXY and NO_PROXY. Connections to localhost and to loopback addresses
use no proxy.

TIME
--timeout bounds the time from sending the request to the response. A stream
may take any time after that. If the call times out or is interrupted, a
request that was acknowledged goes on at the other side. If the
acknowledgement is lost, the request may have arrived. The call says so on
standard error and goes on waiting for the response.

EXIT STATUS
  0  done: the result, and the stream if there is one, was written
  1  the task failed, its error is on standard error; or the response could
     not be read to its end, or not be written
  2  usage: flags, URL or ARGS are wrong, or name a file that can't be used
  3  the request was not taken: nobody listens, or it was refused (over HTTP
     with a status of 300 to 499, with 501, 505 or 511, or with 503 and
     Retry-After)
  4  timed out: no acknowledgement, no response or no stream in time. The
     request may have been taken. A time-out that a gateway reports counts, a
     time limit of the provider is an error of the task (1).
  An interrupted call exits with 130 (SIGINT) or 143 (SIGTERM). A call whose
  output nobody reads exits with 141 (SIGPIPE).`

const callExample = `  acomm call unix:///run/echo.sock echo hello=world n=5
  acomm call ./echo.sock echo '{"hello": "world"}'
  acomm call --timeout 10m -o srv.tar http://127.0.0.1:8080/ backup @backup.json
  acomm call --hook-listen 0.0.0.0:9000 --hook-url http://10.0.0.5:9000/ \
        http://10.0.0.7:8080/ echo
  date | jq -R . | acomm call -v ./echo.sock echo -`

func newCallCommand() *cobra.Command {
	c := &call{}
	cmd := &cobra.Command{
		Use:     "call [flags] URL TASK [ARGS]",
		Short:   "Send a request and wait for its response",
		Long:    callLong,
		Example: callExample,
		Args:    missingArgs("URL", "TASK"),

		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.parse(args, cmd.InOrStdin()); err != nil {
				return &exitError{exitUsage, err}
			}
			if c.json {
				c.report = &callReport{Task: c.task, Phase: phaseNotTaken}
			}
			return c.report.end(c.run())
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&c.timeout, "timeout", time.Minute, "how long to wait for the response")
	flags.StringVar(&c.hookListen, "hook-listen", "127.0.0.1:0", "`ADDR` to listen on for the response to an HTTP request")
	flags.StringVar(&c.hookURL, "hook-url", "", "`URL` of the --hook-listen address as the other side sees it")
	flags.StringVarP(&c.output, "output", "o", "", "write the stream to this `FILE`")
	flags.BoolVar(&c.json, "json", false, "write one JSON object with the result or error, and the times")
	flags.BoolVar(&c.raw, "raw", false, "write the result as it came")
	c.client.addTo(flags)
	flags.BoolVarP(&c.verbose, "verbose", "v", false, "say on standard error what is sent and received, and when")
	return cmd
}

// parse takes URL, TASK and ARGS.
func (c *call) parse(words []string, stdin io.Reader) (err error) {
	if c.target, err = parseTarget(words[0]); err != nil {
		return err
	}
	c.shown = typed(c.target)
	if c.task = words[1]; c.task == "" {
		return errors.New("TASK is empty")
	}
	if c.timeout <= 0 {
		return fmt.Errorf("--timeout %v is not positive", c.timeout)
	}
	if err := c.client.check(c.target); err != nil {
		return err
	}
	if c.json && c.raw {
		return errors.New("--json and --raw can't be used together")
	}
	c.args, err = parseArgs(words[2:], stdin)
	return err
}

// run makes the call.
func (c *call) run() error {
	ctx, stop := signalContext()
	defer stop()

	var file *download
	if c.output != "" && c.output != "-" {
		var err error
		if file, err = newDownload(c.output); err != nil {
			return usageError("-o: %w", err)
		}
		defer file.abort()
	}
	resp, err := c.exchange(ctx)
	if err != nil {
		return err
	}
	if resp.Error != nil {
		if errors.Is(resp.Error, os.ErrDeadlineExceeded) { // the tracker's; none comes over the wire
			c.report.timedOut()
			return &exitError{exitTimeout, fmt.Errorf("no response to %s within %v", c.task, c.timeout)}
		}
		if isResponseTimeout(resp.Error) {
			c.report.timedOut()
			return &exitError{exitTimeout, fmt.Errorf("no response to %s: the time-out of the gateway has passed", c.task)}
		}
		c.report.answered()
		return &exitError{exitTask, errors.New(printable(resp.Error.Error()))}
	}
	c.report.answered()
	return c.deliver(ctx, resp, file)
}

// exchange sends the request and returns its response. An error in the response
// is the tracker's if it matches os.ErrDeadlineExceeded.
func (c *call) exchange(ctx context.Context) (*acomm.Response, error) {
	tracker, err := c.startTracker()
	if err != nil {
		return nil, &exitError{exitNotSent, err}
	}
	defer tracker.Stop()
	hook, closeHook, err := c.openHook(tracker)
	if err != nil {
		return nil, err
	}
	defer closeHook()
	if err := c.takeTransport(); err != nil {
		return nil, err
	}
	responses := make(chan *acomm.Response, 1) // exactly one handler runs, once
	handle := func(_ *acomm.Request, resp *acomm.Response) { responses <- resp }
	req, err := acomm.NewRequest(c.task, hook.String(), c.args, handle, handle)
	if err != nil {
		return nil, usageError("%w", err)
	}
	// Tracked before it is sent: the response may overtake the acknowledgement.
	c.start = time.Now()
	if err := tracker.TrackRequest(req, c.timeout); err != nil {
		return nil, &exitError{exitNotSent, err}
	}
	defer tracker.RemoveRequest(req) // Stop waits for what is tracked
	c.say("sending %s %s to %s, %d bytes of arguments, hook %s", c.task, req.ID, c.shown, len(c.args), place(hook))
	c.report.sending(req.ID)
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(c.target, req) }() // ends with the process, if not before
	return c.await(ctx, tracker, req, sent, responses)
}

// takeTransport has all that goes over HTTP go through transports that know who calls,
// and how far a request has come.
func (c *call) takeTransport() (err error) {
	if c.client.isUsed() {
		if http.DefaultTransport, err = c.client.transport(c.target); err != nil {
			return usageError("%w", err)
		}
	}
	if c.target.Scheme != "unix" {
		c.posts = &postWatcher{RoundTripper: http.DefaultTransport}
		http.DefaultTransport = c.posts // after that of NATS was registered
	}
	return nil
}

// await waits for the acknowledgement and the response, in whichever order they come, and
// returns the response.
func (c *call) await(ctx context.Context, tracker *acomm.Tracker, req *acomm.Request, ack <-chan error, responses <-chan *acomm.Response) (*acomm.Response, error) {
	for {
		select {
		case err := <-ack:
			ack = nil
			switch {
			case err == nil:
				c.say("acknowledged")
				c.report.acknowledged()
			case c.mayHaveArrived(err):
				if resp := c.awaitLate(responses); resp != nil {
					return resp, nil
				}
				if c.report != nil { // its times say so
					continue
				}
				fmt.Fprintln(os.Stderr, errorLabel("acomm call:"), "acknowledgement lost; the request may have arrived, so waiting for its response:",
					printable(sendErrorTo(c.shown, err).Error()))
			default:
				if !tracker.RemoveRequest(req) { // a response or the time-out came first
					return <-responses, nil
				}
				c.report.notTaken()
				return nil, &exitError{exitNotSent, errors.New(printable(sendErrorTo(c.shown, err).Error()))}
			}
		case resp := <-responses:
			if ack != nil && resp.Error == nil {
				c.awaitAck(ack)
			}
			return resp, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// startTracker starts a tracker with a socket for responses, which it has also where
// they come over HTTP or NATS.
func (c *call) startTracker() (*acomm.Tracker, error) {
	tracker, err := acomm.NewTracker("", nil, c.timeout)
	if err == nil {
		err = tracker.Start()
	}
	if errors.Is(err, syscall.ENAMETOOLONG) && os.TempDir() != shortTempDir {
		if err := os.Setenv("TMPDIR", shortTempDir); err != nil {
			return nil, err
		}
		return c.startTracker()
	}
	return tracker, err
}

// awaitLate waits a moment for a response that has come with the loss of the
// acknowledgement, and returns it, or nil.
func (c *call) awaitLate(responses <-chan *acomm.Response) *acomm.Response {
	select {
	case resp := <-responses:
		return resp
	case <-time.After(lostGrace):
		return nil
	}
}

// awaitAck waits a moment for an acknowledgement that the response has overtaken.
func (c *call) awaitAck(ack <-chan error) {
	select {
	case err := <-ack:
		if err == nil {
			c.say("acknowledged")
			c.report.acknowledged()
		}
	case <-time.After(ackGrace):
	}
}

// deliver writes the result, and the stream if there is one.
func (c *call) deliver(ctx context.Context, resp *acomm.Response, file *download) error {
	result := json.RawMessage("null")
	if resp.Result != nil {
		result = *resp.Result
	}
	c.report.result(result)
	if resp.StreamURL == nil {
		c.say("response: %d bytes of result", len(result))
		if err := c.writeResult(os.Stdout, result); err != nil {
			return outputError(err)
		}
		if file != nil {
			return &exitError{exitTask, errors.New("the response has no stream to write to the file of -o")}
		}
		return nil
	}
	c.say("response: %d bytes of result, stream at %s", len(result), place(resp.StreamURL))
	to := os.Stderr
	if file != nil {
		to = os.Stdout
	}
	if string(result) != "null" {
		if err := c.writeResult(to, result); err != nil {
			return outputError(err)
		}
	}
	return c.readStream(ctx, resp.StreamURL, file)
}

// writeResult writes the result in the form that suits the file.
func (c *call) writeResult(to *os.File, result []byte) error {
	if c.report != nil { // it is there
		return nil
	}
	result = unescapeJSON(result)
	if c.raw {
		_, err := to.Write(result)
		return err
	}
	var buf bytes.Buffer
	var err error
	if term.IsTerminal(int(to.Fd())) {
		err = json.Indent(&buf, inertJSON(result), "", "  ")
	} else {
		err = json.Compact(&buf, result)
	}
	if err != nil {
		return err
	}
	buf.WriteByte('\n')
	_, err = to.Write(buf.Bytes())
	return err
}

// readStream reads the stream to its end, into the file if there is one.
func (c *call) readStream(ctx context.Context, stream *url.URL, file *download) error {
	var dest io.Writer = os.Stdout
	shown := term.IsTerminal(int(os.Stdout.Fd()))
	if file != nil {
		dest, shown = file, false
	}
	counted, began := &counter{w: dest}, time.Now()
	dest = counted
	finish := func() {}
	if !shown && c.report == nil && term.IsTerminal(int(os.Stderr.Fd())) {
		bar := newProgress(os.Stderr, printable(c.task))
		dest = io.MultiWriter(counted, bar)
		finish = func() { // the bar gives way to what has come
			bar.clear()
			fmt.Fprintf(os.Stderr, "%s: %d bytes in %v\n", printable(c.task), counted.n.Load(), time.Since(began).Round(time.Millisecond))
		}
	}
	read := make(chan error, 1)
	go func() { read <- acomm.Stream(dest, stream) }() // ends with the process, if not before
	var err error
	select {
	case err = <-read:
		finish()
	case <-ctx.Done(): // the other side may be silent for long
		finish()
		c.report.stream(counted.n.Load(), false, c.output)
		return context.Cause(ctx)
	}
	c.report.stream(counted.n.Load(), false, c.output)
	switch {
	case counted.err != nil:
		return outputError(counted.err)
	case err != nil:
		code := exitTask
		if errors.Is(err, os.ErrDeadlineExceeded) {
			code = exitTimeout
		}
		return &exitError{code, fmt.Errorf("stream from %s, after %d bytes: %w", place(stream), counted.n.Load(), withoutURL(err))}
	}
	if file != nil {
		if err := file.complete(); err != nil {
			return outputError(err)
		}
	}
	c.report.stream(counted.n.Load(), true, c.output)
	c.say("stream: %d bytes", counted.n.Load())
	return nil
}

// counter counts what it passes on, and keeps the error of the other side.
type counter struct {
	w   io.Writer
	n   atomic.Int64
	err error
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(int64(n))
	c.err = err
	return n, err
}

// say tells what happens, with -v.
func (c *call) say(format string, args ...any) {
	if c.verbose {
		label := fmt.Sprintf("%s +%.3fs", time.Now().Format("15:04:05.000"), time.Since(c.start).Seconds())
		fmt.Fprintln(os.Stderr, sayLabel(label), printable(fmt.Sprintf(format, args...)))
	}
}

// outputError is an error of writing. That nobody reads any more needs no words.
func outputError(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return &exitError{code: 128 + int(syscall.SIGPIPE)}
	}
	return &exitError{exitTask, err}
}

// commands reports whether a terminal, or what shows text in lines, would obey the
// character: a control character, or one that turns the direction of text.
func commands(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029'
}

// printable is the text of a peer without what a terminal would obey.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if commands(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}
