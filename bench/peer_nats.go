package main

import (
	"errors"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const natsTimeout = time.Minute // for the server to come up, and for a call

type natsClient struct {
	server             *server.Server
	requester, replier *nats.Conn
}

// startNATS raises the limit of a payload, from 1 MiB, and of what may be queued
// for a connection, from 64 MiB: 64 callers with 1 MiB reach both. The replier
// handles each message in a goroutine, as the other servers do; by itself it
// would handle one at a time.
func startNATS(_ string, _ int, handle handler) (client, error) {
	s, err := server.NewServer(&server.Options{
		Host:       "127.0.0.1",
		Port:       server.RANDOM_PORT,
		MaxPayload: 8 << 20,
		MaxPending: 1 << 30,
		NoLog:      true,
		NoSigs:     true,
	})
	if err != nil {
		return nil, err
	}
	s.Start()
	c := &natsClient{server: s}
	if !s.ReadyForConnections(natsTimeout) {
		return nil, errors.Join(errors.New("the NATS server does not come up"), c.close())
	}
	if err := c.subscribe(handle); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// subscribe connects both ends and has the replier answer.
func (c *natsClient) subscribe(handle handler) (err error) {
	if c.requester, err = nats.Connect(c.server.ClientURL()); err != nil {
		return err
	}
	if c.replier, err = nats.Connect(c.server.ClientURL()); err != nil {
		return err
	}
	sub, err := c.replier.Subscribe("echo", func(msg *nats.Msg) {
		go func() { // ends with its answer, which a caller waits for
			if out, err := handleJSON(handle, msg.Data); err == nil {
				_ = msg.Respond(out)
			} // else the call times out
		}()
	})
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	return c.replier.Flush()
}

func (c *natsClient) call(_ int, args *Message) (*Message, error) {
	return callJSON(args, func(data []byte) ([]byte, error) {
		msg, err := c.requester.Request("echo", data, natsTimeout)
		if err != nil {
			return nil, err
		}
		return msg.Data, nil
	})
}

func (c *natsClient) close() error {
	for _, conn := range []*nats.Conn{c.requester, c.replier} {
		if conn != nil {
			conn.Close()
		}
	}
	c.server.Shutdown()
	c.server.WaitForShutdown()
	return nil
}
