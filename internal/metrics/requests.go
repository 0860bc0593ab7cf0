package metrics

import (
	"cmp"
	"maps"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/server"
)

// requests counts what clients are answered.
type requests struct {
	answered  *prometheus.CounterVec
	bytes     *prometheus.CounterVec
	firstByte *prometheus.HistogramVec

	// What was counted before, to be had without a look at labels: requests are many. It is replaced with mu held, and read without.
	known atomic.Pointer[map[answerKey]*answers]
	mu    sync.Mutex
}

// answerKey is what answers are counted by.
type answerKey struct {
	kind, verdict string
	status        int
}

type answers struct {
	answered, bytes prometheus.Counter
	firstByte       prometheus.Observer
	// The same, to be read: counters can't be.
	requests, content atomic.Int64
}

// noVerdict is the verdict of what the store has no part in.
const noVerdict = "none"

func newRequests() *requests {
	r := &requests{
		answered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_requests_total",
			Help: "Requests of clients that were answered, by kind (page, signature, image, other), by how the answer came about (hit, stale, gone, revalidated, joined, miss, uncached; none where the store had no part in it) and by status.",
		}, []string{"kind", "cache", "code"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_served_bytes_total",
			Help: "Bytes of content that clients were sent, by kind and by how the answer came about.",
		}, []string{"kind", "cache"}),
		firstByte: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "acproxy_first_byte_seconds",
			Help:    "Time from a request until its answer begins, by kind and by how the answer came about.",
			Buckets: []float64{.0001, .001, .01, .1, .5, 1, 5, 30},
		}, []string{"kind", "cache"}),
	}
	r.known.Store(&map[answerKey]*answers{})
	for _, kind := range server.Kinds() {
		for _, verdict := range append(server.Verdicts(), noVerdict) {
			// A counter that is there from the start shows its first increase.
			r.answered.WithLabelValues(kind, verdict, "200")
			r.bytes.WithLabelValues(kind, verdict)
		}
	}
	return r
}

// Answered counts a request.
func (m *Metrics) Answered(a server.Access) {
	key := answerKey{a.Kind, a.Verdict, a.Status}
	counted, ok := (*m.requests.known.Load())[key]
	if !ok {
		counted = m.requests.learn(key)
	}
	counted.answered.Inc()
	counted.bytes.Add(float64(a.Bytes))
	counted.firstByte.Observe(a.FirstByte.Seconds())
	counted.requests.Add(1)
	counted.content.Add(a.Bytes)
}

// learn begins to count answers of a kind.
func (r *requests) learn(key answerKey) *answers {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := *r.known.Load()
	if counted, ok := now[key]; ok {
		return counted
	}
	verdict := cmp.Or(key.verdict, noVerdict)
	counted := &answers{
		answered: r.answered.WithLabelValues(key.kind, verdict, strconv.Itoa(key.status)),
		bytes:    r.bytes.WithLabelValues(key.kind, verdict), firstByte: r.firstByte.WithLabelValues(key.kind, verdict),
	}
	known := maps.Clone(now)
	known[key] = counted
	r.known.Store(&known)
	return counted
}

// Totals returns what was counted of clients' requests: those for images, signatures and pages. What came from publishers is left at 0.
func (m *Metrics) Totals() (t history.Totals) {
	for k, counted := range *m.requests.known.Load() {
		n := counted.requests.Load()
		t.Served += counted.content.Load()
		if k.kind == server.KindOther {
			continue
		}
		t.Requests += n
		switch {
		case k.status == http.StatusForbidden:
			t.Refused += n
		case k.verdict == fetch.Miss.String(), k.verdict == fetch.Joined.String(), k.verdict == fetch.Uncached.String():
			t.Misses += n
		case k.verdict != "" && k.verdict != noVerdict:
			t.Hits += n
		}
	}
	return t
}

// Warmed counts what became of an image of a list that was fetched ahead.
func (m *Metrics) Warmed(outcome string) { m.warmed.WithLabelValues(outcome).Inc() }

// Landed counts a fetch of an image that has ended.
func (m *Metrics) Landed(took time.Duration, err error) {
	outcome := "kept"
	if err != nil {
		outcome = "error"
		if code := acproxy.Code(err); code != "" {
			outcome = code
		}
	}
	m.flights.WithLabelValues(outcome).Observe(took.Seconds())
}
