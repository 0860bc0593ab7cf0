package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A Certificate is one that clients are shown, or the authority of those that are made for them.
type Certificate struct {
	Source   string // acme, files or local-ca
	Name     string // that it is for; of files the first one, of the local CA the CA's own
	NotAfter time.Time
}

// Certificates has the metrics tell when certificates end. The earliest counts where several have one name.
func (m *Metrics) Certificates(all func() []Certificate) {
	m.registry.MustRegister(certificateCollector(all))
}

// Ordered counts an order at an ACME server that has ended.
func (m *Metrics) Ordered(issued bool) {
	outcome := "failed"
	if issued {
		outcome = "issued"
	}
	m.orders.WithLabelValues(outcome).Inc()
}

// certificateCollector makes the metrics when they are asked for.
type certificateCollector func() []Certificate

var _ prometheus.Collector = certificateCollector(nil)

// Describe implements [prometheus.Collector].
func (c certificateCollector) Describe(chan<- *prometheus.Desc) {} // what there is may change

// Collect implements [prometheus.Collector].
func (c certificateCollector) Collect(out chan<- prometheus.Metric) {
	desc := prometheus.NewDesc("acproxy_certificate_expiry_timestamp_seconds",
		"When certificates end, by source (acme, files, local-ca) and name; 0 if an ACME server has issued none yet.", []string{"source", "name"}, nil)
	type key struct{ source, name string }
	ends := make(map[key]float64)
	for _, cert := range c() {
		end := 0.0
		if !cert.NotAfter.IsZero() {
			end = float64(cert.NotAfter.Unix())
		}
		at := key{cert.Source, cert.Name}
		if before, twice := ends[at]; !twice || end < before {
			ends[at] = end
		}
	}
	for at, end := range ends {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, end, at.source, at.name)
	}
}
