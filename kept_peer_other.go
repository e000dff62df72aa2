//go:build !linux

package acomm

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// Where no connection is kept nothing of this is asked for.

func peerOf(*net.UnixConn) peerID { return peerID{} }

func thisThread() threadID { return threadID{} }

func openSocketFile(string) (*os.File, string, fileID, error) {
	return nil, "", fileID{}, errors.ErrUnsupported
}

func changeTime(*syscall.Stat_t) syscall.Timespec { return syscall.Timespec{} }
