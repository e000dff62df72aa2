package acomm

import (
	"context"
	"maps"
	"net/url"
	"slices"
	"time"
)

// What the tests reach behind the documented surface: the times, so that no test
// has to wait for a minute, and nothing else.

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

// SetHashMask sets how much of the hashes of ids differs.
func (t *Tracker) SetHashMask(mask uint64) { t.hashMask = mask }

func (t *Tracker) SetStreamClaim(d time.Duration) { t.streamClaim = d }

func (t *Tracker) SetStreamEnd(d time.Duration) { t.streamEnd = d }

func (t *Tracker) SetStreamStall(d time.Duration) { t.streamStall = d }

// MaxPosts is how many posts go to a host at a time.
const MaxPosts = maxPosts

// HostsPostedTo returns to how many hosts posts are under way.
func HostsPostedTo() int {
	posts.mu.Lock()
	defer posts.mu.Unlock()
	return len(posts.byHost)
}

const (
	KeptName  = keptName
	KeptHello = keptHello
	KeptLimit = keptLimit
	KeptShare = keptShare
	KeptMost  = keptConns
	KeptLook  = keptLook

	KeptWindow = keptWindow
	KeptQueue  = keptQueue
)

// KeptAgreed reports whether the process keeps a connection to the path that its
// listener has agreed to keep.
func KeptAgreed(path string) bool {
	c := kept.to(path)
	if c == nil {
		return false
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.agreed && !c.retired
}

// KeptTo reports whether the process keeps a connection to the path, or is about
// to.
func KeptTo(path string) bool {
	return kept.to(path) != nil
}

// KeptLinked reports whether messages to the path go by a connection that was made
// by the process that listens there.
func KeptLinked(path string) bool {
	c := kept.to(path)
	return c != nil && !c.made
}

// KeptUnwritten returns how many bytes wait to be written to the path.
func KeptUnwritten(path string) uint64 {
	c := kept.to(path)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.queued - c.out.written
}

// SetKeptPatience sets how long a peer may take nothing of what is written to it,
// and returns the time that was. Nothing may be kept meanwhile.
func SetKeptPatience(d time.Duration) (old time.Duration) {
	old, keptPatience = keptPatience, d
	return old
}

// SetKeptRest sets how long a connection rests before its sender closes it, and
// returns the time that was. Nothing may be kept meanwhile.
func SetKeptRest(d time.Duration) (old time.Duration) {
	old, keptRest = keptRest, d
	return old
}

// SetKeptNumber sets the number of the last message on the connection kept to the
// path, and SetKeptNumbers that of those the listener keeps.
func SetKeptNumber(path string, number uint32) {
	c := kept.to(path)
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.last = number
}

func (ul *UnixListener) SetKeptNumbers(number uint32) {
	ul.mu.Lock()
	keeping := slices.Collect(maps.Keys(ul.run.kept))
	ul.mu.Unlock()
	for _, c := range keeping {
		c.out.mu.Lock()
		c.last = number
		c.out.mu.Unlock()
	}
}

// KeptAnswers returns how many bytes of answers wait to be written on the
// connections the listener keeps.
func (ul *UnixListener) KeptAnswers() (waiting uint64) {
	ul.mu.Lock()
	keeping := slices.Collect(maps.Keys(ul.run.kept))
	ul.mu.Unlock()
	for _, c := range keeping {
		c.out.mu.Lock()
		waiting += c.out.answers
		c.out.mu.Unlock()
	}
	return waiting
}

// KeptConns counts the connections that the process keeps.
func KeptConns() int {
	kept.mu.Lock()
	defer kept.mu.Unlock()
	return len(kept.live)
}

// KeptWaiting counts the messages on the connection kept to the path that wait for
// their acknowledgement.
func KeptWaiting(path string) int {
	c := kept.to(path)
	if c == nil {
		return 0
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return len(c.waiting)
}

// NotDelivered reports whether an error of Send proves that nobody has the payload.
func NotDelivered(err error) bool { return notDelivered(err) }

// HostOf returns the host that the turns of posts to the URL are of.
func HostOf(addr *url.URL) string { return hostOf(addr) }
