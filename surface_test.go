package acomm_test

import (
	"bytes"
	"go/ast"
	"go/doc"
	"go/format"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSurface_IsTheDocumentedOne holds everything the package exports against
// the documentation: names, signatures, receivers, struct fields, tags.
func TestSurface_IsTheDocumentedOne(t *testing.T) {
	documented := documentedSurface(readDocumentation(t))
	require.Len(t, documented, 43, "declarations found in the documentation")
	require.Empty(t, diffSurface(documented, exportedSurface(t, readPackage(t))))
}

// TestSurface_EveryChangeOfTheSourceIsSeen changes the package, in memory, in
// every way that users would notice.
func TestSurface_EveryChangeOfTheSourceIsSeen(t *testing.T) {
	const head = "package acomm\n"
	for name, change := range map[string]struct {
		add      string // a further file
		old, new string // a regular expression, replaced once in all files
	}{
		"function added":         {add: "func Extra() {}"},
		"method added":           {add: "func (t *Tracker) Extra() {}"},
		"type added":             {add: "type Extra int"},
		"alias added":            {add: "type Extra = Tracker"},
		"interface added":        {add: "type Extra interface{ Extra() }"},
		"constructor added":      {add: "func ExtraTracker() *Tracker { return nil }"},
		"constant added":         {add: "const Extra = 1"},
		"constant among others":  {add: "const (\n\textra = iota\n\tExtra\n)"},
		"constant of a type":     {add: "const Extra ResponseHandler = nil"},
		"variable added":         {add: "var extra, Extra int"},
		"error value added":      {add: `var ErrExtra = errors.New("extra")`},
		"function removed":       {old: `func Stream\(`, new: "func stream("},
		"method removed":         {old: `\) NumRequests\(`, new: ") numRequests("},
		"type removed":           {old: `type ResponseHandler func`, new: "type responseHandler func"},
		"function renamed":       {old: `func NewResponse\(`, new: "func MakeResponse("},
		"parameter renamed":      {old: `func Send\(addr `, new: "func Send(dest "},
		"parameter's type":       {old: `\) Stop\(timeout time\.Duration`, new: ") Stop(timeout int64"},
		"parameter added":        {old: `\) NextConn\(`, new: ") NextConn(ctx context.Context"},
		"parameter is any":       {old: `(func Send\(addr \*url\.URL, payload) interface\{\}`, new: "$1 any"},
		"parameters grouped":     {old: `sh ResponseHandler, eh ResponseHandler`, new: "sh, eh ResponseHandler"},
		"variadic":               {old: `(func NewMultiRequest\(tracker \*Tracker, timeout) `, new: "$1 ..."},
		"result added":           {old: `(\) DoneConn\(conn net\.Conn\))`, new: "$1 error"},
		"result removed":         {old: `(\) RemoveRequest\(req \*Request\)) bool`, new: "$1"},
		"result named":           {old: `(\) Validate\(\)) error`, new: "$1 (err error)"},
		"receiver by value":      {old: `func \(r \*Response\) MarshalJSON`, new: "func (r Response) MarshalJSON"},
		"receiver renamed":       {old: `func \(t \*Tracker\) URL`, new: "func (tr *Tracker) URL"},
		"method became function": {old: `func \(t \*Tracker\) URL\(`, new: "func URL("},
		"field added":            {old: `(type Request struct \{\n)`, new: "${1}\tExtra int\n"},
		"field beside another":   {old: `(?m)^\tTask `, new: "\tTask, Extra "},
		"field in an opaque one": {old: `(type Tracker struct \{\n)`, new: "${1}\tExtra int\n"},
		"field removed":          {old: `(?m)^\tArgs .*\n`, new: ""},
		"field renamed":          {old: `(?m)^\tStreamURL( .*\n)`, new: "\tStreamAddr$1"},
		"field's type":           {old: `(?m)^\tError +error`, new: "\tError string"},
		"fields in other order":  {old: "(?m)^(\tID .*\n)(\tTask .*\n)", new: "$2$1"},
		"tag changed":            {old: "(?m)^(\tResponseHook +\\*url.URL +.json:\")responsehook", new: "${1}response_hook"},
		"tag removed":            {old: "(?m)^(\tTask +string) .*$", new: "$1"},
		"type embedded":          {old: `(type UnixListener struct \{\n)`, new: "${1}\tsync.Mutex\n"},
		"methods embedded":       {old: `(type Tracker struct \{\n)`, new: "${1}\textra\n", add: "type extra struct{}\n\nfunc (extra) Extra() {}"},
		"type became another":    {old: `(type ResponseHandler) func.*`, new: "$1 interface{ Handle(*Request, *Response) }"},
		"struct became generic":  {old: `type MultiRequest struct \{`, new: "type MultiRequest[T any] struct {"},
		"type became an alias":   {old: `type ResponseHandler func`, new: "type ResponseHandler = func"},
		"handler's type":         {old: `type ResponseHandler func\(\*Request, `, new: "type ResponseHandler func(Request, "},
	} {
		t.Run(name, func(t *testing.T) {
			files := readPackage(t)
			if change.add != "" {
				files["extra.go"] = head + change.add
			}
			if change.old != "" {
				replaceOnce(t, files, change.old, change.new)
			}
			require.NotEmpty(t, diffSurface(documentedSurface(readDocumentation(t)), exportedSurface(t, files)))
		})
	}
}

// TestSurface_WhatUsersCantSeeIsFree is the other half: the package's own
// affairs are no change of the surface.
func TestSurface_WhatUsersCantSeeIsFree(t *testing.T) {
	for name, add := range map[string]string{
		"function":                  "func extra() {}",
		"method":                    "func (t *Tracker) extra() {}",
		"type with a method":        "type extra struct{ Extra int }\n\nfunc (extra) Extra2() {}",
		"constant, variable":        "const extra = 1\n\nvar extra2 int",
		"something inside function": "func extra() { type Extra struct{}; const Extra2 = 1 }",
	} {
		t.Run(name, func(t *testing.T) {
			files := readPackage(t)
			files["extra.go"] = "package acomm\n" + add
			require.Empty(t, diffSurface(documentedSurface(readDocumentation(t)), exportedSurface(t, files)))
		})
	}
	t.Run("field", func(t *testing.T) {
		files := readPackage(t)
		replaceOnce(t, files, `(type Request struct \{\n)`, "${1}\textra int // not exported\n\n")
		require.Empty(t, diffSurface(documentedSurface(readDocumentation(t)), exportedSurface(t, files)))
	})
}

// TestSurface_EveryLineOfTheDocumentationCounts removes and alters the lines of
// the documentation that declare something, one at a time.
func TestSurface_EveryLineOfTheDocumentationCounts(t *testing.T) {
	lines := strings.Split(readDocumentation(t), "\n")
	exported := exportedSurface(t, readPackage(t))
	declaration := regexp.MustCompile("^(func |type )|`json:")
	var seen int
	for i, line := range lines {
		if !declaration.MatchString(line) {
			continue
		}
		seen++
		without := slices.Delete(slices.Clone(lines), i, i+1)
		require.NotEmpty(t, diffSurface(documentedSurface(strings.Join(without, "\n")), exported), "without: %s", line)
		altered := slices.Clone(lines)
		altered[i] = strings.Replace(line, " ", " X", 1)
		require.NotEmpty(t, diffSurface(documentedSurface(strings.Join(altered, "\n")), exported), "altered: %s", line)
	}
	require.Equal(t, 43+10, seen)
}

// readDocumentation returns the documented API.
func readDocumentation(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "documented-api.txt"))
	require.NoError(t, err)
	return string(text)
}

// readPackage returns the package's source files, whatever system they are for,
// by name.
func readPackage(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("*.go")
	require.NoError(t, err)
	files := make(map[string]string)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		files[name] = string(text)
	}
	require.NotEmpty(t, files)
	return files
}

// replaceOnce replaces the first match in the files and fails if there is none.
func replaceOnce(t *testing.T, files map[string]string, expr, replacement string) {
	t.Helper()
	re := regexp.MustCompile(expr)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		at := re.FindStringSubmatchIndex(files[name])
		if at == nil {
			continue
		}
		text := files[name]
		files[name] = text[:at[0]] + string(re.ExpandString(nil, replacement, text, at)) + text[at[1]:]
		require.NotEqual(t, text, files[name])
		return
	}
	require.FailNow(t, "nothing to replace", expr)
}

// documentedSurface returns the declarations in the documentation, each on one
// line, structs with their fields.
func documentedSurface(text string) []string {
	var surface []string
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		keyword, _, _ := strings.Cut(line, " ")
		if !slices.Contains([]string{"func", "type", "const", "var"}, keyword) {
			continue
		}
		if strings.HasSuffix(line, " struct {") {
			var fields []string
			for i++; i < len(lines) && lines[i] != "}"; i++ {
				fields = append(fields, lines[i])
			}
			line = structLine(strings.TrimSuffix(line, " {"), fields)
		}
		surface = append(surface, oneLine(line))
	}
	return surface
}

// exportedSurface returns the same of what go/doc shows of the source files.
func exportedSurface(t *testing.T, files map[string]string) []string {
	t.Helper()
	fset := token.NewFileSet()
	var parsed []*ast.File
	for _, name := range slices.Sorted(maps.Keys(files)) {
		file, err := parser.ParseFile(fset, name, files[name], parser.ParseComments|parser.SkipObjectResolution)
		require.NoError(t, err)
		parsed = append(parsed, file)
	}
	pkg, err := doc.NewFromFiles(fset, parsed, "github.com/mistifyio/acomm")
	require.NoError(t, err)

	p := surfacePrinter{t: t, fset: fset}
	p.values(pkg.Consts)
	p.values(pkg.Vars)
	p.funcs(pkg.Funcs)
	for _, typ := range pkg.Types {
		for _, spec := range typ.Decl.Specs {
			p.typeSpec(spec.(*ast.TypeSpec))
		}
		p.values(typ.Consts)
		p.values(typ.Vars)
		p.funcs(typ.Funcs)
		p.funcs(typ.Methods)
	}
	return p.surface
}

// surfacePrinter writes declarations as the documentation does.
type surfacePrinter struct {
	t       *testing.T
	fset    *token.FileSet
	surface []string
}

func (p *surfacePrinter) add(line string) { p.surface = append(p.surface, oneLine(line)) }

func (p *surfacePrinter) text(node any) string {
	p.t.Helper()
	var buf bytes.Buffer
	require.NoError(p.t, format.Node(&buf, p.fset, node))
	return buf.String()
}

func (p *surfacePrinter) values(values []*doc.Value) {
	for _, value := range values {
		for _, spec := range value.Decl.Specs {
			for _, name := range spec.(*ast.ValueSpec).Names {
				p.add(value.Decl.Tok.String() + " " + name.Name)
			}
		}
	}
}

func (p *surfacePrinter) funcs(funcs []*doc.Func) {
	for _, f := range funcs {
		p.add(p.text(&ast.FuncDecl{Recv: f.Decl.Recv, Name: f.Decl.Name, Type: f.Decl.Type}))
	}
}

func (p *surfacePrinter) typeSpec(spec *ast.TypeSpec) {
	bare := &ast.TypeSpec{Name: spec.Name, TypeParams: spec.TypeParams, Assign: spec.Assign, Type: spec.Type}
	structure, ok := spec.Type.(*ast.StructType)
	if !ok {
		p.add("type " + p.text(bare))
		return
	}
	bare.Type = ast.NewIdent("struct")
	var fields []string
	for _, field := range structure.Fields.List {
		line := p.text(field.Type)
		if field.Tag != nil {
			line += " " + field.Tag.Value
		}
		if len(field.Names) == 0 {
			fields = append(fields, line)
		}
		for _, name := range field.Names {
			fields = append(fields, name.Name+" "+line)
		}
	}
	p.add(structLine("type "+p.text(bare), fields))
}

func structLine(head string, fields []string) string {
	return head + " { " + strings.Join(fields, "; ") + " }"
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// diffSurface says what is in only one of the two, or more often in one.
func diffSurface(documented, exported []string) []string {
	count := make(map[string]int)
	for _, line := range documented {
		count[line]++
	}
	for _, line := range exported {
		count[line]--
	}
	var diff []string
	for _, line := range slices.Sorted(maps.Keys(count)) {
		switch n := count[line]; {
		case n > 0:
			diff = append(diff, "documented, not exported: "+line)
		case n < 0:
			diff = append(diff, "exported, not documented: "+line)
		}
	}
	return diff
}

// TestSource_TheBasicFilesKnowNothingOfSessions holds the walls between the files: plain
// frames, the envelope and the listener can be read without the engine of sessions.
func TestSource_TheBasicFilesKnowNothingOfSessions(t *testing.T) {
	parse := func(file string) *ast.File {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		return f
	}
	files, err := filepath.Glob("session*.go")
	require.NoError(t, err)
	engine := make(map[string]string)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, decl := range parse(file).Decls {
			for _, name := range declaredBy(decl) {
				engine[name] = file
			}
		}
	}
	for _, name := range []string{"session", "sessions", "frameMessage", "openSession", "calls", "exchanges", "maxMessage"} {
		require.Contains(t, engine, name)
	}
	for _, file := range []string{"frame.go", "codec.go", "unix_listener.go"} {
		var check func(ast.Node) bool
		check = func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr: // what is selected is a field or method
				ast.Inspect(n.X, check)
				return false
			case *ast.Ident:
				require.NotContains(t, engine, n.Name, file)
			}
			return true
		}
		ast.Inspect(parse(file), check)
	}
}

// declaredBy returns the names that a declaration adds to the package.
func declaredBy(decl ast.Decl) (names []string) {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil {
			names = append(names, d.Name.Name)
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				names = append(names, s.Name.Name)
			case *ast.ValueSpec:
				for _, name := range s.Names {
					names = append(names, name.Name)
				}
			}
		}
	}
	return names
}
