package main

import (
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// The linker would not object to functions of the same names that do something
// else.
func TestScans_AreTheFunctionsOfTheLibrary(t *testing.T) {
	for _, test := range []struct {
		data                string
		isValue, marshalled bool
	}{
		{`{"a":[1,"x",null]}`, true, true},
		{`{"a": 1}`, true, false},
		{`"<"`, true, false},
		{`{"a":1`, false, false},
		{`1 2`, false, false},
	} {
		require.Equal(t, test.isValue, isValue([]byte(test.data)), "%q", test.data)
		require.Equal(t, test.marshalled, isMarshalled([]byte(test.data)), "%q", test.data)
	}
}

func TestScans_WrongAnswerFailsTheRun(t *testing.T) {
	real := scans
	t.Cleanup(func() { scans = real })
	o := options{runner: quick(1), columns: columns[:1], out: io.Discard}
	for err, take := range map[string]func([]byte) bool{
		"refuses a valid value":         func([]byte) bool { return false },
		"takes a value that is cut off": func([]byte) bool { return true },
	} {
		scans = slices.Clone(real)
		scans[1].take = take
		require.ErrorContains(t, runJSON(o), scans[1].title+" "+err)
	}
}
