package cache_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
	"github.com/acproxy/acproxy/internal/testtools"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testLog shows what a store says when a test fails.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func open(t testing.TB, dir string, opts cache.Options) *cache.Disk {
	t.Helper()
	if opts.Log == nil {
		opts.Log = testLog(t)
	}
	d, err := cache.Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return d
}

// openQuiet is open of a store that does nothing by itself any more once it is returned: its index is complete, and the table of refs is written. It is for tests
// that count its files, or have its next call fail.
func openQuiet(t testing.TB, dir string, opts cache.Options) *cache.Disk {
	t.Helper()
	d := open(t, dir, opts)
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for !d.KeptRefs() {
		if t.Context().Err() != nil {
			t.Fatal("the table of refs is not written")
		}
		time.Sleep(time.Millisecond)
	}
	return d
}

func TestConformance(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cache.Store { return open(t, t.TempDir(), cache.Options{}) })
}

// library is a store's content with a bit of everything.
func library() []cachetest.Image {
	var images []cachetest.Image
	for i := range 40 {
		img := cachetest.NewImage(fmt.Sprintf("example.com/app%d", i/4), fmt.Sprintf("1.%d", i), 100+i)
		// The next one takes the ref without a version away.
		if i%4 != 3 {
			img.Refs = img.Refs[:1]
		}
		images = append(images, img)
	}
	// Enough to need several pages, and pages that overflow.
	images[0].Manifest = append(images[0].Manifest, bytes.Repeat([]byte(" "), 20_000)...)
	return images
}

var when = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

var known = cache.Discovered{
	Name: "example.com/app0", When: when, Page: "https://example.com/app0?ac-discovery=1",
	Templates: []cache.Template{{Prefix: "example.com", URL: "https://storage.example.net/{name}-{version}.{ext}"}},
}

func fill(t testing.TB, d *cache.Disk, images []cachetest.Image) {
	t.Helper()
	var wg sync.WaitGroup
	for _, img := range images {
		wg.Go(func() {
			if err := cachetest.Commit(t.Context(), d, img); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, img := range images {
		for _, r := range img.Refs {
			r.Digest = img.Record.Digest
			if err := d.Point(t.Context(), r); err != nil {
				t.Error(err)
			}
		}
	}
	if err := d.Learn(known); err != nil {
		t.Error(err)
	}
}

// checkAll fails the test if the store doesn't hold exactly these images, found in every way.
func checkAll(t testing.TB, d *cache.Disk, images []cachetest.Image) {
	t.Helper()
	for _, img := range images {
		if err := cachetest.Check(t.Context(), d, img); err != nil {
			t.Errorf("%s %s: %v", img.Record.Name, img.Record.Labels["version"], err)
		}
	}
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, img := range images {
		if got, ok := d.BySignature(img.Record.SignatureDigest); ok == img.Record.Quarantined() || ok && got != img.Record.Digest {
			t.Errorf("BySignature = %v, %v", got, ok)
		}
		if got, err := d.ByImageID(img.Record.ImageID.String()[7:]); len(got) != 1 || err != nil {
			t.Errorf("ByImageID = %d records, %v", len(got), err)
		}
	}
	got, next, err := d.Images(cache.Filter{}, "", 0)
	if len(got) != len(images) || next != "" || err != nil {
		t.Errorf("Images = %d records, next %q, %v, want %d", len(got), next, err, len(images))
	}
	if k, ok := d.Known(known.Name); !ok || !reflect.DeepEqual(k, known) {
		t.Errorf("Known = %+v, %v", k, ok)
	}
	if ks := d.KnownUnderHost("storage.example.net"); len(ks) != 1 {
		t.Errorf("KnownUnderHost = %v", ks)
	}
}

// names returns the names in a directory of a store.
func names(t testing.TB, dir ...string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir...))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func closeStore(t testing.TB, d *cache.Disk) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o640); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReopenedStoreHoldsTheSame(t *testing.T) {
	dir, images := t.TempDir(), library()
	later := when.Add(time.Hour)
	var late atomic.Bool
	now := func() time.Time {
		if late.Load() {
			return later
		}
		return when
	}
	d := open(t, dir, cache.Options{Now: now})
	fill(t, d, images)
	late.Store(true)
	d.Touch(images[5].Record.Digest)
	refused := cache.Refused{Ref: cachetest.MustRef("example.com/x"), When: when, Code: "unknown-key", Detail: "key abcd is not trusted"}
	if err := d.Refuse(refused); err != nil {
		t.Fatal(err)
	}
	if err := d.Quarantine(t.Context(), images[7].Record.Digest, "tar", "two manifests"); err != nil {
		t.Fatal(err)
	}
	images[7].Record.State, images[7].Record.Code, images[7].Record.Reason = cache.Quarantined, "tar", "two manifests"
	closeStore(t, d)
	if err := d.Close(); err != nil {
		t.Errorf("the second Close = %v", err)
	}

	d = open(t, dir, cache.Options{Now: now})
	checkAll(t, d, images)
	if rec, err := d.Record(images[5].Record.Digest); err != nil || !rec.Used.Equal(later) {
		t.Errorf("Used = %v, %v, want %v", rec.Used, err, later)
	}
	if got, err := d.Refusals(); err != nil || len(got) != 1 || !reflect.DeepEqual(got[0], refused) {
		t.Errorf("Refusals = %v, %v", got, err)
	}
	if left := names(t, dir, "quarantine"); len(left) != 0 {
		t.Errorf("the quarantine directory holds %v", left)
	}
}

func TestClosedStoreSaysSo(t *testing.T) {
	d := open(t, t.TempDir(), cache.Options{})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	img := cachetest.NewImage("example.com/app", "1", 10)
	p, err := d.Begin(t.Context(), cache.Arrival{})
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	if _, err := p.Write(img.Blob); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(t.Context(), img.Record, img.Manifest, img.Signature); err == nil {
		t.Error("Commit succeeded")
	}
	if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); err == nil || errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Resolve = %v, want an error that doesn't say that it is not held", err)
	}
	if _, err := d.Begin(t.Context(), cache.Arrival{}); err == nil {
		t.Error("Begin succeeded")
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, cache.Options{})
	_, err := cache.Open(dir, cache.Options{})
	if want := fmt.Sprintf("process %d has it open", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Open = %v, want an error with %q", err, want)
	}
}

func TestVersions(t *testing.T) {
	for _, tt := range []struct{ name, content, want string }{
		{"a newer one is refused", "2\n", "newer acproxy"},
		{"nonsense is refused", "latest\n", "not the version"},
		{"nothing is refused", "", "not the version"},
		{"ours is opened", "1\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			closeStore(t, open(t, dir, cache.Options{}))
			write(t, filepath.Join(dir, "VERSION"), []byte(tt.content))
			d, err := cache.Open(dir, cache.Options{Log: testLog(t)})
			if err == nil {
				closeStore(t, d)
			}
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("Open = %v, want %q", err, tt.want)
			}
		})
	}
}

// TestVersionThatCantBeRead keeps nobody from what is held.
func TestVersionThatCantBeRead(t *testing.T) {
	dir, images := t.TempDir(), library()[:3]
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	closeStore(t, d)
	path := filepath.Join(dir, "VERSION")
	remove(t, path)
	if err := os.Symlink(path, path); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, cache.Options{})
	checkAll(t, d, images)
	closeStore(t, d)
	if got := string(read(t, path)); got != "1\n" {
		t.Errorf("VERSION holds %q", got)
	}
	if left := names(t, dir, "quarantine"); len(left) != 2 || !strings.HasPrefix(left[0], "VERSION-") {
		t.Errorf("the quarantine directory holds %v", left)
	}
}

// TestPartialsOfTheLastTime starts a store again in which something was arriving when its process ended.
func TestPartialsOfTheLastTime(t *testing.T) {
	arrival := cache.Arrival{Key: "a", Ref: cachetest.MustRef("example.com/app:1"), Source: "https://example.com/app.aci", Size: 10, Began: when}
	for _, tt := range []struct {
		name    string
		arrival cache.Arrival
		written string
		spoil   func(t *testing.T, partial string) // nil leaves it as it is
		after   time.Duration                      // until the next start
		kept    bool
	}{
		{name: "half of an image is kept", arrival: arrival, written: "some", kept: true},
		{name: "so is all of it", arrival: arrival, written: "0123456789", kept: true},
		{name: "one of unknown size is kept", arrival: cache.Arrival{Key: "a", Size: -1}, written: "some", kept: true},
		{name: "more than there is to an image is not", arrival: arrival, written: "0123456789a"},
		{name: "nor what has no key", arrival: cache.Arrival{Size: 10}, written: "some"},
		{name: "nor what is empty", arrival: arrival},
		{name: "one whose note is missing is removed", arrival: arrival, written: "some", spoil: func(t *testing.T, partial string) {
			if err := os.Remove(partial + ".json"); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "one whose note was damaged is removed", arrival: arrival, written: "some", spoil: func(t *testing.T, partial string) {
			note := read(t, partial+".json")
			write(t, partial+".json", bytes.Replace(note, []byte("example"), []byte("exbmple"), 1))
		}},
		{name: "a note without a file is removed", arrival: arrival, written: "some", spoil: func(t *testing.T, partial string) {
			if err := os.Remove(partial); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "what is a day old is removed", arrival: arrival, written: "some", after: cache.DefaultKeepPartials},
		{name: "what is a second younger is kept", arrival: arrival, written: "some", after: cache.DefaultKeepPartials - time.Second, kept: true},
	} {
		for _, suspend := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, suspended %v", tt.name, suspend), func(t *testing.T) {
				dir := t.TempDir()
				d := openQuiet(t, dir, cache.Options{})
				p, err := d.Begin(t.Context(), tt.arrival)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := p.Write([]byte(tt.written)); err != nil {
					t.Fatal(err)
				}
				before := names(t, dir, "partial")
				if suspend {
					if err := p.Suspend(); err != nil {
						t.Fatal(err)
					}
				}
				closeStore(t, d)
				if suspend && len(names(t, dir, "partial")) == 0 && !tt.kept {
					return
				}
				if tt.spoil != nil {
					tt.spoil(t, filepath.Join(dir, "partial", before[0]))
				}
				fi, err := os.Stat(filepath.Join(dir, "partial", names(t, dir, "partial")[0]))
				if err != nil {
					t.Fatal(err)
				}
				again := openQuiet(t, dir, cache.Options{Now: func() time.Time { return fi.ModTime().Add(tt.after) }})
				p, err = again.Resume(t.Context(), "a")
				if !tt.kept {
					if !errors.Is(err, acproxy.ErrNotFound) {
						t.Errorf("Resume = %v, want ErrNotFound", err)
					}
					if left := names(t, dir, "partial"); len(left) != 0 {
						t.Errorf("left: %v", left)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if p.Size() != int64(len(tt.written)) || !reflect.DeepEqual(p.Arrival(), tt.arrival) {
					t.Errorf("resumed %d bytes of %+v", p.Size(), p.Arrival())
				}
				f, err := p.Open()
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if b, err := io.ReadAll(f); string(b) != tt.written || err != nil {
					t.Errorf("resumed %q, %v", b, err)
				}
				if err := p.Discard(); err != nil {
					t.Fatal(err)
				}
				if left := names(t, dir, "partial"); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}

func TestPartialsNobodyAsksForGo(t *testing.T) {
	dir := t.TempDir()
	var clock atomic.Int64
	d := openQuiet(t, dir, cache.Options{Now: func() time.Time { return when.Add(time.Duration(clock.Load())) }, FlushEvery: time.Millisecond, KeepPartials: time.Hour})
	p, err := d.Begin(t.Context(), cache.Arrival{Key: "a", Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(); err != nil {
		t.Fatal(err)
	}
	// The file and its note.
	if u, err := d.Usage(); u.Partials != 2*4096 || err != nil {
		t.Errorf("Usage counts %d bytes of partials, %v", u.Partials, err)
	}
	clock.Store(int64(time.Hour))
	// Bytes count until they are gone.
	for u := (cache.Usage{Partials: 1}); u.Partials > 0; runtime.Gosched() {
		var err error
		if u, err = d.Usage(); err != nil || t.Context().Err() != nil {
			t.Fatalf("Usage counts %d bytes of partials, %v", u.Partials, err)
		}
	}
	if left := names(t, dir, "partial"); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

func TestNoPartialsAreKept(t *testing.T) {
	dir := t.TempDir()
	d := openQuiet(t, dir, cache.Options{KeepPartials: -1})
	p, err := d.Begin(t.Context(), cache.Arrival{Key: "a", Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(); err != nil {
		t.Fatal(err)
	}
	if left := names(t, dir, "partial"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestPartialsOfTheLastTimeAreRemoved(t *testing.T) {
	dir := t.TempDir()
	d := openQuiet(t, dir, cache.Options{})
	p, err := d.Begin(t.Context(), cache.Arrival{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write([]byte("some")); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	if left := names(t, dir, "partial"); len(left) != 1 {
		t.Fatalf("before: %v, want one file", left)
	}
	closeStore(t, openQuiet(t, dir, cache.Options{}))
	if left := names(t, dir, "partial"); len(left) != 0 {
		t.Errorf("after: %v", left)
	}
}

func TestListing(t *testing.T) {
	d := open(t, t.TempDir(), cache.Options{})
	for _, s := range []string{"example.com/b 2", "example.com/b 1", "example.com/apple 1", "example.com/app 1", "example.com/app/web 1", "a.org/x 1"} {
		name, version, _ := strings.Cut(s, " ")
		size := 10
		switch name {
		case "example.com/b":
			size = 300
		case "example.com/app":
			size = 20
		}
		if err := cachetest.Commit(t.Context(), d, cachetest.NewImage(name, version, size)); err != nil {
			t.Fatal(err)
		}
	}
	bad := cachetest.NewImage("example.com/apple", "1", 10)
	if err := d.Quarantine(t.Context(), bad.Record.Digest, "tar", "x"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		filter cache.Filter
		want   string
	}{
		{"all", cache.Filter{}, "a.org/x:1 example.com/app:1 example.com/app/web:1 example.com/apple:1 example.com/b:1 example.com/b:2"},
		{"under a prefix", cache.Filter{Prefix: "example.com/app"}, "example.com/app:1 example.com/app/web:1"},
		{"under a prefix with a slash", cache.Filter{Prefix: "example.com/"}, "example.com/app:1 example.com/app/web:1 example.com/apple:1 example.com/b:1 example.com/b:2"},
		{"quarantined", cache.Filter{State: cache.Quarantined}, "example.com/apple:1"},
		{"good ones", cache.Filter{State: cache.OK, Prefix: "example.com"}, "example.com/app:1 example.com/app/web:1 example.com/b:1 example.com/b:2"},
		{"none", cache.Filter{Prefix: "example.org"}, ""},
		{"part of a name", cache.Filter{Contains: "PPLE"}, "example.com/apple:1"},
		{"part of a name and version", cache.Filter{Contains: "b:2"}, "example.com/b:2"},
		{"by name, the last first", cache.Filter{Reverse: true}, "example.com/b:2 example.com/b:1 example.com/apple:1 example.com/app/web:1 example.com/app:1 a.org/x:1"},
		{"by size", cache.Filter{Sort: cache.BySize, Prefix: "example.com"}, "example.com/app/web:1 example.com/apple:1 example.com/app:1 example.com/b:1 example.com/b:2"},
		{"by size, the largest first", cache.Filter{Sort: cache.BySize, Reverse: true, Prefix: "example.com"}, "example.com/b:2 example.com/b:1 example.com/app:1 example.com/apple:1 example.com/app/web:1"},
		{"the latest first", cache.Filter{Sort: cache.ByFetched, Reverse: true, State: cache.Quarantined}, "example.com/apple:1"},
	} {
		for limit := range 4 {
			t.Run(fmt.Sprintf("%s, %d at once", tt.name, limit), func(t *testing.T) {
				var got []string
				for after, i := "", 0; i == 0 || after != ""; i++ {
					records, next, err := d.Images(tt.filter, after, limit)
					if err != nil || i > 6 {
						t.Fatal(err)
					}
					for _, r := range records {
						got = append(got, r.Name+":"+r.Labels["version"])
					}
					after = next
				}
				if got := strings.Join(got, " "); got != tt.want {
					t.Errorf("Images = %s, want %s", got, tt.want)
				}
			})
		}
	}
	if _, _, err := d.Images(cache.Filter{}, "zz", 1); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("Images after nonsense = %v, want ErrInvalid", err)
	}
	if _, _, err := d.Images(cache.Filter{Sort: "colour"}, "", 1); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("Images by colour = %v, want ErrInvalid", err)
	}
}

func TestUsageAndDelete(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	empty, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if empty.Blobs != 0 || empty.Sidecars != 0 || empty.Images != 0 || empty.Index == 0 {
		t.Errorf("empty: Usage = %+v", empty)
	}
	small, large := cachetest.NewImage("example.com/a", "1", 4096), cachetest.NewImage("example.com/b", "1", 4097)
	fill(t, d, []cachetest.Image{small, large})
	p, err := d.Begin(t.Context(), cache.Arrival{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write(make([]byte, 4097)); err != nil {
		t.Fatal(err)
	}
	if err := d.Quarantine(t.Context(), large.Record.Digest, "tar", "x"); err != nil {
		t.Fatal(err)
	}
	u, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if u.Blobs != 3*4096 || u.Sidecars != 2*4096 || u.Images != 2 || u.Quarantined != 1 || u.Partials != 2*4096 || u.Total() < 7*4096 {
		t.Errorf("Usage = %+v", u)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	f, err := d.OpenBlob(small.Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, img := range []cachetest.Image{small, large, small} {
		if err := d.Delete(t.Context(), img.Record.Digest); err != nil {
			t.Fatal(err)
		}
		if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("Resolve of a deleted image = %v, want ErrNotFound", err)
		}
		if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("OpenBlob of a deleted image = %v, want ErrNotFound", err)
		}
	}
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, small.Blob) {
		t.Errorf("a blob that was open when it was deleted reads %d bytes, %v", len(b), err)
	}
	after, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if after.Open != 4096 {
		t.Errorf("a deleted blob of one block is open: Usage = %+v", after)
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if after, err = d.Usage(); err != nil {
		t.Fatal(err)
	}
	if after.Blobs != 0 || after.Sidecars != 0 || after.Partials != 0 || after.Open != 0 || after.Images != 0 || after.Quarantined != 0 || after.Promised != empty.Promised {
		t.Errorf("after all is deleted: Usage = %+v, want %+v", after, empty)
	}
	for _, shard := range names(t, dir, "blobs") {
		if left := names(t, dir, "blobs", shard); len(left) != 0 {
			t.Errorf("left in blobs/%s: %v", shard, left)
		}
	}
}

// blobPath and sidecarPath are where a store keeps an image.
func blobPath(dir string, img cachetest.Image) string {
	digits := img.Record.Digest.Hex()
	return filepath.Join(dir, "blobs", digits[:2], digits)
}

func sidecarPath(dir string, img cachetest.Image) string { return blobPath(dir, img) + ".json" }

func TestLostBytesAreFetchedAgain(t *testing.T) {
	for _, tt := range []struct {
		name string
		lose func(t *testing.T, path string)
		code string
		kept int // files in the quarantine directory
	}{
		{"the file is gone", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, cache.CodeMissing, 0},
		{"the file is empty", func(t *testing.T, path string) { write(t, path, nil) }, cache.CodeDamaged, 2},
		{"a byte is missing", func(t *testing.T, path string) { write(t, path, read(t, path)[1:]) }, cache.CodeDamaged, 2},
		{"a byte is too many", func(t *testing.T, path string) { write(t, path, append(read(t, path), 'x')) }, cache.CodeDamaged, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir, cache.Options{})
			img := cachetest.NewImage("example.com/app", "1", 100)
			fill(t, d, []cachetest.Image{img})
			tt.lose(t, blobPath(dir, img))
			for range 2 {
				if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
					t.Errorf("OpenBlob = %v, want ErrNotFound", err)
				}
			}
			to, was, err := d.Resolve(t.Context(), img.Refs[0].Ref)
			if !errors.Is(err, acproxy.ErrNotFound) || to.Digest != img.Record.Digest || !was.Lost() || was.ImageID != img.Record.ImageID {
				t.Errorf("Resolve = %+v, %+v, %v, want ErrNotFound and what it was", to, was, err)
			}
			if err := d.Restore(t.Context(), img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("Restore = %v, want ErrNotFound", err)
			}
			rec, err := d.Record(img.Record.Digest)
			if err != nil || !rec.Quarantined() || rec.Code != tt.code {
				t.Errorf("Record = %v %v, %v, want it quarantined as %s", rec.State, rec.Code, err, tt.code)
			}
			if u, err := d.Usage(); err != nil || u.Blobs != 0 {
				t.Errorf("Usage = %+v, %v, want no blobs", u, err)
			}
			if kept := names(t, dir, "quarantine"); len(kept) != tt.kept {
				t.Errorf("the quarantine directory holds %v, want %d files", kept, tt.kept)
			}
			if err := cachetest.Commit(t.Context(), d, img); err != nil {
				t.Fatal(err)
			}
			checkAll(t, d, []cachetest.Image{img})
		})
	}
}

func TestFilesThatDisagreeAtStart(t *testing.T) {
	remove := func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	type outcome int
	const (
		served outcome = iota
		missing
		unknown
	)
	for _, tt := range []struct {
		name          string
		spoil         func(t *testing.T, dir string, img cachetest.Image)
		indexed, lost outcome // with the index, and without it
		set, setLost  int     // files in the quarantine directory, with the index and without it
	}{
		{"nothing is wrong", func(*testing.T, string, cachetest.Image) {}, served, served, 0, 0},
		{"the blob is gone", func(t *testing.T, dir string, img cachetest.Image) { remove(t, blobPath(dir, img)) }, missing, unknown, 0, 2},
		{"the sidecar is gone", func(t *testing.T, dir string, img cachetest.Image) { remove(t, sidecarPath(dir, img)) }, served, unknown, 0, 2},
		{"both are gone", func(t *testing.T, dir string, img cachetest.Image) {
			remove(t, sidecarPath(dir, img))
			remove(t, blobPath(dir, img))
		}, missing, unknown, 0, 0},
		{"the sidecar is cut", func(t *testing.T, dir string, img cachetest.Image) {
			b := read(t, sidecarPath(dir, img))
			write(t, sidecarPath(dir, img), b[:len(b)/2])
		}, served, unknown, 0, 4},
		{"the sidecar has a flipped bit", func(t *testing.T, dir string, img cachetest.Image) {
			b := read(t, sidecarPath(dir, img))
			i := bytes.Index(b, []byte("https://"))
			b[i+9] ^= 1
			write(t, sidecarPath(dir, img), b)
		}, served, unknown, 0, 4},
		{"the sidecar is another image's", func(t *testing.T, dir string, img cachetest.Image) {
			write(t, sidecarPath(dir, img), read(t, sidecarPath(dir, library()[1])))
		}, served, unknown, 0, 4},
		{"strange files lie about", func(t *testing.T, dir string, img cachetest.Image) {
			write(t, filepath.Join(filepath.Dir(blobPath(dir, img)), "notes.txt"), []byte("?"))
			write(t, filepath.Join(dir, "names", "x.json"), []byte("{}"))
		}, served, served, 4, 4},
	} {
		for _, lost := range []bool{false, true} {
			name, want, set := tt.name+", with the index", tt.indexed, tt.set
			if lost {
				name, want, set = tt.name+", without the index", tt.lost, tt.setLost
			}
			t.Run(name, func(t *testing.T) {
				dir, images := t.TempDir(), library()[:6]
				d := open(t, dir, cache.Options{})
				fill(t, d, images)
				if err := d.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				killed := filepath.Join(t.TempDir(), "killed")
				copyStore(t, dir, killed)
				img := images[2]
				tt.spoil(t, killed, img)
				if lost {
					remove(t, filepath.Join(killed, "index.db"))
				}
				d = open(t, killed, cache.Options{})
				if err := d.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				rec, err := d.Record(img.Record.Digest)
				switch want {
				case served:
					checkAll(t, d, images)
				case missing:
					if err != nil || rec.Code != cache.CodeMissing {
						t.Errorf("Record = %v %v, %v, want it quarantined as missing", rec.State, rec.Code, err)
					}
				case unknown:
					if !errors.Is(err, acproxy.ErrNotFound) {
						t.Errorf("Record = %v, %v, want ErrNotFound", rec, err)
					}
				}
				if want != served {
					if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
						t.Errorf("Resolve = %v, want ErrNotFound", err)
					}
				}
				// A sidecar that only the index could replace is there again, and readable.
				if want == served && len(read(t, sidecarPath(killed, img))) == 0 {
					t.Error("the sidecar is empty")
				}
				if got := names(t, killed, "quarantine"); lost && len(got) != set {
					t.Errorf("the quarantine directory holds %v, want %d files", got, set)
				}
				if err := cachetest.Commit(t.Context(), d, img); err != nil {
					t.Fatal(err)
				}
				checkAll(t, d, images)
			})
		}
	}
}

// copyStore copies a store as a kill would leave it.
func copyStore(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func TestBrokenIndexLosesNothing(t *testing.T) {
	dir, images := t.TempDir(), library()
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	if err := d.Quarantine(t.Context(), images[9].Record.Digest, "tar", "x"); err != nil {
		t.Fatal(err)
	}
	images[9].Record.State, images[9].Record.Code, images[9].Record.Reason = cache.Quarantined, "tar", "x"
	closeStore(t, d)
	index := filepath.Join(dir, "index.db")
	whole := read(t, index)
	t.Logf("the index has %d pages", len(whole)/4096)

	try := func(name string, broken []byte) {
		t.Run(name, func(t *testing.T) {
			if broken == nil {
				if err := os.Remove(index); err != nil {
					t.Fatal(err)
				}
			} else {
				write(t, index, broken)
			}
			d := open(t, dir, cache.Options{})
			checkAll(t, d, images)
			closeStore(t, d)
			// It was either good, or it is now.
			d = open(t, dir, cache.Options{})
			checkAll(t, d, images)
			closeStore(t, d)
			if left := names(t, dir, "quarantine"); len(left) != 0 {
				t.Errorf("the quarantine directory holds %v", left)
			}
			for _, name := range names(t, dir) {
				if strings.HasPrefix(name, "index.db.broken-") {
					if err := os.Remove(filepath.Join(dir, name)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	try("it is missing", nil)
	try("it is empty", []byte{})
	for _, size := range []int{1, 79, 80, 4095, 4096, 4176, 8192, 16384, len(whole) / 2, len(whole) - 4096, len(whole) - 1} {
		try(fmt.Sprintf("it is cut at %d", size), whole[:size])
	}
	random := rand.New(rand.NewPCG(1, 2))
	garbage := make([]byte, len(whole))
	for i := range garbage {
		garbage[i] = byte(random.Uint32())
	}
	try("it is garbage", garbage)
	try("it is garbage but for the meta pages", append(bytes.Clone(whole[:8192]), garbage[8192:]...))
	try("it is zeros but for the meta pages", append(bytes.Clone(whole[:8192]), make([]byte, len(whole)-8192)...))
	flips := 24
	if testtools.Brief() {
		flips = 6
	}
	for range flips {
		broken := bytes.Clone(whole)
		bit := random.IntN(8 * len(broken))
		broken[bit/8] ^= 1 << (bit % 8)
		try(fmt.Sprintf("bit %d is flipped", bit), broken)
	}
	// The heads of pages are where a flip does most.
	for page := range min(len(whole)/4096, flips) {
		broken := bytes.Clone(whole)
		bit := random.IntN(8 * 48)
		broken[page*4096+bit/8] ^= 1 << (bit % 8)
		try(fmt.Sprintf("bit %d of page %d is flipped", bit, page), broken)
	}
	for range flips / 6 {
		broken := bytes.Clone(whole)
		from, to := 2+random.IntN(len(whole)/4096-2), 2+random.IntN(len(whole)/4096-2)
		copy(broken[to*4096:(to+1)*4096], whole[from*4096:(from+1)*4096])
		try(fmt.Sprintf("page %d is at the place of %d", from, to), broken)
	}
}

func TestIndexThatBreaksInUseLosesNothing(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, f *os.File, size int64)
	}{
		{"overwritten", func(t *testing.T, f *os.File, size int64) {
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(size)-8192), 8192); err != nil {
				t.Fatal(err)
			}
		}},
		{"zeroed", func(t *testing.T, f *os.File, size int64) {
			if _, err := f.WriteAt(make([]byte, int(size)-8192), 8192); err != nil {
				t.Fatal(err)
			}
		}},
		{"cut to its meta pages", func(t *testing.T, f *os.File, _ int64) {
			if err := f.Truncate(8192); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, images := t.TempDir(), library()
			d := open(t, dir, cache.Options{})
			fill(t, d, images[:20])
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(filepath.Join(dir, "index.db"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fi, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, f, fi.Size())
			var wg sync.WaitGroup
			for _, img := range images[:20] {
				wg.Go(func() {
					if err := cachetest.Check(t.Context(), d, img); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Go(func() { fill(t, d, images[20:]) })
			wg.Wait()
			checkAll(t, d, images)
			closeStore(t, d)
			d = open(t, dir, cache.Options{})
			checkAll(t, d, images)
		})
	}
}

func TestRebuildBesideChanges(t *testing.T) {
	dir, images := t.TempDir(), library()
	d := open(t, dir, cache.Options{})
	fill(t, d, images[:30])
	closeStore(t, d)
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir, cache.Options{})
	var wg sync.WaitGroup
	wg.Go(func() { fill(t, d, images[30:]) })
	for i, img := range images[:30] {
		wg.Go(func() {
			switch i % 3 {
			case 0:
				if err := d.Delete(t.Context(), img.Record.Digest); err != nil {
					t.Error(err)
				}
			case 1:
				err := d.Update(t.Context(), img.Record.Digest, func(r *cache.Record) error {
					r.Pinned = true
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			case 2:
				if err := cachetest.Commit(t.Context(), d, img); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	var want []cachetest.Image
	for i, img := range images {
		if i < 30 && i%3 == 0 {
			if rec, err := d.Record(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("a deleted image is there again: %+v, %v", rec, err)
			}
			continue
		}
		img.Record.Pinned = i < 30 && i%3 == 1
		img.Refs = img.Refs[:1]
		want = append(want, img)
	}
	checkAll(t, d, want)
	closeStore(t, d)
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	checkAll(t, open(t, dir, cache.Options{}), want)
}

func TestDeletedAnswerDoesNotBringBackAnEarlierOne(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	old, next := cachetest.NewImage("example.com/app", "1", 10), cachetest.NewImage("example.com/app", "2", 20)
	for _, img := range []cachetest.Image{old, next} {
		if err := cachetest.Commit(t.Context(), d, img); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Delete(t.Context(), next.Record.Digest); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	for _, lost := range []bool{false, true} {
		if lost {
			if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
				t.Fatal(err)
			}
		}
		d = open(t, dir, cache.Options{})
		if r, _, err := d.Resolve(t.Context(), cachetest.MustRef("example.com/app")); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("index lost %v: Resolve = %v, %v, want ErrNotFound", lost, r, err)
		}
		closeStore(t, d)
	}
}

func TestFullDiskHasItsOwnError(t *testing.T) {
	for _, tt := range []struct {
		errno syscall.Errno
		code  string
	}{{syscall.ENOSPC, "disk-full"}, {syscall.EDQUOT, "disk-full"}, {syscall.EROFS, "store-read-only"}} {
		t.Run(tt.errno.Error(), func(t *testing.T) { commitsThatFail(t, tt.errno, tt.code) })
	}
}

// commitsThatFail makes each call of a commit fail in turn.
func commitsThatFail(t *testing.T, errno syscall.Errno, code string) {
	dir := t.TempDir()
	fsys, err := durabletest.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	d := openQuiet(t, dir, cache.Options{FS: fsys})
	img := cachetest.NewImage("example.com/app", "1", 10)
	var calls []string
	for range 2 { // the first time it makes a directory too
		fsys.Break(0, durabletest.Fail, nil)
		if err := cachetest.Commit(t.Context(), d, img); err != nil {
			t.Fatal(err)
		}
		calls = fsys.Calls()
		if err := d.Delete(t.Context(), img.Record.Digest); err != nil {
			t.Fatal(err)
		}
	}
	for at, call := range calls {
		fsys.Break(at+1, durabletest.Fail, errno)
		err := cachetest.Commit(t.Context(), d, img)
		if strings.HasPrefix(call, "open") {
			continue
		}
		if !errors.Is(err, acproxy.ErrNoSpace) || acproxy.Code(err) != code {
			t.Errorf("%s fails: Commit = %v with code %q, want ErrNoSpace with %q", call, err, acproxy.Code(err), code)
		}
		if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("%s fails: Resolve = %v, want ErrNotFound", call, err)
		}
		if u, err := d.Usage(); err != nil || u.Images != 0 || u.Partials != 0 {
			t.Errorf("%s fails: Usage = %+v, %v", call, u, err)
		}
		if left := names(t, dir, "partial"); len(left) != 0 {
			t.Errorf("%s fails: %v is left", call, left)
		}
		for _, path := range []string{blobPath(dir, img), sidecarPath(dir, img)} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s fails: %s is left: %v", call, path, err)
			}
		}
	}
}

// TestTroubleInResumingSaysWhy has the file of what has arrived not open. If that says nothing about the file, it can be had later.
func TestTroubleInResumingSaysWhy(t *testing.T) {
	for _, tt := range []struct {
		errno syscall.Errno
		kind  error // the other error's
		kept  bool
	}{{syscall.EROFS, acproxy.ErrNoSpace, true}, {syscall.EMFILE, nil, true}, {syscall.ENOMEM, nil, true}, {syscall.EIO, nil, false}} {
		t.Run(tt.errno.Error(), func(t *testing.T) {
			dir := t.TempDir()
			fsys, err := durabletest.New(dir)
			if err != nil {
				t.Fatal(err)
			}
			d := openQuiet(t, dir, cache.Options{FS: fsys})
			p, err := d.Begin(t.Context(), cache.Arrival{Key: "a", Size: 10})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Write([]byte("half ")); err != nil {
				t.Fatal(err)
			}
			if err := p.Suspend(); err != nil {
				t.Fatal(err)
			}
			before, err := d.Usage()
			if err != nil {
				t.Fatal(err)
			}
			fsys.Break(1, durabletest.Fail, tt.errno)
			if _, err := d.Resume(t.Context(), "a"); !errors.Is(err, tt.errno) || acproxy.KindOf(err) != tt.kind {
				t.Errorf("Resume = %v of kind %v, want %v of kind %v", err, acproxy.KindOf(err), tt.errno, tt.kind)
			}
			p, err = d.Resume(t.Context(), "a")
			if !tt.kept {
				if left := names(t, dir, "partial"); !errors.Is(err, acproxy.ErrNotFound) || len(left) != 0 {
					t.Errorf("Resume = %v, and left are %v", err, left)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Suspend(); err != nil {
				t.Fatal(err)
			}
			if after, err := d.Usage(); err != nil || after.Partials != before.Partials || after.Promised != before.Promised {
				t.Errorf("Usage = %+v, %v, and was %+v", after, err, before)
			}
		})
	}
}

// TestLossThatCantBeNotedIsALoss has a blob be gone, and the store not be able to note that: the image counts as lost all the same, so that it is fetched again.
func TestLossThatCantBeNotedIsALoss(t *testing.T) {
	for _, spoil := range []struct {
		name string
		do   func(path string) error
	}{{"missing", os.Remove}, {"cut", func(path string) error { return os.Truncate(path, 3) }}} {
		t.Run(spoil.name, func(t *testing.T) {
			dir := t.TempDir()
			fsys, err := durabletest.New(dir)
			if err != nil {
				t.Fatal(err)
			}
			img := cachetest.NewImage("example.com/app", "1", 100)
			d := openQuiet(t, dir, cache.Options{FS: fsys})
			fill(t, d, []cachetest.Image{img})
			if err := spoil.do(blobPath(dir, img)); err != nil {
				t.Fatal(err)
			}
			fsys.Break(1, durabletest.Fail, syscall.ENOSPC)
			if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("OpenBlob = %v, want ErrNotFound", err)
			}
			if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("OpenBlob = %v, want ErrNotFound", err)
			}
			if _, _, err := d.Resolve(t.Context(), img.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("Resolve = %v, want ErrNotFound", err)
			}
		})
	}
}

// TestFullDiskKeepsNoStoreClosed has the lock be a file that takes not a byte: the number of the process is for people only.
func TestFullDiskKeepsNoStoreClosed(t *testing.T) {
	const full = "/dev/full"
	if _, err := os.Stat(full); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(full, filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	d := open(t, dir, cache.Options{})
	fill(t, d, library())
	checkAll(t, d, library())
}

func TestCorruptedCommitHealsOldBytes(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	img := cachetest.NewImage("example.com/app", "1", 100)
	fill(t, d, []cachetest.Image{img})
	rotten := bytes.Clone(img.Blob)
	rotten[50] ^= 1
	write(t, blobPath(dir, img), rotten)
	if err := cachetest.Commit(t.Context(), d, img); err != nil {
		t.Fatal(err)
	}
	checkAll(t, d, []cachetest.Image{img})
}

// syncFails is a file system on which the first sync of each partial file fails, and no other: the operating system says such a thing once.
type syncFails struct{ durable.FS }

type syncFailsOnce struct {
	durable.File
	failed atomic.Bool
}

func (fsys syncFails) Create(name string, perm fs.FileMode) (durable.File, error) {
	f, err := fsys.FS.Create(name, perm)
	if err != nil || filepath.Ext(name) != ".aci" {
		return f, err
	}
	return &syncFailsOnce{File: f}, nil
}

func (f *syncFailsOnce) Sync() error {
	if !f.failed.Swap(true) {
		return syscall.EIO
	}
	return f.File.Sync()
}

// TestSyncBesideTheWriting has the sync fail that goes on while an image is written. The one at the end succeeds, and the bytes may not be on the disk all
// the same.
func TestSyncBesideTheWriting(t *testing.T) {
	for _, more := range []int{0, 1} {
		dir := t.TempDir()
		d := open(t, dir, cache.Options{FS: syncFails{durable.OS{}}})
		p, err := d.Begin(t.Context(), cache.Arrival{Size: -1})
		if err != nil {
			t.Fatal(err)
		}
		img := cachetest.NewImage("example.com/app", "1", 32<<20+more)
		for b := range slices.Chunk(img.Blob, 1<<20) {
			if _, err := p.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Commit(t.Context(), img.Record, img.Manifest, img.Signature, img.Refs...); !errors.Is(err, syscall.EIO) {
			t.Errorf("Commit = %v, want the error of the sync before", err)
		}
		if _, err := d.Record(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("Record = %v, want that the image isn't held", err)
		}
		// A shorter one is synced once, at its end.
		short := cachetest.NewImage("example.com/short", "1", 1000)
		if err := cachetest.Commit(t.Context(), d, short); !errors.Is(err, syscall.EIO) {
			t.Errorf("Commit of a short one = %v", err)
		}
	}
}

// TestFailedSyncIsNotSuspended suspends an arrival whose sync beside the writing has failed. Whoever took it up again would not be told.
func TestFailedSyncIsNotSuspended(t *testing.T) {
	dir := t.TempDir()
	d := openQuiet(t, dir, cache.Options{FS: syncFails{durable.OS{}}})
	before, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.Begin(t.Context(), cache.Arrival{Key: "a", Size: 40 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write(make([]byte, 32<<20)); err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Suspend = %v, want the error of the sync", err)
	}
	if _, err := d.Resume(t.Context(), "a"); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Resume = %v, want ErrNotFound", err)
	}
	if left := names(t, dir, "partial"); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
	if after, err := d.Usage(); err != nil || after.Partials != before.Partials || after.Promised != before.Promised {
		t.Errorf("Usage = %+v, %v, and was %+v", after, err, before)
	}
}
