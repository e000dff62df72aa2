package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
)

// Who may use the gateway over HTTP: certificates and tokens, both read again on SIGHUP.

// access is what the files say that decide who may.
type access struct {
	opts *gatewayOptions

	mu     sync.Mutex // guards the fields below
	cert   *tls.Certificate
	client *x509.CertPool // nil: no certificate is asked for
	tokens [][sha256.Size]byte
}

// newAccess reads the files that the flags name.
func newAccess(opts *gatewayOptions) (*access, error) {
	a := &access{opts: opts}
	return a, a.read()
}

// read reads the files. If one of them can't be used, what was read before stays.
func (a *access) read() error {
	var cert *tls.Certificate
	var client *x509.CertPool
	var tokens [][sha256.Size]byte
	if a.opts.tlsCert != "" {
		pair, err := tls.LoadX509KeyPair(a.opts.tlsCert, a.opts.tlsKey)
		if err != nil {
			return fmt.Errorf("--tls-cert %s, --tls-key %s: %w", a.opts.tlsCert, a.opts.tlsKey, err)
		}
		cert = &pair
	}
	if a.opts.clientCA != "" {
		var err error
		if client, err = readCertificates(a.opts.clientCA); err != nil {
			return fmt.Errorf("--client-ca: %w", err)
		}
	}
	if a.opts.tokenFile != "" {
		list, err := readTokens(a.opts.tokenFile)
		if err != nil {
			return fmt.Errorf("--token-file: %w", err)
		}
		for _, token := range list {
			tokens = append(tokens, sha256.Sum256([]byte(token)))
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cert, a.client, a.tokens = cert, client, tokens
	return nil
}

// readAgain is read on SIGHUP.
func (a *access) readAgain() {
	if err := a.read(); err != nil {
		logrus.WithField("error", err.Error()).Error("gateway: can't read certificates and tokens again, the old ones stay in use")
		return
	}
	logrus.Info("gateway: certificates and tokens were read again")
}

// isUsed reports whether there is something to be read again.
func (a *access) isUsed() bool { return a.opts.tlsCert != "" || a.opts.tokenFile != "" }

// readCertificates reads a file of certificates in PEM.
func readCertificates(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s has no certificate in PEM", file)
	}
	return pool, nil
}

// readTokens reads a file with a token on each line. Empty lines, and those that begin
// with a #, are skipped.
func readTokens(file string) (tokens []string, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for line := range bytes.Lines(data) {
		token := strings.TrimSpace(string(line))
		switch {
		case token == "" || token[0] == '#':
		case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
			return nil, fmt.Errorf("%s: a token has a space, or a character that is not printable ASCII", file)
		default:
			tokens = append(tokens, token)
		}
	}
	if len(tokens) == 0 {
		return nil, fmt.Errorf("%s has no token", file)
	}
	return tokens, nil
}

// secure returns the listener with TLS, if there is to be TLS. Each connection is served
// with the certificates of its moment.
func (a *access) secure(l net.Listener) net.Listener {
	if a.opts.tlsCert == "" {
		return l
	}
	return tls.NewListener(l, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			config := &tls.Config{Certificates: []tls.Certificate{*a.cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
			if a.client != nil {
				config.ClientCAs, config.ClientAuth = a.client, tls.RequireAndVerifyClientCert
			}
			return config, nil
		},
	})
}

// onlyWithToken refuses requests without a token, if there are tokens. Health is told to
// everybody, and the URL of a stream is a secret itself: whoever has it may read it.
func (a *access) onlyWithToken(g *gateway, h http.Handler) http.Handler {
	if a.opts.tokenFile == "" {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" && r.URL.Path != "/stream" && !a.allows(r) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			refused := refuse(http.StatusUnauthorized, reasonInvalid, "a valid bearer token is needed, in the header Authorization")
			g.refused("", "", refused)
			answer(w, "", refused)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// allows reports whether a request has one of the tokens. It takes as long whichever it
// has, and however much of one is right.
func (a *access) allows(r *http.Request) bool {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := sha256.Sum256([]byte(strings.TrimSpace(token)))
	a.mu.Lock()
	defer a.mu.Unlock()
	found := 0
	for _, known := range a.tokens {
		found |= subtle.ConstantTimeCompare(known[:], given[:])
	}
	return found == 1 && strings.EqualFold(scheme, "Bearer")
}

// listenHTTP listens on HOST:PORT, or on unix:PATH with the mode.
func (o *gatewayOptions) listenHTTP() (net.Listener, error) {
	path, ok := strings.CutPrefix(o.listen, "unix:")
	if !ok {
		return net.Listen("tcp", o.listen)
	}
	mode, err := o.socketMode()
	if err != nil {
		return nil, err
	}
	return listenWithMode(path, mode)
}

// socketMode is the mode of --listen-mode.
func (o *gatewayOptions) socketMode() (fs.FileMode, error) {
	mode, err := strconv.ParseUint(o.listenMode, 8, 32)
	if err != nil || mode > 0o777 {
		return 0, usageError("--listen-mode: %q is not an octal mode such as 0660", o.listenMode)
	}
	return fs.FileMode(mode), nil
}

// checkAccess looks for what makes no sense.
func (o *gatewayOptions) checkAccess() error {
	_, err := o.socketMode()
	switch {
	case err != nil:
		return err
	case (o.tlsCert == "") != (o.tlsKey == ""):
		return usageError("--tls-cert and --tls-key must be given together")
	case o.clientCA != "" && o.tlsCert == "":
		return usageError("--client-ca needs --tls-cert and --tls-key")
	}
	if o.access, err = newAccess(o); err != nil {
		return usageError("%w", err)
	}
	return nil
}
