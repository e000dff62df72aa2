package main

import (
	"encoding/json"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// reportOf reads what --json has written: one object on a line. Its times are in order;
// they are taken out, and the names of those that happened returned.
func reportOf(t *testing.T, text string) (report map[string]any, happened []string) {
	t.Helper()
	require.Equal(t, 1, strings.Count(text, "\n"), text)
	require.NoError(t, json.Unmarshal([]byte(text), &report), text)
	times := report["times"].(map[string]any)
	last := time.Time{}
	for _, name := range []string{"sent", "acknowledged", "answered", "ended"} {
		value, ok := times[name]
		require.True(t, ok, text)
		if value == nil {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, value.(string))
		require.NoError(t, err)
		if name != "answered" { // it may overtake the acknowledgement
			require.False(t, at.Before(last), text)
			last = at
		}
		happened = append(happened, name)
	}
	delete(report, "times")
	return report, happened
}

func TestCall_JSONSaysHowItWent(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, nil, sh(`read n; case $n in 1) echo '{"a":"<é>"}';; 2) echo disk is full >&2; exit 3;; 3) sleep 1000;; esac`)...)
	defer r.signalUntilEnd(syscall.SIGTERM) // a task goes on
	all := []string{"sent", "acknowledged", "answered", "ended"}
	for name, test := range map[string]struct {
		args     []string
		code     int
		phase    string
		result   any
		err      any
		happened []string
	}{
		"done":      {[]string{path, "work", "1"}, exitDone, "answered", map[string]any{"a": "<é>"}, nil, all},
		"timed out": {[]string{"--timeout", "2s", path, "work", "3"}, exitTimeout, "timed out", nil, "no response to work within 2s", []string{"sent", "acknowledged", "ended"}},
		"nobody":    {[]string{path + "x", "work"}, exitNotSent, "not taken", nil, "no such file", []string{"sent", "ended"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := runAcomm(t, append([]string{"call", "--json"}, test.args...)...)
			require.Equal(t, test.code, got.code)
			require.Empty(t, got.stderr)
			require.NotContains(t, got.stdout, `\u003c`)
			report, happened := reportOf(t, got.stdout)
			if test.code != exitNotSent {
				require.Len(t, report["id"], 36)
			}
			require.Equal(t, "work", report["task"])
			require.Equal(t, test.phase, report["phase"])
			require.Equal(t, test.result, report["result"])
			require.Nil(t, report["stream"])
			require.Equal(t, test.happened, happened)
			if test.err == nil {
				require.Nil(t, report["error"])
			} else {
				require.Contains(t, report["error"], test.err)
			}
		})
	}
	got := runAcomm(t, "call", "--json", path, "work", "2") // the acknowledgement may be late
	require.Equal(t, exitTask, got.code)
	report, _ := reportOf(t, got.stdout)
	require.Equal(t, "answered", report["phase"])
	require.Equal(t, "disk is full", report["error"])
	require.Nil(t, report["result"])
	// A mistake in the command line is text.
	got = runAcomm(t, "call", "--json", "--raw", path, "work")
	require.Equal(t, exitUsage, got.code)
	require.Empty(t, got.stdout)
}

func TestCall_JSONOfAStream(t *testing.T) {
	t.Parallel()
	p := startCallProvider(t, streamOf(t, raw(`{"a":1}`), func() io.ReadCloser { return io.NopCloser(strings.NewReader("data")) }))
	got := runAcomm(t, "call", "--json", p.path, "read")
	require.Equal(t, exitDone, got.code)
	require.Equal(t, "data", got.stdout)
	report, _ := reportOf(t, got.stderr)
	require.Equal(t, map[string]any{"bytes": 4., "complete": true, "file": nil}, report["stream"])
	require.Equal(t, map[string]any{"a": 1.}, report["result"])

	file := filepath.Join(t.TempDir(), "f")
	got = runAcomm(t, "call", "--json", "-o", file, p.path, "read")
	require.Equal(t, exitDone, got.code)
	require.Empty(t, got.stderr)
	report, _ = reportOf(t, got.stdout)
	require.Equal(t, map[string]any{"bytes": 4., "complete": true, "file": file}, report["stream"])

	r, path := startServe(t, []string{"--stream"}, sh(`echo data; exit 3`)...)
	got = runAcomm(t, "call", "--json", "-o", file, path, "work")
	require.Equal(t, exitTask, got.code)
	report, _ = reportOf(t, got.stdout)
	require.Equal(t, false, report["stream"].(map[string]any)["complete"]) // however much has come
	require.NotNil(t, report["error"])
	r.stop()
}

func TestCall_JSONOfAnInterruptedCall(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	p := startCallProvider(t, func(*callProvider, *acomm.Request) *acomm.Response { asked <- struct{}{}; return nil })
	r := startAcomm(t, "call", "-v", "--json", p.path, "echo")
	<-asked
	r.waitLine("acknowledged")
	r.signal(syscall.SIGINT)
	require.Equal(t, 130, r.wait())
	said := strings.Split(r.said(), "\n")
	report, happened := reportOf(t, said[len(said)-1]+"\n")
	require.Equal(t, "acknowledged", report["phase"])
	require.Contains(t, report["error"], "interrupted")
	require.Equal(t, []string{"sent", "acknowledged", "ended"}, happened)
}

func TestCall_JSONOfARefusal(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, []string{"--task", "work"}, "cat")
	got := runAcomm(t, "call", "--json", path, "play")
	require.Equal(t, exitNotSent, got.code)
	report, happened := reportOf(t, got.stdout)
	require.Equal(t, "not taken", report["phase"])
	require.Equal(t, `the task here is "work", not "play"`, report["error"])
	require.Equal(t, []string{"sent", "ended"}, happened)
	r.stop()
}
