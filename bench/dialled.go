package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"sync"
)

// dialled is the way of 2016: a connection for each message, which carries it and
// its acknowledgement, with plain encoding/json. It is no peer: it is what the
// library is to be compared with by those who have the original.
type dialled struct {
	requests, responses *net.UnixListener
	serving             sync.WaitGroup
	waiting             sync.Map // of chan *wireResponse, by id

	mu  sync.Mutex // guards err
	err error
}

func startDialled(dir string, _ int, handle handler) (client, error) {
	c := &dialled{}
	var err error
	if c.requests, err = listenUnix(filepath.Join(dir, "provider.sock")); err != nil {
		return nil, err
	}
	if c.responses, err = listenUnix(filepath.Join(dir, "requester.sock")); err != nil {
		return nil, errors.Join(err, c.requests.Close())
	}
	c.serving.Go(func() { c.serve(c.requests, func(conn frameConn) error { return answerDialled(conn, handle) }) })
	c.serving.Go(func() { c.serve(c.responses, c.receive) })
	return c, nil
}

func listenUnix(path string) (*net.UnixListener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
}

// serve carries out an exchange on each connection.
func (c *dialled) serve(l *net.UnixListener, exchange func(frameConn) error) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return // closed
		}
		c.serving.Go(func() {
			if err := exchange(frameConn{conn}); err != nil {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.err = errors.Join(c.err, err)
			}
		})
	}
}

// answerDialled is the provider's part.
func answerDialled(conn frameConn, handle handler) error {
	req := &wireRequest{}
	if err := conn.receive(req); err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := errors.Join(conn.send(&wireResponse{ID: req.ID}), conn.Close()); err != nil {
		return err
	}
	if req.Args == nil || req.ResponseHook == nil {
		return errors.New("no args or no hook")
	}
	result, err := handleJSON(handle, *req.Args)
	if err != nil {
		return err
	}
	return sendDialled(req.ResponseHook.Path, &wireResponse{ID: req.ID, Result: (*json.RawMessage)(&result)})
}

// receive takes a response.
func (c *dialled) receive(conn frameConn) error {
	resp := &wireResponse{}
	if err := conn.receive(resp); err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := errors.Join(conn.send(&wireResponse{}), conn.Close()); err != nil {
		return err
	}
	answered, ok := c.waiting.LoadAndDelete(resp.ID)
	if !ok {
		return fmt.Errorf("response to %s: nobody waits for it", resp.ID)
	}
	answered.(chan *wireResponse) <- resp
	return nil
}

// sendDialled sends a message and waits for its acknowledgement.
func sendDialled(path string, message any) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	c := frameConn{conn}
	err = c.send(message)
	if err == nil {
		err = c.receive(&wireResponse{})
	}
	return errors.Join(err, conn.Close())
}

func (c *dialled) call(caller int, args *Message) (*Message, error) {
	return callJSON(args, func(data []byte) ([]byte, error) {
		req := &wireRequest{
			ID:           callID(caller, args),
			Task:         echoTask,
			ResponseHook: &url.URL{Scheme: "unix", Path: c.responses.Addr().String()},
			Args:         (*json.RawMessage)(&data),
		}
		answered := make(chan *wireResponse, 1)
		c.waiting.Store(req.ID, answered)
		if err := sendDialled(c.requests.Addr().String(), req); err != nil {
			return nil, err
		}
		resp := <-answered
		if resp.Result == nil {
			return nil, fmt.Errorf("no result for %s", req.ID)
		}
		return *resp.Result, nil
	})
}

func (c *dialled) close() error {
	err := errors.Join(c.requests.Close(), c.responses.Close())
	c.serving.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(err, c.err)
}
