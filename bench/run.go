package main

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// runner measures cells.
type runner struct {
	shape     shape         // of the calls' data
	benchtime time.Duration // of a turn
	rounds    int
	patience  time.Duration // what a turn may take beyond its time before calls count as lost
	maxCalls  int64         // ends a turn early; 0: no limit. For tests
	progress  func(text string)
}

// cell is a candidate in a column.
type cell struct {
	candidate
	column
}

// result is what a turn has given, or the median of several: each per call.
type result struct {
	wall, cpu, p99 float64 // nanoseconds
	allocs, bytes  float64
}

// measure gives the cells a turn each, round by round, and returns their medians.
func (r runner) measure(cells []cell) ([]result, error) {
	turns := make([][]result, len(cells))
	for round := range r.rounds {
		for i, c := range cells {
			r.report("round %d of %d: %s, %s, %s", round+1, r.rounds, c.title, r.shape, c.column)
			turn, err := r.turn(c)
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", c.name, c.column, err)
			}
			turns[i] = append(turns[i], turn)
		}
	}
	results := make([]result, len(cells))
	for i := range cells {
		results[i] = medians(turns[i])
	}
	return results, nil
}

func (r runner) report(format string, args ...any) {
	if r.progress != nil {
		r.progress(fmt.Sprintf(format, args...))
	}
}

// turn starts the candidate, warms it up and measures it once.
func (r runner) turn(c cell) (result, error) {
	s, err := r.newSession(c)
	if err != nil {
		return result{}, err
	}
	if err := s.warmUp(); err != nil {
		return result{}, s.giveUp(err)
	}
	data := r.shape.newMessage(c.size)
	stop := meter()
	calls, p99, err := s.drive(c.callers, data, r.limit())
	used := stop()
	if err != nil {
		return result{}, s.giveUp(err)
	}
	if err := s.close(); err != nil {
		return result{}, err
	}
	n := float64(calls)
	return result{
		wall:   float64(used.wall) / n,
		cpu:    float64(used.cpu) / n,
		p99:    float64(p99),
		allocs: float64(used.allocs) / n,
		bytes:  float64(used.bytes) / n,
	}, nil
}

// pace says whether a caller is to make another call. It is asked before each,
// with the time, by all callers at once.
type pace func(caller int, now time.Time) bool

// limit is the pace of a turn, which begins with the first call.
func (r runner) limit() pace {
	var begin sync.Once
	var deadline time.Time
	fewer := atMost(r.maxCalls)
	return func(caller int, now time.Time) bool {
		begin.Do(func() { deadline = now.Add(r.benchtime) })
		return now.Before(deadline) && (r.maxCalls == 0 || fewer(caller, now))
	}
}

// atMost allows a number of calls in all.
func atMost(calls int64) pace {
	var made atomic.Int64
	return func(int, time.Time) bool { return made.Add(1) <= calls }
}

// once allows each caller a call.
func once(callers int) pace {
	made := make([]bool, callers) // each caller has its own
	return func(caller int, _ time.Time) bool {
		first := !made[caller]
		made[caller] = true
		return first
	}
}

// session is a candidate while it runs.
type session struct {
	client
	cell
	shape    shape
	dir      string
	patience time.Duration
	made     int64 // calls
	served   atomic.Int64
}

func (r runner) newSession(c cell) (*session, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	s := &session{cell: c, shape: r.shape, dir: dir, patience: r.benchtime + r.patience}
	s.client, err = c.start(dir, c.callers, func(args *Message) *Message {
		s.served.Add(1)
		return args
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// warmUp opens the connections, and has the buffers grow.
func (s *session) warmUp() error {
	if _, _, err := s.drive(s.callers, s.shape.newMessage(min(s.size, 128)), once(s.callers)); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	if _, _, err := s.drive(1, s.shape.newMessage(s.size), atMost(1)); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	return nil
}

// close ends the candidate and compares the calls served with the calls made.
func (s *session) close() error {
	err := s.client.close()
	if served := s.served.Load(); served != s.made {
		err = errors.Join(err, fmt.Errorf("%d calls were made, %d served", s.made, served))
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// giveUp leaves the candidate as it is: with a call in an unknown state, closing
// it might block.
func (s *session) giveUp(err error) error {
	return errors.Join(err, os.RemoveAll(s.dir))
}

// drive has each caller make calls with the data for as long as more says. It returns the
// number of calls made and the time that 99 of 100 did not exceed. The first
// wrong answer ends it.
func (s *session) drive(callers int, data Message, more pace) (calls int64, p99 time.Duration, err error) {
	var failed atomic.Bool
	times := make([]histogram, callers)
	errs := make(chan error, callers)
	for caller := range callers {
		go func() { // ends with its last call; drive waits, unless the call is lost
			errs <- func() error {
				start := time.Now()
				for seq := int64(caller); more(caller, start) && !failed.Load(); seq += int64(callers) {
					args := data
					args.Seq = seq
					answer, err := s.call(caller, &args)
					if err == nil {
						err = checkAnswer(&args, answer)
					}
					if err != nil {
						failed.Store(true)
						return err
					}
					now := time.Now()
					times[caller].add(now.Sub(start))
					start = now
				}
				return nil
			}()
		}()
	}
	lost := time.NewTimer(s.patience)
	defer lost.Stop()
	for waiting := callers; waiting > 0; waiting-- {
		select {
		case callErr := <-errs:
			err = errors.Join(err, callErr)
		case <-lost.C:
			return 0, 0, errors.Join(err, fmt.Errorf("lost: %d callers have no answer after %v", waiting, s.patience))
		}
	}
	var all histogram
	for i := range times {
		all.merge(&times[i])
	}
	s.made += all.count
	return all.count, all.quantile(0.99), err
}

// histogram counts durations in steps of about 3 %. Adding allocates nothing.
type histogram struct {
	count   int64
	buckets [(histogramBits - 4) * 32]uint32
}

const histogramBits = 40 // durations from 2^40 ns, 18 minutes, are counted as that

func (h *histogram) add(d time.Duration) {
	ns := min(uint64(d), 1<<histogramBits-1)
	shift := max(0, bits.Len64(ns)-6) // leaves the 6 leading bits
	h.buckets[shift*32+int(ns>>shift)]++
	h.count++
}

func (h *histogram) merge(other *histogram) {
	h.count += other.count
	for i, n := range other.buckets {
		h.buckets[i] += n
	}
}

// quantile returns the lower end of the step that holds the quantile.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(q * float64(h.count))
	for i, n := range h.buckets {
		if rank -= int64(n); rank < 0 {
			shift := max(0, i/32-1)
			return time.Duration((i - shift*32) << shift)
		}
	}
	return 0
}

// usage is what this process has used.
type usage struct {
	wall, cpu     time.Duration
	allocs, bytes uint64
}

// meter begins to measure what this process uses, and returns what ends that. It
// collects the garbage first: nothing is to pay for what came before it.
func meter() (stop func() usage) {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, start := cpuTime(), time.Now()
	return func() usage {
		used := usage{wall: time.Since(start), cpu: cpuTime() - cpu}
		runtime.ReadMemStats(&after)
		used.allocs, used.bytes = after.Mallocs-before.Mallocs, after.TotalAlloc-before.TotalAlloc
		return used
	}
}

// cpuTime returns the user and system time of this process.
func cpuTime() time.Duration {
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		panic(err) // there is no other error than a wrong argument
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// medians returns the medians of the turns, each number on its own.
func medians(turns []result) result {
	of := func(number func(result) float64) float64 {
		numbers := make([]float64, len(turns))
		for i, turn := range turns {
			numbers[i] = number(turn)
		}
		return median(numbers)
	}
	return result{
		wall:   of(func(r result) float64 { return r.wall }),
		cpu:    of(func(r result) float64 { return r.cpu }),
		p99:    of(func(r result) float64 { return r.p99 }),
		allocs: of(func(r result) float64 { return r.allocs }),
		bytes:  of(func(r result) float64 { return r.bytes }),
	}
}

func median(numbers []float64) float64 {
	if len(numbers) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(numbers))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
