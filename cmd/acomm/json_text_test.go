package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Hazard: what the library's JSON escapes for HTML is longer for the program, or differs
// from what was given.
func TestServe_MarkupIsNotEscaped(t *testing.T) {
	t.Parallel()
	const args = `{"text":"<a>&\u2028","k<":"\\u003c"}`
	r, path := startServe(t, nil, "wc", "-c")
	require.Equal(t, result{stdout: "15\n"}, runAcomm(t, "call", path, "count", "text=<a>"))
	r.stop()
	r, path = startServe(t, nil, "cat")
	for _, options := range [][]string{nil, {"--raw"}} {
		got := runAcomm(t, append(append([]string{"call"}, options...), path, "echo", args)...)
		require.Equal(t, "{\"text\":\"<a>&\u2028\",\"k<\":\"\\\\u003c\"}", trimNewline(got.stdout), "%q: %s", options, got.stderr)
	}
	r.stop()
	r, path = startServe(t, nil, sh(`echo '<b>&'`)...)
	require.Equal(t, `"<b>&"`, runAcomm(t, "call", "--raw", path, "text").stdout)
	require.Equal(t, "\"<b>&\"\n", runAcomm(t, "call", path, "text").stdout)
	r.stop()
}

func TestUnescape_LeavesOtherEscapesAlone(t *testing.T) {
	for text, want := range map[string]string{
		`"\u003c\u003e\u0026"`:      `"<>&"`,
		`"\\u003c \\\u003c"`:        `"\\u003c \\<"`,
		`"\u003C\u0022\u005c"`:      `"\u003C\u0022\u005c"`,
		`"\u2028\u2029\u202e"`:      "\"\u2028\u2029\\u202e\"",
		`{"a":1}`:                   `{"a":1}`,
		`"\u003`:                    `"\u003`,
		`"\`:                        `"\`,
		`["\ud83d\u003c","\n\t\""]`: `["\ud83d<","\n\t\""]`,
	} {
		require.Equal(t, want, string(unescapeJSON([]byte(text))))
	}
}

func trimNewline(text string) string {
	if n := len(text); n > 0 && text[n-1] == '\n' {
		return text[:n-1]
	}
	return text
}

// Hazard: bytes that are not UTF-8 are replaced on the way, and nobody is told.
func TestServe_OutputThatIsNotUTF8IsAnError(t *testing.T) {
	t.Parallel()
	for _, script := range []string{`printf 'caf\351\n'`, `printf '"caf\351"'`, `head -c 100 /dev/urandom; printf '\377'`} {
		r, path := startServe(t, nil, sh(script)...)
		got := runAcomm(t, "call", path, "work")
		require.Equal(t, exitTask, got.code, got.stdout)
		require.Contains(t, got.stderr, "not UTF-8")
		require.Contains(t, got.stderr, "--stream")
		r.stop()
	}
	r, path := startServe(t, []string{"--stream"}, sh(`printf 'caf\351'`)...)
	require.Equal(t, result{stdout: "caf\xe9"}, runAcomm(t, "call", path, "work"))
	r.stop()
}

func TestCall_ArgumentsThatAreNotUTF8AreAnError(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"name=caf\xe9"}, {"caf\xe9=1"}, {"{\"a\":\"caf\xe9\"}"}, {"-"}, {`name="caf` + "\xe9\""}} {
		cmd := acommCmd(t, append([]string{"call", "./no.sock", "work"}, args...)...)
		cmd.Stdin = strings.NewReader("\"caf\xe9\"")
		got := runCmd(t, cmd)
		require.Equal(t, exitUsage, got.code, "%q: %s", args, got.stderr)
		require.Contains(t, got.stderr, "not UTF-8")
	}
}
