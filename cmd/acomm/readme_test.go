package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// session is the commands of the README's blocks, and what they show.
func session(t *testing.T) (script, shown string) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	blocks := strings.Split(string(readme), "```console\n")[1:]
	for _, block := range blocks {
		block, _, _ = strings.Cut(block, "```")
		if !strings.HasPrefix(block, "$ ") {
			continue // the three terminals
		}
		shown += block
		for line := range strings.Lines(block) {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				script += "cat <<'END'\n" + line + "END\n" + command
			}
		}
	}
	return script, shown
}

func TestREADME_SessionRunsAsWritten(t *testing.T) {
	t.Parallel()
	script, shown := session(t)
	require.Contains(t, script, "acomm call")
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script) // in which jobs -p works in $( )
	cmd.Env = append(os.Environ(), "TMPDIR="+shortDir(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	kill := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel = kill
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	_ = kill() // what a failed session leaves
	require.Equal(t, shown, out.String())
	require.NoError(t, err)
}

// The README of the library has the first block with several terminals, too.
func TestREADME_OfTheLibraryShowsTheSame(t *testing.T) {
	ours, err := os.ReadFile("README.md")
	require.NoError(t, err)
	theirs, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, block, found := strings.Cut(string(ours), "```console\n1$ ")
	require.True(t, found)
	block, _, _ = strings.Cut(block, "```")
	require.Contains(t, string(theirs), "```console\n1$ "+block+"```")
}

// terminalLine is a line of a block of the README with several terminals.
type terminalLine struct{ terminal, text string }

// terminals are the blocks of the README with several terminals, their lines with
// the number of their terminal. Those it shows without one belong to the last.
func terminals(t *testing.T) (blocks [][]terminalLine) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	for _, block := range strings.Split(string(readme), "```console\n1$ ")[1:] {
		block, _, _ = strings.Cut("1$ "+block, "```")
		var lines []terminalLine
		for line := range strings.Lines(block) {
			line = strings.TrimSuffix(line, "\n")
			terminal, text, ok := strings.Cut(line, "$ ")
			if !ok {
				terminal, text = "", line
			}
			lines = append(lines, terminalLine{terminal, text})
		}
		blocks = append(blocks, lines)
	}
	return blocks
}

func TestREADME_TerminalsRunAsWritten(t *testing.T) {
	t.Parallel()
	blocks := terminals(t)
	require.Len(t, blocks, 2, "over HTTP, over NATS")
	for _, lines := range blocks {
		runTerminals(t, lines)
	}
}

// What differs from what is written is the directory, the ports, and where the
// program is: those of a test must be its own.
func runTerminals(t *testing.T, lines []terminalLine) {
	t.Helper()
	own := strings.NewReplacer("/tmp/tasks", shortDir(t), "127.0.0.1:8080", closedPort(t), "127.0.0.1:4222", closedPort(t))
	running := map[string]*running{}
	last, answered := "", 0
	for _, line := range lines {
		text := own.Replace(line.text)
		switch {
		case line.terminal == "": // what it shows
			require.Equal(t, text, running[last].waitLine("listening on"))
		case text == "^C":
			running[line.terminal].signal(syscall.SIGINT)
			require.Zero(t, running[line.terminal].wait(), running[line.terminal].said())
		default:
			args, ok := strings.CutPrefix(text, "acomm ")
			require.True(t, ok, text)
			if strings.HasPrefix(args, "call ") {
				got := runAcomm(t, strings.Fields(args)...)
				require.Equal(t, "17\n", got.stdout, got.stderr)
				require.Regexp(t, `sending wc .*\n.*acknowledged\n.*response: 2 bytes of result\n$`, got.stderr)
				got = runAcomm(t, strings.Fields(strings.Replace(args, "wc text=hello", "none", 1))...)
				require.Equal(t, exitNotSent, got.code, got.stderr)
				answered++
				continue
			}
			running[line.terminal] = startAcomm(t, strings.Fields(args)...)
			last = line.terminal
		}
	}
	require.Equal(t, 1, answered)
	require.Len(t, running, 2)
}

func TestREADME_HelpIsThere(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"call", "serve", "gateway", "check"} {
		got := runAcomm(t, command, "--help")
		require.Zero(t, got.code)
		for _, part := range []string{"EXIT STATUS", "Usage:\n  acomm " + command, "Examples:", "Flags:", "--timeout"} {
			require.Contains(t, got.stdout, part)
		}
		for line := range strings.Lines(got.stdout) {
			require.LessOrEqual(t, len(line), 130, line)
		}
	}
	gateway := runAcomm(t, "gateway", "--help").stdout
	for _, part := range append([]string{"EXIT STATUS\n  0  ", "\n  1  ", "\n  2  ", "SIGHUP", "64:ff9b::/96"}, deniedHooks...) {
		require.Contains(t, gateway, part)
	}
	require.Contains(t, runAcomm(t, "call", "--help").stdout, "HTTP_PROXY")
	require.Contains(t, runAcomm(t, "--help").stdout, "NO_COLOR")
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		got := runAcomm(t, "completion", shell)
		require.Zero(t, got.code)
		require.Contains(t, got.stdout, "acomm")
	}
	require.Equal(t, runAcomm(t, "call", "--help"), runAcomm(t, "help", "call"))
	require.Contains(t, runAcomm(t, "__complete", "").stdout, "serve\tServe a task with a program")
	got := runAcomm(t, "nope")
	require.Equal(t, exitUsage, got.code)
	require.Contains(t, got.stderr, `unknown command "nope"`)
	require.Equal(t, exitUsage, runAcomm(t).code)
}
