package natshook_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// A NATS server, a provider of the task echo and a requester, in one process.
func Example() {
	// A NATS server of our own, on a free port. Leave it out if you have servers.
	broker, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		log.Fatal(err)
	}
	broker.Start()
	defer broker.WaitForShutdown()
	defer broker.Shutdown()

	// Once per process: from here on, acomm sends to nats URLs over this connection.
	conn, err := nats.Connect(broker.ClientURL(), nats.MaxReconnects(-1))
	if err != nil {
		log.Panic(err) // not Fatal: on the way out everything is stopped
	}
	defer conn.Close()
	if err := natshook.Register(conn); err != nil {
		log.Panic(err)
	}

	// The provider acknowledges each request at once, works, and sends the response.
	echo := func(w http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		err := json.NewDecoder(r.Body).Decode(req)
		if err == nil {
			err = req.Validate()
		}
		_ = json.NewEncoder(w).Encode(&acomm.Response{Error: err}) // the acknowledgement
		if err == nil {
			go func() { _ = req.Respond(&acomm.Response{ID: req.ID, Result: req.Args}) }() // on an error, log it
		}
	}
	provider, err := natshook.Serve(conn, "tasks.echo", "workers", http.HandlerFunc(echo))
	if err != nil {
		log.Panic(err)
	}
	defer provider.Close()

	// The requester has a tracker, and a subject for its responses.
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		log.Panic(err)
	}
	if err := tracker.Start(); err != nil {
		log.Panic(err)
	}
	defer tracker.Stop()
	responses := func(w http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		err := json.NewDecoder(r.Body).Decode(resp)
		_ = json.NewEncoder(w).Encode(&acomm.Response{Error: err}) // the acknowledgement
		if err == nil {
			tracker.HandleResponse(resp)
		}
	}
	hook, err := natshook.Serve(conn, "responses.requester-1", "", http.HandlerFunc(responses))
	if err != nil {
		log.Panic(err)
	}
	defer hook.Close()

	// Track the request before you send it: the response may come at once.
	answer := make(chan string, 1)
	success := func(_ *acomm.Request, resp *acomm.Response) { answer <- string(*resp.Result) }
	failure := func(_ *acomm.Request, resp *acomm.Response) { answer <- resp.Error.Error() }
	req, err := acomm.NewRequest("echo", natshook.URL("responses.requester-1").String(), "hello", success, failure)
	if err := errors.Join(err, tracker.TrackRequest(req, time.Minute)); err != nil {
		log.Panic(err)
	}
	if err := acomm.Send(natshook.URL("tasks.echo"), req); err != nil {
		tracker.RemoveRequest(req) // no response will come
		log.Panic(err)
	}
	fmt.Println(<-answer)
	// Output: "hello"
}
