package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
)

// frameConn carries frames as acomm does: 4 bytes of length, then the JSON, in
// one write.
type frameConn struct{ net.Conn }

func (c frameConn) send(payload any) error {
	var buf bytes.Buffer
	buf.Write(make([]byte, 4))
	if err := json.NewEncoder(&buf).Encode(payload); err != nil {
		return err
	}
	frame := bytes.TrimSuffix(buf.Bytes(), []byte("\n")) // the encoder's
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
	_, err := c.Write(frame)
	return err
}

func (c frameConn) receive(dest any) error {
	var header [4]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return err
	}
	data := make([]byte, binary.BigEndian.Uint32(header[:]))
	if _, err := io.ReadFull(c, data); err != nil {
		return err
	}
	return json.Unmarshal(data, dest)
}

// frameServers are goroutines that serve until their connections are closed.
type frameServers struct {
	conns   []frameConn // the client's ends
	serving sync.WaitGroup

	mu  sync.Mutex // guards err
	err error      // the first of a server
}

// add opens a number of connections and returns the servers' ends.
func (s *frameServers) add(dir string, number int) ([]frameConn, error) {
	var fars []frameConn
	for range number {
		near, far, err := connect(dir)
		if err != nil {
			return nil, err
		}
		s.conns = append(s.conns, frameConn{near})
		fars = append(fars, frameConn{far})
	}
	return fars, nil
}

// serve repeats one exchange on the connections, then closes them.
func (s *frameServers) serve(conns []frameConn, exchange func() error) {
	s.serving.Go(func() {
		var err error
		for err == nil {
			err = exchange()
		}
		for _, conn := range conns {
			_ = conn.Close()
		}
		if !errors.Is(err, io.EOF) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.err = errors.Join(s.err, err)
		}
	})
}

func (s *frameServers) close() error {
	for _, conn := range s.conns {
		_ = conn.Close()
	}
	s.serving.Wait()
	return s.err
}

// twoFrames is the least there is: a frame with the arguments, a frame with the
// result, a connection and a goroutine at its other end for each caller.
type twoFrames struct{ frameServers }

func startTwoFrames(dir string, callers int, handle handler) (client, error) {
	c := &twoFrames{}
	for range callers {
		fars, err := c.add(dir, 1)
		if err != nil {
			return nil, errors.Join(err, c.close())
		}
		c.serve(fars, func() error {
			args := &Message{}
			if err := fars[0].receive(args); err != nil {
				return err
			}
			return fars[0].send(handle(args))
		})
	}
	return c, nil
}

func (c *twoFrames) call(caller int, args *Message) (*Message, error) {
	if err := c.conns[caller].send(args); err != nil {
		return nil, err
	}
	result := &Message{}
	return result, c.conns[caller].receive(result)
}

// Envelopes as acomm's wire has them. They are no types of the library, so that
// the floor stays where it is when the library gets faster.
type (
	wireRequest struct {
		ID           string           `json:"id"`
		Task         string           `json:"task"`
		ResponseHook *url.URL         `json:"responsehook"`
		Args         *json.RawMessage `json:"args"`
	}
	wireResponse struct {
		Error     string           `json:"error"`
		ID        string           `json:"id"`
		Result    *json.RawMessage `json:"result"`
		StreamURL *url.URL         `json:"stream_url"`
	}
)

// fourFrames is acomm's exchange without acomm: the request and its
// acknowledgement on one connection, the response and its acknowledgement on
// another, both kept for each caller. Nothing is looked up, nothing is timed.
type fourFrames struct{ frameServers }

func startFourFrames(dir string, callers int, handle handler) (client, error) {
	c := &fourFrames{}
	for range callers {
		fars, err := c.add(dir, 2)
		if err != nil {
			return nil, errors.Join(err, c.close())
		}
		c.serve(fars, func() error { return exchangeFourFrames(fars[0], fars[1], handle) })
	}
	return c, nil
}

// exchangeFourFrames is the server's part.
func exchangeFourFrames(requests, responses frameConn, handle handler) error {
	req := &wireRequest{}
	if err := requests.receive(req); err != nil {
		return err
	}
	if err := requests.send(&wireResponse{ID: req.ID}); err != nil {
		return err
	}
	if req.Args == nil {
		return errors.New("no args")
	}
	result, err := handleJSON(handle, *req.Args)
	if err != nil {
		return err
	}
	if err := responses.send(&wireResponse{ID: req.ID, Result: (*json.RawMessage)(&result)}); err != nil {
		return err
	}
	return responses.receive(&wireResponse{})
}

func (c *fourFrames) call(caller int, args *Message) (*Message, error) {
	requests, responses := c.conns[2*caller], c.conns[2*caller+1]
	return callJSON(args, func(data []byte) ([]byte, error) {
		req := &wireRequest{
			ID:           callID(caller, args),
			Task:         echoTask,
			ResponseHook: &url.URL{Scheme: "unix", Path: "/run/requester.sock"},
			Args:         (*json.RawMessage)(&data),
		}
		if err := requests.send(req); err != nil {
			return nil, err
		}
		if err := requests.receive(&wireResponse{}); err != nil {
			return nil, err
		}
		resp := &wireResponse{}
		if err := responses.receive(resp); err != nil {
			return nil, err
		}
		if resp.ID != req.ID || resp.Result == nil {
			return nil, fmt.Errorf("not the response to request %s", req.ID)
		}
		return *resp.Result, responses.send(&wireResponse{})
	})
}
