package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	briskTarget = imagesPath + "example.com/app.aci.asc?version=1.0"
	briskHost   = "proxy.example.com:8080"
)

// briskDoor serves a handler by a door that knows briskTarget to be small.
type briskDoor struct {
	t       *testing.T
	server  *Server
	door    *Door
	address string
	ended   chan error
	brisk   atomic.Int32 // requests that were answered without net/http
}

func newBriskDoor(t *testing.T, patience Patience, handler http.HandlerFunc) *briskDoor {
	t.Helper()
	leak := goleak.IgnoreCurrent()
	b := &briskDoor{t: t, server: New(Config{Patience: patience}), ended: make(chan error, 1)}
	u, err := url.ParseRequestURI(briskTarget)
	if err != nil {
		t.Fatal(err)
	}
	b.server.brisk.Put(briskKey{briskHost, briskTarget}, u)
	hs := b.server.HTTP(Front{})
	hs.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if brisk, ok := w.(*briskWriter); ok && !brisk.given {
				b.brisk.Add(1)
			}
		}()
		handler(w, r)
	})
	b.door = b.server.Door(hs)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = l.Addr().String()
	go func() { b.ended <- b.door.Serve(l) }()
	t.Cleanup(func() {
		_ = b.door.Close()
		<-b.ended
		b.door.serving.Wait()
		if err := b.server.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, leak)
	})
	return b
}

func (b *briskDoor) dial() (net.Conn, *bufio.Reader) {
	b.t.Helper()
	conn, err := net.Dial("tcp", b.address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		b.t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

// ask sends a request and returns what it is answered.
func (b *briskDoor) ask(conn net.Conn, r *bufio.Reader, request string) (*http.Response, string) {
	b.t.Helper()
	if _, err := io.WriteString(conn, request); err != nil {
		b.t.Fatal(err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		b.t.Fatalf("%q: %v", request, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatalf("%q: %v", request, err)
	}
	return resp, string(body)
}

func get(target, host, more string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n" + more + "\r\n"
}

func briefly(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Seen", fmt.Sprint(r.Method, " ", r.Host, " ", r.RequestURI, " ", r.URL, " ", r.Header))
	w.Header()["X-Two"] = []string{"one", "two\r\nX-Third: three"}
	_, _ = io.WriteString(w, "it is small")
}

// TestBriskAnswersAsNetHTTPDoes asks for the same twice: once in a simple way, and once with a field more, which is for net/http.
func TestBriskAnswersAsNetHTTPDoes(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"small":   briefly,
		"nothing": func(http.ResponseWriter, *http.Request) {},
		"not modified": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"x"`)
			w.WriteHeader(http.StatusNotModified)
		},
		"an error": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) },
		"a type that nobody said": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "<html><title>x</title>")
		},
		"as much as is small": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(briskAnswer))
			_, _ = w.Write(make([]byte, briskAnswer))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBriskDoor(t, Patience{}, handler)
			conn, r := b.dial()
			brisk, briskBody := b.ask(conn, r, get(briskTarget, briskHost, "user-agent: curl/8\r\nAccept:  */* \r\n"))
			again, _ := b.ask(conn, r, get(briskTarget, briskHost, "User-Agent: curl/8\r\nAccept: */*\r\nConnection: Keep-Alive\r\n"))
			if n := b.brisk.Load(); n != 2 || again.StatusCode != brisk.StatusCode {
				t.Fatalf("%d of 2 requests were brisk; %d and %d", n, brisk.StatusCode, again.StatusCode)
			}
			slow, slowBody := b.ask(conn, r, get(briskTarget, briskHost, "User-Agent: curl/8\r\nAccept: */*\r\nX-Other: 1\r\n"))
			if b.brisk.Load() != 2 {
				t.Fatal("net/http was not asked")
			}
			for _, resp := range []*http.Response{brisk, slow} {
				resp.Header.Set("X-Seen", strings.ReplaceAll(resp.Header.Get("X-Seen"), " X-Other:[1]", ""))
				if _, err := http.ParseTime(resp.Header.Get("Date")); err != nil {
					t.Error(err)
				}
				resp.Header.Del("Date")
			}
			if brisk.StatusCode != slow.StatusCode || briskBody != slowBody || !reflect.DeepEqual(brisk.Header, slow.Header) || brisk.ContentLength != slow.ContentLength {
				t.Errorf("brisk: %d %v %d %.100q\nnet/http: %d %v %d %.100q", brisk.StatusCode, brisk.Header, brisk.ContentLength, briskBody,
					slow.StatusCode, slow.Header, slow.ContentLength, slowBody)
			}
		})
	}
}

// TestBriskLeavesTheRestToNetHTTP sends what isn't simple. What it means is net/http's business; here it is that it gets it, whole.
func TestBriskLeavesTheRestToNetHTTP(t *testing.T) {
	b := newBriskDoor(t, Patience{}, briefly)
	for name, request := range map[string]string{
		"another target":            get(briskTarget+"1", briskHost, ""),
		"another host":              get(briskTarget, "example.com", ""),
		"HEAD":                      strings.Replace(get(briskTarget, briskHost, ""), "GET", "HEAD", 1),
		"HTTP/1.0":                  strings.Replace(get(briskTarget, briskHost, ""), "HTTP/1.1", "HTTP/1.0", 1),
		"the absolute form":         get("http://"+briskHost+briskTarget, briskHost, ""),
		"a bare LF":                 "GET " + briskTarget + " HTTP/1.1\nHost: " + briskHost + "\n\n",
		"two spaces":                "GET  " + briskTarget + " HTTP/1.1\r\nHost: " + briskHost + "\r\n\r\n",
		"two hosts":                 get(briskTarget, briskHost, "Host: "+briskHost+"\r\n"),
		"no host":                   "GET " + briskTarget + " HTTP/1.1\r\n\r\n",
		"a host with a path":        get(briskTarget, briskHost+"/x", ""),
		"content":                   get(briskTarget, briskHost, "Content-Length: 0\r\n"),
		"chunks":                    get(briskTarget, briskHost, "Transfer-Encoding: chunked\r\n") + "0\r\n\r\n",
		"two fields of one name":    get(briskTarget, briskHost, "Accept: a\r\nAccept: b\r\n"),
		"a space before the colon":  get(briskTarget, briskHost, "Accept : a\r\n"),
		"a folded field":            get(briskTarget, briskHost, "Accept: a\r\n b\r\n"),
		"a NUL":                     get(briskTarget, briskHost, "Accept: a\x00b\r\n"),
		"more than ASCII":           get(briskTarget, briskHost, "User-Agent: é\r\n"),
		"a field without a name":    get(briskTarget, briskHost, ": a\r\n"),
		"a field without a colon":   get(briskTarget, briskHost, "Accept\r\n"),
		"a range":                   get(briskTarget, briskHost, "Range: bytes=0-1\r\n"),
		"an upgrade":                get(briskTarget, briskHost, "Connection: upgrade\r\nUpgrade: h2c\r\n"),
		"the end of the connection": get(briskTarget, briskHost, "Connection: close\r\n"),
		"a request behind it":       get(briskTarget, briskHost, "") + get(briskTarget, briskHost, "Connection: close\r\n"),
		"a long one":                get(briskTarget, briskHost, "User-Agent: "+strings.Repeat("a", briskRequest)+"\r\n"),
	} {
		before := b.brisk.Load()
		conn, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		// What net/http refuses it closes; what it answers stays open.
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if resp.StatusCode == http.StatusOK && name != "HEAD" && resp.Header.Get("X-Seen") == "" {
			t.Errorf("%s: %v", name, resp.Header)
		}
		_ = conn.Close()
		if b.brisk.Load() != before {
			t.Errorf("%s: it was answered briskly", name)
		}
	}
	// In pieces, too.
	conn, r := b.dial()
	request := get(briskTarget, briskHost, "")
	if _, err := io.WriteString(conn, request[:20]); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // so that it is likely to be two reads; it is right in any case
	if resp, body := b.ask(conn, r, request[20:]); resp.StatusCode != http.StatusOK || body != "it is small" {
		t.Errorf("in pieces: %d %q", resp.StatusCode, body)
	}
}

// TestBriskGivesUp has answers that turn out not to be small, after some of them was made: net/http sends them, once and whole.
// TestBriskRush asks again and again on one connection, in the ways that requests come in.
func TestBriskRush(t *testing.T) {
	simple := get(briskTarget, briskHost, "")
	for name, tt := range map[string]struct {
		send    func(*net.TCPConn) error
		answers int  // before the connection ends, or is idle
		ends    bool // by itself
		brisk   int32
	}{
		"one after the other":            {func(c *net.TCPConn) error { return sends(c, simple, simple, simple) }, 3, false, 3},
		"two at once":                    {func(c *net.TCPConn) error { return sends(c, simple+simple) }, 2, false, 0},
		"one, and the end of what comes": {func(c *net.TCPConn) error { return errors.Join(sends(c, simple), c.CloseWrite()) }, 1, true, 1},
		"three, and the end":             {func(c *net.TCPConn) error { return errors.Join(sends(c, simple, simple, simple), c.CloseWrite()) }, 3, true, 3},
		"in two halves":                  {func(c *net.TCPConn) error { return sends(c, simple[:20], simple[20:]) }, 1, false, 0},
		"one that fills the buffer": {func(c *net.TCPConn) error {
			return sends(c, get(briskTarget, briskHost, "Accept: "+strings.Repeat("a", briskRequest-len(simple)-len("Accept: \r\n"))+"\r\n"), simple)
		}, 2, false, 2},
		"one that is longer": {func(c *net.TCPConn) error {
			return sends(c, get(briskTarget, briskHost, "Accept: "+strings.Repeat("a", briskRequest)+"\r\n"), simple)
		}, 2, false, 0},
		"the end at once": {(*net.TCPConn).CloseWrite, 0, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBriskDoor(t, Patience{}, briefly)
			conn, r := b.dial()
			b.ask(conn, r, simple)
			if err := tt.send(conn.(*net.TCPConn)); err != nil {
				t.Fatal(err)
			}
			for i := range tt.answers {
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatalf("answer %d: %v", i, err)
				}
				if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "it is small" {
					t.Fatalf("answer %d is %q, %v", i, body, err)
				}
			}
			if got := b.brisk.Load() - 1; got != tt.brisk {
				t.Errorf("%d requests were brisk, want %d", got, tt.brisk)
			}
			if !tt.ends {
				// It still serves.
				b.ask(conn, r, simple)
				return
			}
			asked := time.Now()
			if _, err := r.ReadByte(); err != io.EOF {
				t.Errorf("after the end of what it sends, a client gets %v", err)
			}
			if took := time.Since(asked); took > 5*time.Second {
				t.Errorf("the connection ended after %v", took)
			}
		})
	}
}

// sends sends texts one after the other, with time in between for what is read of them.
func sends(c *net.TCPConn, texts ...string) error {
	for i, text := range texts {
		if i > 0 {
			time.Sleep(20 * time.Millisecond)
		}
		if _, err := io.WriteString(c, text); err != nil {
			return err
		}
	}
	return nil
}

func TestBriskGivesUp(t *testing.T) {
	long := bytes.Repeat([]byte("long "), briskAnswer/5+1)
	for name, handler := range map[string]http.HandlerFunc{
		"long": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(long)))
			_, _ = w.Write(long[:100])
			_, _ = w.Write(long[100:])
		},
		"copied": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, bytes.NewReader(long)) },
		"flushed": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(long[:100])
			if err := http.NewResponseController(w).Flush(); err != nil {
				panic(http.ErrAbortHandler)
			}
			_, _ = w.Write(long[100:])
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBriskDoor(t, Patience{}, handler)
			conn, r := b.dial()
			for range 3 {
				if resp, body := b.ask(conn, r, get(briskTarget, briskHost, "")); resp.StatusCode != http.StatusOK || body != string(long) {
					t.Errorf("%d with %d bytes", resp.StatusCode, len(body))
				}
			}
			if n := b.brisk.Load(); n != 0 {
				t.Errorf("%d requests were answered briskly", n)
			}
		})
	}
}

func TestBriskHandlerPanics(t *testing.T) {
	var asked atomic.Int32
	b := newBriskDoor(t, Patience{}, func(http.ResponseWriter, *http.Request) {
		asked.Add(1)
		panic(http.ErrAbortHandler)
	})
	conn, r := b.dial()
	if _, err := io.WriteString(conn, get(briskTarget, briskHost, "")); err != nil {
		t.Fatal(err)
	}
	if b, err := r.ReadByte(); err == nil {
		t.Errorf("it was answered, with %q", b)
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the handler was asked %d times, want by both", n)
	}
}

func TestBriskEndsWithAConnectionThatIsIdle(t *testing.T) {
	b := newBriskDoor(t, Patience{Header: 50 * time.Millisecond, Idle: 100 * time.Millisecond}, briefly)
	for _, requests := range []int{0, 1} {
		conn, r := b.dial()
		for range requests {
			b.ask(conn, r, get(briskTarget, briskHost, ""))
		}
		if b, err := r.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("after %d requests: %q, %v, want the end", requests, b, err)
		}
	}
}

// TestBriskShutdown wants idle connections to end at once, and a request to be answered to its end.
func TestBriskShutdown(t *testing.T) {
	began, goOn := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	b := newBriskDoor(t, Patience{}, func(w http.ResponseWriter, r *http.Request) {
		if !first.Swap(true) {
			briefly(w, r)
			return
		}
		close(began)
		<-goOn
		briefly(w, r)
	})
	idle, idleReader := b.dial()
	b.ask(idle, idleReader, get(briskTarget, briskHost, ""))
	busy, busyReader := b.dial()
	if _, err := io.WriteString(busy, get(briskTarget, briskHost, "")); err != nil {
		t.Fatal(err)
	}
	<-began
	ended := make(chan error, 1)
	go func() { ended <- b.door.Shutdown(t.Context()) }()
	if _, err := idleReader.ReadByte(); err == nil {
		t.Error("an idle connection goes on")
	}
	if conn, err := net.Dial("tcp", b.address); err == nil {
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("connections are still accepted")
		}
		_ = conn.Close()
	}
	select {
	case err := <-ended:
		t.Errorf("Shutdown has ended before the request: %v", err)
	default:
	}
	close(goOn)
	resp, err := http.ReadResponse(busyReader, nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("the request was answered with %v, %v", resp, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Shutdown = %v", err)
	}
	if err := <-b.ended; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve = %v", err)
	}
	b.ended <- nil
}

func TestBriskShutdownTakesNoLongerThanItMay(t *testing.T) {
	began, goOn := make(chan struct{}), make(chan struct{})
	b := newBriskDoor(t, Patience{}, func(w http.ResponseWriter, r *http.Request) {
		close(began)
		<-goOn
		briefly(w, r)
	})
	conn, _ := b.dial()
	if _, err := io.WriteString(conn, get(briskTarget, briskHost, "")); err != nil {
		t.Fatal(err)
	}
	<-began
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.door.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown = %v", err)
	}
	close(goOn)
}

// FuzzBrisk holds what is taken for simple against what net/http reads in the same bytes.
func FuzzBrisk(f *testing.F) {
	for _, more := range []string{"", "User-Agent: x\r\n", "accept:a\r\nX-Request-Id: 1\r\n", "Connection: keep-alive\r\n", "Accept: a\r\nAccept: b\r\n", "Host: x\r\n", "Accept:\r\n"} {
		f.Add([]byte(get(briskTarget, briskHost, more)))
	}
	f.Add([]byte("GET " + briskTarget + " HTTP/1.1\nHost: " + briskHost + "\n\n"))
	s := New(Config{})
	f.Fuzz(func(t *testing.T, head []byte) {
		// Whatever it asks for is taken to be small.
		want, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
		if err == nil {
			s.remember(want, &recorder{ResponseWriter: &discarding{header: http.Header{"Cache-Status": cacheStatus(0)}}, status: http.StatusOK})
		}
		c := newBriskConn(s.Door(&http.Server{}), nil, nil)
		defer c.door.cancel()
		got := c.simple(head)
		if got == nil {
			return
		}
		if err != nil {
			t.Fatalf("%q is taken for simple, and net/http says %v", head, err)
		}
		if got.Method != want.Method || got.Host != want.Host || got.RequestURI != want.RequestURI || got.URL.String() != want.URL.String() ||
			!reflect.DeepEqual(got.Header, want.Header) || want.ContentLength != 0 || want.Close || got.Proto != want.Proto || len(want.TransferEncoding) > 0 {
			t.Errorf("%q:\n%+v\nnet/http:\n%+v", head, got, want)
		}
	})
}
