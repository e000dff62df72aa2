package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// parseTarget makes a URL of the text, which may be the path of a socket.
func parseTarget(text string) (*url.URL, error) {
	if isPath(text) {
		path, err := filepath.Abs(text)
		return &url.URL{Scheme: "unix", Path: path}, err
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" {
		return nil, unclearTarget(text) // the error would quote a password
	}
	switch u.Scheme {
	case "unix":
		if err := checkUnixTarget(u); err != nil {
			return nil, fmt.Errorf("URL: %w", err)
		}
		return u, nil
	case "http", "https":
		if u.Host == "" {
			return nil, fmt.Errorf("URL: no host: write %s://HOST/", u.Scheme)
		}
		return u, nil
	case "nats":
		return u, parseNATSTarget(u)
	}
	return nil, unclearTarget(text) // the scheme may be a host, and what follows its port
}

var errTarget = errors.New("URL is not unix:///PATH, http(s)://HOST/, nats://HOST/SUBJECT or the path of a socket (/PATH, ./PATH)")

// isPath reports whether the text can only be the path of a socket.
func isPath(text string) bool {
	switch {
	case strings.HasPrefix(text, "/"), strings.HasPrefix(text, "."):
		return true
	case strings.Contains(text, ":"):
		return false
	case strings.HasSuffix(text, ".sock"):
		return true
	}
	info, err := os.Stat(text)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// checkUnixTarget looks for what makes no sense in the URL of a socket.
func checkUnixTarget(u *url.URL) error {
	switch {
	case u.Host == "" && strings.HasPrefix(u.Path, "/"):
		return nil
	case u.Opaque != "": // unix:x.sock
		return fmt.Errorf("the path is not absolute: write unix:///PATH, or ./%s", u.Opaque)
	case u.Path == "": // unix://x.sock
		return fmt.Errorf("the path is not absolute: write unix:///PATH, or ./%s", u.Host)
	}
	return fmt.Errorf("the path is not absolute: write three slashes, unix:///%s%s", u.Host, u.Path)
}

// unclearTarget is the error of a text that is neither a URL nor certainly a path.
func unclearTarget(text string) error {
	host, path, slash := strings.Cut(text, "/")
	name, port, hasPort := cutPort(host)
	switch {
	case text == "":
		return errors.New("URL is empty")
	case host == "" || strings.Contains(text, "://") || strings.ContainsAny(text, "@ \t?#%\\") || strings.Contains(path, ":") || strings.ContainsAny(name, ":") && name[0] != '[':
		return errTarget // it may hold a password
	case !hasPort && strings.Contains(host, ":"):
		return fmt.Errorf("%w; for HTTP write http://HOST/", errTarget)
	case hasPort && name == "":
		host = "localhost:" + port
	}
	if !slash {
		path = ""
	}
	if hasPort {
		return fmt.Errorf("URL: %q has no scheme: write http://%s/%s", text, host, path)
	}
	return fmt.Errorf("URL: %q has no scheme: write http://%s/%s for a host, ./%s for a socket", text, host, path, text)
}

// cutPort cuts the port from what may be a host.
func cutPort(host string) (name, port string, ok bool) {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || host[i+1:] == "" || strings.Trim(host[i+1:], "0123456789") != "" {
		return host, "", false
	}
	return host[:i], host[i+1:], true
}

// socketPath is the path of a socket to listen on, which may be given as a URL.
func socketPath(text string) (string, error) {
	scheme, rest, isURL := strings.Cut(text, "://")
	if opaque, ok := strings.CutPrefix(text, "unix:"); ok && !isURL {
		scheme, rest, isURL = "unix", opaque, true
	}
	switch {
	case text == "":
		return "", errors.New("PATH is empty")
	case strings.HasSuffix(text, "/"):
		return "", fmt.Errorf("PATH: %q ends with a slash: give a socket, not a directory", text)
	case !isURL || strings.ContainsAny(scheme, "./"):
		return text, nil
	case scheme != "unix":
		return "", errors.New("PATH: serve listens only on a unix socket: use acomm gateway for HTTP and NATS")
	case strings.ContainsAny(rest, "%?#"):
		return "", errors.New("PATH: %, ? and # are ambiguous in a URL: write the path alone, without the scheme")
	}
	u, err := url.Parse(text)
	if err == nil {
		err = checkUnixTarget(u)
	}
	if err != nil {
		return "", fmt.Errorf("PATH: %w", withoutURL(err))
	}
	return u.Path, nil
}
