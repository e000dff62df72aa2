package acomm

import (
	"net"
	"syscall"
)

// samePeer reports whether the system says that the same process is at the other
// end of both connections, with the same rights: where it connected, then, and where
// it began to listen.
func samePeer(a, b *net.UnixConn) bool {
	one, ok := peerOf(a)
	other, ok2 := peerOf(b)
	return ok && ok2 && one == other
}

func peerOf(conn *net.UnixConn) (syscall.Ucred, bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return syscall.Ucred{}, false
	}
	var peer *syscall.Ucred
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		peer, peerErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil || peerErr != nil || peer.Pid == 0 { // 0: a process we can't see
		return syscall.Ucred{}, false
	}
	return *peer, true
}
