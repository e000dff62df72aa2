package main

import (
	"fmt"
	"math"
)

const (
	growthSize  = 128 // bytes, where something else grows
	growthUsers = 64  // callers that share the sockets
)

// growth is how far what grows.
type growth struct{ callers, sockets, sizes []int }

var fullGrowth = growth{
	callers: []int{1, 4, 16, 64, 256, 1024},
	sockets: []int{1, 4, 16, 64, 256},
	sizes:   []int{128, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20},
}

// runGrowth shows what a call costs with more of everything.
func runGrowth(o options) error {
	acomm := candidates[0]
	byCallers := growthSeries{title: fmt.Sprintf("growth with callers (%s, 1 socket)", formatSize(growthSize))}
	for _, n := range o.growth.callers {
		byCallers.add(fmt.Sprintf("%d callers", n), acomm, column{growthSize, n})
	}
	bySockets := growthSeries{title: fmt.Sprintf("growth with providers' sockets (%s, %d callers)", formatSize(growthSize), growthUsers)}
	for _, n := range o.growth.sockets {
		if n > growthUsers {
			break // each caller has one already
		}
		c := acomm
		c.start = startAcomm(n)
		bySockets.add(fmt.Sprintf("%d sockets", n), c, column{growthSize, growthUsers})
	}
	byPeers := growthSeries{title: fmt.Sprintf("growth with providers' sockets (%s, a caller for each)", formatSize(growthSize))}
	for _, n := range o.growth.sockets {
		c := acomm
		c.start = startAcomm(n)
		byPeers.add(fmt.Sprintf("%d sockets", n), c, column{growthSize, n})
	}
	bySize := growthSeries{title: "growth with size (1 caller, 1 socket)"}
	for _, n := range o.growth.sizes {
		bySize.add(formatSize(n), acomm, column{n, 1})
	}
	for _, series := range []growthSeries{byCallers, bySockets, byPeers, bySize} {
		results, err := o.measure(series.cells)
		if err != nil {
			return err
		}
		if err := o.write(series.table(results)); err != nil {
			return err
		}
	}
	return nil
}

// growthSeries is a table of cells in which one thing grows.
type growthSeries struct {
	title string
	names []string
	cells []cell
}

func (s *growthSeries) add(name string, c candidate, in column) {
	s.names = append(s.names, name)
	s.cells = append(s.cells, cell{c, in})
}

// table has the cost of a call and of a byte, and both as a ratio to the line
// before.
func (s *growthSeries) table(results []result) *table {
	t := &table{title: s.title, head: []string{"", "wall", "CPU", "CPU per byte", "p99", "allocations", "bytes", "wall / before", "CPU per byte / before"}}
	wallBefore, byteBefore := math.NaN(), math.NaN()
	for i, r := range results {
		perByte := r.cpu / float64(s.cells[i].size)
		t.add(s.names[i], formatTime(r.wall), formatTime(r.cpu), fmt.Sprintf("%.2f ns", perByte), formatTime(r.p99),
			fmt.Sprintf("%.0f", r.allocs), formatBytes(r.bytes), formatRatio(r.wall/wallBefore), formatRatio(perByte/byteBefore))
		wallBefore, byteBefore = r.wall, perByte
	}
	return t
}
