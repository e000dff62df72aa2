//go:build !goexperiment.jsonv2

package main

const jsonEngine = "encoding/json, the engine up to Go 1.26 (since Go 1.27 with GOEXPERIMENT=nojsonv2)"
