package web

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/test/publisher"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noProxy is an environment that names no proxy.
func noProxy(*url.URL) (*url.URL, error) { return nil, nil }

// serve starts a TLS server, closed at the end of the test, and returns it with its authority.
func serve(t *testing.T, handler http.HandlerFunc) (*httptest.Server, *x509.CertPool) {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, pool(s)
}

func pool(s *httptest.Server) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(s.Certificate())
	return p
}

// client returns a client, closed at the end of the test, that reads no proxy from the environment.
func client(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.Environment == nil {
		cfg.Environment = noProxy
	}
	c := New(cfg)
	t.Cleanup(c.Close)
	return c
}

// names is a resolver that knows these names, and asks nobody.
func names(known map[string][]string) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go answerDNS(theirs, known)
		return ours, nil
	}}
}

// answerDNS answers as over TCP until the other side closes.
func answerDNS(conn net.Conn, known map[string][]string) {
	defer conn.Close()
	for {
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(query); err != nil {
			return
		}
		q := m.Questions[0]
		addresses, ok := known[strings.TrimSuffix(q.Name.String(), ".")]
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		if !ok {
			m.RCode = dnsmessage.RCodeNameError
		}
		for _, s := range addresses {
			ip := netip.MustParseAddr(s)
			h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1}
			switch {
			case q.Type == dnsmessage.TypeA && ip.Is4():
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: ip.As4()}})
			case q.Type == dnsmessage.TypeAAAA && ip.Is6():
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}})
			}
		}
		packed, err := m.Pack()
		if err != nil {
			return
		}
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(packed))), packed...)); err != nil {
			return
		}
	}
}

// codeOf returns the code of an error, or its text if it has none.
func codeOf(err error) string {
	var e *acproxy.Error
	if !errors.As(err, &e) {
		return fmt.Sprint(err)
	}
	return e.Code
}

func checkError(t *testing.T, err error, kind error, code string) {
	t.Helper()
	if !errors.Is(err, kind) || codeOf(err) != code {
		t.Fatalf("error = %v (%s), want %v (%s)", err, codeOf(err), kind, code)
	}
	var e *acproxy.Error
	if errors.As(err, &e) && len(e.Trace) == 0 {
		t.Errorf("error %v has no trace", err)
	}
}

func read(t *testing.T, resp *http.Response) string {
	t.Helper()
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the body: %v", err)
	}
	return string(b)
}

func TestKindsOfAddress(t *testing.T) {
	tests := []struct{ ip, want string }{
		{"8.8.8.8", ""}, {"1.1.1.1", ""}, {"9.255.255.255", ""}, {"10.0.0.0", "private"}, {"10.255.255.255", "private"}, {"11.0.0.0", ""},
		{"100.63.255.255", ""}, {"100.64.0.0", "private (carrier-grade NAT)"}, {"100.127.255.255", "private (carrier-grade NAT)"}, {"100.128.0.0", ""},
		{"172.15.255.255", ""}, {"172.16.0.0", "private"}, {"172.31.255.255", "private"}, {"172.32.0.0", ""}, {"192.168.0.1", "private"}, {"192.169.0.0", ""},
		{"0.0.0.0", "unspecified"}, {"0.1.2.3", "unspecified"}, {"127.0.0.1", "loopback"}, {"127.255.255.255", "loopback"}, {"128.0.0.0", ""},
		{"169.254.169.254", "cloud metadata"}, {"169.254.1.1", "link-local"}, {"168.63.129.16", "cloud metadata"}, {"100.100.100.200", "cloud metadata"},
		{"192.0.0.192", "reserved"}, {"192.0.2.1", "documentation"}, {"198.18.0.1", "benchmarking"}, {"198.19.255.255", "benchmarking"}, {"198.20.0.0", ""},
		{"198.51.100.7", "documentation"}, {"203.0.113.7", "documentation"}, {"223.255.255.255", ""}, {"224.0.0.1", "multicast"}, {"239.255.255.255", "multicast"},
		{"240.0.0.1", "reserved"}, {"255.255.255.255", "reserved"},
		{"2606:4700::1111", ""}, {"::", "unspecified"}, {"::1", "loopback"}, {"::7f00:1", "reserved"}, {"fe80::1", "link-local"}, {"fe80::1%eth0", "link-local"},
		{"fc00::1", "private"}, {"fdff::1", "private"}, {"fd00:ec2::254", "cloud metadata"}, {"ff02::1", "multicast"}, {"fec0::1", "reserved"},
		{"2001:db8::1", "documentation"}, {"3fff::1", "documentation"}, {"2001::1", "reserved"}, {"2001:2::1", "reserved"}, {"2001:200::1", ""},
		{"100::1", "reserved"}, {"4000::1", "reserved"}, {"64:ff9b:1::1", "reserved"},
		{"::ffff:8.8.8.8", ""}, {"::ffff:127.0.0.1", "loopback"}, {"::ffff:169.254.169.254", "cloud metadata"},
		{"64:ff9b::8.8.8.8", ""}, {"64:ff9b::10.0.0.1", "private (10.0.0.1) in an IPv6 address"}, {"2002:0808:0808::1", ""},
		{"2002:7f00:1::1", "loopback (127.0.0.1) in an IPv6 address"}, {"2606:4700::1%eth0", ""},
	}
	for _, tt := range tests {
		if got := kind(netip.MustParseAddr(tt.ip)); got != tt.want {
			t.Errorf("kind(%s) = %q, want %q", tt.ip, got, tt.want)
		}
	}
}

// TestDialling looks names up with a resolver of its own and notes which addresses are dialled; all of them lead to one test server.
func TestDialling(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello from ", r.Host) })
	dns := names(map[string][]string{
		"public.example.com":   {"8.8.4.4"},
		"private.example.com":  {"10.0.0.7"},
		"metadata.example.com": {"169.254.169.254"},
		"mixed.example.com":    {"127.0.0.1", "8.8.4.4"},
		"six.example.com":      {"2606:4700::1"},
		"mapped.example.com":   {"64:ff9b::a00:7"},
		"nowhere.example.com":  {},
	})
	allow := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	tests := []struct {
		name   string
		host   string
		cfg    Config
		rule   Rule
		dialed []string
		code   string // of the refusal
	}{
		{name: "a public address is dialled", host: "public.example.com", dialed: []string{"8.8.4.4:443"}},
		{name: "a public IPv6 address is dialled", host: "six.example.com", dialed: []string{"[2606:4700::1]:443"}},
		{name: "a port is kept", host: "public.example.com:8443", dialed: []string{"8.8.4.4:8443"}},
		{name: "a private address is not", host: "private.example.com", code: "address-not-allowed"},
		{name: "a metadata address is not", host: "metadata.example.com", code: "address-not-allowed"},
		{name: "of several addresses the forbidden are left out", host: "mixed.example.com", dialed: []string{"8.8.4.4:443"}},
		{name: "a literal loopback address is not dialled", host: "127.0.0.1", code: "address-not-allowed"},
		{name: "a literal mapped address is not dialled", host: "[::ffff:127.0.0.1]", code: "address-not-allowed"},
		{name: "a private address hidden in NAT64 is not dialled", host: "mapped.example.com", code: "address-not-allowed"},
		{name: "a private address in NAT64 that is listed is", host: "mapped.example.com", rule: Rule{Allow: allow("10.0.0.0/8")}, dialed: []string{"[64:ff9b::a00:7]:443"}},
		{name: "a private address that the rule lists is dialled", host: "private.example.com", rule: Rule{Allow: allow("10.0.0.7/32")}, dialed: []string{"10.0.0.7:443"}},
		{name: "one that everybody's list has is dialled", host: "private.example.com", cfg: Config{Allow: allow("10.0.0.0/8")}, dialed: []string{"10.0.0.7:443"}},
		{name: "the neighbour of a listed address is not", host: "private.example.com", rule: Rule{Allow: allow("10.0.0.6/32")}, code: "address-not-allowed"},
		{name: "another prefix's list does not help", host: "private.example.com", rule: Rule{Prefix: "example.com/other", Allow: allow("10.0.0.0/8")}, code: "address-not-allowed"},
		{name: "hosts go before DNS, unchecked", host: "public.example.com", cfg: Config{Hosts: map[string]string{"Public.Example.com": "10.1.1.1"}}, dialed: []string{"10.1.1.1:443"}},
		{name: "hosts may change the port", host: "public.example.com", cfg: Config{Hosts: map[string]string{"public.example.com": "10.1.1.1:8443"}}, dialed: []string{"10.1.1.1:8443"}},
		{name: "hosts for a port go before hosts for all", host: "public.example.com", cfg: Config{Hosts: map[string]string{"public.example.com": "10.1.1.1", "public.example.com:443": "[::1]:8443"}}, dialed: []string{"[::1]:8443"}},
		{name: "hosts for another port do not count", host: "public.example.com", cfg: Config{Hosts: map[string]string{"public.example.com:444": "10.1.1.1"}}, dialed: []string{"8.8.4.4:443"}},
		{name: "hosts may name another host", host: "public.example.com", cfg: Config{Hosts: map[string]string{"public.example.com": "private.example.com:8443"}}, dialed: []string{"10.0.0.7:8443"}},
		{name: "hosts may say an IPv6 address without a port", host: "public.example.com", cfg: Config{Hosts: map[string]string{"public.example.com": "fd00::1"}}, dialed: []string{"[fd00::1]:443"}},
		{name: "a name that is not there is unreachable", host: "gone.example.com", code: "publisher-unreachable"},
		{name: "a name without addresses is unreachable", host: "nowhere.example.com", code: "publisher-unreachable"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var mu sync.Mutex
			var dialed []string
			cfg := tt.cfg
			rule := tt.rule
			rule.RootCAs = ca
			cfg.Rules = []Rule{rule, {RootCAs: ca}}
			if rule.Prefix == "" {
				cfg.Rules = cfg.Rules[:1]
			}
			cfg.Resolver = dns
			cfg.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				mu.Lock()
				dialed = append(dialed, addr)
				mu.Unlock()
				return (&net.Dialer{}).DialContext(ctx, network, s.Listener.Addr().String())
			}
			c := client(t, cfg)
			resp, trace, err := c.Get(t.Context(), "example.com/app", "image", "https://"+tt.host+"/x", nil)
			if tt.code != "" {
				kind := acproxy.ErrRefused
				if tt.code == "publisher-unreachable" {
					kind = acproxy.ErrPublisher
				}
				checkError(t, err, kind, tt.code)
				if Unreachable(err) != (tt.code == "publisher-unreachable") {
					t.Errorf("Unreachable = %v", Unreachable(err))
				}
				if tt.code == "address-not-allowed" && !strings.Contains(err.Error(), "dial.allow") {
					t.Errorf("error %q does not name the configuration key", err)
				}
				if len(dialed) > 0 {
					t.Errorf("dialled %v, want nothing", dialed)
				}
				return
			}
			if err != nil {
				t.Fatalf("Get: %v", err)
			}
			if got := read(t, resp); got != "hello from "+tt.host {
				t.Errorf("body = %q", got)
			}
			if !slices.Equal(dialed, tt.dialed) {
				t.Errorf("dialled %v, want %v", dialed, tt.dialed)
			}
			if len(trace) != 1 || trace[0].Status != 200 || trace[0].What != "image" || trace[0].Took <= 0 {
				t.Errorf("trace = %+v", trace)
			}
		})
	}
}

// TestAddressAfterAddress: the first address gives no connection, the second does.
func TestAddressAfterAddress(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {})
	for _, first := range []string{"refuses", "is silent"} {
		t.Run("the first address "+first, func(t *testing.T) {
			c := client(t, Config{
				Rules:    []Rule{{RootCAs: ca}},
				Resolver: names(map[string][]string{"two.example.com": {"8.8.4.4", "2606:4700::1"}}),
				DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
					if addr != "8.8.4.4:443" {
						return (&net.Dialer{}).DialContext(ctx, network, s.Listener.Addr().String())
					}
					if first == "refuses" {
						return nil, errors.New("refused")
					}
					<-ctx.Done()
					return nil, ctx.Err()
				},
			})
			resp, _, err := c.Get(t.Context(), "example.com", "image", "https://two.example.com/", nil)
			if err != nil {
				t.Fatalf("Get: %v", err)
			}
			resp.Body.Close()
		})
	}
	t.Run("all are silent", func(t *testing.T) {
		c := client(t, Config{
			Resolver:       names(map[string][]string{"two.example.com": {"8.8.4.4"}}),
			ConnectTimeout: 20 * time.Millisecond,
			DialContext:    func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() },
		})
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://two.example.com/", nil)
		checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
		if !Unreachable(err) {
			t.Error("Unreachable = false for a host that could not be connected to")
		}
	})
}

func TestInterleave(t *testing.T) {
	var targets []netip.AddrPort
	for i := range 10 {
		targets = append(targets, netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, 8, 8, byte(i)}), 1))
	}
	targets = append(targets, netip.MustParseAddrPort("[2606::1]:1"))
	got := interleave(targets)
	if len(got) != maxAddresses || got[0] != targets[0] || got[1] != targets[10] || got[2] != targets[1] {
		t.Errorf("interleave = %v", got)
	}
}

func TestURLsAndRedirects(t *testing.T) {
	const most = 3
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "plain") }))
	t.Cleanup(plain.Close)
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var n int
		switch {
		case r.URL.Path == "/to-password":
			w.Header().Set("Location", "https://user:sesame@example.com/x")
			w.WriteHeader(http.StatusFound)
		case r.URL.Path == "/to":
			var status int
			fmt.Sscan(r.URL.Query().Get("status"), &status)
			if l := r.URL.Query().Get("l"); l != "" {
				w.Header().Set("Location", l)
			}
			w.WriteHeader(status)
		case strings.HasPrefix(r.URL.Path, "/down/"):
			fmt.Sscan(strings.TrimPrefix(r.URL.Path, "/down/"), &n)
			if n == 0 {
				fmt.Fprint(w, "bottom")
				return
			}
			http.Redirect(w, r, fmt.Sprintf("/down/%d", n-1), http.StatusFound)
		default:
			fmt.Fprint(w, "secure")
		}
	})
	hosts := map[string]string{"example.com": s.Listener.Addr().String(), "example.com:80": plain.Listener.Addr().String()}
	to := func(status int, location string) string {
		return fmt.Sprintf("https://example.com/to?status=%d&l=%s", status, url.QueryEscape(location))
	}
	tests := []struct {
		name   string
		url    string
		http   bool
		status int // 0: an error
		hops   int
		kind   error
		code   string
	}{
		{name: "301", url: to(301, "/x"), status: 200, hops: 2},
		{name: "302", url: to(302, "https://example.com/x"), status: 200, hops: 2},
		{name: "303", url: to(303, "/x#fragment"), status: 200, hops: 2},
		{name: "307", url: to(307, "//example.com/x"), status: 200, hops: 2},
		{name: "308", url: to(308, "x"), status: 200, hops: 2},
		{name: "a redirect without a location is an answer", url: to(302, ""), status: 302, hops: 1},
		{name: "300 is an answer", url: to(300, "/x"), status: 300, hops: 1},
		{name: "304 is an answer", url: to(304, "/x"), status: 304, hops: 1},
		{name: "202 is an answer", url: to(202, "/x"), status: 202, hops: 1},
		{name: "404 is an answer", url: to(404, "/x"), status: 404, hops: 1},
		{name: "503 is an answer", url: to(503, "/x"), status: 503, hops: 1},
		{name: "as many redirects as allowed", url: fmt.Sprintf("https://example.com/down/%d", most), status: 200, hops: most + 1},
		{name: "one redirect more than allowed", url: fmt.Sprintf("https://example.com/down/%d", most+1), hops: most + 1, kind: acproxy.ErrPublisher, code: "too-many-redirects"},
		{name: "https to http", url: to(302, "http://example.com/x"), hops: 1, kind: acproxy.ErrRefused, code: "insecure-url"},
		{name: "https to http where http is allowed", url: to(302, "http://example.com/x"), http: true, status: 200, hops: 2},
		{name: "http", url: "http://example.com/x", hops: 1, kind: acproxy.ErrRefused, code: "insecure-url"},
		{name: "http where it is allowed", url: "http://example.com/x", http: true, status: 200, hops: 1},
		{name: "another scheme", url: "ftp://example.com/x", hops: 1, kind: acproxy.ErrRefused, code: "unsupported-scheme"},
		{name: "a redirect to another scheme", url: to(302, "file:///etc/passwd"), hops: 2, kind: acproxy.ErrRefused, code: "unsupported-scheme"},
		{name: "a password", url: "https://user:sesame@example.com/x", hops: 1, kind: acproxy.ErrRefused, code: "credentials-in-url"},
		{name: "a redirect with a password", url: "https://example.com/to-password", hops: 2, kind: acproxy.ErrRefused, code: "credentials-in-url"},
		{name: "a redirect to a private address", url: to(302, "https://127.0.0.1/x"), hops: 2, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "a redirect to nonsense", url: to(302, "https://exa mple.com/x"), hops: 1, kind: acproxy.ErrPublisher, code: "bad-redirect"},
		{name: "nonsense", url: "https://user:sesame@exa mple.com/x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
		{name: "nonsense with a slash in the password", url: "https://user:sesame/sesame@example.com:x/x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
		{name: "a host that is not text", url: "https://example.com%ff/x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
		{name: "a host that moves the cursor", url: "https://%c2%9b2J.example.com/x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
		{name: "a host that is too long", url: "https://" + strings.Repeat("a.", 200) + "com/x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
		{name: "no host", url: "https:///x", hops: 1, kind: acproxy.ErrPublisher, code: "bad-url"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := client(t, Config{Rules: []Rule{{HTTP: tt.http, RootCAs: ca}}, Hosts: hosts, MaxRedirects: most})
			resp, trace, err := c.Get(t.Context(), "example.com/app", "signature", tt.url, nil)
			if len(trace) != tt.hops {
				t.Errorf("%d attempts, want %d: %v", len(trace), tt.hops, trace)
			}
			if strings.Contains(fmt.Sprint(trace, err), "sesame") {
				t.Errorf("a password is shown: %v, %v", trace, err)
			}
			if tt.status == 0 {
				checkError(t, err, tt.kind, tt.code)
				if trace[len(trace)-1].Err == "" {
					t.Errorf("the last attempt has no error: %+v", trace)
				}
				return
			}
			if err != nil {
				t.Fatalf("Get: %v", err)
			}
			read(t, resp)
			if resp.StatusCode != tt.status || trace[len(trace)-1].Status != tt.status {
				t.Errorf("status = %d, want %d", resp.StatusCode, tt.status)
			}
			if len(trace) > 1 && !strings.HasPrefix(trace[0].Note, "redirects to http") {
				t.Errorf("note = %q", trace[0].Note)
			}
		})
	}
	t.Run("no redirects at all", func(t *testing.T) {
		c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Hosts: hosts, MaxRedirects: -1})
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/down/1", nil)
		checkError(t, err, acproxy.ErrPublisher, "too-many-redirects")
	})
}

func TestHeadersAcrossRedirects(t *testing.T) {
	var mu sync.Mutex
	seen := make(map[string]http.Header)
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Host+r.URL.Path] = r.Header.Clone()
		mu.Unlock()
		switch r.Host + r.URL.Path {
		case "example.com/1":
			http.Redirect(w, r, "/2", http.StatusFound)
		case "example.com/2":
			http.Redirect(w, r, "https://example.com:8443/3", http.StatusFound)
		case "example.com:8443/3":
			http.Redirect(w, r, "https://EXAMPLE.com:443/4", http.StatusFound)
		}
	})
	c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, Via: "token-7", UserAgent: "acproxy/1"})
	given := http.Header{"Range": {"bytes=5-"}, "If-Range": {`"x"`}, "If-None-Match": {`"y"`}, "Authorization": {"Basic x"}, "Cookie": {"a=b"}, "Proxy-Authorization": {"Basic y"}}
	resp, _, err := c.Get(t.Context(), "example.com/app", "image", "https://example.com/1", given)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Errorf("protocol = %s, want HTTP/2", resp.Proto)
	}
	if given.Get("Authorization") == "" || given.Get("Via") != "" {
		t.Errorf("the caller's header was changed: %v", given)
	}
	for page, secrets := range map[string]bool{"example.com/1": true, "example.com/2": true, "example.com:8443/3": false, "EXAMPLE.com:443/4": false} {
		h, ok := seen[page]
		if !ok {
			t.Fatalf("%s was not asked for: %v", page, seen)
		}
		for _, name := range []string{"Range", "If-Range", "If-None-Match"} {
			if h.Get(name) != given.Get(name) {
				t.Errorf("%s: %s = %q", page, name, h.Get(name))
			}
		}
		for _, name := range []string{"Authorization", "Cookie"} {
			if (h.Get(name) != "") != secrets {
				t.Errorf("%s: %s = %q, wanted: %v", page, name, h.Get(name), secrets)
			}
		}
		if h.Get("Via") != "1.1 token-7" || h.Get("User-Agent") != "acproxy/1" || h.Get("Accept-Encoding") != "identity" {
			t.Errorf("%s: header = %v", page, h)
		}
	}
}

func TestNothingIsDecoded(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	fmt.Fprint(z, "an image")
	z.Close()
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(packed.Bytes())
	})
	c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}})
	resp, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/", http.Header{"Accept-Encoding": {"gzip"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, resp); got != packed.String() {
		t.Errorf("body = %q, want it as sent", got)
	}
}

func TestOffline(t *testing.T) {
	c := client(t, Config{
		Offline: true,
		Hosts:   map[string]string{"example.com": "127.0.0.1:1"},
		Resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			t.Error("a name was looked up")
			return nil, io.EOF
		}},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			t.Error("somebody was dialled")
			return nil, io.EOF
		},
		Environment: func(*url.URL) (*url.URL, error) { t.Error("a proxy was chosen"); return nil, nil },
	})
	for _, u := range []string{"https://example.com/", "https://other.example.com/", "https://8.8.8.8/"} {
		_, trace, err := c.Get(t.Context(), "example.com", "image", u, nil)
		checkError(t, err, acproxy.ErrOffline, "offline")
		if len(trace) != 1 {
			t.Errorf("trace = %v", trace)
		}
	}
}

// TestTrouble has servers that misbehave on the connection itself.
func TestTrouble(t *testing.T) {
	tests := []struct {
		name   string
		handle func(w http.ResponseWriter, r *http.Request)
		cfg    Config
		body   bool // the error comes with the body
		kind   error
		code   string
	}{
		{name: "no answer", handle: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, cfg: Config{Timeout: 50 * time.Millisecond}, kind: acproxy.ErrTimeout, code: "publisher-timeout"},
		{name: "a body that stalls", handle: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "some")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, cfg: Config{StallTimeout: 50 * time.Millisecond}, body: true, kind: acproxy.ErrTimeout, code: "publisher-timeout"},
		{name: "a body that ends short", handle: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "some")
		}, body: true, kind: acproxy.ErrPublisher, code: "publisher-cut"},
		{name: "a body that is reset", handle: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "some")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, body: true, kind: acproxy.ErrPublisher, code: "publisher-cut"},
		{name: "a connection closed before the answer", handle: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, kind: acproxy.ErrPublisher, code: "publisher-cut"},
		{name: "headers without end", handle: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 10_000))
		}, cfg: Config{MaxHeaderBytes: 5_000}, kind: acproxy.ErrPublisher, code: "publisher-protocol"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := httptest.NewUnstartedServer(http.HandlerFunc(tt.handle)) // HTTP/1.1: HTTP/2 has resets of its own kind
			s.Config.ErrorLog = log.New(io.Discard, "", 0)
			s.StartTLS()
			defer s.Close()
			cfg := tt.cfg
			cfg.Rules = []Rule{{RootCAs: pool(s)}}
			cfg.Hosts = map[string]string{"example.com": s.Listener.Addr().String()}
			c := client(t, cfg)
			resp, trace, err := c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
			if tt.body {
				if err != nil {
					t.Fatalf("Get: %v", err)
				}
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if trace[0].Err != "" {
					t.Errorf("the trace was changed after it was returned: %v", trace)
				}
			}
			checkError(t, err, tt.kind, tt.code)
			if Unreachable(err) {
				t.Error("Unreachable = true for a server that was connected to")
			}
			var e *acproxy.Error
			if errors.As(err, &e); e.Trace[0].Err == "" {
				t.Errorf("the error's trace does not say why: %v", e.Trace)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		c := client(t, Config{Hosts: map[string]string{"example.com": l.Addr().String()}})
		_, _, err = c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
		checkError(t, err, acproxy.ErrPublisher, "publisher-unreachable")
		if !Unreachable(err) {
			t.Error("Unreachable = false")
		}
	})
	t.Run("a certificate of a stranger", func(t *testing.T) {
		s, _ := serve(t, func(http.ResponseWriter, *http.Request) {})
		c := client(t, Config{Rules: []Rule{{RootCAs: x509.NewCertPool()}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}})
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
		checkError(t, err, acproxy.ErrPublisher, "publisher-tls")
		if Unreachable(err) {
			t.Error("Unreachable = true")
		}
	})
	t.Run("http where https is expected", func(t *testing.T) {
		s := httptest.NewServer(http.NotFoundHandler())
		defer s.Close()
		c := client(t, Config{Hosts: map[string]string{"example.com": s.Listener.Addr().String()}})
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
		checkError(t, err, acproxy.ErrPublisher, "publisher-tls")
	})
}

// TestSlowReader: the stall timeout is the publisher's, not the reader's.
func TestSlowReader(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "abc") })
	c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, StallTimeout: 500 * time.Millisecond, Timeout: 500 * time.Millisecond})
	resp, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(600 * time.Millisecond) // time passing is what is tested here
	if got := read(t, resp); got != "abc" {
		t.Errorf("body = %q", got)
	}
}

func TestCancelledByTheCaller(t *testing.T) {
	asked := make(chan struct{})
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			fmt.Fprint(w, "some")
			w.(http.Flusher).Flush()
		}
		asked <- struct{}{}
		<-r.Context().Done()
	})
	c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}})
	why := errors.New("the node went away")
	for _, path := range []string{"/headers", "/body"} {
		t.Run(path, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if path == "/headers" {
				go func() { <-asked; cancel(why) }()
			}
			resp, _, err := c.Get(ctx, "example.com", "image", "https://example.com"+path, nil)
			if path == "/body" {
				if err != nil {
					t.Fatal(err)
				}
				go func() { <-asked; cancel(why) }()
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if !errors.Is(err, context.Canceled) || !errors.Is(err, why) || errors.Is(err, acproxy.ErrTimeout) || errors.Is(err, acproxy.ErrPublisher) {
				t.Errorf("error = %v, want the caller's own", err)
			}
		})
	}
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		<-ctx.Done()
		_, _, err := c.Get(ctx, "example.com", "image", "https://example.com/headers", nil)
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, acproxy.ErrTimeout) {
			t.Errorf("error = %v, want the caller's own", err)
		}
	})
}

func TestProxy(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "behind the proxy") })
	var mu sync.Mutex
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.Method+" "+r.Host)
		mu.Unlock()
		if r.Method != http.MethodConnect {
			fmt.Fprint(w, "from the proxy")
			return
		}
		if strings.HasPrefix(r.Host, "forbidden.") {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		to, err := net.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		from, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(from, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { io.Copy(to, from); to.Close() }()
		io.Copy(from, to)
		from.Close()
	}))
	t.Cleanup(proxy.Close)
	at, _ := url.Parse(proxy.URL)
	at.User = url.UserPassword("user", "sesame")
	tests := []struct {
		name  string
		url   string
		rule  Rule
		cfg   Config
		asked []string
		kind  error
		code  string
	}{
		{name: "https is tunnelled", url: "https://a.example.com/", rule: Rule{Proxy: at}, asked: []string{"CONNECT a.example.com:443"}},
		{name: "http is asked of the proxy", url: "http://a.example.com/", rule: Rule{Proxy: at, HTTP: true}, asked: []string{"GET a.example.com"}},
		{name: "the environment's proxy", url: "https://a.example.com/", cfg: Config{Environment: func(*url.URL) (*url.URL, error) { return at, nil }}, asked: []string{"CONNECT a.example.com:443"}},
		{name: "the rule's proxy goes before the environment's", url: "https://a.example.com/", rule: Rule{Proxy: at},
			cfg: Config{Environment: func(*url.URL) (*url.URL, error) { return nil, errors.New("asked") }}, asked: []string{"CONNECT a.example.com:443"}},
		{name: "an unusable environment", url: "https://a.example.com/", cfg: Config{Environment: func(*url.URL) (*url.URL, error) { return nil, errors.New("bad proxy") }},
			kind: acproxy.ErrPublisher, code: "publisher-unreachable"},
		{name: "hosts go before the proxy", url: "https://example.com/", rule: Rule{Proxy: at}, cfg: Config{Hosts: map[string]string{"example.com": s.Listener.Addr().String()}}},
		{name: "a refusing proxy", url: "https://forbidden.example.com/", rule: Rule{Proxy: at}, asked: []string{"CONNECT forbidden.example.com:443"}, kind: acproxy.ErrPublisher, code: "publisher-protocol"},
		{name: "a private address", url: "https://10.0.0.1/", rule: Rule{Proxy: at}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "a private address in brackets", url: "https://[fd00::1]/", rule: Rule{Proxy: at}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "a short address", url: "https://127.1/", rule: Rule{Proxy: at}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "a hexadecimal address", url: "https://0x7f000001/", rule: Rule{Proxy: at}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "localhost", url: "https://LOCALHOST./", rule: Rule{Proxy: at}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "the proxy itself, asked for without it", url: "https://" + at.Host + "/", cfg: Config{Environment: noProxy}, kind: acproxy.ErrRefused, code: "address-not-allowed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			asked = nil
			rule := tt.rule
			rule.RootCAs = ca
			cfg := tt.cfg
			cfg.Rules = []Rule{rule}
			c := client(t, cfg)
			resp, trace, err := c.Get(t.Context(), "example.com", "image", tt.url, nil)
			if strings.Contains(fmt.Sprint(trace, err), "sesame") {
				t.Errorf("a password is shown: %v, %v", trace, err)
			}
			if tt.code != "" {
				checkError(t, err, tt.kind, tt.code)
			} else if err != nil {
				t.Fatalf("Get: %v", err)
			} else {
				read(t, resp)
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(asked, tt.asked) {
				t.Errorf("the proxy was asked %v, want %v", asked, tt.asked)
			}
		})
	}
}

// TestRulesKeepApart: what one rule trusts is no way in for another, though both ask the same host.
func TestRulesKeepApart(t *testing.T) {
	s, ca := serve(t, func(http.ResponseWriter, *http.Request) {})
	c := client(t, Config{
		Rules: []Rule{{Prefix: "example.com/a/"}, {Prefix: "example.com", RootCAs: x509.NewCertPool()}, {Prefix: "example.com/a/b", RootCAs: ca}},
		Hosts: map[string]string{"example.com": s.Listener.Addr().String()},
	})
	for _, tt := range []struct {
		name, prefix string
		ok           bool
	}{{"example.com/a/b", "example.com/a/b", true}, {"example.com/a/b/c", "example.com/a/b", true}, {"example.com/a/bc", "example.com/a", false},
		{"example.com/a", "example.com/a", false}, {"example.com/ab", "example.com", false}, {"example.com", "example.com", false}, {"other.com", "", false}} {
		if got := c.Rule(tt.name).Prefix; got != tt.prefix {
			t.Errorf("Rule(%s).Prefix = %q, want %q", tt.name, got, tt.prefix)
		}
		resp, _, err := c.Get(t.Context(), tt.name, "image", "https://example.com/", nil)
		if (err == nil) != tt.ok {
			t.Errorf("%s: error = %v, want none: %v", tt.name, err, tt.ok)
		}
		if err == nil {
			resp.Body.Close()
		}
	}
}

func TestRedacted(t *testing.T) {
	tests := []struct{ url, want string }{
		{"https://example.com/a?b=c&d#e", "https://example.com/a?b=c&d"},
		{"https://user:pw@example.com:1/a", "https://example.com:1/a"},
		{"https://user:p@w@example.com", "https://example.com"},
		{"https://user:p/w@example.com:x", "https://example.com:x"},
		{"user:pw@example.com/a", "example.com/a"},
		{"https://s3/x?X-Amz-Signature=abc&X-Amz-Date=1&x%2damz-Security-Token=t", "https://s3/x?X-Amz-Signature=…&X-Amz-Date=1&x%2damz-Security-Token=…"},
		{"https://blob/x?sv=1&sig=abc", "https://blob/x?sv=1&sig=…"},
		{"//user:pw@example.com/a", "//example.com/a"},
		{"https://example.com/a@b", "https://example.com/a@b"},
	}
	for _, tt := range tests {
		if got := Redacted(tt.url); got != tt.want {
			t.Errorf("Redacted(%q) = %q, want %q", tt.url, got, tt.want)
		}
	}
}

func FuzzRedacted(f *testing.F) {
	f.Add("https://", "user:pw", "example.com/a?sig=1")
	f.Add("", "a/b", "c")
	f.Fuzz(func(t *testing.T, scheme, user, rest string) {
		// Whatever url.Parse takes for a password, nobody gets to see.
		u, err := url.Parse(scheme + user + "@" + rest)
		if err != nil || u.User == nil {
			return
		}
		shown, err := url.Parse(Redacted(u.String()))
		if err == nil && shown.User != nil {
			t.Errorf("Redacted(%q) = %q", u.String(), shown)
		}
	})
}

// hangUp is a body that ends in good order as soon as its request is cancelled.
type hangUp struct{ ctx context.Context }

func (h hangUp) Read([]byte) (int, error) { <-h.ctx.Done(); return 0, io.EOF }
func (h hangUp) Close() error             { return nil }

// TestEndAfterCancelling: the end that a server writes because we hung up is not the end of the body.
func TestEndAfterCancelling(t *testing.T) {
	c := client(t, Config{StallTimeout: time.Millisecond})
	ctx, cancel := context.WithCancelCause(t.Context())
	a := &asking{client: c, route: c.settings.Load().route(""), ctx: ctx, cancel: cancel, trace: acproxy.Trace{{What: "image", URL: "https://example.com/"}}}
	turn, err := c.gate.enter(ctx, asked{host: "https://example.com"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	b := a.body(hangUp{ctx}, turn)
	defer b.Close()
	_, err = io.Copy(io.Discard, b)
	checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
}

// trickle is a body that gives so many bytes at a time, each after a pause.
type trickle struct {
	ctx   context.Context
	bytes int
	pause time.Duration
}

func (r trickle) Close() error { return nil }

func (r trickle) Read(p []byte) (int, error) {
	select {
	case <-time.After(r.pause):
		return min(len(p), r.bytes), nil
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	}
}

// TestTrickle: who sends a byte now and then stalls as well as who sends none.
func TestTrickle(t *testing.T) {
	for _, tt := range []struct {
		name     string
		bytes    int
		pause    time.Duration
		size     int64
		fails    bool
		at, took time.Duration // after which the error comes; the whole body
	}{
		{name: "a byte a second", bytes: 1, pause: time.Second, size: 1 << 20, fails: true, at: 30 * time.Second},
		{name: "a byte every 29 seconds", bytes: 1, pause: 29 * time.Second, size: 1 << 20, fails: true, at: 30 * time.Second},
		{name: "no byte", bytes: 1, pause: time.Hour, size: 1 << 20, fails: true, at: 30 * time.Second},
		{name: "slowly", bytes: 256, pause: time.Second, size: 1 << 20, took: 4096 * time.Second},
		{name: "in pieces", bytes: 4 << 10, pause: 29 * time.Second, size: 1 << 20, took: 256 * 29 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := New(Config{StallTimeout: 30 * time.Second, Environment: noProxy})
				ctx, cancel := context.WithCancelCause(t.Context())
				a := &asking{client: c, route: c.settings.Load().route(""), ctx: ctx, cancel: cancel, trace: acproxy.Trace{{What: "image", URL: "https://example.com/"}}}
				turn, err := c.gate.enter(ctx, asked{host: "https://example.com:443", url: "https://example.com/"}, time.Second)
				if err != nil {
					t.Fatal(err)
				}
				b := a.body(trickle{ctx, tt.bytes, tt.pause}, turn)
				defer b.Close()
				began := time.Now()
				n, err := io.CopyN(io.Discard, b, tt.size)
				took := time.Since(began)
				if !tt.fails {
					if err != nil || took != tt.took {
						t.Errorf("%d bytes in %v, %v; want all of them in %v", n, took, err, tt.took)
					}
					return
				}
				checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
				if took != tt.at {
					t.Errorf("it failed after %v, want %v", took, tt.at)
				}
			})
		})
	}
}

// TestStuckInAHeader: a connection on which an answer has stopped in the middle of its header is given up, and what waits there is asked again.
func TestStuckInAHeader(t *testing.T) {
	p, err := publisher.Start(publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.Serve("example.com/x", "text/plain", []byte("hello"))
	p.MisbehaveTLS("example.com", publisher.ConnFault{StallInHeader: true, Times: 1})
	c := client(t, Config{Rules: []Rule{{RootCAs: p.CAPool()}}, Hosts: map[string]string{"example.com": p.Addr()}, StallTimeout: 2 * time.Second})
	_, _, err = c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
	checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
	resp, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, resp); got != "hello" {
		t.Errorf("the next answer is %q", got)
	}
}

// TestAnswerAfterCancelling: what a server answers because we hung up is no answer.
func TestAnswerAfterCancelling(t *testing.T) {
	c := client(t, Config{Hosts: map[string]string{"example.com": "127.0.0.1:1"}, Timeout: time.Millisecond, Rules: []Rule{{HTTP: true}},
		Limits: Limits{Failures: -1}, DialContext: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			return &late{Conn: ours, other: theirs}, nil
		}})
	for range 50 {
		resp, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
		if err == nil {
			resp.Body.Close()
			t.Fatalf("Get = %d after its time", resp.StatusCode)
		}
		checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
	}
}

// late is a connection whose other side answers only once this side closes.
type late struct {
	net.Conn
	other net.Conn
	once  sync.Once
}

func (l *late) Write(p []byte) (int, error) { return len(p), nil }

func (l *late) Close() error {
	l.once.Do(func() {
		_ = l.other.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = io.WriteString(l.other, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		_ = l.other.Close()
	})
	return l.Conn.Close()
}

func TestDial(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hosts := map[string]string{"example.com:443": l.Addr().String()}
	conn, err := client(t, Config{Hosts: hosts}).Dial(t.Context(), "Example.com:443")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for _, tt := range []struct {
		addr    string
		offline bool
		kind    error
		code    string
	}{
		{"example.com:443", true, acproxy.ErrOffline, "offline"},
		{l.Addr().String(), false, acproxy.ErrRefused, "address-not-allowed"},
		{"example.com", false, acproxy.ErrPublisher, "publisher-unreachable"},
	} {
		_, err := client(t, Config{Hosts: hosts, Offline: tt.offline}).Dial(t.Context(), tt.addr)
		if !errors.Is(err, tt.kind) || codeOf(err) != tt.code {
			t.Errorf("Dial(%s): error = %v (%s), want %v (%s)", tt.addr, err, codeOf(err), tt.kind, tt.code)
		}
	}
}

// TestDialOfAnOfflineHost connects to no host whose images are all offline.
func TestDialOfAnOfflineHost(t *testing.T) {
	whole, part, back := Rule{Prefix: "example.com", Offline: true}, Rule{Prefix: "example.com/app", Offline: true}, Rule{Prefix: "example.com/app"}
	for _, tt := range []struct {
		name    string
		rules   []Rule
		addr    string
		offline bool
	}{
		{"the host", []Rule{whole}, "example.com:443", true},
		{"otherwise written", []Rule{whole}, "Example.COM.:80", true},
		{"another host", []Rule{whole}, "www.example.com:443", false},
		{"one that it is the end of", []Rule{whole}, "anexample.com:443", false},
		{"some of its images", []Rule{part}, "example.com:443", false},
		{"all but some", []Rule{whole, back}, "example.com:443", false},
		{"all, and some by themselves", []Rule{whole, part}, "example.com:443", true},
		{"everybody", []Rule{{Offline: true}}, "example.com:443", true},
		{"everybody but this one", []Rule{{Offline: true}, {Prefix: "example.com"}}, "example.com:443", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dialled := 0
			c := client(t, Config{Rules: tt.rules, Hosts: map[string]string{"example.com": "127.0.0.1:1", "www.example.com": "127.0.0.1:1", "anexample.com": "127.0.0.1:1"}, DialContext: func(context.Context, string, string) (net.Conn, error) {
				dialled++
				return nil, errors.New("nobody is there")
			}})
			_, err := c.Dial(t.Context(), tt.addr)
			if errors.Is(err, acproxy.ErrOffline) != tt.offline || (dialled == 0) != tt.offline {
				t.Errorf("Dial(%s) = %v, and dialled %d times", tt.addr, err, dialled)
			}
		})
	}
}
