//go:build linux && amd64

package chaos

import (
	"bytes"
	"cmp"
	"hash/fnv"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
)

// misreadings are the ways in which a call goes wrong that only reads.
func misreadings() []failure {
	calls := func(names ...string) func(kind string) bool {
		return func(kind string) bool {
			call, _, _ := strings.Cut(kind, " ")
			return slices.Contains(names, call)
		}
	}
	opens := calls("openat")
	// What the kernel knows without the disk doesn't fail for it, and some of that needs no memory either.
	disk := func(kind string) bool { return !calls("lseek", "flock", "mmap")(kind) }
	memory := func(kind string) bool { return !calls("lseek", "flock")(kind) }
	fault := func(errno syscall.Errno) tracer.Fault { return tracer.Fault{Errno: errno, Reads: true} }
	const broken = http.StatusInternalServerError
	return []failure{
		{"EIO", fault(syscall.EIO), broken, disk},
		{"EMFILE", fault(syscall.EMFILE), broken, opens},
		{"EACCES", fault(syscall.EACCES), broken, opens},
		{"ENOMEM", fault(syscall.ENOMEM), broken, memory},
	}
}

// readings are operations of which the calls count that only read the store's files.
func readings() []operation {
	var all []operation
	some := []string{"cold fetch", "resumed fetch", "latest stays", "eviction by a server", "start after a kill", "start without an index"}
	for _, op := range operations() {
		// The first start has nothing to read, and what is written of the times of last use is told by what is written.
		if slices.Contains(some, op.name) || everything() && op.store != "empty" && op.name != "times of last use" {
			all = append(all, op)
		}
	}
	all = append(all,
		operation{name: "start", store: "base", begins: true, when: func(_ *run, p *process) { p.says("the index is complete") }},
		operation{name: "hit", store: "base", when: func(r *run, p *process) { r.visit(p) }},
		operation{name: "fsck", store: "base", args: []string{"fsck"}},
	)
	for i := range all {
		all[i].name, all[i].reads = "reading: "+all[i].name, true
	}
	return all
}

// visit asks for an image that is held, its signature and its page, then again without a fault. What was given the first time is the same.
func (r *run) visit(p *process) {
	r.t.Helper()
	signature := strings.Replace(held.path(), ".aci?", ".aci.asc?", 1)
	var bodies [][]byte
	for _, over := range []bool{false, true} {
		if over {
			p.tracer.Disarm()
		}
		for i, path := range []string{held.path(), signature, "/" + held.name + "?ac-discovery=1"} {
			a := answer{ref: held}
			req, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, p.url()+path, nil)
			if err != nil {
				r.t.Fatal(err)
			}
			req.Host = imageHost
			resp, err := r.w.client.Do(req)
			if err != nil {
				r.t.Fatal(err)
			}
			a.status, a.header = resp.StatusCode, resp.Header
			a.body, a.err = io.ReadAll(resp.Body)
			resp.Body.Close()
			if !over {
				r.wantServedOr(p, failure{name: "a reading call", fault: tracer.Fault{Reads: true}}, point{}, a)
				bodies = append(bodies, nil)
				if a.status == http.StatusOK {
					bodies[i] = a.body
				}
				continue
			}
			if !a.whole() || !bytes.HasPrefix(a.body, bodies[i]) {
				r.t.Errorf("%s: before there were %d bytes, and now there are: %v", path, len(bodies[i]), a)
			}
		}
	}
}

// mayEnd reports whether a server may end in its start when a call fails, and say why. What is beyond the disk's power is set aside. But it can't begin without
// knowing whose the store is, and for what there is too little of somebody else has to see.
func (f failure) mayEnd(at point) bool {
	call, path, _ := strings.Cut(at.kind, " ")
	switch {
	case call == "openat" && path == "store", path == "store/partial/*":
		return true // to sync it, or to make an index: as good as a change that fails
	case f.fault.Errno == syscall.EIO:
		return false
	}
	return call == "mmap" || f.fault.Errno == syscall.EACCES && slices.Contains([]string{"store/VERSION", "store/lock", "store/index.db"}, path)
}

// TestReadingFaults makes each call fail that only reads, once. Nobody is given anything wrong, and nothing is lost but what the disk could not read, which is
// fetched again.
func TestReadingFaults(t *testing.T) {
	w := worldOf(t, "cut-through")
	ops, points := readings(), make(map[string][]point)
	for _, op := range ops {
		points[op.name] = w.pointsOf(t, op)
	}
	if !everything() {
		points = shared(points)
	}
	for _, op := range ops {
		t.Run(op.name, func(t *testing.T) {
			each(t, points[op.name], func(t *testing.T, at point) {
				for _, f := range waysOf(at) {
					t.Run(f.name, func(t *testing.T) { w.misread(t, op, f, at) })
				}
			})
		})
	}
}

// waysOf returns the misreadings of a call: all of the first of its kind, one of the later ones; if not everything is to be tried, one in turn.
func waysOf(at point) []failure {
	ways := slices.DeleteFunc(misreadings(), func(f failure) bool { return !f.of(at.kind) })
	switch {
	case len(ways) == 0, everything() && at.nth == 1:
		return ways
	case everything():
		return ways[:1]
	}
	hash := fnv.New32a()
	hash.Write([]byte(at.kind))
	n := int(hash.Sum32() % uint32(len(ways)))
	return ways[n : n+1]
}

// shared leaves each kind of call to one of the operations that make it, to each of these about as many.
func shared(points map[string][]point) map[string][]point {
	of := make(map[point][]string)
	for _, op := range slices.Sorted(maps.Keys(points)) {
		for _, at := range firsts(points[op]) {
			of[at] = append(of[at], op)
		}
	}
	kinds := slices.SortedFunc(maps.Keys(of), func(a, b point) int {
		return cmp.Or(len(of[a])-len(of[b]), strings.Compare(a.kind, b.kind))
	})
	few := make(map[string][]point)
	for _, at := range kinds {
		op := slices.MinFunc(of[at], func(a, b string) int { return len(few[a]) - len(few[b]) })
		few[op] = append(few[op], at)
	}
	return few
}

// allInspected waits until a server has said how the inspections ended of what an operation asks for.
func (r *run) allInspected(p *process, op operation) {
	for _, of := range op.asks {
		r.inspected(p, of)
	}
}

// misread has one call of an operation fail that only reads, and looks at what is answered meanwhile, afterwards, and when the server is started again.
func (w *world) misread(t *testing.T, op operation, f failure, at point) {
	r, store := w.newRun(t, w.stores[op.store].data), w.stores[op.store]
	r.disk = f.fault.Errno == syscall.EIO
	r.unreadable = r.disk || f.fault.Errno == syscall.EACCES
	p := r.begin(op, f.at(at))
	ended := false
	select {
	case <-p.exited:
		ended = true
		r.lift(p, op)
		code, said := p.status.ExitStatus(), strings.Contains(p.output(), "acproxy: ") || strings.Contains(p.output(), "problem: ")
		if !p.status.Exited() || code != op.exit && (code != 1 || !said) || op.args == nil && !f.mayEnd(at) {
			t.Errorf("it ended with %s:\n%s", describe(p.status), p.output())
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
		if op.when != nil {
			op.when(r, p)
		}
		for _, of := range store.held {
			r.wantServedOr(p, f, at, r.get(p, of))
		}
		r.lift(p, op)
		p.says("the index is complete")
		for _, of := range slices.Concat(store.held, op.asks) {
			if a := r.get(p, of); !a.whole() && of != bad {
				t.Errorf("it is over, and %v can't be had: %v\n%s", of, a, p.output())
			}
		}
		if strings.HasSuffix(at.kind, " store/blobs/??/#") {
			r.allInspected(p, op)
		}
		r.wantThen(p, op)
		p.stop()
	}
	if !r.unreadable && op.damaged == nil && (strings.Contains(p.output(), "an image's bytes are lost") || strings.Contains(p.output(), "problem: ")) {
		t.Errorf("for want of descriptors or memory:\n%s", p.output())
	}
	if r.disk && (op.args != nil || op.ends) {
		// What it could not read is to be fetched again before it can be had alone.
		p = r.serve(w.live)
		for _, of := range store.held {
			if a := r.get(p, of); !a.whole() && !op.evicts {
				t.Errorf("%v can't be had: %v\n%s", of, a, p.output())
			}
		}
		p.stop()
	}
	p = r.serve(w.alone)
	r.wantStill(p, op)
	if !ended {
		// What an inspection found out, and could not be noted, is found out again.
		r.allInspected(p, op)
	}
	if ended || everything() || op.damaged != nil {
		p.stop()
		p = r.serve(w.live)
		r.wantThen(p, op)
	}
	r.tidy(p, op.damaged...)
}
