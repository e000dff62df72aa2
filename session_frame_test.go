package acomm

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func sessionFrameOf(kind frameKind, number uint32, data []byte) []byte {
	frame := append(make([]byte, sessionHeaderSize), data...)
	putSessionHeader(frame, kind, len(data), number)
	return frame
}

// feedReader gives a reader the data in pieces of a size, as far as there is room.
func feedReader(r *frameReader, data []byte, piece int, each func(sessionFrame)) error {
	for len(data) > 0 {
		n := copy(r.space(), data[:min(piece, len(data))])
		r.added(n)
		data = data[n:]
		for {
			f, ok, err := r.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			each(f)
		}
		r.release()
	}
	return nil
}

func TestFrameReader_FramesArriveInAnyPieces(t *testing.T) {
	var data []byte
	var want []string
	for n, size := range []int{0, 1, 7, 8, 9, 300, maxMessage, 5, readBufferSize, 3 * readBufferSize, 2, maxMessage} {
		kind := frameMessage
		if size > maxMessage {
			kind = frameAnswer
		}
		payload := bytes.Repeat([]byte{'a' + byte(n)}, size)
		data = append(data, sessionFrameOf(kind, uint32(n), payload)...)
		want = append(want, fmt.Sprint(kind, n, size))
	}
	for _, piece := range []int{1, 2, 3, 7, 8, 9, 1000, maxMessage, len(data)} {
		var r frameReader
		var got []string
		require.NoError(t, feedReader(&r, data, piece, func(f sessionFrame) {
			got = append(got, fmt.Sprint(f.kind, f.number, len(f.data)))
			require.Equal(t, len(f.data), bytes.Count(f.data, []byte{'a' + byte(f.number)}))
		}))
		require.Equal(t, want, got, "in pieces of %d", piece)
		require.Nil(t, r.buf, "no buffer while nothing is in it")
	}
}

func TestFrameReader_LengthsAreHeldToTheirKind(t *testing.T) {
	for kind := range frameKind(16) {
		most := map[frameKind]int{frameMessage: maxMessage, frameAnswer: headerSize + maxPayload, frameTarget: targetSize}[kind]
		for _, size := range []int{0, 1, targetSize - 1, targetSize, targetSize + 1, maxMessage, maxMessage + 1, headerSize + maxPayload, headerSize + maxPayload + 1, 1<<28 - 1} {
			ok := kind >= frameMessage && kind <= frameTarget && size <= most && (kind != frameTarget || size == targetSize)
			header := make([]byte, sessionHeaderSize)
			putSessionHeader(header, kind, size, 1)
			var r frameReader
			err := feedReader(&r, header, len(header), func(sessionFrame) {})
			require.Equal(t, ok, err == nil, "kind %d, %d bytes", kind, size)
		}
	}
}

// Memory follows what has arrived of a long answer, not what it announces.
func TestFrameReader_MemoryFollowsWhatArrives(t *testing.T) {
	var r frameReader
	header := make([]byte, sessionHeaderSize)
	putSessionHeader(header, frameAnswer, headerSize+maxPayload, 1)
	require.NoError(t, feedReader(&r, header, len(header), func(sessionFrame) {}))
	arrived := 0
	for range 2000 {
		space := r.space()
		require.LessOrEqual(t, len(space), max(readBufferSize, arrived))
		require.LessOrEqual(t, cap(r.long.data), 2*max(readBufferSize, arrived))
		n := min(len(space), 4<<10)
		r.added(n)
		arrived += n
		_, ok, err := r.next()
		require.NoError(t, err)
		require.False(t, ok)
	}
}

// A long answer is the caller's own memory. What comes after it in the same read is not
// taken for a part of it, nor the other way round.
func TestFrameReader_LongAnswersAreOwned(t *testing.T) {
	long := bytes.Repeat([]byte{'l'}, 2*readBufferSize+1)
	data := slices.Concat(
		sessionFrameOf(frameMessage, 1, []byte("before")), sessionFrameOf(frameAnswer, 2, long),
		sessionFrameOf(frameAnswer, 3, []byte("after")), sessionFrameOf(frameAnswer, 4, bytes.Repeat([]byte{'x'}, len(long))),
	)
	for _, piece := range []int{1, sessionHeaderSize, sessionHeaderSize + 6 + sessionHeaderSize, 4 << 10, len(data)} {
		var r frameReader
		var numbers []uint32
		var owned []byte
		require.NoError(t, feedReader(&r, data, piece, func(f sessionFrame) {
			numbers = append(numbers, f.number)
			require.Equal(t, len(f.data) > maxMessage, f.owned, "frame %d", f.number)
			if f.number == 2 {
				owned = f.data
			}
		}))
		require.Equal(t, []uint32{1, 2, 3, 4}, numbers)
		require.Equal(t, long, owned, "in pieces of %d", piece)
		require.LessOrEqual(t, cap(owned), 2*len(owned))
	}
}

// An answer that fits in the buffer is good until the next read, whatever its length.
func TestFrameReader_AnswersAtTheEndOfTheBufferAreWhole(t *testing.T) {
	for size := maxMessage - 2; size <= readBufferSize+2; size++ {
		data := append(sessionFrameOf(frameAnswer, 1, bytes.Repeat([]byte{'a'}, size)), sessionFrameOf(frameStop, 2, nil)...)
		for _, piece := range []int{readBufferSize - 1, readBufferSize, len(data) - sessionHeaderSize - 1} {
			var r frameReader
			var got []string
			require.NoError(t, feedReader(&r, data, piece, func(f sessionFrame) {
				require.Equal(t, len(f.data), bytes.Count(f.data, []byte{'a'}))
				got = append(got, fmt.Sprint(f.kind, f.number, len(f.data)))
			}))
			require.Equal(t, []string{fmt.Sprint(frameAnswer, 1, size), fmt.Sprint(frameStop, 2, 0)}, got)
		}
	}
}

// What is there before a header that no frame has is read, and nothing after it.
func TestFrameReader_StopsAtWhatIsNoFrame(t *testing.T) {
	for _, bad := range []string{"\x00\x00\x00\x00\x00\x00\x00\x00", "\x90\x00\x00\x01\x00\x00\x00\x01", "\x80\x01\x00\x01\x00\x00\x00\x01", greeting} {
		data := slices.Concat(sessionFrameOf(frameMessage, 1, []byte("{}")), []byte(bad), sessionFrameOf(frameMessage, 2, nil))
		for _, piece := range []int{1, 7, 8, 11, len(data)} {
			var r frameReader
			read := 0
			require.ErrorIs(t, feedReader(&r, data, piece, func(sessionFrame) { read++ }), errBadFrame)
			require.Equal(t, 1, read, "%q in pieces of %d", bad, piece)
			_, ok, err := r.next()
			require.False(t, ok)
			require.ErrorIs(t, err, errBadFrame)
		}
	}
}
