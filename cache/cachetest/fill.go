package cachetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/durable"
)

// Fill commits n images of some size to a store for measuring: their refs are those that [Refs] returns, and their bytes are zeros that don't
// have the digests they should. On a store with a [SparseFS] they take no space.
func Fill(ctx context.Context, store cache.Store, n int, size int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	refs := Refs(n)
	next := make(chan int)
	var wg sync.WaitGroup
	// Many at once, because commits that wait at the same time share a sync. Each ends when next is closed; waited for below.
	for range 64 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := range next {
				if err := fillOne(ctx, store, refs[i], i, size); err != nil {
					cancel(fmt.Errorf("committing %v: %w", refs[i], err))
				}
			}
		})
	}
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		next <- i
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// Refs returns the refs of the first n images that [Fill] makes: a hundred versions of each name.
func Refs(n int) []acproxy.Ref {
	refs := make([]acproxy.Ref, n)
	for i := range refs {
		refs[i] = MustRef(fmt.Sprintf("example.com/team%d/app:%d.0.0", i/100, i%100))
	}
	return refs
}

var zeros [1 << 20]byte

func fillOne(ctx context.Context, store cache.Store, ref acproxy.Ref, i int, size int64) error {
	img := NewImage(ref.Name(), ref.Version(), 0)
	name := fmt.Appendf(nil, "sparse image %d", i)
	img.Record.Digest, img.Record.ImageID, img.Record.Size = sha256.Sum256(name), sha512.Sum512(name), size
	p, err := store.Begin(ctx, cache.Arrival{})
	if err != nil {
		return err
	}
	for left := size; left > 0; {
		n, err := p.Write(zeros[:min(left, int64(len(zeros)))])
		if err != nil {
			return errors.Join(err, p.Discard())
		}
		left -= int64(n)
	}
	return p.Commit(ctx, img.Record, img.Manifest, img.Signature, img.Refs[0])
}

// SparseFS is the operating system's file system without syncs, and with holes in place of written zeros. It is for measuring only.
type SparseFS struct{ durable.OS }

var _ durable.FS = SparseFS{}

// Create implements [durable.FS].
func (s SparseFS) Create(name string, perm fs.FileMode) (durable.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return nil, err
	}
	return &sparseFile{File: f}, nil
}

// SyncDir does nothing.
func (SparseFS) SyncDir(string) error { return nil }

type sparseFile struct {
	*os.File
	size int64
}

func (f *sparseFile) Write(b []byte) (int, error) {
	f.size += int64(len(b))
	if len(b) <= len(zeros) && bytes.Equal(b, zeros[:len(b)]) {
		if err := f.Truncate(f.size); err != nil {
			return 0, err
		}
		_, err := f.Seek(f.size, io.SeekStart)
		return len(b), err
	}
	return f.File.Write(b)
}

func (*sparseFile) Sync() error { return nil }
