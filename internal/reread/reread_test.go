package reread

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	reads := 0
	var trouble error
	both := func() (string, error) {
		reads++
		if trouble != nil {
			return "", trouble
		}
		one, err := os.ReadFile(a)
		two, errTwo := os.ReadFile(b)
		if err := errors.Join(err, errTwo); err != nil {
			return "", err
		}
		return string(one) + string(two), nil
	}
	if _, err := Open([]string{a, b}, both, nil); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("Open without files = %v", err)
	}
	write(a, "1")
	write(b, "1")
	var failures []error
	f, err := Open([]string{a, b}, both, func(err error) { failures = append(failures, err) })
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f.now = func() time.Time { return now }
	want := func(what, said string) {
		t.Helper()
		if got := f.Get(); got != said {
			t.Errorf("%s: Get = %q, want %q", what, got, said)
		}
	}
	want("at first", "11")
	write(b, "2")
	want("at once", "11")
	now = now.Add(lookEvery + time.Second)
	want("a second later", "12")
	before := reads
	for range 10 {
		now = now.Add(2 * lookEvery)
		want("unchanged", "12")
	}
	if reads != before {
		t.Errorf("files that haven't changed were read %d times", reads-before)
	}
	if err := os.Remove(a); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		now = now.Add(2 * lookEvery)
		want("without one of them", "12")
	}
	if len(failures) != 1 || !errors.Is(failures[0], os.ErrNotExist) {
		t.Errorf("failures: %v, want one", failures)
	}
	if err := f.Reload(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Reload = %v", err)
	}
	want("after that", "12")
	write(a, "3")
	if err := f.Reload(); err != nil {
		t.Error(err)
	}
	want("once it is back", "32")

	// What can't be read for a moment is read in the next one, though the file is the same.
	write(a, "4")
	trouble = errors.New("too many open files")
	now = now.Add(2 * lookEvery)
	want("while nothing can be read", "32")
	trouble = nil
	now = now.Add(2 * lookEvery)
	want("when it can be again", "42")

	write(a, "5")
	commit, err := f.Prepare()
	if err != nil {
		t.Fatal(err)
	}
	want("before what was prepared counts", "42")
	commit()
	want("since then", "52")
}

// TestFilesByMany reads and writes at once, and every answer is one that was written.
func TestFilesByMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("0"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Open([]string{path}, func() (string, error) {
		b, err := os.ReadFile(path)
		return string(b), err
	}, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	var using sync.WaitGroup
	for range 8 {
		using.Go(func() {
			for i := range 500 {
				if i%50 == 0 {
					if err := f.Reload(); err != nil {
						t.Error(err)
					}
				}
				if got := f.Get(); strings.Trim(got, "0123456789") != "" {
					t.Errorf("Get = %q", got)
				}
			}
		})
	}
	using.Wait()
}
