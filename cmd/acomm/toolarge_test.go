package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: a hook that has taken a response is sent a second one.
func TestServe_HookWithALargeAnswerIsSentOne(t *testing.T) {
	var posts atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		posts.Add(1)
		_, _ = fmt.Fprintf(w, `{"error":"","id":"%s"}`, strings.Repeat("x", 1<<20))
	}))
	defer server.Close()
	hook, err := url.Parse(server.URL)
	require.NoError(t, err)
	raw := json.RawMessage(`1`)
	err = (&service{room: make(chan struct{}, 1)}).deliver(&acomm.Request{ID: "1", ResponseHook: hook}, &acomm.Response{ID: "1", Result: &raw}, nil)
	require.ErrorIs(t, err, syscall.EMSGSIZE)
	require.EqualValues(t, 1, posts.Load())
}

func TestIsTooLarge(t *testing.T) {
	small, large := json.RawMessage(`1`), json.RawMessage(strings.Repeat("1", maxOutput+1))
	for _, is := range []struct {
		scheme string
		result *json.RawMessage
		err    error
		want   bool
	}{
		{"nats", &small, syscall.EMSGSIZE, true},
		{"unix", nil, syscall.EMSGSIZE, true},
		{"http", &small, syscall.EMSGSIZE, false},
		{"https", nil, syscall.EMSGSIZE, false},
		{"https", &large, syscall.EMSGSIZE, true},
		{"nats", &large, errors.New("other"), false},
		{"nats", &large, nil, false},
	} {
		require.Equal(t, is.want, isTooLarge(&url.URL{Scheme: is.scheme}, &acomm.Response{Result: is.result}, is.err), is)
	}
}
