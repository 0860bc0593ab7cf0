//go:build unix

package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/internal/durable"
)

// TestLostImageIsKnownWhileTheIndexIsMade: its sidecar says that its blob was there, so that it isn't of a commit that never came to be.
func TestLostImageIsKnownWhileTheIndexIsMade(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	img := cachetest.NewImage("example.com/app", "1", 100)
	if err := cachetest.Commit(t.Context(), d, img); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(blobPath(dir, img)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Fatalf("OpenBlob = %v, want ErrNotFound", err)
	}
	closeStore(t, d)
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	unblock := blockOpen(t, filepath.Join(dir, "names", "blocked.json"))
	d = open(t, dir, cache.Options{})
	defer unblock()
	if rec, err := d.Record(img.Record.Digest); err != nil || !rec.Lost() {
		t.Errorf("Record = %+v, %v, want one that is lost", rec, err)
	}
	if b, err := d.Manifest(img.Record.Digest); err != nil || !bytes.Equal(b, img.Manifest) {
		t.Errorf("Manifest = %q, %v", b, err)
	}
	if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("OpenBlob = %v, want ErrNotFound", err)
	}
	if !d.Rebuilding() {
		t.Fatal("the index was made all the same")
	}
	unblock()
	closeStore(t, d)
}

// TestServesWhileTheIndexIsMade holds the making of the index up before it has taken anything in. All that is held is served nevertheless, and
// what isn't is not said to be missing.
func TestServesWhileTheIndexIsMade(t *testing.T) {
	spoil := func(change func(b []byte) []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { write(t, path, change(read(t, path))) }
	}
	version := func(n int) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := cache.SetSchema(path, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, path string)
	}{
		{"the index is missing", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"it is empty", spoil(func([]byte) []byte { return nil })},
		{"it is truncated", spoil(func(b []byte) []byte { return b[:5*4096] })},
		{"a bit of its head is flipped", spoil(func(b []byte) []byte { b[4096+20] ^= 1; return b })},
		{"a directory has its place", func(t *testing.T, path string) { directory(t, path) }},
		{"a loop of links has its place", func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Symlink(path, path)); err != nil {
				t.Fatal(err)
			}
		}},
		{"nobody may read it", func(t *testing.T, path string) {
			if os.Geteuid() == 0 {
				t.Skip("root may read all")
			}
			if err := os.Chmod(path, 0); err != nil {
				t.Fatal(err)
			}
		}},
		{"it is of an older version", version(cache.Schema - 1)},
		{"it is of a newer version", version(cache.Schema + 1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, images := t.TempDir(), library()
			d := open(t, dir, cache.Options{})
			fill(t, d, images)
			closeStore(t, d)
			tt.spoil(t, filepath.Join(dir, "index.db"))
			unblock := blockOpen(t, filepath.Join(dir, "names", "blocked.json"))
			d = open(t, dir, cache.Options{})
			defer unblock()
			for _, img := range images {
				if err := cachetest.Check(t.Context(), d, img); err != nil {
					t.Errorf("while it is made: %v", err)
				}
			}
			if k, ok := d.Known(known.Name); !ok || k.Name != known.Name {
				t.Errorf("Known = %+v, %v", k, ok)
			}
			if !d.Rebuilding() {
				t.Fatal("the index was made all the same")
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, _, err := d.Resolve(ctx, cachetest.MustRef("example.com/never:1")); !errors.Is(err, context.Canceled) {
				t.Errorf("Resolve of what isn't held = %v, want it to wait", err)
			}
			if _, err := d.Record(acproxy.Digest{1}); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("Record of what isn't held = %v, want ErrNotFound", err)
			}
			// It can be changed, too.
			next := cachetest.NewImage("example.com/next", "1", 10)
			if err := cachetest.Commit(t.Context(), d, next); err != nil {
				t.Fatal(err)
			}
			if err := d.Delete(t.Context(), images[0].Record.Digest); err != nil {
				t.Fatal(err)
			}
			unblock()
			checkAll(t, d, append(images[1:], next))
		})
	}
}

// TestTableOfRefsIsNotBelieved: an old table names images that don't answer the ref any more, or are gone.
func TestTableOfRefsIsNotBelieved(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, cache.Options{})
	old, next := cachetest.NewImage("example.com/app", "1", 10), cachetest.NewImage("example.com/app", "2", 20)
	gone := cachetest.NewImage("example.com/gone", "1", 30)
	for _, img := range []cachetest.Image{old, gone} {
		if err := cachetest.Commit(t.Context(), d, img); err != nil {
			t.Fatal(err)
		}
	}
	// One that is closed before it knows everything writes no table.
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	table := read(t, filepath.Join(dir, "refs"))
	d = open(t, dir, cache.Options{})
	if err := cachetest.Commit(t.Context(), d, next); err != nil {
		t.Fatal(err)
	}
	if err := d.Delete(t.Context(), gone.Record.Digest); err != nil {
		t.Fatal(err)
	}
	closeStore(t, d)
	for _, tt := range []struct {
		name  string
		table []byte
	}{
		{"an old one", table},
		{"a broken one", bytes.Repeat([]byte{1}, len(table))},
		{"one cut short", table[:len(table)-1]},
		{"none", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			write(t, filepath.Join(dir, "refs"), tt.table)
			if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
				t.Fatal(err)
			}
			d := open(t, dir, cache.Options{})
			r, _, err := d.Resolve(t.Context(), cachetest.MustRef("example.com/app"))
			if err != nil || r.Digest != next.Record.Digest {
				t.Errorf("Resolve = %v, %v, want %v", r.Digest, err, next.Record.Digest)
			}
			if r, _, err := d.Resolve(t.Context(), gone.Refs[0].Ref); !errors.Is(err, acproxy.ErrNotFound) {
				t.Errorf("Resolve of what was removed = %v, %v, want ErrNotFound", r, err)
			}
			closeStore(t, d)
		})
	}
}

// TestMissesAreAnsweredBeforeAllIsVerified: an index that names all that was reported to be held is asked for what isn't, at once.
func TestMissesAreAnsweredBeforeAllIsVerified(t *testing.T) {
	dir, images := t.TempDir(), library()
	d := open(t, dir, cache.Options{})
	fill(t, d, images)
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "killed")
	copyStore(t, dir, killed)
	unblock := blockOpen(t, filepath.Join(killed, "names", "blocked.json"))
	d = open(t, killed, cache.Options{})
	defer unblock()
	if _, _, err := d.Resolve(t.Context(), cachetest.MustRef("example.com/never:1")); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Resolve of what isn't held = %v, want ErrNotFound", err)
	}
	if _, err := d.Record(acproxy.Digest{1}); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Record of what isn't held = %v, want ErrNotFound", err)
	}
	if !d.Rebuilding() {
		t.Error("the files were compared with the index all the same")
	}
	for _, img := range images {
		if err := cachetest.Check(t.Context(), d, img); err != nil {
			t.Error(err)
		}
	}
	f, err := d.OpenBlob(images[0].Record.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, images[0].Blob) {
		t.Errorf("OpenBlob gave %d bytes, %v", len(b), err)
	}
}

// keepsNothingAside is a file system whose quarantine directory is on another one.
type keepsNothingAside struct{ durable.OS }

func (fsys keepsNothingAside) Rename(from, to string) error {
	if filepath.Base(filepath.Dir(to)) == "quarantine" {
		return syscall.EXDEV
	}
	return fsys.OS.Rename(from, to)
}

// TestNobodyWaitsForAnIndexThatCantBeMade keeps the index from being completed. What is held is served; what isn't known to be missing, and what needs to
// know how much is held, gets the reason instead of waiting for that to end. When it ends, so does all of it.
func TestNobodyWaitsForAnIndexThatCantBeMade(t *testing.T) {
	dir, images := t.TempDir(), library()
	opts := cache.Options{FS: keepsNothingAside{}, Quota: cache.Quota{MaxSize: 1 << 30}}
	d := open(t, dir, opts)
	fill(t, d, images)
	closeStore(t, d)
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	// A directory of blobs that can't be listed, and not be moved away.
	next := cachetest.NewImage("example.com/next", "1", 10)
	loop := ""
	for i := 0; loop == ""; i++ {
		name := filepath.Join(dir, "blobs", fmt.Sprintf("%02x", i))
		if name != filepath.Dir(blobPath(dir, next)) && os.Symlink(name, name) == nil {
			loop = name
		}
	}
	d = open(t, dir, opts)
	if _, _, err := d.Resolve(t.Context(), cachetest.MustRef("example.com/never:1")); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("Resolve of what isn't held = %v, want what keeps the index from being made", err)
	}
	if err := cachetest.Commit(t.Context(), d, next); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("Commit = %v, want what keeps the index from being made", err)
	}
	for _, img := range images {
		if err := cachetest.Check(t.Context(), d, img); err != nil {
			t.Errorf("while it can't be made: %v", err)
		}
	}
	if !d.Rebuilding() {
		t.Error("it was made all the same")
	}
	if err := os.Remove(loop); err != nil {
		t.Fatal(err)
	}
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := cachetest.Commit(t.Context(), d, next); err != nil {
		t.Errorf("it is made, and yet: %v", err)
	}
	checkAll(t, d, append(images, next))
}

// TestDirectoriesThatCantBeListed keep nobody from what is held: a store is opened without knowing what was left unfinished.
func TestDirectoriesThatCantBeListed(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may list all")
	}
	for _, name := range []string{"blobs", "partial"} {
		dir, images := t.TempDir(), library()[:4]
		d := open(t, dir, cache.Options{})
		fill(t, d, images[:3])
		closeStore(t, d)
		list := filepath.Join(dir, name)
		if err := os.Chmod(list, 0o300); err != nil {
			t.Fatal(err)
		}
		d = open(t, dir, cache.Options{})
		checkAll(t, d, images[:3])
		if err := os.Chmod(list, 0o700); err != nil {
			t.Fatal(err)
		}
		fill(t, d, images[3:])
		checkAll(t, d, images)
		closeStore(t, d)
	}
}

// TestFilesThatCantBeReadAreSetAside has a sidecar, or what is known of a name, be something that can't be opened or read. What the index can say becomes complete
// without it all the same, and what can't be read is kept.
func TestFilesThatCantBeReadAreSetAside(t *testing.T) {
	base, images := t.TempDir(), library()[:6]
	d := open(t, base, cache.Options{})
	fill(t, d, images)
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "killed")
	copyStore(t, base, killed)
	sidecar, err := filepath.Rel(base, sidecarPath(base, images[2]))
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join("names", names(t, base, "names")[0])
	for _, spoil := range []struct {
		name    string
		do      func(t *testing.T, path string) error
		nothing bool // it counts as not being there
	}{
		{"a loop of links", func(_ *testing.T, path string) error { return errors.Join(os.Remove(path), os.Symlink(path, path)) }, false},
		{"a link to nothing", func(_ *testing.T, path string) error {
			return errors.Join(os.Remove(path), os.Symlink(path+".gone", path))
		}, true},
		{"a link beyond a file", func(_ *testing.T, path string) error {
			return errors.Join(os.Remove(path), os.Symlink("/dev/null/x", path))
		}, false},
		{"a file that is longer than any", func(t *testing.T, path string) error {
			lengthen(t, path)
			return nil
		}, false},
		{"a socket", func(t *testing.T, path string) error {
			// Its name may be too long for an address.
			t.Chdir(filepath.Dir(path))
			l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", "socket")
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
			return os.Rename("socket", path)
		}, false},
	} {
		for _, of := range []struct {
			name, file string
			lost       bool // the index is, too
		}{{"a sidecar, without the index", sidecar, true}, {"a name, without the index", name, true}, {"a name, with the index", name, false}} {
			t.Run(spoil.name+" in the place of "+of.name, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				copyStore(t, killed, dir)
				if of.lost {
					remove(t, filepath.Join(dir, "index.db"))
				}
				if err := spoil.do(t, filepath.Join(dir, of.file)); err != nil {
					t.Fatal(err)
				}
				d := open(t, dir, cache.Options{Quota: cache.Quota{MaxSize: 1 << 30}})
				if err := d.ReadyAtOnce(t.Context()); err != nil {
					t.Fatal(err)
				}
				aside := func(name string) bool { return strings.HasPrefix(name, filepath.Base(of.file)+"-") }
				if left := names(t, dir, "quarantine"); slices.ContainsFunc(left, aside) == spoil.nothing {
					t.Errorf("the quarantine directory holds %v", left)
				}
				if of.file == name && !of.lost && !bytes.Equal(read(t, filepath.Join(dir, name)), read(t, filepath.Join(killed, name))) {
					t.Errorf("what the index knows is not written again: %q", read(t, filepath.Join(dir, name)))
				}
				want := images
				if of.file == sidecar {
					want = slices.Delete(slices.Clone(images), 2, 3)
					if _, err := d.Record(images[2].Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
						t.Errorf("Record = %v, want ErrNotFound", err)
					}
				}
				for _, img := range want {
					if err := cachetest.Check(t.Context(), d, img); err != nil {
						t.Error(err)
					}
				}
				// And what is to come has its place.
				if err := cachetest.Commit(t.Context(), d, cachetest.NewImage("example.com/next", "1", 10)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestWhatCantBeListedIsSetAside: of a directory of blobs that nobody can list the rest knows nothing.
func TestWhatCantBeListedIsSetAside(t *testing.T) {
	base, images := t.TempDir(), library()[:6]
	d := open(t, base, cache.Options{})
	fill(t, d, images)
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "killed")
	copyStore(t, base, killed)
	img := images[2]
	for _, noIndex := range []bool{false, true} {
		for _, by := range []string{"the next start", "fsck"} {
			t.Run(fmt.Sprintf("by %s, no index: %v", by, noIndex), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				copyStore(t, killed, dir)
				if noIndex {
					remove(t, filepath.Join(dir, "index.db"))
				}
				shard := filepath.Dir(blobPath(dir, img))
				remove(t, shard)
				if err := os.Symlink(shard, shard); err != nil {
					t.Fatal(err)
				}
				if by == "fsck" {
					if got, _, _ := check(t, dir, true); got.Left != 0 {
						t.Errorf("Check = %+v", got)
					}
				}
				d := open(t, dir, cache.Options{Quota: cache.Quota{MaxSize: 1 << 30}})
				if err := d.ReadyAtOnce(t.Context()); err != nil {
					t.Fatal(err)
				}
				aside := func(name string) bool { return strings.HasPrefix(name, filepath.Base(shard)+"-") }
				if left := names(t, dir, "quarantine"); !slices.ContainsFunc(left, aside) {
					t.Errorf("the quarantine directory holds %v", left)
				}
				for _, other := range images {
					err := cachetest.Check(t.Context(), d, other)
					if here := filepath.Dir(blobPath(dir, other)) == shard; here == (err == nil) {
						t.Errorf("%s: in the directory: %v, and %v", other.Record.Name, here, err)
					}
				}
				rec, err := d.Record(img.Record.Digest)
				if noIndex && !errors.Is(err, acproxy.ErrNotFound) || !noIndex && rec.Code != cache.CodeMissing {
					t.Errorf("Record = %s, %v", rec.Code, err)
				}
				for _, other := range images {
					if err := cachetest.Commit(t.Context(), d, other); err != nil {
						t.Fatal(err)
					}
				}
				checkAll(t, d, images)
			})
		}
	}
}

// TestTooManyOpenFilesLeaveTheIndexAlone: that no file can be opened says nothing of the index.
func TestTooManyOpenFilesLeaveTheIndexAlone(t *testing.T) {
	dir := t.TempDir()
	d := openQuiet(t, dir, cache.Options{})
	older := filepath.Join(dir, "index.db.older")
	write(t, older, read(t, filepath.Join(dir, "index.db")))
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	errs := d.ReadIndexes(t.Context())
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for _, err := range errs {
		if !errors.Is(err, syscall.EMFILE) {
			t.Errorf("reading an index without files = %v, want that there are too many, and not that it is broken", err)
		}
	}
	if _, err := os.Lstat(older); err != nil {
		t.Errorf("the older index: %v", err)
	}
}
