package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/trust"
)

// A Carried is an image that somebody brought, in place of its publisher. Nothing that is said of it here is believed: it is what to hold the bytes against.
type Carried struct {
	Name      string            `json:"name"`                // the manifest's
	Labels    map[string]string `json:"labels,omitempty"`    // the manifest's
	Refs      []acproxy.Ref     `json:"refs,omitempty"`      // what it shall answer beside the ref of all its labels
	Digest    acproxy.Digest    `json:"digest"`              // of the bytes
	ImageID   acproxy.ImageID   `json:"imageID,omitzero"`    // zero if nobody has said
	Size      int64             `json:"size"`                // bytes
	Signature []byte            `json:"signature,omitempty"` // as published; nil if there is none
	Modified  time.Time         `json:"modified,omitzero"`   // the publisher's Last-Modified
	Source    string            `json:"source"`              // where it comes from, for people
	// Pin keeps it from being evicted.
	Pin bool `json:"pin,omitempty"`
	// AllowOlder lets refs without a version answer it even if what they answer now was signed later.
	AllowOlder bool `json:"allowOlder,omitempty"`
	// Client is who brought it, "" for nobody in particular.
	Client string `json:"-"`
	// published says that its publisher brought it: name and labels are all that the manifest has, and of two images that were signed in the same second the
	// one that comes later is the newer one.
	published bool
	// arrived are its bytes, if they are here already. Whoever takes it in ends them, if it uses them.
	arrived *cache.Partial
}

// A Taken is what became of a carried image.
type Taken struct {
	Record cache.Record  `json:"record"`
	Held   bool          `json:"held"`            // it was held already, so that its bytes weren't read
	Moved  []acproxy.Ref `json:"moved,omitempty"` // refs that answer it from now on
	Kept   []acproxy.Ref `json:"kept,omitempty"`  // refs without a version that go on answering what was signed later
}

const (
	codeOlder = "older-than-held"
	// codeNotAsSaid is the code of bytes that aren't those that were announced.
	codeNotAsSaid = "bundle-damaged"
)

// Examine judges a carried image as far as that is possible without its bytes: whether its name may be here, and whether a trusted key made its signature.
// held reports that the bytes are not needed, because they are here and may be served.
func (f *Fetcher) Examine(c Carried) (held bool, err error) {
	e, err := f.examine(c)
	return e.held != nil, err
}

// examined is what can be said of a carried image without its bytes.
type examined struct {
	full   acproxy.Ref   // of all its labels
	held   *cache.Record // nil if it isn't, or may not be served as it is
	signed time.Time     // when the last of the trusted keys signed it; zero without a signature
	policy Policy
}

func (f *Fetcher) examine(c Carried) (e examined, err error) {
	if e.full, err = acproxy.NewRef(c.Name, c.Labels); err != nil {
		return e, err
	}
	for _, ref := range c.Refs {
		if err := ref.Matches(c.Name, c.Labels); err != nil {
			return e, err
		}
	}
	if err := f.allowed(c.Name); err != nil {
		return e, err
	}
	e.policy = f.policy(c.Name)
	// All of it is here to be checked, so nothing is delivered before that.
	e.policy.Delivery = VerifyFirst
	if c.Size > f.cfg.MaxImageSize {
		return e, tooLarge(c.Source, f.cfg.MaxImageSize)
	}
	// What is said to be another image than the one with these bytes isn't held: its bytes have to show it.
	if rec, err := f.cfg.Store.Record(c.Digest); err == nil && rec.Name == c.Name && maps.Equal(rec.Labels, c.Labels) && (c.ImageID.IsZero() || c.ImageID == rec.ImageID) && f.acceptable(rec) == nil {
		e.held, e.signed = &rec, lastSigned(rec.Signers)
		return e, nil
	}
	acceptance, err := f.judge(f.cfg.Keyring(), c.Name, c.Signature, nil)
	if err != nil {
		return e, err
	}
	for _, s := range acceptance.Signers {
		if s.Signed.After(e.signed) {
			e.signed = s.Signed
		}
	}
	return e, nil
}

func lastSigned(signers []cache.Signer) (last time.Time) {
	for _, s := range signers {
		if s.Signed.After(last) {
			last = s.Signed
		}
	}
	return last
}

// Take takes a carried image in: by the same check and the same commit as one that is fetched, once everything about it has been checked. open opens its
// bytes, which are read to their end before Take returns, unless they are not needed or an error ends it. What was remembered against the refs that the image
// fits is forgotten.
func (f *Fetcher) Take(ctx context.Context, c Carried, open func() (io.Reader, error)) (Taken, error) {
	e, err := f.examine(c)
	if err != nil {
		f.refuseCarried(c, e.full, err)
		return Taken{}, err
	}
	// Nobody else has what is published here.
	c.Pin = c.Pin || e.policy.Local
	moved, kept := f.movable(ctx, c, e)
	t := Taken{Moved: moved, Kept: kept}
	if e.held != nil {
		t.Held, t.Record = true, *e.held
		err = f.pointCarried(ctx, c, e, t.Moved)
	} else {
		t.Record, err = f.takeBytes(ctx, c, e, t.Moved, open)
	}
	if err != nil {
		return Taken{}, err
	}
	f.forgive(c.Name, t.Record.Labels)
	return t, nil
}

// TakeSent is [Fetcher.Take] for bytes that come as slowly as whoever sends them likes: all of them are here before anybody else can come to wait for them.
func (f *Fetcher) TakeSent(ctx context.Context, c Carried, open func() (io.Reader, error)) (Taken, error) {
	e, err := f.examine(c)
	if err != nil || e.held != nil {
		return f.Take(ctx, c, open)
	}
	body, err := open()
	if err != nil {
		return Taken{}, err
	}
	u, err := f.Receive(ctx, e.full, c.Source, c.Size, body)
	if err != nil {
		return Taken{}, err
	}
	c.arrived = u.partial
	t, err := f.Take(ctx, c, func() (io.Reader, error) { return nil, errors.New("its bytes have been used already") })
	return t, errors.Join(err, u.Discard())
}

// movable returns the refs that shall answer a carried image, and those that go on answering what was signed later. That is all that shows, without the
// publisher, which of two images is the newer one: whoever carries an old bundle takes nothing back.
func (f *Fetcher) movable(ctx context.Context, c Carried, e examined) (moved, kept []acproxy.Ref) {
	for _, ref := range append([]acproxy.Ref{e.full}, c.Refs...) {
		before, rec, err := f.cfg.Store.Resolve(ctx, ref)
		switch {
		case err == nil && before.Digest == c.Digest && !rec.Lost():
			if e.held == nil {
				moved = append(moved, ref)
			}
		case err != nil || ref.Version() != "" || c.AllowOlder || f.acceptable(rec) != nil || newer(c, e.signed, rec):
			moved = append(moved, ref)
		default:
			kept = append(kept, ref)
		}
	}
	return moved, kept
}

// newer reports whether a carried image is newer than a held one.
func newer(c Carried, signed time.Time, held cache.Record) bool {
	before := lastSigned(held.Signers)
	if c.published && signed.Equal(before) {
		return true
	}
	if signed.IsZero() && before.IsZero() {
		return c.Modified.After(held.Modified)
	}
	return signed.After(before)
}

// pointCarried lets a held image answer refs.
func (f *Fetcher) pointCarried(ctx context.Context, c Carried, e examined, refs []acproxy.Ref) error {
	var resolutions []cache.Resolution
	for _, ref := range refs {
		// Whatever was said of it: another download may have brought it.
		if err := ref.Matches(e.held.Name, e.held.Labels); err != nil {
			return err
		}
		if err := f.unchanged(ctx, ref, *e.held, c); err != nil {
			return err
		}
		resolutions = append(resolutions, f.resolution(ctx, ref, *e.held, c.Source))
	}
	if len(resolutions) > 0 {
		if err := f.cfg.Store.Point(ctx, resolutions...); err != nil {
			return err
		}
	}
	if !c.Pin || e.held.Pinned {
		return nil
	}
	return f.cfg.Store.Update(ctx, c.Digest, func(rec *cache.Record) error {
		rec.Pinned = true
		return nil
	})
}

// unchanged refuses a held image for a ref with a version that answers another one.
func (f *Fetcher) unchanged(ctx context.Context, ref acproxy.Ref, held cache.Record, c Carried) error {
	err := f.checkVersion(ctx, candidate{
		ref: ref, digest: held.Digest, source: c.Source, onChange: f.policy(c.Name).OnChange, published: c.published,
		identify: func() (acproxy.ImageID, error) { return f.identify(ctx, held) },
	})
	f.refuseCarried(c, ref, err)
	return err
}

// takeBytes takes in what isn't here.
func (f *Fetcher) takeBytes(ctx context.Context, c Carried, e examined, refs []acproxy.Ref, open func() (io.Reader, error)) (cache.Record, error) {
	if len(refs) == 0 {
		return cache.Record{}, &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: codeOlder,
			Detail: fmt.Sprintf("%v has no version, and what is held for it was signed later: it is kept", e.full),
		}
	}
	for {
		d, mine, err := f.claimCarried(c, e, refs)
		if err != nil {
			return cache.Record{}, err
		}
		if mine {
			return f.bring(ctx, d, open)
		}
		// Its publisher sends it at this moment, or somebody else carries it.
		select {
		case <-d.decided:
		case <-ctx.Done():
			return cache.Record{}, context.Cause(ctx)
		}
		rec, err := d.outcome()
		if err == nil {
			return rec, f.pointTaken(ctx, c, rec, refs)
		}
	}
}

// pointTaken lets an image that came another way answer the refs that it was carried for.
func (f *Fetcher) pointTaken(ctx context.Context, c Carried, rec cache.Record, refs []acproxy.Ref) error {
	return f.pointCarried(ctx, c, examined{held: &rec}, refs)
}

// claimCarried registers the download of a carried image, which is that of its publisher if it comes from there already.
func (f *Fetcher) claimCarried(c Carried, e examined, refs []acproxy.Ref) (d *download, mine bool, err error) {
	key := c.Name + " " + c.Digest.String()
	if c.Signature != nil {
		key = signedKey(c.Name, sha256.Sum256(c.Signature))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, false, errClosed
	}
	if d, ok := f.downloads[key]; ok {
		return d, false, nil
	}
	d = &download{
		f: f, key: key, name: c.Name, client: c.Client, basis: f.basis(), policy: e.policy, source: c.Source, endpoints: []string{c.Source}, signature: c.Signature, size: c.Size,
		carried: &c, modified: f.credible(c.Modified),
		begun: make(chan struct{}), decided: make(chan struct{}), finished: make(chan struct{}), changed: make(chan struct{}),
		refs: make(map[acproxy.Ref]struct{}),
	}
	for _, ref := range refs {
		d.refs[ref] = struct{}{}
	}
	d.ctx, d.cancel = context.WithCancel(f.ctx)
	d.urgent = make(chan struct{})
	d.hurry = sync.OnceFunc(func() { close(d.urgent) })
	d.hurry()
	f.downloads[key] = d
	return d, true, nil
}

// credible returns a time of last change unless it is in the future: no later one could take its place.
func (f *Fetcher) credible(modified time.Time) time.Time {
	if modified.After(f.now()) {
		return time.Time{}
	}
	return modified
}

// bring brings the bytes of a carried image to the verdict.
func (f *Fetcher) bring(ctx context.Context, d *download, open func() (io.Reader, error)) (cache.Record, error) {
	stop := context.AfterFunc(ctx, d.cancel)
	defer stop()
	err := f.beginCarried(d, open)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		d.end(err)
		return cache.Record{}, err
	}
	// It ends with the body, or with ctx.
	<-d.finished
	rec, err := d.outcome()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return rec, err
}

// beginCarried sets the download of a carried image going.
func (f *Fetcher) beginCarried(d *download, open func() (io.Reader, error)) error {
	if partial := d.carried.arrived; partial != nil {
		return d.begin(partial, nil, d.size, nil)
	}
	body, err := open()
	if err != nil {
		return err
	}
	// Without a key: what has arrived of it is of no use to a fetch.
	partial, err := f.cfg.Store.Begin(d.ctx, cache.Arrival{Source: d.source, Size: d.size})
	if err != nil {
		return err
	}
	return d.begin(partial, io.NopCloser(body), d.size, nil)
}

// asSaid holds the bytes of a carried image against what was said of them, before anything is made of what is wrong with them: what was damaged on the way
// is no attack.
func (d *download) asSaid(digest acproxy.Digest) error {
	if d.carried == nil || d.carried.Digest == digest {
		return nil
	}
	return &acproxy.Error{
		Kind: acproxy.ErrInvalid, Code: codeNotAsSaid,
		Detail: fmt.Sprintf("the image of %s in %s has other bytes than were announced: their digest is %v, not %v", d.name, d.source, digest, d.carried.Digest),
	}
}

// identifiedAsSaid does the same with the image ID.
func (d *download) identifiedAsSaid(found aci.Inspection) error {
	if d.carried == nil || d.carried.ImageID.IsZero() || d.carried.ImageID == found.ID {
		return nil
	}
	return &acproxy.Error{
		Kind: acproxy.ErrInvalid, Code: codeNotAsSaid,
		Detail: fmt.Sprintf("the image of %s in %s is %s, and was announced as %s", d.name, d.source, found.ID.Short(), d.carried.ImageID.Short()),
	}
}

// refuseCarried records why a carried image wasn't looked at, where that is the verdict of a policy.
func (f *Fetcher) refuseCarried(c Carried, ref acproxy.Ref, err error) {
	if !ref.IsZero() && errors.Is(err, acproxy.ErrRefused) {
		f.recordRefusal(ref, c.Client, c.Source, err)
	}
}

// forgive forgets what was remembered against refs that an image fits.
func (f *Fetcher) forgive(name string, labels map[string]string) {
	if f.negative.ItemCount() > 0 {
		for key := range f.negative.Items() {
			_, text, _ := strings.Cut(key, " ")
			if ref, err := acproxy.ParseRef(text); err == nil && ref.Matches(name, labels) == nil {
				f.negative.Delete(key)
			}
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for ref := range f.retry {
		if ref.Matches(name, labels) == nil {
			delete(f.retry, ref)
		}
	}
}

// maxTaught is how many templates a name can be taught.
const maxTaught = 64

// Teach takes over what somebody else has learned of a name, where nothing is known of it here or where nobody may be asked. It reports whether that was
// so. Where the publisher may be asked it is, at the next occasion.
func (f *Fetcher) Teach(name string, templates []discovery.Template) (bool, error) {
	if err := acproxy.CheckName(name); err != nil {
		return false, err
	}
	if err := f.allowed(name); err != nil {
		return false, err
	}
	if len(templates) == 0 || len(templates) > maxTaught {
		return false, acproxy.Invalid("%s comes with %d templates, where 1 to %d are allowed", name, len(templates), maxTaught)
	}
	for _, t := range templates {
		if err := t.Check(name); err != nil {
			return false, err
		}
	}
	known, ok := f.cfg.Store.Known(name)
	offline := f.policy(name).Offline
	if ok && (!offline || slices.Equal(learned(known), templates)) {
		return false, nil
	}
	found := cache.Discovered{Name: name, Templates: kept(templates)}
	if offline {
		found.When = f.now()
	}
	return true, f.cfg.Store.Learn(found)
}

// Verify judges a carried image by its bytes as [Fetcher.Take] does, and keeps nothing. What the store holds is not looked at.
func (f *Fetcher) Verify(ctx context.Context, c Carried, body io.Reader) error {
	e, err := f.examine(c)
	if err != nil {
		return err
	}
	d := &download{f: f, name: c.Name, source: c.Source, carried: &c}
	var hasher *trust.Hasher
	if c.Signature != nil {
		if hasher, err = trust.NewHasher(c.Signature); err != nil {
			return err
		}
	}
	sum, to := hashing(hasher)
	read := io.TeeReader(&cancelReader{ctx: ctx, r: body}, io.MultiWriter(to...))
	found, wrong := aci.Inspect(read, f.cfg.Limits, func(m aci.Manifest) error { return e.full.Matches(m.Name, m.Labels) })
	if _, err := io.Copy(io.Discard, read); err != nil {
		return err
	}
	// In the order in which Take finds it out.
	if err := d.asSaid(acproxy.Digest(sum.Sum(nil))); err != nil {
		return err
	}
	var hashed trust.Hashed
	if hasher != nil {
		if hashed, err = hasher.Hashed(); err != nil {
			return err
		}
	}
	if _, err := f.judge(f.cfg.Keyring(), c.Name, c.Signature, hashed); err != nil {
		return err
	}
	if wrong != nil {
		return wrong
	}
	return d.identifiedAsSaid(found)
}
