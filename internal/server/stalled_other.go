//go:build !linux

package server

import (
	"syscall"
	"time"
)

// cutStalled does nothing: other kernels have no such option.
func cutStalled(syscall.Conn, time.Duration) error { return nil }
