package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

// install installs with the settings of make, and returns the paths of the files there
// are below the directory then.
func install(t *testing.T, below string, settings ...string) (files []string) {
	t.Helper()
	cmd := exec.Command("make", append([]string{"-C", "../..", "--no-print-directory", "install"}, settings...)...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, filepath.WalkDir(below, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			path, err = filepath.Rel(below, path)
			files = append(files, path)
		}
		return err
	}))
	return files
}

var installed = []string{
	"bin/acomm",
	"lib/systemd/system/acomm-gateway.service",
	"lib/systemd/system/acomm-serve@.service",
	"lib/sysusers.d/acomm.conf",
	"share/bash-completion/completions/acomm",
	"share/doc/acomm/gateway.yaml",
	"share/doc/acomm/serve.conf",
	"share/fish/vendor_completions.d/acomm.fish",
	"share/man/man1/acomm-call.1",
	"share/man/man1/acomm-check.1",
	"share/man/man1/acomm-gateway.1",
	"share/man/man1/acomm-serve.1",
	"share/man/man1/acomm.1",
	"share/zsh/site-functions/_acomm",
}

func TestInstall_PutsEachThingInItsPlace(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("make"); err != nil {
		t.Skip("there is no make")
	}
	root := t.TempDir()
	files := install(t, filepath.Join(root, "opt/x"), "DESTDIR="+root, "PREFIX=/opt/x")
	for _, path := range installed {
		require.Contains(t, files, path)
	}
	top, err := os.ReadDir(root)
	require.NoError(t, err)
	require.Len(t, top, 1, "outside of PREFIX")

	prefix := filepath.Join(root, "opt/x")
	require.NoError(t, exec.Command(filepath.Join(prefix, "bin/acomm"), "help", "serve").Run())
	for shell, path := range map[string]string{"bash": installed[4], "fish": installed[7], "zsh": installed[13]} {
		text, err := os.ReadFile(filepath.Join(prefix, path))
		require.NoError(t, err)
		require.Equal(t, runAcomm(t, "completion", shell).stdout, string(text))
	}
	for _, unit := range installed[1:3] {
		text, err := os.ReadFile(filepath.Join(prefix, unit))
		require.NoError(t, err)
		require.Contains(t, string(text), "\nExecStart=/opt/x/bin/acomm ")
		require.NotRegexp(t, `@[a-z]+@`, string(text), "left for the installer")
	}
}

func TestInstall_RefusesAPrefixThatUnitsCannotName(t *testing.T) {
	t.Parallel()
	for _, prefix := range []string{"opt/x", "/opt/with space", "/opt/%x"} {
		cmd := exec.Command("install/install.sh")
		cmd.Env = append(os.Environ(), "PREFIX="+prefix, "DESTDIR="+t.TempDir(), "GO=false")
		out, err := cmd.CombinedOutput()
		require.Error(t, err)
		require.Contains(t, string(out), "is not an absolute path of plain characters")
	}
}

func TestInstall_SystemdTakesTheUnits(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("there is no systemd-analyze")
	}
	prefix := shortDir(t) // without DESTDIR: what the units start must be there
	// The program is there already: the test above has it built.
	built := filepath.Join(t.TempDir(), "go")
	require.NoError(t, os.WriteFile(built, []byte(`cp "`+acommBinary+`" "$3"`), 0o600)) // of build -o FILE
	install(t, prefix, "PREFIX="+prefix, "GO=sh "+built)
	for _, unit := range []string{"acomm-gateway.service", "acomm-serve@.service"} {
		cmd := exec.Command(analyze, "verify", filepath.Join(prefix, "lib/systemd/system", unit))
		cmd.Env = append(os.Environ(), "MANPATH="+filepath.Join(prefix, "share/man"))
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		require.Empty(t, string(out)) // what it ignores it says
	}
}

// unitSettings are the settings of a unit, by name.
func unitSettings(t *testing.T, unit string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("install", unit))
	require.NoError(t, err)
	settings := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			settings[name] = value
		}
	}
	return settings
}

// Without KillMode=mixed systemd sends the programs of serve SIGTERM as well, and what
// was acknowledged fails. Both units need the same user and directories: a stream is a
// socket in TMPDIR that only its user can open.
func TestInstall_UnitsFitThePrograms(t *testing.T) {
	gateway, serve := unitSettings(t, "acomm-gateway.service.in"), unitSettings(t, "acomm-serve@.service.in")
	require.Equal(t, "mixed", serve["KillMode"])
	for _, name := range []string{"Type", "WatchdogSec", "User", "Group", "UMask", "RuntimeDirectory", "RuntimeDirectoryPreserve", "Environment"} {
		require.NotEmpty(t, gateway[name])
		require.Equal(t, gateway[name], serve[name], name)
	}
	require.Equal(t, "notify", serve["Type"])
	config, err := os.ReadFile("install/gateway.yaml")
	require.NoError(t, err)
	require.Contains(t, string(config), "\nsocket-dir: /run/acomm/tasks\n")
	require.Contains(t, serve["ExecStart"], " /run/acomm/tasks/%i/1.sock -- $COMMAND")

	// docs/scale.md: connections + 2.2 x streams + hooks' connections + 100
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	(&gatewayOptions{}).addFlags(flags)
	connections, err := flags.GetInt("max-connections")
	require.NoError(t, err)
	limit, err := strconv.Atoi(gateway["LimitNOFILE"])
	require.NoError(t, err)
	require.GreaterOrEqual(t, limit, connections+connections*22/10+4096+100)
}

func TestInstall_SampleConfigurationRuns(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("install/gateway.yaml")
	require.NoError(t, err)
	dir := shortDir(t)
	sample := strings.NewReplacer("/run/acomm/tasks", dir, "127.0.0.1:8080", "127.0.0.1:0").Replace(string(text))
	path := filepath.Join(dir, "gateway.yaml")
	require.NoError(t, os.WriteFile(path, []byte(sample), 0o600))
	g := startAcomm(t, "gateway", "--config", path)
	g.waitLine("listening on")
	g.stop()

	// What is commented out is a setting, and its default unless there is none.
	opts := &gatewayOptions{maxBody: 64 << 20, maxHeader: 64 << 10}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	opts.addFlags(flags)
	commented := regexp.MustCompile(`(?m)^#([a-z-]+): (.*)$`).FindAllStringSubmatch(string(text), -1)
	require.GreaterOrEqual(t, len(commented), 10)
	for _, setting := range commented {
		flag := flags.Lookup(setting[1])
		require.NotNil(t, flag, setting[1])
		if def := flag.DefValue; def != "" && def != "[]" {
			require.Equal(t, def, setting[2], setting[1])
		}
	}
	all := regexp.MustCompile(`(?m)^#([a-z-]+: )`).ReplaceAllString(sample, "$1")
	all = regexp.MustCompile(`(?m)^nats: .*$`).ReplaceAllString(all, "nats: embedded\nnats-listen: "+closedPort(t))
	require.NoError(t, os.WriteFile(path, []byte(all), 0o600))
	g = startAcomm(t, "gateway", "--config", path)
	g.waitLine("listening on")
	g.stop()
}

func TestInstall_ManualHasWhatTheHelpSays(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	require.Equal(t, result{}, runAcomm(t, "man", dir))
	root := newRootCommand()
	for _, c := range append(manCommands(root), root) {
		path := filepath.Join(dir, manName(c)+".1")
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		page := strings.NewReplacer(`\e`, `\`, `\-`, `-`, `\(aq`, `'`, `\(ga`, "`", `\(ha`, `^`, `\(ti`, `~`, `\&`, ``).Replace(string(text))
		for line := range strings.Lines(c.Long + "\n" + c.Example) {
			require.Contains(t, page, strings.TrimSpace(line))
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			require.Contains(t, page, "--"+f.Name)
		})
		for line := range strings.Lines(page) { // a macro is one of ours
			if strings.HasPrefix(line, ".") && !slices.Contains([]string{".TH", ".SH", ".B", ".PP", ".nf", ".fi", ".TP"}, strings.Fields(line)[0]) {
				require.Contains(t, string(text), `\&`+strings.TrimSpace(line)[:1], line)
			}
		}
		formatManual(t, path)
	}
}

// Tables stay as they are, paragraphs flow, and nothing in a help text is a macro.
func TestInstall_ManualKeepsTheFormOfTheHelp(t *testing.T) {
	c := &cobra.Command{Use: "x FILE", Short: "Do x", Run: func(*cobra.Command, []string) {}, Long: `X reads FILE
and .profile.
.TH is no macro.

EXIT STATUS
  0  done
  1  'a\n' is wrong
     for ever`}
	c.Flags().StringP("mode", "m", "a.b", "the `name` of a mode")
	want := `.TH X 1 "" acomm "acomm manual"
.SH NAME
x \- Do x
.SH SYNOPSIS
.B x FILE [flags]
.SH DESCRIPTION
X reads FILE
and .profile.
\&.TH is no macro.
.PP
.SH EXIT STATUS
.PP
.nf
0  done
1  \(aqa\en\(aq is wrong
   for ever
.fi
.SH OPTIONS
.TP
\fB\-m\fR, \fB\-\-mode\fR \fIname\fR
the name of a mode (default a.b)
.SH SEE ALSO

`
	page := manPage(c)
	require.Equal(t, want, string(page))
	path := filepath.Join(t.TempDir(), "x.1")
	require.NoError(t, os.WriteFile(path, page, 0o600))
	formatManual(t, path)
}

// formatManual has the page formatted, where that can be done, without a warning.
func formatManual(t *testing.T, path string) {
	t.Helper()
	groff, err := exec.LookPath("groff")
	if err != nil {
		return
	}
	out, err := exec.Command(groff, "-man", "-Tutf8", "-ww", "-z", path).CombinedOutput()
	require.NoError(t, err)
	require.Empty(t, string(out), fmt.Sprint("groff on ", path))
}
