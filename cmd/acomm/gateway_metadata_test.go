package main

import (
	"net/url"
	"strings"
	"testing"

	"github.com/mistifyio/acomm"
	"github.com/stretchr/testify/require"
)

// Hazard: a hook reads or changes what a cloud tells its machines alone. The addresses
// are those that the clouds publish.
func TestGateway_MetadataServicesOfTheCloudsAreNoHooks(t *testing.T) {
	t.Parallel()
	g := startGateway(t)
	for cloud, addrs := range map[string]string{
		"Amazon EC2":                 "169.254.169.254 fd00:ec2::254",
		"Amazon ECS":                 "169.254.170.2",
		"Amazon EKS":                 "169.254.170.23 fd00:ec2::23",
		"Amazon DNS and time":        "169.254.169.253 fd00:ec2::253 169.254.169.123 fd00:ec2::123",
		"Azure":                      "169.254.169.254 168.63.129.16",
		"Google":                     "169.254.169.254 fd20:ce::254",
		"Oracle":                     "169.254.169.254 fd00:c1::a9fe:a9fe 192.0.0.192",
		"Alibaba":                    "100.100.100.200",
		"Tencent":                    "169.254.0.23",
		"Akamai (Linode)":            "169.254.169.254 fd00:a9fe:a9fe::1",
		"Scaleway":                   "169.254.42.42 fd00:42::42",
		"OpenStack":                  "169.254.169.254 fe80::a9fe:a9fe",
		"IPv4 in IPv6":               "::ffff:168.63.129.16 64:ff9b::168.63.129.16 2002:a83f:8110::1",
		"this machine, unspecified":  "0.0.0.0 ::",
		"IBM, Hetzner, DigitalOcean": "169.254.169.254",
		"Huawei, Exoscale, Vultr":    "169.254.169.254",
	} {
		for addr := range strings.FieldsSeq(addrs) {
			host := addr
			if strings.Contains(addr, ":") {
				host = "[" + addr + "]"
			}
			hook := &url.URL{Scheme: "http", Host: host, Path: "/"}
			err := acomm.Send(g.url, gwRequest(t, "echo", hook.String(), 1))
			require.ErrorContains(t, err, "hooks may not lead to this address", "%s: %s", cloud, addr)
			require.ErrorContains(t, err, "400", cloud)
		}
	}
	for _, addr := range []string{"168.63.129.17", "[fd00:ec3::254]", "[fd00:43::42]", "100.100.100.201", "10.0.0.1"} {
		err := acomm.Send(g.url, gwRequest(t, "nobody", "http://"+addr+"/", 1))
		require.ErrorContains(t, err, "nobody provides", addr)
	}
	g.stop()
}
