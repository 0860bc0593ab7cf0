package acproxy_test

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/acproxy/acproxy"
)

func TestShortage(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.EMFILE}, true},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.ENFILE)}, true},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EADDRNOTAVAIL)}, true},
		{fmt.Errorf("mapping: %w", syscall.ENOMEM), true},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, false},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.ENOSPC}, false},
		{nil, false},
	} {
		if got := acproxy.Shortage(tt.err); got != tt.want {
			t.Errorf("Shortage(%v) = %v", tt.err, got)
		}
	}
}
