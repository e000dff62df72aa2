// Package natshook carries the requests and responses of
// [github.com/mistifyio/acomm] over NATS: subjects instead of host names, queue
// groups for many providers of one task, fail-over between servers.
//
// After [Register], [acomm.Send], [acomm.Request.Respond] and the forwarding of
// [acomm.Tracker.ProxyUnix] take URLs such as nats:///worker.tasks as they take
// http ones. [Serve] gives an [net/http.Handler], the same that takes requests
// and responses over HTTP, what is sent to a subject.
//
// # The exchange
//
// A POST is a NATS request, its answer the acknowledgement, with the HTTP status
// in the header Acomm-Status. It happens at most once: natshook never sends a
// message twice. A message is lost with the server or the connection it was on;
// its sender gets an error. Nothing is stored: a JetStream stream must not capture
// a subject of natshook's, since it would answer in the handler's place (such an
// answer is an error).
//
// Streams stay on HTTP: any method but POST, and so [acomm.Stream], gets an error
// that matches [errors.ErrUnsupported].
//
// # Errors
//
// Those of acomm, and the same sentinels:
//
//   - [io/fs.ErrInvalid]: a nil argument; no subject, or none that one may send to;
//     a URL with a user, a query, a fragment or the host of another server
//   - [io/fs.ErrExist]: the scheme is registered already
//   - [net.ErrClosed]: the NATS connection is closed or being drained
//   - [errors.ErrUnsupported]: not a POST; a transport without RegisterProtocol; a
//     server without headers
//   - [syscall.ECONNREFUSED]: nobody serves the subject, or no server could be
//     reached (then os.ErrDeadlineExceeded too). Nobody has got the message, and a
//     tracker's forward is tried again
//   - [syscall.EMSGSIZE]: the payload is over the server's limit (1 MiB by default)
//   - [io.ErrUnexpectedEOF]: the connection to the server was lost before the
//     acknowledgement, or what came is none; the message may have arrived
//   - [os.ErrDeadlineExceeded]: no acknowledgement in time; it may have arrived
//
// # Security
//
// The account of the NATS connection decides who may send to a subject. Hooks are
// chosen by the requester: subjects that begin with $ (the servers' own) or _INBOX
// are refused, and so are those over 1,024 bytes, but every other one that the
// connection may publish to can be named. Give it permissions that suit.
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

// Register makes [net/http.DefaultTransport], as it is now, send POSTs to URLs
// with the scheme nats over the connection. It stays the caller's, who closes it
// when nothing is sent any more; from then on every send gets an error that matches
// [net.ErrClosed].
//
// A URL is nats:///subject. It may name a host, nats://host:4222/subject, if that
// is one of the servers the connection knows (those it was given and those it has
// learnt of): the message then goes out over the connection all the same, to
// whichever of them it has. Any other host is an error that matches
// [io/fs.ErrInvalid], never ignored.
//
// A send waits for the acknowledgement until the deadline of its context, for a
// minute at most. While the connection is being made again, it waits for that. Those
// under way when a connection is lost end at once, with [io.ErrUnexpectedEOF].
//
// A transport has room for one connection: where the scheme is registered, by
// whomever, the error matches [io/fs.ErrExist]. It can't be undone. With a nil
// connection the error matches [io/fs.ErrInvalid], with a closed one
// [net.ErrClosed], and where DefaultTransport is not an [net/http.Transport]
// [errors.ErrUnsupported].
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

// URL returns the URL of a subject: nats:///subject. It does not say whether the
// subject is valid; sending to it does. The caller owns it.
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
		return nil, fmt.Errorf("%s over NATS, which carries POST alone (streams stay on HTTP): %w", req.Method, errors.ErrUnsupported)
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
		return "", fmt.Errorf("a nats URL has a subject, and neither user, query nor fragment: %w", fs.ErrInvalid)
	case u.Host != "" && !rt.knows(u):
		return "", fmt.Errorf("host %q is no server of the NATS connection: %w", u.Host, fs.ErrInvalid)
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
		return fmt.Errorf("a NATS subject of %d bytes, the limit is %d: %w", len(subject), maxSubject, fs.ErrInvalid)
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
		return nil, fmt.Errorf("reply is no acknowledgement: its header %s is %q: %w", statusHeader, status, io.ErrUnexpectedEOF)
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
