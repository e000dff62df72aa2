package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// place is where the URL leads, without what may make it a secret: of a socket the
// path, of NATS the subject, of others the scheme and the host.
func place(u *url.URL) string {
	switch u.Scheme {
	case "unix":
		return (&url.URL{Scheme: u.Scheme, Path: u.Path}).String()
	case "nats":
		return u.Scheme + "://" + u.Host + u.Path // readable also with a $
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String()
}

// typed is place with the path, for a URL of the command line: it is in the list of
// processes anyway.
func typed(u *url.URL) string {
	if u.Scheme != "http" && u.Scheme != "https" {
		return place(u)
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// sendError is an error of the library's Send, which names the whole URL unless it
// is the peer's refusal, without the URL's secrets.
func sendError(to *url.URL, err error) error { return sendErrorTo(place(to), err) }

func sendErrorTo(place string, err error) error {
	if isRefusal(err) {
		return err
	}
	return fmt.Errorf("send to %s: %w", place, withoutURL(err))
}

// natsHosts names the servers of a list of NATS URLs without their secrets.
func natsHosts(servers string) string {
	var hosts []string
	for text := range strings.SplitSeq(servers, ",") {
		if !strings.Contains(text, "://") {
			text = "nats://" + text
		}
		if u, err := url.Parse(strings.TrimSpace(text)); err == nil && u.Host != "" {
			hosts = append(hosts, u.Host)
		}
	}
	return strings.Join(hosts, ",")
}

// withoutURL is the cause of an error of the library that names a URL, or of
// net/url.
func withoutURL(err error) error {
	if cause := errors.Unwrap(err); cause != nil {
		return cause
	}
	return err
}
