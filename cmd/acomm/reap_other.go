//go:build !linux

package main

// reap waits for the program, kills what it has left behind in its process group,
// and returns how the program has ended.
func (p *program) reap() error {
	err := p.cmd.Wait()
	p.killGroup()
	p.mu.Lock()
	p.reaped = true
	p.mu.Unlock()
	return err
}
