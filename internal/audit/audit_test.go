package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

type line struct {
	N int `json:"n"`
}

func read(t *testing.T, name string) []int {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []int
	for s := bufio.NewScanner(f); s.Scan(); {
		var l line
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			t.Fatalf("%s holds %q: %v", name, s.Text(), err)
		}
		out = append(out, l.N)
	}
	return out
}

func TestAppendGoesOnAfterReopening(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	for i := range 3 {
		f, err := Open(name, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Append(line{i}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(read(t, name)); got != "[0 1 2]" {
		t.Errorf("the file holds %v", got)
	}
}

func TestOpenReturnsNothingWithAnError(t *testing.T) {
	f, err := Open(filepath.Join(t.TempDir(), "missing", "audit.log"), Options{})
	if !errors.Is(err, fs.ErrNotExist) || f != nil {
		t.Errorf("Open in a directory that is missing = %v, %v", f, err)
	}
}

func TestRotation(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	// Lines are 8 bytes: two fit exactly.
	f, err := Open(name, Options{MaxSize: 16, MaxFiles: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 7 {
		if err := f.Append(line{i}); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{name: "[6]", name + ".1": "[4 5]", name + ".2": "[2 3]"} {
		if got := fmt.Sprint(read(t, file)); got != want {
			t.Errorf("%s holds %s, want %s", filepath.Base(file), got, want)
		}
	}
	if _, err := os.Stat(name + ".3"); err == nil {
		t.Error("more files are kept than MaxFiles")
	}
}

func TestConcurrentLinesStayWhole(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	f, err := Open(name, Options{MaxSize: 1000, MaxFiles: 100})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for i := range 100 {
				if err := f.Append(line{w*100 + i}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(name + "*")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[int]bool)
	for _, file := range files {
		for _, n := range read(t, file) {
			seen[n] = true
		}
	}
	if len(seen) != 800 {
		t.Errorf("%d lines were found again, want 800", len(seen))
	}
}

// TestTroubleInRotationLosesNoFiles has a new file not open for a while: those put aside stay, and what is appended later is there.
func TestTroubleInRotationLosesNoFiles(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	// One line each.
	f, err := Open(name, Options{MaxSize: 8, MaxFiles: 3})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := f.Append(line{i}); err != nil {
			t.Fatal(err)
		}
	}
	f.openFile = func(string, int, fs.FileMode) (*os.File, error) { return nil, syscall.EMFILE }
	for range 5 {
		if err := f.Append(line{9}); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("Append without a file = %v, want EMFILE", err)
		}
	}
	f.openFile = os.OpenFile
	if err := f.Append(line{4}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{name: "[4]", name + ".1": "[3]", name + ".2": "[2]", name + ".3": "[1]"} {
		if got := fmt.Sprint(read(t, file)); got != want {
			t.Errorf("%s holds %s, want %s", file, got, want)
		}
	}
}
