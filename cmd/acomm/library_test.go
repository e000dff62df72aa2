package main

import (
	"errors"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Hazard: the library changes, and what library.go repeats of it does not.
func TestLibrary_TableNamesWhatIsThere(t *testing.T) {
	text, err := os.ReadFile("library.go")
	require.NoError(t, err)
	rows := regexp.MustCompile(`(?m)^//\t(\S+) +(\S.*?) {2,}(\S+\.go)$`).FindAllStringSubmatch(string(text), -1)
	ours, listed := declarations(t, "library.go"), map[string]bool{}
	constants := 0
	for _, row := range rows {
		here, file := row[1], filepath.Join("../..", row[3])
		require.Contains(t, ours, here)
		listed[here] = true
		theirs := declarations(t, file)
		for follows := range strings.SplitSeq(row[2], ", ") {
			require.Contains(t, theirs, follows, file)
			if value := theirs[follows]; value != "" {
				constants++
				require.Equal(t, value, ours[here], follows)
			}
		}
	}
	require.Equal(t, 9, constants)
	for name, value := range ours { // leaveTimeout is our own
		require.True(t, value == "" || listed[name] || name == "leaveTimeout", name)
	}
}

// declarations are the names at the top of a file, TYPE.NAME of a method; constants with
// their value, as it is written.
func declarations(t *testing.T, file string) map[string]string {
	t.Helper()
	fset := token.NewFileSet()
	parsed, err := parser.ParseFile(fset, file, nil, parser.SkipObjectResolution)
	require.NoError(t, err)
	names := map[string]string{}
	for _, decl := range parsed.Decls {
		switch decl := decl.(type) {
		case *ast.FuncDecl:
			name := decl.Name.Name
			if decl.Recv != nil {
				receiver := decl.Recv.List[0].Type
				if pointer, ok := receiver.(*ast.StarExpr); ok {
					receiver = pointer.X
				}
				name = receiver.(*ast.Ident).Name + "." + name
			}
			names[name] = ""
		case *ast.GenDecl:
			for _, spec := range decl.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					names[spec.Name.Name] = ""
				case *ast.ValueSpec:
					for i, name := range spec.Names {
						var value strings.Builder
						if decl.Tok == token.CONST && i < len(spec.Values) {
							require.NoError(t, format.Node(&value, fset, spec.Values[i]))
						}
						names[name.Name] = value.String()
					}
				}
			}
		}
	}
	return names
}

func TestMovement_EndsWhenItStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, began := newMovement(), time.Now()
		ended := make(chan bool)
		go func() { ended <- m.ends(nil, nil) }()
		for range 10 { // as long as it moves
			time.Sleep(streamStall - time.Nanosecond)
			m.touch()
		}
		require.False(t, <-ended)
		require.Equal(t, 11*streamStall-10*time.Nanosecond, time.Since(began))
		require.False(t, m.ends(nil, nil), "at once: it has not moved for long")
		require.Equal(t, 11*streamStall-10*time.Nanosecond, time.Since(began))

		closed := make(chan struct{})
		close(closed)
		m.touch()
		require.True(t, m.ends(closed, nil))
		require.False(t, m.ends(nil, closed))
	})
}

func TestIsSubject(t *testing.T) {
	for _, subject := range []string{"tasks", "a.b"} {
		require.True(t, isSubject(subject), subject)
	}
	for _, subject := range []string{"", ".", "a.", "a..b", "a b", "a.*", ">"} {
		require.False(t, isSubject(subject), subject)
	}
}

// The two below repeat what the library's tests, and the library, have for themselves:
// shortDir of main_test.go, dialUnix of socket.go.

// shortDir is a directory whose path leaves room for the names of sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "a-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// acommDial connects to the socket; where its backlog is full, again.
func acommDial(path string) (net.Conn, error) {
	for {
		conn, err := net.DialTimeout("unix", path, patience)
		if !errors.Is(err, syscall.EAGAIN) {
			if err == nil {
				err = conn.SetDeadline(time.Now().Add(patience))
			}
			return conn, err
		}
		runtime.Gosched()
	}
}
