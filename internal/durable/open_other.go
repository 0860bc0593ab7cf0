//go:build !linux

package durable

import "os"

// OpenDirect opens a file by way of the page cache: here there is no other.
func OpenDirect(name string) (f *os.File, direct bool, err error) {
	f, err = os.Open(name)
	return f, false, err
}

// Open opens a regular file for reading.
func Open(name string) (*os.File, error) { return os.Open(name) }

// Buffered does nothing here.
func Buffered(*os.File) error { return nil }

// Forget does nothing here.
func Forget(*os.File, int64, int64) {}
