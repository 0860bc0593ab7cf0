package durable

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// StartWriteback tells the operating system to begin writing n bytes at offset to the disk, and doesn't wait for it, so that a later Sync finds
// little left to do. It promises nothing: what it can't do it leaves to Sync.
func StartWriteback(f File, offset, n int64) {
	conn, ok := f.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	// A failure shows again in Sync, which is where it counts.
	_ = raw.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), offset, n, unix.SYNC_FILE_RANGE_WRITE) })
}
