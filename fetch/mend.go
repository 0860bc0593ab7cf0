package fetch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// Damaged returns what is to be said of an image whose bytes turned out to be lost.
func Damaged(rec cache.Record, now time.Time) Decision {
	d := decision(EventDamaged, rec)
	d.Time, d.Outcome, d.Detail, d.Policy = now.UTC(), rec.Code, rec.Reason, rec.Policy
	return d
}

// Mended counts what Mend came to.
type Mended struct {
	Lost   int // images whose bytes were lost
	Mended int // of these are whole again
}

// mendAtOnce is how many images Mend fetches at once: few, as nodes want the places that there are for flights, and several, so that a publisher that stalls
// doesn't keep the images of others waiting.
const mendAtOnce = 4

// An image is replaced if it is lost and its publisher had another one in its place, which was refused. That can only be seen when all of that is here, so it is asked
// for again after twice as long each time.
type replaced struct {
	on    basis // what it was refused on
	pause time.Duration
	until time.Time
}

// The pauses before an image is asked for again for which there was another one.
const (
	replacedPause    = 2 * time.Hour
	replacedMaxPause = 24 * time.Hour
)

// Mend fetches the images again whose bytes the store has lost, a few at a time, the pinned ones first. They take their turns in the queue like anything else
// that is fetched. It dials nobody for those that are to be served offline. That an image can't be had is logged; the next call tries again, or one of the next if its publisher had another
// one in its place.
func (f *Fetcher) Mend(ctx context.Context) (Mended, error) {
	records, err := f.cfg.Store.Lost()
	if err != nil {
		return Mended{}, err
	}
	ask := f.without(records)
	slices.SortStableFunc(ask, func(a, b cache.Record) int { return -cmp.Compare(weight(a), weight(b)) })
	var mended atomic.Int64
	var group errgroup.Group
	group.SetLimit(mendAtOnce)
	for _, rec := range ask {
		if ctx.Err() != nil {
			break
		}
		// Each ends with its fetch, or with ctx; waited for below.
		group.Go(func() error {
			if f.mend(ctx, rec) {
				mended.Add(1)
			}
			return nil
		})
	}
	// None of them fails: that an image can't be had is no reason to leave the others.
	_ = group.Wait()
	return Mended{Lost: len(records), Mended: int(mended.Load())}, context.Cause(ctx)
}

// mend fetches a lost image again and reports whether it is whole.
func (f *Fetcher) mend(ctx context.Context, rec cache.Record) bool {
	on := f.basis()
	err := f.Refetch(ctx, rec)
	f.noteReplaced(rec.Digest, on, err)
	switch {
	case err == nil:
		f.log.Info("an image that was lost is whole again", "name", rec.Name, "digest", rec.Digest)
	case errors.Is(err, acproxy.ErrOffline):
		f.log.Debug("an image that is lost stays so while offline", "name", rec.Name, "digest", rec.Digest)
	case ctx.Err() == nil:
		f.log.Warn("an image that is lost could not be fetched again", "name", rec.Name, "digest", rec.Digest, "err", err)
	}
	return err == nil
}

// noteReplaced notes whether an image was refused because it is another one than the one that was lost.
func (f *Fetcher) noteReplaced(digest acproxy.Digest, on basis, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if acproxy.Code(err) != codeChanged {
		delete(f.replaced, digest)
		return
	}
	c := replaced{on: on, pause: replacedPause}
	if before, ok := f.replaced[digest]; ok && before.on == on {
		c.pause = min(2*before.pause, replacedMaxPause)
	}
	c.until = f.now().Add(c.pause)
	f.replaced[digest] = c
}

// without leaves out the images that are not to be asked for at the moment, and forgets of the others what was noted of them.
func (f *Fetcher) without(lost []cache.Record) []cache.Record {
	on, now := f.basis(), f.now()
	f.mu.Lock()
	defer f.mu.Unlock()
	still := make(map[acproxy.Digest]replaced)
	ask := slices.DeleteFunc(slices.Clone(lost), func(rec cache.Record) bool {
		c, ok := f.replaced[rec.Digest]
		if ok {
			still[rec.Digest] = c
		}
		return ok && c.on == on && now.Before(c.until)
	})
	f.replaced = still
	return ask
}

func weight(rec cache.Record) int {
	if rec.Pinned {
		return 1
	}
	return 0
}

// Refetch fetches an image again whose bytes the store has lost. It joins whoever is fetching it already. If its publisher has another image
// by now that is an error matching [acproxy.ErrRefused], unless policy follows: then the other one is taken, and this one stays lost, which is an error
// matching [acproxy.ErrNotFound]. A publisher that must not be asked gives one matching [acproxy.ErrOffline].
func (f *Fetcher) Refetch(ctx context.Context, rec cache.Record) error {
	ref, err := acproxy.NewRef(rec.Name, rec.Labels)
	if err == nil {
		err = f.allowed(ref.Name())
	}
	if err != nil {
		return err
	}
	switch policy := f.policy(ref.Name()); {
	case policy.Local:
		return &acproxy.Error{Kind: acproxy.ErrOffline, Code: "published-here", Detail: ref.String() + " was published here, and can't be had from anybody else: push it again"}
	case policy.Offline:
		return &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: ref.String() + " can't be fetched again, because this proxy is offline"}
	}
	a, err := f.ask(ctx, Request{Ref: ref})
	if err != nil {
		return err
	}
	if a.download != nil {
		select {
		case <-a.download.decided:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if _, err := a.download.outcome(); err != nil {
			return err
		}
	}
	now, err := f.cfg.Store.Record(rec.Digest)
	if err == nil && now.Lost() {
		err = &acproxy.Error{Kind: acproxy.ErrNotFound, Code: codeBlobGone, Detail: fmt.Sprintf("the publisher of %v has other bytes now than those with the digest %v", ref, rec.Digest)}
	}
	return err
}
