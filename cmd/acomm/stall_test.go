package main

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMovement_EndsWhenItStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, began := newMovement(), time.Now()
		ended := make(chan bool)
		go func() { ended <- m.ends(nil, nil) }()
		for range 10 { // as long as it moves
			time.Sleep(streamStall - time.Nanosecond)
			m.touch()
		}
		require.False(t, <-ended)
		require.Equal(t, 11*streamStall-10*time.Nanosecond, time.Since(began))
		require.False(t, m.ends(nil, nil), "at once: it has not moved for long")
		require.Equal(t, 11*streamStall-10*time.Nanosecond, time.Since(began))

		closed := make(chan struct{})
		close(closed)
		m.touch()
		require.True(t, m.ends(closed, nil))
		require.False(t, m.ends(nil, closed))
	})
}
