package web

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// stagger is how long one address has for itself before the next one is tried beside it (RFC 8305, section 5).
const stagger = 250 * time.Millisecond

// maxAddresses bounds the addresses of one host that are tried.
const maxAddresses = 8

type proxyKey struct{}

// withProxy says in a context which proxy a request goes through. The decision is made once, before the request, so that the dialler knows
// whether it is dialling the proxy, which the operator chose, or a host that a publisher's page named.
func withProxy(ctx context.Context, proxy *url.URL) context.Context {
	if proxy == nil {
		return ctx
	}
	return context.WithValue(ctx, proxyKey{}, proxy)
}

func proxyOf(ctx context.Context) *url.URL {
	proxy, _ := ctx.Value(proxyKey{}).(*url.URL)
	return proxy
}

// proxy returns the proxy for a URL, nil for none. It returns an error if the URL's host is one that must not be asked for, even through
// a proxy.
func (r *route) proxy(ctx context.Context, u *url.URL) (*url.URL, error) {
	host := normalHost(u.Hostname())
	if _, ok := r.settings.where(host, portOf(u)); ok {
		return nil, nil
	}
	proxy := r.rule.Proxy
	if proxy == nil {
		var err error
		if proxy, err = r.settings.cfg.Environment(u); err != nil {
			return nil, &dialError{fmt.Errorf("choosing the proxy for %s: %w", host, err)}
		}
	}
	if proxy == nil {
		return nil, nil
	}
	// Names are the proxy's to look up. An address is known here already, and the proxy stands where private ones may be reachable.
	ip, isIP := literal(host)
	switch {
	case dialsNamed(ctx):
		return proxy, nil
	case isIP:
		return proxy, r.check(host, ip)
	case endsInNumber(host):
		return nil, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "address-not-allowed", Detail: fmt.Sprintf("%q is neither a host name nor an address in its usual form", host)}
	}
	return proxy, nil
}

// literal returns the address that a host is without asking anybody: written as an address, or localhost (RFC 6761, section 6.3).
func literal(host string) (netip.Addr, bool) {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), true
	}
	ip, err := netip.ParseAddr(host)
	return ip, err == nil
}

// endsInNumber reports whether a host's last label is a number, decimal or hexadecimal: many programs read such a host as an IPv4 address
// in an odd form ("127.1", "0x7f000001").
func endsInNumber(host string) bool {
	last := host[strings.LastIndexByte(host, '.')+1:]
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return last != "" && strings.Trim(last, "0123456789") == ""
}

// checkConnect makes an error of a proxy that does not connect us; its words would otherwise stand alone.
func checkConnect(_ context.Context, proxy *url.URL, req *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return fmt.Errorf("the proxy %s answered CONNECT %s with %s", proxy.Host, req.URL.Host, resp.Status)
}

// normalHost writes a host, or host:port, in lower case and without the dot that ends a full DNS name.
func normalHost(host string) string {
	host = strings.ToLower(host)
	if name, port, err := net.SplitHostPort(host); err == nil {
		return strings.TrimSuffix(name, ".") + ":" + port
	}
	return strings.TrimSuffix(strings.Trim(host, "[]"), ".")
}

// where returns where Config.Hosts says that a host is, as host and port.
func (s *settings) where(host, port string) (string, bool) {
	at, ok := s.hosts[host+":"+port]
	if !ok {
		at, ok = s.hosts[host]
	}
	if !ok {
		return "", false
	}
	if _, err := netip.ParseAddr(at); err == nil {
		return net.JoinHostPort(at, port), true
	}
	if _, _, err := net.SplitHostPort(at); err == nil {
		return at, true
	}
	return net.JoinHostPort(strings.Trim(at, "[]"), port), true
}

// dial connects to host:port, unless other settings have taken the place of the route's by then: the error matches errReplaced if they have.
func (r *route) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	trusted := proxyOf(ctx) != nil || dialsNamed(ctx)
	// The settings are the parent because that cancels before Change returns, and what is done after a request was cancelled isn't done after Change. Nothing
	// below asks for values of the request's context.
	dialing, cancel := context.WithCancel(r.settings.current)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	conn, err := r.dialOut(dialing, network, addr, trusted)
	if r.settings.over() {
		if conn != nil {
			_ = conn.Close()
		}
		return nil, &dialError{errReplaced}
	}
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err == nil {
		shake(ctx, conn)
	}
	return conn, err
}

// dialOut connects to host:port. The addresses are looked up and checked here, and it is the checked address that is dialled: a second look-up could give
// another answer.
func (r *route) dialOut(ctx context.Context, network, addr string, trusted bool) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &dialError{err}
	}
	host = normalHost(host)
	if at, ok := r.settings.where(host, port); ok {
		trusted = true
		if host, port, err = net.SplitHostPort(at); err != nil {
			return nil, &dialError{err}
		}
	}
	ips, err := r.lookup(ctx, host)
	if err != nil {
		return nil, &dialError{err}
	}
	number, err := r.settings.cfg.Resolver.LookupPort(ctx, network, port)
	if err != nil {
		return nil, &dialError{err}
	}
	var targets []netip.AddrPort
	var refused error
	for _, ip := range ips {
		if err := r.check(host, ip); err != nil && !trusted {
			refused = err
			continue
		}
		targets = append(targets, netip.AddrPortFrom(ip.Unmap(), uint16(number)))
	}
	if len(targets) == 0 {
		return nil, refused
	}
	conn, err := r.connect(ctx, network, interleave(targets))
	if err != nil {
		return nil, &dialError{err}
	}
	return conn, nil
}

func (r *route) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip}, nil
	}
	// http.Transport lets a dial outlive its request, so the request's timeout does not bound this.
	ctx, cancel := context.WithTimeout(ctx, r.rule.Timeout)
	defer cancel()
	ips, err := r.settings.cfg.Resolver.LookupNetIP(ctx, "ip", host)
	if err == nil && len(ips) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: host, IsNotFound: true}
	}
	return ips, err
}

// interleave puts IPv6 and IPv4 addresses in turns, beginning with the family that came first, and drops those past maxAddresses.
func interleave(targets []netip.AddrPort) []netip.AddrPort {
	first := targets[0].Addr().Is4()
	var same, other, mixed []netip.AddrPort
	for _, t := range targets {
		if t.Addr().Is4() == first {
			same = append(same, t)
		} else {
			other = append(other, t)
		}
	}
	for len(same)+len(other) > 0 {
		if len(same) > 0 {
			mixed, same = append(mixed, same[0]), same[1:]
		}
		if len(other) > 0 {
			mixed, other = append(mixed, other[0]), other[1:]
		}
	}
	return mixed[:min(len(mixed), maxAddresses)]
}

// connect dials the targets in order, each with the one before it still being tried once that has had its time, and returns the first
// connection made.
func (r *route) connect(ctx context.Context, network string, targets []netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	over := make(chan struct{})
	defer close(over)
	// Each one ends when its dial does, at the latest after ConnectTimeout; nobody waits for those that lost.
	dial := func(target netip.AddrPort) {
		ctx, done := context.WithTimeout(ctx, r.settings.cfg.ConnectTimeout)
		defer done()
		var conn net.Conn
		err := ctx.Err()
		if err == nil {
			conn, err = r.settings.cfg.DialContext(ctx, network, target.String())
		}
		select {
		case results <- result{conn, err}:
		case <-over:
			if conn != nil {
				_ = conn.Close()
			}
		}
	}
	var failures []error
	patience := time.NewTimer(0)
	defer patience.Stop()
	for next := 0; len(failures) < len(targets); {
		select {
		case <-patience.C:
			if next < len(targets) {
				// Ends by itself, see above: a dial that has lost is not waited for.
				go dial(targets[next])
				next++
				patience.Reset(stagger)
			}
		case got := <-results:
			if got.err == nil {
				return got.conn, nil
			}
			failures = append(failures, got.err)
			patience.Reset(0)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if len(failures) == 1 {
		return nil, failures[0]
	}
	return nil, errors.Join(failures...)
}
