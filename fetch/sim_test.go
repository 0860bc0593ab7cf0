package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/testtools"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// How often TestSimulation runs, and from which seed on. One that failed is run again with ACPROXY_SIM_SEED=seed ACPROXY_SIM_RUNS=1.
const (
	simRunsEnv = "ACPROXY_SIM_RUNS"
	simSeedEnv = "ACPROXY_SIM_SEED"
	simRuns    = 40
)

// The times of a simulated proxy.
const (
	simTTL      = time.Minute
	simMaxStale = 2 * time.Minute
	simNegative = 20 * time.Second
	simRetryFor = 40 * time.Second
	simStall    = 10 * time.Second
	simTimeout  = 10 * time.Second
	// simFlight is more than a flight can take: its turn, and the attempts after one another.
	simFlight = 4 * time.Minute
	// simCalm is how long all has to be well, so that whoever asks then has to be answered: pauses and memories of failures are over.
	simCalm = 6 * time.Minute
)

// simImage is one image that a simulated publisher may have.
type simImage struct {
	version   string
	aci, sign []byte
}

const (
	simNames    = 3
	simVersions = 4
)

// simMaterial are the images of each name, signed by a key that is older than the time at which a simulation begins.
var simMaterial = sync.OnceValue(func() (m struct {
	key    *trusttest.Key
	images [simNames][simVersions]simImage
}) {
	long := time.Date(1999, time.January, 1, 0, 0, 0, 0, time.UTC)
	m.key = mustKey(trusttest.Options{Algorithm: trusttest.EdDSA, Created: long})
	for n := range simNames {
		for v := range simVersions {
			im := simImage{version: fmt.Sprint(v + 1)}
			im.aci = acitest.Must(fatal{}, acitest.Spec{
				Name: simName(n), Labels: map[string]string{"version": im.version}, RootfsSize: 3000, Seed: uint64(10*n + v), Compression: acitest.None,
			})
			var err error
			if im.sign, err = m.key.Sign(bytes.NewReader(im.aci), trusttest.SignOptions{Time: long.Add(time.Hour)}); err != nil {
				panic(err)
			}
			m.images[n][v] = im
		}
	}
	return m
})

func simName(n int) string { return fmt.Sprintf("pub%d.example/app", n) }

// A simFault is how a simulated publisher misbehaves.
type simFault int

const (
	simWell    simFault = iota
	simRefuses          // nobody can be connected to
	simBroken           // 500
	simBusy             // 503 with Retry-After
	simCuts             // bodies end short
	simStalls           // bodies stop
	simGone             // 404
	simFaults
)

// simPublisher is a publisher in memory, and the model of what it has said.
type simPublisher struct {
	random  *rand.Rand
	mu      sync.Mutex
	fault   simFault
	ill     time.Time // when it was last anything but well; zero if never
	latest  [simNames]int
	history [simNames][]simMoment
	served  map[string]int // whole bodies, by the image's URL
	conns   sync.WaitGroup
}

// simMoment is a version becoming the latest.
type simMoment struct {
	at      time.Time
	version int
}

func (p *simPublisher) say(n, version int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest[n] = version
	p.history[n] = append(p.history[n], simMoment{time.Now(), version})
}

func (p *simPublisher) misbehave(f simFault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f != simWell || p.fault != simWell {
		p.ill = time.Now()
	}
	p.fault = f
}

// calm reports whether all has been well since a time.
func (p *simPublisher) calm(since time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault == simWell && (p.ill.IsZero() || p.ill.Before(since))
}

// wasLatest reports whether a version was the latest at some time in a span.
func (p *simPublisher) wasLatest(n int, version string, from, to time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range p.history[n] {
		ends := to
		if i+1 < len(p.history[n]) {
			ends = p.history[n][i+1].at
		}
		if fmt.Sprint(m.version+1) == version && !m.at.After(to) && !ends.Before(from) {
			return true
		}
	}
	return false
}

func (p *simPublisher) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	fault := p.fault
	cut := p.random.IntN(3000)
	p.mu.Unlock()
	switch fault {
	case simBroken:
		w.WriteHeader(http.StatusInternalServerError)
		return
	case simBusy:
		w.Header().Set("Retry-After", strconv.Itoa(1+cut%30))
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case simGone:
		w.WriteHeader(http.StatusNotFound)
		return
	}
	n := int(r.Host[len("pub")] - '0')
	file := strings.TrimPrefix(r.URL.Path, "/")
	version, isSignature := strings.CutSuffix(file, ".aci.asc")
	version = strings.TrimSuffix(version, ".aci")
	p.mu.Lock()
	v := p.latest[n]
	p.mu.Unlock()
	if version != "latest" {
		v = int(version[0]-'0') - 1
	}
	im := simMaterial().images[n][v]
	body := im.aci
	if isSignature {
		body = im.sign
	}
	w.Header().Set("ETag", `"`+im.version+`"`)
	if fault != simCuts && fault != simStalls || isSignature {
		if r.Header.Get("Range") == "" && !isSignature {
			p.mu.Lock()
			p.served[im.version+" "+r.Host]++
			p.mu.Unlock()
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	// Whoever leaves ends it.
	_, _ = w.Write(body[:cut])
	_ = http.NewResponseController(w).Flush()
	if fault == simStalls {
		<-r.Context().Done()
	}
	panic(http.ErrAbortHandler)
}

// dial connects to the publisher through memory.
func (p *simPublisher) dial(context.Context, string, string) (net.Conn, error) {
	p.mu.Lock()
	fault := p.fault
	p.mu.Unlock()
	if fault == simRefuses {
		return nil, errors.New("connection refused")
	}
	ours, theirs := net.Pipe()
	one := &oneConn{conn: theirs, done: make(chan struct{})}
	// Ends when the connection does; waited for at the end.
	p.conns.Go(func() { _ = (&http.Server{Handler: p, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}).Serve(one) })
	return &closing{ours, one}, nil
}

// oneConn is a listener for one connection.
type oneConn struct {
	conn net.Conn
	done chan struct{}
	once sync.Once
	took bool
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.took {
		l.took = true
		return l.conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// closing ends the listener of a connection with it.
type closing struct {
	net.Conn
	l *oneConn
}

func (c *closing) Close() error { return errors.Join(c.Conn.Close(), c.l.Close()) }

// unsynced is the operating system's file system without syncs: a simulation doesn't lose power.
type unsynced struct{ durable.OS }

func (u unsynced) SyncDir(string) error { return nil }

// A simulation is a Fetcher, a store and a publisher under a clock that only goes on when everybody waits, and the model that they are held against.
type simulation struct {
	t      *testing.T
	seed   uint64
	random *rand.Rand
	pub    *simPublisher
	dir    string
	keys   *trust.Keyring

	store  *cache.Disk
	client *web.Client
	finder *discovery.Finder
	f      *Fetcher

	mu        sync.Mutex
	disturbed time.Time // when the proxy was last restarted
	deleted   map[acproxy.Digest]time.Time
	asking    sync.WaitGroup
	answers   map[string]int
}

func (s *simulation) failf(format string, args ...any) {
	s.t.Helper()
	s.t.Errorf("seed %d: "+format, append([]any{s.seed}, args...)...)
}

func (s *simulation) open() {
	var err error
	if s.store, err = cache.Open(s.dir, cache.Options{FS: unsynced{}, Log: slog.New(slog.DiscardHandler)}); err != nil {
		s.t.Fatal(err)
	}
	if err := s.store.Ready(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	hosts := make(map[string]string)
	var rules []discovery.Rule
	for n := range simNames {
		host, _, _ := strings.Cut(simName(n), "/")
		hosts[host] = "192.0.2.1:80"
		rules = append(rules, discovery.Rule{Prefix: simName(n), Templates: []string{"http://" + host + "/{version}.{ext}"}, HTTP: true})
	}
	s.client = web.New(web.Config{
		Rules: []web.Rule{{HTTP: true}}, Hosts: hosts, DialContext: s.pub.dial, Timeout: simTimeout, StallTimeout: simStall,
		Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	s.finder = discovery.New(discovery.Config{Web: s.client, Rules: rules})
	s.f = New(Config{
		Store: s.store, Discovery: s.finder, Web: s.client, Keyring: func() *trust.Keyring { return s.keys },
		Policies: []Policy{{TTL: simTTL, MaxStale: simMaxStale}}, HoldBack: 512, NegativeTTL: simNegative, Jitter: 0.1,
		Retries: 5, RetryFor: simRetryFor, RetryWait: time.Second, MaxFlights: 4, QueueWait: simRetryFor,
		Log: slog.New(slog.DiscardHandler),
	})
}

func (s *simulation) close() {
	if err := errors.Join(s.f.Close(), s.finder.Close(), s.store.Close()); err != nil {
		s.failf("closing: %v", err)
	}
	s.client.Close()
}

func (s *simulation) restart() {
	s.mu.Lock()
	s.disturbed = time.Now()
	s.mu.Unlock()
	// Those who ask at the moment are told that it shuts down.
	_ = s.f.Close()
	s.asking.Wait()
	s.close()
	s.open()
	s.mu.Lock()
	s.disturbed = time.Now()
	s.mu.Unlock()
	if err := s.f.ResumeDownloads(s.t.Context()); err != nil {
		s.failf("resuming: %v", err)
	}
}

// delete removes a held image, as an eviction would.
func (s *simulation) delete(n, v int) {
	ref := simRef(s.t, n, fmt.Sprint(v+1))
	resolved, _, err := s.store.Resolve(s.t.Context(), ref)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.deleted[resolved.Digest] = time.Now()
	s.mu.Unlock()
	if err := s.store.Delete(s.t.Context(), resolved.Digest); err != nil {
		s.failf("deleting: %v", err)
	}
}

func simRef(t *testing.T, n int, version string) acproxy.Ref {
	labels := map[string]string{}
	if version != "" {
		labels["version"] = version
	}
	ref, err := acproxy.NewRef(simName(n), labels)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// ask asks for an image as a node does, and holds the answer against the model.
func (s *simulation) ask(n int, version string) {
	ref := simRef(s.t, n, version)
	ctx, cancel := context.WithTimeout(s.t.Context(), simFlight)
	defer cancel()
	began := time.Now()
	held, _, notHeld := s.store.Resolve(ctx, ref)
	im, err := s.f.Image(ctx, Request{Ref: ref})
	var got []byte
	var status Status
	following := false
	if err == nil {
		// Whoever has waited for the publisher and sees something new begin has it or has nothing, as with any proxy.
		status, following = im.Status, version == "" && im.Arriving()
		got, err = deliver(ctx, im)
		_ = im.Close()
	}
	ended := time.Now()
	s.mu.Lock()
	quiet := s.disturbed.Before(began) // no restart meanwhile
	deleted := notHeld == nil && !s.deleted[held.Digest].Before(began)
	calm := s.disturbed.IsZero() || s.disturbed.Before(began.Add(-simCalm))
	for _, at := range s.deleted {
		calm = calm && at.Before(began.Add(-simCalm))
	}
	s.answers[fmt.Sprint(status, " ", err == nil)]++
	s.mu.Unlock()
	if err != nil {
		switch {
		case ctx.Err() != nil && s.t.Context().Err() == nil:
			s.failf("%v was not answered within %v", ref, simFlight)
		case acproxy.KindOf(err) == nil:
			s.failf("%v: an error of no kind: %v", ref, err)
		case notHeld == nil && quiet && !deleted && !following:
			s.failf("%v was held, and yet: %v", ref, err)
		case calm && s.pub.calm(began.Add(-simCalm)):
			s.failf("%v: all is well, and yet: %v", ref, err)
		}
		return
	}
	images := simMaterial().images[n]
	i := slices.IndexFunc(images[:], func(im simImage) bool { return bytes.Equal(im.aci, got) })
	if i < 0 {
		s.failf("%v gave %d bytes that nobody published", ref, len(got))
		return
	}
	is := images[i].version
	if version != "" && is != version {
		s.failf("%v gave version %s", ref, is)
	}
	if version != "" && notHeld == nil && quiet && !deleted && status != Hit && status != Gone {
		s.failf("%v was held, and its status is %v", ref, status)
	}
	if version == "" {
		// How far back what is said to be fresh, or stale within bounds, may lie.
		back := map[Status]time.Duration{Hit: simTTL, Revalidated: 0, Miss: 0, Joined: 0, Stale: simTTL + simMaxStale}[status]
		bounded := status != Gone && (status != Stale || s.pub.calm(began.Add(-simCalm-back)))
		if bounded && !s.pub.wasLatest(n, is, began.Add(-back-simFlight), ended) {
			s.failf("%v gave version %s as %v, which had not been the latest for %v", ref, is, status, back+simFlight)
		}
	}
}

// TestSimulation runs random lives of a proxy against a simple model: what a request is answered with was published for it, is as fresh as it is said to
// be, comes if it is held whatever the publisher does, and comes at all if the publisher is well.
func TestSimulation(t *testing.T) {
	runs, first := simRuns, uint64(time.Now().UnixNano())
	if n, err := strconv.Atoi(os.Getenv(simRunsEnv)); err == nil {
		runs = n
	}
	if n, err := strconv.ParseUint(os.Getenv(simSeedEnv), 10, 64); err == nil {
		first = n
	}
	if testtools.Brief() {
		runs = min(runs, 5)
	}
	t.Logf("%d runs, seeds from %d on", runs, first)
	dirs := trust.Dirs{Local: t.TempDir()}
	for n := range simNames {
		if _, err := trust.Add(dirs, simName(n), simMaterial().key.Armored()); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := trust.Load(dirs)
	if err != nil {
		t.Fatal(err)
	}
	total := make(map[string]int)
	for i := range runs {
		seed := first + uint64(i)
		dir := t.TempDir()
		// A store in memory, where there is such a thing, is not slowed by the index's syncs.
		if shm, err := os.MkdirTemp("/dev/shm", "acproxy-sim-"); err == nil {
			dir = shm
		}
		synctest.Test(t, func(t *testing.T) { simulate(t, seed, dir, keys, total) })
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("run it again with %s=%d %s=1", simSeedEnv, seed, simRunsEnv)
		}
	}
	t.Logf("answers: %v", total)
}

func simulate(t *testing.T, seed uint64, dir string, keys *trust.Keyring, total map[string]int) {
	random := rand.New(rand.NewPCG(seed, 1))
	s := &simulation{
		t: t, seed: seed, random: random, dir: dir, keys: keys,
		pub:     &simPublisher{random: rand.New(rand.NewPCG(seed, 2)), served: make(map[string]int)},
		deleted: make(map[acproxy.Digest]time.Time), answers: make(map[string]int),
	}
	for n := range simNames {
		s.pub.say(n, 0)
	}
	s.open()
	// Some lives are without disturbance, so that it can be seen that nothing is fetched twice.
	troubled := random.IntN(4) > 0
	for range 20 + random.IntN(60) {
		time.Sleep(time.Duration(random.ExpFloat64() * float64(15*time.Second)))
		n := random.IntN(simNames)
		switch act := random.IntN(20); {
		case act < 12:
			version := ""
			if random.IntN(2) == 0 {
				version = fmt.Sprint(1 + random.IntN(simVersions))
			}
			for range 1 + random.IntN(3)*random.IntN(2) {
				s.asking.Go(func() { s.ask(n, version) })
			}
		case act < 14:
			s.pub.say(n, random.IntN(simVersions))
		case !troubled:
		case act < 17:
			s.pub.misbehave(simFault(random.IntN(int(simFaults))))
		case act < 18:
			s.pub.misbehave(simWell)
		case act < 19:
			s.delete(n, random.IntN(simVersions))
		default:
			s.restart()
		}
	}
	// In the end all is well again, and everybody gets everything.
	s.pub.misbehave(simWell)
	s.asking.Wait()
	time.Sleep(simCalm + time.Minute)
	for n := range simNames {
		for _, version := range []string{"", "1", "2", "3", "4"} {
			s.ask(n, version)
		}
	}
	if !troubled {
		for url, times := range s.pub.served {
			if times > 1 {
				s.failf("the publisher sent %s %d times", url, times)
			}
		}
	}
	s.close()
	s.pub.conns.Wait()
	for answer, n := range s.answers {
		total[answer] += n
	}
}
