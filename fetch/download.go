package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/tracing"
	"github.com/acproxy/acproxy/trust"
)

// A download is the arriving of one blob: from the publisher into a temporary file, through the hashes and the inspection, to the verdict.
// Readers follow the file as it grows. Several refs may wait for the same download.
//
//	body ─▶ buffer ─┬─▶ partial file ─▶ followers, inspection (both read it from the page cache, at their own pace)
//	                └─▶ sha256 and the signature's hashes, on the other core
//
// A body that ends before its time is taken up again, see reception. What has arrived when that fails, or when the Fetcher is closed, is kept for the
// next one that asks for the same bytes.
type download struct {
	f      *Fetcher
	key    string
	name   string
	client string // who asked first
	basis  basis  // what decisions rested on when it was claimed
	policy Policy
	source string // the image's URL
	// endpoints are the URLs that the image may be had from, source first. Only the goroutine that receives changes them.
	endpoints    []string
	signatureURL string
	signature    []byte // set before the download is shared, unless later

	ctx    context.Context
	cancel context.CancelFunc
	// begun is closed once the publisher's headers are in, or the download has ended without them. size, modified, etag and path may be
	// read after it.
	begun    chan struct{}
	size     int64 // bytes, -1 if the publisher didn't say
	modified time.Time
	etag     string
	// validators are what the publisher said, by the names of its header fields.
	validators map[string]string
	partial    *cache.Partial
	held       acproxy.Digest // with errHeld: the image that made the download needless
	// urgent is closed, by hurry, when somebody waits for the end of the inspection. Until then all of it that the verdict doesn't need waits for the
	// verdict.
	urgent chan struct{}
	hurry  func()
	// carried is the image that somebody brought, nil if the publisher sends it. There is nobody to ask for the rest of one, or for its signature.
	carried *Carried
	// pieced says that the bytes came with more than one answer, or before the process did. It belongs to the goroutine that receives.
	pieced bool
	// decided is closed with the verdict, good or bad; finished, after that, with the end of the inspection.
	decided, finished chan struct{}

	mu        sync.Mutex
	later     bool
	changed   chan struct{} // closed, and replaced, whenever one of the fields below changes
	refs      map[acproxy.Ref]struct{}
	doomed    bool          // the manifest fits none of the refs: nobody else may join
	readers   int           // of those who were given the image while it arrived, how many have it open
	quiet     chan struct{} // closed when there are none any more; nil if nobody waits for that
	written   int64
	complete  bool // the publisher's body has ended well
	manifest  *aci.Manifest
	err       error // the bad verdict
	committed cache.Record
}

// claim registers a ref with the download of an image, and reports whether the caller has to start it. A download is shared by all refs
// for which the publisher gave the same signature: that means the same bytes. An unsigned image is shared by its URL.
func (f *Fetcher) claim(fl *flight, policy Policy, source, signatureURL string, signature []byte, later bool) (d *download, mine bool, err error) {
	ref, name := fl.ref, fl.ref.Name()
	key := name + " " + source
	if signature != nil {
		key = signedKey(name, sha256.Sum256(signature))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, false, errClosed
	}
	if d, ok := f.downloads[key]; ok && d.add(ref) {
		return d, false, nil
	}
	d = &download{
		f: f, key: key, name: name, client: fl.client, basis: fl.basis, policy: policy, source: source, endpoints: fl.endpointsFrom(source),
		signatureURL: signatureURL, signature: signature, later: later, size: -1,
		begun: make(chan struct{}), decided: make(chan struct{}), finished: make(chan struct{}), changed: make(chan struct{}),
		refs: map[acproxy.Ref]struct{}{ref: {}},
	}
	d.ctx, d.cancel = context.WithCancel(tracing.Carry(f.ctx, fl.ctx))
	d.urgent = make(chan struct{})
	d.hurry = sync.OnceFunc(func() { close(d.urgent) })
	if signature == nil || policy.Delivery == VerifyFirst {
		d.hurry()
	}
	f.downloads[key] = d
	return d, true, nil
}

// signedKey returns the key of the download of a signed image.
func signedKey(name string, signature acproxy.Digest) string { return name + " " + signature.Hex() }

// add lets another ref wait for the download. It reports false if the verdict is there already, or is sure to be bad for the refs that wait and
// might be good for this one.
func (d *download) add(ref acproxy.Ref) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.decided:
		return false
	default:
	}
	if d.doomed {
		return false
	}
	d.refs[ref] = struct{}{}
	return true
}

// wait returns when the publisher's headers are in, or with the error that the download ended with before that.
func (d *download) wait(ctx context.Context) error {
	select {
	case <-d.begun:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if d.partial != nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

func (d *download) isLater() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.later
}

// begin sets the download going: with the publisher's body, which goes on where the partial file ends, of size bytes in all, -1 if nobody has said.
// Without a body all of it is there. It runs on after begin has returned, until the verdict.
func (d *download) begin(partial *cache.Partial, body io.ReadCloser, size int64, said map[string]string) error {
	d.size, d.etag, d.validators, d.written = size, said["ETag"], said, partial.Size()
	if t, err := http.ParseTime(said["Last-Modified"]); err == nil {
		d.modified = t
	}
	d.settleModified()
	d.partial = partial
	// Ends with the publisher's body, the stall timeout or the Fetcher; Close waits for it.
	if !d.f.start(func(context.Context) { d.run(body) }) {
		d.partial = nil
		if body != nil {
			_ = body.Close()
		}
		return errors.Join(errClosed, partial.Suspend())
	}
	close(d.begun)
	return nil
}

// settleModified decides the Last-Modified that nodes see: the publisher's, else the time of the signature, which is as stable. Under a ref that
// answered with other bytes before it never goes back.
func (d *download) settleModified() {
	if d.modified.IsZero() && d.signature != nil {
		if a, err := d.f.judge(d.f.cfg.Keyring(), d.name, d.signature, nil); err == nil && len(a.Signers) > 0 {
			d.modified = a.Signers[0].Signed
		}
	}
	if d.modified.IsZero() {
		d.modified = d.f.now()
	}
	d.modified = d.modified.UTC().Truncate(time.Second)
	d.mu.Lock()
	refs := make([]acproxy.Ref, 0, len(d.refs))
	for ref := range d.refs {
		refs = append(refs, ref)
	}
	d.mu.Unlock()
	for _, ref := range refs {
		if before, _, err := d.f.cfg.Store.Resolve(d.ctx, ref); err == nil && !d.modified.After(before.Modified) {
			d.modified = before.Modified.Add(time.Second)
		}
	}
}

// end gives a download that has not begun, or has failed, its bad verdict.
func (d *download) end(err error) {
	d.f.mu.Lock()
	if d.f.downloads[d.key] == d {
		delete(d.f.downloads, d.key)
	}
	d.f.mu.Unlock()
	d.cancel()
	d.mu.Lock()
	d.err = err
	close(d.changed)
	d.changed = make(chan struct{})
	close(d.decided)
	d.mu.Unlock()
	if d.partial == nil {
		close(d.begun)
	}
}

// run takes the body to the verdict and, behind it, the inspection to its end.
func (d *download) run(body io.ReadCloser) {
	defer close(d.finished)
	defer d.cancel()
	started := d.f.now()
	inspection := d.inspect()
	rec, err := d.verdict(body, inspection)
	if err != nil {
		err = d.pieces(d.reason(err, inspection))
	}
	if landed := d.f.cfg.Landed; landed != nil {
		landed(d.f.now().Sub(started), err)
	}
	if err != nil {
		d.fail(err)
		<-inspection.done
		return
	}
	d.succeed(rec)
	d.tell(rec, d.f.now().Sub(started))
	<-inspection.done
	if !rec.Inspected {
		result, err := inspection.result, inspection.err
		if err != nil && !isViolation(err) && d.f.ctx.Err() == nil {
			// That says nothing of the image, which could break a rule all the same: it is read once more, from the store.
			result, err = d.f.inspectHeld(d.f.ctx, rec)
		}
		d.f.inspected(rec, result, err)
	}
}

// tell logs and audits that an image was accepted.
func (d *download) tell(rec cache.Record, took time.Duration) {
	said := decision(EventAccepted, rec)
	said.Client = d.client
	said.Outcome = trust.Accepted.String()
	if !rec.Signed {
		said.Outcome = trust.Unsigned.String()
	}
	log := withTrace(d.ctx, d.f.log).With("ref", said.Ref, "digest", rec.Digest, "bytes", rec.Size, "signers", said.Signers, "source", d.source, "took", took)
	if rec.RktWarning != "" {
		log.Warn("image kept, but rkt nodes will refuse it", "why", rec.RktWarning)
	} else {
		log.Info("image kept")
	}
	d.f.decided(said)
}

// pieces returns what a bad verdict means for bytes that came with several answers: that they don't belong together is as likely as that the image is
// bad, so nothing is said about the image.
func (d *download) pieces(err error) error {
	if !d.pieced || !contentRefused(err) || acproxy.Code(err) == codeTooLarge {
		return err
	}
	return &acproxy.Error{
		Kind: acproxy.ErrPublisher, Code: "pieces-dont-fit", RetryAfter: time.Second,
		Detail: fmt.Sprintf("%s came in several pieces, which don't make an acceptable image together (%v); they are dropped, and asking again fetches it whole", d.source, err),
	}
}

func (d *download) fail(err error) {
	end := d.partial.Discard
	if interrupted(err) || d.f.ctx.Err() != nil {
		end = d.partial.Suspend
	}
	if ended := end(); ended != nil {
		d.f.log.Error("ending a partial file", "err", ended)
	}
	for _, ref := range d.waiting() {
		withTrace(d.ctx, d.f.log).Warn("image not kept", "ref", ref, "source", d.source, "err", err)
		if d.f.ctx.Err() != nil {
			continue
		}
		// What is held for the ref, if anything, is answered with in the meantime. What somebody has brought says nothing about the publisher.
		if d.carried == nil {
			d.f.pause(ref)
		}
		if errors.Is(err, acproxy.ErrRefused) || errors.Is(err, acproxy.ErrPublisher) {
			d.f.recordRefusal(ref, d.client, d.source, err)
			if contentRefused(err) && d.carried == nil {
				d.f.rememberFailure(d.basis, ref, err)
			}
		}
	}
	d.end(err)
}

// contentRefused reports whether an error is about the bytes themselves, so that fetching them again at once would end the same.
func contentRefused(err error) bool {
	var refusal *trust.Refusal
	var violation *aci.Violation
	switch code := acproxy.Code(err); code {
	case "wrong-name", "wrong-labels", codeTooLarge, codeChanged, codeQuarantined:
		return true
	}
	return errors.As(err, &refusal) || errors.As(err, &violation)
}

func (d *download) succeed(rec cache.Record) {
	d.f.mu.Lock()
	if d.f.downloads[d.key] == d {
		delete(d.f.downloads, d.key)
	}
	d.f.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.committed = rec
	close(d.changed)
	d.changed = make(chan struct{})
	close(d.decided)
}

// outcome returns the verdict of a download that is decided.
func (d *download) outcome() (cache.Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.committed, d.err
}

func (d *download) waiting() []acproxy.Ref {
	d.mu.Lock()
	defer d.mu.Unlock()
	refs := make([]acproxy.Ref, 0, len(d.refs))
	for ref := range d.refs {
		refs = append(refs, ref)
	}
	return refs
}

// verdict reads the body and returns the committed record, or what is wrong with the image.
func (d *download) verdict(body io.ReadCloser, inspection *inspection) (cache.Record, error) {
	hasher, err := d.newHasher()
	if err != nil {
		return cache.Record{}, err
	}
	_, span := tracing.Start(d.ctx, "image")
	digest, err := d.receive(body, hasher)
	span.Count("acproxy.bytes", d.received())
	span.End(err)
	if err != nil {
		return cache.Record{}, err
	}
	rec, manifest, err := d.verified(digest, hasher, inspection)
	if err != nil {
		return cache.Record{}, err
	}
	_, span = tracing.Start(d.ctx, "commit")
	rec, err = d.commit(rec, manifest)
	span.End(err)
	return rec, err
}

// received returns how many bytes have come.
func (d *download) received() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.written
}

// verified returns the record of an image that has arrived, or what is wrong with it.
func (d *download) verified(digest acproxy.Digest, hasher *trust.Hasher, inspection *inspection) (rec cache.Record, manifest aci.Manifest, err error) {
	_, span := tracing.Start(d.ctx, "verify")
	defer func() { span.End(err) }()
	wrong := func(err error) (cache.Record, aci.Manifest, error) { return cache.Record{}, aci.Manifest{}, err }
	d.update(func() { d.complete = true })
	if err := d.asSaid(digest); err != nil {
		return wrong(err)
	}
	if d.isLater() {
		if hasher, err = d.lateSignature(); err != nil {
			return wrong(err)
		}
	}
	var hashed trust.Hashed
	if hasher != nil {
		if hashed, err = hasher.Hashed(); err != nil {
			return wrong(err)
		}
	}
	acceptance, err := d.f.judge(d.f.cfg.Keyring(), d.name, d.signature, hashed)
	if err != nil {
		return wrong(err)
	}
	manifest, err = inspection.awaitManifest(d.ctx)
	if err != nil {
		return wrong(err)
	}
	rec = d.record(digest, manifest, acceptance, hashed)
	if d.signature == nil || d.policy.Delivery == VerifyFirst {
		if err := inspection.await(d.ctx); err != nil {
			return wrong(err)
		}
	}
	if err := d.checkChange(rec, inspection); err != nil {
		return wrong(err)
	}
	if inspection.over() {
		if inspection.err != nil {
			return wrong(inspection.err)
		}
		if err := d.identifiedAsSaid(inspection.result); err != nil {
			return wrong(err)
		}
		describe(&rec, inspection.result)
	}
	if err := d.checkHeld(rec); err != nil {
		return wrong(err)
	}
	return rec, manifest, nil
}

// checkHeld refuses bytes that are held already and quarantined: they came again by another way, and are not going to be served by that.
func (d *download) checkHeld(rec cache.Record) error {
	if barred, ok := d.f.barred.Load(rec.Digest); ok && !rec.Inspected {
		return quarantined(barred.(cache.Record))
	}
	held, err := d.f.cfg.Store.Record(rec.Digest)
	if err != nil || rec.Inspected || !held.Quarantined() || held.Lost() {
		return nil
	}
	return quarantined(held)
}

// newHasher returns what computes the hashes that the signature needs, nil if there is no signature (yet).
func (d *download) newHasher() (*trust.Hasher, error) {
	if d.signature == nil {
		return nil, nil
	}
	return trust.NewHasher(d.signature)
}

// update changes what followers look at, and wakes them.
func (d *download) update(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	close(d.changed)
	d.changed = make(chan struct{})
}

// lateSignature asks again for a signature that the publisher answered with 202, and hashes what was received for it. This is the one case in
// which the bytes are read a second time: which hashes are needed wasn't known the first time.
func (d *download) lateSignature() (*trust.Hasher, error) {
	signature, err := d.f.awaitSignature(d.ctx, d.name, d.signatureURL, d.policy)
	if err != nil {
		return nil, err
	}
	d.update(func() { d.signature = signature; d.later = false })
	if signature == nil {
		return nil, nil
	}
	hasher, err := trust.NewHasher(signature)
	if err != nil {
		return nil, err
	}
	file, err := d.partial.Open()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if _, err := io.Copy(hasher, file); err != nil {
		return nil, fmt.Errorf("hashing %s again: %w", d.source, err)
	}
	return hasher, nil
}

func (d *download) record(digest acproxy.Digest, manifest aci.Manifest, acceptance trust.Acceptance, hashed trust.Hashed) cache.Record {
	now := d.f.now()
	rec := cache.Record{
		Digest: digest, Name: manifest.Name, Labels: manifest.Labels, Size: d.written, Source: d.source, Modified: d.modified, ETag: d.etag,
		Fetched: now, Verified: now, Used: now, Policy: policyText(d.f.policy(d.name).Trust), Hashed: cache.HashesOf(hashed), RktWarning: acceptance.RktWarning,
	}
	if d.signature != nil {
		rec.Signed, rec.SignatureDigest = true, sha256.Sum256(d.signature)
	}
	rec.Pinned = d.carried != nil && d.carried.Pin
	for _, s := range acceptance.Signers {
		rec.Signers = append(rec.Signers, cache.Signer{
			Fingerprint: string(s.Fingerprint), KeyID: s.KeyID, UserID: s.UserID, Prefix: s.Prefix, Signed: s.Signed, Algorithm: s.Algorithm,
		})
	}
	for _, dep := range manifest.Dependencies {
		rec.Dependencies = append(rec.Dependencies, cache.Dependency{Name: dep.Name, Labels: dep.Labels, ImageID: dep.ImageID, Size: dep.Size})
	}
	return rec
}

// describe adds what a finished inspection found out.
func describe(rec *cache.Record, found aci.Inspection) {
	rec.Inspected, rec.ImageID, rec.Compression, rec.Uncompressed = true, found.ID, string(found.Compression), found.Size
}

// checkChange asks whether the version of this image is held already as another image.
func (d *download) checkChange(rec cache.Record, inspection *inspection) error {
	full, err := acproxy.NewRef(rec.Name, rec.Labels)
	if err != nil {
		return nil
	}
	return d.f.checkVersion(d.ctx, candidate{
		ref: full, digest: rec.Digest, source: d.source, onChange: d.policy.OnChange, published: d.carried != nil && d.carried.published,
		identify: func() (acproxy.ImageID, error) {
			d.hurry()
			err := inspection.await(d.ctx)
			return inspection.result.ID, err
		},
	})
}

// commit makes the image one that is held, under every ref that waits for it and fits it, and under the ref of all its labels.
func (d *download) commit(rec cache.Record, manifest aci.Manifest) (cache.Record, error) {
	refs := make(map[acproxy.Ref]struct{})
	for _, ref := range d.waiting() {
		if ref.Matches(rec.Name, rec.Labels) == nil {
			refs[ref] = struct{}{}
		}
	}
	if full, err := acproxy.NewRef(rec.Name, rec.Labels); err == nil && full.Version() != "" {
		refs[full] = struct{}{}
	}
	var resolutions []cache.Resolution
	for ref := range refs {
		r := d.f.resolution(d.ctx, ref, rec, d.source)
		if d.signature == nil {
			r.Validators = cache.ValidatorsOf(d.validators)
		}
		resolutions = append(resolutions, r)
	}
	if err := d.partial.Commit(d.ctx, rec, manifest.Raw, d.signature, resolutions...); err != nil {
		return cache.Record{}, fmt.Errorf("committing %s: %w", rec.Name, err)
	}
	return rec, nil
}

// An inspection reads a download behind the publisher: the manifest as soon as it appears, then the rest of the tar, at the pace of inflating.
type inspection struct {
	manifested chan struct{} // closed when manifest is set
	manifest   aci.Manifest
	done       chan struct{} // closed when result and err are set
	result     aci.Inspection
	err        error
}

// inspect begins the inspection of a download. It ends with the download's bytes or its failure.
func (d *download) inspect() *inspection {
	in := &inspection{manifested: make(chan struct{}), done: make(chan struct{})}
	file, err := d.partial.Open()
	if err != nil {
		in.err = err
		close(in.done)
		d.spoil()
		return in
	}
	var once sync.Once
	// Ends when the download is complete and read, or has failed; run waits for it.
	go func() {
		defer close(in.done)
		defer file.Close()
		source := &follower{d: d, file: file}
		in.result, in.err = aci.Inspect(source, d.f.cfg.Limits, func(m aci.Manifest) error {
			err := d.checkManifest(m)
			source.idle = err == nil
			once.Do(func() {
				if err == nil {
					in.manifest = m
					close(in.manifested)
				}
			})
			return err
		})
		if in.err != nil {
			// Whatever is wrong with the image won't get better by receiving more of it.
			d.spoil()
		}
	}()
	return in
}

// spoil ends the receiving of an image whose inspection failed, as long as there is something to be received. Once all of it has come the signature is asked
// as well, and what it says goes first: that bytes are broken is no wonder if they are others than those that were signed.
func (d *download) spoil() {
	if d.carried != nil {
		// Whether it was damaged on the way shows at its end.
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if all := d.size >= 0 && d.written >= d.size; !d.complete && !all {
		d.cancel()
	}
}

// checkManifest holds the manifest against what was asked for. It is an error if it fits none of the refs that wait.
func (d *download) checkManifest(m aci.Manifest) error {
	var first error
	d.update(func() {
		d.manifest = &m
		for ref := range d.refs {
			err := ref.Matches(m.Name, m.Labels)
			if err == nil {
				first = nil
				return
			}
			first = err
		}
		d.doomed = first != nil
	})
	if first == nil && d.carried != nil {
		return d.carried.exactly(m)
	}
	return first
}

// reason returns why there is a bad verdict: because of what the inspection found, if that is what stopped the rest, else err.
func (d *download) reason(err error, in *inspection) error {
	if d.ctx.Err() == nil || !errors.Is(err, context.Canceled) {
		return err
	}
	// It ends with the same context, if it hasn't.
	<-in.done
	if in.err != nil && !errors.Is(in.err, context.Canceled) {
		return in.err
	}
	return err
}

func (in *inspection) awaitManifest(ctx context.Context) (aci.Manifest, error) {
	select {
	case <-in.manifested:
		return in.manifest, nil
	case <-in.done:
	case <-ctx.Done():
		return aci.Manifest{}, context.Cause(ctx)
	}
	select {
	case <-in.manifested:
		return in.manifest, nil
	default:
		return aci.Manifest{}, in.err
	}
}

func (in *inspection) await(ctx context.Context) error {
	select {
	case <-in.done:
		return in.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (in *inspection) over() bool {
	select {
	case <-in.done:
		return true
	default:
		return false
	}
}

// inspected notes how the inspection of an image that is held already ended.
func (f *Fetcher) inspected(rec cache.Record, result aci.Inspection, err error) {
	switch {
	case err == nil:
		describe(&rec, result)
		f.decided(decision(EventInspected, rec))
		err = f.cfg.Store.Update(f.ctx, rec.Digest, func(r *cache.Record) error {
			describe(r, result)
			return nil
		})
		if err != nil {
			f.owe(rec, "noting the inspection of an image", err)
		}
	case isViolation(err):
		f.log.Error("a signed image breaks the rules: quarantined", "name", rec.Name, "digest", rec.Digest, "err", err)
		said := decision(EventQuarantined, rec)
		said.Outcome, said.Detail = acproxy.Code(err), err.Error()
		// Noted here first: a disk that can't note it must not have it served, nor while it is told.
		rec.State, rec.Code, rec.Reason = cache.Quarantined, acproxy.Code(err), err.Error()
		f.barred.Store(rec.Digest, rec)
		f.bars.Add(1)
		f.decided(said)
		if err := f.cfg.Store.Quarantine(f.ctx, rec.Digest, rec.Code, rec.Reason); err != nil {
			f.log.Error("quarantining an image: it is not served as long as this process lives", "name", rec.Name, "digest", rec.Digest, "err", err)
			return
		}
		f.barred.Delete(rec.Digest)
	case f.ctx.Err() == nil:
		f.owe(rec, "inspecting an image", err)
	}
}

// owe notes that the inspection of an image is still to be done, unless the image is gone. The next start would do it, too.
func (f *Fetcher) owe(rec cache.Record, doing string, err error) {
	if errors.Is(err, acproxy.ErrNotFound) {
		return
	}
	f.log.Error(doing+": it is inspected again later", "name", rec.Name, "digest", rec.Digest, "err", err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owed[rec.Digest] = true
}

// InspectAgain inspects, one after the other, the images whose inspection went wrong for a reason that says nothing of them, or could not be noted.
func (f *Fetcher) InspectAgain(ctx context.Context) {
	f.mu.Lock()
	owed := f.owed
	f.owed = make(map[acproxy.Digest]bool)
	f.mu.Unlock()
	for digest := range owed {
		rec, err := f.cfg.Store.Record(digest)
		switch {
		case ctx.Err() != nil:
			return // the next start sees to it
		case errors.Is(err, acproxy.ErrNotFound), err == nil && (rec.Inspected || rec.Quarantined()):
		case err == nil:
			result, err := f.inspectHeld(ctx, rec)
			if ctx.Err() == nil {
				f.inspected(rec, result, err)
			}
		default:
			f.owe(cache.Record{Digest: digest}, "looking up an image that is to be inspected", err)
		}
	}
}

func isViolation(err error) bool {
	var v *aci.Violation
	return errors.As(err, &v)
}

// ResumeInspections inspects, one after the other, the images whose inspection a restart interrupted. It returns when ctx is done or all are
// inspected.
func (f *Fetcher) ResumeInspections(ctx context.Context) error {
	records, err := f.cfg.Store.Uninspected()
	if err != nil {
		return err
	}
	for _, rec := range records {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		result, err := f.inspectHeld(ctx, rec)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f.inspected(rec, result, err)
	}
	return nil
}

func (f *Fetcher) inspectHeld(ctx context.Context, rec cache.Record) (aci.Inspection, error) {
	file, err := f.cfg.Store.OpenBlob(rec.Digest)
	if err != nil {
		return aci.Inspection{}, err
	}
	defer file.Close()
	return aci.Inspect(&cancelReader{ctx: ctx, r: file.File}, f.cfg.Limits, func(aci.Manifest) error { return nil })
}

// cancelReader ends reading when its context does.
type cancelReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancelReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
