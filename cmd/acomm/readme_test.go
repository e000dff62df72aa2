package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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

func TestREADME_ThreeTerminals(t *testing.T) {
	dir := shortDir(t)
	provider := startAcomm(t, "serve", filepath.Join(dir, "wc", "1.sock"), "--", "wc", "-c")
	provider.waitLine("listening on unix:///")
	gateway := startAcomm(t, "gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0")
	_, addr, ok := strings.Cut(gateway.waitLine("listening on "), "listening on ")
	require.True(t, ok)
	_, _, err := net.SplitHostPort(addr)
	require.NoError(t, err, addr)
	require.Equal(t, result{stdout: "17\n"}, runAcomm(t, "call", "http://"+addr+"/", "wc", "text=hello"))
	got := runAcomm(t, "call", "http://"+addr+"/", "none")
	require.Equal(t, exitNotSent, got.code, got.stderr)
	provider.stop()
	gateway.stop()
}

func TestREADME_HelpIsThere(t *testing.T) {
	for _, command := range []string{"call", "serve"} {
		got := runAcomm(t, command, "--help")
		require.Zero(t, got.code)
		for _, part := range []string{"EXIT STATUS", "Usage:\n  acomm " + command, "Examples:", "Flags:", "--timeout"} {
			require.Contains(t, got.stdout, part)
		}
		for line := range strings.Lines(got.stdout) {
			require.LessOrEqual(t, len(line), 130, line)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		got := runAcomm(t, "completion", shell)
		require.Zero(t, got.code)
		require.Contains(t, got.stdout, "acomm")
	}
	require.Contains(t, runAcomm(t, "__complete", "").stdout, "serve\tServe a task with a program")
	got := runAcomm(t, "nope")
	require.Equal(t, exitUsage, got.code)
	require.Contains(t, got.stderr, `unknown command "nope"`)
	require.Equal(t, exitUsage, runAcomm(t).code)
}
