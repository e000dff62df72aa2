package acomm

import (
	"encoding/binary"
	"errors"
	"sync"
)

// The frames of a session. PROTOCOL.md, section 11, has the rules.

const (
	sessionHeaderSize = 8        // bytes: kind and length, number
	maxMessage        = 64 << 10 // bytes of JSON in a message; a longer one gets a connection of its own
	targetSize        = 8 + 8    // bytes: device and inode of a listener's socket file

	// readBufferSize is room for any frame but a long answer.
	readBufferSize = maxMessage + 4<<10
)

// frameKind tells the kinds of a session's frames apart. The highest of its 4 bits is
// set, which it never is in the header of a plain frame.
type frameKind uint32

const (
	frameMessage frameKind = 8 + iota // a request or response, with a number
	frameCancel                       // the sender of that message no longer waits for the answer (HTTP/2: RST_STREAM)
	frameAnswer                       // the answer to the message with that number
	frameStop                         // no message with a higher number is served (HTTP/2: GOAWAY)
	frameTarget                       // the messages that follow are for this listener
)

// isSize reports whether a frame of that kind may have that length.
func (k frameKind) isSize(size int) bool {
	switch k {
	case frameMessage:
		return size <= maxMessage
	case frameAnswer:
		return size <= headerSize+maxPayload
	case frameCancel, frameStop:
		return size == 0
	case frameTarget:
		return size == targetSize
	}
	return false
}

var errBadFrame = errors.New("not a frame of a session")

// sessionFrame is a frame that was received.
type sessionFrame struct {
	kind   frameKind
	number uint32
	data   []byte
	owned  bool // data belongs to the frame; false: it is valid until the next read
}

func putSessionHeader(header []byte, kind frameKind, size int, number uint32) {
	binary.BigEndian.PutUint32(header, uint32(kind)<<28|uint32(size))
	binary.BigEndian.PutUint32(header[4:], number)
}

func parseSessionHeader(header []byte) (kind frameKind, size int, number uint32) {
	word := binary.BigEndian.Uint32(header)
	return frameKind(word >> 28), int(word & (1<<28 - 1)), binary.BigEndian.Uint32(header[4:])
}

var readBuffers = sync.Pool{New: func() any { return new([readBufferSize]byte) }}

// frameReader cuts the received bytes into frames. It takes a buffer from readBuffers,
// and returns it when it is empty: an idle session has none.
type frameReader struct {
	buf        *[readBufferSize]byte // nil: it is empty
	start, end int                   // of the bytes in buf
	long       sessionFrame          // the part that has arrived of an answer too long for buf; kind 0: none
	missing    int                   // bytes of long that have not arrived
}

// space returns the memory that the next bytes are to be read into.
func (r *frameReader) space() []byte {
	if r.missing > 0 {
		return r.longSpace()
	}
	if r.buf == nil {
		r.buf = readBuffers.Get().(*[readBufferSize]byte)
	}
	if r.start > 0 {
		r.end = copy(r.buf[:], r.buf[r.start:r.end])
		r.start = 0
	}
	return r.buf[r.end:]
}

// longSpace returns memory for more of a long answer: at most as many bytes as have
// arrived of it, so that memory follows what arrives and not what was announced.
func (r *frameReader) longSpace() []byte {
	have := len(r.long.data)
	if have == cap(r.long.data) {
		grown := make([]byte, have, have+min(have, r.missing))
		copy(grown, r.long.data)
		r.long.data = grown
	}
	return r.long.data[have:cap(r.long.data)]
}

// added records that n bytes were read into space.
func (r *frameReader) added(n int) {
	if r.missing > 0 {
		r.long.data = r.long.data[:len(r.long.data)+n]
		r.missing -= n
		return
	}
	r.end += n
}

// skip takes n bytes off the front, if that many have arrived.
func (r *frameReader) skip(n int) ([]byte, bool) {
	if r.end-r.start < n {
		return nil, false
	}
	r.start += n
	return r.buf[r.start-n : r.start], true
}

// next returns the next frame, if it has arrived as a whole.
func (r *frameReader) next() (f sessionFrame, ok bool, err error) {
	if r.long.kind != 0 {
		if r.missing > 0 {
			return sessionFrame{}, false, nil
		}
		f, r.long = r.long, sessionFrame{}
		return f, true, nil
	}
	have := r.end - r.start
	if have < sessionHeaderSize {
		return sessionFrame{}, false, nil
	}
	kind, size, number := parseSessionHeader(r.buf[r.start:r.end])
	if !kind.isSize(size) {
		return sessionFrame{}, false, errBadFrame
	}
	f = sessionFrame{kind: kind, number: number}
	if have >= sessionHeaderSize+size {
		data, _ := r.skip(sessionHeaderSize + size)
		f.data = data[sessionHeaderSize:]
		return f, true, nil
	}
	if size > maxMessage {
		data, _ := r.skip(have)
		f.data, f.owned = append(make([]byte, 0, 2*have), data[sessionHeaderSize:]...), true
		r.long, r.missing = f, size-len(f.data)
		r.long.data = r.long.data[:len(f.data):min(cap(f.data), size)]
	}
	return sessionFrame{}, false, nil
}

// release returns the buffer to readBuffers if it is empty.
func (r *frameReader) release() {
	if r.buf != nil && r.start == r.end {
		readBuffers.Put(r.buf)
		r.buf, r.start, r.end = nil, 0, 0
	}
}
