package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// chartLimit is the ratio at which a bar is cut.
const chartLimit = 3.0

const chartTitle = "Time of a call, acomm and other libraries. Lower is better"

// Lengths in a chart, in pixels.
const (
	chartWidth   = 800 // about that of a README
	chartMargin  = 16
	namesWidth   = 178
	panelWidth   = 202
	panelsAcross = 3
	lineHeight   = 18
	barHeight    = 12
	ratioWidth   = 50 // of a bar of ratio 1
)

// chartStyle is blue, bold and darker for acomm, so that it stands out without
// colours, too. The background is the chart's own: a page in dark mode whose browser
// is in light mode shows a light chart.
const chartStyle = `
text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: bold }
.head, text.subject { font-weight: bold }
.note { fill: #57606a }
.name { text-anchor: end }
.back { fill: #ffffff; stroke: #d0d7de }
.one { stroke: #1f2328; stroke-dasharray: 3 2 }
.cut { stroke: #ffffff; stroke-width: 2.5 }
rect.subject { fill: #0072b2 }
text.subject { fill: #005b8f }
rect.peer { fill: #8a949e }
rect.floor { fill: #eaeef2; stroke: #8a949e }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.note { fill: #9da7b1 }
.back { fill: #0d1117; stroke: #30363d }
.one { stroke: #e6edf3 }
.cut { stroke: #0d1117 }
rect.subject, text.subject { fill: #56b4e9 }
rect.peer { fill: #7d8590 }
rect.floor { fill: #21262d; stroke: #7d8590 }
}
`

// roleStyles are the classes of chartStyle and their legend.
var roleStyles = map[role]struct{ class, legend string }{
	subject: {"subject", "acomm"},
	peer:    {"peer", "another library"},
	floor:   {"floor", "no library, for comparison"},
}

var shapeLegends = map[shape]string{
	text: "text: one string of plain letters",
	rows: "rows: a list of records, decoded into structs",
	tree: "tree: a nested configuration, decoded into any",
}

// checkChart returns an error if a run with these options and modes can't draw its
// chart. A run takes minutes: better to know before it.
func checkChart(o options, selected []mode) error {
	if !slices.ContainsFunc(selected, func(m mode) bool { return m.name == "calls" }) {
		return errors.New("the chart shows the mode calls: add calls to -mode")
	}
	if !slices.ContainsFunc(o.candidates, func(c candidate) bool { return c.role == peer }) {
		return errors.New("the chart shows ratios to the fastest peer: add a peer to -only, for example grpc")
	}
	_, err := os.Stat(filepath.Dir(o.svg))
	return err
}

// writeChart draws the chart of a run: results[k] is those of o.shapes[k].
func writeChart(o options, results [][][]result) error {
	c := newChart(o.candidates, o.columns, chartNotes(o.runner))
	for k, shape := range o.shapes {
		c.section(shape, results[k])
	}
	return os.WriteFile(o.svg, c.svg(), 0o644)
}

// chartNotes says on what and how the run was made.
func chartNotes(r runner) []string {
	engine, _, _ := strings.Cut(jsonEngine, " (")
	return []string{
		fmt.Sprintf("%s %s/%s, %d cores, %s", runtime.Version(), runtime.GOOS, runtime.GOARCH,
			min(runtime.NumCPU(), runtime.GOMAXPROCS(0)), processor()),
		fmt.Sprintf("%s; client and server in one process; median of %d turns of %v; %s", engine,
			r.rounds, r.benchtime, time.Now().UTC().Format(time.DateOnly)),
	}
}

// chart draws the wall times of the calls in SVG, as ratios to the fastest peer:
// a panel for each column, in it a bar for each candidate. It draws from the top
// down.
type chart struct {
	candidates []candidate
	columns    []column

	y    int // where the next line begins
	body bytes.Buffer
}

// newChart begins a chart with its title, the notes and a legend.
func newChart(candidates []candidate, columns []column, notes []string) *chart {
	c := &chart{candidates: candidates, columns: columns, y: chartMargin}
	c.line("title", chartTitle)
	c.y += 8
	c.line("", "Wall time of an echo call, as a ratio to the fastest other library of the panel (dashed line, 1.00).")
	for _, note := range notes {
		c.line("note", note)
	}
	c.y += 8
	c.legend()
	return c
}

// legend draws a line that explains the bars.
func (c *chart) legend() {
	x := chartMargin
	for _, r := range []role{subject, peer, floor} {
		style := roleStyles[r]
		c.bar(x, c.y, barHeight, style.class)
		c.text(x+barHeight+6, c.y, style.class, style.legend)
		x += barHeight + 32 + 7*len(style.legend)
	}
	c.bar(x, c.y, 30, roleStyles[peer].class)
	c.cut(x+30, c.y)
	c.text(x+36, c.y, "", fmt.Sprintf("bar cut at %.2f", chartLimit))
	c.y += lineHeight
}

// section draws the panels of a shape: results[i][j] is the result of candidate i in
// column j. Columns with as many callers come beside each other.
func (c *chart) section(s shape, results [][]result) {
	c.y += 12
	c.line("head", shapeLegends[s])
	var order []int // of columns
	for j := range c.columns {
		order = append(order, j)
	}
	slices.SortStableFunc(order, func(a, b int) int { return c.columns[a].callers - c.columns[b].callers })
	for some := range slices.Chunk(order, panelsAcross) {
		c.y += 10
		c.panels(some, results)
	}
}

// panels draws panels of some columns beside each other, with the names of the
// candidates to the left.
func (c *chart) panels(some []int, results [][]result) {
	heads := c.y
	c.y += 2*lineHeight + 2
	var lines []int // where that of each candidate begins
	for i, candidate := range c.candidates {
		if i > 0 && candidate.role == floor && c.candidates[i-1].role != floor {
			c.y += 6
		}
		lines = append(lines, c.y)
		c.text(chartMargin+namesWidth-8, c.y, "name "+roleStyles[candidate.role].class, candidate.title)
		c.y += lineHeight
	}
	for k, j := range some {
		c.panel(chartMargin+namesWidth+k*panelWidth, heads, lines, j, results)
	}
}

// panel draws column j, with its head at x, y and its bars on the lines.
func (c *chart) panel(x, y int, lines []int, j int, results [][]result) {
	wall := func(r result) float64 { return r.wall }
	fastest := fastestPeer(c.candidates, results, j, wall)
	callers := "1 caller"
	if n := c.columns[j].callers; n > 1 {
		callers = fmt.Sprintf("%d callers", n)
	}
	c.print(`<g class="panel">`)
	c.text(x, y, "head", formatSize(c.columns[j].size)+", "+callers)
	c.text(x, y+lineHeight, "note", "1.00 is "+formatTime(fastest))
	for i, line := range lines { // values stay clear of the dashed line
		ratio := wall(results[i][j]) / fastest
		class := roleStyles[c.candidates[i].role].class
		width := min(ratio, chartLimit) * ratioWidth
		c.bar(x, line, width, class)
		if ratio > chartLimit {
			c.cut(x+int(width), line)
		}
		c.text(x+max(int(width), ratioWidth)+6, line, "value "+class, formatRatio(ratio))
	}
	c.print(`<path class="one" d="M%d %dV%d"/>`, x+ratioWidth, lines[0]-2, lines[len(lines)-1]+lineHeight)
	c.print(`</g>`)
}

// line draws a text, and goes to the next line.
func (c *chart) line(class, text string) {
	c.text(chartMargin, c.y, class, text)
	c.y += lineHeight
}

// text draws a text in the line at y. It may have any characters.
func (c *chart) text(x, y int, class, text string) {
	var escaped strings.Builder
	if err := xml.EscapeText(&escaped, []byte(text)); err != nil {
		panic(err) // a Builder takes everything
	}
	c.print(`<text class="%s" x="%d" y="%d">%s</text>`, class, x, y+lineHeight-5, escaped.String())
}

// bar draws a bar in the line at y.
func (c *chart) bar(x, y int, width float64, class string) {
	c.print(`<rect class="%s" x="%d" y="%d" width="%.1f" height="%d"/>`, class, x, y+(lineHeight-barHeight)/2, width, barHeight)
}

// cut draws the mark of a bar that ends at x because it is cut: two gaps.
func (c *chart) cut(x, y int) {
	y += (lineHeight - barHeight) / 2
	c.print(`<path class="cut" d="M%d %dl4 -%dm4 0l-4 %[3]d"/>`, x-14, y+barHeight+1, barHeight+2)
}

func (c *chart) print(format string, args ...any) { fmt.Fprintf(&c.body, format+"\n", args...) }

// svg returns the chart.
func (c *chart) svg() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d">`+"\n",
		chartWidth, c.y+chartMargin)
	fmt.Fprintf(&out, "<title>%s</title>\n<style>%s</style>\n", chartTitle, chartStyle)
	fmt.Fprintf(&out, `<rect class="back" x="0.5" y="0.5" width="%d" height="%d" rx="6"/>`+"\n", chartWidth-1, c.y+chartMargin-1)
	out.Write(c.body.Bytes())
	out.WriteString("</svg>\n")
	return out.Bytes()
}
