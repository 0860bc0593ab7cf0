package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/acproxy/acproxy/internal/web"
)

// Publishers has the hosts that were asked lately among the metrics from now on. It may be called once.
func (m *Metrics) Publishers(hosts func() []web.HostState) {
	gauge := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("acproxy_publisher_"+name, help, []string{"host"}, nil)
	}
	m.registry.MustRegister(&publishers{
		hosts:      hosts,
		open:       gauge("breaker_open", "Whether requests to a publisher's host fail at once because it is down (1), or are made (0)."),
		resting:    gauge("resting", "Whether a publisher's host is left alone because it said so with Retry-After (1), or not (0)."),
		inProgress: gauge("requests_in_progress", "Requests to a publisher's host, until their bodies have come."),
		waiting:    gauge("requests_waiting", "Requests to a publisher's host whose turn hasn't come."),
	})
}

// publishers asks how things are whenever somebody wants to know. There are as many hosts as package web remembers, and no more.
type publishers struct {
	hosts                              func() []web.HostState
	open, resting, inProgress, waiting *prometheus.Desc
}

// Describe sends what there is.
func (p *publishers) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{p.open, p.resting, p.inProgress, p.waiting} {
		out <- d
	}
}

// Collect sends how it is now.
func (p *publishers) Collect(out chan<- prometheus.Metric) {
	for _, h := range p.hosts() {
		for desc, value := range map[*prometheus.Desc]float64{
			p.open: number(h.Open()), p.resting: number(!h.RestingUntil.IsZero()), p.inProgress: float64(h.InProgress), p.waiting: float64(h.Waiting),
		} {
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, h.Host)
		}
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
