// Command hosts tries acomm across machines: three network namespaces with
// addresses of their own on a bridge, a gateway and providers on each, and
// requesters on each that call tasks on the others, over HTTP and over NATS, with
// hooks and streams that cross hosts. It then cuts a link for 5 s and heals it,
// delays and loses packets where the kernel can, and kills a host.
//
//	go run .
//
// It prints a table and fails if a request was lost in silence (it ended neither
// with a response nor with a time-out nor with an error), handled twice, or
// answered with something that is not its answer. It takes about a minute and needs
// root, and ip of iproute2; where they are missing it says so and succeeds. Nothing
// of the machine's own network is touched: the bridge has a namespace of its own.
//
// With -cost it measures instead what a gateway costs, on the loopback interface
// and without being root.
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
	gateway := flag.String("gateway", "", "the built acomm command; built from ../cmd/acomm if empty")
	cost := flag.Bool("cost", false, "measure what a gateway costs, instead")
	overNATS := flag.Bool("nats", true, "also send over NATS")
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

// roles are what this program is started as by itself, in a namespace.
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
