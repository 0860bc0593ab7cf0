// Package web makes acproxy's connections to publishers, within the dial rules.
package web

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/tracing"
)

// Defaults of a [Config].
const (
	DefaultConnectTimeout = 2 * time.Second
	DefaultTimeout        = 30 * time.Second
	DefaultStallTimeout   = 30 * time.Second
	DefaultMaxRedirects   = 10
	DefaultMaxHeaderBytes = 256 << 10
	DefaultUserAgent      = "acproxy"
)

// A Rule says how the publishers of some image names are reached.
type Rule struct {
	// Prefix is the image-name prefix, by segments, that the rule is for; "" matches every name. The longest matching prefix wins.
	Prefix string
	// HTTP allows plain http URLs, and redirects from https to http.
	HTTP bool
	// RootCAs are the authorities that a publisher's certificate may come from; nil means the system's.
	RootCAs *x509.CertPool
	// Timeout bounds the time from asking to the headers of the last answer, redirects included; 0 means Config.Timeout. Waiting for one's
	// turn (Config.Limits) is not part of it, and may take as long again.
	Timeout time.Duration
	// Proxy is the proxy for outgoing connections; nil means what the environment says (Config.Environment).
	Proxy *url.URL
	// Allow lists addresses that may be dialled besides public ones.
	Allow []netip.Prefix
	// Nobody makes every request fail with acproxy.ErrOffline before any look-up or connection: there is nobody to ask.
	Nobody bool
	// Offline does so too, because nobody is to be asked.
	Offline bool
}

// Config says how a Client behaves. Its fields may not change after it was given to New or [Client.Change].
type Config struct {
	Rules []Rule
	// Hosts says where hosts really are, like /etc/hosts and curl's --connect-to: "storage.example.com" or "storage.example.com:443" to
	// "10.0.0.7", "10.0.0.7:8443" or another host name. It is the operator's own word: it goes before DNS and before a proxy, and the
	// address is not checked. It exists because the DNS of the nodes may point a publisher's name at acproxy itself.
	Hosts map[string]string
	// Resolver looks up addresses; nil means net.DefaultResolver.
	Resolver *net.Resolver
	// Allow lists addresses that may be dialled for any name, besides public ones.
	Allow []netip.Prefix

	// Traces tells publishers which trace a request belongs to.
	Traces bool

	UserAgent string // "" means DefaultUserAgent
	Via       string // a token unique to this server, sent in the Via header so that the server knows its own requests; "" sends none

	ConnectTimeout time.Duration // for each address tried; 0 means DefaultConnectTimeout
	Timeout        time.Duration // from asking to the headers of the last answer; 0 means DefaultTimeout
	StallTimeout   time.Duration // a body whose next 4 KiB, or what is left of it, take longer fails; 0 means DefaultStallTimeout
	MaxRedirects   int           // redirects followed; 0 means DefaultMaxRedirects, less than 0 none
	MaxHeaderBytes int64         // bytes of an answer's headers; 0 means DefaultMaxHeaderBytes

	Limits Limits // how each host is spared; as New was given them, for good

	// Authorize gives a request on behalf of an image name what its host wants to see, each time that a host is asked, after redirects too, and returns what that
	// was, for the trace, without anything that is secret. nil means that nothing is shown to anybody.
	Authorize func(name string, r *http.Request) (what string, err error)

	// Offline makes every request fail with acproxy.ErrOffline before any look-up or connection.
	Offline bool
	// DialContext connects to an address that was looked up and checked before; nil means net.Dialer's.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
	// Environment returns the proxy for a URL if its rule names none; nil means what HTTP_PROXY, HTTPS_PROXY and NO_PROXY say,
	// as http.ProxyFromEnvironment reads them.
	Environment func(*url.URL) (*url.URL, error)
	// Now is the clock by which hosts are left alone; nil means time.Now. It is as New was given it, for good.
	Now func() time.Time
	// Random is from 0 to 1, and spreads the times at which hosts are asked again; nil means rand.Float64. It is as New was given it, for good.
	Random func() float64
}

// A Client asks publishers. It is safe for concurrent use.
type Client struct {
	settings atomic.Pointer[settings]
	gate     *gate

	traffic map[string]*traffic // by what is asked for; what isn't here counts as ""
}

// Traffic is what was asked of publishers since the start.
type Traffic struct {
	What     string // is asked for: discovery, key, signature or image; "" is anything else
	Requests int64  // that were made, each redirect by itself
	Failures int64  // of these: without an answer, or with a 5xx
	Bytes    int64  // of the bodies that came
}

type traffic struct{ requests, failures, bytes atomic.Int64 }

// Traffic returns what was asked of publishers since the start, by what was asked for.
func (c *Client) Traffic() []Traffic {
	var out []Traffic
	for what, t := range c.traffic {
		out = append(out, Traffic{what, t.requests.Load(), t.failures.Load(), t.bytes.Load()})
	}
	return out
}

func (a *asking) traffic() *traffic {
	all := a.client.traffic
	if t := all[a.what]; t != nil {
		return t
	}
	return all[""]
}

// What cancels a request on our side. They are told apart from the caller's own cancellation by context.Cause.
var (
	errSlow    = errors.New("no answer in time")
	errStalled = errors.New("the body stalled")
)

// Dial connects to host:port for somebody else's connection, within the dial rules for no name in particular, and without regard to
// Config.Limits: those who wait are not ours to keep waiting. A host whose images are all offline isn't connected to, on whatever port. The caller closes the
// connection. Errors are those of Get.
func (c *Client) Dial(ctx context.Context, hostport string) (net.Conn, error) {
	var conn net.Conn
	err := errReplaced
	for errors.Is(err, errReplaced) {
		s := c.settings.Load()
		if s.cfg.Offline {
			return nil, &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "this side is set to be offline and does not connect to " + hostport}
		}
		if s.wholeOffline(hostport) {
			return nil, &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "this side is set to be offline for all images of that host and does not connect to " + hostport}
		}
		conn, err = s.route("").dial(ctx, "tcp", hostport)
	}
	if err == nil {
		return conn, nil
	}
	if acproxy.KindOf(err) != nil || ctx.Err() != nil {
		return nil, err
	}
	return nil, &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-unreachable", Detail: "connecting to " + hostport, Err: err}
}

// Get asks for a URL on behalf of an image name, whose rule decides how, and follows redirects. what says in the trace what is asked for,
// as [acproxy.Attempt] lists it; "image" also says that the answer may be large. The trace has one attempt for each URL asked.
//
// Each host is asked within Config.Limits. A request may have to wait for its turn; it keeps its place at the host until its body was read to the
// end or closed. At a host that is down, or wants to be left alone, it fails at once.
//
// An answer of any status is returned without an error, except the redirects that were followed (301, 302, 303, 307 and 308 with a
// Location); nothing is decoded. The caller closes its body. Reading the body fails as Get does: with an error matching
// [acproxy.ErrTimeout] if it stalls and [acproxy.ErrPublisher] if it ends short.
//
// The header goes with every request, except that Authorization, Cookie and Proxy-Authorization do not follow a redirect to another
// origin (scheme, host and port, RFC 6454).
//
// A request for which no connection is made yet when [Client.Change] is called, or whose turn hasn't come, goes by what was changed, and so does each
// redirect after that.
//
// Errors match [acproxy.ErrOffline], [acproxy.ErrRefused] if the dial rules forbid it, [acproxy.ErrTimeout], [acproxy.ErrPublisher],
// [acproxy.ErrBusy] with the code [CodeBusy] if its turn didn't come, or the error of ctx if that was what ended it. Those that are an
// [acproxy.Error] carry the trace too and, where nobody was asked, when it is worth asking again.
func (c *Client) Get(ctx context.Context, name, what, rawURL string, header http.Header) (*http.Response, acproxy.Trace, error) {
	return c.do(ctx, http.MethodGet, name, what, rawURL, header)
}

// Head asks whether there is something at a URL, as [Client.Get] would, and returns the status and the size: -1 if the publisher doesn't say.
func (c *Client) Head(ctx context.Context, name, what, rawURL string) (status int, size int64, trace acproxy.Trace, err error) {
	resp, trace, err := c.do(ctx, http.MethodHead, name, what, rawURL, nil)
	if err != nil {
		return 0, -1, trace, err
	}
	// There is no body to read, and nothing that closing it could say.
	_ = resp.Body.Close()
	return resp.StatusCode, resp.ContentLength, trace, nil
}

func (c *Client) do(ctx context.Context, method, name, what, rawURL string, header http.Header) (*http.Response, acproxy.Trace, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	s := c.settings.Load()
	a := &asking{client: c, route: s.route(name), name: name, method: method, what: what, header: s.header(header), ctx: ctx, cancel: cancel}
	if s.cfg.Traces {
		if traceparent := tracing.Outgoing(ctx); traceparent != "" {
			a.header.Set(tracing.Header, traceparent)
		}
	}
	resp, err := a.ask(rawURL)
	if err != nil {
		cancel(nil)
		return nil, a.trace, err
	}
	return resp, a.trace, nil
}

// asking is one Get or Head in progress.
type asking struct {
	client *Client
	route  *route // what the URL that is asked for now goes by
	name   string // of the image
	method string
	what   string
	header http.Header
	trace  acproxy.Trace

	slow   *time.Timer     // cancels; it runs while publishers are waited for, and stands while it isn't our turn
	left   time.Duration   // for publishers, when slow was set last
	since  time.Time       // when that was
	queue  time.Duration   // left for waiting
	ctx    context.Context // the caller's, and cancelled by us with errSlow or errStalled as its cause
	cancel context.CancelCauseFunc
}

func (a *asking) ask(rawURL string) (*http.Response, error) {
	if err := a.nobody(rawURL); err != nil {
		return nil, err
	}
	a.left, a.queue, a.since = a.route.rule.Timeout, a.route.rule.Timeout, time.Now()
	a.slow = time.AfterFunc(a.left, func() { a.cancel(errSlow) })
	defer a.slow.Stop()
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, a.refuse(rawURL, acproxy.ErrPublisher, "bad-url", fmt.Sprintf("%s is not a URL: %v", Redacted(rawURL), parseReason(rawURL, err)))
	}
	for redirects := 0; ; redirects++ {
		resp, t, err := a.request(u)
		if err != nil {
			return nil, err
		}
		location := resp.Header.Get("Location")
		if location == "" || !isRedirect(resp.StatusCode) {
			resp.Body = a.body(resp.Body, t)
			return resp, nil
		}
		// A short body read to its end leaves the connection usable for the next request.
		_, _ = io.CopyN(io.Discard, resp.Body, 2<<10)
		_ = resp.Body.Close()
		t.ended()
		last := &a.trace[len(a.trace)-1]
		next, err := u.Parse(location)
		if err != nil {
			last.Err = "it redirects to what is not a URL: " + parseReason(location, err)
			return nil, a.fail(acproxy.ErrPublisher, "bad-redirect", fmt.Sprintf("%s: %s", last.URL, last.Err), nil)
		}
		next.Fragment, next.RawFragment = "", ""
		note(last, "redirects to "+Redacted(next.String()))
		if most := a.route.settings.cfg.MaxRedirects; redirects >= most {
			last.Err = fmt.Sprintf("more than %d redirects", max(most, 0))
			return nil, a.fail(acproxy.ErrPublisher, "too-many-redirects", fmt.Sprintf("%s leads to %s", a.trace[0].URL, last.Err), nil)
		}
		if u.Scheme == "https" && next.Scheme == "http" && !a.route.rule.HTTP {
			last.Err = "refused: it leads from https to http"
			return nil, a.fail(acproxy.ErrRefused, "insecure-url", fmt.Sprintf("%s redirects from https to %s, which http allowed for this image name would permit",
				last.URL, Redacted(next.String())), nil)
		}
		if origin(u) != origin(next) {
			for _, secret := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
				a.header.Del(secret)
			}
		}
		u = next
	}
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// origin returns the origin of a URL (RFC 6454, section 4) as text. The port is left out where it is the scheme's own.
func origin(u *url.URL) string {
	host, port := normalHost(u.Hostname()), portOf(u)
	if port == portOf(&url.URL{Scheme: u.Scheme}) {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return u.Scheme + "://" + host
	}
	return u.Scheme + "://" + net.JoinHostPort(host, port)
}

func portOf(u *url.URL) string {
	if port := u.Port(); port != "" {
		return port
	}
	if u.Scheme == "http" {
		return "80"
	}
	return "443"
}

// maxHost is how long the host of a URL with its port may be: a name, a colon and digits, or an address with a zone.
const maxHost = 300

// nobody returns an error if nobody is asked for the image name at all.
func (a *asking) nobody(rawURL string) error {
	rule := a.route.rule
	switch {
	case a.route.settings.cfg.Offline:
		return a.refuse(rawURL, acproxy.ErrOffline, "offline", "this side is set to be offline and asks no publisher for "+Redacted(rawURL))
	case rule.Nobody:
		return a.refuse(rawURL, acproxy.ErrOffline, "published-here", "the images under "+rule.Prefix+" are published here, so nobody is asked for "+Redacted(rawURL))
	case rule.Offline:
		return a.refuse(rawURL, acproxy.ErrOffline, "offline", "this side is set to be offline for the images under "+rule.Prefix+" and asks no publisher for "+Redacted(rawURL))
	}
	return nil
}

// request asks for one URL by the settings of the moment, and again where others took their place before anything was asked.
func (a *asking) request(u *url.URL) (*http.Response, *turn, error) {
	for {
		a.route = a.client.settings.Load().route(a.name)
		if err := a.nobody(u.String()); err != nil {
			return nil, nil, err
		}
		if err := a.check(u); err != nil {
			return nil, nil, err
		}
		resp, t, err := a.hop(u)
		if !errors.Is(err, errReplaced) {
			return resp, t, err
		}
		a.trace = a.trace[:len(a.trace)-1]
	}
}

// check returns an error if the rules forbid asking for a URL, whoever it leads to.
func (a *asking) check(u *url.URL) error {
	shown := Redacted(u.String())
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return a.refuse(shown, acproxy.ErrRefused, "unsupported-scheme", fmt.Sprintf("%s: only https and http URLs are fetched, not %q", shown, u.Scheme))
	case u.User != nil:
		return a.refuse(shown, acproxy.ErrRefused, "credentials-in-url", shown+" came with a user name or password in it: credentials belong in the configuration, never in a URL")
	case u.Scheme == "http" && !a.route.rule.HTTP:
		return a.refuse(shown, acproxy.ErrRefused, "insecure-url", shown+" is plain http, which is not allowed for this image name")
	case u.Hostname() == "" || strings.HasSuffix(u.Host, ":"):
		return a.refuse(shown, acproxy.ErrPublisher, "bad-url", shown+" names no host, or a port that is no number")
	case len(u.Host) > maxHost:
		return a.refuse(shown, acproxy.ErrPublisher, "bad-url", fmt.Sprintf("%s names a host of %d bytes; the longest names have 253 (RFC 1035)", shown, len(u.Host)))
	case !utf8.ValidString(u.Host) || strings.ContainsFunc(u.Host, func(c rune) bool { return !unicode.IsPrint(c) }):
		return a.refuse(shown, acproxy.ErrPublisher, "bad-url", fmt.Sprintf("%s names the host %q, which can't be one", shown, u.Host))
	}
	return nil
}

// hop asks for one URL, when its turn has come, and records the attempt. The error matches errReplaced if nothing was asked because the settings of its
// route are not those of the client any more.
func (a *asking) hop(u *url.URL) (*http.Response, *turn, error) {
	began := time.Now()
	a.trace = append(a.trace, acproxy.Attempt{What: a.what, URL: Redacted(u.String())})
	last := &a.trace[len(a.trace)-1]
	doing := "asking for " + last.URL
	proxy, err := a.route.proxy(a.ctx, u)
	if err != nil {
		last.Took = time.Since(began)
		return nil, nil, a.explain(err, doing)
	}
	req := (&http.Request{Method: a.method, URL: u, Host: u.Host, Header: a.header.Clone(), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}).
		WithContext(withProxy(a.ctx, proxy))
	shown := ""
	if authorize := a.route.settings.cfg.Authorize; authorize != nil {
		if shown, err = authorize(a.name, req); err != nil {
			last.Took = time.Since(began)
			return nil, nil, a.explain(err, doing)
		}
	}
	t, err := a.wait(u)
	if err != nil {
		last.Took = time.Since(began)
		return nil, nil, a.notAsked(err, doing)
	}
	if a.route.settings.over() {
		t.dropped()
		return nil, nil, errReplaced
	}
	last.Note = shown
	if waited := time.Since(began); waited >= worthNoting {
		note(last, fmt.Sprintf("waited %v for its turn", waited.Round(time.Millisecond)))
		began = time.Now()
	}
	resp, err := a.route.roundTrip(req)
	if errors.Is(err, errReplaced) {
		t.dropped()
		return nil, nil, errReplaced
	}
	// What a server says because we hung up is no answer, though it may still reach us: climbing on such a 404 would be wrong.
	if err == nil && a.ctx.Err() != nil {
		_ = resp.Body.Close()
		err = a.ctx.Err()
	}
	last.Took = time.Since(began)
	traffic := a.traffic()
	traffic.requests.Add(1)
	if err != nil || resp.StatusCode >= http.StatusInternalServerError {
		traffic.failures.Add(1)
	}
	if err != nil {
		err = a.explain(err, doing)
		t.unanswered(err, last.Err)
		return nil, nil, err
	}
	last.Status = resp.StatusCode
	t.answered(resp, last.Took)
	return resp, t, nil
}

// note adds something to what there is to say of an attempt.
func note(a *acproxy.Attempt, text string) {
	if a.Note != "" {
		a.Note += "; "
	}
	a.Note += text
}

// worthNoting is how long somebody has to wait for his turn for the trace to tell of it.
const worthNoting = 100 * time.Millisecond

// wait returns when it is our turn to ask for a URL. The publisher's time stands still meanwhile.
func (a *asking) wait(u *url.URL) (*turn, error) {
	began := time.Now()
	a.left -= began.Sub(a.since)
	running := a.slow.Stop()
	t, err := a.client.gate.enter(a.ctx, asked{
		host: origin(u), prefix: a.route.rule.Prefix, url: u.String(), large: a.what == "image" && a.method == http.MethodGet,
	}, a.queue)
	a.since = time.Now()
	a.queue -= a.since.Sub(began)
	if running {
		a.slow.Reset(a.left)
	}
	return t, err
}

// notAsked adds the trace to the reason why nobody was asked.
func (a *asking) notAsked(err error, doing string) error {
	var e *acproxy.Error
	if !errors.As(err, &e) {
		return a.explain(err, doing)
	}
	a.trace[len(a.trace)-1].Err = e.Detail
	e.Trace = slices.Clone(a.trace)
	return err
}

// refuse records an attempt that was not made and returns why.
func (a *asking) refuse(rawURL string, kind error, code, detail string) error {
	a.trace = append(a.trace, acproxy.Attempt{What: a.what, URL: Redacted(rawURL), Err: detail})
	return a.fail(kind, code, detail, nil)
}

func (a *asking) fail(kind error, code, detail string, cause error) error {
	return &acproxy.Error{Kind: kind, Code: code, Detail: detail, Trace: slices.Clone(a.trace), Err: cause}
}

// body returns the answer's body, wrapped so that it fails when it stalls and its errors are ours.
func (a *asking) body(rc io.ReadCloser, t *turn) io.ReadCloser {
	stall := a.route.settings.cfg.StallTimeout
	timer := time.AfterFunc(stall, func() { a.cancel(errStalled) })
	timer.Stop()
	return &body{rc: rc, asking: a, turn: t, timer: timer, left: stall, due: leastRead}
}

// leastRead is how many bytes of a body have to come within the stall timeout. Who sends one now and then would be waited for without end.
const leastRead = 4 << 10

// A body reads an answer. The timer runs only while somebody waits in Read: a reader who takes his time is not the publisher's fault.
type body struct {
	rc     io.ReadCloser
	asking *asking
	turn   *turn
	timer  *time.Timer
	left   time.Duration // for the bytes that are due
	due    int
	whole  bool // the end was read
}

// Read reads as the answer's body does.
func (b *body) Read(p []byte) (int, error) {
	began := time.Now()
	b.timer.Reset(b.left)
	n, err := b.rc.Read(p)
	b.timer.Stop()
	b.left -= time.Since(began)
	b.asking.traffic().bytes.Add(int64(n))
	if b.due -= n; b.due <= 0 {
		b.left, b.due = b.asking.route.settings.cfg.StallTimeout, leastRead
	}
	// A server that sees us hang up may end its body in good order, and that end may still reach us: one that comes after the request was
	// cancelled is not the end of the body.
	if err == io.EOF && b.asking.ctx.Err() == nil {
		b.whole = true
		b.turn.ended()
	}
	if err == nil || err == io.EOF && b.whole {
		return n, err
	}
	a := *b.asking
	// The trace that Get returned is the caller's by now.
	a.trace = slices.Clone(a.trace)
	last := &a.trace[len(a.trace)-1]
	err = a.explain(err, "reading the body of "+last.URL)
	b.turn.brokeOff(err, last.Err)
	return n, err
}

// Close ends the request.
func (b *body) Close() error {
	err := b.rc.Close()
	b.timer.Stop()
	if b.asking.ctx.Err() == nil {
		b.turn.ended()
	} else {
		b.turn.dropped()
	}
	b.asking.cancel(nil)
	b.asking.route.leave()
	return err
}
