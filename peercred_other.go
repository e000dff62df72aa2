//go:build !linux

package acomm

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// Systems other than Linux have no sessions, so these functions are not called.

func peerCredsOf(*net.UnixConn) peerCreds { return peerCreds{} }

func thisThread() threadID { return threadID{} }

func openSocketFile(string) (*os.File, string, fileID, error) {
	return nil, "", fileID{}, errors.ErrUnsupported
}

func changeTime(*syscall.Stat_t) syscall.Timespec { return syscall.Timespec{} }
