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

// Response answers a [Request]: with a result or with an error. Make one with
// [NewResponse]. Do not change its fields while it is being sent.
//
// On the wire, the error is its text; an empty text, null and absent mean no error. For
// the result and the stream URL, absent and null decode as nil. The stream URL is written
// as an object with the fields of [net/url.URL]; a plain string is read as well.
type Response struct {
	ID        string           `json:"id"`         // that of the request
	Result    *json.RawMessage `json:"result"`     // nil if there is an error
	StreamURL *url.URL         `json:"stream_url"` // where Stream reads more data; nil: none
	Error     error            `json:"error"`      // nil: success
}

// errUnspecified is sent for an error without a text: the empty string would arrive as
// success.
const errUnspecified = "unspecified error"

// NewResponse creates the response to a request, with a result or with an error. The
// result is anything that marshals to JSON; nil is no result. The streamURL says where
// more data can be read with [Stream]; nil if there is none.
//
// A nil request, and a result together with an error, give an error that matches
// [io/fs.ErrInvalid]. A result that can't be marshalled gives encoding/json's error.
func NewResponse(req *Request, result interface{}, streamURL *url.URL, err error) (*Response, error) {
	if req == nil {
		return nil, fmt.Errorf("new response: request is nil: %w", fs.ErrInvalid)
	}
	resp := &Response{ID: req.ID, StreamURL: streamURL, Error: err}
	if result == nil {
		return resp, nil
	}
	if err != nil {
		return nil, fmt.Errorf("new response to %s: it has both a result and an error: %w", req.ID, fs.ErrInvalid)
	}
	data, err := json.Marshal(result)
	if err != nil {
		return nil, fmt.Errorf("new response to %s: marshal result: %w", req.ID, err)
	}
	resp.Result = (*json.RawMessage)(&data)
	return resp, nil
}

// UnmarshalResult decodes the response's result into dest, as [encoding/json.Unmarshal]
// does. An absent result counts as JSON null: it leaves a struct as it is and sets a
// pointer, map or slice to nil.
//
// If the response is nil, or dest is not a non-nil pointer, the error matches
// [io/fs.ErrInvalid]. A result that does not fit dest gives encoding/json's error.
func (r *Response) UnmarshalResult(dest interface{}) error {
	if r == nil {
		return fmt.Errorf("unmarshal result: response is nil: %w", fs.ErrInvalid)
	}
	return unmarshalRaw("result of response", r.ID, r.Result, dest)
}

// MarshalJSON encodes the response as a JSON object with the members error, id, result
// and stream_url, in this order. An Error with an empty text is sent as "unspecified
// error", since the empty string means success. A nil Response becomes null.
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

// checkText refuses an id or a stream URL that JSON would change, or that leads
// elsewhere.
func (r *Response) checkText() error {
	if !utf8.ValidString(r.ID) {
		return fmt.Errorf("response id %q is not UTF-8: %w", r.ID, fs.ErrInvalid)
	}
	if err := checkURL(r.StreamURL); err != nil {
		return fmt.Errorf("response %s: stream URL: %w", r.ID, err)
	}
	return nil
}

// errorText returns the text that is sent for the error; empty if there is none.
func (r *Response) errorText() string {
	if r.Error == nil {
		return ""
	}
	if text := r.Error.Error(); text != "" {
		return text
	}
	return errUnspecified
}

// UnmarshalJSON decodes a response from JSON. It resets the Response first, also if it
// then returns an error. JSON null gives an empty Response. A nil receiver gives an error
// that matches [io/fs.ErrInvalid].
func (r *Response) UnmarshalJSON(data []byte) error {
	if r == nil {
		return fmt.Errorf("unmarshal response: receiver is nil: %w", fs.ErrInvalid)
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
