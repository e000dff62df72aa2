package acomm_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestSendConnData_WritesHeaderAndJSON(t *testing.T) {
	for want, payload := range map[string]any{
		`{"a":"\u003c"}`: map[string]string{"a": "<"},
		`[1,2]`:          json.RawMessage(" [1,\n2] "),
		`"x"`:            "x",
		`{"error":"x","id":"","result":null,"stream_url":null}`: acomm.Response{Error: errors.New("x")}, // by value, too
	} {
		a, b := connPair(t)
		require.NoError(t, acomm.SendConnData(a, payload))
		require.NoError(t, a.Close())
		got, err := io.ReadAll(b)
		require.NoError(t, err)
		require.Equal(t, string(plainFrame(want)), string(got))
	}
}

// oneWrite is a connection that counts its writes.
type oneWrite struct {
	net.Conn
	writes int
}

func (c *oneWrite) Write(p []byte) (int, error) {
	c.writes++
	return len(p), nil
}

// Hazard: a peer of 2016 reads a frame with a single read.
func TestSendConnData_WritesOnce(t *testing.T) {
	conn := &oneWrite{}
	require.NoError(t, acomm.SendConnData(conn, strings.Repeat("x", 1<<20)))
	require.Equal(t, 1, conn.writes)
}

func TestSendConnData_RefusesBadInput(t *testing.T) {
	a, b := connPair(t)
	for _, payload := range []any{nil, (*acomm.Request)(nil), (*acomm.Response)(nil)} {
		require.ErrorIs(t, acomm.SendConnData(a, payload), fs.ErrInvalid)
	}
	require.ErrorIs(t, acomm.SendConnData(nil, 1), fs.ErrInvalid)
	var unsupported *json.UnsupportedTypeError
	require.ErrorAs(t, acomm.SendConnData(a, make(chan int)), &unsupported)
	require.ErrorIs(t, acomm.SendConnData(a, make([]byte, acomm.MaxPayload/4*3)), syscall.EMSGSIZE, "base64 and two quotes")
	require.NoError(t, a.Close())
	got, err := io.ReadAll(b)
	require.NoError(t, err)
	require.Empty(t, got, "nothing is written of what is refused")

	require.ErrorIs(t, acomm.SendConnData(a, 1), net.ErrClosed)
	c, d := connPair(t)
	require.NoError(t, d.Close())
	require.ErrorIs(t, acomm.SendConnData(c, 1), io.ErrUnexpectedEOF)
}

func TestConnData_KeepsTheCallersDeadline(t *testing.T) {
	a, _ := connPair(t)
	require.NoError(t, a.SetDeadline(time.Now().Add(20*time.Millisecond)))
	require.ErrorIs(t, acomm.SendConnData(a, make([]byte, 1<<20)), os.ErrDeadlineExceeded)
	require.ErrorIs(t, acomm.UnmarshalConnData(a, new(any)), os.ErrDeadlineExceeded)
}

// Hazard: a frame over about 200 KiB, or arriving in pieces, was misread.
func TestUnmarshalConnData_FrameInPiecesIsWhole(t *testing.T) {
	want := strings.Repeat("x", 300<<10)
	data := plainFrame(`"` + want + `"`)
	for _, piece := range []int{1, 2, 3, 4, 5, 4095, 4096, 65536, len(data)} {
		a, b := connPair(t)
		small := data
		if piece < 4 { // a write a byte: a short frame is enough
			want, small = "xyz", plainFrame(`"xyz"`)
		} else {
			want = strings.Repeat("x", 300<<10)
		}
		written := async(func() {
			for rest := small; len(rest) > 0; {
				n, err := a.Write(rest[:min(piece, len(rest))])
				if err != nil {
					return
				}
				rest = rest[n:]
			}
		})
		var got string
		require.NoError(t, acomm.UnmarshalConnData(b, &got))
		require.Equal(t, want, got)
		within(t, written, "the writer")
	}
}

func TestUnmarshalConnData_FrameThatIsCutOffIsAnError(t *testing.T) {
	data := plainFrame(`{"id":"1"}`)
	for cut := range data {
		a, b := connPair(t)
		_, err := a.Write(data[:cut])
		require.NoError(t, err)
		require.NoError(t, a.Close())
		err = acomm.UnmarshalConnData(b, new(any))
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "cut at %d", cut)
	}
}

func TestUnmarshalConnData_LimitIs64MiB(t *testing.T) {
	for announced, want := range map[uint32]error{
		acomm.MaxPayload:     io.ErrUnexpectedEOF, // begun to read
		acomm.MaxPayload + 1: syscall.EMSGSIZE,
		1<<32 - 1:            syscall.EMSGSIZE,
	} {
		a, b := connPair(t)
		_, err := a.Write(binary.BigEndian.AppendUint32(nil, announced))
		require.NoError(t, err)
		require.NoError(t, a.Close())
		require.ErrorIs(t, acomm.UnmarshalConnData(b, new(any)), want)
	}

	a, b := connPair(t)
	large := make([]byte, 6<<20) // 8 MiB of base64
	sent := async(func() { require.NoError(t, acomm.SendConnData(a, large)) })
	var got []byte
	require.NoError(t, acomm.UnmarshalConnData(b, &got))
	require.Equal(t, len(large), len(got))
	within(t, sent, "the sender")
}

// Hazard: a header of 4 bytes made the reader allocate 4 GiB.
func TestUnmarshalConnData_MemoryFollowsWhatArrives(t *testing.T) {
	for _, announced := range []uint32{1<<32 - 1, acomm.MaxPayload} {
		a, b := connPair(t)
		_, err := a.Write(append(binary.BigEndian.AppendUint32(nil, announced), `"half`...))
		require.NoError(t, err)
		require.NoError(t, a.Close())
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		require.Error(t, acomm.UnmarshalConnData(b, new(any)))
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), "announced %d", announced)
	}
}

func TestUnmarshalConnData_RefusesBadInput(t *testing.T) {
	require.ErrorIs(t, acomm.UnmarshalConnData(nil, new(any)), fs.ErrInvalid)
	a, b := connPair(t)
	_, err := a.Write(plainFrame(`"still there"`))
	require.NoError(t, err)
	for _, dest := range []any{nil, "x", (*string)(nil)} {
		require.ErrorIs(t, acomm.UnmarshalConnData(b, dest), fs.ErrInvalid)
	}
	var got string
	require.NoError(t, acomm.UnmarshalConnData(b, &got), "nothing is read for a destination that is refused")

	for _, payload := range []string{"", "{", "[1,]", "{} {}", "\x00"} {
		_, err := a.Write(plainFrame(payload))
		require.NoError(t, err)
		var syntax *json.SyntaxError
		require.ErrorAs(t, acomm.UnmarshalConnData(b, new(any)), &syntax, payload)
	}
	_, err = a.Write(plainFrame(`"text"`))
	require.NoError(t, err)
	var mismatch *json.UnmarshalTypeError
	require.ErrorAs(t, acomm.UnmarshalConnData(b, new(int)), &mismatch)
}

// Hazard: a null frame panicked.
func TestUnmarshalConnData_NullIsAnEmptyResponse(t *testing.T) {
	a, b := connPair(t)
	_, err := a.Write(append(plainFrame("null"), plainFrame("null")...))
	require.NoError(t, err)
	resp := acomm.Response{ID: "old", Error: fs.ErrExist}
	require.NoError(t, acomm.UnmarshalConnData(b, &resp))
	require.Empty(t, resp)
	req := &acomm.Request{}
	require.NoError(t, acomm.UnmarshalConnData(b, req))
	require.ErrorIs(t, req.Validate(), fs.ErrInvalid)
}

// oneFrame is a connection that keeps what was written last, and from which that
// is read over and over.
type oneFrame struct {
	net.Conn
	frame []byte
	rest  []byte
}

func (c *oneFrame) Write(p []byte) (int, error) {
	c.frame = p
	return len(p), nil
}

func (c *oneFrame) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		c.rest = c.frame
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// benchValues are JSON values of about a size: one long string, and records of
// short ones and numbers.
func benchValues(size int) map[string]json.RawMessage {
	record := `{"name":"eth0","path":"/sys/class/net/eth0","mtu":1500,"up":true}`
	return map[string]json.RawMessage{
		"text":    json.RawMessage(`{"data":"` + strings.Repeat("x", size-11) + `"}`),
		"records": json.RawMessage(`[` + strings.Repeat(record+",", size/len(record)-1) + record + `]`),
	}
}

func benchPayloads(b *testing.B, run func(b *testing.B, payload any, size int)) {
	hook := unixURL("/run/acomm/response/requester.sock")
	id := "2f0c8e9e-6f1c-4f3c-9f5a-0d9c5f3c7a11"
	b.Run("ack", func(b *testing.B) { run(b, &acomm.Response{}, 52) })
	for _, size := range []int{128, 16 << 10, 1 << 20} {
		for _, kind := range []string{"text", "records"} {
			raw := benchValues(size)[kind]
			b.Run(fmt.Sprintf("request/%s/%d", kind, size), func(b *testing.B) {
				run(b, &acomm.Request{ID: id, Task: "file.hash", ResponseHook: hook, Args: &raw}, size)
			})
			b.Run(fmt.Sprintf("response/%s/%d", kind, size), func(b *testing.B) {
				run(b, &acomm.Response{ID: id, Result: &raw}, size)
			})
		}
	}
}

func BenchmarkSendConnData(b *testing.B) {
	benchPayloads(b, func(b *testing.B, payload any, size int) {
		conn := &oneFrame{}
		b.ReportAllocs()
		b.SetBytes(int64(size))
		for b.Loop() {
			if err := acomm.SendConnData(conn, payload); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkUnmarshalConnData(b *testing.B) {
	benchPayloads(b, func(b *testing.B, payload any, size int) {
		conn := &oneFrame{}
		if err := acomm.SendConnData(conn, payload); err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		b.SetBytes(int64(size))
		for b.Loop() {
			var err error
			switch payload.(type) {
			case *acomm.Request:
				err = acomm.UnmarshalConnData(conn, &acomm.Request{})
			case *acomm.Response:
				err = acomm.UnmarshalConnData(conn, &acomm.Response{})
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
