package cache_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable"
)

// inspect finds out the image ID of the images that cachetest makes.
func inspect(r io.Reader) (acproxy.ImageID, error) {
	sum := sha512.New()
	_, err := io.Copy(sum, r)
	return acproxy.ImageID(sum.Sum(nil)), err
}

// flip flips a bit in the middle of a file.
func flip(t testing.TB, path string) {
	t.Helper()
	b := read(t, path)
	b[len(b)/2] ^= 1
	write(t, path, b)
}

func remove(t testing.TB, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// directory puts a directory in the place of a file.
func directory(t testing.TB, path string) {
	t.Helper()
	remove(t, path)
	if err := os.Mkdir(path, 0o750); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(path, "inside"), []byte("x"))
}

// lengthen makes a file longer than what is read of any of its kind.
func lengthen(t testing.TB, path string) {
	t.Helper()
	if err := os.Truncate(path, 64<<20+1); err != nil {
		t.Fatal(err)
	}
}

// damages are what may happen to the files of one image.
var damages = []struct {
	name  string
	spoil func(t testing.TB, dir string, img cachetest.Image)
	code  string
	lost  string // the code that the image is quarantined with
	note  bool
}{
	{"a flipped bit in a blob", func(t testing.TB, dir string, img cachetest.Image) { flip(t, blobPath(dir, img)) }, cache.CodeCorrupt, cache.CodeCorrupt, false},
	{"a blob that is cut", func(t testing.TB, dir string, img cachetest.Image) { write(t, blobPath(dir, img), img.Blob[:100]) }, cache.CodeDamaged, cache.CodeDamaged, false},
	{"a blob that is too long", func(t testing.TB, dir string, img cachetest.Image) {
		write(t, blobPath(dir, img), append(bytes.Clone(img.Blob), 0))
	}, cache.CodeDamaged, cache.CodeDamaged, false},
	{"a blob that is empty", func(t testing.TB, dir string, img cachetest.Image) { write(t, blobPath(dir, img), nil) }, cache.CodeDamaged, cache.CodeDamaged, false},
	{"a blob that is gone", func(t testing.TB, dir string, img cachetest.Image) { remove(t, blobPath(dir, img)) }, cache.CodeMissing, cache.CodeMissing, false},
	{"a directory in the place of a blob", func(t testing.TB, dir string, img cachetest.Image) { directory(t, blobPath(dir, img)) }, cache.CodeCorrupt, cache.CodeCorrupt, false},
	{"a flipped bit in a sidecar", func(t testing.TB, dir string, img cachetest.Image) { flip(t, sidecarPath(dir, img)) }, cache.CodeSidecarUnreadable, "", false},
	{"a sidecar that is cut", func(t testing.TB, dir string, img cachetest.Image) {
		write(t, sidecarPath(dir, img), read(t, sidecarPath(dir, img))[:50])
	}, cache.CodeSidecarUnreadable, "", false},
	{"a sidecar that is gone", func(t testing.TB, dir string, img cachetest.Image) { remove(t, sidecarPath(dir, img)) }, cache.CodeSidecarMissing, "", false},
	{"a directory in the place of a sidecar", func(t testing.TB, dir string, img cachetest.Image) { directory(t, sidecarPath(dir, img)) }, cache.CodeSidecarUnreadable, "", false},
	{"a sidecar that is longer than any", func(t testing.TB, dir string, img cachetest.Image) { lengthen(t, sidecarPath(dir, img)) }, cache.CodeSidecarUnreadable, "", false},
	{"a sidecar of before", func(t testing.TB, dir string, img cachetest.Image) {
		write(t, sidecarPath(dir, img), read(t, filepath.Join(dir, "..", "before.json")))
	}, cache.CodeSidecarDiffers, "", true},
}

// spoiled returns the directory of a closed store with some images, one of which can be spoiled.
func spoiled(t testing.TB) (dir string, images []cachetest.Image, img cachetest.Image) {
	t.Helper()
	dir, images = filepath.Join(t.TempDir(), "store"), library()[:8]
	img = images[3]
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	write(t, filepath.Join(dir, "..", "before.json"), read(t, sidecarPath(dir, img)))
	if err := d.Update(t.Context(), img.Record.Digest, func(r *cache.Record) error { r.RktWarning = "changed"; return nil }); err != nil {
		t.Fatal(err)
	}
	images[3].Record.RktWarning = "changed"
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	return dir, images, images[3]
}

// found collects findings.
type found struct {
	mu  sync.Mutex
	all []cache.Finding
}

func (f *found) note(x cache.Finding) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = append(f.all, x)
}

// codes returns the codes of what was found, problems and notes, each sorted.
func (f *found) codes() (problems, notes string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var p, n []string
	for _, x := range f.all {
		if x.Note {
			n = append(n, x.Code)
		} else {
			p = append(p, x.Code)
		}
	}
	slices.Sort(p)
	slices.Sort(n)
	return strings.Join(p, " "), strings.Join(n, " ")
}

func TestScrubFindsAndRepairs(t *testing.T) {
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			dir, images, img := spoiled(t)
			var lost []cache.Record
			d := open(t, dir, cache.Options{Inspect: inspect, Lost: func(r cache.Record) { lost = append(lost, r) }})
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, dir, img)
			var f found
			got, err := d.Scrub(t.Context(), cache.ScrubOptions{Found: f.note})
			if err != nil {
				t.Fatal(err)
			}
			problems, notes := f.codes()
			if want := tt.code; tt.note && notes != want || !tt.note && problems != want || len(f.all) != 1 {
				t.Errorf("found: %+v, want %s", f.all, want)
			}
			if x := f.all[0]; !x.Repaired || x.Digest != img.Record.Digest || x.Image != "example.com/app0:1.3" || !strings.HasPrefix(x.Path, "blobs/") {
				t.Errorf("found: %+v", x)
			}
			whole := len(images)
			if tt.lost != "" {
				whole--
			}
			if got.Images != int64(whole) || got.OfImages != int64(len(images)) || got.Bytes == 0 {
				t.Errorf("Scrub = %+v", got)
			}
			if (len(lost) == 1) != (tt.lost != "") {
				t.Errorf("told were %d lost images", len(lost))
			}
			rec, err := d.Record(img.Record.Digest)
			if err != nil || rec.Lost() != (tt.lost != "") || rec.Lost() && rec.Code != tt.lost {
				t.Errorf("Record = %v %v, %v", rec.State, rec.Code, err)
			}
			if u, err := d.Usage(); err != nil || u.Images != int64(len(images)) {
				t.Errorf("Usage = %+v, %v", u, err)
			}
			(&warden{Disk: d, t: t, dir: dir}).counted("after the scrub")
			if tt.lost != "" {
				if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
					t.Errorf("Resolve = %v, want ErrNotFound", err)
				}
				if records, err := d.Lost(); len(records) != 1 || err != nil {
					t.Errorf("Lost = %v, %v", records, err)
				}
				// Fetched again, it is as before.
				if err := cachetest.Commit(t.Context(), d, img); err != nil {
					t.Fatal(err)
				}
			}
			checkAll(t, d, images)
			// The sidecars are right again: without an index all is there.
			closeStore(t, d)
			remove(t, filepath.Join(dir, "index.db"))
			d = open(t, dir, cache.Options{Inspect: inspect})
			checkAll(t, d, images)
			f.all = nil
			if got, err := d.Scrub(t.Context(), cache.ScrubOptions{Found: f.note}); err != nil || got.Problems != 0 || len(f.all) != 0 {
				t.Errorf("a second scrub found %+v, %v", f.all, err)
			}
		})
	}
}

func TestScrubComparesTheImageID(t *testing.T) {
	dir, images, img := spoiled(t)
	d := open(t, dir, cache.Options{Inspect: inspect})
	wrong := img.Record.ImageID
	wrong[0] ^= 1
	if err := d.Update(t.Context(), img.Record.Digest, func(r *cache.Record) error { r.ImageID = wrong; return nil }); err != nil {
		t.Fatal(err)
	}
	var f found
	if _, err := d.Scrub(t.Context(), cache.ScrubOptions{Found: f.note}); err != nil {
		t.Fatal(err)
	}
	if problems, _ := f.codes(); problems != cache.CodeImageIDDiffers {
		t.Errorf("found: %+v", f.all)
	}
	if rec, err := d.Record(img.Record.Digest); err != nil || rec.Code != cache.CodeImageIDDiffers || rec.Lost() {
		t.Errorf("Record = %v %v, %v, want it quarantined and its bytes kept", rec.State, rec.Code, err)
	}
	_ = images
}

// TestScrubOfWhatGoes scrubs a store whose images are evicted, deleted and replaced meanwhile. None of that is a finding, and the scrub keeps nothing
// from being evicted.
func TestScrubOfWhatGoes(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(w *warden, img cachetest.Image) error
		gone int64
	}{
		{"evicted", func(w *warden, _ cachetest.Image) error {
			_, err := w.Evict(w.t.Context(), 0)
			return err
		}, 1},
		{"deleted", func(w *warden, img cachetest.Image) error { return w.Delete(w.t.Context(), img.Record.Digest) }, 1},
		{"replaced by the same bytes", func(w *warden, img cachetest.Image) error { return cachetest.Commit(w.t.Context(), w, img) }, 1},
		{"left alone", func(*warden, cachetest.Image) error { return nil }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWarden(t, cache.Quota{Grace: -1}, func(o *cache.Options) { o.Inspect = inspect })
			img := w.commit(image("app", 3*mib))
			var f found
			once := false
			got, err := w.Scrub(t.Context(), cache.ScrubOptions{Found: f.note, Progress: func(s cache.Scrubbed) {
				if s.Bytes == mib && !once {
					once = true
					if err := tt.do(w, img); err != nil {
						t.Error(err)
					}
				}
			}})
			if err != nil || got.Gone != tt.gone || got.Problems != 0 || len(f.all) != 0 || got.Images != 1-tt.gone {
				t.Errorf("Scrub = %+v, %v, found %+v", got, err, f.all)
			}
			w.counted("afterwards")
			if u := w.usage(); u.Open != 0 {
				t.Errorf("Usage = %+v", u)
			}
		})
	}
}

func TestScrubCanBeCalledOff(t *testing.T) {
	w := newWarden(t, cache.Quota{}, func(o *cache.Options) { o.Inspect = inspect })
	for i := range 4 {
		w.commit(image(fmt.Sprint("app", i), mib))
	}
	ctx, cancel := context.WithCancel(t.Context())
	got, err := w.Scrub(ctx, cache.ScrubOptions{Progress: func(s cache.Scrubbed) {
		if s.Images == 1 {
			cancel()
		}
		// There is only one at a time.
		if _, err := w.Scrub(t.Context(), cache.ScrubOptions{}); !errors.Is(err, acproxy.ErrBusy) {
			t.Errorf("a second Scrub = %v, want ErrBusy", err)
		}
	}})
	if !errors.Is(err, context.Canceled) || got.Images < 1 || got.Images > 2 {
		t.Errorf("Scrub = %+v, %v", got, err)
	}
	if got, err := w.Scrub(t.Context(), cache.ScrubOptions{}); err != nil || got.Images != 4 {
		t.Errorf("Scrub = %+v, %v", got, err)
	}
}

// TestScrubKeepsToItsRate measures by a clock that only runs while everybody waits.
func TestScrubKeepsToItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := cache.Open(t.TempDir(), cache.Options{Inspect: inspect, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for i := range 3 {
			if err := cachetest.Commit(t.Context(), d, image(fmt.Sprint("app", i), 10*mib)); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		if _, err := d.Scrub(t.Context(), cache.ScrubOptions{Rate: mib}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < 29*time.Second || took > 31*time.Second {
			t.Errorf("30 MiB at 1 MiB/s took %v", took)
		}
	})
}

// noFiles is a file system on which no file can be made while it is full.
type noFiles struct {
	durable.OS
	full atomic.Bool
}

func (f *noFiles) Create(name string, perm fs.FileMode) (durable.File, error) {
	if f.full.Load() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOSPC}
	}
	return f.OS.Create(name, perm)
}

// isBarred checks that an image counts as lost for whoever asks.
func isBarred(t testing.TB, d *cache.Disk, img cachetest.Image) {
	t.Helper()
	digest := img.Record.Digest
	if b, err := d.OpenBlob(digest); acproxy.Code(err) != "blob-gone" {
		t.Errorf("OpenBlob(%v) = %v, %v, want that it is gone", digest, b, err)
	}
	if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); acproxy.Code(err) != "blob-gone" {
		t.Errorf("Resolve(%v) = %v, want that it is gone", img.Refs[0].Ref, err)
	}
	if rec, err := d.Record(digest); err != nil || rec.Code != cache.CodeCorrupt || !rec.Lost() {
		t.Errorf("Record(%v) = %v %v, %v", digest, rec.State, rec.Code, err)
	}
	if got, ok := d.BySignature(img.Record.SignatureDigest); ok && got == digest {
		t.Errorf("BySignature finds %v", digest)
	}
}

// TestScrubWhereNothingCanBeNoted finds damage that can't be noted anywhere. Nothing of it is served, the scrub reads on, and what failed is tried again soon.
func TestScrubWhereNothingCanBeNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, images := t.TempDir(), library()[:8]
		fsys, lost := &noFiles{}, make(map[acproxy.Digest]int)
		opts := cache.Options{
			FS: fsys, Log: slog.New(slog.DiscardHandler), Inspect: inspect, Scrub: cache.Schedule{Every: 30 * 24 * time.Hour}, Quota: cache.Quota{Grace: 100 * 365 * 24 * time.Hour},
			Lost: func(r cache.Record) { lost[r.Digest]++ },
		}
		d, err := cache.Open(dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		served := func(images []cachetest.Image) {
			t.Helper()
			for _, img := range images {
				if err := cachetest.Check(t.Context(), d, img); err != nil {
					t.Error(err)
				}
			}
		}
		for i := range images {
			now := time.Now().UTC().Round(0)
			images[i].Record.Fetched, images[i].Record.Used = now, now
		}
		fill(t, d, images)
		synctest.Wait()
		for _, img := range images {
			flip(t, blobPath(dir, img))
		}
		fsys.full.Store(true)
		var f found
		got, err := d.Scrub(t.Context(), cache.ScrubOptions{Found: f.note})
		if !errors.Is(err, acproxy.ErrNoSpace) || got.Problems != 8 || len(f.all) != 8 {
			t.Errorf("Scrub = %+v, %v, found %+v", got, err, f.all)
		}
		for i, img := range images {
			if f.all[i].Repaired || !strings.Contains(err.Error(), img.Record.Digest.String()) {
				t.Errorf("found %+v, and the error of all is %v", f.all[i], err)
			}
			isBarred(t, d, img)
		}
		if records, err := d.Lost(); len(records) != 8 || err != nil {
			t.Errorf("Lost = %d images, %v", len(records), err)
		}
		// Fetched again, it is served.
		fsys.full.Store(false)
		if err := cachetest.Commit(t.Context(), d, images[0]); err != nil {
			t.Fatal(err)
		}
		served(images[:1])
		if records, err := d.Lost(); len(records) != 7 || err != nil {
			t.Errorf("Lost = %d images, %v", len(records), err)
		}
		// So is what somebody has put right, once it was read.
		write(t, blobPath(dir, images[1]), images[1].Blob)
		isBarred(t, d, images[1])
		time.Sleep(15 * time.Minute)
		synctest.Wait()
		served(images[:2])
		// The others are noted by now.
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if d, err = cache.Open(dir, opts); err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		served(images[:2])
		for _, img := range images[2:] {
			isBarred(t, d, img)
		}
		for digest, n := range lost {
			if n != 1 {
				t.Errorf("that %v is lost was told %d times", digest, n)
			}
		}
		if len(lost) != 8 {
			t.Errorf("told were %d lost images", len(lost))
		}
	})
}

// TestLossIsNotedLater opens what is gone while that can't be noted, also in a store that isn't scrubbed otherwise.
func TestLossIsNotedLater(t *testing.T) {
	for _, every := range []time.Duration{0, 30 * 24 * time.Hour} {
		t.Run(every.String(), func(t *testing.T) { synctest.Test(t, func(t *testing.T) { lossIsNotedLater(t, every) }) })
	}
}

func lossIsNotedLater(t *testing.T, every time.Duration) {
	dir, img, fsys := t.TempDir(), image("app", 10*kib), &noFiles{}
	opts := cache.Options{FS: fsys, Log: slog.New(slog.DiscardHandler), Scrub: cache.Schedule{Every: every}, Quota: cache.Quota{Grace: 100 * 365 * 24 * time.Hour}}
	d, err := cache.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	img.Record.Fetched, img.Record.Used = time.Now(), time.Now()
	fill(t, d, []cachetest.Image{img})
	synctest.Wait()
	remove(t, blobPath(dir, img))
	fsys.full.Store(true)
	was := d.Changes()
	if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("OpenBlob = %v", err)
	}
	if d.Changes() == was {
		t.Error("those who keep answers were not told")
	}
	fsys.full.Store(false)
	time.Sleep(15 * time.Minute)
	synctest.Wait()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = cache.Open(dir, opts); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if rec, err := d.Record(img.Record.Digest); err != nil || rec.Code != cache.CodeMissing {
		t.Errorf("Record = %v %v, %v", rec.State, rec.Code, err)
	}
}

// TestWhatAnOperatorDeletesCountsNoMore deletes what was set aside, as the documentation says.
func TestWhatAnOperatorDeletesCountsNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "index.db.broken-20260301T120000Z-ABCDEF"), make([]byte, mib))
		d, err := cache.Open(dir, cache.Options{Log: slog.New(slog.DiscardHandler), FlushEvery: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		img := image("app", mib)
		fill(t, d, []cachetest.Image{img})
		flip(t, blobPath(dir, img))
		if _, err := d.Scrub(t.Context(), cache.ScrubOptions{}); err != nil {
			t.Fatal(err)
		}
		before, err := d.Usage()
		if err != nil || before.Quarantine < mib || before.Index < mib {
			t.Errorf("Usage = %+v, %v", before, err)
		}
		for _, name := range names(t, dir, "quarantine") {
			remove(t, filepath.Join(dir, "quarantine", name))
		}
		remove(t, filepath.Join(dir, "index.db.broken-20260301T120000Z-ABCDEF"))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if u, err := d.Usage(); err != nil || u.Quarantine != 0 || u.Index > before.Index-mib {
			t.Errorf("Usage = %+v, %v, and was %+v", u, err, before)
		}
	})
}

// TestScrubEvictsNothing finds damage on a full disk where something could be evicted: no image goes for a note.
func TestScrubEvictsNothing(t *testing.T) {
	fsys := &noFiles{}
	w := newWarden(t, cache.Quota{}, func(o *cache.Options) { o.FS, o.Inspect = fsys, inspect })
	old := w.commit(image("old", 10*kib))
	w.later(time.Hour)
	img := w.commit(image("app", 10*kib))
	flip(t, blobPath(w.dir, img))
	fsys.full.Store(true)
	if got, err := w.Scrub(t.Context(), cache.ScrubOptions{}); err == nil || got.Problems != 1 {
		t.Errorf("Scrub = %+v, %v", got, err)
	}
	isBarred(t, w.Disk, img)
	fsys.full.Store(false)
	if got, err := w.Scrub(t.Context(), cache.ScrubOptions{}); err != nil || got.Problems != 1 {
		t.Errorf("Scrub with room = %+v, %v", got, err)
	}
	isBarred(t, w.Disk, img)
	if left := names(t, w.dir, "quarantine"); len(left) != 2 {
		t.Errorf("in the quarantine directory are %v", left)
	}
	if gone := w.gone(); gone != "" {
		t.Errorf("%s went for it", gone)
	}
	if err := cachetest.Check(t.Context(), w.Disk, old); err != nil {
		t.Error(err)
	}
	w.counted("afterwards")
}

// TestScrubInTime lets a month go by.
func TestScrubInTime(t *testing.T) {
	const every, images = 30 * 24 * time.Hour, 20
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		var mu sync.Mutex
		read := make(map[string]int)
		opts := cache.Options{
			Log: slog.New(slog.DiscardHandler), FlushEvery: 24 * time.Hour, Scrub: cache.Schedule{Every: every, Rate: 20 * mib},
			Inspect: func(r io.Reader) (acproxy.ImageID, error) {
				id, err := inspect(r)
				mu.Lock()
				defer mu.Unlock()
				read[id.Short()]++
				return id, err
			},
		}
		d, err := cache.Open(dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		// The first round begins when the store is first opened.
		began := time.Now()
		for i := range images {
			if err := cachetest.Commit(t.Context(), d, image(fmt.Sprint("app", i), 10*kib)); err != nil {
				t.Fatal(err)
			}
		}
		count := func() (once, more int) {
			mu.Lock()
			defer mu.Unlock()
			for _, n := range read {
				if n == 1 {
					once++
				} else {
					more++
				}
			}
			return once, more
		}
		time.Sleep(every/2 - time.Since(began) + 2*time.Hour)
		synctest.Wait()
		half, more := count()
		if half < images/5 || half > images*4/5 || more != 0 {
			t.Errorf("after half of the time %d of %d images were read, %d more than once", half, images, more)
		}
		if s := d.Scrubbing(); s.Position < 0.4 || s.Position > 0.6 || !s.Finished.IsZero() {
			t.Errorf("Scrubbing = %+v", s)
		}
		// A restart goes on where the last one was.
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if d, err = cache.Open(dir, opts); err != nil {
			t.Fatal(err)
		}
		time.Sleep(every - time.Since(began) + 2*time.Hour)
		synctest.Wait()
		if once, more := count(); once != images || more != 0 {
			t.Errorf("after all of the time %d of %d images were read once, %d more often", once, images, more)
		}
		if s := d.Scrubbing(); s.Finished.IsZero() {
			t.Errorf("Scrubbing = %+v", s)
		}
		time.Sleep(every)
		synctest.Wait()
		if once, more := count(); once != 0 || more != images {
			t.Errorf("after twice the time %d of %d images were read again", more, images)
		}
		// Who has been away for long catches up at once.
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * every)
		if d, err = cache.Open(dir, opts); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		mu.Lock()
		for id, n := range read {
			if n != 3 {
				t.Errorf("%s was read %d times, want 3", id, n)
			}
		}
		mu.Unlock()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestScrubAfterTheClockWasAhead begins a round a year ahead of time.
func TestScrubAfterTheClockWasAhead(t *testing.T) {
	const every = 30 * 24 * time.Hour
	synctest.Test(t, func(t *testing.T) {
		dir, wrong := t.TempDir(), 365*24*time.Hour
		opts := cache.Options{
			Log: slog.New(slog.DiscardHandler), FlushEvery: 24 * time.Hour, Scrub: cache.Schedule{Every: every},
			// Without what the operating system's own clock knows of a restart.
			Now: func() time.Time { return time.Now().Add(wrong).Round(0) },
		}
		for range 2 {
			d, err := cache.Open(dir, opts)
			if err != nil {
				t.Fatal(err)
			}
			if err := cachetest.Commit(t.Context(), d, image("app", 10*kib)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(every + 2*time.Hour)
			synctest.Wait()
			if s := d.Scrubbing(); s.Scrubbed.Images != 1 || s.Finished.IsZero() {
				t.Errorf("Scrubbing = %+v, want a round that has ended", s)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			wrong = 0
		}
	})
}

// tree is what a directory holds, for comparing.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if e.IsDir() {
			out[rel] = "directory"
			return nil
		}
		b, err := os.ReadFile(path)
		if rel != "lock" {
			out[rel] = string(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// check runs Check on a closed store.
func check(t testing.TB, dir string, repair bool) (cache.Checked, *found, *found) {
	t.Helper()
	var f, r found
	got, err := cache.Check(t.Context(), dir, cache.Options{Log: testLog(t), Inspect: inspect}, cache.CheckOptions{Repair: repair, Found: f.note, Repaired: r.note})
	if err != nil {
		t.Fatalf("Check: %v", err)
	}
	return got, &f, &r
}

// editIndex changes the index of a closed store behind its back.
func editIndex(t testing.TB, dir string, edit func(tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "index.db"), 0o640, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(edit), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestCheckFindsAndRepairs(t *testing.T) {
	type damage struct {
		name            string
		spoil           func(t testing.TB, dir string, img cachetest.Image)
		problems, notes string
		lost            string
		gone            bool   // nothing is known of the image any more
		after           string // notes after the repair
	}
	var all []damage
	for _, d := range damages {
		x := damage{name: d.name, spoil: d.spoil, lost: d.lost}
		if d.note {
			x.notes = d.code
		} else {
			x.problems = d.code
		}
		if d.lost != "" {
			x.after = cache.CodeLost
		}
		if d.lost == cache.CodeDamaged || d.lost == cache.CodeCorrupt || d.code == cache.CodeSidecarUnreadable {
			x.after = strings.TrimSpace(x.after + " " + cache.CodeSetAside)
		}
		all = append(all, x)
	}
	index := func(dir string) string { return filepath.Join(dir, "index.db") }
	root := func(name string) func(t testing.TB, dir string, _ cachetest.Image) {
		return func(t testing.TB, dir string, _ cachetest.Image) { write(t, filepath.Join(dir, name), []byte("?")) }
	}
	all = append(all,
		damage{name: "nothing", spoil: func(testing.TB, string, cachetest.Image) {}},
		damage{name: "no index", spoil: func(t testing.TB, dir string, _ cachetest.Image) { remove(t, index(dir)) }, problems: cache.CodeIndexMissing},
		damage{name: "an index that is cut", spoil: func(t testing.TB, dir string, _ cachetest.Image) { write(t, index(dir), read(t, index(dir))[:9000]) }, problems: cache.CodeIndexBroken, after: cache.CodeIndexAside},
		damage{name: "a flipped bit in a row of the index", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			// Pages that are free may still hold the row of before.
			b, source := read(t, index(dir)), []byte(img.Record.Source)
			spoiled := bytes.Clone(source)
			spoiled[10] ^= 1
			write(t, index(dir), bytes.ReplaceAll(b, source, spoiled))
		}, problems: cache.CodeIndexBroken, after: cache.CodeIndexAside},
		damage{name: "a directory in the place of the index", spoil: func(t testing.TB, dir string, _ cachetest.Image) { directory(t, index(dir)) }, problems: cache.CodeIndexBroken, after: cache.CodeIndexAside},
		damage{name: "an index without a row that it should have", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			editIndex(t, dir, func(tx *bolt.Tx) error {
				c := tx.Bucket([]byte("names")).Cursor()
				c.First()
				return c.Delete()
			})
		}, problems: cache.CodeIndexInconsistent, after: cache.CodeIndexAside},
		damage{name: "an index with a row too many", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			editIndex(t, dir, func(tx *bolt.Tx) error {
				// A row of an image that isn't pinned, copied from one where it says nothing else.
				key := img.Record.Digest[:]
				return tx.Bucket([]byte("pinned")).Put(key, sealedRow("pinned", key))
			})
		}, problems: cache.CodeIndexInconsistent, after: cache.CodeIndexAside},
		damage{name: "an index with another record beside a ref", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			editIndex(t, dir, func(tx *bolt.Tx) error {
				b := tx.Bucket([]byte("refs"))
				key, row := b.Cursor().First()
				row = bytes.Clone(row[4:])
				row[len(row)-1] ^= 2 // of the time of last use
				return b.Put(bytes.Clone(key), sealedRow("refs", key, row...))
			})
		}, problems: cache.CodeIndexInconsistent, after: cache.CodeIndexAside},
		damage{name: "an index of another version", spoil: func(t testing.TB, dir string, _ cachetest.Image) {
			editIndex(t, dir, func(tx *bolt.Tx) error {
				return tx.Bucket([]byte("state")).Put([]byte("schema"), sealedRow("state", []byte("schema"), '1'))
			})
		}, notes: cache.CodeIndexOld, after: cache.CodeIndexOld},
		damage{name: "no VERSION", spoil: func(t testing.TB, dir string, _ cachetest.Image) { remove(t, filepath.Join(dir, "VERSION")) }, problems: cache.CodeVersion},
		damage{name: "nonsense in VERSION", spoil: root("VERSION"), problems: cache.CodeVersion},
		damage{name: "a directory in the place of VERSION", spoil: func(t testing.TB, dir string, _ cachetest.Image) { directory(t, filepath.Join(dir, "VERSION")) }, problems: cache.CodeVersion, after: cache.CodeSetAside},
		damage{name: "no quarantine directory", spoil: func(t testing.TB, dir string, _ cachetest.Image) { remove(t, filepath.Join(dir, "quarantine")) }, problems: cache.CodeLayout},
		damage{name: "a file in the place of a directory", spoil: func(t testing.TB, dir string, _ cachetest.Image) {
			remove(t, filepath.Join(dir, "quarantine"))
			write(t, filepath.Join(dir, "quarantine"), []byte("x"))
		}, problems: cache.CodeLayout, after: cache.CodeSetAside},
		damage{name: "a strange file", spoil: root("notes.txt"), problems: cache.CodeStray, after: cache.CodeSetAside},
		damage{name: "a strange file among the blobs", spoil: root("blobs/notes.txt"), problems: cache.CodeStray, after: cache.CodeSetAside},
		damage{name: "a strange file beside a blob", spoil: func(t testing.TB, dir string, img cachetest.Image) { write(t, blobPath(dir, img)+".bak", []byte("?")) }, problems: cache.CodeStray, after: cache.CodeSetAside},
		damage{name: "a strange file among the names", spoil: root("names/x.json"), problems: cache.CodeNameUnreadable, after: cache.CodeSetAside},
		damage{name: "no file of a name", spoil: func(t testing.TB, dir string, _ cachetest.Image) {
			for _, name := range names(t, dir, "names") {
				remove(t, filepath.Join(dir, "names", name))
			}
		}, problems: cache.CodeNameMissing},
		damage{name: "a temporary file", spoil: root("partial/ABCDEF"), notes: cache.CodePartial, after: cache.CodePartial},
		damage{name: "a broken index that was kept", spoil: root("index.db.broken-20260301T120000Z-ABCDEF"), notes: cache.CodeIndexAside, after: cache.CodeIndexAside},
		damage{name: "a file that was set aside", spoil: root("quarantine/x-ABCDEFGH"), notes: cache.CodeSetAside, after: cache.CodeSetAside},
		damage{name: "an image that the index doesn't know", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			copyImage(t, dir, cachetest.NewImage("example.com/new", "1", 500))
		}, problems: cache.CodeNotIndexed},
		damage{name: "a blob that nobody knows", spoil: func(t testing.TB, dir string, _ cachetest.Image) {
			img := cachetest.NewImage("example.com/new", "1", 500)
			copyImage(t, dir, img)
			remove(t, sidecarPath(dir, img))
		}, problems: cache.CodeOrphan, after: cache.CodeSetAside},
		damage{name: "a sidecar without a blob", spoil: func(t testing.TB, dir string, _ cachetest.Image) {
			img := cachetest.NewImage("example.com/new", "1", 500)
			copyImage(t, dir, img)
			remove(t, blobPath(dir, img))
		}, problems: cache.CodeLeftover, after: cache.CodeSetAside},
		damage{name: "no index, and a flipped bit in a blob", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			remove(t, index(dir))
			flip(t, blobPath(dir, img))
		}, problems: cache.CodeCorrupt + " " + cache.CodeIndexMissing, lost: cache.CodeCorrupt, after: cache.CodeLost + " " + cache.CodeSetAside},
		damage{name: "no index, and a flipped bit in a sidecar", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			remove(t, index(dir))
			flip(t, sidecarPath(dir, img))
		}, problems: cache.CodeIndexMissing + " " + cache.CodeOrphan + " " + cache.CodeSidecarUnreadable, gone: true, after: cache.CodeSetAside + " " + cache.CodeSetAside},
		damage{name: "no index, and a sidecar that is longer than any", spoil: func(t testing.TB, dir string, img cachetest.Image) {
			remove(t, index(dir))
			lengthen(t, sidecarPath(dir, img))
		}, problems: cache.CodeIndexMissing + " " + cache.CodeOrphan + " " + cache.CodeSidecarUnreadable, gone: true, after: cache.CodeSetAside + " " + cache.CodeSetAside},
	)
	for _, tt := range all {
		t.Run(tt.name, func(t *testing.T) {
			dir, images, img := spoiled(t)
			tt.spoil(t, dir, img)
			before := tree(t, dir)
			got, f, _ := check(t, dir, false)
			problems, notes := f.codes()
			if problems != tt.problems || notes != tt.notes {
				t.Errorf("found: %s, noted: %s\nwant: %s, noted: %s\n%+v", problems, notes, tt.problems, tt.notes, f.all)
			}
			if got.Problems != int64(len(strings.Fields(problems))) || got.Left != got.Problems || got.Notes != int64(len(strings.Fields(notes))) || got.Repaired != 0 {
				t.Errorf("Check = %+v", got)
			}
			for _, x := range f.all {
				if x.Path == "" || x.Detail == "" || x.Repair == "" || x.Repaired {
					t.Errorf("the finding %+v leaves something open", x)
				}
			}
			if after := tree(t, dir); !mapsEqual(before, after) {
				t.Error("checking has changed something")
			}

			got, _, r := check(t, dir, true)
			if got.Left != 0 || len(got.Failures) != 0 || got.Repaired != got.Problems {
				t.Errorf("Check with repairs = %+v: %+v", got, r.all)
			}
			for _, x := range r.all {
				if !x.Repaired {
					t.Errorf("not repaired: %+v", x)
				}
			}
			got, f, _ = check(t, dir, false)
			if problems, notes := f.codes(); problems != "" || notes != tt.after || got.Problems != 0 {
				t.Errorf("after the repair: %s, noted: %s, want nothing but %s\n%+v", problems, notes, tt.after, f.all)
			}
			// Nothing is lost but what was damaged, and that can be fetched again.
			d := open(t, dir, cache.Options{})
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			rec, err := d.Record(img.Record.Digest)
			if tt.gone != errors.Is(err, acproxy.ErrNotFound) || rec.Lost() != (tt.lost != "") || rec.Lost() && rec.Code != tt.lost {
				t.Errorf("Record = %v %v, %v", rec.State, rec.Code, err)
			}
			if err := d.Delete(t.Context(), cachetest.NewImage("example.com/new", "1", 500).Record.Digest); err != nil {
				t.Fatal(err)
			}
			if tt.lost != "" || tt.gone {
				if err := cachetest.Commit(t.Context(), d, img); err != nil {
					t.Fatal(err)
				}
			}
			checkAll(t, d, images)
		})
	}
}

func mapsEqual(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

// copyImage puts an image into a closed store without that its index knows.
func copyImage(t testing.TB, dir string, img cachetest.Image) {
	t.Helper()
	other := filepath.Join(t.TempDir(), "other")
	d := open(t, other, cache.Options{})
	if err := cachetest.Commit(t.Context(), d, img); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	if err := os.MkdirAll(filepath.Dir(blobPath(dir, img)), 0o750); err != nil {
		t.Fatal(err)
	}
	write(t, blobPath(dir, img), read(t, blobPath(other, img)))
	write(t, sidecarPath(dir, img), read(t, sidecarPath(other, img)))
}

func TestCheckOfWhatCantBeChecked(t *testing.T) {
	ctx := t.Context()
	if _, err := cache.Check(ctx, filepath.Join(t.TempDir(), "none"), cache.Options{}, cache.CheckOptions{}); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("no directory: %v, want ErrNotFound", err)
	}
	if _, err := cache.Check(ctx, t.TempDir(), cache.Options{}, cache.CheckOptions{Repair: true}); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("no store: %v, want ErrNotFound", err)
	}
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	if _, err := cache.Check(ctx, dir, cache.Options{}, cache.CheckOptions{}); err == nil || !strings.Contains(err.Error(), "has it open") {
		t.Errorf("a store that is open: %v", err)
	}
	closeStore(t, d)
	write(t, filepath.Join(dir, "VERSION"), []byte("2\n"))
	if _, err := cache.Check(ctx, dir, cache.Options{}, cache.CheckOptions{Repair: true}); err == nil || !strings.Contains(err.Error(), "newer acproxy") {
		t.Errorf("a store of a newer version: %v", err)
	}
	write(t, filepath.Join(dir, "VERSION"), []byte("1\n"))
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := cache.Check(ctx, dir, cache.Options{}, cache.CheckOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
	closeStore(t, open(t, dir, cache.Options{}))
}

// TestCheckAfterAKill wants no problems in what a kill leaves.
func TestCheckAfterAKill(t *testing.T) {
	dir, images := t.TempDir(), library()[:6]
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	p, err := d.Begin(t.Context(), cache.Arrival{Key: "a", Size: 100})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "killed")
	copyStore(t, dir, killed)
	// On its way in, and on its way out.
	in, out := cachetest.NewImage("example.com/in", "1", 500), cachetest.NewImage("example.com/out", "1", 500)
	copyImage(t, killed, in)
	copyImage(t, killed, out)
	remove(t, blobPath(killed, out))
	got, f, _ := check(t, killed, false)
	if problems, notes := f.codes(); problems != "" || notes != "leftover not-indexed partial" {
		t.Errorf("found: %s, noted: %s: %+v", problems, notes, f.all)
	}
	if got.Problems != 0 || got.Notes != 3 || got.Images != int64(len(images))+1 {
		t.Errorf("Check = %+v", got)
	}
	closeStore(t, d)
	d = open(t, killed, cache.Options{})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkAll(t, d, append(images, in))
}

// TestCheckOfAStoreThatIsBeingMade wants no problems in what a kill leaves of the first start, which makes one thing after the other. Where there is an
// image, it was no first start.
func TestCheckOfAStoreThatIsBeingMade(t *testing.T) {
	dir := t.TempDir()
	for _, next := range []string{"blobs", "names", "partial", "quarantine", "VERSION"} {
		path := filepath.Join(dir, next)
		if next == "VERSION" {
			write(t, path, []byte("1\n"))
		} else if err := os.Mkdir(path, 0o750); err != nil {
			t.Fatal(err)
		}
		for _, repair := range []bool{false, true} {
			got, f, _ := check(t, dir, repair)
			if problems, notes := f.codes(); problems != "" || !strings.Contains(notes, cache.CodeIndexMissing) || got.Repaired+got.Left != 0 {
				t.Errorf("with no more than %s: found: %s, noted: %s: %+v", next, problems, notes, got)
			}
		}
	}
	copyImage(t, dir, cachetest.NewImage("example.com/app", "1", 500))
	remove(t, filepath.Join(dir, "VERSION"))
	_, f, _ := check(t, dir, false)
	if problems, _ := f.codes(); problems != "index-missing version" {
		t.Errorf("with an image: found: %s", problems)
	}
	closeStore(t, open(t, dir, cache.Options{}))
	if got, f, _ := check(t, dir, false); got.Problems != 0 {
		t.Errorf("after a start: %+v", f.all)
	}
}

// sealedRow is a value as the index stores it, with a checksum of bucket, key and value.
func sealedRow(bucket string, key []byte, value ...byte) []byte {
	sum := crc32.Update(0, crc32.MakeTable(crc32.Castagnoli), slices.Concat([]byte(bucket), key, value))
	return append(binary.NativeEndian.AppendUint32(nil, sum), value...)
}

// TestBytesOfALostImageThatAreThere: bytes that somebody brings back are an image again, if they are its own.
func TestBytesOfALostImageThatAreThere(t *testing.T) {
	repairs := map[string]func(t *testing.T, dir string){
		"fsck": func(t *testing.T, dir string) {
			if got, found, _ := check(t, dir, true); got.Problems != 1 || got.Repaired != 1 || found.all[0].Code != cache.CodeFound {
				t.Errorf("Check = %+v, found %+v", got, found.all)
			}
		},
		"scrub": func(t *testing.T, dir string) {
			d := open(t, dir, cache.Options{Idle: true})
			defer closeStore(t, d)
			var f found
			if got, err := d.Scrub(t.Context(), cache.ScrubOptions{Found: f.note}); err != nil || got.Problems != 1 || f.all[0].Code != cache.CodeFound {
				t.Errorf("Scrub = %+v, %v, found %+v", got, err, f.all)
			}
		},
	}
	img := cachetest.NewImage("example.com/app", "1", 3000)
	wrong := slices.Clone(img.Blob)
	wrong[7] ^= 1
	for name, repair := range repairs {
		for _, tt := range []struct {
			name  string
			bytes []byte
			whole bool
		}{{"its own", img.Blob, true}, {"others", wrong, false}, {"too few", img.Blob[:9], false}} {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				dir := t.TempDir()
				d := open(t, dir, cache.Options{})
				if err := errors.Join(cachetest.Commit(t.Context(), d, img), d.Ready(t.Context())); err != nil {
					t.Fatal(err)
				}
				path := blobPath(dir, img)
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
					t.Fatalf("OpenBlob = %v", err)
				}
				closeStore(t, d)
				write(t, path, tt.bytes)
				repair(t, dir)
				d = open(t, dir, cache.Options{})
				if err := d.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				if rec, err := d.Record(img.Record.Digest); err != nil || rec.Lost() == tt.whole {
					t.Errorf("Record = %+v, %v", rec, err)
				}
				if err := cachetest.Check(t.Context(), d, img); (err == nil) != tt.whole {
					t.Errorf("holding it: %v", err)
				}
				if aside := len(names(t, dir, "quarantine")) > 0; aside == tt.whole {
					t.Errorf("something was set aside: %t", aside)
				}
				booked(t, d, dir, tt.name)
			})
		}
	}
}
