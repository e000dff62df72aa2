package natshook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"
)

const (
	defaultQueue = "acomm"
	flushTimeout = 10 * time.Second // for a server to confirm what was sent to it
	closeGrace   = time.Second      // for which Close leaves handlers their context
)

// maxHandlers bounds the handlers of one Serve that run at a time. A variable for
// the tests.
var maxHandlers = 1024

// Serve runs the handler for each request to the subject, until the closer is
// closed. It returns when the connection's server knows the subscription; other
// servers of a cluster learn of it a moment later. After 10 s it gives up, with an
// error that matches [os.ErrDeadlineExceeded].
//
// All that serve a subject in the same queue group, in any process, share its
// requests: each request reaches one of them. An empty queue means the group acomm.
// Each group gets every request, and the first answer counts.
//
// The handler gets a POST, as over HTTP: the payload is the body, and the URL is
// that of the subject. Its status, headers and body are the acknowledgement, which
// is sent when the handler returns. So the handler must not wait for the work. Each
// call has a goroutine of its own, and up to 1,024 run at a time. Further requests
// are answered with 503 and Retry-After: 1. A panic is logged and answered with 500,
// and so is an answer over the server's payload limit. A message without a reply
// subject is logged and dropped. natshook drops no request: unless the connection
// is lost, each is handled or answered with 503.
//
// Close ends the subscription and has the requests that have arrived handled. It
// waits for the handlers, and until the server has their answers. After a second it
// cancels the contexts of the handlers that still run. Close may be called several
// times and from several goroutines: each call waits for the first and returns the
// same error. The handler must not call it.
//
// These errors match [io/fs.ErrInvalid]: a nil connection or handler, a subject that
// is invalid or has wildcards, and a queue with a space. A closed connection gives
// [net.ErrClosed]. If the server's permissions forbid the subscription, only the
// connection's error handler learns of it, and nothing arrives. If the connection is
// closed before Close, nothing more arrives, and lost answers are logged.
func Serve(nc *nats.Conn, subject, queue string, h http.Handler) (io.Closer, error) {
	if nc == nil || h == nil {
		return nil, fmt.Errorf("serve %q: nil connection or handler: %w", subject, fs.ErrInvalid)
	}
	if err := checkSubject(subject); err != nil {
		return nil, fmt.Errorf("serve: %w", err)
	}
	if queue == "" {
		queue = defaultQueue
	}
	s := &server{
		nc:      nc,
		handler: h,
		subject: subject,
		turns:   make(chan struct{}, maxHandlers),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.close = sync.OnceValue(s.stop)
	if err := s.subscribe(queue); err != nil {
		s.cancel()
		return nil, fmt.Errorf("serve %q: %w", subject, named(err))
	}
	return s, nil
}

// server serves one subscription.
type server struct {
	nc      *nats.Conn
	handler http.Handler
	subject string
	sub     *nats.Subscription
	ctx     context.Context // of all handlers
	cancel  context.CancelFunc
	close   func() error
	turns   chan struct{} // holds a value for each handler that runs

	mu       sync.Mutex // guards the fields below
	stopped  bool       // no handler starts any more
	handlers sync.WaitGroup
}

// Close implements [io.Closer].
func (s *server) Close() error { return s.close() }

func (s *server) subscribe(queue string) (err error) {
	if s.sub, err = s.nc.QueueSubscribe(s.subject, queue, s.take); err != nil {
		return err
	}
	// take does not wait for handlers, so what is pending stays little; a limit
	// would only make nats.go drop requests.
	if err = s.sub.SetPendingLimits(-1, -1); err == nil {
		err = s.nc.FlushTimeout(flushTimeout)
	}
	if err != nil {
		_ = s.sub.Unsubscribe()
	}
	return err
}

func (s *server) stop() error {
	err := s.drain()
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()

	grace := time.AfterFunc(closeGrace, s.cancel)
	s.handlers.Wait()
	grace.Stop()
	s.cancel()
	if err = errors.Join(err, s.flush()); err != nil {
		return fmt.Errorf("close %q: %w", s.subject, named(err))
	}
	return nil
}

// drain ends the subscription when what has come for it was taken. Where the server
// is lost nothing more can come, and nobody would confirm the end.
func (s *server) drain() error {
	ended := s.sub.StatusChanged(nats.SubscriptionClosed) // closed with it
	ctx, stop := untilLost(context.Background(), s.nc)
	defer stop()
	if !s.nc.IsConnected() {
		_ = s.sub.Unsubscribe() // fails if the connection is closed
		return nil
	}
	if err := s.sub.Drain(); err != nil {
		return nil // the connection is closed
	}
	select {
	case <-ended:
	case <-ctx.Done():
		_ = s.sub.Unsubscribe()
	case <-time.After(2 * flushTimeout):
		_ = s.sub.Unsubscribe()
		return fmt.Errorf("requests still come: %w", nats.ErrTimeout)
	}
	return nil
}

// flush waits until the server has the answers. Where it is lost they go out to the
// next one, if ever.
func (s *server) flush() error {
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	ctx, stop := untilLost(ctx, s.nc)
	defer stop()
	if !s.nc.IsConnected() {
		return nil
	}
	err := s.nc.FlushWithContext(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("answers: %w", err)
	}
	return nil // sent, or the server is lost
}

// take starts a handler for the message. It runs in the subscription's goroutine.
func (s *server) take(msg *nats.Msg) {
	if msg.Reply == "" {
		s.log("dropped a message that is not a request", errors.New("it has no reply subject"))
		return
	}
	if !s.begin() {
		answer := failure(http.StatusServiceUnavailable, "too many requests are being handled, or the service is stopping")
		answer.header.Set("Retry-After", "1")
		s.reply(msg, answer)
		return
	}
	go func() { // ends with its handler; stop waits for it
		defer s.handlers.Done()
		s.handle(msg)
	}()
}

// begin takes a turn to handle a message; handle gives it back.
func (s *server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	select {
	case s.turns <- struct{}{}:
		s.handlers.Add(1)
		return true
	default:
		return false
	}
}

// handle runs the handler and sends its answer, whatever way the handler ends.
func (s *server) handle(msg *nats.Msg) {
	w := &answer{header: make(http.Header), limit: s.nc.MaxPayload()}
	returned := false
	defer func() {
		if !returned {
			// nil: the handler has ended its goroutine
			if cause := recover(); cause != http.ErrAbortHandler {
				s.log("handler panicked", fmt.Errorf("%v\n%s", cause, debug.Stack()))
			}
			w = failure(http.StatusInternalServerError, "handler failed")
		}
		<-s.turns // before the answer: whoever has it finds the turn free
		s.reply(msg, w)
	}()
	s.handler.ServeHTTP(w, newRequest(s.ctx, msg))
	returned = true
}

// newRequest turns a message into the request that a handler gets.
func newRequest(ctx context.Context, msg *nats.Msg) *http.Request {
	u := URL(msg.Subject)
	req := &http.Request{
		Method:        http.MethodPost,
		URL:           u,
		RequestURI:    u.RequestURI(),
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        header(msg),
		Body:          io.NopCloser(bytes.NewReader(msg.Data)),
		ContentLength: int64(len(msg.Data)),
	}
	if req.Header.Get("Content-Type") == "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return req.WithContext(ctx)
}

// reply sends the answer to the message.
func (s *server) reply(msg *nats.Msg, w *answer) {
	var err error
	if !w.tooLarge {
		err = msg.RespondMsg(w.message())
	}
	if w.tooLarge || errors.Is(err, nats.ErrMaxPayload) {
		s.log("answer is over the server's payload limit", syscall.EMSGSIZE)
		err = msg.RespondMsg(failure(http.StatusInternalServerError, "answer is too large").message())
	}
	if err != nil {
		s.log("failed to answer", named(err))
	}
}

func (s *server) log(what string, err error) {
	logrus.WithFields(logrus.Fields{"error": err, "addr": URL(s.subject).String()}).Error(what)
}

// answer is an [net/http.ResponseWriter] that keeps what is written.
type answer struct {
	header   http.Header
	code     int // 0: not set yet
	body     bytes.Buffer
	limit    int64
	tooLarge bool // the body is incomplete
}

// failure returns an answer that says what failed in the way of acomm's peers.
func failure(code int, words string) *answer {
	w := &answer{header: make(http.Header), code: code}
	body, _ := json.Marshal(&acomm.Response{Error: errors.New(words)}) // can't fail
	w.header.Set("Content-Type", "application/json")
	w.body.Write(body)
	return w
}

func (w *answer) Header() http.Header { return w.header }

func (w *answer) WriteHeader(code int) {
	if code < 100 || code > 999 {
		panic(fmt.Sprintf("invalid status %d", code)) // as net/http does
	}
	if w.code == 0 && code >= 200 {
		w.code = code
	}
}

func (w *answer) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if int64(w.body.Len()+len(p)) > w.limit {
		w.tooLarge = true
		return 0, fmt.Errorf("answer is over the NATS server's limit of %d bytes: %w", w.limit, syscall.EMSGSIZE)
	}
	return w.body.Write(p)
}

func (w *answer) message() *nats.Msg {
	w.WriteHeader(http.StatusOK)
	msg := nats.NewMsg("")
	for key, values := range w.header {
		msg.Header[key] = values
	}
	// NATS has a meaning of its own for these: an empty answer with the Status 503
	// would say that there was nobody to handle it.
	msg.Header.Del("Status")
	msg.Header.Del("Description")
	msg.Header.Set(statusHeader, strconv.Itoa(w.code))
	msg.Data = w.body.Bytes()
	return msg
}
