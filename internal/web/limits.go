package web

import "time"

// Defaults of [Limits].
const (
	DefaultMaxConnections = 16
	DefaultRate           = 100
	DefaultBurst          = 200
	DefaultMaxRetryAfter  = 5 * time.Minute
	DefaultFailures       = 5
	DefaultOpen           = 5 * time.Second
	DefaultMaxOpen        = time.Minute
)

// Limits say how a host is spared, and what happens when it is down. Each host is counted by itself: scheme, host and port as asked for,
// whichever addresses it has and whichever proxy leads there.
type Limits struct {
	// MaxConnections is how many requests there may be at a time, from before the connection is made until the body was read or closed. A
	// quarter of them, at least one if there are two, is never taken by images, so that the small requests don't wait for the end of
	// downloads. 0 means DefaultMaxConnections, less than 0 any number.
	MaxConnections int
	// Rate is how many requests may begin in a second, in the long run; 0 means DefaultRate, less than 0 any number.
	Rate int
	// Burst is how many may begin at once after a pause; 0 means DefaultBurst.
	Burst int
	// MaxRetryAfter is for how long, at most, a host is left alone because it said so (429 or 503 with Retry-After); 0 means
	// DefaultMaxRetryAfter, less than 0 that what it says is ignored.
	MaxRetryAfter time.Duration
	// Failures is how many requests in a row have to fail before the host isn't asked any more for a while; 0 means DefaultFailures, less
	// than 0 that it is always asked.
	Failures int
	// Open is how long the host isn't asked the first time. Each time that it still doesn't answer then, it is twice as long. 0 means
	// DefaultOpen.
	Open time.Duration
	// MaxOpen is how long it isn't asked at most; 0 means DefaultMaxOpen.
	MaxOpen time.Duration
}

func (l Limits) orDefaults() Limits {
	l.MaxConnections = orDefault(l.MaxConnections, DefaultMaxConnections)
	l.Rate = orDefault(l.Rate, DefaultRate)
	l.Burst = orDefault(l.Burst, DefaultBurst)
	l.MaxRetryAfter = orDefault(l.MaxRetryAfter, DefaultMaxRetryAfter)
	l.Failures = orDefault(l.Failures, DefaultFailures)
	l.Open = orDefault(l.Open, DefaultOpen)
	l.MaxOpen = orDefault(l.MaxOpen, DefaultMaxOpen)
	return l
}

// maxImages returns how many of the requests at a time may be for images.
func (l *Limits) maxImages() int {
	return max(l.MaxConnections-max(l.MaxConnections/4, 1), 1)
}
