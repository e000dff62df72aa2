package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// Hazard: a terminal wraps what is wider than it in the middle of words.
func TestHelp_FitsIn80Columns(t *testing.T) {
	t.Parallel()
	commands := [][]string{nil}
	for i := 0; i < len(commands); i++ { // those that are found are looked at in turn
		got := runAcomm(t, append(commands[i], "--help")...)
		require.Zero(t, got.code, got.stderr)
		listed := false
		for line := range strings.Lines(got.stdout) {
			line = strings.TrimSuffix(line, "\n")
			if !strings.Contains(line, "https://") { // a shell's own documentation
				require.LessOrEqual(t, utf8.RuneCountInString(line), 80, "%q: %s", commands[i], line)
			}
			listed = listed && line != "" || line == "Available Commands:"
			if name := strings.Fields(line); listed && line[0] == ' ' {
				commands = append(commands, append(append([]string(nil), commands[i]...), name[0]))
			}
		}
	}
	require.Contains(t, commands, []string{"call"})
	require.Contains(t, commands, []string{"completion", "bash"})
}

func TestFold_KeepsTablesAndHeadings(t *testing.T) {
	const text = `HEADING
one two three
four
  key  one two three four
       five
  other  six
    literal

  in lines
  that stay`
	require.Equal(t, `HEADING
one two
three four
  key  one
       two
       three
       four
       five
  other  six
    literal

  in lines
  that stay`, fold(text, 11))
	require.Equal(t, text, fold(text, 80))
}

func TestHelp_UsageIsWhatWorks(t *testing.T) {
	t.Parallel()
	require.Contains(t, runAcomm(t, "serve", "--help").stdout, "Usage:\n  acomm serve [flags] PATH -- COMMAND...\n")
	require.Contains(t, runAcomm(t, "call", "--help").stdout, "Usage:\n  acomm call [flags] URL TASK [ARGS]\n")
}

func TestUsage_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for command, want := range map[string]string{
		"cal":                            `unknown command "cal" for "acomm"; did you mean call?`,
		"gatway --socket-dir x":          "did you mean gateway?",
		"nope":                           `unknown command "nope" for "acomm"`,
		"completion bsh":                 "did you mean bash?",
		"call --timout 1s ./x t":         "did you mean --timeout?",
		"serve --concurency 3 ./x -- t":  "did you mean --concurrency?",
		"gateway --socketdir x":          "did you mean --socket-dir?",
		"call":                           "URL and TASK are missing",
		"call ./x":                       "TASK is missing",
		"serve":                          "PATH is missing",
		"serve ./x":                      "COMMAND is missing",
		"serve ./x --":                   "COMMAND is missing",
		"serve ./x cat":                  "-- is missing before COMMAND",
		"serve ./x y -- cat":             `unexpected argument "y": write PATH -- COMMAND`,
		"gateway /run/acomm":             `"/run/acomm"`,
		"gateway --socket-dir x --liste": "did you mean --listen?",
	} {
		got := runAcomm(t, strings.Fields(command)...)
		require.Equal(t, exitUsage, got.code, command)
		require.Contains(t, got.stderr, want, command)
		require.NotContains(t, got.stderr, "arg(s)")
	}
	require.NotContains(t, runAcomm(t, "nope").stderr, "did you mean")
	require.NotContains(t, runAcomm(t, "call", "--zzz").stderr, "did you mean")
}
