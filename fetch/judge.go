package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/trust"
)

// judge asks a keyring whether a signature makes an image acceptable at this time, by the policy of this time. Without hashes it answers for the case that the
// bytes match.
func (f *Fetcher) judge(keyring *trust.Keyring, name string, signature []byte, hashed trust.Hashed) (trust.Acceptance, error) {
	return keyring.Judge(trust.Question{Name: name, Signature: signature, Hashed: hashed, Policy: f.policy(name).Trust, Now: f.now()})
}

// judged is a verdict on a held image, and what it holds for.
type judged struct {
	signature acproxy.Digest
	until     time.Time // keys and signatures expire
	err       error
}

const (
	// judgedFor is how long a verdict on a held image is used again while the keys and the policies stay the same.
	judgedFor = time.Minute
	// maxVerdicts bounds the verdicts remembered. They are cheap to make again.
	maxVerdicts = 100_000
)

// verdicts remembers what was decided about held images on one basis.
type verdicts struct {
	mu sync.Mutex
	on basis
	of map[acproxy.Digest]judged
}

func (v *verdicts) get(on basis, rec cache.Record, now time.Time) (judged, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	j, ok := v.of[rec.Digest]
	return j, ok && v.on == on && j.signature == rec.SignatureDigest && now.Before(j.until)
}

func (v *verdicts) put(on basis, digest acproxy.Digest, j judged) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.on != on || v.of == nil || len(v.of) >= maxVerdicts {
		v.on, v.of = on, make(map[acproxy.Digest]judged)
	}
	v.of[digest] = j
}

// Acceptable returns nil if a held image may be served now, by the names that are allowed, the keys and the policies of this moment, else why it may not.
func (f *Fetcher) Acceptable(rec cache.Record) error {
	if err := f.allowed(rec.Name); err != nil {
		return err
	}
	return f.acceptable(rec)
}

// acceptable returns nil if a held image may be served now: it isn't quarantined, and the keys as they are now accept its signature. The bytes
// aren't read for it: the hash states kept in the record are enough.
func (f *Fetcher) acceptable(rec cache.Record) error {
	if rec.Quarantined() {
		return quarantined(rec)
	}
	if barred, ok := f.barred.Load(rec.Digest); ok {
		return quarantined(barred.(cache.Record))
	}
	// One keyring and one policy for all of it: a verdict must not be remembered as if it rested on others.
	keyring, settings, now := f.cfg.Keyring(), f.settings.Load(), f.now()
	on := basis{keyring.ID(), settings.number}
	if v, ok := f.verdicts.get(on, rec, now); ok {
		return v.err
	}
	until, err := f.rejudge(keyring, settings, rec)
	if err != nil && !errors.Is(err, acproxy.ErrRefused) {
		// That it could not be decided is no verdict.
		return err
	}
	if latest := now.Add(judgedFor); until.IsZero() || until.After(latest) {
		until = latest
	}
	f.verdicts.put(on, rec.Digest, judged{signature: rec.SignatureDigest, until: until, err: err})
	return err
}

const (
	codeQuarantined = "quarantined"
	// codeBlobGone is the code of an image whose bytes are lost, the store's too.
	codeBlobGone = "blob-gone"
	// codeChanged is the code of an image that is refused because there was another one under its version.
	codeChanged = "changed-upstream"
)

// quarantined returns why a quarantined image isn't served. One whose bytes are lost counts as not there.
func quarantined(rec cache.Record) error {
	if rec.Lost() {
		return &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: codeBlobGone,
			Detail: fmt.Sprintf("the image of %s with digest %v was held, but %s", rec.Name, rec.Digest, rec.Reason),
		}
	}
	return &acproxy.Error{
		Kind: acproxy.ErrRefused, Code: codeQuarantined,
		Detail: fmt.Sprintf("the image of %s with digest %v is quarantined: %s", rec.Name, rec.Digest, rec.Reason),
	}
}

// distrusted reports whether a held image is not served because of what the keys and the policy say now: that may change, and the publisher may
// have signed it anew since.
func distrusted(err error) bool {
	return errors.Is(err, acproxy.ErrRefused) && acproxy.Code(err) != codeQuarantined
}

// Judged returns a record with the state that the keys and the policy of this moment give it: an image that they don't accept is quarantined, with the
// reason, for as long as they don't.
func (f *Fetcher) Judged(rec cache.Record) cache.Record {
	if rec.Quarantined() {
		return rec
	}
	if err := f.acceptable(rec); err != nil {
		rec.State, rec.Code, rec.Reason = cache.Quarantined, acproxy.Code(err), err.Error()
	}
	return rec
}

// rejudge decides about a held image again and returns until when the decision holds, as far as it depends on time.
func (f *Fetcher) rejudge(keyring *trust.Keyring, settings *settings, rec cache.Record) (until time.Time, err error) {
	var signature []byte
	if rec.Signed {
		if signature, err = f.cfg.Store.Signature(rec.Digest); err != nil {
			return until, fmt.Errorf("reading the signature of %s: %w", rec.Name, err)
		}
		if sha256.Sum256(signature) != rec.SignatureDigest {
			// It was signed anew since the record was read, maybe by another hash.
			if rec, err = f.cfg.Store.Record(rec.Digest); err != nil {
				return until, err
			}
		}
	}
	hashed := trust.Hashed(rec.Hashed.Map())
	if rec.Signed {
		if hashed == nil {
			// Without the hashes Judge would answer for bytes that it can't know to match.
			return until, &acproxy.Error{Kind: acproxy.ErrRefused, Code: "not-verified", Detail: "the record of " + rec.Name + " doesn't say what its signature was checked against"}
		}
	}
	acceptance, err := keyring.Judge(trust.Question{
		Name: rec.Name, Signature: signature, Hashed: hashed, Policy: settings.policy(rec.Name).Trust, Now: f.now(), NoRktWarning: true,
	})
	return acceptance.Until, err
}

// awaitSignature asks for a signature until its publisher has made it.
func (f *Fetcher) awaitSignature(ctx context.Context, name, url string, policy Policy) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, max(f.cfg.SignatureWait, 0), &acproxy.Error{
		Kind: acproxy.ErrTimeout, Code: "signature-not-ready",
		Detail: fmt.Sprintf("the publisher still answers 202 Accepted for %s after %v", url, f.cfg.SignatureWait),
	})
	defer cancel()
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		var trace acproxy.Trace
		signature, later, err := f.getSignature(ctx, name, url, policy, &trace)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			return nil, traced(err, trace)
		case !later:
			return signature, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// recordRefusal keeps the reason why an image was refused for the operator to see.
func (f *Fetcher) recordRefusal(ref acproxy.Ref, client, source string, err error) {
	f.decided(Decision{Event: EventRefused, Ref: ref, Client: client, Source: source, Outcome: acproxy.Code(err), Detail: firstLine(err.Error())})
	refused := cache.Refused{Ref: ref, When: f.now(), Code: acproxy.Code(err), Detail: firstLine(err.Error()), Source: source}
	if err := f.cfg.Store.Refuse(refused); err != nil {
		f.log.Error("recording a refusal", "ref", ref, "err", err)
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
