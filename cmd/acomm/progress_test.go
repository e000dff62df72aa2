package main

import (
	"io"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Hazard: a name that is longer than the terminal makes each line of the progress a new
// one; how much has come is not said.
func TestCall_ProgressIsOneLineWithACount(t *testing.T) {
	t.Parallel()
	reader, writer := io.Pipe()
	p := startCallProvider(t, streamOf(t, raw(`null`), func() io.ReadCloser { return reader }))
	go func() { _, _ = writer.Write(make([]byte, 3<<20)) }() // ends with the stream
	file := filepath.Join(t.TempDir(), "f")
	task := strings.Repeat("long.", 50)
	cmd := acommCmd(t, "call", "-o", file, p.path, task)
	shown := cmdOnTerminal(t, cmd, nil, func(shown string) {
		if strings.Contains(shown, "3.0 MiB  ") { // a line with all of it is drawn
			_ = writer.Close()
		}
	})
	require.Zero(t, cmd.ProcessState.ExitCode(), shown)
	drawn, last, _ := strings.Cut(shown, task+": ")
	require.Contains(t, last, "3145728 bytes in ")
	require.NotContains(t, drawn, "\n")
	for line := range strings.SplitSeq(drawn, "\r") {
		require.LessOrEqual(t, textWidth(line), 79, line)
	}
	require.Contains(t, drawn, "3.0 MiB", "the count")
	require.Regexp(t, regexp.MustCompile(`MiB/s`), drawn)
}

func TestProgressLine_FitsAnyTerminal(t *testing.T) {
	for _, name := range []string{"", "short", strings.Repeat("x", 300), strings.Repeat("名", 100)} {
		for columns := 1; columns < 200; columns++ {
			line := progressLine(3, name, 5<<30, 12345678, 90*time.Minute, columns)
			require.LessOrEqual(t, textWidth(line), columns, line)
		}
	}
	require.Equal(t, "⠋ short  5.0 GiB  11.8 MiB/s  1h30m0s", progressLine(0, "short", 5<<30, 12345678, 90*time.Minute, 80))
}

// Hazard: a stream that stands still has the speed that it had.
func TestSpeed_OfAStallIsZero(t *testing.T) {
	s, now := &speed{}, time.Unix(0, 0)
	for i := range 10 {
		now = now.Add(time.Second)
		require.EqualValues(t, min(i, 1)*1000, s.at(now, int64(1000*i)))
	}
	for range 4 {
		now = now.Add(time.Second)
		s.at(now, 9000)
	}
	require.Zero(t, s.at(now.Add(time.Second), 9000))
}

// Hazard: the result of a peer commands the terminal: control characters of 8 bits, and
// those that turn the direction of text.
func TestCall_TerminalIsNotCommandedByAResult(t *testing.T) {
	t.Parallel()
	const evil = "\u009b31mred\u007f\u202eabc\u2066\u200f\u2028"
	p := startCallProvider(t, answerArgs)
	shown := onTerminal(t, nil, "call", p.path, "echo", `{"`+evil+`":"`+evil+` ok é ü"}`)
	const safe = `\u009b31mred\u007f\u202eabc\u2066\u200f\u2028`
	require.Equal(t, "{\r\n  \""+safe+"\": \""+safe+" ok é ü\"\r\n}\r\n", shown)
	got := runAcomm(t, "call", p.path, "echo", `"`+evil+`"`)
	require.Equal(t, result{stdout: `"` + evil + `"` + "\n"}, got, "no terminal")
}

func TestServe_ErrorDoesNotTurnTheText(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, nil, sh(`printf 'a\342\200\256b\302\233c\177' >&2; exit 1`)...)
	got := runAcomm(t, "call", path, "work")
	require.Equal(t, "acomm call: a\uFFFDb\uFFFDc\uFFFD\n", got.stderr)
	r.stop()
}

// Hazard: -v says that a task is done that has failed.
func TestServe_VerboseSaysWhatHasFailed(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		options []string
		script  string
		want    string
	}{
		{[]string{"-v", "--timeout", "50ms"}, "sleep 1000", "failed after "},
		{[]string{"-v", "--timeout", "50ms"}, "sleep 1000", "timed out after 50ms"},
		{[]string{"-v"}, "echo torn >&2; exit 1", ": torn"},
		{[]string{"-v", "--stream"}, "exit 1", ": exit status 1"},
		{[]string{"-v", "--stream"}, "echo data; exit 1", ": exit status 1"},
	} {
		r, path := startServe(t, test.options, sh(test.script)...)
		require.Equal(t, exitTask, runAcomm(t, "call", path, "work").code)
		r.waitLine(test.want)
		r.stop()
		require.NotContains(t, r.said(), "done after")
	}
}

func TestHelp_OfWhatIsNotThereIsUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"help", "nosuch"}, {"help", "call", "nosuch"}, {"completion", "nosuch"}} {
		got := runAcomm(t, args...)
		require.Equal(t, exitUsage, got.code, "%q: %s", args, got.stdout)
		require.Contains(t, got.stderr, "nosuch")
	}
	require.Equal(t, runAcomm(t, "--help"), runAcomm(t, "help"))
	require.Zero(t, runAcomm(t, "help", "completion", "bash").code)
}
