package main

import "syscall"

// ownGroup keeps a terminal's signals from the process, and ends it with this one.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
