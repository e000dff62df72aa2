// Bench compares acomm with the libraries a user might take instead, and
// measures what else its users pay for.
//
//	go run .                            the table of calls, seven to ten minutes
//	go run . -benchtime 100ms -rounds 3 the same in under two minutes
//	go run . -only acomm,grpc -columns 128B/1,16KiB/64
//	go run . -shape text,rows           the tables of calls for each of the shapes
//	go run . -mode json                 the speed of scans of JSON
//	go run . -mode all                  the calls and every other mode
//	go run . -markdown                  tables for RESULTS.md
//	go test -bench Echo/text/acomm      the same calls as Go benchmarks
//
// encoding/json has two engines. The new one is the default since Go 1.27; there
// GOEXPERIMENT=nojsonv2 in the environment gives the old one. The old one is the
// default of Go 1.26, where GOEXPERIMENT=jsonv2 gives the new one. The head of the
// output names the Go release and the engine of the run.
//
// # Calls
//
// A call is an echo of {"seq":n,"data":...}. Client and server are in one
// process, and do the same work whatever carries it: the client encodes the
// arguments, the server decodes them into a struct and encodes that as the
// result, the client decodes the result and compares all of it with what it has
// sent. A
// wrong answer, an error, a call that gets no answer, or a server that has not
// served exactly the calls that were made, fails the run.
//
// The data has one of these shapes, and takes about as many bytes of JSON as the
// column says. It is the same in each run:
//
//   - text: one string of plain letters, {"seq":n,"data":"abc..."}.
//   - rows: a list of records, {"seq":n,"data":"","rows":[...]}, decoded into
//     structs. A row is about 200 bytes of JSON and has 8 to 12 short members of
//     every kind. One string in three has an escape (quote, newline, <, &) or
//     letters that are not ASCII. At 128 B it is one short row.
//   - tree: a configuration, {"seq":n,"data":"","tree":{...}}, decoded into any.
//     It has objects and arrays in each other, 12 levels deep, and long keys. There
//     is room for this depth from a few KiB on; smaller ones are one object.
//
// Comparing costs the same for all candidates: a hundredth of what decoding costs
// for rows, up to a quarter for tree, which is a twentieth of a call.
//
// The candidates:
//
//   - acomm: requests to a UnixListener that is served as the demo's provider
//     does it (NextConn, UnmarshalConnData, SendConnData, DoneConn, Respond),
//     responses to a Tracker; a caller waits for its handler. Four frames: the
//     request, its acknowledgement, the response, its acknowledgement.
//   - The peers: net/rpc with jsonrpc, ttrpc, drpc, HTTP/1.1, gRPC,
//     creachadair/jrpc2 and sourcegraph/jsonrpc2 over unix sockets, NATS with an
//     embedded server over TCP. All callers share one connection; HTTP/1.1 and
//     drpc, whose connections carry one call at a time, keep one for each caller.
//     ttrpc, gRPC and NATS carry the JSON as bytes, the others have it as their
//     own encoding. They are set up as their documentation does it; what differs
//     is said where they are started.
//   - The way of 2016: a connection for each message and its acknowledgement,
//     four frames, plain encoding/json. It is written from PROTOCOL.md; the
//     original can't be in the same build.
//   - The floors: four frames with acomm's envelopes, and two frames with nothing
//     but the arguments, each on connections that are kept for each caller, with
//     encoding/json and without any bookkeeping. No library does less.
//
// A column is a size and a number of callers, each of whom makes its next call
// when it has the answer to the last. Within a column the candidates take turns,
// for -benchtime each, in -rounds rounds; a candidate is started anew for each
// turn, and warmed up: each caller makes a small call, one makes a full one. A
// cell is the median of the rounds:
//
//   - wall: the time of the turn divided by the calls made in it
//   - CPU: user and system time of the process, client, server, garbage collector
//     and all, per call
//   - p99: what 99 of 100 calls did not exceed (in steps of 3 %)
//   - allocations and bytes allocated, per call
//   - ratio: to the peer with the lowest median in that column. Neither acomm nor
//     the floors are peers.
//
// # Modes
//
//   - tracking: a million outstanding requests with time-outs
//   - streams: a stream from a unix connection to a unix connection, and to an
//     HTTP client through ProxyStreamHandler, next to the same path with io.Copy.
//     The ratio is the median of those of the rounds, in which the two take turns
//     to be the first
//   - forward: responses to HTTP hooks that take 0, 5 and 50 ms, next to a bare http.Client, and the TCP
//     connections it opens
//   - growth: the call of acomm with more callers, more sockets, larger payloads.
//     More sockets are shown twice: shared by the same callers, who then share fewer
//     system calls, and with a caller for each. All are in one process, of whose
//     connections to these sockets only one carries the responses, too
//   - idle: what a started tracker and a waiting exchange hold
//   - json: how many MB of each shape acomm checks in a second of CPU, when it
//     receives a value (is it valid JSON?) and when it sends one (would json.Marshal
//     change it?), next to json.Valid, and json.Unmarshal into the type of the
//     shape. "times json.Valid" is the median of the rounds' ratios; above 1 acomm is
//     faster. A turn takes a fifth of -benchtime. A wrong answer fails the run
//
// The flag -shape is for the calls. The mode json takes all shapes, the other modes
// text.
package main
