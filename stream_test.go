package acomm_test

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// NewStreamUnix and Stream: what is offered is read once, as it is.

func randomBytes(n int) []byte {
	data := make([]byte, n)
	_, _ = rand.Read(data)
	return data
}

func TestStream_CarriesAllBytes(t *testing.T) {
	tracker := newTracker(t)
	for _, size := range []int{0, 1, 32 << 10, 32<<10 + 1, 4 << 20} {
		want := randomBytes(size)
		u, err := tracker.NewStreamUnix("", bytesSource(want))
		require.NoError(t, err)
		var got bytes.Buffer
		require.NoError(t, acomm.Stream(&got, u))
		require.True(t, bytes.Equal(want, got.Bytes()), "size %d", size)
	}
}

func TestNewStreamUnix_SocketIsPrivateOrWhereAsked(t *testing.T) {
	tracker := newTracker(t)
	private, err := tracker.NewStreamUnix("", newSource())
	require.NoError(t, err)
	dir, err := os.Stat(filepath.Dir(private.Path))
	require.NoError(t, err)
	require.Equal(t, fs.ModeDir|0o700, dir.Mode())
	file, err := os.Stat(private.Path)
	require.NoError(t, err)
	require.Equal(t, fs.ModeSocket|0o600, file.Mode())

	given := filepath.Join(shortDir(t), "a b", "c")
	names := map[string]bool{}
	for range 10 {
		u, err := tracker.NewStreamUnix(given, newSource())
		require.NoError(t, err)
		require.Equal(t, given, filepath.Dir(u.Path))
		require.Len(t, filepath.Base(u.Path), 15, "66 random bits and the marker")
		names[u.Path] = true
	}
	require.Len(t, names, 10)
	tracker.Stop()
	left, err := os.ReadDir(given)
	require.NoError(t, err)
	require.Empty(t, left)
	require.NoDirExists(t, filepath.Dir(private.Path))
}

func TestNewStreamUnix_RefusalLeavesTheSourceToItsOwner(t *testing.T) {
	src := newSource()
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	_, err = tracker.NewStreamUnix("", src)
	require.ErrorIs(t, err, net.ErrClosed)
	require.NoError(t, tracker.Start())
	_, err = tracker.NewStreamUnix("", nil)
	require.ErrorIs(t, err, fs.ErrInvalid)
	_, err = tracker.NewStreamUnix(filepath.Join(t.TempDir(), strings.Repeat("x", acomm.MaxPath)), src)
	require.ErrorIs(t, err, syscall.ENAMETOOLONG)
	tracker.Stop()
	_, err = tracker.NewStreamUnix("", src)
	require.ErrorIs(t, err, net.ErrClosed)
	require.Empty(t, src.closed)
}

func TestNewStreamUnix_HasOneConsumer(t *testing.T) {
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	first := dial(t, u.Path)
	_, err = src.feed.Write([]byte("x")) // taken, so the first has been accepted
	require.NoError(t, err)
	require.Error(t, acomm.Stream(io.Discard, u))
	require.NoFileExists(t, u.Path)
	src.feed.Close()
	got, err := io.ReadAll(first)
	require.NoError(t, err)
	require.Equal(t, "x", string(got))
	src.requireClosedOnce(t)
}

func TestNewStreamUnix_SourceIsReleasedWhenTheConsumerLeaves(t *testing.T) {
	tracker := newTracker(t)
	for _, sends := range []bool{false, true} { // consumers may leave a byte behind
		src := newSource() // silent: nothing is ever fed
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		conn := dial(t, u.Path)
		if sends {
			_, err := conn.Write([]byte{1})
			require.NoError(t, err)
		}
		conn.Close()
		src.requireClosedOnce(t)
	}
}

// Hazard: where the consumer is not looked at each time it takes something, it may
// leave at a time when nobody looks, and the source says nothing any more.
func TestNewStreamUnix_SourceIsReleasedWhenTheConsumerLeavesInTheMiddle(t *testing.T) {
	tracker := newTracker(t)
	piece := make([]byte, 64<<10)
	for range 20 {
		src := newSource()
		u, err := tracker.NewStreamUnix("", src)
		require.NoError(t, err)
		conn := dial(t, u.Path)
		_, err = conn.Write([]byte{0})
		require.NoError(t, err)
		fed := async(func() {
			for range 10 {
				_, _ = src.feed.Write(piece)
			}
		})
		_, err = io.CopyN(io.Discard, conn, 10*int64(len(piece)))
		require.NoError(t, err)
		within(t, fed, "the feeder")
		conn.Close()
		src.requireClosedOnce(t)
	}
}

func TestNewStreamUnix_FailedSourceIsClosedAndLogged(t *testing.T) {
	lines := captureLog(t)
	tracker := newTracker(t)
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	done := async(func() { _ = acomm.Stream(io.Discard, u) })
	src.feed.CloseWithError(errors.New("disk on fire"))
	src.requireClosedOnce(t)
	within(t, done, "the consumer")
	tracker.Stop()
	require.Contains(t, lines.String(), "disk on fire")
}

func TestNewStreamUnix_UnclaimedIsClosedInTime(t *testing.T) {
	tracker, err := acomm.NewTracker("", nil, 0)
	require.NoError(t, err)
	tracker.SetStreamClaim(time.Millisecond)
	require.NoError(t, tracker.Start())
	defer tracker.Stop()
	src := newSource()
	u, err := tracker.NewStreamUnix("", src)
	require.NoError(t, err)
	src.requireClosedOnce(t)
	require.Error(t, acomm.Stream(io.Discard, u))
}

func TestStream_ErrorsMatchTheirSentinel(t *testing.T) {
	gone := unixURL(filepath.Join(t.TempDir(), "gone.sock"))
	var got bytes.Buffer
	require.ErrorIs(t, acomm.Stream(nil, gone), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Stream(&got, nil), fs.ErrInvalid)
	require.ErrorIs(t, acomm.Stream(&got, gone), fs.ErrNotExist)
	require.ErrorIs(t, acomm.Stream(&got, &url.URL{Scheme: "gopher", Host: "h"}), errors.ErrUnsupported)
	require.ErrorIs(t, acomm.Stream(&got, unixURL("@x")), fs.ErrInvalid)
	require.Empty(t, got.Bytes())
}

// Hazard: a stream's error page was written into the data.
func TestStream_WritesNothingUnlessTheSourceAnswers200(t *testing.T) {
	for _, status := range []int{201, 204, 206, 404, 500} {
		peer := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			if status != 204 {
				_, _ = io.WriteString(w, "<html>error page</html>")
			}
		})
		var got bytes.Buffer
		require.ErrorContains(t, acomm.Stream(&got, peer), "answered")
		require.Empty(t, got.Bytes())
	}
}

func TestStream_CutOffOverHTTPIsAnError(t *testing.T) {
	for _, length := range []string{"", "100"} {
		peer := httpPeer(t, func(w http.ResponseWriter, _ *http.Request) {
			if length != "" {
				w.Header().Set("Content-Length", length)
			}
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		})
		var got bytes.Buffer
		require.ErrorIs(t, acomm.Stream(&got, peer), io.ErrUnexpectedEOF)
		require.Equal(t, "half", got.String())
	}
}

func TestStreams_LeakNothing(t *testing.T) {
	tracker, _ := streamProxy(t)
	exchange := func() {
		addr, err := tracker.NewStreamUnix("", bytesSource([]byte("x")))
		require.NoError(t, err)
		u, err := tracker.ProxyStreamHTTPURL(addr)
		require.NoError(t, err)
		require.NoError(t, acomm.Stream(io.Discard, u))
	}
	exchange()
	before := openFiles(t)
	for range 200 {
		exchange()
	}
	tracker.Stop()
	require.LessOrEqual(t, openFiles(t), before)
}

// failingWriter is a destination with an error that a source may have as well.
type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// Hazard: a destination that failed was taken for a source that was cut off.
func TestStream_DestinationsErrorIsNotTheSources(t *testing.T) {
	tracker := newTracker(t)
	for _, dest := range []error{fs.ErrPermission, syscall.EPIPE, syscall.ECONNRESET, io.EOF} {
		u, err := tracker.NewStreamUnix("", bytesSource(make([]byte, 1<<20)))
		require.NoError(t, err)
		err = acomm.Stream(failingWriter{dest}, u)
		require.ErrorIs(t, err, dest)
		require.NotErrorIs(t, err, io.ErrUnexpectedEOF)
	}
}

// Hazard: a directory that had room for the names of 2016 has none for longer ones.
func TestNewStreamUnix_NamesAreAsShortAsIn2016(t *testing.T) {
	tracker := newTracker(t)
	dir := shortDir(t)
	dir = filepath.Join(dir, strings.Repeat("d", 90-len(dir)-1))
	require.Len(t, dir, 90)
	names := make(map[string]bool)
	for range 100 {
		u, err := tracker.NewStreamUnix(dir, bytesSource([]byte("data")))
		require.NoError(t, err)
		name := filepath.Base(u.Path)
		require.Regexp(t, regexp.MustCompile(`^[A-Za-z0-9_-]{11}\.eof$`), name)
		names[name] = true
		var got bytes.Buffer
		require.NoError(t, acomm.Stream(&got, u))
		require.Equal(t, "data", got.String())
	}
	require.Len(t, names, 100)
	u, err := tracker.NewStreamUnix("", bytesSource(nil))
	require.NoError(t, err)
	require.Len(t, strings.TrimPrefix(u.Path, filepath.Clean(os.TempDir())), 44, "as documented")
}

func TestStream_RedirectsEnd(t *testing.T) {
	peer := httpPeer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) })
	require.ErrorContains(t, acomm.Stream(io.Discard, peer), "redirects")
}

// Hazard: the file's bytes, packed, are unpacked on the way: others, with another
// digest.
func TestStream_BytesArriveAsTheyAre(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(bytes.Repeat([]byte("x"), 4000))
	require.NoError(t, z.Close())
	file := filepath.Join(t.TempDir(), "a.gz")
	require.NoError(t, os.WriteFile(file, packed.Bytes(), 0o600))
	peer := httpPeer(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			w.Header().Set("Content-Encoding", "gzip")
		}
		http.ServeFile(w, r, file)
	})
	var got bytes.Buffer
	require.NoError(t, acomm.Stream(&got, peer))
	require.Equal(t, packed.Bytes(), got.Bytes())
}
