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

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

// runGateway runs a gateway until it is told to stop. It says on stdout when it is
// ready.
func runGateway(ctx context.Context, opts *gatewayOptions, stdout io.Writer) error {
	signals := make(chan os.Signal, 2)
	notifyEnd(signals)
	defer signal.Stop(signals)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a log that nobody reads does not end it

	rules, err := newHookRules(opts.hookAllow, opts.hookDeny)
	if err != nil {
		return err
	}
	transport, connecting := newHookTransport(rules, opts.hookProxy)
	http.DefaultTransport = transport

	tcp, err := net.Listen("tcp", opts.listen)
	if err != nil {
		return err
	}
	front := newLimitedListener(tcp, opts.maxConnections)
	defer front.Close()
	streamURL, err := opts.streamURLAt(tcp.Addr())
	if err != nil {
		return err
	}
	var overNATS *natsFront
	if opts.nats != "" {
		if overNATS, err = connectNATS(opts, transport, connecting); err != nil {
			return err
		}
		defer overNATS.disconnect()
	}
	tracker, err := acomm.NewTracker(opts.socket(responseDir), streamURL, opts.timeout)
	if err != nil {
		return err
	}
	requests := acomm.NewUnixListener(opts.socket(coordinatorDir), 0)
	if err := tracker.Start(); err != nil {
		return err
	}
	if err := requests.Start(); err != nil {
		tracker.Stop()
		return err
	}
	errorLog := logrus.StandardLogger().WriterLevel(logrus.WarnLevel)
	defer errorLog.Close()
	s := &gatewayServer{
		gateway: &gateway{
			opts: opts, rules: rules, timeouts: defaultHTTPTimeouts, tracker: tracker,
			natsHook: overNATS != nil,
			ending:   make(chan struct{}),
			lines:    rate.NewLimiter(10, 10),
		},
		requests: requests,
		nats:     overNATS,
	}
	s.metrics = newGatewayMetrics(s.pending.Load)
	s.http = s.newServer(front, errorLog)
	return s.run(ctx, signals, front, stdout)
}

// socket is the path of a socket of the gateway itself.
func (o *gatewayOptions) socket(dir string) string {
	return filepath.Join(o.socketDir, dir, o.name+".sock")
}

// gatewayServer is a gateway with what it takes requests from.
type gatewayServer struct {
	*gateway
	requests *acomm.UnixListener
	http     *http.Server
	nats     *natsFront // nil without NATS
}

// run serves until a signal, then drains until another one.
func (s *gatewayServer) run(ctx context.Context, signals <-chan os.Signal, front net.Listener, stdout io.Writer) error {
	supervisor := newNotifier()
	defer supervisor.close()
	served := make(chan error, 1)
	var serving sync.WaitGroup
	serving.Go(func() { s.serveUnix(s.requests) })
	serving.Go(func() { served <- s.http.Serve(front) })

	if s.nats != nil {
		s.nats.start(s.gateway)
	}
	_, failed := fmt.Fprintf(stdout, "listening on %s\n", front.Addr())
	if failed == nil {
		logrus.WithFields(logrus.Fields{"addr": front.Addr().String(), "socket": s.requests.Addr()}).Info("gateway: ready")
		supervisor.ready()
		select {
		case sig := <-signals:
			supervisor.stopping()
			s.draining.Store(true)
			logrus.WithFields(logrus.Fields{"signal": sig.String(), "outstanding": s.pending.Load()}).Info("gateway: draining")
		case <-ctx.Done():
		case failed = <-served:
		}
	}
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
		_ = os.Remove(s.tracker.Addr())
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
	s.tracker.Stop()
	close(s.ending)
	_ = s.http.Shutdown(context.Background()) // can only fail to close the listener
}
