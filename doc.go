// Package acomm is a library for asynchronous, JSON-RPC-like communication
// between services: on one machine over unix sockets, beyond it over HTTP.
//
// # The model
//
// A [Request] names a task, its arguments and a response hook: the URL the
// [Response] is to be sent to. The service that receives the request
// acknowledges it at once, works for as long as it needs, and then sends the
// response to the hook. Acknowledged means received and well-formed, not done;
// the response may even arrive before the acknowledgement, so a request is
// tracked before it is sent.
//
// Three roles meet:
//
//   - A requester makes requests with [NewRequest], registers them with a
//     [Tracker] ([Tracker.TrackRequest]) and sends them with [Send]. The
//     tracker owns the unix socket the responses arrive on, matches them by id
//     and runs the request's success or error handler, once: with the response,
//     or with a time-out. A [MultiRequest] collects the responses of many
//     requests at once.
//   - A provider takes connections from a [UnixListener], reads a request from
//     each with [UnmarshalConnData], acknowledges it with [SendConnData] and
//     answers with [Request.Respond].
//   - A coordinator stands between them. It takes requests from outside over
//     HTTP and forwards them to providers on the machine. [Tracker.ProxyUnix]
//     gives it a request whose hook is the coordinator's own unix socket; the
//     response that arrives there is forwarded to the original hook.
//
// Bulk data does not travel in a response. The response names a StreamURL: a
// unix socket for one consumer, made by [Tracker.NewStreamUnix] and read with
// [Stream]. A coordinator publishes it over HTTP with
// [Tracker.ProxyStreamHTTPURL] and [ProxyStreamHandler]. A stream that is cut
// off, by a failing source or because a process was killed, ends with an error
// at its consumer, on both hops (on Linux, and where both ends have this
// library); it never just looks complete.
//
// # Sessions
//
// While a [Tracker] or [UnixListener] of the process is started, [Send] and what builds
// on it open a session to each unix socket whose process has this library too (on
// Linux, and 256 of them at most): one connection that carries up to 1,024 exchanges at
// a time in each direction, for all goroutines. If two processes send to each other, as
// a requester and a provider do, one session carries both. To the callers of
// [UnixListener.NextConn] and [UnixListener.DoneConn] each exchange on it is a
// connection of its own. An idle session is closed after 5 to 10 seconds. When the
// process's last listener or tracker stops, its sessions close: idle ones at once, busy
// ones after their last exchange. A message that the other side may have served is never
// sent again.
//
// # Concurrency
//
// Every function and method is safe for concurrent use. The fields of a Request
// or Response are the caller's: they are not to be changed while the value is
// tracked or being sent. Handlers run in goroutines of their own when a response
// arrives over the socket or a request times out, in the caller's when it is
// handed in with [Tracker.HandleResponse]; a slow handler delays nobody. A
// handler may call any method of the tracker except Stop. A panic in a handler ends the
// process.
//
// # Errors
//
// Errors say what was being done and to what, and match the standard library's
// sentinels with [errors.Is]:
//
//   - [io/fs.ErrInvalid]: a nil or empty argument; no id, task or hook, or one that is
//     not UTF-8; a unix hook that is not an absolute path; JSON nested too deep
//   - [io/fs.ErrExist]: an id already tracked, a name already used
//   - [net.ErrClosed]: the tracker or listener is not running
//   - [errors.ErrUnsupported]: a URL scheme nobody handles
//   - [io/fs.ErrNotExist], [syscall.ECONNREFUSED]: no such socket, nobody listens
//   - [syscall.EADDRINUSE]: the socket path belongs to a live listener
//   - [syscall.ENAMETOOLONG]: the socket path is too long for the system
//   - [syscall.EMSGSIZE]: a payload over the limit of 64 MiB, on either side
//   - [io.ErrUnexpectedEOF]: the peer closed too early
//   - [os.ErrDeadlineExceeded]: a send, read or request took too long
//
// The peer's own refusal is returned with its text unchanged. What happens
// where no caller is there to be told, such as a response nobody waits for, is
// logged through logrus' standard logger. Payloads are never logged.
//
// # Security
//
// Whoever may connect to a socket may send requests or responses through it:
// the permissions of the socket file and its directory decide. Where the caller
// names neither, the library makes a directory only its user can enter and a
// name nobody can guess. Where the caller chooses a path or directory, the
// process's umask decides; use a directory with the mode and group that suit.
// A listener can learn who is on the other side from the socket itself, through
// the SyscallConn method of the connections that [UnixListener.NextConn]
// returns. Hooks are addresses chosen by the requester that the responder dials.
// [ProxyStreamHandler] serves only addresses that this process published.
package acomm
