package discovery

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/web"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func tag(prefix, template string) string {
	return fmt.Sprintf(`<meta name="ac-discovery" content="%s %s">`, prefix, template)
}

func keyTag(prefix, url string) string {
	return fmt.Sprintf(`<meta name="ac-discovery-pubkeys" content="%s %s">`, prefix, url)
}

// A site is a publisher's discovery pages, by host and path, and a note of what was asked for.
type site struct {
	mu     sync.Mutex
	pages  map[string]string // missing ones are 404
	status map[string]int
	header map[string]http.Header
	hold   chan struct{} // if set, answers wait until it is closed or fed
	asked  []string
	server *httptest.Server
}

func newSite(t testing.TB, pages map[string]string) *site {
	t.Helper()
	s := &site{pages: pages, status: map[string]int{}, header: map[string]http.Header{}}
	s.server = httptest.NewUnstartedServer(s)
	s.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.server.StartTLS()
	t.Cleanup(s.server.Close)
	return s
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	page := r.Host + r.URL.Path
	s.mu.Lock()
	s.asked = append(s.asked, page)
	body, ok := s.pages[page]
	status, header, hold := s.status[page], s.header[page], s.hold
	s.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}
	if r.URL.RawQuery != "ac-discovery=1" && !strings.HasPrefix(page, "example.com/redirected") {
		http.Error(w, "not a discovery request", http.StatusTeapot)
		return
	}
	for name, values := range header {
		w.Header()[name] = values
	}
	switch {
	case status != 0:
		w.WriteHeader(status)
	case !ok:
		w.WriteHeader(http.StatusNotFound)
	}
	_, _ = io.WriteString(w, body)
}

func (s *site) set(page, body string, status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pages[page], s.status[page] = body, status
}

// took returns what was asked for since the last call.
func (s *site) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

// web returns a client's configuration for which example.com is the site.
func (s *site) web() web.Config {
	ca := x509.NewCertPool()
	ca.AddCert(s.server.Certificate())
	return web.Config{
		Rules:       []web.Rule{{RootCAs: ca}},
		Hosts:       map[string]string{"example.com": s.server.Listener.Addr().String(), "pages.example.com:8443": s.server.Listener.Addr().String()},
		Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
	}
}

func finder(t testing.TB, cfg Config, wc web.Config) *Finder {
	t.Helper()
	cfg.Web = web.New(wc)
	f := New(cfg)
	t.Cleanup(func() { f.Close(); cfg.Web.Close() })
	return f
}

func templateURLs(found Found) []string {
	var urls []string
	for _, t := range found.Templates {
		urls = append(urls, t.URL)
	}
	return urls
}

func codeOf(err error) string {
	var e *acproxy.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestWalk(t *testing.T) {
	const good = "https://h/{name}.{ext}"
	anywhere := tag("example.com", good)
	all := []string{"example.com/a/b", "example.com/a", "example.com/"}
	large := strings.Repeat(" ", 1000-len(anywhere)) + anywhere
	tests := []struct {
		name   string
		pages  map[string]string
		status map[string]int
		header map[string]http.Header
		cfg    Config
		keys   bool
		asked  []string
		want   []string // URLs found
		page   string
		kind   error
		code   string
	}{
		{name: "the name's own page", pages: map[string]string{"example.com/a/b": anywhere}, asked: all[:1], want: []string{good}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "the parent's", pages: map[string]string{"example.com/a": anywhere}, asked: all[:2], want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "the host's", pages: map[string]string{"example.com/": anywhere}, asked: all, want: []string{good}, page: "https://example.com?ac-discovery=1"},
		{name: "nobody's", asked: all, kind: acproxy.ErrNotFound, code: "not-discovered"},
		{name: "a page without tags is climbed over", pages: map[string]string{"example.com/a/b": "<html>hello</html>", "example.com/": anywhere}, asked: all, want: []string{good}, page: "https://example.com?ac-discovery=1"},
		{name: "a page with tags of others only is climbed over", pages: map[string]string{"example.com/a/b": tag("example.com/x", "https://x/"), "example.com/a": anywhere}, asked: all[:2], want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "a neighbour's prefix does not cover the name", pages: map[string]string{"example.com/a/b": tag("example.com/a/bb", "https://x/") + tag("example.com/a/", "https://i/{name}.{ext}") + tag("exam", "https://x/")},
			asked: all[:1], want: []string{"https://i/{name}.{ext}"}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "templates that no http client can use are left out", pages: map[string]string{"example.com/a/b": tag("example.com", "hdfs://h/{name}.{ext}") + tag("example.com", "https://h/{Name}.{ext}") + anywhere},
			asked: all[:1], want: []string{good}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "a page of unusable templates is climbed over", pages: map[string]string{"example.com/a/b": tag("example.com", "hdfs://h/{name}.{ext}"), "example.com/a": anywhere}, asked: all[:2], want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "all templates in order", pages: map[string]string{"example.com/a/b": tag("example.com/a", "https://2/{name}.{ext}") + anywhere + tag("example.com", "https://1/{name}.{ext}")},
			asked: all[:1], want: []string{"https://2/{name}.{ext}", good, "https://1/{name}.{ext}"}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "keys are on a page of their own", pages: map[string]string{"example.com/a/b": anywhere, "example.com/": keyTag("example.com", "https://h/key")}, keys: true, asked: all, want: []string{"https://h/key"}, page: "https://example.com?ac-discovery=1"},
		{name: "templates are not looked for among keys", pages: map[string]string{"example.com/a/b": keyTag("example.com", "https://h/key"), "example.com/a": anywhere}, asked: all[:2], want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "400 is climbed over", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 400}, asked: all, want: []string{good}, page: "https://example.com?ac-discovery=1"},
		{name: "401 and 403 are climbed over", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 401, "example.com/a": 403}, asked: all, want: []string{good}, page: "https://example.com?ac-discovery=1"},
		{name: "tags of a 404 do not count", pages: map[string]string{"example.com/a/b": tag("example.com", "https://x/")}, status: map[string]int{"example.com/a/b": 404}, asked: all, kind: acproxy.ErrNotFound, code: "not-discovered"},
		{name: "204 has no tags", pages: map[string]string{"example.com/a": anywhere}, status: map[string]int{"example.com/a/b": 204}, asked: all[:2], want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "206 was not asked for", pages: map[string]string{"example.com/a/b": anywhere}, status: map[string]int{"example.com/a/b": 206}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "304 was not asked for", pages: map[string]string{"example.com/a": anywhere}, status: map[string]int{"example.com/a/b": 304}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "408 ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 408}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "425 ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 425}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "429 ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 429}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "500 ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 500}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "503 on the parent ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a": 503}, asked: all[:2], kind: acproxy.ErrPublisher, code: "publisher-status"},
		{name: "a redirect is followed", pages: map[string]string{"example.com/redirected": anywhere}, status: map[string]int{"example.com/a/b": 307}, header: map[string]http.Header{"example.com/a/b": {"Location": {"/redirected"}}},
			asked: []string{"example.com/a/b", "example.com/redirected"}, want: []string{good}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "a redirect to nowhere is climbed over", pages: map[string]string{"example.com/a": anywhere}, status: map[string]int{"example.com/a/b": 302}, header: map[string]http.Header{"example.com/a/b": {"Location": {"/redirected"}}},
			asked: []string{"example.com/a/b", "example.com/redirected", "example.com/a"}, want: []string{good}, page: "https://example.com/a?ac-discovery=1"},
		{name: "a redirect to a forbidden address ends the walk", pages: map[string]string{"example.com/": anywhere}, status: map[string]int{"example.com/a/b": 302}, header: map[string]http.Header{"example.com/a/b": {"Location": {"https://127.0.0.1/"}}},
			asked: all[:1], kind: acproxy.ErrRefused, code: "address-not-allowed"},
		{name: "a page as large as allowed", pages: map[string]string{"example.com/a/b": large}, cfg: Config{MaxPageSize: 1000}, asked: all[:1], want: []string{good}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "a page one byte larger ends the walk", pages: map[string]string{"example.com/a/b": large + " ", "example.com/": anywhere}, cfg: Config{MaxPageSize: 1000}, asked: all[:1], kind: acproxy.ErrPublisher, code: "page-too-large"},
		{name: "a page cut short ends the walk", pages: map[string]string{"example.com/a/b": anywhere, "example.com/": anywhere}, header: map[string]http.Header{"example.com/a/b": {"Content-Length": {"4000"}}}, asked: all[:1], kind: acproxy.ErrPublisher, code: "publisher-cut"},
		{name: "fixed templates ask nobody", pages: map[string]string{"example.com/a/b": anywhere}, cfg: Config{Rules: []Rule{{Prefix: "example.com/a", Templates: []string{"https://f/{name}.{ext}", "https://g/{name}.{ext}"}}}}, want: []string{"https://f/{name}.{ext}", "https://g/{name}.{ext}"}},
		{name: "fixed templates have no keys", cfg: Config{Rules: []Rule{{Templates: []string{"https://f/{name}.{ext}"}}}}, keys: true, kind: acproxy.ErrNotFound, code: "not-discovered"},
		{name: "the longest rule wins, by segments", pages: map[string]string{"example.com/a/b": anywhere},
			cfg:   Config{Rules: []Rule{{Prefix: "example.com", Templates: []string{"https://f/"}}, {Prefix: "example.com/a"}, {Prefix: "example.com/a/b/c", Templates: []string{"https://g/"}}}},
			asked: all[:1], want: []string{good}, page: "https://example.com/a/b?ac-discovery=1"},
		{name: "another discovery host", pages: map[string]string{"pages.example.com:8443/a": anywhere}, cfg: Config{Rules: []Rule{{Host: "pages.example.com:8443"}}},
			asked: []string{"pages.example.com:8443/a/b", "pages.example.com:8443/a"}, want: []string{good}, page: "https://pages.example.com:8443/a?ac-discovery=1"},
		{name: "simple discovery when nothing is found", cfg: Config{Rules: []Rule{{Simple: true}}}, asked: all, want: []string{simpleTemplate}},
		{name: "no simple discovery when something is", pages: map[string]string{"example.com/": anywhere}, cfg: Config{Rules: []Rule{{Simple: true}}}, asked: all, want: []string{good}, page: "https://example.com?ac-discovery=1"},
		{name: "no simple discovery on an outage", status: map[string]int{"example.com/a": 500}, cfg: Config{Rules: []Rule{{Simple: true}}}, asked: all[:2], kind: acproxy.ErrPublisher, code: "publisher-status"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t, tt.pages)
			s.status, s.header = tt.status, tt.header
			f := finder(t, tt.cfg, s.web())
			ask := f.Templates
			if tt.keys {
				ask = f.Keys
			}
			found, err := ask(t.Context(), "example.com/a/b")
			if asked := s.took(); !slices.Equal(asked, tt.asked) {
				t.Errorf("asked %q, want %q", asked, tt.asked)
			}
			if tt.kind != nil {
				if !errors.Is(err, tt.kind) || codeOf(err) != tt.code {
					t.Fatalf("error = %v (%s), want %v (%s)", err, codeOf(err), tt.kind, tt.code)
				}
				var e *acproxy.Error
				if errors.As(err, &e); len(e.Trace) < len(tt.asked) {
					t.Errorf("the trace has %d attempts, want %d: %v", len(e.Trace), len(tt.asked), e.Trace)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := templateURLs(found)
			if tt.keys {
				got = found.Keys
			}
			if !slices.Equal(got, tt.want) || found.Page != tt.page {
				t.Errorf("found %q on %q, want %q on %q", got, found.Page, tt.want, tt.page)
			}
			if len(found.Trace) < max(len(tt.asked), 1) {
				t.Errorf("trace = %v", found.Trace)
			}
		})
	}
}

func TestBadName(t *testing.T) {
	f := finder(t, Config{}, web.Config{Offline: true})
	for _, name := range []string{"", "Example.com", "example.com/../x", "example.com//x"} {
		if _, err := f.Templates(t.Context(), name); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("Templates(%q): error = %v", name, err)
		}
		if _, err := f.Keys(t.Context(), name); !errors.Is(err, acproxy.ErrInvalid) {
			t.Errorf("Keys(%q): error = %v", name, err)
		}
	}
}

// TestRemembering moves a clock.
func TestRemembering(t *testing.T) {
	const ttl, shortTTL = time.Hour, time.Minute
	anywhere := tag("example.com", "https://h/{name}.{ext}")
	now := time.Unix(1_000_000, 0)
	cfg := Config{PositiveTTL: ttl, NegativeTTL: shortTTL, Now: func() time.Time { return now }}
	tests := []struct {
		name   string
		body   string
		status int
		kept   time.Duration // 0: not at all
	}{
		{"a page with tags", anywhere, 0, ttl},
		{"a page with keys only", keyTag("example.com", "https://h/key"), 0, ttl},
		{"a page without tags", "hello", 0, shortTTL},
		{"404", "", 404, shortTTL}, {"410", "", 410, shortTTL}, {"400", "", 400, shortTTL},
		{"401", "", 401, 0}, {"403", "", 403, 0}, {"408", "", 408, 0}, {"425", "", 425, 0}, {"429", "", 429, 0}, {"500", "", 500, 0}, {"503", "", 503, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t, map[string]string{})
			s.set("example.com/", tt.body, tt.status)
			f := finder(t, cfg, s.web())
			asks := func() bool {
				_, _ = f.Templates(t.Context(), "example.com")
				return len(s.took()) > 0
			}
			if !asks() {
				t.Fatal("the first walk asked nobody")
			}
			if tt.kept == 0 {
				if !asks() {
					t.Error("the second walk asked nobody")
				}
				return
			}
			now = now.Add(tt.kept - 1)
			if asks() {
				t.Error("asked again while it is remembered")
			}
			now = now.Add(1)
			if !asks() {
				t.Error("not asked again although its time is over")
			}
		})
	}
	t.Run("less than no time is not at all", func(t *testing.T) {
		s := newSite(t, map[string]string{"example.com/": anywhere})
		f := finder(t, Config{PositiveTTL: -1}, s.web())
		for range 2 {
			if _, err := f.Templates(t.Context(), "example.com"); err != nil || len(s.took()) != 1 {
				t.Errorf("error %v, or nobody was asked", err)
			}
		}
	})
	t.Run("the trace says so, and keys share the pages", func(t *testing.T) {
		s := newSite(t, map[string]string{"example.com/": anywhere + keyTag("example.com", "https://h/key")})
		f := finder(t, cfg, s.web())
		first, err := f.Templates(t.Context(), "example.com/a")
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range first.Trace {
			if strings.Contains(a.Note, "cached") {
				t.Errorf("attempt %v is said to be cached", a)
			}
		}
		s.took()
		second, err := f.Keys(t.Context(), "example.com/a")
		if err != nil || !slices.Equal(second.Keys, []string{"https://h/key"}) {
			t.Fatalf("Keys = %v, %v", second, err)
		}
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked %q", asked)
		}
		if len(second.Trace) != 2 || second.Trace[0].Note != "cached" || second.Trace[1].Note != "cached, 1 template and 1 key for example.com/a" {
			t.Errorf("trace = %+v", second.Trace)
		}
	})
	t.Run("forgotten, with the parents but not the neighbours", func(t *testing.T) {
		s := newSite(t, map[string]string{"example.com/a/b": "x", "example.com/a": "x", "example.com/c": anywhere, "example.com/": anywhere})
		f := finder(t, cfg, s.web())
		for _, name := range []string{"example.com/a/b", "example.com/c"} {
			if _, err := f.Templates(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
		s.took()
		f.Forget("example.com/a/b")
		for _, name := range []string{"example.com/a/b", "example.com/c"} {
			if _, err := f.Templates(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
		if asked := s.took(); !slices.Equal(asked, []string{"example.com/a/b", "example.com/a", "example.com/"}) {
			t.Errorf("asked %q", asked)
		}
	})
	t.Run("what one rule was told is not told to another", func(t *testing.T) {
		s := newSite(t, map[string]string{"example.com/": anywhere})
		wc := s.web()
		wc.Rules = append(wc.Rules, web.Rule{Prefix: "example.com/strict", RootCAs: x509.NewCertPool()})
		f := finder(t, cfg, wc)
		if _, err := f.Templates(t.Context(), "example.com"); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Templates(t.Context(), "example.com/strict"); codeOf(err) != "publisher-tls" {
			t.Errorf("error = %v, want one of TLS", err)
		}
	})
}

func TestPagesAreBounded(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPages(3, func() time.Time { return now })
	held := func() string {
		var s string
		for _, key := range []string{"a", "b", "c", "d", "e", "f"} {
			if p.get(key) != nil {
				s += key
			}
		}
		return s
	}
	keep := func(key string, ttl time.Duration, positive bool) { p.keep(key, &page{}, ttl, positive) }
	keep("a", time.Hour, true)
	keep("b", time.Minute, false)
	keep("c", time.Hour, true)
	if got := held(); got != "abc" || p.len() != 3 {
		t.Fatalf("held %q (%d) at the bound, want abc", got, p.len())
	}
	keep("c", time.Hour, true)
	if got := held(); got != "abc" {
		t.Errorf("held %q after one was replaced, want abc", got)
	}
	keep("d", time.Hour, true)
	if got := held(); got != "bcd" {
		t.Errorf("held %q one past the bound, want the oldest to go", got)
	}
	now = now.Add(time.Minute)
	keep("e", time.Hour, true)
	if got := held(); got != "cde" {
		t.Errorf("held %q, want the expired to go before the oldest", got)
	}
	for i := range 100 {
		keep(fmt.Sprint(i), time.Minute, i%2 == 0)
		if p.len() > 3 || p.order[0].Len()+p.order[1].Len() != p.len() {
			t.Fatalf("%d pages held, and %d keys in order", p.len(), p.order[0].Len()+p.order[1].Len())
		}
	}
}

func TestOneRequestForAll(t *testing.T) {
	const clients = 20
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	f := finder(t, Config{}, s.web())
	// The first one leaves before the answer comes.
	ctx, leave := context.WithCancel(t.Context())
	gone := asks(ctx, f, "example.com")
	until(t, "it is asked", func() bool { return len(s.peek()) == 1 })
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			if found, err := f.Templates(t.Context(), "example.com"); err != nil || len(found.Templates) != 1 {
				t.Errorf("Templates = %v, %v", found, err)
			}
		})
	}
	until(t, "all wait", func() bool { return waiting(f) == clients+1 })
	leave()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("error of the one who left = %v", err)
	}
	close(s.hold)
	wg.Wait()
	if asked := s.took(); len(asked) != 1 {
		t.Errorf("asked %d times, want once", len(asked))
	}
}

// asks has the templates of a name be asked for, and returns where the error comes.
func asks(ctx context.Context, f *Finder, name string) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := f.Templates(ctx, name)
		done <- err
	}()
	return done
}

// waiting returns how many wait for pages.
func waiting(f *Finder) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.asks {
		n += a.waiting
	}
	return n
}

// until waits for what happens soon.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: that doesn't happen", what)
		}
	}
}

// TestNobodyWaits: a page is not asked for any more when everybody who wanted it has left, and who comes then isn't told so.
func TestNobodyWaits(t *testing.T) {
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	wc := s.web()
	wc.Timeout = time.Hour
	f := finder(t, Config{MaxRequests: 1, QueueWait: 20 * time.Second}, wc)
	ctx, leave := context.WithCancel(t.Context())
	others, leaveToo := context.WithCancel(t.Context())
	first, second := asks(ctx, f, "example.com"), asks(others, f, "example.com")
	until(t, "both wait", func() bool { return waiting(f) == 2 && len(s.peek()) == 1 })
	inLine := asks(others, f, "example.com/in/line")
	until(t, "one waits for its turn", func() bool { return waiting(f) == 3 })
	leave()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("error of the first who left = %v", err)
	}
	if n := waiting(f); n != 2 {
		t.Errorf("%d wait, want 2", n)
	}
	leaveToo()
	for _, left := range []<-chan error{second, inLine} {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("error of one who left = %v", err)
		}
	}
	f.mu.Lock()
	if n := len(f.asks); n != 0 {
		t.Errorf("%d pages are still asked for", n)
	}
	f.mu.Unlock()
	s.mu.Lock()
	s.hold = nil
	s.mu.Unlock()
	// There is one place, and the publisher hasn't answered who had it.
	if found, err := f.Templates(t.Context(), "example.com"); err != nil || len(found.Templates) != 1 {
		t.Errorf("Templates = %v, %v", found, err)
	}
	if asked := s.took(); !slices.Equal(asked, []string{"example.com/", "example.com/"}) {
		t.Errorf("asked for %q, want the page twice and nothing else", asked)
	}
}

// TestAnswerForNobody: a page that comes in the moment in which the last one leaves is remembered.
func TestAnswerForNobody(t *testing.T) {
	f := finder(t, Config{}, web.Config{Offline: true})
	a := &asking{cancel: func() {}, waiting: 1, done: make(chan struct{}), page: &page{tags: Tags{Templates: []Template{{Prefix: "example.com", URL: "https://h/"}}}}}
	f.asks["key"] = a
	f.leave(a, "key")
	f.ended(a, "key", 0)
	if f.pages.get("key") != a.page {
		t.Error("it isn't remembered")
	}
	// Nor does its end, nor who leaves it, concern those who ask anew.
	f.asks["key"] = &asking{}
	a.waiting = 1
	f.leave(a, "key")
	if f.asks["key"] == nil {
		t.Error("the next asking was forgotten")
	}
}

// TestClientsTakeTurns: so many pages are asked for at once, so many wait, and no client keeps the others out.
func TestClientsTakeTurns(t *testing.T) {
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	f := finder(t, Config{MaxRequests: 1, MaxQueue: 3}, s.web())
	greedy, other := For(t.Context(), "greedy"), For(t.Context(), "other")
	var all []<-chan error
	for i := range 4 {
		all = append(all, asks(greedy, f, fmt.Sprint("example.com/greedy", i)))
		until(t, "it waits", func() bool { return waiting(f) == i+1 && len(s.peek()) == 1 })
	}
	_, err := f.Templates(greedy, "example.com/one/more")
	if !errors.Is(err, acproxy.ErrBusy) || codeOf(err) != "queue-full" || !strings.Contains(err.Error(), "discovery.max_queue") {
		t.Errorf("the queue is full: error = %v", err)
	}
	last := asks(other, f, "example.com/other")
	if err := <-all[3]; codeOf(err) != "queue-full" {
		t.Errorf("the last one of who has the most: error = %v", err)
	}
	s.hold <- struct{}{}
	until(t, "the next one", func() bool { return len(s.peek()) == 2 })
	s.hold <- struct{}{}
	until(t, "the one after that", func() bool { return len(s.peek()) == 3 })
	if asked := s.peek(); !slices.Contains(asked, "example.com/other") {
		t.Errorf("asked for %q, want the other client's among them", asked)
	}
	close(s.hold)
	for _, done := range append(all[:3], last) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestNoTurn: without a queue nobody waits, and with one not for ever.
func TestNoTurn(t *testing.T) {
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	for _, tt := range []struct {
		cfg  Config
		code string
	}{{Config{MaxRequests: 1, MaxQueue: -1}, "queue-full"}, {Config{MaxRequests: 1, QueueWait: time.Millisecond}, "queue-slow"}} {
		f := finder(t, tt.cfg, s.web())
		ctx, leave := context.WithCancel(t.Context())
		s.took()
		first := asks(ctx, f, "example.com")
		until(t, "it is asked", func() bool { return len(s.peek()) == 1 })
		if _, err := f.Templates(t.Context(), "example.com/a"); codeOf(err) != tt.code {
			t.Errorf("error = %v, want %s", err, tt.code)
		}
		leave()
		<-first
	}
}

func (s *site) peek() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// TestForgottenWhileAsking: an answer to a question from before Forget is not remembered after it.
func TestForgottenWhileAsking(t *testing.T) {
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	f := finder(t, Config{}, s.web())
	done := make(chan error)
	go func() {
		_, err := f.Templates(t.Context(), "example.com")
		done <- err
	}()
	for len(s.peek()) == 0 {
		select {
		case err := <-done:
			t.Fatalf("Templates returned %v before the answer", err)
		case <-time.After(time.Millisecond):
		}
	}
	f.Forget("example.com")
	close(s.hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := f.Templates(t.Context(), "example.com"); err != nil {
		t.Fatal(err)
	}
	if n := len(s.took()); n != 2 {
		t.Errorf("asked %d times, want again after Forget", n)
	}
}

// TestSetRulesWhileAsking: a walk that has begun goes by its rules to its end, nobody who asks later shares its answer, and it isn't remembered.
func TestSetRulesWhileAsking(t *testing.T) {
	s := newSite(t, map[string]string{
		"example.com/app":            tag("example.com", "https://old/{name}.{ext}"),
		"pages.example.com:8443/app": tag("example.com", "https://new/{name}.{ext}"),
	})
	s.hold = make(chan struct{})
	f := finder(t, Config{}, s.web())
	if !f.Since().IsZero() {
		t.Errorf("the first rules count since %v", f.Since())
	}
	ask := func() <-chan string {
		done := make(chan string, 1)
		go func() {
			found, err := f.Templates(t.Context(), "example.com/app")
			done <- fmt.Sprint(templateURLs(found), err)
		}()
		return done
	}
	before := ask()
	for len(s.peek()) == 0 {
		time.Sleep(time.Millisecond) // until it is asked
	}
	f.SetRules([]Rule{{Prefix: "example.com", Host: "pages.example.com:8443"}})
	after := ask()
	for len(s.peek()) == 1 {
		time.Sleep(time.Millisecond) // until it is asked again
	}
	close(s.hold)
	if got := <-before; got != "[https://old/{name}.{ext}] <nil>" {
		t.Errorf("the walk that had begun found %s", got)
	}
	for _, got := range []string{<-after, <-ask()} {
		if got != "[https://new/{name}.{ext}] <nil>" {
			t.Errorf("later ones found %s", got)
		}
	}
	if asked := s.took(); len(asked) != 2 {
		t.Errorf("asked for %q", asked)
	}
	if f.Since().IsZero() {
		t.Error("it isn't known since when the rules count")
	}
	f.SetRules([]Rule{{Prefix: "example.com", Templates: []string{"https://fixed/{name}.{ext}"}}})
	if got := <-ask(); got != "[https://fixed/{name}.{ext}] <nil>" {
		t.Errorf("with fixed templates: %s", got)
	}
	f.SetRules(nil)
	if got := <-ask(); got != "[https://old/{name}.{ext}] <nil>" {
		t.Errorf("with no rules any more: %s", got)
	}
}

func TestClose(t *testing.T) {
	s := newSite(t, map[string]string{})
	s.hold = make(chan struct{})
	f := finder(t, Config{}, s.web())
	done := make(chan error)
	go func() {
		_, err := f.Templates(context.WithoutCancel(t.Context()), "example.com")
		done <- err
	}()
	for len(s.peek()) == 0 {
		select {
		case err := <-done:
			t.Fatalf("Templates returned %v before the answer", err)
		case <-time.After(time.Millisecond):
		}
	}
	f.Close()
	if err := <-done; codeOf(err) != "shutting-down" {
		t.Errorf("error = %v, want that it is closing", err)
	}
	if _, err := f.Templates(t.Context(), "example.com"); codeOf(err) != "shutting-down" {
		t.Errorf("error after Close = %v, want that it is closed", err)
	}
}

func TestOutageEndsTheWalk(t *testing.T) {
	s := newSite(t, map[string]string{"example.com/": tag("example.com", "https://h/{name}.{ext}")})
	s.hold = make(chan struct{})
	wc := s.web()
	wc.Timeout = 50 * time.Millisecond
	_, err := finder(t, Config{}, wc).Templates(t.Context(), "example.com/a")
	if !errors.Is(err, acproxy.ErrTimeout) {
		t.Errorf("a silent publisher: error = %v", err)
	}
	// On a busy machine it may not have come to asking.
	if asked := s.took(); len(asked) > 0 && !slices.Equal(asked, []string{"example.com/a"}) {
		t.Errorf("asked %q", asked)
	}
	wc.Hosts = map[string]string{"example.com": closedPort(t)}
	_, err = finder(t, Config{}, wc).Templates(t.Context(), "example.com/a")
	var e *acproxy.Error
	if !errors.Is(err, acproxy.ErrPublisher) || !errors.As(err, &e) || len(e.Trace) != 1 {
		t.Errorf("nobody listening: error = %v", err)
	}
}

// closedPort returns an address of this machine where nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRetryAfter(t *testing.T) {
	s := newSite(t, map[string]string{})
	s.status["example.com/"], s.header["example.com/"] = 429, http.Header{"Retry-After": {"7"}}
	_, err := finder(t, Config{}, s.web()).Templates(t.Context(), "example.com")
	var e *acproxy.Error
	if !errors.As(err, &e) || e.RetryAfter != 7*time.Second {
		t.Errorf("error = %+v, want Retry-After in it", err)
	}
}

func TestPlainHTTP(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, tag("example.com", "http://h/{name}.{ext}"))
	}))
	t.Cleanup(plain.Close)
	tests := []struct {
		name    string
		rule    Rule
		allowed bool // by the web client
		tls     int  // status of https; 0: nobody listens, -1: a certificate of a stranger, -2: it speaks http
		ok      bool
		code    string
	}{
		{name: "nobody listens on https", rule: Rule{HTTP: true}, allowed: true, ok: true},
		{name: "it is not allowed", allowed: true, code: "publisher-unreachable"},
		{name: "the web client does not allow it", rule: Rule{HTTP: true}, code: "insecure-url"},
		{name: "https says 404", rule: Rule{HTTP: true}, allowed: true, tls: 404, code: "not-discovered"},
		{name: "https says 500", rule: Rule{HTTP: true}, allowed: true, tls: 500, code: "publisher-status"},
		{name: "https has the certificate of a stranger", rule: Rule{HTTP: true}, allowed: true, tls: -1, code: "publisher-tls"},
		{name: "https speaks http", rule: Rule{HTTP: true}, allowed: true, tls: -2, code: "publisher-tls"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t, map[string]string{})
			s.set("example.com/", "", tt.tls)
			wc := s.web()
			wc.Rules[0].HTTP = tt.allowed
			wc.Hosts["example.com:80"] = plain.Listener.Addr().String()
			switch tt.tls {
			case 0:
				wc.Hosts["example.com:443"] = closedPort(t)
			case -1:
				wc.Rules[0].RootCAs = x509.NewCertPool()
			case -2:
				wc.Hosts["example.com:443"] = plain.Listener.Addr().String()
			}
			found, err := finder(t, Config{Rules: []Rule{tt.rule}}, wc).Templates(t.Context(), "example.com")
			if (err == nil) != tt.ok || codeOf(err) != tt.code {
				t.Fatalf("Templates = %v, %v, want code %q", found, err, tt.code)
			}
			if tt.ok && (found.Page != "http://example.com?ac-discovery=1" || len(found.Trace) != 2) {
				t.Errorf("found %+v", found)
			}
		})
	}
}

// TestPlainHTTPOfHostThatIsDown: a host that speaks http alone is found, although nobody tries https any more after a while; one that answered https
// with nonsense until then isn't.
func TestPlainHTTPOfHostThatIsDown(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, tag("example.com", "http://h/{name}.{ext}"))
	}))
	t.Cleanup(plain.Close)
	for _, tt := range []struct {
		name, https, code string
	}{
		{"nobody listens on https", closedPort(t), ""}, {"https speaks http", plain.Listener.Addr().String(), "publisher-tls publisher-down publisher-down"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var dials atomic.Int64
			wc := newSite(t, nil).web()
			wc.Rules[0].HTTP = true
			wc.Hosts = map[string]string{"example.com:443": tt.https, "example.com:80": plain.Listener.Addr().String()}
			wc.Limits = web.Limits{Failures: 1, Open: time.Hour, MaxOpen: time.Hour}
			wc.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == tt.https {
					dials.Add(1)
				}
				return (&net.Dialer{}).DialContext(ctx, network, addr)
			}
			f := finder(t, Config{Rules: []Rule{{HTTP: true}}}, wc)
			var codes []string
			for i := range 3 {
				found, err := f.Templates(t.Context(), fmt.Sprint("example.com/", i))
				if err != nil {
					codes = append(codes, codeOf(err))
				} else if found.Page != fmt.Sprintf("http://example.com/%d?ac-discovery=1", i) {
					t.Errorf("found %+v", found)
				}
			}
			if got := strings.Join(codes, " "); got != tt.code || dials.Load() != 1 {
				t.Errorf("codes %q after %d dials, want %q after one", got, dials.Load(), tt.code)
			}
		})
	}
}

func TestOfflineDialsNobody(t *testing.T) {
	wc := web.Config{
		Offline:     true,
		Hosts:       map[string]string{"example.com": "127.0.0.1:1"},
		DialContext: func(context.Context, string, string) (net.Conn, error) { t.Error("dialled"); return nil, io.EOF },
		Resolver:    &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { t.Error("looked up"); return nil, io.EOF }},
	}
	f := finder(t, Config{Rules: []Rule{{HTTP: true}, {Prefix: "fixed.com", Templates: []string{"https://h/{name}.{ext}"}}}}, wc)
	for _, name := range []string{"example.com/a", "other.com"} {
		if _, err := f.Templates(t.Context(), name); !errors.Is(err, acproxy.ErrOffline) {
			t.Errorf("Templates(%s): error = %v", name, err)
		}
		if _, err := f.Keys(t.Context(), name); !errors.Is(err, acproxy.ErrOffline) {
			t.Errorf("Keys(%s): error = %v", name, err)
		}
	}
	if found, err := f.Templates(t.Context(), "fixed.com/a"); err != nil || len(found.Templates) != 1 {
		t.Errorf("fixed templates = %v, %v", found, err)
	}
}
