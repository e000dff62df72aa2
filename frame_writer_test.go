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

func TestFrameWriter_CopiesOfAnySizeAreTheCallers(t *testing.T) {
	for _, size := range []int{0, 1, maxCopied - sessionHeaderSize, maxCopied - sessionHeaderSize + 1, maxMessage} {
		var w frameWriter
		data := bytes.Repeat([]byte{'d'}, size)
		w.addBytes([]byte("greeting"))
		w.addCopy(frameAnswer, 3, data)
		want := append([]byte("greeting"), sessionFrameOf(frameAnswer, 3, data)...)
		require.EqualValues(t, len(want), w.unwritten())
		require.EqualValues(t, len(want)-len("greeting"), w.answers)
		clear(data)
		require.Equal(t, want, bytes.Join(written(&w), nil), "%d bytes", size)
		require.Zero(t, w.answers)
		require.EqualValues(t, len(want), w.written)
	}
}

// A failed write may be told of while others are queued: those count as not written, and
// frames that come later are left as they are.
func TestFrameWriter_TakesNothingAfterAFailure(t *testing.T) {
	var w frameWriter
	w.add(frameMessage, 1, roomy(10, 'a'))
	w.addCopy(frameAnswer, 1, []byte("answer"))
	c, _ := w.next()
	w.add(frameMessage, 2, roomy(maxCopied, 'b'))
	first := errors.New("first")
	w.wrote(c, 3, first)
	w.wrote(chunk{}, 0, errors.New("second"))
	require.Equal(t, first, w.err)
	queued := w.queued
	for _, size := range []int{0, 10, maxCopied} {
		frame := roomy(size, 'c')
		w.add(frameMessage, 3, frame)
		require.Equal(t, roomy(size, 'c'), frame, "not even the header is written into it")
		w.addCopy(frameAnswer, 1, frame)
	}
	require.Empty(t, written(&w))
	require.Empty(t, w.queue, "the memory of frames is let go")
	require.Equal(t, queued, w.queued)
	require.EqualValues(t, 3, w.written)
	require.Zero(t, w.answers)
	require.Zero(t, w.unwritten())
}

func TestFrameWriter_KeepsTheMemoryOfTwoChunks(t *testing.T) {
	var w frameWriter
	var chunks []chunk
	for range 4 {
		w.addCopy(frameStop, 1, nil)
		c, _ := w.next()
		chunks = append(chunks, c)
	}
	for _, c := range chunks {
		w.wrote(c, len(c.data), nil)
	}
	require.Len(t, w.spare, 2)
	w.add(frameMessage, 1, roomy(maxCopied, 'l'))
	c, _ := w.next()
	w.wrote(c, len(c.data), nil)
	require.Len(t, w.spare, 2, "none of it is a caller's")
	w.addCopy(frameStop, 2, nil)
	require.Len(t, w.spare, 1)
	require.Equal(t, [][]byte{{0xb0, 0, 0, 0, 0, 0, 0, 2}}, written(&w))
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
