package main

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// quick is a runner of turns of a few calls.
func quick(calls int64) runner {
	return runner{benchtime: time.Minute, rounds: 1, patience: time.Minute, maxCalls: calls}
}

func TestCandidates_AnswerEveryCall(t *testing.T) {
	for _, c := range candidates {
		for _, shape := range shapes {
			t.Run(c.name+"/"+shape.String(), func(t *testing.T) {
				large := 1 << 20
				if shape != text {
					large = 64 << 10 // takes long to make and decode with the race detector
				}
				for column, calls := range map[column]int64{{0, 1}: 20, {128, 1}: 20, {4 << 10, 8}: 40, {large, 1}: 1} {
					r := quick(calls)
					r.shape = shape
					results, err := r.measure([]cell{{c, column}})
					require.NoError(t, err)
					require.Len(t, results, 1)
					require.Positive(t, results[0].wall)
					require.Positive(t, results[0].allocs)
					require.GreaterOrEqual(t, results[0].bytes, float64(column.size))
				}
			})
		}
	}
}

// fake is a client and server in which something is wrong from the 6th call on,
// which is the first after the warm-up with 4 callers.
type fake struct {
	handle handler
	wrong  func(handler, *Message) (*Message, error)
	calls  atomic.Int64
}

func (f *fake) call(_ int, args *Message) (*Message, error) {
	if f.calls.Add(1) >= 6 {
		return f.wrong(f.handle, args)
	}
	return f.handle(args), nil
}

func (f *fake) close() error { return nil }

// What a broken candidate does must not end in a table.
func TestRunner_BrokenCandidateFailsTheRun(t *testing.T) {
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	for name, test := range map[string]struct {
		wrong func(handler, *Message) (*Message, error)
		err   string
	}{
		"another call's result": {func(h handler, m *Message) (*Message, error) {
			return h(&Message{Seq: m.Seq + 1, Data: m.Data}), nil
		}, "with the result of call"},
		"short data": {func(h handler, m *Message) (*Message, error) {
			return h(&Message{Seq: m.Seq, Data: m.Data[1:]}), nil
		}, "got 127 back"},
		"other data": {func(h handler, m *Message) (*Message, error) {
			return h(&Message{Seq: m.Seq, Data: strings.ToUpper(m.Data)}), nil
		}, "other data back"},
		"error": {func(handler, *Message) (*Message, error) {
			return nil, errors.New("out of order")
		}, "out of order"},
		"lost call": {func(handler, *Message) (*Message, error) {
			<-release
			return nil, errors.New("released")
		}, "callers have no answer"},
		"served twice": {func(h handler, m *Message) (*Message, error) {
			h(m)
			return h(m), nil
		}, "served"},
		"not served": {func(_ handler, m *Message) (*Message, error) {
			return m, nil
		}, "served"},
	} {
		t.Run(name, func(t *testing.T) {
			r := quick(100)
			if name == "lost call" {
				r.benchtime, r.patience = 10*time.Millisecond, 100*time.Millisecond
			}
			start := func(_ string, _ int, handle handler) (client, error) {
				return &fake{handle: handle, wrong: test.wrong}, nil
			}
			_, err := r.measure([]cell{{candidate{name: "fake", start: start}, column{128, 4}}})
			require.ErrorContains(t, err, test.err)
		})
	}
}

func TestRunner_CallsCarryTheShape(t *testing.T) {
	for _, shape := range shapes {
		var matching atomic.Int64
		start := func(_ string, _ int, handle handler) (client, error) {
			return &fake{handle: handle, wrong: func(h handler, m *Message) (*Message, error) {
				expected := shape.newMessage(1 << 10)
				expected.Seq = m.Seq
				if reflect.DeepEqual(*m, expected) {
					matching.Add(1)
				}
				return h(m), nil
			}}, nil
		}
		r := quick(10)
		r.shape = shape
		_, err := r.measure([]cell{{candidate{name: "fake", start: start}, column{1 << 10, 4}}})
		require.NoError(t, err)
		require.Equal(t, int64(10), matching.Load())
	}
}

func TestRunner_CandidateThatDoesNotStartFailsTheRun(t *testing.T) {
	start := func(string, int, handler) (client, error) { return nil, errors.New("no start") }
	_, err := quick(1).measure([]cell{{candidate{name: "fake", start: start}, column{128, 1}}})
	require.ErrorContains(t, err, "no start")
}

func TestModes_RunAndWriteTheirTables(t *testing.T) {
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			var out bytes.Buffer
			o := options{
				runner:     quick(100),
				candidates: candidates,
				columns:    []column{{128, 1}, {1 << 10, 4}},
				shapes:     []shape{text},
				growth:     growth{callers: []int{1, 8}, sockets: []int{1, 4}, sizes: []int{128, 1 << 16}},
				waits:      []waits{{4, 1 << 10}},
				bursts:     2,
				requests:   1000,
				out:        &out,
			}
			if m.name == "streams" || m.name == "waits" {
				o.benchtime = time.Millisecond // they go by it
			}
			require.NoError(t, m.run(o))
			require.NotEmpty(t, out.String())
			require.NotContains(t, out.String(), "NaN")
			require.NotContains(t, out.String(), "Inf")
		})
	}
}

func TestStreams_DamageFailsTheRun(t *testing.T) {
	check := &streamCheck{block: []byte("abcd")}
	_, err := check.Write([]byte("abcdab"))
	require.NoError(t, err)
	_, err = check.Write([]byte("ab"))
	require.ErrorContains(t, err, "other data")
}

func TestRun_Flags(t *testing.T) {
	var out bytes.Buffer
	err := run([]string{"-quiet", "-markdown", "-benchtime", "1ms", "-rounds", "1", "-only", "acomm,frames2,netrpc", "-columns", "128B/1,1KiB/2", "-shape", "text,tree"}, &out, io.Discard)
	require.NoError(t, err)
	for _, text := range []string{
		"| encoding/json", "| v1.2.10", "### wall per call, text", "### CPU, ratio to the fastest peer, tree", "128 B, 1 caller | 1 KiB, 2", "### During the run",
	} {
		require.Contains(t, out.String(), text)
	}
	for _, args := range [][]string{
		{"-only", "nobody"}, {"-columns", "128"}, {"-columns", "128B/0"}, {"-columns", "12x/1"}, {"-mode", "none"}, {"-shape", "text,none"}, {"-shape", ""}, {"-rounds", "0"}, {"-requests", "0"}, {"more"},
	} {
		require.Error(t, run(args, io.Discard, io.Discard), "%q", args)
	}
}

func TestTables_RatioIsToTheFastestPeer(t *testing.T) {
	some := []candidate{
		{title: "ours", role: subject}, {title: "slow", role: peer}, {title: "fast", role: peer}, {title: "floor", role: floor},
	}
	results := [][]result{{{wall: 30, cpu: 5}}, {{wall: 40, cpu: 10}}, {{wall: 20, cpu: 20}}, {{wall: 1, cpu: 1}}}
	tables := callTables(some, []column{{128, 1}}, results)
	require.Equal(t, [][]string{{"ours", "1.50"}, {"slow", "2.00"}, {"fast", "1.00"}, {"floor", "0.05"}}, tables[1].rows)
	require.Equal(t, [][]string{{"ours", "0.50"}, {"slow", "1.00"}, {"fast", "2.00"}, {"floor", "0.10"}}, tables[3].rows)
	alone := callTables(some[:1], []column{{128, 1}}, results[:1])
	require.Equal(t, [][]string{{"ours", "-"}}, alone[1].rows)
}

func TestHistogram_QuantileIsWithin4Percent(t *testing.T) {
	var h histogram
	for i := range 1000 {
		h.add(time.Duration(i+1) * 37 * time.Microsecond)
	}
	require.InEpsilon(t, float64(991*37*time.Microsecond), float64(h.quantile(0.99)), 0.04)
	var edges histogram
	edges.add(0)
	edges.add(31)
	edges.add(64)
	edges.add(time.Hour) // beyond what it tells apart
	require.Equal(t, time.Duration(0), edges.quantile(0))
	require.Equal(t, time.Duration(31), edges.quantile(0.25))
	require.Equal(t, time.Duration(64), edges.quantile(0.5))
	require.Greater(t, edges.quantile(0.75), 15*time.Minute)
}

func TestMedian(t *testing.T) {
	require.Equal(t, 0.0, median(nil))
	require.Equal(t, 2.0, median([]float64{3, 1, 2}))
	require.Equal(t, 2.5, median([]float64{4, 1, 2, 3}))
}

// BenchmarkEcho is the table of the calls, as Go benchmarks:
//
//	go test -bench Echo/rows/grpc/128B/64
func BenchmarkEcho(b *testing.B) {
	for _, shape := range shapes {
		for _, c := range candidates {
			for _, column := range columns {
				b.Run(shape.String()+"/"+c.name+"/"+column.String(), func(b *testing.B) { benchmarkCell(b, shape, cell{c, column}) })
			}
		}
	}
}

func benchmarkCell(b *testing.B, shape shape, c cell) {
	r := runner{shape: shape, patience: 10 * time.Minute}
	s, err := r.newSession(c)
	require.NoError(b, err)
	require.NoError(b, s.warmUp())
	data := shape.newMessage(c.size)
	b.ReportAllocs()
	b.SetBytes(int64(c.size))
	cpu := cpuTime()
	_, p99, err := s.drive(c.callers, data, loop(b))
	used := cpuTime() - cpu
	b.StopTimer()
	require.NoError(b, err)
	require.NoError(b, s.close())
	b.ReportMetric(float64(used)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(p99), "p99-ns")
}

// loop is b.Loop for several callers: a lock hands out its turns.
func loop(b *testing.B) pace {
	var mu sync.Mutex // guards b and over
	over := false
	return func(int, time.Time) bool {
		mu.Lock()
		defer mu.Unlock()
		over = over || !b.Loop()
		return !over
	}
}
