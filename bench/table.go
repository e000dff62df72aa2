package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// table is text in rows. The first column is names, the others are numbers,
// unless they are words.
type table struct {
	title string
	head  []string // one for each column
	rows  [][]string
	words bool
}

func (t *table) add(row ...string) { t.rows = append(t.rows, row) }

// write writes the table, aligned, or in markdown.
func (t *table) write(w io.Writer, markdown bool) error {
	lines := append([][]string{t.head}, t.rows...)
	widths := make([]int, len(t.head))
	for _, line := range lines {
		for i, text := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(text), 3)
		}
	}
	format, separator := "%s\n", "  "
	title := "\n" + t.title + "\n"
	if markdown {
		format, separator = "| %s |\n", " | "
		title = "\n### " + t.title + "\n\n"
		rule := make([]string, len(widths))
		for i, width := range widths {
			rule[i] = strings.Repeat("-", width)
			if t.isNumber(i) {
				rule[i] = rule[i][1:] + ":"
			}
		}
		lines = slices.Insert(lines, 1, rule)
	}
	var out strings.Builder
	out.WriteString(title)
	for _, line := range lines {
		cells := make([]string, len(line))
		for i, text := range line {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if t.words && !markdown && i == len(line)-1 {
				pad = ""
			}
			cells[i] = text + pad
			if t.isNumber(i) {
				cells[i] = pad + text
			}
		}
		fmt.Fprintf(&out, format, strings.Join(cells, separator))
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func (t *table) isNumber(column int) bool { return column > 0 && !t.words }

// callTables returns the tables of the calls: results[i][j] is the result of
// candidate i in column j.
func callTables(candidates []candidate, columns []column, results [][]result) []*table {
	wall := func(r result) float64 { return r.wall }
	cpu := func(r result) float64 { return r.cpu }
	grid := func(title string, text func(i, j int) string) *table {
		t := &table{title: title, head: []string{""}}
		for _, c := range columns {
			t.head = append(t.head, c.head())
		}
		for i, c := range candidates {
			row := []string{c.title}
			for j := range columns {
				row = append(row, text(i, j))
			}
			t.add(row...)
		}
		return t
	}
	ratio := func(number func(result) float64) func(i, j int) string {
		return func(i, j int) string {
			return formatRatio(number(results[i][j]) / fastestPeer(candidates, results, j, number))
		}
	}
	return []*table{
		grid("wall per call", func(i, j int) string { return formatTime(results[i][j].wall) }),
		grid("wall, ratio to the fastest peer", ratio(wall)),
		grid("CPU per call", func(i, j int) string { return formatTime(results[i][j].cpu) }),
		grid("CPU, ratio to the fastest peer", ratio(cpu)),
		grid("p99", func(i, j int) string { return formatTime(results[i][j].p99) }),
		grid("allocations per call", func(i, j int) string { return fmt.Sprintf("%.0f", results[i][j].allocs) }),
		grid("bytes allocated per call", func(i, j int) string { return formatBytes(results[i][j].bytes) }),
	}
}

// fastestPeer returns the lowest number of a peer in a column, NaN without peers.
func fastestPeer(candidates []candidate, results [][]result, column int, number func(result) float64) float64 {
	fastest := math.NaN()
	for i, c := range candidates {
		if n := number(results[i][column]); c.role == peer && (math.IsNaN(fastest) || n < fastest) {
			fastest = n
		}
	}
	return fastest
}

// formatRatio formats a ratio; there is none to what is not a number.
func formatRatio(ratio float64) string {
	if math.IsNaN(ratio) || math.IsInf(ratio, 0) {
		return "-"
	}
	return fmt.Sprintf("%.2f", ratio)
}

// formatTime formats nanoseconds, with three digits.
func formatTime(ns float64) string {
	switch {
	case ns < 1e3:
		return digits(ns) + " ns"
	case ns < 1e6:
		return digits(ns/1e3) + " us"
	case ns < 1e9:
		return digits(ns/1e6) + " ms"
	}
	return digits(ns/1e9) + " s"
}

// formatBytes formats a number of bytes, with three digits.
func formatBytes(n float64) string {
	switch {
	case math.Abs(n) < 1<<10:
		return fmt.Sprintf("%.0f B", n)
	case math.Abs(n) < 1<<20:
		return digits(n/(1<<10)) + " KiB"
	case math.Abs(n) < 1<<30:
		return digits(n/(1<<20)) + " MiB"
	}
	return digits(n/(1<<30)) + " GiB"
}

// digits formats a number with three digits, or more in front of the point.
func digits(n float64) string {
	switch {
	case math.Abs(n) < 10:
		return fmt.Sprintf("%.2f", n)
	case math.Abs(n) < 100:
		return fmt.Sprintf("%.1f", n)
	}
	return fmt.Sprintf("%.0f", n)
}
