// Bench compares acomm with other libraries for calls between processes of one
// machine. Further modes measure other parts of acomm: streams, hooks, memory.
//
//	go run .                            the calls, in seven to ten minutes
//	go run . -benchtime 100ms -rounds 3 the same in under two minutes
//	go run . -only acomm,grpc -columns 128B/1,16KiB/64
//	go run . -shape text,rows           the calls with two kinds of data
//	go run . -svg chart.svg             the calls, also as a chart
//	go run . -mode json                 the speed of acomm's JSON checks
//	go run . -mode all                  the calls and every other mode
//	go run . -markdown                  tables for RESULTS.md
//	go test -bench Echo/text/acomm      the same calls as Go benchmarks
//
// encoding/json has two engines, and the output names the one of the run. Go 1.27
// has the new one; GOEXPERIMENT=nojsonv2 in the environment gives the old one.
// Go 1.26 has the old one; GOEXPERIMENT=jsonv2 gives the new one.
//
// # Calls
//
// A call is an echo of {"seq":n,"data":...}. All candidates do the same work: the
// client encodes the arguments, the server decodes them into a struct and encodes
// that as the result, the client decodes the result and compares it with the
// arguments. Client and server are in one process. The run fails on a wrong result,
// on an error, on a call without an answer, and if the server has served more or
// fewer calls than were made.
//
// The flag -shape chooses the data. It takes about as many bytes of JSON as the
// column says, and is the same in each run:
//
//   - text: one string of plain letters, {"seq":n,"data":"abc..."}.
//   - rows: a list of records, {"seq":n,"data":"","rows":[...]}, decoded into
//     structs. A record takes about 200 bytes of JSON and has 8 to 12 short members
//     of every kind. One string in three has an escape (quote, newline, <, &) or
//     letters outside ASCII. At 128 B the list is one short record.
//   - tree: a nested configuration, {"seq":n,"data":"","tree":{...}}, decoded into
//     any. From a few KiB on it has objects and arrays in each other, 12 levels
//     deep, and long keys. A smaller one is one object.
//
// Comparing the result takes the same time for all candidates. With tree, where it
// takes longest, that is a twentieth of a call.
//
// The candidates:
//
//   - acomm: requests go to a UnixListener, responses to a Tracker. The server is
//     the code of the demo's provider (NextConn, UnmarshalConnData, SendConnData,
//     DoneConn, Respond). A caller waits for its handler. A call is four frames: the
//     request, its acknowledgement, the response, its acknowledgement.
//   - The peers, the other libraries: net/rpc with jsonrpc, ttrpc, drpc, HTTP/1.1,
//     gRPC, creachadair/jrpc2 and sourcegraph/jsonrpc2 over unix sockets, NATS with
//     an embedded server over TCP. All callers share one connection. HTTP/1.1 and
//     drpc have a connection for each caller, because theirs carry one call at a
//     time. ttrpc, gRPC and NATS carry the JSON as bytes; to the others JSON is
//     their own encoding. Each is set up as its documentation shows; comments in
//     the peer_*.go files name the exceptions.
//   - The way of 2016: four frames, a new connection for each message and its
//     acknowledgement, plain encoding/json. It is written from PROTOCOL.md, because
//     the original can't be in the same build.
//   - The floors, without any library: four frames with acomm's envelopes, and two
//     frames with the arguments and the result. Both use encoding/json and open
//     connections, its own for each caller. They look up and time nothing.
//
// A column is a size and a number of callers. A caller makes its next call when it
// has the answer to the last one. In a column the candidates take turns of
// -benchtime each, in -rounds rounds. A turn starts the candidate anew and warms it
// up: each caller makes a small call, then one of them a full one. A cell is the
// median of the rounds:
//
//   - wall: the time of the turn, divided by the calls made in it
//   - CPU: user and system time of the process per call; this includes client,
//     server and garbage collector
//   - p99: the time that 99 of 100 calls did not exceed, in steps of 3 %
//   - allocations and bytes allocated, per call
//   - ratio: the number divided by that of the peer with the lowest one in the
//     column. acomm, the way of 2016 and the floors are not peers.
//
// The flag -svg draws the ratios of the wall times: a panel for each column, a bar
// for each candidate. Bars beyond 3.00 are cut and have a mark. The run must include
// the mode calls and a peer.
//
// # Modes
//
//   - tracking: a million outstanding requests with time-outs.
//   - streams: a stream from a unix connection to a unix connection, and to an HTTP
//     client through ProxyStreamHandler, next to the same path with io.Copy. In each
//     round the two take turns to be the first. The ratio is the median of the
//     rounds' ratios.
//   - forward: responses to HTTP hooks that take 0, 5 and 50 ms, and the TCP
//     connections opened for them, next to a bare http.Client.
//   - growth: acomm's call with more callers, more sockets, larger data. The sockets
//     are measured twice: shared by 64 callers, of whom fewer then share a system
//     call, and with one caller each. All are in one process. Of its connections to
//     these sockets, one also carries the responses.
//   - idle: goroutines and bytes of a started tracker, of an acknowledged request,
//     and of an exchange that waits for its handler.
//   - json: how many MB of each shape acomm checks in a second of CPU. On receipt it
//     checks for valid JSON, before sending for JSON as json.Marshal writes it. Next
//     to it are json.Valid, and json.Unmarshal into the type of the shape. "times
//     json.Valid" is the median of the rounds' ratios; above 1 acomm is faster. A
//     turn takes a fifth of -benchtime. A wrong answer fails the run.
//   - waits: how long Send waits for its acknowledgement, at the median, the 99th
//     percentile and the longest, for many callers with one session and with a
//     connection for each.
//
// The flag -shape is for the calls. The mode json always measures all shapes, the
// other modes use text.
package main
