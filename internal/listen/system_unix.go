//go:build unix

package listen

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockDir waits until nobody else makes a socket in a directory.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*dialTime)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // which unlocks it
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			// A file system without locks. Two servers that start in the same moment is all that is lost.
			return func() { _ = f.Close() }, nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(errors.New("another process holds the lock of "+dir), f.Close())
		}
	}
}

// startPrivate lets nobody else connect before the socket has the permissions that it should have: on Linux the file gets those of the descriptor.
func startPrivate(_, _ string, c syscall.RawConn) error {
	// Where that can't be done, the file has those of the umask for a moment.
	return c.Control(func(fd uintptr) { _ = unix.Fchmod(int(fd), 0o600) })
}
