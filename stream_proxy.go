package acomm

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const (
	streamAddrParam      = "addr"
	streamSignatureParam = "signature"
	maxStreamQuery       = 8 << 10 // bytes
)

// streamKey returns the key with which this process signs the addresses it publishes.
var streamKey = sync.OnceValue(func() []byte {
	key := make([]byte, sha256.Size)
	rand.Read(key) // never fails
	return key
})

// proxyClient follows no redirect: nobody has signed the address that it leads to.
var proxyClient = http.Client{
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func signStream(addr string) string {
	mac := hmac.New(sha256.New, streamKey())
	mac.Write([]byte(addr))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// ProxyStreamHandler serves streams over HTTP. It is a [net/http.HandlerFunc] for the
// httpStreamURL of [NewTracker]. It serves the URLs that [Tracker.ProxyStreamHTTPURL] of
// this process made, and the streams that trackers of this process serve; nothing else.
// It blocks until the stream ends or the client leaves, which releases the source.
//
// The data is application/octet-stream. What has arrived is flushed before the handler
// waits for more. The status is:
//
//   - 405: the method is not GET (a HEAD would use up the stream)
//   - 400: the query can't be read, or the request has a body
//   - 403: this process has not published the address
//   - 404: the stream is gone
//   - 502: the source failed before its first byte, or redirects
//   - 505: the client speaks HTTP/1.0 and the handler can't reset its connection
//
// If the source fails after its first byte, the handler aborts the connection, so that
// the client can tell. It sets a write deadline in the past and panics with
// [http.ErrAbortHandler]; the deadline holds under middleware that recovers. If no
// deadline can be set, because a ResponseWriter wraps another one without an Unwrap
// method, it ends the server's goroutine with [runtime.Goexit].
//
// In HTTP/1.0, only a reset of the TCP connection tells a cut-off answer from a whole
// one. The handler needs a ResponseWriter that can be hijacked for that. If your listener
// wraps its connections, give them a method NetConn() net.Conn, as [crypto/tls.Conn] has
// it. Without it, a cut-off stream looks complete to a client of HTTP/1.0.
//
// A WriteTimeout of the server ends streams, too. If your service has other rules, write
// your own handler on [Stream].
func ProxyStreamHandler(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "a stream can only be read with GET", http.StatusMethodNotAllowed)
		return
	}
	if r.ContentLength != 0 { // net/http can't see a client leave whose body is unread
		http.Error(w, "a request for a stream must not have a body", http.StatusBadRequest)
		return
	}
	addr, published, err := parseStreamQuery(r.URL.RawQuery)
	if err != nil {
		http.Error(w, "not the address of a stream", http.StatusBadRequest)
		return
	}
	if !published {
		http.Error(w, "not a stream of this service", http.StatusForbidden)
		return
	}
	if isHTTP10(r) && !canReset(w, r) {
		http.Error(w, "a stream that is cut off can't be told from a whole one in HTTP/1.0 here; use HTTP/1.1",
			http.StatusHTTPVersionNotSupported)
		return
	}
	src, err := openStream(r.Context(), &proxyClient, addr)
	if err != nil {
		status := sourceStatus(err)
		http.Error(w, http.StatusText(status), status)
		return
	}
	defer src.Close()
	if !proxyStream(w, src) {
		abort(w, r)
	}
}

// parseStreamQuery returns the address in the query, and whether this process has
// published it.
func parseStreamQuery(rawQuery string) (addr *url.URL, published bool, err error) {
	if len(rawQuery) > maxStreamQuery {
		return nil, false, fmt.Errorf("query has %d bytes, limit %d", len(rawQuery), maxStreamQuery)
	}
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return nil, false, err
	}
	if len(query[streamAddrParam]) != 1 {
		return nil, false, errors.New("query has no address, or more than one")
	}
	text := query.Get(streamAddrParam)
	addr, err = url.ParseRequestURI(text)
	if err != nil {
		return nil, false, err
	}
	signature := query.Get(streamSignatureParam)
	if hmac.Equal([]byte(signature), []byte(signStream(text))) {
		return addr, true, nil
	}
	_, served := servedStreams.Load(addr.Path)
	return addr, served && addr.Scheme == "unix", nil
}

// sourceStatus returns the status for a source that can't be opened.
func sourceStatus(err error) int {
	var status *statusError
	gone := errors.As(err, &status) && (status.code == http.StatusNotFound || status.code == http.StatusGone)
	if gone || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return http.StatusNotFound
	}
	return http.StatusBadGateway
}

// proxyStream copies the source to the client. It reports whether the answer is complete.
// If not, the caller has to abort it: a return from the handler would make it look
// complete.
func proxyStream(w http.ResponseWriter, src io.Reader) bool {
	buf := make([]byte, streamBuffer)
	n, readErr := src.Read(buf)
	if n == 0 && readErr != nil && readErr != io.EOF {
		http.Error(w, http.StatusText(http.StatusBadGateway), http.StatusBadGateway)
		return true
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(http.StatusOK)
	readNow := nowReader(src, buf)
	for {
		if _, err := w.Write(buf[:n]); err != nil {
			return false
		}
		switch {
		case readErr == io.EOF:
			return true
		case readErr != nil:
			_ = flush(w) // the client gets what came before the failure
			return false
		}
		n, readErr = readNow()
		if readErr == syscall.EAGAIN { // the source may be silent for long, so flush first
			if err := flush(w); err != nil {
				return false
			}
			n, readErr = src.Read(buf)
		}
	}
}

func flush(w http.ResponseWriter) error {
	err := http.NewResponseController(w).Flush()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// nowReader returns a function that reads from the source without blocking. The function
// returns EAGAIN if nothing has arrived, or if the source is no unix socket.
func nowReader(src io.Reader, buf []byte) func() (int, error) {
	var raw syscall.RawConn
	if conn := unixConn(src); conn != nil {
		raw, _ = conn.SyscallConn()
	}
	if raw == nil {
		return func() (int, error) { return 0, syscall.EAGAIN }
	}
	var n int
	var err error
	read := func(fd uintptr) bool {
		for {
			if n, err = syscall.Read(int(fd), buf); err != syscall.EINTR {
				return true // false would wait until there is more
			}
		}
	}
	return func() (int, error) {
		switch rawErr := raw.Read(read); {
		case rawErr != nil:
			return 0, rawErr
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func isHTTP10(r *http.Request) bool { return r.ProtoMajor == 1 && r.ProtoMinor == 0 }

// canReset reports whether abort can hijack the connection of the request and reset it.
// It does not hijack it yet: until then, the server notices when the client leaves.
func canReset(w http.ResponseWriter, r *http.Request) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if _, ok := local.(*net.TCPAddr); !ok {
		return false
	}
	for {
		switch rw := w.(type) {
		case http.Hijacker:
			return true
		case interface{ Unwrap() http.ResponseWriter }:
			w = rw.Unwrap()
		default:
			return false
		}
	}
}

// abort ends the connection so that the client can tell that data is missing. The way of
// net/http is a panic. A write deadline in the past keeps the server from completing the
// answer if middleware recovers. If a wrapper hides the deadline, the goroutine ends
// instead: the server aborts as after a panic, and nothing can recover from that.
//
// In HTTP/1.0, which reverse proxies speak, the end of the connection is the end of the
// data. So there the connection is reset.
func abort(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	err := control.SetWriteDeadline(time.Unix(1, 0))
	if isHTTP10(r) {
		if conn, _, err := control.Hijack(); err == nil {
			conn = unwrap(conn) // closing TLS would tell the client that the data is complete
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0)
			}
			_ = conn.Close()
		}
	}
	if err != nil && r.Context().Value(http.ServerContextKey) != nil { // the goroutine is net/http's
		runtime.Goexit()
	}
	panic(http.ErrAbortHandler)
}
