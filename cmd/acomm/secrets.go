package main

import (
	"errors"
	"fmt"
	"net/url"
)

// place is where the URL leads, without what may make it a secret: of a socket the
// path, of others the scheme and the host.
func place(u *url.URL) string {
	if u.Scheme == "unix" {
		return (&url.URL{Scheme: u.Scheme, Path: u.Path}).String()
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String()
}

// sendError is an error of the library's Send, which names the whole URL unless it
// is the peer's refusal, without the URL's secrets.
func sendError(to *url.URL, err error) error {
	if isRefusal(err) {
		return err
	}
	return fmt.Errorf("send to %s: %w", place(to), withoutURL(err))
}

// withoutURL is the cause of an error of the library that names a URL, or of
// net/url.
func withoutURL(err error) error {
	if cause := errors.Unwrap(err); cause != nil {
		return cause
	}
	return err
}
