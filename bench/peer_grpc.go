package main

import (
	"context"
	"net"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type grpcClient struct {
	*grpc.ClientConn
	server  *grpc.Server
	serving sync.WaitGroup
}

func startGRPC(dir string, _ int, handle handler) (client, error) {
	l, err := net.Listen("unix", filepath.Join(dir, "grpc.sock"))
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+l.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.Close()
		return nil, err
	}
	c := &grpcClient{ClientConn: conn, server: grpc.NewServer()}
	c.server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "bench",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Echo", Handler: grpcEcho}},
	}, handle)
	c.serving.Go(func() { _ = c.server.Serve(l) }) // until close
	return c, nil
}

// grpcEcho is the method, in the form that protoc would generate.
func grpcEcho(srv any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	in := &wrapperspb.BytesValue{}
	if err := decode(in); err != nil {
		return nil, err
	}
	out, err := handleJSON(srv.(handler), in.Value)
	return wrapperspb.Bytes(out), err
}

func (c *grpcClient) call(_ int, args *Message) (*Message, error) {
	return callJSON(args, func(data []byte) ([]byte, error) {
		out := &wrapperspb.BytesValue{}
		err := c.Invoke(context.Background(), "/bench/Echo", wrapperspb.Bytes(data), out)
		return out.Value, err
	})
}

func (c *grpcClient) close() error {
	err := c.Close()
	c.server.Stop()
	c.serving.Wait()
	return err
}
