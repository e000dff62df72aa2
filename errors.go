package acomm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// asTimeout makes every kind of time-out match os.ErrDeadlineExceeded.
func asTimeout(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
	}
	return err
}

// asUnexpectedEOF makes every sign that the peer has closed too early match
// io.ErrUnexpectedEOF.
func asUnexpectedEOF(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case err == io.EOF:
		return io.ErrUnexpectedEOF
	case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%w: %w", io.ErrUnexpectedEOF, err)
	}
	return err
}
