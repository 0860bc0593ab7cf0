package durable

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// OpenDirect opens a file for reading what is on the disk, past the page cache: what others have there stays there, and a bad sector isn't hidden by a
// good page. direct says whether the file system can do that; if so, reads have to be into memory that [Aligned] gives, from offsets that are
// multiples of [Alignment]. See [Buffered].
func OpenDirect(name string) (f *os.File, direct bool, err error) {
	f, err = os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	if !errors.Is(err, unix.EINVAL) {
		return f, err == nil, err
	}
	f, err = os.Open(name)
	return f, false, err
}

// Open opens a regular file for reading. It is os.Open without asking the system whether the file can be waited for, which a regular file can't, and
// which takes as long as the opening.
func Open(name string) (*os.File, error) {
	for {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

// Buffered makes a file that OpenDirect opened one that is read by way of the page cache.
func Buffered(f *os.File) error {
	return control(f, func(fd uintptr) error {
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if err == nil {
			_, err = unix.FcntlInt(fd, unix.F_SETFL, flags&^unix.O_DIRECT)
		}
		return err
	})
}

// Forget tells the operating system that what was read by way of the page cache won't be read again soon. What it can't do it leaves: it is about
// memory only.
func Forget(f *os.File, offset, n int64) {
	_ = control(f, func(fd uintptr) error { return unix.Fadvise(int(fd), offset, n, unix.FADV_DONTNEED) })
}

func control(f *os.File, do func(fd uintptr) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if failed := raw.Control(func(fd uintptr) { err = do(fd) }); failed != nil {
		return failed
	}
	if err != nil {
		return &fs.PathError{Op: "control", Path: f.Name(), Err: err}
	}
	return nil
}
