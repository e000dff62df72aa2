package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// options are what the modes are given.
type options struct {
	runner
	candidates []candidate
	columns    []column
	shapes     []shape // of the calls
	growth     growth
	waits      []waits
	bursts     int // of forward
	requests   int // of tracking
	markdown   bool
	svg        string // file for the chart of the calls; "": none
	out        io.Writer
}

// mode is a measurement of its own, with its own tables.
type mode struct {
	name string
	run  func(options) error
}

var modes = []mode{
	{"calls", runCalls},
	{"tracking", runTracking},
	{"streams", runStreams},
	{"forward", runForward},
	{"growth", runGrowth},
	{"idle", runIdle},
	{"json", runJSON},
	{"waits", runWaits},
}

func main() {
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var (
		benchtime = flags.Duration("benchtime", time.Second, "duration of a turn, which measures one candidate in one column")
		rounds    = flags.Int("rounds", 5, "turns of each candidate in each column; the tables show the median")
		only      = flags.String("only", "", "candidates of the calls, comma-separated: "+listOf(candidates, func(c candidate) string { return c.name })+"; empty for all")
		cols      = flags.String("columns", "", "sizes and callers, comma-separated, such as 128B/1,16KiB/64; empty for 128B, 16KiB and 1MiB by 1 and 64")
		shapeList = flags.String("shape", "text", "data of the calls, comma-separated: text, rows, tree")
		modeList  = flags.String("mode", "calls", "measurements, comma-separated: "+listOf(modes, func(m mode) string { return m.name })+"; or all")
		requests  = flags.Int("requests", 1_000_000, "outstanding requests in the mode tracking")
		markdown  = flags.Bool("markdown", false, "write the tables in markdown")
		svg       = flags.String("svg", "", "SVG `file` for a chart of the mode calls: wall times as ratios to the fastest peer; empty for none")
		quiet     = flags.Bool("quiet", false, "write no progress to stderr")
	)
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("argument %q: bench takes flags only, see -help", flags.Arg(0))
	case *rounds < 1:
		return fmt.Errorf("-rounds %d: at least 1 is needed", *rounds)
	case *requests < 1:
		return fmt.Errorf("-requests %d: at least 1 is needed", *requests)
	}
	o := options{
		runner:   runner{benchtime: *benchtime, rounds: *rounds, patience: time.Minute},
		growth:   fullGrowth,
		waits:    fullWaits,
		bursts:   forwardBursts,
		requests: *requests,
		markdown: *markdown,
		svg:      *svg,
		out:      stdout,
	}
	if !*quiet {
		o.progress = func(text string) { fmt.Fprintln(stderr, text) }
	}
	selected, err := selectModes(*modeList)
	if err != nil {
		return err
	}
	if o.candidates, err = selectCandidates(*only); err != nil {
		return err
	}
	if o.columns, err = parseColumns(*cols); err != nil {
		return err
	}
	if o.shapes, err = parseShapes(*shapeList); err != nil {
		return err
	}
	if o.svg != "" {
		if err := checkChart(o, selected); err != nil {
			return fmt.Errorf("-svg: %w", err)
		}
	}
	if err := o.write(header(o.runner)); err != nil {
		return err
	}
	others := meterOthers()
	for _, m := range selected {
		if err := m.run(o); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	end := &table{title: "During the run", head: []string{"", "used"}, words: true}
	end.add("other processes", others())
	return o.write(end)
}

// listOf returns the names of the things, with commas.
func listOf[T any](things []T, name func(T) string) string {
	var names []string
	for _, thing := range things {
		names = append(names, name(thing))
	}
	return strings.Join(names, ", ")
}

// selectModes returns the modes in the list, or all.
func selectModes(list string) ([]mode, error) {
	if list == "all" {
		return modes, nil
	}
	var selected []mode
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(modes, func(m mode) bool { return m.name == name })
		if i < 0 {
			return nil, fmt.Errorf("no mode is called %q", name)
		}
		selected = append(selected, modes[i])
	}
	return selected, nil
}

func (o options) write(tables ...*table) error {
	for _, t := range tables {
		if err := t.write(o.out, o.markdown); err != nil {
			return err
		}
	}
	return nil
}

// runCalls writes the tables of the candidates for each shape, and draws the chart.
func runCalls(o options) error {
	var all [][][]result // by shape
	for _, shape := range o.shapes {
		o.shape = shape
		results, err := runShape(o)
		if err != nil {
			return fmt.Errorf("%s: %w", shape, err)
		}
		all = append(all, results)
	}
	if o.svg == "" {
		return nil
	}
	return writeChart(o, all)
}

// runShape measures the candidates column by column and writes their tables.
// results[i][j] is the result of candidate i in column j.
func runShape(o options) (results [][]result, err error) {
	results = make([][]result, len(o.candidates))
	for _, column := range o.columns {
		var cells []cell
		for _, c := range o.candidates {
			cells = append(cells, cell{c, column})
		}
		measured, err := o.measure(cells)
		if err != nil {
			return nil, err
		}
		for i, r := range measured {
			results[i] = append(results[i], r)
		}
	}
	tables := callTables(o.candidates, o.columns, results)
	for _, t := range tables {
		t.title += ", " + o.shape.String()
	}
	return results, o.write(tables...)
}
