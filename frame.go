package acomm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"net"
	"sync"
	"syscall"
)

const (
	headerSize = 4        // bytes: an unsigned big-endian length
	maxPayload = 64 << 20 // bytes of JSON in a frame or in an HTTP body
	firstChunk = 4 << 10  // bytes allocated before any byte of a payload has arrived
)

// SendConnData writes the payload to the connection as one frame, in one write: a header
// of 4 bytes with the length, then the JSON. It blocks until everything is written, or
// until the deadline that the caller has set on the connection. Any number of goroutines
// may call it: frames of different calls do not mix, and their order is not defined.
//
// On an exchange of a session (see [UnixListener.NextConn]) the frame is queued and the
// call returns at once. As with a socket, nil does not mean that it was read. A message
// gets one answer; a second one gives [io.ErrUnexpectedEOF]. A [Response] on a connection
// of NextConn may get one more member, "sessions", if its sender asked for it.
//
// The errors match:
//
//   - [io/fs.ErrInvalid]: the connection or payload is nil, or [Send] would refuse the
//     payload as invalid
//   - [syscall.EMSGSIZE]: the JSON is over 64 MiB
//   - [io.ErrUnexpectedEOF]: the peer has closed the connection
//   - [os.ErrDeadlineExceeded]: the connection's deadline has passed
//
// In the first two cases nothing was written. After the others, close the connection.
func SendConnData(conn net.Conn, payload interface{}) error {
	if conn == nil {
		return fmt.Errorf("send frame: connection is nil: %w", fs.ErrInvalid)
	}
	m, err := encodeFrame(0, payload)
	if err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	defer m.release()
	frame := m.text
	if isResponse(payload) {
		frame = announceSessions(conn, frame)
	}
	if _, err = conn.Write(frame); err != nil {
		return fmt.Errorf("send frame of %d bytes: %w", len(frame), asUnexpectedEOF(err))
	}
	return nil
}

func isResponse(payload interface{}) bool {
	switch payload.(type) {
	case *Response, Response:
		return true
	}
	return false
}

// UnmarshalConnData reads one frame from the connection and decodes its JSON into dest,
// as [encoding/json.Unmarshal] does. A frame is a header of 4 bytes with the length, then
// the JSON. It blocks until the frame is complete, or until the deadline that the caller
// has set on the connection. On an exchange of a session (see [UnixListener.NextConn])
// the frame has arrived already.
//
// Memory is allocated as bytes arrive, not as the header announces. On one connection,
// only one call may run at a time: two would each read a part of the frame.
//
// The errors match:
//
//   - [io/fs.ErrInvalid]: the connection is nil, or dest is not a non-nil pointer
//   - [syscall.EMSGSIZE]: the frame is over 64 MiB
//   - [io.ErrUnexpectedEOF]: the connection ended before the whole frame
//   - [os.ErrDeadlineExceeded]: the connection's deadline has passed
//
// A frame that is not JSON, or does not fit dest, gives encoding/json's error. After an
// error nothing further can be read: refuse the message or not, then close the
// connection.
func UnmarshalConnData(conn net.Conn, dest interface{}) error {
	growStack()
	if conn == nil {
		return fmt.Errorf("read frame: connection is nil: %w", fs.ErrInvalid)
	}
	if err := checkDest(dest); err != nil {
		return fmt.Errorf("read frame: %w", err)
	}
	data, err := receiveFrame(conn)
	if err != nil {
		return fmt.Errorf("read frame: %w", err)
	}
	return decodeFrame(data, dest)
}

// receiveFrame reads one frame from a connection of any kind.
func receiveFrame(conn net.Conn) ([]byte, error) {
	if c, ok := conn.(interface{ takeFrame() []byte }); ok { // an exchange: its frame has arrived
		if data := c.takeFrame(); data != nil {
			return data, nil
		}
	}
	return readFrame(conn)
}

// encodeFrame returns the frame with the payload, behind room zero bytes.
func encodeFrame(room int, payload interface{}) (*message, error) {
	var m *message
	ok := false
	front := room + headerSize
	switch p := payload.(type) {
	case nil:
		return nil, fmt.Errorf("payload is nil: %w", fs.ErrInvalid)
	case *Request:
		if p == nil {
			return nil, fmt.Errorf("request is nil: %w", fs.ErrInvalid)
		}
		if err := p.checkText(); err != nil {
			return nil, err
		}
		m = newMessage(front, p.ResponseHook, p.Args)
		ok = m.addRequest(p)
	case *Response:
		if p == nil {
			return nil, fmt.Errorf("response is nil: %w", fs.ErrInvalid)
		}
		if err := p.checkText(); err != nil {
			return nil, err
		}
		m = newMessage(front, p.StreamURL, p.Result)
		ok = m.addResponse(p)
	case Request:
		return encodeFrame(room, &p)
	case Response:
		return encodeFrame(room, &p) // only *Response has MarshalJSON
	}
	if !ok {
		text, err := encodeJSON(front, payload)
		if err != nil {
			return nil, err
		}
		m = &message{text: text}
	}
	size := len(m.text) - front
	if err := checkSize(uint64(size)); err != nil {
		return nil, err
	}
	putFrameHeader(m.text[room:])
	return m, nil
}

// putFrameHeader writes the header of a frame, into the 4 bytes before its payload.
func putFrameHeader(frame []byte) {
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-headerSize))
}

// encodeJSON returns the JSON of the payload, behind front zero bytes. It refuses JSON
// that is nested too deep: some releases of encoding/json write it, none reads it.
func encodeJSON(front int, payload any) ([]byte, error) {
	out := &limitedText{front: front, data: make([]byte, front)}
	if err := json.NewEncoder(out).Encode(payload); err != nil {
		if isTooDeep(payload) {
			err = errTooDeep
		}
		return nil, fmt.Errorf("encode payload: %w", err)
	}
	text := bytes.TrimSuffix(out.data, []byte("\n")) // Encode adds a newline
	if scanJSON(text[front:]).tooDeep {
		return nil, fmt.Errorf("encode payload: %w", errTooDeep)
	}
	return text, nil
}

var errTooDeep = fmt.Errorf("JSON is nested more than %d levels deep, which peers refuse: %w", maxDepth, fs.ErrInvalid)

// isTooDeep reports whether the args or the result of a message are nested too deep.
func isTooDeep(payload any) bool {
	var raw *json.RawMessage
	switch p := payload.(type) {
	case *Request:
		raw = p.Args
	case *Response:
		raw = p.Result
	}
	if raw == nil {
		return false
	}
	s := scanJSON(*raw)
	return s.tooDeep || s.depth == maxDepth
}

// limitedText is the io.Writer of an encoder. It refuses a payload over the limit before
// it copies it.
type limitedText struct {
	front int    // bytes of data before the payload
	data  []byte // zero bytes, then the payload
}

func (t *limitedText) Write(p []byte) (int, error) {
	payload := len(t.data) - t.front + len(bytes.TrimSuffix(p, []byte("\n")))
	if err := checkSize(uint64(payload)); err != nil {
		return 0, err
	}
	t.data = append(t.data, p...)
	return len(p), nil
}

// decodeFrame decodes the payload of a frame into dest. The result may refer to parts of
// data, so data must not be changed any more.
func decodeFrame(data []byte, dest interface{}) error {
	switch d := dest.(type) {
	case *Request:
		// json.Unmarshal writes into a hook or args that are there already.
		if d.ResponseHook == nil && d.Args == nil && decodeRequest(data, d) {
			return nil
		}
	case *Response:
		if decodeResponse(data, d) {
			return nil
		}
	}
	err := json.Unmarshal(data, dest)
	if req, ok := dest.(*Request); ok && isHookString(err) {
		err = unmarshalHookString(data, req)
	}
	if err != nil {
		return fmt.Errorf("decode frame of %d bytes: %w", len(data), err)
	}
	return nil
}

// readFrame reads one frame and returns its payload. The memory it allocates is bounded
// by what has arrived, not by what the header announces.
func readFrame(r io.Reader) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, fmt.Errorf("header: %w", asUnexpectedEOF(err))
	}
	announced := binary.BigEndian.Uint32(header[:])
	if err := checkSize(uint64(announced)); err != nil {
		return nil, err
	}
	return readPayload(r, int(announced))
}

// readPayload reads a payload of that size. The buffers it allocates are at most twice as
// large as what has arrived; a buffer from the pool may be twice as large again.
func readPayload(r io.Reader, size int) ([]byte, error) {
	// Each step doubles the buffer, and the last step makes it exactly as large as the
	// payload. All copies together are about as long as the payload.
	var data []byte
	for step := bits.Len(uint((size - 1) / firstChunk)); step >= 0; step-- {
		have := len(data)
		var grown []byte
		if step == 0 {
			grown = make([]byte, size)
		} else {
			grown = takeBuffer(size >> step)
		}
		copy(grown, data)
		releaseBuffer(data)
		data = grown
		if n, err := io.ReadFull(r, data[have:]); err != nil {
			return nil, fmt.Errorf("payload, after %d of %d bytes: %w", have+n, size, asUnexpectedEOF(err))
		}
	}
	return data, nil
}

// buffers pools byte slices (*[]byte) of over 4 KiB and less than 4 MiB. The index is the
// bufferClass: those in 12 have less than 8 KiB.
var buffers [22]sync.Pool

// bufferClass returns the index in buffers for that size.
func bufferClass(size int) int { return bits.Len(uint(size)) - 1 }

// takeBuffer returns a buffer of that size. Its contents are undefined.
func takeBuffer(size int) []byte {
	if class := bufferClass(size); size > firstChunk && class < len(buffers) {
		if b, ok := buffers[class].Get().(*[]byte); ok && cap(*b) >= size {
			return (*b)[:size]
		}
	}
	return make([]byte, size)
}

// releaseBuffer makes a buffer available to takeBuffer. The caller must not use it any
// more.
func releaseBuffer(b []byte) {
	if class := bufferClass(cap(b)); cap(b) > firstChunk && class < len(buffers) {
		put := b // a copy escapes to the heap, and only here
		buffers[class].Put(&put)
	}
}

// parseFrame returns the payload of the frame at the start of data.
func parseFrame(data []byte) ([]byte, error) {
	if whole, err := frameLength(data); err == nil && whole > 0 && whole <= len(data) {
		return data[headerSize:whole:whole], nil
	}
	return readFrame(bytes.NewReader(data)) // fails, and its error says why
}

// frameLength returns the length of the frame at the start of data, with its header; zero
// if data is too short to tell.
func frameLength(data []byte) (int, error) {
	if len(data) < headerSize {
		return 0, nil
	}
	size := binary.BigEndian.Uint32(data)
	return headerSize + int(size), checkSize(uint64(size))
}

func checkSize(size uint64) error {
	if size > maxPayload {
		return fmt.Errorf("payload of %d bytes is over the limit of %d: %w", size, maxPayload, syscall.EMSGSIZE)
	}
	return nil
}

// growStack makes the goroutine's stack large enough for decoding. The stack of a handler
// is often new, and would otherwise grow in several steps, each of which copies more.
// That saves a fifth of the time of a small exchange.
//
//go:noinline
func growStack() {
	var room [5 << 10]byte
	touch(&room)
}

//go:noinline
func touch(*[5 << 10]byte) {}
