package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"sync"

	"storj.io/drpc"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcmux"
	"storj.io/drpc/drpcserver"
)

const drpcEcho = "/bench/Echo"

type drpcClient struct {
	conns   []*drpcconn.Conn // by caller
	stop    context.CancelFunc
	serving sync.WaitGroup
}

// startDRPC opens a connection for each caller: one carries a call at a time.
func startDRPC(dir string, callers int, handle handler) (client, error) {
	mux := drpcmux.New()
	if err := mux.Register(handle, drpcDescription{}); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "drpc.sock"))
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &drpcClient{stop: stop}
	c.serving.Go(func() { _ = drpcserver.New(mux).Serve(ctx, l) }) // until close
	for range callers {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			return nil, errors.Join(err, c.close())
		}
		c.conns = append(c.conns, drpcconn.New(conn))
	}
	return c, nil
}

func (c *drpcClient) call(caller int, args *Message) (*Message, error) {
	result := &Message{}
	return result, c.conns[caller].Invoke(context.Background(), drpcEcho, drpcJSON{}, args, result)
}

func (c *drpcClient) close() error {
	var err error
	for _, conn := range c.conns {
		err = errors.Join(err, conn.Close())
	}
	c.stop()
	c.serving.Wait()
	return err
}

// drpcDescription describes the service, in the form that protoc would generate.
type drpcDescription struct{}

func (drpcDescription) NumMethods() int { return 1 }

func (drpcDescription) Method(n int) (string, drpc.Encoding, drpc.Receiver, any, bool) {
	receive := func(srv any, _ context.Context, args, _ any) (drpc.Message, error) {
		return srv.(handler)(args.(*Message)), nil
	}
	method := func(handle handler, _ context.Context, args *Message) (*Message, error) { return handle(args), nil }
	return drpcEcho, drpcJSON{}, receive, method, n == 0
}

// drpcJSON is an encoding of drpc.
type drpcJSON struct{}

func (drpcJSON) Marshal(msg drpc.Message) ([]byte, error)      { return json.Marshal(msg) }
func (drpcJSON) Unmarshal(data []byte, msg drpc.Message) error { return json.Unmarshal(data, msg) }
