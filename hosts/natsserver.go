package main

import (
	"errors"
	"flag"
	"fmt"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// serveNATS is the role of the broker. It notices within seconds that a host is gone.
// With its defaults a NATS server takes minutes, and sends requests to the host until
// then.
func serveNATS(args []string) error {
	flags := flag.NewFlagSet("nats", flag.ContinueOnError)
	host := flags.String("addr", "", "address")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s, err := server.NewServer(&server.Options{
		Host: *host, Port: natsPort, NoSigs: true, PingInterval: 2 * time.Second, MaxPingsOut: 2,
	})
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(startTimeout) {
		return errors.New("the server does not start")
	}
	fmt.Println("ready")
	s.WaitForShutdown()
	return nil
}

const natsPort = 4222
