package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// shape is the kind of data a call carries.
type shape int

const (
	text shape = iota // one long string that needs no escapes
	rows              // a list of records, decoded into structs
	tree              // a nested configuration, decoded into any
)

var shapes = []shape{text, rows, tree}

func (s shape) String() string { return [...]string{"text", "rows", "tree"}[s] }

// parseShapes reads a list such as text,rows.
func parseShapes(list string) ([]shape, error) {
	var parsed []shape
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(shapes, func(s shape) bool { return s.String() == name })
		if i < 0 {
			return nil, fmt.Errorf("no shape is called %q", name)
		}
		parsed = append(parsed, shapes[i])
	}
	return parsed, nil
}

// newMessage returns a message whose data takes about size bytes of JSON. It is
// the same for each call with the same size.
func (s shape) newMessage(size int) Message {
	switch s {
	case rows:
		return Message{Rows: newRows(size)}
	case tree:
		return Message{Tree: newTree(size)}
	}
	return Message{Data: newText(size)}
}

// newText returns a string no byte of which is escaped in JSON.
func newText(size int) string {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	return strings.Repeat(alphabet, size/len(alphabet)+1)[:size]
}

// dataMaker draws what rows and trees are made of.
type dataMaker struct{ *rand.Rand }

// newDataMaker returns one that always draws the same.
func newDataMaker() dataMaker { return dataMaker{rand.New(rand.NewPCG(11, 2016))} }

var (
	words = strings.Fields("access address amber anchor backup border buffer cable cache channel cluster " +
		"copper default depth engine expiry factor filter garden handler harbour interval kettle ladder " +
		"limit listener maximum memory minimum network output policy primary queue region retry river " +
		"schedule session silver socket storage target timeout upstream valley window winter worker")
	specials = []string{`"new"`, "first\nsecond", "a < b", "x & y", "Zoë", "Łódź", "Жанна", "東京", "naïve", "größer", "🚲"}
)

// word returns one of the words.
func (d dataMaker) word() string { return words[d.IntN(len(words))] }

// text returns a short string. One in three has an escape or letters that are not
// ASCII.
func (d dataMaker) text() string {
	s := d.word()
	if d.IntN(2) == 0 {
		s += " " + d.word()
	}
	if d.IntN(3) == 0 {
		s += " " + specials[d.IntN(len(specials))]
	}
	return s
}

// fraction returns a number below limit with up to so many decimals.
func (d dataMaker) fraction(limit, decimals int) float64 {
	scale := 1
	for range decimals {
		scale *= 10
	}
	return float64(d.IntN(limit*scale)) / float64(scale)
}

// jsonSize returns the number of bytes of the value as JSON.
func jsonSize(value any) int {
	data, err := json.Marshal(value)
	if err != nil {
		panic(err) // all that is made here can be marshalled
	}
	return len(data)
}
