// Package oci answers for appc images as OCI images, so that containerd, CRI-O and podman can pull what rkt nodes fetch.
package oci

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/appc/spec/schema"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/memo"
)

// Config is what a Bridge works with. Its fields may not change after New.
type Config struct {
	Fetcher *fetch.Fetcher
	Store   cache.Store
	// Dir is the directory in which is written down what was made, a few kilobytes for each image. "" forgets it at the end.
	Dir       string
	Platforms []Platform    // what images are looked for under a tag; none means DefaultPlatform
	Wait      time.Duration // for how long a client is kept waiting for an image to arrive and to be converted; 0 means DefaultWait
	Parallel  int           // images that are converted at once; 0 means half as many as there are processors
	Limits    aci.Limits
	// Spool begins a file for a layer of so many bytes, -1 if that isn't known, as [cache.Disk.Spool] does. nil keeps none: each is written anew for everybody
	// who asks for it.
	Spool func(what string, size int64) (*cache.Spool, error)
	Keep  time.Duration // for how long a layer is kept after it was asked for last; 0 means DefaultKeep
	// Suspect is told of an image whose bytes aren't what they were; it looks at them and repairs what it can, as [cache.Disk.ScrubImage] does. nil means nobody is
	// told.
	Suspect func(ctx context.Context, digest acproxy.Digest) error
	// Converted is told of every layer that was made: how many bytes it has, and how long that took. nil means nobody is told.
	Converted func(bytes int64, took time.Duration, err error)

	FS  durable.FS       // nil means the operating system's
	Log *slog.Logger     // nil means slog.Default
	Now func() time.Time // nil means time.Now
}

// Defaults of a [Config].
const (
	DefaultWait = 5 * time.Minute
	DefaultKeep = time.Hour
)

// DefaultPlatform is what images are looked for.
func DefaultPlatform() Platform { return Platform{"linux", "amd64"} }

// A Bridge makes OCI images of appc images: of each image that one is rendered from (appc specification, "Dependency Matching") a layer. What it answers is a
// function of the bytes that were signed, so that the digests that nodes know stay true, here and in another acproxy. It is safe for concurrent use.
//
// To know the digest of a layer all of the image has to be read; that is done once, for everybody who waits for it, and remembered for ever. The layer itself is
// kept for a while, for the other nodes of a rollout, as far as there is space that nothing else has a use for. Where it isn't, it is written anew out of the
// image for everybody who asks for it.
type Bridge struct {
	cfg Config
	log *slog.Logger
	now func() time.Time

	turns   chan struct{} // one for each layer that is being made
	streams chan struct{} // one for each that is made while it is sent

	docs      *memo.Memo[string, *made]             // by key
	failures  *memo.Memo[string, error]             // by layerKey, of those that never will be made
	manifests *memo.Memo[acproxy.Digest, *rendered] // by the digest of the image

	loaded chan struct{} // closed once it is known what was made before

	mu       sync.Mutex
	makings  map[string]*making // by the key of a layer or of an image
	queued   int                // makings that wait for their turn
	suspects map[acproxy.Digest]bool
	made     map[string]bool // by key
	byDigest map[acproxy.Digest][]place
	layers   map[string]descriptor // by layerKey
	unkept   map[string]*made      // by key, what could not be written down
	spools   map[acproxy.Digest]*cache.Spool

	// ctx is the life of what is being made, which doesn't end with who asked for it. Close cancels it and waits for work.
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// New returns a Bridge. Close ends what it has in progress.
func New(cfg Config) (*Bridge, error) {
	b := &Bridge{cfg: cfg, log: cfg.Log, now: cfg.Now, loaded: make(chan struct{}), makings: make(map[string]*making), suspects: make(map[acproxy.Digest]bool), made: make(map[string]bool), byDigest: make(map[acproxy.Digest][]place), layers: make(map[string]descriptor), unkept: make(map[string]*made), spools: make(map[acproxy.Digest]*cache.Spool)}
	if b.log == nil {
		b.log = slog.Default()
	}
	if b.now == nil {
		b.now = time.Now
	}
	if b.cfg.FS == nil {
		b.cfg.FS = durable.OS{}
	}
	if len(cfg.Platforms) == 0 {
		b.cfg.Platforms = []Platform{DefaultPlatform()}
	}
	if cfg.Wait == 0 {
		b.cfg.Wait = DefaultWait
	}
	if cfg.Keep == 0 {
		b.cfg.Keep = DefaultKeep
	}
	if cfg.Parallel == 0 {
		b.cfg.Parallel = max(1, runtime.GOMAXPROCS(0)/2)
	}
	b.turns, b.streams = make(chan struct{}, b.cfg.Parallel), make(chan struct{}, streamsPerTurn*b.cfg.Parallel)
	b.docs, b.manifests = memo.New[string, *made](maxDocs), memo.New[acproxy.Digest, *rendered](maxManifests)
	b.failures = memo.New[string, error](maxDocs)
	var files []fs.DirEntry
	if cfg.Dir != "" {
		var err error
		if files, err = os.ReadDir(cfg.Dir); errors.Is(err, fs.ErrNotExist) {
			err = b.cfg.FS.MkdirAll(cfg.Dir, dirPerm)
		}
		if err != nil {
			// What can't be written down is remembered as long as the process lives.
			b.log.Warn("what OCI images are made can't be written down", "dir", cfg.Dir, "err", err)
		}
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	// It ends when the files are read, or ctx is done; Close waits for it.
	b.work.Go(func() { b.load(files) })
	// So does this.
	b.work.Go(b.sweep)
	return b, nil
}

// How much is remembered to be had at once: documents of up to maxDoc bytes, and manifests of up to a megabyte.
const (
	maxDocs      = 1024
	maxDoc       = 64 << 10
	maxManifests = 64
)

// streamsPerTurn is how many layers may be made while they are sent for each that may be made to be kept: those wait for clients, too.
const streamsPerTurn = 8

// Close ends what is being made, and waits for it.
func (b *Bridge) Close() error {
	b.mu.Lock()
	b.cancel()
	b.mu.Unlock()
	b.work.Wait()
	b.mu.Lock()
	left := slices.Collect(maps.Values(b.spools))
	clear(b.spools)
	b.mu.Unlock()
	var errs []error
	for _, s := range left {
		errs = append(errs, s.Discard())
	}
	return errors.Join(errs...)
}

// A Query is what a client asks for.
type Query struct {
	Name   string // of the appc image
	Client string // who asks, for the fetching
	// May returns an error if the client may not have the images of a name: of the one that it asks for, and of those that this one needs.
	May func(name string) error
}

// A Content is an answer: a document or a layer.
type Content struct {
	MediaType string
	Digest    acproxy.Digest
	Size      int64        // bytes
	Status    fetch.Status // how the image came to be here
	Latest    bool         // the answer to a tag that stands for another image sooner or later
	Partial   bool         // an index from which a platform is missing that could not be asked for now

	document []byte
	b        *Bridge
	pieces   []piece
	layer    int // of the pieces, if there is no document
	file     *cache.Blob
	streams  bool // it has one of the turns to be made while it is sent
}

// Open has the file of a layer be there, if it can be, making it again if it isn't kept any more; else it waits for the turn to make the layer while it is sent. The
// caller closes the content.
func (c *Content) Open(ctx context.Context) (err error) {
	if c.document != nil {
		return nil
	}
	ctx, cancel := c.b.patient(ctx, c.pieces[c.layer].Name)
	defer cancel()
	if c.file, err = c.b.open(ctx, c.pieces, c.layer); err != nil || c.file != nil {
		return err
	}
	select {
	case c.b.streams <- struct{}{}:
		c.streams = true
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// File returns the file that Open has opened, nil if there is none: then Send makes what it writes.
func (c *Content) File() *os.File {
	if c.file == nil {
		return nil
	}
	return c.file.File
}

// Close closes what Open has opened.
func (c *Content) Close() error {
	if c.streams {
		c.streams = false
		<-c.b.streams
	}
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}

// Send writes the content. If a layer turns out not to be what its digest says, because the disk has lost bytes of the image, that is an error, and the end of
// it is not written.
func (c *Content) Send(ctx context.Context, w io.Writer) (int64, error) {
	if c.document != nil {
		n, err := w.Write(c.document)
		return int64(n), err
	}
	counted := &counter{w: w}
	last := &heldBack{w: counted, hash: sha256.New()}
	err := c.b.writeLayer(ctx, last, c.pieces, c.layer)
	if err == nil {
		err = last.end(c.Digest)
	}
	return counted.n, err
}

// heldBack writes what is written to it, but for what came last, until it is known what all of it is.
type heldBack struct {
	w    io.Writer
	hash hash.Hash
	last []byte
}

// Write writes what was written before.
func (h *heldBack) Write(p []byte) (int, error) {
	if _, err := h.w.Write(h.last); err != nil {
		return 0, err
	}
	h.hash.Write(p)
	h.last = append(h.last[:0], p...)
	return len(p), nil
}

// end writes the rest, if all of it is what it should be.
func (h *heldBack) end(want acproxy.Digest) error {
	if got := acproxy.Digest(h.hash.Sum(nil)); got != want {
		return fmt.Errorf("the layer %v came out as %v: its image has been damaged", want, got)
	}
	_, err := h.w.Write(h.last)
	return err
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

// Write is the writer's.
func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Manifest returns the manifest that a tag or a digest stands for. accepts says which media types the client reads: one that reads no index is given the
// manifest for the first platform that there is an image for. Errors match the sentinels of package acproxy.
func (b *Bridge) Manifest(ctx context.Context, q Query, reference string, accepts func(mediaType string) bool) (*Content, error) {
	if digest, err := acproxy.ParseDigest(reference); err == nil {
		return b.known(ctx, q, digest, func(m *made) (*Content, error) {
			if d := m.descriptor(); d.Digest == digest {
				return &Content{MediaType: m.mediaType(), Digest: digest, Size: d.Size, document: m.Manifest}, nil
			}
			return nil, nil
		})
	}
	if strings.Contains(reference, ":") {
		return nil, acproxy.Invalid("%.128q is neither a tag nor a digest that begins with sha256", reference)
	}
	if err := q.May(q.Name); err != nil {
		return nil, err
	}
	return b.tagged(ctx, q, reference, accepts)
}

// Blob returns a configuration or a layer of an image of a name.
func (b *Bridge) Blob(ctx context.Context, q Query, digest acproxy.Digest) (*Content, error) {
	return b.known(ctx, q, digest, func(m *made) (*Content, error) {
		if m.Config != nil {
			if d := describe(m.Config); d.Digest == digest {
				return &Content{MediaType: MediaTypeConfig, Digest: digest, Size: d.Size, document: m.Config}, nil
			}
		}
		for i, p := range m.Pieces {
			if p.Layer.Digest == digest {
				return &Content{MediaType: MediaTypeLayer, Digest: digest, Size: p.Layer.Size, b: b, pieces: m.Pieces, layer: i}, nil
			}
		}
		return nil, nil
	})
}

// known answers with something that was made before, out of the images of a name.
func (b *Bridge) known(ctx context.Context, q Query, digest acproxy.Digest, pick func(*made) (*Content, error)) (*Content, error) {
	if err := q.May(q.Name); err != nil {
		return nil, err
	}
	ctx, cancel := b.patient(ctx, q.Name)
	defer cancel()
	keys := b.keys(digest, q.Name)
	if len(keys) == 0 {
		select {
		case <-b.loaded:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		keys = b.keys(digest, q.Name)
	}
	// Several versions of an image may have it in them: rather one of which all is here, so that nobody is asked.
	var last error
	for _, fetching := range []bool{false, true} {
		for _, key := range keys {
			m, err := b.get(key)
			if err != nil {
				continue
			}
			c, err := pick(m)
			if c == nil && err == nil {
				continue
			}
			if err == nil {
				err = b.servable(ctx, q, m, fetching)
			}
			if err == nil {
				return c, nil
			}
			last = err
		}
	}
	if last != nil {
		return nil, last
	}
	return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-digest", Detail: fmt.Sprintf("no image of %s that was asked for by a tag has %v in it", q.Name, digest)}
}

// place is where something is that has a digest: in an image of a name, under a key.
type place struct{ name, key string }

// keys returns the keys of what was made of images of a name and has something of a digest in it.
func (b *Bridge) keys(digest acproxy.Digest, name string) (keys []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, at := range b.byDigest[digest] {
		if at.name == name {
			keys = append(keys, at.key)
		}
	}
	return keys
}

// patient returns a context that ends when a client has been kept waiting for long enough.
func (b *Bridge) patient(ctx context.Context, name string) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, b.cfg.Wait, &acproxy.Error{
		Kind: acproxy.ErrBusy, Code: "converting", RetryAfter: 10 * time.Second,
		Detail: fmt.Sprintf("what was asked for of %s is still being fetched or converted after %v: ask again, it goes on", name, b.cfg.Wait),
	})
}

// get returns what was made under a key, or an error matching [fs.ErrNotExist].
func (b *Bridge) get(key string) (*made, error) {
	if m, ok := b.docs.Get(key); ok {
		return m, nil
	}
	b.mu.Lock()
	m := b.unkept[key]
	b.mu.Unlock()
	if m != nil {
		return m, nil
	}
	m, err := b.read(key)
	if err == nil {
		b.remember(m)
	}
	return m, err
}

// remember has a document be had at once, unless it is long.
func (b *Bridge) remember(m *made) {
	if len(m.Config)+len(m.Manifest) <= maxDoc {
		b.docs.Put(m.Key, m)
	}
}

// servable returns why something may not be served: every image that it was made of has to be held, by names, keys and policies as they are now, and the client has
// to have a right to it. What is gone is fetched again if that is asked for. Of an index one image has to be servable.
func (b *Bridge) servable(ctx context.Context, q Query, m *made, fetching bool) (err error) {
	for _, child := range m.Children {
		for _, key := range b.keys(child, m.Name) {
			of, getErr := b.get(key)
			if getErr != nil || of.Children != nil {
				continue
			}
			if err = b.servable(ctx, q, of, fetching); err == nil {
				return nil
			}
		}
	}
	if m.Children != nil {
		if err == nil {
			err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-digest", Detail: "nothing is known any more of what the index is of"}
		}
		return err
	}
	for i, p := range m.Pieces {
		if slices.ContainsFunc(m.Pieces[:i], func(before piece) bool { return before.Digest == p.Digest }) {
			continue
		}
		if err := q.May(p.Name); err != nil {
			return err
		}
		if err := b.ensure(ctx, q, p, fetching); err != nil {
			return fmt.Errorf("of what %s is made of, %s: %w", m.Name, p.what(), err)
		}
		b.cfg.Store.Touch(p.Digest)
	}
	return nil
}

// ensure has a piece be held and accepted, fetching it if that is asked for, or returns why it isn't.
func (b *Bridge) ensure(ctx context.Context, q Query, p piece, fetching bool) error {
	rec, err := b.cfg.Store.Record(p.Digest)
	if err == nil {
		err = b.cfg.Fetcher.Acceptable(rec)
	}
	if err == nil || !fetching {
		return err
	}
	ref, err := p.ref()
	if err != nil {
		return err
	}
	im, err := b.cfg.Fetcher.Image(ctx, fetch.Request{Ref: ref, Client: q.Client})
	if err != nil {
		return err
	}
	defer im.Close()
	if err := im.Inspected(ctx); err != nil {
		return err
	}
	if im.Record.Digest != p.Digest {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "another-image", Detail: fmt.Sprintf("it was made of the bytes %v, which are not held any more; its publisher has %v now", p.Digest, im.Record.Digest)}
	}
	return nil
}

// tagged returns the manifest that a tag stands for.
func (b *Bridge) tagged(ctx context.Context, q Query, tag string, accepts func(string) bool) (*Content, error) {
	ctx, cancel := b.patient(ctx, q.Name)
	defer cancel()
	var all []*made
	var status fetch.Status
	var missing, failed error
	for i, platform := range b.cfg.Platforms {
		m, s, err := b.forPlatform(ctx, q, tag, platform)
		switch {
		case err == nil:
			all = append(all, m)
			if i == 0 || s != fetch.Hit {
				status = s
			}
		case absent(err):
			if missing == nil {
				missing = err
			}
		case errors.Is(err, acproxy.ErrPublisher), errors.Is(err, acproxy.ErrTimeout):
			// What is here, or elsewhere, for the others can be had all the same.
			failed = err
		default:
			return nil, err
		}
		if err == nil && !accepts(MediaTypeIndex) {
			break
		}
	}
	switch {
	case len(all) == 0 && failed != nil:
		return nil, failed
	case len(all) == 0:
		return nil, missing
	case len(b.cfg.Platforms) > 1 && accepts(MediaTypeIndex):
		m, err := b.indexOf(q.Name, all)
		if err != nil {
			return nil, err
		}
		all[0] = m
	}
	if !accepts(all[0].mediaType()) {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "not-acceptable", Detail: fmt.Sprintf("it can be had as %s, and the request's Accept doesn't take that", all[0].mediaType())}
	}
	d := all[0].descriptor()
	return &Content{MediaType: all[0].mediaType(), Digest: d.Digest, Size: d.Size, Status: status, Latest: tag == latest, Partial: failed != nil, document: all[0].Manifest}, nil
}

// indexOf returns the index of what an image is on several platforms.
func (b *Bridge) indexOf(name string, all []*made) (*made, error) {
	children := make([]acproxy.Digest, len(all))
	for i, m := range all {
		children[i] = m.descriptor().Digest
	}
	key := keyOfIndex(name, children)
	if m, err := b.get(key); err == nil {
		return m, nil
	}
	raw, err := indexOf(all)
	if err != nil {
		return nil, err
	}
	m := &made{Key: key, Name: name, Children: children, Manifest: raw}
	b.keep(m)
	return m, nil
}

// forPlatform returns what a tag stands for on a platform.
func (b *Bridge) forPlatform(ctx context.Context, q Query, tag string, platform Platform) (*made, fetch.Status, error) {
	versions, err := b.versions(q.Name, tag)
	if err != nil {
		return nil, 0, err
	}
	var first error
	for _, version := range versions {
		m, status, err := b.ofVersion(ctx, q, version, platform)
		if err == nil || !absent(err) {
			return m, status, err
		}
		if first == nil {
			first = err
		}
	}
	return nil, 0, first
}

// ofVersion returns what is made of a version of an image, and of those that it needs, for a platform.
func (b *Bridge) ofVersion(ctx context.Context, q Query, version string, platform Platform) (*made, fetch.Status, error) {
	refs, err := b.refs(ctx, q.Name, map[string]string{acproxy.LabelVersion: version}, platform)
	if err != nil {
		return nil, 0, err
	}
	pieces, status, err := b.gather(ctx, q, refs, platform)
	if err != nil {
		return nil, 0, err
	}
	own := pieces[len(pieces)-1]
	is, err := platformOf(own.Labels, platform)
	if err != nil {
		return nil, 0, err
	}
	key := keyOf(pieces, is)
	if m, err := b.get(key); err == nil {
		return m, status, nil
	}
	m, err := b.once(ctx, key, func(m *making) (any, error) { return b.make(m, key, pieces, is) })
	if absent(err) && acproxy.Code(err) != codeUnconvertible {
		// It was evicted before its turn came.
		err = &acproxy.Error{Kind: acproxy.ErrBusy, Code: codeConverting, RetryAfter: time.Second, Detail: "what it is made of has gone in the meantime: ask again", Err: err}
	}
	if err != nil {
		return nil, 0, fmt.Errorf("making an OCI image of %s: %w", own.what(), err)
	}
	return m.(*made), status, nil
}

// make makes an OCI image of pieces whose layers aren't known yet.
func (b *Bridge) make(m *making, key string, pieces []piece, platform imagespec.Platform) (*made, error) {
	started := b.now()
	pieces = slices.Clone(pieces)
	for i := range pieces {
		var err error
		if pieces[i].Layer, err = b.layer(m.ctx, pieces, i); err != nil {
			return nil, fmt.Errorf("%s: %w", pieces[i].what(), err)
		}
	}
	own := pieces[len(pieces)-1]
	r, err := b.rendered(own.Digest)
	if err != nil {
		return nil, err
	}
	config, err := configOf(r.manifest, pieces, platform)
	if err != nil {
		return nil, err
	}
	manifest, err := manifestOf(r.manifest, pieces, describe(config))
	if err != nil {
		return nil, err
	}
	out := &made{Key: key, Name: own.Name, Platform: platform, Pieces: pieces, Config: config, Manifest: manifest}
	b.keep(out)
	b.log.Info("an OCI image was made", "image", own.what(), "platform", platform.OS+"/"+platform.Architecture, "digest", out.descriptor().Digest, "layers", len(pieces), "took", b.now().Sub(started).Round(time.Millisecond))
	return out, nil
}

// layer returns what the layer of a piece is called, and how long it is.
func (b *Bridge) layer(ctx context.Context, pieces []piece, i int) (descriptor, error) {
	key := layerKey(pieces, i)
	b.mu.Lock()
	d, ok := b.layers[key]
	b.mu.Unlock()
	if ok {
		return d, nil
	}
	if err, ok := b.failures.Get(key); ok {
		return d, err
	}
	v, err := b.once(ctx, key, func(m *making) (any, error) {
		d, err := b.convert(m, pieces, i, -1)
		if err == nil {
			b.mu.Lock()
			b.layers[key] = d
			b.mu.Unlock()
		} else if acproxy.Code(err) == codeUnconvertible {
			b.failures.Put(key, err)
		}
		return d, err
	})
	if err != nil {
		return descriptor{}, err
	}
	return v.(descriptor), nil
}

// convert makes the layer of a piece when its turn comes, finds out what it is called, and keeps it if there is space for it. With a size, which it has to have, it
// isn't made if it can't be kept.
func (b *Bridge) convert(m *making, pieces []piece, i int, size int64) (descriptor, error) {
	giveBack, err := b.turn(m)
	if err != nil {
		return descriptor{}, err
	}
	defer giveBack()
	keep := b.spool(pieces[i], size)
	if size >= 0 && keep.spool == nil {
		return descriptor{}, errNotKept
	}
	started := b.now()
	hash := sha256.New()
	counted := &counter{w: io.MultiWriter(hash, keep)}
	// Not that of the making: this goes on.
	err = b.writeLayer(b.ctx, counted, pieces, i)
	if b.cfg.Converted != nil {
		b.cfg.Converted(counted.n, b.now().Sub(started), err)
	}
	d := descriptor{acproxy.Digest(hash.Sum(nil)), counted.n}
	if err != nil {
		keep.drop(nil)
		return d, err
	}
	b.kept(d.Digest, keep)
	return d, nil
}

// errNotKept says that there is no space for a layer.
var errNotKept = errors.New("there is no space for it")

// untilDone is a reader that fails once ctx is done.
type untilDone struct {
	io.Reader
	ctx context.Context
}

// Read is the reader's, unless ctx is done.
func (r *untilDone) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// writeLayer writes the layer of a piece. It returns an error if the bytes that it was made of are not those that were signed.
func (b *Bridge) writeLayer(ctx context.Context, w io.Writer, pieces []piece, i int) error {
	p := pieces[i]
	var keep []*paths
	for _, within := range p.Within {
		r, err := b.rendered(pieces[within].Digest)
		if err != nil {
			return err
		}
		// One that was looked at as none isn't among them.
		list := r.above
		if within == i {
			list = r.own
		}
		keep = append(keep, list)
	}
	blob, err := b.cfg.Store.OpenBlob(p.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	hash := sha256.New()
	in := io.TeeReader(&untilDone{blob, ctx}, hash)
	err = writeLayer(w, in, p.Size, b.cfg.Limits, keep)
	var broken *aci.Violation
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	if err == nil && acproxy.Digest(hash.Sum(nil)) != p.Digest || errors.As(err, &broken) {
		b.suspect(p.Digest)
		return &acproxy.Error{
			Kind: acproxy.ErrBusy, Code: "image-damaged", RetryAfter: 10 * time.Second, Err: err,
			Detail: "the disk has lost bytes of the image of " + p.what() + ": it is being looked at, and fetched again if that is so",
		}
	}
	return err
}

// suspect has the bytes of an image be looked at.
func (b *Bridge) suspect(digest acproxy.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cfg.Suspect == nil || b.suspects[digest] || b.ctx.Err() != nil {
		return
	}
	b.suspects[digest] = true
	// It ends with its work, or with b.ctx; Close waits for it.
	b.work.Go(func() {
		if err := b.cfg.Suspect(b.ctx, digest); err != nil && b.ctx.Err() == nil {
			b.log.Error("looking at an image whose bytes may be lost", "digest", digest, "err", err)
		}
		b.mu.Lock()
		delete(b.suspects, digest)
		b.mu.Unlock()
	})
}

// rendered is what an image's manifest says of how it is rendered.
type rendered struct {
	manifest   *schema.ImageManifest
	own, above *paths // its pathWhitelist, for its own files and for those of images that it needs; nil if it has none
}

// rendered returns what the manifest of a held image says.
func (b *Bridge) rendered(digest acproxy.Digest) (*rendered, error) {
	if r, ok := b.manifests.Get(digest); ok {
		return r, nil
	}
	raw, err := b.cfg.Store.Manifest(digest)
	if err != nil {
		return nil, err
	}
	m := new(schema.ImageManifest)
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, fmt.Errorf("reading the manifest of %v: %w", digest, err)
	}
	r := &rendered{m, newPaths(m.PathWhitelist, true), newPaths(m.PathWhitelist, false)}
	b.manifests.Put(digest, r)
	return r, nil
}
