package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

// responsesEnd is for responses that come while the gateway ends.
const responsesEnd = 100 * time.Millisecond

// runGateway runs a gateway until it is told to stop. It says on stdout when it is
// ready.
func runGateway(ctx context.Context, opts *gatewayOptions, stdout io.Writer) error {
	signals := make(chan os.Signal, 2)
	notifyEnd(signals)

	rules, err := newHookRules(opts.hookAllow, opts.hookDeny)
	if err != nil {
		return err
	}
	transport, connecting := newHookTransport(rules, opts.hookProxy, opts.hookTimeout)
	http.DefaultTransport = transport

	if opts.access.isUsed() {
		signal.Notify(signals, syscall.SIGHUP) // under nohup, too
		signals = withoutHangups(signals, opts.access.readAgain)
	}
	// Before anything listens that clients find. A signal ends the waiting.
	var overNATS *natsFront
	if opts.nats != "" {
		connect := func() (*natsFront, error) { return connectNATS(opts, transport, connecting) }
		if overNATS, err = connectUnless(signals, connect); overNATS == nil {
			return err
		}
		defer overNATS.disconnect()
	}
	tcp, err := opts.listenHTTP()
	if err != nil {
		return err
	}
	front := newLimitedListener(opts.access.secure(tcp), opts.maxConnections)
	defer front.Close()
	s, err := newGatewayServer(opts, rules, tcp.Addr(), overNATS)
	if err != nil {
		return err
	}
	errorLog := logrus.StandardLogger().WriterLevel(logrus.WarnLevel)
	defer errorLog.Close()
	s.http = s.newServer(front, errorLog)
	return s.run(ctx, signals, front, stdout)
}

// connectUnless connects to NATS. If a signal comes first it returns nil, and no error.
func connectUnless(signals <-chan os.Signal, connect func() (*natsFront, error)) (*natsFront, error) {
	type connection struct {
		front *natsFront
		err   error
	}
	connected := make(chan connection, 1)
	go func() { // ends with the process, if not before
		front, err := connect()
		connected <- connection{front, err}
	}()
	select {
	case c := <-connected:
		return c.front, c.err
	case sig := <-signals:
		logrus.WithField("signal", sig.String()).Info("gateway: stopped before it was connected to NATS")
		return nil, nil
	}
}

// newGatewayServer starts what a gateway has on this machine. It serves nobody before run.
func newGatewayServer(opts *gatewayOptions, rules hookRules, listens net.Addr, overNATS *natsFront) (*gatewayServer, error) {
	streamURL, err := opts.streamURLAt(listens)
	if err != nil {
		return nil, err
	}
	tracker, err := acomm.NewTracker(opts.socket(responseDir), streamURL, opts.timeout)
	if err != nil {
		return nil, err
	}
	responses := acomm.NewUnixListener(opts.socket(responseDir), 0)
	if err := responses.Start(); err != nil {
		return nil, err
	}
	requests := acomm.NewUnixListener(opts.socket(coordinatorDir), 0)
	if err := requests.Start(); err != nil {
		responses.Stop(responsesEnd)
		return nil, err
	}
	s := &gatewayServer{
		gateway: &gateway{
			opts: opts, rules: rules, access: opts.access, hosts: newHostNames(opts, listens), timeouts: defaultHTTPTimeouts,
			tracker: tracker, hook: responses.URL(), streams: publishedStreams{unread: opts.unread},
			natsHook: overNATS != nil,
			health:   health{dir: opts.socketDir, nats: overNATS},
			ending:   make(chan struct{}),
			lines:    rate.NewLimiter(10, 10),
		},
		requests: requests, responses: responses,
		nats: overNATS,
	}
	s.metrics = newGatewayMetrics(s.pending.Load)
	for _, socket := range []*acomm.UnixListener{requests, responses} {
		if err := s.health.own(socket.Addr()); err != nil {
			requests.Stop(0)
			responses.Stop(responsesEnd)
			return nil, err
		}
	}
	return s, nil
}

// socket is the path of a socket of the gateway itself.
func (o *gatewayOptions) socket(dir string) string {
	return filepath.Join(o.socketDir, dir, o.name+".sock")
}

// gatewayServer is a gateway with what it takes requests from.
type gatewayServer struct {
	*gateway
	requests  *acomm.UnixListener
	responses *acomm.UnixListener
	http      *http.Server
	nats      *natsFront // nil without NATS
}

// run serves until a signal, then drains until another one.
func (s *gatewayServer) run(ctx context.Context, signals <-chan os.Signal, front net.Listener, stdout io.Writer) error {
	supervisor := newNotifier()
	defer supervisor.close()
	served := make(chan error, 1)
	var serving sync.WaitGroup
	serving.Go(func() { s.serveUnix(s.requests) })
	serving.Go(func() { s.serveResponses(s.responses) })
	serving.Go(func() { served <- s.http.Serve(front) })

	if s.nats != nil {
		s.nats.start(s.gateway)
	}
	watched := make(chan struct{})
	serving.Go(func() { s.health.watch(watched) })
	addr := front.Addr().String()
	if front.Addr().Network() == "unix" {
		addr = "unix:" + addr
	}
	_, failed := fmt.Fprintf(stdout, "listening on %s\n", addr)
	if failed == nil {
		logrus.WithFields(logrus.Fields{"addr": front.Addr().String(), "socket": s.requests.Addr()}).Info("gateway: ready")
		supervisor.ready()
		select {
		case sig := <-signals:
			signals = secondSignal(signals)
			supervisor.stopping()
			s.draining.Store(true)
			logrus.WithFields(logrus.Fields{"signal": sig.String(), "outstanding": s.pending.Load()}).Info("gateway: draining")
		case <-ctx.Done():
		case failed = <-served:
		}
	}
	close(watched)
	drained := make(chan struct{})
	go func() { // waited for, unless the process ends at once
		defer close(drained)
		s.drain()
		serving.Wait()
	}()
	select {
	case <-drained:
		if failed == nil {
			logrus.Info("gateway: drained")
		}
		return failed
	case sig := <-signals:
		// The sockets are removed as far as possible: whoever finds one connects.
		_ = os.Remove(s.requests.Addr())
		_ = os.Remove(s.responses.Addr())
		return errors.Join(failed, fmt.Errorf("ended by a second signal, %v, with %d requests outstanding", sig, s.pending.Load()))
	}
}

// drain takes no more requests and waits for all that is under way. HTTP is served
// to the end, so that clients learn of it and streams can be read. Its exchanges
// have deadlines, and its streams must move from when all else is done.
func (s *gatewayServer) drain() {
	s.draining.Store(true)
	if s.nats != nil {
		s.nats.close()
	}
	s.requests.Stop(0) // its exchanges have deadlines
	s.waiting.stop()
	select { // each has its time
	case <-s.results.allFetched():
	case <-time.After(s.opts.unread):
		s.warn("ended while responses wait to be fetched", fmt.Errorf("%d of them", s.results.number()), "", "")
	}
	s.responses.Stop(responsesEnd) // nobody waits for what may still come
	close(s.ending)
	_ = s.http.Shutdown(context.Background()) // can only fail to close the listener
	s.streams.endAll()                        // nobody can read them any more
}
