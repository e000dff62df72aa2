package acomm

import (
	"io/fs"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Hazard: requests whose ids have the same hash are taken for one another.
func TestTracker_IDsWithTheSameHashAreKeptApart(t *testing.T) {
	tracker, err := NewTracker("", nil, time.Minute)
	require.NoError(t, err)
	tracker.hashMask = 1
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	const number = 12
	var requests []*Request
	handled := make([]int, number)
	for i := range number {
		count := func(*Request, *Response) { handled[i]++ }
		req, err := NewRequest("task", tracker.URL().String(), nil, count, count)
		require.NoError(t, err)
		requests = append(requests, req)
		require.NoError(t, tracker.TrackRequest(req, time.Minute))
		require.ErrorIs(t, tracker.TrackRequest(req, time.Minute), fs.ErrExist)
	}
	want := make([]int, number)
	left := number
	for _, i := range rand.Perm(number) {
		if left--; left%2 == 0 {
			require.True(t, tracker.RemoveRequest(requests[i]))
		} else {
			tracker.HandleResponse(&Response{ID: requests[i].ID})
			want[i] = 1
		}
		require.False(t, tracker.RemoveRequest(requests[i]))
		require.Equal(t, want, handled)
		require.Equal(t, left, tracker.NumRequests())
	}
}
