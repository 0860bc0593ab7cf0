package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	// simGrace is for how long what was used is not evicted, in the lives that have that.
	simGrace = time.Minute
	// simLatency keeps an image from coming back in the same moment in which it was evicted.
	simLatency = 10 * time.Millisecond
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
	// simSize is what an image takes at most, with what is promised for it.
	simSize = 400 << 10
	// simIndex is what a store takes beside its images, and simSpare what it promises to itself and hardly uses: the pages that the index writes anew.
	simIndex = 448 << 10
	simSpare = 1 << 20
	// simRoom is for how many images a store has room at least: one of each name that its publisher has no more, and one that arrives.
	simRoom = simNames + 1
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
				Name: simName(n), Labels: map[string]string{"version": im.version}, RootfsSize: 300 << 10, Seed: uint64(10*n + v), Compression: acitest.None,
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

func simNumber(name string) int { return int(name[len("pub")] - '0') }

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

// simPublisher is a publisher in memory for each name, and the model of what it has said.
type simPublisher struct {
	random  *rand.Rand
	mu      sync.Mutex
	fault   [simNames]simFault
	since   [simNames]time.Time // when that fault began
	ill     [simNames]time.Time // when it was last anything but well; zero if never
	latest  [simNames]int
	history [simNames][]simMoment
	served  map[string]int // whole bodies, by version and host
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

func (p *simPublisher) misbehave(n int, f simFault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f != simWell || p.fault[n] != simWell {
		p.ill[n] = time.Now()
	}
	if p.fault[n] != f {
		p.fault[n], p.since[n] = f, time.Now()
	}
}

// goneSince reports whether it has had nothing, at any time from one on.
func (p *simPublisher) goneSince(n int, from time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault[n] == simGone && !p.since[n].After(from)
}

// calm reports whether all has been well since a time.
func (p *simPublisher) calm(n int, since time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fault[n] == simWell && (p.ill[n].IsZero() || p.ill[n].Before(since))
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
	time.Sleep(simLatency)
	n := simNumber(r.Host)
	p.mu.Lock()
	fault := p.fault[n]
	cut := p.random.IntN(300 << 10)
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
		counted := &counting{ResponseWriter: w}
		http.ServeContent(counted, r, "", time.Time{}, bytes.NewReader(body))
		if counted.n == len(im.aci) {
			p.mu.Lock()
			p.served[im.version+" "+r.Host]++
			p.mu.Unlock()
		}
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

// counting counts the bytes of a body that were taken.
type counting struct {
	http.ResponseWriter
	n int
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n += n
	return n, err
}

// simAddresses are where the publishers of the names are.
var simAddresses = [simNames]string{"192.0.2.1:80", "192.0.2.2:80", "192.0.2.3:80"}

// dial connects to the publisher through memory.
func (p *simPublisher) dial(_ context.Context, _, address string) (net.Conn, error) {
	n := slices.IndexFunc(simAddresses[:], func(a string) bool { return a == address })
	p.mu.Lock()
	fault := p.fault[n]
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
	// What the disk holds, in bytes of whole blocks, and for how long what was used stays. A disk of no size has no end.
	capacity int64
	quota    cache.Quota

	store  *cache.Disk
	client *web.Client
	finder *discovery.Finder
	f      *Fetcher

	mu        sync.Mutex
	disturbed time.Time                    // when the proxy was last restarted
	alone     bool                         // nobody asks beside
	deleted   time.Time                    // when the last image was deleted
	removed   map[acproxy.Digest]time.Time // when each was last deleted or evicted
	evicted   map[acproxy.Digest]int       // how often
	reading   map[acproxy.Digest]int       // by how many it is being read
	used      map[acproxy.Digest]time.Time // when it was last asked for, and had
	gone      map[acproxy.Digest]time.Time // when it was last said that its publisher has it no more
	asking    sync.WaitGroup
	answers   map[string]int
}

func (s *simulation) failf(format string, args ...any) {
	s.t.Helper()
	s.t.Errorf("seed %d: "+format, append([]any{s.seed}, args...)...)
}

func (s *simulation) open() {
	var err error
	opts := cache.Options{FS: unsynced{}, Log: slog.New(slog.DiscardHandler), Quota: s.quota, Evicted: s.forget}
	if s.capacity > 0 {
		opts.Free = func() (int64, error) { return s.free(), nil }
	}
	if s.store, err = cache.Open(s.dir, opts); err != nil {
		s.t.Fatal(err)
	}
	if err := s.store.Ready(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	hosts := make(map[string]string)
	var rules []discovery.Rule
	for n := range simNames {
		host, _, _ := strings.Cut(simName(n), "/")
		hosts[host] = simAddresses[n]
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
	s.deleted = time.Now()
	s.removed[resolved.Digest] = s.deleted
	s.mu.Unlock()
	if err := s.store.Delete(s.t.Context(), resolved.Digest); err != nil {
		s.failf("deleting: %v", err)
	}
}

// free is what the disk has left. That it is never too little is what a quota is for.
func (s *simulation) free() int64 {
	before := int64(-1)
	for {
		now := int64(0)
		// What goes while this is looking is looked for again.
		_ = filepath.WalkDir(s.dir, func(_ string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() {
				if fi, err := e.Info(); err == nil {
					now += fi.Sys().(*syscall.Stat_t).Blocks * 512
				}
			}
			return nil
		})
		if now != before {
			before = now
			continue
		}
		if left := s.capacity - now; left < simSpare*7/8 {
			s.failf("the store takes %d bytes of %d, and leaves %d", now, s.capacity, left)
		}
		return s.capacity - now
	}
}

// forget holds an eviction against the model: nothing goes that is being read, was just used, or that its publisher has no more.
func (s *simulation) forget(e cache.Eviction) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers["evicted "+e.Kind]++
	if e.Record == nil {
		return
	}
	digest, now := e.Record.Digest, time.Now()
	what := e.Record.Name + ":" + e.Record.Labels[acproxy.LabelVersion]
	s.removed[digest] = now
	s.evicted[digest]++
	if s.reading[digest] > 0 {
		s.failf("%s was evicted while it was read", what)
	}
	if used, ok := s.used[digest]; ok && now.Sub(used) < s.quota.Grace {
		s.failf("%s was evicted %v after it was used, as of %v before, because of %s", what, now.Sub(used), now.Sub(e.Used), e.Reason)
	}
	if gone, ok := s.gone[digest]; ok && s.pub.goneSince(simNumber(e.Record.Name), gone) {
		s.failf("%s was evicted, which its publisher has had no more since %v", what, gone)
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

// ask asks for an image as a node does, which takes its time to begin to read, and holds the answer against the model.
func (s *simulation) ask(n int, version string, slow time.Duration) {
	ref := simRef(s.t, n, version)
	ctx, cancel := context.WithTimeout(s.t.Context(), simFlight+slow)
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
		done := func() {}
		if !im.Arriving() {
			done = s.reads(version, im.Record.Digest, status, began)
		}
		time.Sleep(slow)
		got, err = deliver(ctx, im)
		done()
		_ = im.Close()
	}
	ended := time.Now()
	s.mu.Lock()
	quiet := s.disturbed.Before(began) // no restart meanwhile
	removed := notHeld == nil && !s.removed[held.Digest].Before(began)
	calm := s.disturbed.Before(began.Add(-simCalm)) && s.deleted.Before(began.Add(-simCalm))
	full := s.capacity > 0 && errors.Is(err, acproxy.ErrNoSpace) && !s.alone
	if full {
		s.answers["no space"]++
	} else {
		s.answers[fmt.Sprint(status, " ", err == nil)]++
	}
	s.mu.Unlock()
	if err != nil {
		switch {
		case ctx.Err() != nil && s.t.Context().Err() == nil:
			s.failf("%v was not answered within %v", ref, simFlight+slow)
		case acproxy.KindOf(err) == nil:
			s.failf("%v: an error of no kind: %v", ref, err)
		case full:
			// Others read or receive what would have to go.
		case notHeld == nil && quiet && !removed && !following:
			s.failf("%v was held, and yet: %v", ref, err)
		case calm && s.pub.calm(n, began.Add(-simCalm)):
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
	if version != "" && notHeld == nil && quiet && !removed && status != Hit && status != Gone {
		s.failf("%v was held, and its status is %v", ref, status)
	}
	if version == "" {
		// How far back what is said to be fresh, or stale within bounds, may lie.
		back := map[Status]time.Duration{Hit: simTTL, Revalidated: 0, Miss: 0, Joined: 0, Stale: simTTL + simMaxStale}[status]
		// What there is no room for is as good as what can't be had.
		bounded := status != Gone && (status != Stale || s.capacity == 0 && s.pub.calm(n, began.Add(-simCalm-back)))
		if bounded && !s.pub.wasLatest(n, is, began.Add(-back-simFlight), ended) {
			s.failf("%v gave version %s as %v, which had not been the latest for %v", ref, is, status, back+simFlight)
		}
	}
}

// reads notes that an image is being read, until done is called.
func (s *simulation) reads(version string, digest acproxy.Digest, status Status, began time.Time) (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reading[digest]++
	s.used[digest] = began
	if version == "" && status == Gone {
		s.gone[digest] = began
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reading[digest]--
	}
}

// TestSimulation runs random lives of a proxy against a simple model: what a request is answered with was published for it, is as fresh as it is said to
// be, comes if it is held whatever the publisher does, and comes at all if the publisher is well. In half of the lives the disk is too small for all images:
// then it is never filled, and what is evicted for another image was not needed.
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
		removed: make(map[acproxy.Digest]time.Time), evicted: make(map[acproxy.Digest]int), reading: make(map[acproxy.Digest]int),
		used: make(map[acproxy.Digest]time.Time), gone: make(map[acproxy.Digest]time.Time), answers: make(map[string]int),
	}
	if random.IntN(2) == 0 {
		s.capacity = simSpare + simIndex + simSize*int64(simRoom+random.IntN(simRoom))
		s.quota = cache.Quota{MinFree: 1, High: 100, Low: 100, Grace: -1}
		if random.IntN(2) == 0 {
			s.quota.Grace = simGrace
		}
		if random.IntN(2) == 0 {
			s.quota.High, s.quota.Low = 95, 80
		}
	}
	for n := range simNames {
		s.pub.say(n, 0)
	}
	s.open()
	// Some lives are without disturbance, so that it can be seen that nothing is fetched twice.
	troubled := random.IntN(4) > 0
	names := simNames
	if troubled && random.IntN(3) == 0 {
		// The publisher of the last name goes away early, and what is held of it is not asked for again.
		names--
		s.ask(names, "", 0)
		s.pub.misbehave(names, simGone)
		time.Sleep(simTTL + simMaxStale)
		s.ask(names, "", 0)
	}
	for range 20 + random.IntN(60) {
		time.Sleep(time.Duration(random.ExpFloat64() * float64(15*time.Second)))
		n := random.IntN(names)
		switch act := random.IntN(20); {
		case act < 12:
			version := ""
			if random.IntN(2) == 0 {
				version = fmt.Sprint(1 + random.IntN(simVersions))
			}
			slow := time.Duration(random.IntN(2)*random.IntN(40)) * time.Second
			for range 1 + random.IntN(3)*random.IntN(2) {
				s.asking.Go(func() { s.ask(n, version, slow) })
			}
		case act < 14:
			s.pub.say(n, random.IntN(simVersions))
		case !troubled:
		case act < 17:
			s.pub.misbehave(n, simFault(random.IntN(int(simFaults))))
		case act < 18:
			for n := range names {
				s.pub.misbehave(n, simWell)
			}
		case act < 19:
			s.delete(n, random.IntN(simVersions))
		default:
			s.restart()
		}
	}
	// In the end all is well again, and everybody gets everything.
	for n := range simNames {
		s.pub.misbehave(n, simWell)
	}
	s.asking.Wait()
	time.Sleep(simCalm + time.Minute)
	s.alone = true
	for _, version := range []string{"", "1", "2", "3", "4"} {
		for n := range simNames {
			s.ask(n, version, 0)
			time.Sleep(simGrace + time.Minute)
		}
	}
	s.close()
	s.pub.conns.Wait()
	s.pub.mu.Lock()
	defer s.pub.mu.Unlock()
	if !troubled {
		for n, images := range simMaterial().images {
			for _, im := range images {
				host, _, _ := strings.Cut(simName(n), "/")
				if times, most := s.pub.served[im.version+" "+host], 1+s.evicted[sha256.Sum256(im.aci)]; times > most {
					s.failf("the publisher sent version %s of %s %d times, and it was evicted %d times", im.version, host, times, most-1)
				}
			}
		}
	}
	for answer, n := range s.answers {
		total[answer] += n
	}
}
