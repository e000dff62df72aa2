package acomm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/pborman/uuid"
)

// Request asks a service to carry out a task and to send the [Response] to a hook: a unix
// socket, an http(s) URL, or a URL with any scheme that is registered with
// [net/http.DefaultTransport]. Make one with [NewRequest]. Do not change its fields while
// it is tracked or being sent.
//
// On the wire the hook is an object with the fields of [net/url.URL], without user name
// and password. [UnmarshalConnData] also reads it from a plain string. For the hook and the args, absent and null both decode as nil.
type Request struct {
	ID             string           `json:"id"`           // unique among tracked requests
	Task           string           `json:"task"`         // what the provider is to do
	ResponseHook   *url.URL         `json:"responsehook"` // where the response is to be sent
	Args           *json.RawMessage `json:"args"`         // nil: null
	SuccessHandler ResponseHandler  `json:"-"`            // for a response without an error; nil: none
	ErrorHandler   ResponseHandler  `json:"-"`            // for a response with an error; nil: none
}

// ResponseHandler handles the response to a request. It gets the request it was set on,
// and the response. A time-out is a response with an error. A handler may call any method
// of the tracker except Stop, and a panic in it ends the process.
type ResponseHandler func(*Request, *Response)

// NewRequest creates a request with a random id (a UUID, version 4).
//
// The responseHook is an absolute URL, such as the text of [Tracker.URL]. The args are
// anything that marshals to JSON; nil becomes null. The handler sh runs for a response
// without an error, eh for one with an error or after a time-out. Either may be nil: then
// nothing runs.
//
// A hook that does not parse, and a request that [Request.Validate] refuses, give an
// error that matches [io/fs.ErrInvalid]. Args that can't be marshalled give
// encoding/json's error.
func NewRequest(task, responseHook string, args interface{}, sh ResponseHandler, eh ResponseHandler) (*Request, error) {
	hook, err := url.ParseRequestURI(responseHook)
	if err != nil {
		// The parser's error quotes the URL, which may hold a password.
		var parse *url.Error
		if errors.As(err, &parse) {
			err = parse.Err
		}
		return nil, fmt.Errorf("new request: response hook: %w: %w", fs.ErrInvalid, err)
	}
	data, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("new request: marshal args: %w", err)
	}
	req := &Request{
		ID:             uuid.New(),
		Task:           task,
		ResponseHook:   hook,
		Args:           (*json.RawMessage)(&data),
		SuccessHandler: sh,
		ErrorHandler:   eh,
	}
	if err := req.Validate(); err != nil {
		return nil, err
	}
	return req, nil
}

// Validate checks that the request has an id, a task and a response hook, and that all
// three are UTF-8: JSON would change anything else. A hook with the scheme unix must have
// an absolute path and no host, as in unix:///run/a.sock. If a check fails, the error
// matches [io/fs.ErrInvalid].
func (req *Request) Validate() error {
	switch {
	case req == nil:
		return fmt.Errorf("request is nil: %w", fs.ErrInvalid)
	case req.ID == "":
		return fmt.Errorf("request has no id: %w", fs.ErrInvalid)
	case req.Task == "":
		return fmt.Errorf("request %s has no task: %w", req.ID, fs.ErrInvalid)
	case req.ResponseHook == nil:
		return fmt.Errorf("request %s has no response hook: %w", req.ID, fs.ErrInvalid)
	}
	return req.checkText()
}

// checkText refuses an id, task or hook that JSON would change, and a hook that leads
// elsewhere. A missing one is not an error here.
func (req *Request) checkText() error {
	switch {
	case !utf8.ValidString(req.ID):
		return fmt.Errorf("request id %q is not UTF-8: %w", req.ID, fs.ErrInvalid)
	case !utf8.ValidString(req.Task):
		return fmt.Errorf("request %s: task %q is not UTF-8: %w", req.ID, req.Task, fs.ErrInvalid)
	}
	if err := checkURL(req.ResponseHook); err != nil {
		return fmt.Errorf("request %s: response hook: %w", req.ID, err)
	}
	return nil
}

// checkURL refuses a URL that JSON would change, and a unix URL that is not just an
// absolute path. Nil is valid.
func checkURL(u *url.URL) error {
	if u == nil {
		return nil
	}
	for _, part := range []string{u.Scheme, u.Opaque, u.Host, u.Path, u.RawPath, u.RawQuery, u.Fragment, u.RawFragment} {
		if !utf8.ValidString(part) {
			return fmt.Errorf("URL %q is not UTF-8: %w", u.Redacted(), fs.ErrInvalid)
		}
	}
	if u.Scheme == "unix" && !strings.HasPrefix(u.Path, "/") {
		return fmt.Errorf("URL %q has no absolute path; write it as unix:///run/a.sock: %w", u.Redacted(), fs.ErrInvalid)
	}
	return checkUnixURL(u)
}

// checkUnixURL refuses a unix URL with more than a path. In unix://run/a.sock, "run" is a
// host; unix:run/a.sock has no path at all.
func checkUnixURL(u *url.URL) error {
	if u.Scheme == "unix" && (u.Host != "" || u.Opaque != "") {
		return fmt.Errorf("URL %q has more than a path; write it as unix:///run/a.sock, with three slashes: %w",
			u.Redacted(), fs.ErrInvalid)
	}
	return nil
}

// UnmarshalArgs decodes the request's args into dest, as [encoding/json.Unmarshal] does.
// Absent args count as JSON null: they leave a struct as it is and set a pointer, map or
// slice to nil.
//
// If the request is nil, or dest is not a non-nil pointer, the error matches
// [io/fs.ErrInvalid]. Args that do not fit dest give encoding/json's error.
func (req *Request) UnmarshalArgs(dest interface{}) error {
	if req == nil {
		return fmt.Errorf("unmarshal args: request is nil: %w", fs.ErrInvalid)
	}
	return unmarshalRaw("args of request", req.ID, req.Args, dest)
}

// HandleResponse runs a handler of the request in the caller's goroutine and returns when
// the handler does: ErrorHandler if the response has an error, otherwise SuccessHandler.
// If that handler, the request or the response is nil, it does nothing.
func (req *Request) HandleResponse(resp *Response) {
	if req == nil || resp == nil {
		return
	}
	handler := req.SuccessHandler
	if resp.Error != nil {
		handler = req.ErrorHandler
	}
	if handler != nil {
		handler(req, resp)
	}
}

// Respond sends the response to the request's hook. It blocks until the response is
// acknowledged, for a minute at most, and returns the errors of [Send].
//
// A nil request or response, and a hook that is nil or that [Request.Validate] refuses,
// give an error that matches [io/fs.ErrInvalid].
func (req *Request) Respond(resp *Response) error {
	if req == nil || resp == nil {
		return fmt.Errorf("respond: request or response is nil: %w", fs.ErrInvalid)
	}
	if req.ResponseHook == nil {
		return fmt.Errorf("respond: request %s has no response hook: %w", req.ID, fs.ErrInvalid)
	}
	if err := checkURL(req.ResponseHook); err != nil {
		return fmt.Errorf("respond to request %s: response hook: %w", req.ID, err)
	}
	return Send(req.ResponseHook, resp)
}

// unmarshalRaw decodes raw, nil standing for null, and names what it decodes in
// its errors.
func unmarshalRaw(what, id string, raw *json.RawMessage, dest interface{}) error {
	if err := checkDest(dest); err != nil {
		return fmt.Errorf("unmarshal %s %s: %w", what, id, err)
	}
	if raw == nil {
		null := json.RawMessage("null")
		raw = &null
	}
	if err := json.Unmarshal(*raw, dest); err != nil {
		return fmt.Errorf("unmarshal %s %s: %w", what, id, err)
	}
	return nil
}

// checkDest refuses a destination that nothing can be decoded into.
func checkDest(dest interface{}) error {
	v := reflect.ValueOf(dest)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return fmt.Errorf("destination %T is not a non-nil pointer: %w", dest, fs.ErrInvalid)
	}
	return nil
}
