package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
)

// errHookDenied is the error of a connection to an address that hooks may not
// lead to.
var errHookDenied = errors.New("hooks may not lead to this address")

// deniedHooks are the networks that hooks don't lead to unless told otherwise:
// those where machines find secrets, and those that mean the machine itself under
// another name.
var deniedHooks = []string{
	"169.254.0.0/16", "fe80::/10", // link-local; the metadata services of most clouds
	"168.63.129.16",                     // Azure
	"fd00:ec2::/32",                     // Amazon: metadata, EKS, time, DNS
	"fd20:ce::254",                      // Google
	"fd00:c1::a9fe:a9fe", "192.0.0.192", // Oracle
	"100.100.100.200",   // Alibaba
	"fd00:a9fe:a9fe::1", // Akamai (Linode)
	"fd00:42::42",       // Scaleway
	"0.0.0.0/8", "::",   // unspecified
	"64:ff9b:1::/48", "2002::/16", "2001::/32", // IPv4 addresses inside of IPv6 ones
}

// nat64 is where networks with IPv6 only reach IPv4 addresses.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// hookRule says whether hooks may lead to the addresses of a network.
type hookRule struct {
	network netip.Prefix
	allow   bool
}

// hookRules decide by the longest prefix, and by the last one of equal length.
type hookRules []hookRule

func newHookRules(allow, deny []string) (hookRules, error) {
	var rules hookRules
	for _, list := range []struct {
		flag     string
		networks []string
		allow    bool
	}{{"", deniedHooks, false}, {"--hook-allow", allow, true}, {"--hook-deny", deny, false}} {
		for _, text := range list.networks {
			network, err := parseNetwork(strings.TrimSpace(text))
			if err != nil {
				return nil, usageError("%s: %w", list.flag, err)
			}
			rules = append(rules, hookRule{network, list.allow})
		}
	}
	return rules, nil
}

// parseNetwork reads a network in CIDR notation, or one address.
func parseNetwork(text string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		addr = addr.Unmap().WithZone("")
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	network, err := netip.ParsePrefix(text)
	if err != nil || network.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a network in CIDR notation", text)
	}
	return network.Masked(), nil
}

// check returns an error that matches errHookDenied if hooks may not lead to the
// address.
func (r hookRules) check(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	if !r.allows(addr) {
		return fmt.Errorf("%s: %w", addr, errHookDenied)
	}
	if nat64.Contains(addr) {
		bytes := addr.As16()
		return r.check(netip.AddrFrom4([4]byte(bytes[12:])))
	}
	return nil
}

func (r hookRules) allows(addr netip.Addr) bool {
	allow, bits := true, -1
	for _, rule := range r {
		if rule.network.Contains(addr) && rule.network.Bits() >= bits {
			allow, bits = rule.allow, rule.network.Bits()
		}
	}
	return allow
}

// control refuses a connection to an address after it was looked up.
func (r hookRules) control(_ context.Context, _, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%s: %w", address, errHookDenied) // nothing that could be checked
	}
	return r.check(addr.Addr())
}

// hookConnections is how many connections to a host of hooks are kept.
const hookConnections = 64

// newHookTransport returns the transport for hooks, and for streams over HTTP. Its
// front takes the place of http.DefaultTransport, which the library uses and asks
// for the number of connections it keeps; so it is an http.Transport, and the one
// that connects is registered with it.
func newHookTransport(rules hookRules, throughProxy bool, timeout time.Duration) (front, connecting *http.Transport) {
	connecting = http.DefaultTransport.(*http.Transport).Clone()
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, ControlContext: rules.control}
	connecting.DialContext = dialer.DialContext
	connecting.MaxIdleConnsPerHost = hookConnections
	if !throughProxy {
		connecting.Proxy = nil
	}
	front = &http.Transport{MaxIdleConnsPerHost: hookConnections, Protocols: new(http.Protocols)}
	front.Protocols.SetHTTP1(true)
	front.RegisterProtocol("http", hookTransport{connecting, timeout})
	front.RegisterProtocol("https", hookTransport{connecting, timeout})
	return front, connecting
}

// answerError is the answer of a hook that has not taken a response.
type answerError struct {
	status string
	words  string        // the hook's own, empty if it sent none
	later  bool          // it may take it later
	after  time.Duration // then; zero if it did not say
}

func (e *answerError) Error() string {
	if e.words == "" {
		return "answered " + e.status
	}
	return "answered " + e.status + ": " + e.words
}

// unsentError is the error of a POST for which there was no connection.
type unsentError struct{ error }

func (e unsentError) Unwrap() error { return e.error }

// hookTransport bounds a POST, and tells of it what the library tells nobody but its
// own forwarding: that there was no connection, and which answers prove that the hook
// has not taken it.
type hookTransport struct {
	http.RoundTripper
	timeout time.Duration // to the end of the answer
}

func (t hookTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPost {
		return t.RoundTripper.RoundTrip(r)
	}
	var asked, got atomic.Bool // a transport that does not tell, such as that of NATS, leaves both false
	trace := &httptrace.ClientTrace{
		GetConn: func(string) { asked.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { got.Store(true) },
	}
	ctx, cancel := context.WithTimeout(r.Context(), t.timeout)
	answer, err := t.RoundTripper.RoundTrip(r.WithContext(httptrace.WithClientTrace(ctx, trace)))
	if err != nil {
		cancel()
		if asked.Load() && !got.Load() {
			return nil, unsentError{err}
		}
		return nil, err
	}
	after, ok := retryAfter(answer.Header.Get("Retry-After"))
	later := answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode == http.StatusServiceUnavailable && ok
	answer.Body = cancelBody{answer.Body, cancel}
	if !later && !isRefusedWith(answer.StatusCode) {
		return answer, nil
	}
	body, _ := io.ReadAll(io.LimitReader(answer.Body, 64<<10)) // to its end, so that the connection can be kept
	_ = answer.Body.Close()
	refused := &answerError{status: answer.Status, later: later, after: after}
	if resp := (acomm.Response{}); json.Unmarshal(body, &resp) == nil && resp.Error != nil {
		refused.words = resp.Error.Error()
	}
	return nil, refused
}

// cancelBody ends the time of an answer when it is closed.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b cancelBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// isRefusedWith reports whether who answers a POST with the status has not taken
// what it carries. Other errors may come from a proxy that has passed it on.
func isRefusedWith(status int) bool {
	switch status {
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported, http.StatusNetworkAuthenticationRequired:
		return true
	}
	return status >= 400 && status < 500
}

// retryAfter reads a Retry-After. It reports false if there is none.
func retryAfter(header string) (time.Duration, bool) {
	header = strings.TrimSpace(header)
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, true
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, time.Until(at)), true
	}
	return 0, false
}
