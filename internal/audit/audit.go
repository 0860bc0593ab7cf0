// Package audit appends decisions to a file of JSON lines, and puts the file aside when it has grown.
package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
)

// Options says how long the audit is.
type Options struct {
	MaxSize  int64 // bytes at which the file is put aside; 0 means 100 MiB
	MaxFiles int   // files put aside that are kept: NAME.1 is the latest; 0 means 10
}

// Defaults of Options.
const (
	DefaultMaxSize  = 100 << 20
	DefaultMaxFiles = 10
)

// A File is an audit file. It is safe for concurrent use.
type File struct {
	name     string
	opts     Options
	openFile func(name string, flag int, perm fs.FileMode) (*os.File, error) // os.OpenFile

	mu   sync.Mutex
	file *os.File // nil while it couldn't be opened
	size int64
}

// Open opens an audit file for appending, and makes it, readable by its owner and group, if it isn't there. On a read-only file system that is left to
// Append. The caller closes it.
func Open(name string, opts Options) (*File, error) {
	if opts.MaxSize == 0 {
		opts.MaxSize = DefaultMaxSize
	}
	if opts.MaxFiles == 0 {
		opts.MaxFiles = DefaultMaxFiles
	}
	f := &File{name: name, opts: opts, openFile: os.OpenFile}
	if err := f.open(); err != nil && !errors.Is(err, syscall.EROFS) {
		return nil, err
	}
	return f, nil
}

func (f *File) open() error {
	file, err := f.openFile(f.name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return fmt.Errorf("opening the audit: %w", err)
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	f.file, f.size = file, info.Size()
	return nil
}

// Append appends one line. A line is written with one call, so that a reader never sees half of it unless the disk is full; then the error says so and
// the next Append begins a new line.
func (f *File) Append(value any) error {
	line, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("appending to the audit: %w", err)
	}
	line = append(line, '\n')
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		if err := f.open(); err != nil {
			return err
		}
	}
	if f.size > 0 && f.size+int64(len(line)) > f.opts.MaxSize {
		if err := f.rotate(); err != nil {
			return err
		}
	}
	n, err := f.file.Write(line)
	f.size += int64(n)
	if err != nil && n > 0 {
		// Cut off what came of the line; if that fails too, its reader has to skip it.
		if cut := f.file.Truncate(f.size - int64(n)); cut == nil {
			f.size -= int64(n)
		}
	}
	if err != nil {
		return fmt.Errorf("appending to the audit: %w", err)
	}
	return nil
}

// rotate puts the file aside as NAME.1, and those put aside before one further, up to the first number that is free: what went wrong halfway is gone on
// with, and doesn't push out one more file each time. f.mu is held.
func (f *File) rotate() error {
	aside := func(i int) string { return fmt.Sprintf("%s.%d", f.name, i) }
	free := 1
	for ; free < f.opts.MaxFiles; free++ {
		if _, err := os.Lstat(aside(free)); errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	for i := free - 1; i > 0; i-- {
		if err := os.Rename(aside(i), aside(i+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotating the audit: %w", err)
		}
	}
	if err := os.Rename(f.name, aside(1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("rotating the audit: %w", err)
	}
	old := f.file
	f.file = nil
	return errors.Join(f.open(), old.Close())
}

// Close closes the file.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}
