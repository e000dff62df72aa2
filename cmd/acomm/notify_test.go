package main

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// supervisor is what systemd is to a service of Type=notify.
type supervisor struct {
	t    *testing.T
	conn *net.UnixConn
	name string
	all  []string // what it was told
}

func startSupervisor(t *testing.T, name string) *supervisor {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return &supervisor{t: t, conn: conn, name: name}
}

// next is what it is told next.
func (s *supervisor) next() string {
	s.t.Helper()
	buf := make([]byte, 1000)
	require.NoError(s.t, s.conn.SetReadDeadline(time.Now().Add(patience)))
	n, err := s.conn.Read(buf)
	require.NoError(s.t, err)
	s.all = append(s.all, string(buf[:n]))
	return string(buf[:n])
}

// until waits until it is told so.
func (s *supervisor) until(state string) {
	s.t.Helper()
	for s.next() != state {
	}
}

// supervised is the program as it starts it.
func (s *supervisor) supervised(cmd *exec.Cmd, more ...string) *exec.Cmd {
	cmd.Env = append(append(cmd.Env, "NOTIFY_SOCKET="+s.name), more...)
	return cmd
}

func TestNotify_ServeTellsItsSupervisor(t *testing.T) {
	t.Parallel()
	for name, socket := range map[string]string{
		"path":     filepath.Join(shortDir(t), "notify"),
		"abstract": fmt.Sprintf("@acomm-test-%d", time.Now().UnixNano()),
	} {
		t.Run(name, func(t *testing.T) {
			s := startSupervisor(t, socket)
			path := filepath.Join(shortDir(t), "s.sock")
			serve := startCmd(t, s.supervised(acommCmd(t, "serve", path, "--", "cat"), "WATCHDOG_USEC=100000"))
			require.Equal(t, "READY=1", s.next())
			require.Equal(t, result{stdout: "null\n"}, runAcomm(t, "call", path, "a"))
			for range 3 {
				require.Equal(t, "WATCHDOG=1", s.next())
			}
			serve.signal(syscall.SIGTERM)
			s.until("STOPPING=1")
			require.Zero(t, serve.wait(), serve.said())
		})
	}
}

func TestNotify_GatewayTellsItsSupervisor(t *testing.T) {
	t.Parallel()
	s := startSupervisor(t, filepath.Join(shortDir(t), "notify"))
	g := startCmd(t, s.supervised(acommCmd(t, "gateway", "--socket-dir", shortDir(t), "--listen", "127.0.0.1:0"), "WATCHDOG_USEC=100000"))
	require.Equal(t, "READY=1", s.next())
	g.waitLine("listening on")
	for range 3 {
		require.Equal(t, "WATCHDOG=1", s.next())
	}
	g.signal(syscall.SIGTERM)
	s.until("STOPPING=1")
	require.Zero(t, g.wait(), g.said())
}

// A program that inherited the settings could pass for the service.
func TestNotify_ProgramsDoNotSeeTheSupervisor(t *testing.T) {
	t.Parallel()
	s := startSupervisor(t, filepath.Join(shortDir(t), "notify"))
	path := filepath.Join(shortDir(t), "s.sock")
	serve := startCmd(t, s.supervised(acommCmd(t, append([]string{"serve", path, "--"}, sh(`cat >/dev/null; env | grep -c -e NOTIFY_ -e WATCHDOG_; true`)...)...),
		"WATCHDOG_USEC=1000000"))
	require.Equal(t, "READY=1", s.next())
	require.Equal(t, result{stdout: "0\n"}, runAcomm(t, "call", path, "a"))
	serve.stop()
}

func TestNotify_WatchdogOfAnotherProcessIsNotOurs(t *testing.T) {
	t.Parallel()
	s := startSupervisor(t, filepath.Join(shortDir(t), "notify"))
	path := filepath.Join(shortDir(t), "s.sock")
	serve := startCmd(t, s.supervised(acommCmd(t, "serve", path, "--", "cat"), "WATCHDOG_USEC=1000", "WATCHDOG_PID=1"))
	require.Equal(t, "READY=1", s.next())
	runAcomm(t, "call", path, "a")
	serve.stop()
	s.until("STOPPING=1")
	require.Equal(t, []string{"READY=1", "STOPPING=1"}, s.all)
}

func TestNotify_SupervisorThatIsGoneIsNoReasonToEnd(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "s.sock")
	cmd := acommCmd(t, "serve", path, "--", "cat")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path+".nobody")
	serve := startCmd(t, cmd)
	require.True(t, strings.Contains(serve.waitLine("READY=1"), "failed to tell the supervisor"))
	require.Equal(t, result{stdout: "null\n"}, runAcomm(t, "call", path, "a"))
	serve.stop()
}
