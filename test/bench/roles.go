package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// roleVariable names the environment variable by which this program is told to play one of the others in a benchmark. What it needs to know for
// that comes as JSON on its standard input.
const roleVariable = "ACPROXY_BENCH_ROLE"

const (
	rolePublisher = "publisher" // publishes the ground's files
	roleFiles     = "files"     // serves a directory, as simply as Go can
	roleCopier    = "copier"    // passes on what it fetches, and keeps it
	roleClients   = "clients"   // asks for things
	roleStore     = "store"     // has a store open, and asks it
)

// play plays a role until that is over, or until it is killed.
func play(role string, stdin io.Reader, stdout, stderr io.Writer) int {
	err := fmt.Errorf("there is no role %q", role)
	switch role {
	case rolePublisher:
		err = playServer(stdin, func(s publisherSpec) (string, http.Handler, error) { return s.Address, newPublisher(s), nil })
	case roleFiles:
		err = playServer(stdin, func(s filesSpec) (string, http.Handler, error) { return s.Address, s.handler(), nil })
	case roleCopier:
		err = playServer(stdin, func(s copierSpec) (string, http.Handler, error) { return s.Address, newCopier(s), nil })
	case roleClients:
		err = playClients(stdin, stdout)
	case roleStore:
		err = playStore(stdin, stdout)
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

// playServer serves until the process is ended.
func playServer[S any](stdin io.Reader, handler func(S) (address string, h http.Handler, err error)) error {
	var spec S
	if err := json.NewDecoder(stdin).Decode(&spec); err != nil {
		return fmt.Errorf("reading what to serve: %w", err)
	}
	address, h, err := handler(spec)
	if err != nil {
		return err
	}
	s := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: time.Minute}
	return s.ListenAndServe()
}

// roleCommand returns the command that plays a role.
func roleCommand(role string, spec any) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stdin = strings.NewReader(string(text))
	return cmd, nil
}

// publisherSpec is what the publisher has to know.
type publisherSpec struct {
	Address string
	Root    string            // the directory of the files
	Rate    int64             // bytes a second of images, 0 for as many as there is room for
	Total   bool              // the rate is for all connections together, not for each
	Blobs   map[string]string // by OCI digest: path of the file below Root
}

// The paths of the publisher that aren't files.
const (
	discoveryFile = "page.html" // what is answered for each name that is discovered
	fetchedPath   = "/-/fetched"
	ociPrefix     = "/v2/"
)

// A publisherServer publishes files, a discovery page and, for a registry that passes images on, the same as OCI blobs.
type publisherServer struct {
	spec   publisherSpec
	shared *pace // of all connections, nil if each has its own

	mu      sync.Mutex
	fetched map[string]int // path of a file → how often it was asked for
}

func newPublisher(spec publisherSpec) *publisherServer {
	p := &publisherServer{spec: spec, fetched: make(map[string]int)}
	if spec.Rate > 0 && spec.Total {
		p.shared = &pace{rate: spec.Rate}
	}
	return p
}

// ServeHTTP is [http.Handler]'s.
func (p *publisherServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Keeping a blob or a manifest for as long as anybody likes is what everything here is for.
	w.Header().Set("Cache-Control", "max-age=3600")
	switch {
	case r.URL.Path == fetchedPath:
		p.mu.Lock()
		defer p.mu.Unlock()
		_ = json.NewEncoder(w).Encode(p.fetched)
	case r.URL.Query().Has("ac-discovery"):
		http.ServeFile(w, r, filepath.Join(p.spec.Root, discoveryFile))
	case r.URL.Path == ociPrefix:
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	case strings.HasPrefix(r.URL.Path, ociPrefix):
		p.oci(w, r)
	default:
		p.file(w, r, r.URL.Path)
	}
}

// oci answers for a manifest or a blob by its digest.
func (p *publisherServer) oci(w http.ResponseWriter, r *http.Request) {
	_, digest, _ := strings.Cut(r.URL.Path, "/sha256:")
	file, ok := p.spec.Blobs[digest]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if strings.Contains(r.URL.Path, "/manifests/") {
		w.Header().Set("Content-Type", ociManifestType)
	}
	w.Header().Set("Docker-Content-Digest", "sha256:"+digest)
	p.file(w, r, file)
}

func (p *publisherServer) file(w http.ResponseWriter, r *http.Request, path string) {
	if r.Method == http.MethodGet {
		p.mu.Lock()
		p.fetched[path]++
		p.mu.Unlock()
	}
	pace := p.shared
	if pace == nil && p.spec.Rate > 0 {
		pace = newPace(p.spec.Rate)
	}
	if pace != nil && strings.HasSuffix(path, ".aci") {
		w = &pacedWriter{w, pace}
	}
	serveFile(w, r, p.spec.Root, path)
}

// serveFile answers with a file, and an ETag as nginx makes it.
func serveFile(w http.ResponseWriter, r *http.Request, root, path string) {
	f, err := os.OpenInRoot(root, strings.TrimPrefix(path, "/"))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("ETag", etagOf(fi))
	if w.Header().Get("Content-Type") == "" && !strings.HasSuffix(path, ".html") {
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	http.ServeContent(w, r, filepath.Base(path), fi.ModTime(), f)
}

func etagOf(fi os.FileInfo) string { return fmt.Sprintf(`"%x-%x"`, fi.ModTime().Unix(), fi.Size()) }

// A pace spreads bytes over time. It is safe for concurrent use.
type pace struct {
	rate int64 // bytes a second

	mu   sync.Mutex
	next time.Time // when the next byte may go
}

// newPace returns a pace that begins now.
func newPace(rate int64) *pace { return &pace{rate: rate, next: time.Now()} }

// catchUp is how much time may be made up for: sleeping takes longer than it was meant to.
const catchUp = 50 * time.Millisecond

// wait returns when n bytes may have gone.
func (p *pace) wait(n int) {
	p.mu.Lock()
	if late := time.Now().Add(-catchUp); p.next.Before(late) {
		p.next = late
	}
	p.next = p.next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	until := p.next
	p.mu.Unlock()
	time.Sleep(time.Until(until))
}

// pacedWriter is a response whose body keeps to a pace. It hides that the connection could copy from a file by itself.
type pacedWriter struct {
	http.ResponseWriter
	pace *pace
}

// Write is the ResponseWriter's.
func (w *pacedWriter) Write(b []byte) (written int, err error) {
	// A hundredth of a second's bytes at a time, within reason.
	piece := int(min(max(w.pace.rate/100, 4<<10), 256<<10))
	for len(b) > 0 && err == nil {
		n := min(piece, len(b))
		w.pace.wait(n)
		n, err = w.ResponseWriter.Write(b[:n])
		written += n
		b = b[n:]
		if err == nil {
			err = http.NewResponseController(w.ResponseWriter).Flush()
		}
	}
	return written, err
}

// filesSpec is what the plain file server has to know.
type filesSpec struct {
	Address, Root string
	Memory        bool // read each file once and answer from memory
}

// memoryLimit is the size of the largest file that is answered from memory.
const memoryLimit = 16 << 20

func (s filesSpec) handler() http.Handler {
	if !s.Memory {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveFile(w, r, s.Root, r.URL.Path) })
	}
	var held sync.Map // path → *heldFile
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, ok := held.Load(r.URL.Path)
		if !ok {
			read, err := s.read(r.URL.Path)
			if err != nil {
				serveFile(w, r, s.Root, r.URL.Path)
				return
			}
			held.Store(r.URL.Path, read)
			f = read
		}
		f.(*heldFile).serve(w, r)
	})
}

// A heldFile is a file in memory.
type heldFile struct {
	data     []byte
	modified time.Time
	etag     string
}

// read returns a file in memory, or an error if it is too large for that.
func (s filesSpec) read(path string) (*heldFile, error) {
	file := filepath.Join(s.Root, filepath.FromSlash(path))
	fi, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if fi.Size() > memoryLimit {
		return nil, fmt.Errorf("%s has %d bytes", path, fi.Size())
	}
	data, err := os.ReadFile(file)
	return &heldFile{data, fi.ModTime(), etagOf(fi)}, err
}

// serve answers with no more than net/http does by itself.
func (f *heldFile) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("ETag", f.etag)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", f.modified, bytes.NewReader(f.data))
}

// copierSpec is what the copying proxy has to know.
type copierSpec struct {
	Address, Upstream, Dir string
}

// A copier is the least that a proxy which keeps images does: it copies from the publisher to the client and to a file, and syncs that. It checks
// nothing, and what two ask for at once it fetches twice.
type copier struct {
	spec   copierSpec
	client *http.Client
}

func newCopier(spec copierSpec) *copier {
	return &copier{spec, &http.Client{Transport: &http.Transport{DisableCompression: true}}}
}

// ServeHTTP is [http.Handler]'s.
func (c *copier) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kept := filepath.Join(c.spec.Dir, strings.ReplaceAll(strings.TrimPrefix(r.URL.Path, "/"), "/", "_"))
	if _, err := os.Stat(kept); err == nil {
		http.ServeFile(w, r, kept)
		return
	}
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, c.spec.Upstream+r.URL.Path, nil)
	if err == nil {
		err = c.copy(w, req, kept)
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}

func (c *copier) copy(w http.ResponseWriter, req *http.Request, kept string) error {
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	file, err := os.CreateTemp(c.spec.Dir, "arriving-")
	if err != nil {
		return err
	}
	w.Header().Set("Content-Length", fmt.Sprint(resp.ContentLength))
	_, err = io.CopyBuffer(io.MultiWriter(file, w), struct{ io.Reader }{resp.Body}, make([]byte, 128<<10))
	if err == nil {
		err = file.Sync()
	}
	err = errors.Join(err, file.Close())
	if err == nil {
		err = os.Rename(file.Name(), kept)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(file.Name()))
	}
	return err
}
