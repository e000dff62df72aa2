package main

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// hostNames are the names under which HTTP is served; nil: under any. A web page of
// a stranger reaches a gateway that nobody else can connect to if it has the
// stranger's name lead to the loopback (DNS rebinding). The browser then takes both
// for one site, and only the name in the request tells.
type hostNames map[string]bool

// newHostNames returns the names for a server that listens on the address.
func newHostNames(opts *gatewayOptions, listens net.Addr) hostNames {
	addr, err := netip.ParseAddrPort(listens.String())
	onLoopback := err == nil && addr.Addr().Unmap().IsLoopback()
	if !onLoopback && len(opts.allowHost) == 0 {
		return nil
	}
	names := make(hostNames)
	for _, name := range opts.allowHost {
		if name == "*" {
			return nil
		}
		names[bareHost(name)] = true
	}
	for _, addr := range []string{opts.listen, listens.String()} {
		if host := bareHost(addr); host != "" {
			names[host] = true
		}
	}
	if u, err := url.Parse(opts.streamURL); err == nil && u.Host != "" {
		names[bareHost(u.Host)] = true
	}
	return names
}

// serves reports whether a request is for a name of the server: one of the list, of
// the loopback, or the address it has come to.
func (n hostNames) serves(r *http.Request) bool {
	host := bareHost(r.Host)
	switch {
	case n == nil, host == "", n[host]: // no browser leaves it out
		return true
	case host == "localhost", strings.HasSuffix(host, ".localhost"):
		return true
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	if addr.Unmap().IsLoopback() {
		return true
	}
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return local != nil && local.AddrPort().Addr().Unmap() == addr.Unmap()
}

// bareHost is the host of a HOST or HOST:PORT, in the one form that is compared.
func bareHost(text string) string {
	if host, _, err := net.SplitHostPort(text); err == nil {
		text = host
	}
	text = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	return strings.ToLower(strings.TrimSuffix(text, "."))
}

// isHost reports whether the text is a name or an address, without a port.
func isHost(text string) bool {
	if _, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		return true
	}
	return text != "" && !strings.ContainsAny(text, ":/*?#@[] \t")
}

// onlyNamed refuses requests for other names.
func (g *gateway) onlyNamed(h http.Handler) http.Handler {
	other := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refused := refuse(http.StatusForbidden, reasonInvalid,
			"the host %.256q is not a name of this gateway: add it with the gateway's flag --allow-host", r.Host)
		if r.URL.Path == "/" {
			g.refused("", "", refused)
		}
		w.Header().Set("Connection", "close") // the body is not read
		answer(w, "", refused)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !g.hosts.serves(r) {
			other.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}
