package main

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// logLines are the lines of a log in JSON. Each must be an object with a time.
func logLines(t *testing.T, said string) (messages string, objects []map[string]any) {
	t.Helper()
	for line := range strings.Lines(said) {
		if strings.HasPrefix(line, "listening on") {
			continue // on standard output
		}
		object := map[string]any{}
		require.NoError(t, json.Unmarshal([]byte(line), &object), line)
		at, err := time.Parse(time.RFC3339Nano, object["time"].(string))
		require.NoError(t, err)
		require.WithinDuration(t, time.Now(), at, time.Hour)
		require.NotEmpty(t, object["level"])
		messages += object["msg"].(string) + "\n"
		objects = append(objects, object)
	}
	return messages, objects
}

func TestServe_LogIsTextWithTimeOrJSON(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		gate := fifo(t)
		r, path := startServe(t, []string{"-v", "--log-format", format, "--task", "work<"}, sh(`read line <"`+gate+`"; exit 3`)...)
		require.Equal(t, exitNotSent, runAcomm(t, "call", path, "play").code)
		call := startAcomm(t, "call", "-v", path, "work<")
		call.waitLine("acknowledged")
		r.signal(syscall.SIGTERM)
		r.waitLine("finishing the acknowledged tasks")
		openGate(t, gate, 1)
		call.wait()
		require.Zero(t, r.wait())
		if format == "text" {
			for line := range strings.Lines(r.said()) {
				if !strings.HasPrefix(line, "listening on") {
					require.Regexp(t, `^time="?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\S+ level=\w+ msg=`, line)
				}
			}
			require.Regexp(t, `msg="failed after \S+: exit status 3" id=\S+ task="work<"`, r.said())
			continue
		}
		messages, objects := logLines(t, r.said())
		for _, want := range []string{"start\n", "failed after ", "exit status 3", "refuse request", "finishing the acknowledged tasks"} {
			require.Contains(t, messages, want)
		}
		start := slices.IndexFunc(objects, func(object map[string]any) bool { return object["msg"] == "start" })
		require.Equal(t, "work<", objects[start]["task"])
		require.Len(t, objects[start]["id"], 36)
	}
	got := runAcomm(t, "serve", "--log-format", "xml", "./x.sock", "--", "cat")
	require.Equal(t, exitUsage, got.code)
	require.Contains(t, got.stderr, "neither text nor json")
}

func TestServe_LastErrorIsJSONToo(t *testing.T) {
	t.Parallel()
	r, path := startServe(t, nil, "cat")
	for _, at := range []string{path, "unix://x.sock"} {
		got := runAcomm(t, "serve", "--log-format", "json", at, "--", "cat")
		require.NotZero(t, got.code)
		_, objects := logLines(t, got.stderr)
		require.Len(t, objects, 1)
		require.Equal(t, "error", objects[0]["level"])
	}
	r.stop()
}

func TestGateway_LogIsTextWithTimeOrJSON(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, format := range []string{"text", "json"} {
		cmd := acommCmd(t, "gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0", "--name", "g")
		cmd.Env = append(cmd.Env, "ACOMM_LOG_FORMAT="+format)
		r := startCmd(t, cmd)
		r.waitLine("gateway: ready")
		r.stop()
		if format == "json" {
			messages, _ := logLines(t, r.said())
			require.Contains(t, messages, "gateway: drained")
			continue
		}
		require.Regexp(t, `(?m)^time="?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\S+ level=info msg="gateway: drained"`, r.said())
	}
	file := filepath.Join(dir, "x")
	got := runAcomm(t, "gateway", "--log-format", "json", "--socket-dir", file, "--listen", "nonsense")
	require.Equal(t, exitUsage, got.code)
	_, objects := logLines(t, got.stderr)
	require.Len(t, objects, 1)
}
