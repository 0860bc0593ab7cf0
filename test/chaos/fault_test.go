//go:build linux && amd64

package chaos

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
)

// A failure is a way in which a call goes wrong.
type failure struct {
	name   string
	fault  tracer.Fault
	status int               // of the answer of a fetch that it ends; 0 is none: it must end none. A call that only reads may end it with any other 5xx
	of     func(string) bool // the kinds of calls that it can happen to, nil all
}

func failures() []failure {
	opens := func(kind string) bool { return strings.HasPrefix(kind, "openat ") }
	writes := func(kind string) bool {
		return strings.HasPrefix(kind, "write ") || strings.HasPrefix(kind, "pwrite64 ")
	}
	const full, broken, busy = http.StatusInsufficientStorage, http.StatusInternalServerError, http.StatusServiceUnavailable
	return []failure{
		{"EIO", tracer.Fault{Errno: syscall.EIO}, broken, nil},
		{"EIO from then on", tracer.Fault{Errno: syscall.EIO, Onward: true}, broken, nil},
		{"EIO though done", tracer.Fault{Errno: syscall.EIO, After: true}, broken, nil},
		{"ENOSPC", tracer.Fault{Errno: syscall.ENOSPC}, full, nil},
		{"ENOSPC from then on", tracer.Fault{Errno: syscall.ENOSPC, Onward: true}, full, nil},
		{"EDQUOT from then on", tracer.Fault{Errno: syscall.EDQUOT, Onward: true}, full, nil},
		{"EMFILE", tracer.Fault{Errno: syscall.EMFILE}, busy, opens},
		{"EMFILE from then on", tracer.Fault{Errno: syscall.EMFILE, Onward: true}, busy, opens},
		{"half a write", tracer.Fault{Short: true}, 0, writes},
	}
}

// at returns the failure's fault, to happen at a call and, if it goes on, at all later ones that it can happen to.
func (f failure) at(p point) tracer.Fault {
	fault := p.fault(f.fault)
	if !fault.Onward {
		return fault
	}
	// The calls of that kind before it don't count.
	isKind, left := fault.Only, p.nth
	fault.At, fault.Only = 1, func(c tracer.Call) bool {
		if left > 0 && isKind(c) {
			left--
		}
		return left == 0 && (f.of == nil || f.of(kindOf(c)))
	}
	return fault
}

// TestFaults makes each call of a cold fetch fail in each way, one after the other on one server. It goes on: what is held is served all the time, who asks
// for the image is told, and once the fault is over the image can be had.
func TestFaults(t *testing.T) {
	w := worldOf(t, "verify-first")
	points := w.pointsOf(t, operations()[0])
	if !everything() {
		points = firsts(points)
	}
	images := make([]image, len(points))
	for i := range images {
		images[i] = w.publish(t, ref{fmt.Sprintf("fault%03d", i), "1.0.0"}, imageSize)
	}
	for n, f := range failures() {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			r := w.newRun(t, w.stores["base"].data)
			p := r.begin(operation{}, tracer.Fault{})
			for i, at := range points {
				// Otherwise half of the ways at each call, and half of the calls in each way.
				if now := everything() || (i+n)%2 == 0; now && (f.of == nil || f.of(at.kind)) {
					r.fails(p, f, at, images[i].ref)
				}
				if t.Failed() {
					return
				}
			}
			p.stop()
			p = r.serve(w.alone)
			r.wantHeld(p, w.stores["base"].held)
			r.tidy(p)
		})
	}
}

// fails has a server fetch an image while one of its calls fails, then again when that is over.
func (r *run) fails(p *process, f failure, at point, of ref) {
	r.t.Helper()
	p.tracer.Arm(f.at(at))
	over := make(chan struct{})
	var hits sync.WaitGroup
	hits.Go(func() {
		for {
			if a := r.get(p, held); !a.whole() || !strings.HasPrefix(a.header.Get("Cache-Status"), "acproxy; hit") {
				r.t.Errorf("%s at %v: what is held is served as %v (%s)", f.name, at, a, a.header.Get("Cache-Status"))
				return
			}
			select {
			case <-over:
				return
			default:
			}
		}
	})
	r.wantServedOr(p, f, at, r.get(p, of))
	if f.fault.Onward {
		// It isn't over, and the next one gets no less of an answer.
		r.wantServedOr(p, f, at, r.get(p, of))
	}
	close(over)
	hits.Wait()
	r.lift(p, operations()[0])
	if a := r.get(p, of); !a.whole() {
		r.t.Errorf("%s at %v is over, and the image still can't be had: %v\nfailed: %v\n%s", f.name, at, a, p.tracer.Hits(), p.output())
	}
}

// lift ends a fault, and counts it if it has happened.
func (r *run) lift(p *process, op operation) {
	p.tracer.Disarm()
	if len(p.tracer.Hits()) > 0 {
		tally.failed(op.name)
	}
}

// wantServedOr checks that an answer is the image or says that it can't be had, as a failure asks for.
func (r *run) wantServedOr(p *process, f failure, at point, a answer) {
	r.t.Helper()
	if a.whole() || a.status == http.StatusOK && r.w.cutThrough {
		return // a cut answer is an error, too
	}
	if a.ref == bad && a.status == http.StatusForbidden {
		return
	}
	if _, ok := a.problem(); !ok || a.status != f.status && (!f.fault.Reads || a.status < 500) {
		r.t.Errorf("%s at %v: %v, want the image or a problem with status %d\n%s", f.name, at, a, f.status, p.output())
	}
}

// TestFaultsOfOperations makes calls of all other operations fail, where an answer may have begun by then.
func TestFaultsOfOperations(t *testing.T) {
	w := worldOf(t, "cut-through")
	tried, n := make(map[string]bool), 0
	for _, op := range operations()[1:] {
		t.Run(op.name, func(t *testing.T) {
			all := firsts(w.pointsOf(t, op))
			few := all
			if !everything() {
				few = slices.DeleteFunc(some(all, tried), func(point) bool { n++; return n%5 != 0 })
			}
			for _, f := range failures() {
				points := few
				switch {
				case everything(), f.name == "ENOSPC from then on":
				case op.evicts && f.name == "ENOSPC":
					// A removal that fails once goes on with what is left of it, and all of that has to be mended by the next start.
					points = all
				default:
					continue
				}
				t.Run(f.name, func(t *testing.T) {
					each(t, points, func(t *testing.T, at point) {
						if f.of == nil || f.of(at.kind) {
							w.fail(t, op, f, at)
						}
					})
				})
			}
		})
	}
}

// fail has an operation fail at one call, and looks at what is left of it while the server goes on, and when it is started again.
func (w *world) fail(t *testing.T, op operation, f failure, at point) {
	r := w.newRun(t, w.stores[op.store].data)
	// An index that the disk can't read is set aside, and kept.
	r.unreadable = f.fault.Errno == syscall.EIO
	store := w.stores[op.store]
	p := r.begin(op, f.at(at))
	select {
	case <-p.exited:
		r.lift(p, op)
		done := op.args != nil && p.status.Exited() && p.status.ExitStatus() == op.exit
		if !done && (!p.status.Exited() || p.status.ExitStatus() != 1 || !strings.Contains(p.output(), "acproxy: ")) {
			t.Errorf("at the start it ended with %s, want exit code 1 and the reason:\n%s", describe(p.status), p.output())
		}
	default:
		for _, of := range op.asks {
			r.wantServedOr(p, f, at, r.get(p, of))
		}
		if op.ends {
			if status := p.end(syscall.SIGTERM); !status.Exited() || status.ExitStatus() > 1 {
				t.Errorf("it ended with %s after SIGTERM", describe(status))
			}
			r.lift(p, op)
			break
		}
		if op.when != nil && (op.evicts || op.damaged != nil) {
			op.when(r, p)
		} else if a := r.get(p, held); slices.Contains(store.held, held) && !a.whole() {
			t.Errorf("%s at %v: what is held is served as %v", f.name, at, a)
		}
		r.lift(p, op)
		if op.begins {
			// It tries that again after a while.
			p.says("the index is complete")
		}
		for _, of := range store.held {
			if a := r.get(p, of); !a.whole() {
				t.Errorf("%s at %v is over, and %v can't be had: %v\nfailed: %v\n%s", f.name, at, of, a, p.tracer.Hits(), p.output())
			}
		}
		r.wantThen(p, op)
		p.stop()
	}
	p = r.serve(w.alone)
	r.wantStill(p, op)
	p.stop()
	p = r.serve(w.live)
	r.wantThen(p, op)
	r.tidy(p, op.damaged...)
}
