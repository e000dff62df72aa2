package acomm_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// signatureIn returns the signature in a URL of ProxyStreamHTTPURL.
func signatureIn(t testing.TB, tracker *acomm.Tracker, addr *url.URL) string {
	t.Helper()
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	return u.Query().Get("signature")
}

// TestProxyStreamHandler_AttacksAreRefused asks for what this process has not
// published, in every way known. Nothing of it is ever connected to.
func TestProxyStreamHandler_AttacksAreRefused(t *testing.T) {
	tracker, server := streamProxy(t)
	dir := shortDir(t)
	other := newVictim(t, "unix", filepath.Join(dir, "other.sock"))
	internal := newVictim(t, "tcp", "127.0.0.1:0")
	link := filepath.Join(dir, "link.sock")
	require.NoError(t, os.Symlink(other.url.Path, link))
	// A stream of our own in the same directory, and a published address.
	own, err := tracker.NewStreamUnix(dir, bytesSource([]byte("own")))
	require.NoError(t, err)
	published := unixURL(filepath.Join(dir, "published.sock"))
	signature := signatureIn(t, tracker, published)
	used, err := tracker.NewStreamUnix(dir, bytesSource([]byte("used")))
	require.NoError(t, err)
	usedURL, err := tracker.ProxyStreamHTTPURL(used)
	require.NoError(t, err)
	_, body, err := get(t, usedURL)
	require.NoError(t, err)
	require.Equal(t, "used", string(body))

	esc := url.QueryEscape
	unix := func(path string) string { return "unix://" + path }
	addr := func(text string) string { return "addr=" + esc(text) }
	signed := func(text string) string { return addr(text) + "&signature=" + esc(signature) }
	rest := strings.TrimPrefix(other.url.Path, "/")
	nested := server.URL + "/stream?" + addr(unix(other.url.Path))

	type row struct {
		query string
		want  int
	}
	rows := map[string]row{
		"nothing":                            {"", 400},
		"no address":                         {"addr=", 400},
		"signature alone":                    {"signature=xx", 400},
		"address in a broken escape":         {"addr=%zz", 400},
		"address that is no URL":             {"addr=://", 400},
		"address in front of a semicolon":    {"addr=a;b=c", 400},
		"another service's socket":           {addr(other.url.String()), 403},
		"another service's stream, guessed":  {addr(unix(filepath.Join(dir, strings.Repeat("A", 26)+".eof"))), 403},
		"internal HTTP":                      {addr(internal.url.String()), 403},
		"internal HTTP, by name":             {addr(strings.Replace(internal.url.String(), "127.0.0.1", "localhost", 1)), 403},
		"internal HTTP, by number":           {addr(strings.Replace(internal.url.String(), "127.0.0.1", "2130706433", 1)), 403},
		"internal HTTP, as IPv6":             {addr(strings.Replace(internal.url.String(), "127.0.0.1", "[::ffff:127.0.0.1]", 1)), 403},
		"internal HTTP, with user":           {addr(strings.Replace(internal.url.String(), "http://", "http://public@", 1)), 403},
		"internal HTTP, upper case":          {addr("HTTP" + strings.TrimPrefix(internal.url.String(), "http")), 403},
		"file":                               {addr("file://" + other.url.Path), 403},
		"no scheme":                          {addr(other.url.Path), 403},
		"no scheme, two slashes":             {addr("//" + rest), 403},
		"itself":                             {addr(server.URL + "/stream"), 403},
		"itself, nested":                     {addr(nested), 403},
		"itself, nested twice":               {addr(server.URL + "/stream?" + addr(nested)), 403},
		"itself, nested and signed":          {addr(server.URL+"/stream?"+signed(other.url.String())) + "&signature=" + signature, 403},
		"signature of another address":       {signed(other.url.String()), 403},
		"signature of another, HTTP":         {signed(internal.url.String()), 403},
		"signature of a used stream":         {addr(other.url.String()) + "&signature=" + usedURL.Query().Get("signature"), 403},
		"signature of another process":       {addr(other.url.String()) + "&signature=" + signElsewhere(t, other.url), 403},
		"signature empty":                    {addr(other.url.String()) + "&signature=", 403},
		"signature in hexadecimal":           {addr(other.url.String()) + "&signature=" + strings.Repeat("0", 64), 403},
		"signature too long":                 {signed(other.url.String()) + "AAAA", 403},
		"two signatures":                     {addr(other.url.String()) + "&signature=x&signature=" + signature, 403},
		"two addresses, published first":     {signed(published.String()) + "&" + addr(other.url.String()), 400},
		"two addresses, published last":      {addr(other.url.String()) + "&" + signed(published.String()), 400},
		"two addresses, own first":           {addr(own.String()) + "&" + addr(other.url.String()), 400},
		"two addresses, the same":            {addr(other.url.String()) + "&" + addr(other.url.String()), 400},
		"address in upper case":              {"ADDR=" + esc(other.url.String()), 400},
		"address as an array":                {"addr[]=" + esc(other.url.String()), 400},
		"address behind a semicolon":         {"x=1;" + addr(other.url.String()), 400},
		"replayed after use":                 {usedURL.RawQuery, 404},
		"replayed after use, unsigned":       {addr(used.String()), 403},
		"oversized":                          {addr(other.url.String()) + "&x=" + strings.Repeat("x", 8<<10), 400},
		"oversized, signed":                  {signed(published.String()) + "&x=" + strings.Repeat("x", 8<<10), 400},
		"oversized, many parameters":         {strings.Repeat("x&", 5<<10) + addr(other.url.String()), 400},
		"dots from the own stream":           {addr(unix(own.Path + "/../other.sock")), 403},
		"dots from the directory":            {addr(unix(dir + "/../" + filepath.Base(dir) + "/other.sock")), 403},
		"dots, encoded":                      {addr(unix(own.Path + "/%2e%2e/other.sock")), 403},
		"dots, encoded twice":                {addr(unix(own.Path + "/%252e%252e/other.sock")), 403},
		"dots and signature":                 {signed(unix(published.Path + "/../other.sock")), 403},
		"a dot":                              {addr(unix(dir + "/./other.sock")), 403},
		"two slashes":                        {addr(unix(dir + "//other.sock")), 403},
		"slashes, encoded":                   {addr(unix("/" + esc(rest))), 403},
		"slash at the end":                   {addr(unix(other.url.Path + "/")), 403},
		"symlink":                            {addr(unix(link)), 403},
		"symlink and signature":              {signed(unix(link)), 403},
		"process's own link to it":           {addr(unix("/proc/self/root" + other.url.Path)), 403},
		"NUL":                                {"addr=" + esc(unix(other.url.Path)) + "%00", 400},
		"NUL behind the own stream":          {"addr=" + esc(own.String()) + "%00", 400},
		"NUL, encoded":                       {addr(unix(other.url.Path + "%00")), 403},
		"NUL, encoded, behind the own":       {addr(own.String() + "%00" + other.url.Path), 403},
		"NUL, signed":                        {"addr=" + esc(published.String()) + "%00&signature=" + signature, 400},
		"NUL, encoded, signed":               {signed(published.String() + "%00"), 403},
		"line end":                           {addr("unix://\r\n" + other.url.Path), 400},
		"space before":                       {addr(" " + unix(other.url.Path)), 400},
		"host":                               {addr("unix://host" + other.url.Path), 403},
		"host, signed":                       {signed("unix://host" + published.Path), 403},
		"host that is the path":              {addr("unix://" + esc(other.url.Path)), 400},
		"host that is part of the path":      {addr("unix://" + rest), 403},
		"user":                               {addr("unix://user:password@" + other.url.Path), 403},
		"user, signed":                       {signed("unix://user@" + published.Path), 403},
		"opaque":                             {addr("unix:" + rest), 403},
		"opaque with a dot":                  {addr("unix:./" + rest), 403},
		"one slash":                          {addr("unix:" + other.url.Path), 403},
		"query in the address":               {addr(unix(other.url.Path) + "?x"), 403},
		"query behind the published one":     {signed(published.String() + "?" + other.url.Path), 403},
		"fragment":                           {addr(unix(other.url.Path) + "#" + own.Path), 403},
		"fragment behind the published one":  {signed(published.String() + "#x"), 403},
		"fragment behind the own":            {addr(own.String() + "#" + other.url.Path), 403},
		"scheme in upper case":               {addr("UNIX://" + other.url.Path), 403},
		"scheme in upper case, signed":       {signed("UNIX" + strings.TrimPrefix(published.String(), "unix")), 403},
		"address broken":                     {addr("unix://%zz"), 400},
		"address encoded twice":              {addr(esc(other.url.String())), 400},
		"published one, encoded differently": {signed(strings.Replace(published.String(), "published", "publishe%64", 1)), 403},
	}
	var abstract *victim
	if runtime.GOOS == "linux" {
		name := "acomm-" + filepath.Base(dir)
		abstract = newVictim(t, "unix", "@"+name)
		for how, text := range map[string]string{
			"at": "unix:@" + name, "at, host": "unix://@" + name, "at, path": "unix:///@" + name,
			"NUL, encoded": "unix:%00" + name, "NUL, path": "unix:///%00" + name, "NUL, path, encoded twice": "unix:///%2500" + name,
		} {
			rows["abstract socket, "+how] = row{addr(text), 403}
		}
		rows["abstract socket, NUL"] = row{addr("unix:\x00" + name), 400}
		rows["abstract socket, no scheme"] = row{addr("@" + name), 400}
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			u, err := url.Parse(server.URL + "/stream")
			require.NoError(t, err)
			u.RawQuery = row.query
			status, body, err := get(t, u)
			require.NoError(t, err)
			require.Equal(t, row.want, status, "%s", body)
			require.NotContains(t, string(body), dir, "an error tells nothing")
		})
	}
	t.Run("address in a form", func(t *testing.T) {
		form := url.Values{"addr": {other.url.String()}, "signature": {signature}}.Encode()
		for method, want := range map[string]int{"POST": 405, "GET": 400} {
			req, err := http.NewRequest(method, server.URL+"/stream", strings.NewReader(form))
			require.NoError(t, err)
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			resp, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			resp.Body.Close()
			require.Equal(t, want, resp.StatusCode)
		}
	})

	other.requireUntouched()
	internal.requireUntouched()
	if abstract != nil {
		abstract.requireUntouched()
	}
	status, body, err := get(t, &url.URL{Scheme: "http", Host: server.Listener.Addr().String(), Path: "/stream", RawQuery: addr(own.String())})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status, "nobody has used up our own stream")
	require.Equal(t, "own", string(body))
}

// TestProxyStreamHandler_EveryTamperedByteIsRefused alters a published URL that
// leads to a live socket, at each byte of address and signature.
func TestProxyStreamHandler_EveryTamperedByteIsRefused(t *testing.T) {
	tracker, _ := streamProxy(t)
	target := newVictim(t, "unix", filepath.Join(shortDir(t), "target.sock"))
	text, signature := target.url.String(), signatureIn(t, tracker, target.url)
	call := func(text, signature string) int {
		w := httptest.NewRecorder()
		query := url.Values{"addr": {text}, "signature": {signature}}.Encode()
		acomm.ProxyStreamHandler(w, httptest.NewRequest("GET", "/stream?"+query, nil))
		return w.Code
	}
	tamper := func(s string) (altered []string) {
		for i := range len(s) {
			for _, b := range []byte{s[i] ^ 1, s[i] ^ 0x20, s[i] + 1, 'A', '=', '%', '/', '.', 0} {
				if b != s[i] {
					altered = append(altered, s[:i]+string([]byte{b})+s[i+1:])
				}
			}
			altered = append(altered, s[:i], s[:i]+s[i+1:], s[:i]+s[i:i+1]+s[i:])
		}
		return append(altered, s+"=", s+"\x00", s+" ", " "+s, s+s)
	}
	for _, altered := range tamper(text) {
		require.Contains(t, []int{400, 403}, call(altered, signature), "%q", altered)
	}
	for _, altered := range tamper(signature) {
		require.Equal(t, 403, call(text, altered), "%q", altered)
	}
	target.requireUntouched()
	require.Equal(t, 200, call(text, signature), "as it was published")
}

func init() { roles["signer"] = signer }

// signer prints the signature of an address.
func signer() {
	addr, err := url.Parse(os.Getenv("ADDRESS"))
	orExit(err)
	tracker, err := acomm.NewTracker("", &url.URL{Scheme: "http", Host: "h"}, 0)
	orExit(err)
	u, err := tracker.ProxyStreamHTTPURL(addr)
	orExit(err)
	fmt.Println(u.Query().Get("signature"))
}

// signElsewhere has another process of this very program sign the address.
func signElsewhere(t testing.TB, addr *url.URL) string {
	t.Helper()
	return startProcess(t, "signer", "ADDRESS="+addr.String()).ReadLine()
}

func TestProxyStreamHTTPURL_EachProcessHasAKeyOfItsOwn(t *testing.T) {
	tracker, _ := streamProxy(t)
	addr := unixURL("/x")
	here, there := signatureIn(t, tracker, addr), signElsewhere(t, addr)
	require.Len(t, here, 43, "256 bits")
	require.Len(t, there, 43)
	require.NotEqual(t, here, there)
	require.NotEqual(t, signElsewhere(t, addr), there)
}

// A published URL is a bearer capability: whoever has it reads the stream, once.
func TestProxyStreamHTTPURL_WhoeverHasItReadsTheStreamOnce(t *testing.T) {
	tracker, _ := streamProxy(t)
	addr, err := tracker.NewStreamUnix("", bytesSource([]byte(secret)))
	require.NoError(t, err)
	u, err := tracker.ProxyStreamHTTPURL(addr)
	require.NoError(t, err)
	stranger := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, want := range []int{200, 404, 404} {
		resp, err := stranger.Get(u.String())
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, want, resp.StatusCode)
		require.Equal(t, want == 200, string(body) == secret)
	}
}

// Who answers a proxied request decides what the coordinator publishes: it is
// trusted with that, as SECURITY.md says.
func TestProxyUnix_PublishesTheAddressTheResponderNames(t *testing.T) {
	tracker, _ := streamProxy(t)
	internal := newVictim(t, "tcp", "127.0.0.1:0")
	responses := make(chan *acomm.Response, 1)
	hook := httpPeer(t, func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		_ = json.NewDecoder(r.Body).Decode(resp)
		responses <- resp
	})
	req, _ := newRequest(t, hook, nil)
	proxied, err := tracker.ProxyUnix(req, 0)
	require.NoError(t, err)
	require.NoError(t, proxied.Respond(&acomm.Response{ID: req.ID, StreamURL: internal.url}))
	resp := within(t, responses, "the response")
	status, body, err := get(t, resp.StreamURL)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, secret, string(body))
}

// Hooks are dial targets that the requester chooses. The library connects to
// whatever they say: a service that takes requests from strangers looks at them
// first, as this one does.
func TestRespond_HooksLeadWhereverTheRequesterSays(t *testing.T) {
	allowed := func(hook *url.URL) bool { return hook.Scheme == "https" && hook.Hostname() == "callbacks.example" }
	dir := shortDir(t)
	for _, target := range []*victim{newVictim(t, "unix", filepath.Join(dir, "s.sock")), newVictim(t, "tcp", "127.0.0.1:0")} {
		req, _ := newRequest(t, target.url, nil)
		require.False(t, allowed(req.ResponseHook))
		target.requireUntouched()
		require.Error(t, req.Respond(&acomm.Response{ID: req.ID}), "a secret is no acknowledgement")
		require.EqualValues(t, 2, target.accepted.Load(), "it was connected to")
	}
}

// Over HTTP the body is read by the service, which has to bound it.
func TestSend_ServiceBoundsTheBodiesItReads(t *testing.T) {
	const limit = 1 << 10
	service := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit)).Decode(req); err != nil {
			http.Error(w, "too much", http.StatusRequestEntityTooLarge)
		}
	})
	small, _ := newRequest(t, service, "small")
	require.NoError(t, acomm.Send(service, small))
	large, _ := newRequest(t, service, strings.Repeat("x", 2*limit))
	require.ErrorContains(t, acomm.Send(service, large), "413")
}
