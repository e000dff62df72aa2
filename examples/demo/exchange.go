package main

import (
	"fmt"
	"net"
	"time"

	"github.com/mistifyio/acomm"
)

// exchangeTimeout bounds reading a request and acknowledging it.
const exchangeTimeout = 10 * time.Second

// receive reads a request from a connection of the listener, asks accept whether to
// serve it, acknowledges or refuses it, and closes the connection. After an error the
// request must not be served: it could not be read, it was refused, or the sender got
// no acknowledgement and takes it for lost.
func receive(listener *acomm.UnixListener, conn net.Conn, accept func(*acomm.Request) error) (*acomm.Request, error) {
	defer listener.DoneConn(conn)
	if err := conn.SetDeadline(time.Now().Add(exchangeTimeout)); err != nil {
		return nil, fmt.Errorf("receive request: %w", err)
	}
	req := &acomm.Request{}
	refusal := acomm.UnmarshalConnData(conn, req)
	if refusal == nil {
		refusal = req.Validate()
	}
	if refusal == nil {
		refusal = accept(req)
	}
	// A response without an error is the acknowledgement.
	err := acomm.SendConnData(conn, &acomm.Response{ID: req.ID, Error: refusal})
	if refusal != nil {
		return nil, fmt.Errorf("refuse request %q: %w", req.ID, refusal)
	}
	if err != nil {
		return nil, fmt.Errorf("acknowledge request %q: %w", req.ID, err)
	}
	return req, nil
}
