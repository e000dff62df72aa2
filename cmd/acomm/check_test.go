package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// checkHolds has a peer checked, in which nothing is wrong, by check of a binary, and
// returns what was printed.
func checkHolds(t *testing.T, binary string, args ...string) string {
	t.Helper()
	got := runCmd(t, acommCmdOf(t, binary, append([]string{"check", "--timeout", "20s"}, args...)...))
	require.Zero(t, got.code, got.stdout+got.stderr)
	require.NotContains(t, got.stdout, "FAIL")
	require.Regexp(t, `\n\d+ passed, 0 failed, \d+ not tested\n$`, got.stdout)
	require.Empty(t, got.stderr)
	return got.stdout
}

// plain is the path of plainBinary.
func plain(t *testing.T) string {
	t.Helper()
	path, err := plainBinary()
	require.NoError(t, err)
	return path
}

func TestCheck_ServePasses(t *testing.T) {
	t.Parallel()
	r, path := startServeOf(t, plain(t), nil, "cat")
	require.Contains(t, checkHolds(t, plain(t), path, "echo"), "26 passed, 0 failed, 1 not tested")
	r.stop()
	r, path = startServe(t, nil, "cat")
	checkHolds(t, acommBinary, "--of-2016", "unix://"+path) // which is quicker
	r.stop()
}

func TestCheck_ServeWithStreamPasses(t *testing.T) {
	t.Parallel()
	r, path := startServeOf(t, plain(t), []string{"--stream"}, "seq", "100000")
	said := checkHolds(t, plain(t), path, "numbers")
	require.Contains(t, said, "seen: a stream with .eof, 588895 bytes; a second consumer had none")
	require.Contains(t, said, "27 passed, 0 failed, 0 not tested")
	r.stop()
	r, path = startServe(t, []string{"--stream"}, "seq", "100000")
	checkHolds(t, acommBinary, "--of-2016", path, "numbers")
	r.stop()
}

func TestCheck_PeerThatRefusesTheTaskPasses(t *testing.T) {
	t.Parallel()
	r, path := startServeOf(t, plain(t), []string{"--task", "work"}, "cat")
	require.Contains(t, checkHolds(t, plain(t), path), "seen: no request was accepted")
	got := runAcomm(t, "check", path, "play") // which is said to be one that it takes
	require.Equal(t, exitTask, got.code)
	require.Contains(t, got.stdout, `the task here is \"work\", not \"play\"`)
	r.stop()
}

func TestCheck_GatewayPasses(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	for _, binary := range []string{plain(t), acommBinary} {
		serve := startCmd(t, acommCmdOf(t, binary, "serve", "--stream", filepath.Join(dir, "numbers", "1.sock"), "--", "seq", "100000"))
		serve.waitLine("listening on")
		g := startCmd(t, acommCmdOf(t, binary, "gateway", "--socket-dir", dir, "--name", "g", "--listen", "127.0.0.1:0"))
		_, addr, _ := strings.Cut(g.waitLine("listening on"), "listening on ")
		if binary == plain(t) {
			said := checkHolds(t, binary, "http://"+addr+"/", "numbers")
			require.Contains(t, said, "seen: HEAD took nothing, GET 588895 bytes; a second consumer had none")
			require.Contains(t, said, "21 passed, 0 failed, 0 not tested")
		} else {
			checkHolds(t, binary, "--of-2016", "http://"+addr+"/", "numbers")
		}
		checkHolds(t, binary, "--of-2016", filepath.Join(dir, coordinatorDir, "g.sock"), "numbers")
		g.stop()
		serve.stop()
		if !hasRace {
			break // they are one
		}
	}
}

func TestCheck_ProviderInPythonPasses(t *testing.T) {
	t.Parallel()
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("there is no python3")
	}
	source, err := os.ReadFile("../../examples/python/provider.py")
	require.NoError(t, err)
	require.Less(t, strings.Count(string(source), "\n"), 60, "lines: it shows how little a provider needs")
	path := filepath.Join(shortDir(t), "s.sock")
	provider := startCmd(t, exec.Command(python, "../../examples/python/provider.py", path))
	provider.waitLine("listening on unix://" + path)
	require.Contains(t, checkHolds(t, plain(t), path, "echo"), "26 passed, 0 failed, 1 not tested")
	require.Equal(t, result{stdout: "{\"a\":[1,null]}\n"}, runAcomm(t, "call", path, "echo", "a=[1,null]"))
	provider.stop()
	require.NoFileExists(t, path)
}

// The peer of 2016 is that of the library's tests, in a process of its own.
func TestCheck_PeerOf2016Passes(t *testing.T) {
	t.Parallel()
	tests := filepath.Join(t.TempDir(), "acomm.test")
	build := exec.Command("go", "test", "-c", "-o", tests, ".")
	build.Dir = "../.."
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	cmd := exec.Command(tests, "-test.run=^TestProcessRole$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), "ACOMM_TEST_ROLE=provider of 2016", "TMPDIR="+shortDir(t))
	stdin, err := cmd.StdinPipe() // at whose end it ends
	require.NoError(t, err)
	provider := startCmd(t, cmd)
	peer := provider.waitLine("unix:")
	said := checkHolds(t, acommBinary, "--of-2016", peer, "echo")
	require.Contains(t, said, "not asked of peers of 2016")
	require.Contains(t, said, "20 passed, 0 failed")
	require.NoError(t, stdin.Close())
	require.Zero(t, provider.wait(), provider.said())
}

func TestCheck_PeerOf2016ReadsNoPieces(t *testing.T) {
	t.Parallel()
	p := &wrongPeer{readsOnce: true}
	got := p.check(t)
	require.Equal(t, exitTask, got.code)
	require.Contains(t, got.stdout, "FAIL  PROTOCOL.md 3      A frame is read in any number of pieces.\n")
	p = &wrongPeer{readsOnce: true}
	require.Zero(t, p.check(t, "--of-2016").code)
}

// wrongPeer is a provider of any task that is wrong in one way, or in none.
type wrongPeer struct {
	readsOnce, readsToEnd, ignoresLimit, keepsBroken, takesBroken, strict, dies bool
	writesTwice, acksLate, takesInvalid, answersRefused                         bool
	answersTwice, leavesEarly, staysOpen, otherID, mixed, parses                bool
	stream                                                                      string

	t        *testing.T
	listener net.Listener
	working  sync.WaitGroup
}

// check has the peer checked.
func (p *wrongPeer) check(t *testing.T, args ...string) result {
	t.Helper()
	p.t = t
	path := filepath.Join(shortDir(t), "s.sock")
	var err error
	p.listener, err = net.Listen("unix", path)
	require.NoError(t, err)
	accepting := make(chan struct{})
	go func() { // ends with the listener
		defer close(accepting)
		for {
			conn, err := p.listener.Accept()
			if err != nil {
				return
			}
			p.working.Go(func() {
				defer conn.Close()
				p.serve(conn)
			})
		}
	}()
	timeout := "2s"
	if len(args) == 0 {
		timeout = "4s" // there will be 64 MiB
	}
	got := runAcomm(t, append([]string{"check", "--timeout", timeout, path, "work"}, args...)...)
	_ = p.listener.Close()
	<-accepting
	p.working.Wait()
	return got
}

func (p *wrongPeer) serve(conn net.Conn) {
	_ = conn.SetDeadline(time.Now().Add(patience))
	req, err := p.read(conn)
	if err != nil {
		if p.takesBroken {
			p.write(conn, map[string]any{"error": ""})
		}
		if p.keepsBroken {
			_, _ = io.Copy(io.Discard, conn)
		}
		return
	}
	hook, _ := req["responsehook"].(map[string]any)
	id, _ := req["id"].(string)
	if id == "" || req["task"] == nil || req["task"] == "" || hook["Host"] != nil && hook["Host"] != "" ||
		!strings.HasPrefix(fmt.Sprint(hook["Path"]), "/") {
		if p.dies {
			_ = p.listener.Close()
			return
		}
		refusal := "invalid"
		if p.takesInvalid {
			refusal = ""
		}
		p.write(conn, map[string]any{"error": refusal})
		if p.answersRefused && id != "" && hook["Path"] != nil {
			p.answer(id, hook)
		}
		return
	}
	if p.acksLate {
		p.answer(id, hook)
	}
	p.write(conn, map[string]any{"error": ""})
	if !p.acksLate {
		p.answer(id, hook)
	}
	if p.answersTwice {
		p.answer(id, hook)
	}
}

func (p *wrongPeer) read(conn net.Conn) (req map[string]any, err error) {
	header := make([]byte, 4)
	if p.readsOnce {
		_, err = conn.Read(header)
	} else {
		_, err = io.ReadFull(conn, header)
	}
	size := binary.BigEndian.Uint32(header)
	if err != nil || size > 64<<20 && !p.ignoresLimit {
		return nil, errors.Join(err, syscall.EMSGSIZE)
	}
	data := make([]byte, size)
	if p.readsOnce {
		_, err = conn.Read(data)
	} else {
		_, err = io.ReadFull(conn, data)
	}
	if err != nil {
		return nil, err
	}
	if p.readsToEnd {
		_, _ = io.Copy(io.Discard, conn)
	}
	// encoding/json under the race detector takes seconds for what pads a large message.
	data = bytes.ReplaceAll(data, bytes.Repeat([]byte{' '}, 1<<10), nil)
	var typed struct {
		ID   *string         `json:"id"`
		Task *string         `json:"task"`
		Hook *struct{}       `json:"responsehook"`
		Args json.RawMessage `json:"args"`
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	if p.strict && bytes.Contains(data, []byte(`"version"`)) { // the URL has more members than typed, too
		decoder.DisallowUnknownFields()
	}
	if err := errors.Join(json.Unmarshal(data, &req), decoder.Decode(&typed)); err != nil {
		return nil, err
	}
	return req, nil
}

func (p *wrongPeer) write(conn net.Conn, message any) {
	data, _ := json.Marshal(message)
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
	if p.writesTwice {
		_, _ = conn.Write(frame[:4])
		awaitRead(conn)
		frame = frame[4:]
	}
	_, _ = conn.Write(frame)
}

func (p *wrongPeer) answer(id string, hook map[string]any) {
	path := fmt.Sprint(hook["Path"])
	if p.parses {
		if u, err := url.Parse("unix://" + path); err == nil {
			path = u.Path
		}
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	message := map[string]any{"id": id}
	if p.otherID {
		message["id"] = strings.ToValidUTF8(strings.Map(func(r rune) rune { return min(r, 0x7f) }, id), "")
	}
	if p.mixed {
		message["error"], message["result"] = "no", 1
	}
	if p.stream != "" {
		message["stream_url"] = "unix://" + p.stream
	}
	p.write(conn, message)
	if p.leavesEarly {
		return
	}
	_, _ = conn.Read(make([]byte, 1000))
	if p.staysOpen {
		_, _ = io.Copy(io.Discard, conn)
	}
}

func TestCheck_EachFaultIsSeen(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		peer *wrongPeer
		want string // what does not hold
	}{
		"reads once":                    {&wrongPeer{readsOnce: true}, "in any number of pieces"},
		"waits for the end":             {&wrongPeer{readsToEnd: true}, "stays open until then"},
		"no limit":                      {&wrongPeer{ignoresLimit: true}, "A frame that announces more"},
		"keeps broken connections open": {&wrongPeer{keepsBroken: true}, "(0 is not a message:|is cut off) the connection is closed"},
		"takes broken frames":           {&wrongPeer{takesBroken: true}, "A payload that is not JSON is not taken"},
		"unknown members":               {&wrongPeer{strict: true}, "Unknown members are skipped"},
		"header and payload apart":      {&wrongPeer{writesTwice: true}, "Each acknowledgement is one Response, written at once"},
		"works first":                   {&wrongPeer{acksLate: true}, "A request is acknowledged before its response is"},
		"takes invalid requests":        {&wrongPeer{takesInvalid: true}, "is refused in the acknowledgement"},
		"answers refused requests":      {&wrongPeer{answersRefused: true}, "a refused one gets none"},
		"answers twice":                 {&wrongPeer{answersTwice: true}, "gets one response"},
		"wants no acknowledgement":      {&wrongPeer{leavesEarly: true}, "its sender reads the acknowledgement"},
		"does not close":                {&wrongPeer{staysOpen: true}, "and closes"},
		"changes the id":                {&wrongPeer{otherID: true}, "comes back as the text that it stands for"},
		"error and result":              {&wrongPeer{mixed: true}, "Each response is one frame"},
		"parses the path":               {&wrongPeer{parses: true}, "taken as it is, with a space"},
		"no such stream":                {&wrongPeer{stream: "/nowhere/s.sock"}, "A stream can be read"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if test.peer.writesTwice && runtime.GOOS != "linux" {
				t.Skip("the system does not tell when the header was read")
			}
			args := []string{"--of-2016"} // which is quicker
			if test.peer.readsOnce || test.peer.ignoresLimit {
				args = nil
			}
			got := test.peer.check(t, args...)
			require.Equal(t, exitTask, got.code, got.stdout)
			require.Regexp(t, `FAIL  PROTOCOL.md [\d, ]+ [^\n]*`+test.want, got.stdout)
		})
	}
	got := (&wrongPeer{}).check(t, "--of-2016") // 64 MiB take too long under the race detector
	require.Zero(t, got.code, got.stdout)
}

// A stream that was cut off, and one that a second consumer gets as well.
func TestCheck_FaultsOfStreamsAreSeen(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ file, want string }{
		"cut off":      {"s.eof", `a stream with .eof, after \d+ bytes: .*reset`},
		"served twice": {"s.sock", "a second consumer was served"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), test.file)
			listener, err := net.Listen("unix", path)
			require.NoError(t, err)
			var serving sync.WaitGroup
			serving.Go(func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Write([]byte("data"))
					if test.file == "s.eof" { // so that the consumer's byte is there, and unread
						_, _ = watchPeek(conn)
					}
					_ = conn.Close()
				}
			})
			got := (&wrongPeer{stream: path}).check(t, "--of-2016")
			_ = listener.Close()
			serving.Wait()
			require.Equal(t, exitTask, got.code, got.stdout)
			require.Regexp(t, `FAIL  PROTOCOL.md 8      .*\n        seen: `+test.want, got.stdout)
		})
	}
}

// watchPeek waits until there is a byte, and leaves it.
func watchPeek(conn net.Conn) (n int, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	err = errors.Join(raw.Read(func(fd uintptr) bool {
		n, _, err = syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK)
		return !errors.Is(err, syscall.EAGAIN)
	}), err)
	return n, err
}

func TestCheck_SaysThatThePeerHasGone(t *testing.T) {
	t.Parallel()
	got := (&wrongPeer{dies: true}).check(t)
	require.Equal(t, exitTask, got.code)
	require.Contains(t, got.stderr, "the peer has gone")
}

func TestCheck_ExitStatus(t *testing.T) {
	t.Parallel()
	nobody := filepath.Join(shortDir(t), "s.sock")
	require.Equal(t, exitNotSent, runAcomm(t, "check", nobody).code)
	require.Equal(t, exitNotSent, runAcomm(t, "check", "http://"+closedPort(t)+"/").code)
	for _, args := range [][]string{{}, {"a b"}, {nobody, ""}, {nobody, "a", "b"}, {"nats://h/s"}, {"--timeout", "0s", nobody}, {"--hook-url", "x", "http://h/"}} {
		require.Equal(t, exitUsage, runAcomm(t, append([]string{"check"}, args...)...).code, args)
	}
	help := runAcomm(t, "check", "--help")
	require.Zero(t, help.code)
	for line := range strings.Lines(help.stdout) {
		require.LessOrEqual(t, len(strings.TrimSuffix(line, "\n")), 80, line)
	}
}

func TestCheck_InterruptLeavesNothing(t *testing.T) {
	t.Parallel()
	p := &wrongPeer{readsToEnd: true}
	p.t = t
	path := filepath.Join(shortDir(t), "s.sock")
	listener, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer listener.Close()
	cmd := startAcomm(t, "check", path, "work")
	conn, err := listener.Accept()
	require.NoError(t, err)
	defer conn.Close()
	cmd.signal(syscall.SIGINT)
	require.Equal(t, 128+int(syscall.SIGINT), cmd.wait(), cmd.said()) // acommCmd looks for what is left
}
