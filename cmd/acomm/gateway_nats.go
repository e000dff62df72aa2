package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"
)

const (
	natsQueue        = "acomm"
	natsRescan       = 2 * time.Second // for tasks that have come or gone
	natsStartTimeout = 10 * time.Second
)

// natsFront takes requests over NATS.
type natsFront struct {
	gateway *gateway
	server  *server.Server // nil unless embedded
	conn    *nats.Conn

	stop    context.CancelFunc   // ends the scanning
	scanned chan struct{}        // closed when it has ended
	serving map[string]io.Closer // by task; the scanning's, until it has ended
}

// connectNATS connects to the server, or starts it, and makes the transports send
// to hooks with the scheme nats: the one that connects, and the one before it.
func connectNATS(opts *gatewayOptions, front, connecting *http.Transport) (*natsFront, error) {
	f := &natsFront{serving: make(map[string]io.Closer), scanned: make(chan struct{})}
	address := opts.nats
	if address == "embedded" {
		var err error
		if f.server, err = startNATSServer(opts.natsListen); err != nil {
			return nil, fmt.Errorf("start a NATS server on %s: %w", opts.natsListen, err)
		}
		address = f.server.ClientURL()
	}
	conn, err := nats.Connect(address, nats.Name("acomm gateway "+opts.name), nats.MaxReconnects(-1))
	if err == nil {
		f.conn = conn
		// Registered behind the front, so that its answers are looked at as others are.
		http.DefaultTransport = connecting
		err = natshook.Register(conn)
		http.DefaultTransport = front
	}
	if err != nil {
		f.disconnect()
		return nil, connectError(address, err)
	}
	front.RegisterProtocol("nats", hookTransport{connecting, opts.hookTimeout})
	return f, nil
}

// hosts names the servers that the connection knows.
func (f *natsFront) hosts() string { return natsHosts(strings.Join(f.conn.Servers(), ",")) }

func startNATSServer(listen string) (*server.Server, error) {
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, err
	}
	port, err := net.LookupPort("tcp", portText)
	if err != nil {
		return nil, err
	}
	// The server itself would only log that it can't listen.
	probe, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, err
	}
	_ = probe.Close()
	if port == 0 {
		port = server.RANDOM_PORT
	}
	s, err := server.NewServer(&server.Options{Host: host, Port: port, NoSigs: true})
	if err != nil {
		return nil, err
	}
	failed := make(natsFailure, 1)
	s.SetLogger(failed, false, false)
	ready := make(chan bool, 1)
	go s.Start()                                                     // ends with the server
	go func() { ready <- s.ReadyForConnections(natsStartTimeout) }() // within that time
	select {
	case is := <-ready:
		if is {
			return s, nil
		}
		err = fmt.Errorf("not ready after %v: %w", natsStartTimeout, os.ErrDeadlineExceeded)
	case err = <-failed:
	}
	s.Shutdown()
	return nil, err
}

// natsFailure is a server's log, of which it takes only what is fatal: where a
// program is the server, it has nobody else to tell.
type natsFailure chan error

func (f natsFailure) Fatalf(format string, args ...any) {
	select {
	case f <- fmt.Errorf(format, args...):
	default: // the first tells
	}
}

func (natsFailure) Noticef(string, ...any) {}
func (natsFailure) Warnf(string, ...any)   {}
func (natsFailure) Errorf(string, ...any)  {}
func (natsFailure) Debugf(string, ...any)  {}
func (natsFailure) Tracef(string, ...any)  {}

// start serves the tasks that have providers now, then looks for others now and
// then.
func (f *natsFront) start(g *gateway) {
	f.gateway = g
	ctx, stop := context.WithCancel(context.Background())
	f.stop = stop
	if f.server != nil {
		logrus.WithField("url", f.server.ClientURL()).Info("gateway: NATS server started")
	}
	f.scan()
	go func() { // close waits for it
		defer close(f.scanned)
		ticks := time.NewTicker(natsRescan)
		defer ticks.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticks.C:
				f.scan()
			}
		}
	}()
}

// scan subscribes to the tasks that have come and leaves those that have gone.
func (f *natsFront) scan() {
	entries, err := os.ReadDir(f.gateway.opts.socketDir)
	if err != nil {
		f.gateway.warn("failed to look for tasks", err, "", "")
		return
	}
	present := make(map[string]bool)
	for _, entry := range entries {
		task := entry.Name()
		if strings.Contains(task, ".") || !isSubject(task) || checkTaskName(task) != nil {
			continue
		}
		providers, err := f.gateway.providers(task)
		present[task] = err == nil && len(providers) > 0
	}
	for task, closer := range f.serving {
		if !present[task] {
			delete(f.serving, task)
			f.leave(task, closer)
		}
	}
	for task, is := range present {
		if !is || f.serving[task] != nil {
			continue
		}
		subject := f.gateway.opts.natsSubject + "." + task
		closer, err := natshook.Serve(f.conn, subject, natsQueue, http.HandlerFunc(f.gateway.handleRequest))
		if err != nil {
			f.gateway.warn("failed to subscribe to a task", err, "", task)
			continue
		}
		f.serving[task] = closer
		logrus.WithField("subject", subject).Info("gateway: serving over NATS")
	}
}

func (f *natsFront) leave(task string, closer io.Closer) {
	if err := closer.Close(); err != nil {
		f.gateway.warn("failed to unsubscribe from a task", err, "", task)
	}
}

// close takes no more requests. Responses can be sent until disconnect.
func (f *natsFront) close() {
	f.stop()
	<-f.scanned
	var leaving sync.WaitGroup
	for task, closer := range f.serving {
		leaving.Go(func() { f.leave(task, closer) })
	}
	leaving.Wait()
}

// disconnect ends the connection, and the server if it is this process's.
func (f *natsFront) disconnect() {
	if f.conn != nil {
		if err := f.conn.FlushTimeout(natsStartTimeout); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			logrus.WithError(err).Warn("gateway: failed to send the last messages over NATS")
		}
		f.conn.Close()
	}
	if f.server != nil {
		f.server.Shutdown()
		f.server.WaitForShutdown()
	}
}
