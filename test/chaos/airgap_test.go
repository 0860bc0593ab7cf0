//go:build linux && amd64

package chaos

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/acproxy/acproxy/test/tracer"
)

// must runs a command of the binary, which has to end with 0.
func (r *run) must(config string, args ...string) {
	r.t.Helper()
	out, err := r.command(config, args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("acproxy %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// bundle is the file with the bundle that is imported.
func (w *world) bundle() string { return w.path("bundle.tar") }

// prepareBundle makes a bundle of what the stores hold and of two images that they don't, and a store with a key to sign bundles.
func (w *world) prepareBundle(t *testing.T) {
	t.Helper()
	source := w.keptRun(t, w.stores["base"].data)
	p := source.serve(w.live)
	for _, of := range []ref{cold, half} {
		if a := source.get(p, of); !a.whole() {
			t.Fatalf("preparing a bundle: %v\n%s", a, p.output())
		}
		source.inspected(p, of)
	}
	p.stop()
	source.must(w.alone, "export", w.bundle(), "--all")
	signing := w.keptRun(t, w.stores["base"].data)
	signing.must(w.alone, "export", "key")
	w.stores["signing"] = &store{data: signing.data, held: w.stores["base"].held}
}

// importing is the taking in of the bundle.
func (w *world) importing() operation {
	return operation{name: "import", store: "base", args: []string{"import", w.bundle()}, then: map[ref]ref{cold: cold, half: half}}
}

// exporting is the writing of a bundle in volumes, beside the store, because that is where calls count.
func exporting(data string) []string {
	return []string{"export", filepath.Join(data, "out", "b.tar"), "--all", "--volume-size", "100KiB", "--parity", "1"}
}

// TestKillImport kills an import at its calls, and runs it again: everything is held then, and nothing else lies about.
func TestKillImport(t *testing.T) {
	w := worldOf(t, "cut-through")
	op := w.importing()
	points := w.pointsOf(t, op)
	tally.calls("import, run again", len(points))
	if !everything() {
		points = some(points, map[string]bool{"": true})
	}
	var killed atomic.Int64
	each(t, points, func(t *testing.T, at point) {
		r := w.newRun(t, w.stores[op.store].data)
		p := r.begin(op, at.fault(tracer.Fault{Kill: true}))
		if len(p.tracer.Hits()) > 0 {
			killed.Add(1)
			tally.killed("import, run again")
		}
		r.sound("killed", op)
		// What it has held before, and nothing that isn't whole.
		p = r.serve(w.alone)
		r.wantStill(p, op)
		p.stop()
		r.must(w.alone, op.args...)
		p = r.serve(w.alone)
		r.wantHeld(p, append(slices.Clone(w.stores[op.store].held), cold, half))
		r.tidy(p)
	})
	if missed := len(points) - int(killed.Load()); missed > max(1, len(points)/5) {
		t.Errorf("it was killed at %d of %d points", killed.Load(), len(points))
	}
}

// TestKillExport kills an export at its calls, and runs it again: the files are the same as without that.
func TestKillExport(t *testing.T) {
	w := worldOf(t, "cut-through")
	whole := w.newRun(t, w.stores["signing"].data)
	place := func(r *run) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(r.data, "out"), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	place(whole)
	p := launch(t, whole.command(w.alone, exporting(whole.data)...), true, whole.data, &tracer.Fault{})
	p.wait()
	if p.status.ExitStatus() != 0 {
		t.Fatalf("acproxy export: %s\n%s", describe(p.status), p.output())
	}
	want := contents(t, filepath.Join(whole.data, "out"))
	if len(want) < 10 {
		t.Fatalf("it wrote %d files only", len(want))
	}
	seen := map[string]int{}
	var points []point
	for _, c := range p.tracer.Calls() {
		kind := kindOf(c)
		seen[kind]++
		if strings.Contains(kind, "out/") {
			points = append(points, point{kind, seen[kind]})
		}
	}
	tally.calls("export, run again", len(points))
	if !everything() {
		points = some(points, map[string]bool{"": true})
	}
	var killed atomic.Int64
	each(t, points, func(t *testing.T, at point) {
		r := w.newRun(t, w.stores["signing"].data)
		place(r)
		p := launch(t, r.command(w.alone, exporting(r.data)...), true, r.data, ptr(at.fault(tracer.Fault{Kill: true})))
		p.wait()
		if len(p.tracer.Hits()) > 0 {
			killed.Add(1)
			tally.killed("export, run again")
		}
		r.must(w.alone, exporting(r.data)...)
		got := contents(t, filepath.Join(r.data, "out"))
		for name, b := range want {
			if !bytes.Equal(got[name], b) {
				t.Errorf("%s is another file than without the kill (%d bytes, want %d)", name, len(got[name]), len(b))
			}
		}
		for name := range got {
			if want[name] == nil {
				t.Errorf("%s is left", name)
			}
		}
		r.sound("killed and exported again", operation{})
	})
	if missed := len(points) - int(killed.Load()); missed > max(1, len(points)/5) {
		t.Errorf("it was killed at %d of %d points", killed.Load(), len(points))
	}
}

func ptr[T any](v T) *T { return &v }

// contents returns the files of a directory.
func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string][]byte)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = b
	}
	return out
}
