package main

import (
	"slices"
	"strings"
)

const (
	treeDepth  = 12 // objects and arrays in each other, where there is room for them
	memberSize = 45 // bytes of JSON of a member with a plain value, on average
)

// newTree returns a configuration that takes about size bytes of JSON, in the
// types that decoding into any gives. It is an object of sections, each of which
// goes down to the full depth; what room is left has members with plain values.
func newTree(size int) any {
	d := newDataMaker()
	root := map[string]any{}
	rest := size
	for {
		section := d.container(2)
		bytes := jsonSize(section)
		if bytes+memberSize > rest {
			break
		}
		rest -= bytes + d.addMember(root, section)
	}
	for rest > memberSize/2 {
		value := d.plain()
		rest -= jsonSize(value) + d.addMember(root, value)
	}
	return root
}

// container returns an object or an array for this level, which has others down to
// the full depth.
func (d dataMaker) container(level int) any {
	var values []any
	for range 2 + d.IntN(3) {
		values = append(values, d.plain())
	}
	if level < treeDepth {
		values = append(values, d.container(level+1))
		if d.IntN(3) == 0 {
			values = append(values, d.container(treeDepth)) // has no others
		}
	}
	if d.IntN(3) == 0 {
		return values
	}
	object := map[string]any{}
	for _, value := range values {
		d.addMember(object, value)
	}
	return object
}

// addMember adds the value with a long name that is not in use, and returns the
// bytes of JSON that this takes beyond the value.
func (d dataMaker) addMember(object map[string]any, value any) int {
	name := d.word()
	for _, taken := object[name]; len(name) < 20 || taken; _, taken = object[name] {
		word := d.word()
		name += strings.ToUpper(word[:1]) + word[1:]
	}
	object[name] = value
	return len(`"":,`) + len(name)
}

// plain returns a value that holds no others.
func (d dataMaker) plain() any {
	switch d.IntN(8) {
	case 0:
		return nil
	case 1:
		return d.IntN(2) == 0
	case 2:
		return d.fraction(100, 3)
	case 3, 4:
		return float64(d.IntN(100_000))
	}
	return d.text()
}

// equalTree compares values of the types that decoding into any gives. It takes a
// quarter of what decoding takes; reflect.DeepEqual takes more than decoding.
func equalTree(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		if !ok || len(a) != len(b) {
			return false
		}
		for name, value := range a {
			other, ok := b[name]
			if !ok || !equalTree(value, other) {
				return false
			}
		}
		return true
	case []any:
		b, ok := b.([]any)
		return ok && slices.EqualFunc(a, b, equalTree)
	}
	return a == b
}
