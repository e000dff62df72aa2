package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// lookStream reads the stream of a response, if there is one.
func lookStream(c *checker) (string, error) {
	seen, resp, err := c.ask(c.newRequest(), delivery{})
	switch {
	case err != nil:
		return "", err
	case resp == nil:
		return "", errors.New(seen)
	case resp.stream == nil:
		return "", notSeen("the task has no stream")
	case resp.stream.Scheme == "unix":
		return c.readUnixStream(resp.stream.Path)
	case resp.stream.Scheme == "http", resp.stream.Scheme == "https":
		return c.readHTTPStream(resp.stream.String())
	}
	return "", fmt.Errorf("a stream with the scheme %q", resp.stream.Scheme)
}

func (c *checker) readUnixStream(path string) (string, error) {
	conn, err := c.dial(path)
	if err != nil {
		return "", fmt.Errorf("connect to the stream: %w", noDial(err))
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { _ = conn.Close() })()
	way := "a stream without .eof"
	if strings.HasSuffix(path, ".eof") {
		way = "a stream with .eof"
		if _, err := conn.Write([]byte{0}); err != nil {
			return "", fmt.Errorf("the consumer's byte: %w", err)
		}
	}
	n, err := io.Copy(io.Discard, conn)
	if err != nil {
		return "", fmt.Errorf("%s, after %d bytes: %w", way, n, err)
	}
	second, err := c.dial(path)
	if err == nil {
		defer second.Close()
		if n, _ := second.Read(make([]byte, 1)); n > 0 {
			return "", errors.New("a second consumer was served")
		}
	}
	return fmt.Sprintf("%s, %d bytes; a second consumer had none", way, n), nil
}

// noDial is the error without what says that the peer itself can't be reached.
func noDial(err error) error { return errors.New(err.Error()) }

func (c *checker) readHTTPStream(stream string) (string, error) {
	get := func(method string) (int, int64, error) {
		ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, stream, nil)
		if err != nil {
			return 0, 0, withoutURL(err)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, 0, noDial(withoutURL(err))
		}
		defer answer.Body.Close()
		n, err := io.Copy(io.Discard, answer.Body)
		return answer.StatusCode, n, err
	}
	_, n, err := get(http.MethodHead)
	if err != nil {
		return "", fmt.Errorf("HEAD: %w", err)
	}
	if n > 0 {
		return "", fmt.Errorf("HEAD: %d bytes", n)
	}
	status, n, err := get(http.MethodGet)
	if err != nil {
		return "", fmt.Errorf("GET after a HEAD, after %d bytes: %w", n, err)
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("GET after a HEAD: status %d", status)
	}
	if again, _, err := get(http.MethodGet); err == nil && again == http.StatusOK {
		return "", errors.New("a second consumer was served")
	}
	return fmt.Sprintf("HEAD took nothing, GET %d bytes; a second consumer had none", n), nil
}
