package web

import (
	"fmt"
	"net/netip"

	"github.com/acproxy/acproxy"
)

// special are the addresses that are not publishers' on the public internet, from the IANA special-purpose address registries
// (RFC 6890 and what came after), and those at which clouds answer their machines with credentials.
var special = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("169.254.169.254/32"), "cloud metadata"},
	{netip.MustParsePrefix("168.63.129.16/32"), "cloud metadata"}, // Azure's, out of a public range
	{netip.MustParsePrefix("100.100.100.200/32"), "cloud metadata"},
	{netip.MustParsePrefix("fd00:ec2::254/128"), "cloud metadata"},
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("10.0.0.0/8"), "private"},
	{netip.MustParsePrefix("100.64.0.0/10"), "private (carrier-grade NAT)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("172.16.0.0/12"), "private"},
	{netip.MustParsePrefix("192.0.0.0/24"), "reserved"},
	{netip.MustParsePrefix("192.0.2.0/24"), "documentation"},
	{netip.MustParsePrefix("192.88.99.0/24"), "reserved"},
	{netip.MustParsePrefix("192.168.0.0/16"), "private"},
	{netip.MustParsePrefix("198.18.0.0/15"), "benchmarking"},
	{netip.MustParsePrefix("198.51.100.0/24"), "documentation"},
	{netip.MustParsePrefix("203.0.113.0/24"), "documentation"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("2001::/23"), "reserved"}, // Teredo, benchmarking and ORCHID among them
	{netip.MustParsePrefix("2001:db8::/32"), "documentation"},
	{netip.MustParsePrefix("3fff::/20"), "documentation"},
	{netip.MustParsePrefix("fc00::/7"), "private"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

var (
	globalUnicast = netip.MustParsePrefix("2000::/3") // all that IANA has given out of IPv6 (RFC 4291, section 2.4)
	nat64         = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour     = netip.MustParsePrefix("2002::/16")
)

// check returns an error matching acproxy.ErrRefused unless the address of a host is a public one or listed.
func (r *route) check(host string, ip netip.Addr) error {
	what := kind(ip)
	if what == "" || r.listed(ip) {
		return nil
	}
	is := "has the address " + ip.String()
	if host == ip.String() {
		is = "is an address"
	}
	return &acproxy.Error{Kind: acproxy.ErrRefused, Code: "address-not-allowed", Detail: fmt.Sprintf(
		"%s %s, which is %s: only public addresses are dialled, unless dial.allow (or the publisher's allow_addresses) in the configuration lists it", host, is, what)}
}

func (r *route) listed(ip netip.Addr) bool {
	for _, a := range []netip.Addr{ip.WithZone("").Unmap(), embedded(ip)} {
		for _, prefix := range r.allow {
			if prefix.Contains(a) {
				return true
			}
		}
	}
	return false
}

// kind returns what sort of address it is, "" for one that is globally routable unicast.
func kind(ip netip.Addr) string {
	ip = ip.WithZone("").Unmap()
	if v4 := embedded(ip); v4.IsValid() {
		if what := kind(v4); what != "" {
			return what + " (" + v4.String() + ") in an IPv6 address"
		}
		return ""
	}
	for _, s := range special {
		if s.prefix.Contains(ip) {
			return s.what
		}
	}
	if ip.Is4() || globalUnicast.Contains(ip) {
		return ""
	}
	return "reserved"
}

// embedded returns the IPv4 address that an IPv6 address leads to by NAT64 (RFC 6052) or 6to4 (RFC 3056), the invalid Addr for none.
func embedded(ip netip.Addr) netip.Addr {
	b := ip.As16()
	switch ip = ip.WithZone(""); {
	case nat64.Contains(ip):
		return netip.AddrFrom4([4]byte(b[12:16]))
	case sixToFour.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6]))
	}
	return netip.Addr{}
}
