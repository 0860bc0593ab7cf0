package e2e

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	spans "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
)

// A receiver takes spans as an OpenTelemetry collector does.
type receiver struct {
	*httptest.Server
	t testing.TB

	mu      sync.Mutex
	header  http.Header
	raw     []byte
	spans   []*spans.Span
	service string
}

func newReceiver(t testing.TB) *receiver {
	r := &receiver{t: t}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	var got collector.ExportTraceServiceRequest
	if err = errors.Join(err, proto.Unmarshal(body, &got)); err != nil || req.URL.Path != "/v1/traces" || req.Header.Get("Content-Type") != "application/x-protobuf" {
		r.t.Errorf("%s %s with %q: %v", req.Method, req.URL, req.Header.Get("Content-Type"), err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.header = req.Header
	r.raw = append(r.raw, body...)
	for _, resource := range got.GetResourceSpans() {
		for _, a := range resource.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				r.service = a.GetValue().GetStringValue()
			}
		}
		for _, scope := range resource.GetScopeSpans() {
			r.spans = append(r.spans, scope.GetSpans()...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// of returns the spans of a trace with a name.
func (r *receiver) of(trace, name string) []*spans.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*spans.Span
	for _, s := range r.spans {
		if hex.EncodeToString(s.GetTraceId()) == trace && s.GetName() == name {
			found = append(found, s)
		}
	}
	return found
}

// one returns the only span of a trace with a name.
func (r *receiver) one(trace, name string) *spans.Span {
	r.t.Helper()
	found := r.of(trace, name)
	if len(found) != 1 {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, s := range r.spans {
			r.t.Logf("%x %s of %x", s.GetTraceId(), s.GetName(), s.GetParentSpanId())
		}
		r.t.Fatalf("trace %s has %d spans %q, want 1", trace, len(found), name)
	}
	return found[0]
}

func attribute(s *spans.Span, key string) string {
	for _, a := range s.GetAttributes() {
		if a.GetKey() == key {
			return a.GetValue().GetStringValue()
		}
	}
	return ""
}

func linked(s, to *spans.Span) bool {
	return slices.ContainsFunc(s.GetLinks(), func(l *spans.Span_Link) bool {
		return bytes.Equal(l.GetSpanId(), to.GetSpanId()) && bytes.Equal(l.GetTraceId(), to.GetTraceId())
	})
}

func traceID(n int) string { return fmt.Sprintf("%032x", n) }

func traceparent(n int) string { return "00-" + traceID(n) + "-00f067aa0ba902b7-01" }

func TestTraces(t *testing.T) {
	t.Parallel()
	to := newReceiver(t)
	s := newScene(t, `{traces: {endpoint: "`+to.URL+`"}, log: {access_flush: 0s}}`)
	im := s.publish(large("app", 1<<20))
	trouble := s.publisher.Misbehave(publisher.URL(im.blob()), publisher.Fault{StallAfter: publisher.At(1000)})

	// One starts a flight, two join it.
	ask := func(n int) *http.Response {
		req := must(http.NewRequestWithContext(s.context(), http.MethodGet, s.direct(im, "aci"), nil))(t)
		req.Header.Set("Traceparent", traceparent(n))
		req.Header.Set("Authorization", "Bearer hush-hush")
		return must(s.client().Do(req))(t)
	}
	var all []*http.Response
	for n := 1; n <= 3; n++ {
		all = append(all, ask(n))
	}
	trouble.Release()
	for _, resp := range all {
		if body := must(io.ReadAll(resp.Body))(t); !bytes.Equal(body, im.aci) {
			t.Errorf("%s with %d bytes", resp.Status, len(body))
		}
		_ = resp.Body.Close()
	}
	// Then hits, of which the later ones are answered by the brisk path.
	page := s.plain() + "/app?ac-discovery=1&secret=hush-hush"
	wantStatus(t, s.get(page), http.StatusForbidden)
	wantStatus(t, s.get(strings.Replace(s.direct(im, "aci"), "version=1.0.0", "token=hush-hush&version=1.0.0", 1)), http.StatusBadGateway)
	for n := 4; n <= 6; n++ {
		wantStatus(t, s.get(s.direct(im, "aci.asc"), "Traceparent", traceparent(n)), http.StatusOK)
	}
	wantStatus(t, s.get(s.plain()+"/.acproxy/images/example.com/missing.aci?version=1.0.0", "Traceparent", traceparent(7)), http.StatusNotFound)
	s.server().end(syscall.SIGTERM)

	if to.service != "acproxy" {
		t.Errorf("service.name is %q", to.service)
	}
	first := to.one(traceID(1), "GET image")
	if hex.EncodeToString(first.GetParentSpanId()) != "00f067aa0ba902b7" || first.GetKind() != spans.Span_SPAN_KIND_SERVER {
		t.Errorf("the request's span is %v", first)
	}
	for key, want := range map[string]string{"acproxy.kind": "image", "acproxy.cache": "acproxy; fwd=uri-miss", "client.address": "127.0.0.1", "http.request.method": "GET"} {
		if got := attribute(first, key); got != want {
			t.Errorf("%s = %q, want %q", key, got, want)
		}
	}
	if ref := attribute(first, "acproxy.ref"); !strings.HasPrefix(ref, im.name+":1.0.0") {
		t.Errorf("acproxy.ref = %q", ref)
	}
	flight := to.one(traceID(1), "flight")
	if !bytes.Equal(flight.GetParentSpanId(), first.GetSpanId()) {
		t.Error("the flight's span isn't below that of the request")
	}
	for _, name := range []string{"queue", "discovery", "signature", "image", "verify", "commit"} {
		part := to.one(traceID(1), name)
		if !bytes.Equal(part.GetParentSpanId(), flight.GetSpanId()) || part.GetStatus().GetCode() == spans.Status_STATUS_CODE_ERROR {
			t.Errorf("%s is %v", name, part)
		}
	}
	for n := 2; n <= 3; n++ {
		joined := to.one(traceID(n), "GET image")
		if !linked(joined, flight) || !linked(flight, joined) {
			t.Errorf("request %d and the flight that it joined are not linked", n)
		}
		if len(to.of(traceID(n), "flight")) > 0 {
			t.Errorf("request %d has a flight of its own", n)
		}
	}
	for n := 4; n <= 6; n++ {
		if hit := attribute(to.one(traceID(n), "GET signature"), "acproxy.cache"); hit != "acproxy; hit" {
			t.Errorf("the cache verdict of request %d is %q", n, hit)
		}
	}
	missing, failed := to.one(traceID(7), "GET image"), to.one(traceID(7), "flight")
	if missing.GetStatus().GetCode() == spans.Status_STATUS_CODE_ERROR || attribute(missing, "error.type") == "" {
		t.Errorf("what the client asked for in vain is %v", missing)
	}
	if failed.GetStatus().GetCode() != spans.Status_STATUS_CODE_ERROR {
		t.Errorf("the flight that found nothing is %v", failed)
	}
	if bytes.Contains(to.raw, []byte("hush-hush")) {
		t.Error("a secret is in the spans")
	}
	log := s.server().output()
	for _, want := range []string{`"trace_id":"` + traceID(4) + `"`, `"msg":"image kept","trace_id":"` + traceID(1) + `"`} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %s", want)
		}
	}
	// Nobody has told the publisher.
	for _, r := range s.publisher.Requests() {
		if v := r.Header.Get("Traceparent"); v != "" {
			t.Errorf("the publisher was told of trace %s with %s", v, r.Path)
		}
	}
}

func TestTracesToPublishers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, overlay string }{
		{"exported", `{traces: {publishers: true, endpoint: "$ENDPOINT"}}`},
		{"not exported", `{traces: {publishers: true}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, strings.ReplaceAll(tt.overlay, "$ENDPOINT", newReceiver(t).URL))
			im := s.publish(app("app"))
			wantImage(t, s.get(s.direct(im, "aci"), "Traceparent", traceparent(1), "Tracestate", "vendor=1"), im)
			told := 0
			for _, r := range s.publisher.Requests() {
				if v := r.Header.Get("Traceparent"); strings.HasPrefix(v, "00-"+traceID(1)+"-") {
					told++
				} else {
					t.Errorf("%s came with the trace %q", r.Path, v)
				}
				if v := r.Header.Get("Tracestate"); v != "" {
					t.Errorf("the publisher was told the state %q", v)
				}
			}
			if told < 3 {
				t.Errorf("%d requests said their trace, want those for page, signature and image", told)
			}
		})
	}
}

// TestTracesOff: a trace that a request names is in the log, and nothing is exported that nobody has configured.
func TestTracesOff(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
	s := newScene(t, `log: {access_flush: 0s}`)
	im := s.publish(app("app"))
	wantImage(t, s.get(s.direct(im, "aci"), "Traceparent", traceparent(1)), im)
	wantImage(t, s.get(s.direct(im, "aci"), "Traceparent", "00-nonsense"), im)
	s.server().end(syscall.SIGTERM)
	log := s.server().output()
	if !strings.Contains(log, `"trace_id":"`+traceID(1)+`"`) || strings.Contains(log, "nonsense") || strings.Contains(log, "export") {
		t.Errorf("the log is\n%s", log)
	}
}

// TestTracesWithoutCollector: nobody waits for a collector that isn't there, and the log says so once.
func TestTracesWithoutCollector(t *testing.T) {
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
	s := newScene(t, `{traces: {endpoint: "http://127.0.0.1:1"}, log: {access_flush: 0s}}`)
	im := s.publish(acitest.Spec{Name: "example.com/app", Labels: standard("1.0.0"), RootfsSize: 100})
	for range 3 {
		wantImage(t, s.get(s.direct(im, "aci")), im)
	}
	eventually(t, "the log says that traces can't be exported", func() bool { return strings.Contains(s.server().output(), "traces can't be exported") })
	s.server().end(syscall.SIGTERM)
	if n := strings.Count(s.server().output(), "traces can't be exported"); n != 1 {
		t.Errorf("the log says it %d times", n)
	}
}
