package cache_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/testtools"
)

// A crowd works on a store with a quota: what it holds must be what a simple model allows.
type crowd struct {
	*warden
	t      *testing.T
	max    int64
	images []*shared
}

// shared is an image that several work with. Whoever reads it holds the lock for reading, whoever commits, deletes or pins it for writing: then only
// the store itself can have taken it away.
type shared struct {
	cachetest.Image
	mu     sync.RWMutex
	pinned bool
}

func newCrowd(t *testing.T, w *warden, max int64, n int) *crowd {
	c := &crowd{warden: w, t: t, max: max}
	random := rand.New(rand.NewPCG(uint64(n), 1))
	for i := range n {
		size := 1 + random.IntN(600*kib)
		img := image(fmt.Sprint("app", i), size)
		if i > 0 && i%3 == 0 {
			img = image(fmt.Sprint("app", i), size, fmt.Sprint("app", random.IntN(i)))
		}
		c.images = append(c.images, &shared{Image: img})
	}
	return c
}

// run lets some work at the same time, each so many steps, after each of which they look at what is taken.
func (c *crowd) run(workers, steps int, seed uint64, look func()) {
	var wg sync.WaitGroup
	for i := range workers {
		// Ends after its steps; waited for.
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
			defer cancel()
			(&worker{crowd: c, ctx: ctx, random: rand.New(rand.NewPCG(seed, uint64(i)))}).work(steps, look)
		})
	}
	wg.Wait()
}

// look checks what is taken at this moment.
func (c *crowd) look() {
	if c.t.Failed() {
		// Once is enough.
		return
	}
	u, err := c.Usage()
	if err != nil {
		c.t.Errorf("Usage: %v", err)
		return
	}
	if u.Total()+u.Promised > c.max {
		c.t.Errorf("taken are %d bytes of %d: %+v", u.Total()+u.Promised, c.max, u)
	}
	for what, n := range map[string]int64{
		"blobs": u.Blobs, "sidecars": u.Sidecars, "partials": u.Partials, "promised": u.Promised, "quarantine": u.Quarantine, "removed and open": u.Open, "pinned": u.Pinned,
	} {
		if n < 0 {
			c.t.Errorf("%d bytes of %s: %+v", n, what, u)
		}
	}
}

type worker struct {
	*crowd
	ctx     context.Context
	random  *rand.Rand
	reading []read1
}

// read1 is an image that a worker reads.
type read1 struct {
	*shared
	blob *cache.Blob
}

func (w *worker) work(steps int, look func()) {
	for range steps {
		look()
		if w.ctx.Err() != nil {
			w.t.Errorf("it takes too long")
			break
		}
		img := w.images[w.random.IntN(len(w.images))]
		switch n := w.random.IntN(100); {
		case n < 35:
			w.fetch(img)
		case n < 45:
			w.part(img)
		case n < 70:
			w.open(img)
		case n < 80:
			w.close()
		case n < 90:
			w.Touch(img.Record.Digest)
		case n < 94:
			w.pin(img)
		case n < 97:
			w.remove(img)
		default:
			err := w.Point(w.ctx, cache.Resolution{Ref: cachetest.MustRef(img.Record.Name + ",os=linux"), Digest: img.Record.Digest})
			w.tolerate("Point", err)
		}
	}
	for len(w.reading) > 0 {
		w.close()
	}
}

// tolerate fails the test at an error other than that there is no space, or no image.
func (w *worker) tolerate(what string, err error) {
	if err != nil && !errors.Is(err, acproxy.ErrNoSpace) && !errors.Is(err, acproxy.ErrNotFound) {
		w.t.Errorf("%s: %v", what, err)
	}
}

// mine reports whether the worker reads the image itself: he would wait for himself.
func (w *worker) mine(img *shared) bool {
	return slices.ContainsFunc(w.reading, func(r read1) bool { return r.shared == img })
}

func (w *worker) fetch(img *shared) {
	if w.mine(img) || !img.mu.TryLock() {
		return
	}
	defer img.mu.Unlock()
	var err error
	if w.random.IntN(2) == 0 {
		err = commitSized(w.ctx, w, img.Image)
	} else {
		err = cachetest.Commit(w.ctx, w, img.Image)
	}
	w.tolerate("Commit", err)
}

// part lets some of an image arrive, and maybe the rest later.
func (w *worker) part(img *shared) {
	key := img.Record.Name
	p, err := w.Resume(w.ctx, key)
	if errors.Is(err, acproxy.ErrNotFound) {
		p, err = w.Begin(w.ctx, cache.Arrival{Key: key, Size: []int64{-1, img.Record.Size}[w.random.IntN(2)]})
	}
	if err != nil {
		w.tolerate("Begin", err)
		return
	}
	var blob *cache.Blob
	if w.random.IntN(3) == 0 {
		if blob, err = p.Open(); err != nil {
			w.t.Errorf("Open: %v", err)
		}
	}
	if left := int(img.Record.Size - p.Size()); left > 0 {
		_, err = p.Write(img.Blob[p.Size():][:w.random.IntN(left)])
		w.tolerate("Write", err)
	}
	if w.random.IntN(2) == 0 && err == nil {
		err = p.Suspend()
	} else {
		err = p.Discard()
	}
	if err != nil {
		w.t.Errorf("ending a partial: %v", err)
	}
	if blob != nil {
		_ = blob.Close()
	}
}

func (w *worker) open(img *shared) {
	if len(w.reading) == 3 || w.mine(img) || !img.mu.TryRLock() {
		return
	}
	blob, err := w.OpenBlob(img.Record.Digest)
	if err != nil {
		w.tolerate("OpenBlob", err)
		if img.pinned {
			w.t.Errorf("%s is pinned, and OpenBlob = %v", img.Record.Name, err)
		}
		img.mu.RUnlock()
		return
	}
	w.reading = append(w.reading, read1{img, blob})
}

// close ends the reading of an image. The store must not have taken it away.
func (w *worker) close() {
	if len(w.reading) == 0 {
		return
	}
	r := w.reading[0]
	w.reading = w.reading[1:]
	defer r.mu.RUnlock()
	defer r.blob.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, r.blob); err != nil || acproxy.Digest(sum.Sum(nil)) != r.Record.Digest {
		w.t.Errorf("%s has other bytes: %v", r.Record.Name, err)
	}
	opened, err := r.blob.Stat()
	if err != nil {
		w.t.Error(err)
		return
	}
	there, err := os.Stat(blobPath(w.dir, r.Image))
	if err != nil || !os.SameFile(opened, there) {
		w.t.Errorf("%s was taken away from somebody who read it: %v", r.Record.Name, err)
	}
	if _, err := w.Record(r.Record.Digest); err != nil {
		w.t.Errorf("%s was taken away from somebody who read it: %v", r.Record.Name, err)
	}
}

func (w *worker) pin(img *shared) {
	if w.mine(img) || !img.mu.TryLock() {
		return
	}
	defer img.mu.Unlock()
	// Few at a time, or nothing else fits.
	pin := !img.pinned && img.Record.Size < 50*kib
	err := w.Update(w.ctx, img.Record.Digest, func(r *cache.Record) error { r.Pinned = pin; return nil })
	w.tolerate("Update", err)
	if img.pinned && err != nil {
		w.t.Errorf("%s is pinned, and Update = %v", img.Record.Name, err)
	}
	img.pinned = pin && err == nil
	img.Record.Pinned = false
}

func (w *worker) remove(img *shared) {
	if w.mine(img) || !img.mu.TryLock() {
		return
	}
	defer img.mu.Unlock()
	img.pinned = false
	if err := w.Delete(w.ctx, img.Record.Digest); err != nil {
		w.t.Errorf("Delete: %v", err)
	}
}

// after checks what the crowd has left.
func (c *crowd) after() {
	c.t.Helper()
	for _, img := range c.images {
		rec, err := c.Record(img.Record.Digest)
		if errors.Is(err, acproxy.ErrNotFound) {
			if img.pinned {
				c.t.Errorf("%s was pinned and is gone", img.Record.Name)
			}
			continue
		}
		if err != nil || rec.Pinned != img.pinned {
			c.t.Errorf("%s: pinned %v, %v, want %v", img.Record.Name, rec.Pinned, err, img.pinned)
		}
		blob, err := c.OpenBlob(img.Record.Digest)
		if err != nil {
			c.t.Errorf("%s: %v", img.Record.Name, err)
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, blob); err != nil || acproxy.Digest(sum.Sum(nil)) != img.Record.Digest {
			c.t.Errorf("%s has other bytes: %v", img.Record.Name, err)
		}
		_ = blob.Close()
	}
	if u := c.usage(); u.Open != 0 || u.Promised > mib {
		c.t.Errorf("nothing is open, and nothing arrives: %+v", u)
	}
	c.counted("after all")
}

func TestQuotaHoldsUnderLoad(t *testing.T) {
	steps := 150
	if testtools.Brief() {
		steps = 50
	}
	for _, tt := range []struct {
		name  string
		quota cache.Quota
	}{
		{"with watermarks", cache.Quota{MaxSize: 12 * mib, High: 90, Low: 60, Grace: -1}},
		{"to the last byte", cache.Quota{MaxSize: 9 * mib, High: 100, Low: 100, Grace: -1}},
		{"with little that may go", cache.Quota{MaxSize: 9 * mib, Grace: 10 * time.Minute}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := &warden{t: t, dir: memoryDir(t), clock: when, told: make(chan struct{})}
			w.open(tt.quota, func(o *cache.Options) { o.FlushEvery = 5 * time.Millisecond })
			c := newCrowd(t, w, tt.quota.MaxSize, 60)
			c.run(8, steps, 1, func() {
				c.look()
				w.later(time.Second)
			})
			t.Logf("evicted: %d", w.count())
			if w.count() == 0 && tt.quota.Grace < 0 {
				t.Error("nothing was evicted: the test is too small")
			}
			// The evictor may still be at it.
			if _, err := w.Evict(t.Context(), w.usage().Total()-1); err != nil {
				t.Error(err)
			}
			c.after()
			closeStore(t, w.Disk)
			w.open(tt.quota, func(o *cache.Options) { o.Idle = true })
			c.after()
		})
	}
}

// memoryDir returns a directory in memory, where there is one: what is tried in it is not what a disk does.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "acproxy-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// tmpfs mounts a file system of some size, or skips the test.
func tmpfs(t *testing.T, bytes int64) string {
	t.Helper()
	testtools.Need(t, "mount", "umount")
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d,mode=700", bytes), "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("mounting a small file system takes more rights than there are here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// TestSmallFileSystem works on a file system that is really full: once with a quota below its size, which must keep that from happening, and once
// without any, where the store has to make room when the disk says so.
func TestSmallFileSystem(t *testing.T) {
	steps := 150
	if testtools.Brief() {
		steps = 40
	}
	taken := func(t *testing.T, dir string) int64 {
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil {
			t.Fatal(err)
		}
		return int64(s.Blocks-s.Bfree) * int64(s.Bsize) //nolint:unconvert // it is an int64 on Linux only
	}
	t.Run("the quota is never exceeded", func(t *testing.T) {
		mount := tmpfs(t, 64*mib)
		quota := cache.Quota{MaxSize: 10 * mib, Grace: -1}
		w := &warden{t: t, dir: filepath.Join(mount, "store"), clock: when, told: make(chan struct{})}
		w.open(quota, func(o *cache.Options) { o.FlushEvery = 5 * time.Millisecond })
		c := newCrowd(t, w, quota.MaxSize, 60)
		var most atomic.Int64
		c.run(8, steps, 2, func() {
			c.look()
			n := taken(t, mount)
			if n > quota.MaxSize {
				t.Errorf("the file system says that %d bytes are taken, of %d", n, quota.MaxSize)
			}
			most.Store(max(most.Load(), n))
		})
		t.Logf("most that was ever taken: %d of %d", most.Load(), quota.MaxSize)
		closeStore(t, w.Disk)
	})
	t.Run("a file system that is full is made room on", func(t *testing.T) {
		mount := tmpfs(t, 12*mib)
		w := &warden{t: t, dir: filepath.Join(mount, "store"), clock: when, told: make(chan struct{})}
		w.open(cache.Quota{Grace: -1})
		var last cachetest.Image
		for i := range 30 {
			last = w.commit(image(fmt.Sprint("app", i), 700*kib))
			if err := cachetest.Check(t.Context(), w, withRecord(t, w, last)); err != nil {
				t.Fatal(err)
			}
		}
		if gone := w.gone(); gone == "" {
			t.Error("30 images of 700 KiB were kept in 12 MiB")
		}
		// One that is larger than all there is fails, and the store works on.
		if err := cachetest.Commit(t.Context(), w, image("large", 14*mib)); !errors.Is(err, acproxy.ErrNoSpace) || acproxy.Code(err) != "disk-full" {
			t.Errorf("Commit = %v, want disk-full", err)
		}
		w.commit(image("after", 700*kib))
		closeStore(t, w.Disk)
	})
	t.Run("a full file system can be emptied", func(t *testing.T) {
		mount := tmpfs(t, 12*mib)
		w := &warden{t: t, dir: filepath.Join(mount, "store"), clock: when, told: make(chan struct{})}
		w.open(cache.Quota{Grace: time.Hour})
		for i := range 8 {
			w.commit(image(fmt.Sprint("app", i), mib))
		}
		// Not a single block is left to the index.
		filler, err := os.Create(filepath.Join(mount, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		defer filler.Close()
		for block := make([]byte, 4096); err == nil; {
			_, err = filler.Write(block)
		}
		if err := cachetest.Commit(t.Context(), w, image("more", 10)); !errors.Is(err, acproxy.ErrNoSpace) {
			t.Errorf("Commit = %v, want no space", err)
		}
		w.later(2 * time.Hour)
		freed, err := w.Evict(t.Context(), 0)
		if err != nil || freed.Bytes < 8*mib {
			t.Errorf("Evict = %d bytes, %v", freed.Bytes, err)
		}
		w.commit(image("more", 10))
		if u := w.usage(); u.Images != 1 {
			t.Errorf("Usage = %+v", u)
		}
		closeStore(t, w.Disk)
	})
}

// withRecord returns an image with the record that the store has for it, whose times are the store's.
func withRecord(t *testing.T, w *warden, img cachetest.Image) cachetest.Image {
	t.Helper()
	rec, err := w.Record(img.Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	img.Record = rec
	return img
}
