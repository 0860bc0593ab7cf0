package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/tracing"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

// A flight is the asking of a publisher for one ref, on behalf of everybody who wants it. It belongs to the Fetcher, not to the client that
// started it. It has landed, for those who wait, as soon as it is known where the image is: held already, or arriving as a download. It stays
// registered until the download has ended, so that a ref is never asked for twice at once.
type flight struct {
	ref    acproxy.Ref
	have   acproxy.Digest // what is held for the ref and being refreshed; zero if nothing is
	client string         // who asked first
	began  time.Time
	asking atomic.Bool     // its turn has come
	ctx    context.Context // with the trace of who asked first
	span   *tracing.Span
	// basis is what decisions rested on at the beginning.
	basis basis
	// endpoints are the URLs that the publisher's templates give for the image, in its order.
	endpoints []string
	// kept returns when what discovery found for this flight is kept; nil if it asked nobody.
	kept func()

	landed chan struct{} // closed once the fields below are set
	// download is nil if the image turned out to be held.
	download *download
	shared   bool             // another ref's flight started the download
	before   cache.Resolution // what the ref answered when the flight began; zero if nothing
	err      error
}

// settle waits for what the flight does beside the asking: what comes after its end finds it done.
func (fl *flight) settle() {
	if fl.kept != nil {
		fl.kept()
	}
}

// arriving returns the answer for somebody who waited for a flight that landed with a download.
func (fl *flight) arriving(joined bool) answer {
	a := answer{status: Miss, download: fl.download, modified: laterThan(fl.before, fl.download.modified)}
	if joined || fl.shared {
		a.status = Joined
	}
	return a
}

// laterThan returns the modification time of other bytes than those that a ref answered before: it never goes back under the same ref, because
// rkt takes other bytes under the same URL only with a later one.
func laterThan(before cache.Resolution, modified time.Time) time.Time {
	if !before.Modified.IsZero() && !modified.After(before.Modified) {
		return before.Modified.Add(time.Second)
	}
	return modified
}

// wait returns when the flight has landed, with its error, or when ctx is done.
func (fl *flight) wait(ctx context.Context) error {
	select {
	case <-fl.landed:
		return fl.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// endpointsFrom returns the endpoints, the given one first.
func (fl *flight) endpointsFrom(source string) []string {
	endpoints := []string{source}
	for _, e := range fl.endpoints {
		if !slices.Contains(endpoints, e) {
			endpoints = append(endpoints, e)
		}
	}
	return endpoints
}

// over reports whether a flight has nothing left to give but what is held already, although it may not have been forgotten yet.
func (fl *flight) over() bool { return fl.pending() == nil }

// pending returns what is closed when the flight gets further, nil if it is over.
func (fl *flight) pending() <-chan struct{} {
	select {
	case <-fl.landed:
	default:
		return fl.landed
	}
	if fl.download == nil {
		return nil
	}
	select {
	case <-fl.download.decided:
		return nil
	default:
		return fl.download.decided
	}
}

// join returns the flight for a ref, started now if there was none.
func (f *Fetcher) join(ctx context.Context, req Request, have acproxy.Digest) (fl *flight, joined bool) {
	ref, on := req.Ref, f.basis()
	f.mu.Lock()
	if fl, ok := f.flights[ref]; ok && !fl.over() {
		f.mu.Unlock()
		tracing.Meet(ctx, fl.ctx)
		return fl, true
	}
	fl = &flight{ref: ref, have: have, client: req.Client, began: f.now(), basis: on, landed: make(chan struct{})}
	fl.ctx, fl.span = tracing.Start(tracing.Carry(f.ctx, ctx), "flight", "acproxy.name", ref.Name(), "server.address", ref.Host())
	f.flights[ref] = fl
	f.mu.Unlock()
	// Ends when the flight does; Close cancels it and waits for it.
	if !f.start(func(context.Context) { f.fly(fl.ctx, fl) }) {
		f.forgetFlight(fl)
		fl.err = errClosed
		fl.span.End(errClosed)
		close(fl.landed)
	}
	return fl, false
}

var errClosed = &acproxy.Error{Kind: acproxy.ErrBusy, Code: "shutting-down", Detail: "this proxy is shutting down"}

// fly runs a flight to its end.
func (f *Fetcher) fly(ctx context.Context, fl *flight) {
	var trace acproxy.Trace
	_, queued := tracing.Start(ctx, "queue")
	leave, err := f.queue.Enter(ctx, fl.client, fl.ref.Host())
	queued.End(err)
	if err == nil {
		// Whose bytes come with another flight needs no place of its own.
		leave = sync.OnceFunc(leave)
		defer leave()
		fl.asking.Store(true)
		fl.download, err = f.locate(ctx, fl, &trace)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errClosed
		}
		fl.err = traced(err, trace)
		f.landedBadly(ctx, fl, fl.err)
	}
	if fl.download == nil {
		fl.settle()
		fl.span.End(fl.err)
		f.forgetFlight(fl)
		if leave != nil {
			// Before anybody is told: for what the store had no room for, who waited needs a place of its own next.
			leave()
		}
		close(fl.landed)
		return
	}
	close(fl.landed)
	if fl.shared {
		leave()
	}
	<-fl.download.decided
	fl.settle()
	f.catchUp(ctx, fl)
	_, failed := fl.download.outcome()
	if failed == nil {
		// Now its labels are known to be those of an image, and nothing else that somebody wrote into a URL.
		fl.span.Note("acproxy.ref", fl.ref.String())
	}
	fl.span.End(failed)
	f.forgetFlight(fl)
}

// catchUp lets the image that a flight's download brought answer its ref too, if it joined the download when the refs to commit were counted
// already.
func (f *Fetcher) catchUp(ctx context.Context, fl *flight) {
	rec, err := fl.download.outcome()
	if err != nil {
		return
	}
	if resolved, _, err := f.cfg.Store.Resolve(ctx, fl.ref); err == nil && resolved.Digest == rec.Digest {
		return
	}
	if err := f.alsoAnswers(ctx, fl.ref, rec.Digest, fl.download.source); err != nil && ctx.Err() == nil {
		f.landedBadly(ctx, fl, err)
	}
}

// withTrace returns a log whose lines say which trace they belong to.
func withTrace(ctx context.Context, log *slog.Logger) *slog.Logger {
	if id := tracing.ID(ctx); id != "" {
		return log.With("trace_id", id)
	}
	return log
}

func (f *Fetcher) forgetFlight(fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.flights[fl.ref] == fl {
		delete(f.flights, fl.ref)
	}
}

// landedBadly records what a failed flight means for what is held and for those who ask next.
func (f *Fetcher) landedBadly(ctx context.Context, fl *flight, err error) {
	switch {
	case ctx.Err() != nil:
		return
	case !fl.have.IsZero():
		f.pause(fl.ref)
		if errors.Is(err, acproxy.ErrNotFound) {
			f.markGone(fl.ref)
		}
		withTrace(ctx, f.log).Warn("refresh failed, what is held is still served", "ref", fl.ref, "err", err)
	case errors.Is(err, acproxy.ErrNotFound) && cacheableAbsence(err):
		f.rememberFailure(fl.basis, fl.ref, err)
	}
	if errors.Is(err, acproxy.ErrRefused) || contentRefused(err) {
		f.recordRefusal(fl.ref, fl.client, "", err)
		f.rememberFailure(fl.basis, fl.ref, err)
	}
}

// cacheableAbsence reports whether "not found" was said by the publisher plainly, and by nobody who may have meant something else: a 401 or a
// 403 may be about credentials that change.
func cacheableAbsence(err error) bool {
	var e *acproxy.Error
	if !errors.As(err, &e) {
		return true
	}
	for _, a := range e.Trace {
		switch a.Status {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
			return false
		}
	}
	return true
}

// locate finds out where the image is, asking the publisher's endpoints in order until one answers. It returns nil if the image is held under
// another ref already, or is still the one that was held.
func (f *Fetcher) locate(ctx context.Context, fl *flight, trace *acproxy.Trace) (*download, error) {
	before, rec, err := f.cfg.Store.Resolve(ctx, fl.ref)
	if err == nil {
		fl.before = before
		// It may have been committed between the caller's look at the store and the flight's beginning.
		if fl.have.IsZero() && f.acceptable(rec) == nil {
			return nil, nil
		}
	}
	discovering, span := tracing.Start(ctx, "discovery")
	found, kept, err := f.templates(discovering, fl.ref.Name(), trace)
	span.End(err)
	fl.kept = kept
	if err != nil {
		return nil, err
	}
	for _, template := range found {
		if url, err := template.Expand(fl.ref, "aci"); err == nil {
			fl.endpoints = append(fl.endpoints, url)
		}
	}
	var first error
	for _, template := range found {
		d, err := f.locateAt(ctx, fl, template, trace)
		switch {
		case err == nil:
			return d, nil
		case conclusive(err) || ctx.Err() != nil:
			return nil, err
		case first == nil || errors.Is(first, acproxy.ErrNotFound):
			// Of several endpoints, one that could not answer says more than one that hasn't got the image.
			first = err
		}
	}
	if first == nil {
		first = &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: "no-template",
			Detail: fmt.Sprintf("none of the publisher's %d templates can be filled in with the labels of %v", len(found), fl.ref),
		}
	}
	return nil, first
}

// conclusive reports whether the other endpoints aren't asked after an error: they could only hide what this one showed, or there is no room for
// what they have. An endpoint that has no signature, or that the dial rules forbid, has shown nothing.
func conclusive(err error) bool {
	var refusal *trust.Refusal
	return errors.As(err, &refusal) && refusal.Outcome != trust.Unsigned || acproxy.Code(err) == codeTooLarge || errors.Is(err, acproxy.ErrNoSpace)
}

// locateAt asks one endpoint for the signature and, if that is acceptable and new, for the image.
func (f *Fetcher) locateAt(ctx context.Context, fl *flight, template discovery.Template, trace *acproxy.Trace) (*download, error) {
	imageURL, err := template.Expand(fl.ref, "aci")
	if err == nil {
		var signatureURL string
		if signatureURL, err = template.Expand(fl.ref, "aci.asc"); err == nil {
			return f.locateURL(ctx, fl, imageURL, signatureURL, trace)
		}
	}
	*trace = append(*trace, acproxy.Attempt{What: "image", URL: template.URL, Note: "template not usable", Err: err.Error()})
	// Not as its cause: who asked said nothing wrong, and the error would be of two kinds.
	return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: err.Error()}
}

func (f *Fetcher) locateURL(ctx context.Context, fl *flight, imageURL, signatureURL string, trace *acproxy.Trace) (*download, error) {
	name, policy := fl.ref.Name(), f.policy(fl.ref.Name())
	getting, span := tracing.Start(ctx, "signature")
	signature, later, err := f.getSignature(getting, name, signatureURL, policy, trace)
	span.End(err)
	if acproxy.Code(err) == codeNoSignature {
		return nil, f.unsigned(ctx, name, imageURL, trace, err)
	}
	if err != nil {
		return nil, err
	}
	if !later {
		if _, err := f.cfg.Keyring().Judge(trust.Question{Name: name, Signature: signature, Policy: policy.Trust, Now: f.now()}); err != nil {
			return nil, err
		}
	}
	if digest, ok := f.heldBySignature(signature); ok {
		return nil, f.alsoAnswers(ctx, fl.ref, digest, imageURL)
	}
	for {
		d, mine, err := f.claim(fl, policy, imageURL, signatureURL, signature, later)
		if err != nil {
			return nil, err
		}
		if mine {
			f.begin(fl, d, trace)
		} else {
			tracing.Meet(ctx, d.ctx)
		}
		switch err := d.wait(ctx); {
		case err == nil:
			fl.shared = !mine
			return d, nil
		case errors.Is(err, errHeld):
			return nil, f.alsoAnswers(ctx, fl.ref, d.held, imageURL)
		case mine || d.source == imageURL || ctx.Err() != nil:
			return nil, err
		}
		// Another ref's URL didn't have the image. This one's may.
	}
}

// begin sets a download going, or ends it with the reason why not.
func (f *Fetcher) begin(fl *flight, d *download, trace *acproxy.Trace) {
	// Another download of the same image may have ended between the look at the store and the claim.
	if digest, ok := f.heldBySignature(d.signature); ok {
		d.held = digest
		d.end(errHeld)
		return
	}
	// Or have been refused since this one's flight began, which nothing was remembered for then.
	if err, ok := recall[error](f.negative, negativeKey(fl.basis, fl.ref), f.now()); ok && fl.have.IsZero() && contentRefused(err) {
		d.end(err)
		return
	}
	if err := f.open200(fl, d, trace); err != nil {
		if !errors.Is(err, errHeld) {
			err = traced(err, *trace)
		}
		d.end(err)
	}
}

// errHeld ends a download that turned out not to be needed: the image is held.
var errHeld = errors.New("held already")

// codeNoSignature says that there is no signature where there should be one.
const codeNoSignature = "no-signature-found"

// unsigned tells an image that its publisher hasn't signed from one that it hasn't got, without asking for a byte of it.
func (f *Fetcher) unsigned(ctx context.Context, name, imageURL string, trace *acproxy.Trace, absent error) error {
	status, _, attempts, err := f.cfg.Web.Head(ctx, name, "image", imageURL)
	*trace = append(*trace, attempts...)
	if err != nil || status != http.StatusOK {
		return absent
	}
	_, err = f.judge(f.cfg.Keyring(), name, nil, nil)
	return err
}

// signatureTimeout bounds the receiving of a signature as a whole. The client's own timeouts don't: it may come a byte at a time.
const signatureTimeout = 2 * time.Minute

// getSignature returns the signature at a URL. A publisher that answers 404 has none: that is nil where policy accepts it, and an error
// otherwise. later says that the publisher answered 202: it wants to be asked again after the image.
func (f *Fetcher) getSignature(ctx context.Context, name, url string, policy Policy, trace *acproxy.Trace) (signature []byte, later bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, signatureTimeout, &acproxy.Error{
		Kind: acproxy.ErrTimeout, Code: "publisher-timeout", Detail: fmt.Sprintf("the signature at %s did not arrive within %v", url, signatureTimeout),
	})
	defer cancel()
	resp, attempts, err := f.cfg.Web.Get(ctx, name, "signature", url, nil)
	*trace = append(*trace, attempts...)
	if err != nil {
		return nil, false, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusAccepted:
		return nil, true, nil
	case http.StatusNotFound, http.StatusGone:
		if policy.Trust.Signature == trust.Optional {
			return nil, false, nil
		}
		return nil, false, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: codeNoSignature, Detail: "the publisher has no signature at " + url}
	default:
		return nil, false, badStatus("signature", url, resp)
	}
	signature, err = io.ReadAll(io.LimitReader(resp.Body, f.cfg.MaxSignatureSize+1))
	if err != nil {
		return nil, false, fmt.Errorf("reading the signature at %s: %w", url, err)
	}
	if int64(len(signature)) > f.cfg.MaxSignatureSize {
		return nil, false, &acproxy.Error{
			Kind: acproxy.ErrPublisher, Code: "signature-too-large",
			Detail: fmt.Sprintf("the signature at %s is longer than %d bytes, the limit that fetch.max_signature_size sets", url, f.cfg.MaxSignatureSize),
		}
	}
	return signature, false, nil
}

// heldBySignature returns the image with exactly this signature, if it is held and acceptable. The same signature means the same bytes, so
// nothing more has to be asked for.
func (f *Fetcher) heldBySignature(signature []byte) (acproxy.Digest, bool) {
	if signature == nil {
		return acproxy.Digest{}, false
	}
	digest, ok := f.cfg.Store.BySignature(sha256.Sum256(signature))
	if !ok {
		return acproxy.Digest{}, false
	}
	rec, err := f.cfg.Store.Record(digest)
	return digest, err == nil && f.acceptable(rec) == nil
}

// alsoAnswers lets a held image answer a ref from now on, if it fits it.
func (f *Fetcher) alsoAnswers(ctx context.Context, ref acproxy.Ref, digest acproxy.Digest, source string) error {
	rec, err := f.cfg.Store.Record(digest)
	if err == nil {
		if err := ref.Matches(rec.Name, rec.Labels); err != nil {
			return err
		}
		err = f.cfg.Store.Point(ctx, f.resolution(ctx, ref, rec, source))
	}
	if errors.Is(err, acproxy.ErrNotFound) {
		// Passed on as it is, it would be taken for the publisher's word.
		return &acproxy.Error{Kind: acproxy.ErrBusy, Code: "removed", Detail: "the image of " + ref.String() + " was removed from the store in this moment: ask again", RetryAfter: time.Second}
	}
	return err
}

// resolution returns what a ref answers from now on: an image, with a modification time that never goes back under the same ref, because rkt
// takes other bytes under the same URL only with a later one.
func (f *Fetcher) resolution(ctx context.Context, ref acproxy.Ref, rec cache.Record, source string) cache.Resolution {
	r := cache.Resolution{Ref: ref, Digest: rec.Digest, Source: source, Modified: rec.Modified, Validated: f.now()}
	if before, _, err := f.cfg.Store.Resolve(ctx, ref); err == nil {
		switch {
		case before.Digest == r.Digest:
			r.Modified = before.Modified
			if before.Source == source {
				r.Validators = before.Validators
			}
		default:
			r.Modified = laterThan(before, r.Modified)
		}
	}
	return r
}

func (f *Fetcher) markGone(ref acproxy.Ref) {
	resolved, _, err := f.cfg.Store.Resolve(f.ctx, ref)
	if err != nil {
		return
	}
	if resolved.Gone.IsZero() {
		resolved.Gone = f.now()
	}
	resolved.Validated = f.now()
	if err := f.cfg.Store.Point(f.ctx, resolved); err != nil {
		f.log.Error("marking a ref as gone upstream", "ref", ref, "err", err)
	}
}

// open200 asks for the image, or for the rest of what has arrived of it before, and, if the publisher has it, sets the download going. A held unsigned
// image is asked for conditionally: its validators are all there is to compare.
func (f *Fetcher) open200(fl *flight, d *download, trace *acproxy.Trace) error {
	header := make(http.Header)
	// What another URL said of the image, or what was made of it for the nodes, means nothing here.
	if said := fl.before; !fl.have.IsZero() && said.Digest == fl.have && said.Source == d.source && d.signature == nil && !d.later {
		for field, of := range map[string]string{"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"} {
			if v := said.Validators.Get(of); v != "" {
				header.Set(field, v)
			}
		}
	}
	var resp *http.Response
	partial, err := f.cfg.Store.Resume(d.ctx, d.key)
	switch {
	case err == nil:
		if resp, err = f.takeUp(d, partial, trace); resp == nil {
			return err
		}
	case errors.Is(err, acproxy.ErrNotFound):
		resp, err = f.get(d, header, trace, nil)
	}
	if err != nil {
		return err
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		err = f.checkImageHeader(d.source, resp)
	case resp.StatusCode == http.StatusNotModified && len(header) > 0:
		d.held, err = fl.have, errHeld
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-image-found", Detail: "the publisher has no image at " + d.source}
	default:
		err = badStatus("image", d.source, resp)
	}
	if err == nil {
		partial, err = f.cfg.Store.Begin(d.ctx, cache.Arrival{
			Key: d.key, Ref: fl.ref, Source: d.source, Size: resp.ContentLength, Validators: validators(resp), Began: f.now(),
		})
	}
	if err != nil {
		// What closing a body that nobody reads says is of no interest.
		_ = resp.Body.Close()
		return err
	}
	return d.begin(partial, resp.Body, resp.ContentLength, validators(resp))
}

func (f *Fetcher) checkImageHeader(url string, resp *http.Response) error {
	if coding := resp.Header.Get("Content-Encoding"); coding != "" && coding != "identity" {
		return &acproxy.Error{
			Kind: acproxy.ErrPublisher, Code: "content-encoding",
			Detail: fmt.Sprintf("%s came with Content-Encoding %q, so its signature can't match; the publisher must serve the file as it is", url, coding),
		}
	}
	if resp.ContentLength > f.cfg.MaxImageSize {
		return tooLarge(url, f.cfg.MaxImageSize)
	}
	return nil
}

const codeTooLarge = "image-too-large"

func tooLarge(url string, limit int64) error {
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: codeTooLarge,
		Detail: fmt.Sprintf("%s is larger than %d bytes, the limit that fetch.max_image_size sets", url, limit),
	}
}

func badStatus(what, url string, resp *http.Response) error {
	return &acproxy.Error{
		Kind: acproxy.ErrPublisher, Code: "publisher-status", RetryAfter: web.RetryAfter(resp, time.Now()),
		Detail: fmt.Sprintf("the publisher answered %s for the %s at %s", resp.Status, what, url),
	}
}

// traced returns err with the trace of what was tried, as an *acproxy.Error of the same kind.
func traced(err error, trace acproxy.Trace) error {
	if len(trace) == 0 {
		return err
	}
	out := &acproxy.Error{Kind: acproxy.KindOf(err), Code: acproxy.Code(err), Trace: trace, Err: err}
	var e *acproxy.Error
	if errors.As(err, &e) {
		out.RetryAfter = e.RetryAfter
	}
	return out
}
