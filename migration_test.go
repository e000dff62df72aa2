package acomm_test

import (
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// What the migration notes say of services that were written on the library of 2016.

// What the migration notes say of services that were written on the library of 2016.
func TestMigrationNotes_SayWhatTheLibraryDoes(t *testing.T) {
	text := strings.Join(strings.Fields(document(t, "docs/migrating.md")), " ")
	_, text, _ = strings.Cut(text, "## What may need a change")
	notes, _, _ := strings.Cut(text, "## ")
	for note, check := range map[string]func(*testing.T){
		"Returned errors are wrapped":                           returnedErrorsAreWrapped,
		"Settings of `http.DefaultClient` itself are not used":  defaultClientIsNotUsed,
		"`MultiRequest.AddRequest` refuses a name that is used": namesAreUsedOnce,
		"handlers that are set after it don't run":              handlersSetAfterAddRequestDoNotRun,
		"A failed acknowledgement is returned by `Send`":        failedAcknowledgementIsReturned,
	} {
		t.Run(note, func(t *testing.T) {
			require.True(t, strings.Contains(notes, note), "the note is missing")
			check(t)
		})
	}
}

func returnedErrorsAreWrapped(t *testing.T) {
	near, far := connPair(t)
	require.NoError(t, near.SetReadDeadline(time.Unix(1, 0)))
	err := acomm.UnmarshalConnData(near, new(any))
	require.NotImplements(t, (*net.Error)(nil), err)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout())

	require.NoError(t, far.Close())
	require.NoError(t, near.SetReadDeadline(time.Time{}))
	err = acomm.UnmarshalConnData(near, new(any))
	require.NotEqual(t, io.EOF, err)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)

	err = acomm.Send(unixURL(filepath.Join(shortDir(t), "none.sock")), 1)
	require.False(t, os.IsNotExist(err))
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// refusingTransport answers every request with an error.
type refusingTransport struct{}

func (refusingTransport) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, fs.ErrPermission
}

func defaultClientIsNotUsed(t *testing.T) {
	hooks := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer hooks.Close()
	hook, err := url.Parse(hooks.URL)
	require.NoError(t, err)
	client, transport := *http.DefaultClient, http.DefaultTransport
	defer func() { *http.DefaultClient, http.DefaultTransport = client, transport }()
	*http.DefaultClient = http.Client{Transport: refusingTransport{}, Timeout: time.Nanosecond}
	require.NoError(t, acomm.Send(hook, 1))
	http.DefaultTransport = refusingTransport{}
	require.ErrorIs(t, acomm.Send(hook, 1), fs.ErrPermission)
}

func namesAreUsedOnce(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "a")
	other, _ := newRequest(t, tracker.URL(), nil)
	require.ErrorIs(t, multi.AddRequest("a", other), fs.ErrExist)
	multi.RemoveRequest(req)
}

func handlersSetAfterAddRequestDoNotRun(t *testing.T) {
	tracker := newTracker(t)
	multi := acomm.NewMultiRequest(tracker, patience)
	req := namedRequest(t, multi, tracker, "a")
	req.SuccessHandler = func(*acomm.Request, *acomm.Response) { t.Error("the handler runs") }
	tracker.HandleResponse(answerTo(t, req, 1, nil))
	require.Contains(t, allResponses(t, multi), "a")
}

func failedAcknowledgementIsReturned(t *testing.T) {
	log := captureLog(t)
	ul := startListener(t, "", 0)
	sent := make(chan error, 1)
	go func() { sent <- acomm.Send(ul.URL(), 1) }()
	conn := take(t, ul)
	require.NoError(t, acomm.UnmarshalConnData(conn, new(any)))
	ul.DoneConn(conn)
	require.ErrorIs(t, within(t, sent, "Send"), io.ErrUnexpectedEOF)
	require.Error(t, acomm.SendConnData(conn, &acomm.Response{}))
	require.Empty(t, log.String())
}
