//go:build !linux

package main

import "syscall"

// ownGroup does nothing here: the three hosts need Linux, and -cost works without it.
func ownGroup() *syscall.SysProcAttr { return nil }
