package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"unicode/utf8"
)

// largestSample is the size up to which a file is read several times, if there
// is a choice.
const largestSample = 256 << 20

// input is what the demo works on.
type input struct {
	root   string // absolute, without symbolic links
	files  []file // the regular files at or below it
	size   int64  // of all files
	sample file   // one of them, which can be read

	unreadable int // directories
	irregular  int // symbolic links, sockets, pipes and devices
	unnamable  int // files whose path JSON can't carry
}

type file struct {
	name string // below the root
	path string
	size int64
}

// readInput finds the files at or below target.
func readInput(target string) (*input, error) {
	root, err := filepath.Abs(target)
	if err == nil && target == "" {
		err = errors.New("the name of the file or directory is empty")
	}
	if err == nil {
		root, err = filepath.EvalSymlinks(root)
	}
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is neither a file nor a directory", target)
	}
	in := &input{root: root}
	if err := filepath.WalkDir(root, in.visit); err != nil {
		return nil, err
	}
	if len(in.files) == 0 {
		return nil, fmt.Errorf("there is no file to work on in %q", target)
	}
	return in, in.chooseSample()
}

// visit is called for everything at or below the root.
func (in *input) visit(path string, d fs.DirEntry, err error) error {
	switch {
	case err != nil && path == in.root:
		return err
	case err != nil: // a directory that can't be listed
		in.unreadable++
		return nil
	case d.IsDir() && d.Name() == ".git" && path != in.root:
		return fs.SkipDir
	case d.IsDir():
		return nil
	case !d.Type().IsRegular():
		in.irregular++
		return nil
	case !utf8.ValidString(path):
		in.unnamable++
		return nil
	}
	info, err := d.Info()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed in the meantime
	}
	if err != nil {
		return err
	}
	name, err := filepath.Rel(in.root, path)
	if err != nil || name == "." {
		name = filepath.Base(path)
	}
	in.files = append(in.files, file{name: name, path: path, size: info.Size()})
	in.size += info.Size()
	return nil
}

// chooseSample takes the largest file that can be read, but one of those over
// largestSample only if there is no other, and then the smallest.
func (in *input) chooseSample() error {
	rank := func(f file) int64 { // smaller is better
		if f.size > largestSample {
			return f.size
		}
		return largestSample - f.size
	}
	byRank := slices.Clone(in.files)
	slices.SortStableFunc(byRank, func(a, b file) int { return cmp.Compare(rank(a), rank(b)) })
	var first error
	for _, candidate := range byRank {
		f, err := os.Open(candidate.path)
		if err == nil {
			in.sample = candidate
			return f.Close()
		}
		if first == nil {
			first = err
		}
	}
	return fmt.Errorf("there is no file that can be read: %w", first)
}

// findModule returns the directory of the acomm module's sources, which the
// current directory is in.
func findModule() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.Contains(mod, []byte("module github.com/mistifyio/acomm\n")) {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("name a file or directory: the current directory is not in the acomm module")
		}
		dir = parent
	}
}
