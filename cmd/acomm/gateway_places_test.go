package main

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/mistifyio/acomm/natshook"
	"github.com/stretchr/testify/require"
)

// Hazard: an administrator links the socket of a service into the directory, and
// nobody is said to provide the task.
func TestGateway_LinkedSocketIsAProvider(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	g.provide("real", "a.sock", gwEcho)
	linked := filepath.Join(g.dir, "linked")
	require.NoError(t, os.Mkdir(linked, 0o700))
	require.NoError(t, os.Symlink(filepath.Join(g.dir, "nowhere"), filepath.Join(linked, "0.sock")))
	require.NoError(t, os.Symlink(t.TempDir(), filepath.Join(linked, "1.sock")))
	require.NoError(t, os.Symlink(filepath.Join(g.dir, "real", "a.sock"), filepath.Join(linked, "2.sock")))
	require.NoError(t, os.Symlink("real", filepath.Join(g.dir, "dir")))
	hook, responses := gwHook(t)
	for _, task := range []string{"linked", "dir"} {
		require.NoError(t, acomm.Send(g.url, gwRequest(t, task, hook, 1)))
		require.NoError(t, gwWithin(t, responses).Error)
	}
	g.stop()
}

func TestGateway_LinkedSocketIsAProviderOverNATS(t *testing.T) {
	g := newGatewayRun(t, shortDir(t))
	g.provide("no.task", "a.sock", gwEcho)
	require.NoError(t, os.Mkdir(filepath.Join(g.dir, "linked"), 0o700))
	require.NoError(t, os.Symlink(filepath.Join(g.dir, "no.task", "a.sock"), filepath.Join(g.dir, "linked", "1.sock")))
	g.start("--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	g.waitLine("tasks.linked")
	responses := make(chan *acomm.Response, 1)
	hook := natsRequester(t, g.natsURL(), func(resp *acomm.Response) { responses <- resp })
	require.NoError(t, acomm.Send(natshook.URL("tasks.linked"), gwRequest(t, "linked", hook, 1)))
	require.NoError(t, gwWithin(t, responses).Error)
	g.stop()
}

func TestErrors_NameWhereTheMessageWent(t *testing.T) {
	t.Parallel()
	no := serveHTTP(t, http.NotFound)
	closed := closedPort(t)
	g := startGateway(t, "--timeout", "1s", "--nats", "embedded", "--nats-listen", "127.0.0.1:0")
	g.provide("echo", "a.sock", gwEcho)
	g.waitLine("tasks.echo")
	broker := g.natsURL()
	u, err := url.Parse(broker)
	require.NoError(t, err)
	for _, test := range []struct {
		says []string
		args []string
	}{
		{[]string{"send to " + no + "/some/path: answered 404"}, []string{no + "/some/path", "x"}},
		{[]string{"send to http://" + closed + "/a%20b: "}, []string{"http://" + closed + "/a%20b", "x"}},
		{[]string{"connect to NATS at " + closed + ": "}, []string{"nats://" + closed + "/tasks.x", "x"}},
		{[]string{"send to nats://" + u.Host + "/tasks.nobody: ", "sending x", " to nats://" + u.Host + "/tasks.nobody, ", "hook nats:///acomm.call."},
			[]string{"-v", broker + "/tasks.nobody", "x"}},
	} {
		got := runAcomm(t, append([]string{"call"}, test.args...)...)
		require.Equal(t, exitNotSent, got.code, got.stderr)
		for _, words := range test.says {
			require.Contains(t, got.stderr, words)
		}
	}
	cmd := acommCmd(t, "call", "nats:///tasks.nobody", "x")
	cmd.Env = append(cmd.Env, "NATS_URL="+broker)
	require.Contains(t, runCmd(t, cmd).stderr, "send to nats://"+u.Host+"/tasks.nobody: ")

	require.NoError(t, acomm.Send(g.url, gwRequest(t, "echo", natshook.URL("nobody.here").String(), 1)))
	require.Contains(t, g.waitLine("failed to forward"), "send to nats:///nobody.here: ")
	g.stop()

	r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0", "--nats", "nats://user:secret@"+closed+",nats://127.0.0.1:1")
	require.Equal(t, exitTask, r.code)
	require.Contains(t, r.stderr, "connect to NATS at "+closed+",127.0.0.1:1: ")
	require.NotContains(t, r.stderr, "secret")
}

func TestCall_BadSubjectIsAMistakeOfTheCommandLine(t *testing.T) {
	t.Parallel()
	closed := closedPort(t)
	for _, subject := range []string{"a..b", ".a", "a.", "a%20b", "a.*", "tasks.%3E", "$SYS.x", "_INBOX.x", "_INBOX", "a%00", ""} {
		got := runAcomm(t, "call", "nats://"+closed+"/"+subject, "x")
		require.Equal(t, exitUsage, got.code, "%s: %s", subject, got.stderr)
	}
	for _, subject := range []string{"$SYS", "_INBOX.x", "a..b"} {
		r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0", "--nats", "nats://"+closed, "--nats-subject", subject)
		require.Equal(t, exitUsage, r.code, "%s: %s", subject, r.stderr)
		require.Contains(t, r.stderr, "--nats-subject")
	}
	r := runAcomm(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0", "--nats", "nats://user:secret@host:port")
	require.Equal(t, exitUsage, r.code, r.stderr)
	require.Contains(t, r.stderr, "--nats")
	require.NotContains(t, r.stderr, "secret")
}
