package bundle

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sort"

	"github.com/acproxy/acproxy"
)

// A writing is the stream of a bundle, from some byte on. Every member is held against its digest on the way; one that differs is an error in place of its
// last byte.
type writing struct {
	ctx   context.Context
	parts []part
	open  Opener

	left   int64 // of the first part
	member io.ReadCloser
	sum    hash.Hash
}

// Stream returns the bytes of the bundle from some byte on. The caller closes it.
func (b *Bundle) Stream(ctx context.Context, from int64, open Opener) (io.ReadCloser, error) {
	parts := b.parts()
	first := sort.Search(len(parts), func(i int) bool { return parts[i].at+parts[i].size > from })
	w := &writing{ctx: ctx, parts: parts[first:], open: open}
	if len(w.parts) == 0 {
		return w, nil
	}
	skip := from - w.parts[0].at
	if err := w.begin(); err != nil {
		return nil, err
	}
	if w.parts[0].member == nil {
		w.left -= skip
		return w, nil
	}
	// What was written before is read again: the digest is of all of it.
	if err := skipTo(readOnly{w}, skip); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// readOnly hides what else a writing can do from io.CopyN.
type readOnly struct{ io.Reader }

// begin prepares the first part.
func (w *writing) begin() error {
	p := w.parts[0]
	w.left = p.size
	if p.member == nil {
		return nil
	}
	var err error
	if w.member, err = w.open(*p.member); err != nil {
		return err
	}
	w.sum = sha256.New()
	return nil
}

// Read implements io.Reader.
func (w *writing) Read(b []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	if len(w.parts) == 0 {
		return 0, io.EOF
	}
	p := w.parts[0]
	n, err := w.read(p, b[:min(int64(len(b)), w.left)])
	if err != nil {
		return n, err
	}
	if w.left -= int64(n); w.left > 0 {
		return n, nil
	}
	if w.parts = w.parts[1:]; len(w.parts) > 0 {
		err = w.begin()
	}
	return n, err
}

func (w *writing) read(p part, b []byte) (int, error) {
	if p.member == nil {
		return copy(b, p.bytes[p.size-w.left:]), nil
	}
	n, err := io.ReadFull(w.member, b)
	if err != nil {
		return n, changed(*p.member, "it ends early", err)
	}
	w.sum.Write(b)
	if int64(n) == w.left {
		if acproxy.Digest(w.sum.Sum(nil)) != p.member.Digest {
			return 0, changed(*p.member, "it has other bytes", nil)
		}
		err = w.member.Close()
		w.member = nil
	}
	return n, err
}

func changed(m Member, how string, err error) error {
	return &acproxy.Error{
		Code: CodeDamaged, Err: err,
		Detail: m.Kind.String() + " " + m.Digest.String() + " in the store is not what it was: " + how + "; acproxy scrub repairs the store, then export again",
	}
}

// Close ends the stream.
func (w *writing) Close() error {
	w.parts = nil
	if w.member == nil {
		return nil
	}
	return w.member.Close()
}
