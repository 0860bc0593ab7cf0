package web

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
)

// counted is a server that counts the connections made to it.
func counted(t *testing.T, handler http.HandlerFunc, http2 bool) (s *httptest.Server, ca *x509.CertPool, made *atomic.Int64) {
	t.Helper()
	made = new(atomic.Int64)
	s = httptest.NewUnstartedServer(handler)
	s.EnableHTTP2 = http2
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			made.Add(1)
		}
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s, pool(s), made
}

// TestChangedConnections: a connection that was made by one configuration is not used by the next one.
func TestChangedConnections(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s, ca, made := counted(t, func(http.ResponseWriter, *http.Request) {}, http2)
			cfg := Config{
				Environment: noProxy, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, Rules: []Rule{{Prefix: "example.com", RootCAs: ca}},
			}
			c := client(t, cfg)
			get := func() error {
				resp, _, err := c.Get(t.Context(), "example.com/app", "image", "https://example.com/", nil)
				if err == nil {
					read(t, resp)
				}
				return err
			}
			for range 2 {
				if err := get(); err != nil {
					t.Fatal(err)
				}
			}
			if made.Load() != 1 {
				t.Fatalf("two requests made %d connections", made.Load())
			}
			c.Change(cfg)
			if err := get(); err != nil || made.Load() != 2 {
				t.Errorf("after a change: %v, %d connections", err, made.Load())
			}
			stranger := cfg
			stranger.Rules = []Rule{{Prefix: "example.com", RootCAs: x509.NewCertPool()}}
			c.Change(stranger)
			checkError(t, get(), acproxy.ErrPublisher, "publisher-tls")
			forbidden := cfg
			forbidden.Hosts = nil
			forbidden.Rules = nil
			c.Change(forbidden)
			_, _, err := c.Get(t.Context(), "example.com/app", "image", "https://"+s.Listener.Addr().String()+"/", nil)
			checkError(t, err, acproxy.ErrRefused, "address-not-allowed")
			local := cfg
			local.Rules = []Rule{{Prefix: "example.com", Offline: true}}
			c.Change(local)
			checkError(t, get(), acproxy.ErrOffline, "offline")
			c.Change(cfg)
			if err := get(); err != nil {
				t.Errorf("with the first configuration again: %v", err)
			}
		})
	}
}

// TestChangedToOffline has requests of all kinds going on while the client is set to be offline and back: once Change has returned, nobody is dialled.
func TestChangedToOffline(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "https://storage.example.com/", http.StatusFound)
		}
	})
	var offline atomic.Bool
	cfg := Config{
		Environment: noProxy, Hosts: map[string]string{"example.com": s.Listener.Addr().String(), "storage.example.com": s.Listener.Addr().String()},
		Rules: []Rule{{Prefix: "example.com", RootCAs: ca}}, Limits: Limits{MaxConnections: 2, Rate: -1, Failures: -1},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			// With a context that is done nobody is dialled.
			if offline.Load() && ctx.Err() == nil {
				t.Error("somebody was dialled")
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}
	c := client(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var askers sync.WaitGroup
	var served atomic.Int64
	for _, path := range []string{"/", "/away", "/", "/away"} {
		// They end with ctx; waited for below.
		askers.Go(func() {
			for ctx.Err() == nil {
				resp, _, err := c.Get(ctx, "example.com/app", "image", "https://example.com"+path, nil)
				switch {
				case err == nil:
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					served.Add(1)
				case !errors.Is(err, acproxy.ErrOffline) && ctx.Err() == nil:
					t.Errorf("error = %v", err)
					return
				}
			}
		})
	}
	// As they do.
	askers.Go(func() {
		for ctx.Err() == nil {
			conn, err := c.Dial(ctx, "example.com:443")
			switch {
			case err == nil:
				conn.Close()
			case !errors.Is(err, acproxy.ErrOffline) && ctx.Err() == nil:
				t.Errorf("Dial: %v", err)
				return
			}
		}
	})
	off := cfg
	off.Offline = true
	for range 50 {
		for before := served.Load(); served.Load() < before+3 && !t.Failed(); {
			time.Sleep(time.Millisecond) // until some were answered
		}
		c.Change(off)
		offline.Store(true)
		if !c.Offline() {
			t.Error("it isn't offline")
		}
		time.Sleep(time.Millisecond) // for somebody to dial, if anybody does
		offline.Store(false)
		c.Change(cfg)
	}
	cancel()
	askers.Wait()
}

// TestChangeWhileDialling: a request whose connection isn't made yet goes by what was changed.
func TestChangeWhileDialling(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	dialling := make(chan struct{}, 10)
	good := Config{Environment: noProxy, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, Rules: []Rule{{Prefix: "example.com", RootCAs: ca}}}
	silent := good
	// It is not its own time that ends it.
	silent.ConnectTimeout, silent.Timeout = time.Hour, time.Hour
	silent.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		dialling <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c := client(t, silent)
	type result struct {
		resp  *http.Response
		trace acproxy.Trace
		err   error
	}
	done := make(chan result, 1)
	get := func() {
		resp, trace, err := c.Get(t.Context(), "example.com/app", "signature", "https://example.com/", nil)
		done <- result{resp, trace, err}
	}
	go get()
	<-dialling
	c.Change(good)
	got := <-done
	if got.err != nil || len(got.trace) != 1 || got.trace[0].Err != "" {
		t.Fatalf("error %v, trace %v", got.err, got.trace)
	}
	if body := read(t, got.resp); body != "hello" {
		t.Errorf("body %q", body)
	}
	c.Change(silent)
	go get()
	<-dialling
	off := good
	off.Offline = true
	c.Change(off)
	checkError(t, (<-done).err, acproxy.ErrOffline, "offline")
}

// TestChangeWhileWaiting: a request that waits for its turn goes by what was changed, although there is a connection from before that it could use.
func TestChangeWhileWaiting(t *testing.T) {
	var c *Client
	hold := make(chan struct{})
	s, ca := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-hold
		_, _ = io.WriteString(w, "to the end")
	})
	cfg := Config{
		Environment: noProxy, Hosts: map[string]string{"example.com": s.Listener.Addr().String()}, Rules: []Rule{{Prefix: "example.com", RootCAs: ca}},
		Limits: Limits{Rate: 2, Burst: 1},
	}
	c = client(t, cfg)
	first, _, err := c.Get(t.Context(), "example.com/app", "image", "https://example.com/", nil)
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		_, _, err := c.Get(t.Context(), "example.com/app", "signature", "https://example.com/", nil)
		failed <- err
	}()
	for c.Hosts()[0].Waiting == 0 {
		time.Sleep(time.Millisecond) // until it waits
	}
	off := cfg
	off.Offline = true
	c.Change(off)
	checkError(t, <-failed, acproxy.ErrOffline, "offline")
	close(hold)
	if body := read(t, first); body != "to the end" {
		t.Errorf("an answer that had begun ended with %q", body)
	}
	if host := c.Hosts()[0]; host.InProgress != 0 || host.Waiting != 0 {
		t.Errorf("in progress %d, waiting %d", host.InProgress, host.Waiting)
	}
}

// TestChangeForgives: whoever was down by what was changed is asked again at once.
func TestChangeForgives(t *testing.T) {
	s, ca := serve(t, func(http.ResponseWriter, *http.Request) {})
	wrong := Config{Environment: noProxy, Hosts: map[string]string{"example.com": "127.0.0.1:1"}, Rules: []Rule{{Prefix: "example.com", RootCAs: ca}}, Limits: Limits{Failures: 1, Open: time.Hour, MaxOpen: time.Hour}}
	c := client(t, wrong)
	for _, code := range []string{"publisher-unreachable", "publisher-down"} {
		_, _, err := c.Get(t.Context(), "example.com/app", "image", "https://example.com/", nil)
		checkError(t, err, acproxy.ErrPublisher, code)
	}
	right := wrong
	right.Hosts = map[string]string{"example.com": s.Listener.Addr().String()}
	c.Change(right)
	resp, _, err := c.Get(t.Context(), "example.com/app", "image", "https://example.com/", nil)
	if err != nil {
		t.Fatal(err)
	}
	read(t, resp)
}
