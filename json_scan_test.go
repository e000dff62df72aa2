package acomm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// checkScan compares what the scanner says of a text with what encoding/json says.
func checkScan(t *testing.T, text []byte) {
	t.Helper()
	s := scanJSON(text)
	require.Equal(t, json.Valid(text), s.valid, "valid: %q", text)
	if !s.valid {
		return
	}
	marshalled, err := json.Marshal(json.RawMessage(text))
	require.NoError(t, err)
	require.Equal(t, string(marshalled) != string(text), s.changes, "%q is marshalled as %q", text, marshalled)
	require.Equal(t, levels(t, text), s.depth, "depth: %q", text)
}

// What is special is noticed at each place of a word of 8 bytes, and so is the end.
func TestScanJSON_TakesEveryByteOfAStringAsEncodingJSON(t *testing.T) {
	for c := range 256 {
		for size := range 20 {
			for at := range size {
				text := bytes.Repeat([]byte("x"), size)
				text[at] = byte(c)
				checkScan(t, []byte(`"`+string(text)+`"`))
				checkScan(t, []byte(`["`+string(text)+`"]`))
				checkScan(t, []byte(`"`+string(text)))
			}
		}
	}
}

func TestScanJSON_TakesEveryByteOfAnEscapeAsEncodingJSON(t *testing.T) {
	for c := range 256 {
		for i := range len(`\u12aF`) {
			text := []byte(`"xxxxx\u12aFxxxxx"`)
			text[len(`"xxxxx`)+i] = byte(c)
			checkScan(t, text)
		}
	}
}

// Each text cut off at each byte, with each byte left out, and with each replaced.
func TestScanJSON_TakesWhatIsNearlyValidAsEncodingJSON(t *testing.T) {
	for _, text := range []string{
		`{"a":[1,-0.5e+3,{"b":null,"":[]}],"c":{},"d":[true,false]}`,
		` [ { "a" : 1 , "b" : [ ] } , "x" ] `,
		`["\u00fc\"\\\/\b\f\n\r\t","\ud800","ü€😀` + "\u2028\u2029" + `"]`,
		`[0,-0,0.1,1e1,1E-1,10.25e+10,123456789012345678901234567890]`,
	} {
		for i := range len(text) + 1 {
			checkScan(t, []byte(text[:i]))
			if i == len(text) {
				break
			}
			checkScan(t, []byte(text[:i]+text[i+1:]))
			for _, c := range []byte("\"\\{}[]:,0e.-+tnu \n\x00\x80\xe2<&") {
				replaced := []byte(text)
				replaced[i] = c
				checkScan(t, replaced)
				checkScan(t, append(append([]byte(text[:i]), c), text[i:]...))
			}
		}
	}
}

// Levels are remembered over the edges of words, up to the limit of encoding/json.
func TestScanJSON_RemembersLevelsUpToTheLimit(t *testing.T) {
	for _, depth := range []int{1, 2, 63, 64, 65, 127, 128, 129, 192, 1000, maxDepth - 1, maxDepth, maxDepth + 1} {
		arrays := strings.Repeat("[", depth) + strings.Repeat("]", depth)
		objects := strings.Repeat(`{"a":`, depth) + "1" + strings.Repeat("}", depth)
		mixed := strings.Repeat(`[{"a":`, depth/2) + "[]" + strings.Repeat("}]", depth/2)
		for _, text := range []string{arrays, objects, mixed} {
			s := scanJSON([]byte(text))
			require.Equal(t, json.Valid([]byte(text)), s.valid, "%d levels", depth)
			if s.valid {
				require.Equal(t, levels(t, []byte(text)), s.depth)
			}
			wrong := []byte(text) // the closing bracket of the outermost level
			wrong[len(wrong)-1] ^= '}' ^ ']'
			require.False(t, scanJSON(wrong).valid)
			half := []byte(text)
			half[len(half)*3/4] ^= '}' ^ ']'
			require.Equal(t, json.Valid(half), scanJSON(half).valid)
		}
	}
}

// Hazard: the levels of one word are taken for those of another.
func TestScanJSON_KeepsLevelsOfBothKindsApart(t *testing.T) {
	random := rand.New(rand.NewPCG(20, 16))
	for _, depth := range []int{1, 64, 65, 130, 200, 1000, maxDepth, maxDepth + 1} {
		for range 20 {
			text, closing := []byte(nil), []byte(nil)
			for range depth {
				if random.IntN(2) == 0 {
					text, closing = append(text, '['), append(closing, ']')
				} else {
					text, closing = append(text, `{"":`...), append(closing, '}')
				}
			}
			slices.Reverse(closing)
			text = append(append(text, '1'), closing...)
			s := scanJSON(text)
			require.Equal(t, json.Valid(text), s.valid, "%d levels", depth)
			require.Equal(t, depth > maxDepth, s.tooDeep, "%d levels", depth)
			if s.valid {
				require.Equal(t, depth, s.depth)
			}
			text[len(text)-1-random.IntN(depth)] ^= '}' ^ ']'
			require.False(t, scanJSON(text).valid, "%d levels, one closed by the wrong bracket", depth)
		}
	}
}

// Hazard: a value as deep as encoding/json allows is one level too deep inside of
// an envelope.
func TestScanJSON_AnEnvelopeTakesALevel(t *testing.T) {
	for depth, ok := range map[int]bool{maxDepth - 1: true, maxDepth: false} {
		value := []byte(strings.Repeat("[", depth) + strings.Repeat("]", depth))
		require.Equal(t, ok, isValue(value), depth)
		require.Equal(t, ok, isMarshalled(value), depth)
		message := fmt.Sprintf(`{"args":%s}`, value)
		require.Equal(t, ok, decodeFrame([]byte(message), &Request{}) == nil, depth)
	}
}

// FuzzScanJSON asks encoding/json the same.
func FuzzScanJSON(f *testing.F) {
	run := strings.Repeat("x", 20)
	for _, text := range []string{
		``, `null`, ` [1, {"a": "b"}] `, `"\u00` + run + `41"`, `"\ud800` + run + `\udc00"`, `"\` + run + `"`,
		`{"` + run + `":1,"` + run + `":2}`, `"` + run + "\xe2" + run + "\x80\xa8" + `"`, `"` + run + "\u2029\"",
		`"` + run + `<b>"`, `"` + run + "ü\x7f\x00\"", `"` + run, `[[[{"a":[]}]]]`, `"\u12"` + run + `"`,
		`{"id":7,"price":-12.50e+1,"on":true,"off":false,"none":null,"tags":["a","b\n"],"in":{"x":0}}`,
		strings.Repeat("[", 70) + `{"a":1}` + strings.Repeat("]", 70),
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(checkScan)
}

// levels returns how deep a JSON text is, as encoding/json has it.
func levels(t *testing.T, text []byte) int {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	depth, deepest := 0, 0
	for {
		token, err := dec.Token()
		if err == io.EOF {
			return deepest
		}
		require.NoError(t, err)
		switch token {
		case json.Delim('['), json.Delim('{'):
			depth++
			deepest = max(deepest, depth)
		case json.Delim(']'), json.Delim('}'):
			depth--
		}
	}
}
