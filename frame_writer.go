package acomm

import "slices"

const (
	maxCopied   = 4 << 10  // bytes; frames up to this size are copied, to be coalesced
	maxCoalesce = 64 << 10 // bytes; a chunk of this size takes no further frame
)

// frameWriter queues the frames of many goroutines for one connection. It coalesces small
// frames that are queued at about the same moment: they go out in one write. It has
// neither a lock nor a connection. Its owner guards it, writes the chunks that next
// returns, and reports the results to wrote.
type frameWriter struct {
	queue   []chunk  // chunks that next has not returned yet
	spare   [][]byte // memory for copied chunks, two at most
	queued  uint64   // bytes ever added
	written uint64   // bytes that the connection has taken
	answers uint64   // bytes of answers that it has not taken
	err     error    // of the first failed write; nothing is written after it
}

// chunk holds the bytes of one write.
type chunk struct {
	data    []byte
	copied  bool   // data holds copies of small frames; false: it is the memory of one frame
	answers uint64 // bytes of answers in data
}

// add queues a frame that begins with room for its header. A frame over maxCopied bytes
// is not copied: its memory must not be changed until it is written or the writer has
// failed.
func (w *frameWriter) add(kind frameKind, number uint32, frame []byte) {
	if w.err != nil {
		return
	}
	putSessionHeader(frame, kind, len(frame)-sessionHeaderSize, number)
	if len(frame) > maxCopied {
		w.queue = append(w.queue, chunk{data: frame})
		w.count(kind, len(frame))
		return
	}
	c := w.copies()
	c.data = append(c.data, frame...)
	w.count(kind, len(frame))
}

// addCopy queues a frame with a copy of data, which may be empty.
func (w *frameWriter) addCopy(kind frameKind, number uint32, data []byte) {
	size := sessionHeaderSize + len(data)
	if size > maxCopied {
		w.add(kind, number, append(make([]byte, sessionHeaderSize, size), data...))
		return
	}
	if w.err != nil {
		return
	}
	var header [sessionHeaderSize]byte
	putSessionHeader(header[:], kind, len(data), number)
	c := w.copies()
	c.data = append(append(c.data, header[:]...), data...)
	w.count(kind, size)
}

// addBytes queues a copy of bytes that are not a frame: the greeting.
func (w *frameWriter) addBytes(data []byte) {
	c := w.copies()
	c.data = append(c.data, data...)
	w.queued += uint64(len(data))
}

// copies returns the chunk that the next small frame is copied to.
func (w *frameWriter) copies() *chunk {
	last := len(w.queue) - 1
	if last >= 0 && w.queue[last].copied && len(w.queue[last].data) < maxCoalesce {
		return &w.queue[last]
	}
	c := chunk{copied: true}
	if n := len(w.spare); n > 0 {
		c.data, w.spare = w.spare[n-1], w.spare[:n-1]
	}
	w.queue = append(w.queue, c)
	return &w.queue[last+1]
}

// count adds the size of a frame that was added to the last chunk.
func (w *frameWriter) count(kind frameKind, size int) {
	w.queued += uint64(size)
	if kind == frameAnswer {
		w.queue[len(w.queue)-1].answers += uint64(size)
		w.answers += uint64(size)
	}
}

// next returns the chunk to be written next. It reports false if there is none, or the
// writer has failed.
func (w *frameWriter) next() (chunk, bool) {
	if w.err != nil || len(w.queue) == 0 {
		w.queue = slices.Delete(w.queue, 0, len(w.queue))
		return chunk{}, false
	}
	c := w.queue[0]
	w.queue = slices.Delete(w.queue, 0, 1)
	return c, true
}

// wrote records that n bytes of a chunk were written: all of them, or err says why not.
func (w *frameWriter) wrote(c chunk, n int, err error) {
	w.written += uint64(n)
	w.answers -= c.answers
	if c.copied && len(w.spare) < 2 {
		w.spare = append(w.spare, c.data[:0])
	}
	if w.err == nil {
		w.err = err
	}
}

// unwritten returns the number of bytes that are still to be written: none after a failed
// write.
func (w *frameWriter) unwritten() uint64 {
	if w.err != nil {
		return 0
	}
	return w.queued - w.written
}
