package acomm

import (
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"net/url"
	"time"
)

const sendTimeout = time.Minute // bounds a Send: dial, write and acknowledgement together

// Send attempts to send the payload, usually a [Request] or a [Response], to the
// specified URL and waits until the peer has acknowledged it, for a minute at
// most: dial, write and acknowledgement together. Acknowledged means received
// and well-formed, not done. An error means that the payload may not have
// arrived; where the acknowledgement itself was lost, it may have.
//
// Any number of goroutines may call it, also with the same URL and payload. Nobody
// may change the payload before it returns. It works in every process, also after
// the Stop of all trackers and listeners.
//
// A URL with the scheme unix is the socket at the URL's Path, or, where none is there,
// at the path as it was written: in "unix://" + path a question mark begins a query for
// the parser, and %41 is an A. On Linux, while a [Tracker] or [UnixListener] of this
// process is started, the first message to a process that has this library too opens a
// session: one connection for all goroutines, for up to 1,024 exchanges at a time of up
// to 64 KiB of JSON, together 2 MiB. A message over these limits goes on a connection of
// its own. A process opens 256 sessions at most, or as many as an eighth of its
// descriptors. A session is closed after 5 to 10 s without an exchange, and where a
// descriptor is lacking. A message that was certainly not served is sent again, on
// another connection and within the same minute; one that may have been is not. A
// socket file that was replaced, removed, or given another mode or owner is noticed
// within a millisecond, and connected to again. A thread with another file-system user
// or group than the one that opened the session has a connection of its own.
//
// Everything else goes out as an HTTP POST with the JSON as its body, through
// [net/http.DefaultTransport] as it is at that moment, so its settings for TLS,
// proxies and further schemes (RegisterProtocol) apply. There a status of 2xx is
// delivered: with an empty body, or with a Response that accepts or refuses it.
// Any other answer is an error. Redirects are followed where they keep the
// payload (307 and 308), without a Referer. At most 1 MiB of the answer is read. Up to
// 100 posts go to a host at a time, more if MaxIdleConnsPerHost of that transport is
// more; others wait for their turn, within their minute. A redirect counts for the first
// host. If MaxIdleConnsPerHost is not set, up to 100 idle connections to a host are kept
// for posts. They are closed after the transport's IdleConnTimeout, or 90 s if it has
// none; its CloseIdleConnections does not close them. A hook should keep idle
// connections open for longer than that: a post that meets one as it is closed may be
// lost.
//
// The peer's refusal is returned with its text unchanged. The other errors match
// [io/fs.ErrInvalid] (nil URL or payload, no host in an HTTP URL or one in a unix URL, a
// path that is no socket path, an id, task, hook or stream URL that is not UTF-8, a
// unix hook without an absolute path, JSON nested more than 10,000 levels deep),
// [syscall.EMSGSIZE] (over 64 MiB of JSON), [errors.ErrUnsupported] (a scheme
// nobody handles), [io/fs.ErrNotExist] (no such socket), [syscall.ECONNREFUSED]
// (nobody listens), [syscall.ENAMETOOLONG] (the socket's path),
// [io.ErrUnexpectedEOF] (the peer closed without acknowledging) and
// [os.ErrDeadlineExceeded] (the minute has passed).
func Send(addr *url.URL, payload interface{}) error {
	return send(time.Now().Add(sendTimeout), addr, payload)
}

// send is Send with a deadline.
func send(deadline time.Time, addr *url.URL, payload interface{}) error {
	if addr == nil {
		return fmt.Errorf("send: URL is nil: %w", fs.ErrInvalid)
	}
	if err := checkUnixURL(addr); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	const room = sessionHeaderSize - headerSize
	m, err := encodeFrame(room, payload)
	if err != nil {
		return fmt.Errorf("send to %s: %w", addr.Redacted(), err)
	}
	var ack *Response
	if addr.Scheme == "unix" {
		ack, err = sendUnix(deadline, socketPath(addr), m)
	} else {
		ack, err = sendHTTP(deadline, addr, m.text[sessionHeaderSize:])
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", addr.Redacted(), asTimeout(asUnexpectedEOF(err)))
	}
	return ack.Error
}

// sendUnix carries out one exchange with the listener at the path, by a session or else
// on a connection of its own, and returns the acknowledgement. In front of the frame
// there is room for the longer header of a session.
func sendUnix(deadline time.Time, path string, m *message) (*Response, error) {
	if len(m.text) <= sessionHeaderSize+maxMessage {
		ack, err := sessions.send(deadline, path, m)
		if err != errUnsent {
			return ack, err
		}
	}
	defer m.release()
	const room = sessionHeaderSize - headerSize
	frame := m.text[room:]
	putFrameHeader(frame)
	return sendAlone(deadline, path, frame)
}

// sendAlone carries out one exchange on a connection of its own.
func sendAlone(deadline time.Time, path string, frame []byte) (*Response, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	name := "" // none: the system picks it
	wants := sessions.wants(path)
	if wants {
		name = senderName + rand.Text()
	}
	conn, err := dialUnix(ctx, path, name)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	// A peer may refuse a frame before it has read all of it. Its word says more
	// than our broken pipe, so it is looked for even if the write failed.
	_, writeErr := conn.Write(frame) // all of it: a peer of 2016 reads it with one read
	data, err := readFrame(conn)
	ack := &Response{}
	if err == nil {
		err = decodeFrame(data, ack)
	}
	if writeErr != nil && (err != nil || ack.Error == nil) {
		return nil, writeErr
	}
	if err != nil {
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	if wants && hasSessionsMember(data) {
		sessions.open(path)
	}
	return ack, nil
}

// accepted is the acknowledgement that nearly all are.
var accepted = &Response{}
