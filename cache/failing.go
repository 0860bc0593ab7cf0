package cache

import (
	"errors"
	"io/fs"
	"sync/atomic"

	"github.com/acproxy/acproxy/internal/durable"
)

// failing is a file system that remembers whether anything in it failed that makes names come and go. After that a blob may be without its sidecar, a sidecar
// without its blob, or both without their rows, so that the next start has to compare the files with the index, however well this one ends.
type failing struct {
	durable.FS
	failed atomic.Bool
}

func (f *failing) note(err error) error {
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.failed.Store(true)
	}
	return err
}

func (f *failing) MkdirAll(dir string, perm fs.FileMode) error {
	return f.note(f.FS.MkdirAll(dir, perm))
}

func (f *failing) Rename(from, to string) error { return f.note(f.FS.Rename(from, to)) }

func (f *failing) Remove(name string) error { return f.note(f.FS.Remove(name)) }

func (f *failing) SyncDir(dir string) error { return f.note(f.FS.SyncDir(dir)) }
