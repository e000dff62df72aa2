package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats.go"
)

// parseNATSTarget looks for what makes no sense in a URL of a subject.
func parseNATSTarget(u *url.URL) error {
	subject := strings.TrimPrefix(u.Path, "/")
	if subject == "" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("URL: a NATS URL is nats://[HOST[:PORT]]/SUBJECT, without query and fragment")
	}
	if !isSubject(subject) {
		return fmt.Errorf("URL: %q is not a valid subject: no spaces, wildcards, empty tokens, $... or _INBOX", subject)
	}
	return nil
}

// connectError is an error of connecting to the NATS servers, without their URLs,
// which may hold a password.
func connectError(servers string, err error) error {
	var parse *url.Error
	if errors.As(err, &parse) {
		err = parse.Err
	}
	if hosts := natsHosts(servers); hosts != "" {
		return fmt.Errorf("connect to NATS at %s: %w", hosts, err)
	}
	return fmt.Errorf("connect to NATS: %w", err)
}

// openNATSHook connects to the server that the target names, has requests and
// responses go over the connection, and serves a subject nobody can guess.
func (c *call) openNATSHook(tracker *acomm.Tracker) (*url.URL, func(), error) {
	server := os.Getenv("NATS_URL") // may be a list
	if c.target.Host != "" {
		u := url.URL{Scheme: c.target.Scheme, User: c.target.User, Host: c.target.Host}
		server = u.String()
	}
	if server == "" {
		server = nats.DefaultURL
	}
	nc, err := nats.Connect(server, nats.Name("acomm call"), nats.Timeout(min(c.timeout, nats.DefaultTimeout)))
	if err != nil {
		return nil, nil, &exitError{exitNotSent, connectError(server, err)}
	}
	hook := natshook.URL("acomm.call." + rand.Text())
	serving, err := natshook.Serve(nc, strings.TrimPrefix(hook.Path, "/"), "", responseHandler(tracker))
	if err = errors.Join(err, natshook.Register(nc)); err != nil {
		nc.Close()
		return nil, nil, &exitError{exitNotSent, err}
	}
	c.shown = typed(&url.URL{Scheme: c.target.Scheme, Host: nc.ConnectedAddr(), Path: c.target.Path})
	// The host and the user are those of the connection.
	c.target = natshook.URL(strings.TrimPrefix(c.target.Path, "/"))
	return hook, func() {
		_ = serving.Close()
		nc.Close()
	}, nil
}
