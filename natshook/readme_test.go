package natshook_test

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// readmePrograms are the blocks of Go in the README.
func readmePrograms(t *testing.T) (programs []string) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	for _, block := range strings.Split(string(readme), "```go\n")[1:] {
		program, _, ended := strings.Cut(block, "\n```\n")
		require.True(t, ended, block)
		programs = append(programs, program+"\n")
	}
	return programs
}

// bodyOf returns the source of a function's body, formatted.
func bodyOf(t *testing.T, source, name string) string {
	t.Helper()
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, "", source, parser.ParseComments)
	require.NoError(t, err)
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Name.Name == name {
			body, err := format.Source([]byte(source[files.Position(f.Body.Lbrace).Offset+1 : files.Position(f.Body.Rbrace).Offset]))
			require.NoError(t, err)
			return strings.TrimSpace(string(body))
		}
	}
	require.Fail(t, "no such function", name)
	return ""
}

// Hazard: who copies the first program of the README gets one that does not compile,
// or does something else than the README says.
func TestReadme_ProgramRunsAsWritten(t *testing.T) {
	programs := readmePrograms(t)
	require.NotEmpty(t, programs, "no program")
	program := programs[0]
	formatted, err := format.Source([]byte(program))
	require.NoError(t, err)
	require.Equal(t, string(formatted), program, "gofmt")

	example, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	body, output, found := strings.Cut(bodyOf(t, string(example), "Example"), "// Output: ")
	require.True(t, found)
	require.Equal(t, strings.TrimSpace(body), bodyOf(t, program, "main"), "the program is the example")

	path := filepath.Join(t.TempDir(), "readme.go")
	require.NoError(t, os.WriteFile(path, []byte(program), 0o600))
	cmd := exec.CommandContext(t.Context(), "go", "run", path)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(t, cmd.Run(), stderr.String())
	require.Equal(t, output+"\n", stdout.String())

	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	require.Contains(t, string(readme), "It prints `"+output+"`")
}
