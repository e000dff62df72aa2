package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// How far a call has come, in the report of --json.
const (
	phaseNotTaken     = "not taken"    // nobody has the request
	phaseSent         = "sent"         // it may have been taken, and may not
	phaseAcknowledged = "acknowledged" // it was taken
	phaseAnswered     = "answered"     // there is a response
	phaseTimedOut     = "timed out"    // there was none in time
)

// callReport is what --json says of a call. Its methods may be called on nil, where there
// is no such report, and from any goroutine.
type callReport struct {
	mu sync.Mutex // guards the fields below

	ID     string          `json:"id"` // empty: there was no request
	Task   string          `json:"task"`
	Phase  string          `json:"phase"`
	Result json.RawMessage `json:"result"` // null without a response that is a success
	Error  *string         `json:"error"`  // null: none
	Stream *streamReport   `json:"stream"` // null: the response had none
	Times  struct {        // null: it did not happen
		Sent         *time.Time `json:"sent"`
		Acknowledged *time.Time `json:"acknowledged"`
		Answered     *time.Time `json:"answered"`
		Ended        *time.Time `json:"ended"`
	} `json:"times"`
}

type streamReport struct {
	Bytes    int64   `json:"bytes"` // that were written
	Complete bool    `json:"complete"`
	File     *string `json:"file"` // null: it went to standard output
}

// update changes the report, if there is one.
func (r *callReport) update(change func(now *time.Time)) {
	if r == nil {
		return
	}
	now := time.Now().UTC().Round(time.Microsecond)
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&now)
}

// sending notes that the request with the id is on its way.
func (r *callReport) sending(id string) {
	r.update(func(now *time.Time) { r.ID, r.Phase, r.Times.Sent = id, phaseSent, now })
}

func (r *callReport) notTaken() {
	r.update(func(*time.Time) { r.Phase = phaseNotTaken })
}

// acknowledged may be noted after answered: the response may overtake it.
func (r *callReport) acknowledged() {
	r.update(func(now *time.Time) {
		r.Times.Acknowledged = now
		if r.Phase == phaseSent {
			r.Phase = phaseAcknowledged
		}
	})
}

func (r *callReport) answered() {
	r.update(func(now *time.Time) { r.Phase, r.Times.Answered = phaseAnswered, now })
}

func (r *callReport) timedOut() {
	r.update(func(*time.Time) { r.Phase = phaseTimedOut })
}

func (r *callReport) result(result json.RawMessage) {
	r.update(func(*time.Time) { r.Result = unescapeJSON(result) })
}

// stream notes how a stream has ended that went to the file, or to standard output.
func (r *callReport) stream(n int64, complete bool, file string) {
	r.update(func(*time.Time) {
		r.Stream = &streamReport{Bytes: n, Complete: complete}
		if file != "" && file != "-" {
			r.Stream.File = &file
		}
	})
}

// end writes the report: to standard output, or, if the stream went there, to standard
// error. It returns an error that decides the exit code and needs no words, but for one
// of usage, which is not reported.
func (r *callReport) end(failed error) error {
	if r == nil {
		return failed
	}
	code := exitDone
	if failed != nil {
		code = exitTask
		exit := (*exitError)(nil)
		if errors.As(failed, &exit) {
			if code = exit.code; code == exitUsage {
				return failed
			}
		}
		text := failed.Error()
		r.update(func(*time.Time) { r.Error = &text })
	}
	to := os.Stdout
	var line bytes.Buffer
	var err error
	r.update(func(now *time.Time) {
		r.Times.Ended = now
		if r.Stream != nil && r.Stream.File == nil {
			to = os.Stderr
		}
		encoder := json.NewEncoder(&line)
		encoder.SetEscapeHTML(false)
		err = encoder.Encode(r)
	})
	text := unescapeJSON(line.Bytes())
	if term.IsTerminal(int(to.Fd())) {
		text = inertJSON(text)
	}
	if err == nil {
		_, err = to.Write(text)
	}
	if err != nil && code == exitDone {
		return outputError(err)
	}
	if code == exitDone {
		return nil
	}
	return &exitError{code: code}
}
