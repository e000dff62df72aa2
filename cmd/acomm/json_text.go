package main

import (
	"bytes"
	"fmt"
	"unicode/utf8"
)

// escapedForHTML is what encoding/json writes, for HTML and JavaScript, in place of
// characters that JSON takes as they are.
var escapedForHTML = map[string]string{
	"u003c": "<", "u003e": ">", "u0026": "&", "u2028": "\u2028", "u2029": "\u2029",
}

// unescapeJSON undoes that. Other escapes stay as they are.
func unescapeJSON(text []byte) []byte {
	const length = len("u003c")
	if !bytes.Contains(text, []byte(`\u00`)) && !bytes.Contains(text, []byte(`\u202`)) {
		return text
	}
	out := make([]byte, 0, len(text))
	for {
		i := bytes.IndexByte(text, '\\')
		if i < 0 || i+1 == len(text) {
			return append(out, text...)
		}
		out, text = append(out, text[:i]...), text[i+1:]
		if len(text) >= length {
			if plain, ok := escapedForHTML[string(text[:length])]; ok {
				out, text = append(out, plain...), text[length:]
				continue
			}
		}
		out, text = append(out, '\\', text[0]), text[1:]
	}
}

// inertJSON is the JSON with escapes for what a terminal would obey, and for what is not
// UTF-8. Outside of strings there is none of that but white space.
func inertJSON(text []byte) []byte {
	out := make([]byte, 0, len(text))
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		switch {
		case r == utf8.RuneError && size == 1, r > ' ' && commands(r):
			out = fmt.Appendf(out, "\\u%04x", r)
		default:
			out = append(out, text[:size]...)
		}
		text = text[size:]
	}
	return out
}
