package acomm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistifyio/acomm"
)

// The listeners of the processes of the model: how they come and go, and what their
// handlers do.

// modelListener is a run of a listener.
type modelListener struct {
	*acomm.UnixListener
	m       *modelMember
	name    string
	run     string // names the run in the ledgers
	moved   bool   // the socket's file was renamed
	ctx     context.Context
	release func()         // ends what hangs
	loops   sync.WaitGroup // callers of NextConn
	after   sync.WaitGroup // handlers
	conns   atomic.Int64
}

func (l *modelListener) removeFile() error {
	if err := os.Remove(l.m.path(l.name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (l *modelListener) serve() {
	for conn := l.NextConn(); conn != nil; conn = l.NextConn() {
		l.after.Go(func() { l.handle(conn) })
	}
}

// handle does with a message what it asks for.
func (l *modelListener) handle(conn net.Conn) {
	done := sync.OnceFunc(func() { l.DoneConn(conn) })
	defer done()
	conns := l.conns.Add(1)
	if strings.HasPrefix(l.name, modelWild) && conns%50 == 0 {
		return // without reading
	}
	if conns%2 == 0 {
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
	}
	req := &acomm.Request{}
	resp := &acomm.Response{}
	var args modelArgs
	var err error
	id, how := "", ""
	if l.name == modelHook {
		err = acomm.UnmarshalConnData(conn, resp)
		id, how = "R"+resp.ID, "accept"
		if err == nil && resp.Error == nil {
			err = resp.UnmarshalResult(&args)
			how = args.Back
		}
	} else {
		err = acomm.UnmarshalConnData(conn, req)
		id, how = req.ID, req.Task
		if err == nil {
			err = req.UnmarshalArgs(&args)
		}
	}
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return // its sender is gone, or the listener stopped
	case err != nil, args.Data != modelData(strings.TrimPrefix(id, "R"), len(args.Data)):
		l.m.odd("on "+l.name, conn.RemoteAddr(), err)
		return
	}
	l.m.note("took", id, how, filepath.Join(l.m.place, l.name), l.run)
	l.answer(conn, done, id, how, func() { l.respond(req, &args) })
}

// answer does what is asked for with a message that was read.
func (l *modelListener) answer(conn net.Conn, done func(), id, how string, respond func()) {
	ack := &acomm.Response{ID: id}
	switch how {
	case "silent":
		return
	case "hang":
		stop := context.AfterFunc(l.ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
		l.readOn(conn, id, how)
		stop()
		return
	case "refuse":
		ack.Error = errors.New("refused " + id)
	case "late0":
		done := make(chan struct{})
		go close(done) // lets others go first
		<-done
	case "late5": // the time that a handler takes; nothing is ordered by it
		time.Sleep(5 * time.Millisecond)
	case "late50":
		time.Sleep(50 * time.Millisecond)
	case "readon":
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		l.readOn(conn, id, how)
	case "early":
		respond()
	case "pieces":
		data, err := json.Marshal(ack)
		orExit(err)
		for part := range slices.Chunk(plainFrame(string(data)), 7) {
			_, _ = conn.Write(part)
		}
		return
	}
	_ = acomm.SendConnData(conn, ack) // fails where the sender is gone, or the listener stopped
	switch how {
	case "linger":
		l.readOn(conn, id, how) // until the sender has read it
	case "respond":
		done()
		respond()
	}
}

// readOn reads until the exchange or the time is over. There must be nothing to read.
func (l *modelListener) readOn(conn net.Conn, id, how string) {
	buf := make([]byte, 100)
	if n, err := conn.Read(buf); n > 0 {
		l.m.odd(id, fmt.Sprintf("%s: %q behind its frame on %s, %v", how, buf[:n], l.name, err))
	}
}

// respond sends the response to the request's hook.
func (l *modelListener) respond(req *acomm.Request, args *modelArgs) {
	to, err := filepath.Rel(l.m.dir, req.ResponseHook.Path)
	orExit(err)
	result, how := any(args), args.Back
	var failure error
	if strings.HasSuffix(req.ID, "7") {
		result, how, failure = nil, "accept", errors.New("failed "+req.ID)
	}
	if filepath.Base(to) != modelHook {
		how = "tracker"
	}
	resp, err := acomm.NewResponse(req, result, nil, failure)
	orExit(err)
	l.m.deliver("R"+req.ID, how, to, resp)
}

// start starts a listener whose file is at the path of the name, or will be.
func (m *modelMember) start(ul *acomm.UnixListener, name string) *modelListener {
	l := &modelListener{UnixListener: ul, m: m, name: name, run: fmt.Sprint(m.number, ".", m.last.Add(1))}
	l.ctx, l.release = context.WithCancel(m.ctx) // at the end nothing hangs, as all wait for what they have sent
	orExit(ul.Start())
	m.note("start", l.run, name)
	for range 2 {
		l.loops.Go(l.serve)
	}
	return l
}

// stop stops a listener and waits until nothing more can come from it.
func (m *modelMember) stop(l *modelListener, timeout time.Duration) {
	l.Stop(timeout)
	m.note("gone", l.run, l.name)
	l.loops.Wait()
	l.release()
	m.after.Go(l.after.Wait)
	if l.moved { // the listener can't know its file
		orExit(l.removeFile())
	}
}

// beWild starts, stops, moves and removes a listener.
func (m *modelMember) beWild(name string, rng *rand.Rand) {
	path := m.path(name)
	_ = os.Remove(path + ".new") // of a process that was killed just there
	var l *modelListener
	for {
		if l == nil {
			limit := 0
			if rng.IntN(8) == 0 {
				limit = 1 + rng.IntN(200)
			}
			l = m.start(acomm.NewUnixListener(path, limit), name)
		}
		if !m.pause(rng, 300*time.Millisecond) {
			m.running <- l
			return
		}
		switch rng.IntN(8) {
		case 0:
			_ = os.Chmod(path, 0o600) // it is not there where an accept limit is reached
			m.pause(rng, 20*time.Millisecond)
			_ = os.Chmod(path, 0o755)
		case 1:
			orExit(l.removeFile())
			m.note("gone", l.run, name)
			m.pause(rng, 100*time.Millisecond)
			m.stopSomehow(l, rng)
			l = nil
		case 2, 3:
			l = m.replace(l, rng)
		case 4: // the same listener again
			m.stopSomehow(l, rng)
			m.pause(rng, 20*time.Millisecond)
			if ul := l.UnixListener; !l.moved && ul.Addr() == path {
				l = m.start(ul, name)
			} else {
				l = nil
			}
		default:
			m.stopSomehow(l, rng)
			l = nil
			m.pause(rng, 50*time.Millisecond)
		}
	}
}

// replace puts the socket of a new listener in the place of another one's.
func (m *modelMember) replace(old *modelListener, rng *rand.Rand) *modelListener {
	path := m.path(old.name)
	fresh := m.start(acomm.NewUnixListener(path+".new", 0), old.name)
	orExit(os.Rename(path+".new", path))
	m.note("gone", old.run, old.name)
	fresh.moved, old.moved = true, false
	file, err := os.Lstat(path)
	orExit(err)
	m.pause(rng, 50*time.Millisecond)
	m.stopSomehow(old, rng)
	if now, err := os.Lstat(path); err != nil || !os.SameFile(file, now) {
		m.odd(fresh.run, "file of another listener removed:", err)
	}
	return fresh
}

// stopSomehow stops a listener in one of the ways in which that is done.
func (m *modelMember) stopSomehow(l *modelListener, rng *rand.Rand) {
	if l.moved && rng.IntN(2) == 0 {
		l.moved = false // the file stays, and is dead
	}
	switch rng.IntN(4) {
	case 0:
		l.release()
		m.stop(l, 0)
	case 1:
		late := time.AfterFunc(time.Duration(rng.IntN(300))*time.Millisecond, l.release)
		m.stop(l, 0)
		late.Stop()
	case 2:
		m.note("abort", l.run)
		m.stop(l, time.Duration(1+rng.IntN(20))*time.Millisecond)
	case 3:
		m.note("abort", l.run)
		second := async(func() { l.Stop(time.Millisecond) })
		m.stop(l, time.Duration(1+rng.IntN(200))*time.Millisecond)
		<-second
	}
}
