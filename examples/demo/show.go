package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	shortTimeout = 200 * time.Millisecond // for the request that is to time out
	progressRate = 200 * time.Millisecond
	maxListed    = 5 // of what is the same for many files
)

// show is the requester's programme: it tells what is sent and what comes back,
// and checks it.
type show struct {
	*requester
	dir  string   // of the sockets
	unix *url.URL // the coordinator, over its unix socket
	http *url.URL // the coordinator, over HTTP
	in   *input
	out  io.Writer
	lost error // the first error of out
}

// runShow is the requester's process.
func runShow(ctx context.Context, dir string, front *url.URL, target string) error {
	in, err := readInput(target)
	if err != nil {
		return err
	}
	r, err := newRequester(dir)
	if err != nil {
		return err
	}
	s := &show{requester: r, dir: dir, unix: coordinatorURL(dir), http: front, in: in, out: os.Stdout}
	err = s.run(ctx)
	return errors.Join(err, r.Close())
}

// run shows one thing after the other. What is wrong does not keep it from
// showing the rest; it is in the error.
func (s *show) run(ctx context.Context) error {
	s.introduce()
	var wrong []error
	for i, step := range []struct {
		title string
		show  func(context.Context) error
	}{
		{"A request over a unix socket, and its success handler", s.showSuccess},
		{"A request that fails, and its error handler", s.showError},
		{"A request that times out", s.showTimeout},
		{"The hash of every file, with a MultiRequest", s.showFanOut},
		{"A request over HTTP, answered on an HTTP hook", s.showHTTP},
		{"A file as a stream, read over a unix socket", s.showUnixStream},
		{"The same file as a stream, read through the HTTP proxy", s.showHTTPStream},
	} {
		s.say("\n%d. %s", i+1, step.title)
		err := step.show(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			s.say("   WRONG: %v", err)
			wrong = append(wrong, fmt.Errorf("%d. %s: %w", i+1, step.title, err))
		}
	}
	if len(wrong) > 0 {
		return errors.Join(wrong...)
	}
	s.say("\nEverything shown here was right.")
	return s.lost
}

// say prints a line.
func (s *show) say(format string, args ...any) {
	if _, err := fmt.Fprintf(s.out, format+"\n", args...); s.lost == nil {
		s.lost = err
	}
}

func (s *show) introduce() {
	s.say("The requester is process %d. It works on %s, %s, in %q.",
		os.Getpid(), count(len(s.in.files), "file"), bytesText(s.in.size), s.in.root)
	for _, left := range []struct {
		n    int
		what string
	}{
		{s.in.irregular, "symbolic links and special files"},
		{s.in.unreadable, "directories that can't be listed"},
		{s.in.unnamable, "files with a name that is not UTF-8, which JSON can't carry"},
	} {
		if left.n > 0 {
			s.say("Left out: %s (%d).", left.what, left.n)
		}
	}
}

func (s *show) showSuccess(ctx context.Context) error {
	f := s.in.sample
	rep, err := s.call(ctx, s.unix, s.unixHook, "file.hash", fileArgs{Path: f.path}, requestTimeout)
	if err != nil {
		return err
	}
	s.say("   Sent file.hash for %q to the coordinator's unix socket, accepted after %s.", f.name, took(rep.accepted))
	return s.checkHash(ctx, rep, f)
}

// describe tells which handler ran, and when. That it is before the
// acknowledgement arrives is as good as after it.
func (r *reply) describe() string {
	text := fmt.Sprintf("%s handler ran after %s", r.handler, took(r.took))
	if r.took < r.accepted {
		text += ", before the acknowledgement had arrived"
	}
	return text
}

// checkHash tells what came back for a file that can be read.
func (s *show) checkHash(ctx context.Context, rep *reply, f file) error {
	s.say("   The %s.", rep.describe())
	if rep.Error != nil {
		return rep.Error
	}
	if rep.handler != "success" {
		return errors.New("the success handler should have run")
	}
	var got fileHash
	if err := rep.UnmarshalResult(&got); err != nil {
		return err
	}
	s.say("   The result: %s, SHA-256 %s.", bytesText(got.Size), got.SHA256)
	if err := checkFile(ctx, got, f); err != nil {
		return err
	}
	s.say("   The requester has read the file itself, and comes to the same.")
	return nil
}

func (s *show) showError(ctx context.Context) error {
	missing := filepath.Join(s.dir, "no such file")
	rep, err := s.call(ctx, s.unix, s.unixHook, "file.hash", fileArgs{Path: missing}, requestTimeout)
	if err != nil {
		return err
	}
	s.say("   Sent file.hash for a file that does not exist, accepted after %s.", took(rep.accepted))
	s.say("   The %s, with the error %q.", rep.describe(), rep.Error)
	if rep.handler != "error" || rep.Error == nil {
		return errors.New("the error handler should have run")
	}
	start := time.Now()
	rep, err = s.call(ctx, s.unix, s.unixHook, "file.shred", nil, requestTimeout)
	if err == nil {
		return fmt.Errorf("a task that nobody provides was accepted, and its %s handler ran", rep.handler)
	}
	s.say("   Sent file.shred, a task that nobody provides: refused after %s, with %q.", took(time.Since(start)), err)
	if s.tracker.NumRequests() != 0 {
		return errors.New("a request that was refused is still tracked")
	}
	return nil
}

func (s *show) showTimeout(ctx context.Context) error {
	rep, err := s.call(ctx, s.unix, s.unixHook, "sleep", sleepArgs{Duration: "1h"}, shortTimeout)
	if err != nil {
		return err
	}
	s.say("   Sent sleep for an hour, to be answered in %s, accepted after %s.", took(shortTimeout), took(rep.accepted))
	s.say("   The %s, with the error %q.", rep.describe(), rep.Error)
	if rep.handler != "error" || !errors.Is(rep.Error, os.ErrDeadlineExceeded) {
		return errors.New("the request should have timed out")
	}
	if rep.took < shortTimeout {
		return errors.New("the request has timed out too early")
	}
	return nil
}

func (s *show) showFanOut(ctx context.Context) error {
	files := s.in.files
	s.say("   Sending %s to the coordinator's unix socket, up to %d at a time.", count(len(files), "request"), maxSending)
	var accepted, checked atomic.Int64
	start := time.Now()
	stop := progress("answered", len(files), func() int { return int(accepted.Load()) - s.tracker.NumRequests() })
	responses, err := s.hashAll(ctx, s.unix, files, &accepted)
	stop()
	if err != nil {
		return err
	}
	elapsed := time.Since(start)
	s.say("   All %d were answered after %s, %.0f a second.", len(responses), took(elapsed), float64(len(files))/elapsed.Seconds())

	results := make([]error, len(files)) // of each file, in their order
	stop = progress("checked", len(files), func() int { return int(checked.Load()) })
	numbers := make([]int, len(files))
	for i := range numbers {
		numbers[i] = i
	}
	each(ctx, maxHashing, numbers, func(i int) {
		results[i] = checkResponse(ctx, responses[files[i].path], files[i])
		checked.Add(1)
	})
	stop()
	return s.sumUp(ctx, results)
}

// errBoth is the outcome for a file that neither side can read.
type errBoth struct{ error }

// checkResponse checks what came back for one of many files. A file that neither
// side can read gives an errBoth.
func checkResponse(ctx context.Context, resp *acomm.Response, f file) error {
	if resp == nil {
		return errors.New("there is no response")
	}
	if resp.Error != nil {
		if _, err := hashLocal(ctx, f); err == nil {
			return fmt.Errorf("the provider can't read what the requester can: %w", resp.Error)
		}
		return errBoth{resp.Error}
	}
	var got fileHash
	if err := resp.UnmarshalResult(&got); err != nil {
		return err
	}
	return checkFile(ctx, got, f)
}

// sumUp tells what the checks have shown.
func (s *show) sumUp(ctx context.Context, results []error) error {
	if ctx.Err() != nil {
		return ctx.Err() // some were not checked
	}
	var right, unreadable, wrong []string
	for i, err := range results {
		name := s.in.files[i].name
		var both errBoth
		switch {
		case err == nil:
			right = append(right, name)
		case errors.As(err, &both):
			unreadable = append(unreadable, fmt.Sprintf("%q: %v", name, err))
		default:
			wrong = append(wrong, fmt.Sprintf("%q: %v", name, err))
		}
	}
	s.say("   %s: size and SHA-256 are what the requester finds itself.", count(len(right), "file"))
	if len(unreadable) > 0 {
		s.say("   %s: not readable, which the provider has answered with an error, as it should.", count(len(unreadable), "file"))
		s.list(unreadable)
	}
	if len(wrong) > 0 {
		s.say("   %s: not right.", count(len(wrong), "file"))
		s.list(wrong)
		return fmt.Errorf("%s, the first is %s", count(len(wrong), "wrong response"), wrong[0])
	}
	return nil
}

// list prints the first few lines.
func (s *show) list(lines []string) {
	for _, line := range lines[:min(len(lines), maxListed)] {
		s.say("     %s", line)
	}
	if more := len(lines) - maxListed; more > 0 {
		s.say("     and %d more", more)
	}
}

func (s *show) showHTTP(ctx context.Context) error {
	f := s.in.sample
	rep, err := s.call(ctx, s.http, s.httpHook, "file.hash", fileArgs{Path: f.path}, requestTimeout)
	if err != nil {
		return err
	}
	s.say("   Posted file.hash for %q to %s, accepted after %s.", f.name, s.http, took(rep.accepted))
	s.say("   The response was posted to %s.", s.httpHook)
	return s.checkHash(ctx, rep, f)
}

func (s *show) showUnixStream(ctx context.Context) error {
	return s.showStream(ctx, s.unix, s.unixHook, "unix")
}

func (s *show) showHTTPStream(ctx context.Context) error {
	return s.showStream(ctx, s.http, s.httpHook, "http")
}

// showStream asks for a file and reads the stream that the response names.
func (s *show) showStream(ctx context.Context, addr, hook *url.URL, scheme string) error {
	f := s.in.sample
	rep, err := s.call(ctx, addr, hook, "file.read", fileArgs{Path: f.path}, requestTimeout)
	if err != nil {
		return err
	}
	s.say("   Sent file.read for %q to %s, accepted after %s.", f.name, addr.Redacted(), took(rep.accepted))
	s.say("   The %s.", rep.describe())
	switch {
	case rep.Error != nil:
		return rep.Error
	case rep.StreamURL == nil:
		return errors.New("the response names no stream")
	case rep.StreamURL.Scheme != scheme:
		return fmt.Errorf("the stream should be read over %s, not %s", scheme, rep.StreamURL.Scheme)
	}
	s.say("   The stream is at %s.", shorten(rep.StreamURL.Redacted(), 100))
	start := time.Now()
	got, err := readStream(ctx, rep.StreamURL)
	if err != nil {
		return err
	}
	elapsed := time.Since(start)
	s.say("   Read %s in %s%s, SHA-256 %s.", bytesText(got.Size), took(elapsed), rate(got.Size, elapsed), got.SHA256)
	if err := checkFile(ctx, got, f); err != nil {
		return err
	}
	s.say("   The requester has read the file itself, and comes to the same.")
	return nil
}

// checkFile compares what came back with the file. As it may have been written to
// in the meantime, a second look decides.
func checkFile(ctx context.Context, got fileHash, f file) error {
	var want fileHash
	for range 2 {
		var err error
		if want, err = hashLocal(ctx, f); err != nil {
			return fmt.Errorf("the requester can't read the file: %w", err)
		}
		if got == want {
			return nil
		}
	}
	return fmt.Errorf("got %d bytes, SHA-256 %s; the file has %d bytes, SHA-256 %s (was it changed in between?)",
		got.Size, got.SHA256, want.Size, want.SHA256)
}

// hashLocal is the requester's own reading of the file, without the library.
func hashLocal(ctx context.Context, f file) (fileHash, error) {
	r, err := os.Open(f.path)
	if err != nil {
		return fileHash{}, err
	}
	defer r.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, contextReader{ctx, r})
	return fileHash{Size: n, SHA256: hex.EncodeToString(hash.Sum(nil))}, err
}

// progress shows on a terminal how far it is, until stop is called. What is done
// before it is first due leaves no trace.
func progress(what string, total int, done func() int) (stop func()) {
	info, err := os.Stderr.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return func() {}
	}
	stopping, stopped := make(chan struct{}), make(chan struct{})
	go func() { // stop waits for stopped
		defer close(stopped)
		ticker := time.NewTicker(progressRate)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				fmt.Fprintf(os.Stderr, "\r   %d of %d %s ", max(done(), 0), total, what)
			case <-stopping:
				fmt.Fprint(os.Stderr, "\r\x1b[K") // an empty line
				return
			}
		}
	}()
	return func() {
		close(stopping)
		<-stopped
	}
}

// took is a duration for people.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", d.Seconds()*1e3)
	case d < time.Second:
		return fmt.Sprintf("%.0f ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// bytesText is a size for people.
func bytesText(n int64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB"}
	if n < 10<<10 {
		return count(int(n), "byte")
	}
	size := float64(n) / 1024
	for size >= 1024 && len(units) > 1 {
		size, units = size/1024, units[1:]
	}
	return fmt.Sprintf("%.1f %s", size, units[0])
}

// rate is the speed of a transfer, for what is large enough to have one.
func rate(n int64, d time.Duration) string {
	if n < 1<<20 {
		return ""
	}
	return fmt.Sprintf(" (%.0f MiB/s)", float64(n)/(1<<20)/d.Seconds())
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// shorten cuts a text that is too long for a line.
func shorten(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return text[:limit] + "..."
}
