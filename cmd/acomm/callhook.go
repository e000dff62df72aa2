package main

import (
	"context"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/mistifyio/acomm"
)

// hookTimeout is for what is being received when the call ends.
const hookTimeout = 10 * time.Second

// openHook opens what the response to the call is sent to, and returns its URL
// and what closes it. The latter waits until a response that has been received is
// acknowledged.
func (c *call) openHook(tracker *acomm.Tracker) (*url.URL, func(), error) {
	switch c.target.Scheme {
	case "unix":
		return tracker.URL(), func() {}, nil
	case "nats":
		return c.openNATSHook(tracker)
	}
	hook, err := c.publicHook()
	if err != nil {
		return nil, nil, &exitError{exitUsage, err}
	}
	listener, err := net.Listen("tcp", c.hookListen)
	if err != nil {
		return nil, nil, usageError("--hook-listen: %w", err)
	}
	if hook == nil {
		addr := listener.Addr().(*net.TCPAddr)
		if addr.IP.IsUnspecified() {
			_ = listener.Close()
			return nil, nil, usageError("--hook-listen %s is not an address that others can send to: give one with --hook-url", c.hookListen)
		}
		hook = &url.URL{Scheme: "http", Host: addr.String(), Path: "/"}
	}
	server := &http.Server{
		Handler:     responseHandler(tracker),
		ReadTimeout: c.timeout, // no response is waited for any longer
		ErrorLog:    log.New(io.Discard, "", 0),
	}
	served := make(chan struct{})
	go func() { // closeHook waits for it
		defer close(served)
		_ = server.Serve(listener)
	}()
	return hook, func() {
		ctx, cancel := context.WithTimeout(context.Background(), hookTimeout)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
		<-served
	}, nil
}

// publicHook is the URL that the user has named for the hook, nil if none.
func (c *call) publicHook() (*url.URL, error) {
	if c.hookURL == "" {
		return nil, nil
	}
	u, err := url.Parse(c.hookURL)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, usageError("--hook-url is not http(s)://HOST[:PORT][/PATH]")
	}
	return u, nil
}

// responseHandler takes responses over HTTP. An empty answer with the status 200
// acknowledges one.
func responseHandler(tracker *acomm.Tracker) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "send a response with POST", http.StatusMethodNotAllowed)
			return
		}
		resp := &acomm.Response{}
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPayload)).Decode(resp); err != nil {
			http.Error(w, "the body is not a response", http.StatusBadRequest)
			return
		}
		tracker.HandleResponse(resp)
	})
}
