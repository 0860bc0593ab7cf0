//go:build linux && amd64

package chaos

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/test/tracer"
)

// The images that operations are about.
var (
	held   = ref{"held", "1.0.0"}   // held, and the latest of its name
	moving = ref{"moving", "1.0.0"} // held as the latest, which is 2.0.0 by now
	back   = ref{"back", "1.0.0"}   // held, and the latest again, where 2.0.0 is held as that
	lost   = ref{"lost", "1.0.0"}   // held, until its blob is removed
	cold   = ref{"cold", "1.0.0"}   // not held
	half   = ref{"half", "1.0.0"}   // half of it has arrived
	torn   = ref{"torn", "1.0.0"}   // its commit was interrupted
	bad    = ref{"bad", "1.0.0"}    // signed, and its tar breaks a rule, which shows when it has been delivered
)

// at returns the ref of another version.
func (r ref) at(version string) ref { return ref{r.name, version} }

// An operation is something that changes files.
type operation struct {
	name  string
	store string // what it begins with
	// args are a command that does it. nil is a server, which does what follows.
	args []string
	// reads says that the calls count that only read the store's files, and no others.
	reads bool
	// begins says that calls count from the first of the process on; otherwise from when it serves.
	begins bool
	// asks are images that a client asks for, one after the other.
	asks []ref
	// ends says that the server is told to stop.
	ends bool
	// when is when the operation is over, apart from what was asked for. nil is at once.
	when func(r *run, p *process)
	// evicts says that images may be gone when it is over. Those that are there are whole.
	evicts bool
	// exit is the exit code of a command.
	exit int
	// damaged are images whose blobs are damaged or gone when it begins. They may be when it was killed, and not when a server was asked for them.
	damaged []ref
	// lacks is what a check finds when it begins.
	lacks string
	// then is what refs answer when it is over and the publisher can be reached.
	then map[ref]ref
}

func operations() []operation {
	settled := func(r *run, p *process) { p.says("the index is complete") }
	return []operation{
		{name: "cold fetch", store: "base", asks: []ref{cold}, then: map[ref]ref{cold: cold}},
		{name: "resumed fetch", store: "half", begins: true, asks: []ref{half}, then: map[ref]ref{half: half}},
		{name: "latest moves to a new image", store: "base", asks: []ref{moving.at("")}, then: map[ref]ref{moving.at(""): moving.at("2.0.0"), moving: moving}},
		{name: "latest moves to a held image", store: "base", asks: []ref{back.at("")}, then: map[ref]ref{back.at(""): back, back.at("2.0.0"): back.at("2.0.0")}},
		{name: "latest stays", store: "base", asks: []ref{held.at("")}, then: map[ref]ref{held.at(""): held}},
		{name: "times of last use", store: "base", when: func(r *run, p *process) {
			r.get(p, held)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			written := func(calls []tracer.Call) bool {
				return len(slices.DeleteFunc(slices.Clone(calls), func(c tracer.Call) bool { return c.Name != "fdatasync" })) >= 2
			}
			if err := p.tracer.Await(ctx, written); err != nil {
				r.t.Error("waiting for the times of last use to be written:", err)
			}
		}},
		{name: "lost blob", store: "lost", asks: []ref{lost}, damaged: []ref{lost}, then: map[ref]ref{lost: lost}},
		{name: "damaged blob", store: "damaged", asks: []ref{lost}, damaged: []ref{lost}, then: map[ref]ref{lost: lost}},
		{name: "scrub", store: "damaged", args: []string{"scrub"}, exit: 1, damaged: []ref{lost}, then: map[ref]ref{lost: lost}},
		{name: "scrub by a server", store: "damaged", damaged: []ref{lost}, when: func(r *run, p *process) {
			// If the server is killed meanwhile, this fails. What it finds is fetched again at once.
			_ = r.command(r.w.live, "scrub").Run()
			r.get(p, lost)
		}, then: map[ref]ref{lost: lost}},
		{name: "quarantine", store: "base", asks: []ref{bad}},
		{name: "eviction", store: "base", args: []string{"gc", "--to", "700KiB"}, evicts: true, then: map[ref]ref{held: held, moving: moving, lost: lost}},
		{name: "eviction by a server", store: "base", evicts: true, when: func(r *run, p *process) {
			// If the server is killed meanwhile, so is this.
			_ = r.command(r.w.graceless, "gc", "--to", "700KiB").Run()
		}, then: map[ref]ref{held: held, moving: moving, lost: lost}},
		{name: "first start", store: "empty", begins: true, when: settled, then: map[ref]ref{cold: cold}},
		{name: "start after a kill", store: "killed", begins: true, when: settled},
		{name: "start after a kill in a commit", store: "torn", begins: true, when: settled, then: map[ref]ref{torn: torn}},
		{name: "start without an index", store: "no index", begins: true, when: settled, lacks: cache.CodeIndexMissing},
		{name: "stop", store: "base", asks: []ref{held}, ends: true},
	}
}

const imageSize = 160 << 10

// prepare publishes the images and makes the stores.
func (w *world) prepare(t *testing.T) {
	t.Helper()
	for _, r := range []ref{held, moving, back, lost, cold, half, torn} {
		w.publish(t, r, imageSize)
	}
	w.publishSpec(t, bad, acitest.Spec{RootfsSize: imageSize, Extra: []acitest.Entry{acitest.File("elsewhere", "neither the manifest nor in rootfs")}})
	w.stores["empty"] = &store{}
	base := w.keptRun(t, "")
	p := base.serve(w.live)
	hold := func(r *run, p *process, refs ...ref) {
		t.Helper()
		for _, of := range refs {
			if a := r.get(p, of); !a.whole() {
				t.Fatalf("preparing a store: %v\n%s", a, p.output())
			}
			r.inspected(p, of)
		}
	}
	hold(base, p, held, held.at(""), moving.at(""), back.at(""), lost)
	w.publish(t, moving.at("2.0.0"), imageSize)
	w.publish(t, back.at("2.0.0"), imageSize)
	hold(base, p, back.at(""))
	w.publisher.SetLatest(imageHost+"/"+back.name, back.version)
	p.stop()
	all := []ref{held, held.at(""), moving, moving.at(""), back, back.at("2.0.0"), back.at(""), lost}
	w.stores["base"] = &store{data: base.data, held: all}
	from := func(name string, held []ref, change func(r *run)) {
		r := w.keptRun(t, base.data)
		change(r)
		w.stores[name] = &store{data: r.data, held: held}
	}
	from("no index", all, func(r *run) { remove(t, filepath.Join(r.data, "store", "index.db")) })
	from("lost", all[:len(all)-1], func(r *run) {
		sum := w.images[lost].sum
		remove(t, filepath.Join(r.data, "store", "blobs", sum[:2], sum))
	})
	from("damaged", all[:len(all)-1], func(r *run) {
		sum := w.images[lost].sum
		if err := os.Truncate(filepath.Join(r.data, "store", "blobs", sum[:2], sum), imageSize/2); err != nil {
			t.Fatal(err)
		}
	})
	from("killed", append(slices.Clone(all), cold), func(r *run) {
		p := r.serve(w.live)
		hold(r, p, cold)
		p.end(syscall.SIGKILL)
	})
	from("half", all, func(r *run) { r.arriveInPart(half) })
	w.prepareBundle(t)
	from("torn", all, func(r *run) {
		p := r.trace(w.live, nil)
		p.serves()
		p.tracer.Arm(point{kind: "renameat store/partial/*.aci → store/blobs/??/#", nth: 1}.fault(tracer.Fault{Kill: true}))
		r.get(p, torn)
		p.wait()
	})
}

// arriveInPart has half of an image arrive, and kills the server.
func (r *run) arriveInPart(of ref) {
	r.t.Helper()
	const arrived = imageSize / 2
	trouble := r.w.publisher.Misbehave(publisher.URL(r.w.images[of].place), publisher.Fault{StallAfter: publisher.At(arrived)})
	defer trouble.End()
	p := r.serve(r.w.live)
	var asking sync.WaitGroup
	asking.Go(func() { r.get(p, of) })
	r.eventually("half of an image has arrived", func() bool {
		files, _ := filepath.Glob(filepath.Join(r.data, "store", "partial", "*.aci"))
		if len(files) != 1 {
			return false
		}
		fi, err := os.Stat(files[0])
		return err == nil && fi.Size() == arrived
	})
	p.end(syscall.SIGKILL)
	asking.Wait()
}

func remove(t *testing.T, file string) {
	t.Helper()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
}

// do starts a server and has it do an operation with a fault. It returns when that is done, or the server is over.
func (r *run) do(op operation, fault tracer.Fault) *process {
	r.t.Helper()
	p := r.begin(op, fault)
	if op.args != nil {
		return p
	}
	for _, of := range op.asks {
		r.get(p, of)
		r.inspected(p, of)
	}
	if op.when != nil {
		op.when(r, p)
	}
	if op.ends {
		p.end(syscall.SIGTERM)
	}
	return p
}

// begin starts a server with a fault in effect, from its first call on or from when it serves; or runs the operation's command to its end.
func (r *run) begin(op operation, fault tracer.Fault) *process {
	r.t.Helper()
	fault.Reads = op.reads
	if op.args != nil {
		p := launch(r.t, r.command(r.w.graceless, op.args...), true, r.data, &fault)
		p.wait()
		return p
	}
	config := r.w.live
	if op.evicts {
		config = r.w.graceless
	}
	if op.begins {
		p := r.trace(config, &fault)
		p.says("serving")
		return p
	}
	p := r.trace(config, nil)
	p.serves()
	p.says("the index is complete")
	p.tracer.Arm(fault)
	return p
}

// wantStill checks that a server that can't reach the publisher still gives what was held before an operation, as far as that doesn't evict it.
func (r *run) wantStill(p *process, op operation) {
	r.t.Helper()
	held := r.w.stores[op.store].held
	if !op.evicts {
		r.wantHeld(p, held)
		return
	}
	for _, of := range held {
		a := r.get(p, of)
		if _, ok := a.problem(); !a.whole() && !ok {
			r.t.Errorf("%v, which may have been evicted: %v\n%s", of, a, p.output())
		}
	}
}

// wantThen checks that a server that can reach the publisher answers as it should after an operation, whatever became of that.
func (r *run) wantThen(p *process, op operation) {
	r.t.Helper()
	for of, im := range op.then {
		if a := r.get(p, of); !a.whole() || a.sum() != r.w.images[im].sum {
			r.t.Errorf("%v: %v, want %v\n%s", of, a, im, p.output())
		}
	}
	if slices.Contains(op.asks, bad) {
		r.get(p, bad)
		r.eventually("the image that breaks a rule is refused", func() bool { return r.get(p, bad).status == http.StatusForbidden })
	}
}

// A point is a call of an operation: the nth of its kind.
type point struct {
	kind string
	nth  int
}

func (p point) String() string { return fmt.Sprintf("%s (%d)", p.kind, p.nth) }

// fault returns a fault that happens at the point.
func (p point) fault(f tracer.Fault) tracer.Fault {
	f.At, f.Only = p.nth, func(c tracer.Call) bool { return kindOf(c) == p.kind }
	return f
}

var (
	random = regexp.MustCompile(`[A-Z2-7]{26}|\b[A-Z2-7]{8}\b`)
	digits = regexp.MustCompile(`[0-9a-f]{40,64}`)
	shard  = regexp.MustCompile(`blobs/[0-9a-f]{2}`)
)

// kindOf returns a call without what differs from run to run.
func kindOf(c tracer.Call) string {
	s := random.ReplaceAllString(c.String(), "*")
	return shard.ReplaceAllString(digits.ReplaceAllString(s, "#"), "blobs/??")
}

// pointsOf does an operation without a fault, if nobody has asked for it before, and returns its calls.
func (w *world) pointsOf(t *testing.T, op operation) []point {
	t.Helper()
	if known := w.points[op.name]; known != nil {
		return known
	}
	r := w.newRun(t, w.stores[op.store].data)
	p := r.do(op, tracer.Fault{})
	p.tracer.Disarm()
	switch {
	case op.args != nil:
		if p.status.ExitStatus() != op.exit {
			t.Fatalf("acproxy %s: %s\n%s", strings.Join(op.args, " "), describe(p.status), p.output())
		}
	case !op.ends:
		p.stop()
	}
	seen := make(map[string]int)
	var points []point
	for _, c := range p.tracer.Calls() {
		if op.reads && c.Path != "store" && !strings.HasPrefix(c.Path, "store/") {
			continue
		}
		kind := kindOf(c)
		seen[kind]++
		points = append(points, point{kind, seen[kind]})
	}
	if len(points) == 0 {
		t.Fatalf("%s makes no calls", op.name)
	}
	w.points[op.name] = points
	return points
}

// firsts returns the points at which a kind of call comes for the first time.
func firsts(points []point) []point {
	return slices.DeleteFunc(slices.Clone(points), func(p point) bool { return p.nth > 1 })
}

// each tries points, some at once.
func each(t *testing.T, points []point, try func(t *testing.T, at point)) {
	queue := make(chan point)
	var workers sync.WaitGroup
	for range 3 {
		workers.Go(func() {
			for at := range queue {
				t.Run(strings.ReplaceAll(at.String(), "/", "∕"), func(t *testing.T) { try(t, at) })
			}
		})
	}
	for _, at := range points {
		queue <- at
	}
	close(queue)
	workers.Wait()
}
