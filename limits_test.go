package acomm

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The numbers of docs/limits.md are the library's.
func TestLimitsDocument_NumbersAreTheLibrarys(t *testing.T) {
	data, err := os.ReadFile("docs/limits.md")
	require.NoError(t, err)
	text := strings.Join(strings.Fields(string(data)), " ")
	size := func(n int) string {
		if n >= 1<<20 {
			return fmt.Sprintf("%d MiB", n>>20)
		}
		return fmt.Sprintf("%d KiB", n>>10)
	}
	spell := func(d time.Duration) string {
		switch {
		case d >= time.Hour:
			return fmt.Sprintf("%d hour", d/time.Hour)
		case d == time.Minute:
			return "1 minute"
		case d >= time.Second:
			return fmt.Sprintf("%d s", d/time.Second)
		}
		return fmt.Sprintf("%d ms", d/time.Millisecond)
	}
	for _, want := range []string{
		"acknowledgement together | " + spell(sendTimeout),
		"a tracker reads one response and acknowledges it | " + spell(exchangeTimeout),
		"the tracker's default; without one, " + spell(defaultTimeout),
		"until it is connected (HTTP: until the status) | " + spell(sendTimeout),
		"a stream to which no consumer connects | " + spell(streamClaim),
		"while the tracker stops | " + spell(streamStall) + " without a byte",
		"JSON of a message, sent or read | " + size(maxPayload),
		fmt.Sprintf("its own included | %d,%03d", maxDepth/1000, maxDepth%1000),
		"answer to an HTTP POST | " + size(maxAnswer),
		"query of a stream's HTTP URL | " + size(maxStreamQuery),
		map[bool]string{true: fmt.Sprintf("%d bytes on Linux", maxSocketPath), false: fmt.Sprintf("%d on macOS", maxSocketPath)}[runtime.GOOS == "linux"],
		"again after " + spell(minForwardDelay) + ", doubling to " + spell(maxForwardDelay),
		fmt.Sprintf("posts to one host at a time | %d,", maxPosts),
		fmt.Sprintf("closed after %d s without a post", idleTimeout/time.Second),
		fmt.Sprintf("one to each socket; %d, or an eighth", maxSessions),
		fmt.Sprintf("%d,%03d in each direction, together %s, each at most %s",
			maxInFlight/1000, maxInFlight%1000, size(maxInFlightBytes), size(maxMessage)),
		"cancelled ones included | " + size(maxAhead) + " of each session",
		"answers that the peer does not read | " + size(maxUnsentAnswers),
		fmt.Sprintf("closed after %d to %d s by the process that opened it, after %d to %d s by the other",
			sessionIdleTimeout/time.Second, 2*sessionIdleTimeout/time.Second, 2*sessionIdleTimeout/time.Second, 4*sessionIdleTimeout/time.Second),
		"a session that is ending | each process has " + spell(sessionWriteTimeout),
		"tries again after " + spell(minAcceptDelay) + ", doubling to " + spell(maxAcceptDelay),
		fmt.Sprintf("%d lines a second", logBurst),
		fmt.Sprintf("cut at %d bytes", maxLogText),
	} {
		require.Contains(t, text, want)
	}
	require.Equal(t, time.Second, logInterval)
}
