//go:build linux && amd64

package chaos

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/test/tracer"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

const imageHost = "example.com"

// A ref is what a client asks for. Without a version it asks for the latest.
type ref struct{ name, version string }

func (r ref) String() string {
	if r.version == "" {
		return r.name + ":latest"
	}
	return r.name + ":" + r.version
}

// path returns the path of the image's direct URL.
func (r ref) path() string {
	query := "?os=linux&arch=amd64"
	if r.version != "" {
		query += "&version=" + r.version
	}
	return "/.acproxy/images/" + imageHost + "/" + r.name + ".aci" + query
}

// An image is one that the publisher publishes.
type image struct {
	ref   ref
	aci   []byte
	sum   string // SHA-256, in hex
	place string // the pattern of its blob at the publisher
}

// A world is what runs share: a publisher, the keys, the configurations, and stores to begin with.
type world struct {
	dir       string
	publisher *publisher.Publisher
	key       *trusttest.Key // trusted for the image host
	live      string         // the configuration with which the publisher is reached
	graceless string         // the same, and images that were used just now may be evicted
	alone     string         // the one with which nobody is
	client    *http.Client
	// cutThrough says that images are passed on before they have been checked whole.
	cutThrough bool
	nobody     int // the socket that nobody listens at
	// points are the calls of each operation. Operations are looked at one after the other.
	points map[string][]point

	mu     sync.Mutex
	images map[ref]image
	stores map[string]*store
}

// store is a data directory that runs begin with a copy of.
type store struct {
	data string // "" is an empty one
	held []ref  // what it holds
}

// worlds has one world for each kind of delivery, for all tests. TestMain closes them.
var worlds struct {
	mu sync.Mutex
	of map[string]*world
}

// worldOf returns the world with a kind of delivery. It is made when it is asked for first.
func worldOf(t *testing.T, delivery string) *world {
	t.Helper()
	worlds.mu.Lock()
	defer worlds.mu.Unlock()
	if w := worlds.of[delivery]; w != nil {
		return w
	}
	w, err := newWorld(delivery)
	if err != nil {
		t.Fatal(err)
	}
	if worlds.of == nil {
		worlds.of = make(map[string]*world)
	}
	worlds.of[delivery] = w
	w.prepare(t)
	return w
}

// closeWorlds ends what worldOf began.
func closeWorlds() error {
	worlds.mu.Lock()
	defer worlds.mu.Unlock()
	var errs []error
	for _, w := range worlds.of {
		w.publisher.Close()
		errs = append(errs, syscall.Close(w.nobody), os.RemoveAll(w.dir))
	}
	return errors.Join(errs...)
}

// newWorld starts a publisher and writes keys and configurations.
func newWorld(delivery string) (*world, error) {
	// Not in a test's own directory: a socket's path has to be short.
	dir, err := os.MkdirTemp(roomy(), "acproxy-chaos-")
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, cutThrough: delivery == "cut-through", images: make(map[ref]image), stores: make(map[string]*store), points: make(map[string][]point)}
	// No connection is used twice: a server that was killed would be asked by the one it had.
	w.client = &http.Client{Transport: &http.Transport{DialContext: dialLoopback, DisableKeepAlives: true, DisableCompression: true}, Timeout: patience}
	if w.key, err = trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA}); err != nil {
		return nil, err
	}
	if w.publisher, err = publisher.Start(publisher.Options{}); err != nil {
		return nil, err
	}
	socket, alone, err := nobody()
	if err != nil {
		return nil, err
	}
	w.nobody = socket
	if _, err := trust.Add(trust.Dirs{Local: w.path("keys")}, imageHost, w.key.Armored()); err != nil {
		return nil, err
	}
	w.live, w.graceless, w.alone = w.path("live.yaml"), w.path("graceless.yaml"), w.path("alone.yaml")
	for file, content := range map[string]string{
		w.path("publisher-ca.pem"): string(w.publisher.CAPEM()),
		w.live:                     w.config(w.publisher.Addr(), delivery, "1h"),
		w.graceless:                w.config(w.publisher.Addr(), delivery, "0s"),
		w.alone:                    w.config(alone, delivery, "1h"),
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// roomy returns a directory in memory, if there is one with room, else "". What a killed process leaves is the same there as on a disk, and none has
// to be waited for.
func roomy() string {
	const memory, enough = "/dev/shm", 256 << 20
	var fs syscall.Statfs_t
	if err := syscall.Statfs(memory, &fs); err != nil || fs.Bavail*uint64(fs.Bsize) < enough {
		return ""
	}
	return memory
}

// nobody returns an address that nobody answers at: it stays bound, as long as the socket is open, and isn't listened at.
func nobody() (socket int, address string, err error) {
	if socket, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0); err != nil {
		return 0, "", err
	}
	if err := syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, "", err
	}
	bound, err := syscall.Getsockname(socket)
	if err != nil {
		return 0, "", err
	}
	return socket, net.JoinHostPort("127.0.0.1", fmt.Sprint(bound.(*syscall.SockaddrInet4).Port)), nil
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

// config is the configuration with a publisher's address. A ref without a version is asked for each time, so that it moves on when it can.
func (w *world) config(address, delivery, grace string) string {
	return fmt.Sprintf(`
listen: [{address: "127.0.0.1:0", tls: none, proxy: false}]
dial:
  resolver: 127.0.0.1:1
  hosts: {%[1]s: "%[2]s", storage.%[1]s: "%[2]s"}
discovery: {negative_ttl: 0s}
trust: {local_dir: %[3]s}
freshness: {ttl: 0s, max_stale: 0s}
fetch: {retries: 3, retry_wait: 10ms, delivery: %[5]s}
cache: {access_flush: 20ms, max_size: 1GiB, min_free: 0, grace: %[6]s}
audit: {max_size: 1KiB, max_files: 2}
log: {format: json, level: debug}
publishers: [{prefix: %[1]s, ca_file: %[4]s}, {prefix: %[1]s/ours, publisher: local}]
`, imageHost, address, w.path("keys"), w.path("publisher-ca.pem"), delivery, grace)
}

// publish publishes a signed image of a size.
func (w *world) publish(t *testing.T, r ref, size int64) image {
	t.Helper()
	return w.publishSpec(t, r, acitest.Spec{RootfsSize: size})
}

func (w *world) publishSpec(t *testing.T, r ref, spec acitest.Spec) image {
	t.Helper()
	labels := map[string]string{"version": r.version, "os": "linux", "arch": "amd64"}
	spec.Name, spec.Labels = imageHost+"/"+r.name, labels
	im := image{ref: r, aci: acitest.Must(t, spec)}
	sum := sha256.Sum256(im.aci)
	im.sum = hex.EncodeToString(sum[:])
	published, err := w.publisher.AddSigned(publisher.Image{Name: spec.Name, Labels: labels, ACI: im.aci}, w.key)
	if err != nil {
		t.Fatal(err)
	}
	im.place = strings.TrimPrefix(published.URL, "https://")
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[r] = im
	return im
}

// candidates returns the images that a ref may be answered with at any time.
func (w *world) candidates(r ref) []image {
	w.mu.Lock()
	defer w.mu.Unlock()
	var fits []image
	for have, im := range w.images {
		if have.name == r.name && (r.version == "" || r.version == have.version) {
			fits = append(fits, im)
		}
	}
	return fits
}

// An answer is what a client was given.
type answer struct {
	ref    ref
	status int
	header http.Header
	body   []byte
	err    error // reaching the server or reading the body; a body cut short is one
}

func (a answer) whole() bool { return a.err == nil && a.status == http.StatusOK }

func (a answer) String() string {
	s := fmt.Sprintf("%v: %d, %d bytes", a.ref, a.status, len(a.body))
	if a.err != nil {
		s += ", " + a.err.Error()
	}
	if a.status >= 400 {
		s += "\n" + string(a.body)
	}
	return s
}

func (a answer) sum() string {
	sum := sha256.Sum256(a.body)
	return hex.EncodeToString(sum[:])
}

// problem returns the end of the type of an error, and whether it is a proper one.
func (a answer) problem() (code string, ok bool) {
	var p struct {
		Type, Title, Detail string
		Status              int
	}
	if a.header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(a.body, &p) != nil || p.Status != a.status || p.Title == "" {
		return "", false
	}
	_, code, _ = strings.Cut(p.Type, "urn:acproxy:problem:")
	return code, p.Detail != ""
}

// A run is one store, and what happened to it.
type run struct {
	unreadable bool // something could not be read, or might not, for a while
	disk       bool // and it was for the disk, so that all of it that was set aside had to be
	w          *world
	t          *testing.T
	data       string // the data directory

	mu   sync.Mutex
	told []answer // whole answers, in order, but for those with the bad image

	brought error // how the command ended that a bringing is
}

// newRun begins with a copy of a data directory; "" is an empty one. It is removed when the test ends.
func (w *world) newRun(t *testing.T, from string) *run {
	t.Helper()
	r := w.keptRun(t, from)
	t.Cleanup(func() {
		if err := os.RemoveAll(r.data); err != nil {
			t.Error(err)
		}
	})
	return r
}

// keptRun is newRun; what it leaves is kept as long as the world.
func (w *world) keptRun(t *testing.T, from string) *run {
	t.Helper()
	data, err := os.MkdirTemp(w.dir, "run-")
	if err != nil {
		t.Fatal(err)
	}
	if from != "" {
		copyDir(t, from, data)
	}
	return &run{w: w, t: t, data: data}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case entry.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o750)
		case !entry.Type().IsRegular():
			return nil // a socket
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o640)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// command returns a command of the binary on the run's data. Nothing of this process's environment that concerns connections reaches it.
func (r *run) command(config string, args ...string) *exec.Cmd {
	cmd := exec.Command(binary, append(args, "--config", config, "--data-dir", r.data)...)
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "SSL_CERT_FILE=/dev/null", "SSL_CERT_DIR=/dev/null")
	return cmd
}

// trace starts a server under the tracer. With a fault, its calls count from the first on.
func (r *run) trace(config string, fault *tracer.Fault) *process {
	r.t.Helper()
	return launch(r.t, r.command(config, "serve"), true, r.data, fault)
}

// serve starts a server, and waits until it serves.
func (r *run) serve(config string) *process {
	r.t.Helper()
	p := launch(r.t, r.command(config, "serve"), false, "", nil)
	p.serves()
	return p
}

// get asks a server for an image. What it gives may be cut, but never wrong.
func (r *run) get(p *process, of ref) answer {
	r.t.Helper()
	a := answer{ref: of}
	resp, err := r.w.client.Get(p.url() + of.path())
	if err != nil {
		a.err = err
		return a
	}
	defer resp.Body.Close()
	a.status, a.header = resp.StatusCode, resp.Header
	a.body, a.err = io.ReadAll(resp.Body)
	if a.status != http.StatusOK {
		return a
	}
	right := slices.ContainsFunc(r.w.candidates(of), func(im image) bool {
		return bytes.HasPrefix(im.aci, a.body) && (a.err != nil || len(im.aci) == len(a.body))
	})
	if !right {
		r.t.Errorf("something wrong was served: %v", a)
	}
	if a.whole() && of != bad {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.told = append(r.told, a)
	}
	return a
}

// inspected waits until a server has said how the inspection of an image ended, or is over.
func (r *run) inspected(p *process, of ref) {
	r.t.Helper()
	r.eventually("the image "+of.String()+" is inspected", func() bool {
		resp, err := r.w.client.Head(p.url() + of.path())
		if err != nil {
			select {
			case <-p.exited:
				return true
			default:
				return false
			}
		}
		resp.Body.Close()
		return resp.Header.Get("X-Appc-Image-Id") != "" || of == bad && resp.StatusCode == http.StatusForbidden
	})
}

// eventually waits for something that nothing tells of.
func (r *run) eventually(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("it doesn't come about: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// wantHeld checks that a server gives what is held, byte for byte, as a hit. A ref without a version has to be answered with what it was answered with
// last, if it was.
func (r *run) wantHeld(p *process, held []ref) {
	r.t.Helper()
	last := make(map[ref]string)
	r.mu.Lock()
	for _, a := range r.told {
		last[a.ref] = a.sum()
	}
	r.mu.Unlock()
	for of := range last {
		if !slices.Contains(held, of) {
			held = append(held, of)
		}
	}
	for _, of := range held {
		a := r.get(p, of)
		if !a.whole() || !strings.HasPrefix(a.header.Get("Cache-Status"), "acproxy; hit") {
			r.t.Errorf("%v was held or served before, and now: %v (%s)\n%s", of, a, a.header.Get("Cache-Status"), p.output())
			continue
		}
		if want := last[of]; want != "" && a.sum() != want {
			r.t.Errorf("%v: other bytes than those that were served before", of)
		}
	}
}

// tidy stops a server for which nothing is arriving, once it has compared its files with its index, and checks that nothing lies about in its store, and that a
// check of the store finds no problem. An image that was damaged has left something in the quarantine directory.
func (r *run) tidy(p *process, damaged ...ref) {
	r.t.Helper()
	if !p.says("the index is complete") {
		r.t.Errorf("it ended before its index was complete:\n%s", p.output())
	}
	p.stop()
	names := func(elem ...string) []string {
		entries, err := os.ReadDir(filepath.Join(append([]string{r.data, "store"}, elem...)...))
		if err != nil {
			r.t.Error(err)
		}
		var out []string
		for _, e := range entries {
			out = append(out, e.Name())
		}
		return out
	}
	if left := names("partial"); len(left) > 0 {
		r.t.Errorf("partial holds %q", left)
	}
	for _, name := range names("quarantine") {
		if r.disk || r.unreadable && strings.Contains(name, ".json-") {
			continue // without its index nobody knows whether a sidecar without a blob was on its way in, or has lost it
		}
		if !slices.ContainsFunc(damaged, func(of ref) bool { return strings.Contains(name, r.w.images[of].sum) }) {
			r.t.Errorf("quarantine holds %s", name)
		}
	}
	for _, shard := range names("blobs") {
		files := names("blobs", shard)
		for _, name := range files {
			blob, isSidecar := strings.CutSuffix(name, ".json")
			if other := blob + ".json"; !isSidecar && !slices.Contains(files, other) || isSidecar && !slices.Contains(files, blob) {
				r.t.Errorf("blobs/%s has %s without the other", shard, name)
			}
		}
	}
	err := filepath.WalkDir(r.data, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && (strings.HasPrefix(entry.Name(), ".tmp-") || strings.Contains(entry.Name(), ".broken-") && !r.unreadable) {
			r.t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	r.audited()
	r.sound("stopped", operation{})
}

// sound checks that a check of the store, which no server has open, finds nothing wrong with it, but for what an operation begins with. What a kill leaves,
// and the next start mends, is worth a note and no problem.
func (r *run) sound(when string, op operation) {
	r.t.Helper()
	checked, err := r.check()
	var none *acproxy.Error
	if errors.As(err, &none) && none.Code == "no-store" && op.store == "empty" {
		return // it was killed before there was one
	}
	if err != nil {
		r.t.Errorf("%s: checking the store: %v", when, err)
	}
	for _, f := range checked {
		about := func(of ref) bool { return strings.Contains(f.Path, r.w.images[of].sum) }
		if !f.Note && f.Code != op.lacks && !slices.ContainsFunc(op.damaged, about) {
			r.t.Errorf("%s: fsck finds %s in %s: %s", when, f.Code, f.Path, f.Detail)
		}
	}
}

// check checks the store and returns what it finds: by the command if there is time for everything, else within this process.
func (r *run) check() (found []cache.Finding, err error) {
	if !everything() {
		inspect := func(b io.Reader) (acproxy.ImageID, error) {
			found, err := aci.Inspect(b, aci.Limits{}, nil)
			return found.ID, err
		}
		opts := cache.Options{Log: slog.New(slog.DiscardHandler), Inspect: inspect}
		_, err := cache.Check(r.t.Context(), filepath.Join(r.data, "store"), opts, cache.CheckOptions{Found: func(f cache.Finding) { found = append(found, f) }})
		return found, err
	}
	cmd := r.command(r.w.alone, "fsck", "--json")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, failed := cmd.Output()
	if strings.Contains(stderr.String(), "holds no store") || strings.Contains(stderr.String(), "there is no directory") {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-store", Detail: stderr.String()}
	}
	problems := 0
	lines := json.NewDecoder(bytes.NewReader(out))
	for lines.More() {
		var line struct{ Finding *cache.Finding }
		if err := lines.Decode(&line); err != nil {
			return nil, fmt.Errorf("reading what acproxy fsck says: %w\n%s", err, out)
		}
		if line.Finding == nil {
			continue // the sum
		}
		found = append(found, *line.Finding)
		if !line.Finding.Note {
			problems++
		}
	}
	if (failed != nil) != (problems > 0) {
		return found, fmt.Errorf("acproxy fsck found %d problems and ended with %v: %s", problems, failed, stderr.String())
	}
	return found, nil
}

// audited checks that every line of the audit can be read.
func (r *run) audited() {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(r.data, "audit.log*"))
	if err != nil {
		r.t.Error(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			r.t.Error(err)
		}
		for line := range bytes.Lines(b) {
			if !json.Valid(line) {
				r.t.Errorf("%s has the line %.200q", file, line)
			}
		}
	}
}

// A counter counts what was tried, by operation.
type counter struct {
	mu   sync.Mutex
	rows []*countRow
}

// countRow is what was tried of one operation.
type countRow struct {
	operation             string
	calls, kills, failing int
}

// tally is what this test run has tried.
var tally counter

// row returns the row of an operation. The caller holds mu.
func (c *counter) row(operation string) *countRow {
	for _, r := range c.rows {
		if r.operation == operation {
			return r
		}
	}
	r := &countRow{operation: operation}
	c.rows = append(c.rows, r)
	return r
}

// calls notes how many calls an operation makes.
func (c *counter) calls(operation string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.row(operation).calls = n
}

func (c *counter) killed(operation string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.row(operation).kills++
}

func (c *counter) failed(operation string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.row(operation).failing++
}

func (c *counter) print(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sum := countRow{operation: "all"}
	for _, r := range c.rows {
		sum.calls, sum.kills, sum.failing = sum.calls+r.calls, sum.kills+r.kills, sum.failing+r.failing
	}
	for _, r := range append(c.rows, &sum) {
		fmt.Fprintf(w, "chaos: %-42s %5d crash points  killed %5d times  a call failed %5d times\n", r.operation, r.calls, r.kills, r.failing)
	}
}
