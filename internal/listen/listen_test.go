package listen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// helper is the variable that makes this test binary a server that is killed.
const helper = "ACPROXY_TEST_LISTEN"

func TestMain(m *testing.M) {
	if path := os.Getenv(helper); path != "" {
		if _, err := Unix(context.Background(), path, 0o600); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("listening")
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// dir returns a directory with a path that is short enough.
func dir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "acproxy-listen-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func open(t *testing.T, path string, mode fs.FileMode) net.Listener {
	t.Helper()
	l, err := Unix(t.Context(), path, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestUnixMode(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	for _, mode := range []fs.FileMode{0o600, 0o660, 0o666, 0o777} {
		l := open(t, path, mode)
		st, err := os.Lstat(path)
		if err != nil || st.Mode() != fs.ModeSocket|mode {
			t.Errorf("mode %v, %v; want %v", st.Mode(), err, fs.ModeSocket|mode)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Close the socket is still there: %v", err)
		}
	}
}

// TestUnixIsNeverOpenToOthers looks at the permissions for as long as the socket is being made.
func TestUnixIsNeverOpenToOthers(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(dir(t), "s")
	stop, looked := make(chan struct{}), make(chan fs.FileMode)
	go func() {
		var seen fs.FileMode
		defer func() { looked <- seen }()
		for {
			select {
			case <-stop:
				return
			default:
				if st, err := os.Lstat(path); err == nil {
					seen |= st.Mode().Perm()
				}
			}
		}
	}()
	for range 300 {
		if err := open(t, path, 0o600).Close(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if seen := <-looked; seen&^0o600 != 0 {
		t.Errorf("for a moment the socket had the permissions %v", seen)
	}
}

func TestUnixTellsWhoConnects(t *testing.T) {
	l := open(t, filepath.Join(dir(t), "s"), 0o600)
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if got, want := accepted.RemoteAddr().String(), fmt.Sprintf("unix/uid=%d,pid=%d", os.Getuid(), os.Getpid()); got != want {
		t.Errorf("RemoteAddr = %s, want %s", got, want)
	}
}

func TestUnixRefuses(t *testing.T) {
	d := dir(t)
	path := func(name string) string { return filepath.Join(d, name) }
	open(t, path("live"), 0o600)
	if err := os.WriteFile(path("file"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("live"), path("link")); err != nil {
		t.Fatal(err)
	}
	// Its queue is full: nobody accepts.
	full := open(t, path("full"), 0o600)
	fill(t, full.Addr().String())
	for _, tt := range []struct {
		name, path, says string
		is               error
	}{
		{"a server that lives", path("live"), "another server answers on " + path("live"), syscall.EADDRINUSE},
		{"a server that is busy", path("full"), "another server answers on " + path("full"), syscall.EADDRINUSE},
		{"a file", path("file"), "no socket", nil},
		{"a link", path("link"), "no socket", nil},
		{"a directory", d, "no socket", nil},
		{"no directory", filepath.Join(d, "missing", "s"), filepath.Join(d, "missing"), fs.ErrNotExist},
		{"a path that is too long", "/" + strings.Repeat("s", MaxPath), "may have 107", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Unix(t.Context(), tt.path, 0o600)
			if err == nil {
				_ = l.Close()
				t.Fatal("it listens")
			}
			if !strings.Contains(err.Error(), tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("the error is %q, want %q in it, and %v", err, tt.says, tt.is)
			}
		})
	}
	if text, err := os.ReadFile(path("file")); string(text) != "precious" {
		t.Errorf("the file is %q, %v", text, err)
	}
}

// fill connects until the queue of a socket is full.
func fill(t *testing.T, path string) {
	t.Helper()
	for range 1 << 16 {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err != nil {
			t.Skipf("as many descriptors can't be had: %v", err)
		}
		t.Cleanup(func() { _ = syscall.Close(fd) })
		if err := syscall.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
			return
		}
	}
	t.Fatal("the queue never was full")
}

// TestUnixReplacesADeadServer kills a server and listens where it did.
func TestUnixReplacesADeadServer(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helper+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, len("listening\n"))
	if _, err := io.ReadFull(out, said); err != nil || string(said) != "listening\n" {
		t.Fatalf("the server says %q, %v", said, err)
	}
	if _, err := Unix(t.Context(), path, 0o600); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("while it lives: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("the dead server has left nothing behind: %v", err)
	}
	l := open(t, path, 0o600)
	if conn, err := net.Dial("unix", l.Addr().String()); err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}
}

// TestUnixOneOfMany has many find a dead server's socket at once: one of them listens, and stays reachable.
func TestUnixOneOfMany(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	for range 50 {
		dead, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		dead.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = dead.Close()
		var mu sync.Mutex
		var listening []net.Listener
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				l, err := Unix(t.Context(), path, 0o600)
				if err != nil {
					if !errors.Is(err, syscall.EADDRINUSE) {
						t.Error(err)
					}
					return
				}
				mu.Lock()
				defer mu.Unlock()
				listening = append(listening, l)
			})
		}
		all.Wait()
		if len(listening) != 1 {
			t.Errorf("%d listen, want 1", len(listening))
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
		for _, l := range listening {
			_ = l.Close()
		}
	}
}

// TestUnixLeavesAnothersSocket closes a listener whose place somebody else has taken.
func TestUnixLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	first := open(t, path, 0o600)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	open(t, path, 0o600)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the other's socket is gone: %v", err)
	}
}

// given returns what systemd would have handed over.
func given(t *testing.T, name string, l net.Listener) *os.File {
	t.Helper()
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	return os.NewFile(uintptr(fd), name)
}

func tcp(t *testing.T) net.Listener {
	t.Helper()
	l, err := TCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestSystemd(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	unix, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	unix.(*net.UnixListener).SetUnlinkOnClose(false)
	s, err := inherit([]*os.File{given(t, "http", tcp(t)), given(t, "http", tcp(t)), given(t, "nodes", unix)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), "systemd:https", 0); err == nil || !strings.Contains(err.Error(), `named "https", but "http", "nodes"`) {
		t.Errorf("a name that isn't there: %v", err)
	}
	listeners, err := s.Open(t.Context(), "systemd:http", 0)
	if err != nil || len(listeners) != 2 {
		t.Fatalf("Open = %d listeners, %v; want 2", len(listeners), err)
	}
	for _, l := range listeners {
		if conn, err := net.Dial("tcp", l.Addr().String()); err != nil {
			t.Error(err)
		} else {
			_ = conn.Close()
		}
		_ = l.Close()
	}
	if _, err := s.Open(t.Context(), "systemd:http", 0); err == nil || !strings.Contains(err.Error(), "served already") {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := s.Unused(); err == nil || !strings.Contains(err.Error(), "write address: systemd:nodes") {
		t.Errorf("Unused = %v", err)
	}
	listeners, err = s.Open(t.Context(), "systemd:nodes", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unused(); err != nil {
		t.Errorf("Unused = %v, all are taken", err)
	}
	if err := listeners[0].Close(); err != nil {
		t.Error(err)
	}
	// It is systemd's, and its next start of the service has it.
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of systemd is gone: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestSystemdHandedOverNothing(t *testing.T) {
	s, err := Inherit()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), "systemd:http", 0); err == nil || !strings.Contains(err.Error(), "handed over no sockets") || !strings.Contains(err.Error(), "acproxy.socket") {
		t.Errorf("Open = %v", err)
	}
	if err := errors.Join(s.Unused(), s.Close()); err != nil {
		t.Error(err)
	}
}

func TestSystemdSocketsThatDontListen(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := udp.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	_ = udp.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	_, err = inherit([]*os.File{os.NewFile(uintptr(fd), "dns"), given(t, "http", tcp(t))})
	if err == nil || !strings.Contains(err.Error(), `"dns"`) || !strings.Contains(err.Error(), "ListenStream=") {
		t.Errorf("inherit = %v", err)
	}
}
