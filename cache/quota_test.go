package cache_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
)

// What an arriving image needs beside its bytes, and what is kept for the index: docs/configuration.md says so.
const (
	kib         = 1 << 10
	mib         = 1 << 20
	needsBeside = 64 * kib
)

// A warden has a store with a quota, a clock, and a list of what was evicted.
type warden struct {
	*cache.Disk
	t   testing.TB
	dir string

	mu      sync.Mutex
	clock   time.Time
	evicted []cache.Eviction
	told    chan struct{} // closed and replaced with every eviction
}

func newWarden(t testing.TB, quota cache.Quota, change ...func(*cache.Options)) *warden {
	t.Helper()
	w := &warden{t: t, dir: t.TempDir(), clock: when, told: make(chan struct{})}
	w.open(quota, change...)
	return w
}

func (w *warden) open(quota cache.Quota, change ...func(*cache.Options)) {
	w.t.Helper()
	opts := cache.Options{Quota: quota, Now: w.now, Evicted: w.note}
	for _, c := range change {
		c(&opts)
	}
	w.Disk = open(w.t, w.dir, opts)
	if err := w.Ready(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *warden) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.clock
}

// later moves the clock on.
func (w *warden) later(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(d)
}

func (w *warden) note(e cache.Eviction) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.evicted = append(w.evicted, e)
	close(w.told)
	w.told = make(chan struct{})
}

// count returns how many evictions there were.
func (w *warden) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.evicted)
}

// said returns what was evicted.
func (w *warden) said() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return said(w.evicted)
}

// until waits for evictions until something is so.
func (w *warden) until(what string, ok func() bool) {
	w.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		w.mu.Lock()
		told := w.told
		w.mu.Unlock()
		if ok() {
			return
		}
		select {
		case <-told:
		case <-timeout:
			w.t.Fatalf("%s: that does not happen: %+v", what, w.usage())
		}
	}
}

// gone returns what was evicted since the last call.
func (w *warden) gone() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := said(w.evicted)
	w.evicted = nil
	return s
}

// said writes evictions on one line: names of images with their versions, the kinds of others.
func said(evicted []cache.Eviction) string {
	var out []string
	for _, e := range evicted {
		switch {
		case e.Record != nil:
			out = append(out, short(*e.Record))
		default:
			out = append(out, e.Kind)
		}
	}
	return strings.Join(out, " ")
}

func short(rec cache.Record) string {
	name := rec.Name[strings.LastIndexByte(rec.Name, '/')+1:]
	if v := rec.Labels["version"]; v != "1" {
		name += v
	}
	return name
}

// image returns an image that depends on others, given as name or name:version.
func image(name string, size int, needs ...string) cachetest.Image {
	name, version, ok := strings.Cut(name, ":")
	if !ok {
		version = "1"
	}
	img := cachetest.NewImage("example.com/"+name, version, size)
	img.Record.Dependencies = nil
	for _, need := range needs {
		name, version, ok := strings.Cut(need, ":")
		dep := cache.Dependency{Name: "example.com/" + name}
		if ok {
			dep.Labels = map[string]string{"version": version}
		}
		img.Record.Dependencies = append(img.Record.Dependencies, dep)
	}
	return img
}

// commit commits an image, a minute after the one before.
func (w *warden) commit(img cachetest.Image) cachetest.Image {
	w.t.Helper()
	w.later(time.Minute)
	img.Record.Fetched, img.Record.Used = w.now(), w.now()
	if err := commitSized(w.t.Context(), w, img); err != nil {
		w.t.Fatalf("committing %s: %v", img.Record.Name, err)
	}
	return img
}

// commitSized commits an image whose size is known beforehand.
func commitSized(ctx context.Context, store cache.Store, img cachetest.Image) error {
	p, err := store.Begin(ctx, cache.Arrival{Size: img.Record.Size, Ref: img.Refs[0].Ref})
	if err != nil {
		return err
	}
	if _, err := p.Write(img.Blob); err != nil {
		return errors.Join(err, p.Discard())
	}
	return p.Commit(ctx, img.Record, img.Manifest, img.Signature, slices.Clone(img.Refs)...)
}

func (w *warden) usage() cache.Usage {
	w.t.Helper()
	u, err := w.Usage()
	if err != nil {
		w.t.Fatal(err)
	}
	return u
}

// room is how many bytes an image may have to fit without an eviction.
func (w *warden) room() int64 {
	w.t.Helper()
	u := w.usage()
	return u.Room.MaxSize - u.Total() - u.Promised - needsBeside
}

// diskUsage is what du says of a directory: all of its files and directories.
func diskUsage(t testing.TB, dir string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		fi, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		sum += 512 * fi.Sys().(*syscall.Stat_t).Blocks
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// counted fails the test unless the store counts what is on the disk, no more and no less, once nothing is being written.
func (w *warden) counted(what string) {
	w.t.Helper()
	if err := w.Counted(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	u := w.usage()
	var other int64
	for _, name := range []string{"VERSION", "lock"} {
		fi, err := os.Lstat(filepath.Join(w.dir, name))
		if err != nil {
			w.t.Fatal(err)
		}
		other += 512 * fi.Sys().(*syscall.Stat_t).Blocks
	}
	if got := diskUsage(w.t, w.dir) - other; u.Total() != got {
		w.t.Errorf("%s: counted are %d bytes, on the disk are %d: %+v", what, u.Total(), got, u)
	}
}

func wantNoSpace(t testing.TB, err error, code string) {
	t.Helper()
	if !errors.Is(err, acproxy.ErrNoSpace) || acproxy.Code(err) != code {
		t.Errorf("error = %v (code %q), want ErrNoSpace with %q", err, acproxy.Code(err), code)
	}
}

func TestQuotaIsExact(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100})
	fits := w.room() / 4096 * 4096
	for _, size := range []int64{fits + 1, fits + 4096, 1 << 40} {
		_, err := w.Begin(t.Context(), cache.Arrival{Size: size})
		wantNoSpace(t, err, "quota")
	}
	before := w.usage()
	p, err := w.Begin(t.Context(), cache.Arrival{Size: fits})
	if err != nil {
		t.Fatalf("%d bytes, for which there is just space: %v", fits, err)
	}
	for _, size := range []int64{0, 1} {
		_, err := w.Begin(t.Context(), cache.Arrival{Size: size})
		wantNoSpace(t, err, "quota")
	}
	if u := w.usage(); u.Total()+u.Promised != 16*mib {
		t.Errorf("with all space promised %d bytes are taken, want %d: %+v", u.Total()+u.Promised, 16*mib, u)
	}
	img := image("app", int(fits))
	if _, err := p.Write(img.Blob); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(t.Context(), img.Record, img.Manifest, img.Signature, img.Refs...); err != nil {
		t.Fatal(err)
	}
	w.counted("after the commit")
	if err := w.Delete(t.Context(), img.Record.Digest); err != nil {
		t.Fatal(err)
	}
	w.counted("after the deletion")
	if after := w.usage(); after.Promised != before.Promised || after.Open != 0 || after.Partials != 0 {
		t.Errorf("something is left: %+v, before %+v", after, before)
	}
}

func TestTwoNeverGetTheLastBytes(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100})
	size := w.room()/2 + 4096
	var got atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			p, err := w.Begin(t.Context(), cache.Arrival{Size: size})
			if err != nil {
				wantNoSpace(t, err, "quota")
				return
			}
			got.Add(1)
			t.Cleanup(func() { _ = p.Discard() })
		})
	}
	wg.Wait()
	if got.Load() != 1 {
		t.Errorf("%d of 16 got more than half of the space, want 1", got.Load())
	}
}

func TestAnImageOfUnknownSizeAsksAsItGrows(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100})
	p, err := w.Begin(t.Context(), cache.Arrival{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	written, chunk := int64(0), make([]byte, 100*kib)
	for {
		n, err := p.Write(chunk)
		written += int64(n)
		if u := w.usage(); u.Total()+u.Promised > 16*mib {
			t.Fatalf("after %d bytes %d are taken", written, u.Total()+u.Promised)
		}
		if err != nil {
			wantNoSpace(t, err, "quota")
			break
		}
	}
	if written < 14*mib || written > 15*mib {
		t.Errorf("%d bytes were written to a store of 16 MiB with an empty index", written)
	}
	w.counted("with as much written as fits")
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	w.counted("after that was discarded")
}

// TestNothingIsEvictedInVain wants a store to keep what it has if that would not have been enough.
func TestNothingIsEvictedInVain(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100, Grace: -1})
	pinned := image("pinned", 6*mib)
	pinned.Record.Pinned = true
	w.commit(pinned)
	w.commit(image("old", 3*mib))
	reading := w.commit(image("reading", 3*mib))
	blob, err := w.OpenBlob(reading.Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	for _, tt := range []struct {
		size int64
		want []string
	}{
		{20 * mib, []string{"20.1 MiB", "more than cache.max_size (16.0 MiB)"}},
		{8 * mib, []string{"the image of example.com/app:1 needs 8.1 MiB", "no more than 3.0 MiB could be evicted, so nothing was", "6.0 MiB are pinned", "3.0 MiB are being read"}},
	} {
		_, err := w.Begin(t.Context(), cache.Arrival{Size: tt.size, Ref: cachetest.MustRef("example.com/app:1")})
		wantNoSpace(t, err, "quota")
		for _, want := range tt.want {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("the error %q doesn't say %q", err, want)
			}
		}
		if gone := w.gone(); gone != "" {
			t.Errorf("%d bytes don't fit, and evicted was %s", tt.size, gone)
		}
	}
	p, err := w.Begin(t.Context(), cache.Arrival{Size: 5 * mib})
	if err != nil {
		t.Fatalf("what fits once one image is gone: %v", err)
	}
	defer p.Discard()
	if gone := w.gone(); gone != "old" {
		t.Errorf("evicted was %s, want old", gone)
	}
	w.counted("with a promise")
}

func TestEvictionGoesByLastUse(t *testing.T) {
	for _, reopened := range []bool{false, true} {
		t.Run(fmt.Sprintf("reopened %v", reopened), func(t *testing.T) {
			quota := cache.Quota{MaxSize: 64 * mib, Grace: -1}
			w := newWarden(t, quota)
			var images []cachetest.Image
			for i := range 6 {
				images = append(images, w.commit(image(fmt.Sprint("app", i), 100*kib)))
			}
			w.later(time.Minute)
			w.Touch(images[0].Record.Digest)
			w.later(time.Minute)
			w.Touch(images[3].Record.Digest)
			if reopened {
				closeStore(t, w.Disk)
				w.open(quota)
			}
			const order = "app1 app2 app4 app5 app0 app3"
			plan, err := w.PlanEviction(t.Context(), 0)
			if err != nil || said(plan.Evict) != order || plan.Enough {
				t.Errorf("PlanEviction = %s, enough %v, %v, want %s", said(plan.Evict), plan.Enough, err, order)
			}
			if gone := w.gone(); gone != "" {
				t.Errorf("planning evicted %s", gone)
			}
			// Two go for the first half of what two take.
			freed, err := w.Evict(t.Context(), w.usage().Total()-150*kib)
			if err != nil || said(freed.Evicted) != "app1 app2" || freed.Bytes < 200*kib {
				t.Errorf("Evict = %s, %d bytes, %v", said(freed.Evicted), freed.Bytes, err)
			}
			w.counted("after two")
			freed, err = w.Evict(t.Context(), 0)
			if err != nil || said(freed.Evicted) != "app4 app5 app0 app3" {
				t.Errorf("Evict = %s, %v", said(freed.Evicted), err)
			}
			if gone := w.gone(); gone != order {
				t.Errorf("told were %s, want %s", gone, order)
			}
			w.counted("after all")
			if u := w.usage(); u.Images != 0 || u.Blobs != 0 || u.Sidecars != 0 {
				t.Errorf("left: %+v", u)
			}
		})
	}
}

func TestWatermarks(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 20 * mib, High: 80, Low: 50, Grace: -1})
	for i := range 14 {
		w.commit(image(fmt.Sprint("app", i), 1*mib))
	}
	if gone := w.gone(); gone != "" {
		t.Errorf("below the high watermark %s was evicted", gone)
	}
	w.commit(image("last", 1*mib))
	w.until("no more than half is taken", func() bool {
		u := w.usage()
		return u.Total()+u.Promised <= 10*mib && int(u.Images)+w.count() == 15
	})
	if gone := w.gone(); gone != "app0 app1 app2 app3 app4 app5 app6" {
		t.Errorf("evicted was %s", gone)
	}
	w.counted("at the low watermark")
}

// TestSetQuota: a smaller quota is come down to at once, a larger one counts for the next image.
func TestSetQuota(t *testing.T) {
	w := newWarden(t, cache.Quota{})
	for i := range 14 {
		w.commit(image(fmt.Sprint("app", i), 1*mib))
	}
	downTo := func(most, images int64) {
		t.Helper()
		w.until(fmt.Sprintf("no more than %d are taken", most), func() bool {
			u := w.usage()
			return u.Total()+u.Promised <= most && u.Images == images && u.Images+int64(w.count()) == 14
		})
	}
	w.SetQuota(cache.Quota{MaxSize: 20 * mib, High: 80, Low: 50, Grace: -1})
	w.SetQuota(cache.Quota{MaxSize: 16 * mib, High: 60, Low: 50, Grace: -1})
	downTo(8*mib, 6)
	if room := w.usage().Room; room.MaxSize != 16*mib || room.High != 60 || room.Low != 50 {
		t.Errorf("Usage says %+v", room)
	}
	// What doesn't fit by the one fits by the next.
	_, err := w.Begin(t.Context(), cache.Arrival{Size: 30 * mib})
	wantNoSpace(t, err, "quota")
	w.SetQuota(cache.Quota{MaxSize: 64 * mib})
	p, err := w.Begin(t.Context(), cache.Arrival{Size: 30 * mib})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	w.SetQuota(cache.Quota{})
	if p, err = w.Begin(t.Context(), cache.Arrival{Size: 30 << 30}); err != nil {
		t.Fatalf("without a quota: %v", err)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	w.counted("at the end")
}

// TestSetQuotaWithinTheGrace: what is too much by a new quota goes when it may, although nobody asks for space; and a shorter grace lets it go at once.
func TestSetQuotaWithinTheGrace(t *testing.T) {
	w := newWarden(t, cache.Quota{}, cache.EvictAgain(10*time.Millisecond))
	for i := range 10 {
		w.commit(image(fmt.Sprint("app", i), 1*mib))
	}
	left := func(images int64) {
		t.Helper()
		w.until(fmt.Sprintf("%d images are left", images), func() bool { return w.usage().Images == images && w.count() == 10-int(images) })
	}
	w.SetQuota(cache.Quota{MaxSize: 16 * mib, High: 50, Low: 50, Grace: 12 * time.Minute})
	time.Sleep(50 * time.Millisecond) // it looks at them some times, and lets them be
	if gone := w.gone(); gone != "" {
		t.Errorf("within their grace %s were evicted", gone)
	}
	w.later(3 * time.Minute) // the first is 12 minutes old, the second 11
	left(9)
	w.SetQuota(cache.Quota{MaxSize: 16 * mib, High: 50, Low: 50, Grace: 11 * time.Minute})
	left(8)
	w.SetQuota(cache.Quota{MaxSize: 16 * mib, High: 50, Low: 50, Grace: -1})
	left(6)
	if gone := w.gone(); gone != "app0 app1 app2 app3" {
		t.Errorf("evicted were %s", gone)
	}
}

// TestSetQuotaWhileImagesArrive has the quota change while images arrive and are read: once it stays the same it is kept, and the books are right.
func TestSetQuotaWhileImagesArrive(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1})
	var writers sync.WaitGroup
	stop := make(chan struct{})
	for i := range 4 {
		// They end when stop is closed; waited for below.
		writers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				img := image(fmt.Sprintf("app%d:%d", i, n), 300*kib)
				img.Record.Fetched, img.Record.Used = w.now(), w.now()
				if err := commitSized(t.Context(), w, img); err != nil && !errors.Is(err, acproxy.ErrNoSpace) {
					t.Errorf("committing: %v", err)
					return
				}
			}
		})
	}
	quotas := []cache.Quota{{MaxSize: 17 * mib, Grace: -1}, {}, {MaxSize: 24 * mib, High: 60, Low: 40, Grace: -1}, {MinFree: 1, Grace: -1}, {MaxSize: 20 * mib, Grace: -1}}
	for i := range 50 {
		w.SetQuota(quotas[i%len(quotas)])
		time.Sleep(2 * time.Millisecond) // for some images to arrive by it
	}
	close(stop)
	writers.Wait()
	w.until("the last quota is kept, and the files of what was evicted are gone, which nobody has open", func() bool {
		u := w.usage()
		return u.Total()+u.Promised <= 20*mib*95/100 && u.Open == 0
	})
	w.counted("after all")
}

// TestWhatIsKept goes through the reasons for keeping an image, alone and together.
func TestWhatIsKept(t *testing.T) {
	type scene struct {
		w      *warden
		images map[string]cachetest.Image
	}
	pin := func(name string) func(*testing.T, scene) {
		return func(t *testing.T, s scene) {
			if err := s.w.Update(t.Context(), s.images[name].Record.Digest, func(r *cache.Record) error { r.Pinned = true; return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	touch := func(names ...string) func(*testing.T, scene) {
		return func(_ *testing.T, s scene) {
			for _, name := range names {
				s.w.later(time.Minute)
				s.w.Touch(s.images[name].Record.Digest)
			}
		}
	}
	gone := func(ref, name string) func(*testing.T, scene) {
		return func(t *testing.T, s scene) {
			r := cache.Resolution{Ref: cachetest.MustRef(ref), Digest: s.images[name].Record.Digest, Gone: when}
			if err := s.w.Point(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	// there has the publisher say that a ref is there, at a time before or after it said that another is gone.
	there := func(ref, name string, since time.Duration) func(*testing.T, scene) {
		return func(t *testing.T, s scene) {
			r := cache.Resolution{Ref: cachetest.MustRef(ref), Digest: s.images[name].Record.Digest, Validated: when.Add(since)}
			if err := s.w.Point(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	read := func(name string) func(*testing.T, scene) {
		return func(t *testing.T, s scene) {
			blob, err := s.w.OpenBlob(s.images[name].Record.Digest)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = blob.Close() })
		}
	}
	quarantine := func(name string) func(*testing.T, scene) {
		return func(t *testing.T, s scene) {
			if err := s.w.Quarantine(t.Context(), s.images[name].Record.Digest, "tar", "two manifests"); err != nil {
				t.Fatal(err)
			}
		}
	}
	chain := []string{"c0"}
	var deep []cachetest.Image
	for i := range 50 {
		img := image(fmt.Sprint("c", i), 1000)
		if i > 0 {
			img = image(fmt.Sprint("c", i), 1000, fmt.Sprint("c", i-1))
			chain = append(chain, fmt.Sprint("c", i))
		}
		deep = append(deep, img)
	}
	ring := make([]cachetest.Image, 5)
	for i := range ring {
		ring[i] = image(fmt.Sprint("r", i), 1000, fmt.Sprint("r", (i+1)%len(ring)))
	}
	for _, tt := range []struct {
		name       string
		images     []cachetest.Image // a minute apart
		grace      time.Duration
		lastCopies bool
		prepare    []func(*testing.T, scene)
		order      string // what is evicted
		kept       string // image=reason
	}{
		{name: "nothing is kept without a reason", images: []cachetest.Image{image("a", 10), image("b", 10)}, order: "a b"},
		{
			name: "a pinned image", images: []cachetest.Image{image("a", 10), image("b", 10)}, prepare: []func(*testing.T, scene){pin("a")},
			order: "b", kept: "a=pinned",
		},
		{
			name: "one that is read", images: []cachetest.Image{image("a", 10), image("b", 10)}, prepare: []func(*testing.T, scene){read("a")},
			order: "b", kept: "a=in-use",
		},
		{name: "one that is young", images: []cachetest.Image{image("a", 10), image("b", 10)}, grace: 30 * time.Second, order: "a", kept: "b=grace"},
		{
			name: "one that was used", images: []cachetest.Image{image("a", 10), image("b", 10)}, grace: 30 * time.Second,
			prepare: []func(*testing.T, scene){touch("a")}, order: "b", kept: "a=grace",
		},
		{
			name: "the last copy of an image", images: []cachetest.Image{image("a", 10), image("b", 10)}, prepare: []func(*testing.T, scene){gone("example.com/a", "a")},
			order: "b", kept: "a=last-copy",
		},
		{
			name: "unless that is wanted", images: []cachetest.Image{image("a", 10), image("b", 10)}, lastCopies: true,
			prepare: []func(*testing.T, scene){gone("example.com/a", "a")}, order: "a b",
		},
		{
			name: "an image that its publisher has under another ref is not the last copy", images: []cachetest.Image{image("a", 10), image("b", 10)},
			prepare: []func(*testing.T, scene){gone("example.com/a:1", "a"), there("example.com/a", "a", 1)}, order: "a b",
		},
		{
			name: "unless that was before it was gone under the first", images: []cachetest.Image{image("a", 10), image("b", 10)},
			prepare: []func(*testing.T, scene){gone("example.com/a", "a"), there("example.com/a,os=linux", "a", -1)}, order: "b", kept: "a=last-copy",
		},
		{
			name: "quarantined images go first", images: []cachetest.Image{image("a", 10), image("b", 10), image("c", 10)},
			prepare: []func(*testing.T, scene){quarantine("c"), quarantine("b")}, order: "b c a",
		},
		{
			name: "but not pinned ones", images: []cachetest.Image{image("a", 10), image("b", 10)}, prepare: []func(*testing.T, scene){quarantine("b"), pin("b")},
			order: "a", kept: "b=pinned",
		},
		{
			name: "what an image needs goes after it", images: []cachetest.Image{image("base", 10), image("a", 10), image("app", 10, "base:1")},
			order: "a app base",
		},
		{
			name: "what a pinned image needs stays", images: []cachetest.Image{image("base", 10), image("a", 10), image("app", 10, "base:1")},
			prepare: []func(*testing.T, scene){pin("app")}, order: "a", kept: "app=pinned base=needed:example.com/app 1",
		},
		{
			name: "so does what an image needs that is read", images: []cachetest.Image{image("base", 10), image("app", 10, "base"), image("b", 10)},
			prepare: []func(*testing.T, scene){read("app")}, order: "b", kept: "app=in-use base=needed:example.com/app 1",
		},
		{
			name: "and what a last copy needs", images: []cachetest.Image{image("base", 10), image("app", 10, "base"), image("b", 10)},
			prepare: []func(*testing.T, scene){gone("example.com/app", "app")}, order: "b", kept: "app=last-copy base=needed:example.com/app 1",
		},
		{
			name: "and what a young image needs", images: []cachetest.Image{image("base", 10), image("b", 10), image("app", 10, "base")}, grace: 30 * time.Second,
			order: "b", kept: "app=grace base=needed:example.com/app 1",
		},
		{
			name: "not what a quarantined image needs", images: []cachetest.Image{image("base", 10), image("app", 10, "base"), image("b", 10)},
			prepare: []func(*testing.T, scene){quarantine("app")}, order: "app base b",
		},
		{
			name: "of several images that fit a dependency, the one fetched last", images: []cachetest.Image{image("base:1", 10), image("base:2", 10), image("app", 10, "base")},
			prepare: []func(*testing.T, scene){pin("app")}, order: "base", kept: "app=pinned base2=needed:example.com/app 1",
		},
		{
			name: "an image of another version than is needed goes", images: []cachetest.Image{image("base:1", 10), image("base:2", 10), image("app", 10, "base:1")},
			prepare: []func(*testing.T, scene){pin("app")}, order: "base2", kept: "app=pinned base=needed:example.com/app 1",
		},
		{
			name: "a neighbour of a name is not it", images: []cachetest.Image{image("base-x", 10), image("base/x", 10), image("app", 10, "base")},
			prepare: []func(*testing.T, scene){pin("app")}, order: "base-x x", kept: "app=pinned",
		},
		{name: "a chain goes from its end", images: deep, order: strings.Join(reversed(chain), " ")},
		{
			name: "a chain is used as a whole", images: append(slices.Clone(deep), image("b", 10)), prepare: []func(*testing.T, scene){touch("c49")},
			order: "b " + strings.Join(reversed(chain), " "),
		},
		{name: "a circle goes when its youngest is the oldest", images: append(slices.Clone(ring), image("b", 10)), order: "r4 r0 r1 r2 r3 b"},
		{
			name: "a circle stays as long as one of it was used later", images: append(slices.Clone(ring), image("b", 10)), prepare: []func(*testing.T, scene){touch("r2")},
			order: "b r2 r3 r4 r0 r1",
		},
		{
			name: "an image that needs itself", images: []cachetest.Image{image("a", 10, "a"), image("b", 10)}, order: "a b",
		},
		{
			name: "a circle that something pinned needs", images: append(slices.Clone(ring), image("app", 10, "r1")), prepare: []func(*testing.T, scene){pin("app")},
			kept: "app=pinned r0=needed:example.com/app 1 r1=needed:example.com/app 1 r2=needed:example.com/app 1 r3=needed:example.com/app 1 r4=needed:example.com/app 1",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			grace := tt.grace
			if grace == 0 {
				grace = -1
			}
			w := newWarden(t, cache.Quota{MaxSize: 64 * mib, Grace: grace, LastCopies: tt.lastCopies})
			s := scene{w, make(map[string]cachetest.Image)}
			for _, img := range tt.images {
				img = w.commit(img)
				s.images[short(img.Record)] = img
			}
			for _, prepare := range tt.prepare {
				prepare(t, s)
			}
			plan, err := w.PlanEviction(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			var kept []string
			for _, k := range plan.Kept {
				by := ""
				if k.By != "" {
					// Of a circle any one may be named that keeps the others.
					by = ":" + k.By
					if strings.HasPrefix(tt.name, "a circle") {
						by = ":example.com/app 1"
					}
				}
				kept = append(kept, short(k.Record)+"="+k.Why+by)
			}
			slices.Sort(kept)
			if got := strings.Join(kept, " "); got != tt.kept {
				t.Errorf("kept: %s\nwant: %s", got, tt.kept)
			}
			if got := said(plan.Evict); got != tt.order {
				t.Errorf("planned: %s\nwant:    %s", got, tt.order)
			}
			if _, err := w.Evict(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			if got := w.gone(); got != tt.order {
				t.Errorf("evicted: %s\nwant:    %s", got, tt.order)
			}
			w.counted("after the eviction")
		})
	}
}

func reversed(s []string) []string {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

// TestKeptImagesGoLater evicts what was kept as soon as nothing keeps it any more, although the evictor remembers what it has passed by.
func TestKeptImagesGoLater(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100, Grace: -1})
	base := w.commit(image("base", 3*mib))
	reading := w.commit(image("reading", 3*mib, "base"))
	last := w.commit(image("last", 3*mib))
	pinned := w.commit(image("pinned", 3*mib))
	update := func(pin bool) {
		t.Helper()
		if err := w.Update(t.Context(), pinned.Record.Digest, func(r *cache.Record) error { r.Pinned = pin; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	update(true)
	mark := func(gone time.Time) {
		t.Helper()
		if err := w.Point(t.Context(), cache.Resolution{Ref: cachetest.MustRef("example.com/last"), Digest: last.Record.Digest, Gone: gone}); err != nil {
			t.Fatal(err)
		}
	}
	mark(when)
	blob, err := w.OpenBlob(reading.Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	begin := func() error {
		p, err := w.Begin(t.Context(), cache.Arrival{Size: 5 * mib})
		if err == nil {
			err = p.Discard()
		}
		return err
	}
	for range 3 {
		wantNoSpace(t, begin(), "quota")
	}
	update(false)
	if err := begin(); err != nil || w.gone() != "pinned" {
		t.Errorf("after it was unpinned: %v", err)
	}
	w.commit(image("b", 3*mib))
	if err := begin(); err != nil || w.gone() != "b" {
		t.Errorf("a new one: %v", err)
	}
	keep := image("keep", 3*mib)
	keep.Record.Pinned = true
	w.commit(keep)
	wantNoSpace(t, begin(), "quota")
	if err := blob.Close(); err != nil {
		t.Fatal(err)
	}
	if err := begin(); err != nil {
		t.Errorf("after the reader has left: %v", err)
	}
	if gone := w.gone(); gone != "reading" {
		t.Errorf("evicted was %s, want reading", gone)
	}
	if rec, err := w.Record(base.Record.Digest); err != nil {
		t.Errorf("base = %v, %v", rec, err)
	}
	mark(time.Time{})
	if freed, err := w.Evict(t.Context(), 0); err != nil || said(freed.Evicted) != "base last" {
		t.Errorf("Evict = %s, %v", said(freed.Evicted), err)
	}
}

// TestGraceEnds evicts what was too young before.
func TestGraceEnds(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 100, Low: 100, Grace: time.Hour})
	w.commit(image("a", 6*mib))
	w.commit(image("b", 6*mib))
	for range 2 {
		_, err := w.Begin(t.Context(), cache.Arrival{Size: 5 * mib})
		wantNoSpace(t, err, "quota")
		if want := "12.0 MiB were fetched or used less than cache.grace ago"; !strings.Contains(err.Error(), want) {
			t.Errorf("the error %q doesn't say %q", err, want)
		}
	}
	w.later(time.Hour - time.Minute)
	p, err := w.Begin(t.Context(), cache.Arrival{Size: 5 * mib})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Discard()
	if gone := w.gone(); gone != "a" {
		t.Errorf("evicted was %s, want a", gone)
	}
}

// TestAccessTimesKeepToTheQuota uses all images of a store that is full, again and again.
func TestAccessTimesKeepToTheQuota(t *testing.T) {
	w := newWarden(t, cache.Quota{}, func(o *cache.Options) { o.FlushEvery = time.Hour })
	images := make([]cachetest.Image, 6000)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for i := i; i < len(images); i += 32 {
				images[i] = image(fmt.Sprint("app", i), 10)
				images[i].Record.Fetched = when.Add(time.Duration(i) * time.Millisecond)
				if err := cachetest.Commit(t.Context(), w, images[i]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	u := w.usage()
	most := u.Total() + u.Promised
	w.SetQuota(cache.Quota{MaxSize: most, High: 100, Low: 100, Grace: 1000 * time.Hour})
	for range 4 {
		w.later(time.Hour)
		for _, img := range images {
			w.Touch(img.Record.Digest)
		}
		// The plan is made by times that are written first.
		if _, err := w.PlanEviction(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if u := w.usage(); u.Total() > most || u.Images != int64(len(images)) {
			t.Errorf("%d bytes are taken by %d images, %d more than may be", u.Total(), u.Images, u.Total()-most)
		}
	}
}

// TestWhatCantBeNotedIsNotInUse uses an image in a store that has no room to note that.
func TestWhatCantBeNotedIsNotInUse(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: mib, Grace: -1}, func(o *cache.Options) { o.Idle = true })
	w.SetQuota(cache.Quota{Grace: -1})
	img := w.commit(image("app", 2*mib))
	for _, tt := range []struct {
		most int64
		used time.Duration
	}{{w.usage().Total() + mib/2 - 1, 0}, {w.usage().Total() + mib, time.Minute}} {
		w.SetQuota(cache.Quota{MaxSize: tt.most, Grace: -1})
		w.later(time.Minute)
		before := w.now().Add(-time.Minute)
		w.Touch(img.Record.Digest)
		plan, err := w.PlanEviction(t.Context(), 0)
		if err != nil || len(plan.Evict) != 1 || !plan.Evict[0].Used.Equal(before.Add(tt.used)) && tt.used > 0 {
			t.Errorf("with %d bytes: PlanEviction = %+v, %v", tt.most, plan, err)
		}
		if rec, err := w.Record(img.Record.Digest); err != nil || rec.Used.Equal(w.now()) != (tt.used > 0) {
			t.Errorf("with %d bytes: last used is %v, %v", tt.most, rec.Used, err)
		}
	}
}

// TestNoGraceUntilTheClockHasCaughtUp fills a store while the clock is a year ahead. Once it is right, what was kept before goes first, what is young stays, and what
// was kept in that time goes for what needs the space.
func TestNoGraceUntilTheClockHasCaughtUp(t *testing.T) {
	const year = 365 * 24 * time.Hour
	w := newWarden(t, cache.Quota{MaxSize: 24 * mib, High: 100, Low: 100, Grace: time.Hour})
	w.commit(image("before", 5*mib))
	w.later(year)
	w.commit(image("ahead", 5*mib))
	w.commit(image("further", 5*mib))
	w.later(-year + 2*time.Hour)
	w.commit(image("young", 5*mib))
	for i, gone := range []string{"before", "ahead", "further"} {
		plan, err := w.PlanEviction(t.Context(), 0)
		if err != nil || plan.Sums[cache.KeptGrace] < 5*mib*int64(1+i) || plan.Sums[cache.KeptGrace] > 6*mib*int64(1+i) {
			t.Errorf("PlanEviction = %+v, %v, want only what is young to be kept", plan, err)
		}
		w.commit(image(fmt.Sprint("next", i), 5*mib))
		if got := w.gone(); got != gone {
			t.Errorf("evicted were %s, want %s", got, gone)
		}
	}
	_, err := w.Begin(t.Context(), cache.Arrival{Size: 5 * mib})
	wantNoSpace(t, err, "quota")
}

// TestWhatIsNoImageGoesFirst evicts what has arrived of images, then blobs that were set aside, then images.
func TestWhatIsNoImageGoesFirst(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, High: 100, Low: 100, Grace: -1})
	w.commit(image("good", mib))
	rotten := w.commit(image("rotten", mib))
	write(t, blobPath(w.dir, rotten), rotten.Blob[1:])
	if _, err := w.OpenBlob(rotten.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Fatalf("OpenBlob = %v", err)
	}
	// These nobody can make anew, or nobody knows what they are.
	for _, name := range []string{"notes.txt-ABCDEFGH", strings.Repeat("ab", 32) + ".json-ABCDEFGH", "short-ABCDEFGH"} {
		write(t, filepath.Join(w.dir, "quarantine", name), []byte("?"))
	}
	suspend := func(key string, size int) {
		p, err := w.Begin(t.Context(), cache.Arrival{Key: key, Size: -1, Ref: cachetest.MustRef("example.com/" + key)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if err := p.Suspend(); err != nil {
			t.Fatal(err)
		}
		w.later(time.Minute)
	}
	suspend("first", mib)
	suspend("second", mib)
	writing, err := w.Begin(t.Context(), cache.Arrival{Key: "writing", Size: mib})
	if err != nil {
		t.Fatal(err)
	}
	defer writing.Discard()
	if _, err := writing.Write(make([]byte, mib)); err != nil {
		t.Fatal(err)
	}
	const order = "partial partial set-aside rotten good"
	plan, err := w.PlanEviction(t.Context(), 0)
	if err != nil || said(plan.Evict) != order || plan.Evict[0].Ref != "example.com/first" {
		t.Errorf("PlanEviction = %s, %v, want %s", said(plan.Evict), err, order)
	}
	resumed, err := w.Resume(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	freed, err := w.Evict(t.Context(), w.usage().Total()-1)
	if err != nil || said(freed.Evicted) != "partial" || freed.Evicted[0].Ref != "example.com/first" {
		t.Errorf("Evict = %s, %v, want the first partial", said(freed.Evicted), err)
	}
	if err := resumed.Suspend(); err != nil {
		t.Fatal(err)
	}
	freed, err = w.Evict(t.Context(), 0)
	if err != nil || said(freed.Evicted) != "partial set-aside rotten good" {
		t.Errorf("Evict = %s, %v", said(freed.Evicted), err)
	}
	if left := names(t, w.dir, "quarantine"); len(left) != 3 {
		t.Errorf("the quarantine directory holds %v, want the three that are no blobs", left)
	}
	if left := names(t, w.dir, "partial"); len(left) != 2 {
		t.Errorf("left of partials are %v, want the one that is written", left)
	}
}

func TestPartialsThatAreReadStay(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1})
	p, err := w.Begin(t.Context(), cache.Arrival{Key: "a", Size: 2 * mib})
	if err != nil {
		t.Fatal(err)
	}
	img := image("app", 2*mib)
	if _, err := p.Write(img.Blob[:mib]); err != nil {
		t.Fatal(err)
	}
	f, err := p.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Suspend(); err != nil {
		t.Fatal(err)
	}
	w.counted("suspended")
	if freed, err := w.Evict(t.Context(), 0); err != nil || len(freed.Evicted) != 0 {
		t.Errorf("Evict = %s, %v, want nothing", said(freed.Evicted), err)
	}
	// Taken up, it becomes an image, and whoever read it all along still keeps it.
	if p, err = w.Resume(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Write(img.Blob[mib:]); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(t.Context(), img.Record, img.Manifest, img.Signature, img.Refs...); err != nil {
		t.Fatal(err)
	}
	w.counted("committed")
	if freed, err := w.Evict(t.Context(), 0); err != nil || len(freed.Evicted) != 0 {
		t.Errorf("Evict = %s, %v, want nothing", said(freed.Evicted), err)
	}
	after, err := p.Open()
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range []io.Closer{f, after} {
		if freed, err := w.Evict(t.Context(), 0); err != nil || len(freed.Evicted) != 0 {
			t.Errorf("with %d readers: Evict = %s, %v, want nothing", 2-i, said(freed.Evicted), err)
		}
		for range 2 {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if freed, err := w.Evict(t.Context(), 0); err != nil || said(freed.Evicted) != "app" {
		t.Errorf("Evict = %s, %v, want app", said(freed.Evicted), err)
	}
	if _, err := p.Open(); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Open of an evicted image = %v, want ErrNotFound", err)
	}
	w.counted("after all")
}

// TestOpenFilesCountUntilTheyAreClosed removes files in every way while somebody reads them.
func TestOpenFilesCountUntilTheyAreClosed(t *testing.T) {
	img := image("app", mib)
	for _, tt := range []struct {
		name string
		read func(t *testing.T, w *warden) *cache.Blob
	}{
		{"a blob is deleted", func(t *testing.T, w *warden) *cache.Blob {
			w.commit(img)
			blob, err := w.OpenBlob(img.Record.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Delete(t.Context(), img.Record.Digest); err != nil {
				t.Fatal(err)
			}
			return blob
		}},
		{"a blob is replaced by the same bytes", func(t *testing.T, w *warden) *cache.Blob {
			w.commit(img)
			blob, err := w.OpenBlob(img.Record.Digest)
			if err != nil {
				t.Fatal(err)
			}
			w.commit(img)
			return blob
		}},
		{"an arriving image is discarded", func(t *testing.T, w *warden) *cache.Blob {
			p, err := w.Begin(t.Context(), cache.Arrival{Size: mib})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Write(img.Blob); err != nil {
				t.Fatal(err)
			}
			blob, err := p.Open()
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Discard(); err != nil {
				t.Fatal(err)
			}
			return blob
		}},
		{"a suspended image is begun anew", func(t *testing.T, w *warden) *cache.Blob {
			p, err := w.Begin(t.Context(), cache.Arrival{Key: "a", Size: mib})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Write(img.Blob); err != nil {
				t.Fatal(err)
			}
			blob, err := p.Open()
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Suspend(); err != nil {
				t.Fatal(err)
			}
			p, err = w.Begin(t.Context(), cache.Arrival{Key: "a", Size: 1})
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Discard(); err != nil {
				t.Fatal(err)
			}
			return blob
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWarden(t, cache.Quota{MaxSize: 32 * mib})
			blob := tt.read(t, w)
			if u := w.usage(); u.Open != mib {
				t.Errorf("with the file open %d bytes count for it, want %d: %+v", u.Open, mib, u)
			}
			b, err := io.ReadAll(blob)
			if sum := sha256.Sum256(b); err != nil || sum != img.Record.Digest {
				t.Errorf("it reads %d bytes, %v", len(b), err)
			}
			for range 2 {
				if err := blob.Close(); err != nil {
					t.Error(err)
				}
			}
			if u := w.usage(); u.Open != 0 {
				t.Errorf("with the file closed %d bytes count for it: %+v", u.Open, u)
			}
			w.counted("in the end")
		})
	}
}

func TestMinFree(t *testing.T) {
	var free atomic.Int64
	free.Store(100 * mib)
	disk := func(o *cache.Options) {
		note := o.Evicted
		o.Free = func() (int64, error) { return free.Load(), nil }
		o.Evicted = func(e cache.Eviction) {
			free.Add(e.Bytes)
			note(e)
		}
	}
	w := newWarden(t, cache.Quota{MinFree: 90 * mib, High: 100, Low: 100, Grace: -1}, disk)
	w.commit(image("a", mib))
	w.commit(image("b", mib))
	// What is promised and not written has to fit, too: 1 MiB is the housekeeping's.
	p, err := w.Begin(t.Context(), cache.Arrival{Size: 8 * mib})
	if err != nil {
		t.Fatal(err)
	}
	if gone := w.gone(); gone != "" {
		t.Errorf("evicted was %s", gone)
	}
	_, err = w.Begin(t.Context(), cache.Arrival{Size: 8 * mib})
	wantNoSpace(t, err, "min-free")
	if want := "within cache.min_free (90.0 MiB)"; !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("the error %q doesn't say %q", err, want)
	}
	q, err := w.Begin(t.Context(), cache.Arrival{Size: 3 * mib / 2})
	if err != nil {
		t.Fatal(err)
	}
	if gone := w.gone(); gone != "a" {
		t.Errorf("evicted was %s, want a", gone)
	}
	for _, p := range []*cache.Partial{p, q} {
		if err := p.Discard(); err != nil {
			t.Fatal(err)
		}
	}
	w.counted("after all")
}

// TestSomebodyElseFillsTheDisk evicts without that anything arrives.
func TestSomebodyElseFillsTheDisk(t *testing.T) {
	var free atomic.Int64
	free.Store(100 * mib)
	w := newWarden(t, cache.Quota{MinFree: 50 * mib, Grace: -1}, func(o *cache.Options) {
		o.Free, o.FlushEvery = func() (int64, error) { return free.Load(), nil }, time.Millisecond
	})
	w.commit(image("a", mib))
	w.commit(image("b", mib))
	free.Store(49 * mib)
	w.until("both are evicted", func() bool {
		return w.said() == "a b"
	})
}

// TestIdleStoreEvictsOnlyWhatIsInTheWay is for the commands that look into a store.
func TestIdleStoreEvictsOnlyWhatIsInTheWay(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib, High: 50, Low: 10, Grace: -1}, func(o *cache.Options) { o.Idle, o.FlushEvery = true, time.Millisecond })
	w.commit(image("a", 5*mib))
	w.commit(image("b", 5*mib))
	w.commit(image("c", 5*mib))
	if gone := w.gone(); gone != "a" {
		t.Errorf("evicted was %s, want a", gone)
	}
	freed, err := w.Evict(t.Context(), -1)
	if err != nil || said(freed.Evicted) != "b c" {
		t.Errorf("Evict = %s, %v", said(freed.Evicted), err)
	}
}

func TestWaitingForSpaceEndsWithItsContext(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 16 * mib})
	closeStore(t, w.Disk)
	if err := os.Remove(filepath.Join(w.dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.open(cache.Quota{MaxSize: 16 * mib})
	if _, err := w.Begin(ctx, cache.Arrival{Size: mib}); !errors.Is(err, context.Canceled) {
		t.Errorf("Begin = %v, want it called off", err)
	}
	closeStore(t, w.Disk)
	if _, err := w.Begin(t.Context(), cache.Arrival{Size: mib}); err == nil || errors.Is(err, acproxy.ErrNoSpace) {
		t.Errorf("Begin in a closed store = %v", err)
	}
}

// TestRefsAreTheCount shows what several refs of one blob mean: the blob is there as long as its image is, whichever refs come and go, and an image
// goes with all of its refs at once.
func TestRefsAreTheCount(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 64 * mib, Grace: -1})
	one, two := image("app:1", 1000), image("app:2", 1000)
	more := []cache.Resolution{
		{Ref: cachetest.MustRef("example.com/app:1,os=linux"), Digest: one.Record.Digest}, {Ref: cachetest.MustRef("example.com/app,os=linux"), Digest: one.Record.Digest},
	}
	w.commit(one)
	if err := w.Point(t.Context(), more...); err != nil {
		t.Fatal(err)
	}
	resolves := func(ref string, want cachetest.Image) {
		t.Helper()
		r, rec, err := w.Resolve(t.Context(), cachetest.MustRef(ref))
		if err != nil || r.Digest != want.Record.Digest || rec.Digest != r.Digest {
			t.Errorf("Resolve(%s) = %v, %v, want %v", ref, r.Digest, err, want.Record.Digest)
		}
		blob, err := w.OpenBlob(want.Record.Digest)
		if err != nil {
			t.Errorf("OpenBlob = %v", err)
			return
		}
		_ = blob.Close()
	}
	// The second image takes the refs of the first away one by one. The first stays for those that it has, and then for itself.
	w.commit(two)
	resolves("example.com/app", two)
	resolves("example.com/app,os=linux", one)
	for _, ref := range []string{"example.com/app,os=linux", "example.com/app:1,os=linux", "example.com/app:1"} {
		if err := w.Point(t.Context(), cache.Resolution{Ref: cachetest.MustRef(ref), Digest: two.Record.Digest}); err != nil {
			t.Fatal(err)
		}
		resolves(ref, two)
	}
	if records, err := w.ByImageID(one.Record.ImageID.String()[7:]); len(records) != 1 || err != nil {
		t.Errorf("without a ref the image is %v, %v", records, err)
	}
	if blob, err := w.OpenBlob(one.Record.Digest); err != nil {
		t.Errorf("without a ref OpenBlob = %v", err)
	} else {
		_ = blob.Close()
	}
	// What has no ref goes as any other, by its use.
	freed, err := w.Evict(t.Context(), w.usage().Total()-1)
	if err != nil || said(freed.Evicted) != "app" {
		t.Errorf("Evict = %s, %v", said(freed.Evicted), err)
	}
	for _, ref := range []string{"example.com/app", "example.com/app:1", "example.com/app:2", "example.com/app,os=linux"} {
		resolves(ref, two)
	}
	if _, err := w.Evict(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"example.com/app", "example.com/app:1", "example.com/app:2", "example.com/app,os=linux", "example.com/app:1,os=linux"} {
		if r, _, err := w.Resolve(t.Context(), cachetest.MustRef(ref)); !errors.Is(err, acproxy.ErrNotFound) {
			t.Errorf("Resolve(%s) = %v, %v, want ErrNotFound", ref, r, err)
		}
	}
	w.counted("in the end")
}

// TestFullDiskIsRelieved lets single calls fail for lack of space on the disk, although the quota would allow them.
func TestFullDiskIsRelieved(t *testing.T) {
	w := newWarden(t, cache.Quota{Grace: -1})
	closeStore(t, w.Disk)
	fsys, err := durabletest.New(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	w.open(cache.Quota{Grace: -1}, func(o *cache.Options) { o.FS = fsys })
	img := image("app", 10_000)
	var calls []string
	for range 2 { // the first time it makes a directory too
		fsys.Break(0, durabletest.Fail, nil)
		w.commit(img)
		calls = fsys.Calls()
		if err := w.Delete(t.Context(), img.Record.Digest); err != nil {
			t.Fatal(err)
		}
	}
	for at, call := range calls {
		old := w.commit(image(fmt.Sprint("old", at), 10_000))
		fsys.Break(at+1, durabletest.Fail, syscall.ENOSPC)
		err := commitSized(t.Context(), w, img)
		gone := w.gone()
		switch what, _, _ := strings.Cut(call, " "); what {
		case "sync":
			if strings.Contains(call, ".aci") {
				// Nobody knows after a failed sync what of the bytes is written.
				wantNoSpace(t, err, "disk-full")
				break
			}
			fallthrough
		default:
			if err != nil || gone != short(old.Record) {
				t.Errorf("%s fails once: Commit = %v, evicted was %q, want %s", call, err, gone, short(old.Record))
			}
		}
		if err == nil {
			if err := cachetest.Check(t.Context(), w, img); err != nil {
				t.Errorf("%s fails once: %v", call, err)
			}
		}
		fsys.Break(0, durabletest.Fail, nil)
		if err := w.Delete(t.Context(), img.Record.Digest); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Evict(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		w.gone()
	}
}
