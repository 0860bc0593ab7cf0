//go:build linux && amd64

package chaos

import (
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
)

// TestKill kills acproxy at the calls of each operation, before the call is done, and looks at what it serves then.
func TestKill(t *testing.T) {
	w := newWorld(t, "cut-through")
	w.prepare()
	tried := make(map[string]bool)
	for _, op := range operations() {
		t.Run(op.name, func(t *testing.T) {
			points := w.pointsOf(t, op)
			calls := len(points)
			if os.Getenv(whole) == "" {
				points = untried(points, tried)
			}
			var killed atomic.Int64
			each(t, points, func(t *testing.T, at point) {
				if w.kill(t, op, at.fault(tracer.Fault{Kill: true})) {
					killed.Add(1)
				}
			})
			t.Logf("%s: %d calls, killed before %d of them", op.name, calls, killed.Load())
		})
	}
}

// TestKillAfter kills acproxy when calls are done, and before it can tell anybody. What is on the disk then is what is there before the next call; what
// clients were told is less.
func TestKillAfter(t *testing.T) {
	w := newWorld(t, "cut-through")
	w.prepare()
	for _, op := range operations() {
		if op.begins || len(op.asks) == 0 {
			continue
		}
		t.Run(op.name, func(t *testing.T) {
			points := firsts(w.pointsOf(t, op))
			if os.Getenv(whole) == "" {
				points = points[len(points)-1:]
			}
			each(t, points, func(t *testing.T, at point) { w.kill(t, op, at.fault(tracer.Fault{Kill: true, After: true})) })
		})
	}
}

// untried returns the first call of an operation, its last one, and those of kinds that no operation had before.
func untried(points []point, tried map[string]bool) []point {
	var some []point
	for i, at := range points {
		if !tried[at.kind] || i == 0 || i == len(points)-1 {
			some = append(some, at)
		}
		tried[at.kind] = true
	}
	return some
}

// kill kills acproxy during an operation, and reports whether it came to that.
func (w *world) kill(t *testing.T, op operation, fault tracer.Fault) bool {
	r := w.newRun(t, w.stores[op.store].data)
	p := r.do(op, fault)
	p.end(syscall.SIGKILL)
	hit := len(p.tracer.Hits()) > 0
	if hit {
		tally.killed()
	} else {
		t.Log("it didn't come to this call")
	}

	p = r.serve(w.alone)
	r.wantStill(p, op)
	p.end(syscall.SIGKILL)

	p = r.serve(w.live)
	r.wantThen(p, op)
	p.stop()
	r.tidy()
	return hit
}

// TestKillTwice kills a server in its first fetch, and the next one at each call of its start: what the first has left is no worse for that.
func TestKillTwice(t *testing.T) {
	if os.Getenv(whole) == "" {
		t.Skipf("only with %s", whole)
	}
	w := newWorld(t, "cut-through")
	w.prepare()
	var op, start operation
	for _, o := range operations() {
		switch o.name {
		case "cold fetch":
			op = o
		case "start after a kill":
			start = o
		}
	}
	starts := firsts(w.pointsOf(t, start))
	each(t, firsts(w.pointsOf(t, op)), func(t *testing.T, first point) {
		r := w.newRun(t, w.stores[op.store].data)
		p := r.do(op, first.fault(tracer.Fault{Kill: true}))
		p.end(syscall.SIGKILL)
		left := &store{data: r.data, held: w.stores[op.store].held}
		for _, a := range r.told {
			left.held = append(left.held, a.ref)
		}
		for _, second := range starts {
			again := w.newRun(t, left.data)
			p := again.begin(operation{begins: true}, second.fault(tracer.Fault{Kill: true}))
			if len(p.tracer.Hits()) == 0 {
				p.end(syscall.SIGKILL)
				continue
			}
			tally.killed()
			p.end(syscall.SIGKILL)
			p = again.serve(w.alone)
			again.wantHeld(p, left.held)
			p.stop()
		}
	})
}
