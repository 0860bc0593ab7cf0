package publisher

import (
	"net/http"
	"slices"
	"sync"
	"time"
)

// A Fault says how to misbehave. Its fields can be combined; the zero Fault changes nothing. Offsets count bytes of the answer's body; they
// are pointers because 0 is an offset: use [At]. What is marked as HTTP/1.1 changes nothing in HTTP/2; [ConnFault.HTTP1] keeps clients from that.
type Fault struct {
	Skip  int // how many requests are answered properly first: what they were told changes under their feet
	Times int // how many requests it applies to after those; 0 is all

	// Instead of the right answer.

	Status          int    // this status; the body is a line of text unless Body is set. Status 202 and Times 3 say "ask again" three times
	Body            []byte // these bytes, with an ETag of their own and an hour younger; Header can set the old ones again
	RedirectTo      string // to this URL, with 302 or Status
	RedirectLoop    bool   // to the URL that was asked for
	CloseConnection bool   // none: the connection is closed before a byte of it
	EndlessHeaders  bool   // a header that never ends (HTTP/1.1; in HTTP/2 one of 4 MiB, see [ConnFault.EndlessHeaders])
	EndlessInterim  bool   // 103 Early Hints again and again, and no answer after them

	// Before and in the header.

	Delay             time.Duration // before the header
	HeaderEvery       time.Duration // the header comes a byte at a time, one each time so long has passed (HTTP/1.1)
	Header            http.Header   // fields set; a nil list removes one
	IgnoreRange       bool          // answers 200 with all of it, whatever range was asked for
	IgnoreIfRange     bool          // answers a range with its bytes, whatever they were to depend on
	UnaskedRange      bool          // answers 206 where no range was asked for, as if it had been one of all bytes
	MultipartRange    bool          // answers a range with multipart/byteranges, the range and one byte of it again
	ShiftRange        int64         // a range begins so many bytes later than was asked for, earlier if less than 0, and says so
	RangeLength       int64         // a range ends after so many bytes, although more were asked for, and says so
	WrongContentRange bool          // Content-Range says one byte further than what is sent
	ContentLength     *int64        // claimed instead of the right one (in HTTP/2 too little is sent, never too much)
	OtherLength       *int64        // claimed in a second Content-Length, after the right one (HTTP/1.1)
	NoContentLength   bool          // none: chunks in HTTP/1.1
	CloseDelimited    bool          // none, and no chunks: the body ends where the connection does (HTTP/1.1)
	HTTP10            bool          // the answer of an HTTP/1.0 server, which closes the connection after it (HTTP/1.1)

	// In the body.

	FlipBitAt      *int64 // the lowest bit of this byte is another
	TruncateAfter  *int64 // the connection (in HTTP/2 the stream) ends here, although the whole length was claimed
	ResetAfter     *int64 // the connection is reset here: RST, and what hasn't been read of the answer may be lost
	TearAfter      *int64 // the connection ends in the middle of what is sent next: over TLS in the middle of a record
	StallAfter     *int64 // nothing more comes after this byte until Release, Stop or Close, or until the client gives up
	BytesPerSecond int64  // not faster than this
	EndlessBody    bool   // when the body is over, spaces follow for ever
	BadChunk       string // the body comes in chunks, and this follows in place of the "0\r\n\r\n" that ends them (HTTP/1.1)
}

// A ConnFault says how to misbehave below HTTP, on connections to the TLS listener, where nothing is known yet but the host that the client names. Its
// fields can be combined as far as that makes sense; the zero ConnFault changes nothing.
type ConnFault struct {
	Skip  int // how many connections are served properly first
	Times int // how many connections it applies to after those; 0 is all

	StallHandshake bool   // the client's hello is not answered until Release, Stop or Close, and then the connection is closed
	CutHandshake   bool   // the connection is closed in place of an answer to it
	Garbage        bool   // the answer to it is something, but not TLS
	WrongHost      bool   // the certificate is for another host
	Expired        bool   // the time of the certificate is over
	HTTP1          bool   // no HTTP/2
	CutAfter       *int64 // the connection is closed after so many bytes to the client, of whatever they are
	ResetAfter     *int64 // the same with RST
	EndlessHeaders bool   // HTTP/2 whose first answer is a header without end, over more and more CONTINUATION frames
	StallInHeader  bool   // HTTP/2 whose first answer is the first half of a header; the other half comes never, and with it nothing else
}

// At returns a pointer to an offset.
func At(offset int64) *int64 { return &offset }

// A Match says which requests a fault is for. The request's URL has host and path as they were asked for.
type Match func(*http.Request) bool

// Method restricts a match to the requests of one method: a change between HEAD and GET is a fault of one of them.
func Method(method string, of Match) Match {
	return func(r *http.Request) bool { return r.Method == method && of(r) }
}

// URL matches requests by host (without port) and path, unescaped: * stands for any text, slashes included. "storage.example.com/*.aci"
// are all images there, without their signatures, which end in .asc; "*" is everything.
func URL(pattern string) Match {
	return func(r *http.Request) bool { return matches(pattern, r.URL.Host+r.URL.Path) }
}

// A Trouble is a fault that is in effect.
type Trouble struct {
	match Match
	fault Fault
	// Of a fault of connections, the hosts in place of a match.
	hosts string
	conn  ConnFault

	skip, times int

	mu       sync.Mutex
	seen     int // requests, or connections, that matched
	over     bool
	released chan struct{}
	stalled  chan struct{}
}

// Misbehave puts a fault into effect. Where several match a request they are combined; what is set in a later one goes before.
func (p *Publisher) Misbehave(match Match, f Fault) *Trouble {
	t := &Trouble{match: match, fault: f, skip: f.Skip, times: f.Times, released: make(chan struct{}), stalled: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.troubles = append(p.troubles, t)
	return t
}

// MisbehaveTLS puts a fault of connections into effect, for those whose client names a host that matches a pattern as in [URL]. Connections that
// are there already are not affected. Where several match, the one that was put into effect last counts alone.
func (p *Publisher) MisbehaveTLS(hosts string, f ConnFault) *Trouble {
	t := &Trouble{hosts: hosts, conn: f, skip: f.Skip, times: f.Times, released: make(chan struct{}), stalled: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.connTroubles = append(p.connTroubles, t)
	return t
}

// Behave ends all faults, and lets go what stalls.
func (p *Publisher) Behave() {
	p.mu.Lock()
	troubles := slices.Concat(p.troubles, p.connTroubles)
	p.troubles, p.connTroubles = nil, nil
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

// Applied returns how many requests, or connections, the fault was applied to.
func (t *Trouble) Applied() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := max(t.seen-t.skip, 0)
	if t.times > 0 {
		n = min(n, t.times)
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

// take counts a request, or a connection, that matched, and reports whether the fault is for it.
func (t *Trouble) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return false
	}
	t.seen++
	return t.seen > t.skip && (t.times == 0 || t.seen <= t.skip+t.times)
}

// connFaultFor returns the trouble of a connection whose client names a host, nil for none.
func (p *Publisher) connFaultFor(host string) *Trouble {
	p.mu.Lock()
	troubles := p.connTroubles
	p.mu.Unlock()
	var last *Trouble
	for _, t := range troubles {
		if matches(t.hosts, host) && t.take() {
			last = t
		}
	}
	return last
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
	set(&f.HeaderEvery, g.HeaderEvery)
	set(&f.ShiftRange, g.ShiftRange)
	set(&f.RangeLength, g.RangeLength)
	set(&f.BadChunk, g.BadChunk)
	for _, b := range []struct {
		to   *bool
		from bool
	}{
		{&f.RedirectLoop, g.RedirectLoop}, {&f.CloseConnection, g.CloseConnection}, {&f.EndlessHeaders, g.EndlessHeaders},
		{&f.IgnoreRange, g.IgnoreRange}, {&f.WrongContentRange, g.WrongContentRange}, {&f.NoContentLength, g.NoContentLength},
		{&f.CloseDelimited, g.CloseDelimited}, {&f.EndlessBody, g.EndlessBody}, {&f.EndlessInterim, g.EndlessInterim},
		{&f.UnaskedRange, g.UnaskedRange}, {&f.MultipartRange, g.MultipartRange}, {&f.HTTP10, g.HTTP10},
		{&f.IgnoreIfRange, g.IgnoreIfRange},
	} {
		set(b.to, b.from)
	}
	for _, o := range []struct{ to, from **int64 }{
		{&f.ContentLength, &g.ContentLength}, {&f.FlipBitAt, &g.FlipBitAt}, {&f.TruncateAfter, &g.TruncateAfter},
		{&f.ResetAfter, &g.ResetAfter}, {&f.StallAfter, &g.StallAfter}, {&f.TearAfter, &g.TearAfter}, {&f.OtherLength, &g.OtherLength},
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
