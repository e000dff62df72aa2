package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// drawn is what a test reads in a chart. Decoding it checks that it is well-formed.
type drawn struct {
	Width  int         `xml:"width,attr"`
	Height int         `xml:"height,attr"`
	Texts  []drawnText `xml:"text"`
	Panels []struct {
		Texts []drawnText `xml:"text"`
		Bars  []struct {
			X     float64 `xml:"x,attr"`
			Class string  `xml:"class,attr"`
			Width float64 `xml:"width,attr"`
		} `xml:"rect"`
		Paths []struct {
			Class string `xml:"class,attr"`
			D     string `xml:"d,attr"`
		} `xml:"path"`
	} `xml:"g"`
}

type drawnText struct {
	Class string  `xml:"class,attr"`
	X     float64 `xml:"x,attr"`
	Y     int     `xml:"y,attr"`
	Text  string  `xml:",chardata"`
}

func parseChart(t *testing.T, svg []byte) drawn {
	var d drawn
	decoder := xml.NewDecoder(strings.NewReader(string(svg)))
	require.NoError(t, decoder.Decode(&d), "%s", svg)
	_, err := decoder.Token()
	for err == nil { // white space
		_, err = decoder.Token()
	}
	require.ErrorIs(t, err, io.EOF)
	return d
}

// textsOf returns the texts whose class has the word.
func textsOf(texts []drawnText, class string) []string {
	var found []string
	for _, text := range texts {
		if strings.Contains(" "+text.Class+" ", " "+class+" ") {
			found = append(found, text.Text)
		}
	}
	return found
}

// walls are results with these wall times, a line for each candidate.
func walls(lines ...[]float64) [][]result {
	results := make([][]result, len(lines))
	for i, line := range lines {
		for _, wall := range line {
			results[i] = append(results[i], result{wall: wall})
		}
	}
	return results
}

// A chart that tells other numbers than the table would be worse than none.
func TestChart_ShowsTheTable(t *testing.T) {
	full := make([][]float64, len(candidates))
	for i := range full {
		for j := range columns {
			full[i] = append(full[i], float64(1000*(1+(7*i+j)%12)))
		}
	}
	for _, test := range []struct {
		name       string
		candidates []candidate
		columns    []column
		results    [][]result
		heads      []string // of the panels, in order
		cuts       []int    // bars cut in each panel
	}{
		{
			"all", candidates, columns, walls(full...),
			[]string{"128 B, 1 caller", "16 KiB, 1 caller", "1 MiB, 1 caller", "128 B, 64 callers", "16 KiB, 64 callers", "1 MiB, 64 callers"},
			nil,
		},
		{
			"one peer", []candidate{{title: "acomm", role: subject}, {title: "p", role: peer}}, columns[:1], walls([]float64{1}, []float64{2}),
			[]string{"128 B, 1 caller"},
			[]int{0},
		},
		{
			"names with characters of XML",
			[]candidate{{title: `a<b> & "c" 'd' ]]>`, role: subject}, {title: "Zoë\n東京 %d", role: peer}, {title: "</text>", role: floor}},
			columns[:1], walls([]float64{1}, []float64{2}, []float64{3}),
			[]string{"128 B, 1 caller"},
			[]int{0},
		},
		{
			"at the limit and beyond",
			[]candidate{{title: "acomm", role: subject}, {title: "fast", role: peer}, {title: "slow", role: peer}, {title: "floor", role: floor}},
			[]column{{0, 1}, {128, 4}}, walls([]float64{300, 301}, []float64{100, 100}, []float64{12345, 301}, []float64{299, 0}),
			[]string{"0 B, 1 caller", "128 B, 4 callers"},
			[]int{1, 2},
		},
		{
			"no library before the libraries",
			[]candidate{{title: "floor", role: floor}, {title: "p", role: peer}, {title: "acomm", role: subject}},
			columns[:2], walls([]float64{1, 1}, []float64{2, 2}, []float64{3, 3}),
			[]string{"128 B, 1 caller", "128 B, 64 callers"},
			[]int{0, 0},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newChart(test.candidates, test.columns, []string{"go1.27.3 <&>, 2 cores"})
			c.section(rows, test.results)
			d := parseChart(t, c.svg())
			require.Contains(t, textsOf(d.Texts, "title")[0], "Lower is better")
			require.Equal(t, []string{"go1.27.3 <&>, 2 cores"}, textsOf(d.Texts, "note"))
			require.Equal(t, []string{"rows: a list of records, decoded into structs"}, textsOf(d.Texts, "head"))

			var titles []string
			for _, c := range test.candidates {
				titles = append(titles, c.title)
			}
			names := textsOf(d.Texts, "name")
			for abreast := 0; abreast < len(names); abreast += len(titles) {
				require.Equal(t, titles, names[abreast:abreast+len(titles)])
			}

			table := callTables(test.candidates, test.columns, test.results)[1]
			var heads []string
			for k, panel := range d.Panels {
				head := textsOf(panel.Texts, "head")[0]
				heads = append(heads, head)
				j := 1
				for !strings.HasPrefix(head+" ", table.head[j]+" ") {
					j++
				}
				values := textsOf(panel.Texts, "value")
				require.Len(t, values, len(table.rows))
				require.Len(t, panel.Bars, len(table.rows))
				cuts := 0
				for i, row := range table.rows {
					require.Equal(t, row[j], values[i], "%s in %s", row[0], head)
					ratio := test.results[i][j-1].wall / fastestPeer(test.candidates, test.results, j-1, func(r result) float64 { return r.wall })
					if ratio > chartLimit {
						cuts++
						ratio = chartLimit
					}
					require.InDelta(t, ratio*ratioWidth, panel.Bars[i].Width, 0.1, "%s in %s", row[0], head)
					require.Equal(t, roleStyles[test.candidates[i].role].class, panel.Bars[i].Class)
				}
				require.Len(t, panel.Paths, cuts+1)
				require.Equal(t, "one", panel.Paths[cuts].Class)
				if test.cuts != nil {
					require.Equal(t, test.cuts[k], cuts)
				}
				require.Contains(t, textsOf(panel.Texts, "note")[0], "1.00 is ")
			}
			require.Equal(t, test.heads, heads)
		})
	}
}

// Names, bars and values of a candidate are in one line, no two candidates are, and
// nothing is outside the picture.
func TestChart_LinesDoNotOverlap(t *testing.T) {
	some := []candidate{{title: "floor", role: floor}, {title: "acomm", role: subject}, {title: "p", role: peer}, {title: "floor 2", role: floor}}
	c := newChart(some, columns, nil)
	for _, s := range shapes {
		c.section(s, walls(make([]float64, 6), make([]float64, 6), []float64{1, 1, 1, 1, 1, 1}, []float64{999, 999, 999, 999, 999, 999}))
	}
	d := parseChart(t, c.svg())
	require.Len(t, d.Panels, len(shapes)*len(columns))
	require.Len(t, textsOf(d.Texts, "head"), len(shapes))
	var names []int
	for _, text := range d.Texts {
		if strings.HasPrefix(text.Class, "name") {
			names = append(names, text.Y)
		}
	}
	for k, panel := range d.Panels {
		line := k / panelsAcross * len(some) // of the first candidate
		for i, value := range panel.Texts[2:] {
			require.Equal(t, names[line+i], value.Y)
		}
		x, top, bottom := 0, 0, 0
		_, err := fmt.Sscanf(panel.Paths[len(panel.Paths)-1].D, "M%d %dV%d", &x, &top, &bottom)
		require.NoError(t, err)
		require.Equal(t, int(panel.Bars[0].X)+ratioWidth, x)
		require.Less(t, top, names[line]-barHeight)
		require.Greater(t, bottom, names[line+len(some)-1])
		for i, bar := range panel.Bars {
			value := panel.Texts[2+i]
			require.Greater(t, value.X, bar.X+max(bar.Width, ratioWidth))
			require.LessOrEqual(t, value.X+float64(7*len(value.Text)), panel.Bars[0].X+panelWidth)
			require.LessOrEqual(t, panel.Bars[0].X+panelWidth, float64(d.Width))
		}
	}
	for i := 1; i < len(names); i++ {
		require.GreaterOrEqual(t, names[i]-names[i-1], lineHeight)
	}
	require.Less(t, names[len(names)-1], d.Height)
}

func TestChart_NotesSayWhereAndHow(t *testing.T) {
	notes := strings.Join(chartNotes(runner{rounds: 5, benchtime: 400 * time.Millisecond}), "\n")
	for _, text := range []string{"go1.", " cores, ", "encoding/json, the engine", "median of 5 turns of 400ms", time.Now().UTC().Format("2006-")} {
		require.Contains(t, notes, text)
	}
	require.NotContains(t, notes, "GOEXPERIMENT")
}

func TestRun_DrawsTheChartOfTheCalls(t *testing.T) {
	file := filepath.Join(t.TempDir(), "chart.svg")
	var out bytes.Buffer
	require.NoError(t, run([]string{
		"-quiet", "-markdown", "-benchtime", "1ms", "-rounds", "1", "-only", "acomm,netrpc", "-columns", "128B/1", "-shape", "text,tree", "-svg", file,
	}, &out, io.Discard))
	svg, err := os.ReadFile(file)
	require.NoError(t, err)
	d := parseChart(t, svg)
	require.Equal(t, []string{shapeLegends[text], shapeLegends[tree]}, textsOf(d.Texts, "head"))
	require.Len(t, d.Panels, 2)
	for k, shape := range []shape{text, tree} {
		_, table, _ := strings.Cut(out.String(), "### wall, ratio to the fastest peer, "+shape.String())
		values := regexp.MustCompile(`(?m)^\| .* \| +([0-9.]+) \|$`).FindAllStringSubmatch(table, 2)
		require.Equal(t, []string{values[0][1], values[1][1]}, textsOf(d.Panels[k].Texts, "value"))
	}
}

// A run takes minutes, so what can't be drawn is refused before it.
func TestRun_RefusesAChartItCannotDrawAtOnce(t *testing.T) {
	start := func(string, int, handler) (client, error) { return nil, errors.New("started") }
	real := candidates
	t.Cleanup(func() { candidates = real })
	candidates = []candidate{{name: "acomm", role: subject, start: start}, {name: "grpc", role: peer, start: start}}
	file := filepath.Join(t.TempDir(), "chart.svg")
	for _, test := range []struct{ name, err, args string }{
		{"no peer", "add a peer to -only", "-only acomm -svg " + file},
		{"another mode", "add calls to -mode", "-mode json -svg " + file},
		{"no directory", "no such file or directory", "-svg " + filepath.Join(file, "chart.svg")},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := run(strings.Fields("-quiet "+test.args), io.Discard, io.Discard)
			require.ErrorContains(t, err, "-svg: ")
			require.ErrorContains(t, err, test.err)
			require.NoFileExists(t, file)
		})
	}
	require.ErrorContains(t, run([]string{"-quiet", "-svg", file}, io.Discard, io.Discard), "started")
}
