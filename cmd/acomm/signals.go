package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// sameSignal is how long after the first signal another one is taken for the same: a
// terminal and a supervisor send one each.
const sameSignal = time.Second

// notifyEnd relays the signals that end a command. Nothing stops that before the process
// ends: a signal that arrives on the way out must not change how it ends.
func notifyEnd(signals chan<- os.Signal) {
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // or nohup would be of no use
		signal.Notify(signals, syscall.SIGHUP)
	}
	// A log that nobody reads does not end the process, nor does an output: writing it
	// then fails, and what is on disk is removed.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
}

// secondSignal relays the signals that are not the same as the one that has just come.
func secondSignal(signals <-chan os.Signal) <-chan os.Signal {
	second := make(chan os.Signal, 1)
	first := time.Now()
	go func() { // ends with the process
		for sig := range signals {
			if time.Since(first) >= sameSignal {
				second <- sig
				return
			}
		}
	}()
	return second
}

// signalContext is a context that ends with SIGINT, SIGTERM or SIGHUP; its cause
// then has the exit code. The second signal ends the process.
func signalContext() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	notifyEnd(signals)
	go func() { // ends with the process
		sig := <-signals
		cancel(&exitError{128 + int(sig.(syscall.Signal)), fmt.Errorf("interrupted: %v", sig)})
		sig = <-secondSignal(signals)
		os.Exit(128 + int(sig.(syscall.Signal)))
	}()
	return ctx, func() { cancel(nil) }
}

// withoutHangups relays all signals but SIGHUP, which it calls a function for.
func withoutHangups(signals <-chan os.Signal, hangup func()) chan os.Signal {
	others := make(chan os.Signal, cap(signals))
	go func() { // ends with the process
		for sig := range signals {
			if sig == syscall.SIGHUP {
				hangup()
				continue
			}
			others <- sig
		}
	}()
	return others
}
