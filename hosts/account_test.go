package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// What must not be is found, and told apart from what may be.
func TestAccount_FindsWhatIsLostAndWhatIsHandledTwice(t *testing.T) {
	sent := func(id string) event { return event{Kind: "sent", ID: id, Via: "http"} }
	end := func(id, outcome string) event { return event{Kind: "end", ID: id, Outcome: outcome, Millis: 5} }
	hook := func(id string) event { return event{Kind: "hook", ID: id} }
	for _, c := range []struct {
		name    string
		killed  bool
		events  []event
		handled map[string]int
		want    tally
		failed  bool
	}{
		{name: "answered", events: []event{sent("a"), hook("a"), end("a", answered)}, handled: map[string]int{"a": 1},
			want: tally{requests: 1, responses: 1}},
		{name: "answered by nobody", events: []event{sent("a"), end("a", answered)}, want: tally{requests: 1, wrongAnswer: 1}, failed: true},
		{name: "with a stream", events: []event{sent("a"), {Kind: "end", ID: "a", Outcome: answered, Stream: true}}, handled: map[string]int{"a": 1},
			want: tally{requests: 1, responses: 1, streams: 1}},
		{name: "timed out", events: []event{sent("a"), end("a", timedOut)}, want: tally{requests: 1, timeouts: 1}},
		{name: "late response", events: []event{sent("a"), end("a", timedOut), hook("a")}, want: tally{requests: 1, timeouts: 1}},
		{name: "send error", events: []event{sent("a"), end("a", "nobody listens")}, want: tally{requests: 1, failed: 1}},
		{name: "lost", events: []event{sent("a")}, handled: map[string]int{"a": 1}, want: tally{requests: 1, lost: 1}, failed: true},
		{name: "stream lost", events: []event{sent("a"), end("a", silentStream)}, want: tally{requests: 1, lost: 1}, failed: true},
		{name: "killed", killed: true, events: []event{sent("a")}, want: tally{requests: 1, abandoned: 1}},
		{name: "provided twice", events: []event{sent("a"), end("a", answered)}, handled: map[string]int{"a": 2},
			want: tally{requests: 1, responses: 1, twice: 1}, failed: true},
		{name: "hook told twice", events: []event{sent("a"), hook("a"), hook("a"), end("a", answered)}, handled: map[string]int{"a": 1},
			want: tally{requests: 1, responses: 1, twice: 1}, failed: true},
		{name: "ended twice", events: []event{sent("a"), end("a", timedOut), end("a", answered)},
			want: tally{requests: 1, timeouts: 1, twice: 1}, failed: true},
		{name: "wrong answer", events: []event{sent("a"), end("a", wrong)}, want: tally{requests: 1, wrongAnswer: 1}, failed: true},
		{name: "over NATS", events: []event{{Kind: "sent", ID: "a", Via: "nats"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := account("phase", "http", []record{{killed: c.killed, events: c.events}}, c.handled)
			require.Equal(t, c.failed, got.err() != nil, "%v", got.err())
			got.name, got.kinds, got.millis = "", nil, nil
			require.Equal(t, c.want, *got)
		})
	}
}

// The last line of a killed requester may be half of one.
func TestReadRecord_KeepsWhatIsBeforeAHalfLine(t *testing.T) {
	events, err := readRecord(strings.NewReader("{\"kind\":\"sent\",\"id\":\"a\"}\n{\"kind\":\"en"))
	require.Error(t, err)
	require.Equal(t, []event{{Kind: "sent", ID: "a"}}, events)
}

func TestErrorKind(t *testing.T) {
	for want, err := range map[string]error{
		"host unreachable": fmt.Errorf("send: %w", &os.SyscallError{Syscall: "connect", Err: syscall.EHOSTUNREACH}),
		"cut off":          fmt.Errorf("stream: %w", io.ErrUnexpectedEOF),
		"took too long":    fmt.Errorf("send: %w", os.ErrDeadlineExceeded),
		"refused: no":      fmt.Errorf("no"),
	} {
		require.Equal(t, want, errorKind(err))
	}
}

func TestPrintTable(t *testing.T) {
	out := &strings.Builder{}
	require.NoError(t, printTable(out, []*tally{{
		name: "calm", requests: 3, responses: 1, failed: 2, kinds: map[string]int{"cut off": 2}, millis: []float64{1, 2, 9},
	}}))
	require.Contains(t, out.String(), "2.0 ms")
	require.Contains(t, out.String(), "calm: 2 cut off")
}

// A source is the same bytes however it is read, and digest knows them.
func TestSource_IsKnownByItsDigest(t *testing.T) {
	one, err := io.ReadAll(newSource("a", 40000, 0))
	require.NoError(t, err)
	require.Len(t, one, 40000)
	two, err := io.ReadAll(slowly{newSource("a", 40000, 0)})
	require.NoError(t, err)
	require.Equal(t, one, two)
	require.NotEqual(t, digest("a", 40000), digest("b", 40000))
}

// slowly reads a few bytes at a time.
type slowly struct{ io.Reader }

func (r slowly) Read(p []byte) (int, error) { return r.Reader.Read(p[:min(len(p), 7)]) }
