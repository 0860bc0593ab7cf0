//go:build unix

package cache_test

import (
	"os"
	"sync"
	"syscall"
	"testing"
)

// blockOpen puts something under a name that whoever opens it to read waits for. The returned function waits for that, and lets it go on: what it
// reads, then and from then on, is nothing.
func blockOpen(t *testing.T, name string) (unblock func()) {
	t.Helper()
	if err := syscall.Mkfifo(name, 0o640); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		write(t, name+".empty", nil)
		if err := os.Rename(name+".empty", name); err != nil {
			t.Error(err)
		}
	})
}
