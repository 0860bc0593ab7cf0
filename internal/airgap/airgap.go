// Package airgap carries images from one store to another without a network: it chooses what goes into a bundle, and takes in what comes out of one.
package airgap

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/bundle"
	"github.com/acproxy/acproxy/trust"
)

// An Origin is what bundles are written from: an open store, with the state that keys and policies give its images now.
type Origin interface {
	// Ready returns once all that is held is known, which takes a while after an index was lost.
	Ready(ctx context.Context) error
	// Images returns held images by name and version, at most limit, those after the place that the call before returned, "" for the first; the next place is "" at
	// the end.
	Images(filter cache.Filter, after string, limit int) (images []cache.Record, next string, err error)
	// Resolve returns what a ref answers, or an error matching [acproxy.ErrNotFound].
	Resolve(ctx context.Context, ref acproxy.Ref) (cache.Resolution, cache.Record, error)
	// Match returns the images that a ref may be answered with.
	Match(ref acproxy.Ref) ([]cache.Record, error)
	// Answers returns all that an image answers.
	Answers(digest acproxy.Digest) ([]cache.Resolution, error)
	Source
	// Known returns what discovery has found out about a name.
	Known(name string) (cache.Discovered, bool)
	// Key returns a trusted key, armored, and the prefixes that it is trusted for. ok is false if there is none.
	Key(fingerprint string) (armored []byte, prefixes []string, ok bool)
}

// A Destination is what bundles are taken into: everything in it goes through its check and its commit.
type Destination interface {
	// Examine judges a carried image without its bytes, and reports whether they are not needed.
	Examine(c fetch.Carried) (held bool, err error)
	// Verify judges a carried image by its bytes, and keeps nothing.
	Verify(ctx context.Context, c fetch.Carried, body io.Reader) error
	// Take takes a carried image in. open is called if its bytes are needed.
	Take(ctx context.Context, c fetch.Carried, open func() (io.Reader, error)) (fetch.Taken, error)
	// Teach takes over what is known of a name, and reports whether it was wanted.
	Teach(name string, templates []discovery.Template) (bool, error)
}

var (
	_ Origin      = Store{}
	_ Destination = (*fetch.Fetcher)(nil)
)

// Store is an open store as an [Origin].
type Store struct {
	Disk    *cache.Disk
	Judge   func(cache.Record) cache.Record // the state that keys and policies give an image now
	Keyring func() *trust.Keyring
}

// Ready implements [Origin].
func (s Store) Ready(ctx context.Context) error { return s.Disk.Ready(ctx) }

// Images implements [Origin].
func (s Store) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	records, next, err := s.Disk.Images(filter, after, limit)
	return s.judged(records), next, err
}

// Resolve implements [Origin].
func (s Store) Resolve(ctx context.Context, ref acproxy.Ref) (cache.Resolution, cache.Record, error) {
	resolved, rec, err := s.Disk.Resolve(ctx, ref)
	if err == nil {
		rec = s.Judge(rec)
	}
	return resolved, rec, err
}

// Match implements [Origin].
func (s Store) Match(ref acproxy.Ref) ([]cache.Record, error) {
	records, err := s.Disk.Match(ref)
	return s.judged(records), err
}

// Answers implements [Origin].
func (s Store) Answers(digest acproxy.Digest) ([]cache.Resolution, error) {
	return s.Disk.Answers(digest)
}

// Signature implements [Origin].
func (s Store) Signature(digest acproxy.Digest) ([]byte, error) { return s.Disk.Signature(digest) }

// Known implements [Origin].
func (s Store) Known(name string) (cache.Discovered, bool) { return s.Disk.Known(name) }

// Open implements [Origin].
func (s Store) Open(digest acproxy.Digest) (io.ReadCloser, error) { return s.Disk.OpenBlob(digest) }

// Key implements [Origin].
func (s Store) Key(fingerprint string) (armored []byte, prefixes []string, ok bool) {
	for _, k := range s.Keyring().Held(trust.Fingerprint(fingerprint)) {
		if !slices.Contains(prefixes, k.Prefix) {
			prefixes = append(prefixes, k.Prefix)
		}
		armored = k.Armored()
	}
	return armored, prefixes, armored != nil
}

func (s Store) judged(records []cache.Record) []cache.Record {
	for i, rec := range records {
		records[i] = s.Judge(rec)
	}
	return records
}

// page is how many records are read at once.
const page = 500

// each calls do with every image that a filter chooses.
func each(ctx context.Context, o Origin, filter cache.Filter, do func(cache.Record) error) error {
	for after, more := "", true; more; more = after != "" {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		records, next, err := o.Images(filter, after, page)
		if err != nil {
			return err
		}
		for _, rec := range records {
			if err := do(rec); err != nil {
				return err
			}
		}
		after = next
	}
	return nil
}

// Receipt returns what a store holds and would serve.
func Receipt(ctx context.Context, o Origin) (*bundle.Receipt, error) {
	if err := o.Ready(ctx); err != nil {
		return nil, err
	}
	r := new(bundle.Receipt)
	err := each(ctx, o, cache.Filter{}, func(rec cache.Record) error {
		if rec.Quarantined() {
			return nil
		}
		held := bundle.Held{Digest: rec.Digest, Signature: rec.SignatureDigest}
		answers, err := o.Answers(rec.Digest)
		if errors.Is(err, acproxy.ErrNotFound) {
			return nil // it was evicted just now
		}
		for _, a := range answers {
			held.Refs = append(held.Refs, a.Ref)
		}
		r.Images = append(r.Images, held)
		return err
	})
	return r, err
}

func digestOf(b []byte) acproxy.Digest { return sha256.Sum256(b) }
