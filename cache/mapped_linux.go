package cache

import (
	"bytes"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// residentFiles returns how many bytes of files are mapped into the process and in memory now. Where that can't be told it is 0.
func residentFiles(statm *os.File) int64 {
	if statm == nil {
		return 0
	}
	var b [128]byte
	n, _ := statm.ReadAt(b[:], 0)
	fields := bytes.Fields(b[:n])
	if len(fields) < 3 {
		return 0
	}
	pages, _ := strconv.ParseInt(string(fields[2]), 10, 64) // proc_pid_statm(5): shared
	return pages * int64(os.Getpagesize())
}

// openStatm opens what residentFiles reads, nil if it can't be.
func openStatm() *os.File {
	f, err := os.Open("/proc/self/statm")
	if err != nil {
		return nil
	}
	return f
}

// giveBack has the pages of a map of a file no longer count as the process's. They stay in the operating system's cache, and come back when they
// are touched.
func giveBack(at uintptr, size int64) {
	// A failure leaves them where they are.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, at, uintptr(size), unix.MADV_DONTNEED)
}
