// Bench compares acomm with the libraries that a user might take instead. It also
// measures what else the users of acomm pay for.
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
// encoding/json has two engines. The new one is the default since Go 1.27. There,
// GOEXPERIMENT=nojsonv2 in the environment selects the old one. Go 1.26 has the old
// one as its default, and GOEXPERIMENT=jsonv2 selects the new one. The head of the
// output names the Go release and the engine of the run.
//
// # Calls
//
// A call is an echo of {"seq":n,"data":...}. Client and server are in one process,
// and do the same work with every candidate:
//
//  1. The client encodes the arguments.
//  2. The server decodes them into a struct, and encodes that as the result.
//  3. The client decodes the result and compares all of it with what it has sent.
//
// The run fails on a wrong answer, on an error, and on a call without an answer. It
// also fails if a server has not served exactly the calls that were made.
//
// The data has one of these shapes, and about as many bytes of JSON as the column
// says. It is the same in each run:
//
//   - text: one string of plain letters, {"seq":n,"data":"abc..."}.
//   - rows: a list of records, {"seq":n,"data":"","rows":[...]}, decoded into
//     structs. A row has about 200 bytes of JSON and 8 to 12 short members of every
//     kind. One string in three has an escape (quote, newline, <, &) or letters that
//     are not ASCII. At 128 B it is one short row.
//   - tree: a configuration, {"seq":n,"data":"","tree":{...}}, decoded into any. Its
//     objects and arrays are nested 12 levels deep, with long keys. That depth needs a
//     few KiB; smaller trees are one object.
//
// The comparison costs the same with every candidate. For rows it is a hundredth of
// the decoding. For tree it is up to a quarter of the decoding, a twentieth of a call.
//
// The candidates:
//
//   - acomm: requests go to a UnixListener, which is served as in the demo's provider
//     (NextConn, UnmarshalConnData, SendConnData, DoneConn, Respond). Responses go to
//     a Tracker, and a caller waits for its handler. A call has four frames: the
//     request, its acknowledgement, the response, its acknowledgement.
//   - The peers: net/rpc with jsonrpc, ttrpc, drpc, HTTP/1.1, gRPC,
//     creachadair/jrpc2 and sourcegraph/jsonrpc2 over unix sockets, and NATS with an
//     embedded server over TCP. All callers share one connection. HTTP/1.1 and drpc
//     carry one call at a time on a connection, so each caller has its own. ttrpc, gRPC
//     and NATS carry the JSON as bytes; the others use it as their own encoding. Each
//     is set up as its documentation says. Exceptions are noted where the peer is
//     started.
//   - The way of 2016: a connection for each message and its acknowledgement, four
//     frames, plain encoding/json. It is written from PROTOCOL.md, because the
//     original can't be in the same build.
//   - The floors: four frames with acomm's envelopes, and two frames with nothing but
//     the arguments. Each caller has connections that stay open. The floors use
//     encoding/json and no bookkeeping. No library does less.
//
// A column is a size and a number of callers. Each caller makes its next call when it
// has the answer to the last. Within a column the candidates take turns of -benchtime
// each, in -rounds rounds. For each turn a candidate is started anew and warmed up:
// each caller makes a small call, and one makes a full one. A cell is the median of
// the rounds:
//
//   - wall: the time of the turn divided by the calls made in it
//   - CPU: user and system time of the process per call, with client, server and
//     garbage collector
//   - p99: the time that 99 of 100 calls did not exceed (in steps of 3 %)
//   - allocations and bytes allocated, per call
//   - ratio: to the peer with the lowest median in that column. Neither acomm nor
//     the floors are peers.
//
// # Modes
//
//   - tracking: a million outstanding requests with time-outs.
//   - streams: a stream from a unix connection to a unix connection, and to an HTTP
//     client through ProxyStreamHandler, next to the same path with io.Copy. The two
//     take turns to be first in a round. The ratio is the median of the rounds' ratios.
//   - forward: responses to HTTP hooks that take 0, 5 and 50 ms, next to a bare
//     http.Client, and the TCP connections that it opens.
//   - growth: the call of acomm with more callers, more sockets and larger payloads.
//     More sockets are shown twice: with the same callers, who then share fewer system
//     calls, and with one caller for each. All are in one process. Only one of its
//     connections to these sockets also carries the responses.
//   - idle: what a started tracker and a waiting exchange hold.
//   - json: how many MB of each shape acomm checks in a second of CPU. It checks a
//     value that it receives (is it valid JSON?) and one that it sends (would
//     json.Marshal change it?). Next to these are json.Valid, and json.Unmarshal into
//     the type of the shape. "times json.Valid" is the median of the rounds' ratios;
//     above 1 acomm is faster. A turn takes a fifth of -benchtime. A wrong answer
//     fails the run.
//   - waits: how long a Send waits for its acknowledgement, at p50, p99 and at most.
//     Many callers send messages near the limits of a session. They share one session,
//     or each has a connection of its own. The buffer size of sockets decides the
//     result; set /proc/sys/net/core/wmem_default to change it (4608 is the least).
//
// The flag -shape is for the calls. The mode json takes all shapes, the other modes
// text.
package main
