package e2e

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
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
	// Twice as long as elsewhere: on a busy machine the slow reader below may not have its turn for seconds.
	s := newScene(t, strings.Replace(impatient, "stall_timeout: 3s", "stall_timeout: 6s", 1))
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
		const piece, pieces = 8 << 10, 240
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

// TestSmuggling sends requests that two servers may read in two ways. One that is answered is answered once, and nothing that may have been meant as
// content is taken for the next request: its connection ends.
func TestSmuggling(t *testing.T) {
	t.Parallel()
	s := newScene(t, impatient)
	const (
		get   = "GET /.acproxy/healthz HTTP/1.1\r\nHost: x\r\n"
		inner = "GET /.acproxy/ca.pem HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n"
	)
	size := fmt.Sprint(len(inner))
	for _, tt := range []struct {
		name, request string
		status        int  // of the first answer
		second        bool // what follows is a request of its own, and answered
	}{
		{"two requests", get + "\r\n" + inner, 200, true},
		{"no content", get + "Content-Length: 0\r\n\r\n" + inner, 200, true},
		{"content", get + "Content-Length: " + size + "\r\n\r\n" + inner, 400, false},
		{"content with POST", "POST /.acproxy/healthz HTTP/1.1\r\nHost: x\r\nContent-Length: " + size + "\r\n\r\n" + inner, 405, false},
		{"content longer than it says", get + "Content-Length: 5\r\n\r\n01234" + inner, 400, false},
		{"more content than anybody reads", get + "Content-Length: 1000000000\r\n\r\n" + strings.Repeat("x", 300<<10) + inner, 400, false},
		{"two lengths", get + "Content-Length: 0\r\nContent-Length: " + size + "\r\n\r\n" + inner, 400, false},
		{"two lengths in a line", get + "Content-Length: 0, " + size + "\r\n\r\n" + inner, 400, false},
		{"the same length twice", get + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n01234" + inner, 400, false},
		{"a length with a sign", get + "Content-Length: +" + size + "\r\n\r\n" + inner, 400, false},
		{"a negative length", get + "Content-Length: -1\r\n\r\n" + inner, 400, false},
		{"a length in hexadecimal", get + "Content-Length: 0x10\r\n\r\n" + inner, 400, false},
		{"a length with a space in it", get + "Content-Length: 1 0\r\n\r\n" + inner, 400, false},
		{"chunks", get + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, 400, false},
		{"chunks and a length", get + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, 400, false},
		{"a length and chunks", get + "Transfer-Encoding: chunked\r\nContent-Length: " + size + "\r\n\r\n0\r\n\r\n" + inner, 400, false},
		{"chunks twice", get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, 0, false},
		{"chunks that nobody knows", get + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + inner, 501, false},
		{"chunks after another coding", get + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + inner, 501, false},
		{"chunks behind a space", get + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + inner, 400, false},
		{"chunks behind a vertical tab", get + "Transfer-Encoding: \vchunked\r\n\r\n0\r\n\r\n" + inner, 0, false},
		{"chunks on a folded line", get + "X: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, 200, false},
		{"a chunk whose size has a sign", get + "Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + inner, 400, false},
		{"a chunk that is too large for any number", get + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + inner, 400, false},
		{"a chunk's extension with a line feed in it", get + "Transfer-Encoding: chunked\r\n\r\n0;\n\r\n\r\n" + inner, 400, false},
		{"HTTP/1.0 with chunks", "GET /.acproxy/healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner, 200, false},
		{"lines that end in line feeds", "GET /.acproxy/healthz HTTP/1.1\nHost: x\n\n" + inner, 200, true},
		{"a carriage return in a line", get + "X: a\rContent-Length: " + size + "\r\n\r\n" + inner, 400, false},
		{"a zero in a field", get + "X: a\x00b\r\n\r\n" + inner, 400, false},
		{"a zero in a name", get + "X\x00: b\r\n\r\n" + inner, 400, false},
		{"a zero in the path", "GET /.acproxy/healthz\x00 HTTP/1.1\r\nHost: x\r\n\r\n" + inner, 400, false},
		{"a field without a name", get + ": x\r\n\r\n" + inner, 400, false},
		{"a line that is no field", get + "nothing\r\n\r\n" + inner, 400, false},
		{"a folded line", get + "X: a\r\n b\r\n\r\n" + inner, 200, true},
		{"a folded line first", "GET /.acproxy/healthz HTTP/1.1\r\n Host: x\r\n\r\n" + inner, 400, false},
		{"two hosts", get + "Host: y\r\n\r\n" + inner, 400, false},
		{"no host", "GET /.acproxy/healthz HTTP/1.1\r\n\r\n" + inner, 400, false},
		{"a host that is none", "GET /.acproxy/healthz HTTP/1.1\r\nHost: x/../y z\r\n\r\n" + inner, 400, false},
		{"two spaces in the request line", "GET  /.acproxy/healthz HTTP/1.1\r\nHost: x\r\n\r\n" + inner, 400, false},
		{"no version", "GET /.acproxy/healthz\r\n\r\n" + inner, 400, false},
		{"a version to come", "GET /.acproxy/healthz HTTP/3.0\r\nHost: x\r\n\r\n" + inner, 505, false},
		{"a head that is too long", get + "X: " + strings.Repeat("x", 80<<10) + "\r\n\r\n" + inner, 431, false},
		{"a head of too many fields", get + strings.Repeat("X: y\r\n", 20<<10) + "\r\n" + inner, 431, false},
		{"a request line that is too long", "GET /" + strings.Repeat("x", 80<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n" + inner, 431, false},
		{"HTTP/2 in the clear", http2Preface + inner, 0, false},
		{"an upgrade to HTTP/2", get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n" + inner, 200, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := s.raw("http")
			// It may be answered, and the connection ended, before all of it was read.
			_, _ = io.WriteString(conn, tt.request)
			got := ended(t, conn)
			first, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(got))), nil)
			switch {
			case err != nil && strings.HasPrefix(tt.name, "more content"):
				// What nobody read resets the connection, and may take the answer along.
			case err != nil:
				t.Fatalf("the answer is %.500q, %v", got, err)
			case tt.status == 0 && first.StatusCode < 400, tt.status != 0 && first.StatusCode != tt.status:
				t.Errorf("the answer is %d, want %d\n%.500s", first.StatusCode, tt.status, got)
			}
			if second := strings.Contains(string(got), "X-Request-Id: smuggled"); second != tt.second {
				t.Errorf("what follows was answered: %v, want %v\n%.2000s", second, tt.second, got)
			}
		})
	}
	wantStatus(t, s.get(s.plain()+"/.acproxy/healthz"), http.StatusOK)
}

// TestFloodOfHEAD asks for nothing but heads, thousands of them, without waiting for the answers.
func TestFloodOfHEAD(t *testing.T) {
	t.Parallel()
	s := newScene(t, "log: {access: false}")
	im, arriving := s.publish(large("app", 1<<20)), s.publish(large("arriving", 1<<20))
	s.hold(im)
	trouble := s.arriving(arriving)
	// Something can be delivered, so everything about the arriving one has been opened.
	wantStatus(t, s.get(s.direct(arriving, "aci"), "Range", "bytes=0-9"), http.StatusPartialContent)
	before := s.vitals()
	images := []image{im, arriving}
	var clients sync.WaitGroup
	n := inChaos(200, 5000)
	for range 10 {
		conn := s.raw("http")
		// Both end with the answers, or with the connection, at the latest when the scene ends; waited for below.
		clients.Go(func() {
			for i := range n {
				which := images[i%2]
				if _, err := fmt.Fprintf(conn, "HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n", directPath(which.name, which.labels, "aci")); err != nil {
					t.Error(err)
					return
				}
			}
		})
		clients.Go(func() {
			r := bufio.NewReader(conn)
			for i := range n {
				resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodHead})
				if err != nil || resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(images[i%2].aci)) {
					t.Errorf("answer %d is %v, %v", i, resp, err)
					return
				}
			}
			_ = conn.Close()
		})
	}
	wantImage(t, s.get(s.direct(im, "aci")), im)
	wait(t, "all heads are answered", &clients)
	s.node.Close()
	s.settles(before)
	trouble.Release()
	wantImage(t, s.get(s.direct(arriving, "aci")), arriving)
	if n := s.publisher.Count(im.blob()) + s.publisher.Count(arriving.blob()); n != 2 {
		t.Errorf("the publisher was asked for the images %d times, want once for each", n)
	}
}

// TestAbuseOfHTTP2 does with streams what the protocol allows and nobody needs. Whether the server ends the connection or puts up with it, others are
// served, and nothing is left behind.
func TestAbuseOfHTTP2(t *testing.T) {
	t.Parallel()
	s := newScene(t, impatient+"\nlog: {access: false}")
	im := s.publish(large("app", 1<<20))
	s.hold(im)
	path := directPath(im.name, im.labels, "aci")
	url := "https://" + imageHost + path
	before := s.vitals()
	long := strings.Repeat("x", 16<<10)
	many := inChaos(2_000, 50_000)
	for _, tt := range []struct {
		name  string
		abuse func(c *frames) error
	}{
		{"requests that are taken back at once", func(c *frames) error {
			for range many {
				f := c.request(path)
				if err := c.send(f, frame{kind: frameReset, stream: f.stream, payload: []byte{0, 0, 0, errCancel}}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"more streams than are allowed", func(c *frames) error {
			for range many {
				if err := c.send(c.request(path)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"pings", func(c *frames) error {
			for range many {
				if err := c.send(frame{kind: framePing, payload: make([]byte, 8)}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"settings", func(c *frames) error {
			for range many {
				if err := c.send(frame{kind: frameSettings}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"a head over frames without end", func(c *frames) error {
			f := c.request(path)
			f.flags = flagEndStream
			for err := c.send(f); ; err = c.send(frame{kind: frameContinuation, stream: f.stream, payload: []byte("\x00\x01x\x01y")}) {
				if err != nil {
					return err
				}
			}
		}},
		{"a head that is too long", func(c *frames) error {
			for range 20 {
				if err := c.send(c.request("/" + long)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"a window that grows too large", func(c *frames) error {
			f := c.request(path)
			return c.send(f, more(0, 1<<31-1), more(0, 1<<31-1), more(f.stream, 1<<31-1), more(f.stream, 1<<31-1))
		}},
		{"windows that change all the time", func(c *frames) error {
			f := c.request(path)
			if err := c.send(f); err != nil {
				return err
			}
			for i := range many {
				if err := c.send(frame{kind: frameSettings, payload: []byte{0, settingWindow, 0, 0, 0, byte(i)}}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"data that nobody asked for", func(c *frames) error {
			f := c.request(path)
			f.flags = flagEndHeaders
			if err := c.send(f); err != nil {
				return err
			}
			for range many {
				if err := c.send(frame{kind: frameData, stream: f.stream, payload: []byte(long[:100])}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"frames that are none", func(c *frames) error {
			return c.send(frame{kind: 0xee, payload: []byte("unknown")}, frame{kind: frameHeaders, flags: flagEndHeaders, stream: 2, payload: []byte{0xff, 0xff}})
		}},
		{"a frame that is too long", func(c *frames) error {
			return c.send(frame{kind: frameData, stream: 1, payload: make([]byte, 1<<21)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := s.frames()
			defer c.Close()
			c.begin(0)
			var reading sync.WaitGroup
			// Ends with the connection, which is closed below; waited for then.
			reading.Go(func() { _, _ = io.Copy(io.Discard, c) })
			err := c.SetWriteDeadline(time.Now().Add(patience))
			if err == nil {
				err = tt.abuse(c)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server neither reads on nor ends the connection")
			}
			wantImage(t, s.get(url), im)
			_ = c.Close()
			reading.Wait()
		})
	}
	s.node.Close()
	s.settles(before)
}

// TestAByteAtATimeInHTTP2 takes an answer through a window of one byte.
func TestAByteAtATimeInHTTP2(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	im := s.publish(app("app"))
	s.hold(im)
	c := s.frames()
	c.begin(1)
	f := c.request(directPath(im.name, im.labels, "aci"))
	if err := c.send(f); err != nil {
		t.Fatal(err)
	}
	if head, err := c.until(frameHeaders, f.stream); err != nil || head.payload[0] != 0x88 {
		t.Fatalf("the answer is %+v, %v; want 200", head, err)
	}
	var got []byte
	for {
		data, err := c.until(frameData, f.stream)
		if err != nil || len(data.payload) > 1 {
			t.Fatalf("after %d bytes came %d at once, %v", len(got), len(data.payload), err)
		}
		got = append(got, data.payload...)
		if data.flags&flagEndStream != 0 {
			break
		}
		if err := c.send(more(f.stream, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if string(got) != string(im.aci) {
		t.Errorf("%d other bytes than the %d published", len(got), len(im.aci))
	}
}
