// Package durable writes files that survive power loss: whole or not at all.
package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// TempPrefix begins the name of every temporary file that WriteFile makes. One that is found at start was left behind by a crash and may be
// removed.
const TempPrefix = ".tmp-"

// An FS is the part of a file system that writing durably needs. It exists so that tests can make each call fail, fail although it was
// done, or forget what was not synced; reading needs no such thing and goes to package os directly.
type FS interface {
	MkdirAll(dir string, perm fs.FileMode) error
	// Create makes a new file open for reading and writing. It fails if the name exists.
	Create(name string, perm fs.FileMode) (File, error)
	// OpenFile opens an existing file for reading and writing.
	OpenFile(name string) (File, error)
	Rename(from, to string) error
	Remove(name string) error
	// SyncDir makes what was created, renamed and removed in dir durable.
	SyncDir(dir string) error
}

// A File is an open file of an FS.
type File interface {
	io.Writer
	io.WriterAt
	io.ReaderAt
	io.Closer
	Sync() error
	Truncate(size int64) error
	Name() string
}

// OS is the FS of the operating system. What root makes belongs to whom the directory belongs that it is made in, so that root can run commands beside a
// service that has a user of its own, and leaves nothing there that the service can't read.
type OS struct{}

var _ FS = OS{}

// MkdirAll is [os.MkdirAll].
func (o OS) MkdirAll(dir string, perm fs.FileMode) error {
	if _, err := os.Stat(dir); os.Geteuid() != 0 || err == nil {
		return os.MkdirAll(dir, perm)
	}
	above := filepath.Dir(filepath.Clean(dir))
	if err := o.MkdirAll(above, perm); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm); err != nil {
		// Somebody else may have made it in between.
		return os.MkdirAll(dir, perm)
	}
	d, err := openMade(dir)
	if err != nil {
		return err
	}
	return errors.Join(inherit(d, above), d.Close())
}

// Create is [os.OpenFile] for a name that must not exist.
func (OS) Create(name string, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
	if err != nil || os.Geteuid() != 0 {
		return f, err
	}
	if err := inherit(f, filepath.Dir(name)); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(name))
	}
	return f, nil
}

// OpenFile is [os.OpenFile] for a name that must exist.
func (OS) OpenFile(name string) (File, error) { return os.OpenFile(name, os.O_RDWR, 0) }

// Rename is [os.Rename].
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove is [os.Remove].
func (OS) Remove(name string) error { return os.Remove(name) }

// SyncDir syncs a directory.
func (OS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// WriteFile replaces name with data: after a crash at any moment name holds the old content or the new, and once WriteFile has returned
// nil, the new. A nil fsys means OS. The temporary file stands beside name.
//
//	create .tmp-… ─▶ write ─▶ fsync ─▶ close ─▶ rename over name ─▶ fsync directory
func WriteFile(fsys FS, name string, data []byte, perm fs.FileMode) error {
	return Replace(fsys, filepath.Join(filepath.Dir(name), TempPrefix+rand.Text()), name, data, perm)
}

// Rewrite is [WriteFile] for a file that one process writes over and over: there is one name for what isn't whole yet, name with ".new" behind it, so that what a
// killed process left there goes with the next writing.
func Rewrite(name string, data []byte, perm fs.FileMode) error {
	unfinished := name + ".new"
	if err := os.Remove(unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return Replace(nil, unfinished, name, data, perm)
}

// Replace is [WriteFile] with a temporary file that the caller names: one that must not exist yet, on the same file system. After a crash it
// may be left over.
func Replace(fsys FS, temp, name string, data []byte, perm fs.FileMode) (err error) {
	if fsys == nil {
		fsys = OS{}
	}
	f, err := fsys.Create(temp, perm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// The first error is the one to tell; what can't be removed is removed at the next start.
			_ = fsys.Remove(temp)
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	if err := fsys.Rename(temp, name); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}
