package acomm_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What the documents say is held against the library here: the frames, messages
// and tables of PROTOCOL.md, the programs and numbers of README.md. So are the
// frames in testdata/wire, which are the protocol as it was always spoken.

const frameHeader = 4 // bytes

// readFrom has the library read bytes that a peer sends.
func readFrom(t *testing.T, sent []byte, dest any) {
	t.Helper()
	ours, peer := net.Pipe()
	writing := async(func() {
		_, _ = peer.Write(sent)
		_ = peer.Close()
	})
	err := acomm.UnmarshalConnData(ours, dest)
	require.NoError(t, ours.Close())
	within(t, writing, "the peer's write")
	require.NoError(t, err)
}

// written returns what the library sends a peer.
func written(t *testing.T, payload any) []byte {
	t.Helper()
	ours, peer := net.Pipe()
	var sent []byte
	reading := async(func() { sent, _ = io.ReadAll(peer) })
	err := acomm.SendConnData(ours, payload)
	require.NoError(t, ours.Close())
	within(t, reading, "the peer's read")
	require.NoError(t, err)
	return sent
}

// framed puts the header before a payload.
func framed(payload []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), payload...)
}

// checkFrame reads a frame as the message it is and writes that again: the same
// JSON has to come out, its members in the same order, and, where no URL is in
// it, the same bytes. (The members of a URL are url.URL's and grow with Go.)
func checkFrame(t *testing.T, data []byte) {
	t.Helper()
	require.Greater(t, len(data), frameHeader)
	payload := data[frameHeader:]
	require.EqualValues(t, len(payload), binary.BigEndian.Uint32(data), "length in the header")

	var again []byte
	var hasURL bool
	if bytes.Contains(payload, []byte(`"task"`)) {
		req := &acomm.Request{}
		readFrom(t, data, req)
		require.NoError(t, req.Validate())
		again, hasURL = written(t, req), true
	} else {
		resp := &acomm.Response{}
		readFrom(t, data, resp)
		again, hasURL = written(t, resp), resp.StreamURL != nil
	}
	require.JSONEq(t, string(payload), string(again[frameHeader:]))
	require.Equal(t, memberNames(t, payload), memberNames(t, again[frameHeader:]), "order of the members")
	if !hasURL {
		require.Equal(t, string(data), string(again))
	}
}

// memberNames returns the names of an object's members in their order.
func memberNames(t *testing.T, object []byte) []string {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(object))
	_, err := decoder.Token() // {
	require.NoError(t, err)
	var names []string
	for decoder.More() {
		name, err := decoder.Token()
		require.NoError(t, err)
		names = append(names, name.(string))
		var value json.RawMessage
		require.NoError(t, decoder.Decode(&value))
	}
	return names
}

// document reads one of the texts that come with the library.
func document(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(data)
}

// codeBlocks returns the fenced blocks of a document with the language given.
func codeBlocks(text, language string) []string {
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		if m[1] == language {
			blocks = append(blocks, m[2])
		}
	}
	return blocks
}

// dumpedBytes turns a hex dump into the bytes it shows, and checks its offsets
// and the text in its last column.
func dumpedBytes(t *testing.T, dump string) []byte {
	t.Helper()
	var data []byte
	for line := range strings.Lines(dump) {
		offset, rest, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		require.True(t, ok, line)
		require.Equal(t, fmt.Sprintf("%08x", len(data)), offset)
		digits, text, ok := strings.Cut(rest, "  ")
		require.True(t, ok, line)
		shown, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
		require.NoError(t, err)
		printable := bytes.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return '.'
			}
			return r
		}, shown)
		require.Equal(t, string(printable), strings.TrimLeft(text, " "), line)
		data = append(data, shown...)
	}
	return data
}

// tableNames returns the names in the first column of the first table after a
// heading in bold, each of them in backquotes.
func tableNames(t *testing.T, text, heading string) []string {
	t.Helper()
	_, text, ok := strings.Cut(text, "**"+heading+"**")
	require.True(t, ok, heading)
	_, text, ok = strings.Cut(text, "\n|---")
	require.True(t, ok, heading)
	var names []string
	for _, row := range strings.Split(text, "\n")[1:] {
		if !strings.HasPrefix(row, "|") {
			break
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(strings.Split(row, "|")[1], -1) {
			names = append(names, m[1])
		}
	}
	return names
}

func TestWire_FramesOf2016RoundTrip(t *testing.T) {
	files, err := filepath.Glob("testdata/wire/*.bin")
	require.NoError(t, err)
	require.Len(t, files, 8)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			checkFrame(t, []byte(document(t, file)))
		})
	}
}

func TestProtocolDocument_HexDumpsAreFrames(t *testing.T) {
	dumps := 0
	for _, block := range codeBlocks(document(t, "PROTOCOL.md"), "") {
		if !strings.HasPrefix(block, "00000000: ") {
			continue // a diagram
		}
		dumps++
		checkFrame(t, dumpedBytes(t, block))
	}
	require.Equal(t, 2, dumps)
	text := document(t, "PROTOCOL.md")
	require.Contains(t, text, "(0x34 = 52 bytes of JSON)")
	require.Len(t, written(t, &acomm.Response{}), frameHeader+0x34, "the acknowledgement shown is the library's own")
}

func TestProtocolDocument_MessagesAreRead(t *testing.T) {
	blocks := codeBlocks(document(t, "PROTOCOL.md"), "json")
	require.Len(t, blocks, 2)
	for _, block := range blocks {
		checkFrame(t, framed([]byte(block)))
	}
}

func TestProtocolDocument_TablesNameTheMembers(t *testing.T) {
	text := document(t, "PROTOCOL.md")
	req, err := acomm.NewRequest("task", "unix:///run/a.sock", nil, nil, nil)
	require.NoError(t, err)
	require.Equal(t, memberNames(t, written(t, req)[frameHeader:]), tableNames(t, text, "Request"))
	require.Equal(t, memberNames(t, written(t, &acomm.Response{})[frameHeader:]), tableNames(t, text, "Response"))

	for _, name := range tableNames(t, text, "URL object.") {
		field, ok := reflect.TypeFor[url.URL]().FieldByName(name)
		require.True(t, ok && field.IsExported(), name)
	}
}

func TestProtocolDocument_BothFormsOfAURL(t *testing.T) {
	text := document(t, "PROTOCOL.md")
	for _, form := range []string{`{"Scheme":"unix","Path":"/run/a.sock"}`, `"unix:///run/a.sock"`} {
		require.Contains(t, text, "`"+form+"`")
		resp := &acomm.Response{}
		readFrom(t, framed([]byte(`{"id":"x","stream_url":`+form+`}`)), resp)
		require.Equal(t, &url.URL{Scheme: "unix", Path: "/run/a.sock"}, resp.StreamURL)
	}
	// A hook in the form of a string makes a broken frame.
	require.Error(t, json.Unmarshal([]byte(`{"responsehook":"unix:///run/a.sock"}`), &acomm.Request{}))
}

func TestProtocolDocument_URLCarriesNoCredentials(t *testing.T) {
	req, err := acomm.NewRequest("task", "http://name:secret@host/hook", nil, nil, nil)
	require.NoError(t, err)
	sent := written(t, req)
	require.NotContains(t, string(sent), "secret")
	require.NotContains(t, string(sent), "name")
	require.Contains(t, string(sent), `"User":{}`)
}

// normalised is Go code as gofmt has it, without its indentation, blank lines and
// the comment that says what an example prints.
func normalised(t *testing.T, body string) string {
	t.Helper()
	body, _, _ = strings.Cut(body, "// Output:")
	body, _, _ = strings.Cut(body, "// Unordered output:")
	code, err := format.Source([]byte("{\n" + body + "\n}"))
	require.NoError(t, err)
	var lines []string
	for line := range strings.Lines(string(code)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// functionBody returns the source between the braces of a function, and the
// comments in it.
func functionBody(t *testing.T, source, name string) string {
	t.Helper()
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, source, parser.ParseComments)
	require.NoError(t, err)
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == name {
			return source[files.Position(f.Body.Lbrace).Offset+1 : files.Position(f.Body.Rbrace).Offset]
		}
	}
	require.Fail(t, "no such function", name)
	return ""
}

func TestReadme_ProgramIsTheExample(t *testing.T) {
	program := codeBlocks(document(t, "README.md"), "go")[0]
	example := functionBody(t, document(t, "example_test.go"), "Example")
	require.Equal(t, normalised(t, example), normalised(t, functionBody(t, program, "main")))

	_, output, ok := strings.Cut(example, "// Output:")
	require.True(t, ok)
	var want []string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "//")); line != "" {
			want = append(want, line)
		}
	}
	require.Equal(t, strings.Join(want, "\n"), strings.TrimSpace(runGo(t, "run", goFile(t, program))))
}

func TestReadme_CodeCompiles(t *testing.T) {
	blocks := codeBlocks(document(t, "README.md"), "go")
	require.Len(t, blocks, 3)
	for _, block := range blocks {
		formatted, err := format.Source([]byte(block))
		require.NoError(t, err)
		require.Equal(t, string(formatted), block, "gofmt")
		runGo(t, "vet", goFile(t, block))
	}
}

func goFile(t *testing.T, source string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "readme.go")
	require.NoError(t, os.WriteFile(path, []byte(source), 0o600))
	return path
}

func runGo(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(t, cmd.Run(), stderr.String())
	return stdout.String()
}

func TestReadme_NumbersAreTheLibrarys(t *testing.T) {
	text := document(t, "README.md")
	require.Contains(t, text, fmt.Sprintf("| payload of a message | %d MiB", acomm.MaxPayload>>20))
	require.Contains(t, text, fmt.Sprintf("| answer to an HTTP POST | %d MiB", acomm.MaxAnswer>>20))
	require.Contains(t, text, "| `Send` | 1 minute")
	require.Equal(t, "1m0s", acomm.SendTimeout.String())
	require.Contains(t, document(t, "PROTOCOL.md"), fmt.Sprintf("%d MiB (67,108,864 bytes)", acomm.MaxPayload>>20))
	require.Equal(t, 67_108_864, acomm.MaxPayload)
}

func TestReadme_CommandsAreTargets(t *testing.T) {
	makefile := document(t, "Makefile")
	named := regexp.MustCompile("`make ([a-z ]+)`|(?m)^make ([a-z ]+)").FindAllStringSubmatch(document(t, "README.md"), -1)
	require.NotEmpty(t, named)
	for _, m := range named {
		for _, target := range strings.Fields(m[1] + " " + m[2]) {
			require.Regexp(t, `(?m)^`+target+`:`, makefile)
		}
	}
}
