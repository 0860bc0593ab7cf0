package web

import (
	"container/list"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/acproxy/acproxy"
)

const (
	// maxHosts is how many hosts are remembered. Those with requests are, however many there are.
	maxHosts = 1024
	// keepHost is how long a host is remembered that nobody asks.
	keepHost = 10 * time.Minute
)

// A host is what is remembered of one. The gate's mutex guards it.
type host struct {
	name string // its origin

	held, images int // requests in progress, and how many of them are for images
	// Requests that wait, by their numbers: small ones, and those for images, which may have to let small ones pass.
	small, large list.List
	bucket       *rate.Limiter // nil lets any number begin
	refill       *time.Timer   // lets in who waits for the bucket
	resting      time.Time     // until when it asked to be left alone
	why          string        // the status with which it did
	breakers     map[string]*breaker
	used         time.Time

	requests, failures int64         // answered and not, since it is remembered
	latency            time.Duration // until the head of an answer, lately
}

// took notes how a request ended, and how long its answer took to begin.
func (h *host) took(d time.Duration, failed bool) {
	h.requests++
	if failed {
		h.failures++
		return
	}
	if h.latency == 0 {
		h.latency = d
	}
	// A fifth of each new one, so that about the last ten count.
	h.latency += (d - h.latency) / 5
}

// resters returns why a host isn't asked that wants to be left alone.
func (h *host) resters(now time.Time) error {
	left := h.resting.Sub(now)
	return &acproxy.Error{
		Kind: acproxy.ErrPublisher, Code: "publisher-resting", RetryAfter: left,
		Detail: fmt.Sprintf("%s answered %s and said when to come back: it isn't asked before %s, in %v", h.name, h.why, clock(h.resting), roundUp(left)),
	}
}

// down returns why a host isn't asked that a breaker keeps requests from.
func (h *host) down(b *breaker, now time.Time) error {
	left := max(b.until.Sub(now), time.Second)
	again := fmt.Sprintf("it is asked again at %s, in %v", clock(b.until), roundUp(left))
	if b.probing || !now.Before(b.until) {
		again = "another request finds out whether it is back"
	}
	e := &acproxy.Error{
		Kind: b.last.kind, Code: "publisher-down", RetryAfter: left,
		Detail: fmt.Sprintf("%s has been down since %s, after %d failures in a row, and isn't asked: %s; the last failure was: %s",
			h.name, clock(b.since), b.failures(), again, b.last.text),
	}
	if b.last.unreachable {
		return &dialError{e}
	}
	return e
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// roundUp rounds to seconds, as Retry-After has them.
func roundUp(d time.Duration) time.Duration {
	return (d + time.Second - 1).Truncate(time.Second)
}

func statusText(status int) string {
	return strings.TrimSpace(strconv.Itoa(status) + " " + http.StatusText(status))
}

// host returns what is remembered of a host, beginning now if it is nothing.
func (g *gate) host(name string, now time.Time) *host {
	h, ok := g.hosts[name]
	if !ok {
		if now.Sub(g.swept) >= keepHost/10 {
			g.sweep(now)
		}
		g.makeRoom(now)
		h = &host{name: name, breakers: make(map[string]*breaker)}
		if g.limits.Rate > 0 {
			h.bucket = rate.NewLimiter(rate.Limit(g.limits.Rate), g.limits.Burst)
		}
		g.hosts[name] = h
	}
	h.used = now
	return h
}

// sweep forgets the hosts that nobody asks and that there is nothing worth remembering of.
func (g *gate) sweep(now time.Time) {
	g.swept = now
	maps.DeleteFunc(g.hosts, func(_ string, h *host) bool {
		return !h.inUse() && now.Sub(h.used) >= keepHost && h.atRest(now)
	})
}

// makeRoom forgets some of the hosts that were asked least recently, if there are too many. Who asks for ever new ones should not make us forget
// that another one is down: those that aren't asked go last.
func (g *gate) makeRoom(now time.Time) {
	if len(g.hosts) < maxHosts {
		return
	}
	idle := slices.Collect(maps.Values(g.hosts))
	idle = slices.DeleteFunc(idle, (*host).inUse)
	slices.SortFunc(idle, func(a, b *host) int {
		switch closedA, closedB := a.notAsked(now), b.notAsked(now); {
		case closedA && !closedB:
			return 1
		case closedB && !closedA:
			return -1
		}
		return a.used.Compare(b.used)
	})
	// Not one by one: to look at all of them takes a while.
	for _, h := range idle[:min(len(idle), maxHosts/8)] {
		delete(g.hosts, h.name)
	}
}

// forgive forgets which hosts are down. Those that want to be left alone still do.
func (g *gate) forgive() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, h := range g.hosts {
		// Requests in progress keep the breakers that they began with, and tell them what nobody asks for.
		h.breakers = make(map[string]*breaker)
	}
}

// notAsked reports whether a host wants to be left alone, or is down.
func (h *host) notAsked(now time.Time) bool {
	for _, b := range h.breakers {
		if b.isOpen() {
			return true
		}
	}
	return now.Before(h.resting)
}

func (h *host) inUse() bool { return h.held+h.small.Len()+h.large.Len() > 0 }

// atRest reports whether a host would be treated as it is if nothing were known of it.
func (h *host) atRest(now time.Time) bool {
	for _, b := range h.breakers {
		if now.Before(b.until) {
			return false
		}
	}
	return !now.Before(h.resting) && (h.bucket == nil || h.bucket.TokensAt(now) >= float64(h.bucket.Burst()))
}

// A HostState is how things are with one host.
type HostState struct {
	Host         string         `json:"host"`       // scheme, host and port; the port is left out where it is the scheme's own
	InProgress   int            `json:"inProgress"` // requests, until their bodies were read
	Images       int            `json:"images"`     // how many of those are for images
	Waiting      int            `json:"waiting"`    // requests whose turn hasn't come
	Requests     int64          `json:"requests"`   // that were made since the host is remembered, which is as long as it is asked every now and then
	Failures     int64          `json:"failures"`   // how many of those had no answer, or one of 5xx
	Latency      float64        `json:"latency"`    // seconds until the head of an answer, on average of about the last ten
	Used         time.Time      `json:"used"`       // when it was last asked
	RestingUntil time.Time      `json:"restingUntil,omitzero"`
	RestingWhy   string         `json:"restingWhy,omitempty"` // the status with which it said that it wants to be left alone
	Breakers     []BreakerState `json:"breakers,omitempty"`   // those under whose rules requests failed, by prefix
}

// Open reports whether a breaker keeps requests from the host.
func (s HostState) Open() bool {
	return slices.ContainsFunc(s.Breakers, func(b BreakerState) bool { return b.State != BreakerClosed })
}

// The states of a breaker.
const (
	BreakerClosed   = "closed"    // requests failed, but not enough of them
	BreakerOpen     = "open"      // the host isn't asked
	BreakerHalfOpen = "half-open" // one request finds out, or the next one will, whether the host is back
)

// A BreakerState is what became of requests to a host under the rule of one prefix. A host with its own rules may be reachable for one and not
// for another.
type BreakerState struct {
	Prefix      string    `json:"prefix,omitempty"` // the rule's; "" is the one for all names
	State       string    `json:"state"`
	Failures    int       `json:"failures"`       // in a row
	Since       time.Time `json:"since,omitzero"` // when the host was found to be down
	Until       time.Time `json:"until,omitzero"` // when it is asked again
	LastError   string    `json:"lastError"`      // what the last failure was
	LastFailure time.Time `json:"lastFailure"`    // when
}

// states returns how things are, by the names of the hosts.
func (g *gate) states() []HostState {
	now := g.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sweep(now)
	states := make([]HostState, 0, len(g.hosts))
	for _, h := range g.hosts {
		s := HostState{Host: h.name, InProgress: h.held, Images: h.images, Waiting: h.small.Len() + h.large.Len(), Requests: h.requests, Failures: h.failures, Latency: h.latency.Seconds(), Used: h.used}
		if now.Before(h.resting) {
			s.RestingUntil, s.RestingWhy = h.resting, h.why
		}
		for prefix, b := range h.breakers {
			if !b.clean() {
				s.Breakers = append(s.Breakers, b.state(prefix, now))
			}
		}
		slices.SortFunc(s.Breakers, func(a, b BreakerState) int { return strings.Compare(a.Prefix, b.Prefix) })
		states = append(states, s)
	}
	slices.SortFunc(states, func(a, b HostState) int { return strings.Compare(a.Host, b.Host) })
	return states
}

func (b *breaker) state(prefix string, now time.Time) BreakerState {
	s := BreakerState{Prefix: prefix, State: BreakerClosed, Failures: b.failures(), LastError: b.last.text, LastFailure: b.last.when}
	if b.isOpen() {
		s.State, s.Since, s.Until = BreakerOpen, b.since, b.until
		if b.probing || !now.Before(b.until) {
			s.State = BreakerHalfOpen
		}
	}
	return s
}
