package admin

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/cache/cachetest"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/airgap"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/warm"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// key is trusted for example.com in every scene.
var key = sync.OnceValue(func() *trusttest.Key {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		panic(err)
	}
	return key
})

// A scene is a Server over a real store, at its socket and at an address.
type scene struct {
	t      *testing.T
	s      *Server
	store  *cache.Disk
	client *Client // by the socket
	url    string  // of the address
	web    *http.Client
	tokens map[string]string // by the names of clients
	job    warm.Job          // a list of images of two prefixes

	mu      sync.Mutex
	flights []fetch.FlightState
	ready   error
	did     []fetch.Decision
}

// images are those that every scene holds.
func images() []cachetest.Image {
	app := cachetest.NewImage("example.com/app", "1", 4000)
	app.Record.Dependencies = append(app.Record.Dependencies, cache.Dependency{Name: "example.com/absent"}, cache.Dependency{Name: "secret.example.com/db"})
	base := cachetest.NewImage("example.com/base", "1", 3000)
	base.Record.Dependencies = []cache.Dependency{{Name: "example.com/app"}}
	return []cachetest.Image{app, base, cachetest.NewImage("secret.example.com/db", "7", 2000)}
}

func newScene(t *testing.T, rules []access.Rule, methods access.Method) *scene {
	t.Helper()
	sc := &scene{t: t, tokens: make(map[string]string)}
	var err error
	if sc.store, err = cache.Open(filepath.Join(t.TempDir(), "store"), cache.Options{Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sc.store.Close() })
	for _, img := range images() {
		if err := cachetest.Commit(t.Context(), sc.store, img); err != nil {
			t.Fatal(err)
		}
	}
	bad := cachetest.NewImage("example.com/bad", "1", 100)
	if err := cachetest.Commit(t.Context(), sc.store, bad); err != nil {
		t.Fatal(err)
	}
	if err := sc.store.Quarantine(t.Context(), bad.Record.Digest, "tar", "it breaks a rule"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"example.com/evil", "secret.example.com/evil"} {
		refused := cache.Refused{Ref: cachetest.MustRef(name), When: start, Code: "unknown-key", Detail: "nobody knows the key"}
		if err := sc.store.Refuse(refused); err != nil {
			t.Fatal(err)
		}
	}
	tokens, err := access.OpenTokens(filepath.Join(t.TempDir(), "tokens"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"admin", "ci", "node"} {
		if sc.tokens[name], _, err = tokens.Add(name, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	dirs := trust.Dirs{Local: t.TempDir()}
	if _, err := trust.Add(dirs, "example.com", key().Armored()); err != nil {
		t.Fatal(err)
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		t.Fatal(err)
	}
	past := history.New()
	past.Note(time.Now(), history.Totals{Requests: 3, Hits: 2, Misses: 1, Served: 100, Fetched: 40})
	events := journal.New([]fetch.Decision{
		{Time: start, Event: fetch.EventAccepted, Ref: cachetest.MustRef("example.com/app:1"), Digest: images()[0].Record.Digest, Client: "192.0.2.1"},
		{Time: start, Event: fetch.EventAccepted, Ref: cachetest.MustRef("secret.example.com/db:7")},
		{Time: start, Event: journal.EventReloaded, Detail: "nothing has changed"},
	})
	sc.flights = []fetch.FlightState{
		{Ref: cachetest.MustRef("example.com/big:1"), Phase: fetch.PhaseReceiving, Began: start, Client: "192.0.2.1", Received: 5, Size: 10, Source: "https://example.com/big.aci"},
		{Ref: cachetest.MustRef("secret.example.com/big:1"), Phase: fetch.PhaseAsking, Began: start},
	}
	asked := missing.New()
	for _, name := range []string{"example.com/none", "secret.example.com/none"} {
		asked.Note(cachetest.MustRef(name), &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline"}, start)
		asked.NoteName(name+"/more", &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline"}, start)
	}
	asked.Note(cachetest.MustRef("example.com/base:1"), &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline"}, start) // it has come since
	f := sc.fetcher(keyring)
	sc.s = New(Options{
		Warm:   sc.warm(f),
		Origin: airgap.Store{Disk: sc.store, Judge: func(rec cache.Record) cache.Record { return rec }, Keyring: func() *trust.Keyring { return keyring }}, Destination: f, Stall: time.Second,
		Store: Judged{Disk: sc.store, Judge: func(rec cache.Record) cache.Record { return rec }, Did: sc.done, Missed: asked, Knows: func(string) bool { return false }},
		Guard: access.New(access.Config{Tokens: tokens, Rules: rules}), Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") }),
		Flights: func() []fetch.FlightState {
			sc.mu.Lock()
			defer sc.mu.Unlock()
			return sc.flights
		},
		Publishers: func() []web.HostState {
			return []web.HostState{{Host: "https://example.com", Requests: 3, Failures: 1, Latency: .02, Used: start, Breakers: []web.BreakerState{{State: web.BreakerOpen, Failures: 5, Since: start, LastError: "connection refused", LastFailure: start}}}}
		},
		Keyring: func() *trust.Keyring { return keyring }, Journal: events, History: past,
		Discover: func(_ context.Context, ref acproxy.Ref) (Discovered, error) {
			found := Discovered{
				Ref: ref, Keys: []string{"https://example.com/key.asc"}, Trace: acproxy.Trace{{What: "discovery", URL: "https://example.com/app?ac-discovery=1", Status: 200, Note: "1 template", Took: time.Second}},
				Endpoints: []Endpoint{{Template: discovery.Template{Prefix: "example.com", URL: "https://example.com/{name}.{ext}"}, Image: "https://example.com/a.aci", Signature: "https://example.com/a.aci.asc"}},
			}
			return found, nil
		},
		Config: func() ([]byte, error) { return []byte("offline: false\n"), nil }, ReloadKeys: func() {},
		Reload: func() ([]Change, error) { return []Change{{"offline", "false", "true", true}}, nil },
		Ready: func() error {
			sc.mu.Lock()
			defer sc.mu.Unlock()
			return sc.ready
		},
		Version: "1.2.3", Started: start, Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() { _ = sc.s.Close() })
	socket := filepath.Join(t.TempDir(), "s")
	if err := sc.s.Listen(socket); err != nil {
		t.Fatal(err)
	}
	if sc.client, err = Dial(socket); err != nil {
		t.Fatal(err)
	}
	hs := httptest.NewServer(sc.s.Front(methods))
	t.Cleanup(hs.Close)
	t.Cleanup(sc.s.EndLive) // before the server waits for who listens
	sc.url, sc.web = hs.URL, hs.Client()
	return sc
}

// fetcher takes images in, and dials nobody for them.
func (sc *scene) fetcher(keyring *trust.Keyring) *fetch.Fetcher {
	f := fetch.New(fetch.Config{Store: sc.store, Keyring: func() *trust.Keyring { return keyring }, Offline: true, Log: slog.New(slog.DiscardHandler)})
	sc.t.Cleanup(func() { _ = f.Close() })
	return f
}

// warm fetches lists of images.
func (sc *scene) warm(f *fetch.Fetcher) *warm.Jobs {
	jobs, err := warm.Open(warm.Options{Fetcher: f, Dir: sc.t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		sc.t.Fatal(err)
	}
	if sc.job, err = jobs.Submit(warm.Spec{Images: []warm.Entry{{Image: "example.com/app:2"}, {Image: "secret.example.com/db:8"}}}, "ci"); err != nil {
		sc.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	// Ends when the test does, which waits for it.
	go func() {
		defer close(ended)
		jobs.Run(ctx)
	}()
	sc.t.Cleanup(func() {
		cancel()
		<-ended
	})
	return jobs
}

func (sc *scene) done(d fetch.Decision) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	sc.did = append(sc.did, d)
}

// ask asks at the address, in the name of a client, or of nobody.
func (sc *scene) ask(who, method, path string, header ...string) (*http.Response, string) {
	sc.t.Helper()
	// What is sent stands behind the path.
	path, body, _ := strings.Cut(strings.ReplaceAll(path, "{job}", sc.job.ID), " ")
	req, err := http.NewRequestWithContext(sc.t.Context(), method, sc.url+path, strings.NewReader(body))
	if err != nil {
		sc.t.Fatal(err)
	}
	if who != "" {
		req.Header.Set("Authorization", "Bearer "+sc.tokens[who])
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		}
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := sc.web.Do(req)
	if err != nil {
		sc.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		sc.t.Fatal(err)
	}
	return resp, strings.TrimSpace(string(text))
}
