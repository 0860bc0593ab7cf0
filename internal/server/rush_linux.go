package server

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rush answers simple requests for as long as they come one after the other, with two system calls for each. [net.Conn] makes three: it asks for bytes
// before it waits for them, in vain each time. Here nobody asks before the kernel has said that there is something, and having got less than there was
// room for, nobody asks again: more comes with a word of its own (epoll(7), on edge-triggered descriptors).
//
// One thing comes without such a word: the end of what a client sends, if it came together with its last request. So nobody waits in a rush for longer
// than some time; then nextRequest is returned, and who asks finds out. With nextOwner comes how much was read of the request.
func (c *briskConn) rush(x *exchange, wait time.Duration) (n int, after next) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, nextNothing
	}
	var until time.Time
	err = raw.Read(func(fd uintptr) bool {
		for {
			// A moment earlier than it could be, so that not every request sets it.
			if now := time.Now(); until.Sub(now) < wait*7/8 {
				until = now.Add(wait)
				if c.SetReadDeadline(until) != nil {
					after = nextNothing
					return true
				}
			}
			var errno syscall.Errno
			n, errno = receive(fd, x.head)
			switch {
			case errno == unix.EAGAIN:
				return false
			case errno == unix.EINTR:
				continue
			case errno != 0:
				after = nextNothing
				return true
			}
			after = c.answer(x, n, func(b []byte) (int, error) { return c.send(fd, b) })
			if after != nextRequest {
				return true
			}
			if n < len(x.head) {
				return false
			}
		}
	})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, nextNothing
	}
	return n, after
}

// receive and send don't tell the scheduler that they are going into the kernel, as they come back at once: that takes longer than they do.
func receive(fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// send sends bytes, at once as far as there is room.
func (c *briskConn) send(fd uintptr, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return c.TCPConn.Write(b)
	case errno != 0:
		return 0, os.NewSyscallError("sendto", errno)
	case int(n) < len(b):
		rest, err := c.TCPConn.Write(b[n:])
		return int(n) + rest, err
	}
	return int(n), nil
}
