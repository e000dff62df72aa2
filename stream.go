package acomm

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/sirupsen/logrus"
)

const (
	streamBuffer = 32 << 10         // bytes, for each stream in transfer
	streamClaim  = time.Hour        // for the consumer of a stream to connect
	streamStall  = 10 * time.Second // without a byte; then Stop cuts the stream off
	streamEnd    = time.Second      // while Stop waits: for a source to return from Read, or a consumer to close after the last byte
	streamLinger = time.Minute      // for the consumer to close after the last byte

	streamPoll = 10 * time.Millisecond // between checks whether the consumer has closed, while it takes data

	// streamSuffix ends the socket names of streams that can't be cut off unnoticed. A
	// consumer that knows the suffix writes one byte after connecting. The provider
	// reads the byte only after it has sent the whole source. A provider that fails or
	// is killed leaves the byte unread, and the kernel reports ECONNRESET to the
	// consumer, behind the data.
	streamSuffix = ".eof"

	// streamName is the length of such a name. Names of 2016 had the same length, and
	// services have chosen directories that leave just enough of a path's 107 bytes.
	streamName = 15
)

// errConsumerLeft is why a transfer ends when the consumer has closed.
var errConsumerLeft = errors.New("the consumer left")

// servedStreams holds the socket paths of the streams of this process that have no
// consumer yet, of all trackers. ProxyStreamHandler serves them; it does not know the
// trackers.
var servedStreams sync.Map

// unixStream is a stream that waits for its consumer or is in transfer.
type unixStream struct {
	listener *UnixListener // owned by serveStream
	src      io.ReadCloser // read by serveStream; closed by closeSource
	failures *logLimit     // the tracker's
	whole    chan struct{} // closed when all of the source is sent
	done     chan struct{} // closed when consumer and source are closed
	born     time.Time
	moved    atomic.Int64 // when a byte last moved, in nanoseconds since born; 0: no consumer yet

	closing sync.Once // of src
}

// NewStreamUnix makes a unix socket that sends src to one consumer, and returns its URL
// for the StreamURL of a [Response]. The first consumer that connects, for example with
// [Stream], gets all of src. A second one gets an error.
//
// The socket is made in dir, under a random name of 15 bytes, with permissions that the
// process's umask decides. If dir is empty, it is made in a directory of its own below
// [os.TempDir] that only the process's user can enter; that takes 44 bytes more than
// TempDir, and a socket's path has 107 at most.
//
// After a return without an error, src belongs to the library. It is closed exactly once:
// when it ends or fails, when the consumer leaves, after an hour without a consumer, or
// when the tracker stops. The consumer may leave while a Read of src blocks, so Close has
// to end that Read. A failure of src is logged.
//
// A nil src, and a dir that is not UTF-8, give an error that matches [io/fs.ErrInvalid].
// A tracker that is not started or is stopping gives [net.ErrClosed]. The other errors
// are those of [UnixListener.Start]. After an error src is still the caller's.
func (t *Tracker) NewStreamUnix(dir string, src io.ReadCloser) (*url.URL, error) {
	if src == nil {
		return nil, fmt.Errorf("new stream: source is nil: %w", fs.ErrInvalid)
	}
	if !t.running() {
		return nil, fmt.Errorf("new stream: tracker is not started, or is stopping: %w", net.ErrClosed)
	}
	path, listen := randomSocketPath("stream"+streamSuffix), listenPrivate
	if dir != "" {
		path, listen = filepath.Join(dir, randomStreamName()), listenUnclaimed
	}
	listener := newListener(path, 1, listen)
	if !utf8.ValidString(listener.path) { // JSON would change the URL
		return nil, fmt.Errorf("new stream: directory %q is not UTF-8: %w", filepath.Dir(listener.path), fs.ErrInvalid)
	}
	if err := listener.Start(); err != nil {
		return nil, fmt.Errorf("new stream: %w", err)
	}
	s := &unixStream{
		listener: listener,
		src:      src,
		failures: &t.failures,
		whole:    make(chan struct{}),
		done:     make(chan struct{}),
		born:     time.Now(),
	}
	if !t.addStream(s) {
		listener.Stop(atOnce)
		return nil, fmt.Errorf("new stream: tracker is not started, or is stopping: %w", net.ErrClosed)
	}
	return listener.URL(), nil
}

// randomStreamName returns a name of 15 bytes with 66 random bits.
func randomStreamName() string {
	var random [9]byte
	_, _ = rand.Read(random[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(random[:])[:streamName-len(streamSuffix)] + streamSuffix
}

func (t *Tracker) running() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state == trackerRunning
}

// addStream starts to serve the stream, unless the tracker is not running.
func (t *Tracker) addStream(s *unixStream) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != trackerRunning {
		return false
	}
	t.streams[s] = struct{}{}
	servedStreams.Store(s.listener.path, struct{}{})
	go t.serveStream(s) // endStreams waits for done
	return true
}

// serveStream waits for the consumer, sends it the source, and closes both.
func (t *Tracker) serveStream(s *unixStream) {
	defer close(s.done)
	defer func() {
		t.mu.Lock()
		delete(t.streams, s)
		t.mu.Unlock()
	}()
	unclaimed := time.AfterFunc(t.streamClaim, s.listener.refuse)
	conn, _ := s.listener.NextConn().(*net.UnixConn)
	unclaimed.Stop()
	servedStreams.Delete(s.listener.path)
	if conn != nil {
		s.transfer(conn)
	}
	s.closeSource()
	s.listener.Stop(atOnce)
}

// transfer copies the source to the consumer until one of them ends, and closes the
// connection.
func (s *unixStream) transfer(conn *net.UnixConn) {
	s.touch()
	over := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		// If the consumer has left, this ends a Read of the source that blocks.
		waitPeerGone(conn, over)
		s.closeSource()
	})
	err := s.copyTo(conn)
	close(over)
	if err == nil {
		s.touch() // a silence of the source must not shorten the time for the end
		close(s.whole)
		_ = conn.CloseWrite()
		_ = conn.SetReadDeadline(time.Unix(1, 0)) // ends the watching
		watching.Wait()
		takeByte(conn)
	}
	s.listener.DoneConn(conn)
	watching.Wait()
	if err != nil && err != errConsumerLeft {
		s.failures.log(logrus.ErrorLevel, "a stream's source failed", err, "", s.listener.addr)
	}
}

// copyTo copies the source to the consumer. It returns nil after the whole source,
// errConsumerLeft if the consumer has closed, and otherwise the source's error. When the
// consumer closes, the source is closed too and Read fails: that counts as
// errConsumerLeft.
func (s *unixStream) copyTo(conn net.Conn) error {
	buf := make([]byte, streamBuffer)
	for {
		n, readErr := s.src.Read(buf)
		if n > 0 {
			if _, err := conn.Write(buf[:n]); err != nil {
				return errConsumerLeft
			}
			s.touch()
		}
		switch {
		case readErr == io.EOF:
			return nil
		case readErr != nil && peerGone(conn):
			return errConsumerLeft
		case readErr != nil:
			return readErr
		}
	}
}

// takeByte reads the consumer's byte, which says that the stream is whole, and waits
// until the consumer closes. A consumer of 2016 just closes.
func takeByte(conn *net.UnixConn) {
	if conn.SetReadDeadline(time.Now().Add(streamLinger)) == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
}

func (s *unixStream) touch() { s.moved.Store(int64(time.Since(s.born))) }

func (s *unixStream) idle() time.Duration { return time.Since(s.born) - time.Duration(s.moved.Load()) }

// closeSource closes the source once, however often it is called.
func (s *unixStream) closeSource() {
	s.closing.Do(func() { _ = s.src.Close() })
}

// endStreams ends the streams without a consumer and waits for those in transfer while
// they move. New ones can't come: the tracker is stopping.
func (t *Tracker) endStreams() {
	t.mu.Lock()
	streams := make([]*unixStream, 0, len(t.streams))
	for s := range t.streams {
		streams = append(streams, s)
	}
	t.mu.Unlock()
	for _, s := range streams {
		s.moved.CompareAndSwap(0, int64(time.Since(s.born))) // without a consumer: time to close starts now
		s.listener.refuse()
	}
	var ending sync.WaitGroup
	for _, s := range streams {
		ending.Go(func() { s.end(t.streamStall, t.streamEnd) })
	}
	ending.Wait()
}

// end waits until the stream is done. It cuts the stream off when no byte has moved for
// the time stall; after the last byte, for the time end. A source whose Read still does
// not return is left behind, and that is logged.
func (s *unixStream) end(stall, end time.Duration) {
	whole := s.whole
	for idle := s.idle(); idle < stall; idle = s.idle() {
		select {
		case <-s.done:
			return
		case <-whole: // all is written: only the consumer's close is missing
			whole, stall = nil, min(stall, end)
		case <-time.After(stall - idle):
		}
	}
	s.listener.Stop(atOnce) // closes the connection, and serveStream then the source
	select {
	case <-s.done:
	case <-time.After(end):
		s.failures.log(logrus.ErrorLevel, "a stream's source does not return from Read after Close", nil, "", s.listener.addr)
	}
}

// Stream copies a stream to dest and returns when its source ends. The address is a unix
// socket of [Tracker.NewStreamUnix], or a URL that [net/http.DefaultTransport] can GET.
// It waits a minute at most for the connection, or over HTTP for the header of the
// answer. After that the source may be silent for any time. It writes nothing to dest
// unless the source is there, and over HTTP has answered with the status 200.
//
// A unix address is resolved as by [Send]. Over HTTP, Stream asks for the bytes as they
// are (Accept-Encoding: identity) and follows up to 10 redirects without a Referer, as
// the URL is a secret.
//
// A source that is cut off gives [io.ErrUnexpectedEOF], even if its process was killed:
// over HTTP, and on Linux over sockets of [Tracker.NewStreamUnix]. Elsewhere the end of
// the process looks like the end of the data: with sockets of the original acomm and with
// HTTP/1.0 servers. So it does through a relay such as socat or ssh -L, which does not
// pass a reset on: connect to the socket directly.
//
// The errors match:
//
//   - [io/fs.ErrInvalid]: an argument is nil, or a unix URL has a host
//   - [io/fs.ErrNotExist], [syscall.ECONNREFUSED]: the stream is gone
//   - [errors.ErrUnsupported]: nothing handles the scheme
//   - [io.ErrUnexpectedEOF]: the source was cut off
//   - [os.ErrDeadlineExceeded]: the source did not answer within the minute
//
// An error of dest ends the stream and is returned.
func Stream(dest io.Writer, addr *url.URL) error {
	if dest == nil || addr == nil {
		return fmt.Errorf("stream: destination or URL is nil: %w", fs.ErrInvalid)
	}
	located, err := locate(addr)
	if err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	src, err := openStream(context.Background(), &getClient, located)
	if err != nil {
		return fmt.Errorf("stream from %s: %w", addr.Redacted(), asTimeout(asUnexpectedEOF(err)))
	}
	defer src.Close()
	if n, err := io.Copy(dest, sourceReader{src}); err != nil {
		return fmt.Errorf("stream from %s, after %d bytes: %w", addr.Redacted(), n, err)
	}
	return nil
}

// sourceReader turns the early end of a source into io.ErrUnexpectedEOF. An error of the
// destination stays as it is.
type sourceReader struct{ io.Reader }

func (r sourceReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != io.EOF {
		err = asUnexpectedEOF(err)
	}
	return n, err
}

// openStream connects to the source of a stream. For a unix socket it takes the Path of
// the URL as it is. The source stays open until it is closed or the context ends.
func openStream(ctx context.Context, client *http.Client, addr *url.URL) (io.ReadCloser, error) {
	if addr.Scheme != "unix" {
		return openStreamHTTP(ctx, client, addr)
	}
	dialCtx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	conn, err := dialUnix(dialCtx, addr.Path, "")
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(addr.Path, streamSuffix) {
		if _, err := conn.Write([]byte{0}); err != nil { // fits any buffer: it can't block
			_ = conn.Close()
			return nil, err
		}
	}
	return closeWith(ctx, conn), nil
}

// closeWith closes the connection when the context ends.
func closeWith(ctx context.Context, conn net.Conn) io.ReadCloser {
	if ctx.Done() == nil {
		return conn
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	return streamSource{conn, func() { stop() }}
}

// streamSource is a source that releases its context when it is closed.
type streamSource struct {
	io.ReadCloser
	release func()
}

func (s streamSource) Close() error {
	defer s.release()
	return s.ReadCloser.Close()
}

// unixConn returns the unix socket of a source that openStream has opened; nil if it is
// none.
func unixConn(src io.Reader) *net.UnixConn {
	if s, ok := src.(streamSource); ok {
		src = s.ReadCloser
	}
	conn, _ := src.(*net.UnixConn)
	return conn
}

// getClient sends through http.DefaultTransport, whatever it is at the time of a request.
var getClient = http.Client{CheckRedirect: func(req *http.Request, via []*http.Request) error {
	req.Header.Del("Referer") // the URL gives access to the stream
	return checkRedirects(via)
}}

func checkRedirects(via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	return nil
}

func openStreamHTTP(ctx context.Context, client *http.Client, addr *url.URL) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	answered := time.AfterFunc(sendTimeout, func() { cancel(os.ErrDeadlineExceeded) })
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "", nil)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	req.URL = requestURL(addr)
	req.Header.Set("Accept-Encoding", "identity") // else the transport asks for gzip and unpacks it
	answer, err := doHTTP(req, client)
	answered.Stop()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	src := streamSource{answer.Body, func() { cancel(nil) }}
	if answer.StatusCode != http.StatusOK {
		src.Close()
		return nil, &statusError{code: answer.StatusCode, status: answer.Status}
	}
	return src, nil
}

// waitPeerGone blocks until the peer has closed, this end has closed, or the read
// deadline passes. Closing over ends a pause between two checks, but not the wait for an
// event on the socket.
func waitPeerGone(conn *net.UnixConn, over <-chan struct{}) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	// The consumer's unread byte makes the socket readable all the time. So raw.Read also
	// returns each time the consumer takes data; the pause keeps that from being a loop.
	var last time.Time
	gone := false
	check := func(fd uintptr) bool {
		gone = peerGoneFD(fd)
		now := time.Now()
		soon := now.Sub(last) < streamPoll
		last = now
		return gone || soon
	}
	pause := time.NewTimer(streamPoll)
	defer pause.Stop()
	for {
		if err := raw.Read(check); err != nil || gone {
			return
		}
		pause.Reset(streamPoll)
		select {
		case <-over:
			return
		case <-pause.C:
		}
	}
}

// peerGone reports whether the peer or this end has closed the connection.
func peerGone(conn net.Conn) bool {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return true
	}
	gone := true
	_ = raw.Control(func(fd uintptr) { gone = peerGoneFD(fd) })
	return gone
}

// peerGoneFD reports whether the peer has closed, without reading or sending a byte: to
// send an empty message fails with EPIPE if nobody can receive it.
func peerGoneFD(fd uintptr) bool {
	_, err := syscall.SendmsgN(int(fd), nil, nil, nil, 0)
	return errors.Is(err, syscall.EPIPE)
}
