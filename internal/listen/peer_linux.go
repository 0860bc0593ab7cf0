package listen

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// peerOf returns who is at the other end (unix(7), SO_PEERCRED).
func peerOf(c *net.UnixConn) peer {
	raw, err := c.SyscallConn()
	if err != nil {
		return "unix"
	}
	var cred *unix.Ucred
	if controlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); controlErr != nil || err != nil {
		return "unix"
	}
	return peer(fmt.Sprintf("unix/uid=%d,pid=%d", cred.Uid, cred.Pid))
}
