package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

const (
	headerTimeout = 10 * time.Second // for the header of an HTTP request
	idleTimeout   = time.Minute      // for the next one on a connection
)

// httpTimeouts are for HTTP exchanges; only tests have others than these.
type httpTimeouts struct {
	body   time.Duration // for the body of a request
	answer time.Duration // from its headers to the end of the answer
}

var defaultHTTPTimeouts = httpTimeouts{body: time.Minute, answer: 2 * time.Minute}

// newServer returns the HTTP server, with a WriteTimeout of none: a stream takes
// as long as it takes. ConnState belongs to the listener.
func (g *gateway) newServer(front *limitedListener, errorLog io.Writer) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", g.handleRequest)
	mux.HandleFunc("/tasks", g.handleTasks)
	mux.HandleFunc("/tasks/{task}", g.handleTask)
	mux.HandleFunc(resultsPath+"{key}", g.handleResult)
	mux.HandleFunc("/stream", g.handleStream)
	mux.HandleFunc("/healthz", g.handleHealth)
	mux.Handle("/metrics", g.metrics.handler())
	sameOrigin := http.NewCrossOriginProtection()
	sameOrigin.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		r := refuse(http.StatusForbidden, reasonInvalid, "requests from web pages of other sites are refused")
		g.refused("", "", r)
		answer(w, "", r)
	}))
	return &http.Server{
		Handler:           g.bounded(g.onlyNamed(g.access.onlyWithToken(g, sameOrigin.Handler(mux)))),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    int(g.opts.maxHeader),
		ConnState:         front.connState,
		ErrorLog:          log.New(&limitedLog{errorLog, g.lines}, "", 0), // of strangers, too
	}
}

// bounded gives the client a time to send what it has announced, which net/http reads
// even if the handler does not, and to take the answer in: whatever is asked for, and
// whoever is refused. The next request on the connection sets its own; a stream has none.
func (g *gateway) bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		if r.ContentLength != 0 { // else a handler that waits would seem to have lost its client by then
			_ = control.SetReadDeadline(time.Now().Add(g.timeouts.body)) // only a test's recorder can't
		}
		_ = control.SetWriteDeadline(time.Now().Add(g.timeouts.answer))
		h.ServeHTTP(w, r)
	})
}

// limitedLog passes on so many lines and drops the others.
type limitedLog struct {
	io.Writer
	lines *rate.Limiter
}

func (l *limitedLog) Write(p []byte) (int, error) {
	if !l.lines.Allow() {
		return len(p), nil
	}
	return l.Writer.Write(p)
}

// handleRequest takes a request over HTTP. As on a unix socket, the answer is a
// Response without an error if the request is taken, else with the reason.
func (g *gateway) handleRequest(w http.ResponseWriter, r *http.Request) {
	if g.draining.Load() {
		w.Header().Set("Connection", "close") // the body is not read
		g.refused("", "", errDraining())
		answer(w, "", errDraining())
		return
	}
	req, refused := g.readRequest(w, r)
	if refused != nil {
		g.refused("", "", refused)
		answer(w, "", refused)
		return
	}
	answer(w, req.ID, g.take(req, false))
}

// readRequest reads the one request that is the body.
func (g *gateway) readRequest(w http.ResponseWriter, r *http.Request) (*acomm.Request, *refusal) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return nil, refuse(http.StatusMethodNotAllowed, reasonInvalid, "send a request with POST")
	}
	body, refused := g.readBody(w, r)
	if refused != nil {
		return nil, refused
	}
	req := &acomm.Request{}
	err := json.Unmarshal(body, req)
	var mismatch *json.UnmarshalTypeError
	if errors.As(err, &mismatch) && strings.EqualFold(mismatch.Field, "responsehook") {
		// A string, perhaps, which the library reads in a frame.
		err = acomm.UnmarshalConnData(newFrameConn(body), req)
	}
	if err != nil {
		return nil, refuse(http.StatusBadRequest, reasonInvalid, "parse the request: %w", err)
	}
	return req, nil
}

// frameConn is a connection on which one frame has arrived.
type frameConn struct {
	net.Conn // nil: nothing but Read is called
	frame    io.Reader
}

// newFrameConn returns a connection on which the payload has arrived as a frame.
func newFrameConn(payload []byte) *frameConn {
	header := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	return &frameConn{frame: io.MultiReader(bytes.NewReader(header), bytes.NewReader(payload))}
}

func (c *frameConn) Read(p []byte) (int, error) { return c.frame.Read(p) }

// readBody reads the whole body.
func (g *gateway) readBody(w http.ResponseWriter, r *http.Request) ([]byte, *refusal) {
	limit := int64(g.opts.maxBody)
	// Within bounded's deadline, not the server's ReadTimeout: that would end streams
	// as well.
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err == nil {
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // or the client seems to leave
	}
	tooLarge := (*http.MaxBytesError)(nil)
	switch {
	case errors.As(err, &tooLarge):
		return nil, refuse(http.StatusRequestEntityTooLarge, reasonInvalid, "the request is larger than %d bytes", limit)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, refuse(http.StatusRequestTimeout, reasonInvalid, "the request did not arrive within %v", g.timeouts.body)
	case err != nil:
		return nil, refuse(http.StatusBadRequest, reasonInvalid, "read the request: %w", err)
	}
	return body, nil
}

// answer acknowledges a request, or tells why it is refused.
func answer(w http.ResponseWriter, id string, r *refusal) {
	status, resp := http.StatusOK, &acomm.Response{ID: id}
	if r != nil {
		status, resp.Error = r.status, r.err
	}
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(resp) // a requester that has left can't be told
}

// handleStream serves a stream, which takes as long as it takes. Once the gateway is
// ending it is cut off when it has stood still for too long, because its source is
// silent or its client takes nothing.
func (g *gateway) handleStream(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Time{})
	ctx, cancel := context.WithCancel(r.Context())
	moving := &movingWriter{w, newMovement(), func() { g.streams.claimed(r.URL) }}
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-done:
			return
		case <-g.ending:
		}
		if !moving.moved.ends(done, nil) {
			_ = control.SetWriteDeadline(time.Unix(1, 0)) // ends a Write
			cancel()                                      // ends a Read
		}
	})
	defer func() { // also when the client is told of an early end, which is a panic
		close(done)
		watching.Wait()
		if ctx.Err() == nil {
			_ = control.SetWriteDeadline(time.Now().Add(g.timeouts.answer)) // for what is buffered
		}
		cancel()
	}()
	acomm.ProxyStreamHandler(moving, r.WithContext(ctx))
}

// movingWriter knows when something was last written.
type movingWriter struct {
	http.ResponseWriter
	moved *movement
	begin func() // called when the stream has a reader
}

func (w *movingWriter) WriteHeader(status int) {
	if status == http.StatusOK {
		w.begin()
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *movingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.moved.touch()
	return n, err
}

// Unwrap is for http.ResponseController.
func (w *movingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// serveUnix takes requests from the unix socket until the listener is stopped.
func (g *gateway) serveUnix(listener *acomm.UnixListener) {
	slots := make(chan struct{}, g.opts.maxConnections)
	var exchanges sync.WaitGroup
	defer exchanges.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		slots <- struct{}{}
		exchanges.Go(func() {
			defer func() { <-slots }()
			defer listener.DoneConn(conn)
			g.serveConn(conn)
		})
	}
}

// serveConn takes a request from a connection. Where it is unclear whether it was
// taken, its sender is not told anything, which says just that.
func (g *gateway) serveConn(conn net.Conn) {
	if err := conn.SetDeadline(time.Now().Add(headerTimeout)); err != nil {
		return
	}
	req := &acomm.Request{}
	var r *refusal
	if err := acomm.UnmarshalConnData(conn, req); err != nil {
		r = &refusal{reason: reasonInvalid, err: err}
		g.refused("", "", r)
	} else {
		r = g.take(req, true)
	}
	ack := &acomm.Response{ID: req.ID}
	if r != nil {
		if r.reason == reasonUnclear {
			return
		}
		ack.Error = r.err
	}
	if err := conn.SetDeadline(time.Now().Add(headerTimeout)); err != nil {
		return
	}
	if err := acomm.SendConnData(conn, ack); err != nil && r == nil {
		logrus.WithField("id", shorten(req.ID)).Debug("a requester closed the connection before it read the acknowledgement")
	}
}
