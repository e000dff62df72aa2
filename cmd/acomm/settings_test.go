package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Hazard: a number of a file is refused, or a name of one becomes another.
func TestGateway_FileSaysWhatItSays(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ file, text, socket string }{
		"JSON, large":     {"c.json", `{"max-outstanding": 2000000, "max-body": 10000000, "name": "n", "max-header": 1e6, "hook-deny": ["10.0.0.0/8"]}`, "n"},
		"JSON, number":    {"c.json", `{"name": 1000000}`, "1000000"},
		"JSON, exponent":  {"c.json", `{"max-connections": 2e3, "name": "0123"}`, "0123"},
		"TOML, large":     {"c.toml", "max-outstanding = 2_000_000\nmax-connections = 1e3\nname = \"0123\"\n", "0123"},
		"YAML, zero":      {"c.yaml", "name: 0123\n", "0123"},
		"YAML, hex":       {"c.yaml", "name: 0x1F\nmax-body: 0x100000\n", "0x1F"},
		"YAML, float":     {"c.yaml", "name: 1.10\nmax-outstanding: 2000000\nmax-body: 10_000_000\n", "1.10"},
		"YAML, date":      {"c.yml", "Name: 2024-01-01\nhook-allow: [127.0.0.1, '10.0.0.0/8']\n", "2024-01-01"},
		"YAML, truth":     {"c.yaml", "name: True\nverbose: true\n", "True"},
		"YAML, alias":     {"c.yaml", "listen: &a 127.0.0.1:0\nnats-listen: *a\nname: n\nmax-connections: 1e3\n", "n"},
		"YAML, zeroes":    {"c.yaml", "name: n\nmax-body: 0999999\n", "n"},
		"YAML, null name": {"c.yaml", "name: n\nstream-url: ~\n", "n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := shortDir(t)
			file := filepath.Join(dir, test.file)
			require.NoError(t, os.WriteFile(file, []byte(test.text), 0o600))
			r := startAcomm(t, "gateway", "--socket-dir", dir, "--listen", "127.0.0.1:0", "--config", file)
			r.waitLine("listening on")
			require.FileExists(t, filepath.Join(dir, "coordinator", test.socket+".sock"))
			r.stop()
		})
	}
}

func TestGateway_ErrorSaysWhereTheSettingIs(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	base := []string{"gateway", "--socket-dir", dir}
	for setting, value := range map[string]string{
		"max-connections": "many", "timeout": "soon", "max-body": "10XB", "listen": "nonsense", "hook-deny": "everywhere",
		"stream-url": "nonsense", "max-outstanding": "-1", "name": "a/b", "max-header": "0",
	} {
		args := base
		if setting != "listen" {
			args = append(base, "--listen", "127.0.0.1:0")
		}
		file := filepath.Join(dir, "c.yaml")
		require.NoError(t, os.WriteFile(file, []byte(setting+": "+value+"\n"), 0o600))
		got := runAcomm(t, append(args, "--config", file)...)
		require.Equal(t, exitUsage, got.code, got.stderr)
		require.Contains(t, got.stderr, file+": "+setting, setting)

		cmd := acommCmd(t, args...)
		name := environmentName(setting)
		cmd.Env = append(cmd.Env, name+"="+value)
		got = runCmd(t, cmd)
		require.Equal(t, exitUsage, got.code, got.stderr)
		require.Contains(t, got.stderr, name, setting)
		require.NotContains(t, got.stderr, "--"+setting+":", setting)

		cmd = acommCmd(t, append(args, "--"+setting+"="+value)...)
		cmd.Env = append(cmd.Env, name+"=1")
		got = runCmd(t, cmd)
		require.Equal(t, exitUsage, got.code, got.stderr)
		require.Contains(t, got.stderr, "--"+setting, setting)
		require.NotContains(t, got.stderr, name, setting)
	}
}
