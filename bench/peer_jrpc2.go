package main

import (
	"context"

	"github.com/creachadair/jrpc2"
	"github.com/creachadair/jrpc2/channel"
	jrpc2handler "github.com/creachadair/jrpc2/handler"
)

type jrpc2Client struct {
	*jrpc2.Client
	server *jrpc2.Server
}

func startJRPC2(dir string, _ int, handle handler) (client, error) {
	near, far, err := connect(dir)
	if err != nil {
		return nil, err
	}
	echo := func(_ context.Context, args *Message) (*Message, error) { return handle(args), nil }
	methods := jrpc2handler.Map{"echo": jrpc2handler.New(echo)}
	return &jrpc2Client{
		Client: jrpc2.NewClient(channel.Line(near, near), nil),
		server: jrpc2.NewServer(methods, nil).Start(channel.Line(far, far)),
	}, nil
}

func (c *jrpc2Client) call(_ int, args *Message) (*Message, error) {
	result := &Message{}
	return result, c.CallResult(context.Background(), "echo", args, result)
}

func (c *jrpc2Client) close() error {
	c.server.Stop()
	_ = c.server.Wait() // it was stopped
	return c.Close()
}
