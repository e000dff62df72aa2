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
	senderName  = "@acomm-3/"         // begins the name of a plain connection's socket if its sender can have sessions
	sessionName = "@acomm-3s/"        // begins the name of a session's socket
	greeting    = "\xffacomm\x00\x03" // the first bytes from each end of a session; its token follows
	openTimeout = time.Second         // for opening a session
	openBackoff = 5 * time.Second     // after a failed opening, until the next one
)

// hasSessions says whether the system supports sessions: they need sockets with abstract
// names and a /proc.
const hasSessions = runtime.GOOS == "linux"

// processToken names a process. It is made once in a process, and told only to the peers
// of its sessions.
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

// hasSessionsMember reports whether an acknowledgement has the member "sessions": its
// listener can have sessions.
func hasSessionsMember(ack []byte) bool {
	if !bytes.Contains(ack, []byte(`"sessions"`)) {
		return false
	}
	var member struct {
		Sessions int `json:"sessions"`
	}
	return json.Unmarshal(ack, &member) == nil && member.Sessions >= 1
}

// openSession opens a session to the listener at the path, with the rights of the calling
// thread. It blocks for openTimeout at most.
func openSession(ctx context.Context, path string) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	runtime.LockOSThread() // connect and thisThread have to see the same user and group
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

// greetedSession waits for the listener's greeting and makes a session of the connection.
func greetedSession(ctx context.Context, conn *net.UnixConn, name string, file fileID) (*session, error) {
	if conn.LocalAddr().String() != name {
		return nil, errors.New("socket could not be bound to its name")
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
	s.calls.openLocked(file) // without the lock: the session is not shared yet
	s.token = token
	return s, nil
}

// isSession reports whether an accepted connection is to become a session: its name
// tells.
func isSession(conn *net.UnixConn) bool {
	addr, ok := conn.RemoteAddr().(*net.UnixAddr)
	return ok && hasSessions && strings.HasPrefix(addr.Name, sessionName)
}

// acceptSession makes a session of an accepted connection. If the listener can't have one
// more, it closes the connection.
func acceptSession(conn *net.UnixConn, queue *acceptQueue) {
	s, err := newSession(conn, false, conn.RemoteAddr().String(), queue.file)
	if err != nil {
		_ = conn.Close()
		return
	}
	f := s.serveLocked(queue, conn.LocalAddr(), conn.RemoteAddr()) // without the lock: the session is not shared yet
	if !queue.join(f) {
		_ = conn.Close()
		return
	}
	sessions.add(s)
	go s.read() // ends with the session; the listener's Stop waits until f has left the queue
}
