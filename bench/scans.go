package main

import _ "unsafe" // for go:linkname

// acomm scans through the arguments and results that it sends and receives. These
// are its own functions for that, reached through the linker: what acomm exports
// is fixed, and a benchmark is no reason to add to it. A function that has another
// name there fails the link, and one that does something else
// TestScans_AreTheFunctionsOfTheLibrary. The empty scans.s has the compiler accept
// functions without a body.

// isValue reports whether data is one valid JSON value: it is asked about what was
// received. The value is not empty.
//
//go:linkname isValue github.com/mistifyio/acomm.isValue
func isValue(data []byte) bool

// isMarshalled reports whether data is valid and json.Marshal would change nothing
// in it: it is asked about what is to be sent.
//
//go:linkname isMarshalled github.com/mistifyio/acomm.isMarshalled
func isMarshalled(data []byte) bool
