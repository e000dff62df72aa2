package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// header says when, with what and on what a run was made.
func header(r runner) *table {
	t := &table{title: "Set-up", head: []string{"", "of this run"}, words: true}
	t.add("date", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	t.add("Go", runtime.Version()+" "+runtime.GOOS+"/"+runtime.GOARCH)
	t.add("JSON", jsonEngine)
	t.add("cores", fmt.Sprintf("%d, GOMAXPROCS %d", runtime.NumCPU(), runtime.GOMAXPROCS(0)))
	t.add("processor", processor())
	t.add("kernel", kernel())
	t.add("turns", fmt.Sprintf("%v, %d rounds", r.benchtime, r.rounds))
	for _, c := range candidates {
		if c.module != "" {
			t.add(c.module, moduleVersion(c.module))
		}
	}
	return t
}

func moduleVersion(path string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == path {
			return dep.Version
		}
	}
	return "unknown"
}

// load is what the machine's processors have done.
type load struct{ all, own time.Duration }

// readLoad returns false where the system does not say.
func readLoad() (load, bool) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return load{}, false
	}
	first, _, _ := strings.Cut(string(stat), "\n")
	fields := strings.Fields(first) // cpu user nice system idle iowait irq softirq steal ...
	if len(fields) < 9 {
		return load{}, false
	}
	var ticks int
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			return load{}, false
		}
		ticks += n
	}
	return load{time.Duration(ticks) * 10 * time.Millisecond, cpuTime()}, true
}

// meterOthers begins to measure what others have the processors do, and returns
// what ends that: a share of all processors. Numbers from a busy machine are to be
// distrusted, wall before CPU.
func meterOthers() (stop func() string) {
	start := time.Now()
	before, ok := readLoad()
	return func() string {
		after, okAfter := readLoad()
		if !ok || !okAfter {
			return "unknown"
		}
		others := (after.all - before.all) - (after.own - before.own)
		share := others.Seconds() / time.Since(start).Seconds() / float64(runtime.NumCPU())
		return fmt.Sprintf("%.0f %% of the processors", max(0, 100*share))
	}
}

func kernel() string {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return runtime.GOOS
	}
	return "Linux " + strings.TrimSpace(string(release))
}

func processor() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for lines := bufio.NewScanner(bytes.NewReader(info)); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
