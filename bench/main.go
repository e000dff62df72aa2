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
		benchtime = flags.Duration("benchtime", time.Second, "how long a turn takes")
		rounds    = flags.Int("rounds", 5, "turns of each candidate in each column")
		only      = flags.String("only", "", "names of candidates, separated by commas; all if empty")
		cols      = flags.String("columns", "", "columns such as 128B/1,16KiB/64; the six of the table if empty")
		shapeList = flags.String("shape", "text", "shapes of the data of calls, separated by commas: text, rows, tree")
		modeList  = flags.String("mode", "calls", "modes, separated by commas: calls, tracking, streams, forward, growth, idle, json, waits; or all")
		requests  = flags.Int("requests", 1_000_000, "outstanding requests in the mode tracking")
		markdown  = flags.Bool("markdown", false, "write the tables in markdown")
		quiet     = flags.Bool("quiet", false, "do not print on stderr what is being measured")
	)
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *rounds < 1 || *requests < 1 {
		return fmt.Errorf("unexpected arguments %q, or -rounds or -requests is less than 1", flags.Args())
	}
	o := options{
		runner:   runner{benchtime: *benchtime, rounds: *rounds, patience: time.Minute},
		growth:   fullGrowth,
		waits:    fullWaits,
		bursts:   forwardBursts,
		requests: *requests,
		markdown: *markdown,
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

// runCalls is the tables of the candidates, for each shape.
func runCalls(o options) error {
	for _, shape := range o.shapes {
		o.shape = shape
		if err := runShape(o); err != nil {
			return fmt.Errorf("%s: %w", shape, err)
		}
	}
	return nil
}

// runShape measures the candidates column by column.
func runShape(o options) error {
	results := make([][]result, len(o.candidates))
	for _, column := range o.columns {
		var cells []cell
		for _, c := range o.candidates {
			cells = append(cells, cell{c, column})
		}
		measured, err := o.measure(cells)
		if err != nil {
			return err
		}
		for i, r := range measured {
			results[i] = append(results[i], r)
		}
	}
	tables := callTables(o.candidates, o.columns, results)
	for _, t := range tables {
		t.title += ", " + o.shape.String()
	}
	return o.write(tables...)
}
