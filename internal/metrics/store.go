package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/acproxy/acproxy/cache"
)

// A Store is asked for the space that it takes, and how far it has been scrubbed, whenever somebody asks for the metrics.
type Store interface {
	Usage() (cache.Usage, error)
}

// Watch adds the metrics of a store. It is called once.
func (m *Metrics) Watch(store Store) { m.registry.MustRegister(storeCollector{store}) }

// storeCollector makes the metrics of a store when they are asked for.
type storeCollector struct{ store Store }

var _ prometheus.Collector = storeCollector{}

// Describe implements [prometheus.Collector].
func (c storeCollector) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, out) }

// Collect implements [prometheus.Collector].
func (c storeCollector) Collect(out chan<- prometheus.Metric) {
	const bytesName, bytesHelp = "acproxy_cache_bytes", "Bytes that the store takes, by part; promised is what is promised to what is arriving, and not written yet."
	u, err := c.store.Usage()
	if err != nil {
		out <- prometheus.NewInvalidMetric(prometheus.NewDesc(bytesName, bytesHelp, []string{"part"}, nil), err)
		return
	}
	for _, part := range []struct {
		name  string
		bytes int64
	}{
		{"blobs", u.Blobs}, {"sidecars", u.Sidecars}, {"index", u.Index}, {"partials", u.Partials}, {"spools", u.Spools}, {"quarantine", u.Quarantine}, {"names", u.Names},
		{"directories", u.Directories}, {"open", u.Open}, {"promised", u.Promised},
	} {
		labelled(out, bytesName, bytesHelp, "part", part.name, part.bytes)
	}
	const limitName, limitHelp = "acproxy_cache_limit_bytes", "What limits the store: cache.max_size and cache.min_free; 0 is no limit."
	labelled(out, limitName, limitHelp, "limit", "max_size", u.Room.MaxSize)
	labelled(out, limitName, limitHelp, "limit", "min_free", u.Room.MinFree)
	const imagesName, imagesHelp = "acproxy_cache_images", "Images that are held, by state."
	labelled(out, imagesName, imagesHelp, "state", string(cache.OK), u.Images-u.Quarantined)
	labelled(out, imagesName, imagesHelp, "state", string(cache.Quarantined), u.Quarantined)
	gauge(out, "acproxy_cache_pinned_bytes", "Bytes of images that are pinned.", float64(u.Pinned))
	gauge(out, "acproxy_cache_free_bytes", "Bytes of the file system that are free.", float64(u.Room.Free))

	s := u.Scrub
	finished := 0.0
	if !s.Finished.IsZero() {
		finished = float64(s.Finished.UnixNano()) / 1e9
	}
	gauge(out, "acproxy_scrub_position", "Which part of the images has been scrubbed in this round, from 0 to 1.", s.Position)
	gauge(out, "acproxy_scrub_finished_timestamp_seconds", "When the last round of scrubbing ended, in seconds since 1970; 0 if none has.", finished)
	counter(out, "acproxy_scrubbed_images_total", "Images that were scrubbed.", s.Scrubbed.Images)
	counter(out, "acproxy_scrubbed_bytes_total", "Bytes that were scrubbed.", s.Scrubbed.Bytes)
	counter(out, "acproxy_scrub_findings_total", "What scrubbing has found wrong.", s.Scrubbed.Problems)
}

func labelled(out chan<- prometheus.Metric, name, help, label, value string, n int64) {
	out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, []string{label}, nil), prometheus.GaugeValue, float64(n), value)
}

func gauge(out chan<- prometheus.Metric, name, help string, value float64) {
	out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, value)
}

func counter(out chan<- prometheus.Metric, name, help string, n int64) {
	out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue, float64(n))
}
