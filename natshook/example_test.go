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

// A provider of the task echo and a requester of it, here in one process and with
// a NATS server of their own.
func Example() {
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		log.Fatal(err)
	}
	s.Start()
	defer s.WaitForShutdown()
	defer s.Shutdown()
	nc, err := nats.Connect(s.ClientURL(), nats.MaxReconnects(-1))
	if err != nil {
		log.Panic(err)
	}
	defer nc.Close()
	if err := natshook.Register(nc); err != nil { // from here on Send takes nats URLs
		log.Panic(err)
	}

	// The provider: acknowledge at once, work, respond.
	echo := func(w http.ResponseWriter, r *http.Request) {
		req := &acomm.Request{}
		err := json.NewDecoder(r.Body).Decode(req)
		if err == nil {
			err = req.Validate()
		}
		_ = json.NewEncoder(w).Encode(&acomm.Response{Error: err})
		if err == nil {
			go func() { _ = req.Respond(&acomm.Response{ID: req.ID, Result: req.Args}) }() // on an error, log it
		}
	}
	provider, err := natshook.Serve(nc, "tasks.echo", "workers", http.HandlerFunc(echo))
	if err != nil {
		log.Panic(err)
	}
	defer provider.Close()

	// The requester: a tracker, and a subject for its responses.
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err := errors.Join(err, tracker.Start()); err != nil {
		log.Panic(err)
	}
	defer tracker.Stop()
	responses := func(w http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		err := json.NewDecoder(r.Body).Decode(resp)
		_ = json.NewEncoder(w).Encode(&acomm.Response{Error: err})
		if err == nil {
			tracker.HandleResponse(resp)
		}
	}
	hook, err := natshook.Serve(nc, "responses.requester-1", "", http.HandlerFunc(responses))
	if err != nil {
		log.Panic(err)
	}
	defer hook.Close()

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
