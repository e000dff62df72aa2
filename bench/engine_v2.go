//go:build goexperiment.jsonv2

package main

const jsonEngine = "encoding/json on v2 (GOEXPERIMENT=jsonv2)"
