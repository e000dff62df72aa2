package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
	"unicode/utf8"
)

// Check speaks to the peer with nothing of the library: what it must see and do is
// below what that shows.

const (
	maxFrame   = 64 << 20               // bytes of a payload
	oneWrite   = 32 << 10               // bytes of a frame that arrive at once if written at once
	watchFor   = 2 * time.Millisecond   // how long the first bytes of a frame are watched for
	pieceGap   = 5 * time.Millisecond   // between the pieces of a frame
	strayAfter = 500 * time.Millisecond // for a response that must not come
)

// checker holds a peer to the protocol.
type checker struct {
	target     *url.URL
	task       string
	mustAccept bool // the task is one that the peer has
	of2016     bool
	timeout    time.Duration
	hookListen string
	hookURL    string
	out        io.Writer

	ctx     context.Context // of the run; it ends with a signal
	hook    *checkHook
	accepts bool       // the peer has accepted the first request
	acks    frameTally // the acknowledgements it has written
}

// frameTally is what has been seen of many frames.
type frameTally struct {
	n      int
	faults []string
}

func (f *frameTally) add(faults ...string) {
	f.n++
	f.faults = append(f.faults, faults...)
}

// message is a Response as the protocol describes it: names exactly as written,
// types as in the table.
type message struct {
	failure   string
	id        string
	result    json.RawMessage // null: none
	stream    *url.URL
	streamRaw string
}

// parseMessage reads a Response.
func parseMessage(data []byte) (*message, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("not UTF-8")
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return nil, fmt.Errorf("no JSON object: %w", err)
	}
	m := &message{result: members["result"], streamRaw: string(members["stream_url"])}
	if m.result == nil {
		m.result = json.RawMessage("null")
	}
	for name, dest := range map[string]*string{"error": &m.failure, "id": &m.id} {
		if text, ok := members[name]; ok && json.Unmarshal(text, dest) != nil {
			return nil, fmt.Errorf("the member %q is no string", name)
		}
	}
	if m.streamRaw == "" || m.streamRaw == "null" || m.streamRaw == `""` {
		return m, nil
	}
	var text string
	var err error
	if json.Unmarshal(members["stream_url"], &text) == nil {
		m.stream, err = url.Parse(text)
	} else {
		err = json.Unmarshal(members["stream_url"], &m.stream)
	}
	if err != nil {
		return nil, errors.New("the member \"stream_url\" is neither a URL object nor a URL")
	}
	return m, nil
}

// checkRequest is a request, its members as JSON text; an empty one is left out.
type checkRequest struct {
	id, task, hook, args string
	more                 string // further members
	padTo                int    // bytes, with white space
}

// newRequest is a request that the peer should take.
func (c *checker) newRequest() *checkRequest {
	return &checkRequest{
		id:   encodeJSON("acomm-check-" + rand.Text()),
		task: encodeJSON(c.task), hook: encodeJSON(c.hook.url), args: "null",
	}
}

func encodeJSON(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // never: they are strings and URLs
	}
	return string(data)
}

// payload is the request in JSON.
func (r *checkRequest) payload() []byte {
	var b bytes.Buffer
	b.WriteString("{" + r.more)
	comma := ""
	for _, member := range [][2]string{{"id", r.id}, {"task", r.task}, {"responsehook", r.hook}, {"args", r.args}} {
		if member[1] != "" {
			fmt.Fprintf(&b, "%s%q:%s", comma, member[0], member[1])
			comma = ","
		}
	}
	if pad := r.padTo - b.Len() - 1; pad > 0 {
		b.Write(bytes.Repeat([]byte{' '}, pad))
	}
	b.WriteByte('}')
	return b.Bytes()
}

// delivery is how a message is delivered; zero: as usual.
type delivery struct {
	write     func(net.Conn, []byte) error // of the frame, on a unix socket
	beforeAck func()                       // before the acknowledgement is read, on a unix socket
	afterAck  func()                       // after it was read, on a unix socket
}

// notTaken is an end of an exchange in which the peer did not take the message.
type notTaken string

func (n notTaken) Error() string { return string(n) }

// deliver sends a message and returns its acknowledgement.
func (c *checker) deliver(payload []byte, how delivery) (*message, error) {
	if c.target.Scheme != "unix" {
		return c.post(payload)
	}
	return c.exchange(frameOf(payload), how)
}

func frameOf(payload []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), payload...)
}

// exchange writes a frame on a connection of its own and reads one. Where the peer
// closes in place of that, the error is a notTaken.
func (c *checker) exchange(frame []byte, how delivery) (*message, error) {
	conn, err := c.dial(c.target.Path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(c.ctx, func() { _ = conn.Close() })()
	var writeErr error
	if how.write != nil {
		writeErr = how.write(conn, frame)
	} else {
		_, writeErr = conn.Write(frame)
	}
	if how.beforeAck != nil {
		how.beforeAck()
		_ = conn.SetDeadline(time.Now().Add(c.timeout))
	}
	data, pieces, err := readCheckFrame(conn)
	switch {
	case isClosed(err), err != nil && isClosed(writeErr):
		return nil, notTaken("the connection was closed without an acknowledgement")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("neither an acknowledgement nor the end of the connection within %v", c.timeout)
	case err != nil:
		c.acks.add(err.Error())
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	ack, err := parseMessage(data)
	if err != nil {
		c.acks.add(err.Error())
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	c.acks.add(pieces...)
	if how.afterAck != nil {
		how.afterAck()
	}
	return ack, nil
}

// dial connects to a socket, for as long as one check waits.
func (c *checker) dial(path string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: c.timeout}).DialContext(c.ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(c.timeout))
}

// isClosed reports whether the error says that the other side has closed, before the
// first byte of a frame or while one was written.
func isClosed(err error) bool {
	return err == io.EOF || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// readCheckFrame reads a frame. Pieces says so if it was not written at once.
func readCheckFrame(conn net.Conn) (payload []byte, pieces []string, err error) {
	buf := make([]byte, 64<<10)
	n, err := watchRead(conn, buf)
	if err != nil {
		return nil, nil, err
	}
	buf = buf[:n]
	for len(buf) < 4 {
		pieces = []string{"the header was not written at once"}
		more := make([]byte, 4-len(buf))
		n, err := conn.Read(more)
		if err != nil {
			return nil, nil, fmt.Errorf("%d bytes of a header: %w", len(buf), noEOF(err))
		}
		buf = append(buf, more[:n]...)
	}
	size := int(binary.BigEndian.Uint32(buf))
	if size > maxFrame {
		return nil, nil, fmt.Errorf("a frame that announces %d bytes", size)
	}
	buf = buf[4:]
	if len(buf) > size {
		return nil, nil, fmt.Errorf("%d bytes behind a frame of %d", len(buf)-size, size)
	}
	if pieces == nil && len(buf) < size && size+4 <= oneWrite {
		pieces = []string{fmt.Sprintf("header and payload were not written at once: %d of %d bytes came first", len(buf)+4, size+4)}
	}
	all := bytes.NewBuffer(buf)
	if _, err := io.CopyN(all, conn, int64(size-len(buf))); err != nil {
		return nil, nil, fmt.Errorf("%d of %d bytes of a payload: %w", all.Len(), size, noEOF(err))
	}
	return all.Bytes(), pieces, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// watchRead reads what is there first. For a moment it does not wait but looks again
// and again: between two writes there may be a microsecond.
func watchRead(conn net.Conn, buf []byte) (n int, err error) {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0, err
	}
	until := time.Now().Add(watchFor)
	rawErr := raw.Read(func(fd uintptr) bool {
		for {
			n, err = syscall.Read(int(fd), buf)
			if !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.EINTR) {
				return true
			}
			if time.Now().After(until) && errors.Is(err, syscall.EAGAIN) {
				return false
			}
		}
	})
	switch {
	case rawErr != nil:
		return 0, rawErr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// post sends a message over HTTP. Where the status says that it was not taken, the
// error is a notTaken.
func (c *checker) post(payload []byte) (*message, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.target.String(), bytes.NewReader(payload))
	if err != nil {
		return nil, withoutURL(err)
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, withoutURL(err) // which may hold a secret
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20+1))
	if answer.StatusCode >= 300 {
		return nil, notTaken(fmt.Sprintf("answered %s: %.200s", answer.Status, bytes.Join(bytes.Fields(body), []byte(" "))))
	}
	if err != nil {
		return nil, fmt.Errorf("the answer: %w", err)
	}
	if len(body) > 1<<20 {
		err = errors.New("an answer of more than 1 MiB")
	} else if body = bytes.TrimSpace(body); len(body) == 0 {
		c.acks.add()
		return &message{}, nil
	}
	var ack *message
	if err == nil {
		if ack, err = parseMessage(body); err != nil {
			err = fmt.Errorf("the answer %s is no Response: %w", answer.Status, err)
		}
	}
	if err != nil {
		c.acks.add(err.Error())
		return nil, err
	}
	c.acks.add()
	return ack, nil
}
