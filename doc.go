// Package acomm sends requests to services that respond later: over unix sockets on one
// machine, over HTTP between machines. Messages are JSON, similar to JSON-RPC.
//
// # The model
//
// A [Request] names a task, its arguments and a response hook. The hook is the address
// to which the [Response] is to be sent. It is a unix socket of the requester or a URL
// that takes a POST. Request and response travel separately:
//
//	requester                           provider
//	    | Request, with its hook  ------->  |
//	    | <---------------  acknowledgement |
//	    |                                   | works
//	    | <---------  Response, to the hook |
//	    | acknowledgement  -------------->  |
//
// Each of the two is an exchange: a message one way, its acknowledgement the other way.
// The acknowledgement says that the message was received and is well-formed. It does not
// say that the task is done. A response may even arrive before the acknowledgement of
// its request, so track a request before you send it.
//
// A process plays one or more of three roles:
//
//   - A requester makes a request with [NewRequest], registers it with a [Tracker]
//     ([Tracker.TrackRequest]) and sends it with [Send]. The tracker owns the unix socket
//     of the hook. It matches each response to its request by id and runs the request's
//     success or error handler once: with the response, or after a time-out. A
//     [MultiRequest] collects the responses of many requests.
//   - A provider takes connections from a [UnixListener]. It reads a request from each
//     with [UnmarshalConnData], acknowledges it with [SendConnData], does the work, and
//     answers with [Request.Respond].
//   - A coordinator takes requests from other machines over HTTP and sends them to
//     providers on its own machine. [Tracker.ProxyUnix] returns a request whose hook is
//     the coordinator's unix socket. The tracker forwards the response from there to the
//     original hook.
//
// Large data does not travel in a response. The response names a stream instead: a unix
// socket for one consumer, made by [Tracker.NewStreamUnix] and read with [Stream]. A
// coordinator publishes it over HTTP with [Tracker.ProxyStreamHTTPURL] and
// [ProxyStreamHandler]. On Linux, and where both ends have this library, a stream that is
// cut off gives its consumer an error, even if the provider's process was killed.
//
// # Delivery
//
// Delivery is at most once: the library never sends a message again if the peer may have
// served it. Messages have no order and are not stored. If a provider dies before it has
// responded, the request ends with the requester's time-out.
//
// # Sessions
//
// On Linux, two processes with this library exchange messages over a session: one unix
// connection that carries many exchanges at a time, in both directions. It makes an
// exchange cheaper and changes nothing else. Sessions need no configuration:
//
//   - [Send] opens one in the background after the first message to a socket, while a
//     [Tracker] or [UnixListener] of the process is started. All goroutines share it.
//   - A process opens 256 sessions at most, and a listener accepts as many; an eighth of
//     the descriptor limit (RLIMIT_NOFILE) if that is less.
//   - In each direction it carries up to 1,024 exchanges at a time, each of up to 64 KiB
//     of JSON, together 2 MiB. Other messages travel on connections of their own.
//   - [UnixListener.NextConn] returns each exchange as a connection of its own.
//   - A session closes after 5 to 10 s without an exchange. When the process's last
//     listener or tracker stops, its sessions close: idle ones at once, busy ones after
//     their last exchange.
//
// # Concurrency
//
// Every function and method is safe for concurrent use. The fields of a Request or
// Response belong to the caller. Do not change them while the value is tracked or being
// sent.
//
// The tracker runs handlers in goroutines of their own, so a slow handler delays nobody.
// Only [Tracker.HandleResponse] runs the handler in the goroutine of its caller. A
// handler may call any method of the tracker except Stop. A panic in a handler ends the
// process.
//
// # Errors
//
// An error says what was being done and to what. It matches one of the standard library's
// sentinels with [errors.Is]:
//
//   - [io/fs.ErrInvalid]: an argument is nil, empty or malformed; an id, task or hook is
//     missing or not UTF-8; a unix hook is not an absolute path; JSON is nested more than
//     10,000 levels deep
//   - [io/fs.ErrExist]: the id is tracked already, the name is used already
//   - [net.ErrClosed]: the tracker or listener is not running
//   - [errors.ErrUnsupported]: nothing handles the URL's scheme
//   - [io/fs.ErrNotExist], [syscall.ECONNREFUSED]: no such socket, nobody listens there
//   - [syscall.EADDRINUSE]: the socket path belongs to a live listener
//   - [syscall.ENAMETOOLONG]: the socket path is too long (Linux: over 107 bytes)
//   - [syscall.EMSGSIZE]: the payload is over the limit of 64 MiB
//   - [io.ErrUnexpectedEOF]: the peer closed the connection too early
//   - [os.ErrDeadlineExceeded]: a send, a read or a request took too long
//
// JSON that can't be encoded or decoded gives an error of encoding/json. The peer's own
// refusal is returned with its text unchanged.
//
// If no caller is there to be told, as with a response that nobody waits for, the library
// logs through logrus' standard logger: ten lines a second of a kind at most. It never
// logs payloads.
//
// # Security
//
// The protocol has no authentication. Every process that may connect to a unix socket may
// send requests or responses to it: the permissions of the socket file and its directory
// decide. If you name no path, the library makes a directory that only the process's user
// can enter. In it is a socket with the mode 0600. Its path can't be guessed. If you name
// a path or directory, the process's umask decides; choose a directory with the mode and
// group that suit. A listener learns which process is at the other end from the
// SyscallConn method of the connection (SO_PEERCRED).
//
// The requester chooses the hook, and the responder connects to it. A service that takes
// requests from strangers has to check hooks first. [ProxyStreamHandler] serves only
// streams that this process published.
package acomm
