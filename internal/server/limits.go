package server

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/problem"
)

// Limits bound what one client, or all of them, may ask for at once. A field that is 0 sets no limit.
type Limits struct {
	Rate  int // requests of one client in a second
	Burst int // requests of one client at once when there were none for a while; 0 means as many as in a second
	// MaxConnections is how many connections a listener has at once; further ones wait to be accepted.
	MaxConnections int
	// MaxConnectionsPerClient is how many of these are one client's; further ones are closed.
	MaxConnectionsPerClient int
}

// clientAddress returns what limits take for one client: an IPv4 address, or the 64 bits of an IPv6 address that a network's hosts have in common. It is not
// valid for what has no address, such as a unix socket's.
func clientAddress(address string) netip.Addr {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Addr{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	if addr.Is6() {
		// 64 is a number of bits that there are.
		prefix, _ := addr.Prefix(64)
		return prefix.Addr()
	}
	return addr
}

// maxClients bounds how many clients' rates are remembered.
const maxClients = 16 << 10

// rates counts the requests of clients.
type rates struct {
	limit rate.Limit
	burst int
	now   func() time.Time

	mu      sync.Mutex
	clients map[netip.Addr]*rate.Limiter
}

// newRates returns nil if there is no limit.
func newRates(l Limits, now func() time.Time) *rates {
	if l.Rate <= 0 {
		return nil
	}
	burst := l.Burst
	if burst <= 0 {
		burst = l.Rate
	}
	return &rates{limit: rate.Limit(l.Rate), burst: burst, now: now, clients: make(map[netip.Addr]*rate.Limiter)}
}

// check counts a request, and returns an error if it is one too many.
func (l *rates) check(r *http.Request) error {
	if l == nil {
		return nil
	}
	addr := clientAddress(r.RemoteAddr)
	if !addr.IsValid() {
		return nil
	}
	now := l.now()
	if l.of(addr, now).AllowN(now, 1) {
		return nil
	}
	return problem.WithStatus(http.StatusTooManyRequests, &acproxy.Error{
		Kind: acproxy.ErrBusy, Code: "too-many-requests", RetryAfter: time.Second,
		Detail: "there are more requests from " + addr.String() + " than clients.rate allows; ask again later",
	})
}

// of returns the limiter of a client.
func (l *rates) of(addr netip.Addr, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	client, ok := l.clients[addr]
	if ok {
		return client
	}
	if len(l.clients) >= maxClients {
		l.forget(now)
	}
	client = rate.NewLimiter(l.limit, l.burst)
	l.clients[addr] = client
	return client
}

// forget makes room: a client that could ask for all at once is as good as a new one.
func (l *rates) forget(now time.Time) {
	for addr, client := range l.clients {
		if client.TokensAt(now) >= float64(l.burst) {
			delete(l.clients, addr)
		}
	}
	if len(l.clients) >= maxClients {
		clear(l.clients)
	}
}

// limitedListener accepts no more connections than it may.
type limitedListener struct {
	net.Listener
	free   chan struct{} // has room for all that there may be; nil if there may be any number
	most   int           // of one client, 0 for any number
	closed chan struct{}
	once   sync.Once

	mu  sync.Mutex
	has map[netip.Addr]int
}

func newLimitedListener(l net.Listener, limits Limits) net.Listener {
	if limits.MaxConnections <= 0 && limits.MaxConnectionsPerClient <= 0 {
		return l
	}
	out := &limitedListener{Listener: l, most: limits.MaxConnectionsPerClient, closed: make(chan struct{}), has: make(map[netip.Addr]int)}
	if limits.MaxConnections > 0 {
		out.free = make(chan struct{}, limits.MaxConnections)
	}
	return out
}

// Accept waits for a connection, and first until there may be one more.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		if l.free != nil {
			select {
			case l.free <- struct{}{}:
			case <-l.closed:
				return nil, net.ErrClosed
			}
		}
		conn, err := l.Listener.Accept()
		if err != nil {
			l.leave(netip.Addr{})
			return nil, err
		}
		addr := clientAddress(conn.RemoteAddr().String())
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			// What comes by a unix socket has no address to be counted by.
			return &countedConn{Conn: conn, leave: func() { l.leave(netip.Addr{}) }}, nil
		}
		if l.enter(addr) {
			return &limitedConn{TCPConn: tcp, leave: func() { l.leave(addr) }}, nil
		}
		l.leave(netip.Addr{})
		// Whoever has so many already is told by that, and by the others' going on.
		_ = conn.Close()
	}
}

// enter counts a connection of a client, and reports false if that is one too many.
func (l *limitedListener) enter(addr netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.most > 0 && l.has[addr] >= l.most {
		return false
	}
	l.has[addr]++
	return true
}

// leave gives the place of a connection back, and that of a client if it has one.
func (l *limitedListener) leave(addr netip.Addr) {
	if l.free != nil {
		<-l.free
	}
	if !addr.IsValid() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.has[addr]--; l.has[addr] == 0 {
		delete(l.has, addr)
	}
}

// Close ends Accept.
func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn is a connection that counts.
type limitedConn struct {
	*net.TCPConn
	leave func()
	once  sync.Once
}

// Close closes the connection, which counts no more.
func (c *limitedConn) Close() error {
	err := c.TCPConn.Close()
	c.once.Do(c.leave)
	return err
}

// countedConn is a connection that counts, but for no client.
type countedConn struct {
	net.Conn
	leave func()
	once  sync.Once
}

// Close closes the connection, which counts no more.
func (c *countedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.leave)
	return err
}
