package web

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"

	"github.com/acproxy/acproxy"
)

type namedKey struct{}

// dialsNamed reports whether a connection is for the host that the operator named.
func dialsNamed(ctx context.Context) bool { return ctx.Value(namedKey{}) != nil }

// named asks a server that the operator named, and whoever that leads to.
type named struct {
	client *Client
	rule   Rule
	host   string // that the operator named, with its port

	mu   sync.Mutex
	last *route // by the settings of the last request; nil before the first
}

// Named returns connections to a server that isn't a publisher, by https alone: the configuration names it, by a URL. Its own host and port may be at any
// address, as that is the operator's own word; other hosts that it leads to are within the dial rules. Proxies and Config.Hosts are as for publishers,
// Config.Limits don't count. roots are the authorities that its certificate may come from; nil means the system's. Nothing is retried, and how long an answer may
// take is for the caller to say. Each request goes by what [Client.Change] has put in place by then.
func (c *Client) Named(u *url.URL, roots *x509.CertPool) http.RoundTripper {
	return &named{client: c, rule: Rule{RootCAs: roots}, host: hostPort(u)}
}

// route returns the route by the settings of now.
func (n *named) route() *route {
	now := n.client.settings.Load()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == nil || n.last.settings != now {
		if n.last != nil {
			n.last.transport.CloseIdleConnections()
		}
		n.last = now.newRoute(n.rule)
	}
	return n.last
}

// RoundTrip asks for one URL. It returns an error matching [acproxy.ErrOffline] or [acproxy.ErrRefused] where nobody may be asked.
func (n *named) RoundTrip(r *http.Request) (*http.Response, error) {
	for {
		by := n.route()
		asked, err := n.request(by, r)
		if err != nil {
			if r.Body != nil {
				_ = r.Body.Close() // as http.RoundTripper has it
			}
			return nil, err
		}
		resp, err := by.transport.RoundTrip(asked)
		if !errors.Is(err, errReplaced) || r.Body != nil && r.GetBody == nil {
			return resp, err
		}
		// Nothing was sent, as there was no connection.
		if r.GetBody != nil {
			again := r.Clone(r.Context())
			if again.Body, err = r.GetBody(); err != nil {
				return nil, err
			}
			r = again
		}
	}
}

// request returns a request that says how it may be connected, or why nobody may be asked.
func (n *named) request(by *route, r *http.Request) (*http.Request, error) {
	if by.settings.cfg.Offline {
		return nil, &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "this side is set to be offline and does not ask " + r.URL.Host}
	}
	if r.URL.Scheme != "https" {
		return nil, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "insecure-url", Detail: fmt.Sprintf("%s is not https", Redacted(r.URL.String()))}
	}
	ctx := r.Context()
	if hostPort(r.URL) == n.host {
		ctx = context.WithValue(ctx, namedKey{}, true)
	}
	proxy, err := by.proxy(ctx, r.URL)
	if err != nil {
		return nil, err
	}
	return r.WithContext(withProxy(ctx, proxy)), nil
}

// CloseIdleConnections drops the connections that nobody uses; [http.Client] has a method for it.
func (n *named) CloseIdleConnections() { n.route().transport.CloseIdleConnections() }

// hostPort returns host and port that a URL leads to.
func hostPort(u *url.URL) string { return net.JoinHostPort(normalHost(u.Hostname()), portOf(u)) }
