package main

import (
	"strings"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

func TestGateway_LogHasTheTimeAndVSaysMore(t *testing.T) {
	t.Parallel()
	g := startGateway(t, "-v")
	began := time.Now()
	require.Error(t, acomm.Send(g.url, gwRequest(t, "nobody", "http://127.0.0.1:9/", 1)))
	g.waitLine("nobody provides the task")
	g.stop()
	for line := range strings.SplitSeq(g.said(), "\n") {
		text, found := strings.CutPrefix(line, `time="`)
		require.True(t, found, line)
		text, _, _ = strings.Cut(text, `"`)
		at, err := time.Parse(time.RFC3339Nano, text)
		require.NoError(t, err, line)
		require.WithinDuration(t, began, at, patience)
	}
}
