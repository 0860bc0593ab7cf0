package tracing

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestIncoming(t *testing.T) {
	for _, tt := range []struct{ name, says, id string }{
		{"none", "", ""},
		{"a trace", parent, "4bf92f3577b34da6a3ce929d0e0e4736"},
		{"not sampled", parent[:len(parent)-1] + "0", "4bf92f3577b34da6a3ce929d0e0e4736"},
		{"a later version", "cc" + parent[2:] + "-what-comes", "4bf92f3577b34da6a3ce929d0e0e4736"},
		{"the version that there isn't", "ff" + parent[2:], ""},
		{"capitals", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", ""},
		{"no trace", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", ""},
		{"no parent", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ""},
		{"too short", parent[:40], ""},
		{"lines", parent + "\nx", ""},
	} {
		ctx := Incoming(t.Context(), http.Header{Header: {tt.says}})
		if got := ID(ctx); got != tt.id {
			t.Errorf("%s: ID = %q, want %q", tt.name, got, tt.id)
		}
	}
	if got := Outgoing(Incoming(t.Context(), http.Header{Header: {parent}})); got != parent {
		t.Errorf("Outgoing = %q, want %q", got, parent)
	}
	if got := Outgoing(t.Context()); got != "" {
		t.Errorf("Outgoing of nothing = %q", got)
	}
}

func TestCarry(t *testing.T) {
	life, end := context.WithCancel(t.Context())
	from, leave := context.WithCancel(Incoming(t.Context(), http.Header{Header: {parent}}))
	ctx := Carry(life, from)
	if leave(); ctx.Err() != nil || Outgoing(ctx) != parent {
		t.Errorf("it ends with the request, or has lost its trace: %v, %q", ctx.Err(), Outgoing(ctx))
	}
	if end(); ctx.Err() == nil {
		t.Error("it has another life than it should")
	}
	if other := Carry(life, t.Context()); other != life {
		t.Error("a context without a trace makes another one")
	}
}

// TestOff: nothing is made of what nobody exports, and nobody has to ask whether it is exported.
func TestOff(t *testing.T) {
	var none *Exporter
	for _, header := range []http.Header{{}, {Header: {parent}}} {
		incoming := Incoming(t.Context(), header)
		ctx, span := none.Request(incoming, http.MethodGet)
		if ctx != incoming || span != nil {
			t.Errorf("Request = %v, %v", ctx, span)
		}
		inner, part := Start(ctx, "part", "name", "value")
		if inner != ctx || part != nil {
			t.Errorf("Start = %v, %v", inner, part)
		}
		part.Note("a", "b")
		part.Count("n", 1)
		part.Answered("GET", 200)
		part.End(errors.New("failed"))
		Meet(ctx, t.Context())
	}
	if err := none.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		ctx, span := Start(t.Context(), "part")
		span.End(nil)
		_ = ctx
	}); n > 0 {
		t.Errorf("a span that nobody exports takes %v allocations", n)
	}
}

func TestSampling(t *testing.T) {
	for percent, want := range map[int]bool{100: true, 0: false} {
		e, err := NewExporter(t.Context(), Options{Endpoint: "http://127.0.0.1:1", Percent: percent})
		if err != nil {
			t.Fatal(err)
		}
		ctx, _ := e.Request(t.Context(), http.MethodGet)
		if _, part := Start(ctx, "part"); (part != nil) != want {
			t.Errorf("with %d per cent a new trace is exported: %v", percent, part != nil)
		}
		if ctx, _ = e.Request(Incoming(t.Context(), http.Header{Header: {parent}}), http.MethodGet); ID(ctx) != parent[3:35] {
			t.Errorf("the trace is %s", ID(ctx))
		}
		if _, part := Start(ctx, "part"); part == nil {
			t.Error("a trace that its beginner exports isn't")
		}
		short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_ = e.Close(short) // there is no collector
		cancel()
	}
}
