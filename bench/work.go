package main

import (
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
)

// Message is the arguments and the result of a call. Its shape says which of the
// members behind Seq has the data.
type Message struct {
	Seq  int64  `json:"seq"`
	Data string `json:"data"`
	Rows []Row  `json:"rows,omitempty"`
	Tree any    `json:"tree,omitempty"`
}

// handler is what a server does between decoding and encoding.
type handler func(*Message) *Message

// client makes calls to a server in the same process.
type client interface {
	// call makes one call and returns its decoded result. Callers are numbered
	// from 0; each makes one call at a time, all of them at once.
	call(caller int, args *Message) (*Message, error)

	// close ends the client and its server, and waits for both.
	close() error
}

// role is what a candidate stands for in the tables.
type role int

const (
	subject role = iota // this library
	peer                // what the ratios are to
	floor               // no library at all
)

// candidate is one way to make the call.
type candidate struct {
	name   string // for -only
	title  string // for the tables
	role   role
	module string // whose version is reported; "" for the standard library

	// start starts a server, with its sockets in dir, and a client of it.
	start func(dir string, callers int, handle handler) (client, error)
}

var candidates = []candidate{
	{"acomm", "acomm", subject, "", startAcomm(1)},
	{"netrpc", "net/rpc + jsonrpc", peer, "", startNetRPC},
	{"ttrpc", "containerd/ttrpc", peer, "github.com/containerd/ttrpc", startTTRPC},
	{"drpc", "drpc", peer, "storj.io/drpc", startDRPC},
	{"http", "HTTP/1.1 over unix", peer, "", startHTTP},
	{"grpc", "gRPC over unix", peer, "google.golang.org/grpc", startGRPC},
	{"jrpc2", "creachadair/jrpc2", peer, "github.com/creachadair/jrpc2", startJRPC2},
	{"nats", "NATS (embedded, TCP)", peer, "github.com/nats-io/nats-server/v2", startNATS},
	{"jsonrpc2", "sourcegraph/jsonrpc2", peer, "github.com/sourcegraph/jsonrpc2", startJSONRPC2},
	{"dialled", "the way of 2016, dials twice", floor, "", startDialled},
	{"frames4", "four frames, naive JSON", floor, "", startFourFrames},
	{"frames2", "two bare frames", floor, "", startTwoFrames},
}

// selectCandidates returns those with the names in the list, all for "".
func selectCandidates(list string) ([]candidate, error) {
	if list == "" {
		return candidates, nil
	}
	var selected []candidate
next:
	for name := range strings.SplitSeq(list, ",") {
		for _, c := range candidates {
			if c.name == name {
				selected = append(selected, c)
				continue next
			}
		}
		return nil, fmt.Errorf("no candidate is called %q", name)
	}
	return selected, nil
}

// column is a size of the data and a number of callers.
type column struct {
	size    int // bytes
	callers int
}

var columns = []column{
	{128, 1}, {128, 64},
	{16 << 10, 1}, {16 << 10, 64},
	{1 << 20, 1}, {1 << 20, 64},
}

func (c column) String() string {
	return fmt.Sprintf("%s/%d", strings.ReplaceAll(formatSize(c.size), " ", ""), c.callers)
}

// head is the head of the column in a table.
func (c column) head() string {
	if c.callers == 1 {
		return formatSize(c.size) + ", 1 caller"
	}
	return fmt.Sprintf("%s, %d", formatSize(c.size), c.callers)
}

// parseColumns reads a list such as 128B/1,16KiB/64; all columns for "".
func parseColumns(list string) ([]column, error) {
	if list == "" {
		return columns, nil
	}
	var parsed []column
	for text := range strings.SplitSeq(list, ",") {
		sizeText, callersText, _ := strings.Cut(text, "/")
		size, err := parseSize(sizeText)
		if err != nil {
			return nil, fmt.Errorf("column %q: %w", text, err)
		}
		callers, err := strconv.Atoi(callersText)
		if err != nil || callers < 1 {
			return nil, fmt.Errorf("column %q: no number of callers behind the /", text)
		}
		parsed = append(parsed, column{size, callers})
	}
	return parsed, nil
}

var units = []struct {
	name  string
	bytes int
}{{"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

func parseSize(text string) (int, error) {
	for _, unit := range units {
		number, ok := strings.CutSuffix(text, unit.name)
		if !ok {
			continue
		}
		if n, err := strconv.Atoi(number); err == nil && n >= 0 {
			return n * unit.bytes, nil
		}
		break
	}
	return 0, fmt.Errorf("%q is not a size such as 128B, 16KiB or 1MiB", text)
}

func formatSize(size int) string {
	for _, unit := range units {
		if size >= unit.bytes && size%unit.bytes == 0 {
			return fmt.Sprintf("%d %s", size/unit.bytes, unit.name)
		}
	}
	return "0 B"
}

// checkAnswer compares all of a result with the arguments.
func checkAnswer(args, result *Message) error {
	switch {
	case result.Seq != args.Seq:
		return fmt.Errorf("call %d was answered with the result of call %d", args.Seq, result.Seq)
	case len(result.Data) != len(args.Data):
		return fmt.Errorf("call %d: sent %d bytes, got %d back", args.Seq, len(args.Data), len(result.Data))
	case result.Data != args.Data || !equalRows(result.Rows, args.Rows) || !equalTree(result.Tree, args.Tree):
		return fmt.Errorf("call %d: got other data back than was sent", args.Seq)
	}
	return nil
}

// callID returns an id of the length of a UUID.
func callID(caller int, args *Message) string {
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", caller, args.Seq)
}

// handleJSON is the server's part where the carrier takes bytes: decode, handle,
// encode.
func handleJSON(handle handler, data []byte) ([]byte, error) {
	args := &Message{}
	if err := json.Unmarshal(data, args); err != nil {
		return nil, err
	}
	return json.Marshal(handle(args))
}

// callJSON is the client's part where the carrier takes bytes.
func callJSON(args *Message, carry func([]byte) ([]byte, error)) (*Message, error) {
	data, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	if data, err = carry(data); err != nil {
		return nil, err
	}
	result := &Message{}
	return result, json.Unmarshal(data, result)
}

// connect returns the two ends of a connection over a unix socket in dir.
func connect(dir string) (near, far net.Conn, err error) {
	l, err := net.Listen("unix", filepath.Join(dir, "connect.sock"))
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if near, err = net.Dial("unix", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	if far, err = l.Accept(); err != nil {
		near.Close()
		return nil, nil, err
	}
	return near, far, nil
}
