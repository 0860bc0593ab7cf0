package metrics

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
)

func TestNamesKeepPrometheusRules(t *testing.T) {
	m := New("1.0")
	m.Decided(fetch.Decision{Event: fetch.EventAccepted, Outcome: "accepted"})
	m.Watch(store{})
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestDecisionsAreCounted(t *testing.T) {
	m := New("1.0")
	m.Decided(fetch.Decision{Event: fetch.EventAccepted, Outcome: "accepted"})
	m.Decided(fetch.Decision{Event: fetch.EventAccepted, Outcome: "accepted", RktWarning: "Ed25519"})
	m.Decided(fetch.Decision{Event: fetch.EventRefused, Outcome: "unknown-key"})
	m.Rejudged(fetch.Rejudged{Images: 3, Quarantined: 2})
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`acproxy_decisions_total{event="accepted",outcome="accepted"} 2`,
		`acproxy_decisions_total{event="refused",outcome="unknown-key"} 1`,
		`acproxy_decisions_total{event="refused",outcome="bad-signature"} 0`,
		`acproxy_accepted_rkt_refuses_total 1`,
		`acproxy_images_distrusted 2`,
		`acproxy_build_info{version="1.0"} 1`,
	} {
		if !strings.Contains(string(body), want+"\n") {
			t.Errorf("the metrics don't say %s", want)
		}
	}
}

func TestEvictionsAreCounted(t *testing.T) {
	m := New("test")
	m.Evicted(cache.Eviction{Kind: cache.EvictImage, Reason: cache.ReasonHigh, Bytes: 4096})
	m.Evicted(cache.Eviction{Kind: cache.EvictImage, Reason: cache.ReasonHigh, Bytes: 8192})
	if n, bytes := testutil.ToFloat64(m.evictions.WithLabelValues("image", "high-watermark")), testutil.ToFloat64(m.evicted.WithLabelValues("image", "high-watermark")); n != 2 || bytes != 12288 {
		t.Errorf("counted are %v evictions and %v bytes", n, bytes)
	}
}
