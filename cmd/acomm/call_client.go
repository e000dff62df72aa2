package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/pflag"
)

// httpClient is how a call shows who it is to a service over HTTP, and whom it trusts.
type httpClient struct {
	cacert    string
	cert      string
	key       string
	tokenFile string
	headers   []string
}

func (c *httpClient) addTo(flags *pflag.FlagSet) {
	flags.StringVar(&c.cacert, "cacert", "", "`FILE` with the authorities, in PEM, that may have signed the certificate of the service")
	flags.StringVar(&c.cert, "cert", "", "`FILE` with a client certificate, in PEM")
	flags.StringVar(&c.key, "key", "", "`FILE` with the key of --cert, in PEM")
	flags.StringVar(&c.tokenFile, "token-file", "", "`FILE` with the bearer token for the service in its first line")
	flags.StringArrayVar(&c.headers, "header", nil, "`HEADER` to send to the service, such as 'X-Name: value'; may be repeated")
}

func (c *httpClient) isUsed() bool {
	return c.cacert != "" || c.cert != "" || c.key != "" || c.tokenFile != "" || len(c.headers) > 0
}

// check returns an error if the URL's scheme has no use for it.
func (c *httpClient) check(target *url.URL) error {
	if c.isUsed() && target.Scheme != "http" && target.Scheme != "https" {
		return errors.New("--cacert, --cert, --key, --token-file and --header are for http and https")
	}
	return nil
}

// transport returns a transport that does so, for requests to the host of the URL and no
// other: a stream may be elsewhere, and a redirect may lead there.
func (c *httpClient) transport(target *url.URL) (http.RoundTripper, error) {
	base, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, errors.New("the transport is not net/http's")
	}
	service, others := base.Clone(), base.Clone()
	config, err := c.tlsConfig()
	if err != nil {
		return nil, err
	}
	if config != nil {
		service.TLSClientConfig = config
		others.TLSClientConfig = config.Clone()
		others.TLSClientConfig.Certificates = nil
	}
	header, err := c.header()
	if err != nil {
		return nil, err
	}
	return &serviceTransport{service, others, target.Scheme, target.Host, header}, nil
}

func (c *httpClient) tlsConfig() (*tls.Config, error) {
	if c.cacert == "" && c.cert == "" && c.key == "" {
		return nil, nil
	}
	if (c.cert == "") != (c.key == "") {
		return nil, errors.New("--cert and --key must be given together")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.cacert != "" {
		pool, err := readCertificates(c.cacert)
		if err != nil {
			return nil, fmt.Errorf("--cacert: %w", err)
		}
		config.RootCAs = pool
	}
	if c.cert != "" {
		pair, err := tls.LoadX509KeyPair(c.cert, c.key)
		if err != nil {
			return nil, fmt.Errorf("--cert %s, --key %s: %w", c.cert, c.key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// header is what each request to the service has in addition.
func (c *httpClient) header() (http.Header, error) {
	header := make(http.Header)
	if c.tokenFile != "" {
		tokens, err := readTokens(c.tokenFile)
		if err != nil {
			return nil, fmt.Errorf("--token-file: %w", err)
		}
		header.Set("Authorization", "Bearer "+tokens[0])
	}
	for _, text := range c.headers {
		name, value, ok := strings.Cut(text, ":")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || name == "" || strings.ContainsAny(name+value, "\r\n") || strings.ContainsAny(name, " \t") {
			return nil, fmt.Errorf("--header: %q is not NAME: VALUE", printable(text))
		}
		header.Add(name, value)
	}
	return header, nil
}

// serviceTransport adds headers and the client certificate to the requests to one host.
type serviceTransport struct {
	service      http.RoundTripper // with the certificate
	others       http.RoundTripper // without
	scheme, host string
	header       http.Header
}

func (t *serviceTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != t.scheme || r.URL.Host != t.host {
		return t.others.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	for name, values := range t.header {
		if name == "Host" {
			r.Host = values[0]
			continue
		}
		r.Header[name] = values
	}
	return t.service.RoundTrip(r)
}
