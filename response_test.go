package acomm_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"net/url"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestNewResponse_KeepsWhatItIsGiven(t *testing.T) {
	req := &acomm.Request{ID: "1"}
	stream := unixURL("/s")
	resp, err := acomm.NewResponse(req, map[string]int{"n": 1}, stream, nil)
	require.NoError(t, err)
	require.Equal(t, "1", resp.ID)
	require.Equal(t, stream, resp.StreamURL)
	require.NoError(t, resp.Error)
	require.JSONEq(t, `{"n":1}`, string(*resp.Result))

	resp, err = acomm.NewResponse(req, nil, nil, fs.ErrExist)
	require.NoError(t, err)
	require.Nil(t, resp.Result)
	require.Equal(t, fs.ErrExist, resp.Error)
}

// Hazard: a result that can't be marshalled was sent as success.
func TestNewResponse_RefusesBadInput(t *testing.T) {
	req := &acomm.Request{ID: "1"}
	_, err := acomm.NewResponse(req, math.NaN(), nil, nil)
	var unsupported *json.UnsupportedValueError
	require.ErrorAs(t, err, &unsupported)
	_, err = acomm.NewResponse(req, 1, nil, fs.ErrExist)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = acomm.NewResponse(nil, 1, nil, nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
}

func TestResponse_JSONHasTheFormOf2016(t *testing.T) {
	raw := json.RawMessage(`{"a": "<&>"}`)
	for want, resp := range map[string]*acomm.Response{
		`{"error":"","id":"","result":null,"stream_url":null}`:                                {},
		`{"error":"","id":"1","result":{"a":"\u003c\u0026\u003e"},"stream_url":null}`:         {ID: "1", Result: &raw},
		`{"error":"boom \u003c\u0026\u003e","id":"1","result":null,"stream_url":null}`:        {ID: "1", Error: errors.New("boom <&>")},
		`{"error":"unspecified error","id":"1","result":null,"stream_url":null}`:              {ID: "1", Error: errors.New("")},
		`{"error":"` + strings.Repeat("x", 99) + `","id":"","result":null,"stream_url":null}`: {Error: errors.New(strings.Repeat("x", 99))},
	} {
		data, err := json.Marshal(resp)
		require.NoError(t, err)
		require.Equal(t, want, string(data))
	}
	data, err := (*acomm.Response)(nil).MarshalJSON()
	require.NoError(t, err)
	require.Equal(t, "null", string(data))
	broken := json.RawMessage(`{`)
	_, err = (&acomm.Response{Result: &broken}).MarshalJSON()
	require.Error(t, err)
}

// Hazard: a reused Response kept its old error.
func TestResponse_DecodingResetsWhatItHeld(t *testing.T) {
	raw := json.RawMessage("1")
	full := acomm.Response{ID: "old", Result: &raw, StreamURL: &url.URL{}, Error: fs.ErrExist}
	for _, data := range []string{`{}`, `null`, `{"error":null,"id":null,"result":null,"stream_url":null}`, `{"error":"","stream_url":""}`} {
		resp := full
		require.NoError(t, json.Unmarshal([]byte(data), &resp), data)
		require.Equal(t, acomm.Response{}, resp, data)
	}
	resp := full
	require.Error(t, json.Unmarshal([]byte(`{"id":7}`), &resp))
	require.Equal(t, acomm.Response{}, resp)
}

func TestResponse_DecodesWhatPeersSend(t *testing.T) {
	var resp acomm.Response
	require.NoError(t, json.Unmarshal([]byte(`{"id":"1","error":"boom","result":{"a":[1]},"added":"later"}`), &resp))
	require.Equal(t, "1", resp.ID)
	require.EqualError(t, resp.Error, "boom")
	require.JSONEq(t, `{"a":[1]}`, string(*resp.Result))

	for _, stream := range []string{`{"Scheme":"unix","Path":"/a b%?#"}`, `"unix:///a%20b%25%3F%23"`} {
		require.NoError(t, json.Unmarshal([]byte(`{"stream_url":`+stream+`}`), &resp), stream)
		require.Equal(t, unixURL("/a b%?#"), &url.URL{Scheme: resp.StreamURL.Scheme, Path: resp.StreamURL.Path})
	}
	var nested struct {
		Value   acomm.Response
		Pointer *acomm.Response
	}
	nested.Value.ID, nested.Pointer = "old", &acomm.Response{}
	require.NoError(t, json.Unmarshal([]byte(`{"Value":null,"Pointer":null}`), &nested))
	require.Empty(t, nested.Value)
	require.Nil(t, nested.Pointer)
}

func TestResponse_DecodingRefusesBadInput(t *testing.T) {
	for _, data := range []string{
		``, `{`, `[]`, `"x"`, `7`, `{} {}`, `{"error":{"code":1}}`, `{"stream_url":7}`, `{"stream_url":"://secret"}`,
		`{"stream_url":{"Path":7}}`, `{"id":["x"]}`, "{\"id\":\"a\nb\"}",
	} {
		var resp acomm.Response
		err := json.Unmarshal([]byte(data), &resp)
		require.Error(t, err, data)
		require.NotContains(t, err.Error(), "secret")
	}
	require.ErrorIs(t, (*acomm.Response)(nil).UnmarshalJSON([]byte("{}")), fs.ErrInvalid)
}

func TestResponse_UnmarshalResultReadsItOrSaysWhyNot(t *testing.T) {
	raw := json.RawMessage(`{"n":1}`)
	var result struct{ N int }
	require.NoError(t, (&acomm.Response{Result: &raw}).UnmarshalResult(&result))
	require.Equal(t, 1, result.N)
	require.NoError(t, (&acomm.Response{}).UnmarshalResult(&result), "no result is null")
	require.Equal(t, 1, result.N)
	require.ErrorIs(t, (&acomm.Response{Result: &raw}).UnmarshalResult(nil), fs.ErrInvalid)
	require.ErrorIs(t, (*acomm.Response)(nil).UnmarshalResult(&result), fs.ErrInvalid)
	var mismatch *json.UnmarshalTypeError
	require.ErrorAs(t, (&acomm.Response{Result: &raw}).UnmarshalResult(new(int)), &mismatch)
}
