package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
)

// event is a line in the record of a requester.
type event struct {
	Kind    string  `json:"kind"` // sent, hook (a response has come to it), end
	ID      string  `json:"id"`
	Via     string  `json:"via,omitempty"`     // sent: http or nats
	Outcome string  `json:"outcome,omitempty"` // end: one of those below, or the kind of an error
	Stream  bool    `json:"stream,omitempty"`  // end: with a whole stream
	Millis  float64 `json:"millis,omitempty"`  // end: since it was sent
}

const (
	answered     = "answered"
	timedOut     = "timed out"
	wrong        = "wrong answer"
	silentStream = "stream without an end"
)

// errorKind sorts an error of Send or Stream.
func errorKind(err error) string {
	timeout := net.Error(nil)
	switch {
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "host unreachable"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return "nobody listens"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "connection reset"
	case errors.Is(err, syscall.ETIMEDOUT):
		return "connection timed out"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return "cut off"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "took too long"
	case errors.Unwrap(err) == nil: // the peer's own words
		return "refused: " + err.Error()
	}
	return "other: " + err.Error()
}

// record is what a requester has written down.
type record struct {
	killed bool // the requester was, with its host: what it waited for is not lost in silence
	events []event
}

func readRecord(r io.Reader) ([]event, error) {
	var events []event
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		e := event{}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return events, err // a killed requester's last line may be half of one
		}
		events = append(events, e)
	}
	return events, lines.Err()
}

// tally is the account of some requests.
type tally struct {
	name                                        string
	requests, responses, streams, timeouts      int
	failed, abandoned, lost, twice, wrongAnswer int
	kinds                                       map[string]int // of those that failed
	millis                                      []float64      // of those that were answered without a stream
}

// account adds up the records. A request or a stream that has not ended was lost in
// silence. A request was handled twice if a provider worked on it more than once, its
// handler ran more than once, or its hook got more than one response.
func account(name, via string, records []record, handled map[string]int) *tally {
	t := &tally{name: name, kinds: map[string]int{}}
	for _, rec := range records {
		ends, hooks := map[string][]event{}, map[string]int{}
		for _, e := range rec.events {
			switch e.Kind {
			case "end":
				ends[e.ID] = append(ends[e.ID], e)
			case "hook":
				hooks[e.ID]++
			}
		}
		for _, e := range rec.events {
			if e.Kind == "sent" && (via == "" || e.Via == via) {
				twice := handled[e.ID] > 1 || hooks[e.ID] > 1 || len(ends[e.ID]) > 1
				t.add(ends[e.ID], rec.killed, twice, handled[e.ID] > 0)
			}
		}
	}
	slices.Sort(t.millis)
	return t
}

func (t *tally) add(ends []event, killed, twice, provided bool) {
	t.requests++
	if twice {
		t.twice++
	}
	switch {
	case len(ends) == 0 && killed:
		t.abandoned++
		return
	case len(ends) == 0:
		t.lost++
		return
	}
	switch end := ends[0]; {
	case end.Outcome == wrong, end.Outcome == answered && !provided: // or the providers' record misses some
		t.wrongAnswer++
	case end.Outcome == answered:
		t.responses++
		if end.Stream {
			t.streams++ // its time is the stream's own
		} else {
			t.millis = append(t.millis, end.Millis)
		}
	case end.Outcome == timedOut:
		t.timeouts++
	case end.Outcome == silentStream:
		t.lost++
	default:
		t.failed++
		t.kinds[end.Outcome]++
	}
}

// err is what must not be.
func (t *tally) err() error {
	if t.lost == 0 && t.twice == 0 && t.wrongAnswer == 0 {
		return nil
	}
	return fmt.Errorf("%s: %d lost in silence, %d handled twice, %d with a wrong answer", t.name, t.lost, t.twice, t.wrongAnswer)
}

// percentile of sorted values, in milliseconds.
func percentile(sorted []float64, p int) string {
	if len(sorted) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f ms", sorted[min(len(sorted)-1, len(sorted)*p/100)])
}

func printTable(w io.Writer, tallies []*tally) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "phase\trequests\tresponses\twith stream\ttime-outs\terrors\tkilled with requester\tlost\ttwice\twrong\tp50\tp99\t")
	for _, t := range tallies {
		fmt.Fprintf(out, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t\n", t.name, t.requests, t.responses, t.streams,
			t.timeouts, t.failed, t.abandoned, t.lost, t.twice, t.wrongAnswer, percentile(t.millis, 50), percentile(t.millis, 99))
	}
	if err := out.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nerrors by kind:")
	for _, t := range tallies {
		kinds := slices.SortedFunc(maps.Keys(t.kinds), func(a, b string) int {
			return cmp.Or(t.kinds[b]-t.kinds[a], strings.Compare(a, b))
		})
		for _, kind := range kinds {
			fmt.Fprintf(w, "  %s: %d %s\n", t.name, t.kinds[kind], kind)
		}
	}
	return nil
}
