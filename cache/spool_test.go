package cache_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/durable"
)

// spool makes a spool of some bytes.
func (w *warden) spool(what string, size int) *cache.Spool {
	w.t.Helper()
	w.later(time.Minute)
	s, err := w.Spool(what, -1)
	if err == nil {
		_, err = s.Write(bytes.Repeat([]byte{7}, size))
	}
	if err == nil {
		err = s.Keep()
	}
	if err != nil {
		w.t.Fatalf("spooling %s: %v", what, err)
	}
	return s
}

func TestSpoolIsReadAndCounted(t *testing.T) {
	w := newWarden(t, cache.Quota{})
	before := w.usage()
	s := w.spool("a layer", 100_000)
	w.counted("with a spool")
	if got := w.usage().Spools; got != 102_400 {
		t.Errorf("it counts for %d bytes, want 102400", got)
	}
	f, err := s.Open()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(f); err != nil || len(b) != 100_000 || s.Size() != 100_000 {
		t.Errorf("it has %d bytes, %v", len(b), err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Open of what was discarded: %v", err)
	}
	// What is open still takes space, and can still be read.
	if u := w.usage(); u.Spools != 0 || u.Open != 102_400 {
		t.Errorf("while it is open: %d bytes of spools, %d of open files", u.Spools, u.Open)
	}
	if _, err := f.ReadAt(make([]byte, 1), 99_999); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if u := w.usage(); u.Total() != before.Total() || u.Promised != before.Promised {
		t.Errorf("in the end: %+v, and in the beginning %+v", u, before)
	}
	if err := s.Discard(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	w.counted("in the end")
}

// TestSpoolsGoFirst fills a store with images and spools, and has another image come: the spools go, the least recently used first, and the images stay.
func TestSpoolsGoFirst(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1, High: 100, Low: 100})
	w.commit(image("held", 8*mib))
	first, second := w.spool("first", 6*mib), w.spool("second", 6*mib)
	third := w.spool("third", 4*mib)
	w.later(time.Minute)
	f, err := first.Open()
	if err != nil {
		t.Fatal(err)
	}
	w.commit(image("new", int(w.room()+3*mib)))
	if got := w.gone(); got != "spool" {
		t.Errorf("evicted: %s", got)
	}
	if _, err := second.Open(); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("the one that was used least recently: %v", err)
	}
	// The first is in use, the third was used before it.
	w.commit(image("newer", int(w.room()+3*mib)))
	if _, err := third.Open(); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("the one that was used next: %v", err)
	}
	if got := w.gone(); got != "spool" {
		t.Errorf("evicted: %s", got)
	}
	// When only that is left which somebody reads, images go.
	w.commit(image("newest", int(w.room()+3*mib)))
	if got := w.gone(); got != "held" {
		t.Errorf("evicted: %s", got)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	w.commit(image("last", int(w.room()+3*mib)))
	if got := w.gone(); got != "spool" {
		t.Errorf("evicted: %s", got)
	}
	w.counted("in the end")
}

// TestNothingIsEvictedForASpool asks for more than is free below the high watermark.
func TestNothingIsEvictedForASpool(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1, High: 80, Low: 50})
	w.commit(image("held", 12*mib))
	s, err := w.Spool("a layer", -1)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; err == nil && n < 64; n++ {
		_, err = s.Write(make([]byte, mib))
	}
	wantNoSpace(t, err, "quota")
	if u := w.usage(); s.Size() < 4*mib || u.Total()+u.Promised > 32*mib*80/100 {
		t.Errorf("it got %d bytes: %+v", s.Size(), u)
	}
	if err := s.Discard(); err != nil {
		t.Error(err)
	}
	// Where it is known how much there will be, nothing is begun in vain.
	_, err = w.Spool("a layer", 20*mib)
	wantNoSpace(t, err, "quota")
	if s, err = w.Spool("a layer", 10*mib); err != nil {
		t.Fatal(err)
	}
	if got := w.usage().Spools; got != 10*mib {
		t.Errorf("%d bytes are promised, want 10 MiB", got)
	}
	if err := s.Discard(); err != nil {
		t.Error(err)
	}
	if got := w.gone(); got != "" {
		t.Errorf("evicted: %s", got)
	}
	w.counted("in the end")
}

// TestSpoolThatIsWrittenGoes has an image need the space of a spool that isn't whole yet.
func TestSpoolThatIsWrittenGoes(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1, High: 100, Low: 100})
	s, err := w.Spool("a layer", 24*mib)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(make([]byte, mib)); err != nil {
		t.Fatal(err)
	}
	w.commit(image("new", 16*mib))
	if got := w.gone(); got != "spool" {
		t.Errorf("evicted: %s", got)
	}
	_, err = s.Write(make([]byte, mib))
	wantNoSpace(t, err, "quota")
	if err := s.Keep(); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Keep: %v", err)
	}
	if err := s.Discard(); err != nil {
		t.Error(err)
	}
	w.counted("in the end")
}

// TestSpoolsAndMinFree promises no byte twice of those that are free.
func TestSpoolsAndMinFree(t *testing.T) {
	const free = 64 * mib
	w := newWarden(t, cache.Quota{MinFree: 8 * mib, Grace: -1, High: 100, Low: 100}, func(o *cache.Options) { o.Free = func() (int64, error) { return free, nil } })
	var all []*cache.Spool
	for {
		s, err := w.Spool("a layer", 10*mib)
		if err != nil {
			wantNoSpace(t, err, "quota")
			break
		}
		if all = append(all, s); len(all) > 10 {
			break
		}
	}
	// 64 MiB are free, 8 have to be left, and 1 is kept for what is written without asking.
	if len(all) != 5 {
		t.Errorf("%d spools of 10 MiB were promised, want 5", len(all))
	}
	for _, s := range all {
		if err := s.Discard(); err != nil {
			t.Error(err)
		}
	}
	if s, err := w.Spool("a layer", 50*mib); err != nil {
		t.Error(err)
	} else if err := s.Discard(); err != nil {
		t.Error(err)
	}
}

// TestSpoolsAtOnce writes, keeps, opens, evicts and discards spools by many at once.
func TestSpoolsAtOnce(t *testing.T) {
	w := newWarden(t, cache.Quota{MaxSize: 32 * mib, Grace: -1, High: 90, Low: 80})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for n := range 30 {
				s, err := w.Spool("a layer", int64(n%3-1)*mib)
				if err != nil {
					continue
				}
				for range 1 + (i+n)%8 {
					if _, err = s.Write(make([]byte, mib/2)); err != nil {
						break
					}
				}
				if err == nil {
					err = s.Keep()
				}
				if err != nil {
					if !errors.Is(err, acproxy.ErrNoSpace) && !errors.Is(err, acproxy.ErrNotFound) {
						t.Error(err)
					}
					err = s.Discard()
				} else if f, openErr := s.Open(); openErr == nil {
					err = f.Close()
				}
				if n%2 == 0 {
					err = errors.Join(err, s.Discard())
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 5 {
		w.commit(image(fmt.Sprintf("image%d", i), 4*mib))
	}
	all.Wait()
	w.commit(image("last", 20*mib))
	w.counted("in the end")
	if u := w.usage(); u.Open != 0 {
		t.Errorf("%d bytes count for files that are open", u.Open)
	}
}

// TestSpoolsEndWithTheProcess leaves spools behind, a whole one and one that is being written, and opens the store again.
func TestSpoolsEndWithTheProcess(t *testing.T) {
	w := newWarden(t, cache.Quota{})
	w.spool("a layer", 1000)
	half, err := w.Spool("another", -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := half.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(w.dir, "partial", "*.spool")
	if files, _ := filepath.Glob(left); len(files) != 2 {
		t.Errorf("files after the end: %q", files)
	}
	w.open(cache.Quota{})
	// What is left of the last process is removed behind the opening, and this waits for that.
	if _, err := w.Arrivals(t.Context()); err != nil {
		t.Fatal(err)
	}
	if files, _ := filepath.Glob(left); len(files) != 0 {
		t.Errorf("files after the next start: %q", files)
	}
	w.counted("after the next start")
}

// TestSpoolAndTheEnd ends a spool after its store.
func TestSpoolAndTheEnd(t *testing.T) {
	w := newWarden(t, cache.Quota{})
	s, err := w.Spool("a layer", -1)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Keep(); err == nil {
		t.Error("Keep after the store was closed is no error")
	}
	if files, _ := filepath.Glob(filepath.Join(w.dir, "partial", "*")); len(files) != 0 {
		t.Errorf("left: %q", files)
	}
}

// TestSpoolThatWasTakenAway removes, and cuts, the file of a spool.
func TestSpoolThatWasTakenAway(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(path string) error
	}{{"removed", os.Remove}, {"cut", func(path string) error { return os.Truncate(path, 10) }}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWarden(t, cache.Quota{})
			s := w.spool("a layer", 1000)
			files, _ := filepath.Glob(filepath.Join(w.dir, "partial", "*.spool"))
			if len(files) != 1 {
				t.Fatalf("files: %q", files)
			}
			if err := tt.do(files[0]); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Open(); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("Open: %v, want one matching ErrNotFound", err)
			}
			w.counted("without it")
		})
	}
}

// fullDisk is a file system whose files take no more than some bytes.
type fullDisk struct {
	durable.OS
	room int64
}

type fullFile struct {
	durable.File
	room int64
}

// Create makes a file with as much room.
func (f fullDisk) Create(name string, perm os.FileMode) (durable.File, error) {
	file, err := f.OS.Create(name, perm)
	return &fullFile{file, f.room}, err
}

// WriteAt writes what there is room for.
func (f *fullFile) WriteAt(b []byte, at int64) (int, error) {
	if at+int64(len(b)) > f.room {
		return 0, &os.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
	}
	return f.File.WriteAt(b, at)
}

func TestSpoolOnAFullDisk(t *testing.T) {
	w := newWarden(t, cache.Quota{}, func(o *cache.Options) { o.FS = fullDisk{room: mib} })
	s, err := w.Spool("a layer", -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(make([]byte, 2*mib)); !errors.Is(err, acproxy.ErrNoSpace) {
		t.Errorf("Write: %v, want one matching ErrNoSpace", err)
	}
	if err := s.Discard(); err != nil {
		t.Error(err)
	}
	w.counted("in the end")
}
