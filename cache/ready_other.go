//go:build !linux

package cache

import "os"

// readyReader reads from a file.
type readyReader struct{}

func (readyReader) read(f *os.File, b []byte, at int64) (int, error) { return f.ReadAt(b, at) }
