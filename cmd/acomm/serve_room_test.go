package main

import (
	"net"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: a result that was ready waited behind all requests that had come after its own.
func TestServe_ResultsGoBeforeRequestsThatWait(t *testing.T) {
	t.Parallel()
	gate := fifo(t)
	r, path := startServeWith(t, "ulimit -n 24", []string{"--concurrency", "1"}, // room for two
		sh(`echo running >&2; read line <"`+gate+`"; cat`)...)
	hook, responses := gwHook(t)
	target := gwRequest(t, "x", "unix://"+path, nil).ResponseHook
	const number = 8
	for n := range number {
		require.NoError(t, acomm.Send(target, gwRequest(t, "work", hook, n)))
	}
	r.waitLine("running")
	openGate(t, gate, 1)
	require.NoError(t, gwWithin(t, responses).Error) // while the next one runs, and the others wait
	openGate(t, gate, number-1)
	for range number - 1 {
		require.NoError(t, gwWithin(t, responses).Error)
	}
	r.stop()
}

// Hazard: readers that take nothing kept their places, where it was descriptors that the
// next request waited for.
func TestServe_AStalledReaderGivesWayToARequestThatWaitsForDescriptors(t *testing.T) {
	t.Parallel()
	r, path := startServeWith(t, "ulimit -n 24", []string{"--stream", "--concurrency", "4", "--unread-duration", "1s"}, "yes") // room for one
	first := requestStream(t, path)
	require.NoError(t, first.Error)
	reader, err := net.Dial("unix", first.StreamURL.Path)
	require.NoError(t, err)
	defer reader.Close() // it takes nothing
	second := requestStream(t, path)
	require.NoError(t, second.Error)
	require.NotEqual(t, first.StreamURL, second.StreamURL)
	next, err := net.Dial("unix", second.StreamURL.Path)
	require.NoError(t, err)
	require.NoError(t, next.Close())
	r.stop()
}
