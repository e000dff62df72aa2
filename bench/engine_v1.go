//go:build !goexperiment.jsonv2

package main

const jsonEngine = "encoding/json (v1)"
