//go:build unix

package durable

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestRootLeavesNothingOfItsOwn has root make things where somebody else keeps his.
func TestRootLeavesNothingOfItsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	const uid, gid = 64998, 64999
	theirs, mine := t.TempDir(), t.TempDir()
	if err := os.Chown(theirs, uid, gid); err != nil {
		t.Fatal(err)
	}
	owner := func(name string) [2]int {
		t.Helper()
		info, err := os.Lstat(name)
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		return [2]int{int(st.Uid), int(st.Gid)}
	}
	for _, test := range []struct {
		name, dir string
		want      [2]int
	}{
		{"in somebody's directory", theirs, [2]int{uid, gid}},
		{"in root's", mine, [2]int{0, os.Getegid()}},
	} {
		t.Run(test.name, func(t *testing.T) {
			deep := filepath.Join(test.dir, "a", "b")
			// Twice, because what is there already is left alone.
			for range 2 {
				if err := (OS{}).MkdirAll(deep, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			file := filepath.Join(deep, "file")
			if err := WriteFile(nil, file, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{filepath.Dir(deep), deep, file} {
				if got := owner(name); got != test.want {
					t.Errorf("%s belongs to %v, want %v", name, got, test.want)
				}
			}
		})
	}
	if got := owner(theirs); got != [2]int{uid, gid} {
		t.Errorf("the directory itself belongs to %v", got)
	}
}

// TestMadeDirectoryIsNotFollowed has somebody put a symbolic link in the place of what root has made in his directory.
func TestMadeDirectoryIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if d, err := openMade(filepath.Join(dir, "link")); err == nil {
		d.Close()
		t.Error("the link was followed")
	}
}
