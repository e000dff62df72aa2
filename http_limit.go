package acomm

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Posts to hooks come in bursts. A limit of posts to a host at a time keeps a hook that
// hangs from using up the process's descriptors. As many connections are kept idle, or
// each burst would open them anew.

// maxPosts is how many posts go to a host at a time, and how many connections to it are
// kept idle. http.DefaultTransport keeps two, unless the service sets
// MaxIdleConnsPerHost; with more than maxPosts as many may post.
const maxPosts = 100

// idleTimeout closes the idle connections of a clone where the service has set no time:
// CloseIdleConnections of its transport does not reach them.
const idleTimeout = 90 * time.Second

// posts counts the posts that are under way.
var posts = postLimit{byHost: make(map[string]*hostPosts)}

type postLimit struct {
	mu     sync.Mutex // guards byHost and the users of its values
	byHost map[string]*hostPosts
}

// hostPosts is the posts to one host.
type hostPosts struct {
	turns chan struct{} // holds a value for each post under way
	users int           // under way or waiting; the last one drops the entry
}

// enter waits until a post to the URL's host may begin, or the context ends. The caller
// calls leave when it has read the answer.
func (l *postLimit) enter(ctx context.Context, addr *url.URL) (leave func(), err error) {
	if !isHTTP(addr) {
		return func() {}, nil // what is registered for another scheme has its own rules
	}
	host := hostOf(addr)
	l.mu.Lock()
	h := l.byHost[host]
	if h == nil {
		h = &hostPosts{turns: make(chan struct{}, max(maxPosts, idleConnections()))}
		l.byHost[host] = h
	}
	h.users++
	l.mu.Unlock()
	dropUse := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(l.byHost, host)
		}
	}
	select {
	case h.turns <- struct{}{}:
		return func() { <-h.turns; dropUse() }, nil
	case <-ctx.Done():
		dropUse()
		return nil, unsentError{fmt.Errorf("%d posts to the host are under way: %w", cap(h.turns), ctx.Err())}
	}
}

// hostOf returns the host of a URL as it is spelled most simply: strangers choose hooks.
func hostOf(addr *url.URL) string {
	port := addr.Port()
	if port == "" {
		port = addr.Scheme // as good as its number
	} else if port == "80" && addr.Scheme == "http" || port == "443" && addr.Scheme == "https" {
		port = addr.Scheme
	}
	return addr.Scheme + "://" + strings.TrimSuffix(strings.ToLower(addr.Hostname()), ".") + ":" + port
}

// idleConnections is how many connections to a host http.DefaultTransport is set to
// keep idle; 0 if that is not set.
func idleConnections() int {
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return 0
	}
	return min(transport.MaxIdleConnsPerHost, 1<<16)
}

// postTransport sends posts of the schemes http and https.
var postTransport keepingTransport

// keepingTransport is http.DefaultTransport, whatever that is at the time of a request.
// Where it is a Transport that keeps the default of two idle connections to a host, it
// is a clone that keeps more. The clone is made again when the default's settings are
// others.
type keepingTransport struct {
	mu       sync.Mutex // guards the fields below
	of       *http.Transport
	settings []any // of it, when it was cloned
	clone    *http.Transport
}

func (k *keepingTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok || transport.DisableKeepAlives || transport.MaxIdleConnsPerHost != 0 || hasRegistered(transport, req.URL.Scheme) {
		return http.DefaultTransport.RoundTrip(req)
	}
	return k.cloneOf(transport).RoundTrip(req)
}

func (k *keepingTransport) cloneOf(transport *http.Transport) *http.Transport {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == transport && slices.Equal(k.settings, settingsOf(transport)) {
		return k.clone
	}
	if k.clone != nil {
		k.clone.CloseIdleConnections() // those in use are closed when they are idle next
	}
	// A Transport completes its settings at its first use, of which Clone is one. From
	// then on nothing but the service changes them.
	k.of, k.clone = transport, transport.Clone()
	k.settings = settingsOf(transport)
	k.clone.ForceAttemptHTTP2 = transport.ForceAttemptHTTP2 || transport.TLSNextProto["h2"] != nil
	k.clone.Clone() // writes into the TLSClientConfig, which is the clone's own as yet
	shareSettings(k.clone, transport)
	k.clone.MaxIdleConnsPerHost = maxPosts
	k.clone.IdleConnTimeout = cmp.Or(transport.IdleConnTimeout, idleTimeout)
	return k.clone
}

// shareSettings has changes inside of the service's settings apply to the clone, too. A
// TLSClientConfig is shared unless the clone had to add its protocols: the service's
// requests read it, so nobody may write there.
func shareSettings(clone, transport *http.Transport) {
	clone.ProxyConnectHeader = transport.ProxyConnectHeader
	own, services := clone.TLSClientConfig, transport.TLSClientConfig
	if own != nil && services != nil && slices.Equal(own.NextProtos, services.NextProtos) {
		clone.TLSClientConfig = services
	}
}

// hasRegistered reports whether a Transport leaves the scheme to another one
// (RegisterProtocol), which a clone does not know of. That may be what refuses hooks that
// lead astray. net/http does not say, so this looks where it keeps them.
func hasRegistered(transport *http.Transport, scheme string) bool {
	if !isHTTP(&url.URL{Scheme: scheme}) {
		return true
	}
	field := reflect.ValueOf(transport).Elem().FieldByName("altProto")
	if !field.IsValid() || field.Type() != reflect.TypeFor[atomic.Value]() {
		return true // can't tell
	}
	value := (*atomic.Value)(field.Addr().UnsafePointer()).Load()
	protocols, ok := value.(map[string]http.RoundTripper)
	if !ok {
		return value != nil
	}
	registered := protocols[scheme]
	return registered != nil && reflect.TypeOf(registered) != ownHTTP2()
}

// ownHTTP2 is the type of what net/http registers for https by itself, at the first use
// of a Transport.
var ownHTTP2 = sync.OnceValue(func() reflect.Type {
	transport := &http.Transport{ForceAttemptHTTP2: true}
	transport.Clone()
	field := reflect.ValueOf(transport).Elem().FieldByName("altProto")
	protocols, _ := (*atomic.Value)(field.Addr().UnsafePointer()).Load().(map[string]http.RoundTripper)
	return reflect.TypeOf(protocols["https"])
})

// settingsOf returns the exported fields of a Transport; of those that can't be compared,
// where they are.
func settingsOf(transport *http.Transport) []any {
	v := reflect.ValueOf(transport).Elem()
	settings := make([]any, 0, v.NumField())
	for i := range v.NumField() {
		field := v.Field(i)
		switch {
		case !v.Type().Field(i).IsExported():
		case field.Comparable():
			settings = append(settings, field.Interface())
		default: // functions, of which two of the same code may do different things; maps
			settings = append(settings, *(*uintptr)(field.Addr().UnsafePointer()))
		}
	}
	return settings
}

func isHTTP(addr *url.URL) bool { return addr.Scheme == "http" || addr.Scheme == "https" }
