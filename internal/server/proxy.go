package server

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/problem"
)

// proxy answers clients that have acproxy as their HTTP proxy.
func (s *Server) proxy(w http.ResponseWriter, r *http.Request) error {
	if r.Method == http.MethodConnect {
		return s.connect(w, r)
	}
	host := hostname(r.URL.Host)
	switch {
	case r.URL.Scheme != "http" && r.URL.Scheme != "https":
		return acproxy.Invalid("the scheme %q can't be proxied", r.URL.Scheme)
	case s.imageHost(host):
		s.router.ServeHTTP(w, r)
		return nil
	case !s.cfg.Tunnel:
		return notImageHost(host)
	}
	s.forward(w, r)
	return nil
}

func (s *Server) imageHost(host string) bool { return s.cfg.ImageHost != nil && s.cfg.ImageHost(host) }

func notImageHost(host string) error {
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: "not-an-image-host",
		Detail: host + " is not an image host of this proxy; add it to proxy.hosts (and to the local CA's hosts), or set proxy.tunnel: true to let other hosts through",
	}
}

// connect answers CONNECT: a connection to an image host ends here, one to any other host goes through untouched, if that is allowed.
func (s *Server) connect(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Path != "" {
		return acproxy.Invalid("CONNECT needs host:port, not a path")
	}
	host, port, err := net.SplitHostPort(r.Host)
	if err != nil {
		return acproxy.Invalid("CONNECT needs host:port, not %.128q", r.Host)
	}
	host = hostname(host)
	if !s.imageHost(host) {
		if !s.cfg.Tunnel {
			return notImageHost(host)
		}
		return s.tunnel(w, r)
	}
	if port != "443" {
		return &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-an-image-port", Detail: "image hosts are answered for on port 443 only, not on port " + port}
	}
	if s.inner == nil {
		return &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "no-local-ca",
			Detail: "this proxy has no local CA to answer for " + host + " with; acproxy ca init --host " + host + " makes one",
		}
	}
	to := connected{host: host, shown: credentialsOf(r), auth: access.AllMethods}
	if rec, ok := w.(*recorder); ok {
		to.auth = rec.auth(r)
	}
	conn, err := takeOver(w)
	if err != nil {
		return err
	}
	s.inner.serve(conn, to)
	return nil
}

// takeOver answers a CONNECT request and returns the connection, with what the client sent already.
func takeOver(w http.ResponseWriter) (net.Conn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	noteTakenOver(w)
	// The server's deadlines were for the request.
	err = conn.SetDeadline(time.Time{})
	if err == nil {
		_, err = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	}
	if err != nil {
		_ = conn.Close()
		panic(http.ErrAbortHandler)
	}
	if buffered.Reader.Buffered() == 0 {
		return conn, nil
	}
	return &prefixedConn{Conn: conn, r: buffered.Reader}, nil
}

// prefixedConn is a connection whose beginning was read into a buffer already.
type prefixedConn struct {
	net.Conn
	r io.Reader
}

// Read reads what was buffered, then from the connection.
func (c *prefixedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// tunnel connects the client with a host that is none of ours, within the dial rules.
func (s *Server) tunnel(w http.ResponseWriter, r *http.Request) error {
	up, err := s.cfg.Dial(r.Context(), r.Host)
	if err != nil {
		return err
	}
	defer up.Close()
	// Counted while the HTTP server still knows of the request: from the taking over on it doesn't.
	s.tunnels.Add(1)
	defer s.tunnels.Done()
	down, err := takeOver(w)
	if err != nil {
		return err
	}
	defer down.Close()
	defer context.AfterFunc(s.ctx, func() {
		_ = up.Close() // ends the relays, which is all that is wanted
		_ = down.Close()
	})()
	// Each direction ends when its reader does; closing both connections then ends the other one, and both are waited for.
	var both sync.WaitGroup
	relay := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // a tunnel's ends tell each other what went wrong
		_ = to.Close()
		_ = from.Close()
	}
	both.Go(func() { relay(up, down) })
	both.Go(func() { relay(down, up) })
	both.Wait()
	return nil
}

// forward proxies a plain http request for a host that is none of ours, within the dial rules.
func (s *Server) forward(w http.ResponseWriter, r *http.Request) {
	transport := &http.Transport{
		DialContext:        func(ctx context.Context, _, address string) (net.Conn, error) { return s.cfg.Dial(ctx, address) },
		DisableCompression: true, DisableKeepAlives: true,
	}
	rp := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.Host = p.In.Host
			p.Out.Header.Del("Proxy-Authorization")
			p.Out.Header.Add("Via", "1.1 "+s.cfg.Via)
		},
		Transport: transport,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if acproxy.KindOf(err) == nil {
				err = &acproxy.Error{Kind: acproxy.ErrPublisher, Code: "host-unreachable", Detail: "asking " + r.URL.Host, Err: err}
			}
			s.fail(w, r, err)
		},
	}
	if r.ContentLength != 0 {
		r.Body = &patientBody{r.Body, http.NewResponseController(w), s.cfg.Patience.Stall}
	}
	rp.ServeHTTP(w, r)
}

// inner is the HTTP server inside terminated CONNECT connections: HTTP/1.1 and HTTP/2, keep-alive, one certificate per image host.
type inner struct {
	http     *http.Server
	listener *handedListener
	config   *tls.Config
	patience Patience
	serving  sync.WaitGroup
}

// connectedTo is the key of what a connection was terminated for.
type connectedTo struct{}

// connected is what a CONNECT request said: the host that it named, and what it showed, where clients may show it in which ways.
type connected struct {
	host  string
	shown access.Credentials
	auth  access.Method
}

func newInner(s *Server) *inner {
	in := &inner{
		patience: s.cfg.Patience,
		listener: &handedListener{conns: make(chan net.Conn), closed: make(chan struct{})},
		config:   TLS(),
	}
	in.config.GetCertificate, in.config.NextProtos = s.cfg.Certificate, []string{"h2", "http/1.1"}
	in.http = s.HTTP(Front{})
	// A copy of its own: Serve adds to it while connections are being made with the other.
	in.http.TLSConfig = in.config.Clone()
	in.http.Handler = misdirected(s, in.http.Handler)
	in.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if t, ok := c.(*tls.Conn); ok {
			if h, ok := t.NetConn().(*hostConn); ok {
				return context.WithValue(ctx, connectedTo{}, h.connected)
			}
		}
		return ctx
	}
	// Ends when close closes the listener; close waits for it.
	in.serving.Go(func() { _ = in.http.Serve(in.listener) })
	return in
}

// misdirected refuses requests for another host than the connection was made to (RFC 9110 §15.5.20).
func misdirected(s *Server, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(connectedTo{}).(connected); ok && c.host != requestHost(r) {
			s.fail(w, r, problem.WithStatus(http.StatusMisdirectedRequest, &acproxy.Error{
				Kind: acproxy.ErrInvalid, Code: "misdirected", Detail: "this connection was made to " + c.host + ", not to " + requestHost(r),
			}))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// hostConn remembers what a CONNECT request said.
type hostConn struct {
	net.Conn
	connected
}

// serve shakes hands for a host on a taken-over connection and hands it to the inner server, which closes it.
func (in *inner) serve(conn net.Conn, to connected) {
	host := to.host
	config := in.config.Clone()
	config.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if hello.ServerName == "" {
			// A client that names nobody means the host it asked to be connected to.
			named := *hello
			named.ServerName = host
			hello = &named
		}
		if strings.ToLower(hello.ServerName) != host {
			return nil, errors.New("the TLS server name " + hello.ServerName + " is not " + host + ", which CONNECT named")
		}
		return in.config.GetCertificate(hello)
	}
	t := tls.Server(&hostConn{conn, to}, config)
	ctx, cancel := context.WithTimeout(context.Background(), in.patience.Header)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		_ = t.Close() // the client knows best why it hung up
		return
	}
	in.listener.hand(t)
}

func (in *inner) close() error {
	err := in.listener.Close()
	in.serving.Wait()
	return errors.Join(err, in.http.Close())
}

// handedListener is a listener whose connections are handed to it.
type handedListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *handedListener) hand(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		_ = c.Close()
	}
}

// Accept returns the next connection that was handed over.
func (l *handedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (l *handedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr returns a name, not an address: there is no socket.
func (l *handedListener) Addr() net.Addr { return &net.UnixAddr{Name: "connect", Net: "unix"} }
