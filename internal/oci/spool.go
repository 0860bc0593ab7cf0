package oci

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
)

// optional is a spool that is done without as soon as it can't be written.
type optional struct {
	b     *Bridge
	what  string
	spool *cache.Spool // nil if it is done without
	err   error        // why
}

// spool begins to keep the layer of a piece, of so many bytes, -1 if that isn't known.
func (b *Bridge) spool(p piece, size int64) *optional {
	o := &optional{b: b, what: "the OCI layer of " + p.what()}
	if b.cfg.Spool == nil {
		return o
	}
	var err error
	if o.spool, err = b.cfg.Spool(o.what, size); err != nil {
		o.spool = nil
		o.drop(err)
	}
	return o
}

// Write keeps what is written as long as that is possible, and never fails.
func (o *optional) Write(p []byte) (int, error) {
	if o.spool != nil {
		if _, err := o.spool.Write(p); err != nil {
			o.drop(err)
		}
	}
	return len(p), nil
}

// drop does without the spool.
func (o *optional) drop(why error) {
	o.err = why
	if why != nil {
		o.b.log.Debug("a layer is not kept", "what", o.what, "err", why)
	}
	if o.spool == nil {
		return
	}
	if err := o.spool.Discard(); err != nil {
		o.b.log.Warn("removing a layer", "what", o.what, "err", err)
	}
	o.spool = nil
}

// kept has a layer be found that was kept whole.
func (b *Bridge) kept(digest acproxy.Digest, o *optional) {
	if o.spool == nil {
		return
	}
	if err := o.spool.Keep(); err != nil {
		b.log.Debug("a layer is not kept", "what", o.what, "err", err)
		return
	}
	b.mu.Lock()
	before := b.spools[digest]
	b.spools[digest] = o.spool
	b.mu.Unlock()
	if before == nil {
		return
	}
	if err := before.Discard(); err != nil {
		b.log.Warn("removing a layer", "what", o.what, "err", err)
	}
}

// open returns the file of the layer of a piece, making it again if it is gone. It returns nil if it can't be kept.
func (b *Bridge) open(ctx context.Context, pieces []piece, i int) (*cache.Blob, error) {
	p := pieces[i]
	f, err := b.openKept(p.Layer.Digest)
	if f != nil || err != nil || b.cfg.Spool == nil {
		return f, err
	}
	// The ones who wait for it share the making, and each opens the file for himself.
	_, err = b.once(ctx, "spool "+p.Layer.Digest.Hex(), func(m *making) (any, error) {
		switch f, err := b.openKept(p.Layer.Digest); {
		case err != nil:
			return nil, err
		case f != nil:
			// Somebody was faster.
			return nil, f.Close()
		}
		made, err := b.convert(m, pieces, i, p.Layer.Size)
		if errors.Is(err, errNotKept) {
			return nil, nil
		}
		if err == nil && made != p.Layer {
			err = fmt.Errorf("the layer of %s was %v of %d bytes, and is %v of %d now", p.what(), p.Layer.Digest, p.Layer.Size, made.Digest, made.Size)
		}
		return nil, err
	})
	if err != nil {
		return nil, err
	}
	return b.openKept(p.Layer.Digest)
}

// openKept returns the file of a layer that is kept, nil if it isn't.
func (b *Bridge) openKept(digest acproxy.Digest) (*cache.Blob, error) {
	b.mu.Lock()
	s := b.spools[digest]
	b.mu.Unlock()
	if s == nil {
		return nil, nil
	}
	f, err := s.Open()
	if errors.Is(err, acproxy.ErrNotFound) {
		b.mu.Lock()
		if b.spools[digest] == s {
			delete(b.spools, digest)
		}
		b.mu.Unlock()
		return nil, nil
	}
	return f, err
}

// maxKept is for how long a layer is kept, however often it is asked for.
const maxKept = 24 * time.Hour

// sweepEvery is how often is looked for layers that nobody has asked for for a while.
const sweepEvery = time.Minute

// sweep removes layers that nobody has asked for for a while, until the bridge is closed.
func (b *Bridge) sweep() {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			b.dropUnused()
		case <-b.ctx.Done():
			return
		}
	}
}

func (b *Bridge) dropUnused() {
	var unused []*cache.Spool
	b.mu.Lock()
	for digest, s := range b.spools {
		// What the disk loses of it meanwhile would go on being sent.
		if b.now().Sub(s.Used()) > b.cfg.Keep || b.now().Sub(s.Kept()) > maxKept {
			unused = append(unused, s)
			delete(b.spools, digest)
		}
	}
	b.mu.Unlock()
	for _, s := range unused {
		if err := s.Discard(); err != nil {
			b.log.Warn("removing a layer", "err", err)
		}
	}
}
