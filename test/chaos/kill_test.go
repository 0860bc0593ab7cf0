//go:build linux && amd64

package chaos

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
)

// TestKill kills acproxy at the calls of each operation, before the call is done, and looks at what it serves then.
func TestKill(t *testing.T) {
	w := worldOf(t, "cut-through")
	tried := make(map[string]bool)
	for _, op := range operations() {
		t.Run(op.name, func(t *testing.T) {
			points := w.pointsOf(t, op)
			tally.calls(op.name, len(points))
			if !everything() {
				points = some(points, tried)
			}
			var n, killed atomic.Int64
			each(t, points, func(t *testing.T, at point) {
				if w.kill(t, op, at.fault(tracer.Fault{Kill: true}), everything() || n.Add(1)%2 == 0) {
					killed.Add(1)
				} else if at.nth == 1 {
					t.Error("it always makes the first call of a kind")
				}
			})
			// The writes of the index are not as many each time, so that it doesn't come to the last of them.
			if missed := len(points) - int(killed.Load()); missed > max(1, len(points)/5) {
				t.Errorf("it was killed at %d of %d points", killed.Load(), len(points))
			}
		})
	}
}

// TestKillAfter kills acproxy when calls are done, and before it can tell anybody. What is on the disk then is what is there before the next call; what
// clients were told is less.
func TestKillAfter(t *testing.T) {
	w := worldOf(t, "cut-through")
	for i, op := range operations() {
		if op.begins || len(op.asks) == 0 || i%2 == 1 && !everything() {
			continue
		}
		t.Run(op.name, func(t *testing.T) {
			points := firsts(w.pointsOf(t, op))
			if !everything() {
				points = points[len(points)-1:]
			}
			each(t, points, func(t *testing.T, at point) { w.kill(t, op, at.fault(tracer.Fault{Kill: true, After: true}), true) })
		})
	}
}

// classes are the system calls that do the same kind of thing.
var classes = map[string]string{
	"write": "write", "pwrite64": "write", "ftruncate": "write", "fsync": "sync", "fdatasync": "sync", "renameat": "rename", "unlinkat": "remove",
	"openat": "make", "mkdirat": "make", "fchmodat": "make",
}

// some returns some points of an operation, at least one of each class; of the first operation, all kinds. One that no operation has had before comes first,
// else it is one in the middle.
func some(points []point, tried map[string]bool) []point {
	if len(tried) == 0 {
		few := firsts(points)
		for _, at := range few {
			tried[at.kind] = true
		}
		return few
	}
	of := make(map[string][]point)
	for _, at := range points {
		call, _, _ := strings.Cut(at.kind, " ")
		class := cmp.Or(classes[call], call)
		of[class] = append(of[class], at)
	}
	var few []point
	for _, class := range slices.Sorted(maps.Keys(of)) {
		all := of[class]
		at := all[len(all)/2]
		if i := slices.IndexFunc(all, func(p point) bool { return !tried[p.kind] }); i >= 0 {
			at = all[i]
		}
		tried[at.kind] = true
		few = append(few, at)
	}
	return few
}

// kill kills acproxy during an operation, and looks at what is left of it when it is started again without a publisher: nothing is lost, and nothing is wrong.
// With then, it is killed once more, and started with the publisher: it does what the operation was about, and leaves nothing lying about. It reports
// whether it came to the first kill.
func (w *world) kill(t *testing.T, op operation, fault tracer.Fault, then bool) bool {
	r := w.newRun(t, w.stores[op.store].data)
	p := r.do(op, fault)
	p.end(syscall.SIGKILL)
	hit := len(p.tracer.Hits()) > 0
	if hit {
		tally.killed(op.name)
	} else {
		t.Log("it didn't come to this call")
	}
	r.sound("killed", op)

	p = r.serve(w.alone)
	r.wantStill(p, op)
	if !then {
		p.says("the index is complete")
		p.stop()
		r.sound("stopped", operation{damaged: op.damaged})
		return hit
	}
	p.end(syscall.SIGKILL)

	p = r.serve(w.live)
	r.wantThen(p, op)
	r.tidy(p, op.damaged...)
	return hit
}

// TestKillTwice kills a server in its first fetch, and the next one at each call of its start: what the first has left is no worse for that.
func TestKillTwice(t *testing.T) {
	if !everything() {
		t.Skip("only with ACPROXY_CHAOS")
	}
	w := worldOf(t, "cut-through")
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
			tally.killed("start after a kill, killed again")
			p.end(syscall.SIGKILL)
			again.sound("killed twice", operation{})
			p = again.serve(w.alone)
			again.wantHeld(p, left.held)
			p.stop()
		}
	})
}
