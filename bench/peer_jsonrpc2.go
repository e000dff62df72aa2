package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"

	"github.com/sourcegraph/jsonrpc2"
)

type jsonrpc2Client struct {
	*jsonrpc2.Conn
	server *jsonrpc2.Conn
}

func startJSONRPC2(dir string, _ int, handle handler) (client, error) {
	near, far, err := connect(dir)
	if err != nil {
		return nil, err
	}
	echo := func(_ context.Context, _ *jsonrpc2.Conn, req *jsonrpc2.Request) (any, error) {
		if req.Params == nil {
			return nil, errors.New("no params")
		}
		args := &Message{}
		if err := json.Unmarshal(*req.Params, args); err != nil {
			return nil, err
		}
		return handle(args), nil
	}
	open := func(conn net.Conn, h jsonrpc2.Handler) *jsonrpc2.Conn {
		stream := jsonrpc2.NewBufferedStream(conn, jsonrpc2.VSCodeObjectCodec{})
		return jsonrpc2.NewConn(context.Background(), stream, h)
	}
	return &jsonrpc2Client{
		Conn:   open(near, jsonrpc2.HandlerWithError(nil)), // is never asked
		server: open(far, jsonrpc2.AsyncHandler(jsonrpc2.HandlerWithError(echo))),
	}, nil
}

func (c *jsonrpc2Client) call(_ int, args *Message) (*Message, error) {
	result := &Message{}
	return result, c.Call(context.Background(), "echo", args, result)
}

func (c *jsonrpc2Client) close() error {
	err := c.Close()
	<-c.server.DisconnectNotify()
	return err
}
