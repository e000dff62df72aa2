package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"
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

// isRefusedWith reports whether who answers a POST with the status has not taken
// what it carries. Other errors may come from a proxy that has passed it on.
func isRefusedWith(status int) bool {
	switch status {
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported, http.StatusNetworkAuthenticationRequired:
		return true
	}
	return status >= 400 && status < 500
}
