package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

const (
	progressEvery = 100 * time.Millisecond // a line is drawn
	speedOver     = 3 * time.Second        // what the speed is the mean of
	narrowest     = 20                     // columns; a terminal that says less says nothing
)

// progress draws a line on a terminal that says how much of a stream has come. What is
// written to it is counted.
type progress struct {
	terminal *os.File
	name     string
	n        atomic.Int64

	stop  chan struct{} // closed to end the drawing
	drawn sync.WaitGroup
	width int // columns of the line that is shown; the drawing's, until it has ended
}

// newProgress begins to draw.
func newProgress(terminal *os.File, name string) *progress {
	p := &progress{terminal: terminal, name: name, stop: make(chan struct{})}
	began := time.Now()
	speed := &speed{samples: []speedSample{{at: began}}}
	p.draw(0, 0, 0, 0)
	p.drawn.Go(func() { // clear waits for it
		ticks := time.NewTicker(progressEvery)
		defer ticks.Stop()
		for frame := 1; ; frame++ {
			select {
			case <-p.stop:
				return
			case now := <-ticks.C:
				n := p.n.Load()
				p.draw(frame, n, speed.at(now, n), now.Sub(began))
			}
		}
	})
	return p
}

func (p *progress) Write(b []byte) (int, error) {
	p.n.Add(int64(len(b)))
	return len(b), nil
}

// clear ends the drawing and removes the line.
func (p *progress) clear() {
	close(p.stop)
	p.drawn.Wait()
	_, _ = io.WriteString(p.terminal, "\r"+strings.Repeat(" ", p.width)+"\r")
}

// draw draws the line over the one before.
func (p *progress) draw(frame int, n, perSecond int64, elapsed time.Duration) {
	columns, _, err := term.GetSize(int(p.terminal.Fd()))
	if err != nil || columns < narrowest {
		columns = 80
	}
	line := progressLine(frame, p.name, n, perSecond, elapsed, columns-1) // in the last column it would wrap
	width := textWidth(line)
	_, _ = io.WriteString(p.terminal, "\r"+line+strings.Repeat(" ", max(0, min(p.width, columns-1)-width)))
	p.width = width
}

var spinner = []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")

// progressLine is the line in so many columns. A name that is too long is cut.
func progressLine(frame int, name string, n, perSecond int64, elapsed time.Duration, columns int) string {
	numbers := fmt.Sprintf("  %s  %s/s  %v", byteCount(n), byteCount(perSecond), elapsed.Truncate(time.Second))
	room := columns - 2 - len(numbers)
	if textWidth(name) > room {
		short, width := strings.Builder{}, 3
		for _, r := range name {
			if width += runeWidth(r); width > room {
				break
			}
			short.WriteRune(r)
		}
		name = short.String() + "..."
	}
	if room < len("...") {
		name = ""
	}
	line := []rune(string(spinner[frame%len(spinner)]) + " " + name + numbers)
	return string(line[:min(len(line), columns)])
}

// textWidth is how many columns the text takes at most.
func textWidth(text string) (columns int) {
	for _, r := range text {
		columns += runeWidth(r)
	}
	return columns
}

// runeWidth is one column, or two where a terminal may take two: from U+1100 on, but for
// the spinner's.
func runeWidth(r rune) int {
	if r >= 0x1100 && (r < 0x2800 || r > 0x28ff) {
		return 2
	}
	return 1
}

// byteCount is the number of bytes in the unit that suits.
func byteCount(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, units := float64(n)/(1<<10), []string{"KiB", "MiB", "GiB", "TiB"}
	for value >= 1<<10 && len(units) > 1 {
		value, units = value/(1<<10), units[1:]
	}
	return fmt.Sprintf("%.1f %s", value, units[0])
}

// speed knows how fast a count has grown of late.
type speed struct{ samples []speedSample }

type speedSample struct {
	at time.Time
	n  int64
}

// at notes the count and returns by how much it has grown in a second, as the mean of
// speedOver.
func (s *speed) at(now time.Time, n int64) int64 {
	s.samples = append(s.samples, speedSample{now, n})
	for len(s.samples) > 2 && now.Sub(s.samples[1].at) >= speedOver {
		s.samples = s.samples[1:]
	}
	first := s.samples[0]
	if elapsed := now.Sub(first.at); elapsed > 0 {
		return int64(float64(n-first.n) / elapsed.Seconds())
	}
	return 0
}
