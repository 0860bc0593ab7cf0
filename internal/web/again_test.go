package web

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

// sharing is a publisher at example.com, asked over one HTTP/2 connection that has been used before.
func sharing(t *testing.T, handler http.HandlerFunc) (get func(path string) (string, error)) {
	t.Helper()
	s, roots := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("asked over %s", r.Proto)
		}
		switch r.URL.Path {
		case "/first":
		case "/breaks-the-connection":
			// More than twice of what is allowed ends the connection, and not only the stream (golang.org/issue/65051).
			w.Header().Set("X-Long", strings.Repeat("x", 64<<10))
		default:
			handler(w, r)
		}
	})
	c := client(t, Config{Rules: []Rule{{RootCAs: roots}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, MaxHeaderBytes: 4 << 10})
	get = func(path string) (string, error) {
		resp, _, err := c.Get(t.Context(), "example.com/app", "page", "https://example.com"+path, nil)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	if _, err := get("/first"); err != nil {
		t.Fatal(err)
	}
	return get
}

func TestAnswerToAnotherBreaksTheConnection(t *testing.T) {
	var asked atomic.Int32
	waits := make(chan struct{})
	get := sharing(t, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			close(waits)
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, "well")
	})
	type answer struct {
		body string
		err  error
	}
	answers := make(chan answer, 1)
	// Ends with the answer, which is waited for below.
	go func() {
		body, err := get("/")
		answers <- answer{body, err}
	}()
	<-waits
	if _, err := get("/breaks-the-connection"); err == nil {
		t.Error("a header longer than allowed was accepted")
	} else {
		checkError(t, err, acproxy.ErrPublisher, "publisher-protocol")
	}
	if a := <-answers; a.err != nil || a.body != "well" || asked.Load() != 2 {
		t.Errorf("the other request = %q, %v, asked %d times; want it asked again on another connection", a.body, a.err, asked.Load())
	}
}

func TestWhatIsNotAskedAgain(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
	}{
		{"a refusal of this request alone", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		{"an answer that has begun", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "10")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var asked atomic.Int32
			get := sharing(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				tt.answer(w, r)
			})
			if body, err := get("/"); err == nil || asked.Load() != 1 {
				t.Errorf("Get = %q, %v, asked %d times; want an error after one", body, err, asked.Load())
			}
		})
	}
	t.Run("a connection that breaks at its first use", func(t *testing.T) {
		var asked atomic.Int32
		s, roots := serve(t, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			w.Header().Set("X-Long", strings.Repeat("x", 64<<10))
		})
		c := client(t, Config{Rules: []Rule{{RootCAs: roots}}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, MaxHeaderBytes: 4 << 10})
		if _, _, err := c.Get(t.Context(), "example.com/app", "page", "https://example.com/", nil); err == nil || asked.Load() != 1 {
			t.Errorf("Get = %v, asked %d times; want an error after one", err, asked.Load())
		}
	})
}

// TestHandshakeEndsWithItsRequest: a publisher that accepts connections and says nothing has none from us that nobody waits for.
func TestHandshakeEndsWithItsRequest(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := client(t, Config{Hosts: map[string]string{"example.com": silent.Addr().String()}})
	ctx, leave := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, _, err := c.Get(ctx, "example.com/app", "page", "https://example.com/", nil)
		done <- err
	}()
	conn, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// It has begun to shake hands.
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	leave()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is still there")
	}
}
