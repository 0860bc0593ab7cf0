package e2e

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// impatient makes the server give up clients in a time that tests can wait for.
const impatient = "clients: {header_timeout: 1s, idle_timeout: 1s, stall_timeout: 3s}\nproxy: {tunnel: true}"

// ended waits until the server has ended a connection, and returns what it sent before.
func ended(t testing.TB, conn net.Conn) []byte {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the server keeps the connection")
	}
	return got
}

func say(t testing.TB, conn io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// TestClientsThatSayLittle connects in every way in which a client can leave the server waiting, many times at once. Each connection is ended, the others are
// served meanwhile, and nothing is left behind.
func TestClientsThatSayLittle(t *testing.T) {
	t.Parallel()
	s := newScene(t, impatient)
	im := s.publish(app("app"))
	s.hold(im)
	overTLS := func(t *testing.T, conn net.Conn) net.Conn {
		tlsConn := tls.Client(conn, &tls.Config{RootCAs: s.nodeCAs, ServerName: imageHost})
		if err := tlsConn.HandshakeContext(s.context()); err != nil {
			t.Fatal(err)
		}
		return tlsConn
	}
	connected := func(t *testing.T) net.Conn {
		conn := s.raw("http")
		say(t, conn, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
		answer := make([]byte, len("HTTP/1.1 200 Connection established\r\n\r\n"))
		if _, err := io.ReadFull(conn, answer); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
			t.Fatalf("CONNECT = %q, %v", answer, err)
		}
		return conn
	}
	const health = "GET /.acproxy/healthz HTTP/1.1\r\nHost: x\r\n"
	kinds := []struct {
		name  string
		begin func(t *testing.T) net.Conn
	}{
		{"nothing", func(*testing.T) net.Conn { return s.raw("http") }},
		{"nothing to the TLS listener", func(*testing.T) net.Conn { return s.raw("https") }},
		{"half a TLS hello", func(t *testing.T) net.Conn {
			conn := s.raw("https")
			say(t, conn, "\x16\x03\x01\x02\x00\x01")
			return conn
		}},
		{"nothing after the handshake", func(t *testing.T) net.Conn { return overTLS(t, s.raw("https")) }},
		{"half a request line", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, "GET /.acproxy/hea")
			return conn
		}},
		{"a head without end", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health)
			return conn
		}},
		{"a head without end, over TLS", func(t *testing.T) net.Conn {
			conn := overTLS(t, s.raw("https"))
			say(t, conn, health)
			return conn
		}},
		{"one request, and no other", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health+"\r\n")
			return conn
		}},
		{"one request, and half of another", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health+"\r\n"+health)
			return conn
		}},
		{"content that doesn't come", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health+"Content-Length: 10\r\n\r\n")
			return conn
		}},
		{"content that doesn't come, with POST", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, "POST /.acproxy/healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
			return conn
		}},
		{"content in chunks that don't come", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health+"Transfer-Encoding: chunked\r\n\r\n")
			return conn
		}},
		{"content that was expected first", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, health+"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
			return conn
		}},
		{"content for another host", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, "POST http://other.example/ HTTP/1.1\r\nHost: other.example\r\nContent-Length: 10\r\n\r\n")
			return conn
		}},
		{"CONNECT, and no hello", connected},
		{"CONNECT, and nothing after the handshake", func(t *testing.T) net.Conn { return overTLS(t, connected(t)) }},
		{"CONNECT with content", func(t *testing.T) net.Conn {
			conn := s.raw("http")
			say(t, conn, "CONNECT other.example:443 HTTP/1.1\r\nHost: other.example:443\r\nContent-Length: 10\r\n\r\n")
			return conn
		}},
		{"HTTP/2 without a request", func(*testing.T) net.Conn {
			c := s.frames()
			c.begin(65535)
			return c
		}},
		{"HTTP/2 and half a head", func(t *testing.T) net.Conn {
			c := s.frames()
			c.begin(65535)
			f := c.request("/.acproxy/healthz")
			f.flags = flagEndStream
			if err := c.send(f); err != nil {
				t.Fatal(err)
			}
			return c
		}},
		{"HTTP/2 and half a preface", func(t *testing.T) net.Conn {
			c := s.frames()
			say(t, c, http2Preface[:10])
			return c
		}},
	}
	before := s.vitals()
	var conns []net.Conn
	var of []string
	for _, kind := range kinds {
		for range inChaos(3, 30) {
			conns, of = append(conns, kind.begin(t)), append(of, kind.name)
		}
	}
	// Everybody else is served.
	wantImage(t, s.get(s.direct(im, "aci")), im)
	wantImage(t, s.get("https://"+imageHost+directPath(im.name, im.labels, "aci")), im)
	for i, conn := range conns {
		t.Run(of[i], func(t *testing.T) {
			got := string(ended(t, conn))
			if strings.Count(got, "HTTP/1.1 2") > 1 {
				t.Errorf("one request was answered with\n%s", got)
			}
			_ = conn.Close()
		})
	}
	s.node.Close()
	s.settles(before)
}

// TestHeadAByteAtATime: the time for a head is for all of it.
func TestHeadAByteAtATime(t *testing.T) {
	t.Parallel()
	s := newScene(t, impatient)
	var clients sync.WaitGroup
	for range inChaos(20, 200) {
		conn := s.raw("http")
		// Ends when the server ends the connection, at the latest with the scene; waited for below.
		clients.Go(func() {
			say(t, conn, "GET /.acproxy/healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
			for every := time.NewTicker(20 * time.Millisecond); ; <-every.C {
				if _, err := conn.Write([]byte("x")); err != nil {
					every.Stop()
					return
				}
			}
		})
	}
	wait(t, "the server has had enough of all of them", &clients)
	wantStatus(t, s.get(s.plain()+"/.acproxy/healthz"), http.StatusOK)
}

// narrow connects with as little room for what is received as there can be, so that the server soon notices that nobody reads.
func (s *scene) narrow(scheme string) net.Conn {
	s.t.Helper()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 8<<10)
		})
		return errors.Join(err, failed)
	}}
	conn := must(d.DialContext(s.context(), "tcp", s.server().address(scheme)))(s.t)
	s.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// TestClientsThatDoNotRead asks for images and takes nothing of them. The server lets go of them in its time, and of nobody else.
func TestClientsThatDoNotRead(t *testing.T) {
	t.Parallel()
	s := newScene(t, impatient)
	// More than the buffers of a connection hold.
	held, other := s.publish(large("held", 24<<20)), s.publish(large("arriving", 12<<20))
	s.hold(held)
	before := s.vitals()
	path := directPath(held.name, held.labels, "aci")
	request := "GET " + path + " HTTP/1.1\r\nHost: " + imageHost + "\r\n\r\n"
	overTLS := func(conn net.Conn) net.Conn {
		tlsConn := tls.Client(conn, &tls.Config{RootCAs: s.nodeCAs, ServerName: imageHost})
		if err := tlsConn.HandshakeContext(s.context()); err != nil {
			t.Fatal(err)
		}
		return tlsConn
	}
	var conns []net.Conn
	for range inChaos(2, 20) {
		plain, secure := s.narrow("http"), overTLS(s.narrow("https"))
		say(t, plain, request)
		say(t, secure, request)
		arriving := s.narrow("http")
		say(t, arriving, "GET "+directPath(other.name, other.labels, "aci")+" HTTP/1.1\r\nHost: x\r\n\r\n")
		connected := s.narrow("http")
		say(t, connected, "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
		if _, err := io.ReadFull(connected, make([]byte, len("HTTP/1.1 200 Connection established\r\n\r\n"))); err != nil {
			t.Fatal(err)
		}
		inside := overTLS(connected)
		say(t, inside, request)
		conns = append(conns, plain, secure, arriving, inside)
		// In HTTP/2 a stream whose window is shut waits although the connection is well; a short answer does so after its handler has returned.
		for _, window := range []uint32{0, 1, 65535} {
			c := s.frames()
			c.begin(window)
			if err := c.send(c.request(path), c.request(path+"&"), c.request("/.acproxy/healthz")); err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
	}
	// A reader that is slow, but reads, keeps what it has. It reads for much longer than the others may do nothing, and the server has more for it all the time.
	slow := s.narrow("http")
	say(t, slow, request)
	steady := make(chan error, 1)
	// Ends after its reading, which is waited for below.
	go func() {
		const piece, pieces = 8 << 10, 160
		every := time.NewTicker(50 * time.Millisecond)
		defer every.Stop()
		for range pieces {
			<-every.C
			if _, err := io.CopyN(io.Discard, slow, piece); err != nil {
				steady <- err
				return
			}
		}
		_, err := io.CopyN(io.Discard, slow, int64(len(held.aci))-pieces*piece)
		steady <- err
	}()
	wantImage(t, s.get(s.direct(held, "aci")), held)
	wantImage(t, s.get(s.direct(other, "aci")), other)
	if err := <-steady; err != nil {
		t.Errorf("the slow reader: %v", err)
	}
	_ = slow.Close()
	s.node.Close()
	s.settles(before)
	for _, conn := range conns {
		if got := ended(t, conn); len(got) >= len(held.aci) {
			t.Errorf("a client that read nothing for its time got all of it, %d bytes", len(got))
		}
	}
}
