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

	// readBufferSize holds every frame but a long answer.
	readBufferSize = maxMessage + 4<<10
)

// frameKind is what a frame of a session is. Its highest bit is set, so that its
// header can't be one of a plain frame.
type frameKind uint32

const (
	frameMessage frameKind = 8 + iota // a request or response, with a number
	frameCancel                       // the sender has given up on the message of that number
	frameAnswer                       // what was written in answer to the message of that number
	frameStop                         // no message after that number is served (HTTP/2: GOAWAY)
	frameTarget                       // which listener the sender's messages are for
)

// isSize reports whether a frame of the kind may have so many bytes after its header.
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

// sessionFrame is a frame that has arrived.
type sessionFrame struct {
	kind   frameKind
	number uint32
	data   []byte
	owned  bool // data is the frame's own; else it is good until the next read
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

// frameReader cuts the bytes that arrive into frames. It has a buffer only while
// something is in it.
type frameReader struct {
	buf        *[readBufferSize]byte
	start, end int
	long       sessionFrame // an answer too long for buf, as far as it has arrived; kind 0: none
	missing    int          // bytes of it
}

// space returns where the next bytes have to be put.
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

// longSpace returns room for more of the long answer: at most as much again as has
// arrived of it.
func (r *frameReader) longSpace() []byte {
	have := len(r.long.data)
	if have == cap(r.long.data) {
		grown := make([]byte, have, have+min(have, r.missing))
		copy(grown, r.long.data)
		r.long.data = grown
	}
	return r.long.data[have:cap(r.long.data)]
}

// added notes that so many bytes were put into space.
func (r *frameReader) added(n int) {
	if r.missing > 0 {
		r.long.data = r.long.data[:len(r.long.data)+n]
		r.missing -= n
		return
	}
	r.end += n
}

// skip takes so many bytes off the front, if they are there.
func (r *frameReader) skip(n int) ([]byte, bool) {
	if r.end-r.start < n {
		return nil, false
	}
	r.start += n
	return r.buf[r.start-n : r.start], true
}

// next returns the next frame that has arrived as a whole, if there is one.
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

// release gives the buffer back if nothing is in it.
func (r *frameReader) release() {
	if r.buf != nil && r.start == r.end {
		readBuffers.Put(r.buf)
		r.buf, r.start, r.end = nil, 0, 0
	}
}
