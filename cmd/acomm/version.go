package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is that of a release: go build -ldflags '-X main.version=1.0.0'.
var version string

// versionText says what was built, of which commit, and with which Go.
func versionText() string {
	release, commit, modified := version, "unknown", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		if release == "" {
			release = info.Main.Version
		}
		for _, setting := range info.Settings {
			switch {
			case setting.Key == "vcs.revision":
				commit = setting.Value
			case setting.Key == "vcs.modified" && setting.Value == "true":
				modified = " (modified)"
			}
		}
	}
	if release == "" {
		release = "(devel)"
	}
	return fmt.Sprintf("acomm %s, commit %s%s, %s %s/%s", release, commit, modified, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
