package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/mistifyio/acomm"
)

const (
	echoTask        = "echo"
	exchangeTimeout = 10 * time.Second // as in the demo
	requestTimeout  = time.Minute
)

// acommClient is a requester and its providers. It is the code of a user: the
// demo's, with another task.
type acommClient struct {
	tracker   *acomm.Tracker
	hook      string
	listeners []*acomm.UnixListener
	addrs     []*url.URL
	serving   sync.WaitGroup
}

// startAcomm starts providers on a number of sockets, which the callers share.
func startAcomm(sockets int) func(string, int, handler) (client, error) {
	return func(dir string, _ int, handle handler) (client, error) {
		tracker, err := acomm.NewTracker(filepath.Join(dir, "requester.sock"), nil, requestTimeout)
		if err != nil {
			return nil, err
		}
		if err := tracker.Start(); err != nil {
			return nil, err
		}
		c := &acommClient{tracker: tracker, hook: tracker.URL().String()}
		for i := range sockets {
			listener := acomm.NewUnixListener(filepath.Join(dir, strconv.Itoa(i)+".sock"), 0)
			if err := listener.Start(); err != nil {
				return nil, errors.Join(err, c.close())
			}
			c.listeners = append(c.listeners, listener)
			c.addrs = append(c.addrs, listener.URL())
			c.serving.Go(func() { serveEcho(listener, handle) })
		}
		return c, nil
	}
}

// serveEcho takes the requests for the task until its listener is stopped.
func serveEcho(listener *acomm.UnixListener, handle handler) {
	var working sync.WaitGroup
	defer working.Wait()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		working.Go(func() {
			req, err := receiveRequest(listener, conn)
			if err == nil {
				err = answerEcho(req, handle)
			}
			if err != nil {
				log.Print(err)
			}
		})
	}
}

// receiveRequest reads a request, acknowledges it, and is done with the
// connection.
func receiveRequest(listener *acomm.UnixListener, conn net.Conn) (*acomm.Request, error) {
	defer listener.DoneConn(conn)
	if err := conn.SetDeadline(time.Now().Add(exchangeTimeout)); err != nil {
		return nil, err
	}
	req := &acomm.Request{}
	refusal := acomm.UnmarshalConnData(conn, req)
	if refusal == nil {
		refusal = req.Validate()
	}
	if refusal == nil && req.Task != echoTask {
		refusal = fmt.Errorf("the task here is %q, not %q", echoTask, req.Task)
	}
	err := acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: refusal})
	if refusal != nil {
		return nil, refusal
	}
	return req, err
}

// answerEcho does the task and sends the response to the request's hook.
func answerEcho(req *acomm.Request, handle handler) error {
	args := &Message{}
	if err := req.UnmarshalArgs(args); err != nil {
		return err
	}
	resp, err := acomm.NewResponse(req, handle(args), nil, nil)
	if err != nil {
		return err
	}
	return req.Respond(resp)
}

func (c *acommClient) call(caller int, args *Message) (*Message, error) {
	answered := make(chan *acomm.Response, 1)
	handle := func(_ *acomm.Request, resp *acomm.Response) { answered <- resp }
	req, err := acomm.NewRequest(echoTask, c.hook, args, handle, handle)
	if err != nil {
		return nil, err
	}
	if err := c.tracker.TrackRequest(req, requestTimeout); err != nil {
		return nil, err
	}
	if err := acomm.Send(c.addrs[caller%len(c.addrs)], req); err != nil {
		c.tracker.RemoveRequest(req) // no response will come
		return nil, err
	}
	resp := <-answered
	if resp.Error != nil {
		return nil, resp.Error
	}
	result := &Message{}
	return result, resp.UnmarshalResult(result)
}

func (c *acommClient) close() error {
	for _, listener := range c.listeners {
		listener.Stop(0)
	}
	c.serving.Wait()
	c.tracker.Stop()
	return nil
}
