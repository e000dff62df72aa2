package acomm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"unicode/utf8"
)

// Response is a response data structure for asynchronous requests. The ID is
// that of the Request it answers. Result is nil if Error is present and vice
// versa. StreamURL is where additional data can be read with [Stream]; nil if
// there is none.
//
// On the wire no error is the empty string; null and absence mean the same.
// Null and absence mean nil for the result and the stream URL. The stream URL is
// an object with the fields of [net/url.URL]; a plain string is read as well.
type Response struct {
	ID        string           `json:"id"`
	Result    *json.RawMessage `json:"result"`
	StreamURL *url.URL         `json:"stream_url"`
	Error     error            `json:"error"`
}

// errUnspecified is what an error without a text travels as: the empty string
// would arrive as success.
const errUnspecified = "unspecified error"

// NewResponse creates a new Response to a Request: with a result, which is
// anything that marshals to JSON, or with err. The streamURL may be nil.
//
// A nil request, and a result together with an error, give an error that
// matches [io/fs.ErrInvalid]; a result that can't be marshalled gives
// encoding/json's error.
func NewResponse(req *Request, result interface{}, streamURL *url.URL, err error) (*Response, error) {
	if req == nil {
		return nil, fmt.Errorf("new response: request is nil: %w", fs.ErrInvalid)
	}
	resp := &Response{ID: req.ID, StreamURL: streamURL, Error: err}
	if result == nil {
		return resp, nil
	}
	if err != nil {
		return nil, fmt.Errorf("new response to %s: result and error together: %w", req.ID, fs.ErrInvalid)
	}
	data, err := json.Marshal(result)
	if err != nil {
		return nil, fmt.Errorf("new response to %s: marshal result: %w", req.ID, err)
	}
	resp.Result = (*json.RawMessage)(&data)
	return resp, nil
}

// UnmarshalResult unmarshals the response result into the destination object,
// as [encoding/json.Unmarshal] does. An absent result is JSON null: it leaves a
// struct as it is and sets a pointer, map or slice to nil. A destination that
// is not a non-nil pointer gives an error that matches [io/fs.ErrInvalid].
func (r *Response) UnmarshalResult(dest interface{}) error {
	if r == nil {
		return fmt.Errorf("unmarshal result: response is nil: %w", fs.ErrInvalid)
	}
	return unmarshalRaw("result of response", r.ID, r.Result, dest)
}

// MarshalJSON marshals a Response into JSON, with the members error, id, result
// and stream_url, in this order. An Error whose text is empty travels as
// "unspecified error", since the empty string means success.
func (r *Response) MarshalJSON() ([]byte, error) {
	if r == nil {
		return []byte("null"), nil
	}
	if m := newMessage(0, r.StreamURL, r.Result); m.addResponse(r) {
		defer m.release()
		return bytes.Clone(m.text), nil
	}
	return json.Marshal(struct {
		Error     string           `json:"error"`
		ID        string           `json:"id"`
		Result    *json.RawMessage `json:"result"`
		StreamURL *url.URL         `json:"stream_url"`
	}{r.errorText(), r.ID, r.Result, r.StreamURL})
}

// checkText refuses what would not arrive, or would lead elsewhere.
func (r *Response) checkText() error {
	if !utf8.ValidString(r.ID) {
		return fmt.Errorf("response id %q is not UTF-8: %w", r.ID, fs.ErrInvalid)
	}
	if err := checkURL(r.StreamURL); err != nil {
		return fmt.Errorf("response %s: stream URL: %w", r.ID, err)
	}
	return nil
}

// errorText is what the error travels as.
func (r *Response) errorText() string {
	if r.Error == nil {
		return ""
	}
	if text := r.Error.Error(); text != "" {
		return text
	}
	return errUnspecified
}

// UnmarshalJSON unmarshals JSON data into a Response. Whatever the Response
// held before is gone, also when an error is returned; JSON null gives an empty
// Response.
func (r *Response) UnmarshalJSON(data []byte) error {
	if r == nil {
		return fmt.Errorf("unmarshal response: target is nil: %w", fs.ErrInvalid)
	}
	*r = Response{}
	var wire struct {
		Error     string           `json:"error"`
		ID        string           `json:"id"`
		Result    *json.RawMessage `json:"result"`
		StreamURL wireURL          `json:"stream_url"`
	}
	if err := json.Unmarshal(data, &wire); err != nil {
		return fmt.Errorf("unmarshal response: %w", err)
	}
	r.ID, r.Result, r.StreamURL = wire.ID, wire.Result, wire.StreamURL.url
	if wire.Error != "" {
		r.Error = errors.New(wire.Error)
	}
	return nil
}
