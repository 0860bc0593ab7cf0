package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy/test/node"
	"github.com/acproxy/acproxy/test/publisher"
)

func TestProxyDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(large("app", 300<<10))
	for _, tt := range []struct {
		name  string
		http2 bool
		want  string
	}{{"HTTP/1.1 inside", false, "HTTP/1.1"}, {"HTTP/2 inside", true, "HTTP/2.0"}} {
		t.Run(tt.name, func(t *testing.T) {
			var dialled atomic.Int32
			n := s.proxied(node.Options{HTTP2: tt.http2, Resolve: func(hostport string) (string, bool) {
				dialled.Add(1)
				return hostport, hostport == s.server().address("http")
			}})
			for range 3 {
				f := s.fetchAsRkt(n, im)
				if f.Image.Proto != tt.want {
					t.Errorf("the image came over %s, want %s", f.Image.Proto, tt.want)
				}
				if !strings.HasPrefix(f.Endpoint.Image, "https://"+imageHost+"/.acproxy/") {
					t.Errorf("discovery points to %s, want a URL of the image's host", f.Endpoint.Image)
				}
			}
			// Nine requests to one host, one after the other.
			if got := dialled.Load(); got != 1 {
				t.Errorf("%d connections were made, want one for all requests", got)
			}
		})
	}
}

// connect asks the proxy for a connection, and returns it if there is one. The caller closes it.
func (s *scene) connect(target string) (net.Conn, node.Answer) {
	s.t.Helper()
	conn := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(s.t)
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		s.t.Fatal(err)
	}
	a := readAnswer(http.MethodConnect, target, bufio.NewReader(conn))
	if a.Status != http.StatusOK {
		_ = conn.Close()
		return nil, a
	}
	return conn, a
}

func readAnswer(method, url string, from *bufio.Reader) node.Answer {
	a := node.Answer{Method: method, URL: url}
	resp, err := http.ReadResponse(from, &http.Request{Method: method})
	if err != nil {
		a.Err = err
		return a
	}
	defer resp.Body.Close()
	a.Status, a.Header = resp.StatusCode, resp.Header
	if method != http.MethodConnect || a.Status != http.StatusOK {
		a.Body, a.Err = io.ReadAll(resp.Body)
		a.Bytes = int64(len(a.Body))
	}
	return a
}

func TestProxyDoorRefuses(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, tt := range []struct{ name, target, code string }{
		{"a host that is no image host", "example.org:443", "not-an-image-host"},
		{"a host whose name ends alike", "evil-example.com:443", "not-an-image-host"},
		{"an image host's name in front", "example.com.evil.org:443", "not-an-image-host"},
		{"this machine", "127.0.0.1:443", "not-an-image-host"},
		{"another port than 443", "example.com:8443", "not-an-image-port"},
		{"port 80", "example.com:80", "not-an-image-port"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, a := s.connect(tt.target)
			if conn != nil {
				_ = conn.Close()
			}
			wantProblem(t, a, http.StatusForbidden, tt.code)
			if host, _, _ := strings.Cut(tt.target, ":"); tt.code == "not-an-image-host" && !strings.Contains(a.Detail(), host) {
				t.Errorf("the reason is %q, want one that names %s", a.Detail(), host)
			}
		})
	}
	t.Run("no port", func(t *testing.T) {
		_, a := s.connect("example.com")
		if a.Status != http.StatusBadRequest {
			t.Errorf("CONNECT without a port: %s, want 400", described(a))
		}
	})
	t.Run("a listener that is no proxy", func(t *testing.T) {
		conn := must(tls.Dial("tcp", s.server().address("https"), &tls.Config{RootCAs: s.nodeCAs, ServerName: imageHost}))(t)
		defer conn.Close()
		fmt.Fprint(conn, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
		wantProblem(t, readAnswer(http.MethodConnect, "example.com:443", bufio.NewReader(conn)), http.StatusForbidden, "not-a-proxy")
	})
	if n := s.publisher.Count("*"); n != 0 {
		t.Errorf("the publisher was asked %d times", n)
	}
}

func TestInsideTheProxyDoor(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	s.publish(app("app"))
	shake := func(t *testing.T, target, name string) (*tls.Conn, error) {
		t.Helper()
		conn, a := s.connect(target)
		if conn == nil {
			t.Fatalf("CONNECT %s: %s", target, described(a))
		}
		t.Cleanup(func() { _ = conn.Close() })
		config := &tls.Config{RootCAs: s.nodeCAs, ServerName: name}
		if name == "" {
			// A client without SNI has to check the certificate by itself.
			config.InsecureSkipVerify = true
			config.VerifyConnection = func(state tls.ConnectionState) error {
				_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: s.nodeCAs, DNSName: imageHost})
				return err
			}
		}
		secure := tls.Client(conn, config)
		return secure, secure.HandshakeContext(s.context())
	}
	ask := func(conn net.Conn, from *bufio.Reader, host string) node.Answer {
		fmt.Fprintf(conn, "GET /app?ac-discovery=1 HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		return readAnswer(http.MethodGet, host, from)
	}
	t.Run("the wrong Host, then the right one", func(t *testing.T) {
		conn, err := shake(t, "example.com:443", "example.com")
		if err != nil {
			t.Fatal(err)
		}
		from := bufio.NewReader(conn)
		wantProblem(t, ask(conn, from, "storage.example.com"), http.StatusMisdirectedRequest, "misdirected")
		wantProblem(t, ask(conn, from, "example.org"), http.StatusMisdirectedRequest, "misdirected")
		wantStatus(t, ask(conn, from, "example.com"), http.StatusOK)
		wantStatus(t, ask(conn, from, "example.com:443"), http.StatusOK)
		wantStatus(t, ask(conn, from, "EXAMPLE.com"), http.StatusOK)
	})
	t.Run("a server name other than that of CONNECT", func(t *testing.T) {
		if _, err := shake(t, "example.com:443", "storage.example.com"); err == nil {
			t.Error("the handshake succeeded")
		}
	})
	t.Run("no server name", func(t *testing.T) {
		conn, err := shake(t, "example.com:443", "")
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, ask(conn, bufio.NewReader(conn), "example.com"), http.StatusOK)
	})
	t.Run("a name in capitals", func(t *testing.T) {
		conn, err := shake(t, "EXAMPLE.com:443", "example.com")
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, ask(conn, bufio.NewReader(conn), "example.com"), http.StatusOK)
	})
	t.Run("a proxy request inside", func(t *testing.T) {
		conn, err := shake(t, "example.com:443", "example.com")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
		wantProblem(t, readAnswer(http.MethodConnect, "", bufio.NewReader(conn)), http.StatusForbidden, "not-a-proxy")
	})
	t.Run("the client speaks before it is answered", func(t *testing.T) {
		// rkt doesn't, but nothing forbids to send the TLS hello right behind CONNECT.
		conn := must(dialLoopback(s.context(), "tcp", s.server().address("http")))(t)
		defer conn.Close()
		eager := &eagerConn{Conn: conn, head: []byte("CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"), from: bufio.NewReader(conn)}
		secure := tls.Client(eager, &tls.Config{RootCAs: s.nodeCAs, ServerName: imageHost})
		if err := secure.HandshakeContext(s.context()); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, ask(secure, bufio.NewReader(secure), "example.com"), http.StatusOK)
	})
}

// eagerConn sends a request together with the first bytes written, and reads its answer before the first bytes read.
type eagerConn struct {
	net.Conn
	head []byte
	from *bufio.Reader
	open bool
}

func (c *eagerConn) Write(p []byte) (int, error) {
	if c.head != nil {
		_, err := c.Conn.Write(append(c.head, p...))
		c.head = nil
		return len(p), err
	}
	return c.Conn.Write(p)
}

func (c *eagerConn) Read(p []byte) (int, error) {
	if !c.open {
		c.open = true
		if a := readAnswer(http.MethodConnect, "", c.from); a.Status != http.StatusOK {
			return 0, fmt.Errorf("CONNECT: %s", described(a))
		}
	}
	return c.from.Read(p)
}

// elsewhere is a server that has nothing to do with images, over TLS or not, and what trusts it.
func elsewhere(t *testing.T, secure bool) (address string, pool *x509.CertPool) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s here, asked for %s via %q", r.Host, r.URL.Path, r.Header.Get("Via"))
	}))
	server.Start()
	if secure {
		server.Close()
		server = httptest.NewTLSServer(server.Config.Handler)
		pool = x509.NewCertPool()
		pool.AddCert(server.Certificate())
	}
	t.Cleanup(server.Close)
	return server.Listener.Addr().String(), pool
}

func TestTunnel(t *testing.T) {
	t.Parallel()
	address, pool := elsewhere(t, true)
	_, port, _ := net.SplitHostPort(address)
	s := newScene(t, fmt.Sprintf("{proxy: {tunnel: true}, dial: {hosts: {www.example.org: %q}}}", address))
	im := s.publish(app("app"))

	through := &http.Client{Transport: &http.Transport{
		Proxy:           func(*http.Request) (*url.URL, error) { return url.Parse(s.plain()) },
		DialContext:     dialLoopback,
		TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: imageHost}, // httptest's certificate is for example.com
	}}
	defer through.CloseIdleConnections()
	resp, err := through.Get("https://www.example.org/some/page")
	if err != nil {
		t.Fatal(err)
	}
	body := must(io.ReadAll(resp.Body))(t)
	_ = resp.Body.Close()
	if want := `www.example.org here, asked for /some/page via ""`; string(body) != want {
		t.Errorf("through the tunnel came %q, want %q", body, want)
	}
	// Image hosts are answered for all the same.
	s.fetchAsRkt(s.proxied(node.Options{}), im)

	for _, tt := range []struct {
		name, target string
		status       []int
	}{
		{"this machine by address", "127.0.0.1:" + port, []int{403}},
		{"this machine by its other address", "[::1]:" + port, []int{403}},
		{"this machine in another notation", "2130706433:" + port, []int{403, 502}},
		{"cloud metadata", "169.254.169.254:80", []int{403}},
		{"a private network", "10.0.0.1:443", []int{403}},
		{"a name that leads nowhere", "nowhere.example.org:443", []int{502, 504}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, a := s.connect(tt.target)
			if conn != nil {
				_ = conn.Close()
			}
			for _, status := range tt.status {
				if a.Err == nil && a.Status == status {
					return
				}
			}
			t.Errorf("CONNECT %s: %s, want one of %v", tt.target, described(a), tt.status)
		})
	}
}

func TestTunnelToAllowedNetwork(t *testing.T) {
	t.Parallel()
	address, _ := elsewhere(t, false)
	s := newScene(t, "{proxy: {tunnel: true}, dial: {allow: [127.0.0.0/8]}}")
	conn, a := s.connect(address)
	if conn == nil {
		t.Fatalf("CONNECT %s: %s", address, described(a))
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /through HTTP/1.1\r\nHost: inside\r\nConnection: close\r\n\r\n")
	got := readAnswer(http.MethodGet, "/through", bufio.NewReader(conn))
	if wantStatus(t, got, http.StatusOK); !bytes.HasPrefix(got.Body, []byte("inside here, asked for /through")) {
		t.Errorf("through the tunnel came %q", got.Body)
	}
}

func TestAbsoluteFormDoor(t *testing.T) {
	t.Parallel()
	address, _ := elsewhere(t, false)
	for _, tunnel := range []bool{false, true} {
		t.Run(fmt.Sprintf("tunnel %v", tunnel), func(t *testing.T) {
			s := newScene(t, fmt.Sprintf("{proxy: {tunnel: %v}, dial: {hosts: {www.example.org: %q}}, publishers: [{prefix: example.com, ca_file: $CA, http: true}]}", tunnel, address))
			im := s.publish(app("app"))
			n := s.proxied(node.Options{})
			page := n.Get(s.context(), "http://example.com/app?ac-discovery=1", nil, nil)
			wantStatus(t, page, http.StatusOK)
			want := im.name + " http://example.com/.acproxy/images/{name}.{ext}?version={version}&os={os}&arch={arch}"
			if tags := tagsOf(t, page.Body)["ac-discovery"]; len(tags) != 1 || tags[0] != want {
				t.Errorf("tags %q, want %q", tags, want)
			}
			at := "http://example.com" + directPath(im.name, im.labels, "aci")
			wantImage(t, n.Get(s.context(), at, nil, nil), im)
			wantStatus(t, n.Do(s.context(), http.MethodHead, at, nil, nil), http.StatusOK)

			// A publisher's own URL, where its template is plain http itself.
			insecure := s.publish(app("insecure"))
			template := strings.Replace(insecure.published.Template, "https:", "http:", 1)
			s.publisher.SetPage(publisher.Page{Path: insecure.name, Templates: []publisher.Tag{{Prefix: insecure.name, URL: template}}})
			wantStatus(t, n.Get(s.context(), "http://"+insecure.name+"?ac-discovery=1", nil, nil), http.StatusOK)
			wantImage(t, n.Get(s.context(), strings.Replace(insecure.published.URL, "https:", "http:", 1), nil, nil), insecure)

			other := n.Get(s.context(), "http://www.example.org/page", nil, nil)
			if !tunnel {
				wantProblem(t, other, http.StatusForbidden, "not-an-image-host")
				return
			}
			if wantStatus(t, other, http.StatusOK); !strings.HasPrefix(string(other.Body), "www.example.org here, asked for /page via \"1.1 acproxy-") {
				t.Errorf("the other host said %q", other.Body)
			}
			if a := n.Get(s.context(), "http://169.254.169.254/latest/meta-data", nil, nil); a.Status != http.StatusForbidden {
				t.Errorf("cloud metadata: %s, want 403", described(a))
			}
		})
	}
}

func TestProxyHostsOfTheConfiguration(t *testing.T) {
	t.Parallel()
	s := newScene(t, "proxy: {hosts: ['*.example.com']}")
	im := s.publish(app("app"))
	conn, a := s.connect("example.com:443")
	if conn != nil {
		_ = conn.Close()
	}
	wantProblem(t, a, http.StatusForbidden, "not-an-image-host")
	wantStatus(t, s.get("https://"+imageHost+"/app?ac-discovery=1"), http.StatusOK)
	wantImage(t, s.proxied(node.Options{}).Get(s.context(), im.published.URL, nil, nil), im)
}

func TestLoopIsBroken(t *testing.T) {
	t.Parallel()
	s := stage(t, "")
	// The publisher's name leads acproxy to itself, as it does where the node's DNS is its own.
	free := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	address := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	s.configure(fmt.Sprintf(`{listen: [{address: %q, tls: local-ca}, {address: "127.0.0.1:0", tls: none}], dial: {hosts: {example.com: %q}}, publishers: [{prefix: example.com, ca_file: $DIR/data/ca/ca.pem}]}`, address, address))
	s.start()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	a := s.node.Get(ctx, "https://example.com/app?ac-discovery=1", nil, nil)
	if a.Err != nil || a.Status < 500 {
		t.Errorf("a proxy that asks itself answers %s, want 502 or 508", described(a))
	}
	if !strings.Contains(string(a.Body), "508") && !strings.Contains(string(a.Body), "dial.hosts") {
		t.Errorf("the answer doesn't tell what is wrong: %s", a.Body)
	}
}
