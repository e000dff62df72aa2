package acomm

import (
	"net"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

const (
	openPath      = 0x200000 // O_PATH; package syscall lacks it
	soPeerGroups  = 59       // SO_PEERGROUPS; package syscall lacks it
	maxPeerGroups = 1 << 16  // Linux allows no more groups
)

// peerCredsOf returns what the kernel says of the process at the other end of a
// connection, at the moment that process connected or began to listen. If the kernel does
// not say, it returns the zero value.
func peerCredsOf(conn *net.UnixConn) peerCreds {
	raw, err := conn.SyscallConn()
	if err != nil {
		return peerCreds{}
	}
	var peer peerCreds
	_ = raw.Control(func(fd uintptr) {
		cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err != nil || cred.Pid == 0 { // 0: a process of a pid namespace that we can't see
			return
		}
		if groups, ok := peerGroups(fd); ok {
			peer = peerCreds{cred.Pid, cred.Uid, cred.Gid, groups}
		}
	})
	return peer
}

// peerGroups returns the supplementary groups of the process at the other end.
func peerGroups(fd uintptr) (string, bool) {
	for size := uint32(64); size <= 4*maxPeerGroups; size *= 2 {
		buf, got := make([]byte, size), size
		_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.SOL_SOCKET, soPeerGroups,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&got)), 0)
		switch errno {
		case 0:
			return string(buf[:got]), true
		case syscall.ENOPROTOOPT: // Linux before 4.13
			return "", true
		case syscall.ERANGE: // buf is too small
			continue
		}
		return "", false
	}
	return "", false
}

// thisThread returns the file-system user and group of the calling thread. Linux tells
// them only when they are set, so it tries to set an id that does not exist, which fails.
func thisThread() threadID {
	const nobody = ^uintptr(0)
	uid, _, _ := syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0)
	gid, _, _ := syscall.RawSyscall(syscall.SYS_SETFSGID, nobody, 0, 0)
	return threadID{uid, gid}
}

// openSocketFile opens the socket file at the path without connecting to it (O_PATH). The
// returned name leads to that very file, even if the path leads elsewhere by then.
func openSocketFile(path string) (file *os.File, name string, id fileID, err error) {
	fd, err := syscall.Open(path, openPath|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", fileID{}, err
	}
	file = os.NewFile(uintptr(fd), path)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		_ = file.Close()
		return nil, "", fileID{}, err
	}
	return file, "/proc/self/fd/" + strconv.Itoa(fd), newFileID(&st), nil
}

func changeTime(st *syscall.Stat_t) syscall.Timespec { return st.Ctim }
