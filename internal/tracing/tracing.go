// Package tracing follows a request through acproxy: the trace that a client says it belongs to (W3C Trace Context), and spans for an OpenTelemetry collector.
package tracing

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/acproxy/acproxy"
)

// Header is the field in which clients say which trace their request belongs to, in the form that [http.Header] has it.
const Header = "Traceparent"

// scope is who makes the spans, as the collector sees it.
const scope = "github.com/acproxy/acproxy"

// Incoming returns a context that belongs to the trace that a request names. It is ctx itself if the request names none, or names it wrongly.
func Incoming(ctx context.Context, header http.Header) context.Context {
	// tracestate is what other vendors tell each other; nothing here adds to it or passes it on.
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": header.Get(Header)})
}

// ID returns the ID of the trace that a context belongs to, in hex. It is "" if it belongs to none.
func ID(ctx context.Context) string {
	if sc := trace.SpanContextFromContext(ctx); sc.HasTraceID() {
		return sc.TraceID().String()
	}
	return ""
}

// Outgoing returns what a request that is made in a context says in its field [Header]. It is "" if the context belongs to no trace.
func Outgoing(ctx context.Context) string {
	carrier := make(propagation.MapCarrier, 1)
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// Carry returns a context with the life of one and the trace of another: what is started by a request may outlive it.
func Carry(life, from context.Context) context.Context {
	if sc := trace.SpanContextFromContext(from); !sc.IsValid() {
		return life
	}
	return trace.ContextWithSpan(life, trace.SpanFromContext(from))
}

// A Span is a piece of work with a beginning and an end. nil is one that nobody looks at: all its methods do nothing. It is safe for concurrent use.
type Span struct{ span trace.Span }

// Start begins a piece of work within the one that ctx belongs to. Unless that is exported it returns ctx and nil. attributes are names and values in turn.
// What goes into a span leaves this machine: never a URL, which may have a token in its query.
func Start(ctx context.Context, name string, attributes ...string) (context.Context, *Span) {
	parent := trace.SpanFromContext(ctx)
	if sc := parent.SpanContext(); !sc.IsSampled() || sc.IsRemote() {
		return ctx, nil
	}
	ctx, span := parent.TracerProvider().Tracer(scope).Start(ctx, name, trace.WithAttributes(pairs(attributes)...))
	return ctx, &Span{span}
}

func pairs(attributes []string) []attribute.KeyValue {
	out := make([]attribute.KeyValue, 0, len(attributes)/2)
	for i := 1; i < len(attributes); i += 2 {
		out = append(out, attribute.String(attributes[i-1], attributes[i]))
	}
	return out
}

// Note adds what has become known of the work, as names and values in turn.
func (s *Span) Note(attributes ...string) {
	if s != nil {
		s.span.SetAttributes(pairs(attributes)...)
	}
}

// Count adds a number that has become known of the work.
func (s *Span) Count(name string, n int64) {
	if s != nil {
		s.span.SetAttributes(attribute.Int64(name, n))
	}
}

// Fail says how the work failed: the code of the error, if it has one, and nothing of its text, in which there may be a URL.
func (s *Span) Fail(err error) {
	if s == nil || err == nil {
		return
	}
	code := acproxy.Code(err)
	if code == "" {
		code = "_OTHER" // as the semantic conventions have it
	}
	s.span.SetAttributes(attribute.String("error.type", code))
	s.span.SetStatus(codes.Error, code)
}

// End ends the work, with the error that it ended with or nil.
func (s *Span) End(err error) {
	if s == nil {
		return
	}
	s.Fail(err)
	s.span.End()
}

// Meet links the work that two contexts belong to with each other, if both are exported: neither has begun the other, and both go on by it.
func Meet(a, b context.Context) {
	one, other := trace.SpanFromContext(a), trace.SpanFromContext(b)
	if one.SpanContext().Equal(other.SpanContext()) {
		return
	}
	for _, pair := range [][2]trace.Span{{one, other}, {other, one}} {
		if pair[0].IsRecording() && pair[1].SpanContext().IsValid() {
			pair[0].AddLink(trace.Link{SpanContext: pair[1].SpanContext()})
		}
	}
}
