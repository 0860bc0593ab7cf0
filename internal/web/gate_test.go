package web

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/acproxy/acproxy"
)

const theHost = "https://example.com"

// unlimited is what tests of one limit start from.
func unlimited() Limits { return Limits{MaxConnections: -1, Rate: -1, MaxRetryAfter: -1, Failures: -1} }

// testGate returns a gate that opens for the whole time: nothing is spread.
func testGate(l Limits) *gate { return newGate(l, time.Now, func() float64 { return 0 }) }

func image(url string) asked { return asked{host: theHost, url: url, large: true} }
func small(url string) asked { return asked{host: theHost, url: url} }

// enter enters at once, or fails the test.
func enter(t *testing.T, g *gate, a asked) *turn {
	t.Helper()
	turn, err := g.enter(t.Context(), a, 0)
	if err != nil {
		t.Fatalf("enter: %v", err)
	}
	return turn
}

// turnedAway checks that a request is refused at once.
func turnedAway(t *testing.T, g *gate, a asked, kind error, code string) *acproxy.Error {
	t.Helper()
	began := time.Now()
	turn, err := g.enter(t.Context(), a, time.Hour)
	if err == nil {
		turn.ended()
		t.Fatalf("%+v was let through", a)
	}
	if took := time.Since(began); took != 0 {
		t.Errorf("it took %v to refuse %+v", took, a)
	}
	var e *acproxy.Error
	if !errors.As(err, &e) || !errors.Is(err, kind) || e.Code != code {
		t.Fatalf("error = %v (%s), want %v (%s)", err, codeOf(err), kind, code)
	}
	return e
}

// state returns how things are with the host.
func state(g *gate) HostState {
	for _, s := range g.states() {
		if s.Host == theHost {
			return s
		}
	}
	return HostState{}
}

func answer(status int, header ...string) *http.Response {
	h := make(http.Header)
	for i := 0; i+1 < len(header); i += 2 {
		h.Add(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Header: h}
}

// unreachable is what Get says of a host that refuses connections.
var unreachable = &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-unreachable", Err: &dialError{errors.New("connection refused")}}

// fails makes a request that can't connect.
func fails(t *testing.T, g *gate, a asked) {
	t.Helper()
	enter(t, g, a).unanswered(unreachable, "connection refused")
}

func TestConnectionLimit(t *testing.T) {
	for _, tt := range []struct{ max, images, all int }{{1, 1, 1}, {2, 1, 2}, {3, 2, 3}, {4, 3, 4}, {8, 6, 8}, {16, 12, 16}, {17, 13, 17}} {
		synctest.Test(t, func(t *testing.T) {
			l := unlimited()
			l.MaxConnections = tt.max
			g := testGate(l)
			var turns []*turn
			fill := func(a asked, want int) {
				t.Helper()
				for range tt.max + 5 {
					turn, err := g.enter(t.Context(), a, 0)
					if err == nil {
						turns = append(turns, turn)
					} else if !errors.Is(err, acproxy.ErrBusy) {
						t.Fatal(err)
					}
				}
				if s := state(g); len(turns) != want || s.InProgress != want || s.Images != min(want, tt.images) || s.Waiting != 0 {
					t.Errorf("max %d: %d requests are in progress, %+v; want %d", tt.max, len(turns), s, want)
				}
			}
			fill(image("/image"), tt.images)
			fill(small("/small"), tt.all)
			for _, turn := range turns {
				turn.ended()
				turn.ended() // a second time is nothing
			}
			if s := state(g); s.InProgress != 0 || s.Images != 0 {
				t.Errorf("after all: %+v", s)
			}
			turns = nil
			// Small ones may take all places.
			for range tt.all {
				turns = append(turns, enter(t, g, small("/small")))
			}
			if _, err := g.enter(t.Context(), small("/small"), 0); !errors.Is(err, acproxy.ErrBusy) {
				t.Errorf("max %d: one too many was let through: %v", tt.max, err)
			}
			for _, turn := range turns {
				turn.dropped()
			}
			if s := state(g); s.InProgress != 0 {
				t.Errorf("after all: %+v", s)
			}
		})
	}
	t.Run("no limit", func(t *testing.T) {
		g := testGate(unlimited())
		for range 1000 {
			enter(t, g, image("/image"))
		}
	})
	t.Run("another host has places of its own", func(t *testing.T) {
		l := unlimited()
		l.MaxConnections = 1
		g := testGate(l)
		enter(t, g, image("/"))
		enter(t, g, asked{host: "https://example.com:8443", large: true})
		enter(t, g, asked{host: "http://example.com", large: true})
	})
}

// TestFirstComeFirstServed: who came first goes first, except that small requests pass images that have to wait for images.
func TestFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := unlimited()
		l.MaxConnections = 4
		g := testGate(l)
		var running []*turn
		for range 3 {
			running = append(running, enter(t, g, image("/first")))
		}
		running = append(running, enter(t, g, small("/first")))
		var mu sync.Mutex
		var order []string
		var turns []*turn
		var waiting sync.WaitGroup
		queue := func(name string, a asked) {
			// Ends when it is let through; waited for below.
			waiting.Go(func() {
				turn, err := g.enter(t.Context(), a, time.Hour)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				order, turns = append(order, name), append(turns, turn)
			})
			synctest.Wait()
		}
		for i := range 20 {
			queue(fmt.Sprint("image", i), image("/"))
			queue(fmt.Sprint("small", i), small("/"))
		}
		if s := state(g); s.InProgress != 4 || s.Waiting != 40 {
			t.Fatalf("%+v", s)
		}
		// A small request ends: the next small one follows, again and again, though images came before it.
		running[3].ended()
		for range 9 {
			synctest.Wait()
			mu.Lock()
			last := turns[len(turns)-1]
			mu.Unlock()
			last.ended()
		}
		synctest.Wait()
		// Images end: image0 came before small10.
		mu.Lock()
		for i := range 10 {
			if want := fmt.Sprint("small", i); i >= len(order) || order[i] != want {
				t.Fatalf("order = %v, want %s as number %d", order, want, i)
			}
		}
		order, turns = nil, append(running[:3:3], turns[len(turns)-1])
		mu.Unlock()
		var want []string
		for i := range 20 {
			want = append(want, fmt.Sprint("image", i))
			if i >= 10 {
				want = append(want, fmt.Sprint("small", i))
			}
		}
		for {
			mu.Lock()
			if len(turns) == 0 {
				mu.Unlock()
				break
			}
			next := turns[0]
			turns = turns[1:]
			mu.Unlock()
			next.ended()
			synctest.Wait()
		}
		waiting.Wait()
		// Within their kind they came in order.
		for _, kind := range []string{"image", "small"} {
			of := func(names []string) []string {
				return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !strings.HasPrefix(n, kind) })
			}
			if !slices.Equal(of(order), of(want)) {
				t.Errorf("order of %ss = %v, want %v", kind, of(order), of(want))
			}
		}
		if len(order) != len(want) {
			t.Errorf("%d were let through, want %d", len(order), len(want))
		}
		if order[0] != "image0" {
			t.Errorf("after an image ended came %s, want image0", order[0])
		}
	})
}

// TestTurnDoesNotCome: who waits for too long, or has lost interest, leaves nothing behind.
func TestTurnDoesNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := unlimited()
		l.MaxConnections = 1
		g := testGate(l)
		first := enter(t, g, small("/"))
		began := time.Now()
		_, err := g.enter(t.Context(), small("/"), 30*time.Second)
		if took := time.Since(began); took != 30*time.Second {
			t.Errorf("it waited for %v, want 30s", took)
		}
		var e *acproxy.Error
		if !errors.As(err, &e) || e.Kind != acproxy.ErrBusy || e.Code != CodeBusy || e.RetryAfter != busyRetry ||
			e.Detail != "no turn to ask https://example.com came within 30s: 1 request is in progress, 0 are waiting (dial.max_connections, dial.rate)" {
			t.Errorf("error = %+v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := g.enter(ctx, small("/"), time.Hour); !errors.Is(err, context.Canceled) {
			t.Errorf("error = %v, want the caller's own", err)
		}
		if s := state(g); s.InProgress != 1 || s.Waiting != 0 {
			t.Errorf("%+v", s)
		}
		first.ended()
		enter(t, g, small("/"))
	})
}

// TestTurnComesTooLate: it comes in the very moment in which its time is over, or in which nobody wants it any more.
func TestTurnComesTooLate(t *testing.T) {
	l := unlimited()
	l.MaxConnections = 1
	came := 0
	for i := range 400 {
		synctest.Test(t, func(t *testing.T) {
			g := testGate(l)
			first := enter(t, g, small("/"))
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			// Ends with its turn, or without; waited for below.
			go func() {
				turn, err := g.enter(ctx, small("/"), time.Second)
				if err == nil {
					turn.ended()
				}
				ended <- err
			}()
			synctest.Wait()
			switch i % 3 {
			case 0:
				first.ended()
				cancel()
			case 1:
				cancel()
				first.ended()
			case 2:
				time.AfterFunc(time.Second, first.ended)
			}
			err := <-ended
			cancel()
			synctest.Wait()
			if err == nil {
				came++
			} else if i%3 == 2 && !errors.Is(err, acproxy.ErrBusy) || i%3 != 2 && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if s := state(g); s.InProgress != 0 || s.Waiting != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
	t.Logf("in %d of 400 the turn came", came)
}

// TestManyLoseInterest: whoever goes in the very moment in which the turn comes gives it back.
func TestManyLoseInterest(t *testing.T) {
	l := Limits{MaxConnections: 3, Rate: -1, Failures: 3}
	g := testGate(l)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var inside atomic.Int64
	var all sync.WaitGroup
	for i := range 50 {
		// Ends after its rounds; waited for below.
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for range 100 {
				ctx, cancel := context.WithCancel(t.Context())
				if random.IntN(2) == 0 {
					// Ends at once.
					go cancel()
				}
				turn, err := g.enter(ctx, asked{host: theHost, large: random.IntN(2) == 0}, time.Duration(random.IntN(1000))*time.Microsecond)
				if err == nil {
					if n := inside.Add(1); n > 3 {
						t.Errorf("%d at once", n)
					}
					inside.Add(-1)
					switch random.IntN(5) {
					case 0:
						turn.dropped()
					case 1:
						turn.unanswered(context.Canceled, "")
					default:
						turn.answered(answer(200), 0)
						turn.ended()
					}
				} else if !errors.Is(err, acproxy.ErrBusy) && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	all.Wait()
	if s := state(g); s.InProgress != 0 || s.Images != 0 || s.Waiting != 0 || len(s.Breakers) > 0 {
		t.Errorf("after all: %+v", s)
	}
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := unlimited()
		l.Rate, l.Burst = 10, 5
		g := testGate(l)
		began := time.Now()
		var mu sync.Mutex
		var when []time.Duration
		var all sync.WaitGroup
		for range 25 {
			// Ends when it is let through; waited for below.
			all.Go(func() {
				turn, err := g.enter(t.Context(), small("/"), time.Minute)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				when = append(when, time.Since(began))
				mu.Unlock()
				turn.ended()
			})
		}
		synctest.Wait()
		if s := state(g); s.Waiting != 20 || s.InProgress != 0 {
			t.Errorf("after the burst: %+v", s)
		}
		all.Wait()
		for i, got := range when {
			want := time.Duration(max(i-4, 0)*100) * time.Millisecond
			// Calculating with fractions of tokens may cost a millisecond.
			if got < want || got > want+2*time.Millisecond {
				t.Errorf("number %d began after %v, want %v", i, got, want)
			}
		}
	})
	t.Run("who can't wait for it takes none", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := unlimited()
			l.Rate, l.Burst = 1, 5
			g := testGate(l)
			for range 5 {
				enter(t, g, small("/")).ended()
			}
			for range 100 {
				if _, err := g.enter(t.Context(), small("/"), time.Millisecond); !errors.Is(err, acproxy.ErrBusy) {
					t.Fatal(err)
				}
			}
			// The waiting took a tenth of a second.
			time.Sleep(4900 * time.Millisecond)
			for range 5 {
				enter(t, g, small("/")).ended()
			}
			if _, err := g.enter(t.Context(), small("/"), 0); !errors.Is(err, acproxy.ErrBusy) {
				t.Errorf("after a pause more than the burst began: %v", err)
			}
		})
	})
	t.Run("no limit", func(t *testing.T) {
		g := testGate(unlimited())
		for range 10_000 {
			enter(t, g, small("/")).ended()
		}
	})
}

func TestRetryAfterIsHonoured(t *testing.T) {
	tests := []struct {
		name   string
		status int
		value  string
		limit  time.Duration
		want   time.Duration
	}{
		{"429 with seconds", 429, "30", time.Hour, 30 * time.Second},
		{"503 with seconds", 503, "30", time.Hour, 30 * time.Second},
		{"a date", 429, "in 30s", time.Hour, 30 * time.Second},
		{"more than the most", 429, "3601", time.Hour, time.Hour},
		{"far more than the most", 503, "99999999999999999999", time.Minute, time.Minute},
		{"a date far away", 503, "Fri, 31 Dec 9999 23:59:59 GMT", time.Minute, time.Minute},
		{"nothing", 429, "", time.Hour, 0},
		{"garbage", 429, "soon", time.Hour, 0},
		{"negative", 429, "-30", time.Hour, 0},
		{"none", 503, "0", time.Hour, 0},
		{"switched off", 429, "30", -1, 0},
		{"500 means something else by it", 500, "30", time.Hour, 0},
		{"202 too", 202, "30", time.Hour, 0},
		{"and 301", 301, "30", time.Hour, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := unlimited()
				l.MaxRetryAfter = tt.limit
				g := testGate(l)
				value := tt.value
				if value == "in 30s" {
					value = time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat)
				}
				turn := enter(t, g, small("/"))
				turn.answered(answer(tt.status, "Retry-After", value), 0)
				turn.ended()
				if tt.want == 0 {
					enter(t, g, small("/")).ended()
					return
				}
				e := turnedAway(t, g, small("/"), acproxy.ErrPublisher, "publisher-resting")
				if e.RetryAfter != tt.want || !strings.Contains(e.Detail, fmt.Sprintf("answered %d %s", tt.status, http.StatusText(tt.status))) {
					t.Errorf("error = %+v, want to come back in %v", e, tt.want)
				}
				if s := state(g); !s.RestingUntil.Equal(time.Now().Add(tt.want)) || s.RestingWhy == "" || s.Open() {
					t.Errorf("%+v", s)
				}
				time.Sleep(tt.want - time.Nanosecond)
				turnedAway(t, g, image("/other"), acproxy.ErrPublisher, "publisher-resting")
				enter(t, g, asked{host: "https://example.org"})
				time.Sleep(time.Nanosecond)
				enter(t, g, small("/")).ended()
				if s := state(g); !s.RestingUntil.IsZero() {
					t.Errorf("afterwards: %+v", s)
				}
			})
		})
	}
	t.Run("the longest counts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := unlimited()
			l.MaxRetryAfter = time.Hour
			g := testGate(l)
			turns := []*turn{enter(t, g, small("/")), enter(t, g, small("/")), enter(t, g, small("/"))}
			for i, value := range []string{"10", "60", "30"} {
				turns[i].answered(answer(429, "Retry-After", value), 0)
			}
			if e := turnedAway(t, g, small("/"), acproxy.ErrPublisher, "publisher-resting"); e.RetryAfter != time.Minute {
				t.Errorf("RetryAfter = %v, want a minute", e.RetryAfter)
			}
		})
	})
	t.Run("who waits already is sent away", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := unlimited()
			l.MaxConnections, l.MaxRetryAfter = 1, time.Hour
			g := testGate(l)
			first := enter(t, g, small("/"))
			errs := make(chan error, 2)
			for _, a := range []asked{small("/"), image("/")} {
				// Ends when it is sent away; its error is waited for.
				go func() {
					_, err := g.enter(t.Context(), a, time.Hour)
					errs <- err
				}()
			}
			synctest.Wait()
			began := time.Now()
			first.answered(answer(503, "Retry-After", "60"), 0)
			for range 2 {
				if err := <-errs; codeOf(err) != "publisher-resting" || time.Since(began) != 0 {
					t.Errorf("error = %v after %v", err, time.Since(began))
				}
			}
			first.ended()
			if s := state(g); s.Waiting != 0 || s.InProgress != 0 {
				t.Errorf("%+v", s)
			}
		})
	})
}

func breaking(failures int) Limits {
	l := unlimited()
	l.Failures, l.Open, l.MaxOpen = failures, 5*time.Second, time.Minute
	return l
}

func TestHostIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGate(breaking(3))
		fails(t, g, image("/a"))
		fails(t, g, small("/a"))
		if s := state(g); s.Open() || len(s.Breakers) != 1 || s.Breakers[0].State != BreakerClosed || s.Breakers[0].Failures != 2 || s.Breakers[0].LastError != "connection refused" {
			t.Errorf("before: %+v", s)
		}
		time.Sleep(time.Second)
		fails(t, g, image("/a"))
		since := time.Now()
		time.Sleep(2 * time.Second)
		e := turnedAway(t, g, image("/b"), acproxy.ErrPublisher, "publisher-down")
		if want := "https://example.com has been down since 2000-01-01T00:00:01Z, after 3 failures in a row, and isn't asked: it is asked again at 2000-01-01T00:00:06Z, in 3s; " +
			"the last failure was: connection refused"; e.Detail != want || e.RetryAfter != 3*time.Second {
			t.Errorf("error = %q, after %v, want %q", e.Detail, e.RetryAfter, want)
		}
		s := state(g)
		if want := (BreakerState{
			State: BreakerOpen, Failures: 3, Since: since, Until: since.Add(5 * time.Second), LastError: "connection refused", LastFailure: since,
		}); !s.Open() || len(s.Breakers) != 1 || s.Breakers[0] != want {
			t.Errorf("state = %+v, want %+v", s, want)
		}
		enter(t, g, asked{host: "https://example.org"})
		time.Sleep(3 * time.Second)
		if s := state(g); s.Breakers[0].State != BreakerHalfOpen {
			t.Errorf("when it is due: %+v", s)
		}
		probe := enter(t, g, image("/b"))
		e = turnedAway(t, g, image("/c"), acproxy.ErrPublisher, "publisher-down")
		if !strings.Contains(e.Detail, "another request finds out whether it is back") || e.RetryAfter != time.Second {
			t.Errorf("error = %+v", e)
		}
		if s := state(g); s.Breakers[0].State != BreakerHalfOpen {
			t.Errorf("with a probe on its way: %+v", s)
		}
		probe.answered(answer(404), 0)
		if s := state(g); s.Open() || len(s.Breakers) != 0 {
			t.Errorf("after the probe: %+v", s)
		}
		enter(t, g, image("/c")).ended()
		// The probe's body counts as any other.
		probe.brokeOff(unreachable, "cut")
		if s := state(g); len(s.Breakers) != 1 || s.Breakers[0].Failures != 1 || s.InProgress != 0 {
			t.Errorf("after the probe broke off: %+v", s)
		}
	})
}

// TestWhatCounts: each outcome twice, which is as many as it takes.
func TestWhatCounts(t *testing.T) {
	timeout := &acproxy.Error{Kind: acproxy.ErrTimeout, Code: "publisher-timeout"}
	cut := &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-cut"}
	status := func(status int) func(*turn) {
		return func(t *turn) { t.answered(answer(status), 0); t.ended() }
	}
	tests := []struct {
		name string
		what func(*turn)
		kind error // nil if it doesn't count
	}{
		{"no connection", func(t *turn) { t.unanswered(unreachable, "") }, acproxy.ErrPublisher},
		{"no answer in time", func(t *turn) { t.unanswered(timeout, "") }, acproxy.ErrTimeout},
		{"cut before the answer", func(t *turn) { t.unanswered(cut, "") }, acproxy.ErrPublisher},
		{"500", status(500), acproxy.ErrPublisher},
		{"502", status(502), acproxy.ErrPublisher},
		{"503", status(503), acproxy.ErrPublisher},
		{"504", status(504), acproxy.ErrPublisher},
		{"599", status(599), acproxy.ErrPublisher},
		{"501", status(501), nil},
		{"200", status(200), nil},
		{"304", status(304), nil},
		{"400", status(400), nil},
		{"403", status(403), nil},
		{"404", status(404), nil},
		{"429", status(429), nil},
		{"600", status(600), nil},
		{"a body that stalls", func(t *turn) { t.answered(answer(200), 0); t.brokeOff(timeout, "") }, acproxy.ErrTimeout},
		{"a body that is cut", func(t *turn) { t.answered(answer(200), 0); t.brokeOff(cut, "") }, acproxy.ErrPublisher},
		{"a body that is closed early", func(t *turn) { t.answered(answer(200), 0); t.dropped() }, nil},
		{"refused by the dial rules", func(t *turn) { t.unanswered(&acproxy.Error{Kind: acproxy.ErrRefused}, "") }, nil},
		{"cancelled", func(t *turn) { t.unanswered(context.Canceled, "") }, nil},
		{"the caller's time is over", func(t *turn) { t.unanswered(fmt.Errorf("asking: %w", context.DeadlineExceeded), "") }, nil},
		{"cancelled in the body", func(t *turn) { t.answered(answer(200), 0); t.brokeOff(context.Canceled, "") }, nil},
		{"a bad answer counts once, its body isn't asked for", func(t *turn) { t.answered(answer(503), 0); t.brokeOff(cut, "") }, acproxy.ErrPublisher},
	}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			g := testGate(breaking(2))
			tt.what(enter(t, g, image("/1")))
			tt.what(enter(t, g, image("/2")))
			s := state(g)
			if s.InProgress != 0 || s.Images != 0 {
				t.Errorf("%s: its place was kept: %+v", tt.name, s)
			}
			if s.Open() != (tt.kind != nil) {
				t.Errorf("%s: %+v", tt.name, s)
			}
			if tt.kind != nil {
				turnedAway(t, g, image("/3"), tt.kind, "publisher-down")
				if s.Breakers[0].Failures != 2 {
					t.Errorf("%s: %d failures, want 2", tt.name, s.Breakers[0].Failures)
				}
			}
		})
	}
}

// TestOneBadFile: a file that always breaks off doesn't keep anybody from the others.
func TestOneBadFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cut := &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "publisher-cut"}
		g := testGate(breaking(2))
		for range 100 {
			turn := enter(t, g, image("/bad"))
			turn.answered(answer(200), 0)
			turn.brokeOff(cut, "cut")
			turn = enter(t, g, image("/bad"))
			turn.answered(answer(500), 0)
			turn.ended()
		}
		turn := enter(t, g, image("/worse"))
		turn.answered(answer(200), 0)
		turn.brokeOff(cut, "cut")
		turnedAway(t, g, image("/good"), acproxy.ErrPublisher, "publisher-down")
	})
}

// TestOneProbe: of fifty requests at once one asks, and the others don't wait for it.
func TestOneProbe(t *testing.T) {
	for _, back := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g := testGate(breaking(1))
			fails(t, g, image("/"))
			time.Sleep(5 * time.Second)
			var through, sentAway atomic.Int64
			release := make(chan struct{})
			var all sync.WaitGroup
			for range 50 {
				// Ends when it is sent away, or let through and told to go on; waited for below.
				all.Go(func() {
					turn, err := g.enter(t.Context(), image("/"), time.Hour)
					if err != nil {
						if codeOf(err) != "publisher-down" {
							t.Error(err)
						}
						sentAway.Add(1)
						return
					}
					through.Add(1)
					<-release
					if back {
						turn.answered(answer(200), 0)
						turn.ended()
					} else {
						turn.unanswered(unreachable, "refused")
					}
				})
			}
			synctest.Wait()
			if through.Load() != 1 || sentAway.Load() != 49 {
				t.Errorf("%d were let through and %d sent away, want 1 and 49", through.Load(), sentAway.Load())
			}
			close(release)
			all.Wait()
			s := state(g)
			if s.Open() == back {
				t.Errorf("back = %v: %+v", back, s)
			}
			if !back && !s.Breakers[0].Until.Equal(time.Now().Add(10*time.Second)) {
				t.Errorf("it is asked again in %v, want twice as long as the first time", time.Until(s.Breakers[0].Until))
			}
		})
	}
	t.Run("one that loses interest, or has no place, makes way for another", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := breaking(1)
			l.MaxConnections = 1
			g := testGate(l)
			fails(t, g, small("/"))
			time.Sleep(5 * time.Second)
			enter(t, g, small("/")).dropped()
			enter(t, g, small("/")).unanswered(context.Canceled, "")
			other := enter(t, g, asked{host: theHost, prefix: "example.com/other"})
			if _, err := g.enter(t.Context(), small("/"), time.Second); !errors.Is(err, acproxy.ErrBusy) {
				t.Errorf("error = %v, want no turn", err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := g.enter(ctx, small("/"), time.Hour); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error = %v, want the caller's own", err)
			}
			other.ended()
			probe := enter(t, g, small("/"))
			probe.answered(answer(200), 0)
			probe.ended()
			if s := state(g); s.Open() {
				t.Errorf("%+v", s)
			}
		})
	})
}

// TestWaitingWhenItOpens: who waits is told at once, if it is about the same rule.
func TestWaitingWhenItOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := breaking(1)
		l.MaxConnections = 1
		g := testGate(l)
		first := enter(t, g, small("/"))
		type result struct {
			prefix string
			err    error
		}
		results := make(chan result, 3)
		for _, prefix := range []string{"", "example.com/own", ""} {
			// Ends when it is let through or sent away; its result is waited for.
			go func() {
				turn, err := g.enter(t.Context(), asked{host: theHost, prefix: prefix}, time.Hour)
				if err == nil {
					turn.ended()
				}
				results <- result{prefix, err}
			}()
			synctest.Wait()
		}
		began := time.Now()
		first.unanswered(unreachable, "refused")
		for range 3 {
			if got := <-results; (got.err == nil) != (got.prefix != "") || got.err != nil && codeOf(got.err) != "publisher-down" || time.Since(began) != 0 {
				t.Errorf("%q: %v after %v", got.prefix, got.err, time.Since(began))
			}
		}
		if s := state(g); s.InProgress != 0 || s.Waiting != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestDownUnderOneRule: a rule whose certificates don't fit says nothing about the others.
func TestDownUnderOneRule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGate(breaking(1))
		own := asked{host: theHost, prefix: "example.com/own"}
		fails(t, g, own)
		turnedAway(t, g, own, acproxy.ErrPublisher, "publisher-down")
		enter(t, g, small("/")).ended()
		fails(t, g, small("/"))
		if s := state(g); len(s.Breakers) != 2 || s.Breakers[0].Prefix != "" || s.Breakers[1].Prefix != own.prefix {
			t.Errorf("%+v", s)
		}
	})
}

func TestErrorsAreOneLine(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"connection refused", "connection refused"},
		{"first\nsecond\r\x1b[2J\u009bK\x00\xff", "first second  [2J K "},
		{strings.Repeat("ü", 10_000), strings.Repeat("ü", 150) + "…"},
		{"x" + strings.Repeat("ü", 10_000), "x" + strings.Repeat("ü", 149) + "…"},
	} {
		g := testGate(breaking(1))
		enter(t, g, small("/")).unanswered(unreachable, tt.text)
		if got := state(g).Breakers[0].LastError; got != tt.want {
			t.Errorf("%.20q is kept as %q, want %q", tt.text, got, tt.want)
		}
	}
}

func TestHostsAreForgotten(t *testing.T) {
	at := func(i int) asked { return asked{host: fmt.Sprint("https://h", i, ".example.com")} }
	t.Run("there are only so many", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := breaking(2)
			l.MaxRetryAfter = time.Hour
			g := testGate(l)
			inUse := enter(t, g, at(-1))
			fails(t, g, at(-2))
			fails(t, g, at(-2))
			resting := enter(t, g, at(-3))
			resting.answered(answer(429, "Retry-After", "3600"), 0)
			resting.ended()
			for i := range 10 * maxHosts {
				// Names that don't exist, perhaps.
				fails(t, g, at(i))
				time.Sleep(time.Microsecond)
				if n := len(g.hosts); n > maxHosts {
					t.Fatalf("%d hosts are remembered", n)
				}
			}
			turnedAway(t, g, at(-2), acproxy.ErrPublisher, "publisher-down")
			turnedAway(t, g, at(-3), acproxy.ErrPublisher, "publisher-resting")
			if n := len(g.hosts); n < maxHosts/2 {
				t.Errorf("only %d hosts are remembered", n)
			}
			if _, ok := g.hosts[at(-1).host]; !ok {
				t.Error("a host with a request in progress was forgotten")
			}
			if _, ok := g.hosts[at(10*maxHosts-1).host]; !ok {
				t.Error("the last one was forgotten")
			}
			inUse.ended()
			// All of them down: the oldest goes.
			for i := range 3 * maxHosts {
				fails(t, g, asked{host: fmt.Sprint("https://d", i, ".example.com")})
				fails(t, g, asked{host: fmt.Sprint("https://d", i, ".example.com")})
			}
			if n := len(g.hosts); n > maxHosts {
				t.Errorf("%d hosts are remembered", n)
			}
			turnedAway(t, g, asked{host: fmt.Sprint("https://d", 3*maxHosts-1, ".example.com")}, acproxy.ErrPublisher, "publisher-down")
		})
	})
	t.Run("all in use", func(t *testing.T) {
		g := testGate(unlimited())
		var turns []*turn
		for i := range maxHosts + 10 {
			turns = append(turns, enter(t, g, at(i)))
		}
		if n := len(g.states()); n != maxHosts+10 {
			t.Errorf("%d hosts are remembered, want all that are asked", n)
		}
		for _, turn := range turns {
			turn.ended()
		}
	})
	t.Run("nobody asks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := breaking(1)
			l.MaxRetryAfter = time.Hour
			l.Rate, l.Burst = 1, 1000
			g := testGate(l)
			enter(t, g, at(1)).ended()
			for range 1000 {
				enter(t, g, at(2)).ended()
			}
			fails(t, g, at(3))
			turn := enter(t, g, at(4))
			turn.answered(answer(503, "Retry-After", "3600"), 0)
			turn.ended()
			inUse := enter(t, g, at(5))
			names := func() string {
				var out []string
				for _, s := range g.states() {
					out = append(out, s.Host[len("https://h"):len("https://h")+1])
				}
				return strings.Join(out, "")
			}
			for _, step := range []struct {
				after time.Duration
				want  string
			}{
				{keepHost - 1, "12345"}, // not yet
				{1, "245"},              // the bucket of 2 isn't full, 4 wants to be left alone
				{1000*time.Second - keepHost, "45"},
				{time.Hour, "5"},
			} {
				time.Sleep(step.after)
				if got := names(); got != step.want {
					t.Errorf("%v later hosts %s are remembered, want %s", step.after, got, step.want)
				}
			}
			inUse.ended()
			if got := names(); got != "5" {
				t.Errorf("after the end of a long request hosts %q are remembered, want the one it was for", got)
			}
			time.Sleep(keepHost)
			enter(t, g, at(6)).ended()
			if len(g.hosts) != 1 {
				t.Errorf("%d hosts are remembered, want the new one", len(g.hosts))
			}
		})
	})
}

// TestGateAgainstModel does things at random, and checks after each of them what must always hold.
func TestGateAgainstModel(t *testing.T) {
	for range 200 {
		seed := rand.Uint64()
		synctest.Test(t, func(t *testing.T) { modelled(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func modelled(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	l := Limits{
		MaxConnections: 2 + random.IntN(8), Rate: 1 + random.IntN(50), Burst: 1 + random.IntN(20), MaxRetryAfter: time.Minute,
		Failures: 1 + random.IntN(4), Open: 5 * time.Second, MaxOpen: time.Minute,
	}
	g := newGate(l, time.Now, rand.New(rand.NewPCG(seed, 1)).Float64)
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var inside []*turn
	type entry struct {
		number uint64
		when   time.Time
	}
	begun := make(map[bool][]entry) // by whether it is large: who came in, and when
	var all sync.WaitGroup
	queue := func(i int) {
		large, patience := random.IntN(2) == 0, time.Duration(random.IntN(40))*time.Second
		// Ends when it is let through or sent away, at the latest with its patience; waited for below.
		all.Go(func() {
			turn, err := g.enter(ctx, asked{host: theHost, url: fmt.Sprint(i % 7), large: large}, patience)
			if err != nil {
				if code := codeOf(err); code != CodeBusy && code != "publisher-down" && code != "publisher-resting" && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			inside = append(inside, turn)
			begun[large] = append(begun[large], entry{turn.number, time.Now()})
		})
		synctest.Wait()
	}
	end := func() {
		mu.Lock()
		if len(inside) == 0 {
			mu.Unlock()
			return
		}
		i := random.IntN(len(inside))
		turn := inside[i]
		inside = slices.Delete(inside, i, i+1)
		mu.Unlock()
		switch random.IntN(9) {
		case 0:
			turn.unanswered(unreachable, "refused")
		case 1:
			turn.answered(answer(503, "Retry-After", fmt.Sprint(random.IntN(10))), 0)
			turn.ended()
		case 2:
			turn.answered(answer(200), 0)
			turn.brokeOff(unreachable, "cut")
		case 3:
			turn.dropped()
		default:
			turn.answered(answer(200), 0)
			turn.ended()
		}
		synctest.Wait()
	}
	for i := range 300 {
		switch random.IntN(5) {
		case 0, 1:
			queue(i)
		case 2, 3:
			end()
		case 4:
			time.Sleep(time.Duration(random.IntN(2000)) * time.Millisecond)
			synctest.Wait()
		}
		s := state(g)
		mu.Lock()
		if s.InProgress != len(inside) || s.InProgress > l.MaxConnections || s.Images > g.limits.maxImages() {
			t.Errorf("step %d: %+v with %d inside, limits %+v", i, s, len(inside), l)
		}
		if s.Open() && s.Waiting > 1 {
			t.Errorf("step %d: somebody waits besides the probe although the host isn't asked: %+v", i, s)
		}
		mu.Unlock()
	}
	cancel()
	all.Wait()
	for len(inside) > 0 {
		end()
	}
	if s := state(g); s.InProgress != 0 || s.Images != 0 || s.Waiting != 0 {
		t.Errorf("after all: %+v", s)
	}
	var when []time.Time
	for large, entries := range begun {
		for i, e := range entries {
			when = append(when, e.when)
			if i > 0 && e.when.After(entries[i-1].when) && e.number < entries[i-1].number {
				t.Errorf("large = %v: number %d came in after number %d", large, e.number, entries[i-1].number)
			}
		}
	}
	slices.SortFunc(when, time.Time.Compare)
	// In no time did more begin than the bucket has.
	for i := range when {
		for j := i; j < len(when); j++ {
			most := float64(l.Burst) + when[j].Sub(when[i]).Seconds()*float64(l.Rate)
			if float64(j-i+1) > most+0.001 {
				t.Fatalf("%d requests began within %v, limits %+v", j-i+1, when[j].Sub(when[i]), l)
			}
		}
	}
}
