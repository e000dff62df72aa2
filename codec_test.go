package acomm

import (
	"encoding/binary"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Hazard: without a sign of it, every message takes the long way, or a member
// that url.URL gains is not written.
func TestCodec_OwnFormTakesTheShortWay(t *testing.T) {
	require.True(t, urlKnown, "url.URL has new members: see appendURL")
	files, err := filepath.Glob("testdata/wire/*.bin")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		data, err := os.ReadFile(file)
		require.NoError(t, err)
		data = data[headerSize:]
		var again []byte
		known, ok := strings.Contains(file, "response-error"), false // its text is escaped
		if strings.Contains(file, "request") {
			var req Request
			known = decodeRequest(data, &req)
			require.NoError(t, json.Unmarshal(data, &req))
			m := newMessage(0, nil, nil)
			ok = m.addRequest(&req)
			again = m.text
		} else {
			var resp Response
			known = decodeResponse(data, &resp) || known
			require.NoError(t, json.Unmarshal(data, &resp))
			m := newMessage(0, nil, nil)
			ok = m.addResponse(&resp)
			again = m.text
		}
		require.True(t, known, file)
		require.True(t, ok, file)
		require.Equal(t, string(data), string(again))
	}

	for _, accepted := range []string{
		`{"error":"","id":"","result":null,"stream_url":null}`,
		`{"error":"","id":"1","result":null,"stream_url":null}`,
		`{"error":"","id":"1","result":"` + strings.Repeat("x", 1<<20) + `","stream_url":null}`,
	} {
		require.True(t, decodeResponse([]byte(accepted), &Response{}))
	}
}

// Hazard: whoever appends to the args writes over what follows them.
func TestCodec_ValuesEndWhereTheyEnd(t *testing.T) {
	data := []byte(`{"error":"","id":"1","result":[1],"stream_url":null}`)
	var resp Response
	require.NoError(t, decodeFrame(data, &resp))
	_ = append(*resp.Result, "xxx"...)
	require.Equal(t, `{"error":"","id":"1","result":[1],"stream_url":null}`, string(data))
}

// As encoding/json does.
func TestDecodeFrame_WritesIntoWhatIsThere(t *testing.T) {
	data := []byte(`{"id":"1","task":"t","responsehook":{"Scheme":"unix","Opaque":"","User":null,"Host":"","Path":"/a",` +
		`"Fragment":"","RawQuery":"","RawPath":"","RawFragment":"","ForceQuery":false,"OmitHost":false},"args":[1]}`)
	hook, args := &url.URL{}, &json.RawMessage{}
	req := &Request{ResponseHook: hook}
	require.NoError(t, decodeFrame(data, req))
	require.Same(t, hook, req.ResponseHook)
	req = &Request{Args: args}
	require.NoError(t, decodeFrame(data, req))
	require.Same(t, args, req.Args)

	handled := 0
	req = &Request{SuccessHandler: func(*Request, *Response) { handled++ }}
	require.NoError(t, decodeFrame(data, req))
	req.HandleResponse(&Response{})
	require.Equal(t, 1, handled, "the handlers are not of the wire")
}

func TestEncodeFrame_LeavesRoom(t *testing.T) {
	raw := json.RawMessage(`[1]`)
	loose := json.RawMessage(`[ 1 ]`)
	for _, payload := range []any{
		&Request{ID: "1", Args: &raw}, &Request{ID: "1", Args: &loose},
		&Response{ID: "1", Result: &raw}, Response{ID: "1", Result: &loose}, "x",
	} {
		want, err := encodeFrame(0, payload)
		require.NoError(t, err)
		got, err := encodeFrame(7, payload)
		require.NoError(t, err)
		require.Equal(t, string(make([]byte, 7))+string(want.text), string(got.text))
	}
}

// Hazard: an answer that is no acceptance is taken for one.
func TestSession_OnlyAnAcceptanceIsOne(t *testing.T) {
	const text = `{"error":"","id":"1","result":null,"stream_url":null}`
	frame := func(size int, text string) string {
		return string(binary.BigEndian.AppendUint32(nil, uint32(size))) + text
	}
	for _, answer := range []struct {
		data     string
		accepted bool
	}{
		{frame(len(text), text), true},
		{"", false},
		{frame(0, ""), false},
		{frame(len(text)-1, text), false},
		{frame(len(text)+1, text), false},
		{frame(len(text)+1, text+"x"), false},
		{frame(len(text)+1, text+" "), false},
		{frame(len(text)-1, text[:len(text)-1]), false},
		{frame(len(text), strings.Replace(text, `"1"`, `"<"`, 1)), false},
		{frame(len(text)+1, strings.Replace(text, `""`, `"x"`, 1)), false},
		{frame(len(text)-3, strings.Replace(text, "null", "1", 1)), false},
	} {
		require.Equal(t, answer.accepted, isAcceptedFrame([]byte(answer.data)), answer.data)
	}
}

// Hazard: a small text that its caller keeps holds on to the memory of a large one.
func TestResponse_MarshalledTextHasMemoryOfItsOwn(t *testing.T) {
	raw := json.RawMessage(`"` + strings.Repeat("x", 60_000) + `"`)
	for range 20 { // a pool may lose what it is given
		m, err := encodeFrame(0, &Response{Result: &raw})
		require.NoError(t, err)
		m.release()
		data, err := (&Response{ID: "1"}).MarshalJSON()
		require.NoError(t, err)
		require.Less(t, cap(data), 1000)
	}
}

// Hazard: memory is taken for what was announced.
func TestTakeBuffer_IsLessThanTwiceAsLarge(t *testing.T) {
	for i, used := range []int{100, 5000, 8192, 700_000, 1 << 20, 1<<22 - 1, 1 << 22, 1 << 26} {
		for _, size := range []int{0, 1, 90, 4096, 4097, 4999, 5000, 8191, 524_289, 700_001, 1 << 20, 1 << 22, 1<<25 + 1} {
			released := make([]byte, used)
			released[0] = byte(1 + i)
			releaseBuffer(released)
			b := takeBuffer(size)
			require.Len(t, b, size)
			if used <= 4096 || used >= 4<<20 {
				require.False(t, size > 0 && b[0] == released[0], "%d bytes are kept", used)
			}
			require.LessOrEqual(t, cap(b), 2*size)
		}
	}
}

// Hazard: what is over the limit was copied first.
func TestLimitedText_TakesWhatFitsAFrame(t *testing.T) {
	text := make([]byte, maxPayload+2)
	text[maxPayload] = '\n' // the encoder's
	for size, want := range map[int]error{maxPayload: nil, maxPayload + 1: nil, maxPayload + 2: syscall.EMSGSIZE} {
		limited := &limitedText{front: 4, data: make([]byte, 4)}
		n, err := limited.Write(text[:size])
		require.ErrorIs(t, err, want)
		if want == nil {
			require.Equal(t, size, n)
			require.Len(t, limited.data, 4+size)
			_, err := limited.Write([]byte("x\n"))
			require.ErrorIs(t, err, syscall.EMSGSIZE)
			continue
		}
		require.Len(t, limited.data, 4)
	}
}

func TestDecodeFrame_AResponseHookMayBeAString(t *testing.T) {
	plain := &url.URL{Scheme: "unix", Path: "/run/a b.sock"}
	for _, test := range []struct {
		name, data string
		want       Request // with the hook above, if it has an id
	}{
		{"first", `{"responsehook":"unix:///run/a%20b.sock","id":"1","task":"t","args":[1]}`, Request{ID: "1", Task: "t"}},
		{"last, in other letters", `{"args":[1],"task":"t","id":"1","ResponseHook":"unix:///run/a%20b.sock"}`, Request{ID: "1", Task: "t"}},
		{"twice", `{"id":"1","task":"t","responsehook":{"Scheme":"http"},"args":[1],"responsehook":"unix:///run/a%20b.sock"}`, Request{ID: "1", Task: "t"}},
		{"empty is none", `{"responsehook":"","args":[1]}`, Request{}},
	} {
		for _, held := range []*url.URL{nil, {Scheme: "http", Fragment: "old"}} {
			got := Request{ResponseHook: held}
			require.NoError(t, decodeFrame([]byte(test.data), &got), test.name)
			require.Equal(t, "[1]", string(*got.Args), test.name)
			got.Args = nil
			if test.want.ID != "" {
				test.want.ResponseHook = plain
			}
			require.Equal(t, test.want, got, test.name)
		}
	}
	for _, test := range []struct{ name, data, want string }{
		{"no URL", `{"id":"1","task":"t","responsehook":"unix:///run/%zz?secret"}`, "can't be parsed"},
		{"a number", `{"id":"1","task":"t","responsehook":4}`, "cannot unmarshal number"},
		{"another member", `{"id":1,"task":"t","responsehook":"unix:///a"}`, "cannot unmarshal number"},
		{"another member, behind it", `{"responsehook":"unix:///a","task":"t","id":1}`, "cannot unmarshal number"},
	} {
		err := decodeFrame([]byte(test.data), &Request{})
		require.ErrorContains(t, err, test.want, test.name)
		require.NotContains(t, err.Error(), "secret", test.name)
	}
}
