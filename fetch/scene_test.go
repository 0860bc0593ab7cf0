package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is when a test stops waiting for what should have happened.
const patience = 20 * time.Second

// goodKey is trusted for example.com in every scene, strangerKey in none.
var (
	goodKey     = sync.OnceValue(func() *trusttest.Key { return mustKey(trusttest.Options{Algorithm: trusttest.EdDSA}) })
	strangerKey = sync.OnceValue(func() *trusttest.Key { return mustKey(trusttest.Options{Algorithm: trusttest.EdDSA, Name: "Stranger"}) })
)

func mustKey(opts trusttest.Options) *trusttest.Key {
	key, err := trusttest.NewKey(opts)
	if err != nil {
		panic(err)
	}
	return key
}

// A clock stands still until it is told to go on.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// A scene is a Fetcher between a real store and a real publisher.
type scene struct {
	t      *testing.T
	pub    *publisher.Publisher
	dirs   trust.Dirs
	keys   *trust.Store
	dir    string // the store's
	clock  *clock
	change []func(*Config)
	disk   cache.Options
	stall  time.Duration // for how long the publisher may say nothing

	store  *cache.Disk
	client *web.Client
	finder *discovery.Finder
	f      *Fetcher

	mu      sync.Mutex
	told    []Decision
	changed chan struct{}
	dials   int
	noDial  bool // a dial fails the test
}

func newScene(t *testing.T, change ...func(*Config)) *scene {
	t.Helper()
	pub, err := publisher.Start(publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{
		t: t, pub: pub, dir: t.TempDir(), dirs: trust.Dirs{Local: t.TempDir()}, clock: &clock{now: time.Now()}, change: change,
		changed: make(chan struct{}), stall: patience,
	}
	t.Cleanup(func() { _ = pub.Close() })
	s.trust("example.com", goodKey())
	if s.keys, err = trust.Open(s.dirs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.keys.Close() })
	s.open()
	t.Cleanup(s.close)
	return s
}

// open starts everything on this side.
func (s *scene) open() {
	s.t.Helper()
	s.disk.Now, s.disk.Log = s.clock.Now, slog.New(slog.DiscardHandler)
	var err error
	if s.store, err = cache.Open(s.dir, s.disk); err != nil {
		s.t.Fatal(err)
	}
	if err := s.store.Ready(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	hosts := map[string]string{"plain.example.com:80": s.pub.HTTPAddr()}
	for _, host := range []string{"example.com", "storage.example.com", "one.example.com", "two.example.com", "plain.example.com:443"} {
		hosts[host] = s.pub.Addr()
	}
	s.client = web.New(web.Config{
		Rules: []web.Rule{{RootCAs: s.pub.CAPool()}}, Hosts: hosts, StallTimeout: s.stall,
		Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			s.mu.Lock()
			s.dials++
			if s.noDial {
				s.t.Errorf("%s was dialled", addr)
			}
			s.mu.Unlock()
			if addr != s.pub.Addr() && addr != s.pub.HTTPAddr() {
				s.t.Errorf("%s was dialled, which is not the publisher", addr)
				return nil, errors.New("a test may not dial out")
			}
			var d net.Dialer
			return d.DialContext(ctx, network, addr)
		},
	})
	s.finder = discovery.New(discovery.Config{Web: s.client, Now: s.clock.Now})
	cfg := Config{
		Store: s.store, Discovery: s.finder, Web: s.client, Keyring: s.keys.Current,
		Policies: []Policy{{TTL: time.Minute, MaxStale: time.Hour}}, RetryWait: time.Millisecond,
		Log: slog.New(slog.DiscardHandler), Now: s.clock.Now, Decided: s.decided,
	}
	for _, change := range s.change {
		change(&cfg)
	}
	s.f = New(cfg)
}

func (s *scene) close() {
	if err := errors.Join(s.f.Close(), s.finder.Close(), s.store.Close()); err != nil {
		s.t.Errorf("closing: %v", err)
	}
	s.client.Close()
}

// restart closes everything on this side and opens it again.
func (s *scene) restart() {
	s.t.Helper()
	s.close()
	s.open()
}

func (s *scene) decided(d Decision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, d)
	close(s.changed)
	s.changed = make(chan struct{})
}

// await returns when a decision has been told that is what ok says.
func (s *scene) await(what string, ok func(Decision) bool) Decision {
	s.t.Helper()
	timeout := time.After(patience)
	for {
		s.mu.Lock()
		i, changed := slices.IndexFunc(s.told, ok), s.changed
		var d Decision
		if i >= 0 {
			d = s.told[i]
		}
		s.mu.Unlock()
		if i >= 0 {
			return d
		}
		select {
		case <-changed:
		case <-timeout:
			s.t.Fatalf("nobody was told of %s", what)
		}
	}
}

// eventually waits for what happens behind an answer and is told to nobody.
func (s *scene) eventually(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			s.t.Fatalf("%s: did not happen", what)
		}
	}
}

// idle waits until no flight is in progress.
func (s *scene) idle() {
	s.t.Helper()
	s.eventually("the end of all flights", func() bool {
		s.f.mu.Lock()
		defer s.f.mu.Unlock()
		return len(s.f.flights) == 0 && len(s.f.downloads) == 0
	})
}

// asked waits until the publisher was asked n times for what matches. It may be called by any goroutine.
func (s *scene) asked(n int, match func(publisher.Request) bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if err := s.pub.Wait(ctx, n, match); err != nil {
		s.t.Errorf("waiting for request %d: %v", n, err)
	}
}

func (s *scene) trust(prefix string, key *trusttest.Key) {
	s.t.Helper()
	if _, err := trust.Add(s.dirs, prefix, key.Armored()); err != nil {
		s.t.Fatal(err)
	}
	if s.keys != nil {
		s.keys.Reload()
	}
}

// distrust takes away the trust that a key has for everything under example.com.
func (s *scene) distrust(key *trusttest.Key) {
	s.t.Helper()
	if err := trust.Remove(s.dirs, "example.com", trust.Fingerprint(key.Fingerprint())); err != nil {
		s.t.Fatal(err)
	}
	s.keys.Reload()
}

// labels are what rkt would ask for.
func labels(version string) map[string]string {
	l := map[string]string{"os": "linux", "arch": "amd64"}
	if version != "" {
		l["version"] = version
	}
	return l
}

func (s *scene) ref(name string, labels map[string]string) acproxy.Ref {
	s.t.Helper()
	ref, err := acproxy.NewRef(name, labels)
	if err != nil {
		s.t.Fatal(err)
	}
	return ref
}

// app is the ref of example.com/app with rkt's labels.
func (s *scene) app(version string) acproxy.Ref {
	s.t.Helper()
	return s.ref("example.com/app", labels(version))
}

// spec is an image of example.com/app, of somewhat more than size bytes.
func spec(version string, size int64) acitest.Spec {
	return acitest.Spec{Name: "example.com/app", Labels: labels(version), RootfsSize: size, Compression: acitest.None}
}

// publish publishes an image signed by goodKey and returns its bytes. It comes a day later than the one before.
func (s *scene) publish(spec acitest.Spec) []byte {
	s.t.Helper()
	blob := acitest.Must(s.t, spec)
	s.publishAs(spec.Name, spec.Labels, blob, goodKey())
	return blob
}

// publishAs publishes bytes under a name, signed by a key; by nobody if it is nil.
func (s *scene) publishAs(name string, labels map[string]string, blob []byte, key *trusttest.Key) {
	s.t.Helper()
	im := publisher.Image{Name: name, Labels: maps.Clone(labels), ACI: blob}
	var err error
	if key == nil {
		_, err = s.pub.Add(im)
	} else {
		_, err = s.pub.AddSigned(im, key)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// requests counts what the publisher was asked for: images and signatures.
func (s *scene) requests() (images, signatures int) {
	return s.pub.Count("*.aci"), s.pub.Count("*.asc")
}

// wantRequests checks what the publisher was asked for.
func (s *scene) wantRequests(images, signatures int) {
	s.t.Helper()
	if i, sig := s.requests(); i != images || sig != signatures {
		s.t.Errorf("the publisher was asked for %d images and %d signatures, want %d and %d:\n%v", i, sig, images, signatures, s.pub.Requests())
	}
}

// deliver reads an image as the server does: while it arrives, as far as it may be delivered.
func deliver(ctx context.Context, im *Image) ([]byte, error) {
	if !im.Arriving() {
		return io.ReadAll(im.File())
	}
	var got bytes.Buffer
	for {
		upTo, err := im.Await(ctx, int64(got.Len()))
		if err == io.EOF {
			return got.Bytes(), nil
		}
		if err != nil {
			return got.Bytes(), err
		}
		if _, err := io.Copy(&got, io.NewSectionReader(im.Growing(), int64(got.Len()), upTo-int64(got.Len()))); err != nil {
			return got.Bytes(), err
		}
		if int64(got.Len()) != upTo {
			return got.Bytes(), fmt.Errorf("Await says %d bytes, the file has %d", upTo, got.Len())
		}
	}
}

// get asks for an image and reads it to the end.
func (s *scene) get(ref acproxy.Ref) (blob []byte, status Status, err error) {
	return s.getFor(Request{Ref: ref})
}

func (s *scene) getFor(req Request) (blob []byte, status Status, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	im, err := s.f.Image(ctx, req)
	if err != nil {
		return nil, 0, err
	}
	defer im.Close()
	blob, err = deliver(ctx, im)
	return blob, im.Status, err
}

// want gets an image and checks it.
func (s *scene) want(ref acproxy.Ref, blob []byte, status Status) {
	s.t.Helper()
	got, how, err := s.get(ref)
	if err != nil || how != status || !bytes.Equal(got, blob) {
		s.t.Errorf("%v = %d bytes (right: %v), %v, %v; want %d, %v", ref, len(got), bytes.Equal(got, blob), how, err, len(blob), status)
	}
}

// wantError asks for an image that must not be given.
func (s *scene) wantError(ref acproxy.Ref, kind error, code string) error {
	s.t.Helper()
	_, _, err := s.get(ref)
	wantError(s.t, err, kind, code)
	return err
}

func wantError(t *testing.T, err, kind error, code string) {
	t.Helper()
	if !errors.Is(err, kind) || acproxy.Code(err) != code {
		t.Errorf("error = %v (kind %v, code %q), want kind %v, code %q", err, acproxy.KindOf(err), acproxy.Code(err), kind, code)
	}
}

// wantNothingHeld checks that no image is held.
func (s *scene) wantNothingHeld() {
	s.t.Helper()
	records, _, err := s.store.Images(cache.Filter{}, "", 0)
	if err != nil || len(records) != 0 {
		s.t.Errorf("held are %d images, %v; want none", len(records), err)
	}
}

// wantNothingKept checks that no image is held and no file left over.
func (s *scene) wantNothingKept() {
	s.t.Helper()
	s.wantNothingHeld()
	// Without their extension there are files that the store is just writing for itself.
	left, err := filepath.Glob(filepath.Join(s.dir, "partial", "*.aci*"))
	if err != nil || len(left) != 0 {
		s.t.Errorf("left over are %v, %v", left, err)
	}
}

// record returns what the store knows of the image that a ref answers.
func (s *scene) record(ref acproxy.Ref) cache.Record {
	s.t.Helper()
	_, rec, err := s.store.Resolve(s.t.Context(), ref)
	if err != nil {
		s.t.Fatalf("Resolve(%v): %v", ref, err)
	}
	return rec
}

func (s *scene) wait(what string, c <-chan struct{}) {
	s.t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		s.t.Fatalf("waiting for %s", what)
	}
}

func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func policies(p ...Policy) func(*Config) { return func(c *Config) { c.Policies = p } }

// received waits until a download has so many bytes.
func (s *scene) received(d *download, n int64) {
	s.t.Helper()
	timeout := time.After(patience)
	for {
		d.mu.Lock()
		written, changed := d.written, d.changed
		d.mu.Unlock()
		if written >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			s.t.Fatalf("%d bytes were received, not %d", written, n)
		}
	}
}
