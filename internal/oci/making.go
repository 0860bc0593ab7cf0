package oci

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/acproxy/acproxy"
)

// A making is something that one goroutine makes for all who wait for it.
type making struct {
	// ctx ends with the bridge, and when nobody waits any more for what isn't begun.
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed when val and err are there
	val    any
	err    error

	// These are guarded by the mutex of the bridge.
	waiting int  // for it
	kept    bool // it goes on whoever waits
}

// once has something made by one goroutine, for all who wait for it. What is begun, or was waited for for as long as anybody may, goes on when they leave; what is
// not is given up then.
func (b *Bridge) once(ctx context.Context, key string, do func(m *making) (any, error)) (any, error) {
	b.mu.Lock()
	if b.ctx.Err() != nil {
		b.mu.Unlock()
		return nil, errClosed
	}
	m := b.makings[key]
	if m == nil {
		m = &making{done: make(chan struct{})}
		m.ctx, m.cancel = context.WithCancel(b.ctx)
		b.makings[key] = m
		// It ends with its work, or m.ctx, which ends with the bridge; Close waits for it.
		b.work.Go(func() {
			m.val, m.err = do(m)
			b.mu.Lock()
			b.over(key, m)
			b.mu.Unlock()
			close(m.done)
		})
	}
	m.waiting++
	b.mu.Unlock()
	select {
	case <-m.done:
		return m.val, m.err
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	m.kept = m.kept || acproxy.Code(context.Cause(ctx)) == codeConverting
	if m.waiting--; m.waiting == 0 && !m.kept {
		b.over(key, m)
	}
	return nil, context.Cause(ctx)
}

// over ends a making, if it goes on, and has the next who asks begin another one. The caller holds the mutex.
func (b *Bridge) over(key string, m *making) {
	m.cancel()
	if b.makings[key] == m {
		delete(b.makings, key)
	}
}

const codeConverting = "converting"

var errClosed = &acproxy.Error{Kind: acproxy.ErrBusy, Code: "closing", Detail: "this proxy is being stopped"}

// maxQueued is how many images may wait for their turn to be read.
const maxQueued = 256

// turn waits for one of the few turns to read an image. Whoever gets it gives it back. From then on the making goes on whoever waits for it.
func (b *Bridge) turn(m *making) (giveBack func(), err error) {
	b.mu.Lock()
	full := b.queued >= maxQueued
	if !full {
		b.queued++
	}
	b.mu.Unlock()
	if full {
		return nil, &acproxy.Error{Kind: acproxy.ErrBusy, Code: "too-many-conversions", RetryAfter: 10 * time.Second, Detail: fmt.Sprintf("%d images wait already to be made OCI images of", maxQueued)}
	}
	got := false
	select {
	case b.turns <- struct{}{}:
		got = true
	case <-m.ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queued--
	if m.ctx.Err() != nil {
		if got {
			<-b.turns
		}
		return nil, errUnwanted
	}
	m.kept = true
	return func() { <-b.turns }, nil
}

// errUnwanted ends what nobody waits for any more.
var errUnwanted = errors.New("nobody waits for it any more")
