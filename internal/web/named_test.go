package web

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/acproxy/acproxy"
)

// closeCounter is the content of a request, and counts how often it is closed.
type closeCounter struct {
	io.Reader
	closed atomic.Int32
}

func (c *closeCounter) Close() error {
	c.closed.Add(1)
	return nil
}

// TestNamed asks a server that the operator named at a private address, and follows it to where it leads.
func TestNamed(t *testing.T) {
	s, ca := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, r.Host, " ", string(body))
	})
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	known := map[string][]string{"ca.internal": {"127.0.0.1"}, "metadata.internal": {"127.0.0.1"}, "example.com": {"127.0.0.1"}}
	for _, tt := range []struct {
		name, url string
		cfg       Config
		kind      error
		code      string
	}{
		{name: "the server itself", url: "https://example.com:" + port + "/directory"},
		{name: "in capitals and with a dot", url: "https://EXAMPLE.com.:" + port + "/directory"},
		{name: "another host at a private address", url: "https://metadata.internal:" + port + "/", kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "another port of its own", url: "https://example.com:1/", kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "an address", url: "https://127.0.0.1:" + port + "/", kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "an address that is allowed", url: "https://127.0.0.1:" + port + "/", cfg: Config{Allow: prefixes("127.0.0.1/32")}},
		{name: "plain http", url: "http://example.com:" + port + "/directory", kind: acproxy.ErrRefused, code: "insecure-url"},
		{name: "offline", url: "https://example.com:" + port + "/directory", cfg: Config{Offline: true}, kind: acproxy.ErrOffline, code: "offline"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.cfg
			cfg.Resolver = names(known)
			directory := &url.URL{Scheme: "https", Host: "example.com:" + port, Path: "/directory"}
			c := &http.Client{Transport: client(t, cfg).Named(directory, ca)}
			defer c.CloseIdleConnections()
			content := &closeCounter{Reader: strings.NewReader("signed")}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, tt.url, content)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.Do(req)
			if tt.kind != nil {
				var e *acproxy.Error
				if !errors.As(err, &e) || !errors.Is(err, tt.kind) || e.Code != tt.code {
					t.Errorf("error = %v, want %v (%s)", err, tt.kind, tt.code)
				}
				if content.closed.Load() == 0 {
					t.Error("the content of the request isn't closed")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, resp); !strings.HasSuffix(got, " signed") {
				t.Errorf("it was asked as %q", got)
			}
		})
	}
}

// TestNamedByProxy has a server that the operator named be reached by the environment's proxy, whatever its address.
func TestNamedByProxy(t *testing.T) {
	var asked atomic.Pointer[string]
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		target := r.Method + " " + r.Host
		asked.Store(&target)
		http.Error(w, "no", http.StatusForbidden)
	}))
	t.Cleanup(proxy.Close)
	at, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Environment: func(*url.URL) (*url.URL, error) { return at, nil }}
	rt := client(t, cfg).Named(&url.URL{Scheme: "https", Host: "10.0.0.5"}, nil)
	for target, want := range map[string]string{"https://10.0.0.5/directory": "CONNECT 10.0.0.5:443", "https://10.0.0.6/order": ""} {
		asked.Store(new(string))
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, target, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := rt.RoundTrip(req); err == nil {
			_ = resp.Body.Close()
			t.Errorf("%s was answered", target)
		}
		if got := *asked.Load(); got != want {
			t.Errorf("for %s the proxy is asked %q, want %q", target, got, want)
		}
	}
}

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}
