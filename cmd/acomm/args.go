package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"
)

// parseArgs makes JSON of the arguments of a call, in any of their forms.
func parseArgs(words []string, stdin io.Reader) (json.RawMessage, error) {
	if len(words) == 0 {
		return json.RawMessage("null"), nil
	}
	for _, word := range words {
		if isFile := len(words) == 1 && strings.HasPrefix(word, "@"); !isFile && !utf8.ValidString(word) {
			return nil, fmt.Errorf("ARGS: %q is not UTF-8: JSON must be UTF-8", word)
		}
	}
	first := words[0]
	if len(words) == 1 {
		switch {
		case first == "-":
			return readArgs("standard input", stdin)
		case strings.HasPrefix(first, "@"):
			f, err := os.Open(first[1:])
			if err != nil {
				return nil, fmt.Errorf("ARGS: %w", err)
			}
			defer f.Close()
			return readArgs(first[1:], f)
		case json.Valid([]byte(first)):
			return json.RawMessage(first), nil
		}
	}
	return parsePairs(words)
}

// readArgs reads JSON from a file that has the name.
func readArgs(name string, r io.Reader) (json.RawMessage, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxPayload+1))
	if err != nil {
		return nil, fmt.Errorf("ARGS: %w", err)
	}
	if len(data) > maxPayload {
		return nil, fmt.Errorf("ARGS: %s is larger than 64 MiB, the limit of a message", name)
	}
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("ARGS: %s is not UTF-8: JSON must be UTF-8", name)
	}
	if err := json.Unmarshal(data, new(json.RawMessage)); err != nil {
		return nil, fmt.Errorf("ARGS: %s is not JSON: %w", name, err)
	}
	return data, nil
}

// parsePairs makes an object of words of the form key=value, in their order.
func parsePairs(words []string) (json.RawMessage, error) {
	var object bytes.Buffer
	seen := make(map[string]bool, len(words))
	for i, word := range words {
		key, value, ok := strings.Cut(word, "=")
		switch {
		case !ok && len(words) == 1:
			return nil, fmt.Errorf("ARGS: %q is neither JSON nor @file, - or key=value", word)
		case !ok:
			return nil, fmt.Errorf("ARGS: %q is not key=value", word)
		case key == "":
			return nil, fmt.Errorf("ARGS: %q has no key", word)
		case seen[key]:
			return nil, fmt.Errorf("ARGS: the key %q is given twice", key)
		}
		seen[key] = true
		name, err := json.Marshal(key)
		if err != nil {
			return nil, err
		}
		data := []byte(value)
		if !json.Valid(data) {
			if data, err = json.Marshal(value); err != nil {
				return nil, err
			}
		}
		if i == 0 {
			object.WriteByte('{')
		} else {
			object.WriteByte(',')
		}
		fmt.Fprintf(&object, "%s:%s", name, data)
	}
	object.WriteByte('}')
	return object.Bytes(), nil
}
