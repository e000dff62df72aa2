package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
)

const (
	receiveTimeout = 10 * time.Second // for reading a request and acknowledging it
	abortTimeout   = 2 * time.Second  // for the service to end when it must
)

// service is a task that a program does.
type service struct {
	path    string
	command []string

	task        string // empty: any
	stream      bool
	concurrency int
	timeout     time.Duration // 0: none
	unread      time.Duration
	verbose     bool
	log         logFormat

	tracker  *acomm.Tracker // for the streams
	room     chan struct{}  // holds a token for each request that descriptors are kept for
	slots    chan struct{}  // holds a token for each program that runs
	waiting  atomic.Int64   // requests that wait for a place
	draining chan struct{}  // closed when the service is told to stop
	programs programs

	acknowledged atomic.Int64 // requests that are to be done, or are being done
}

const serveLong = `Serve takes requests on the unix socket PATH and runs COMMAND for each of
them. When it is ready it prints "listening on" and the URL of the socket.
Missing directories are created. The process's umask decides who may connect.

Serve acknowledges a request as soon as it has read it: the request is
well-formed, and the task will be done. It refuses a request in the
acknowledgement if
  - the id, the task or the hook is missing,
  - serve can't send to a hook of that kind, or
  - the task is not that of --task.

THE COMMAND
COMMAND runs without a shell. It gets
  standard input   the arguments of the request, as JSON on one line; null if
                   there are none
  ACOMM_TASK       the name of the task
  ACOMM_ID         the id of the request
Its standard output is the result. Output that is not JSON becomes a JSON
string, without the newlines at its end. Output that is not UTF-8, or over 64
MiB, fails the task. Its standard error goes to that of the service. If the
exit status is not 0, the task has failed. The error is the last line on
standard error, or how COMMAND exited if there is none.

With --stream the standard output is a stream, and the result is null. The
response is sent with the first byte. If COMMAND fails before it, the task has
failed. If COMMAND fails after it, the stream is cut off, which is an error
for the reader. If the reader leaves, COMMAND is killed.

The task ends when COMMAND ends. The rest of its process group is then killed.
When --timeout has passed, the whole group is killed. A process that has left
the group, such as a daemon (setsid), is not killed. If such a process keeps
an output of COMMAND open, the task waits for it, for at most 2 s after the
end of COMMAND. A stream of a COMMAND that succeeded waits for the rest of
--timeout, or 2 s without one. The stream then ends with the bytes written so
far.

CONCURRENCY
At most --concurrency programs run at a time. Further requests are
acknowledged at once and wait for their turn. Their number has no limit. If
there are few file descriptors (ulimit -n), fewer programs run.

If no descriptor is left, starting a program and sending a result are tried
again for a minute. A result is also tried again for a minute if there is no
connection to its HTTP hook. That ends when the service is told to stop, and
it is not done for a stream.

The time of --timeout begins when the program starts. With --stream, a stream
that nobody begins to read ends after --unread-duration. If another request
waits for a place, a stream whose reader takes nothing for that time ends too.

SIGNALS
On SIGTERM, SIGINT or SIGHUP the service stops listening, does the tasks it
has acknowledged, and exits. A stream that nobody has begun to read has 10
seconds to find a reader. A stream that is being read is cut off, and its
program killed, when it does not move for 10 seconds: the program is silent,
or the reader takes nothing. This applies from the first byte on. Before it,
the service waits for the program without limit, or for --timeout.

A second signal kills the programs, fails their tasks and ends the service. A
signal within a second of the first counts as the same one, because a terminal
and a supervisor may both send one. SIGHUP does nothing if the service was
started with SIGHUP ignored, as under nohup.

LOG
The log on standard error is lines of text with the time. With --log-format
json each line is an object with time, level and msg, and with id and task if
it is about a request. What programs write to standard error appears between
these lines.

SECURITY
Whoever may connect to PATH may run COMMAND, with arguments of their choice,
and chooses the address of the response. Put PATH into a directory with a
suitable mode and group.

EXIT STATUS
  0  told to stop, and all acknowledged tasks are done
  1  could not listen, or was stopped by a second signal
  2  usage`

const serveExample = `  acomm serve ./echo.sock -- cat
  acomm serve --task count --timeout 9s ./wc.sock -- sh -c 'jq -r .text | wc -w'
  acomm serve --stream --concurrency 2 ./backup.sock -- tar -C /srv -cf - .
  acomm serve ./tasks/echo/1.sock -- cat   # of a gateway`

func newServeCommand() *cobra.Command {
	s := &service{}
	cmd := &cobra.Command{
		Use:     "serve [flags] PATH -- COMMAND...",
		Short:   "Serve a task with a program",
		Long:    serveLong,
		Example: serveExample,
		Args: func(cmd *cobra.Command, args []string) error {
			switch dash := cmd.ArgsLenAtDash(); {
			case len(args) == 0 || dash == 0:
				return errors.New("PATH is missing: write PATH -- COMMAND")
			case dash == 1 && len(args) > 1:
				return nil
			case len(args) == 1:
				return errors.New("COMMAND is missing: write PATH -- COMMAND")
			case dash < 0:
				return errors.New("-- is missing before COMMAND: write PATH -- COMMAND")
			default:
				return fmt.Errorf("unexpected argument %q: write PATH -- COMMAND", args[1])
			}
		},

		DisableFlagsInUseLine: true,
		RunE: func(_ *cobra.Command, args []string) error {
			s.log.use()
			s.command = args[1:]
			if err := s.check(args[0]); err != nil {
				return s.log.logged(&exitError{exitUsage, err})
			}
			return s.log.logged(s.run())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&s.task, "task", "", "`name` of the task; requests for other tasks are refused (default any)")
	flags.BoolVar(&s.stream, "stream", false, "send the output of the program as a stream")
	flags.IntVar(&s.concurrency, "concurrency", runtime.NumCPU(), "how many programs run at a time")
	flags.DurationVar(&s.timeout, "timeout", 0, "how long a program may run (default without limit)")
	flags.DurationVar(&s.unread, "unread-duration", time.Minute, "how long a stream may stay unread")
	flags.BoolVarP(&s.verbose, "verbose", "v", false, "log when each task starts and how it ends")
	s.log.addTo(flags)
	return cmd
}

// check takes PATH, and looks for what makes no sense.
func (s *service) check(path string) (err error) {
	if s.path, err = socketPath(path); err != nil {
		return err
	}
	switch {
	case s.concurrency < 1:
		return fmt.Errorf("--concurrency %d is not positive", s.concurrency)
	case s.unread <= 0:
		return fmt.Errorf("--unread-duration %v is not positive", s.unread)
	case s.timeout < 0:
		return fmt.Errorf("--timeout %v is negative", s.timeout)
	}
	program, err := exec.LookPath(s.command[0])
	if err != nil {
		return fmt.Errorf("COMMAND: %w", err)
	}
	s.command[0] = program
	return nil
}

// run serves until it is told to stop.
func (s *service) run() (err error) {
	// Before the socket is there: whoever sees it may send a signal.
	signals := make(chan os.Signal, 2)
	notifyEnd(signals)

	s.room = make(chan struct{}, s.requestsWithDescriptors())
	supervisor := newNotifier()
	defer supervisor.close()
	s.slots = make(chan struct{}, s.concurrency)
	s.draining = make(chan struct{})
	s.programs.killed = make(chan struct{})
	if s.tracker, err = acomm.NewTracker("", nil, 0); err != nil {
		return err
	}
	if err := s.tracker.Start(); err != nil {
		return err
	}
	listener := acomm.NewUnixListener(s.path, 0)
	if err := listener.Start(); err != nil {
		s.tracker.Stop()
		return err
	}
	fmt.Printf("listening on %s\n", listener.URL())
	supervisor.ready()

	done := make(chan struct{})
	go func() { // run waits for it, but after a second signal not for long
		defer close(done)
		s.serve(listener)
		s.tracker.Stop()
	}()
	sig := <-signals
	supervisor.stopping()
	again := secondSignal(signals)
	logrus.Infof("%v: finishing the acknowledged tasks; another signal after %v kills them", sig, sameSignal)
	close(s.draining)
	go listener.Stop(receiveTimeout) // serve ends with it
	select {
	case <-done:
		return nil
	case sig = <-again:
	}
	if s.acknowledged.Load() == 0 { // it only waited for requests that did not come
		s.tracker.Stop()
		return nil
	}
	s.programs.killAll()
	select {
	case <-done:
	case <-time.After(abortTimeout):
	}
	return &exitError{exitTask, fmt.Errorf("%v: ended while tasks were running", sig)}
}

// serve takes requests until the listener is stopped, and does them.
func (s *service) serve(listener *acomm.UnixListener) {
	var working sync.WaitGroup
	defer working.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		working.Go(func() {
			req, err := s.receive(listener, conn)
			if err != nil {
				logrus.Warn(shorten(printable(err.Error())))
				return
			}
			defer s.acknowledged.Add(-1)
			if err := s.answer(req); err != nil {
				logOf(req).Warn(shorten(printable(err.Error())))
			}
		})
	}
}

// receive reads a request, acknowledges or refuses it, and is done with the
// connection. An error means that the request is not to be done, else it counts as
// acknowledged.
func (s *service) receive(listener *acomm.UnixListener, conn net.Conn) (*acomm.Request, error) {
	defer listener.DoneConn(conn)
	if err := conn.SetDeadline(time.Now().Add(receiveTimeout)); err != nil {
		return nil, fmt.Errorf("receive request: %w", err)
	}
	req := &acomm.Request{}
	refusal := acomm.UnmarshalConnData(conn, req)
	if refusal == nil {
		refusal = s.accept(req)
	}
	s.acknowledged.Add(1)
	err := acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: refusal})
	if refusal != nil || err != nil {
		s.acknowledged.Add(-1)
	}
	if refusal != nil {
		return nil, fmt.Errorf("refuse request %q: %w", req.ID, refusal)
	}
	if err != nil {
		return nil, fmt.Errorf("acknowledge request %q: %w", req.ID, err)
	}
	return req, nil
}

// accept says what is wrong with a request, nil if nothing is.
func (s *service) accept(req *acomm.Request) error {
	if err := req.Validate(); err != nil {
		return err
	}
	if s.task != "" && req.Task != s.task {
		return fmt.Errorf("the task here is %q, not %q", s.task, req.Task)
	}
	switch req.ResponseHook.Scheme {
	case "unix", "http", "https":
		return nil
	}
	return fmt.Errorf("request %s: a hook with the scheme %q: %w", req.ID, req.ResponseHook.Scheme, errors.ErrUnsupported)
}

// answer does the task when it is its turn, and sends the response.
func (s *service) answer(req *acomm.Request) error {
	s.waiting.Add(1)
	s.room <- struct{}{}
	leave := sync.OnceFunc(func() { <-s.room })
	defer leave()
	s.slots <- struct{}{}
	s.waiting.Add(-1)
	release := sync.OnceFunc(func() { <-s.slots })
	defer release()
	s.say(req, "start")
	started := time.Now()
	var failed, err error // of the task, and of its response
	if s.stream {
		failed, err = s.answerStream(req, release)
	} else {
		failed, err = s.answerResult(req, release, leave)
	}
	if err != nil {
		return fmt.Errorf("respond to request: %w", sendError(req.ResponseHook, err))
	}
	took := time.Since(started).Round(time.Millisecond)
	if failed != nil {
		s.say(req, "failed after %v: %v", took, failed)
		return nil
	}
	s.say(req, "done after %v", took)
	return nil
}

// answerResult does a task whose output is the result. It calls release when the program
// has ended, and leave when the response was tried to be sent.
func (s *service) answerResult(req *acomm.Request, release, leave func()) (failed, err error) {
	result, failed := s.runProgram(req)
	release()
	resp := &acomm.Response{ID: req.ID, Error: failed}
	if failed == nil {
		if resp, err = acomm.NewResponse(req, result, nil, nil); err != nil {
			return nil, err
		}
	}
	return failed, s.deliver(req, resp, leave)
}

// answerStream does a task whose output is a stream, and returns when that has
// ended. Meanwhile it calls release, when the program has ended.
func (s *service) answerStream(req *acomm.Request, release func()) (failed, err error) {
	src, err := s.startStream(req)
	if err != nil {
		return err, s.respond(req, &acomm.Response{ID: req.ID, Error: err})
	}
	defer func() { // its end, whatever becomes of the stream
		if end := src.program.wait(); failed == nil {
			failed = end
		}
	}()
	var addr *url.URL
	err = s.retry("offer the stream", req, isShortage, func() (err error) {
		addr, err = s.tracker.NewStreamUnix("", src)
		return err
	})
	if err != nil {
		_ = src.Close() // it is still ours
		return err, s.respond(req, &acomm.Response{ID: req.ID, Error: err})
	}
	resp, err := acomm.NewResponse(req, nil, addr, nil)
	if err == nil {
		err = s.respond(req, resp)
	}
	if err != nil {
		_ = src.Close()
		s.dropStream(req, addr)
		return nil, err
	}
	go s.endUnread(req, src, addr) // ends with the stream
	go func() {                    // ends with the program
		<-src.program.ended
		release()
	}()
	select {
	case <-src.closed:
		return nil, nil
	case <-s.draining:
	}
	if !src.isClaimed() {
		src.moved.touch() // so much time for somebody to come
	}
	if !src.moved.ends(src.closed, s.programs.killed) {
		// Closed, it ends a program that is silent. A consumer that does not read
		// is cut off when the tracker stops.
		_ = src.Close()
		if !src.isClaimed() {
			s.dropStream(req, addr)
		}
	}
	return nil, nil
}

// deliver sends the response, or that it is too large. It calls leave after the first try.
func (s *service) deliver(req *acomm.Request, resp *acomm.Response, leave func()) error {
	err := s.respondLater(req, resp, leave)
	if isTooLarge(req.ResponseHook, resp, err) {
		err = s.respondLater(req, tooLarge(resp), nil)
	}
	return err
}

// dropStream ends a stream that nobody reads, as a consumer that leaves at once.
func (s *service) dropStream(req *acomm.Request, addr *url.URL) {
	_ = s.retry("end the stream", req, isShortage, func() error {
		return acomm.Stream(closedWriter{}, addr) // it can't succeed
	})
}

// closedWriter is a consumer that has left.
type closedWriter struct{}

func (closedWriter) Write([]byte) (int, error) { return 0, net.ErrClosed }

// context is for a program: it ends with its time-out.
func (s *service) context() (context.Context, context.CancelFunc) {
	if s.timeout == 0 {
		return context.WithCancel(context.Background())
	}
	return context.WithTimeoutCause(context.Background(), s.timeout, fmt.Errorf("timed out after %v", s.timeout))
}

// say logs what is done, with -v.
func (s *service) say(req *acomm.Request, format string, args ...any) {
	if s.verbose {
		logOf(req).Info(printable(fmt.Sprintf(format, args...)))
	}
}

// logOf logs about a request.
func logOf(req *acomm.Request) *logrus.Entry {
	return logrus.WithFields(logrus.Fields{"id": shorten(printable(req.ID)), "task": shorten(printable(req.Task))})
}
