package main

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const gatewayLong = `Gateway takes requests from other machines over HTTP, and from this machine
over a unix socket. It forwards each request to a provider of the task on this
machine, and sends the response to the hook that the request names.

PROVIDERS
The providers of TASK have their sockets, or links to them, at
DIR/TASK/*.sock. The gateway asks them in the order of their names. It asks
the next one only if the request was certainly not taken: nobody listens, or
the provider has refused it. If it can't know, for example because a
connection ends before the acknowledgement, it asks no other. So a task is
done at most once.

A task is one name of at most 255 bytes. It is not empty, has no slash, and is
none of ".", "..", "coordinator" and "response". The gateway uses the last two
itself.

HTTP
POST /
  Takes a request in JSON and answers with a response in JSON. The status 200
  acknowledges the request if the error in the response is empty. Else the
  error says why it was not taken: no provider, all providers refuse it, or
  its id is in use. The other statuses:
    400  not a valid request: not JSON, or a hook that is not allowed
    403  sent by a web page of another site, or for a name that is not the
         gateway's, see --allow-host
    405  not a POST
    408  the body did not arrive within a minute
    413  larger than --max-body, or than a provider takes (64 MiB)
    429  not taken: --max-outstanding requests are waiting for responses
    502  a provider may have taken it; nothing will be sent to the hook
    503  not taken: the gateway is ending
GET /tasks
  Lists the tasks that have providers, with their number, as acomm list does.
POST /tasks/TASK
  Does a task without a hook. The body has the arguments in JSON, or is empty.
  The gateway waits for the response and answers with the result as JSON, or
  with the bytes of the stream. It waits for --timeout, or for a shorter time
  such as ?wait=30s. Other answers are {"error": TEXT}:
    404  nobody provides the task
    422  the task failed, with its error
    502  a provider may have taken it
    503  not taken: no provider listens, all refuse it, or the gateway is
         ending
    504  no response in time
  400, 403, 405, 408, 413 and 429 are as for POST /.
  The answer has the bytes of a stream, but not the result beside it.
  With the header "Prefer: respond-async" the answer is 202 within a second.
  Fetch the response with GET from its Location. A GET without a response yet is
  answered with 202; ?wait=30s makes it wait. A response can be fetched once,
  until the time to wait for it plus --unread-duration has passed. At most
  --max-outstanding responses are kept; then such a request gets 429.
/stream
  Serves the streams of responses, see --stream-url. A stream holds its
  program at the provider, so it is ended early in two cases. It is ended at
  once if its response is late or was not taken by the hook. It is ended after
  --unread-duration if nobody begins to read it.
/healthz
  Answers 200. It answers 503 if the gateway is ending, or if one of its own
  sockets or the connection to NATS is gone. The log says so too.
/metrics
  Has the counters for Prometheus, see METRICS.

SOCKETS
DIR/coordinator/NAME.sock
  Takes requests from this machine, of at most 64 MiB. If a provider may or
  may not have taken a request, the gateway closes the connection without an
  acknowledgement.
DIR/response/NAME.sock
  Takes the responses of the providers.

ACCESS
Everything over HTTP has one address. Whoever reaches it may send requests and
read /metrics. Restrict that with a proxy that has TLS and logins, or with
these flags:
  --tls-cert, --tls-key  serve HTTPS.
  --client-ca            A client needs a certificate that one of these
                         authorities has signed.
  --token-file           Each request needs the header "Authorization: Bearer
                         TOKEN", with a token of the file, one on a line. Else
                         the answer is 401. Tokens are compared in constant
                         time. /healthz and /stream need no token: the URL of
                         a stream is a secret itself.
SIGHUP makes the gateway read these files again; it does not end the gateway.
Connections that are open stay, also those of clients of another --client-ca.
If a file can't be used, the old contents stay in use. --listen unix:PATH
serves HTTP on a socket with the mode --listen-mode, for a proxy on this
machine.

On a loopback address the gateway serves only requests for localhost, for a
loopback address, and for the hosts of --listen, --stream-url and
--allow-host. A web page could otherwise reach it with a name of its own that
leads to the loopback (DNS rebinding). On other addresses the gateway serves
any name. With --allow-host it serves only these names and the address itself.

DIR decides who may send requests from this machine and who may provide tasks.
Missing directories are created; the umask decides their mode. See
SECURITY.md.

HOOKS
A request over HTTP has an http or https hook, or with --nats a nats hook. A
request over the unix socket may also have a unix hook. It is then forwarded
unchanged, and the provider sends the response to the hook itself.

In all other cases the response comes to the gateway, which sends it to the
hook. After --timeout it sends the error "response timeout" instead. It sends
a response at most once. It tries again, until the time-out, only if it got no
connection, or if the hook answered 429, or 503 with Retry-After. A hook has
--hook-timeout to answer. If a response is too large for the hook, an error
that says so is sent instead. Over NATS the limit is 1 MiB, unless the server
has another one.

Strangers choose the hooks, so the gateway checks the address of each
connection to a hook, after the look-up of the name and after redirects. It
refuses
  169.254.0.0/16, fe80::/10        link-local, and metadata services of clouds
  168.63.129.16, 100.100.100.200, 192.0.0.192, fd00:ec2::/32, fd20:ce::254,
  fd00:c1::a9fe:a9fe, fd00:a9fe:a9fe::1, fd00:42::42
                                   other metadata services
  0.0.0.0/8, ::                    unspecified
  64:ff9b:1::/48, 2002::/16, 2001::/32
                                   IPv6 addresses with an IPv4 address inside
                                   (local NAT64, 6to4, Teredo)
For an address in 64:ff9b::/96 (NAT64), both the address and the IPv4 address
inside must be allowed.

--hook-deny adds networks, --hook-allow adds exceptions. The longest prefix
that contains an address decides. Between two of the same length, --hook-deny
wins over --hook-allow, and --hook-allow over the list above. This allows
nothing but one network:
  --hook-deny 0.0.0.0/0,::/0 --hook-allow 10.1.0.0/16
The same rules apply to streams that providers offer over HTTP.

The gateway does not use the proxies in the environment (HTTP_PROXY), except
with --hook-proxy. Then it can check only the address of the proxy, and hooks
that are written as addresses.

NATS
With --nats URL the gateway also takes requests from a NATS server, for each
TASK that has a directory, from the subject SUBJECT.TASK. It looks for new
directories every few seconds. All gateways use the queue group "acomm", so
gateways on many machines share the tasks that they provide. Hooks may then be
nats URLs. The rules for requests over HTTP apply. A TASK with a dot, a space,
"*" or ">" is not served over NATS. --nats embedded starts a server in this
process, see --nats-listen.

CONFIGURATION
A flag may also be set in the environment, or in a YAML, TOML or JSON file
that --config names. Its name in the environment is ACOMM_ and the flag in
capitals with _ for -, such as ACOMM_SOCKET_DIR. In a file it is the name of
the flag. The command line wins over the environment, and the environment over
the file. Lists are separated by commas; a file may also have a list. An
unknown name in a file is an error.

METRICS
  acomm_gateway_requests_total{task}
      requests that could be read
  acomm_gateway_refused_total{task,reason}
      requests, also unreadable ones, that were not acknowledged: invalid,
      no_provider, refused, duplicate, busy, draining, unclear
  acomm_gateway_responses_total{task,result}
      responses from providers: success, error
  acomm_gateway_timeouts_total{task}
      requests without a response in time
  acomm_gateway_forward_failures_total{task}
      responses and time-outs that did not arrive at their hook, or may not
      have
  acomm_gateway_response_seconds{task}
      time from the request to its response
  acomm_gateway_outstanding
      requests that wait for their response, or whose response is being sent
      to the hook
The label task is empty for tasks without a directory. Two things are not
counted: responses and time-outs of requests with unix hooks, which the
gateway does not see, and responses that come after the time-out.

SIGNALS
On SIGTERM, SIGINT or SIGHUP the gateway takes no more requests. It waits for
the outstanding responses, for at most --timeout plus --hook-timeout. It waits
for responses that are to be fetched, for at most --unread-duration. Then it
waits for streams and other HTTP exchanges, and ends with status 0. It cuts
off a stream that has not moved for 10 seconds.

A second signal ends the gateway at once, with status 1. A signal within a
second of the first counts as the same one. SIGHUP does nothing if the gateway
was started with SIGHUP ignored, as under nohup.

EXIT STATUS
  0  told to stop, and everything that was taken is done
  1  could not listen or connect, failed, or was stopped by a second signal
  2  usage: flags, the environment or the file are wrong`

const (
	minHookTimeout = 5 * time.Second // unless it is given: a short --timeout is about the provider
	maxHookTimeout = sendTimeout
)

// gatewayOptions are the flags of the gateway.
type gatewayOptions struct {
	config         string
	socketDir      string
	name           string
	listen         string
	listenMode     string
	tlsCert        string
	tlsKey         string
	clientCA       string
	tokenFile      string
	access         *access // what these files say, once they are checked
	streamURL      string
	timeout        time.Duration
	unread         time.Duration
	maxBody        byteSize
	maxHeader      byteSize
	maxConnections int
	maxOutstanding int
	allowHost      []string
	hookTimeout    time.Duration
	hookAllow      []string
	hookDeny       []string
	hookProxy      bool
	nats           string
	natsSubject    string
	natsListen     string
	verbose        bool
	log            logFormat
}

func newGatewayCommand() *cobra.Command {
	opts := &gatewayOptions{maxBody: maxPayload, maxHeader: 64 << 10}
	cmd := &cobra.Command{
		Use:   "gateway --socket-dir DIR --listen ADDR",
		Short: "Take requests over HTTP and forward them to providers",
		Long:  gatewayLong,
		Example: `  acomm gateway --socket-dir /run/acomm --listen :8080 \
        --stream-url https://box.example/stream
  acomm gateway --config /etc/acomm/gateway.yaml`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, err := loadSettings(cmd.NonInheritedFlags())
			opts.log.use()
			if err == nil {
				err = opts.check()
			}
			if err == nil {
				err = runGateway(cmd.Context(), opts, cmd.OutOrStdout())
			}
			return opts.log.logged(settings.locate(err))
		},
	}
	opts.addFlags(cmd.Flags())
	return cmd
}

func (o *gatewayOptions) addFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.StringVar(&o.socketDir, "socket-dir", "", "`DIR` with the sockets; required")
	f.StringVar(&o.listen, "listen", "", "`ADDR` for HTTP: host:port (port 0 takes a free one) or unix:PATH; required")
	f.StringVar(&o.listenMode, "listen-mode", "0660", "`MODE` of the socket for --listen unix:PATH")
	f.StringVar(&o.tlsCert, "tls-cert", "", "`FILE` with the certificate for TLS and its chain, in PEM")
	f.StringVar(&o.tlsKey, "tls-key", "", "`FILE` with the key of --tls-cert, in PEM")
	f.StringVar(&o.clientCA, "client-ca", "", "`FILE` with authorities, in PEM; clients need a certificate that one of these has signed")
	f.StringVar(&o.tokenFile, "token-file", "", "`FILE` with bearer tokens, one on a line; clients need one of these")
	f.StringVar(&o.name, "name", "", "`NAME` of the gateway's own sockets (default the name of the host)")
	f.StringVar(&o.streamURL, "stream-url", "", "`URL` under which others reach /stream (default http://ADDR/stream)")
	f.DurationVar(&o.timeout, "timeout", time.Minute, "how long to wait for the response to a request")
	f.DurationVar(&o.unread, "unread-duration", time.Minute, "how long a stream may stay unread")
	f.StringSliceVar(&o.allowHost, "allow-host", nil, "further `NAMES` under which HTTP is served; * is any name")
	f.Var(&o.maxBody, "max-body", "largest body of an HTTP request, in bytes, KiB, MiB or GiB")
	f.Var(&o.maxHeader, "max-header", "largest header of an HTTP request")
	f.IntVar(&o.maxConnections, "max-connections", 1024, "how many HTTP connections, and how many exchanges over the unix socket, are served at a time")
	f.IntVar(&o.maxOutstanding, "max-outstanding", 65536, "how many requests may wait for responses; more are refused")
	f.DurationVar(&o.hookTimeout, "hook-timeout", 0, "how long a hook may take to answer (default --timeout, but at least 5s and at most 1m)")
	f.StringSliceVar(&o.hookAllow, "hook-allow", nil, "addresses or networks (`CIDR`) that hooks may lead to")
	f.StringSliceVar(&o.hookDeny, "hook-deny", nil, "addresses or networks (`CIDR`) that hooks may not lead to")
	f.BoolVar(&o.hookProxy, "hook-proxy", false, "connect to hooks through the proxies in the environment (HTTP_PROXY)")
	f.StringVar(&o.nats, "nats", "", "`URL` of a NATS server to take requests from, or embedded")
	f.StringVar(&o.natsSubject, "nats-subject", "tasks", "`SUBJECT` of requests over NATS, before the name of the task")
	f.StringVar(&o.natsListen, "nats-listen", "127.0.0.1:4222", "`ADDR` that the embedded NATS server listens on")
	f.StringVar(&o.config, "config", "", "`FILE` with values for these flags")
	o.log.addTo(f)
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log each request that is refused, with the reason")
}

func (o *gatewayOptions) check() error {
	if o.name == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("name of the host: %w", err)
		}
		o.name = name
	}
	if o.hookTimeout == 0 {
		o.hookTimeout = min(max(o.timeout, minHookTimeout), maxHookTimeout)
	}
	switch {
	case o.socketDir == "":
		return usageError("--socket-dir is missing")
	case o.listen == "":
		return usageError("--listen is missing")
	case strings.HasPrefix(o.listen, "unix:"):
		if o.streamURL == "" {
			return usageError("--listen %s: give --stream-url too, the address at which others read streams", o.listen)
		}
	case !isHostPort(o.listen):
		return usageError("--listen: %q is neither HOST:PORT nor unix:PATH", o.listen)
	}
	switch {
	case o.nats == "embedded" && !isHostPort(o.natsListen):
		return usageError("--nats-listen: %q is not HOST:PORT", o.natsListen)
	case checkTaskName(o.name) != nil:
		return usageError("--name: %q can't be part of a file name", o.name)
	case o.timeout <= 0:
		return usageError("--timeout: %v is not positive", o.timeout)
	case o.hookTimeout <= 0, o.hookTimeout > maxHookTimeout:
		return usageError("--hook-timeout: %v is not positive, or over %v", o.hookTimeout, maxHookTimeout)
	case o.unread <= 0:
		return usageError("--unread-duration: %v is not positive", o.unread)
	case o.maxBody <= 0:
		return usageError("--max-body: %d is not positive", o.maxBody)
	case o.maxHeader <= 0:
		return usageError("--max-header: %d is not positive", o.maxHeader)
	case o.maxConnections <= 0:
		return usageError("--max-connections: %d is not positive", o.maxConnections)
	case o.maxOutstanding <= 0:
		return usageError("--max-outstanding: %d is not positive", o.maxOutstanding)
	case slices.ContainsFunc(o.allowHost, func(host string) bool { return host != "*" && !isHost(host) }):
		return usageError("--allow-host: %q must be names or addresses, without ports", o.allowHost)
	case o.streamURL != "" && !isHTTPURL(o.streamURL):
		return usageError("--stream-url must be an http or https URL")
	case o.nats != "" && !areURLs(o.nats):
		return usageError("--nats must be embedded, or URLs separated by commas") // it may hold a password
	case o.nats != "" && !isSubject(o.natsSubject):
		return usageError("--nats-subject: %q is not a valid subject", o.natsSubject)
	}
	return o.checkAccess()
}

func isHostPort(text string) bool {
	_, port, err := net.SplitHostPort(text)
	if err != nil {
		return false
	}
	_, err = net.LookupPort("tcp", port)
	return err == nil
}

// areURLs reports whether the text is a list of URLs, or of hosts.
func areURLs(list string) bool {
	for text := range strings.SplitSeq(list, ",") {
		if _, err := url.Parse(strings.TrimSpace(text)); err != nil && strings.Contains(text, "://") {
			return false
		}
	}
	return true
}

func isHTTPURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

// streamURLAt is where others reach the streams of a gateway that listens there.
func (o *gatewayOptions) streamURLAt(addr net.Addr) (*url.URL, error) {
	if o.streamURL != "" {
		return url.Parse(o.streamURL)
	}
	host := addr.String()
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			host = net.JoinHostPort(name, strconv.Itoa(tcp.Port))
		}
	}
	scheme := "http"
	if o.tlsCert != "" {
		scheme = "https"
	}
	return &url.URL{Scheme: scheme, Host: host, Path: "/stream"}, nil
}

// byteSize is a flag for a number of bytes.
type byteSize int64

var byteUnits = []struct {
	name string
	size int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

func (b *byteSize) Type() string { return "SIZE" }

func (b *byteSize) String() string {
	for _, unit := range byteUnits {
		if int64(*b)%unit.size == 0 {
			return strconv.FormatInt(int64(*b)/unit.size, 10) + unit.name
		}
	}
	return ""
}

func (b *byteSize) Set(text string) error {
	for _, unit := range byteUnits {
		number, ok := strings.CutSuffix(strings.TrimSpace(text), unit.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if err != nil || n < 0 || n > (1<<62)/unit.size {
			return fmt.Errorf("%q is not a size: write for example 1000, 64KiB or 1MiB", text)
		}
		*b = byteSize(n * unit.size)
		return nil
	}
	return nil
}
