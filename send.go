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

// Send sends the payload, usually a [Request] or a [Response], to the URL. It blocks
// until the peer has acknowledged it, for a minute at most. An acknowledged message was
// received and is well-formed; its task need not be done. Any number of goroutines may
// call Send. Do not change the payload before it returns.
//
// With the scheme unix it connects to the socket at the URL's Path, or uses the process's
// session to it (see the package documentation). If there is no socket at Path, it tries
// the path as it was written: in "unix://" + path, the parser takes a question mark for
// the start of a query, and %41 for an A.
//
// With another scheme it POSTs the JSON through [net/http.DefaultTransport], with the
// settings of that moment for TLS, proxies and further schemes (RegisterProtocol):
//
//   - A 2xx answer with an empty body accepts the message. A Response in the body accepts
//     or refuses it. Any other answer is an error.
//   - Redirects 307 and 308 are followed, 10 at most, without a Referer. Others are
//     errors.
//   - Up to 100 posts go to a host at a time, or MaxIdleConnsPerHost if that is more.
//     Others wait within their minute.
//   - A hook should keep idle connections open for longer than the transport's
//     IdleConnTimeout (or 90 s if that is 0). Otherwise a post may be lost.
//
// A peer's refusal is returned with its text unchanged. If only the acknowledgement is
// lost, that is an error too, and the peer has the payload. The errors match:
//
//   - [io/fs.ErrInvalid]: the URL or payload is nil, or malformed: no host for HTTP; a
//     host or no valid path for unix; an id, task, hook or stream URL that is not UTF-8;
//     JSON nested more than 10,000 levels deep
//   - [syscall.EMSGSIZE]: the JSON is over 64 MiB, or the answer over 1 MiB
//   - [errors.ErrUnsupported]: nothing handles the scheme
//   - [io/fs.ErrNotExist], [syscall.ECONNREFUSED]: no such socket; nobody listens
//   - [syscall.ENAMETOOLONG]: the socket's path is over 107 bytes (on Linux)
//   - [io.ErrUnexpectedEOF]: the peer closed without an acknowledgement
//   - [os.ErrDeadlineExceeded]: the minute has passed
func Send(addr *url.URL, payload interface{}) error {
	return send(time.Now().Add(sendTimeout), addr, payload)
}

// send is Send with another deadline than a minute from now.
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

// sendUnix carries out one exchange with the listener at the path, on a session or on a
// connection of its own, and returns the acknowledgement. The message begins with room
// for a session header, which is 4 bytes longer than that of a plain frame.
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

// sendAlone carries out one exchange on a connection of its own. If the acknowledgement
// says that the listener can have sessions, it has one opened in the background.
func sendAlone(deadline time.Time, path string, frame []byte) (*Response, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	name := "" // the socket has none
	canOpen := sessions.mayOpen(path)
	if canOpen {
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
	// A peer may refuse a frame before it has read all of it. Its refusal says more than
	// our broken pipe, so we try to read it even if the write failed.
	_, writeErr := conn.Write(frame) // in one write: a peer of 2016 reads it with one read
	data, err := readFrame(conn)
	ack := &Response{}
	if err == nil {
		err = decodeFrame(data, ack)
	}
	if writeErr != nil && (err != nil || ack.Error == nil) {
		return nil, writeErr
	}
	if err != nil {
		return nil, fmt.Errorf("read acknowledgement: %w", err)
	}
	if canOpen && hasSessionsMember(data) {
		sessions.open(path)
	}
	return ack, nil
}

// accepted is the acknowledgement without an error, for all who send or receive one.
var accepted = &Response{}
