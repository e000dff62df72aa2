//go:build !linux

package main

import (
	"net"
	"time"
)

// awaitRead gives the peer the time to read what was written: the system does not tell.
func awaitRead(net.Conn) { time.Sleep(time.Millisecond) }
