package acomm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// The envelope of a message is all of it but the args or the result. It is
// written by hand, in the form encoding/json gives it, and read by hand in that
// form. What is in any other form is left to encoding/json as a whole, so that
// nothing but the time it takes depends on what is in this file.

const (
	maxKnown   = 1000    // levels; encoding/json counts, and limits, those of the whole message
	maxScratch = 1 << 20 // bytes of an abridged text that are kept for the next
)

// urlKnown is false if url.URL has members that came after Go 1.26.
var urlKnown = reflect.TypeFor[url.URL]().NumField() == 11

// inert bytes stand for themselves in a JSON string, whoever writes it.
var inert = func() (set [256]bool) {
	for c := ' '; c < utf8.RuneSelf; c++ {
		set[c] = !strings.ContainsRune(`"\<>&`, c)
	}
	return set
}()

// message is a message that is about to be sent.
type message struct {
	text  []byte // all of it, behind the room that newMessage made, but for value
	value []byte // large, and nobody's to change; nil if it is in the text
	at    int    // where in the text it belongs; 0 without one
}

// newMessage makes room for a message with the URL and the raw value, and with
// texts of usual length, behind so many bytes.
func newMessage(front int, u *url.URL, raw *json.RawMessage) *message {
	size := front + 128
	if u != nil {
		size += 256
	}
	if raw != nil && !isApart(*raw) {
		size += len(*raw)
	}
	m := messages.Get().(*message)
	if cap(m.text) < size {
		m.text = make([]byte, 0, size)
	}
	m.text = m.text[:front]
	clear(m.text)
	return m
}

var messages = sync.Pool{New: func() any { return new(message) }}

// release keeps the memory of a message, which nobody looks at any more, for
// another one.
func (m *message) release() {
	m.value, m.at = nil, 0
	if cap(m.text) <= 2*keptLimit {
		messages.Put(m)
	}
}

// isApart reports whether a raw value is large enough not to be copied.
func isApart(raw json.RawMessage) bool { return len(raw) > keptLimit }

func (m *message) size() int { return len(m.text) + len(m.value) }

// join returns the message in one slice, which may be its own.
func (m *message) join() []byte {
	if m.value == nil {
		return m.text
	}
	return m.copy()
}

// copy returns the message in a slice of its size.
func (m *message) copy() []byte {
	return slices.Concat(m.text[:m.at], m.value, m.text[m.at:])
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
	switch {
	case raw == nil:
		m.text = append(m.text, "null"...)
	case isApart(*raw):
		m.value, m.at = *raw, len(m.text)
	default:
		m.text = append(m.text, *raw...)
	}
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

// decodeResponse is decodeRequest for a response. A last member "keep", which
// is none of a Response, is skipped.
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
	if e.has(`,"keep":1`) {
		e.skip(`,"keep":1`)
	}
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

// isValue reports whether json.Unmarshal takes data, and all of it, as one
// value, wherever in a message it is.
func isValue(data []byte) bool {
	if data[0] <= ' ' || data[len(data)-1] <= ' ' {
		return false // white space around it is not of the value
	}
	return isValid(data, true)
}

// isMarshalled reports whether json.Marshal takes data and changes nothing in it.
func isMarshalled(data []byte) bool {
	return isValid(data, false)
}

// scratch holds the *[]byte that texts are abridged in.
var scratch = sync.Pool{New: func() any { return new([]byte) }}

// isValid reports whether data is valid JSON of few levels, and if not anything
// goes, such that json.Marshal changes nothing in it.
func isValid(data []byte, anything bool) bool {
	buf := scratch.Get().(*[]byte)
	a := abridge((*buf)[:0], data)
	ok := a.depth <= maxKnown && (anything || !a.changes) && json.Valid(a.text)
	if len(a.text) < len(data) && cap(a.text) <= maxScratch {
		*buf = a.text
	}
	scratch.Put(buf)
	return ok
}

// abridgement is a JSON text without most of the inert bytes in its strings:
// from 9 in a row on, all but the first and up to 7 are left out.
//
// Whether it is valid depends on none of them: inside of a string an inert byte
// leaves encoding/json in the state it was in, unless it is part of an escape
// sequence, and those are kept; outside of one, only a quote leads into one.
// A byte of each row stays, and keeps apart what was apart, such as the bytes of
// a character.
type abridgement struct {
	text []byte // valid if and only if the whole is; then, of the whole:

	depth   int  // levels of objects and arrays
	changes bool // json.Marshal may leave out or escape something
}

// abridge appends to dst what is left of the JSON text. It returns the text
// itself if that is all of it.
func abridge(dst, text []byte) abridgement {
	a := abridgement{text: dst}
	depth, kept := 0, 0 // text[kept:i] is still to be appended
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c <= ' ':
			a.changes = true
		case c|0x20 == '{': // a bracket, too
			depth++
			a.depth = max(a.depth, depth)
		case c|0x20 == '}':
			depth--
		case c == '"':
			i, kept = a.inString(text, i+1, kept)
		}
	}
	if kept == 0 {
		a.text = text
	} else {
		a.text = append(a.text, text[kept:]...)
	}
	return a
}

// inString abridges the string that begins at i. It returns where its closing
// quote is, and from where on the text is still to be appended.
func (a *abridgement) inString(text []byte, i, kept int) (int, int) {
	for i < len(text) {
		switch c := text[i]; {
		case inert[c]:
			i++
			if n := inertWords(text[i:]); n > 0 {
				a.text = append(a.text, text[kept:i]...)
				i += n
				kept = i
			}
			for i < len(text) && inert[text[i]] {
				i++
			}
		case c == '"':
			return i, kept
		case c == '\\':
			i++
			if i < len(text) && text[i] == 'u' {
				i += 4
			}
			i++
		default:
			r, size := utf8.DecodeRune(text[i:])
			if size == 1 || r == '\u2028' || r == '\u2029' {
				a.changes = true
			}
			i += size
		}
	}
	return i, kept
}

// inertWords returns for how many bytes, a multiple of 8, all are inert.
func inertWords(text []byte) int {
	rest := text
	for len(rest) >= 8 {
		switch {
		case len(rest) >= 32 && areInert(rest):
			rest = rest[32:]
		case others(binary.LittleEndian.Uint64(rest)) == 0:
			rest = rest[8:]
		default:
			return len(text) - len(rest)
		}
	}
	return len(text) - len(rest)
}

const (
	ones = 0x0101010101010101
	high = 0x80 * ones
)

// others is not zero if any of the 8 bytes is not inert.
func others(w uint64) uint64 {
	// Each of these is zero in the bytes it looks for. As long as no byte has its
	// high bit set, subtracting one sets that of the lowest zero.
	quote := w | 0x04*ones ^ '&'*ones // or an ampersand
	angle := w | 0x02*ones ^ '>'*ones // of either kind
	slash := w ^ '\\'*ones
	return (w | (w - ' '*ones) | (quote - ones) | (angle - ones) | (slash - ones)) & high
}

// areInert reports whether the first 32 bytes are inert, and none of them one of
// the few that it takes along for the time this saves.
func areInert(text []byte) bool {
	a, b := binary.LittleEndian.Uint64(text), binary.LittleEndian.Uint64(text[8:])
	c, d := binary.LittleEndian.Uint64(text[16:]), binary.LittleEndian.Uint64(text[24:])
	found := a | b | c | d
	found |= (a - ' '*ones) | (b - ' '*ones) | (c - ' '*ones) | (d - ' '*ones)
	const x, quote = 0x04 * ones, '&' * ones // or an ampersand
	found |= (a | x ^ quote - ones) | (b | x ^ quote - ones) | (c | x ^ quote - ones) | (d | x ^ quote - ones)
	const y, angle = 0x62 * ones, '~' * ones // of either kind, or a backslash, or one of |^~
	found |= (a | y ^ angle - ones) | (b | y ^ angle - ones) | (c | y ^ angle - ones) | (d | y ^ angle - ones)
	return found&high == 0
}
