package fetch

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/trust"
)

// The events that a Decision can be about.
const (
	EventAccepted    = "accepted"    // an image was fetched, verified and kept
	EventInspected   = "inspected"   // a kept image's tar was read to its end: its image ID is known
	EventRefused     = "refused"     // an image was not kept
	EventQuarantined = "quarantined" // a kept image is no longer served
	EventRestored    = "restored"    // a quarantined image is served again
	EventPassed      = "passed"      // an image was verified on its way to a client, and not kept: there was no room for it
	EventEvicted     = "evicted"     // a kept image had to go, for space
	EventPublished   = "published"   // an image was published here by somebody who may, whether it was held already or not
	EventDamaged     = "damaged"     // a kept image's bytes are not what they were; it is fetched again if it can be
)

// A Decision is what was decided about an image, for the audit and the metrics. Fields that don't apply are zero.
type Decision struct {
	Time       time.Time       `json:"time"`
	Event      string          `json:"event"`             // one of the Event constants
	Outcome    string          `json:"outcome,omitempty"` // trust's word for the verdict, or another code for why an image was refused
	Ref        acproxy.Ref     `json:"ref"`               // what was asked for, or the ref of all the image's labels
	ImageID    acproxy.ImageID `json:"imageID"`           // "" while it is not known
	Digest     acproxy.Digest  `json:"digest"`            // "" if the bytes were not received
	Signers    []string        `json:"signers,omitempty"` // fingerprints of the trusted keys that signed
	Policy     string          `json:"policy,omitempty"`  // what the name's prefix asks for
	Client     string          `json:"client,omitempty"`  // who asked; "" if nobody did
	Source     string          `json:"source,omitempty"`  // the image's URL
	Detail     string          `json:"detail,omitempty"`  // the reason, for people
	RktWarning string          `json:"rktWarning,omitempty"`
}

// decided tells a decision.
func (f *Fetcher) decided(d Decision) {
	if f.cfg.Decided == nil {
		return
	}
	d.Time = f.now().UTC()
	if !d.Ref.IsZero() {
		d.Policy = policyText(f.policy(d.Ref.Name()).Trust)
	}
	f.cfg.Decided(d)
}

// policyText writes a policy on one line, as the configuration words it.
func policyText(p trust.Policy) string {
	return fmt.Sprintf("signature=%v expired=%v legacy=%v threshold=%d", p.Signature, p.Expired, p.Legacy, max(p.Threshold, 1))
}

// decision returns what is to be said of a held image.
func decision(event string, rec cache.Record) Decision {
	d := Decision{Event: event, ImageID: rec.ImageID, Digest: rec.Digest, Source: rec.Source, RktWarning: rec.RktWarning}
	d.Ref, _ = acproxy.NewRef(rec.Name, rec.Labels) // a name and labels that were a ref when the image was committed
	for _, s := range rec.Signers {
		d.Signers = append(d.Signers, s.Fingerprint)
	}
	return d
}

// Rejudged counts what Rejudge found.
type Rejudged struct {
	Images      int // held
	Quarantined int // of these not served because of what the keys and policies say now
	Changed     int // since the last time
	// Until is when the first of these verdicts may change by itself, because a key or a signature expires; zero if none does.
	Until time.Time
}

// Evicted returns what is to be said of an image that was evicted.
func Evicted(e cache.Eviction, now time.Time) Decision {
	d := decision(EventEvicted, *e.Record)
	d.Time, d.Outcome, d.Policy = now.UTC(), e.Reason, e.Record.Policy
	d.Detail = fmt.Sprintf("%d bytes, last used %s", e.Bytes, e.Used.UTC().Format(time.RFC3339))
	if e.Kind == cache.EvictQuarantined {
		d.Detail += "; it was quarantined: " + e.Record.Reason
	}
	return d
}

// rejudgePage is how many records are read at once.
const rejudgePage = 1000

// Rejudge decides about every held image again, by the keys as they are now, and tells what has changed since it did so last. Serving doesn't depend
// on it: each hit is judged by the keys of its moment.
func (f *Fetcher) Rejudge(ctx context.Context) (Rejudged, error) {
	f.mu.Lock()
	before := f.refused
	f.mu.Unlock()
	now := make(map[acproxy.Digest]string)
	var counted Rejudged
	for after, more := "", true; more; {
		records, next, err := f.cfg.Store.Images(cache.Filter{State: cache.OK}, after, rejudgePage)
		if err != nil {
			return counted, err
		}
		outcomes, until, err := f.judgeAll(ctx, records)
		if err != nil {
			return counted, err
		}
		counted.Until = sooner(counted.Until, until)
		for i, rec := range records {
			counted.Images++
			if f.changed(rec, before[rec.Digest], outcomes[i]) {
				counted.Changed++
			}
			if outcomes[i] != nil {
				counted.Quarantined++
				now[rec.Digest] = acproxy.Code(outcomes[i])
			}
		}
		after, more = next, next != ""
	}
	f.mu.Lock()
	f.refused = now
	f.mu.Unlock()
	return counted, nil
}

// sooner returns the earlier of two times, of which zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// judgeAll returns why each of the images isn't acceptable, nil where it is, and when that may change by itself.
func (f *Fetcher) judgeAll(ctx context.Context, records []cache.Record) (outcomes []error, until time.Time, err error) {
	outcomes = make([]error, len(records))
	workers := runtime.GOMAXPROCS(0)
	ends := make([]time.Time, workers)
	var group errgroup.Group
	for w := range workers {
		// Each worker ends with its share of the page; waited for below.
		group.Go(func() error {
			for i := w; i < len(records) && ctx.Err() == nil; i += workers {
				end, err := f.rejudge(f.cfg.Keyring(), f.settings.Load(), records[i])
				ends[w] = sooner(ends[w], end)
				if errors.Is(err, acproxy.ErrNotFound) {
					// It was deleted in the meantime.
					err = nil
				}
				if err != nil && !errors.Is(err, acproxy.ErrRefused) {
					return err
				}
				outcomes[i] = err
			}
			return context.Cause(ctx)
		})
	}
	err = group.Wait()
	for _, end := range ends {
		until = sooner(until, end)
	}
	return outcomes, until, err
}

// changed tells, and reports, whether an image is judged otherwise than before.
func (f *Fetcher) changed(rec cache.Record, before string, err error) bool {
	outcome := ""
	if err != nil {
		outcome = acproxy.Code(err)
	}
	if outcome == before {
		return false
	}
	event := EventRestored
	if err != nil {
		event = EventQuarantined
	}
	d := decision(event, rec)
	d.Outcome = outcome
	if err != nil {
		d.Detail = firstLine(err.Error())
		f.log.Warn("a held image is not served any more", "ref", d.Ref, "digest", rec.Digest, "err", err)
	} else {
		d.Outcome = trust.Accepted.String()
		f.log.Info("a held image is served again", "ref", d.Ref, "digest", rec.Digest)
	}
	f.decided(d)
	return true
}
