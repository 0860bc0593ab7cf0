package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/acproxy/acproxy/internal/web"
)

// Publishers has the hosts that were asked lately, and what was asked of all of them, among the metrics from now on. It may be called once.
func (m *Metrics) Publishers(hosts func() []web.HostState, traffic func() []web.Traffic) {
	gauge := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("acproxy_publisher_"+name, help, []string{"host"}, nil)
	}
	m.registry.MustRegister(&publishers{
		hosts: hosts, traffic: traffic,
		requests:   prometheus.NewDesc("acproxy_publisher_requests_total", "Requests that publishers were asked, by what was asked for (discovery, key, signature, image, other).", []string{"what"}, nil),
		failures:   prometheus.NewDesc("acproxy_publisher_failures_total", "Requests to publishers without an answer, or with one of 5xx, by what was asked for.", []string{"what"}, nil),
		bytes:      prometheus.NewDesc("acproxy_publisher_received_bytes_total", "Bytes that came from publishers, by what was asked for.", []string{"what"}, nil),
		open:       gauge("breaker_open", "Whether requests to a publisher's host fail at once because it is down (1), or are made (0)."),
		resting:    gauge("resting", "Whether a publisher's host is left alone because it said so with Retry-After (1), or not (0)."),
		inProgress: gauge("requests_in_progress", "Requests to a publisher's host, until their bodies have come."),
		waiting:    gauge("requests_waiting", "Requests to a publisher's host whose turn hasn't come."),
	})
}

// publishers asks how things are whenever somebody wants to know. There are as many hosts as package web remembers, and no more.
type publishers struct {
	hosts                              func() []web.HostState
	traffic                            func() []web.Traffic
	open, resting, inProgress, waiting *prometheus.Desc
	requests, failures, bytes          *prometheus.Desc
}

// Describe sends what there is.
func (p *publishers) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{p.open, p.resting, p.inProgress, p.waiting, p.requests, p.failures, p.bytes} {
		out <- d
	}
}

// Collect sends how it is now.
func (p *publishers) Collect(out chan<- prometheus.Metric) {
	p.sendTraffic(out)
	for _, h := range p.hosts() {
		for desc, value := range map[*prometheus.Desc]float64{
			p.open: number(h.Open()), p.resting: number(!h.RestingUntil.IsZero()), p.inProgress: float64(h.InProgress), p.waiting: float64(h.Waiting),
		} {
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, h.Host)
		}
	}
}

// sendTraffic sends what was asked so far.
func (p *publishers) sendTraffic(out chan<- prometheus.Metric) {
	for _, t := range p.traffic() {
		what := t.What
		if what == "" {
			what = "other"
		}
		for desc, n := range map[*prometheus.Desc]int64{p.requests: t.Requests, p.failures: t.Failures, p.bytes: t.Bytes} {
			out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), what)
		}
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
