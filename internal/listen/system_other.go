//go:build !unix

package listen

import (
	"context"
	"syscall"
)

func lockDir(context.Context, string) (unlock func(), err error) { return func() {}, nil }

func startPrivate(_, _ string, _ syscall.RawConn) error { return nil }
