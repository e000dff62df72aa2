package main

import (
	"errors"

	"golang.org/x/sys/unix"
)

// reap waits for the program, kills what it has left behind in its process group,
// and returns how the program has ended. The group is killed before the program
// is waited for: until then its number is its own.
func (p *program) reap() error {
	for {
		err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.killGroup()
	p.mu.Lock()
	p.reaped = true
	p.mu.Unlock()
	return p.cmd.Wait()
}
