package main

import (
	"net"
	"os"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"
)

// notifier tells systemd, or another supervisor that speaks sd_notify(3), how the
// process is. Where none has started it, it does nothing.
type notifier struct {
	socket string        // of the supervisor; empty: none
	every  time.Duration // a sign of life is due; 0: none is

	stop    chan struct{} // closed by close
	stopped chan struct{} // closed when there are no more signs of life; nil: there were none
}

// newNotifier takes the supervisor's settings out of the environment: they are not
// for the programs that the process starts.
func newNotifier() *notifier {
	n := &notifier{socket: os.Getenv("NOTIFY_SOCKET"), stop: make(chan struct{})}
	pid := os.Getenv("WATCHDOG_PID")
	if pid == "" || pid == strconv.Itoa(os.Getpid()) {
		if usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 {
			n.every = time.Duration(usec) * time.Microsecond / 2 // as sd_watchdog_enabled(3) advises
		}
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"} {
		_ = os.Unsetenv(name)
	}
	return n
}

// ready says that requests are taken, and from then on gives signs of life.
func (n *notifier) ready() {
	if n.socket == "" {
		return
	}
	n.send("READY=1")
	if n.every <= 0 {
		return
	}
	n.stopped = make(chan struct{})
	go func() { // close waits for it
		defer close(n.stopped)
		ticker := time.NewTicker(n.every)
		defer ticker.Stop()
		for {
			n.send("WATCHDOG=1")
			select {
			case <-ticker.C:
			case <-n.stop:
				return
			}
		}
	}()
}

// stopping says that no more requests are taken.
func (n *notifier) stopping() { n.send("STOPPING=1") }

// close ends the signs of life.
func (n *notifier) close() {
	close(n.stop)
	if n.stopped != nil {
		<-n.stopped
	}
}

func (n *notifier) send(state string) {
	if n.socket == "" {
		return
	}
	conn, err := net.Dial("unixgram", n.socket)
	if err == nil {
		defer conn.Close()
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = conn.Write([]byte(state))
	}
	if err != nil {
		logrus.WithError(err).Warnf("failed to tell the supervisor %s", state)
	}
}
