package localca

import (
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/acproxy/acproxy"
	"golang.org/x/net/publicsuffix"
)

// nobody is a domain that no host has (RFC 6761, section 6.4). A CA for IP addresses alone permits it: to permit no DNS name at all is to
// permit every one.
const nobody = "invalid"

// maxHosts bounds the hosts of a CA. The certificate carries all of them in every verifier's memory, and some give up at a few hundred.
const maxHosts = 256

// A hostSet is what a CA permits: domains with their subdomains, and IP addresses.
type hostSet struct {
	domains []string
	addrs   []netip.Addr
}

// newHostSet returns the hosts of a new CA, in the order given and without those that another one covers. It returns an error matching
// acproxy.ErrInvalid if there are none, too many, or one can't be meant.
func newHostSet(hosts []string) (hostSet, error) {
	var set hostSet
	for _, text := range hosts {
		host := canonicalHost(strings.TrimPrefix(text, "*."))
		if addr, err := netip.ParseAddr(host); err == nil {
			if addr.Zone() != "" {
				return hostSet{}, acproxy.Invalid("host %q: a certificate can't carry the zone of an address", clip(text))
			}
			if !slices.Contains(set.addrs, addr) {
				set.addrs = append(set.addrs, addr)
			}
			continue
		}
		if problem := checkDomain(host); problem != "" {
			return hostSet{}, acproxy.Invalid("host %q %s", clip(text), problem)
		}
		if !slices.Contains(set.domains, host) {
			set.domains = append(set.domains, host)
		}
	}
	set.domains = slices.DeleteFunc(set.domains, func(host string) bool {
		return slices.ContainsFunc(set.domains, func(other string) bool { return other != host && covers(other, host) })
	})
	switch n := len(set.domains) + len(set.addrs); {
	case n == 0:
		return hostSet{}, acproxy.Invalid("a CA needs the hosts that it may vouch for, such as example.com: without any it could pose as the whole internet")
	case n > maxHosts:
		return hostSet{}, acproxy.Invalid("a CA for %d hosts is too wide, the limit is %d: give the domain above them", n, maxHosts)
	}
	return set, nil
}

// constrainedTo returns what a CA's certificate permits; nothing if it doesn't say.
func constrainedTo(cert *x509.Certificate) hostSet {
	var set hostSet
	for _, domain := range cert.PermittedDNSDomains {
		if domain != nobody && domain != "" {
			set.domains = append(set.domains, strings.ToLower(strings.TrimPrefix(domain, ".")))
		}
	}
	for _, network := range cert.PermittedIPRanges {
		addr, ok := netip.AddrFromSlice(network.IP)
		// A wider range was not made here; leaving it out only makes us mint less.
		if ones, bits := network.Mask.Size(); ok && ones == bits {
			set.addrs = append(set.addrs, addr.Unmap())
		}
	}
	return set
}

// constrain writes the set into the certificate of a new CA. Every kind of name that a TLS client looks for is limited, permitted or not.
func (s hostSet) constrain(cert *x509.Certificate) {
	cert.PermittedDNSDomains = s.domains
	if len(s.domains) == 0 {
		cert.PermittedDNSDomains = []string{nobody}
	}
	families := map[bool]bool{}
	for _, addr := range s.addrs {
		families[addr.Is4()] = true
		cert.PermittedIPRanges = append(cert.PermittedIPRanges, &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())})
	}
	// A family with a permitted address has every other address of it refused by that alone, and excluding it would take that one along.
	if !families[true] {
		cert.ExcludedIPRanges = append(cert.ExcludedIPRanges, &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)})
	}
	if !families[false] {
		cert.ExcludedIPRanges = append(cert.ExcludedIPRanges, &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)})
	}
}

// permits reports whether a canonical host may have a certificate.
func (s hostSet) permits(host string) bool {
	if addr, err := netip.ParseAddr(host); err == nil {
		return slices.Contains(s.addrs, addr)
	}
	return checkName(host) == "" && slices.ContainsFunc(s.domains, func(domain string) bool { return covers(domain, host) })
}

func (s hostSet) names() []string {
	names := slices.Clone(s.domains)
	for _, addr := range s.addrs {
		names = append(names, addr.String())
	}
	return names
}

// String returns the hosts as a sentence carries them, the first few if there are many.
func (s hostSet) String() string {
	names := s.names()
	const most = 8
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// canonicalHost returns a host in lower case, without a trailing dot, an IP address without brackets and in its shortest form.
func canonicalHost(host string) string {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if inner, ok := strings.CutPrefix(host, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.Unmap().String()
	}
	return host
}

// covers reports whether a name constraint for domain permits host, as RFC 5280 (section 4.2.1.10) says.
func covers(domain, host string) bool {
	return host == domain || strings.HasSuffix(host, "."+domain)
}

// checkDomain says what is wrong with a canonical host that a CA is to be made for, "" if nothing is.
func checkDomain(host string) string {
	if problem := checkName(host); problem != "" {
		return problem
	}
	if suffix, icann := publicsuffix.PublicSuffix(host); icann && suffix == host {
		return "is a public suffix: everybody's hosts are under it; give the hosts of the images"
	}
	if host == nobody {
		return "is reserved: no host is called that"
	}
	return ""
}

// checkName says what is wrong with a canonical DNS name, "" if nothing is: letters, digits and hyphens (RFC 1123, section 2.1).
func checkName(host string) string {
	switch {
	case host == "":
		return "is empty: give a host such as example.com"
	case strings.Contains(host, "/"):
		return "is not a host: give it without scheme and path, as example.com"
	case strings.Contains(host, ":"):
		return "is not a host: give it without the port, as a certificate is good for all of them"
	case strings.Contains(host, "*"):
		return "has a wildcard: a host covers its subdomains without one"
	case len(host) > 253:
		return "is longer than the 253 bytes that a host may have"
	}
	var label string
	for label = range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "is not a host: between the dots stand 1 to 63 letters, digits and hyphens, no hyphen first or last"
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return "is not a host: it may hold letters, digits, hyphens and dots (write other scripts in their xn-- form)"
			}
		}
	}
	if strings.Trim(label, "0123456789") == "" {
		return "is not an IP address, yet ends in a number, which no host does"
	}
	return ""
}
