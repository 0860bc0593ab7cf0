//go:build linux && amd64

package chaos

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
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

// A world is what the runs of a test share: a publisher, the keys, the configurations, and stores to begin with.
type world struct {
	t         *testing.T
	dir       string
	publisher *publisher.Publisher
	key       *trusttest.Key // trusted for the image host
	live      string         // the configuration with which the publisher is reached
	graceless string         // the same, and images that were used just now may be evicted
	alone     string         // the one with which nobody is
	client    *http.Client
	// cutThrough says that images are passed on before they have been checked whole.
	cutThrough bool

	mu     sync.Mutex
	images map[ref]image
	stores map[string]*store
}

// store is a data directory that runs begin with a copy of.
type store struct {
	data string // "" is an empty one
	held []ref  // what it holds
}

// newWorld starts a publisher. The configurations have a kind of delivery.
func newWorld(t *testing.T, delivery string) *world {
	t.Helper()
	// Not TempDir: a socket's path has to be short.
	dir, err := os.MkdirTemp(roomy(), "acproxy-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, cutThrough: delivery == "cut-through", images: make(map[ref]image), stores: make(map[string]*store)}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	w.key = newKey(t)
	if w.publisher, err = publisher.Start(publisher.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.publisher.Close() })
	w.write("publisher-ca.pem", w.publisher.CAPEM())
	if _, err := trust.Add(trust.Dirs{Local: w.path("keys")}, imageHost, w.key.Armored()); err != nil {
		t.Fatal(err)
	}
	w.live = w.write("live.yaml", []byte(w.config(w.publisher.Addr(), delivery, "1h")))
	w.graceless = w.write("graceless.yaml", []byte(w.config(w.publisher.Addr(), delivery, "0s")))
	w.alone = w.write("alone.yaml", []byte(w.config(nobody(t), delivery, "1h")))
	// No connection is used twice: a server that was killed would be asked by the one it had.
	w.client = &http.Client{Transport: &http.Transport{DialContext: dialLoopback, DisableKeepAlives: true, DisableCompression: true}, Timeout: patience}
	return w
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

func newKey(t *testing.T) *trusttest.Key {
	t.Helper()
	key, err := trusttest.NewKey(trusttest.Options{Algorithm: trusttest.EdDSA})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// nobody returns an address that nobody answers at: it stays bound, and isn't listened at.
func nobody(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", fmt.Sprint(bound.(*syscall.SockaddrInet4).Port))
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

func (w *world) write(name string, content []byte) string {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), content, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
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
publishers: [{prefix: %[1]s, ca_file: %[4]s}]
`, imageHost, address, w.path("keys"), w.path("publisher-ca.pem"), delivery, grace)
}

// publish publishes a signed image of a size.
func (w *world) publish(r ref, size int64) image {
	w.t.Helper()
	return w.publishSpec(r, acitest.Spec{RootfsSize: size})
}

func (w *world) publishSpec(r ref, spec acitest.Spec) image {
	w.t.Helper()
	labels := map[string]string{"version": r.version, "os": "linux", "arch": "amd64"}
	spec.Name, spec.Labels = imageHost+"/"+r.name, labels
	im := image{ref: r, aci: acitest.Must(w.t, spec)}
	sum := sha256.Sum256(im.aci)
	im.sum = hex.EncodeToString(sum[:])
	published, err := w.publisher.AddSigned(publisher.Image{Name: spec.Name, Labels: labels, ACI: im.aci}, w.key)
	if err != nil {
		w.t.Fatal(err)
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
	w    *world
	t    *testing.T
	data string // the data directory

	mu   sync.Mutex
	told []answer // whole answers, in order, but for those with the bad image
}

// newRun begins with a copy of a data directory; "" is an empty one.
func (w *world) newRun(t *testing.T, from string) *run {
	t.Helper()
	data, err := os.MkdirTemp(w.dir, "run-")
	if err != nil {
		t.Fatal(err)
	}
	if from != "" {
		copyDir(t, from, data)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(data); err != nil {
			t.Error(err)
		}
	})
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

// tidy checks that nothing lies about in the store of a server that was stopped when nothing was arriving, and that fsck is content.
func (r *run) tidy() {
	r.t.Helper()
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
	for _, dir := range []string{"partial", "quarantine"} {
		if left := names(dir); len(left) > 0 {
			r.t.Errorf("%s holds %q", dir, left)
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
		if err == nil && (strings.HasPrefix(entry.Name(), ".tmp-") || strings.Contains(entry.Name(), ".broken-")) {
			r.t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	r.audited()
	if hasFsck() {
		if out, err := r.command(r.w.alone, "fsck").CombinedOutput(); err != nil {
			r.t.Errorf("acproxy fsck: %v\n%s", err, out)
		}
	}
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

// hasFsck reports whether the binary can check a store.
var hasFsck = sync.OnceValue(func() bool { return hasCommand("fsck") })

// hasCommand reports whether the binary has a command.
func hasCommand(name string) bool {
	help, err := exec.Command(binary, name, "--help").Output()
	return err == nil && bytes.Contains(help, []byte("acproxy "+name))
}

// A counter counts what was tried.
type counter struct {
	mu            sync.Mutex
	kills, faults int
}

// tally is what this test run has tried.
var tally counter

func (c *counter) killed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kills++
}

func (c *counter) failed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults++
}

func (c *counter) print(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(w, "chaos: acproxy was killed at %d calls, and %d times a call failed\n", c.kills, c.faults)
}
