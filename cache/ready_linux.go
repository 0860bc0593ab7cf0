package cache

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readyReader reads from a file what the operating system has in memory without telling Go's scheduler, which takes a third of the time; what has to
// be waited for is read as usual. The zero value is ready; it is not safe for concurrent use.
type readyReader struct {
	f    *os.File
	conn syscall.RawConn
	call func(fd uintptr)
	// vain is set when the file system can't do this.
	vain bool

	at   int64
	vec  unix.Iovec
	n    int
	errn syscall.Errno
}

// read is f's ReadAt.
func (r *readyReader) read(f *os.File, b []byte, at int64) (int, error) {
	if r.f != f {
		*r = readyReader{f: f}
		var err error
		if r.conn, err = f.SyscallConn(); err != nil {
			r.vain = true
		}
		r.call = r.preadv2
	}
	if r.vain || len(b) == 0 {
		return f.ReadAt(b, at)
	}
	r.vec.Base, r.at = &b[0], at
	r.vec.SetLen(len(b))
	// It keeps the file from being closed meanwhile, and its number from being another's.
	err := r.conn.Control(r.call)
	r.vec.Base = nil
	switch {
	case err == nil && r.errn == 0 && r.n == len(b):
		return r.n, nil
	case r.errn != 0 && r.errn != unix.EAGAIN && r.errn != unix.EINTR:
		// The file system doesn't know how, or the kernel, or somebody forbids it.
		r.vain = true
	}
	return f.ReadAt(b, at)
}

func (r *readyReader) preadv2(fd uintptr) {
	// The offset is given in two halves where a register is too small for it; else the second one counts for nothing (preadv2(2)).
	n, _, errn := unix.RawSyscall6(unix.SYS_PREADV2, fd, uintptr(unsafe.Pointer(&r.vec)), 1, uintptr(r.at), uintptr(uint64(r.at)>>32), unix.RWF_NOWAIT)
	r.n, r.errn = int(n), errn
}
