package acomm

import (
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

// roomy is a frame with room for its header.
func roomy(size int, fill byte) []byte {
	return append(make([]byte, sessionHeaderSize), bytes.Repeat([]byte{fill}, size)...)
}

// written takes all chunks, as if a connection had taken them.
func written(w *frameWriter) (chunks [][]byte) {
	for c, ok := w.next(); ok; c, ok = w.next() {
		chunks = append(chunks, bytes.Clone(c.data))
		w.wrote(c, len(c.data), nil)
	}
	return chunks
}

func TestFrameWriter_SmallFramesGoOutTogetherInOrder(t *testing.T) {
	var w frameWriter
	var want []byte
	for n := range uint32(10) {
		frame := roomy(int(n), 'a'+byte(n))
		w.add(frameMessage, n, frame)
		want = append(want, frame...) // with its header by now
	}
	w.addCopy(frameStop, 7, nil)
	want = append(want, 0xb0, 0, 0, 0, 0, 0, 0, 7)
	require.EqualValues(t, len(want), w.unwritten())
	require.Equal(t, [][]byte{want}, written(&w))
	require.Zero(t, w.unwritten())
}

func TestFrameWriter_LargeFramesAreNotCopied(t *testing.T) {
	var w frameWriter
	small, large := roomy(10, 's'), roomy(maxCopied, 'l')
	w.add(frameMessage, 1, small)
	w.add(frameMessage, 2, large)
	w.add(frameMessage, 3, small)
	for i := range 3 {
		c, ok := w.next()
		require.True(t, ok)
		require.Equal(t, i == 1, &c.data[0] == &large[0], "chunk %d", i)
		w.wrote(c, len(c.data), nil)
	}
	_, ok := w.next()
	require.False(t, ok)
	before := bytes.Clone(large)
	w.addCopy(frameAnswer, 1, []byte("answer"))
	require.Equal(t, before, large, "nor is its memory used again")
}

func TestFrameWriter_AChunkOfSmallFramesHasALimit(t *testing.T) {
	var w frameWriter
	for range 100 {
		w.add(frameMessage, 1, roomy(maxCopied-sessionHeaderSize, 'x'))
	}
	chunks := written(&w)
	require.Len(t, chunks, 100*maxCopied/maxCoalesce+1)
	for _, c := range chunks {
		require.LessOrEqual(t, len(c), maxCoalesce+maxCopied)
	}
}

// What was added while a chunk is written is another chunk, so nobody changes what is
// being written.
func TestFrameWriter_WhatIsBeingWrittenIsNotChanged(t *testing.T) {
	var w frameWriter
	w.addCopy(frameAnswer, 1, []byte("first"))
	c, _ := w.next()
	before := string(c.data)
	w.addCopy(frameAnswer, 2, []byte("second"))
	require.Equal(t, before, string(c.data))
	w.wrote(c, len(c.data), nil)
	w.addCopy(frameAnswer, 3, []byte("third")) // not into memory that is used again
	require.Len(t, written(&w), 1)
}

func TestFrameWriter_CountsWhatAFailedWriteHasWritten(t *testing.T) {
	var w frameWriter
	w.addCopy(frameAnswer, 1, []byte("answer"))
	w.add(frameMessage, 1, roomy(maxCopied, 'x'))
	require.EqualValues(t, sessionHeaderSize+6, w.answers)
	c, _ := w.next()
	w.wrote(c, len(c.data), nil)
	require.Zero(t, w.answers)
	end := w.queued
	c, _ = w.next()
	failed := errors.New("failed")
	w.wrote(c, 100, failed)
	require.Equal(t, failed, w.err)
	require.EqualValues(t, sessionHeaderSize+6+100, w.written)
	require.Less(t, w.written, end, "that frame is not wholly written")
	w.addCopy(frameStop, 1, nil)
	_, ok := w.next()
	require.False(t, ok, "nothing goes out after it")
	require.Equal(t, end, w.queued)
	require.Zero(t, w.unwritten())
}
