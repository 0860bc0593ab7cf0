//go:build !linux

package durable

// StartWriteback does nothing here: Sync does it all.
func StartWriteback(File, int64, int64) {}
