package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/mistifyio/acomm"
)

const (
	maxOutput = maxPayload - 1024 // bytes of a result; the rest of a message is less than 1 KiB
	maxLine   = 4096              // bytes of the line that is the error
	maxPipe   = 1 << 20           // bytes that a pipe can hold
	pipeGrace = 2 * time.Second   // for pipes that a process outside the group holds open
)

// errKilled is the error of tasks that a second signal has ended.
var errKilled = errors.New("the service was stopped")

// programs are the programs that run.
type programs struct {
	killed chan struct{} // closed by killAll

	mu     sync.Mutex // guards the fields below
	cancel map[*program]context.CancelCauseFunc
	ending bool
}

// program is a program that runs for a task, with its process group.
type program struct {
	cmd    *exec.Cmd
	errors *lastLine
	ctx    context.Context
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed when it has ended and err is set
	err    error

	mu     sync.Mutex // guards reaped
	reaped bool       // the number of its group may be another's
}

// start starts the program for a request, when there are the descriptors for it. It
// ends when it wants to, or killed with the context of its time-out, with stop, and
// with killAll.
func (s *service) start(req *acomm.Request, stdout io.Writer) (p *program, err error) {
	err = s.retry("start the program", req, isStartShortage, func() (err error) {
		p, err = s.tryStart(req, stdout)
		return err
	})
	return p, err
}

func (s *service) tryStart(req *acomm.Request, stdout io.Writer) (*program, error) {
	timeout, cancelTimeout := s.context()
	ctx, cancel := context.WithCancelCause(timeout)
	p := &program{ctx: ctx, cancel: cancel, ended: make(chan struct{}), errors: &lastLine{}}
	args := []byte("null")
	if req.Args != nil {
		args = *req.Args
	}
	var line bytes.Buffer
	if err := json.Compact(&line, args); err != nil {
		cancelTimeout()
		return nil, err
	}
	line.WriteByte('\n')
	stdin := bytes.NewReader(unescapeJSON(line.Bytes()))
	p.cmd = exec.Command(s.command[0], s.command[1:]...)
	p.cmd.Env = append(os.Environ(), "ACOMM_TASK="+req.Task, "ACOMM_ID="+req.ID)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, stdout, p.errors
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = pipeGrace
	if err := s.programs.start(p); err != nil {
		cancelTimeout()
		return nil, err
	}
	context.AfterFunc(ctx, p.killGroup)
	go func() { // ends with the program; closes ended
		p.finish(p.reap())
		s.programs.remove(p)
		cancelTimeout()
		cancel(nil)
	}()
	return p, nil
}

// killGroup kills the program's process group, if it has not been waited for.
func (p *program) killGroup() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
}

// finish makes the error of a program from how it has ended.
func (p *program) finish(err error) {
	defer close(p.ended)
	switch {
	case p.cmd.ProcessState.Success(): // whatever holds its pipes
	case p.ctx.Err() != nil:
		p.err = context.Cause(p.ctx)
	case p.errors.String() != "":
		p.err = errors.New(p.errors.String())
	default:
		p.err = err
	}
}

// wait waits for the end of the program and returns its error.
func (p *program) wait() error {
	<-p.ended
	return p.err
}

// start starts a program, unless all are to be killed.
func (ps *programs) start(p *program) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.ending {
		return errKilled
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	if ps.cancel == nil {
		ps.cancel = make(map[*program]context.CancelCauseFunc)
	}
	ps.cancel[p] = p.cancel
	return nil
}

func (ps *programs) remove(p *program) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.cancel, p)
}

// killAll kills all programs, now and from now on.
func (ps *programs) killAll() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.ending = true
	for _, cancel := range ps.cancel {
		cancel(errKilled)
	}
	close(ps.killed)
}

// runProgram runs the program for a request to its end, and returns its result.
func (s *service) runProgram(req *acomm.Request) (json.RawMessage, error) {
	out := &limitedBuffer{}
	p, err := s.start(req, out)
	if err != nil {
		return nil, err
	}
	err = p.wait()
	if out.over { // the program's error comes from that
		return nil, fmt.Errorf("the result is larger than %d bytes: serve it with --stream", maxOutput)
	}
	if err != nil {
		return nil, err
	}
	return resultOf(out.buf.Bytes())
}

// resultOf makes a result of what a program has written.
func resultOf(out []byte) (json.RawMessage, error) {
	if !utf8.Valid(out) {
		return nil, errors.New("the output is not UTF-8: serve other bytes with --stream")
	}
	if json.Valid(out) {
		return bytes.TrimSpace(out), nil
	}
	return json.Marshal(strings.TrimRight(string(out), "\r\n"))
}

// startStream starts the program for a request and waits for its first byte. A
// program that fails before gives its error.
func (s *service) startStream(req *acomm.Request) (*programStream, error) {
	var r *os.File
	var p *program
	// Again with another pipe: one with the last free number fails again and again.
	err := s.retry("start the program", req, isStartShortage, func() (err error) {
		var w *os.File
		if r, w, err = os.Pipe(); err != nil {
			return err
		}
		p, err = s.tryStart(req, w)
		_ = w.Close()
		if err != nil {
			_ = r.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	go func() { // ends with the program
		// A process outside its group must not hold the end up.
		until, bounded := p.ctx.Deadline()
		if p.wait() != nil || !bounded {
			until = time.Now().Add(pipeGrace)
		}
		_ = r.SetReadDeadline(until)
	}()
	pipe := &programPipe{File: r, program: p, left: maxPipe}
	src := &programStream{program: p, pipe: pipe, r: bufio.NewReaderSize(pipe, 64<<10), moved: newMovement(),
		claimed: make(chan struct{}), closed: make(chan struct{})}
	if _, err := src.r.Peek(1); err != nil {
		if err := p.wait(); err != nil {
			_ = r.Close()
			return nil, err
		}
	}
	return src, nil
}

// programPipe is the standard output of a program that writes a stream. Its
// deadline is set when the program has ended, and bounds the waiting for processes
// that the program has left behind.
type programPipe struct {
	*os.File
	program *program
	late    bool // the deadline has passed, and the program was successful; Read's
	left    int  // bytes that may yet be read then
}

// Read returns what has been written also after the deadline: the reader may be
// slow.
func (p *programPipe) Read(b []byte) (int, error) {
	if !p.late {
		n, err := p.File.Read(b)
		if !errors.Is(err, os.ErrDeadlineExceeded) || p.program.wait() != nil {
			return n, err
		}
		p.late = true
		_ = p.SetReadDeadline(time.Time{}) // past it, there is no reading at all
	}
	n, err := readPresent(p.File, b[:min(len(b), p.left)])
	p.left -= n
	return n, err
}

// readPresent reads without waiting; where there is nothing it is at the end.
func readPresent(pipe *os.File, b []byte) (n int, err error) {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return 0, err
	}
	rawErr := raw.Read(func(fd uintptr) bool {
		n, err = syscall.Read(int(fd), b)
		for errors.Is(err, syscall.EINTR) {
			n, err = syscall.Read(int(fd), b)
		}
		return true // do not wait
	})
	switch {
	case rawErr != nil: // closed
		return 0, rawErr
	case errors.Is(err, syscall.EAGAIN), err == nil && n <= 0:
		return 0, io.EOF
	}
	return max(n, 0), err
}

// programStream is what a program writes. It ends well only if the program does.
type programStream struct {
	program *program
	pipe    *programPipe
	r       *bufio.Reader
	moved   *movement   // touched before and after each Read: what one gave is taken by the next
	reading atomic.Bool // there is a Read, or all has been read
	claim   sync.Once
	claimed chan struct{} // closed when it is read
	end     sync.Once
	closed  chan struct{} // closed when it is
}

func (s *programStream) Read(p []byte) (n int, err error) {
	s.moved.touch()
	s.reading.Store(true)
	defer func() { s.moved.touch(); s.reading.Store(err == io.EOF) }()
	s.claim.Do(func() { close(s.claimed) })
	n, err = s.r.Read(p)
	if n == 0 && errors.Is(err, io.EOF) {
		if failed := s.program.wait(); failed != nil {
			return 0, failed
		}
	}
	return n, err
}

// isClaimed reports whether somebody has begun to read it.
func (s *programStream) isClaimed() bool {
	select {
	case <-s.claimed:
		return true
	default:
		return false
	}
}

// Close ends the program too. It ends a Read that blocks.
func (s *programStream) Close() error {
	err := os.ErrClosed
	s.end.Do(func() {
		s.program.cancel(errors.New("nobody reads the stream any more"))
		err = s.pipe.Close()
		close(s.closed)
	})
	return err
}

// limitedBuffer holds what a message can carry.
type limitedBuffer struct {
	buf  bytes.Buffer // not embedded: it would be filled past Write, with ReadFrom
	over bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.over = b.over || b.buf.Len()+len(p) > maxOutput; b.over {
		return 0, io.ErrShortBuffer // the program has a broken pipe now
	}
	return b.buf.Write(p)
}

// lastLine passes on what a program writes to standard error, and keeps the last
// line that is not empty.
type lastLine struct {
	last, line []byte
}

func (l *lastLine) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		if room := maxLine - len(l.line); room > 0 {
			l.line = append(l.line, line[:min(room, len(line))]...)
		}
		if ended {
			l.keep()
			l.line = l.line[:0]
		}
		rest = after
	}
	_, _ = os.Stderr.Write(p)
	return len(p), nil
}

// keep takes the line for the last one, unless it is empty.
func (l *lastLine) keep() {
	if line := bytes.TrimSpace(l.line); len(line) > 0 {
		l.last = bytes.Clone(line)
	}
}

// String is the line. The program has to have ended.
func (l *lastLine) String() string {
	l.keep()
	return strings.ToValidUTF8(string(l.last), "\uFFFD")
}
