//go:build !linux

package acomm

import "net"

// samePeer reports whether the same process is at the other end of both connections,
// which is not asked where no connection is kept.
func samePeer(_, _ *net.UnixConn) bool { return false }
