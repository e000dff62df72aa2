package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// runIn runs the program in the directory.
func runIn(t *testing.T, dir string, args ...string) result {
	t.Helper()
	cmd := acommCmd(t, args...)
	cmd.Dir = dir
	return runCmd(t, cmd)
}

// Hazard: a URL in place of a path makes a directory "unix:".
func TestServe_TakesAURLForThePath(t *testing.T) {
	t.Parallel()
	for _, form := range []string{"unix://", "unix:"} {
		dir := shortDir(t)
		cmd := acommCmd(t, "serve", form+filepath.Join(dir, "d", "s.sock"), "--", "cat")
		cmd.Dir = dir
		r := startCmd(t, cmd)
		require.Equal(t, "listening on unix://"+filepath.Join(dir, "d", "s.sock"), r.waitLine("listening on"))
		r.stop()
		require.NoDirExists(t, filepath.Join(dir, "unix:"))
	}
	dir := shortDir(t)
	for path, hint := range map[string]string{
		"unix://run/x.sock":     "unix:///run/x.sock",
		"unix://x.sock":         "./x.sock",
		"unix:x.sock":           "./x.sock",
		"unix:///a%41.sock":     "without the scheme",
		"http://127.0.0.1:8080": "acomm gateway",
		"nats://127.0.0.1/x":    "acomm gateway",
		"./d/":                  "slash",
	} {
		got := runIn(t, dir, "serve", path, "--", "cat")
		require.Equal(t, exitUsage, got.code, got.stderr)
		require.Contains(t, got.stderr, hint)
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestCall_TakesWhatCanOnlyBeASocket(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, path := range []string{"d/echo/1.sock", "echo.sock", "d/plain"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o700))
		r := startAcomm(t, "serve", filepath.Join(dir, path), "--", "cat")
		r.waitLine("listening on")
		require.Equal(t, result{stdout: "1\n"}, runIn(t, dir, "call", path, "echo", "1"))
		r.stop()
	}
	got := runIn(t, dir, "call", "d/echo/2.sock", "echo")
	require.Equal(t, exitNotSent, got.code, "a path, where nobody is: %s", got.stderr)
}

func TestCall_HintsAtWhatTheURLMayBe(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for target, hints := range map[string][]string{
		"127.0.0.1:8080":       {"http://127.0.0.1:8080/"},
		"localhost:8080":       {"http://localhost:8080/"},
		"localhost:8080/tasks": {"http://localhost:8080/tasks"},
		"[::1]:8080":           {"http://[::1]:8080/"},
		":8080":                {"http://localhost:8080/"},
		"box.example":          {"http://box.example/", "./box.example"},
		"box.example/tasks":    {"http://box.example/tasks", "./box.example/tasks"},
		"unix://run/x.sock":    {"unix:///run/x.sock"},
		"unix://x.sock":        {"./x.sock"},
		"unix:x.sock":          {"./x.sock"},
		"http:127.0.0.1:80":    {"http://HOST/"},
		"ftp://host/":          {"unix:///PATH"},
		"":                     {"empty"},
	} {
		got := runIn(t, dir, "call", target, "echo")
		require.Equal(t, exitUsage, got.code, "%s: %s", target, got.stderr)
		for _, hint := range hints {
			require.Contains(t, got.stderr, hint, target)
		}
	}
	got := runIn(t, dir, "call", "joe:secret@box.example", "echo")
	require.Equal(t, exitUsage, got.code)
	require.NotContains(t, got.stderr, "secret")
}
