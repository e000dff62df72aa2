package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

const maxTaskName = 255 // bytes, of a file name

// The directories that hold sockets of gateways, not of providers.
const (
	coordinatorDir = "coordinator"
	responseDir    = "response"
)

// Why a request is refused; see the help on metrics.
const (
	reasonInvalid    = "invalid"
	reasonNoProvider = "no_provider"
	reasonRefused    = "refused"
	reasonDuplicate  = "duplicate"
	reasonBusy       = "busy"
	reasonDraining   = "draining"
	reasonUnclear    = "unclear"
)

// refusal is why a request is not acknowledged.
type refusal struct {
	status int // over HTTP
	reason string
	err    error // for the requester
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(status int, reason, format string, args ...any) *refusal {
	return &refusal{status, reason, fmt.Errorf(format, args...)}
}

// gateway forwards requests to providers, and their responses to the requests'
// hooks.
type gateway struct {
	opts     *gatewayOptions
	rules    hookRules
	access   *access
	hosts    hostNames
	timeouts httpTimeouts
	tracker  *acomm.Tracker // never started: for the URLs of streams
	hook     *url.URL       // of the responses
	waiting  outstanding
	streams  publishedStreams
	results  taskResults
	health   health
	metrics  *gatewayMetrics
	pending  atomic.Int64  // requests that are tracked, or whose response is being sent to the hook
	draining atomic.Bool   // no more requests are taken
	ending   chan struct{} // closed when streams must move or are cut off
	natsHook bool          // there is a connection for hooks with the scheme nats
	lines    *rate.Limiter // of the log about what strangers can cause
}

// task names the request's task for metrics: strangers must not be able to make up
// names without bound.
func (g *gateway) task(name string) string {
	if checkTaskName(name) != nil {
		return ""
	}
	if info, err := os.Stat(filepath.Join(g.opts.socketDir, name)); err != nil || !info.IsDir() {
		return ""
	}
	return name
}

// take has a provider take the request. A nil error is the acknowledgement: the
// response, or a time-out, is going to be sent to the hook. After a refusal it
// will not be.
func (g *gateway) take(req *acomm.Request, local bool) *refusal {
	task := g.task(req.Task)
	g.metrics.requests.WithLabelValues(task).Inc()
	r := g.forward(req, task, local)
	if r != nil {
		g.refused(task, req.ID, r)
	}
	return r
}

// refused counts and logs a refusal.
func (g *gateway) refused(task, id string, r *refusal) {
	g.metrics.refused.WithLabelValues(task, r.reason).Inc()
	if g.opts.verbose || r.reason == reasonUnclear {
		g.warn("refused a request", r.err, id, task)
	}
}

// warn logs ten lines a second at most; all is counted.
func (g *gateway) warn(message string, err error, id, task string) {
	if g.lines.Allow() {
		logrus.WithFields(logrus.Fields{"error": shorten(err.Error()), "id": shorten(id), "task": task}).Warn(message)
	}
}

// shorten keeps a peer from filling the log with one line.
func shorten(text string) string {
	const limit = 256
	if len(text) <= limit {
		return text
	}
	return text[:limit] + "..."
}

func (g *gateway) forward(req *acomm.Request, task string, local bool) *refusal {
	if g.draining.Load() {
		return errDraining()
	}
	if err := req.Validate(); err != nil {
		return &refusal{http.StatusBadRequest, reasonInvalid, err}
	}
	if err := checkTaskName(req.Task); err != nil {
		return &refusal{http.StatusBadRequest, reasonInvalid, err}
	}
	if err := g.checkHook(req.ResponseHook, local); err != nil {
		return &refusal{http.StatusBadRequest, reasonInvalid, err}
	}
	providers, err := g.providers(req.Task)
	if err != nil || len(providers) == 0 {
		if err != nil {
			g.warn("failed to look for providers", err, req.ID, task)
		}
		return refuse(http.StatusOK, reasonNoProvider, "nobody provides the task %q", req.Task)
	}
	if req.ResponseHook.Scheme == "unix" {
		return g.offer(providers, req)
	}
	return g.proxy(providers, req, task)
}

func errDraining() *refusal {
	return refuse(http.StatusServiceUnavailable, reasonDraining, "the gateway is ending")
}

// What is kept of a request while it is outstanding is at most so many bytes.
const (
	maxID   = 1 << 10
	maxHook = 8 << 10
)

// proxy offers the request with the gateway's own hook, and tracks it.
func (g *gateway) proxy(providers []*url.URL, req *acomm.Request, task string) *refusal {
	if g.pending.Add(1) > int64(g.opts.maxOutstanding) {
		g.pending.Add(-1)
		return refuse(http.StatusTooManyRequests, reasonBusy, "%d requests are waiting for responses: try again later", g.opts.maxOutstanding)
	}
	if hook := req.ResponseHook.String(); len(req.ID) > maxID || len(hook) > maxHook {
		g.pending.Add(-1)
		return refuse(http.StatusBadRequest, reasonInvalid, "the id has %d bytes (limit %d), the hook %d bytes (limit %d)", len(req.ID), maxID, len(hook), maxHook)
	}
	taken := time.Now()
	hook := req.ResponseHook // without the request: its arguments are not kept for so long
	tracked, err := g.waiting.add(req.ID, g.opts.timeout, g.publish, func(resp *acomm.Response) {
		defer g.pending.Add(-1)
		g.finish(hook, resp, task, taken)
	})
	if err != nil {
		g.pending.Add(-1)
		if errors.Is(err, fs.ErrExist) {
			return refuse(http.StatusOK, reasonDuplicate, "the id %.256q is in use: a request with it is waiting for its response", req.ID)
		}
		return errDraining()
	}
	hooked := &acomm.Request{ID: req.ID, Task: req.Task, ResponseHook: g.hook, Args: req.Args}
	r := g.offer(providers, hooked)
	if r == nil {
		return nil
	}
	if !g.waiting.remove(tracked) {
		return nil // a response or the time-out came first, and is sent to the hook
	}
	g.waiting.drop()
	g.pending.Add(-1)
	return r
}

// offer sends the request to the first provider that takes it.
func (g *gateway) offer(providers []*url.URL, req *acomm.Request) *refusal {
	var words error // of the last provider that has refused it
	for _, provider := range providers {
		err := acomm.Send(provider, req)
		switch {
		case err == nil:
			return nil
		case isRefusal(err):
			words = err
		case isNotConnected(err):
		case errors.Is(err, syscall.EMSGSIZE):
			return refuse(http.StatusRequestEntityTooLarge, reasonInvalid, "the request is too large for the provider")
		default:
			// The path in the error is of no concern to strangers.
			g.warn("a provider may or may not have taken a request", err, req.ID, req.Task)
			return refuse(http.StatusBadGateway, reasonUnclear, "a provider of %q may or may not have taken the request", req.Task)
		}
	}
	if words != nil {
		return &refusal{http.StatusOK, reasonRefused, words}
	}
	return refuse(http.StatusOK, reasonNoProvider, "no provider of %q is listening", req.Task)
}

// handleResponse takes a response of a provider. A stream that is not passed on is
// ended: it holds its program, and that a place at its provider.
func (g *gateway) handleResponse(resp *acomm.Response) {
	if g.waiting.respond(resp) {
		return
	}
	g.warn("dropped a response that nobody waits for", errNotWaiting, resp.ID, "")
	if resp.StreamURL == nil {
		return
	}
	// One that is published has come before, and was passed on.
	if published, err := g.tracker.ProxyStreamHTTPURL(resp.StreamURL); err == nil && !g.streams.has(published) {
		leaveStream(resp.StreamURL)
	}
}

var errNotWaiting = errors.New("it is too late, or its id is unknown")

// publish notes the stream of a response. Another copy of the response, which may come at
// the same time, then leaves it alone.
func (g *gateway) publish(resp *acomm.Response) {
	if resp.StreamURL == nil {
		return
	}
	if published, err := g.tracker.ProxyStreamHTTPURL(resp.StreamURL); err == nil {
		g.streams.add(published, resp.StreamURL)
	}
}

// finish counts the response to a request, or its time-out, and sends it to the
// hook.
func (g *gateway) finish(hook *url.URL, resp *acomm.Response, task string, taken time.Time) {
	g.count(resp, task, taken)
	out := *resp
	if resp.StreamURL != nil {
		published, err := g.tracker.ProxyStreamHTTPURL(resp.StreamURL)
		if err != nil {
			g.warn("forwarding a response without its stream", withoutURL(err), resp.ID, task)
		}
		out.StreamURL = published
	}
	err := g.deliver(hook, &out, task, taken.Add(g.opts.timeout))
	switch {
	case out.StreamURL == nil:
	case err != nil && (isNotTaken(err) || isTooLarge(hook, &out, err)):
		g.streams.end(streamKey(out.StreamURL))
	default:
		g.streams.told(out.StreamURL)
	}
}

// count counts the response to a request, or its time-out.
func (g *gateway) count(resp *acomm.Response, task string, taken time.Time) {
	switch {
	case errors.Is(resp.Error, os.ErrDeadlineExceeded): // no error from outside does
		g.metrics.timeouts.WithLabelValues(task).Inc()
	case resp.Error != nil:
		g.metrics.responses.WithLabelValues(task, "error").Inc()
		g.metrics.seconds.WithLabelValues(task).Observe(time.Since(taken).Seconds())
	default:
		g.metrics.responses.WithLabelValues(task, "success").Inc()
		g.metrics.seconds.WithLabelValues(task).Observe(time.Since(taken).Seconds())
	}
}

// deliver sends the response to the hook, or that it is too large. The error is that
// of the response.
func (g *gateway) deliver(hook *url.URL, resp *acomm.Response, task string, deadline time.Time) error {
	err := sendResponse(hook, resp, deadline)
	if err == nil {
		return nil
	}
	g.metrics.forwardFailures.WithLabelValues(task).Inc()
	g.warn("failed to forward a response", sendError(hook, err), resp.ID, task)
	if isTooLarge(hook, resp, err) { // the requester must not wait in vain
		if err := sendResponse(hook, tooLarge(resp), deadline); err != nil {
			g.warn("failed to say that a response is too large", sendError(hook, err), resp.ID, task)
		}
	}
	return err
}

// isNotTaken reports whether an error of sending a response proves that its hook
// has not taken it.
func isNotTaken(err error) bool {
	answered := (*answerError)(nil)
	return isRefusal(err) || isNotConnected(err) || errors.As(err, &answered) ||
		errors.Is(err, errHookDenied)
}

// checkTaskName refuses what is not the name of a directory for providers.
func checkTaskName(task string) error {
	switch {
	case !fs.ValidPath(task), task == ".", strings.ContainsAny(task, "/\x00"), len(task) > maxTaskName,
		task == coordinatorDir, task == responseDir:
		return fmt.Errorf("%.*q is not the name of a task", maxTaskName, task)
	}
	return nil
}

// providers returns the sockets of the task, in the order of their names.
func (g *gateway) providers(task string) ([]*url.URL, error) {
	dir := filepath.Join(g.opts.socketDir, task)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var sockets []*url.URL
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if strings.HasSuffix(entry.Name(), ".sock") && isSocket(path, entry.Type()) {
			sockets = append(sockets, &url.URL{Scheme: "unix", Path: path})
		}
	}
	return sockets, nil
}

// checkHook refuses hooks that no response can be sent to, or must not be. Those
// with a host name are checked when it is known where that leads.
func (g *gateway) checkHook(hook *url.URL, local bool) error {
	switch {
	case hook.Scheme == "unix":
		if !local {
			return errors.New("a request over HTTP or NATS can't have a unix hook")
		}
		return nil
	case hook.Scheme == "nats" && g.natsHook:
		return nil
	case hook.Scheme != "http" && hook.Scheme != "https":
		return fmt.Errorf("hooks with the scheme %.32q are not supported", hook.Scheme)
	case hook.Host == "":
		return errors.New("the hook has no host")
	}
	if addr, err := netip.ParseAddr(hook.Hostname()); err == nil {
		return g.rules.check(addr)
	}
	return nil
}
