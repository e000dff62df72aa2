package acomm_test

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	model     = flag.Duration("model", 3*time.Second, "how long TestModel runs")
	modelSeed = flag.Uint64("seed", 0, "of TestModel's first round; the next ones have the next ones. 0: a random one")
)

// modelSlack is what the clock of the ledgers may be wrong by: somebody may set it.
const modelSlack = 20_000 // µs

// modelMessage is a message, or a response ("R" before the id), with what the ledgers
// say of it.
type modelMessage struct {
	id      string
	sends   []modelLine // send id how to
	sents   []modelLine // sent id class milliseconds
	took    []modelLine // took id how by run
	tracks  []modelLine // track id tracker
	untrack []modelLine // untrack id
	done    []modelLine // done id what; removed id
	odd     []modelLine // odd id: something that must never happen
}

// modelLine is a line of a ledger.
type modelLine struct {
	process int
	at      int64 // µs since the round began
	event   string
	id      string
	args    []string
	text    string
}

// modelPlace is where one process at a time is.
type modelPlace struct {
	name    string
	process *process
	number  int
	away    []modelTimes // when it may not be reached
}

type modelTimes struct{ from, to int64 } // µs since the round began; to is 0 while it lasts

// modelRound is the referee of a round.
type modelRound struct {
	testing.TB
	dir      string
	ledgers  string
	seed     uint64
	rng      *rand.Rand
	begun    time.Time
	places   []*modelPlace
	killed   map[int]bool // by number of the process
	number   int          // processes started
	kills    bool         // processes are killed
	actions  tally
	messages map[string]*modelMessage
	gone     map[string]int64 // by run of a listener, from when on no new message may reach it
	aborted  map[string]bool  // runs of listeners that did not wait for all of their handlers
	settled  int64            // µs: what was sent before must have an outcome
	wrongs   tally            // of messages
	problems []string
}

// Several processes send to each other, while listeners are stopped, moved and
// removed and processes stopped and killed. Each writes down what it sends, with what
// outcome, and what it handles. Then the ledgers are compared.
func TestModel_EveryMessageHasTheOutcomeThatSendNamed(t *testing.T) {
	seed := *modelSeed
	if seed == 0 {
		seed = rand.Uint64N(1_000_000)
	}
	for over := time.Now().Add(*model); time.Until(over) > time.Second && !t.Failed(); seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			length := 3 + rng.ExpFloat64()*10
			playModel(t, seed, rng, min(time.Duration(length*float64(time.Second)), time.Until(over)))
		})
	}
}

// playModel plays one round.
func playModel(t *testing.T, seed uint64, rng *rand.Rand, length time.Duration) {
	r := &modelRound{
		TB: t, dir: shortDir(t), ledgers: t.TempDir(), seed: seed, rng: rng, begun: time.Now(),
		killed: make(map[int]bool), messages: make(map[string]*modelMessage), gone: make(map[string]int64), aborted: make(map[string]bool),
	}
	r.kills = rng.IntN(3) > 0 // else whatever is lost is lost until the end
	for i := range 2 + rng.IntN(2) {
		r.places = append(r.places, &modelPlace{name: strconv.Itoa(i)})
	}
	ok := true
	for _, p := range r.places {
		ok = r.start(p) && ok
	}
	for _, p := range r.places {
		r.tell(p, "go")
	}
	for ok && time.Since(r.begun) < length {
		ok = r.act(length)
	}
	ok = ok && r.step("end", "idle") && r.step("stop services", "stopped") &&
		r.step("stop all", "left: goroutines 0, descriptors 0, sockets []")
	r.read(ok)
	r.judge()
	for _, p := range r.places {
		if ok {
			p.process.CloseInput()
		} else {
			_ = p.process.Signal(syscall.SIGQUIT) // shows where its goroutines are
		}
		_ = p.process.Wait()
	}
	t.Logf("seed %d: %.1f s, %d processes, %d at a time; %s", seed, time.Since(r.begun).Seconds(), r.number, len(r.places), &r.actions)
	r.report()
}

func (r *modelRound) now() int64 { return time.Now().UnixMicro() - r.begun.UnixMicro() }

// pause lets processes run for a time that is part of the round: nothing waits for it.
func (r *modelRound) pause(most time.Duration) {
	time.Sleep(time.Duration(r.rng.Int64N(int64(most))))
}

// start starts a process and waits until it is there.
func (r *modelRound) start(p *modelPlace) bool {
	if len(p.away) == 0 {
		p.away = append(p.away, modelTimes{})
	}
	var others []string
	for _, other := range r.places {
		if other != p {
			others = append(others, other.name)
		}
	}
	r.number++
	p.number = r.number
	p.process = startProcess(r.TB, "model", "DIR="+r.dir, "PLACE="+p.name, "OTHERS="+strings.Join(others, " "),
		"LEDGER="+r.ledger(p.number), fmt.Sprint("NUMBER=", p.number), fmt.Sprint("SEED=", r.seed), fmt.Sprint("BEGUN=", r.begun.UnixMicro()))
	ok := r.expect(p, "ready")
	p.away[len(p.away)-1].to = r.now()
	return ok
}

func (r *modelRound) ledger(number int) string { return filepath.Join(r.ledgers, strconv.Itoa(number)) }

func (r *modelRound) tell(p *modelPlace, what string) {
	if err := p.process.WriteLine(what); err != nil {
		r.problem("process %d can't be told to %s: %v", p.number, what, err)
	}
}

// expect reports whether the process says what it has to. All that it waits for ends
// by itself, and soon.
func (r *modelRound) expect(p *modelPlace, what string) bool {
	select {
	case line, ok := <-p.process.Lines():
		if line != what {
			r.problem("process %d says %q (%t), not %q", p.number, line, ok, what)
		}
		return line == what
	case <-time.After(patience):
		r.problem("process %d does not say %q", p.number, what)
		return false
	}
}

// step has all processes do something.
func (r *modelRound) step(command, answer string) bool {
	for _, p := range r.places {
		r.tell(p, command)
	}
	all := true
	for _, p := range r.places {
		all = r.expect(p, answer) && all
	}
	return all
}

// act does something to a process, or to all.
func (r *modelRound) act(length time.Duration) bool {
	r.pause(500 * time.Millisecond)
	p := r.places[r.rng.IntN(len(r.places))]
	switch n := r.rng.IntN(30); {
	case n < 10 && r.kills:
		return r.kill(p)
	case n < 20:
		r.actions.add("stopped for a moment")
		if p.process.Signal(syscall.SIGSTOP) != nil {
			return r.expect(p, "to be alive")
		}
		r.pause(400 * time.Millisecond)
		if r.kills && r.rng.IntN(4) == 0 {
			return r.kill(p) // it does not see the end
		}
		_ = p.process.Signal(syscall.SIGCONT)
	case n == 20 && time.Since(r.begun)+15*time.Second < length:
		r.actions.add("calm")
		for _, p := range r.places {
			r.tell(p, "calm")
		}
		r.pause(15 * time.Second)
		for _, p := range r.places {
			r.tell(p, "go on")
		}
	}
	return true
}

// kill kills a process and starts another one in its place.
func (r *modelRound) kill(p *modelPlace) bool {
	r.actions.add("killed")
	r.killed[p.number] = true
	p.away = append(p.away, modelTimes{from: r.now()})
	p.process.Kill()
	if err := p.process.Wait(); !strings.Contains(fmt.Sprint(err), "killed") {
		r.problem("process %d had ended before it was killed: %v", p.number, err)
		return false
	}
	r.pause(50 * time.Millisecond)
	if !r.start(p) {
		return false
	}
	r.tell(p, "go")
	return true
}

func (r *modelRound) problem(format string, args ...any) {
	r.problems = append(r.problems, fmt.Sprintf(format, args...))
}

// read reads the ledgers. Where the processes have not all come to their end, what
// has just been sent may have no outcome yet.
func (r *modelRound) read(ended bool) {
	r.settled = math.MaxInt64
	if !ended {
		r.settled = r.now() - 5_000_000
	}
	for number := 1; number <= r.number; number++ {
		data, err := os.ReadFile(r.ledger(number))
		require.NoError(r, err)
		for text := range slices.Chunk(data, modelLineSize) {
			fields := strings.Fields(string(text))
			if len(text) != modelLineSize || text[modelLineSize-1] != '\n' || len(fields) < 3 {
				r.problem("process %d: no line of a ledger: %q", number, text)
				break
			}
			at, err := strconv.ParseInt(fields[0], 10, 64)
			require.NoError(r, err)
			r.add(modelLine{number, at, fields[1], fields[2], fields[3:], strings.TrimSpace(string(text))})
		}
	}
}

// add files a line.
func (r *modelRound) add(line modelLine) {
	switch line.event {
	case "start":
		r.actions.add("listener started")
		return
	case "abort":
		r.aborted[line.id] = true
		return
	case "gone":
		if at, ok := r.gone[line.id]; !ok || line.at < at {
			r.gone[line.id] = line.at
		}
		return
	}
	m := r.messages[line.id]
	if m == nil {
		m = &modelMessage{id: line.id}
		r.messages[line.id] = m
	}
	lines := map[string]*[]modelLine{
		"send": &m.sends, "sent": &m.sents, "took": &m.took, "track": &m.tracks, "untrack": &m.untrack,
		"done": &m.done, "removed": &m.done, "odd": &m.odd,
	}[line.event]
	require.NotNil(r, lines, "%s", line.text)
	*lines = append(*lines, line)
}

// judge compares the ledgers.
func (r *modelRound) judge() {
	for _, m := range r.messages {
		odd := ""
		if len(m.odd) > 0 {
			odd = "SOMETHING ODD, as the stderr of its process says"
		}
		for _, wrong := range []string{odd, r.wrong(m), r.wrongTracking(m)} {
			if wrong != "" {
				r.wrongs.add(wrong)
				r.problem("%s: %s\n%s", m.id, wrong, r.all(m.id))
			}
		}
	}
}

// wrong says what is wrong with a message, if anything.
func (r *modelRound) wrong(m *modelMessage) string {
	switch {
	case len(m.sends) == 0 && len(m.took)+len(m.sents) > 0:
		return "NEVER SENT"
	case len(m.sends) == 0:
		return "" // killed between tracking and sending
	case len(m.took) > 1:
		return "HANDLED TWICE"
	case len(m.sends) > 1 || len(m.sents) > 1:
		return "SENT TWICE"
	}
	send := m.sends[0]
	how, to := send.args[0], send.args[1]
	took := len(m.took) == 1
	if took {
		r.actions.add("handled: " + how)
		by := m.took[0]
		gone, ok := r.gone[by.args[2]]
		switch {
		case by.args[0] != how || by.args[1] != to:
			return "HANDLED BY ANOTHER LISTENER, or asked for something else"
		case ok && send.at > gone+modelSlack:
			return "HANDLED BY A LISTENER THAT WAS NOT THERE any more"
		}
	}
	if len(m.sents) == 0 {
		if !r.killed[send.process] && send.at < r.settled {
			return "NO OUTCOME"
		}
		r.actions.add("sent: sender killed")
		return ""
	}
	sent := m.sents[0]
	class := sent.args[0]
	r.actions.add("sent: " + class)
	if ms, err := strconv.Atoi(sent.args[1]); err != nil || ms > 62_000 { // it may have been stopped
		return "SEND TOOK TOO LONG"
	}
	tracker := how == "tracker"
	refuses, silent := how == "refuse", how == "silent" || how == "hang"
	switch class {
	case "ok":
		if !tracker && (!took || refuses || silent) {
			return "ACKNOWLEDGED, NOT HANDLED"
		}
	case "refused":
		if !took || !refuses {
			return "REFUSED BY NOBODY"
		}
	case "absent", "nobody", "denied", "size":
		if took {
			return "HANDLED, but Send is certain that it was not"
		}
		if class != "size" && r.reachable(send, sent) {
			return "NOT REACHED, but the listener was there all the time"
		}
	case "eof":
		if !silent && r.reachable(send, sent) {
			return "OUTCOME UNKNOWN, but the listener was there all the time"
		}
		if !silent && took && !r.aborted[m.took[0].args[2]] && !r.away(send, sent) {
			return "ANSWER LOST"
		}
	case "late":
		if how != "hang" {
			return "NO ANSWER, but nobody was silent"
		}
	default:
		return "OUTCOME NOT DOCUMENTED"
	}
	return ""
}

// reachable reports whether the message was for a listener or tracker that was there
// during all of its exchange.
func (r *modelRound) reachable(send, sent modelLine) bool {
	name := filepath.Base(send.args[1])
	return slices.Contains([]string{modelSteady, modelHook, modelSteadyTracker}, name) && !r.away(send, sent)
}

// away reports whether the process that the message was for was not there at some time
// of its exchange.
func (r *modelRound) away(send, sent modelLine) bool {
	name := filepath.Dir(send.args[1])
	p := r.places[slices.IndexFunc(r.places, func(p *modelPlace) bool { return p.name == name })]
	return slices.ContainsFunc(p.away, func(away modelTimes) bool {
		return send.at < away.to+modelSlack && sent.at > away.from-modelSlack
	})
}

// wrongTracking says what is wrong with the completion of a request.
func (r *modelRound) wrongTracking(m *modelMessage) string {
	switch {
	case len(m.tracks) == 0 && len(m.done) > 0:
		return "COMPLETED, NOT TRACKED"
	case len(m.tracks) == 0:
		return ""
	case len(m.untrack) > 0 && len(m.done) > 0:
		return "COMPLETED, but the tracker did not take it"
	case len(m.done) > 1:
		return "COMPLETED TWICE"
	case len(m.untrack)+len(m.done) == 0 && !r.killed[m.tracks[0].process] && r.settled == math.MaxInt64:
		return "NEVER COMPLETED"
	case len(m.done) == 0:
		return ""
	}
	what := "removed"
	if m.done[0].event == "done" {
		what = m.done[0].args[0]
	}
	r.actions.add("tracked: " + what)
	response := r.messages["R"+m.id]
	class := ""
	if response != nil && len(response.sents) > 0 {
		class = response.sents[0].args[0]
	}
	switch what {
	case "response", "failed":
		if response == nil || len(response.sends) == 0 {
			return "COMPLETED WITH A RESPONSE that nobody sent"
		}
		if class != "" && class != "ok" && class != "eof" {
			return "COMPLETED WITH A RESPONSE that has certainly not arrived"
		}
	case "timeout", "removed":
		patient := m.tracks[0].args[0] == modelSteadyTracker
		if patient && class == "ok" && m.done[0].at > response.sents[0].at+3_000_000 {
			return "RESPONSE ACKNOWLEDGED, AND LOST"
		}
	}
	return ""
}

// all returns the lines about a message and its response.
func (r *modelRound) all(id string) string {
	var lines []modelLine
	id = strings.TrimPrefix(id, "R")
	for _, m := range []*modelMessage{r.messages[id], r.messages["R"+id]} {
		if m != nil {
			lines = slices.Concat(lines, m.tracks, m.untrack, m.sends, m.took, m.sents, m.done, m.odd)
		}
	}
	slices.SortStableFunc(lines, func(a, b modelLine) int { return int(a.at - b.at) })
	var text strings.Builder
	for _, line := range lines {
		fmt.Fprintf(&text, "\tprocess %d: %s\n", line.process, line.text)
	}
	return text.String()
}

// report fails the test for what is wrong.
func (r *modelRound) report() {
	for _, must := range []string{"ok", "refused", "eof"} {
		if r.actions.get("sent: "+must) == 0 {
			r.problem("it shows nothing without %s", must)
		}
	}
	if len(r.problems) == 0 {
		return
	}
	const shown = 20
	for _, problem := range r.problems[:min(shown, len(r.problems))] {
		r.Error(problem)
	}
	for _, p := range r.places {
		r.Logf("place %s, now with process %d, was away (µs): %v", p.name, p.number, p.away)
	}
	r.Errorf("%d problems; %s; again with: make model DURATION=30s SEED=%d", len(r.problems), &r.wrongs, r.seed)
}
