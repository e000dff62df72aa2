package acomm_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Streams behind what services wrap around the handler and its connections.

// recovering is middleware that turns panics into something else, as many routers have
// it.
func recovering(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { _ = recover() }()
		next.ServeHTTP(w, r)
	})
}

// recoveringWithPage tells the client of the panic, or tries to.
func recoveringWithPage(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if recover() != nil {
				_, _ = io.WriteString(w, "internal error")
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// statusRecorder hides all but the three methods of a ResponseWriter.
type statusRecorder struct {
	http.ResponseWriter
	status int
}

func (s *statusRecorder) WriteHeader(status int) {
	s.status = status
	s.ResponseWriter.WriteHeader(status)
}

func recording(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(&statusRecorder{ResponseWriter: w}, r)
	})
}

// unwrapping is a recorder that says what it wraps.
type unwrapping struct{ statusRecorder }

func (u *unwrapping) Unwrap() http.ResponseWriter { return u.ResponseWriter }

// wrappingListener accepts connections that are wrapped, and say so.
type wrappingListener struct{ net.Listener }

func (l wrappingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return wrappedConn{conn}, nil
}

type wrappedConn struct{ net.Conn }

func (c wrappedConn) NetConn() net.Conn { return c.Conn }

const beforeTheBreak = 60_000 // bytes

// breaking is a reader that fails once it is told to.
type breaking chan struct{}

func (b breaking) Read([]byte) (int, error) {
	<-b
	return 0, errors.New("broken")
}

// proxyUnder serves streams under middleware, and offers one that breaks once it is told
// to.
func proxyUnder(t *testing.T, middleware func(http.Handler) http.Handler, configure func(*httptest.Server)) (*httptest.Server, *url.URL, breaking) {
	t.Helper()
	server := httptest.NewUnstartedServer(middleware(http.HandlerFunc(acomm.ProxyStreamHandler)))
	configure(server)
	t.Cleanup(server.Close)
	streamURL, err := url.Parse(server.URL + "/stream")
	require.NoError(t, err)
	tracker := newStreamTracker(t, streamURL)
	broken := make(breaking)
	src := io.MultiReader(bytes.NewReader(randomBytes(beforeTheBreak)), broken)
	stream, err := tracker.NewStreamUnix("", io.NopCloser(src))
	require.NoError(t, err)
	published, err := tracker.ProxyStreamHTTPURL(stream)
	require.NoError(t, err)
	return server, published, broken
}

// requireCutOff reads an answer whose source breaks when all before that has come.
func requireCutOff(t *testing.T, answer *http.Response, broken breaking) {
	t.Helper()
	require.Equal(t, http.StatusOK, answer.StatusCode)
	_, err := io.ReadFull(answer.Body, make([]byte, beforeTheBreak))
	require.NoError(t, err)
	close(broken)
	_, err = answer.Body.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotEqual(t, io.EOF, err)
}

// Hazard: the abort is a panic, and others catch it: 200, and no error.
func TestProxyStreamHandler_CutOffShowsUnderMiddlewareThatRecovers(t *testing.T) {
	onlyLinux(t)
	captureLog(t)
	for name, configure := range map[string]func(*httptest.Server){
		"HTTP/1.1": (*httptest.Server).Start,
		"HTTP/1.1 over TLS": func(s *httptest.Server) {
			s.StartTLS()
		},
		"HTTP/2": func(s *httptest.Server) {
			s.EnableHTTP2 = true
			s.StartTLS()
		},
	} {
		for what, middleware := range map[string]func(http.Handler) http.Handler{
			"recovering": recovering,
			"recovering around a recorder that unwraps": func(next http.Handler) http.Handler {
				return recovering(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					next.ServeHTTP(&unwrapping{statusRecorder{ResponseWriter: w}}, r)
				}))
			},
			"recovering around a recorder": func(next http.Handler) http.Handler { return recovering(recording(next)) },
			"a recorder around recovering": func(next http.Handler) http.Handler { return recording(recovering(next)) },
			"recovering, with a page":      recoveringWithPage,
		} {
			t.Run(name+", "+what, func(t *testing.T) {
				server, published, broken := proxyUnder(t, middleware, configure)
				answer, err := server.Client().Get(published.String())
				require.NoError(t, err)
				defer answer.Body.Close()
				require.Equal(t, name == "HTTP/2", answer.ProtoMajor == 2)
				requireCutOff(t, answer, broken)
			})
		}
	}
}

// Hazard: in HTTP/1.0 the end of the connection is the end of the data, and what hides
// the connection keeps it from being reset.
func TestProxyStreamHandler_HTTP10IsRefusedWhereItCantBeReset(t *testing.T) {
	onlyLinux(t)
	captureLog(t)
	direct := func(next http.Handler) http.Handler { return next }
	for name, test := range map[string]struct {
		middleware func(http.Handler) http.Handler
		configure  func(*httptest.Server)
		refused    bool
	}{
		"direct":                   {direct, (*httptest.Server).Start, false},
		"recovering":               {recovering, (*httptest.Server).Start, false},
		"under a recorder":         {recording, (*httptest.Server).Start, true},
		"under a recorder, behind": {func(next http.Handler) http.Handler { return recording(recovering(next)) }, (*httptest.Server).Start, true},
		"over a connection that says what it wraps": {direct, func(s *httptest.Server) {
			s.Listener = wrappingListener{s.Listener}
			s.StartTLS() // wraps it once more
		}, false},
		"over a unix socket": {direct, func(s *httptest.Server) {
			l, err := net.Listen("unix", filepath.Join(shortDir(t), "http.sock"))
			require.NoError(t, err)
			_ = s.Listener.Close()
			s.Listener = l
			s.Start()
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			server, published, broken := proxyUnder(t, test.middleware, test.configure)
			stream, err := url.Parse(published.Query().Get("addr"))
			require.NoError(t, err)
			addr := server.Listener.Addr()
			conn, err := net.Dial(addr.Network(), addr.String())
			require.NoError(t, err)
			if server.TLS != nil {
				conn = tls.Client(conn, &tls.Config{RootCAs: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: "example.com"})
			}
			defer conn.Close()
			_, err = io.WriteString(conn, "GET "+published.RequestURI()+" HTTP/1.0\r\n\r\n")
			require.NoError(t, err)
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			require.NoError(t, err)
			if test.refused {
				require.Equal(t, http.StatusHTTPVersionNotSupported, answer.StatusCode)
				r, w := io.Pipe()
				go func() { _ = w.CloseWithError(acomm.Stream(w, stream)) }()
				_, err = io.ReadFull(r, make([]byte, beforeTheBreak))
				require.NoError(t, err, "the refusal has not used the stream up")
				close(broken)
				_, err = r.Read(make([]byte, 1))
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
				return
			}
			requireCutOff(t, answer, broken)
		})
	}
}
