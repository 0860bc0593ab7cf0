//go:build linux && amd64

package chaos

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// ours is published here, and not held.
var ours = ref{"ours/app", "1.0.0"}

// preparePush makes the image that is pushed, and returns its file.
func (w *world) preparePush(t *testing.T) string {
	t.Helper()
	file := w.path("ours.aci")
	if _, err := os.Stat(file); err == nil {
		return file
	}
	im := w.publish(t, ours, imageSize)
	signature, err := w.key.Sign(bytes.NewReader(im.aci), trusttest.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{file: im.aci, file + ".asc": signature} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return file
}

// A bringing is an operation by which images come that no publisher was asked for.
type bringing struct {
	operation
	command []string // what brings them; run again it is a matter of course
	brings  []ref
}

// bringings are pushes and imports: straight into the store, and to a server, which is what the calls are counted of then.
func (w *world) bringings(t *testing.T) []bringing {
	t.Helper()
	file := w.preparePush(t)
	push, carry := []string{"push", file}, []string{"import", w.bundle()}
	to := func(command []string) func(r *run, p *process) {
		return func(r *run, _ *process) {
			// If the server is killed meanwhile, this fails.
			r.brought = r.command(r.w.live, command...).Run()
		}
	}
	return []bringing{
		{operation{name: "push", store: "base", args: push}, push, []ref{ours}},
		{operation{name: "push to a server", store: "base", when: to(push)}, push, []ref{ours}},
		{operation{name: "import beside a server", store: "base", when: to(carry)}, carry, []ref{cold, half}},
	}
}

// TestKillPush kills what brings images, or the server that takes them in, at its calls: they are there as a whole or not at all, and brought again they are
// there.
func TestKillPush(t *testing.T) {
	w := worldOf(t, "cut-through")
	for _, op := range w.bringings(t) {
		t.Run(op.name, func(t *testing.T) {
			points := w.pointsOf(t, op.operation)
			tally.calls(op.name, len(points))
			if !everything() {
				points = some(points, map[string]bool{"": true})
			}
			var killed, held atomic.Int64
			each(t, points, func(t *testing.T, at point) {
				r := w.newRun(t, w.stores[op.store].data)
				p := r.do(op.operation, at.fault(tracer.Fault{Kill: true}))
				if op.args == nil {
					p.end(syscall.SIGKILL)
				}
				if len(p.tracer.Hits()) > 0 {
					killed.Add(1)
					tally.killed(op.name)
				}
				r.sound("killed", op.operation)
				p = r.serve(w.alone)
				r.wantStill(p, op.operation)
				p.says("the index is complete")
				if r.wantAllOrNone(p, op.brings) {
					held.Add(1)
				}
				r.must(w.alone, op.command...)
				r.wantHeld(p, slices.Concat(w.stores[op.store].held, op.brings))
				r.tidy(p)
			})
			if missed := len(points) - int(killed.Load()); missed > max(1, len(points)/5) {
				t.Errorf("it was killed at %d of %d points", killed.Load(), len(points))
			}
			t.Logf("killed at %d of %d points; all was there after %d of them", killed.Load(), len(points), held.Load())
		})
	}
}

// wantAllOrNone checks that each of some images is there as a whole or not at all, and reports whether all are.
func (r *run) wantAllOrNone(p *process, of []ref) bool {
	r.t.Helper()
	all := true
	for _, of := range of {
		a := r.get(p, of)
		_, problem := a.problem()
		if all = all && a.whole(); !a.whole() && !problem {
			r.t.Errorf("what was being brought: %v\n%s", a, p.output())
		}
	}
	return all
}

// TestFaultsOfPush makes calls fail of what brings images, or of the server that takes them in: who brings them is told, the server goes on, and once the
// fault is over they can be brought.
func TestFaultsOfPush(t *testing.T) {
	w := worldOf(t, "cut-through")
	for _, op := range w.bringings(t) {
		for i, f := range failures() {
			if !everything() && f.name != "ENOSPC from then on" && f.name != "EIO" {
				continue
			}
			t.Run(op.name+"/"+f.name, func(t *testing.T) {
				n := i
				points := slices.DeleteFunc(firsts(w.pointsOf(t, op.operation)), func(at point) bool {
					n++
					return f.of != nil && !f.of(at.kind) || !everything() && n%4 != 0
				})
				each(t, points, func(t *testing.T, at point) { w.failBringing(t, op, f, at) })
			})
		}
	}
}

func (w *world) failBringing(t *testing.T, op bringing, f failure, at point) {
	r := w.newRun(t, w.stores[op.store].data)
	// An index that the disk can't read is set aside, and kept.
	r.unreadable = f.fault.Errno == syscall.EIO
	p := r.do(op.operation, f.at(at))
	told := r.brought == nil
	if op.args != nil {
		told = p.status.ExitStatus() == 0
		if !told && !strings.Contains(p.output(), "acproxy: ") && !strings.Contains(p.output(), "failed") {
			t.Errorf("%s at %v: it ended with %s and no reason:\n%s", f.name, at, describe(p.status), p.output())
		}
		r.lift(p, op.operation)
		p = r.serve(w.alone)
	} else {
		if a := r.get(p, held); !a.whole() {
			t.Errorf("%s at %v: what is held is served as %v", f.name, at, a)
		}
		r.lift(p, op.operation)
	}
	if there := r.wantAllOrNone(p, op.brings); told && !there {
		t.Errorf("%s at %v: it was said that all is there, and it isn't\n%s", f.name, at, p.output())
	}
	r.must(w.alone, op.command...)
	if !r.wantAllOrNone(p, op.brings) {
		t.Errorf("%s at %v is over, and brought again not all is there\n%s", f.name, at, p.output())
	}
	p.stop()
	p = r.serve(w.alone)
	r.wantHeld(p, op.brings)
	if op.args == nil {
		r.wantHeld(p, w.stores[op.store].held)
	} else {
		// On a disk that is full others may have had to make room, as nothing is too young for that there.
		r.wantAllOrNone(p, w.stores[op.store].held)
	}
	r.tidy(p)
}
