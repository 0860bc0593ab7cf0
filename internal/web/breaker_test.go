package web

import (
	"math"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

// start is when the tests of this file begin.
func start() time.Time { return time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC) }

func newBreaker(failures int) *breaker {
	return &breaker{limits: &Limits{Failures: failures, Open: 5 * time.Second, MaxOpen: time.Minute}}
}

// miss is a failure of the host, broken one that may be a file's own.
func miss(now time.Time) failure {
	return failure{kind: acproxy.ErrPublisher, text: "refused", when: now}
}
func broken(now time.Time, file uint64) failure {
	return failure{kind: acproxy.ErrPublisher, text: "cut", file: file, when: now}
}

func TestBreakerOpens(t *testing.T) {
	now := start()
	// Each letter is what becomes of a request: m a miss, a an answer whose body hasn't ended, e its end, digits a file that breaks off.
	tests := []struct {
		name, story string
		open        bool
	}{
		{"one too few", "mm", false},
		{"as many as it takes", "mmm", true},
		{"an answer in between", "mmamm", false},
		{"after an answer in between", "mmammm", true},
		{"an end in between", "mmemm", false},
		{"files that break off", "123", true},
		{"one file that always does", "1111111111", false},
		{"two files that always do", "1212121212", false},
		{"answers that then break off", "a1a2a3", true},
		{"one that comes to its end in between", "a1a2aea3a4", false},
		{"some of both", "1m2", true},
		{"an answer shows that the host is up", "1ma2", false},
		{"but not that bodies end", "1ma23", true},
		{"a file that breaks off, again after an end", "12e12", false},
	}
	for _, tt := range tests {
		b := newBreaker(3)
		for _, c := range tt.story {
			switch c {
			case 'm':
				b.failed(0, miss(now), 0)
			case 'a':
				b.answered(0)
			case 'e':
				b.ended(0)
			default:
				b.failed(0, broken(now, uint64(c)), 0)
			}
		}
		if b.isOpen() != tt.open {
			t.Errorf("%s (%s): open = %v, want %v", tt.name, tt.story, b.isOpen(), tt.open)
		}
		if _, ok := b.admit(now); ok == tt.open {
			t.Errorf("%s (%s): admits = %v", tt.name, tt.story, ok)
		}
	}
	t.Run("switched off", func(t *testing.T) {
		b := newBreaker(-1)
		for range 1000 {
			b.failed(0, miss(now), 0)
		}
		if _, ok := b.admit(now); !ok || !b.clean() {
			t.Error("it does something")
		}
	})
}

func TestBreakerHalfOpen(t *testing.T) {
	now := start()
	opened := func() *breaker {
		b := newBreaker(1)
		if !b.failed(0, miss(now), 0) {
			t.Fatal("it didn't open")
		}
		return b
	}
	due := now.Add(5 * time.Second)
	t.Run("not before its time", func(t *testing.T) {
		b := opened()
		if _, ok := b.admit(due.Add(-1)); ok {
			t.Error("a request was let through early")
		}
		if probe, ok := b.admit(due); !ok || !probe {
			t.Error("no probe was let through in time")
		}
		if _, ok := b.admit(due.Add(time.Hour)); ok {
			t.Error("a second probe was let through")
		}
	})
	t.Run("an answer closes it", func(t *testing.T) {
		b := opened()
		b.admit(due)
		if b.answered(b.round); b.isOpen() || !b.clean() {
			t.Errorf("after the probe's answer: %+v", b)
		}
		if probe, ok := b.admit(due); probe || !ok {
			t.Error("it still probes")
		}
	})
	t.Run("a failure opens it for longer", func(t *testing.T) {
		b := opened()
		b.admit(due)
		if !b.failed(b.round, miss(due), 0) || !b.until.Equal(due.Add(10*time.Second)) || !b.since.Equal(now) {
			t.Errorf("after the probe's failure: %+v", b)
		}
		if _, ok := b.admit(due.Add(10*time.Second - 1)); ok {
			t.Error("a request was let through early")
		}
		if probe, ok := b.admit(due.Add(10 * time.Second)); !ok || !probe {
			t.Error("no second probe was let through")
		}
	})
	t.Run("a broken file opens it, too, and isn't kept", func(t *testing.T) {
		b := opened()
		for i := range 1000 {
			b.admit(b.until)
			if !b.failed(b.round, broken(b.until, uint64(i+1)), 0) {
				t.Fatal("it is closed")
			}
		}
		if len(b.files) > 0 {
			t.Errorf("%d files are kept", len(b.files))
		}
	})
	t.Run("an abandoned probe makes way for another", func(t *testing.T) {
		b := opened()
		b.admit(due)
		b.abandoned(b.round, true)
		if probe, ok := b.admit(due); !ok || !probe {
			t.Error("no other probe was let through")
		}
	})
	t.Run("what was begun before is of no interest", func(t *testing.T) {
		b := opened()
		b.admit(due)
		for range 10 {
			if b.failed(0, miss(due), 0) {
				t.Error("a request from before it opened opened it")
			}
			b.answered(0)
			b.ended(0)
			b.abandoned(0, true)
		}
		if !b.isOpen() || !b.probing || b.opened != 1 {
			t.Errorf("%+v", b)
		}
	})
	t.Run("a body's end doesn't close it", func(t *testing.T) {
		b := opened()
		b.ended(b.round)
		if !b.isOpen() {
			t.Error("it closed without a probe")
		}
	})
}

func TestBreakerGrowth(t *testing.T) {
	for _, random := range []float64{0, 0.5, math.Nextafter(1, 0)} {
		b, now := newBreaker(1), start()
		b.failed(0, miss(now), random)
		for i, seconds := range []int{5, 10, 20, 40, 60, 60, 60} {
			want := time.Duration(seconds) * time.Second
			got := b.until.Sub(now)
			if got > want || got < want*3/4 || random == 0 && got != want || random == 0.5 && got != want*7/8 {
				t.Errorf("random %v: opened for %v the %d. time, want up to %v", random, got, i+1, want)
			}
			now = b.until
			b.admit(now)
			b.failed(b.round, miss(now), random)
		}
		b.admit(b.until)
		b.answered(b.round)
		b.failed(b.round, miss(now), 0)
		if got := b.until.Sub(now); got != 5*time.Second {
			t.Errorf("after it was closed it opens for %v, want to begin anew", got)
		}
	}
	t.Run("extremes", func(t *testing.T) {
		for _, l := range []Limits{
			{Failures: 1, Open: math.MaxInt64, MaxOpen: math.MaxInt64}, {Failures: 1, Open: 1 << 61, MaxOpen: math.MaxInt64}, {Failures: 1, Open: time.Hour, MaxOpen: time.Second},
			{Failures: 1, Open: 1, MaxOpen: math.MaxInt64},
		} {
			b := &breaker{limits: &l}
			for range 100 {
				b.opened++
				if got := b.pause(0); got <= 0 || got > l.MaxOpen {
					t.Fatalf("%+v: opened for %v the %d. time", l, got, b.opened)
				}
			}
		}
	})
}
