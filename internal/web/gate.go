package web

import (
	"container/list"
	"context"
	"fmt"
	"hash/maphash"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/acproxy/acproxy"
)

// busyRetry is when it is worth asking again for somebody whose turn didn't come.
const busyRetry = 5 * time.Second

// CodeBusy is the code of the error of a request whose turn didn't come.
const CodeBusy = "publisher-busy"

// A gate lets requests to hosts through, in turn. It is safe for concurrent use.
type gate struct {
	limits Limits
	now    func() time.Time
	random func() float64 // from 0 to 1
	seed   maphash.Seed

	mu     sync.Mutex
	hosts  map[string]*host
	swept  time.Time
	queued uint64 // requests so far
}

// A turn is a request's place at a host, from the queue to the end of its body.
type turn struct {
	gate    *gate
	host    *host
	breaker *breaker // the host's, for the rule: what one rule can't reach, another may
	large   bool
	file    uint64 // the URL, hashed
	number  uint64
	ready   chan struct{} // closed when the turn has come, or isn't going to

	// The gate's mutex guards these.
	element *list.Element // in the queue; nil after it
	refused error         // why the turn isn't going to come
	held    bool
	probe   bool
	round   int
	judged  bool // it counts as a failure already
}

// asked is what somebody wants to ask for.
type asked struct {
	host   string // the origin
	prefix string // of the rule
	url    string
	large  bool
}

func newGate(limits Limits, now func() time.Time, random func() float64) *gate {
	return &gate{limits: limits.orDefaults(), now: now, random: random, seed: maphash.MakeSeed(), hosts: make(map[string]*host)}
}

// enter waits until a request may be made: for patience at most, or until ctx is done. The turn has to be told what becomes of the request, and be
// released. An error is ctx's, or an [acproxy.Error] without a trace.
func (g *gate) enter(ctx context.Context, a asked, patience time.Duration) (*turn, error) {
	now := g.now()
	t := &turn{gate: g, large: a.large, file: maphash.String(g.seed, a.url), ready: make(chan struct{})}
	if err := g.join(t, a, now); err != nil {
		return nil, err
	}
	var err error
	select {
	case <-t.ready:
		err = t.refused
	default:
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-t.ready:
			err = t.refused
		case <-timer.C:
			err = g.giveUp(t, patience, nil)
		case <-ctx.Done():
			err = g.giveUp(t, patience, ctx.Err())
		}
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// join puts a turn into its host's queue, unless the host isn't asked at all.
func (g *gate) join(t *turn, a asked, now time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	h := g.host(a.host, now)
	if now.Before(h.resting) {
		return h.resters(now)
	}
	b := h.breakers[a.prefix]
	if b == nil {
		b = &breaker{limits: &g.limits}
		h.breakers[a.prefix] = b
	}
	probe, ok := b.admit(now)
	if !ok {
		return h.down(b, now)
	}
	g.queued++
	t.host, t.breaker, t.probe, t.round, t.number = h, b, probe, b.round, g.queued
	if t.large {
		t.element = h.large.PushBack(t)
	} else {
		t.element = h.small.PushBack(t)
	}
	g.dispatch(h, now)
	return nil
}

// giveUp takes a turn out of the queue because its time is over, or, with an error, because nobody wants it any more. It returns nil if it came in
// this moment and is still wanted.
func (g *gate) giveUp(t *turn, patience time.Duration, unwanted error) error {
	now := g.now()
	g.mu.Lock()
	defer g.mu.Unlock()
	h := t.host
	switch {
	case t.element != nil:
		// Nobody else waits because of this one: whoever comes next waits for a place, or for the bucket, as it did.
		h.remove(t)
		t.breaker.abandoned(t.round, t.probe)
	case t.held && unwanted != nil:
		t.breaker.abandoned(t.round, t.probe)
		g.release(t, now)
	case unwanted == nil:
		return t.refused
	}
	if unwanted != nil {
		return unwanted
	}
	detail := fmt.Sprintf("no turn to ask %s came within %v: %s in progress, %d are waiting (dial.max_connections, dial.rate)",
		h.name, patience.Round(time.Millisecond), requests(h.held), h.small.Len()+h.large.Len())
	return &acproxy.Error{Kind: acproxy.ErrBusy, Code: CodeBusy, Detail: detail, RetryAfter: busyRetry}
}

func requests(n int) string {
	if n == 1 {
		return "1 request is"
	}
	return strconv.Itoa(n) + " requests are"
}

func (h *host) remove(t *turn) {
	if t.large {
		h.large.Remove(t.element)
	} else {
		h.small.Remove(t.element)
	}
	t.element = nil
}

// dispatch lets those go whose turn has come.
func (g *gate) dispatch(h *host, now time.Time) {
	for {
		t := g.next(h)
		if t == nil {
			return
		}
		if h.bucket != nil && !h.bucket.AllowN(now, 1) {
			g.refillIn(h, h.untilToken(now))
			return
		}
		h.remove(t)
		t.held = true
		h.held++
		if t.large {
			h.images++
		}
		close(t.ready)
	}
}

// next returns whose turn it is: the first in line of those that there is room for, nil if there is nobody.
func (g *gate) next(h *host) *turn {
	if g.limits.MaxConnections > 0 && h.held >= g.limits.MaxConnections {
		return nil
	}
	first := func(queue *list.List) *turn {
		if e := queue.Front(); e != nil {
			t, _ := e.Value.(*turn)
			return t
		}
		return nil
	}
	small, large := first(&h.small), first(&h.large)
	if g.limits.MaxConnections > 0 && h.images >= g.limits.maxImages() {
		large = nil
	}
	if large == nil || small != nil && small.number < large.number {
		return small
	}
	return large
}

// untilToken returns how long it takes until the bucket holds a token.
func (h *host) untilToken(now time.Time) time.Duration {
	missing := 1 - h.bucket.TokensAt(now)
	// What is lost in calculating must not make it ask again and again.
	return max(time.Duration(missing/float64(h.bucket.Limit())*float64(time.Second)), time.Millisecond)
}

func (g *gate) refillIn(h *host, d time.Duration) {
	if h.refill != nil {
		h.refill.Reset(d)
		return
	}
	// Runs once for each time that it is set. If nobody waits any more by then, it does nothing.
	h.refill = time.AfterFunc(d, func() {
		now := g.now()
		g.mu.Lock()
		defer g.mu.Unlock()
		g.dispatch(h, now)
	})
}

// refuseWaiting sends those away who wait, all of them or those under the rule of one prefix.
func (h *host) refuseWaiting(wanted func(*turn) bool, why func() error) {
	for _, queue := range []*list.List{&h.small, &h.large} {
		for e := queue.Front(); e != nil; {
			t, _ := e.Value.(*turn)
			e = e.Next()
			if wanted(t) {
				h.remove(t)
				t.breaker.abandoned(t.round, t.probe)
				t.refused = why()
				close(t.ready)
			}
		}
	}
}

// answered tells of the head of the host's answer, and how long it took to come.
func (t *turn) answered(resp *http.Response, took time.Duration) {
	g := t.gate
	now, random := g.now(), g.random()
	status := statusText(resp.StatusCode)
	g.mu.Lock()
	defer g.mu.Unlock()
	h := t.host
	h.took(took, resp.StatusCode >= http.StatusInternalServerError)
	if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable {
		if until := now.Add(min(RetryAfter(resp, now), g.limits.MaxRetryAfter)); until.After(now) && until.After(h.resting) {
			h.resting, h.why = until, status
			h.refuseWaiting(func(*turn) bool { return true }, func() error { return h.resters(now) })
		}
	}
	if resp.StatusCode/100 != 5 || resp.StatusCode == http.StatusNotImplemented {
		t.breaker.answered(t.round)
		t.probe = false
		return
	}
	f := failure{kind: acproxy.ErrPublisher, text: "it answered " + status, when: now}
	if resp.StatusCode == http.StatusInternalServerError {
		f.file = t.file
	}
	g.failed(t, f, random)
}

// unanswered tells that there was no answer. Errors that aren't the host's fault don't count.
func (t *turn) unanswered(err error, text string) {
	t.fault(err, failure{text: text, unreachable: Unreachable(err)})
}

// brokeOff tells that the body ended before its end.
func (t *turn) brokeOff(err error, text string) {
	t.fault(err, failure{text: text, file: t.file})
}

// fault counts an error against the host, unless it is its reader's own, and releases the turn.
func (t *turn) fault(err error, f failure) {
	g := t.gate
	now, random := g.now(), g.random()
	f.kind, f.when = acproxy.KindOf(err), now
	g.mu.Lock()
	defer g.mu.Unlock()
	if f.kind == acproxy.ErrPublisher || f.kind == acproxy.ErrTimeout {
		if t.host.failures++; f.file == 0 {
			t.host.requests++ // that wasn't counted when its answer began
		}
		g.failed(t, f, random)
	} else {
		t.breaker.abandoned(t.round, t.probe)
	}
	g.release(t, now)
}

func (g *gate) failed(t *turn, f failure, random float64) {
	if t.judged {
		return
	}
	f.text = oneLine(f.text)
	t.judged = true
	if t.breaker.failed(t.round, f, random) {
		same := func(waiting *turn) bool { return waiting.breaker == t.breaker }
		t.host.refuseWaiting(same, func() error { return t.host.down(t.breaker, f.when) })
	}
}

// oneLine returns a stranger's text as it may stand in a line of ours: not too long, and without anything that moves the cursor.
func oneLine(text string) string {
	const most = 300
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return ' '
	}, strings.ToValidUTF8(text, ""))
}

// ended tells that the answer came to its end, or was closed by somebody who had no complaint, and releases the turn.
func (t *turn) ended() {
	now := t.gate.now()
	t.gate.mu.Lock()
	defer t.gate.mu.Unlock()
	if t.held && !t.judged {
		t.breaker.ended(t.round)
	}
	t.gate.release(t, now)
}

// dropped tells that whoever asked doesn't want the answer any more, and releases the turn.
func (t *turn) dropped() {
	now := t.gate.now()
	t.gate.mu.Lock()
	defer t.gate.mu.Unlock()
	t.breaker.abandoned(t.round, t.probe)
	t.gate.release(t, now)
}

// release gives the place to the next one. It does nothing the second time.
func (g *gate) release(t *turn, now time.Time) {
	if !t.held {
		return
	}
	h := t.host
	t.held = false
	h.held--
	if t.large {
		h.images--
	}
	h.used = now
	g.dispatch(h, now)
}
