package metrics

import (
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/internal/web"
)

// everything returns metrics in which each one has a value.
func everything() *Metrics {
	m := New("1.0")
	m.Watch(store{})
	m.Publishers(func() []web.HostState { return []web.HostState{{Host: "https://example.com"}} }, func() []web.Traffic {
		return []web.Traffic{{What: "image", Requests: 3, Failures: 1, Bytes: 500}, {Requests: 1}}
	})
	m.Decided(fetch.Decision{Event: fetch.EventAccepted, Outcome: "accepted"})
	m.Uploads(func() int { return 1 })
	m.Certificates(func() []Certificate {
		return []Certificate{{Source: "acme", Name: "images.example.com", NotAfter: time.Now()}}
	})
	m.Answered(server.Access{Kind: server.KindImage, Verdict: "hit", Status: 200, Bytes: 100})
	return m
}

var ourName = regexp.MustCompile(`acproxy_[a-z_]+[a-z]`)

// TestMetricsAreDocumented holds docs/metrics.md, the alerts and the dashboard against what there is.
func TestMetricsAreDocumented(t *testing.T) {
	families, err := everything().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	there := make(map[string]bool)
	for _, f := range families {
		there[f.GetName()] = true
	}
	page := readFile(t, "../../docs/metrics.md")
	for name := range there {
		if strings.HasPrefix(name, "acproxy_") && !strings.Contains(page, "`"+name+"`") {
			t.Errorf("docs/metrics.md doesn't have %s", name)
		}
	}
	for _, file := range []string{"../../docs/metrics.md", "../../deploy/prometheus/alerts.yaml", "../../deploy/grafana/acproxy.json"} {
		for _, name := range ourName.FindAllString(readFile(t, file), -1) {
			if !there[name] && !there[strings.TrimSuffix(name, "_bucket")] {
				t.Errorf("%s has %s, which isn't there", file, name)
			}
		}
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestAnswersAreCounted(t *testing.T) {
	m := New("1.0")
	for range 2 {
		m.Answered(server.Access{Kind: server.KindImage, Verdict: "hit", Status: 200, Bytes: 100, FirstByte: time.Millisecond})
	}
	m.Answered(server.Access{Kind: server.KindSignature, Status: 403, Bytes: 50})
	if n := testutil.ToFloat64(m.requests.answered.WithLabelValues("image", "hit", "200")); n != 2 {
		t.Errorf("%v images, want 2", n)
	}
	if n := testutil.ToFloat64(m.requests.bytes.WithLabelValues("image", "hit")); n != 200 {
		t.Errorf("%v bytes of images, want 200", n)
	}
	if n := testutil.ToFloat64(m.requests.answered.WithLabelValues("signature", "none", "403")); n != 1 {
		t.Errorf("%v refusals, want 1", n)
	}
	m.Landed(time.Second, nil)
	m.Landed(time.Second, &acproxy.Error{Code: "publisher-cut"})
	m.Landed(time.Second, errors.New("x"))
	if n := testutil.CollectAndCount(m.flights); n != 3 {
		t.Errorf("flights have %d outcomes, want 3", n)
	}
}
