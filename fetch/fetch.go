// Package fetch answers for one image: from the store, or once from its publisher.
package fetch

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	gocache "github.com/patrickmn/go-cache"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/memo"
	"github.com/acproxy/acproxy/internal/queue"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

// Defaults of a [Config].
const (
	DefaultHoldBack      = 64 << 10
	DefaultMaxImageSize  = 20 << 30
	DefaultSignatureWait = 30 * time.Second
	DefaultNegativeTTL   = 30 * time.Second
	DefaultDiscoveryTTL  = 10 * time.Minute
	DefaultMaxFlights    = 64
	DefaultMaxQueue      = 1000
	DefaultQueueWait     = time.Minute
)

// Config is what a Fetcher works with. Its fields may not change after New.
type Config struct {
	Store     cache.Store
	Discovery *discovery.Finder
	Web       *web.Client
	Keyring   func() *trust.Keyring // the keys as they are now

	// These three, and Jitter, are what counts until Change.
	Policies []Policy // the one with the longest prefix counts; an empty prefix is the default
	Allow    []string // image-name prefixes that may be asked for; none means all
	Offline  bool     // dial nobody, whatever the policies say

	HoldBack         int64         // bytes at the end of an arriving image that wait for the verdict; 0 or less means DefaultHoldBack
	MaxImageSize     int64         // bytes of a blob; 0 means DefaultMaxImageSize
	MaxSignatureSize int64         // bytes of a signature; 0 means trust.MaxSignature, which is also the most
	SignatureWait    time.Duration // for how long a signature answered with 202 is asked for again; 0 means DefaultSignatureWait, less than 0 not at all
	NegativeTTL      time.Duration // for how long "not found" and a refusal of an image's content are remembered; 0 means DefaultNegativeTTL, less than 0 not at all
	// Jitter is the part of every time to live, from 0 to 1, by which it is shortened at random, so that what was learned together isn't asked
	// for together again.
	Jitter       float64
	DiscoveryTTL time.Duration // how long what was learned of a name is used before it is refreshed; 0 means DefaultDiscoveryTTL, less than 0 refreshes it every time
	Limits       aci.Limits

	// How an image is received whose publisher breaks off: it is asked for the rest, after a pause that grows.
	Retries   int64         // attempts to go on with one image; 0 means DefaultRetries, less than 0 none
	RetryFor  time.Duration // without a new byte for so long, including the next pause, it is given up; 0 means DefaultRetryFor
	RetryWait time.Duration // the first pause; 0 means DefaultRetryWait

	MaxFlights int64         // refs that publishers are asked for at once; 0 means DefaultMaxFlights
	MaxQueue   int64         // refs that wait for their turn beyond that; 0 means DefaultMaxQueue, less than 0 none
	QueueWait  time.Duration // for how long they wait; 0 means DefaultQueueWait

	// Decided is told every decision about an image, in the order in which they are made, by any goroutine. It must not block for long. nil means
	// nobody is told.
	Decided func(Decision)
	// Landed is told of every fetch of an image that has ended, kept or not, and how long it took from the publisher's answer on. It must not block for long. nil
	// means nobody is told.
	Landed func(took time.Duration, err error)
	// Missed is told of every image that a client asked for and that is neither held nor to be had, and why. Where only discovery was asked, ref is a name. It must
	// not block for long. nil means nobody is told.
	Missed func(ref acproxy.Ref, discovery bool, err error)

	Log *slog.Logger     // nil means slog.Default
	Now func() time.Time // nil means time.Now
}

// A Fetcher finds, fetches, verifies and keeps images. It is safe for concurrent use.
type Fetcher struct {
	cfg Config
	log *slog.Logger
	now func() time.Time

	// ctx is the life of everything that was started on behalf of a client and doesn't end with it.
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	negative *gocache.Cache // basis and ref → remembered error
	sticky   *gocache.Cache // client and ref → remembered digest of the signature that the client was given
	// signatures remembers signatures by their SHA-256.
	signatures *memo.Memo[acproxy.Digest, []byte]
	verdicts   verdicts
	// barred are held images that are to be quarantined, by digest, each as a cache.Record that says why: until the store has noted it, and for good if it
	// can't.
	barred sync.Map
	bars   atomic.Uint64 // how often one was added
	queue  *queue.Queue
	// publishing has publications of the same name wait for one another.
	publishing turns

	settings atomic.Pointer[settings]

	mu        sync.Mutex
	closed    bool
	flights   map[acproxy.Ref]*flight
	downloads map[string]*download
	learning  map[string]bool           // names whose discovery is being refreshed
	refused   map[acproxy.Digest]string // held images that the last Rejudge found not acceptable, with the outcome
	retry     map[acproxy.Ref]time.Time
	replaced  map[acproxy.Digest]replaced // images that Mend does not ask for at the moment
	owed      map[acproxy.Digest]bool     // images that could not be inspected, or of which that could not be noted
}

// New returns a Fetcher. Close ends what it has in progress.
func New(cfg Config) *Fetcher {
	// Less than 0 would let the last bytes go before the verdict.
	cfg.HoldBack = orDefault(max(cfg.HoldBack, 0), DefaultHoldBack)
	cfg.MaxImageSize = orDefault(cfg.MaxImageSize, DefaultMaxImageSize)
	cfg.MaxSignatureSize = orDefault(cfg.MaxSignatureSize, trust.MaxSignature)
	cfg.SignatureWait = orDefault(cfg.SignatureWait, DefaultSignatureWait)
	cfg.NegativeTTL = orDefault(cfg.NegativeTTL, DefaultNegativeTTL)
	cfg.DiscoveryTTL = orDefault(cfg.DiscoveryTTL, DefaultDiscoveryTTL)
	cfg.Retries = orDefault(cfg.Retries, DefaultRetries)
	cfg.RetryFor = orDefault(cfg.RetryFor, DefaultRetryFor)
	cfg.RetryWait = orDefault(cfg.RetryWait, DefaultRetryWait)
	cfg.MaxFlights = orDefault(cfg.MaxFlights, DefaultMaxFlights)
	cfg.MaxQueue = orDefault(cfg.MaxQueue, DefaultMaxQueue)
	cfg.QueueWait = orDefault(cfg.QueueWait, DefaultQueueWait)
	f := &Fetcher{
		cfg: cfg, log: cfg.Log, now: cfg.Now,
		// No janitors: they would be goroutines that nobody can stop. What has expired is dropped when the next is added.
		negative:   gocache.New(cfg.NegativeTTL, 0),
		sticky:     gocache.New(stickyFor, 0),
		signatures: memo.New[acproxy.Digest, []byte](maxMemoSignatures),
		queue: queue.New(queue.Config{
			Places: int(cfg.MaxFlights), Length: int(max(cfg.MaxQueue, 0)), Patience: cfg.QueueWait,
			Doing: "images are being fetched", PlacesName: "fetch.max_flights", LengthName: "fetch.max_queue", PatienceName: "fetch.queue_wait",
		}),
		flights:   make(map[acproxy.Ref]*flight),
		downloads: make(map[string]*download),
		learning:  make(map[string]bool),
		retry:     make(map[acproxy.Ref]time.Time),
		replaced:  make(map[acproxy.Digest]replaced),
		owed:      make(map[acproxy.Digest]bool),
	}
	if f.log == nil {
		f.log = slog.Default()
	}
	if f.now == nil {
		f.now = time.Now
	}
	f.settings.Store(&settings{Settings: Settings{Policies: cfg.Policies, Allow: cfg.Allow, Offline: cfg.Offline, Jitter: cfg.Jitter}})
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	return f
}

func orDefault[T int64 | time.Duration](v, fallback T) T {
	if v == 0 {
		return fallback
	}
	return v
}

// Close ends every flight and inspection in progress and waits for them. Their readers get an error.
func (f *Fetcher) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.cancel(errClosed)
	f.wg.Wait()
	return nil
}

// Drain waits until no flight is in progress, or ctx is done. Others may begin meanwhile: it is for when nobody asks any more.
func (f *Fetcher) Drain(ctx context.Context) {
	for {
		wait := f.unlanded()
		if wait == nil {
			return
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
}

// unlanded returns what is closed when one of the flights in progress has got further, nil if there are none.
func (f *Fetcher) unlanded() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fl := range f.flights {
		if wait := fl.pending(); wait != nil {
			return wait
		}
	}
	return nil
}

// start runs work in the background until it returns; Close cancels its context and waits for it. It reports false, and runs nothing, once
// the Fetcher is closed.
func (f *Fetcher) start(work func(ctx context.Context)) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.wg.Go(func() { work(f.ctx) })
	return true
}

// Status says how an answer came about; the HTTP side turns it into Cache-Status (RFC 9211).
type Status int

const (
	Hit         Status = iota // held, and fresh
	Stale                     // held, past its time to live, being refreshed behind or the publisher doesn't answer
	Gone                      // held, and no longer there at its publisher
	Revalidated               // held, and the publisher just said that it is still the same
	Miss                      // fetched for this request
	Joined                    // somebody else's request is fetching it already
	Uncached                  // fetched for this request alone: there is no room to keep it
)

// String returns the status in lower-case words.
func (s Status) String() string {
	return [...]string{"hit", "stale", "gone", "revalidated", "miss", "joined", "uncached"}[s]
}

// A Request asks for an image on behalf of a client.
type Request struct {
	Ref acproxy.Ref
	// Client tells clients apart, by address. A client that was given a signature is given the image it belongs to, even if the ref has moved
	// on to another image in between. Empty means nobody in particular.
	Client string
	// Has is the ETag of the image that the client has already, "" for none. If it is that of the held image there is nothing to send: that image is
	// returned without its file.
	Has string
	// Fresh has the publisher be asked whether what is held is still what a ref without a version answers, however lately it was, and waited for.
	Fresh bool
}

// moves reports whether the ref may move on to another image between a client's two requests: only one without a version can.
func (r Request) moves() bool { return r.Client != "" && r.Ref.Version() == "" }

// stickyFor is how long a client may take between asking for a signature and asking for the image.
const stickyFor = 2 * time.Minute

const (
	// maxSticky bounds the signatures remembered for clients, and the pauses.
	maxSticky = 100_000
	// maxNegative bounds the negative answers, which carry the trace of what was tried: some kilobytes each.
	maxNegative = 10_000
)

// answer is where an image is: held, or arriving.
type answer struct {
	status   Status
	record   cache.Record     // if held
	resolved cache.Resolution // if held
	download *download        // if arriving
	modified time.Time        // if arriving: the Last-Modified that the ref will have
}

// Image returns the image that a ref asks for: open, if it is held; arriving, if its publisher had to be asked. The caller closes it.
// Errors match the sentinels of package acproxy and carry the trace of what was tried.
func (f *Fetcher) Image(ctx context.Context, req Request) (*Image, error) {
	a, err := f.answer(ctx, req)
	if err != nil && f.streams(req.Ref.Name(), err) {
		p, err := f.stream(ctx, req, false)
		if err != nil {
			return nil, err
		}
		return &Image{Status: Uncached, Size: p.size, Modified: p.modified, ETag: p.etag(), f: f, ref: req.Ref, passage: p}, nil
	}
	if err != nil {
		return nil, err
	}
	if a.download == nil {
		im, err := f.open(req, a)
		if !errors.Is(err, acproxy.ErrNotFound) {
			return im, err
		}
		// The bytes are gone since the store was asked, or nobody had noticed yet. It knows now.
		if a, err = f.answer(ctx, req); err != nil {
			return nil, err
		}
		if a.download == nil {
			return f.open(req, a)
		}
	}
	return f.follow(ctx, a, req.Ref)
}

// A Signature is a detached OpenPGP signature as its publisher published it.
type Signature struct {
	Status   Status
	Bytes    []byte         // armored or binary; nil if the image is unsigned and policy accepts that
	Modified time.Time      // as the image's
	Later    bool           // the publisher wants to be asked again once the image was fetched
	Digest   acproxy.Digest // SHA-256 of Bytes
	Image    acproxy.Digest // of the held image that it belongs to; zero while that is arriving
}

// Signature returns the signature of the image that a ref asks for, once a key that is trusted for its name is known to have made it. An
// unsigned image that policy accepts gives an error matching [acproxy.ErrNotFound].
func (f *Fetcher) Signature(ctx context.Context, req Request) (Signature, error) {
	// Who asks for a signature begins anew. A client that asks more often than it is forgotten would never see the next image otherwise.
	if req.moves() {
		f.sticky.Delete(stickyKey(req))
	}
	a, err := f.answer(ctx, req)
	if err != nil && f.streams(req.Ref.Name(), err) {
		p, err := f.stream(ctx, req, true)
		if err != nil {
			return Signature{}, err
		}
		return Signature{Status: Uncached, Bytes: p.signature, Modified: p.f.now().UTC(), Digest: sha256.Sum256(p.signature)}, p.close()
	}
	if err != nil {
		return Signature{}, err
	}
	if d := a.download; d != nil {
		if d.isLater() {
			return Signature{Status: a.status, Later: true}, nil
		}
		if d.signature == nil {
			return Signature{}, unsigned(req.Ref.String())
		}
		sum := sha256.Sum256(d.signature)
		f.stick(req, sum)
		return Signature{Status: a.status, Bytes: d.signature, Modified: a.modified, Digest: sum}, nil
	}
	if !a.record.Signed {
		return Signature{}, unsigned(req.Ref.String())
	}
	sig, err := f.SignatureOf(a.record)
	if err != nil {
		return Signature{}, fmt.Errorf("reading the signature of %v: %w", req.Ref, err)
	}
	f.stick(req, a.record.SignatureDigest)
	return Signature{Status: a.status, Bytes: sig, Modified: a.resolved.Modified, Digest: a.record.SignatureDigest, Image: a.record.Digest}, nil
}

// SignatureOf returns the signature of a held image, as published.
func (f *Fetcher) SignatureOf(rec cache.Record) ([]byte, error) {
	if !rec.Signed {
		return nil, unsigned(rec.Name)
	}
	if sig, ok := f.signatures.Get(rec.SignatureDigest); ok {
		return sig, nil
	}
	sig, err := f.cfg.Store.Signature(rec.Digest)
	if err == nil && len(sig) <= maxMemoSignature && sha256.Sum256(sig) == rec.SignatureDigest {
		f.signatures.Put(rec.SignatureDigest, sig)
	}
	return sig, err
}

const (
	// maxMemoSignatures bounds the signatures that are remembered, and maxMemoSignature each of them, in bytes.
	maxMemoSignatures = 4096
	maxMemoSignature  = 8 << 10
)

func unsigned(what string) error {
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "unsigned", Detail: what + " has no signature; the policy of its prefix accepts it without one"}
}

// ByImageID returns the held image with an image ID, given whole or as its first digits (at least [acproxy.MinImageIDPrefix]), of those whose names may
// says that they may be known of. The caller closes it. An ID that two images share is an error matching [acproxy.ErrInvalid].
func (f *Fetcher) ByImageID(ctx context.Context, digits string, may func(name string) bool) (*Image, error) {
	records, err := f.cfg.Store.ByImageID(digits)
	if err == nil && len(records) == 0 {
		// It may not have known everything yet.
		if err = f.cfg.Store.Ready(ctx); err == nil {
			records, err = f.cfg.Store.ByImageID(digits)
		}
	}
	if err != nil {
		return nil, err
	}
	var fits []cache.Record
	var refused error
	for _, rec := range records {
		if !may(rec.Name) {
			continue
		}
		err := f.allowed(rec.Name)
		if err == nil {
			err = f.acceptable(rec)
		}
		if err != nil {
			refused = err
			continue
		}
		fits = append(fits, rec)
	}
	switch {
	case len(fits) == 0 && refused != nil:
		return nil, refused
	case len(fits) == 0:
		return nil, &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: "image-id-unknown",
			Detail: "no image with an ID that begins with sha512-" + digits + " is held, or that you may have; an image that isn't can only be asked for by name",
		}
	}
	for _, rec := range fits[1:] {
		if rec.ImageID != fits[0].ImageID {
			return nil, acproxy.Invalid("several images have an ID that begins with sha512-%s; give more digits", digits)
		}
	}
	f.cfg.Store.Touch(fits[0].Digest)
	return f.open(Request{}, answer{status: Hit, resolved: cache.Resolution{Digest: fits[0].Digest, Modified: fits[0].Modified}, record: fits[0]})
}

func (f *Fetcher) answer(ctx context.Context, req Request) (answer, error) {
	a, err := f.find(ctx, req)
	switch {
	case err != nil && req.Client != "":
		f.missed(req.Ref, false, err)
	case err == nil && a.download == nil:
		f.cfg.Store.Touch(a.record.Digest)
	}
	return a, err
}

// missed tells of what a client could not get because it isn't here. What is refused is another matter.
func (f *Fetcher) missed(ref acproxy.Ref, discovery bool, err error) {
	if f.cfg.Missed != nil && (errors.Is(err, acproxy.ErrOffline) || errors.Is(err, acproxy.ErrNotFound) || errors.Is(err, acproxy.ErrPublisher) || errors.Is(err, acproxy.ErrTimeout)) {
		f.cfg.Missed(ref, discovery, err)
	}
}

// find is answer, and tells nobody.
func (f *Fetcher) find(ctx context.Context, req Request) (answer, error) {
	if err := f.allowed(req.Ref.Name()); err != nil {
		return answer{}, err
	}
	policy := f.policy(req.Ref.Name())
	resolved, rec, err := f.cfg.Store.Resolve(ctx, req.Ref)
	switch {
	case err == nil:
		a, err := f.held(ctx, req, policy, resolved, rec)
		if policy.Offline || !distrusted(err) {
			return a, err
		}
		// The publisher may have signed it anew, with a key that is trusted.
		a, again := f.ask(ctx, req)
		if outage(again) || errors.Is(again, acproxy.ErrNotFound) {
			// That it isn't to be had there either says less than why what is here isn't served.
			return answer{}, err
		}
		return a, again
	case !errors.Is(err, acproxy.ErrNotFound):
		return answer{}, err
	case policy.Offline:
		return f.fallback(req.Ref, absent(req.Ref, policy))
	}
	a, err := f.ask(ctx, req)
	if outage(err) {
		return f.fallback(req.Ref, err)
	}
	return a, err
}

// ask answers by asking the publisher, unless it was asked a moment ago and the answer was no.
func (f *Fetcher) ask(ctx context.Context, req Request) (answer, error) {
	if err, ok := recall[error](f.negative, negativeKey(f.basis(), req.Ref), f.now()); ok {
		return answer{}, err
	}
	fl, joined := f.join(ctx, req, acproxy.Digest{})
	if err := fl.wait(ctx); err != nil {
		return answer{}, err
	}
	if fl.download != nil {
		return fl.arriving(joined), nil
	}
	// The publisher's signature showed that the image is held already, under another ref.
	resolved, rec, err := f.cfg.Store.Resolve(ctx, req.Ref)
	if err != nil {
		return answer{}, err
	}
	if err := f.acceptable(rec); err != nil {
		return answer{}, err
	}
	return answer{status: Hit, resolved: resolved, record: rec}, nil
}

// held answers with what the store has for a ref, asking the publisher only where a ref without a version is no longer fresh.
func (f *Fetcher) held(ctx context.Context, req Request, policy Policy, resolved cache.Resolution, rec cache.Record) (answer, error) {
	if a, ok := f.belonging(req, policy, resolved, rec); ok {
		return a, nil
	}
	status, arriving, err := f.freshen(ctx, req, policy, resolved)
	if err != nil {
		return answer{}, err
	}
	if arriving != nil {
		return *arriving, nil
	}
	if status == Revalidated {
		if resolved, rec, err = f.cfg.Store.Resolve(ctx, req.Ref); err != nil {
			return answer{}, err
		}
	}
	if err := f.acceptable(rec); err != nil {
		return answer{}, err
	}
	return answer{status: status, resolved: resolved, record: rec}, nil
}

// belonging answers with the image that the signature belongs to which the client was given a moment ago, whatever the publisher calls latest by
// now: together they are right, and one of each is not.
func (f *Fetcher) belonging(req Request, policy Policy, resolved cache.Resolution, rec cache.Record) (answer, bool) {
	if !req.moves() {
		return answer{}, false
	}
	stuck, ok := recall[acproxy.Digest](f.sticky, stickyKey(req), f.now())
	if !ok {
		return answer{}, false
	}
	if rec.SignatureDigest != stuck {
		digest, ok := f.cfg.Store.BySignature(stuck)
		if !ok {
			return answer{}, false
		}
		var err error
		if rec, err = f.cfg.Store.Record(digest); err != nil {
			return answer{}, false
		}
		resolved = cache.Resolution{Ref: req.Ref, Digest: rec.Digest, Modified: rec.Modified, Source: rec.Source}
	}
	if f.acceptable(rec) != nil {
		return answer{}, false
	}
	status := Hit
	if cache.Age(f.now(), resolved.Validated) >= f.jittered(policy.TTL, req.Ref.String(), resolved.Validated) {
		status = Stale
	}
	return answer{status: status, resolved: resolved, record: rec}, true
}

// freshen decides whether what is held for a ref may be answered with. It returns another answer, one that is arriving, if the publisher has
// something newer and the node had to wait for it.
func (f *Fetcher) freshen(ctx context.Context, req Request, policy Policy, resolved cache.Resolution) (Status, *answer, error) {
	ref := req.Ref
	asHeld := Hit
	if !resolved.Gone.IsZero() {
		asHeld = Gone
	}
	if ref.Version() != "" || policy.Offline {
		return asHeld, nil, nil
	}
	age, ttl := cache.Age(f.now(), resolved.Validated), f.jittered(policy.TTL, ref.String(), resolved.Validated)
	if age < ttl && !req.Fresh {
		return asHeld, nil, nil
	}
	if asHeld == Hit {
		asHeld = Stale
	}
	if f.pausing(ref) {
		return asHeld, nil, nil
	}
	fl, joined := f.join(ctx, req, resolved.Digest)
	if age < ttl+policy.MaxStale && !req.Fresh {
		return asHeld, nil, nil
	}
	switch err := fl.wait(ctx); {
	case err == nil && fl.download == nil:
		return Revalidated, nil, nil
	case err == nil:
		a := fl.arriving(joined)
		return a.status, &a, nil
	case ctx.Err() != nil:
		return 0, nil, err
	case errors.Is(err, acproxy.ErrNotFound):
		return Gone, nil, nil
	}
	return asHeld, nil, nil
}

// jittered returns a time to live that is shorter by a random part of it, the same one for the same thing learned at the same time: a restart doesn't
// change it.
func (f *Fetcher) jittered(ttl time.Duration, what string, learned time.Time) time.Duration {
	jitter := f.settings.Load().Jitter
	if jitter <= 0 || ttl <= 0 {
		return ttl
	}
	h := fnv.New64a()
	// A hash can't fail (package hash says so).
	_, _ = io.WriteString(h, what)
	_ = binary.Write(h, binary.LittleEndian, learned.UnixNano())
	random := float64(h.Sum64()>>11) / (1 << 53)
	return ttl - time.Duration(float64(ttl)*jitter*random)
}

// fallback answers a ref that can't be asked for at its publisher with the one held image that fits it, if there is exactly one.
func (f *Fetcher) fallback(ref acproxy.Ref, cause error) (answer, error) {
	records, err := f.cfg.Store.Match(ref)
	if err != nil {
		return answer{}, errors.Join(cause, err)
	}
	var fits []cache.Record
	for _, rec := range records {
		if f.acceptable(rec) == nil {
			fits = append(fits, rec)
		}
	}
	local := f.policy(ref.Name()).Local
	if len(fits) > 1 && local {
		cause = ambiguous(ref, len(fits))
	}
	if len(fits) != 1 {
		return answer{}, cause
	}
	rec, status := fits[0], Stale
	if local {
		status = Hit
	}
	return answer{status: status, record: rec, resolved: cache.Resolution{Ref: ref, Digest: rec.Digest, Modified: rec.Modified, Source: rec.Source}}, nil
}

// outage reports whether an error says nothing about the image, only about reaching its publisher.
func outage(err error) bool {
	return errors.Is(err, acproxy.ErrPublisher) || errors.Is(err, acproxy.ErrTimeout) || acproxy.Code(err) == web.CodeBusy || acproxy.Code(err) == acproxy.CodeShortage
}

func stickyKey(req Request) string { return req.Client + " " + req.Ref.String() }

// stick remembers which signature, by its SHA-256, a client was given.
func (f *Fetcher) stick(req Request, signature acproxy.Digest) {
	if req.moves() {
		remember(f.sticky, maxSticky, stickyKey(req), signature, f.now().Add(stickyFor))
	}
}

// remembered is a value with its time. It is by our clock; the cache's own is the wall clock's.
type remembered[T any] struct {
	value T
	until time.Time
}

// remember adds to a cache that has no bound of its own. Expired ones go first; if all are young, the newcomer isn't remembered.
func remember[T any](c *gocache.Cache, most int, key string, value T, until time.Time) {
	if c.ItemCount() >= most {
		c.DeleteExpired()
	}
	if c.ItemCount() < most {
		c.SetDefault(key, remembered[T]{value, until})
	}
}

func recall[T any](c *gocache.Cache, key string, now time.Time) (T, bool) {
	v, ok := c.Get(key)
	r, _ := v.(remembered[T])
	return r.value, ok && now.Before(r.until)
}

// rememberFailure keeps an error for those who ask next while what it was decided on is the same.
func (f *Fetcher) rememberFailure(on basis, ref acproxy.Ref, err error) {
	if f.cfg.NegativeTTL > 0 {
		remember(f.negative, maxNegative, negativeKey(on, ref), err, f.now().Add(f.cfg.NegativeTTL))
	}
}

// negativeKey contains the basis, so that a refusal isn't remembered past the adding of a key, or a change of the policies.
func negativeKey(on basis, ref acproxy.Ref) string {
	return on.keyring + "." + strconv.FormatUint(on.settings, 10) + " " + ref.String()
}

// pausing reports whether a refresh of a ref failed a moment ago, so that it isn't tried again with every request.
func (f *Fetcher) pausing(ref acproxy.Ref) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	until, ok := f.retry[ref]
	if ok && !f.now().Before(until) {
		delete(f.retry, ref)
		return false
	}
	return ok
}

func (f *Fetcher) pause(ref acproxy.Ref) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.retry) >= maxSticky {
		clear(f.retry)
	}
	f.retry[ref] = f.now().Add(f.cfg.NegativeTTL)
}
