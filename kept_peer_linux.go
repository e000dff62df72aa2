package acomm

import (
	"net"
	"syscall"
)

// peerOf returns the process at the other end of a connection, as it was when it
// connected or began to listen; the zero value if the system does not say.
func peerOf(conn *net.UnixConn) peerID {
	raw, err := conn.SyscallConn()
	if err != nil {
		return peerID{}
	}
	var peer peerID
	_ = raw.Control(func(fd uintptr) {
		cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err == nil && cred.Pid != 0 { // 0: a process we can't see
			peer = peerID{cred.Pid, cred.Uid, cred.Gid}
		}
	})
	return peer
}
