//go:build goexperiment.jsonv2

package main

const jsonEngine = "encoding/json, the engine since Go 1.27 (in Go 1.26 with GOEXPERIMENT=jsonv2)"
