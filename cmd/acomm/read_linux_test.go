package main

import (
	"net"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

// awaitRead waits until the peer has read all that was written to a unix socket. A peer
// that reads something else first is waited for a moment only.
func awaitRead(conn net.Conn) {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return
	}
	unread := func() (n int32) {
		_ = raw.Control(func(fd uintptr) {
			_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
		})
		return n
	}
	for until := time.Now().Add(20 * time.Millisecond); unread() > 0 && time.Now().Before(until); {
		runtime.Gosched()
	}
}
