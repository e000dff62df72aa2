package acomm_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// The programs and commands of README.md do what it says.

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

// readmeCode returns README's Go code with the text in it. A part without a package
// clause gets one, and the imports that it needs.
func readmeCode(t *testing.T, text string) string {
	t.Helper()
	blocks := codeBlocks(document(t, "README.md"), "go")
	i := slices.IndexFunc(blocks, func(block string) bool { return strings.Contains(block, text) })
	require.GreaterOrEqual(t, i, 0, text)
	return asFile(blocks[i])
}

func asFile(block string) string {
	if strings.HasPrefix(block, "package ") {
		return block
	}
	var header strings.Builder
	header.WriteString("package main\n\nimport (\n")
	for _, path := range []string{"encoding/json", "errors", "net/http", "net/url", "time"} {
		if strings.Contains(block, path[strings.LastIndex(path, "/")+1:]+".") {
			fmt.Fprintf(&header, "\t%q\n", path)
		}
	}
	header.WriteString("\n\t\"github.com/mistifyio/acomm\"\n)\n\n")
	return header.String() + block
}

func TestReadme_CodeCompiles(t *testing.T) {
	blocks := codeBlocks(document(t, "README.md"), "go")
	require.Len(t, blocks, 4)
	for _, block := range blocks {
		file := asFile(block)
		formatted, err := format.Source([]byte(file))
		require.NoError(t, err)
		require.Equal(t, string(formatted), file, "gofmt")
		if !strings.Contains(block, "func main()") {
			file += "\nfunc main() {}\n"
		}
		runGo(t, "vet", goFile(t, file))
	}
}

// The two parts on many requests and on a hook over HTTP, in one program.
func TestReadme_PartsWork(t *testing.T) {
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "main.go")}
	require.NoError(t, os.WriteFile(files[0], []byte(`
package main

import (
	"fmt"
	"net/http/httptest"
	"time"

	"github.com/mistifyio/acomm"
)

func main() {
	tracker, err := acomm.NewTracker("", nil, time.Minute)
	if err != nil {
		panic(err)
	}
	provider := acomm.NewUnixListener("", 0)
	if tracker.Start() != nil || provider.Start() != nil {
		panic("start")
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for conn := provider.NextConn(); conn != nil; conn = provider.NextConn() {
			req, word := &acomm.Request{}, ""
			if acomm.UnmarshalConnData(conn, req) != nil || req.UnmarshalArgs(&word) != nil {
				panic("request")
			}
			refusal := error(nil)
			if word == "four" {
				refusal = fmt.Errorf("no")
			}
			if err := acomm.SendConnData(conn, &acomm.Response{Error: refusal}); err != nil {
				panic(err)
			}
			provider.DoneConn(conn)
			if refusal == nil {
				resp, err := acomm.NewResponse(req, len(word), nil, nil)
				if err != nil || req.Respond(resp) != nil {
					panic("respond")
				}
			}
		}
	}()
	responses, err := lengths(tracker, provider.URL(), []string{"one", "three", "four"})
	fmt.Println(len(responses), string(*responses["one"].Result), string(*responses["three"].Result), err)

	server := httptest.NewServer(hookHandler(tracker))
	handled := make(chan string, 1)
	req, err := acomm.NewRequest("length", server.URL, "eleven", func(_ *acomm.Request, resp *acomm.Response) { handled <- string(*resp.Result) }, nil)
	if err != nil || tracker.TrackRequest(req, time.Minute) != nil || acomm.Send(provider.URL(), req) != nil {
		panic("request over HTTP")
	}
	fmt.Println(<-handled)
	provider.Stop(0)
	tracker.Stop()
	<-served
	server.Close()
}
`), 0o600))
	for i, function := range []string{"func lengths(", "func hookHandler("} {
		path := filepath.Join(dir, fmt.Sprintf("part%d.go", i))
		require.NoError(t, os.WriteFile(path, []byte(readmeCode(t, function)), 0o600))
		files = append(files, path)
	}
	require.Equal(t, "2 3 5 <nil>\n6\n", runGo(t, append([]string{"run"}, files...)...))
}

// Its coordinator runs as a process, between a provider and a requester. It serves on a
// listener of this process: so nobody else takes the port, and it can be connected to
// before it has started.
func TestReadme_CoordinatorForwardsBothWays(t *testing.T) {
	front, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer front.Close()
	address := front.Addr().(*net.TCPAddr)
	inherited, err := front.(*net.TCPListener).File()
	require.NoError(t, err)
	defer inherited.Close()
	socket := filepath.Join(shortDir(t), "wc.sock")
	source := readmeCode(t, "func (c *coordinator) forward(")
	for old, replacement := range map[string]string{
		"127.0.0.1:8080": address.String(), "/tmp/tasks/wc/1.sock": socket,
		"http.ListenAndServe(streams.Host, nil)": "http.Serve(inherited(), nil)",
	} {
		require.Equal(t, 1, strings.Count(source, old), old)
		source = strings.Replace(source, old, replacement, 1)
	}
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "coordinator.go"), filepath.Join(dir, "inherited.go")}
	require.NoError(t, os.WriteFile(files[0], []byte(source), 0o600))
	require.NoError(t, os.WriteFile(files[1], []byte(`
package main

import (
	"net"
	"os"
)

func inherited() net.Listener {
	l, err := net.FileListener(os.NewFile(3, "front"))
	if err != nil {
		panic(err)
	}
	return l
}
`), 0o600))
	binary := filepath.Join(dir, "coordinator")
	runGo(t, append([]string{"build", "-o", binary}, files...)...)
	coordinator := exec.CommandContext(t.Context(), binary)
	coordinator.ExtraFiles = []*os.File{inherited}
	coordinator.Env = append(os.Environ(), "TMPDIR="+shortDir(t)) // it is killed, and its directory stays
	require.NoError(t, coordinator.Start())
	defer func() { // by the time of t.Cleanup the context has ended
		_ = coordinator.Process.Kill()
		_ = coordinator.Wait()
	}()

	streams := newTracker(t)
	provider := startListener(t, socket, 0)
	go func() { // ends with the provider
		for conn := provider.NextConn(); conn != nil; conn = provider.NextConn() {
			req := &acomm.Request{}
			err := acomm.UnmarshalConnData(conn, req)
			ackErr := acomm.SendConnData(conn, &acomm.Response{Error: err})
			provider.DoneConn(conn)
			stream, streamErr := streams.NewStreamUnix("", io.NopCloser(strings.NewReader("the data")))
			respondErr := req.Respond(&acomm.Response{ID: req.ID, Result: req.Args, StreamURL: stream})
			if err := errors.Join(err, ackErr, streamErr, respondErr); err != nil {
				t.Error(err)
			}
		}
	}()
	responses := make(chan *acomm.Response, 1)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		resp := &acomm.Response{}
		if err := json.NewDecoder(r.Body).Decode(resp); err != nil {
			t.Error(err)
		}
		responses <- resp
	}))
	defer hook.Close()

	requests := &url.URL{Scheme: "http", Host: address.String(), Path: "/"}
	req, err := acomm.NewRequest("wc", hook.URL, "text", nil, nil)
	require.NoError(t, err)
	require.NoError(t, acomm.Send(requests, req))
	resp := within(t, responses, "the response")
	require.Equal(t, req.ID, resp.ID)
	require.JSONEq(t, `"text"`, string(*resp.Result))
	require.Equal(t, address.String(), resp.StreamURL.Host)
	var data bytes.Buffer
	require.NoError(t, acomm.Stream(&data, resp.StreamURL))
	require.Equal(t, "the data", data.String())

	req.Task = "other"
	require.EqualError(t, acomm.Send(requests, req), `nobody provides the task "other"`)
	resp2, err := http.Get(requests.String())
	require.NoError(t, err)
	require.NoError(t, resp2.Body.Close())
	require.Equal(t, http.StatusMethodNotAllowed, resp2.StatusCode)
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// The handler is that of the example of Stream.
func TestExampleStream_HandlerCutsOffUnderMiddleware(t *testing.T) {
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.Repeat("x", 60000))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer source.Close()
	addr, err := url.Parse(source.URL)
	require.NoError(t, err)
	handler := streamHandler(func(*http.Request) (*url.URL, bool) { return addr, true })
	for _, isHTTP2 := range []bool{false, true} {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() { _ = recover() }() // as middleware does
			handler(w, r)
		}))
		server.EnableHTTP2 = isHTTP2
		server.StartTLS()
		answer, err := server.Client().Get(server.URL)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, answer.StatusCode)
		require.Equal(t, isHTTP2, answer.ProtoMajor == 2)
		_, err = io.Copy(io.Discard, answer.Body)
		require.Error(t, err, "it is cut off")
		_ = answer.Body.Close()
		server.Close()
	}
	plain := httptest.NewServer(handler)
	defer plain.Close()
	conn, err := net.Dial("tcp", plain.Listener.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusHTTPVersionNotSupported, answer.StatusCode)
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

// docs/tour.md names each file of the package, and no other.
func TestTour_NamesEveryFile(t *testing.T) {
	tour := document(t, "docs/tour.md")
	named := regexp.MustCompile(`\b[a-z0-9_]+\.go\b`).FindAllString(tour, -1)
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			require.Contains(t, named, file)
		}
	}
	for _, file := range named {
		require.Contains(t, files, file)
	}
}

func TestReadme_CommandsAreTargets(t *testing.T) {
	makefile := document(t, "Makefile")
	named := regexp.MustCompile("`make ([a-z ]+)`|(?m)^make ([a-z ]+)").FindAllStringSubmatch(document(t, "README.md")+document(t, "CONTRIBUTING.md"), -1)
	require.NotEmpty(t, named)
	for _, m := range named {
		for _, target := range strings.Fields(m[1] + " " + m[2]) {
			require.Regexp(t, `(?m)^`+target+`:`, makefile)
		}
	}
}

// documentsThatNameTests are checked for the names of tests in them, and for how many
// they have at least.
var documentsThatNameTests = map[string]int{
	"CONTRIBUTING.md":  4,
	"PROTOCOL.md":      100,
	"README.md":        8,
	"SECURITY.md":      50,
	"docs/limits.md":   30,
	"docs/sessions.md": 8,
	"docs/tour.md":     1,
}

func TestDocuments_NameTestsThatExist(t *testing.T) {
	exist := testsInRepository(t)
	for name, least := range documentsThatNameTests {
		t.Run(name, func(t *testing.T) {
			named := regexp.MustCompile(`\b(Test|Fuzz|Example)[A-Z]\w+`).FindAllString(document(t, name), -1)
			require.GreaterOrEqual(t, len(named), least)
			for _, test := range named {
				require.True(t, exist[test], "%s names %s, which does not exist", name, test)
			}
		})
	}
}

// testsInRepository returns the names of the functions in the tests of all modules.
func testsInRepository(t *testing.T) map[string]bool {
	t.Helper()
	exist := make(map[string]bool)
	require.NoError(t, filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				exist[f.Name.Name] = true
			}
		}
		return nil
	}))
	return exist
}
