package acomm_test

import (
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"syscall"

	"github.com/mistifyio/acomm"
)

// The kernel tells a listener who is on the other side of a connection, here
// before anything is read from it.
func ExampleUnixListener_peerCredentials() {
	listener := acomm.NewUnixListener("", 0)
	if err := listener.Start(); err != nil {
		log.Fatal(err)
	}
	defer listener.Stop(0)

	peerUID := func(conn net.Conn) (uint32, error) {
		sc, ok := conn.(syscall.Conn)
		if !ok {
			return 0, errors.ErrUnsupported
		}
		raw, err := sc.SyscallConn()
		if err != nil {
			return 0, err
		}
		var cred *syscall.Ucred
		var credErr error
		if err := raw.Control(func(fd uintptr) {
			cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		}); err != nil {
			return 0, err
		}
		if credErr != nil {
			return 0, credErr
		}
		return cred.Uid, nil
	}
	go func() {
		conn := listener.NextConn()
		defer listener.DoneConn(conn)
		uid, err := peerUID(conn)
		if err != nil || uid != uint32(os.Getuid()) {
			return // closing is an answer, too
		}
		var req acomm.Request
		if err := acomm.UnmarshalConnData(conn, &req); err != nil {
			return
		}
		if err := acomm.SendConnData(conn, &acomm.Response{}); err != nil {
			log.Print(err)
			return
		}
	}()

	req, err := acomm.NewRequest("test", "http://localhost/hook", nil, nil, nil)
	if err != nil {
		log.Panic(err)
	}
	if err := acomm.Send(listener.URL(), req); err != nil {
		log.Panic(err)
	}
	fmt.Println("one of us")
	// Output: one of us
}
