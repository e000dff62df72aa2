package acomm_test

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"time"

	"github.com/mistifyio/acomm"
)

// streamHandler serves the stream that find allows the client to read. Where
// find trusts what the client sent, the client reads any socket it likes.
func streamHandler(find func(*http.Request) (*url.URL, bool)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet { // a HEAD would use the stream up
			http.Error(w, "a stream can only be read with GET", http.StatusMethodNotAllowed)
			return
		}
		if !r.ProtoAtLeast(1, 1) { // it would take a stream that is cut off for a whole one
			http.Error(w, "a stream can't be read with HTTP/1.0", http.StatusHTTPVersionNotSupported)
			return
		}
		addr, ok := find(r)
		if !ok {
			http.Error(w, "no such stream", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		body := &countingWriter{w: w}
		switch err := acomm.Stream(body, addr); {
		case err != nil && body.n == 0:
			http.Error(w, "the stream is gone", http.StatusBadGateway)
		case err != nil: // a return would make it look complete
			// The deadline ends it also where middleware recovers from the panic,
			// unless a wrapper of w without an Unwrap method hides it.
			_ = http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0))
			panic(http.ErrAbortHandler)
		}
	}
}

// countingWriter tells whether anything has been written.
type countingWriter struct {
	w io.Writer
	n int
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += n
	return n, err
}

// A service with rules of its own, for instance who may read what, serves streams with
// a handler of its own. [acomm.ProxyStreamHandler] does two things more: it flushes
// before it waits for more data, and it releases the source as soon as the client has
// left; this handler notices that at its next write.
func ExampleStream() {
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		log.Fatal(err)
	}
	defer tracker.Stop()
	streamURL, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("a lot of data")))
	if err != nil {
		log.Panic(err)
	}
	server := httptest.NewServer(streamHandler(func(r *http.Request) (*url.URL, bool) {
		return streamURL, r.Header.Get("Authorization") == "Bearer secret"
	}))
	defer server.Close()

	for _, token := range []string{"guess", "secret"} {
		req, err := http.NewRequest(http.MethodGet, server.URL, nil)
		if err != nil {
			log.Panic(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			log.Panic(err)
		}
		data, err := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		fmt.Println(answer.StatusCode, strings.TrimSpace(string(data)), err)
	}
	// Output:
	// 404 no such stream <nil>
	// 200 a lot of data <nil>
}
