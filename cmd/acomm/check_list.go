package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/mistifyio/acomm"
)

// peerCheck is one thing that PROTOCOL.md asks of a peer.
type peerCheck struct {
	section string // of PROTOCOL.md
	asks    string
	only    string // unix or http; empty: both
	not2016 bool   // peers of 2016 can't do it
	sound   bool   // says something only if sound requests are accepted
	look    func(*checker) (seen string, err error)
}

// peerChecks are the checks for a peer at the URL, in their order.
func peerChecks(target *url.URL) (checks []peerCheck) {
	for _, check := range allChecks {
		if check.only == "" || (check.only == "unix") == (target.Scheme == "unix") {
			checks = append(checks, check)
		}
	}
	return checks
}

var allChecks = []peerCheck{
	{section: "3, 5", only: "unix", look: lookFirst,
		asks: "A request in one write is acknowledged, and the connection stays open until then."},
	{section: "6", only: "http", look: lookFirst,
		asks: "A POST with a request is acknowledged: 2xx, with an empty body or a Response."},
	{section: "5", sound: true, look: lookAcknowledgedFirst,
		asks: "A request is acknowledged before its response is."},
	{section: "2, 5", only: "unix", sound: true, look: lookOvertaken,
		asks: "The response is sent even if the acknowledgement is still unread."},

	{section: "3", only: "unix", not2016: true, look: lookPieces,
		asks: "A frame is read in any number of pieces."},
	{section: "3", look: lookArgs(30_000),
		asks: "30,000 bytes of arguments are taken."},
	{section: "3", not2016: true, look: lookArgs(1 << 20),
		asks: "1 MiB of arguments is taken."},
	{section: "3", not2016: true, look: lookLimit,
		asks: "A payload of 64 MiB, the limit, is acknowledged."},
	{section: "3", only: "unix", not2016: true, look: lookOverLimit,
		asks: "A frame that announces more than 64 MiB is refused, or the connection is closed, before more is read."},
	{section: "3", only: "unix", look: lookBroken("\x00\x00\x00\x00", false),
		asks: "A length of 0 is not a message: the connection is closed."},
	{section: "3", only: "unix", look: lookBroken("\x00\x00", true),
		asks: "After a header that is cut off the connection is closed."},
	{section: "3", only: "unix", look: lookBroken("\x00\x00\x01\x00{\"id\":\"1\"}", true),
		asks: "After a payload that is cut off the connection is closed."},
	{section: "3", look: lookNotTaken(`{"id":`, `}`, `request`, "\xff\xfe", `{"id":"1"} {}`),
		asks: "A payload that is not JSON is not taken, and the connection is closed."},
	{section: "3", not2016: true, look: lookDeep,
		asks: "100 levels of JSON are taken, more than 10,000 are not."},

	{section: "4", look: lookNotTaken(`5`, `"request"`, `[]`, `{"id":5,"task":"a","responsehook":{}}`, `{"id":"1","task":{},"responsehook":{}}`, `{"id":"1","task":"a","responsehook":5}`),
		asks: "A payload with a wrong type is not taken, and the connection is closed."},
	{section: "4", look: lookNotTaken(`null`),
		asks: "A payload of null is not taken as a request."},
	{section: "4", look: lookUnknown,
		asks: "Unknown members are skipped, whatever they hold."},
	{section: "4", look: lookForm(func(r *checkRequest) { r.args = "" }),
		asks: "The arguments may be absent."},
	{section: "4", sound: true, look: lookEscapes,
		asks: "An id with escapes comes back as the text that it stands for."},
	{section: "4", sound: true, look: lookForm(func(r *checkRequest) { r.hook = minimalURL(r.hook) }),
		asks: "A URL object needs only the members that are not empty."},
	{section: "4", only: "unix", sound: true, look: lookPath,
		asks: "The path of a unix URL is taken as it is, with a space, %41, ? and #."},
	{section: "4", sound: true, look: lookInvalid(map[string]func(*checkRequest){
		"without an id":      func(r *checkRequest) { r.id = "" },
		"with id null":       func(r *checkRequest) { r.id = "null" },
		"with an empty id":   func(r *checkRequest) { r.id = `""` },
		"without a task":     func(r *checkRequest) { r.task = "" },
		"with an empty task": func(r *checkRequest) { r.task = `""` },
		"without a hook":     func(r *checkRequest) { r.hook = "" },
		"with hook null":     func(r *checkRequest) { r.hook = "null" },
	}),
		asks: "A request without id, task or hook is refused in the acknowledgement."},
	{section: "4", only: "unix", not2016: true, sound: true, look: lookInvalid(map[string]func(*checkRequest){
		"with a host":          func(r *checkRequest) { r.hook = `{"Scheme":"unix","Host":"h","Path":"/r.sock"}` },
		"with an opaque part":  func(r *checkRequest) { r.hook = `{"Scheme":"unix","Opaque":"r.sock"}` },
		"with a relative path": func(r *checkRequest) { r.hook = `{"Scheme":"unix","Path":"r.sock"}` },
	}),
		asks: "A unix hook with a host, an opaque part or a relative path is refused."},
	{section: "4", look: lookStringHook,
		asks: "A hook that is a string is refused, or it gets its response."},

	{section: "6, 7", only: "http", sound: true, look: lookRedirected,
		asks: "A redirect by the hook (307) is followed, and the response is sent there."},
	{section: "6, 7", only: "http", sound: true, look: lookUnavailable,
		asks: "If the hook answers 503 without Retry-After, the response is not sent again."},
	{section: "8", sound: true, look: lookStream,
		asks: "A stream can be read to its end, once."},

	{section: "3, 5", look: lookAcks,
		asks: "Each acknowledgement is one Response, written at once."},
	{section: "3, 4", only: "unix", look: lookResponses,
		asks: "Each response is one frame, written at once; its sender reads the acknowledgement and closes."},
	{section: "4, 6", only: "http", look: lookResponses,
		asks: "Each response is POSTed as application/json, with members of the right types."},
	{section: "5, 7", look: lookStrays,
		asks: "An accepted request gets one response, a refused one gets none."},
}

// ask sends a request, and waits for its response if it is accepted.
func (c *checker) ask(r *checkRequest, how delivery) (seen string, resp *message, err error) {
	e := c.expect(r)
	close(e.acknowledge)
	return c.askExpected(r, e, how)
}

// expect registers the request with the hook.
func (c *checker) expect(r *checkRequest) *expected {
	var id string
	_ = json.Unmarshal([]byte(r.id), &id)
	return c.hook.expect(id)
}

func (c *checker) askExpected(r *checkRequest, e *expected, how delivery) (seen string, resp *message, err error) {
	start := time.Now()
	ack, err := c.deliver(r.payload(), how)
	if err != nil {
		return "", nil, err
	}
	acked := since(start)
	if ack.failure != "" {
		e.refuse()
		seen = fmt.Sprintf("refused after %s: %.100q", acked, ack.failure)
		if c.mustAccept {
			return "", nil, errors.New(seen)
		}
		return seen, nil, nil
	}
	if resp, err = c.await(e); err != nil {
		return "", nil, fmt.Errorf("accepted after %s, then %w", acked, err)
	}
	return fmt.Sprintf("accepted after %s, answered after %s with %s", acked, since(start), describe(resp)), resp, nil
}

func since(start time.Time) string {
	return time.Since(start).Round(time.Millisecond / 10).String()
}

// await waits for the response, and for the end of its exchange.
func (c *checker) await(e *expected) (*message, error) {
	var resp *message
	select {
	case resp = <-e.responses:
	case <-time.After(c.timeout):
		return nil, fmt.Errorf("no response within %v", c.timeout)
	case <-c.ctx.Done():
		return nil, context.Cause(c.ctx)
	}
	select {
	case <-e.done:
	case <-c.ctx.Done():
	}
	return resp, nil
}

// describe says what a response holds.
func describe(m *message) string {
	switch {
	case m.failure != "":
		return fmt.Sprintf("the error %.60q", m.failure)
	case m.stream != nil:
		return "a stream"
	}
	return fmt.Sprintf("a result of %d bytes", len(m.result))
}

// usual asks and gives up a stream of the response.
func (c *checker) usual(r *checkRequest, how delivery) (string, error) {
	seen, resp, err := c.ask(r, how)
	if resp != nil && resp.stream != nil {
		giveUpStream(resp.stream)
	}
	return seen, err
}

func lookFirst(c *checker) (string, error) {
	seen, resp, err := c.ask(c.newRequest(), delivery{})
	if c.accepts = resp != nil; c.accepts && resp.stream != nil {
		giveUpStream(resp.stream)
	}
	return seen, err
}

// lookForm looks whether a request is taken that differs from the usual one.
func lookForm(change func(*checkRequest)) func(*checker) (string, error) {
	return func(c *checker) (string, error) {
		r := c.newRequest()
		change(r)
		return c.usual(r, delivery{})
	}
}

func lookArgs(size int) func(*checker) (string, error) {
	return lookForm(func(r *checkRequest) { r.args = `"` + strings.Repeat("x", size) + `"` })
}

func lookLimit(c *checker) (string, error) {
	r := c.newRequest()
	r.padTo = maxFrame
	must := c.mustAccept
	c.mustAccept = false // it may have a limit of its own, and say so
	defer func() { c.mustAccept = must }()
	seen, err := c.usual(r, delivery{})
	if refused := notTaken(""); c.target.Scheme != "unix" && errors.As(err, &refused) {
		return refused.Error(), nil
	}
	return seen, err
}

func lookPieces(c *checker) (string, error) {
	return c.usual(c.newRequest(), delivery{write: func(conn net.Conn, frame []byte) error {
		for len(frame) > 0 {
			n := 1 // of the header, and the beginning of the payload
			if rest := len(frame); rest > 60 {
				n = min(rest, 60)
			}
			if _, err := conn.Write(frame[:n]); err != nil {
				return err
			}
			frame = frame[n:]
			time.Sleep(pieceGap)
		}
		return nil
	}})
}

// lookAcknowledgedFirst leaves the response without an acknowledgement until the
// request has one.
func lookAcknowledgedFirst(c *checker) (string, error) {
	r := c.newRequest()
	e := c.expect(r)
	start := time.Now()
	ack, err := c.deliver(r.payload(), delivery{})
	acked := since(start)
	if err == nil && ack.failure == "" { // the response is kept waiting a little
		select {
		case resp := <-e.responses:
			if resp.stream != nil {
				defer giveUpStream(resp.stream)
			}
		case <-time.After(c.timeout):
			return "", fmt.Errorf("accepted, then no response within %v", c.timeout)
		case <-c.ctx.Done():
			return "", context.Cause(c.ctx)
		}
		time.Sleep(10 * pieceGap)
	}
	close(e.acknowledge)
	if err != nil {
		return "", fmt.Errorf("while the hook did not acknowledge: %w", err)
	}
	if ack.failure != "" {
		return "", fmt.Errorf("refused: %.100q", ack.failure)
	}
	select {
	case <-e.done:
	case <-c.ctx.Done():
	}
	return "acknowledged after " + acked + ", while the hook did not acknowledge the response", nil
}

// lookOvertaken does not read the acknowledgement before the response has come.
func lookOvertaken(c *checker) (string, error) {
	r := c.newRequest()
	e := c.expect(r)
	close(e.acknowledge)
	var resp *message
	var late error
	ack, err := c.deliver(r.payload(), delivery{beforeAck: func() { resp, late = c.await(e) }})
	switch {
	case late != nil:
		return "", late
	case err != nil:
		return "", fmt.Errorf("the response came, but then: %w", err)
	case ack.failure != "":
		return "", fmt.Errorf("the response came, but the request was refused: %.100q", ack.failure)
	}
	if resp.stream != nil {
		giveUpStream(resp.stream)
	}
	return "the response came, and the acknowledgement was there", nil
}

// lookBroken looks whether the peer closes after the bytes, behind which the
// connection may end, and goes on.
func lookBroken(frame string, cut bool) func(*checker) (string, error) {
	return func(c *checker) (string, error) {
		return c.broken([]byte(frame), cut)
	}
}

func lookOverLimit(c *checker) (string, error) {
	return c.broken([]byte{0x04, 0x00, 0x00, 0x01, '{'}, false)
}

// broken sends a broken frame, after which the connection must be closed, with or
// without a refusal.
func (c *checker) broken(frame []byte, cut bool) (string, error) {
	seen, err := c.breakOff(frame, cut)
	if err != nil {
		return "", err
	}
	if _, err := c.usual(c.newRequest(), delivery{}); err != nil {
		return "", fmt.Errorf("%s; the next request: %w", seen, err)
	}
	return seen + "; the next request was taken care of", nil
}

func (c *checker) breakOff(frame []byte, cut bool) (string, error) {
	var open net.Conn
	ended := make(chan error, 1)
	ack, err := c.exchange(frame, delivery{
		write: func(conn net.Conn, frame []byte) error {
			open = conn
			_, err := conn.Write(frame)
			if cut && err == nil {
				err = conn.(*net.UnixConn).CloseWrite()
			}
			return err
		},
		afterAck: func() {
			_, err := open.Read(make([]byte, 1))
			ended <- err
		},
	})
	switch refused := notTaken(""); {
	case errors.As(err, &refused):
		return "closed", nil
	case err != nil:
		return "", err
	case ack.failure == "":
		return "", errors.New("accepted")
	}
	if err := <-ended; !isClosed(err) {
		return "", fmt.Errorf("refused, but the connection was left open for %v", c.timeout)
	}
	return fmt.Sprintf("refused and closed: %.100q", ack.failure), nil
}

// lookNotTaken looks whether the peer takes none of the payloads.
func lookNotTaken(payloads ...string) func(*checker) (string, error) {
	return func(c *checker) (string, error) {
		last := ""
		for _, payload := range payloads {
			seen, err := c.notTaken([]byte(payload))
			if err != nil {
				return "", fmt.Errorf("%.60q: %w", payload, err)
			}
			last = fmt.Sprintf("%d payloads; the last, %.60q: %s", len(payloads), payload, seen)
		}
		return last, nil
	}
}

func (c *checker) notTaken(payload []byte) (string, error) {
	if c.target.Scheme == "unix" {
		if string(payload) != "null" {
			return c.broken(frameOf(payload), false)
		}
	}
	ack, err := c.deliver(payload, delivery{})
	switch refused := notTaken(""); {
	case errors.As(err, &refused):
		return refused.Error(), nil
	case err != nil:
		return "", err
	case ack.failure == "":
		return "", errors.New("accepted")
	}
	return fmt.Sprintf("refused: %.100q", ack.failure), nil
}

func lookDeep(c *checker) (string, error) {
	r := c.newRequest()
	r.args = strings.Repeat("[", 100) + strings.Repeat("]", 100)
	if _, err := c.usual(r, delivery{}); err != nil {
		return "", fmt.Errorf("100 levels: %w", err)
	}
	r = c.newRequest()
	r.args = strings.Repeat("[", 10_001) + strings.Repeat("]", 10_001)
	seen, err := c.notTaken(r.payload())
	if err != nil {
		return "", fmt.Errorf("10,001 levels: %w", err)
	}
	return "10,001 levels: " + seen, nil
}

func lookUnknown(c *checker) (string, error) {
	r := c.newRequest()
	r.more = `"a":null,"version":{"id":"other","args":[1,{"task":"x"}]},"sessions":1,"\u00e9":"}",`
	return c.usual(r, delivery{})
}

func lookEscapes(c *checker) (string, error) {
	r := c.newRequest()
	r.id = strings.TrimSuffix(r.id, `"`) + ` \u00fc\"\\\/ ☃ \ud83d\ude00"`
	return c.usual(r, delivery{})
}

// minimalURL is the URL object with no more than it needs.
func minimalURL(object string) string {
	var u url.URL
	_ = json.Unmarshal([]byte(object), &u)
	if u.Scheme == "unix" {
		return encodeJSON(map[string]string{"Scheme": u.Scheme, "Path": u.Path})
	}
	return encodeJSON(map[string]string{"Scheme": u.Scheme, "Host": u.Host, "Path": u.Path})
}

func lookPath(c *checker) (string, error) {
	path, err := c.hook.alias("a b%41?c#d")
	if err != nil {
		return "", notSeen(err.Error())
	}
	return lookForm(func(r *checkRequest) { r.hook = encodeJSON(&url.URL{Scheme: "unix", Path: path}) })(c)
}

// lookInvalid looks whether all of these requests are refused in so many words.
func lookInvalid(changes map[string]func(*checkRequest)) func(*checker) (string, error) {
	return func(c *checker) (string, error) {
		seen := ""
		for _, name := range slices.Sorted(maps.Keys(changes)) {
			r := c.newRequest()
			c.expect(r).refuse()
			changes[name](r)
			ack, err := c.deliver(r.payload(), delivery{})
			refused := notTaken("")
			switch {
			case c.target.Scheme != "unix" && errors.As(err, &refused):
				seen = refused.Error()
			case err != nil:
				return "", fmt.Errorf("%s: %w", name, err)
			case ack.failure == "":
				return "", fmt.Errorf("%s: accepted", name)
			default:
				seen = fmt.Sprintf("%.100q", ack.failure)
			}
		}
		return fmt.Sprintf("%d requests refused, one with %s", len(changes), seen), nil
	}
}

func lookStringHook(c *checker) (string, error) {
	must := c.mustAccept
	c.mustAccept = false
	defer func() { c.mustAccept = must }()
	seen, err := lookForm(func(r *checkRequest) { r.hook = encodeJSON(c.hook.url.String()) })(c)
	if refused := notTaken(""); errors.As(err, &refused) {
		return refused.Error(), nil
	}
	return seen, err
}

func lookRedirected(c *checker) (string, error) {
	r := c.newRequest()
	e := c.expect(r)
	close(e.acknowledge)
	e.answer = func(w http.ResponseWriter, _ *message, attempt int) bool {
		if attempt > 1 {
			return false
		}
		w.Header().Set("Location", c.hook.url.JoinPath("moved").String())
		w.WriteHeader(http.StatusTemporaryRedirect)
		return true
	}
	seen, resp, err := c.askExpected(r, e, delivery{})
	if resp != nil && resp.stream != nil {
		giveUpStream(resp.stream)
	}
	return seen, err
}

func lookUnavailable(c *checker) (string, error) {
	r := c.newRequest()
	e := c.expect(r)
	close(e.acknowledge)
	first := make(chan struct{})
	e.answer = func(w http.ResponseWriter, m *message, attempt int) bool {
		if attempt == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			if m.stream != nil {
				giveUpStream(m.stream)
			}
			close(first)
			return true
		}
		return false
	}
	if _, err := c.deliver(r.payload(), delivery{}); err != nil {
		return "", err
	}
	select {
	case <-first:
	case <-time.After(c.timeout):
		return "", fmt.Errorf("no response within %v", c.timeout)
	case <-c.ctx.Done():
		return "", context.Cause(c.ctx)
	}
	select {
	case <-e.responses:
		return "", errors.New("sent again")
	case <-time.After(2 * time.Second):
	case <-c.ctx.Done():
		return "", context.Cause(c.ctx)
	}
	return "not sent again within 2 s", nil
}

func lookAcks(c *checker) (string, error) { return c.acks.verdict("acknowledgements") }

func lookResponses(c *checker) (string, error) {
	tally, _ := c.hook.seen()
	return tally.verdict("responses")
}

func (f frameTally) verdict(what string) (string, error) {
	switch {
	case len(f.faults) > 0:
		return "", fmt.Errorf("in %d of %d %s: %s", len(f.faults), f.n, what, f.faults[0])
	case f.n == 0:
		return "", notSeen("there were no " + what)
	}
	return fmt.Sprintf("%d %s", f.n, what), nil
}

func lookStrays(c *checker) (string, error) {
	select {
	case <-time.After(strayAfter):
	case <-c.ctx.Done():
		return "", context.Cause(c.ctx)
	}
	if _, strays := c.hook.seen(); len(strays) > 0 {
		return "", fmt.Errorf("%d times: %s", len(strays), strays[0])
	}
	return "nothing else within " + strayAfter.String(), nil
}

// giveUpStream reads nothing of a stream, which ends it.
func giveUpStream(addr *url.URL) {
	_ = acomm.Stream(closedWriter{}, addr) // it can't succeed
}
