package acomm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// asTimeout gives everything that took too long one name.
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

// asUnexpectedEOF gives a connection that the peer has closed too early one name,
// in whichever way the system reports it.
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
