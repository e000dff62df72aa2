package main

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/mistifyio/acomm"
	"github.com/sirupsen/logrus"
)

// work is what a request asks for.
type work struct {
	Millis int `json:"millis"` // until the response, or for the whole stream
	Bytes  int `json:"bytes"`  // of a stream; 0: none
}

// answer is the result of a request.
type answer struct {
	ID   string `json:"id"`
	Host string `json:"host"`
}

// provide is the role of a provider: it listens at DIR/TASK/NAME.sock and appends
// the id of each request it works on to a file.
func provide(args []string) error {
	flags := flag.NewFlagSet("provider", flag.ContinueOnError)
	dir := flags.String("dir", "", "directory of the sockets")
	task := flags.String("task", "", "task")
	host := flags.String("host", "", "name of the host")
	handled := flags.String("handled", "", "file for the ids")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ids, err := os.OpenFile(*handled, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer ids.Close()
	own := filepath.Join(*dir, ".providers") // the gateway looks for tasks beside it
	tracker, err := acomm.NewTracker(filepath.Join(own, *task+".sock"), nil, time.Minute)
	if err != nil {
		return err
	}
	listener := acomm.NewUnixListener(filepath.Join(*dir, *task, "provider.sock"), 0)
	if err := errors.Join(tracker.Start(), listener.Start()); err != nil {
		return err
	}
	p := &provider{host: *host, streams: own, ids: ids, tracker: tracker, listener: listener}
	fmt.Println("ready")

	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go func() { // ends with the process
		<-ended
		listener.Stop(time.Second)
	}()
	for conn := listener.NextConn(); conn != nil; conn = listener.NextConn() {
		go p.serve(conn) // ends with its request; the process does not wait
	}
	tracker.Stop()
	return nil
}

type provider struct {
	host     string
	streams  string // directory for the sockets of streams
	ids      *os.File
	tracker  *acomm.Tracker
	listener *acomm.UnixListener
}

func (p *provider) serve(conn net.Conn) {
	req, job := &acomm.Request{}, work{}
	err := acomm.UnmarshalConnData(conn, req)
	if err == nil {
		err = req.UnmarshalArgs(&job)
	}
	ack := &acomm.Response{ID: req.ID, Error: err}
	sendErr := acomm.SendConnData(conn, ack)
	p.listener.DoneConn(conn)
	if err != nil || sendErr != nil {
		return // refused, or the sender knows that it may not have arrived
	}
	if _, err := p.ids.WriteString(req.ID + "\n"); err != nil {
		logrus.WithError(err).Fatal("record a request")
	}
	pause := time.Duration(job.Millis) * time.Millisecond
	var stream *url.URL
	if job.Bytes == 0 {
		time.Sleep(pause)
	} else {
		stream, err = p.tracker.NewStreamUnix(p.streams, newSource(req.ID, job.Bytes, pause)) // the requester gets the error
	}
	var result any
	if err == nil {
		result = answer{ID: req.ID, Host: p.host}
	}
	resp, err := acomm.NewResponse(req, result, stream, err)
	if err == nil {
		err = req.Respond(resp)
	}
	if err != nil {
		logrus.WithError(err).WithField("id", req.ID).Warn("respond")
	}
}

// source is a stream of bytes that follow from the request's id, spread over a time.
type source struct {
	io.Reader
	left  int
	pause time.Duration // before each piece
}

const piece = 16 << 10

func newSource(id string, size int, over time.Duration) *source {
	return &source{rand.NewChaCha8(sha256.Sum256([]byte(id))), size, over / time.Duration(max(1, size/piece))}
}

func (s *source) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	time.Sleep(s.pause)
	n, err := s.Reader.Read(p[:min(len(p), s.left, piece)])
	s.left -= n
	return n, err
}

func (s *source) Close() error { return nil }

// digest is that of the stream that a request is answered with.
func digest(id string, size int) string {
	hash := sha256.New()
	_, _ = io.Copy(hash, newSource(id, size, 0)) // neither fails
	return fmt.Sprintf("%x", hash.Sum(nil))
}
