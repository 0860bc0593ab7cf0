//go:build linux && amd64

package chaos

import (
	"bytes"
	"net/http"
	"os"
	"slices"
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

// TestKillPush kills a push at its calls, straight into the store and to a server: it is there as a whole or not at all, and pushed again it is there.
func TestKillPush(t *testing.T) {
	w := worldOf(t, "cut-through")
	file := w.preparePush(t)
	for _, op := range []operation{
		{name: "push", store: "base", args: []string{"push", file}},
		{name: "push to a server", store: "base", when: func(r *run, p *process) {
			// If the server is killed meanwhile, this fails.
			_ = r.command(r.w.live, "push", file).Run()
		}},
	} {
		t.Run(op.name, func(t *testing.T) {
			points := w.pointsOf(t, op)
			tally.calls(op.name, len(points))
			if !everything() {
				points = some(points, map[string]bool{"": true})
			}
			var killed, held atomic.Int64
			each(t, points, func(t *testing.T, at point) {
				r := w.newRun(t, w.stores[op.store].data)
				p := r.do(op, at.fault(tracer.Fault{Kill: true}))
				if op.args == nil {
					p.end(syscall.SIGKILL)
				}
				if len(p.tracer.Hits()) > 0 {
					killed.Add(1)
					tally.killed(op.name)
				}
				r.sound("killed", op)
				p = r.serve(w.alone)
				r.wantStill(p, op)
				p.says("the index is complete")
				if a := r.get(p, ours); a.whole() {
					held.Add(1)
				} else if a.status != http.StatusNotFound {
					t.Errorf("what was being pushed: %v\n%s", a, p.output())
				}
				r.must(w.alone, "push", file)
				r.wantHeld(p, append(slices.Clone(w.stores[op.store].held), ours))
				p.stop()
				r.tidy()
			})
			if killed.Load() < int64(len(points)+1)/2 {
				t.Errorf("it was killed at %d of %d points", killed.Load(), len(points))
			}
			t.Logf("killed at %d of %d points; it was there after %d of them", killed.Load(), len(points), held.Load())
		})
	}
}
