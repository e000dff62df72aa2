package acomm

import (
	"encoding/binary"
	"math/bits"
	"unicode/utf8"
)

// maxDepth is the number of levels of objects and arrays that JSON may have.
// encoding/json refuses one more.
const maxDepth = 10_000

// jsonScan is the result of scanJSON.
type jsonScan struct {
	valid   bool // what json.Valid returns
	tooDeep bool // not valid because of more than maxDepth levels

	// Set for a valid value:

	depth   int  // levels of objects and arrays
	changes bool // json.Marshal of a RawMessage with the value leaves out or escapes something
}

// scanJSON finds in one pass, and in less time, what json.Valid and json.Marshal would
// find.
func scanJSON(data []byte) jsonScan {
	var s jsonScan
	var open nesting
	i := 0

value:
	i = s.skipSpace(data, i)
	if i >= len(data) {
		return jsonScan{}
	}
	if c := data[i]; c == '{' || c == '[' {
		if open.depth == maxDepth {
			return jsonScan{tooDeep: true}
		}
		open.push(c == '{')
		s.depth = max(s.depth, open.depth)
		i = s.skipSpace(data, i+1)
		switch {
		case i < len(data) && data[i] == c+2: // the bracket that closes it
			goto end
		case c == '{':
			goto name
		}
		goto value
	}
	if i = s.skipScalar(data, i); i < 0 {
		return jsonScan{}
	}

next:
	i = s.skipSpace(data, i)
	if open.depth == 0 {
		s.valid = i == len(data)
		return s
	}
	if i >= len(data) {
		return jsonScan{}
	}
	if data[i] == ',' {
		i++
		if open.inObject() {
			goto name
		}
		goto value
	}

end:
	if open.inObject() && data[i] != '}' || !open.inObject() && data[i] != ']' {
		return jsonScan{}
	}
	open.pop()
	i++
	goto next

name:
	if i = s.skipName(data, i); i < 0 {
		return jsonScan{}
	}
	goto value
}

// skipName returns the position behind a member's name and the colon after it; -1 if they
// are not there.
func (s *jsonScan) skipName(data []byte, i int) int {
	i = s.skipSpace(data, i)
	if i >= len(data) || data[i] != '"' {
		return -1
	}
	if i = s.skipString(data, i+1); i < 0 {
		return -1
	}
	i = s.skipSpace(data, i)
	if i >= len(data) || data[i] != ':' {
		return -1
	}
	return i + 1
}

// skipScalar returns the position behind the string, number, true, false or null that
// begins at i; -1 if there is none.
func (s *jsonScan) skipScalar(data []byte, i int) int {
	switch data[i] {
	case '"':
		return s.skipString(data, i+1)
	case 't':
		return skipWord(data, i, "true")
	case 'f':
		return skipWord(data, i, "false")
	case 'n':
		return skipWord(data, i, "null")
	}
	return skipNumber(data, i)
}

func skipWord(data []byte, i int, word string) int {
	end := i + len(word)
	if end > len(data) || string(data[i:end]) != word {
		return -1
	}
	return end
}

// nesting records for each level whether it is an object or an array.
type nesting struct {
	depth int
	inner uint64   // a bit for each of the inner levels, the lowest for the innermost; 1: an object
	outer []uint64 // the outer levels, 64 in each
}

func (n *nesting) push(object bool) {
	if n.depth%64 == 0 && n.depth > 0 {
		n.outer = append(n.outer, n.inner)
	}
	n.depth++
	n.inner <<= 1
	if object {
		n.inner |= 1
	}
}

func (n *nesting) pop() {
	n.depth--
	n.inner >>= 1
	if n.depth%64 == 0 && n.depth > 0 {
		last := len(n.outer) - 1
		n.inner, n.outer = n.outer[last], n.outer[:last]
	}
}

func (n *nesting) inObject() bool { return n.inner&1 == 1 }

// skipSpace returns the position behind the white space that begins at i.
func (s *jsonScan) skipSpace(data []byte, i int) int {
	if i < len(data) && data[i] <= ' ' {
		return s.skipSomeSpace(data, i)
	}
	return i
}

func (s *jsonScan) skipSomeSpace(data []byte, i int) int {
	s.changes = true
	for i < len(data) && (data[i] == ' ' || data[i] == '\n' || data[i] == '\r' || data[i] == '\t') {
		i++
	}
	return i
}

// skipNumber returns the position behind the number that begins at i; -1 if there is
// none.
func skipNumber(data []byte, i int) int {
	if data[i] == '-' {
		i++
	}
	whole := skipDigits(data, i)
	if whole == i || data[i] == '0' && whole > i+1 {
		return -1
	}
	i = whole
	if i < len(data) && data[i] == '.' {
		fraction := skipDigits(data, i+1)
		if fraction == i+1 {
			return -1
		}
		i = fraction
	}
	if i < len(data) && data[i]|0x20 == 'e' {
		i++
		if i < len(data) && (data[i] == '+' || data[i] == '-') {
			i++
		}
		exponent := skipDigits(data, i)
		if exponent == i {
			return -1
		}
		i = exponent
	}
	return i
}

func skipDigits(data []byte, i int) int {
	for i < len(data) && data[i]-'0' <= 9 {
		i++
	}
	return i
}

// skipString returns the position behind the closing quote of the string whose text
// begins at i; -1 if it is not valid.
func (s *jsonScan) skipString(data []byte, i int) int {
	for i < len(data) {
		if rest := data[i:]; len(rest) >= 8 {
			found := findSpecial(binary.LittleEndian.Uint64(rest))
			if found == 0 {
				i += 8
				continue
			}
			i += bits.TrailingZeros64(found) / 8
		}
		switch c := data[i]; {
		case c == '"':
			return i + 1
		case c == '\\':
			size := escapeSize(data[i:])
			if size == 0 {
				return -1
			}
			i += size
		case c < ' ':
			return -1
		case c < utf8.RuneSelf:
			s.changes = s.changes || isEscapedForHTML(c)
			i++
		default:
			i = s.skipNonASCII(data, i)
		}
	}
	return -1
}

const (
	ones = 0x0101010101010101
	high = 0x80 * ones
)

// findSpecial sets the high bit of the first of 8 bytes, counted from the lowest, that
// needs a closer look in a string: a quote, a backslash, a control character, one of <, >
// and &, or part of a character that is not ASCII. Bits of the bytes after it have no
// meaning. It returns zero if there is none.
func findSpecial(w uint64) uint64 {
	// A byte that is zero borrows from the next when one is subtracted, which sets
	// its high bit. Until then no byte has its high bit set, or it is found for it.
	quote := w | 0x04*ones ^ '&'*ones // zero for a quote or an ampersand
	angle := w | 0x02*ones ^ '>'*ones // zero for < or >
	slash := w ^ '\\'*ones
	return (w | (w - ' '*ones) | (quote - ones) | (angle - ones) | (slash - ones)) & high
}

func isEscapedForHTML(c byte) bool { return c == '<' || c == '>' || c == '&' }

// escapeSize returns the size of the escape sequence at the start of text; 0 if it is not
// valid.
func escapeSize(text []byte) int {
	if len(text) < 2 {
		return 0
	}
	switch text[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		if len(text) >= 6 && isHex(text[2]) && isHex(text[3]) && isHex(text[4]) && isHex(text[5]) {
			return 6
		}
	}
	return 0
}

func isHex(c byte) bool { return c-'0' <= 9 || c|0x20-'a' <= 5 }

// skipNonASCII returns the position behind the bytes that are not ASCII and begin at i.
// They need not be UTF-8. json.Marshal escapes the two line separators of Unicode.
func (s *jsonScan) skipNonASCII(data []byte, i int) int {
	for i < len(data) && data[i] >= utf8.RuneSelf {
		if data[i] == lineEnd[0] && i+2 < len(data) && data[i+1] == lineEnd[1] && data[i+2]|1 == lineEnd[2]|1 {
			s.changes = true
		}
		i++
	}
	return i
}

const lineEnd = "\u2028" // e2 80 a8; the other one is e2 80 a9
