package server

import (
	"math"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cutStalled makes the kernel close connections whose other side has taken nothing for a time: it acknowledges nothing, or says all the time that it has
// no room (tcp(7), TCP_USER_TIMEOUT). The kernel alone knows: to a program, a full buffer of which somebody takes a kilobyte a second looks like one of
// which nobody takes anything. Set on a socket that listens, the time is that of the connections to come, which inherit it.
func cutStalled(socket syscall.Conn, after time.Duration) error {
	// 0 would be as long as the system likes.
	milliseconds := int(min(max(after.Milliseconds(), 1), math.MaxInt32))
	c, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, milliseconds)
	})
	if err != nil {
		return err
	}
	return failed
}
