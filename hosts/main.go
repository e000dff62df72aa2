// Command hosts tests acomm across machines. Three network namespaces stand for the
// machines: they have addresses of their own and share a bridge. On each run a
// gateway, providers and requesters. The requesters call tasks on the other hosts,
// over HTTP and over NATS, and hooks and streams cross hosts too. Then the command
// cuts a link for 5 s, delays and loses packets if the kernel can, and kills a host.
//
//	go run .
//
// It prints a table. It fails if a request was lost in silence, handled twice or
// answered with a wrong answer. A request is lost in silence if it ends neither with
// a response nor with a time-out nor with an error.
//
// It takes about a minute. It needs root, and ip of iproute2. Without them it says
// so and succeeds. The machine's own network is not touched, because the bridge has
// a namespace of its own.
//
// With -cost it measures what a gateway costs, on the loopback interface. That needs
// no root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// limit bounds a run, whatever happens in it.
const limit = 3 * time.Minute

func main() {
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
				os.Exit(1)
			}
			return
		}
	}
	gateway := flag.String("gateway", "", "`path` of the acomm command; if empty, it is built from ../cmd/acomm")
	cost := flag.Bool("cost", false, "measure what a gateway costs, and nothing else")
	overNATS := flag.Bool("nats", true, "also send requests over NATS")
	keep := flag.Bool("keep", false, "keep the directory with logs and records")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, limit)
	err := run(ctx, *gateway, *cost, *keep, *overNATS)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "hosts:", err)
		os.Exit(1)
	}
}

// roles are what this program starts itself as, in a namespace.
var roles = map[string]func(args []string) error{
	"provider":  provide,
	"requester": request,
	"nats":      serveNATS,
}

func run(ctx context.Context, gateway string, cost, keep, overNATS bool) (err error) {
	if !cost {
		if reason := missing(); reason != "" {
			fmt.Println("skipped:", reason)
			return nil
		}
	}
	dir, err := os.MkdirTemp("", "acomm-hosts-")
	if err != nil {
		return err
	}
	defer func() {
		if keep {
			fmt.Println("kept:", dir)
		} else if removeErr := os.RemoveAll(dir); err == nil {
			err = removeErr
		}
	}()
	if gateway == "" {
		if gateway, err = buildGateway(ctx, dir); err != nil {
			return err
		}
	}
	procs := &processes{dir: dir}
	defer procs.killAll()
	if cost {
		return measureCost(ctx, procs, gateway)
	}
	return tryHosts(ctx, procs, gateway, overNATS)
}
