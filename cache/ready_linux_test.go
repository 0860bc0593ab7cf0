package cache

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestReadyReaderReadsAsReadAtDoes: whole, past the end, from a file that was closed, and from another one afterwards.
func TestReadyReaderReadsAsReadAtDoes(t *testing.T) {
	dir := t.TempDir()
	open := func(name string, content []byte) *os.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	content := bytes.Repeat([]byte("0123456789abcdef"), 1000)
	f := open("one", content)
	var r readyReader
	for _, at := range []int64{0, 4096, 11904, 11905, 15999, 16000, 1 << 40} {
		got, want := make([]byte, 4096), make([]byte, 4096)
		n, err := r.read(f, got, at)
		wantN, wantErr := f.ReadAt(want, at)
		if n != wantN || !errors.Is(err, wantErr) || !bytes.Equal(got[:n], want[:n]) {
			t.Errorf("at %d: %d, %v, want %d, %v", at, n, err, wantN, wantErr)
		}
	}
	other := open("other", []byte("other"))
	b := make([]byte, 5)
	if n, err := r.read(other, b, 0); err != nil || string(b[:n]) != "other" {
		t.Errorf("of the other file: %q, %v", b[:n], err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := r.read(f, b, 0); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("after closing: %d, %v", n, err)
	}
}

// TestReadyReaderBesideClose: the number of a file that is closed may be another's at once, and must not be read from then.
func TestReadyReaderBesideClose(t *testing.T) {
	dir := t.TempDir()
	var paths []string
	for _, c := range "ab" {
		path := filepath.Join(dir, string(c))
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte(c)}, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	for i := range 500 {
		mine, err := os.Open(paths[i%2])
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		// Ends when the file is closed; waited for below.
		wg.Go(func() {
			var r readyReader
			b := make([]byte, 4096)
			for {
				n, err := r.read(mine, b, 0)
				if err != nil && err != io.EOF {
					return
				}
				if n != 4096 || b[0] != "ab"[i%2] || b[4095] != b[0] {
					t.Errorf("%d bytes, %.8q", n, b)
				}
			}
		})
		if err := mine.Close(); err != nil {
			t.Fatal(err)
		}
		another, err := os.Open(paths[1-i%2])
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		another.Close()
	}
}
