package metrics

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/acproxy/acproxy/internal/web"
)

func TestPublishers(t *testing.T) {
	m := New("1.0")
	var hosts []web.HostState
	m.Publishers(func() []web.HostState { return hosts }, func() []web.Traffic { return nil })
	names := []string{"acproxy_publisher_breaker_open", "acproxy_publisher_resting", "acproxy_publisher_requests_in_progress", "acproxy_publisher_requests_waiting"}
	if err := testutil.GatherAndCompare(m.registry, strings.NewReader(""), names...); err != nil {
		t.Errorf("with no host: %v", err)
	}
	hosts = []web.HostState{
		{Host: "http://b.example.com:8080", RestingUntil: time.Now()},
		{Host: "https://a.example.com", InProgress: 3, Waiting: 2, Breakers: []web.BreakerState{{State: web.BreakerClosed}}},
		{Host: "https://ä.example.com", Breakers: []web.BreakerState{{State: web.BreakerClosed}, {Prefix: "example.com", State: web.BreakerOpen}}},
	}
	const want = `
# HELP acproxy_publisher_breaker_open Whether requests to a publisher's host fail at once because it is down (1), or are made (0).
# TYPE acproxy_publisher_breaker_open gauge
acproxy_publisher_breaker_open{host="http://b.example.com:8080"} 0
acproxy_publisher_breaker_open{host="https://a.example.com"} 0
acproxy_publisher_breaker_open{host="https://ä.example.com"} 1
# HELP acproxy_publisher_requests_in_progress Requests to a publisher's host, until their bodies have come.
# TYPE acproxy_publisher_requests_in_progress gauge
acproxy_publisher_requests_in_progress{host="http://b.example.com:8080"} 0
acproxy_publisher_requests_in_progress{host="https://a.example.com"} 3
acproxy_publisher_requests_in_progress{host="https://ä.example.com"} 0
# HELP acproxy_publisher_requests_waiting Requests to a publisher's host whose turn hasn't come.
# TYPE acproxy_publisher_requests_waiting gauge
acproxy_publisher_requests_waiting{host="http://b.example.com:8080"} 0
acproxy_publisher_requests_waiting{host="https://a.example.com"} 2
acproxy_publisher_requests_waiting{host="https://ä.example.com"} 0
# HELP acproxy_publisher_resting Whether a publisher's host is left alone because it said so with Retry-After (1), or not (0).
# TYPE acproxy_publisher_resting gauge
acproxy_publisher_resting{host="http://b.example.com:8080"} 1
acproxy_publisher_resting{host="https://a.example.com"} 0
acproxy_publisher_resting{host="https://ä.example.com"} 0
`
	if err := testutil.GatherAndCompare(m.registry, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	problems, err := testutil.GatherAndLint(m.registry, names...)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}
