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

const gatewayLong = `gateway takes requests from other machines over HTTP, and from this one over a
unix socket, gives each to a provider of its task on this machine, and sends the
response to the hook that the request names.

PROVIDERS
  The providers of the task TASK have their sockets, or links to them, at
  DIR/TASK/*.sock. They are asked in the order of their names. The next one is asked only if a request was
  certainly not taken: nobody listens, or the provider has refused it. After
  anything that leaves this open, such as a connection that ends before the
  acknowledgement, no other is asked: a request is done at most once.
  A task is one name: not empty, without a slash, neither "." nor "..", 255 bytes at
  most, and neither "coordinator" nor "response", which the gateway uses.

WHAT IT SERVES
  POST /      a request, in JSON. The answer acknowledges it: 200 with a response
              whose error is empty, or says why the request is not taken (nobody
              provides the task, or all providers refuse it; the id is in use).
              Other statuses, with a response that says more:
                400  no valid request: no JSON, a hook that is not allowed
                403  sent by a web page of another site, or for a name that is not the
                     gateway's, see --allow-host
                405  not a POST
                408  the body did not arrive within a minute
                413  larger than --max-body, or than a provider takes (64 MiB)
                429  --max-outstanding requests are under way; not taken
                502  a provider may have taken it, or may not; nothing will be sent
                     to the hook
                503  the gateway is ending; not taken
  GET /tasks  the tasks with providers, and how many, as acomm list shows them
  POST /tasks/TASK   the task, with the arguments as the body, in JSON, or nothing.
              The gateway waits for the response, ?wait=30s at most (--timeout is the
              default and the most), and answers with the result as JSON, or with the
              bytes of its stream. Other answers are {"error": TEXT}:
                404  nobody provides the task
                422  the error of the task
                502  a provider may have taken it, or may not
                503  not taken: no provider listens, or all refuse it; or the gateway is
                     ending
                504  no response in time
              and 400, 403, 405, 408, 413 and 429 as above. With the header "Prefer:
              respond-async" it answers 202 at once. Its Location is where the
              response is fetched with GET, once, as if it were the answer, or 202 again
              while there is none (?wait=30s waits). It is there for the time that was
              waited for and --unread-duration; --max-outstanding of them, more are
              429.
  /stream     the streams that responses name, see --stream-url. One that can't be
              passed on, since its response is late or its hook has not taken it,
              is ended at once, and one that nobody begins to read after
              --unread-duration: it holds its program at the provider.
  /healthz    200, or 503 once the gateway is ending, and while one of its own
              sockets or the connection to NATS is gone, which the log says too
  /metrics    counts, for Prometheus
  DIR/coordinator/NAME.sock   requests from this machine, of 64 MiB at most. A
              sender that is not told whether a request was taken finds the
              connection closed without an acknowledgement.
  DIR/response/NAME.sock      the responses of the providers

  Everything over HTTP is on one address: whoever reaches it may send requests, and
  read /metrics. Put a proxy with TLS and logins before it if that is not meant.
  On a loopback address it serves only requests for that: for localhost, a loopback
  address, the host of --listen, of --stream-url and of --allow-host. A web page could
  otherwise have its own name lead there (DNS rebinding). On other addresses it serves
  any name, but with --allow-host only these and the address itself.

HOOKS
  A request over HTTP has an http, https or nats hook, the last with --nats. One over
  the unix socket may have a unix hook too: such a request is passed on unchanged,
  and its response does not come through the gateway. The response of all others
  does, or after --timeout an error that says "response timeout". It is sent to the
  hook at most once: again, until the time-out, only if nobody could be connected to,
  or the answer was 429, or 503 with Retry-After. A hook is given --hook-timeout to
  answer. In place of one that is too large for the hook (over
  NATS 1 MiB, if the server has no other limit) an error is sent that says so.

  Hooks are chosen by strangers, so the addresses they lead to are checked: when
  connecting, after the name was looked up, also after redirects. Refused are
    169.254.0.0/16, fe80::/10        link-local, and metadata services of clouds
    168.63.129.16, 100.100.100.200, 192.0.0.192, fd00:ec2::/32, fd20:ce::254,
    fd00:c1::a9fe:a9fe, fd00:a9fe:a9fe::1, fd00:42::42
                                     other metadata services
    0.0.0.0/8, ::                    unspecified
    64:ff9b:1::/48, 2002::/16, 2001::/32
                                     IPv6 addresses with an IPv4 address inside (local
                                     NAT64, 6to4, Teredo)
  An address in 64:ff9b::/96 (NAT64) has to be allowed itself, and so does the IPv4
  address inside. --hook-deny adds to these, --hook-allow makes exceptions. The longest
  prefix that holds an address decides; of two equally long ones a refusal, but
  --hook-allow over those above. To allow nothing but one network:
    --hook-deny 0.0.0.0/0,::/0 --hook-allow 10.1.0.0/16
  Streams that providers offer over HTTP are subject to the same rules. Proxies that
  the environment names (HTTP_PROXY) are not used, but with --hook-proxy, where the
  rules can be applied only to the proxy's address and to hooks that are addresses.

NATS
  With --nats URL the gateway also takes requests from a NATS server: for each TASK
  with a directory, which it looks for every few seconds, from SUBJECT.TASK, with the
  queue group "acomm", so that gateways on many machines share the tasks that they
  have providers for. Hooks may then be nats URLs. Requests that come that way are
  subject to the rules of those over HTTP. A TASK with a dot, a space, "*" or ">" can't
  be had over NATS. --nats embedded starts a server in this process, see --nats-listen.

CONFIGURATION
  Each flag may also be given in the environment, as ACOMM_ and its name in capitals
  with _ for - (ACOMM_SOCKET_DIR), or by its name in a YAML, TOML or JSON file that
  --config names. A flag goes before the environment, that before the file. Lists are
  separated by commas; in a file they may be lists. What the file does not know how
  to spell is an error.

METRICS
  acomm_gateway_requests_total{task}            requests that could be read
  acomm_gateway_refused_total{task,reason}      of them and of others, not acknowledged:
                                                invalid, no_provider, refused, duplicate,
                                                busy, draining, unclear
  acomm_gateway_responses_total{task,result}    from providers: success, error
  acomm_gateway_timeouts_total{task}            requests without a response in time
  acomm_gateway_forward_failures_total{task}    responses and time-outs that did not
                                                arrive at their hook, or may not have
  acomm_gateway_response_seconds{task}          from the request to its response
  acomm_gateway_outstanding                     requests that wait for their response, or
                                                whose response is being sent to the hook
  The label task is empty for tasks without a directory. Not counted: the responses
  and time-outs of requests with unix hooks, which the gateway does not see, and
  responses that come after the time-out.

WHO MAY
  --tls-cert and --tls-key serve HTTPS. With --client-ca a client needs a certificate that
  one of these has signed. With --token-file each request but those for /healthz and
  /stream needs the header "Authorization: Bearer TOKEN" with one of the tokens in the
  file, one on a line; 401 without. They are compared in a time that tells nothing. The
  URL of a stream is a secret itself. With any of these files SIGHUP has them read
  again, in place of ending the gateway; what can't be used leaves things as they were.
  --listen unix:PATH serves HTTP on a socket with --listen-mode, for a proxy on this
  machine.

SIGNALS
  SIGTERM, SIGINT, SIGHUP
              takes no more requests, waits for the responses that are outstanding
              (--timeout at most, and --hook-timeout), then for streams and other HTTP
              exchanges that are under way, and ends with status 0. Streams that then
              do not move for 10 seconds, or have not, are cut off. A second signal
              ends it at once, with status 1; one within a second of the first is
              taken for the same. SIGHUP does nothing where it was ignored
              from the start, as with nohup.

EXIT STATUS
  0  told to stop, and all that was taken has been done
  1  could not listen or connect, failed, or stopped by a second signal
  2  usage: flags, the environment or the file make no sense

FILES
  DIR decides who may send requests from this machine and who may provide tasks:
  directories that are missing are made as the umask says. See SECURITY.md.`

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
	f.StringVar(&o.socketDir, "socket-dir", "", "directory `DIR` of the sockets; required")
	f.StringVar(&o.listen, "listen", "", "address `ADDR` for HTTP, host:port, where port 0 takes a free one, or unix:PATH; required")
	f.StringVar(&o.listenMode, "listen-mode", "0660", "`MODE` of the socket of --listen unix:PATH")
	f.StringVar(&o.tlsCert, "tls-cert", "", "`FILE` of the certificate for TLS, and those above it, in PEM")
	f.StringVar(&o.tlsKey, "tls-key", "", "`FILE` of its key")
	f.StringVar(&o.clientCA, "client-ca", "", "`FILE` of certificates; clients need one that these have signed")
	f.StringVar(&o.tokenFile, "token-file", "", "`FILE` of bearer tokens, one on a line; clients need one of them")
	f.StringVar(&o.name, "name", "", "`NAME` of the gateway's own sockets (default the host's name)")
	f.StringVar(&o.streamURL, "stream-url", "", "`URL` under which others reach /stream (default http://ADDR/stream)")
	f.DurationVar(&o.timeout, "timeout", time.Minute, "for the response to a request")
	f.DurationVar(&o.unread, "unread-duration", time.Minute, "for somebody to begin to read a stream")
	f.StringSliceVar(&o.allowHost, "allow-host", nil, "`NAMES` under which HTTP is served too; * is any")
	f.Var(&o.maxBody, "max-body", "largest request over HTTP, in bytes, KiB, MiB or GiB")
	f.Var(&o.maxHeader, "max-header", "largest header over HTTP")
	f.IntVar(&o.maxConnections, "max-connections", 1024, "HTTP connections, and unix exchanges, at a time")
	f.IntVar(&o.maxOutstanding, "max-outstanding", 65536, "requests that may wait for responses; more are refused")
	f.DurationVar(&o.hookTimeout, "hook-timeout", 0, "for a hook to answer (default --timeout, from 5s to 1m)")
	f.StringSliceVar(&o.hookAllow, "hook-allow", nil, "addresses, or networks as `CIDR`, that hooks may lead to")
	f.StringSliceVar(&o.hookDeny, "hook-deny", nil, "addresses, or networks as `CIDR`, that they may not lead to")
	f.BoolVar(&o.hookProxy, "hook-proxy", false, "connect to hooks through the proxies that the environment names")
	f.StringVar(&o.nats, "nats", "", "`URL` of a NATS server, or embedded")
	f.StringVar(&o.natsSubject, "nats-subject", "tasks", "`SUBJECT` before the task's name")
	f.StringVar(&o.natsListen, "nats-listen", "127.0.0.1:4222", "`ADDR` of the embedded NATS server")
	f.StringVar(&o.config, "config", "", "`FILE` with flags")
	o.log.addTo(f)
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log each request that is refused, and why")
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
			return usageError("--listen %s: others can't know where the streams are: name that with --stream-url", o.listen)
		}
	case !isHostPort(o.listen):
		return usageError("--listen: %q is neither HOST:PORT nor unix:PATH", o.listen)
	}
	switch {
	case o.nats == "embedded" && !isHostPort(o.natsListen):
		return usageError("--nats-listen: %q is no HOST:PORT", o.natsListen)
	case checkTaskName(o.name) != nil:
		return usageError("--name: %q is no file name", o.name)
	case o.timeout <= 0:
		return usageError("--timeout is not positive")
	case o.hookTimeout <= 0, o.hookTimeout > maxHookTimeout:
		return usageError("--hook-timeout: %v is not between 0 and %v", o.hookTimeout, maxHookTimeout)
	case o.unread <= 0:
		return usageError("--unread-duration is not positive")
	case o.maxBody <= 0:
		return usageError("--max-body is not positive")
	case o.maxHeader <= 0:
		return usageError("--max-header is not positive")
	case o.maxConnections <= 0:
		return usageError("--max-connections is not positive")
	case o.maxOutstanding <= 0:
		return usageError("--max-outstanding is not positive")
	case slices.ContainsFunc(o.allowHost, func(host string) bool { return host != "*" && !isHost(host) }):
		return usageError("--allow-host: %q has more or less than names or addresses", o.allowHost)
	case o.streamURL != "" && !isHTTPURL(o.streamURL):
		return usageError("--stream-url is no http URL")
	case o.nats != "" && !areURLs(o.nats):
		return usageError("--nats is not URLs, separated by commas, or embedded") // it may hold a password
	case o.nats != "" && !isSubject(o.natsSubject):
		return usageError("--nats-subject: %q is no subject", o.natsSubject)
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
			return fmt.Errorf("%q is no number of bytes, such as 1000, 64KiB or 1MiB", text)
		}
		*b = byteSize(n * unit.size)
		return nil
	}
	return nil
}
