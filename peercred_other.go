//go:build !linux

package acomm

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// Where there are no sessions nothing of this is asked for.

func peerCredsOf(*net.UnixConn) peerCreds { return peerCreds{} }

func thisThread() threadID { return threadID{} }

func openSocketFile(string) (*os.File, string, fileID, error) {
	return nil, "", fileID{}, errors.ErrUnsupported
}

func changeTime(*syscall.Stat_t) syscall.Timespec { return syscall.Timespec{} }
