package acomm_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What a tracker logs: little, and no payload.

func TestTracker_FloodOfUnknownIDsLogsLittle(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	synctest.Test(t, func(t *testing.T) { // for its clock
		for i := range 1000 {
			tracker.HandleResponse(&acomm.Response{ID: fmt.Sprint("stranger-", i)})
		}
		require.LessOrEqual(t, strings.Count(log.String(), "\n"), 20)
		time.Sleep(time.Minute)
		before := log.String()
		tracker.HandleResponse(&acomm.Response{ID: "last"})
		last := strings.TrimPrefix(log.String(), before)
		require.Contains(t, last, "id=last")
		require.Contains(t, last, fmt.Sprint("suppressed=", 1000-strings.Count(before, "\n")))
	})
}

// Hazard: what a peer names an id fills the disk.
func TestTracker_HugeIDLogsLittle(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	tracker.HandleResponse(&acomm.Response{ID: strings.Repeat("id", 1<<20)})
	require.Contains(t, log.String(), "idididid")
	require.Less(t, len(log.String()), 4<<10)
}

func TestTracker_NilResponseIsLogged(t *testing.T) {
	tracker := newTracker(t)
	log := captureLog(t)
	tracker.HandleResponse(nil)
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log)
	require.Contains(t, log.String(), "nil")
}

// Hazard: payloads end up in the log.
func TestTracker_PayloadsStayOutOfTheLog(t *testing.T) {
	const secret = "XSECRETX"
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/garbage" {
			fmt.Fprint(w, "<p>"+secret)
			return
		}
		http.Error(w, secret, http.StatusInternalServerError)
	}))
	defer hook.Close()
	tracker := newTracker(t)
	log := captureLog(t)
	result := map[string]any{"key": secret, "padding": strings.Repeat(secret, 1000)}

	for _, text := range []string{
		`{"id":"broken","result":"` + secret + `",}`,
		`{"id":"type","error":["` + secret + `"]}`,
		`{"id":"url","stream_url":"http://` + secret + `:%zz"}`,
		`"` + secret + `"`,
		secret,
	} {
		conn := dial(t, tracker.Addr())
		_, err := conn.Write(plainFrame(text))
		require.NoError(t, err)
		_, err = io.ReadAll(conn)
		require.NoError(t, err)
	}

	stranger, _ := newRequest(t, tracker.URL(), secret)
	require.NoError(t, acomm.Send(tracker.URL(), stranger), "a request where a response belongs")
	require.NoError(t, stranger.Respond(answerTo(t, stranger, result, nil)))
	require.NoError(t, stranger.Respond(answerTo(t, stranger, nil, errors.New(secret))))
	stream := answerTo(t, stranger, result, nil)
	stream.StreamURL = &url.URL{Scheme: "http", User: url.UserPassword("user", secret), Host: "localhost:1"}
	tracker.HandleResponse(stream)

	user := "user:" + secret + "@"
	for _, addr := range []string{
		strings.Replace(hook.URL, "http://", "http://"+user, 1),
		hook.URL + "/garbage",
		"http://" + user + "127.0.0.1:1/", // nobody listens
		"nobody://" + user + "handles/",
	} {
		proxy := newTracker(t) // its log is not full yet
		req, err := acomm.NewRequest("test", addr, secret, nil, nil)
		require.NoError(t, err)
		for _, resp := range []*acomm.Response{
			answerTo(t, req, result, nil),
			answerTo(t, req, nil, errors.New(secret)),
			stream,
		} {
			_, err = proxy.ProxyUnix(req, time.Millisecond)
			require.NoError(t, err)
			copied := *resp
			copied.ID = req.ID
			proxy.HandleResponse(&copied)
		}
		proxy.Stop() // a time-out may have been faster
	}
	tracker.Stop()
	require.Equal(t, 12, strings.Count(log.String(), "failed to forward"))
	require.NotContains(t, log.String(), secret)
}
