// Package listen opens what acproxy is reached at: TCP addresses, unix sockets, and sockets that systemd has opened for it.
package listen

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
)

// What an address begins with that is not one of TCP.
const (
	unixPrefix    = "unix:"
	systemdPrefix = "systemd:"
)

// MaxPath is how long the path of a unix socket may be in bytes: what fits into sockaddr_un on Linux with the zero that ends it.
const MaxPath = 107

// UnixPath returns the path of a unix socket's address, "unix:/run/acproxy/nodes.sock". It reports false for any other address.
func UnixPath(address string) (path string, ok bool) { return strings.CutPrefix(address, unixPrefix) }

// SystemdName returns the name of a socket that systemd opens, as in "systemd:http". It reports false for any other address.
func SystemdName(address string) (name string, ok bool) {
	return strings.CutPrefix(address, systemdPrefix)
}

// UnixAddress returns the address of a unix socket at a path.
func UnixAddress(path string) string { return unixPrefix + path }

// Sockets are those that a process was started with, by the names that its service manager gave them. The zero value has none. It is safe for concurrent
// use.
type Sockets struct {
	mu    sync.Mutex
	named map[string][]net.Listener
	taken map[string]bool
}

// Inherit returns the sockets that systemd has handed over to this process (sd_listen_fds(3)), which happens once: nobody else finds them afterwards. It
// fails for one that takes no connections.
func Inherit() (*Sockets, error) { return inherit(activation.Files(true)) }

func inherit(files []*os.File) (*Sockets, error) {
	s := &Sockets{named: make(map[string][]net.Listener), taken: make(map[string]bool)}
	var errs []error
	for _, f := range files {
		l, err := net.FileListener(f)
		// It has a descriptor of its own.
		err = errors.Join(err, f.Close())
		if err == nil {
			switch l.(type) {
			case *net.TCPListener, *net.UnixListener:
				s.named[f.Name()] = append(s.named[f.Name()], l)
				continue
			}
			err = l.Close()
		}
		errs = append(errs, fmt.Errorf("systemd has handed over %q, which is no stream socket that listens (write it as ListenStream=, without Accept=yes): %w", f.Name(),
			cmpErr(err, errors.ErrUnsupported)))
	}
	if len(errs) > 0 {
		return nil, errors.Join(append(errs, s.Close())...)
	}
	return s, nil
}

func cmpErr(err, fallback error) error {
	if err != nil {
		return err
	}
	return fallback
}

// Open listens at an address: host and port, "unix:" and the path of a unix socket, which gets mode, or "systemd:" and the name of sockets that the process
// was started with, of which there may be several. Whoever calls closes them.
func (s *Sockets) Open(ctx context.Context, address string, mode fs.FileMode) ([]net.Listener, error) {
	if name, ok := SystemdName(address); ok {
		return s.take(name)
	}
	var l net.Listener
	var err error
	if path, ok := UnixPath(address); ok {
		l, err = Unix(ctx, path, mode)
	} else {
		l, err = TCP(ctx, address)
	}
	if err != nil {
		return nil, err
	}
	return []net.Listener{l}, nil
}

// TCP listens at a TCP address. It is TCP alone: the connections of a socket for Multipath TCP, which Go would make, know neither TCP_USER_TIMEOUT nor all
// that sendfile is good for.
func TCP(ctx context.Context, address string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(ctx, "tcp", address)
}

// take returns the sockets of a name, which are given away once.
func (s *Sockets) take(name string) ([]net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.named[name]
	switch {
	case s.taken[name]:
		return nil, fmt.Errorf("the socket %q of systemd is served already: two addresses of the configuration name it", name)
	case len(found) == 0 && len(s.named) == 0:
		return nil, fmt.Errorf("systemd has handed over no sockets, so there is none named %q: start acproxy by its socket unit (systemctl enable --now acproxy.socket), or write an address", name)
	case len(found) == 0:
		return nil, fmt.Errorf("systemd has handed over no socket named %q, but %s: give it that name (FileDescriptorName= in the socket unit), or write one of these", name, quoted(s.named))
	}
	s.taken[name] = true
	out := make([]net.Listener, len(found))
	for i, l := range found {
		if u, ok := l.(*net.UnixListener); ok {
			// The path belongs to systemd.
			u.SetUnlinkOnClose(false)
			out[i] = &unixListener{UnixListener: u}
			continue
		}
		out[i] = l
	}
	return out, nil
}

// Unused returns an error that names the sockets that nobody has opened, nil if there are none: who connects to one of them would wait without end.
func (s *Sockets) Unused() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := maps.Clone(s.named)
	maps.DeleteFunc(left, func(name string, _ []net.Listener) bool { return s.taken[name] })
	if len(left) == 0 {
		return nil
	}
	first := slices.Sorted(maps.Keys(left))[0]
	return fmt.Errorf("systemd has handed over %s, which no address of the configuration names: write address: %s%s for it, or take it out of the socket unit", quoted(left), systemdPrefix, first)
}

// Close closes the sockets that nobody has opened.
func (s *Sockets) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for name, listeners := range s.named {
		if s.taken[name] {
			continue
		}
		for _, l := range listeners {
			errs = append(errs, l.Close())
		}
	}
	s.named = nil
	return errors.Join(errs...)
}

func quoted(named map[string][]net.Listener) string {
	names := slices.Sorted(maps.Keys(named))
	for i, name := range names {
		names[i] = fmt.Sprintf("%q", name)
	}
	return strings.Join(names, ", ")
}
