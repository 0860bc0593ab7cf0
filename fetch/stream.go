package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/trust"
)

// OnFull says what becomes of an image for which the store has no room.
type OnFull int

const (
	// RefuseFull answers that there is no space.
	RefuseFull OnFull = iota
	// StreamFull passes a signed image on to whoever asks, checked as always, without keeping it: each client costs its publisher a fetch.
	StreamFull
)

// streams reports whether an image that the store had no room for is passed on without being kept. What may not be delivered before it has been checked
// whole can't be.
func (f *Fetcher) streams(name string, err error) bool {
	policy := f.policy(name)
	return errors.Is(err, acproxy.ErrNoSpace) && policy.OnFull == StreamFull && policy.Delivery == CutThrough && !policy.Offline
}

// noRoom is the error for an image that can't be passed on without being kept, because all of it is needed first.
func noRoom(ref acproxy.Ref) error {
	return &acproxy.Error{
		Kind: acproxy.ErrNoSpace, Code: "no-room-to-check", Detail: "there is no room for the image of " + ref.String() + ", and what was asked for needs all of it to be here",
	}
}

// A passage is an image on its way from the publisher to one client, kept nowhere. Its signer is trusted; the rest is checked on the way, and the last
// bytes wait for the verdict.
type passage struct {
	f      *Fetcher
	ref    acproxy.Ref
	policy Policy
	source string
	leave  func() // gives the place in the queue back

	ctx       context.Context
	cancel    context.CancelFunc
	body      io.ReadCloser
	size      int64 // bytes, -1 if the publisher didn't say
	modified  time.Time
	signature []byte
	hasher    *trust.Hasher
	sum       hash.Hash // of the bytes
	to        []io.Writer

	inspecting *io.PipeWriter
	inspected  chan struct{}  // closed when found and wrong are set
	found      aci.Inspection // what the inspection has found
	wrong      error          // why that is bad

	buf  []byte // what has come and not been delivered
	came int64
	done bool // all has come and the verdict is good
	err  error
}

// stream begins to pass an image on, without keeping it, or only gets its signature. The caller closes what it returns.
func (f *Fetcher) stream(ctx context.Context, req Request, onlySignature bool) (*passage, error) {
	leave, err := f.queue.Enter(ctx, req.Client, req.Ref.Host())
	if err != nil {
		return nil, err
	}
	var trace acproxy.Trace
	p, err := f.passage(ctx, req.Ref, onlySignature, &trace)
	if err != nil {
		leave()
		return nil, traced(err, trace)
	}
	p.leave = leave
	return p, nil
}

// passage asks the publisher's endpoints in order.
func (f *Fetcher) passage(ctx context.Context, ref acproxy.Ref, onlySignature bool, trace *acproxy.Trace) (*passage, error) {
	templates, kept, err := f.templates(ctx, ref.Name(), trace)
	defer kept()
	if err != nil {
		return nil, err
	}
	var first error
	for _, template := range templates {
		p, err := f.passageFrom(ctx, ref, template.Expand, onlySignature, trace)
		if err == nil || conclusive(err) || ctx.Err() != nil {
			return p, err
		}
		if first == nil || errors.Is(first, acproxy.ErrNotFound) {
			first = err
		}
	}
	if first == nil {
		first = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: "the publisher of " + ref.Name() + " has no templates"}
	}
	return nil, first
}

func (f *Fetcher) passageFrom(ctx context.Context, ref acproxy.Ref, expand func(acproxy.Ref, string) (string, error), onlySignature bool, trace *acproxy.Trace) (*passage, error) {
	imageURL, err := expand(ref, "aci")
	signatureURL, asErr := expand(ref, "aci.asc")
	if err := errors.Join(err, asErr); err != nil {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-template", Detail: err.Error()}
	}
	name, policy := ref.Name(), f.policy(ref.Name())
	signature, later, err := f.getSignature(ctx, name, signatureURL, policy, trace)
	if err != nil {
		return nil, err
	}
	if later || signature == nil {
		return nil, noRoom(ref)
	}
	if _, err := f.judge(f.cfg.Keyring(), name, signature, nil); err != nil {
		return nil, err
	}
	p := &passage{f: f, ref: ref, policy: policy, source: imageURL, signature: signature, inspected: make(chan struct{})}
	if p.hasher, err = trust.NewHasher(signature); err != nil {
		return nil, err
	}
	p.sum, p.to = hashing(p.hasher)
	p.ctx, p.cancel = context.WithCancel(ctx)
	if onlySignature {
		return p, nil
	}
	resp, attempts, err := f.cfg.Web.Get(p.ctx, name, "image", imageURL, nil)
	*trace = append(*trace, attempts...)
	if err == nil && resp.StatusCode == http.StatusOK {
		err = f.checkImageHeader(imageURL, resp)
	} else if err == nil {
		err = badStatus("image", imageURL, resp)
		if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone {
			err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-image-found", Detail: "the publisher has no image at " + imageURL}
		}
	}
	if err != nil {
		if resp != nil {
			// What closing a body that nobody reads says is of no interest.
			_ = resp.Body.Close()
		}
		p.cancel()
		return nil, err
	}
	p.begin(resp)
	return p, nil
}

func (p *passage) begin(resp *http.Response) {
	p.body, p.size = resp.Body, resp.ContentLength
	if t, err := http.ParseTime(resp.Header.Get("Last-Modified")); err == nil {
		p.modified = t
	}
	if p.modified.IsZero() {
		p.modified = p.f.now().UTC().Truncate(time.Second)
	}
	r, w := io.Pipe()
	p.inspecting = w
	// Ends with the pipe, which close ends at the latest; close waits for it.
	go func() {
		found, err := aci.Inspect(r, p.f.cfg.Limits, func(m aci.Manifest) error { return p.ref.Matches(m.Name, m.Labels) })
		// Whoever writes is told why nobody reads any more.
		_ = r.CloseWithError(errors.Join(err, errInspected))
		p.found, p.wrong = found, err
		close(p.inspected)
	}()
}

// errInspected ends the pipe to an inspection that is over.
var errInspected = errors.New("the inspection is over")

// Read returns bytes that may be delivered. The last ones come after the verdict; if that is bad, its error comes in place of them.
func (p *passage) Read(b []byte) (int, error) {
	for {
		may := int64(len(p.buf))
		if !p.done {
			may -= p.f.cfg.HoldBack
		}
		switch {
		case may > 0:
			n := copy(b, p.buf[:may])
			p.buf = p.buf[n:]
			return n, nil
		case p.done:
			return 0, io.EOF
		case p.err != nil:
			return 0, p.err
		}
		if p.err = p.more(); p.err != nil && p.ctx.Err() == nil {
			p.f.recordRefusal(p.ref, "", p.source, p.err)
		}
	}
}

// more receives some of the body, or comes to the verdict.
func (p *passage) more() error {
	chunk := make([]byte, bufferSize)
	n, err := p.body.Read(chunk)
	p.came += int64(n)
	if p.came > p.f.cfg.MaxImageSize {
		return tooLarge(p.source, p.f.cfg.MaxImageSize)
	}
	for _, hash := range p.to {
		// A hash can't fail (package hash says so).
		_, _ = hash.Write(chunk[:n])
	}
	if _, piped := p.inspecting.Write(chunk[:n]); piped != nil && !errors.Is(piped, errInspected) {
		return piped
	} else if piped != nil {
		if <-p.inspected; p.wrong != nil {
			return p.wrong
		}
	}
	// What is left is moved to the front, so that no more than a chunk and what is held back is in memory.
	p.buf = append(bytes.Clone(p.buf), chunk[:n]...)
	switch {
	case err == io.EOF:
		return p.verdict()
	case err != nil:
		return fmt.Errorf("receiving %s after %d bytes: %w", p.source, p.came, err)
	}
	return nil
}

func (p *passage) verdict() error {
	hashed, err := p.hasher.Hashed()
	if err != nil {
		return err
	}
	acceptance, err := p.f.judge(p.f.cfg.Keyring(), p.ref.Name(), p.signature, hashed)
	if err != nil {
		return err
	}
	// Closing a pipe for writing can't fail.
	_ = p.inspecting.Close()
	if <-p.inspected; p.wrong != nil {
		return p.wrong
	}
	digest := acproxy.Digest(p.sum.Sum(nil))
	if err := p.checkChange(digest); err != nil {
		return err
	}
	p.done = true
	said := Decision{
		Event: EventPassed, Outcome: trust.Accepted.String(), Ref: p.ref, ImageID: p.found.ID, Digest: digest, Source: p.source, RktWarning: acceptance.RktWarning,
	}
	for _, s := range acceptance.Signers {
		said.Signers = append(said.Signers, string(s.Fingerprint))
	}
	p.f.decided(said)
	p.f.log.Warn("an image was passed on and not kept: the store has no room for it", "ref", p.ref, "bytes", p.came, "source", p.source)
	return nil
}

// checkChange asks whether the version of this image is held as another image, as for one that is kept. That these bytes are quarantined need not be asked:
// their inspection has just ended well.
func (p *passage) checkChange(digest acproxy.Digest) error {
	full, err := acproxy.NewRef(p.found.Manifest.Name, p.found.Manifest.Labels)
	if err != nil {
		return nil
	}
	return p.f.checkVersion(p.ctx, candidate{
		ref: full, digest: digest, source: p.source, onChange: p.policy.OnChange,
		identify: func() (acproxy.ImageID, error) { return p.found.ID, nil },
	})
}

func (p *passage) etag() string { return etag(true, sha256.Sum256(p.signature), acproxy.Digest{}) }

// close ends the passage.
func (p *passage) close() error {
	defer p.leave()
	p.cancel()
	if p.body == nil {
		return nil
	}
	_ = p.inspecting.CloseWithError(context.Canceled)
	<-p.inspected
	return p.body.Close()
}
