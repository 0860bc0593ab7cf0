// Package metrics counts what acproxy does, for Prometheus.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/trust"
)

// Metrics are the counters of one server. They are safe for concurrent use.
type Metrics struct {
	registry    *prometheus.Registry
	decisions   *prometheus.CounterVec
	rktRefusals prometheus.Counter
	distrusted  prometheus.Gauge
	evictions   *prometheus.CounterVec
	evicted     *prometheus.CounterVec
	flights     *prometheus.HistogramVec
	warmed      *prometheus.CounterVec
	requests    *requests
	pushes      *prometheus.CounterVec
	pushed      prometheus.Counter
	layers      *prometheus.HistogramVec
	layerBytes  prometheus.Counter
	orders      *prometheus.CounterVec
}

// New returns counters at zero.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_decisions_total",
			Help: "Decisions about images, by event (accepted, refused, quarantined, restored, inspected, passed, published, evicted, damaged) and outcome (trust's word for the verdict, or another reason).",
		}, []string{"event", "outcome"}),
		rktRefusals: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "acproxy_accepted_rkt_refuses_total",
			Help: "Images accepted here that rkt's own check is expected to refuse.",
		}),
		distrusted: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "acproxy_images_distrusted",
			Help: "Held images that are not served because of what the keys and policies say now.",
		}),
		evictions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_evictions_total",
			Help: "What was evicted, by kind (partial, set-aside, quarantined, image) and reason (needed, high-watermark, disk-full, asked).",
		}, []string{"kind", "reason"}),
		evicted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_evicted_bytes_total",
			Help: "Bytes of what was evicted, by kind and reason.",
		}, []string{"kind", "reason"}),
		flights: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "acproxy_flight_seconds",
			Help:    "Time that fetching an image took, from its publisher's answer to the verdict, by outcome (kept, or the code of the error).",
			Buckets: []float64{.01, .1, .5, 1, 5, 15, 60, 300, 1800},
		}, []string{"outcome"}),
		warmed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_warmed_images_total",
			Help: "Images of lists that were fetched ahead, by what became of them (held, fetched, would, failed).",
		}, []string{"outcome"}),
		requests: newRequests(),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_pushes_total",
			Help: "Uploads that have ended, by outcome (published, held, given-up, or the code of the error).",
		}, []string{"outcome"}),
		pushed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "acproxy_push_received_bytes_total",
			Help: "Bytes of images that were uploaded.",
		}),
		layers: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "acproxy_oci_layer_seconds",
			Help:    "Time that reading an image took to find out what its OCI layer is called, by outcome (made, or the code of the error).",
			Buckets: []float64{.01, .1, .5, 1, 5, 15, 60, 300},
		}, []string{"outcome"}),
		layerBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "acproxy_oci_layer_bytes_total",
			Help: "Bytes of the OCI layers that acproxy_oci_layer_seconds counts.",
		}),
		orders: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "acproxy_acme_orders_total",
			Help: "Attempts to have a certificate issued by the ACME server, by outcome (issued, failed).",
		}, []string{"outcome"}),
	}
	m.orders.WithLabelValues("issued")
	m.orders.WithLabelValues("failed")
	m.pushes.WithLabelValues("published")
	m.layers.WithLabelValues("made")
	m.flights.WithLabelValues("kept")
	for _, outcome := range []string{"held", "fetched", "failed"} {
		m.warmed.WithLabelValues(outcome)
	}
	for _, reason := range []string{cache.ReasonNeeded, cache.ReasonHigh, cache.ReasonDiskFull, cache.ReasonAsked} {
		m.evictions.WithLabelValues(cache.EvictImage, reason)
		m.evicted.WithLabelValues(cache.EvictImage, reason)
	}
	for _, outcome := range trust.Outcomes() {
		event := fetch.EventRefused
		if outcome == trust.Accepted {
			event = fetch.EventAccepted
		}
		// A counter that is there from the start shows its first increase.
		m.decisions.WithLabelValues(event, outcome.String())
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "acproxy_build_info", Help: "Which acproxy this is; always 1.", ConstLabels: prometheus.Labels{"version": version},
	})
	info.Set(1)
	m.registry.MustRegister(m.orders, m.layers, m.layerBytes, m.pushes, m.pushed, m.decisions, m.rktRefusals, m.distrusted, m.evictions, m.evicted, m.flights, m.warmed, m.requests.answered, m.requests.bytes, m.requests.firstByte, info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Decided counts a decision.
func (m *Metrics) Decided(d fetch.Decision) {
	m.decisions.WithLabelValues(d.Event, d.Outcome).Inc()
	if d.Event == fetch.EventAccepted && d.RktWarning != "" {
		m.rktRefusals.Inc()
	}
}

// Evicted counts an eviction.
func (m *Metrics) Evicted(e cache.Eviction) {
	m.evictions.WithLabelValues(e.Kind, e.Reason).Inc()
	m.evicted.WithLabelValues(e.Kind, e.Reason).Add(float64(e.Bytes))
}

// Converted counts an OCI layer of so many bytes that was made, or wasn't, and how long that took.
func (m *Metrics) Converted(bytes int64, took time.Duration, err error) {
	m.layerBytes.Add(float64(bytes))
	outcome := "made"
	if err != nil {
		if outcome = acproxy.Code(err); outcome == "" {
			outcome = "error"
		}
	}
	m.layers.WithLabelValues(outcome).Observe(took.Seconds())
}

// Pushed counts an upload that has ended and, with "" as its outcome, bytes of images that came.
func (m *Metrics) Pushed(outcome string, bytes int64) {
	m.pushed.Add(float64(bytes))
	if outcome != "" {
		m.pushes.WithLabelValues(outcome).Inc()
	}
}

// Uploads has the metrics tell how many uploads are in progress.
func (m *Metrics) Uploads(inProgress func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "acproxy_uploads", Help: "Uploads in progress.",
	}, func() float64 { return float64(inProgress()) }))
}

// Rejudged notes how many held images the keys don't accept.
func (m *Metrics) Rejudged(r fetch.Rejudged) { m.distrusted.Set(float64(r.Quarantined)) }

// Handler answers with the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
