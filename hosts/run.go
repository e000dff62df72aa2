package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	hosts       = 3
	victim      = 3 // whose link is cut, and who is killed
	rate        = 40
	gatewayPort = "8080"
)

// trial is a run: hosts, and what has been tried on them.
type trial struct {
	procs    *processes
	network  *network
	self     string // this program
	gateway  string
	nats     string // URL of the server; empty without
	overNATS bool
	machine  map[int][]*process // the processes of each host
	tallies  []func(handled map[string]int) *tally
}

func tryHosts(ctx context.Context, procs *processes, gateway string, overNATS bool) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	t := &trial{procs: procs, self: self, gateway: gateway, overNATS: overNATS, machine: map[int][]*process{}}
	t.network, err = newNetwork()
	defer func() {
		procs.killAll() // a namespace ends with its last process
		err = errors.Join(err, t.network.remove())
	}()
	if err != nil {
		return err
	}
	if err := t.startHosts(ctx); err != nil {
		return err
	}
	for _, phase := range []func(context.Context) error{t.calm, t.cutLink, t.disturb, t.killHost} {
		if err := phase(ctx); err != nil {
			return err
		}
	}
	return t.report()
}

// startHosts starts the broker, and providers and a gateway on each host.
func (t *trial) startHosts(ctx context.Context) error {
	if t.overNATS {
		if _, err := t.procs.start(ctx, t.network.bridge(), "nats", "ready", t.self, "nats", "-addr", address(254)); err != nil {
			return err
		}
		t.nats = "nats://" + net.JoinHostPort(address(254), strconv.Itoa(natsPort))
	}
	for i := 1; i <= hosts; i++ {
		if err := t.network.addHost(i); err != nil {
			return err
		}
		for _, task := range []string{"echo", "blob"} {
			if err := t.start(ctx, i, task, "ready", t.self, "provider", "-dir", t.dir(i), "-task", task, "-host", name(i),
				"-handled", t.handled()); err != nil {
				return err
			}
		}
		if err := t.startGateway(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (t *trial) startGateway(ctx context.Context, i int) error {
	argv := []string{t.gateway, "gateway", "--socket-dir", t.dir(i), "--name", name(i), "--timeout", gatewayTimeout,
		"--listen", net.JoinHostPort(address(i), gatewayPort)}
	if t.nats != "" {
		argv = append(argv, "--nats", t.nats, "--nats-subject", "tasks")
	}
	return t.start(ctx, i, "gateway", "listening on", argv...)
}

// start starts a process on a host.
func (t *trial) start(ctx context.Context, host int, what, ready string, argv ...string) error {
	proc, err := t.procs.start(ctx, t.network.host(host), name(host)+"-"+what, ready, argv...)
	if err != nil {
		return err
	}
	t.machine[host] = append(t.machine[host], proc)
	return nil
}

func name(host int) string           { return fmt.Sprintf("h%d", host) }
func (t *trial) dir(host int) string { return filepath.Join(t.procs.dir, name(host)) }
func (t *trial) handled() string     { return filepath.Join(t.procs.dir, "handled") }
func gatewayURL(host int) string     { return "http://" + net.JoinHostPort(address(host), gatewayPort) }

// requesters start one on each host, which sends to all gateways but its own.
func (t *trial) requesters(ctx context.Context, phase string, lasts time.Duration) (map[int]*process, error) {
	all := map[int]*process{}
	for i := 1; i <= hosts; i++ {
		var targets []string
		for j := 1; j <= hosts; j++ {
			if j != i {
				targets = append(targets, gatewayURL(j))
			}
		}
		id := recordID(phase, i)
		proc, err := t.procs.start(ctx, t.network.host(i), "requester-"+id, "ready", t.self, "requester", "-name", id,
			"-addr", address(i), "-targets", strings.Join(targets, ","), "-nats", t.nats, "-record", t.record(id),
			"-dir", t.procs.dir, "-for", lasts.String(), "-rate", strconv.Itoa(rate))
		if err != nil {
			return nil, err
		}
		all[i] = proc
	}
	return all, nil
}

// recordID is a name for files and subjects.
func recordID(phase string, host int) string {
	return strings.NewReplacer(" ", "-", ",", "", "%", "").Replace(phase) + "-" + name(host)
}

func (t *trial) record(id string) string { return filepath.Join(t.procs.dir, "record-"+id) }

// finish waits for the requesters of a phase, but those that were killed, and takes
// their records.
func (t *trial) finish(ctx context.Context, phase string, all map[int]*process, killed int) error {
	var records []record
	for i := 1; i <= hosts; i++ {
		if i != killed {
			if err := all[i].wait(ctx); err != nil {
				return err
			}
		}
		file, err := os.Open(t.record(recordID(phase, i)))
		if err != nil {
			return err
		}
		events, err := readRecord(file)
		_ = file.Close() // was only read
		if err != nil && i != killed {
			return err
		}
		records = append(records, record{killed: i == killed, events: events})
	}
	for _, via := range []string{"http", "nats"} {
		if via == "http" || t.nats != "" {
			t.tallies = append(t.tallies, func(handled map[string]int) *tally {
				return account(phase+", "+via, via, records, handled)
			})
		}
	}
	return nil
}

func (t *trial) calm(ctx context.Context) error {
	return t.phase(ctx, "calm", 8*time.Second, func() error { return nil })
}

func (t *trial) cutLink(ctx context.Context) error {
	return t.phase(ctx, "link cut", 11*time.Second, func() error {
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
		if err := t.network.cut(victim); err != nil {
			return err
		}
		if err := sleep(ctx, 5*time.Second); err != nil {
			return err
		}
		return t.network.heal(victim)
	})
}

func (t *trial) disturb(ctx context.Context) error {
	for i := 1; i <= hosts; i++ {
		if err := t.network.disturb(i); err != nil {
			if i > 1 {
				return err
			}
			fmt.Println("50 ms and 1 % loss are left out:", err)
			return nil
		}
	}
	if err := t.phase(ctx, "50 ms, 1 % lost", 8*time.Second, func() error { return nil }); err != nil {
		return err
	}
	for i := 1; i <= hosts; i++ {
		if err := t.network.calm(i); err != nil {
			return err
		}
	}
	return nil
}

// killHost ends a host as a loss of power does: nothing on it closes a connection.
func (t *trial) killHost(ctx context.Context) error {
	const phase = "host killed"
	all, err := t.requesters(ctx, phase, 10*time.Second)
	if err != nil {
		return err
	}
	if err := sleep(ctx, 3*time.Second); err != nil {
		return err
	}
	if err := t.network.cut(victim); err != nil {
		return err
	}
	for _, proc := range append(t.machine[victim], all[victim]) {
		proc.kill()
	}
	return t.finish(ctx, phase, all, victim)
}

// phase has the requesters send for a time, and something happen meanwhile.
func (t *trial) phase(ctx context.Context, name string, lasts time.Duration, happen func() error) error {
	all, err := t.requesters(ctx, name, lasts)
	if err != nil {
		return err
	}
	if err := happen(); err != nil {
		return err
	}
	return t.finish(ctx, name, all, 0)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// report prints the table when nothing is in flight any more: a request may be handled
// a second time long after the first.
func (t *trial) report() error {
	data, err := os.ReadFile(t.handled())
	if err != nil {
		return err
	}
	handled := map[string]int{}
	for id := range strings.FieldsSeq(string(data)) {
		handled[id]++
	}
	var tallies []*tally
	var failed error
	for _, count := range t.tallies {
		tallies = append(tallies, count(handled))
		failed = errors.Join(failed, tallies[len(tallies)-1].err())
	}
	if err := printTable(os.Stdout, tallies); err != nil {
		return err
	}
	return failed
}
