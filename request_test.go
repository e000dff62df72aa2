package acomm_test

import (
	"encoding/json"
	"io/fs"
	"math"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/pborman/uuid"
	"github.com/stretchr/testify/require"
)

func TestNewRequest_KeepsWhatItIsGiven(t *testing.T) {
	var handled []string
	req, err := acomm.NewRequest("file.hash", "http://127.0.0.1:8080/hook?k=v", map[string]any{"n": 3},
		func(*acomm.Request, *acomm.Response) { handled = append(handled, "success") },
		func(*acomm.Request, *acomm.Response) { handled = append(handled, "error") })
	require.NoError(t, err)
	require.NotNil(t, uuid.Parse(req.ID), "id %q", req.ID)
	version, ok := uuid.Parse(req.ID).Version()
	require.True(t, ok)
	require.EqualValues(t, 4, version)
	require.Equal(t, "file.hash", req.Task)
	require.Equal(t, "http://127.0.0.1:8080/hook?k=v", req.ResponseHook.String())
	require.JSONEq(t, `{"n":3}`, string(*req.Args))
	require.NoError(t, req.Validate())

	req.HandleResponse(&acomm.Response{})
	req.HandleResponse(&acomm.Response{Error: fs.ErrNotExist})
	require.Equal(t, []string{"success", "error"}, handled)

	other, err := acomm.NewRequest("file.hash", "unix:///a", nil, nil, nil)
	require.NoError(t, err)
	require.NotEqual(t, req.ID, other.ID)
}

func TestNewRequest_NilArgsAreJSONNull(t *testing.T) {
	req, err := acomm.NewRequest("ping", "unix:///a", nil, nil, nil)
	require.NoError(t, err)
	require.Equal(t, "null", string(*req.Args))
	args := struct{ N int }{7}
	require.NoError(t, req.UnmarshalArgs(&args))
	require.Equal(t, 7, args.N, "null changes nothing")
}

func TestNewRequest_RefusesBadInput(t *testing.T) {
	for name, hook := range map[string]string{"empty": "", "no URL": "asdf", "control": "unix:///a\x00b", "escape": "http://u:secret@h/%zz"} {
		_, err := acomm.NewRequest("t", hook, nil, nil, nil)
		require.ErrorIs(t, err, fs.ErrInvalid, name)
		require.NotContains(t, err.Error(), "secret", name)
	}
	_, err := acomm.NewRequest("", "unix:///a", nil, nil, nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = acomm.NewRequest("t", "unix:///a", math.Inf(1), nil, nil)
	var unsupported *json.UnsupportedValueError
	require.ErrorAs(t, err, &unsupported)
}

func TestRequest_ValidateNamesWhatIsMissing(t *testing.T) {
	hook := unixURL("/a")
	for want, req := range map[string]*acomm.Request{
		"is nil":           nil,
		"has no id":        {Task: "t", ResponseHook: hook},
		"no task":          {ID: "1", ResponseHook: hook},
		"no response hook": {ID: "1", Task: "t"},
	} {
		err := req.Validate()
		require.ErrorIs(t, err, fs.ErrInvalid, want)
		require.ErrorContains(t, err, want)
	}
	require.NoError(t, (&acomm.Request{ID: "1", Task: "t", ResponseHook: hook}).Validate())
}

func TestRequest_UnmarshalArgsReadsThemOrSaysWhyNot(t *testing.T) {
	req, err := acomm.NewRequest("t", "unix:///a", []int{1, 2}, nil, nil)
	require.NoError(t, err)
	var args []int
	require.NoError(t, req.UnmarshalArgs(&args))
	require.Equal(t, []int{1, 2}, args)

	var wrong string
	var mismatch *json.UnmarshalTypeError
	require.ErrorAs(t, req.UnmarshalArgs(&wrong), &mismatch)
	require.ErrorIs(t, req.UnmarshalArgs(nil), fs.ErrInvalid)
	require.ErrorIs(t, req.UnmarshalArgs(args), fs.ErrInvalid)
	require.ErrorIs(t, req.UnmarshalArgs((*int)(nil)), fs.ErrInvalid)
	require.ErrorIs(t, (*acomm.Request)(nil).UnmarshalArgs(&args), fs.ErrInvalid)

	// Hazard: args that were null on the wire are nil after decoding.
	var decoded acomm.Request
	require.NoError(t, json.Unmarshal([]byte(`{"id":"1","args":null}`), &decoded))
	require.NoError(t, decoded.UnmarshalArgs(&args))
	require.Nil(t, args)
}
