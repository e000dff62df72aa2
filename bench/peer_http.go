package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
)

type httpClient struct {
	http.Client
	server  *http.Server
	serving sync.WaitGroup
}

// startHTTP keeps a connection for each caller. The transport's default of two
// would have the others dial for every call.
func startHTTP(dir string, callers int, handle handler) (client, error) {
	l, err := net.Listen("unix", filepath.Join(dir, "http.sock"))
	if err != nil {
		return nil, err
	}
	echo := func(w http.ResponseWriter, r *http.Request) {
		data, err := readBody(r.Body, r.ContentLength)
		if err == nil {
			data, err = handleJSON(handle, data)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(data) // the client sees what is missing
	}
	c := &httpClient{server: &http.Server{Handler: http.HandlerFunc(echo)}}
	c.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", l.Addr().String())
		},
		MaxIdleConnsPerHost: callers,
	}
	c.serving.Go(func() { _ = c.server.Serve(l) }) // until close
	return c, nil
}

func (c *httpClient) call(_ int, args *Message) (*Message, error) {
	return callJSON(args, func(data []byte) ([]byte, error) {
		resp, err := c.Post("http://unix/echo", "application/json", bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return nil, errors.New(resp.Status)
		}
		return readBody(resp.Body, resp.ContentLength)
	})
}

func (c *httpClient) close() error {
	c.CloseIdleConnections()
	err := c.server.Shutdown(context.Background())
	c.serving.Wait()
	return err
}

// readBody reads a body into a slice of its size, where that is known.
func readBody(r io.Reader, size int64) ([]byte, error) {
	if size < 0 {
		return io.ReadAll(r)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("body of %d bytes: %w", size, err)
	}
	return data, nil
}
