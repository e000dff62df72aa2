package main

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestShapes_SameDataEachTimeInTheSizeAsked(t *testing.T) {
	for _, shape := range shapes {
		for _, size := range []int{128, 1 << 10, 16 << 10, 1 << 20} {
			made, again := shape.newMessage(size), shape.newMessage(size)
			require.True(t, reflect.DeepEqual(made, again))
			data, err := json.Marshal(made)
			require.NoError(t, err)
			require.InDelta(t, size, len(data), max(100, float64(size)/100), "%s, %d", shape, size)

			var decoded Message
			require.NoError(t, json.Unmarshal(data, &decoded))
			require.True(t, reflect.DeepEqual(made, decoded), "%s, %d", shape, size)
			require.NoError(t, checkAnswer(&made, &decoded))
		}
	}
}

func TestText_IsOnTheWireAsInTheTablesBeforeTheShapes(t *testing.T) {
	data, err := json.Marshal(text.newMessage(40))
	require.NoError(t, err)
	require.Equal(t, `{"seq":0,"data":"abcdefghijklmnopqrstuvwxyz0123456789abcd"}`, string(data))
}

func TestRows_ShortMembersOfEveryKind(t *testing.T) {
	rows := newRows(1 << 20)
	require.InDelta(t, rowSize, jsonSize(rows)/len(rows), 20)
	var c census
	members := map[int]int{}
	for _, row := range decodeNumbers(t, rows).([]any) {
		c.add(row, 0)
		members[len(row.(map[string]any))]++
	}
	for n := 8; n <= 12; n++ {
		require.Greater(t, members[n], len(rows)/100, "%d members", n)
	}
	require.Len(t, members, 5)
	for _, kind := range []string{"integer", "fraction", "bool", "null", "string", "object", "array"} {
		require.Greater(t, c.share(kind), 0.03, kind)
		require.Less(t, c.share(kind), 0.35, kind)
	}
	require.InDelta(t, 1.0/3, c.shareOfSpecials(), 0.02)
	require.Less(t, c.longest, 60)
	require.Equal(t, 2, c.depth)

	short := decodeNumbers(t, newRows(128)).([]any)
	require.Len(t, short, 1)
	require.Len(t, short[0], 8)
	c = census{}
	c.add(short, 0)
	require.Len(t, c.kinds, 7)
	require.Positive(t, c.specials)
}

func TestTree_DeepTo12LevelsWithLongKeys(t *testing.T) {
	for _, size := range []int{16 << 10, 1 << 20} {
		var c census
		c.add(decodeNumbers(t, newTree(size)), 0)
		require.Equal(t, treeDepth, c.depth)
		require.GreaterOrEqual(t, c.shortestKey, 20)
		for _, kind := range []string{"integer", "fraction", "bool", "null", "string", "object", "array"} {
			require.Greater(t, c.share(kind), 0.02, kind)
		}
		require.InDelta(t, 1.0/3, c.shareOfSpecials(), 0.1)
	}
}

// census counts the values in a value.
type census struct {
	kinds                                      map[string]int
	all, specials, depth, longest, shortestKey int
}

func (c *census) add(value any, level int) {
	kind := "null"
	switch v := value.(type) {
	case bool:
		kind = "bool"
	case json.Number:
		kind = "integer"
		if strings.ContainsAny(v.String(), ".e") {
			kind = "fraction"
		}
	case string:
		kind = "string"
		c.longest = max(c.longest, len(v))
		if strings.ContainsAny(v, "\"\n<&") || utf8.RuneCountInString(v) < len(v) {
			c.specials++
		}
	case []any:
		kind = "array"
		c.depth = max(c.depth, level+1)
		for _, element := range v {
			c.add(element, level+1)
		}
	case map[string]any:
		kind = "object"
		c.depth = max(c.depth, level+1)
		for name, member := range v {
			if c.shortestKey == 0 || len(name) < c.shortestKey {
				c.shortestKey = len(name)
			}
			c.add(member, level+1)
		}
	}
	if c.kinds == nil {
		c.kinds = map[string]int{}
	}
	c.kinds[kind]++
	c.all++
}

func (c *census) share(kind string) float64 { return float64(c.kinds[kind]) / float64(c.all) }

func (c *census) shareOfSpecials() float64 { return float64(c.specials) / float64(c.kinds["string"]) }

// decodeNumbers returns the value as its JSON has it.
func decodeNumbers(t *testing.T, value any) any {
	data, err := json.Marshal(value)
	require.NoError(t, err)
	d := json.NewDecoder(strings.NewReader(string(data)))
	d.UseNumber()
	var decoded any
	require.NoError(t, d.Decode(&decoded))
	return decoded
}

// A member that is not compared would let a wrong answer pass.
func TestCheckAnswer_SeesAChangeInAnyMember(t *testing.T) {
	args := rows.newMessage(1 << 10)
	at := slices.IndexFunc(args.Rows, func(r Row) bool { return r.Parent != nil })
	require.GreaterOrEqual(t, at, 0)
	for i := range reflect.TypeFor[Row]().NumField() {
		changed := rows.newMessage(1 << 10)
		change(t, reflect.ValueOf(&changed.Rows[at]).Elem().Field(i))
		require.ErrorContains(t, checkAnswer(&args, &changed), "other data", "%s", reflect.TypeFor[Row]().Field(i).Name)
	}
	for _, parent := range []*int64{nil, new(int64)} {
		changed := rows.newMessage(1 << 10)
		changed.Rows[at].Parent = parent
		require.Error(t, checkAnswer(&args, &changed))
		require.Error(t, checkAnswer(&changed, &args))
	}
	fewer := Message{Rows: args.Rows[1:]}
	require.Error(t, checkAnswer(&args, &fewer))

	of := func(tree string) *Message {
		m := &Message{}
		require.NoError(t, json.Unmarshal([]byte(tree), &m.Tree))
		return m
	}
	const whole = `{"a":[1,"x",true,null,{"b":{}}],"c":"d"}`
	require.NoError(t, checkAnswer(of(whole), of(whole)))
	for _, other := range []string{
		`{"a":[2,"x",true,null,{"b":{}}],"c":"d"}`,
		`{"a":[1,"y",true,null,{"b":{}}],"c":"d"}`,
		`{"a":[1,"x",false,null,{"b":{}}],"c":"d"}`,
		`{"a":[1,"x",true,0,{"b":{}}],"c":"d"}`,
		`{"a":[1,"x",true,null,{"b":[]}],"c":"d"}`,
		`{"a":[1,"x",true,null,{"b":null}],"c":"d"}`,
		`{"a":[1,"x",true,null,{"e":{}}],"c":"d"}`,
		`{"a":[1,"x",true,null],"c":"d"}`,
		`{"a":[1,"x",true,null,{"b":{}}]}`,
		`null`,
	} {
		require.Error(t, checkAnswer(of(whole), of(other)), other)
		require.Error(t, checkAnswer(of(other), of(whole)), other)
	}
}

// change gives the field another value.
func change(t *testing.T, field reflect.Value) {
	switch field.Kind() {
	case reflect.Int64:
		field.SetInt(field.Int() + 1)
	case reflect.Float64:
		field.SetFloat(field.Float() + 0.25)
	case reflect.Bool:
		field.SetBool(!field.Bool())
	case reflect.String:
		field.SetString(field.String() + "x")
	case reflect.Pointer:
		change(t, field.Elem())
	case reflect.Slice:
		change(t, field.Index(0))
	case reflect.Struct:
		change(t, field.Field(field.NumField()-1))
	default:
		require.Fail(t, fmt.Sprintf("no way to change a %s", field.Kind()))
	}
}
