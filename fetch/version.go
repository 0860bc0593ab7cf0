package fetch

import (
	"context"
	"errors"
	"fmt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// A candidate is an image that is to be the one of a version.
type candidate struct {
	ref      acproxy.Ref // with the version; one without has no say
	digest   acproxy.Digest
	source   string // for people
	onChange OnChange
	// published says that its publisher brought it.
	published bool
	// identify finds its image ID out.
	identify func() (acproxy.ImageID, error)
}

// checkVersion refuses an image for a version that is held as another one, unless policy follows. That the disk has lost the bytes of the one held changes
// nothing: what it was is known, and a flipped bit must not let another one take its place. The image ID decides, not the digest: the same tar may come
// compressed in another way.
func (f *Fetcher) checkVersion(ctx context.Context, c candidate) error {
	if c.ref.Version() == "" {
		return nil
	}
	_, before, err := f.cfg.Store.Resolve(ctx, c.ref)
	switch {
	case err != nil && !errors.Is(err, acproxy.ErrNotFound):
		return err
	case before.Digest.IsZero(), before.Digest == c.digest:
		return nil
	}
	was, err := f.identify(ctx, before)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case acproxy.Code(err) == codeBlobGone:
		// It was lost before it was inspected: that the digest is another one has to do.
	case isViolation(err), errors.Is(err, acproxy.ErrNotFound):
		// It never was an image, or has just been removed.
		return nil
	case err != nil:
		return err
	}
	before.ImageID = was
	is, err := c.identify()
	if err != nil || was == is {
		return err
	}
	f.log.Warn("a version changed at its publisher", "ref", c.ref, "held", was.Short(), "published", is.Short(), "source", c.source)
	if c.onChange == FollowChange {
		return nil
	}
	return c.refuse(before, is)
}

// identify returns the image ID of a held image, although its own inspection may not have come to its end yet.
func (f *Fetcher) identify(ctx context.Context, rec cache.Record) (acproxy.ImageID, error) {
	if !rec.ImageID.IsZero() {
		return rec.ImageID, nil
	}
	found, err := f.inspectHeld(ctx, rec)
	return found.ID, err
}

// refuse returns why an image isn't taken in the place of another one, and what an operator can do who wants it to be.
func (c candidate) refuse(before cache.Record, is acproxy.ImageID) error {
	held, was, forget := "is held", before.ImageID.Short(), ""
	if before.ImageID.IsZero() {
		was = before.Digest.String()
	}
	if before.Lost() {
		held, forget = "was held", fmt.Sprintf(", or have the one forgotten that the disk has lost: acproxy images delete %v", before.Digest)
	}
	detail := fmt.Sprintf("%v %s as %s, but %s now is %s; a version doesn't change (set on_change: follow for its prefix to take the new image%s)", c.ref, held, was, c.source, is.Short(), forget)
	if c.published {
		detail = fmt.Sprintf("%v was published as %s, and this is %s; a version doesn't change: give this image another one (or set on_change: follow for its prefix%s)", c.ref, was, is.Short(), forget)
	}
	return &acproxy.Error{Kind: acproxy.ErrRefused, Code: codeChanged, Detail: detail}
}
