package acomm

import (
	"context"
	"net/url"
	"time"
)

// What the tests reach behind the documented surface: the times, so that no test
// has to wait for a minute; the limits; and one status, that of sessions, which no user
// sees. What needs to see or set more of the library is a test inside the package.

const (
	SendTimeout = sendTimeout
	MaxPayload  = maxPayload
	MaxAnswer   = maxAnswer
	MaxPath     = maxSocketPath
	StreamEnd   = streamEnd
)

// SendContext is Send with another time than a minute: the context's.
func SendContext(ctx context.Context, addr *url.URL, payload any) error {
	deadline, _ := ctx.Deadline()
	return send(deadline, addr, payload)
}

// SetExchangeTimeout sets what bounds the reading of a response. Call it before
// Start, as the others.
func (t *Tracker) SetExchangeTimeout(d time.Duration) { t.exchangeTimeout = d }

func (t *Tracker) SetStreamClaim(d time.Duration) { t.streamClaim = d }

func (t *Tracker) SetStreamEnd(d time.Duration) { t.streamEnd = d }

func (t *Tracker) SetStreamStall(d time.Duration) { t.streamStall = d }

// MaxPosts is how many posts go to a host at a time.
const MaxPosts = maxPosts

const (
	SenderName  = senderName
	SessionName = sessionName
	Greeting    = greeting
	MaxMessage  = maxMessage
	MaxInFlight = maxInFlight
	MaxSessions = maxSessions
	CheckedFor  = checkedFor

	MaxInFlightBytes = maxInFlightBytes
	MaxUnsentAnswers = maxUnsentAnswers
)

// SessionStatus is what sessions the process has, to a path and to its own listener
// there.
type SessionStatus struct {
	Opening   bool // one is being opened, or that failed a moment ago
	Known     bool // messages to the path go by a session
	Open      bool // and more may be sent
	Carried   bool // by one that the listener's process has opened
	InFlight  int  // messages to the path that are not answered
	Unwritten uint64

	Accepted      int    // by the listener at the path
	UnsentAnswers uint64 // bytes, of that listener
	Opened        int    // by the process, to any path
}

// SessionTo returns the status of the sessions to the path.
func SessionTo(path string) (st SessionStatus) {
	file, _ := statFile(path)
	sessions.mu.Lock()
	defer sessions.mu.Unlock()
	for s := range sessions.all {
		if s.opened {
			st.Opened++
			continue
		}
		s.mu.Lock()
		if s.file.isSame(file) {
			st.Accepted++
			st.UnsentAnswers += s.out.answers
		}
		s.mu.Unlock()
	}
	st.Opening = time.Now().Before(sessions.avoid[path])
	r := sessions.routes[path]
	if r == nil {
		return st
	}
	st.Known, st.Carried = true, r.carrier != nil
	for _, s := range []*session{r.own, r.carrier} {
		if s == nil {
			continue
		}
		s.mu.Lock()
		st.Open = st.Open || s.calls.state == halfOpen
		st.InFlight += len(s.calls.pending)
		st.Unwritten += s.out.unwritten()
		s.mu.Unlock()
	}
	return st
}

// SetSessionWriteTimeout sets how long a peer may take nothing of what is written to
// it, and returns the time that was. There may be no session meanwhile.
func SetSessionWriteTimeout(d time.Duration) (old time.Duration) {
	old, sessionWriteTimeout = sessionWriteTimeout, d
	return old
}

// SetSessionIdleTimeout sets how long a session is idle before who opened it closes it,
// and returns the time that was. There may be no session meanwhile.
func SetSessionIdleTimeout(d time.Duration) (old time.Duration) {
	old, sessionIdleTimeout = sessionIdleTimeout, d
	return old
}
