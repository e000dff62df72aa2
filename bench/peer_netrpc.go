package main

import (
	"net/rpc"
	"net/rpc/jsonrpc"
	"sync"
)

// netRPCService is the receiver of net/rpc's methods.
type netRPCService struct{ handle handler }

func (s netRPCService) Echo(args, result *Message) error {
	*result = *s.handle(args)
	return nil
}

type netRPCClient struct {
	*rpc.Client
	serving sync.WaitGroup
}

func startNetRPC(dir string, _ int, handle handler) (client, error) {
	server := rpc.NewServer()
	if err := server.RegisterName("Bench", netRPCService{handle}); err != nil {
		return nil, err
	}
	near, far, err := connect(dir)
	if err != nil {
		return nil, err
	}
	c := &netRPCClient{Client: jsonrpc.NewClient(near)}
	c.serving.Go(func() { server.ServeCodec(jsonrpc.NewServerCodec(far)) })
	return c, nil
}

func (c *netRPCClient) call(_ int, args *Message) (*Message, error) {
	result := &Message{}
	return result, c.Call("Bench.Echo", args, result)
}

func (c *netRPCClient) close() error {
	err := c.Close()
	c.serving.Wait()
	return err
}
