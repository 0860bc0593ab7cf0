package listen

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// dialTime is how long a server at the other end of a unix socket may take to take a connection.
const dialTime = 5 * time.Second

// Unix listens on a unix socket at path with the permissions of mode. It replaces the socket of a server that is no more, and fails for one that somebody
// listens on, and for any other file. Closing the listener removes the socket, unless another one has taken its place. The connections' remote address
// says who is at the other end, as far as the system tells.
func Unix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	if len(path) > MaxPath {
		return nil, fmt.Errorf("%s is %d bytes long, a socket's path may have %d", path, len(path), MaxPath)
	}
	// Between looking for a server and listening nobody else may do the same: both would find none, and the second would remove the socket of the first.
	unlock, err := lockDir(ctx, filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("making the socket %s: %w", path, err)
	}
	defer unlock()
	if err := clearAway(ctx, path); err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{Control: startPrivate}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(errors.ErrUnsupported, l.Close()) // cannot happen: "unix" gives no others
	}
	u.SetUnlinkOnClose(false)
	out := &unixListener{UnixListener: u, path: path}
	err = os.Chmod(path, mode)
	if err == nil {
		out.file, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(err, u.Close(), os.Remove(path))
	}
	return out, nil
}

// clearAway removes a socket on which nobody listens.
func clearAway(ctx context.Context, path string) error {
	switch st, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there already, and no socket: remove it, or give the socket another path", path)
	}
	conn, err := (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		_ = conn.Close()
		return inUse(path)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded):
		// As many connections wait there as may, so somebody will be there to take them.
		return inUse(path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return ignoreMissing(os.Remove(path))
	}
	return fmt.Errorf("finding out whether a server listens on %s: %w", path, err)
}

// inUse says that somebody listens. It is the system's error for a TCP port that is taken.
func inUse(path string) error {
	return fmt.Errorf("another server answers on %s: %w", path, syscall.EADDRINUSE)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// unixListener is a unix socket that says who connects.
type unixListener struct {
	*net.UnixListener
	path string      // that Close removes, "" if it belongs to somebody else
	file os.FileInfo // what was made at path
	once sync.Once
}

// Accept waits for a connection.
func (l *unixListener) Accept() (net.Conn, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return &unixConn{conn, peerOf(conn)}, nil
}

// Close ends the listening and removes the socket.
func (l *unixListener) Close() error {
	var err error
	l.once.Do(func() {
		if l.path == "" {
			return
		}
		// Before it is closed, because until then nothing else can have its inode.
		if st, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(st, l.file) {
			err = ignoreMissing(os.Remove(l.path))
		}
	})
	return errors.Join(err, l.UnixListener.Close())
}

// unixConn is a connection of which is known who is at the other end.
type unixConn struct {
	*net.UnixConn
	peer net.Addr
}

// RemoteAddr returns who connected, as in unix/uid=1000,pid=77.
func (c *unixConn) RemoteAddr() net.Addr { return c.peer }

// A peer is who is at the other end of a unix socket.
type peer string

// Network returns "unix".
func (p peer) Network() string { return "unix" }

// String returns the peer: no colon is in it, so that nothing of it is taken for a port.
func (p peer) String() string { return string(p) }
