package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Options say where spans go.
type Options struct {
	// Endpoint is the URL of the collector, to whose path /v1/traces is added unless it has one. What else there is to say, headers with secrets above all,
	// stands in the environment (OTEL_EXPORTER_OTLP_HEADERS and so on).
	Endpoint string
	Percent  int // of the requests that belong to no trace yet which are exported
	Version  string
	Log      *slog.Logger // nil means slog.Default
}

// An Exporter sends spans to a collector. nil sends none. It is safe for concurrent use.
type Exporter struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// NewExporter returns an Exporter. It doesn't look whether there is a collector: spans that can't be sent are dropped, and the log says so once.
func NewExporter(ctx context.Context, o Options) (*Exporter, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	url := strings.TrimRight(o.Endpoint, "/")
	if !strings.HasSuffix(url, "/v1/traces") {
		url += "/v1/traces"
	}
	client, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(url))
	if err != nil {
		return nil, fmt.Errorf("exporting traces: %w", err)
	}
	e := &Exporter{provider: sdk.NewTracerProvider(
		sdk.WithBatcher(&teller{SpanExporter: client, log: o.Log}),
		sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(float64(o.Percent)/100))),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", "acproxy"), attribute.String("service.version", o.Version))),
	)}
	e.tracer = e.provider.Tracer(scope)
	return e, nil
}

// Close sends what waits to be sent, for as long as ctx allows.
func (e *Exporter) Close(ctx context.Context) error {
	if e == nil {
		return nil
	}
	return e.provider.Shutdown(ctx)
}

// Request begins the span of a request that was received, within the trace that ctx belongs to, or in a new one.
func (e *Exporter) Request(ctx context.Context, method string) (context.Context, *Span) {
	if e == nil {
		return ctx, nil
	}
	ctx, span := e.tracer.Start(ctx, method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(attribute.String("http.request.method", method)))
	return ctx, &Span{span}
}

// Answered says what became of a request: its name, once it is known what it was about.
func (s *Span) Answered(name string, status int) {
	if s == nil {
		return
	}
	s.span.SetName(name)
	s.span.SetAttributes(attribute.Int("http.response.status_code", status))
}

// teller is an exporter that says when sending begins to fail, and when it works again.
type teller struct {
	sdk.SpanExporter
	log *slog.Logger

	mu      sync.Mutex
	failing bool
}

// ExportSpans sends spans. Those that can't be sent are nobody's error.
func (t *teller) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	err := t.SpanExporter.ExportSpans(ctx, spans)
	t.mu.Lock()
	changed := t.failing != (err != nil)
	t.failing = err != nil
	t.mu.Unlock()
	switch {
	case changed && err != nil:
		t.log.Warn("traces can't be exported, and are dropped until they can", "err", err)
	case changed:
		t.log.Info("traces are exported again")
	}
	return nil
}
