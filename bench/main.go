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
	o, selected, err := parse(args, stdout, stderr)
	if err != nil {
		return err
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

// parse returns what the arguments ask for. All of them are checked before anything is
// measured.
func parse(args []string, stdout, stderr io.Writer) (o options, selected []mode, err error) {
	o = options{
		runner: runner{patience: time.Minute}, growth: fullGrowth, waits: fullWaits, bursts: forwardBursts, out: stdout,
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.DurationVar(&o.benchtime, "benchtime", time.Second, "duration of a turn, which measures one candidate in one column")
	flags.IntVar(&o.rounds, "rounds", 5, "turns of each candidate in each column; the tables show the median")
	flags.IntVar(&o.requests, "requests", 1_000_000, "outstanding requests in the mode tracking")
	flags.BoolVar(&o.markdown, "markdown", false, "write the tables in markdown")
	flags.StringVar(&o.svg, "svg", "", "SVG `file` for a chart of the mode calls: wall times as ratios to the fastest peer; empty for none")
	quiet := flags.Bool("quiet", false, "write no progress to stderr")
	only := flags.String("only", "", "candidates of the calls, comma-separated: "+listOf(candidates, func(c candidate) string { return c.name })+"; empty for all")
	cols := flags.String("columns", "", "sizes and callers, comma-separated, such as 128B/1,16KiB/64; empty for 128B, 16KiB and 1MiB by 1 and 64")
	shapeList := flags.String("shape", "text", "data of the calls, comma-separated: text, rows, tree")
	modeList := flags.String("mode", "calls", "measurements, comma-separated: "+listOf(modes, func(m mode) string { return m.name })+"; or all")
	if err := flags.Parse(args); err != nil {
		return o, nil, err
	}
	if !*quiet {
		o.progress = func(text string) { fmt.Fprintln(stderr, text) }
	}
	if err := o.check(flags.Args()); err != nil {
		return o, nil, err
	}
	if selected, err = selectModes(*modeList); err != nil {
		return o, nil, err
	}
	if o.candidates, err = selectCandidates(*only); err != nil {
		return o, nil, err
	}
	if o.columns, err = parseColumns(*cols); err != nil {
		return o, nil, err
	}
	if o.shapes, err = parseShapes(*shapeList); err != nil {
		return o, nil, err
	}
	if o.svg != "" {
		if err := checkChart(o, selected); err != nil {
			return o, nil, fmt.Errorf("-svg: %w", err)
		}
	}
	return o, selected, nil
}

// check returns an error for what no run can be made with.
func (o options) check(args []string) error {
	switch {
	case len(args) > 0:
		return fmt.Errorf("argument %q: bench takes flags only, see -help", args[0])
	case o.rounds < 1:
		return fmt.Errorf("-rounds %d: at least 1 is needed", o.rounds)
	case o.requests < 1:
		return fmt.Errorf("-requests %d: at least 1 is needed", o.requests)
	}
	return nil
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
