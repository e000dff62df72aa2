package acomm

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"unicode/utf8"
)

// The envelope of a message is all of it but the args or the result. It is
// written by hand, in the form encoding/json gives it, and read by hand in that
// form. What is in any other form is left to encoding/json as a whole, so that
// nothing but the time it takes depends on what is in this file.

// urlKnown is false if url.URL has members that came after Go 1.27.
var urlKnown = reflect.TypeFor[url.URL]().NumField() == 11

// inert bytes stand for themselves in a JSON string, whoever writes it.
var inert = func() (set [256]bool) {
	for c := ' '; c < utf8.RuneSelf; c++ {
		set[c] = !strings.ContainsRune(`"\<>&`, c)
	}
	return set
}()

const maxPooled = 128 << 10 // bytes of a message whose memory is used again as it is

// message is a message that is about to be sent.
type message struct{ text []byte }

// newMessage makes room for a message with the URL and the raw value, and with
// texts of usual length, behind so many bytes.
func newMessage(front int, u *url.URL, raw *json.RawMessage) *message {
	size := front + 128
	if u != nil {
		size += 256
	}
	if raw != nil {
		size += len(*raw)
	}
	m := messages.Get().(*message)
	if cap(m.text) < size {
		m.text = takeBuffer(size)
	}
	m.text = m.text[:front]
	clear(m.text)
	return m
}

var messages = sync.Pool{New: func() any { return new(message) }}

// release keeps the memory of a message, which nobody looks at any more, for
// another one.
func (m *message) release() {
	if cap(m.text) > maxPooled {
		releaseBuffer(m.text)
		m.text = nil
	}
	messages.Put(m)
}

// addRequest adds the request as json.Marshal writes it, or reports false if that
// is not certain.
func (m *message) addRequest(req *Request) bool {
	if !isPlainURL(req.ResponseHook) || req.Args != nil && !isMarshalled(*req.Args) {
		return false
	}
	m.text = appendText(append(m.text, `{"id":`...), req.ID)
	m.text = appendText(append(m.text, `,"task":`...), req.Task)
	m.text = appendURL(append(m.text, `,"responsehook":`...), req.ResponseHook)
	m.addRaw(`,"args":`, req.Args)
	m.text = append(m.text, '}')
	return true
}

// addResponse is addRequest for a response.
func (m *message) addResponse(r *Response) bool {
	if !isPlainURL(r.StreamURL) || r.Result != nil && !isMarshalled(*r.Result) {
		return false
	}
	m.text = appendText(append(m.text, `{"error":`...), r.errorText())
	m.text = appendText(append(m.text, `,"id":`...), r.ID)
	m.addRaw(`,"result":`, r.Result)
	m.text = appendURL(append(m.text, `,"stream_url":`...), r.StreamURL)
	m.text = append(m.text, '}')
	return true
}

// addRaw adds a value behind its name.
func (m *message) addRaw(name string, raw *json.RawMessage) {
	m.text = append(m.text, name...)
	if raw == nil {
		m.text = append(m.text, "null"...)
		return
	}
	m.text = append(m.text, *raw...)
}

func appendText(b []byte, text string) []byte {
	for i := range len(text) {
		if !inert[text[i]] {
			quoted, _ := json.Marshal(text) // which never refuses a string
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, text...)
	return append(b, '"')
}

// isPlainURL reports whether appendURL writes the URL.
func isPlainURL(u *url.URL) bool {
	return u == nil || u.User == nil && !u.ForceQuery && !u.OmitHost && urlKnown
}

func appendURL(b []byte, u *url.URL) []byte {
	if u == nil {
		return append(b, "null"...)
	}
	b = appendText(append(b, `{"Scheme":`...), u.Scheme)
	b = appendText(append(b, `,"Opaque":`...), u.Opaque)
	b = appendText(append(b, `,"User":null,"Host":`...), u.Host)
	b = appendText(append(b, `,"Path":`...), u.Path)
	b = appendText(append(b, `,"Fragment":`...), u.Fragment)
	b = appendText(append(b, `,"RawQuery":`...), u.RawQuery)
	b = appendText(append(b, `,"RawPath":`...), u.RawPath)
	b = appendText(append(b, `,"RawFragment":`...), u.RawFragment)
	return append(b, `,"ForceQuery":false,"OmitHost":false}`...)
}

// decodeRequest sets the wire members of the request from data, parts of which
// it keeps. It reports false, and leaves the request alone, if data is not what
// addRequest writes.
func decodeRequest(data []byte, req *Request) bool {
	e := envelope{rest: data}
	id := e.text(`{"id":`)
	task := e.text(`,"task":`)
	hook := e.url(`,"responsehook":`)
	e.skip(`,"args":`)
	args := e.raw(len(e.rest) - len(`}`))
	e.skip(`}`)
	if e.failed {
		return false
	}
	req.ID, req.Task, req.ResponseHook, req.Args = id, task, hook, args
	return true
}

// decodeResponse is decodeRequest for a response.
func decodeResponse(data []byte, r *Response) bool {
	e := envelope{rest: data}
	errText := e.text(`{"error":`)
	id := e.text(`,"id":`)
	e.skip(`,"result":`)
	if e.failed {
		return false
	}
	result := e.raw(bytes.LastIndex(e.rest, []byte(`,"stream_url":`)))
	stream := e.url(`,"stream_url":`)
	e.skip(`}`)
	if e.failed || len(e.rest) > 0 {
		return false
	}
	*r = Response{ID: id, Result: result, StreamURL: stream}
	if errText != "" {
		r.Error = errors.New(errText)
	}
	return true
}

// isAcceptance reports whether data is what addResponse writes for an
// acknowledgement without an error, or any other Response with no more than an id.
func isAcceptance(data []byte) bool {
	e := envelope{rest: data}
	e.skip(`{"error":"","id":"`)
	if e.failed {
		return false
	}
	e.rest = e.rest[inertBytes(e.rest):]
	e.skip(`","result":null,"stream_url":null}`)
	return !e.failed && len(e.rest) == 0
}

// inertBytes returns how many bytes at the beginning are inert.
func inertBytes(text []byte) int {
	n := 0
	for n < len(text) && inert[text[n]] {
		n++
	}
	return n
}

// envelope is a message that is read from its beginning. Once something is not
// as expected it has failed, and what it returns is of no meaning.
type envelope struct {
	rest   []byte
	failed bool
}

// has reports whether the rest begins with the form.
func (e *envelope) has(form string) bool {
	return len(e.rest) >= len(form) && string(e.rest[:len(form)]) == form
}

func (e *envelope) skip(form string) {
	if e.failed || !e.has(form) {
		e.failed = true
		return
	}
	e.rest = e.rest[len(form):]
}

// text reads a string of inert bytes behind the name.
func (e *envelope) text(name string) string {
	e.skip(name)
	e.skip(`"`)
	if e.failed {
		return ""
	}
	size := inertBytes(e.rest)
	text := e.rest[:size]
	e.rest = e.rest[size:]
	e.skip(`"`)
	return intern(text)
}

// intern saves an allocation for what is in most URLs.
func intern(text []byte) string {
	if string(text) == "unix" {
		return "unix"
	}
	return string(text)
}

// url reads null or a URL without anything unusual behind the name.
func (e *envelope) url(name string) *url.URL {
	e.skip(name)
	if e.has("null") {
		e.skip("null")
		return nil
	}
	u := &url.URL{
		Scheme:      e.text(`{"Scheme":`),
		Opaque:      e.text(`,"Opaque":`),
		Host:        e.text(`,"User":null,"Host":`),
		Path:        e.text(`,"Path":`),
		Fragment:    e.text(`,"Fragment":`),
		RawQuery:    e.text(`,"RawQuery":`),
		RawPath:     e.text(`,"RawPath":`),
		RawFragment: e.text(`,"RawFragment":`),
	}
	e.skip(`,"ForceQuery":false,"OmitHost":false}`)
	return u
}

// raw reads a JSON value of so many bytes, which is not copied. Null is nil.
func (e *envelope) raw(size int) *json.RawMessage {
	if e.failed || size <= 0 {
		e.failed = true
		return nil
	}
	value := e.rest[:size:size]
	e.rest = e.rest[size:]
	if string(value) == "null" {
		return nil
	}
	e.failed = !isValue(value)
	raw := json.RawMessage(value) // allocated here, not for null
	return &raw
}

// isValue reports whether data, which is not empty, is a JSON value without white
// space around it. It may be a member of an envelope, which takes one of the levels.
func isValue(data []byte) bool {
	if data[0] <= ' ' || data[len(data)-1] <= ' ' {
		return false // white space around it is not of the value
	}
	s := scanJSON(data)
	return s.valid && s.depth < maxDepth
}

// isMarshalled reports whether data is a JSON value in which json.Marshal changes
// nothing. It may be a member of an envelope, which takes one of the levels.
func isMarshalled(data []byte) bool {
	s := scanJSON(data)
	return s.valid && !s.changes && s.depth < maxDepth
}

// isHookString reports whether encoding/json failed because the response hook is a
// string. A Request has no method that could read it: the documented API has none.
func isHookString(err error) bool {
	var mismatch *json.UnmarshalTypeError
	return errors.As(err, &mismatch) && mismatch.Value == "string" && strings.EqualFold(mismatch.Field, "responsehook")
}

// unmarshalHookString is json.Unmarshal for a request whose response hook is a string.
func unmarshalHookString(data []byte, req *Request) error {
	wire := struct {
		ID           string           `json:"id"`
		Task         string           `json:"task"`
		ResponseHook wireURL          `json:"responsehook"`
		Args         *json.RawMessage `json:"args"`
	}{req.ID, req.Task, wireURL{req.ResponseHook}, req.Args}
	if err := json.Unmarshal(data, &wire); err != nil {
		return err
	}
	req.ID, req.Task, req.ResponseHook, req.Args = wire.ID, wire.Task, wire.ResponseHook.url, wire.Args
	return nil
}

// wireURL decodes a URL from an object or from a string. The empty string and null decode
// as nil.
type wireURL struct{ url *url.URL }

func (w *wireURL) UnmarshalJSON(data []byte) error {
	w.url = nil
	if !bytes.HasPrefix(data, []byte(`"`)) {
		return json.Unmarshal(data, &w.url)
	}
	var text string
	if err := json.Unmarshal(data, &text); err != nil || text == "" {
		return err
	}
	u, err := url.Parse(text)
	if err != nil {
		// The parser's error quotes the URL, which is payload.
		return errors.New("a string that should be a URL can't be parsed as one")
	}
	w.url = u
	return nil
}
