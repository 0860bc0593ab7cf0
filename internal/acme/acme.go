// Package acme has certificates for the server's own names issued by an ACME server, and renews them in time.
package acme

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/mholt/acmez/v3/acme"

	"github.com/acproxy/acproxy/internal/durable"
)

// The ways in which the ACME server can be shown that a name is ours.
const (
	TLSALPN01 = "tls-alpn-01" // RFC 8737: by a certificate of its own, at port 443
	HTTP01    = "http-01"     // RFC 8555, section 8.3: by an answer in clear, at port 80
)

const (
	// attemptTimeout is how long having one certificate issued may take.
	attemptTimeout = 5 * time.Minute
	// requestTimeout is how long the ACME server may take for one answer.
	requestTimeout = time.Minute
	// maxAnswer is how long an answer of the ACME server may be, in bytes. A chain of certificates has a few thousand.
	maxAnswer = 1 << 20
	// lookEvery is how often it is looked at what is due, at most: clocks are changed, and machines sleep.
	lookEvery = time.Minute
	// maxPause is how long is waited at most after a failure, unless the server asks for more.
	maxPause = time.Hour
	// maxRetryAfter is how long the server may have us wait.
	maxRetryAfter = 24 * time.Hour
)

// Options says how a [Client] behaves.
type Options struct {
	Directory  string   // the URL of the ACME server's directory
	Hosts      []string // the names that certificates are for, in lower case: for no other name is one ever asked
	Challenges []string // TLSALPN01, HTTP01 or both, in the order in which they are tried; nil means TLSALPN01
	Email      string   // where the server may write to; "" for nowhere
	Terms      bool     // the server's terms of service are agreed to
	// The account elsewhere that the one at this server is bound to (RFC 8555, section 7.3.4); "" for none. EABKey is in base64url.
	EABKeyID, EABKey string

	Dir       string            // where account and certificates are kept, in a directory for each server
	Transport http.RoundTripper // connects to the server; nil means http.DefaultTransport
	UserAgent string

	// Happened is told when a certificate was issued, and when that failed. nil means that nobody is told.
	Happened func(Event)
	FS       durable.FS       // nil means durable.OS
	Log      *slog.Logger     // nil means slog.Default
	Now      func() time.Time // nil means time.Now
	// Offline reports whether nobody may be asked at the moment; nil means never.
	Offline func() bool

	// How long is waited after a first failure, and longer with each further one: where the server can't be reached, and where it has refused. 0 means ten
	// seconds and five minutes. Let's Encrypt takes five failed validations of a name in an hour before it refuses to try.
	PauseUnreachable, PauseRefused time.Duration
}

// An Event says that a certificate was issued, or could not be.
type Event struct {
	Host     string
	NotAfter time.Time // of the certificate that was issued
	Err      error     // why none was; nil if one was
	Again    time.Time // when it is tried again, after a failure
}

// A Client has certificates for a few names. It is safe for concurrent use.
type Client struct {
	opts Options
	log  *slog.Logger
	now  func() time.Time
	http *http.Client
	busy *manners // keeps away from a server that wants to be left alone

	hosts map[string]*host
	names []string // in the order given

	answers answers

	account *account // of Run alone; nil before it is known
}

// A host is a name, and the certificate that there is for it.
type host struct {
	name string

	mu    sync.Mutex
	cert  *tls.Certificate // with its leaf; nil if there is none
	due   time.Time        // when it is asked for the next one
	err   error            // why the last attempt failed, nil if it didn't
	since time.Time        // when the last certificate was issued to this process

	// Of Run alone.
	unreachable, refused *backoff.ExponentialBackOff
	last                 string // the challenge that was met last
	advice               advice
}

// State is how things are with one name.
type State struct {
	Host     string
	NotAfter time.Time // of the certificate that is held; zero if there is none
	Due      time.Time // when the next one is asked for
	Err      error     // why the last attempt failed; nil if it didn't
}

// Open returns a Client with the certificates that it has had issued before. What can't be read is said in the log, and issued again. Nobody is asked before Run.
func Open(opts Options) *Client {
	c := &Client{opts: opts, log: opts.Log, now: opts.Now, hosts: make(map[string]*host), names: slices.Clone(opts.Hosts)}
	if c.log == nil {
		c.log = slog.Default()
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.opts.FS == nil {
		c.opts.FS = durable.OS{}
	}
	if len(c.opts.Challenges) == 0 {
		c.opts.Challenges = []string{TLSALPN01}
	}
	if c.opts.PauseUnreachable == 0 {
		c.opts.PauseUnreachable = 10 * time.Second
	}
	if c.opts.PauseRefused == 0 {
		c.opts.PauseRefused = 5 * time.Minute
	}
	if c.opts.Transport == nil {
		c.opts.Transport = http.DefaultTransport
	}
	c.busy = &manners{next: c.opts.Transport, now: c.now}
	c.http = &http.Client{Transport: c.busy, Timeout: requestTimeout}
	for _, name := range c.names {
		h := &host{name: name, unreachable: growing(c.opts.PauseUnreachable), refused: growing(c.opts.PauseRefused)}
		cert, err := c.load(name)
		if err != nil {
			c.log.Error("a certificate that was issued can't be used; another one is asked for", "host", name, "err", err)
		}
		h.cert, h.due = cert, c.now()
		if cert != nil {
			h.due = renewal(cert)
		}
		c.hosts[name] = h
	}
	return c
}

// growing returns pauses that treble, up to maxPause.
func growing(first time.Duration) *backoff.ExponentialBackOff {
	return &backoff.ExponentialBackOff{InitialInterval: first, Multiplier: 3, RandomizationFactor: 0.2, MaxInterval: maxPause}
}

// Certificate returns the certificate for a name, nil if it is none of ours or has none yet. valid says that its time is not over.
func (c *Client) Certificate(name string) (cert *tls.Certificate, valid bool) {
	h := c.hosts[strings.ToLower(strings.TrimSuffix(name, "."))]
	if h == nil {
		return nil, false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cert, h.cert != nil && c.now().Before(h.cert.Leaf.NotAfter)
}

// Hosts returns the names that certificates are for, in the order given.
func (c *Client) Hosts() []string { return slices.Clone(c.names) }

// States returns how things are with each name, in the order given.
func (c *Client) States() []State {
	var out []State
	for _, name := range c.names {
		h := c.hosts[name]
		h.mu.Lock()
		s := State{Host: name, Due: h.due, Err: h.err}
		if h.cert != nil {
			s.NotAfter = h.cert.Leaf.NotAfter
		}
		h.mu.Unlock()
		out = append(out, s)
	}
	return out
}

// Run has certificates issued when they are due, one after the other, until ctx is done.
func (c *Client) Run(ctx context.Context) {
	defer c.http.CloseIdleConnections()
	timer := time.NewTimer(0)
	defer timer.Stop()
	offline := false
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		if c.opts.Offline != nil && c.opts.Offline() {
			if !offline {
				c.notRenewed()
			}
			offline = true
			timer.Reset(lookEvery)
			continue
		}
		offline = false
		next := c.now().Add(lookEvery)
		for _, name := range c.names {
			h := c.hosts[name]
			c.consult(ctx, h)
			if !c.now().Before(h.dueAt()) {
				c.issue(ctx, h)
			}
			if ctx.Err() != nil {
				return
			}
			if due := h.dueAt(); due.Before(next) {
				next = due
			}
		}
		timer.Reset(max(next.Sub(c.now()), 0))
	}
}

// notRenewed says that nobody is asked.
func (c *Client) notRenewed() {
	for _, s := range c.States() {
		until := "never issued"
		if !s.NotAfter.IsZero() {
			until = s.NotAfter.UTC().Format(time.RFC3339)
		}
		c.log.Warn("offline: the ACME server isn't asked, and this certificate isn't renewed", "host", s.Host, "until", until)
	}
}

func (h *host) dueAt() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.due
}

// issue has one certificate issued, and notes how that went.
func (c *Client) issue(ctx context.Context, h *host) {
	h.mu.Lock()
	before := h.cert
	h.mu.Unlock()
	attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
	cert, err := c.obtain(attempt, h, before)
	cancel()
	if ctx.Err() != nil && err != nil {
		return // the server is being stopped, which is nobody's failure
	}
	if err != nil {
		again := c.now().Add(c.pause(h, err))
		h.mu.Lock()
		h.err, h.due = err, again
		h.mu.Unlock()
		c.log.Error("no certificate was issued", "host", h.name, "directory", c.opts.Directory, "again", again.UTC().Format(time.RFC3339), "err", err)
		c.tell(Event{Host: h.name, Err: err, Again: again})
		return
	}
	h.unreachable.Reset()
	h.refused.Reset()
	h.advice = advice{}
	h.mu.Lock()
	h.cert, h.err, h.since = cert, nil, c.now()
	h.due = c.notTooSoon(h, renewal(cert))
	h.mu.Unlock()
	c.log.Info("a certificate was issued", "host", h.name, "directory", c.opts.Directory, "until", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	c.tell(Event{Host: h.name, NotAfter: cert.Leaf.NotAfter})
}

func (c *Client) tell(e Event) {
	if c.opts.Happened != nil {
		c.opts.Happened(e)
	}
}

// pause returns how long to wait after a failure.
func (c *Client) pause(h *host, err error) time.Duration {
	grows := h.unreachable
	var problem acme.Problem
	if errors.As(err, &problem) && problem.Status < http.StatusInternalServerError {
		grows = h.refused
	}
	return max(grows.NextBackOff(), c.busy.left())
}

// renewal returns when a certificate is renewed if nobody advises otherwise: when two thirds of its time are over.
func renewal(cert *tls.Certificate) time.Time {
	return cert.Leaf.NotAfter.Add(-lifetime(cert) / 3)
}

func lifetime(cert *tls.Certificate) time.Duration {
	return cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
}

// notTooSoon puts off the renewal of a certificate that was issued only just, whatever clocks and servers say of it: nobody wants orders without end.
func (c *Client) notTooSoon(h *host, due time.Time) time.Time {
	if h.since.IsZero() {
		return due
	}
	if soonest := h.since.Add(min(lifetime(h.cert)/3, time.Hour)); due.Before(soonest) {
		return soonest
	}
	return due
}

// advice is when the server advises to renew a certificate (ACME renewal information, RFC 9773).
type advice struct {
	acme.RenewalInfo
	askAgain time.Time // when to ask for advice again
}

// How often the server is asked for advice: as it says, but no more and no less often than this.
const (
	adviseEvery = 6 * time.Hour
	adviseLeast = time.Hour
	adviseMost  = 24 * time.Hour
)

// consult asks the server when it wants a certificate to be renewed, and has it renewed then. That may be long before the usual time, when certificates are
// about to be revoked. Without an answer the usual time holds.
func (c *Client) consult(ctx context.Context, h *host) {
	h.mu.Lock()
	cert, failed, due := h.cert, h.err != nil, h.due
	h.mu.Unlock()
	now := c.now()
	// After a failure it is the pause that counts.
	if cert == nil || failed || now.Before(h.advice.askAgain) || c.busy.left() > 0 || !now.Before(due) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	info, err := c.protocol().GetRenewalInfo(ctx, cert.Leaf)
	if err != nil {
		if !errors.Is(err, acme.ErrUnsupported) && ctx.Err() == nil {
			c.log.Debug("the ACME server doesn't say when to renew", "host", h.name, "err", err)
		}
		h.advice.askAgain = now.Add(adviseEvery)
		return
	}
	// One time is chosen for each window, or asking often enough would choose the earliest.
	if !h.advice.HasWindow() || !info.SameWindow(h.advice.RenewalInfo) {
		h.advice.RenewalInfo = info
		if info.ExplanationURL != "" {
			c.log.Warn("the ACME server explains when it wants a certificate to be renewed", "host", h.name, "see", info.ExplanationURL)
		}
	}
	every := adviseEvery
	if info.RetryAfter != nil {
		every = min(max(info.RetryAfter.Sub(now), adviseLeast), adviseMost)
	}
	h.advice.askAgain = now.Add(every)
	h.mu.Lock()
	defer h.mu.Unlock()
	// Whatever it says, some time has to be left for failures.
	due = h.advice.SelectedTime
	if latest := cert.Leaf.NotAfter.Add(-lifetime(cert) / 10); due.After(latest) {
		due = latest
	}
	h.due = c.notTooSoon(h, due)
}

// manners keeps a client within what a server is prepared to take, and its answers within what we are.
type manners struct {
	next http.RoundTripper
	now  func() time.Time

	mu    sync.Mutex
	until time.Time // when the server may be asked again
}

// RoundTrip asks, and notes when the server wants to be left alone (RFC 8555, section 6.6).
func (m *manners) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := m.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable {
		m.mu.Lock()
		m.until = m.now().Add(min(retryAfter(resp.Header.Get("Retry-After"), m.now()), maxRetryAfter))
		m.mu.Unlock()
	}
	return resp, nil
}

// CloseIdleConnections drops the connections that nobody uses.
func (m *manners) CloseIdleConnections() {
	if closer, ok := m.next.(interface{ CloseIdleConnections() }); ok {
		closer.CloseIdleConnections()
	}
}

// left returns how long the server wants to be left alone, a little more at random so that not all come back at once.
func (m *manners) left() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	left := m.until.Sub(m.now())
	if left <= 0 {
		return 0
	}
	return left + time.Duration(rand.Int64N(int64(left)/10+1))
}

// retryAfter reads a number of seconds, or a date (RFC 9110, section 10.2.3); 0 if it is neither.
func retryAfter(text string, now time.Time) time.Duration {
	var seconds int
	if n, err := fmt.Sscanf(text, "%d", &seconds); err == nil && n == 1 && fmt.Sprint(seconds) == text {
		return time.Duration(min(max(seconds, 0), int(maxRetryAfter/time.Second))) * time.Second
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	return max(at.Sub(now), 0)
}
