package durabletest_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/durable/durabletest"
)

func newFS(t *testing.T) (*durabletest.FS, string) {
	t.Helper()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "old"), []byte("old"), 0o640); err != nil {
		t.Fatal(err)
	}
	fsys, err := durabletest.New(root)
	if err != nil {
		t.Fatal(err)
	}
	return fsys, root
}

func content(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCrashKeepsWhatWasSyncedOnly(t *testing.T) {
	write := func(sync bool) func(*testing.T, *durabletest.FS, string) {
		return func(t *testing.T, fsys *durabletest.FS, root string) {
			f, err := fsys.Create(filepath.Join(root, "new"), 0o640)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.Write([]byte("new")); err != nil {
				t.Fatal(err)
			}
			if sync {
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	syncDir := func(t *testing.T, fsys *durabletest.FS, root string) {
		if err := fsys.SyncDir(root); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(t *testing.T, fsys *durabletest.FS, root string) {
		if err := fsys.Rename(filepath.Join(root, "new"), filepath.Join(root, "old")); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(t *testing.T, fsys *durabletest.FS, root string) {
		if err := fsys.Remove(filepath.Join(root, "old")); err != nil {
			t.Fatal(err)
		}
	}
	type steps = []func(*testing.T, *durabletest.FS, string)
	tests := []struct {
		name     string
		steps    steps
		survival durabletest.Survival
		old, new string
	}{
		{"what was there at first stays", nil, durabletest.Nothing(), "old", "(none)"},
		{"a file in an unsynced directory is gone", steps{write(true)}, durabletest.Nothing(), "old", "(none)"},
		{"an unsynced file in a synced directory is empty", steps{write(false), syncDir}, durabletest.Nothing(), "old", ""},
		{"a synced file in a synced directory stays", steps{write(true), syncDir}, durabletest.Nothing(), "old", "new"},
		{"an unsynced rename is undone", steps{write(true), syncDir, rename}, durabletest.Nothing(), "old", "new"},
		{"a synced rename stays", steps{write(true), rename, syncDir}, durabletest.Nothing(), "new", "(none)"},
		{"an unsynced removal is undone", steps{remove}, durabletest.Nothing(), "old", "(none)"},
		{"a synced removal stays", steps{remove, syncDir}, durabletest.Nothing(), "(none)", "(none)"},
		{"everything survives a kill", steps{write(false), rename}, durabletest.Everything(), "new", "(none)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fsys, root := newFS(t)
			for _, step := range tt.steps {
				step(t, fsys, root)
			}
			after := filepath.Join(t.TempDir(), "after")
			if err := fsys.Crash(after, tt.survival); err != nil {
				t.Fatal(err)
			}
			if got := content(t, filepath.Join(after, "old")); got != tt.old {
				t.Errorf("old holds %q, want %q", got, tt.old)
			}
			if got := content(t, filepath.Join(after, "new")); got != tt.new {
				t.Errorf("new holds %q, want %q", got, tt.new)
			}
			if err := fsys.SyncDir(root); !errors.Is(err, durabletest.ErrPower) {
				t.Errorf("a call after the crash = %v, want ErrPower", err)
			}
		})
	}
}

// TestKillSyncsNothing has a process killed, and the power fail for the next one.
func TestKillSyncsNothing(t *testing.T) {
	for _, tt := range []struct {
		name string
		next func(fsys *durabletest.FS, root string) error
		want string // of the file that the first one made
	}{
		{"the next one does nothing", func(*durabletest.FS, string) error { return nil }, "(none)"},
		{"the next one syncs the directory", func(fsys *durabletest.FS, root string) error { return fsys.SyncDir(root) }, ""},
		{"the next one syncs both", func(fsys *durabletest.FS, root string) error {
			f, err := fsys.OpenFile(filepath.Join(root, "new"))
			if err != nil {
				return err
			}
			return errors.Join(f.Sync(), f.Close(), fsys.SyncDir(root))
		}, "new"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fsys, root := newFS(t)
			f, err := fsys.Create(filepath.Join(root, "new"), 0o640)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.Write([]byte("new")); err != nil {
				t.Fatal(err)
			}
			killed, lost := filepath.Join(t.TempDir(), "killed"), filepath.Join(t.TempDir(), "lost")
			next, err := fsys.Kill(killed)
			if err != nil {
				t.Fatal(err)
			}
			if err := fsys.SyncDir(root); !errors.Is(err, durabletest.ErrPower) {
				t.Errorf("the killed one works on: %v", err)
			}
			if got := content(t, filepath.Join(killed, "new")); got != "new" {
				t.Errorf("the next one finds %q", got)
			}
			if err := tt.next(next, killed); err != nil {
				t.Fatal(err)
			}
			if err := next.Crash(lost, durabletest.Nothing()); err != nil {
				t.Fatal(err)
			}
			if got := content(t, filepath.Join(lost, "new")); got != tt.want {
				t.Errorf("after the power failed there is %q, want %q", got, tt.want)
			}
			if got := content(t, filepath.Join(lost, "old")); got != "old" {
				t.Errorf("what was synced is %q", got)
			}
		})
	}
}

func TestModes(t *testing.T) {
	const renameCall = 4 // create, write, sync, rename, syncdir
	tests := []struct {
		mode    durabletest.Mode
		content string
		err     error
		later   error
	}{
		{durabletest.Fail, "old", syscall.EIO, nil},
		{durabletest.FailThoughDone, "new", syscall.EIO, nil},
		{durabletest.PowerCut, "new", durabletest.ErrPower, durabletest.ErrPower},
	}
	for _, tt := range tests {
		t.Run(tt.mode.String(), func(t *testing.T) {
			fsys, root := newFS(t)
			fsys.Break(renameCall, tt.mode, nil)
			err := durable.WriteFile(fsys, filepath.Join(root, "old"), []byte("new"), 0o640)
			if !errors.Is(err, tt.err) {
				t.Errorf("WriteFile = %v, want %v", err, tt.err)
			}
			if got := content(t, filepath.Join(root, "old")); got != tt.content {
				t.Errorf("the file holds %q, want %q", got, tt.content)
			}
			if err := fsys.SyncDir(root); !errors.Is(err, tt.later) {
				t.Errorf("a later call = %v, want %v", err, tt.later)
			}
		})
	}
}

func TestWriteFileHoldsOldOrNewAtEveryCrash(t *testing.T) {
	fsys, root := newFS(t)
	if err := durable.WriteFile(fsys, filepath.Join(root, "old"), []byte("new"), 0o640); err != nil {
		t.Fatal(err)
	}
	calls := len(fsys.Calls())
	for at := 1; at <= calls; at++ {
		for _, mode := range []durabletest.Mode{durabletest.Fail, durabletest.FailThoughDone, durabletest.PowerCut} {
			for seed := range uint64(20) {
				fsys, root := newFS(t)
				fsys.Break(at, mode, nil)
				err := durable.WriteFile(fsys, filepath.Join(root, "old"), []byte("new"), 0o640)
				after := filepath.Join(t.TempDir(), "after")
				if err := fsys.Crash(after, durabletest.Some(seed)); err != nil {
					t.Fatal(err)
				}
				got := content(t, filepath.Join(after, "old"))
				if got != "new" && (got != "old" || err == nil) {
					t.Errorf("call %d %v, seed %d: the file holds %q, and WriteFile returned %v", at, mode, seed, got, err)
				}
			}
		}
	}
}
