package main

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type ttrpcClient struct {
	*ttrpc.Client
	server  *ttrpc.Server
	serving sync.WaitGroup
}

func startTTRPC(dir string, _ int, handle handler) (client, error) {
	server, err := ttrpc.NewServer()
	if err != nil {
		return nil, err
	}
	echo := func(_ context.Context, unmarshal func(any) error) (any, error) {
		in := &wrapperspb.BytesValue{}
		if err := unmarshal(in); err != nil {
			return nil, err
		}
		out, err := handleJSON(handle, in.Value)
		return wrapperspb.Bytes(out), err
	}
	server.RegisterService("bench", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{"Echo": echo}})

	l, err := net.Listen("unix", filepath.Join(dir, "ttrpc.sock"))
	if err != nil {
		return nil, err
	}
	c := &ttrpcClient{server: server}
	c.serving.Go(func() { _ = server.Serve(context.Background(), l) }) // until close
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, errors.Join(err, server.Close())
	}
	c.Client = ttrpc.NewClient(conn)
	return c, nil
}

func (c *ttrpcClient) call(_ int, args *Message) (*Message, error) {
	return callJSON(args, func(data []byte) ([]byte, error) {
		out := &wrapperspb.BytesValue{}
		err := c.Call(context.Background(), "bench", "Echo", wrapperspb.Bytes(data), out)
		return out.Value, err
	})
}

func (c *ttrpcClient) close() error {
	err := c.Close()
	err = errors.Join(err, c.server.Shutdown(context.Background()))
	c.serving.Wait()
	return err
}
