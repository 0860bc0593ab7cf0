package cache_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
)

// nobody is who has no rights that others haven't.
const nobody = 65534

// asNobody runs the test again as somebody whom permissions keep from anything, if it is root who runs it. It reports whether that was so.
func asNobody(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		return false
	}
	dir, err := os.MkdirTemp("", "acproxy-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	// Where the go command has put the program nobody else may go.
	program := filepath.Join(dir, "test")
	in, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(program, os.O_CREATE|os.O_WRONLY, 0o755) //nolint:gosec // it is to be run
	if err == nil {
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close(), os.Chown(dir, nobody, nobody))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	printed, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(printed, []byte("--- PASS: "+t.Name())) {
		t.Errorf("as nobody: %v\n%s", err, printed)
	}
	return true
}

func chmod(t testing.TB, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// TestWhatMayNotBeOpenedIsLeft: files of which somebody has changed the owner or the mode can be had again once that is put right. Nothing of them is moved.
func TestWhatMayNotBeOpenedIsLeft(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("nobody has another number elsewhere")
	}
	if asNobody(t) {
		return
	}
	shard := func(dir string, img cachetest.Image) string { return filepath.Dir(blobPath(dir, img)) }
	name := func(dir string, _ cachetest.Image) string {
		return filepath.Join(dir, "names", names(t, dir, "names")[0])
	}
	for _, tt := range []struct {
		name    string
		path    func(dir string, img cachetest.Image) string
		noIndex bool
		unknown bool   // nothing can be known of the image
		lost    string // what it counts as when somebody asks for its bytes
		found   string // what fsck finds
		after   string // what it finds after its repair
	}{
		{"a blob", blobPath, false, false, cache.CodeForbidden, "", ""},
		{"a blob, without the index", blobPath, true, false, cache.CodeForbidden, cache.CodeForbidden + " " + cache.CodeIndexMissing, ""},
		{"a sidecar, without the index", sidecarPath, true, true, "", cache.CodeIndexMissing + " " + cache.CodeSidecarUnreadable, cache.CodeSidecarUnreadable},
		{"a shard", shard, false, false, cache.CodeForbidden, cache.CodeLayout, cache.CodeLayout},
		{"a shard, without the index", shard, true, true, "", cache.CodeIndexMissing + " " + cache.CodeLayout, cache.CodeLayout},
		{"a name, without the index", name, true, false, "", cache.CodeIndexMissing + " " + cache.CodeNameUnreadable, cache.CodeNameUnreadable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, images, img := spoiled(t)
			path := tt.path(dir, img)
			fi, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			before := tree(t, dir)
			if tt.noIndex {
				remove(t, filepath.Join(dir, "index.db"))
			}
			chmod(t, path, 0)
			defer chmod(t, path, fi.Mode().Perm())
			opts := cache.Options{Inspect: inspect, Quota: cache.Quota{MaxSize: 1 << 30}}

			// Twice, because a store that ended properly is not looked through at its next start.
			for range 2 {
				d := open(t, dir, opts)
				if err := d.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				if _, err := d.Record(img.Record.Digest); errors.Is(err, acproxy.ErrNotFound) != tt.unknown {
					t.Errorf("Record = %v, unknown: %v", err, tt.unknown)
				}
				for _, other := range images {
					if strings.HasPrefix(other.Record.Digest.Hex(), img.Record.Digest.Hex()[:2]) && (tt.lost != "" || tt.unknown) {
						continue
					}
					if err := cachetest.Check(t.Context(), d, other); err != nil {
						t.Error(err)
					}
				}
				if tt.lost != "" {
					if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
						t.Errorf("OpenBlob = %v", err)
					}
					if rec, err := d.Record(img.Record.Digest); err != nil || rec.Code != tt.lost {
						t.Errorf("Record = %+v, %v", rec, err)
					}
				}
				closeStore(t, d)
			}
			if left := names(t, dir, "quarantine"); len(left) > 0 {
				t.Errorf("the quarantine directory holds %v", left)
			}

			if tt.noIndex {
				remove(t, filepath.Join(dir, "index.db"))
			}
			got, f, _ := check(t, dir, true)
			if problems, _ := f.codes(); problems != tt.found || got.Repaired == 0 && tt.noIndex {
				t.Errorf("found: %s, want %s; %+v", problems, tt.found, got)
			}
			_, f, _ = check(t, dir, false)
			if problems, _ := f.codes(); problems != tt.after {
				t.Errorf("after the repair: %s, want %q", problems, tt.after)
			}

			chmod(t, path, fi.Mode().Perm())
			d := open(t, dir, opts)
			if err := d.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			checkAll(t, d, images)
			closeStore(t, d)
			after := tree(t, dir)
			for name, content := range before {
				if strings.HasPrefix(name, "blobs") && !strings.HasSuffix(name, ".json") && after[name] != content {
					t.Errorf("%s is not what it was", name)
				}
			}
			if left := names(t, dir, "quarantine"); len(left) > 0 {
				t.Errorf("the quarantine directory holds %v", left)
			}
		})
	}
}

// TestForbiddenBytesCount: what may not be opened is on the disk all the same, until the image comes again.
func TestForbiddenBytesCount(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("nobody has another number elsewhere")
	}
	if asNobody(t) {
		return
	}
	dir, images, img := spoiled(t)
	d := open(t, dir, cache.Options{Inspect: inspect})
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	before, err := d.Usage()
	if err != nil {
		t.Fatal(err)
	}
	chmod(t, blobPath(dir, img), 0)
	if _, err := d.OpenBlob(img.Record.Digest); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("OpenBlob = %v", err)
	}
	if u, err := d.Usage(); err != nil || u.Blobs != before.Blobs || u.Quarantine != before.Quarantine {
		t.Errorf("Usage = %+v, %v; before it was %+v", u, err, before)
	}
	if err := cachetest.Commit(t.Context(), d, img); err != nil {
		t.Fatal(err)
	}
	if u, err := d.Usage(); err != nil || u.Blobs != before.Blobs || u.Quarantine != before.Quarantine {
		t.Errorf("once it has come again: Usage = %+v, %v; before it was %+v", u, err, before)
	}
	checkAll(t, d, images)
}
