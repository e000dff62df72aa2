package acomm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/mistifyio/acomm"
)

// A provider that echoes, and a requester, in one program.
func Example() {
	provider := acomm.NewUnixListener("", 0)               // requests arrive here
	tracker, err := acomm.NewTracker("", nil, time.Minute) // and responses here
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(provider.Start(), tracker.Start()); err != nil {
		log.Fatal(err)
	}
	defer provider.Stop(0)
	defer tracker.Stop()

	go func() { // the provider: acknowledge at once, work, respond
		conn, req := provider.NextConn(), &acomm.Request{}
		defer provider.DoneConn(conn)
		if acomm.UnmarshalConnData(conn, req) == nil && acomm.SendConnData(conn, &acomm.Response{}) == nil {
			_ = req.Respond(&acomm.Response{ID: req.ID, Result: req.Args}) // on an error, log it
		}
	}()

	answer := make(chan string, 1)
	success := func(_ *acomm.Request, resp *acomm.Response) { answer <- string(*resp.Result) }
	failure := func(_ *acomm.Request, resp *acomm.Response) { answer <- resp.Error.Error() }
	req, err := acomm.NewRequest("echo", tracker.URL().String(), "hello", success, failure)
	if err := errors.Join(err, tracker.TrackRequest(req, time.Minute)); err != nil {
		log.Panic(err) // it runs the deferred Stops, which remove the sockets; Fatal does not
	}
	if err := acomm.Send(provider.URL(), req); err != nil {
		tracker.RemoveRequest(req) // a late response is dropped
		log.Panic(err)
	}
	fmt.Println(<-answer)
	// Output: "hello"
}

// A request whose provider never answers ends with its time-out.
func ExampleRequest() {
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		log.Fatal(err)
	}
	defer tracker.Stop()

	done := make(chan struct{})
	success := func(_ *acomm.Request, resp *acomm.Response) {
		defer close(done)
		var size int64
		if err := resp.UnmarshalResult(&size); err != nil {
			log.Print(err)
			return
		}
		fmt.Println(size, "bytes")
	}
	failure := func(req *acomm.Request, resp *acomm.Response) {
		defer close(done)
		if errors.Is(resp.Error, os.ErrDeadlineExceeded) {
			fmt.Println(req.Task, "took too long:", resp.Error)
			return
		}
		fmt.Println(req.Task, "failed:", resp.Error)
	}
	args := map[string]string{"path": "/etc/hosts"}
	req, err := acomm.NewRequest("file.size", tracker.URL().String(), args, success, failure)
	if err != nil {
		log.Panic(err)
	}
	if err := tracker.TrackRequest(req, 10*time.Millisecond); err != nil {
		log.Panic(err)
	}
	// Here the request would be sent to its provider: acomm.Send(provider, req)
	<-done
	// Output: file.size took too long: response timeout
}

// A coordinator takes a request with an HTTP hook, and has a provider on the
// same machine answer it over a unix socket.
func ExampleTracker_ProxyUnix() {
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var resp acomm.Response
		if err := json.NewDecoder(r.Body).Decode(&resp); err != nil {
			log.Print(err)
			return
		}
		fmt.Printf("the hook got %s\n", *resp.Result)
	}))
	defer hook.Close()

	coordinator, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Panic(err)
	}
	if err := coordinator.Start(); err != nil {
		log.Panic(err)
	}
	req, err := acomm.NewRequest("sum", hook.URL, []int{1, 2}, nil, nil)
	if err != nil {
		log.Panic(err)
	}
	proxied, err := coordinator.ProxyUnix(req, 10*time.Second)
	if err != nil {
		log.Panic(err)
	}
	fmt.Println(req.ResponseHook.Scheme, "became", proxied.ResponseHook.Scheme)

	// The provider, which was sent the proxied request, answers it as any other.
	var numbers [2]int
	if err := proxied.UnmarshalArgs(&numbers); err != nil {
		log.Panic(err)
	}
	resp, err := acomm.NewResponse(proxied, numbers[0]+numbers[1], nil, nil)
	if err != nil {
		log.Panic(err)
	}
	if err := proxied.Respond(resp); err != nil {
		log.Panic(err)
	}
	coordinator.Stop() // waits until it is forwarded
	// Output:
	// http became unix
	// the hook got 3
}

// Many requests at once, and all their responses.
func ExampleMultiRequest() {
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		log.Fatal(err)
	}
	defer tracker.Stop()

	multi := acomm.NewMultiRequest(tracker, 10*time.Second)
	for _, word := range []string{"one", "two", "three"} {
		req, err := acomm.NewRequest("length", tracker.URL().String(), word, nil, nil)
		if err != nil {
			log.Panic(err)
		}
		if err := multi.AddRequest(word, req); err != nil {
			log.Panic(err)
		}
		// In place of sending it to a provider, which would do this:
		resp, err := acomm.NewResponse(req, len(word), nil, nil)
		if err == nil {
			err = req.Respond(resp)
		}
		if err != nil {
			multi.RemoveRequest(req) // so that Responses does not wait for it
			log.Print(err)
		}
	}
	responses := multi.Responses()
	for _, word := range []string{"one", "two", "three"} {
		resp := responses[word]
		if resp.Error != nil {
			fmt.Println(word, resp.Error)
			continue
		}
		fmt.Printf("%s %s\n", word, *resp.Result)
	}
	// Output:
	// one 3
	// two 3
	// three 5
}

// A provider takes requests, each in a goroutine, until it is stopped.
func ExampleUnixListener() {
	listener := acomm.NewUnixListener("", 0)
	if err := listener.Start(); err != nil {
		log.Fatal(err)
	}
	handle := func(conn net.Conn) error {
		defer listener.DoneConn(conn)
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		var req acomm.Request
		if err := acomm.UnmarshalConnData(conn, &req); err != nil {
			return err
		}
		var refusal error
		if req.Task != "sleep" {
			refusal = errors.New("no such task: " + req.Task)
		}
		return acomm.SendConnData(conn, &acomm.Response{Error: refusal})
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
			go func() {
				if err := handle(conn); err != nil {
					log.Print(err)
				}
			}()
		}
	}()

	for _, task := range []string{"sleep", "dance"} {
		req, err := acomm.NewRequest(task, "http://localhost/hook", nil, nil, nil)
		if err != nil {
			log.Panic(err)
		}
		fmt.Println(task+":", acomm.Send(listener.URL(), req))
	}
	listener.Stop(10 * time.Second) // for the connections that are open
	<-served
	// Output:
	// sleep: <nil>
	// dance: no such task: dance
}

// Data that is too large for a response is read from a stream.
func ExampleTracker_NewStreamUnix() {
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		log.Fatal(err)
	}
	defer tracker.Stop()

	// The provider offers a file, or anything else that can be read and closed,
	// and puts the URL into its response.
	file := io.NopCloser(strings.NewReader("a lot of data\n"))
	streamURL, err := tracker.NewStreamUnix("", file)
	if err != nil {
		log.Panic(err)
	}
	// The consumer copies it to wherever it likes.
	if err := acomm.Stream(os.Stdout, streamURL); err != nil {
		log.Panic(err)
	}
	// Output: a lot of data
}

// A service publishes its streams over HTTP.
func ExampleProxyStreamHandler() {
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", acomm.ProxyStreamHandler)
	server := httptest.NewServer(mux)
	defer server.Close()
	handlerURL, err := url.Parse(server.URL + "/stream")
	if err != nil {
		log.Panic(err)
	}
	tracker, err := acomm.NewTracker("", handlerURL, time.Minute)
	if err != nil {
		log.Panic(err)
	}
	if err := tracker.Start(); err != nil {
		log.Panic(err)
	}
	defer tracker.Stop()

	streamURL, err := tracker.NewStreamUnix("", io.NopCloser(strings.NewReader("a lot of data\n")))
	if err != nil {
		log.Panic(err)
	}
	// ProxyUnix does this with the stream in a response.
	publicURL, err := tracker.ProxyStreamHTTPURL(streamURL)
	if err != nil {
		log.Panic(err)
	}
	if err := acomm.Stream(os.Stdout, publicURL); err != nil {
		log.Panic(err)
	}
	// It is for one reader. Without the signature there is nothing to read at all.
	answer, err := http.Get(handlerURL.String() + "?addr=" + url.QueryEscape(streamURL.String()))
	if err != nil {
		log.Panic(err)
	}
	defer answer.Body.Close()
	fmt.Println(answer.Status)
	// Output:
	// a lot of data
	// 403 Forbidden
}
