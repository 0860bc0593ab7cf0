package web

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// settings are what a Client goes by until others take their place. They don't change.
type settings struct {
	cfg    Config
	hosts  map[string]string // Config.Hosts, the keys as normalHost writes them
	routes []*route          // by prefix, longest first; the last one matches every name

	// current is done once others have taken their place. From then on no connection is begun by these.
	current context.Context
	end     context.CancelFunc
}

// errReplaced says that nothing was asked because other settings count by now.
var errReplaced = errors.New("the configuration has changed")

// A route is a Rule with connections of its own: what one rule trusts must not answer for another.
type route struct {
	settings  *settings
	rule      Rule
	allow     []netip.Prefix
	transport *http.Transport
	alone     *http.Transport // the same, with a connection for each request
}

// New returns a Client. Close drops its idle connections.
func New(cfg Config) *Client {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = rand.Float64
	}
	c := &Client{gate: newGate(cfg.Limits, cfg.Now, cfg.Random), traffic: make(map[string]*traffic)}
	for _, what := range []string{"", "discovery", "key", "signature", "image"} {
		c.traffic[what] = new(traffic)
	}
	c.settings.Store(newSettings(cfg))
	return c
}

// Change puts another configuration in the place of the one that counts, but for its Limits, Now and Random. Once it has returned no connection is begun by
// the one before, and none that was made by it is used for a request that begins; an answer that has begun is read to its end. Hosts that were found to be
// down are asked again: they may have been so because of what is changed.
func (c *Client) Change(cfg Config) {
	before := c.settings.Swap(newSettings(cfg))
	before.end()
	for _, r := range before.routes {
		r.transport.CloseIdleConnections()
	}
	c.gate.forgive()
}

// Offline reports whether nobody is asked for anything.
func (c *Client) Offline() bool { return c.settings.Load().cfg.Offline }

// Close drops the idle connections. Bodies still open stay readable.
func (c *Client) Close() {
	for _, r := range c.settings.Load().routes {
		r.transport.CloseIdleConnections()
	}
}

// Hosts returns how things are with the hosts that were asked lately, by name.
func (c *Client) Hosts() []HostState { return c.gate.states() }

// Rule returns the rule that is used for an image name, with the client's defaults filled in. Two names with the same Prefix there share
// connections, and answers got for one may be used for the other.
func (c *Client) Rule(name string) Rule { return c.settings.Load().route(name).rule }

func newSettings(cfg Config) *settings {
	cfg.ConnectTimeout = orDefault(cfg.ConnectTimeout, DefaultConnectTimeout)
	cfg.Timeout = orDefault(cfg.Timeout, DefaultTimeout)
	cfg.StallTimeout = orDefault(cfg.StallTimeout, DefaultStallTimeout)
	cfg.MaxRedirects = orDefault(cfg.MaxRedirects, DefaultMaxRedirects)
	cfg.MaxHeaderBytes = orDefault(cfg.MaxHeaderBytes, DefaultMaxHeaderBytes)
	cfg.UserAgent = orDefault(cfg.UserAgent, DefaultUserAgent)
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	if cfg.DialContext == nil {
		cfg.DialContext = (&net.Dialer{}).DialContext
	}
	if cfg.Environment == nil {
		cfg.Environment = func(u *url.URL) (*url.URL, error) { return http.ProxyFromEnvironment(&http.Request{URL: u}) }
	}
	s := &settings{cfg: cfg, hosts: make(map[string]string, len(cfg.Hosts))}
	s.current, s.end = context.WithCancel(context.Background())
	for host, where := range cfg.Hosts {
		s.hosts[normalHost(host)] = where
	}
	for _, rule := range cfg.Rules {
		s.routes = append(s.routes, s.newRoute(rule))
	}
	s.routes = append(s.routes, s.newRoute(Rule{}))
	slices.SortStableFunc(s.routes, func(a, b *route) int { return len(b.rule.Prefix) - len(a.rule.Prefix) })
	return s
}

func orDefault[T comparable](v, fallback T) T {
	var zero T
	if v == zero {
		return fallback
	}
	return v
}

func (s *settings) newRoute(rule Rule) *route {
	rule.Prefix = strings.TrimSuffix(rule.Prefix, "/")
	rule.Timeout = orDefault(rule.Timeout, s.cfg.Timeout)
	r := &route{settings: s, rule: rule, allow: slices.Concat(s.cfg.Allow, rule.Allow)}
	r.transport = &http.Transport{
		Proxy:                  func(req *http.Request) (*url.URL, error) { return proxyOf(req.Context()), nil },
		DialContext:            r.dial,
		TLSClientConfig:        &tls.Config{RootCAs: rule.RootCAs},
		TLSHandshakeTimeout:    rule.Timeout,
		DisableCompression:     true, // the signature is over the bytes as published, whatever they are
		ForceAttemptHTTP2:      true,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: s.cfg.MaxHeaderBytes,
		OnProxyConnectResponse: checkConnect,
		// A dead HTTP/2 connection would otherwise be given to one request after another until the kernel notices. One that has stopped in the middle
		// of a header is dead, too.
		HTTP2: &http.HTTP2Config{SendPingTimeout: max(s.cfg.StallTimeout/2, time.Second), PingTimeout: max(s.cfg.StallTimeout/2, time.Second)},
	}
	r.alone = r.transport.Clone()
	r.alone.DisableKeepAlives = true
	return r
}

func (s *settings) route(name string) *route {
	for _, r := range s.routes {
		if acproxy.HasPrefix(name, r.rule.Prefix) {
			return r
		}
	}
	return s.routes[len(s.routes)-1] // cannot happen: the last one matches every name
}

// wholeOffline reports whether all images whose names begin with a host, given with its port, are offline.
func (s *settings) wholeOffline(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	host = normalHost(host)
	for _, r := range s.routes {
		if acproxy.HasPrefix(r.rule.Prefix, host) && !r.rule.Offline {
			return false
		}
	}
	return s.route(host).rule.Offline
}

// over reports whether others have taken their place.
func (s *settings) over() bool { return s.current.Err() != nil }

// leave is called when an answer was read. Its connection is of no use to anybody any more if the settings are over.
func (r *route) leave() {
	if r.settings.over() {
		r.transport.CloseIdleConnections()
	}
}

// header returns the header of a request.
func (s *settings) header(given http.Header) http.Header {
	h := given.Clone()
	if h == nil {
		h = make(http.Header)
	}
	h.Set("User-Agent", s.cfg.UserAgent)
	// Without a word about it, a server may choose any coding (RFC 9110, section 12.5.3).
	h.Set("Accept-Encoding", "identity")
	if s.cfg.Via != "" {
		h.Add("Via", "1.1 "+s.cfg.Via)
	}
	return h
}
