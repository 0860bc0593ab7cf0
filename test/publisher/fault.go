package publisher

import (
	"net/http"
	"sync"
	"time"
)

// A Fault says how to misbehave. Its fields can be combined; the zero Fault changes nothing. Offsets count bytes of the answer's body; they
// are pointers because 0 is an offset: use [At].
type Fault struct {
	Skip  int // how many requests are answered properly first: what they were told changes under their feet
	Times int // how many requests it applies to after those; 0 is all

	// Instead of the right answer.

	Status          int    // this status; the body is a line of text unless Body is set. Status 202 and Times 3 say "ask again" three times
	Body            []byte // these bytes, with an ETag of their own and an hour younger; Header can set the old ones again
	RedirectTo      string // to this URL, with 302 or Status
	RedirectLoop    bool   // to the URL that was asked for
	CloseConnection bool   // none: the connection is closed before a byte of it
	EndlessHeaders  bool   // a header that never ends (HTTP/1.1; in HTTP/2 one of 4 MiB)

	// Before and in the header.

	Delay             time.Duration // before the header
	Header            http.Header   // fields set; a nil list removes one
	IgnoreRange       bool          // answers 200 with all of it, whatever range was asked for
	WrongContentRange bool          // Content-Range says one byte further than what is sent
	ContentLength     *int64        // claimed instead of the right one (in HTTP/2 too little is sent, never too much)
	NoContentLength   bool          // none: chunks in HTTP/1.1
	CloseDelimited    bool          // none, and no chunks: the body ends where the connection does (HTTP/1.1 only)

	// In the body.

	FlipBitAt      *int64 // the lowest bit of this byte is another
	TruncateAfter  *int64 // the connection (in HTTP/2 the stream) ends here, although the whole length was claimed
	ResetAfter     *int64 // the connection is reset here: RST, and what hasn't been read of the answer may be lost
	StallAfter     *int64 // nothing more comes after this byte until Release, Stop or Close, or until the client gives up
	BytesPerSecond int64  // not faster than this
	EndlessBody    bool   // when the body is over, spaces follow for ever
}

// At returns a pointer to an offset.
func At(offset int64) *int64 { return &offset }

// A Match says which requests a fault is for. The request's URL has host and path as they were asked for.
type Match func(*http.Request) bool

// URL matches requests by host (without port) and path, unescaped: * stands for any text, slashes included. "storage.example.com/*.aci"
// are all images there, without their signatures, which end in .asc; "*" is everything.
func URL(pattern string) Match {
	return func(r *http.Request) bool { return matches(pattern, r.URL.Host+r.URL.Path) }
}

// A Trouble is a fault that is in effect.
type Trouble struct {
	match Match
	fault Fault

	mu       sync.Mutex
	seen     int // requests that matched
	over     bool
	released chan struct{}
	stalled  chan struct{}
}

// Misbehave puts a fault into effect. Where several match a request they are combined; what is set in a later one goes before.
func (p *Publisher) Misbehave(match Match, f Fault) *Trouble {
	t := &Trouble{match: match, fault: f, released: make(chan struct{}), stalled: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.troubles = append(p.troubles, t)
	return t
}

// Behave ends all faults, and lets go what stalls.
func (p *Publisher) Behave() {
	p.mu.Lock()
	troubles := p.troubles
	p.troubles = nil
	p.mu.Unlock()
	for _, t := range troubles {
		t.End()
	}
}

// End ends the fault for the requests to come, and lets go what stalls. The answers that are on their way keep their other faults.
func (t *Trouble) End() {
	t.mu.Lock()
	t.over = true
	t.mu.Unlock()
	t.Release()
}

// Release lets go the answers that stall, and from now on none stalls for this fault.
func (t *Trouble) Release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.released:
	default:
		close(t.released)
	}
}

// Stalled returns a channel that is closed when the first answer stalls.
func (t *Trouble) Stalled() <-chan struct{} { return t.stalled }

// Applied returns how many requests the fault was applied to.
func (t *Trouble) Applied() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := max(t.seen-t.fault.Skip, 0)
	if t.fault.Times > 0 {
		n = min(n, t.fault.Times)
	}
	return n
}

func (t *Trouble) stall() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.stalled:
	default:
		close(t.stalled)
	}
}

// take counts a request that matched, and reports whether the fault is for it.
func (t *Trouble) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return false
	}
	t.seen++
	return t.seen > t.fault.Skip && (t.fault.Times == 0 || t.seen <= t.fault.Skip+t.fault.Times)
}

// faultFor returns the faults for a request, combined, and the trouble that it stalls for, nil for none.
func (p *Publisher) faultFor(r *http.Request) (Fault, *Trouble) {
	p.mu.Lock()
	troubles := p.troubles
	p.mu.Unlock()
	var f Fault
	var stalls *Trouble
	for _, t := range troubles {
		if !t.match(r) || !t.take() {
			continue
		}
		f.add(t.fault)
		if t.fault.StallAfter != nil {
			stalls = t
		}
	}
	return f, stalls
}

// add sets what g sets.
func (f *Fault) add(g Fault) {
	set(&f.Status, g.Status)
	set(&f.RedirectTo, g.RedirectTo)
	set(&f.Delay, g.Delay)
	set(&f.BytesPerSecond, g.BytesPerSecond)
	for _, b := range []struct {
		to   *bool
		from bool
	}{
		{&f.RedirectLoop, g.RedirectLoop}, {&f.CloseConnection, g.CloseConnection}, {&f.EndlessHeaders, g.EndlessHeaders},
		{&f.IgnoreRange, g.IgnoreRange}, {&f.WrongContentRange, g.WrongContentRange}, {&f.NoContentLength, g.NoContentLength},
		{&f.CloseDelimited, g.CloseDelimited}, {&f.EndlessBody, g.EndlessBody},
	} {
		set(b.to, b.from)
	}
	for _, o := range []struct{ to, from **int64 }{
		{&f.ContentLength, &g.ContentLength}, {&f.FlipBitAt, &g.FlipBitAt}, {&f.TruncateAfter, &g.TruncateAfter},
		{&f.ResetAfter, &g.ResetAfter}, {&f.StallAfter, &g.StallAfter},
	} {
		set(o.to, *o.from)
	}
	if g.Body != nil {
		f.Body = g.Body
	}
	if f.Header == nil {
		f.Header = make(http.Header)
	}
	for name, values := range g.Header {
		f.Header[http.CanonicalHeaderKey(name)] = values
	}
}

// set sets *to unless from is zero.
func set[T comparable](to *T, from T) {
	var zero T
	if from != zero {
		*to = from
	}
}
