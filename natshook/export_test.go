package natshook

import "time"

// SetMaxWait sets what bounds an exchange, and returns what undoes it.
func SetMaxWait(d time.Duration) (undo func()) {
	old := maxWait
	maxWait = d
	return func() { maxWait = old }
}

// SetMaxHandlers sets how many handlers of the next Serve run at a time, and
// returns what undoes it.
func SetMaxHandlers(n int) (undo func()) {
	old := maxHandlers
	maxHandlers = n
	return func() { maxHandlers = old }
}
