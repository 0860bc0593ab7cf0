//go:build !linux

package server

import (
	"syscall"
	"time"
)

// cutStalled returns nothing: other kernels have no such option.
func cutStalled(time.Duration) func(network, address string, c syscall.RawConn) error { return nil }
