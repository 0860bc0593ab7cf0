package publisher

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// A Request is one that the publisher was asked.
type Request struct {
	Time   time.Time
	Method string
	Host   string // without the port
	Path   string // unescaped
	Query  string
	Header http.Header // as it came
	Proto  string      // "HTTP/1.1" or "HTTP/2.0"
	TLS    bool
	Remote string // the client's host:port
	Status int    // of the answer; 0 until it has begun, or if there is none
	Bytes  int64  // of the answer's body, as far as it was written
	Done   bool   // the answer is over, one way or another
}

// At returns host and path, what patterns are matched against.
func (r Request) At() string { return r.Host + r.Path }

// String returns the request on one line.
func (r Request) String() string {
	s := fmt.Sprintf("%s %s%s", r.Method, r.Host, r.Path)
	if r.Query != "" {
		s += "?" + r.Query
	}
	if ranges := r.Header.Get("Range"); ranges != "" {
		s += " (" + ranges + ")"
	}
	return fmt.Sprintf("%s → %d, %d bytes", s, r.Status, r.Bytes)
}

// Requests returns what the publisher was asked since it was started or the log was cleared, in order of arrival.
func (p *Publisher) Requests() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	requests := make([]Request, len(p.log))
	for i, r := range p.log {
		requests[i] = *r
	}
	return requests
}

// ClearRequests forgets what was asked. Requests that are being answered are forgotten too.
func (p *Publisher) ClearRequests() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = nil
	p.tell()
}

// Count returns how many requests came in for a pattern, as in [URL], of whatever method.
func (p *Publisher) Count(pattern string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count(func(r Request) bool { return matches(pattern, r.At()) })
}

// Wait returns once at least n requests that match have come in. A nil match is all of them. It returns ctx's error if that ends first.
func (p *Publisher) Wait(ctx context.Context, n int, match func(Request) bool) error {
	for {
		p.mu.Lock()
		count, changed := p.count(match), p.changed
		p.mu.Unlock()
		if count >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %d requests, %d came: %w", n, count, ctx.Err())
		}
	}
}

// count counts requests. p.mu is held.
func (p *Publisher) count(match func(Request) bool) int {
	n := 0
	for _, r := range p.log {
		if match == nil || match(*r) {
			n++
		}
	}
	return n
}

// tell wakes those who wait for the log to change. p.mu is held.
func (p *Publisher) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// matches reports whether s is what a pattern says, in which * stands for any text, slashes included.
func matches(pattern, s string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return s == pattern
	}
	s, ok := strings.CutPrefix(s, head)
	if !ok {
		return false
	}
	parts := strings.Split(rest, "*")
	for _, part := range parts[:len(parts)-1] {
		_, after, found := strings.Cut(s, part)
		if !found {
			return false
		}
		s = after
	}
	return strings.HasSuffix(s, parts[len(parts)-1])
}
