package acomm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"time"
)

// How a session begins, at both ends. PROTOCOL.md, section 11, has the steps.

const (
	senderName  = "@acomm-3/"         // begins the name of a plain connection's socket whose owner can have sessions
	sessionName = "@acomm-3s/"        // begins the name of a session's socket
	greeting    = "\xffacomm\x00\x03" // the first bytes of a session, from each end; its token follows
	openTimeout = time.Second         // for a session to be opened
	openBackoff = 5 * time.Second     // until it is tried again, where that failed
)

// hasSessions says whether the system has what sessions need: names for sockets without
// a file.
const hasSessions = runtime.GOOS == "linux"

// processToken tells processes apart. It is made once in a process, and only those that
// have a session with it know it.
type processToken [16]byte

var ownToken = sync.OnceValue(func() (t processToken) {
	_, _ = rand.Read(t[:]) // never fails
	return t
})

func ownGreeting() []byte {
	token := ownToken()
	return append([]byte(greeting), token[:]...)
}

func parseGreeting(data []byte) (processToken, error) {
	if string(data[:len(greeting)]) != greeting {
		return processToken{}, errors.New("not the greeting of a session")
	}
	return processToken(data[len(greeting):]), nil
}

// hasSessionsMember reports whether an acknowledgement says that its listener can have
// sessions.
func hasSessionsMember(ack []byte) bool {
	if !bytes.Contains(ack, []byte(`"sessions"`)) {
		return false
	}
	var member struct {
		Sessions int `json:"sessions"`
	}
	return json.Unmarshal(ack, &member) == nil && member.Sessions >= 1
}

// openSession opens a session to the listener at the path, in the name of the calling
// thread.
func openSession(ctx context.Context, path string) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	runtime.LockOSThread() // the one that the kernel asks whether it may connect
	defer runtime.UnlockOSThread()
	file, name, id, err := openSocketFile(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	own := sessionName + rand.Text()
	conn, err := dialUnix(ctx, name, own)
	if err != nil {
		return nil, err
	}
	s, err := greetedSession(ctx, conn, own, id)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	s.as = thisThread()
	return s, nil
}

// greetedSession waits for the listener's greeting.
func greetedSession(ctx context.Context, conn *net.UnixConn, name string, file fileID) (*session, error) {
	if conn.LocalAddr().String() != name {
		return nil, errors.New("the socket has no name")
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	data := make([]byte, len(ownGreeting()))
	if _, err := io.ReadFull(conn, data); err != nil {
		return nil, err
	}
	token, err := parseGreeting(data)
	if err != nil {
		return nil, err
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	s, err := newSession(conn, true, name, file)
	if err != nil {
		return nil, err
	}
	s.greeted = true
	s.calls.openLocked(file) // nobody else has the session
	s.token = token
	return s, nil
}

// isSession reports whether a connection that was accepted is there to be a session.
func isSession(conn *net.UnixConn) bool {
	addr, ok := conn.RemoteAddr().(*net.UnixAddr)
	return ok && hasSessions && strings.HasPrefix(addr.Name, sessionName)
}

// acceptSession makes a session of a connection that was accepted, if the listener can
// have one more.
func acceptSession(conn *net.UnixConn, queue *acceptQueue) {
	s, err := newSession(conn, false, conn.RemoteAddr().String(), queue.file)
	if err != nil {
		_ = conn.Close()
		return
	}
	f := s.serveLocked(queue, conn.LocalAddr(), conn.RemoteAddr()) // nobody else has the session
	if !queue.join(f) {
		_ = conn.Close()
		return
	}
	sessions.add(s)
	go s.read() // ends with the session; the queue waits for that
}
