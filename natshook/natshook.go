// Package natshook carries the requests and responses of
// [github.com/mistifyio/acomm] over NATS. A subject takes the place of a host name,
// a queue group lets many providers share a task, and the connection fails over
// between servers.
//
// After [Register], [acomm.Send], [acomm.Request.Respond] and the forwarding of
// [acomm.Tracker.ProxyUnix] accept URLs such as nats:///worker.tasks as they accept
// http URLs. [Serve] passes what is sent to a subject to an [net/http.Handler]. The
// same handler can serve requests and responses over HTTP.
//
// # The exchange
//
// A POST is a NATS request, and its answer is the acknowledgement. The header
// Acomm-Status of the reply has the HTTP status. An exchange happens at most once:
// natshook never sends a message twice. If a server or a connection is lost, its
// messages are lost too, and their senders get errors. Nothing is stored. No
// JetStream stream may capture a subject of natshook: it would answer in place of
// the handler, and such an answer is an error.
//
// Streams use HTTP. A method other than POST, and so [acomm.Stream], gets an error
// that matches [errors.ErrUnsupported].
//
// # Errors
//
// Errors match the sentinels that acomm uses:
//
//   - [io/fs.ErrInvalid]: a nil argument; a missing, invalid or reserved subject; a
//     URL with a user, a query, a fragment or the host of another server
//   - [io/fs.ErrExist]: the scheme is registered already
//   - [net.ErrClosed]: the NATS connection is closed or draining
//   - [errors.ErrUnsupported]: not a POST; a transport without RegisterProtocol; a
//     server without headers
//   - [syscall.ECONNREFUSED]: nobody serves the subject, or no server could be
//     reached (then [os.ErrDeadlineExceeded] matches too). Nobody got the message,
//     and a tracker tries to forward it again
//   - [syscall.EMSGSIZE]: the payload is over the server's limit (1 MiB by default)
//   - [io.ErrUnexpectedEOF]: the connection to the server was lost before the
//     acknowledgement, or the reply is not an acknowledgement; the message may have
//     arrived
//   - [os.ErrDeadlineExceeded]: no acknowledgement in time; the message may have
//     arrived
//
// # Security
//
// The account of the NATS connection decides who may send to a subject. The
// requester chooses the hook. It can name every subject that the connection may
// publish to, so restrict the permissions of the connection. Three kinds of
// subjects are refused: those that begin with $ (the servers' own), those below
// _INBOX, and those over 1,024 bytes.
package natshook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

const (
	scheme       = "nats"
	statusHeader = "Acomm-Status" // of a reply; NATS has a meaning of its own for Status
	defaultPort  = "4222"
	maxSubject   = 1024 // bytes; a server drops the connection at 4,096
)

// maxWait bounds an exchange whose context has no earlier deadline. A variable for
// the tests, which lose messages on purpose.
var maxWait = time.Minute

// Register makes the present [net/http.DefaultTransport] send POSTs to nats URLs
// over the connection. The caller keeps the connection and closes it in the end.
// From then on every send gets an error that matches [net.ErrClosed].
//
// A URL is nats:///subject. It may have a host, nats://host:4222/subject, if that is
// a server that the connection was given or has learnt of. The message still goes
// over the connection, to the server it is connected to at the moment. Any other
// host is an error that matches [io/fs.ErrInvalid].
//
// A send waits for the acknowledgement until the deadline of its context, but at
// most a minute. While the connection is being restored, the send waits for that.
// If the connection is lost while sends wait for acknowledgements, they end at once
// with [io.ErrUnexpectedEOF].
//
// A transport takes one connection, once and for good. If the scheme is registered
// already, by anybody, the error matches [io/fs.ErrExist]. A nil connection gives
// [io/fs.ErrInvalid], a closed one [net.ErrClosed]. If DefaultTransport is not an
// [net/http.Transport], the error matches [errors.ErrUnsupported].
func Register(nc *nats.Conn) (err error) {
	switch {
	case nc == nil:
		return fmt.Errorf("register nats: connection is nil: %w", fs.ErrInvalid)
	case nc.IsClosed():
		return fmt.Errorf("register nats: %w", named(nats.ErrConnectionClosed))
	}
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return fmt.Errorf("register nats: http.DefaultTransport is a %T: %w", http.DefaultTransport, errors.ErrUnsupported)
	}
	defer func() { // there is no other way to learn of it without a race
		if recover() != nil {
			err = fmt.Errorf("register nats: the scheme is registered already: %w", fs.ErrExist)
		}
	}()
	transport.RegisterProtocol(scheme, &roundTripper{nc: nc})
	return nil
}

// URL returns the URL of a subject, nats:///subject. It does not check the subject;
// a send to the URL does. The caller owns the URL.
func URL(subject string) *url.URL {
	return &url.URL{Scheme: scheme, Path: "/" + subject}
}

// roundTripper sends HTTP requests as NATS requests.
type roundTripper struct {
	nc *nats.Conn
}

// RoundTrip implements [net/http.RoundTripper].
func (rt *roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close()
	}
	if req.Method != http.MethodPost {
		return nil, fmt.Errorf("%s over NATS: only POST is supported, streams use HTTP: %w", req.Method, errors.ErrUnsupported)
	}
	subject, err := rt.subject(req.URL)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(req.Context(), maxWait)
	defer cancel()
	if err := rt.connected(ctx); err != nil {
		return nil, err
	}
	msg := nats.NewMsg(subject)
	for key, values := range req.Header {
		msg.Header[key] = values
	}
	if msg.Data, err = readBody(req.Body, rt.nc.MaxPayload()); err != nil {
		return nil, err
	}
	reply, err := rt.exchange(ctx, msg)
	if err != nil {
		return nil, err
	}
	return newResponse(req, reply)
}

// subject returns the subject that a URL names.
func (rt *roundTripper) subject(u *url.URL) (string, error) {
	switch {
	case u.Opaque != "", u.RawQuery != "", u.Fragment != "", u.User != nil && u.User.String() != "":
		return "", fmt.Errorf("a nats URL must not have a user, a query or a fragment: %w", fs.ErrInvalid)
	case u.Host != "" && !rt.knows(u):
		return "", fmt.Errorf("host %q is not a server of the NATS connection: %w", u.Host, fs.ErrInvalid)
	}
	subject := strings.TrimPrefix(u.Path, "/")
	return subject, checkSubject(subject)
}

// knows reports whether the URL's host is a server of the connection.
func (rt *roundTripper) knows(u *url.URL) bool {
	host := hostPort(u)
	if host == rt.nc.ConnectedAddr() {
		return true
	}
	for _, s := range rt.nc.Servers() {
		if server, err := url.Parse(s); err == nil && hostPort(server) == host {
			return true
		}
	}
	return false
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// checkSubject refuses what is no subject, and what a requester has no business
// to make others send to.
func checkSubject(subject string) error {
	bad := func(r rune) bool { return r == '*' || r == '>' || unicode.IsSpace(r) || unicode.IsControl(r) }
	var why string
	switch {
	case subject == "":
		why = "is missing"
	case len(subject) > maxSubject:
		return fmt.Errorf("NATS subject has %d bytes, the limit is %d: %w", len(subject), maxSubject, fs.ErrInvalid)
	case !utf8.ValidString(subject) || strings.ContainsFunc(subject, bad):
		why = "has a space, a wildcard or a control character"
	case strings.HasPrefix(subject, ".") || strings.HasSuffix(subject, ".") || strings.Contains(subject, ".."):
		why = "has an empty token"
	case subject[0] == '$' || subject == "_INBOX" || strings.HasPrefix(subject, "_INBOX."):
		why = "is reserved"
	default:
		return nil
	}
	return fmt.Errorf("NATS subject %q %s: %w", subject, why, fs.ErrInvalid)
}

// connected waits until the connection has a server. What is published before that
// would be kept, and go out after its sender has given up.
func (rt *roundTripper) connected(ctx context.Context) error {
	changed := rt.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer rt.nc.RemoveStatusListener(changed)
	for {
		switch {
		case rt.nc.IsClosed():
			return named(nats.ErrConnectionClosed)
		case rt.nc.IsDraining():
			return named(nats.ErrConnectionDraining)
		case rt.nc.IsConnected():
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("no NATS server can be reached: %w: %w", syscall.ECONNREFUSED, named(ctx.Err()))
			}
			return ctx.Err()
		}
	}
}

// readBody reads a body of at most limit bytes.
func readBody(body io.Reader, limit int64) ([]byte, error) {
	if body == nil {
		return nil, nil
	}
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("payload is over the NATS server's limit of %d bytes: %w", limit, syscall.EMSGSIZE)
	}
	return data, nil
}

// untilLost returns a context that also ends, with the error of NATS as its cause,
// when the connection loses its server or is closed. The caller calls stop.
func untilLost(ctx context.Context, nc *nats.Conn) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	lost := nc.StatusChanged(nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED)
	watched := make(chan struct{})
	go func() { // stop waits for it
		defer close(watched)
		switch status, isOpen := <-lost; {
		case !isOpen:
		case status == nats.CLOSED:
			cancel(nats.ErrConnectionClosed)
		default:
			cancel(nats.ErrDisconnected)
		}
	}()
	return ctx, func() {
		nc.RemoveStatusListener(lost) // closes it
		<-watched
		cancel(nil)
	}
}

// exchange publishes the message and waits for the reply, the end of the context or
// the loss of the connection.
func (rt *roundTripper) exchange(ctx context.Context, msg *nats.Msg) (*nats.Msg, error) {
	ctx, stop := untilLost(ctx, rt.nc)
	defer stop()
	reply, err := rt.nc.RequestMsgWithContext(ctx, msg)
	if errors.Is(err, context.Canceled) {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, named(err)
	}
	return reply, nil
}

// named gives an error of NATS the name that acomm has for it.
func named(err error) error {
	for _, name := range []struct{ theirs, ours error }{
		{nats.ErrNoResponders, syscall.ECONNREFUSED},
		{nats.ErrConnectionClosed, net.ErrClosed},
		{nats.ErrConnectionDraining, net.ErrClosed},
		{nats.ErrDisconnected, io.ErrUnexpectedEOF},
		{nats.ErrReconnectBufExceeded, syscall.ECONNREFUSED},
		{nats.ErrMaxPayload, syscall.EMSGSIZE},
		{nats.ErrBadSubject, fs.ErrInvalid},
		{nats.ErrBadQueueName, fs.ErrInvalid},
		{nats.ErrHeadersNotSupported, errors.ErrUnsupported},
		{nats.ErrTimeout, os.ErrDeadlineExceeded},
		{context.DeadlineExceeded, os.ErrDeadlineExceeded},
	} {
		if errors.Is(err, name.theirs) {
			return fmt.Errorf("%w: %w", err, name.ours)
		}
	}
	var socket net.Error // of a large message: nats.go writes it in the sender's goroutine
	if errors.As(err, &socket) {
		// Only its words: it may match net.ErrClosed, yet the connection is made again.
		return fmt.Errorf("%w: %w: %v", nats.ErrDisconnected, io.ErrUnexpectedEOF, err)
	}
	return err
}

// header returns the message's, with keys as HTTP has them.
func header(msg *nats.Msg) http.Header {
	h := make(http.Header)
	for key, values := range msg.Header {
		for _, value := range values {
			h.Add(key, value)
		}
	}
	return h
}

// newResponse turns a reply into the answer to the request.
func newResponse(req *http.Request, reply *nats.Msg) (*http.Response, error) {
	status := reply.Header.Get(statusHeader)
	code, err := strconv.Atoi(status)
	if err != nil || code < 200 || code > 999 {
		return nil, fmt.Errorf("reply is not an acknowledgement: its header %s is %q: %w", statusHeader, status, io.ErrUnexpectedEOF)
	}
	return &http.Response{
		Status:        strings.TrimSpace(fmt.Sprintf("%d %s", code, http.StatusText(code))),
		StatusCode:    code,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        header(reply),
		Body:          io.NopCloser(bytes.NewReader(reply.Data)),
		ContentLength: int64(len(reply.Data)),
		Request:       req,
	}, nil
}
