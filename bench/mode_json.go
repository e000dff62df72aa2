package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"time"
)

// scan is a way to go through JSON.
type scan struct {
	title string
	take  func(data []byte) bool // false if it refuses data
}

var scans = []scan{
	{"acomm, receiving", isValue},
	{"acomm, sending", isMarshalled},
	{"json.Valid", json.Valid},
	{"json.Unmarshal", func(data []byte) bool { return json.Unmarshal(data, &Message{}) == nil }},
}

const (
	ours      = 2 // of the scans, the first ones
	yardstick = 2 // which of them is json.Valid
)

// scanSpeeds are those of a scan in each round.
type scanSpeeds struct{ speeds, ratios []float64 } // MB/s, and to json.Valid

// runJSON shows how fast acomm scans through a value, for each shape. The values
// are marshalled here: what acomm has marshalled itself it may know without a scan.
func runJSON(o options) error {
	var sizes []int
	for _, c := range o.columns {
		if !slices.Contains(sizes, c.size) {
			sizes = append(sizes, c.size)
		}
	}
	for _, shape := range shapes {
		t := &table{title: "scans of JSON, MB per second of CPU, " + shape.String(), head: []string{""}}
		for _, scan := range scans {
			t.add(scan.title)
		}
		for _, scan := range scans[:ours] {
			t.add(scan.title + ", times json.Valid")
		}
		for _, size := range sizes {
			o.report("scans of %s, %s", shape, formatSize(size))
			measured, err := o.measureScans(shape, size)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", shape, formatSize(size), err)
			}
			t.head = append(t.head, formatSize(size))
			for i, m := range measured {
				t.rows[i] = append(t.rows[i], digits(median(m.speeds)))
			}
			for i, m := range measured[:ours] {
				t.rows[len(scans)+i] = append(t.rows[len(scans)+i], fmt.Sprintf("%.2f", median(m.ratios)))
			}
		}
		if err := o.write(t); err != nil {
			return err
		}
	}
	return nil
}

// measureScans checks what the scans say, and lets them take turns.
func (r runner) measureScans(shape shape, size int) ([]scanSpeeds, error) {
	data, err := json.Marshal(shape.newMessage(size))
	if err != nil {
		return nil, err
	}
	for _, scan := range scans {
		if scan.take(data[:len(data)-1]) {
			return nil, fmt.Errorf("%s takes a value that is cut off", scan.title)
		}
	}
	measured := make([]scanSpeeds, len(scans))
	for round := range r.rounds {
		for i, scan := range scans {
			speed, err := r.timeScan(scan, data)
			if err != nil {
				return nil, err
			}
			measured[i].speeds = append(measured[i].speeds, speed)
		}
		for i := range measured {
			m := &measured[i]
			m.ratios = append(m.ratios, m.speeds[round]/measured[yardstick].speeds[round])
		}
	}
	return measured, nil
}

// timeScan returns the MB that a scan goes through in a second of CPU. The clock
// is read once in 64 KiB, so that it does not count.
func (r runner) timeScan(scan scan, data []byte) (float64, error) {
	batch := max(1, 64<<10/len(data))
	runtime.GC() // nothing is to pay for what came before it
	start, cpu := time.Now(), cpuTime()
	for done := batch; ; done += batch {
		for range batch {
			if !scan.take(data) {
				return 0, fmt.Errorf("%s refuses a valid value", scan.title)
			}
		}
		if time.Since(start) >= r.benchtime/5 || r.maxCalls > 0 && int64(done) >= r.maxCalls {
			used := max(cpuTime()-cpu, time.Nanosecond)
			return float64(done) * float64(len(data)) / 1e6 / used.Seconds(), nil
		}
	}
}
