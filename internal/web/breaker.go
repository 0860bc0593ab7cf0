package web

import (
	"slices"
	"time"
)

// A breaker keeps requests from a host that is down. It is closed until too many requests in a row have failed; then it is open, and nobody is
// asked, until the time has come for one request to find out whether the host is back: that is the probe.
//
// Rounds tell apart what belongs together. What was begun before the breaker opened says nothing about the time after it.
//
// Time comes from outside, and whoever uses a breaker guards it.
type breaker struct {
	limits *Limits

	round  int
	missed int // requests in a row to which the host had no answer, or none but that something is wrong with it
	// files are URLs, hashed, that failed in a way which may be their own fault since a body last came to its end. Each of them counts once: one
	// broken file that many ask for must not keep them from all the others.
	files []uint64
	last  failure

	opened  int       // times in a row, without an answer in between
	since   time.Time // when it opened first; zero while it is closed
	until   time.Time // when the next probe may go
	probing bool      // a probe is on its way
}

// A failure is why a request failed.
type failure struct {
	kind        error  // acproxy.ErrPublisher or acproxy.ErrTimeout
	text        string // without the URL, which whoever asks next need not know
	unreachable bool   // nobody could be connected to
	file        uint64 // the URL, hashed, if it may be the fault of that file alone; else 0
	when        time.Time
}

func (b *breaker) isOpen() bool { return !b.since.IsZero() }

// clean reports whether there is nothing to remember.
func (b *breaker) clean() bool { return b.failures() == 0 && !b.isOpen() }

// failures returns how many count.
func (b *breaker) failures() int { return b.missed + len(b.files) }

// admit reports whether a request may go, and whether it is the probe. A probe has to be told of by answered, failed or abandoned.
func (b *breaker) admit(now time.Time) (probe, ok bool) {
	switch {
	case !b.isOpen():
		return false, true
	case b.probing || now.Before(b.until):
		return false, false
	}
	b.probing = true
	return true, true
}

// answered notes that the host gave an answer: it is up. Whether it brings bodies to their end remains to be seen.
func (b *breaker) answered(round int) {
	switch {
	case round != b.round:
	case b.isOpen():
		// There is nothing else of this round: the probe was alone.
		*b = breaker{limits: b.limits, round: b.round}
	default:
		b.missed = 0
	}
}

// ended notes that an answer came to its end as it should.
func (b *breaker) ended(round int) {
	if round == b.round && !b.isOpen() {
		b.missed, b.files = 0, nil
	}
}

// abandoned notes that nothing will be known of a request: whoever made it has lost interest.
func (b *breaker) abandoned(round int, probe bool) {
	if probe && round == b.round {
		b.probing = false
	}
}

// failed notes a failure and reports whether it made the breaker open, or stay open. random, from 0 to 1, spreads the probes of many servers.
func (b *breaker) failed(round int, f failure, random float64) (opened bool) {
	if round != b.round || b.limits.Failures < 0 {
		return false
	}
	b.last = f
	switch {
	case f.file == 0 || b.isOpen():
		b.missed++
	case !slices.Contains(b.files, f.file):
		b.files = append(b.files, f.file)
	}
	if !b.isOpen() {
		if b.failures() < b.limits.Failures {
			return false
		}
		b.since = f.when
	}
	b.round++
	b.opened++
	b.probing = false
	b.until = f.when.Add(b.pause(random))
	return true
}

// pause returns how long the breaker stays open this time: twice as long as the last time, up to the most, less up to a quarter.
func (b *breaker) pause(random float64) time.Duration {
	d := min(b.limits.Open, b.limits.MaxOpen)
	for i := 1; i < b.opened && d < b.limits.MaxOpen; i++ {
		d += min(d, b.limits.MaxOpen-d)
	}
	return d - time.Duration(random*float64(d)/4)
}
