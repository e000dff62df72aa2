package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// A network of namespaces: one with a bridge, and one for each host.
type network struct {
	prefix string
	made   []string // namespaces, to be deleted
}

// missing says what keeps this machine from having namespaces; empty for nothing.
func missing() string {
	if runtime.GOOS != "linux" {
		return "network namespaces are Linux'"
	}
	if os.Geteuid() != 0 {
		return "network namespaces need root"
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return "there is no ip command (iproute2)"
	}
	probe := fmt.Sprintf("acomm%d-try", os.Getpid())
	if err := ip("netns add " + probe); err != nil {
		return err.Error()
	}
	defer func() { _ = ip("netns delete " + probe) }()
	if err := ip("-n " + probe + " link add br0 type bridge"); err != nil {
		return err.Error()
	}
	if err := ip("-n " + probe + " link add v0 type veth peer name v1"); err != nil {
		return err.Error()
	}
	return ""
}

// newNetwork makes the namespace of the bridge. It has the address 254, for what
// all hosts share.
func newNetwork() (*network, error) {
	n := &network{prefix: fmt.Sprintf("acomm%d-", os.Getpid())}
	return n, n.do(n.bridge(), "addr add "+address(254)+"/24 dev br0", "link set br0 up",
		func() error { return ip("-n " + n.bridge() + " link add br0 type bridge") })
}

func (n *network) bridge() string       { return n.prefix + "bridge" }
func (n *network) host(i int) string    { return fmt.Sprintf("%sh%d", n.prefix, i) }
func address(host int) string           { return fmt.Sprintf("10.77.31.%d", host) }
func (n *network) port(host int) string { return fmt.Sprintf("port%d", host) }

// do makes a namespace, calls first in it, and runs ip with the commands there.
func (n *network) do(netns, addr, up string, first func() error) error {
	if err := ip("netns add " + netns); err != nil {
		return err
	}
	n.made = append(n.made, netns)
	if err := first(); err != nil {
		return err
	}
	for _, command := range []string{addr, up, "link set lo up"} {
		if err := ip("-n " + netns + " " + command); err != nil {
			return err
		}
	}
	return nil
}

// addHost makes the namespace of a host, and its link to the bridge.
func (n *network) addHost(i int) error {
	return n.do(n.host(i), "addr add "+address(i)+"/24 dev eth0", "link set eth0 up", func() error {
		if err := ip("-n " + n.bridge() + " link add " + n.port(i) + " type veth peer name eth0 netns " + n.host(i)); err != nil {
			return err
		}
		if err := ip("-n " + n.bridge() + " link set " + n.port(i) + " master br0"); err != nil {
			return err
		}
		return n.heal(i)
	})
}

// cut takes the cable out at the bridge.
func (n *network) cut(host int) error {
	return ip("-n " + n.bridge() + " link set " + n.port(host) + " down")
}

// heal puts it in again.
func (n *network) heal(host int) error {
	return ip("-n " + n.bridge() + " link set " + n.port(host) + " up")
}

// disturb delays what a host sends by 50 ms, and loses 1 % of it.
func (n *network) disturb(host int) error {
	return command("tc", "-n "+n.host(host)+" qdisc add dev eth0 root netem delay 50ms loss 1%")
}

// calm ends what disturb began.
func (n *network) calm(host int) error {
	return command("tc", "-n "+n.host(host)+" qdisc del dev eth0 root")
}

// remove deletes the namespaces, and with them the links.
func (n *network) remove() error {
	var failed error
	for _, netns := range n.made {
		if err := ip("netns delete " + netns); err != nil {
			failed = errors.Join(failed, err)
		}
	}
	n.made = nil
	return failed
}

func ip(args string) error { return command("ip", args) }

func command(name, args string) error {
	out, err := exec.Command(name, strings.Fields(args)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, args, err, strings.TrimSpace(string(out)))
	}
	return nil
}
