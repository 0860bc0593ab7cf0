package server

import (
	"math"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cutStalled returns what makes the kernel close connections whose other side has taken nothing for a time: it acknowledges nothing, or says all the time
// that it has no room (tcp(7), TCP_USER_TIMEOUT). The kernel alone knows: to a program, a full buffer of which somebody takes a kilobyte a second
// looks like one of which nobody takes anything.
func cutStalled(after time.Duration) func(network, address string, c syscall.RawConn) error {
	// 0 would be as long as the system likes.
	milliseconds := int(min(max(after.Milliseconds(), 1), math.MaxInt32))
	return func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, milliseconds)
		})
		if err != nil {
			return err
		}
		return failed
	}
}
