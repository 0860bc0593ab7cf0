package cache_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
	"github.com/acproxy/acproxy/internal/testtools"
)

// an operation changes a store that holds alpha 1, which is also the latest alpha, and beta 1.
type operation struct {
	name          string
	do            func(ctx context.Context, d *cache.Disk) error
	before, after func(ctx context.Context, d *cache.Disk) error
	aside         bool // something is left in the quarantine directory
}

func alpha(version string) cachetest.Image {
	return cachetest.NewImage("example.com/alpha", version, 3000)
}

func beta() cachetest.Image {
	img := cachetest.NewImage("example.com/beta", "1", 2000)
	// It is used last.
	img.Record.Used = img.Record.Used.Add(time.Hour)
	return img
}

// gamma returns an image whose bytes were lost when operations begin.
func gamma() cachetest.Image {
	img := cachetest.NewImage("example.com/gamma", "1", 2500)
	img.Record.Used = img.Record.Used.Add(time.Minute)
	return img
}

// without returns an image without its ref for the latest.
func without(img cachetest.Image) cachetest.Image {
	img.Refs = img.Refs[:1]
	return img
}

func holds(images ...cachetest.Image) func(context.Context, *cache.Disk) error {
	return func(ctx context.Context, d *cache.Disk) error {
		for _, img := range images {
			if err := cachetest.Check(ctx, d, img); err != nil {
				return err
			}
		}
		return nil
	}
}

// lost reports, as nil, that refs of an image answer nothing.
func lost(img cachetest.Image) func(context.Context, *cache.Disk) error {
	return func(ctx context.Context, d *cache.Disk) error {
		if r, _, err := d.Resolve(ctx, img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
			return fmt.Errorf("Resolve(%v) = %v, %w", img.Refs[0].Ref, r.Digest, err)
		}
		return nil
	}
}

// lacks reports, as nil, that nothing of an image is served.
func lacks(img cachetest.Image) func(context.Context, *cache.Disk) error {
	return func(ctx context.Context, d *cache.Disk) error {
		if f, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
			if err == nil {
				err = f.Close()
			}
			return fmt.Errorf("%s %s is held: %w", img.Record.Name, img.Record.Labels["version"], err)
		}
		return lost(img)(ctx, d)
	}
}

func both(checks ...func(context.Context, *cache.Disk) error) func(context.Context, *cache.Disk) error {
	return func(ctx context.Context, d *cache.Disk) error {
		for _, check := range checks {
			if err := check(ctx, d); err != nil {
				return err
			}
		}
		return nil
	}
}

func operations() []operation {
	one, two, other := alpha("1"), alpha("2"), beta()
	again := without(one)
	again.Refs = []cache.Resolution{{Ref: cachetest.MustRef("example.com/alpha:1,os=linux"), Source: "https://mirror.example.com/a"}}
	merged := one
	merged.Refs = append(merged.Refs[:2:2], again.Refs...)
	pinned := one
	pinned.Record.Pinned = true
	bad := other
	bad.Record.State, bad.Record.Code, bad.Record.Reason = cache.Quarantined, "tar", "two manifests"
	moved := other
	moved.Refs = append(moved.Refs[:2:2], cache.Resolution{Ref: one.Refs[1].Ref, Digest: other.Record.Digest, Source: "https://example.com/moved"})
	learned := known
	learned.Name = one.Record.Name
	knows := func(want bool) func(context.Context, *cache.Disk) error {
		return func(_ context.Context, d *cache.Disk) error {
			if k, ok := d.Known(learned.Name); ok != want || ok && !reflect.DeepEqual(k, learned) {
				return fmt.Errorf("Known = %+v, %v, want %v", k, ok, want)
			}
			return nil
		}
	}
	return []operation{
		{
			"committing a new image",
			func(ctx context.Context, d *cache.Disk) error { return cachetest.Commit(ctx, d, two) },
			both(holds(one, other), lacks(two)), holds(without(one), two, other), false,
		},
		{
			"committing an image that was lost",
			func(ctx context.Context, d *cache.Disk) error { return cachetest.Commit(ctx, d, gamma()) },
			both(holds(one, other), lost(gamma())), holds(one, other, gamma()), false,
		},
		{
			"deleting an image that was lost",
			func(ctx context.Context, d *cache.Disk) error { return d.Delete(ctx, gamma().Record.Digest) },
			holds(one, other), both(holds(one, other), lacks(gamma())), false,
		},
		{
			"committing the same bytes again",
			func(ctx context.Context, d *cache.Disk) error { return cachetest.Commit(ctx, d, again) },
			holds(one, other), holds(merged, other), false,
		},
		{
			"pointing a ref at another image",
			func(ctx context.Context, d *cache.Disk) error { return d.Point(ctx, moved.Refs[2]) },
			holds(one, other), holds(without(one), moved), false,
		},
		{
			"updating a record",
			func(ctx context.Context, d *cache.Disk) error {
				return d.Update(ctx, one.Record.Digest, func(r *cache.Record) error {
					r.Pinned = true
					return nil
				})
			},
			holds(one, other), holds(pinned, other), false,
		},
		{
			"quarantining an image",
			func(ctx context.Context, d *cache.Disk) error {
				return d.Quarantine(ctx, other.Record.Digest, bad.Record.Code, bad.Record.Reason)
			},
			holds(one, other), holds(one, bad), false,
		},
		{
			"deleting an image",
			func(ctx context.Context, d *cache.Disk) error { return d.Delete(ctx, other.Record.Digest) },
			holds(one, other), both(holds(one), lacks(other)), false,
		},
		{
			"evicting an image",
			func(ctx context.Context, d *cache.Disk) error {
				for {
					// It is the oldest one; once it is gone, nothing more is asked for.
					if _, err := d.Record(one.Record.Digest); errors.Is(err, acproxy.ErrNotFound) {
						return nil
					}
					u, err := d.Usage()
					if err != nil {
						return err
					}
					freed, err := d.Evict(ctx, u.Total()-1)
					if err != nil {
						return err
					}
					if len(freed.Evicted) > 0 {
						continue
					}
					now, err := d.Usage()
					if err != nil {
						return err
					}
					if now.Total() >= u.Total() {
						return errors.New("nothing was evicted")
					}
					// What the store writes for itself after a start, the table of refs, took more in the moment of the first look.
				}
			},
			holds(one, other), both(holds(other), lacks(one)), false,
		},
		{
			"scrubbing a blob that has lost a bit",
			func(ctx context.Context, d *cache.Disk) error {
				blob, err := d.OpenBlob(other.Record.Digest)
				if errors.Is(err, acproxy.ErrNotFound) {
					return nil
				}
				if err != nil {
					return err
				}
				defer blob.Close()
				if err := os.WriteFile(blob.Name(), append([]byte{other.Blob[0] ^ 1}, other.Blob[1:]...), 0o640); err != nil {
					return err
				}
				_, err = d.Scrub(ctx, cache.ScrubOptions{})
				return err
			},
			both(holds(one), func(_ context.Context, d *cache.Disk) error {
				rec, err := d.Record(other.Record.Digest)
				if err == nil && rec.Lost() {
					err = errors.New("its bytes are lost")
				}
				return err
			}),
			both(holds(one), lacks(other), func(_ context.Context, d *cache.Disk) error {
				// A crash in between, and a lost index, leave the image as one that is missing, or unknown.
				rec, err := d.Record(other.Record.Digest)
				if err == nil && !rec.Lost() {
					err = errors.New("it is not lost")
				}
				if errors.Is(err, acproxy.ErrNotFound) {
					err = nil
				}
				return err
			}),
			true,
		},
		{
			"learning of a name",
			func(_ context.Context, d *cache.Disk) error { return d.Learn(learned) },
			both(holds(one, other), knows(false)), both(holds(one, other), knows(true)), false,
		},
	}
}

// TestNothingIsLostAtAnyCall makes each call on the file system that an operation makes go wrong in each way, and then crashes and starts
// again: what was reported done is done, what was not is done or not, and nothing lies about.
func TestNothingIsLostAtAnyCall(t *testing.T) {
	base := t.TempDir()
	d := open(t, base, cache.Options{})
	fillBase(t, d)
	closeStore(t, d)
	for _, op := range operations() {
		n := len(callsOf(t, base, op))
		t.Logf("%s makes %d calls", op.name, n)
		for at := 1; at <= n; at++ {
			for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.FailThoughDone, durabletest.PowerCut} {
				t.Run(fmt.Sprintf("%s, call %d %v", op.name, at, mode), func(t *testing.T) {
					t.Parallel()
					tryCall(t, base, op, at, mode)
				})
			}
		}
	}
}

// fillBase has a store hold what operations begin with. The name of beta is known, and what is known of it goes with it.
func fillBase(t *testing.T, d *cache.Disk) {
	t.Helper()
	for _, img := range []cachetest.Image{alpha("1"), beta(), gamma()} {
		if err := cachetest.Commit(t.Context(), d, img); err != nil {
			t.Fatal(err)
		}
	}
	blob, err := d.OpenBlob(gamma().Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(blob.Close(), os.Remove(blob.Name())); err != nil {
		t.Fatal(err)
	}
	if err := lacks(gamma())(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	of := known
	of.Name = beta().Record.Name
	if err := d.Learn(of); err != nil {
		t.Fatal(err)
	}
}

// onCopy opens a copy of a store on a file system that can be broken.
func onCopy(t *testing.T, base string) (*cache.Disk, *durabletest.FS, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	copyStore(t, base, dir)
	fsys, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, dir, cache.Options{FS: fsys, Quota: cache.Quota{Grace: -1}})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d, fsys, dir
}

func callsOf(t *testing.T, base string, op operation) []string {
	t.Helper()
	d, fsys, _ := onCopy(t, base)
	if err := op.before(t.Context(), d); err != nil {
		t.Fatalf("before: %v", err)
	}
	fsys.Break(0, durabletest.Fail, nil)
	if err := op.do(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if err := op.after(t.Context(), d); err != nil {
		t.Fatalf("after: %v", err)
	}
	return fsys.Calls()
}

// callAt returns a call that was made.
func callAt(fsys *durabletest.FS, at int) string {
	if calls := fsys.Calls(); len(calls) >= at {
		return calls[at-1]
	}
	return "all that was done"
}

func tryCall(t *testing.T, base string, op operation, at int, mode durabletest.Mode) {
	ctx := t.Context()
	d, fsys, dir := onCopy(t, base)
	indexBefore := read(t, filepath.Join(dir, "index.db"))
	fsys.Break(at, mode, nil)
	done := op.do(ctx, d)
	if mode == durabletest.PowerCut {
		// Nobody was there any more to be told that it was done.
		done = durabletest.ErrPower
	}
	what := callAt(fsys, at)
	indexAfter := read(t, filepath.Join(dir, "index.db"))
	verdict := func(d *cache.Disk) error {
		after := op.after(ctx, d)
		if after == nil {
			return nil
		}
		if done == nil {
			return fmt.Errorf("reported done, and yet: %w", after)
		}
		if before := op.before(ctx, d); before != nil {
			return fmt.Errorf("neither as before: %w; nor as after: %w", before, after)
		}
		return nil
	}
	if err := verdict(d); err != nil {
		t.Errorf("%s: at once: %v", what, err)
	}

	type crash struct {
		survival durabletest.Survival
		index    []byte
	}
	// Whatever the index says was synced by bbolt itself, after the files that it speaks of; or it is lost.
	crashes := []crash{
		{durabletest.Nothing(), nil}, {durabletest.Nothing(), indexAfter}, {durabletest.Everything(), indexAfter}, {durabletest.Some(uint64(at)), nil},
	}
	if mode == durabletest.PowerCut {
		crashes = []crash{
			{durabletest.Nothing(), nil}, {durabletest.Nothing(), indexBefore}, {durabletest.Everything(), nil}, {durabletest.Everything(), indexBefore},
			{durabletest.Some(uint64(at)), nil}, {durabletest.Some(uint64(at) + 100), indexBefore},
			{durabletest.Nothing(), indexAfter}, {durabletest.Everything(), indexAfter}, {durabletest.Some(uint64(at) + 200), indexAfter},
		}
	}
	if testtools.Brief() {
		// Another one for each call.
		crashes = crashes[at%len(crashes):][:1]
	}
	for _, c := range crashes {
		after := filepath.Join(t.TempDir(), "after")
		if err := fsys.Crash(after, c.survival); err != nil {
			t.Fatal(err)
		}
		// The model doesn't see what the index's own library writes.
		if err := os.RemoveAll(filepath.Join(after, "index.db")); err != nil {
			t.Fatal(err)
		}
		state := "the index lost"
		if c.index != nil {
			state = "the index kept"
			write(t, filepath.Join(after, "index.db"), c.index)
		}
		again := open(t, after, cache.Options{Quota: cache.Quota{Grace: -1}})
		if err := again.Ready(ctx); err != nil {
			t.Fatal(err)
		}
		if err := verdict(again); err != nil {
			t.Errorf("%s: %v, %s: %v", what, c.survival, state, err)
		}
		booked(t, again, after, what)
		// And it works on.
		if err := op.do(ctx, again); err != nil {
			t.Errorf("%s: %v, %s: doing it again: %v", what, c.survival, state, err)
		}
		if err := op.after(ctx, again); err != nil {
			t.Errorf("%s: %v, %s: after doing it again: %v", what, c.survival, state, err)
		}
		closeStore(t, again)
		tidy(t, after, c.index == nil, op.aside, what)
	}
}

// TestNothingIsLostAfterAKill kills the process at each call of an operation that brings something, or after that has failed, starts again, and cuts the power:
// what the start has found and served, and what was done since, is there.
func TestNothingIsLostAfterAKill(t *testing.T) {
	base := t.TempDir()
	d := open(t, base, cache.Options{})
	for _, img := range []cachetest.Image{alpha("1"), beta()} {
		if err := cachetest.Commit(t.Context(), d, img); err != nil {
			t.Fatal(err)
		}
	}
	closeStore(t, d)
	all := operations()
	for _, op := range []operation{all[0], all[len(all)-1]} {
		for at := 1; at <= len(callsOf(t, base, op)); at++ {
			for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.PowerCut} {
				t.Run(fmt.Sprintf("%s, call %d %v", op.name, at, mode), func(t *testing.T) {
					t.Parallel()
					d, fsys, dir := onCopy(t, base)
					index := read(t, filepath.Join(dir, "index.db"))
					fsys.Break(at, mode, nil)
					_ = op.do(t.Context(), d) // who asked for it has ended, too
					what := callAt(fsys, at)
					killed := filepath.Join(t.TempDir(), "killed")
					next, err := fsys.Kill(killed)
					if err != nil {
						t.Fatal(err)
					}
					if mode == durabletest.Fail {
						index = read(t, filepath.Join(dir, "index.db"))
					}
					write(t, filepath.Join(killed, "index.db"), index)
					again := open(t, killed, cache.Options{FS: next, Quota: cache.Quota{Grace: -1}})
					if err := again.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
					if op.after(t.Context(), again) != nil {
						what += ", done again"
						if err := op.do(t.Context(), again); err != nil {
							t.Fatal(err)
						}
					}
					lost := filepath.Join(t.TempDir(), "lost")
					if err := next.Crash(lost, durabletest.Nothing()); err != nil {
						t.Fatal(err)
					}
					write(t, filepath.Join(lost, "index.db"), read(t, filepath.Join(killed, "index.db")))
					last := open(t, lost, cache.Options{Quota: cache.Quota{Grace: -1}})
					if err := last.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
					if err := op.after(t.Context(), last); err != nil {
						t.Errorf("%s: it was there, and is lost with the power: %v", what, err)
					}
					if left := names(t, lost, "names"); op.name == all[len(all)-1].name && len(left) != 1 {
						t.Errorf("%s: the names are %v", what, left)
					}
				})
			}
		}
	}
}

// TestWhatFailedIsMendedByTheNextStart makes each call on the file system that an operation makes fail, closes the store properly, and opens it again: the
// failure has left nothing that a store can't be closed with.
func TestWhatFailedIsMendedByTheNextStart(t *testing.T) {
	base := t.TempDir()
	d := open(t, base, cache.Options{})
	fillBase(t, d)
	closeStore(t, d)
	for _, op := range operations() {
		n := len(callsOf(t, base, op))
		for at := 1; at <= n; at++ {
			for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.FailThoughDone} {
				t.Run(fmt.Sprintf("%s, call %d %v", op.name, at, mode), func(t *testing.T) {
					t.Parallel()
					d, fsys, dir := onCopy(t, base)
					fsys.Break(at, mode, nil)
					err := op.do(t.Context(), d)
					what := callAt(fsys, at)
					closeStore(t, d)
					again := open(t, dir, cache.Options{Idle: true})
					if err := again.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
					booked(t, again, dir, what)
					closeStore(t, again)
					tidy(t, dir, false, op.aside, what)
					_, found, _ := check(t, dir, false)
					for _, f := range found.all {
						if !f.Note && !(op.aside && f.Code == cache.CodeCorrupt) { // what the operation has spoilt itself
							t.Errorf("%s, which ended with %v: fsck finds %s in %s: %s", what, err, f.Code, f.Path, f.Detail)
						}
					}
				})
			}
		}
	}
}

// TestClosedWhileFilesChange closes a store in the midst of commits, changes, evictions and deletions: the next start knows whether the files have to be looked at.
func TestClosedWhileFilesChange(t *testing.T) {
	for round := range 60 {
		dir := t.TempDir()
		d := open(t, dir, cache.Options{Quota: cache.Quota{Grace: -1}})
		if err := d.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		const images = 4
		var busy sync.WaitGroup
		for i := range images {
			// It ends with the store, and is waited for.
			busy.Go(func() {
				img := cachetest.NewImage(fmt.Sprintf("example.com/app%d", i), "1", 100)
				for {
					for _, do := range []func() error{
						func() error { return cachetest.Commit(t.Context(), d, img) },
						func() error { return d.Quarantine(t.Context(), img.Record.Digest, "tar", "two manifests") },
						func() error { return d.Delete(t.Context(), img.Record.Digest) },
						func() error { return cachetest.Commit(t.Context(), d, img) },
						func() error { _, err := d.Evict(t.Context(), 0); return err },
					} {
						if err := do(); d.Working() != nil {
							return
						} else if err != nil && !errors.Is(err, acproxy.ErrNotFound) {
							t.Error(err)
						}
					}
				}
			})
		}
		time.Sleep(time.Duration(round%20) * time.Millisecond)
		closeStore(t, d)
		busy.Wait()
		again := open(t, dir, cache.Options{Idle: true})
		if err := again.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		closeStore(t, again)
		tidy(t, dir, false, true, "closed")
		_, found, _ := check(t, dir, false)
		for _, f := range found.all {
			// A sidecar that was written, and whose change was not, is written again when the store is scrubbed.
			if f.Code != cache.CodeSidecarDiffers {
				t.Errorf("fsck finds %s in %s: %s", f.Code, f.Path, f.Detail)
			}
		}
	}
}

// TestTheFirstCommitAfterAStart cuts the power at each call of a commit that is the first thing that happens to a store that was closed properly: before the
// whole of its index has been read, nothing else has noted that it is open.
func TestTheFirstCommitAfterAStart(t *testing.T) {
	base := t.TempDir()
	closeStore(t, open(t, base, cache.Options{}))
	op := operations()[0]
	two := alpha("2")
	op.before = lacks(two)
	op.after = holds(two)
	for at := 1; at <= len(callsOf(t, base, op)); at++ {
		d, fsys, dir := onCopy(t, base)
		if err := d.Unmark(); err != nil {
			t.Fatal(err)
		}
		fsys.Break(at, durabletest.PowerCut, nil)
		_ = op.do(t.Context(), d) // nobody is there any more to be told
		what := callAt(fsys, at)
		after := filepath.Join(t.TempDir(), "after")
		if err := fsys.Crash(after, durabletest.Everything()); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(after, "index.db"), read(t, filepath.Join(dir, "index.db")))
		again := open(t, after, cache.Options{Idle: true})
		if err := again.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		closeStore(t, again)
		tidy(t, after, false, false, what)
		_, found, _ := check(t, after, false)
		for _, f := range found.all {
			t.Errorf("power cut after %s: fsck finds %s in %s: %s", what, f.Code, f.Path, f.Detail)
		}
	}
}

// booked fails the test unless a store counts just the blobs and sidecars that there are.
func booked(t *testing.T, d *cache.Disk, dir, what string) {
	t.Helper()
	if err := d.Counted(t.Context()); err != nil {
		t.Fatal(err)
	}
	u, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	var files int64
	for _, shard := range names(t, dir, "blobs") {
		for _, name := range names(t, dir, "blobs", shard) {
			files += diskUsage(t, filepath.Join(dir, "blobs", shard, name))
		}
	}
	if got := u.Blobs + u.Sidecars; got != files {
		t.Errorf("%s: counted are %d bytes of blobs and sidecars, and there are %d: %+v", what, got, files, u)
	}
}

// tidy fails the test if a store's directory holds temporary files, a blob without its sidecar, or files set aside, other than the sidecar of a
// commit that never came to be when the index, which could have told, was lost.
func tidy(t *testing.T, dir string, lost, aside bool, what string) {
	t.Helper()
	if left := names(t, dir, "partial"); len(left) != 0 {
		t.Errorf("%s: temporary files are left: %v", what, left)
	}
	if aside {
		return
	}
	left := slices.DeleteFunc(names(t, dir, "quarantine"), func(name string) bool { return lost && strings.Contains(name, ".json-") })
	if len(left) != 0 {
		t.Errorf("%s: the quarantine directory holds %v", what, left)
	}
	for _, shard := range names(t, dir, "blobs") {
		files := strings.Join(names(t, dir, "blobs", shard), " ")
		for _, name := range strings.Fields(files) {
			if !strings.HasSuffix(name, ".json") && !strings.Contains(files, name+".json") {
				t.Errorf("%s: the blob %s has no sidecar", what, name)
			}
		}
	}
}
