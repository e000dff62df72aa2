//go:build !linux

package main

import "syscall"

// ownGroup has nothing to offer: the three hosts need Linux, and -cost does without.
func ownGroup() *syscall.SysProcAttr { return nil }
