package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/acproxy/acproxy"
)

// wantQuiet checks that no request has kept its place at any host.
func wantQuiet(t *testing.T, c *Client) {
	t.Helper()
	for _, s := range c.Hosts() {
		if s.InProgress != 0 || s.Images != 0 || s.Waiting != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// TestPlaceIsGivenBack: on every way out, over HTTP/1.1 and HTTP/2. There is one place at each host, so that whoever keeps it is found out by the
// next.
func TestPlaceIsGivenBack(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		s := httptest.NewUnstartedServer(http.HandlerFunc(placeHandler))
		s.EnableHTTP2 = h2
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		t.Cleanup(s.Close)
		at := s.Listener.Addr().String()
		cfg := Config{
			Rules:  []Rule{{RootCAs: pool(s)}, {Prefix: "stranger.example.com"}},
			Hosts:  map[string]string{"example.com": at, "other.example.com": at, "down.example.com": "127.0.0.1:1", "example.com:80": at},
			Limits: Limits{MaxConnections: 1, Failures: -1},
		}
		c := client(t, cfg)
		get := func(ctx context.Context, path string) (*http.Response, error) {
			resp, _, err := c.Get(ctx, "example.com", "image", "https://example.com"+path, nil)
			return resp, err
		}
		inProgress := func() (n int) {
			for _, s := range c.Hosts() {
				n += s.InProgress
			}
			return n
		}
		tests := []struct {
			name string
			do   func(t *testing.T)
		}{
			{"the body is read to its end, and not closed", func(t *testing.T) {
				resp, err := get(t.Context(), "/whole")
				if err != nil {
					t.Fatal(err)
				}
				if n := inProgress(); n != 1 {
					t.Errorf("before: %d in progress", n)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					t.Error(err)
				}
				wantQuiet(t, c)
				resp.Body.Close()
				resp.Body.Close()
			}},
			{"the body is closed early", func(t *testing.T) {
				resp, err := get(t.Context(), "/endless")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(resp.Body, make([]byte, 10)); err != nil {
					t.Error(err)
				}
				if n := inProgress(); n != 1 {
					t.Errorf("before: %d in progress", n)
				}
				resp.Body.Close()
			}},
			{"the body isn't read at all", func(t *testing.T) {
				resp, err := get(t.Context(), "/endless")
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}},
			{"there is no body", func(t *testing.T) {
				resp, err := get(t.Context(), "/none")
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}},
			{"the body stalls", func(t *testing.T) {
				hasty := cfg
				hasty.StallTimeout = 20 * time.Millisecond
				c := client(t, hasty)
				resp, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/stall", nil)
				if err != nil {
					t.Fatal(err)
				}
				_, err = io.Copy(io.Discard, resp.Body)
				checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
				wantQuiet(t, c)
				resp.Body.Close()
				wantQuiet(t, c)
			}},
			{"the body is cut", func(t *testing.T) {
				resp, err := get(t.Context(), "/cut")
				if err != nil {
					t.Fatal(err)
				}
				if _, err = io.Copy(io.Discard, resp.Body); !errors.Is(err, acproxy.ErrPublisher) {
					t.Errorf("error = %v", err)
				}
				wantQuiet(t, c)
				resp.Body.Close()
			}},
			{"cancelled while the body comes", func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				resp, err := get(ctx, "/stall")
				if err != nil {
					t.Fatal(err)
				}
				cancel()
				if _, err = io.Copy(io.Discard, resp.Body); !errors.Is(err, context.Canceled) {
					t.Errorf("error = %v", err)
				}
				resp.Body.Close()
			}},
			{"cancelled before the answer", func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				defer cancel()
				if _, err := get(ctx, "/silent"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error = %v", err)
				}
			}},
			{"500", func(t *testing.T) {
				resp, err := get(t.Context(), "/500")
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}},
			{"HEAD", func(t *testing.T) {
				if _, _, _, err := c.Head(t.Context(), "example.com", "image", "https://example.com/whole"); err != nil {
					t.Error(err)
				}
			}},
			{"a redirect to the same host", func(t *testing.T) {
				resp, err := get(t.Context(), "/to?/whole")
				if err != nil {
					t.Fatal(err)
				}
				read(t, resp)
			}},
			{"a redirect to another host takes its place there", func(t *testing.T) {
				resp, err := get(t.Context(), "/to?https://other.example.com/endless")
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range c.Hosts() {
					if want := strings.Contains(s.Host, "other."); (s.InProgress == 1) != want {
						t.Errorf("while the body comes: %+v", s)
					}
				}
				// The first host has room again.
				resp2, err := get(t.Context(), "/whole")
				if err != nil {
					t.Fatal(err)
				}
				read(t, resp2)
				resp.Body.Close()
			}},
			{"a redirect to nonsense", func(t *testing.T) {
				_, err := get(t.Context(), "/nonsense")
				checkError(t, err, acproxy.ErrPublisher, "bad-redirect")
			}},
			{"a redirect that is refused", func(t *testing.T) {
				_, err := get(t.Context(), "/to?http://example.com/")
				checkError(t, err, acproxy.ErrRefused, "insecure-url")
			}},
			{"redirects in circles", func(t *testing.T) {
				_, err := get(t.Context(), "/circle")
				checkError(t, err, acproxy.ErrPublisher, "too-many-redirects")
			}},
			{"a redirect to a host that is down", func(t *testing.T) {
				_, err := get(t.Context(), "/to?https://down.example.com/")
				checkError(t, err, acproxy.ErrPublisher, "publisher-unreachable")
			}},
			{"a redirect to a private address", func(t *testing.T) {
				_, err := get(t.Context(), "/to?https://10.0.0.1/")
				checkError(t, err, acproxy.ErrRefused, "address-not-allowed")
			}},
			{"a certificate of a stranger", func(t *testing.T) {
				_, _, err := c.Get(t.Context(), "stranger.example.com", "image", "https://example.com/whole", nil)
				checkError(t, err, acproxy.ErrPublisher, "publisher-tls")
			}},
		}
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s, HTTP/2 %v", tt.name, h2), func(t *testing.T) {
				tt.do(t)
				wantQuiet(t, c)
				resp, err := get(t.Context(), "/whole")
				if err != nil {
					t.Fatalf("the next request: %v", err)
				}
				read(t, resp)
			})
		}
	}
}

// placeHandler answers as its paths say.
func placeHandler(w http.ResponseWriter, r *http.Request) {
	flush := func(s string) {
		fmt.Fprint(w, s)
		w.(http.Flusher).Flush()
	}
	switch r.URL.Path {
	case "/whole":
		fmt.Fprint(w, "whole")
	case "/endless":
		for r.Context().Err() == nil {
			flush("more and more\n")
		}
	case "/none":
		w.WriteHeader(http.StatusNoContent)
	case "/stall":
		flush("some")
		<-r.Context().Done()
	case "/silent":
		<-r.Context().Done()
	case "/cut":
		w.Header().Set("Content-Length", "100")
		flush("some")
		panic(http.ErrAbortHandler)
	case "/500":
		w.WriteHeader(http.StatusInternalServerError)
	case "/to":
		w.Header().Set("Location", r.URL.RawQuery)
		w.WriteHeader(http.StatusFound)
	case "/nonsense":
		w.Header().Set("Location", "https://exa mple.com/")
		w.WriteHeader(http.StatusFound)
	case "/circle":
		http.Redirect(w, r, "/circle", http.StatusFound)
	}
}

// piped returns a client whose hosts are all a handler in this process, without the operating system in between, so that its time can be a bubble's.
// It is closed at the end of the bubble's test.
func piped(t *testing.T, cfg Config, handler http.HandlerFunc) *Client {
	t.Helper()
	conns := make(chan net.Conn)
	l := &pipeListener{conns: conns, closed: make(chan struct{})}
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	served := make(chan struct{})
	// Ends when the server is closed; waited for below.
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	if cfg.DialContext == nil {
		cfg.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			select {
			case conns <- theirs:
				return ours, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	cfg.Rules = append(cfg.Rules, Rule{HTTP: true})
	cfg.Hosts = map[string]string{"example.com": "192.0.2.1", "other.example.com": "192.0.2.2"}
	cfg.Environment = noProxy
	c := New(cfg)
	t.Cleanup(func() {
		c.Close()
		_ = server.Close()
		<-served
	})
	return c
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// TestWaitingIsNotThePublishersFault: the time for an answer begins when it is our turn to ask, and a turn is waited for as long again.
func TestWaitingIsNotThePublishersFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, Config{Timeout: 30 * time.Second, Limits: Limits{MaxConnections: 1, Failures: 1}}, func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(25 * time.Second):
			case <-r.Context().Done():
			}
			if r.URL.Path == "/to" {
				http.Redirect(w, r, "/slower", http.StatusFound)
				return
			}
			fmt.Fprint(w, "slow")
		})
		type result struct {
			took  time.Duration
			err   error
			trace acproxy.Trace
		}
		began := time.Now()
		results := make(chan result)
		for range 3 {
			// Ends with its answer, or its error; both are waited for.
			go func() {
				resp, trace, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
				if err == nil {
					read(t, resp)
				}
				results <- result{time.Since(began), err, trace}
			}()
			synctest.Wait()
		}
		if got := <-results; got.err != nil || got.took != 25*time.Second || got.trace[0].Note != "" {
			t.Errorf("the first: %+v", got)
		}
		third := <-results
		checkError(t, third.err, acproxy.ErrBusy, CodeBusy)
		if third.took != 30*time.Second || third.trace[0].Status != 0 || !strings.Contains(third.trace[0].Err, "no turn to ask http://example.com came within 30s") {
			t.Errorf("the third: %+v", third)
		}
		if got := <-results; got.err != nil || got.took != 50*time.Second || got.trace[0].Note != "waited 25s for its turn" || got.trace[0].Took != 25*time.Second {
			t.Errorf("the second: %+v", got)
		}
		// Redirects share the time for answers.
		_, trace, err := c.Get(t.Context(), "example.com", "image", "http://example.com/to", nil)
		checkError(t, err, acproxy.ErrTimeout, "publisher-timeout")
		if len(trace) != 2 || trace[1].Took != 5*time.Second {
			t.Errorf("trace = %+v", trace)
		}
		wantQuiet(t, c)
	})
}

// TestWaitingTwice: who is redirected to a host where he has to wait, too, has as much time for answers as if he hadn't, and one time for both
// queues.
func TestWaitingTwice(t *testing.T) {
	for _, tt := range []struct {
		name         string
		first, other time.Duration // how long each host's place is taken
		answer       time.Duration // how long an answer takes
		took         time.Duration
		code         string
	}{
		{"in time", 2 * time.Second, 20 * time.Second, 14 * time.Second, 50 * time.Second, ""},
		{"waiting for too long", 20 * time.Second, 20 * time.Second, 5 * time.Second, 35 * time.Second, CodeBusy},
		{"answering for too long", 5 * time.Second, 5 * time.Second, 20 * time.Second, 40 * time.Second, "publisher-timeout"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := piped(t, Config{Timeout: 30 * time.Second, Limits: Limits{MaxConnections: 1}}, func(w http.ResponseWriter, r *http.Request) {
					select {
					case <-time.After(tt.answer):
					case <-r.Context().Done():
					}
					if r.Host == "example.com" {
						http.Redirect(w, r, "http://other.example.com/", http.StatusFound)
					}
				})
				take := func(host string) *turn { return enter(t, c.gate, asked{host: host}) }
				first := take("http://example.com")
				time.AfterFunc(tt.first, func() {
					first.ended()
					second := take("http://other.example.com")
					time.AfterFunc(tt.answer+tt.other, second.ended)
				})
				began := time.Now()
				resp, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
				if err == nil {
					read(t, resp)
				}
				if took := time.Since(began); took != tt.took || (err == nil) != (tt.code == "") || err != nil && codeOf(err) != tt.code {
					t.Errorf("after %v: %v; want %v, %q", took, err, tt.took, tt.code)
				}
				time.Sleep(time.Minute)
				wantQuiet(t, c)
			})
		})
	}
}

// TestCancelledSaysNothing: a request that is given up neither counts as a failure nor makes up for one.
func TestCancelledSaysNothing(t *testing.T) {
	s, ca := serve(t, placeHandler)
	c := client(t, Config{Rules: []Rule{{RootCAs: ca}}, Limits: Limits{Failures: 2}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}})
	get := func(ctx context.Context, path string) *http.Response {
		resp, _, err := c.Get(ctx, "example.com", "image", "https://example.com"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	cut := func(path string) {
		resp := get(t.Context(), path)
		if _, err := io.Copy(io.Discard, resp.Body); !errors.Is(err, acproxy.ErrPublisher) {
			t.Errorf("error = %v", err)
		}
		resp.Body.Close()
	}
	cut("/cut?1")
	ctx, cancel := context.WithCancel(t.Context())
	resp := get(ctx, "/stall")
	cancel()
	resp.Body.Close()
	if s := c.Hosts()[0]; s.Open() || len(s.Breakers) != 1 || s.Breakers[0].Failures != 1 {
		t.Errorf("%+v", s)
	}
	cut("/cut?2")
	if s := c.Hosts()[0]; !s.Open() {
		t.Errorf("%+v", s)
	}
	wantQuiet(t, c)
}

func TestCancelledWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		c := piped(t, Config{Limits: Limits{MaxConnections: 1}}, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			fmt.Fprint(w, "body")
		})
		resp, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
		if err != nil {
			t.Fatal(err)
		}
		why := errors.New("the node went away")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(why) })
		_, trace, err := c.Get(ctx, "example.com", "image", "http://example.com/", nil)
		if !errors.Is(err, context.Canceled) || !errors.Is(err, why) || acproxy.KindOf(err) != nil || trace[0].Err == "" {
			t.Errorf("error = %v, %v, want the caller's own", err, trace)
		}
		read(t, resp)
		wantQuiet(t, c)
		if asked.Load() != 1 {
			t.Errorf("the publisher was asked %d times", asked.Load())
		}
	})
}

// TestDownloadsLeaveRoom: pages, signatures and keys don't wait for the end of large images.
func TestDownloadsLeaveRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, Config{Limits: Limits{MaxConnections: 8}}, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/image" && r.Method == http.MethodGet {
				fmt.Fprint(w, "some")
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
			fmt.Fprint(w, "small")
		})
		var bodies []io.Closer
		var images sync.WaitGroup
		var busy atomic.Int64
		var mu sync.Mutex
		for range 20 {
			// Ends with the answer's head, or without a turn; waited for below.
			images.Go(func() {
				resp, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/image", nil)
				if err != nil {
					busy.Add(1)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				bodies = append(bodies, resp.Body)
			})
		}
		synctest.Wait()
		began := time.Now()
		for _, what := range []string{"signature", "discovery", "key"} {
			resp, _, err := c.Get(t.Context(), "example.com", what, "http://example.com/small", nil)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			read(t, resp)
		}
		if status, _, _, err := c.Head(t.Context(), "example.com", "image", "http://example.com/image"); status != 200 || err != nil {
			t.Errorf("HEAD: %d, %v", status, err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("small requests waited %v", took)
		}
		images.Wait()
		if len(bodies) != 6 || busy.Load() != 14 {
			t.Errorf("%d images came and %d were busy, want 6 and 14", len(bodies), busy.Load())
		}
		for _, b := range bodies {
			b.Close()
		}
		wantQuiet(t, c)
	})
}

// TestDownHostIsNotDialled: after as many failures as it takes, nobody dials, until one probe does.
func TestDownHostIsNotDialled(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(ctx context.Context) error
		kind error
		text string
	}{
		{"refuses", func(context.Context) error { return errors.New("connection refused") }, acproxy.ErrPublisher, "connection refused"},
		{"is silent", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, acproxy.ErrTimeout, "deadline exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var dials atomic.Int64
				var up atomic.Bool
				var connect func(ctx context.Context) (net.Conn, error)
				c := piped(t, Config{
					Limits: Limits{Failures: 3, Open: 10 * time.Second}, Random: func() float64 { return 0 },
					DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
						dials.Add(1)
						if !up.Load() {
							return nil, tt.fail(ctx)
						}
						return connect(ctx)
					},
				}, nil)
				connect = func(context.Context) (net.Conn, error) {
					ours, theirs := net.Pipe()
					// Ends when the client closes its side.
					go func() {
						buf := make([]byte, 4096)
						for {
							if _, err := theirs.Read(buf); err != nil {
								return
							}
							time.Sleep(time.Second)
							_, _ = io.WriteString(theirs, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback")
						}
					}()
					return ours, nil
				}
				get := func() (acproxy.Trace, error) {
					resp, trace, err := c.Get(t.Context(), "example.com/app", "signature", "http://example.com/secret-name", nil)
					if err == nil {
						read(t, resp)
					}
					return trace, err
				}
				for range 3 {
					if _, err := get(); !errors.Is(err, tt.kind) || !Unreachable(err) {
						t.Fatal(err)
					}
				}
				began := time.Now()
				trace, err := get()
				checkError(t, err, tt.kind, "publisher-down")
				var e *acproxy.Error
				errors.As(err, &e)
				if !Unreachable(err) || e.RetryAfter != 10*time.Second || !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "secret-name") ||
					len(e.Trace) != 1 || e.Trace[0].Err != e.Detail || len(trace) != 1 || trace[0] != e.Trace[0] || trace[0].Status != 0 {
					t.Errorf("error = %v, %+v", err, e)
				}
				if dials.Load() != 3 || time.Since(began) != 0 {
					t.Errorf("%d dials after %v", dials.Load(), time.Since(began))
				}
				// Tunnels are somebody else's connections.
				before := dials.Load()
				if _, err := c.Dial(t.Context(), "example.com:80"); err == nil || dials.Load() == before {
					t.Errorf("Dial = %v, after %d dials", err, dials.Load()-before)
				}
				up.Store(true)
				before = dials.Load()
				time.Sleep(10 * time.Second)
				var through atomic.Int64
				var all sync.WaitGroup
				for range 50 {
					// Ends with its answer, or because it is sent away; waited for below.
					all.Go(func() {
						if _, err := get(); err == nil {
							through.Add(1)
						} else if codeOf(err) != "publisher-down" {
							t.Error(err)
						}
					})
				}
				all.Wait()
				if through.Load() != 1 || dials.Load() != before+1 {
					t.Errorf("%d of 50 were answered with %d dials, want 1 with 1", through.Load(), dials.Load()-before)
				}
				if _, err := get(); err != nil {
					t.Errorf("after the probe: %v", err)
				}
				wantQuiet(t, c)
			})
		})
	}
}

// TestWhatIsNotTheHostsFault: none of this keeps anybody from the host.
func TestWhatIsNotTheHostsFault(t *testing.T) {
	s, ca := serve(t, placeHandler)
	c := client(t, Config{
		Rules: []Rule{{RootCAs: ca}}, Limits: Limits{Failures: 1}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()},
		Resolver: names(map[string][]string{"private.example.com": {"10.0.0.7"}}),
	})
	for range 3 {
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://private.example.com/", nil)
		checkError(t, err, acproxy.ErrRefused, "address-not-allowed")
		_, _, err = c.Get(t.Context(), "example.com", "image", "https://10.0.0.1/", nil)
		checkError(t, err, acproxy.ErrRefused, "address-not-allowed")
		_, _, err = c.Get(t.Context(), "example.com", "image", "https://"+strings.Repeat("a", 400)+"/", nil)
		checkError(t, err, acproxy.ErrPublisher, "bad-url")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_, _, err = c.Get(ctx, "example.com", "image", "https://example.com/silent", nil)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v", err)
		}
		cancel()
		resp, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/404", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	for _, s := range c.Hosts() {
		if s.Open() || len(s.Breakers) > 0 {
			t.Errorf("%+v", s)
		}
	}
	wantQuiet(t, c)
}

// TestOfflineTouchesNothing: no host is even remembered.
func TestOfflineTouchesNothing(t *testing.T) {
	c := client(t, Config{Offline: true, Limits: Limits{MaxConnections: 1, Rate: 1, Burst: 1, Failures: 1}, DialContext: func(context.Context, string, string) (net.Conn, error) {
		t.Error("somebody dials")
		return nil, errors.New("no")
	}})
	for range 5 {
		_, _, err := c.Get(t.Context(), "example.com", "image", "https://example.com/", nil)
		checkError(t, err, acproxy.ErrOffline, "offline")
	}
	if hosts := c.Hosts(); len(hosts) != 0 {
		t.Errorf("Hosts = %+v", hosts)
	}
}

// TestDifferentRulesShareAHost: its places and its wish to be left alone are the host's; what fails may be the rule's.
func TestDifferentRulesShareAHost(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/429" {
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(http.StatusTooManyRequests)
		}
	})
	c := client(t, Config{
		Rules:  []Rule{{Prefix: "example.com/good", RootCAs: ca}, {Prefix: "example.com/bad", Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
		Limits: Limits{Failures: 1}, Hosts: map[string]string{"example.com": s.Listener.Addr().String()},
	})
	ask := func(name, path string) error {
		resp, _, err := c.Get(t.Context(), name, "image", "https://EXAMPLE.com.:443"+path, nil)
		if err == nil {
			read(t, resp)
		}
		return err
	}
	checkError(t, ask("example.com/bad", "/"), acproxy.ErrPublisher, "publisher-tls")
	checkError(t, ask("example.com/bad", "/"), acproxy.ErrPublisher, "publisher-down")
	if err := ask("example.com/good", "/"); err != nil {
		t.Error(err)
	}
	hosts := c.Hosts()
	if len(hosts) != 1 || hosts[0].Host != "https://example.com" || len(hosts[0].Breakers) != 1 || hosts[0].Breakers[0].Prefix != "example.com/bad" {
		t.Errorf("Hosts = %+v", hosts)
	}
	if h := hosts[0]; h.Requests != 2 || h.Failures != 1 || h.Latency <= 0 || h.Used.IsZero() {
		t.Errorf("Hosts = %+v, want 2 requests, 1 of them failed, and what the other took", h)
	}
	if err := ask("example.com/good", "/429"); err != nil {
		t.Error(err)
	}
	checkError(t, ask("example.com/good", "/"), acproxy.ErrPublisher, "publisher-resting")
}

func TestOrigin(t *testing.T) {
	for _, tt := range []struct{ url, want string }{
		{"https://example.com/a?b", "https://example.com"}, {"https://Example.COM.:443/", "https://example.com"}, {"http://example.com", "http://example.com"},
		{"http://example.com:443", "http://example.com:443"}, {"https://example.com:8443", "https://example.com:8443"}, {"https://[FD00::1]", "https://[fd00::1]"},
		{"https://[fd00::1]:80", "https://[fd00::1]:80"},
	} {
		u, err := url.Parse(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		if got := origin(u); got != tt.want {
			t.Errorf("origin(%s) = %s, want %s", tt.url, got, tt.want)
		}
	}
}

// TestOurOwnShortageIsNoFaultOfThePublisher: that this process has no more descriptors says nothing about the host that it wanted to ask.
func TestOurOwnShortageIsNoFaultOfThePublisher(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	short := true
	c := client(t, Config{Rules: []Rule{{HTTP: true}}, Hosts: map[string]string{"example.com": "192.0.2.1"}, Limits: Limits{Failures: 1}, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if short {
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("socket", syscall.EMFILE)}
		}
		return new(net.Dialer).DialContext(ctx, network, s.Listener.Addr().String())
	}})
	for range 3 {
		_, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
		checkError(t, err, acproxy.ErrBusy, acproxy.CodeShortage)
	}
	short = false
	resp, _, err := c.Get(t.Context(), "example.com", "image", "http://example.com/", nil)
	if err != nil {
		t.Fatalf("once there are descriptors: %v", err)
	}
	read(t, resp)
}
