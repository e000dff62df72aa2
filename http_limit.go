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

// Posts to hooks come in bursts. The limit of posts to a host at a time keeps a hook that
// hangs from using up the process's descriptors. The same number of connections stays
// idle, or each burst would open them anew.

// maxPosts is the number of posts to a host at a time, and of idle connections to it.
// Without it there would be two idle connections, the default of http.DefaultTransport.
// A service may set MaxIdleConnsPerHost of that transport: that is then the number of
// idle connections, and also of posts if it is more than maxPosts.
const maxPosts = 100

// idleTimeout closes the idle connections of a clone if the service has set no
// IdleConnTimeout: the service can't close them, since CloseIdleConnections of its
// transport does not reach the clone.
const idleTimeout = 90 * time.Second

// posts limits the posts of the process.
var posts = postLimit{byHost: make(map[string]*hostPosts)}

type postLimit struct {
	mu     sync.Mutex // guards byHost and the users of its values
	byHost map[string]*hostPosts
}

// hostPosts counts the posts to one host.
type hostPosts struct {
	turns chan struct{} // a semaphore: holds a value for each post under way
	users int           // posts under way or waiting; the last one removes the entry
}

// enter waits until a post to the URL's host may begin, or the context ends. The caller
// calls leave after it has read the answer.
func (l *postLimit) enter(ctx context.Context, addr *url.URL) (leave func(), err error) {
	if !isHTTP(addr) {
		return func() {}, nil // the transport of another scheme has limits of its own
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
		return nil, unsentError{fmt.Errorf("the limit of %d posts to the host at a time is reached: %w", cap(h.turns), ctx.Err())}
	}
}

// hostOf returns the URL's host in one spelling: else a peer could get around the limit
// by spelling its hooks differently.
func hostOf(addr *url.URL) string {
	port := addr.Port()
	if port == "" {
		port = addr.Scheme // stands for the default port
	} else if port == "80" && addr.Scheme == "http" || port == "443" && addr.Scheme == "https" {
		port = addr.Scheme
	}
	return addr.Scheme + "://" + strings.TrimSuffix(strings.ToLower(addr.Hostname()), ".") + ":" + port
}

// idleConnections returns MaxIdleConnsPerHost of http.DefaultTransport; 0 if that is not
// set.
func idleConnections() int {
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return 0
	}
	return min(transport.MaxIdleConnsPerHost, 1<<16)
}

// postTransport sends the posts with the schemes http and https.
var postTransport poolingTransport

// poolingTransport sends through http.DefaultTransport, whatever that is at the time of a
// request. If that is a Transport with the default of two idle connections to a host, it
// sends through a clone with maxPosts of them. When the settings of the original change,
// it makes a new clone.
type poolingTransport struct {
	mu       sync.Mutex      // guards the fields below
	of       *http.Transport // the one that was cloned
	settings []any           // of the one that was cloned, at that moment
	clone    *http.Transport
}

func (k *poolingTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok || transport.DisableKeepAlives || transport.MaxIdleConnsPerHost != 0 || hasRegistered(transport, req.URL.Scheme) {
		return http.DefaultTransport.RoundTrip(req)
	}
	return k.cloneOf(transport).RoundTrip(req)
}

func (k *poolingTransport) cloneOf(transport *http.Transport) *http.Transport {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == transport && slices.Equal(k.settings, settingsOf(transport)) {
		return k.clone
	}
	if k.clone != nil {
		k.clone.CloseIdleConnections() // also closes those in use, once they are idle
	}
	// A Transport completes its settings at its first use, and Clone is a use. After
	// that only the service changes them, so settingsOf comes after Clone.
	k.of, k.clone = transport, transport.Clone()
	k.settings = settingsOf(transport)
	k.clone.ForceAttemptHTTP2 = transport.ForceAttemptHTTP2 || transport.TLSNextProto["h2"] != nil
	k.clone.Clone() // adds protocols to the TLSClientConfig, which is still the clone's own
	shareSettings(k.clone, transport)
	k.clone.MaxIdleConnsPerHost = maxPosts
	k.clone.IdleConnTimeout = cmp.Or(transport.IdleConnTimeout, idleTimeout)
	return k.clone
}

// shareSettings shares maps and pointers with the clone, so that changes inside of the
// service's settings apply to the clone as well. A TLSClientConfig to which the clone had
// to add protocols is not shared: requests of the service read theirs, so nobody may
// write it.
func shareSettings(clone, transport *http.Transport) {
	clone.ProxyConnectHeader = transport.ProxyConnectHeader
	own, services := clone.TLSClientConfig, transport.TLSClientConfig
	if own != nil && services != nil && slices.Equal(own.NextProtos, services.NextProtos) {
		clone.TLSClientConfig = services
	}
}

// hasRegistered reports whether a Transport hands the scheme to another one
// (RegisterProtocol). A clone does not have these, and the service may use one to refuse
// hooks. net/http has no method that tells, so this looks at the field.
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

// ownHTTP2 returns the type of what net/http itself registers for https at the first use
// of a Transport.
var ownHTTP2 = sync.OnceValue(func() reflect.Type {
	transport := &http.Transport{ForceAttemptHTTP2: true}
	transport.Clone()
	field := reflect.ValueOf(transport).Elem().FieldByName("altProto")
	protocols, _ := (*atomic.Value)(field.Addr().UnsafePointer()).Load().(map[string]http.RoundTripper)
	return reflect.TypeOf(protocols["https"])
})

// settingsOf returns the exported fields of a Transport. For fields that can't be
// compared it returns their pointers.
func settingsOf(transport *http.Transport) []any {
	v := reflect.ValueOf(transport).Elem()
	settings := make([]any, 0, v.NumField())
	for i := range v.NumField() {
		field := v.Field(i)
		switch {
		case !v.Type().Field(i).IsExported():
		case field.Comparable():
			settings = append(settings, field.Interface())
		default: // functions and maps: a pointer tells whether it is the same one
			settings = append(settings, *(*uintptr)(field.Addr().UnsafePointer()))
		}
	}
	return settings
}

func isHTTP(addr *url.URL) bool { return addr.Scheme == "http" || addr.Scheme == "https" }
