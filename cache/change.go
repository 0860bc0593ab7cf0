package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// save writes an image's sidecar, then its rows. The caller holds the lock of its digest. It returns the images whose sidecars are no longer
// right about their refs; see rewrite.
//
//	sidecar: create, write, fsync, rename, fsync directory ─▶ index transaction (shared), fsync
func (d *Disk) save(ix *index, img *image) (displaced []acproxy.Digest, err error) {
	if err := d.writeSidecar(img); err != nil {
		return nil, err
	}
	err = ix.update(func(tx *bolt.Tx) (err error) {
		displaced, err = putImage(tx, img)
		return err
	}, effect{img.Record.Digest, img.Refs})
	return displaced, err
}

func (d *Disk) writeSidecar(img *image) error {
	file, err := seal(img)
	if err != nil {
		return err
	}
	img.sidecar = int64(len(file))
	if err := d.makeShard(img.Record.Digest); err != nil {
		return noSpace(err)
	}
	return noSpace(durable.Replace(d.fsys, d.temp(), d.sidecarPath(img.Record.Digest), file, filePerm))
}

// rewrite brings the sidecars of images up to date that lost refs to another. They come after the index, where a gained ref comes before it, so
// that a crash leaves a ref in two sidecars rather than in none; a rebuild then takes the later one.
func (d *Disk) rewrite(digests []acproxy.Digest) {
	for _, digest := range digests {
		if err := d.change(digest, func(*image) error { return nil }); err != nil && !errors.Is(err, acproxy.ErrNotFound) {
			// It is only of use if the image that took the ref is removed and the index is lost.
			d.log.Warn("a sidecar still claims a ref that moved on", "digest", digest, "err", err)
		}
	}
}

// change reads an image under its lock, lets edit change it, and saves it. edit must not call anything that locks.
func (d *Disk) change(digest acproxy.Digest, edit func(*image) error) error {
	if _, err := d.record(digest); err != nil {
		return err
	}
	displaced, err := d.changeLocked(digest, edit)
	d.rewrite(displaced)
	return err
}

func (d *Disk) changeLocked(digest acproxy.Digest, edit func(*image) error) (displaced []acproxy.Digest, err error) {
	defer d.locks.lock(digest)()
	img, err := d.imageLocked(digest)
	switch {
	case err != nil:
		return nil, err
	case img == nil:
		return nil, notHeld(digest)
	}
	if err := edit(img); err != nil {
		return nil, err
	}
	err = d.on(func(ix *index) (err error) {
		displaced, err = d.save(ix, img)
		return err
	})
	return displaced, err
}

// Update implements [Store].
func (d *Disk) Update(ctx context.Context, digest acproxy.Digest, change func(*Record) error) error {
	errAgain := errors.New("changed in between")
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		before, err := d.record(digest)
		if err != nil {
			return err
		}
		// change is a stranger's: it is called without a lock, and its result is kept only if it started from what is there then.
		after := clone(before)
		if err := change(&after); err != nil {
			return err
		}
		after.Digest, after.Size = before.Digest, before.Size
		err = d.change(digest, func(img *image) error {
			if !reflect.DeepEqual(img.Record, before) {
				return errAgain
			}
			img.Record = after
			return nil
		})
		if err != errAgain {
			return err
		}
	}
}

func clone(r Record) Record {
	r.Labels = maps.Clone(r.Labels)
	r.Signers = slices.Clone(r.Signers)
	r.Dependencies = slices.Clone(r.Dependencies)
	for i := range r.Dependencies {
		r.Dependencies[i].Labels = maps.Clone(r.Dependencies[i].Labels)
	}
	r.Hashed = maps.Clone(r.Hashed)
	for k, v := range r.Hashed {
		r.Hashed[k] = bytes.Clone(v)
	}
	return r
}

// Point implements [Store].
func (d *Disk) Point(_ context.Context, resolutions ...Resolution) error {
	byDigest := make(map[acproxy.Digest][]Resolution)
	for _, r := range resolutions {
		if r.Ref.IsZero() {
			return acproxy.Invalid("a resolution without a ref")
		}
		byDigest[r.Digest] = append(byDigest[r.Digest], r)
	}
	for digest, refs := range byDigest {
		if err := d.number(refs); err != nil {
			return err
		}
		err := d.change(digest, func(img *image) error {
			img.Refs = mergeRefs(img.Refs, refs)
			return nil
		})
		if err != nil {
			return fmt.Errorf("pointing %v at %v: %w", refs[0].Ref, digest, err)
		}
	}
	return nil
}

// mergeRefs returns the refs of both; where they have the same ref, the later one's answer.
func mergeRefs(before, after []Resolution) []Resolution {
	merged := slices.Clone(before)
	for _, r := range after {
		i := slices.IndexFunc(merged, func(have Resolution) bool { return have.Ref == r.Ref })
		if i >= 0 {
			merged[i] = r
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}

// number gives resolutions numbers above those that their refs have had. The clock is where they begin, so that they go on rising if the index
// is lost.
func (d *Disk) number(refs []Resolution) error {
	err := d.view(func(tx *bolt.Tx) error {
		for _, r := range refs {
			before, _, err := getRow(tx, bucketRefs, []byte(r.Ref.String()), takeResolution)
			if err != nil {
				return err
			}
			d.raise([]Resolution{before})
		}
		return nil
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range refs {
		d.pointed = max(d.pointed+1, d.now().UnixNano())
		refs[i].Pointed = d.pointed
	}
	return err
}

// raise keeps numbers from being given that are not above those of refs.
func (d *Disk) raise(refs []Resolution) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range refs {
		d.pointed = max(d.pointed, r.Pointed)
	}
}

// Quarantine implements [Store].
func (d *Disk) Quarantine(_ context.Context, digest acproxy.Digest, code, reason string) error {
	return d.change(digest, func(img *image) error {
		if !img.Record.lost() {
			img.Record.State, img.Record.Code, img.Record.Reason = Quarantined, code, reason
		}
		return nil
	})
}

// Restore implements [Store].
func (d *Disk) Restore(_ context.Context, digest acproxy.Digest) error {
	return d.change(digest, func(img *image) error {
		if img.Record.lost() {
			return notFound("blob-gone", fmt.Sprintf("%v can't be restored: %s", digest, img.Record.Reason))
		}
		img.Record.State, img.Record.Code, img.Record.Reason = OK, "", ""
		return nil
	})
}

// Delete removes an image, its bytes and its refs. Files of it that are open stay readable. An image that is not held is no error.
//
//	index transaction ─▶ remove blob ─▶ fsync directory ─▶ remove sidecar ─▶ fsync directory
//
// A crash in between leaves both files, and the image is there again, or the sidecar, which the next start removes.
func (d *Disk) Delete(_ context.Context, digest acproxy.Digest) error {
	defer d.locks.lock(digest)()
	if err := d.update(func(tx *bolt.Tx) error { return dropImage(tx, digest) }, effect{digest: digest}); err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.touched, digest)
	d.mu.Unlock()
	return d.removeFiles(digest)
}

func (d *Disk) removeFiles(digest acproxy.Digest) error {
	for _, path := range []string{d.blobPath(digest), d.sidecarPath(digest)} {
		if err := d.fsys.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := d.fsys.SyncDir(filepath.Dir(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Learn implements [Store].
func (d *Disk) Learn(found Discovered) error {
	if err := acproxy.CheckName(found.Name); err != nil {
		return err
	}
	defer d.locks.lock(nameDigest(found.Name))()
	before, known := d.Known(found.Name)
	when := before.When
	before.When = found.When
	if !known || !reflect.DeepEqual(before, found) || found.When.Sub(when) > keptEvery {
		file, err := seal(found)
		if err != nil {
			return err
		}
		if err := durable.Replace(d.fsys, d.temp(), d.namePath(found.Name), file, filePerm); err != nil {
			return noSpace(err)
		}
	}
	return d.update(func(tx *bolt.Tx) error { return putKnown(tx, found) }, effect{})
}

// keptEvery is how old the time of an otherwise unchanged finding may become outside of the index.
const keptEvery = 24 * time.Hour

// Refuse implements [Store].
func (d *Disk) Refuse(refused Refused) error {
	return d.update(func(tx *bolt.Tx) error {
		var last uint64
		if _, err := getJSON(tx, bucketState, []byte(stateRefused), &last); err != nil {
			return err
		}
		last++
		if err := putJSON(tx, bucketState, []byte(stateRefused), last); err != nil {
			return err
		}
		if last > MaxRefusals {
			if err := remove(tx, bucketRefused, refusalKey(last-MaxRefusals)); err != nil {
				return err
			}
		}
		return putJSON(tx, bucketRefused, refusalKey(last), refused)
	}, effect{})
}

// refusalKey sorts as the number does.
func refusalKey(n uint64) []byte {
	key := make([]byte, 8)
	for i := range key {
		key[i] = byte(n >> (56 - 8*i))
	}
	return key
}

// Touch implements [Store].
func (d *Disk) Touch(digest acproxy.Digest) {
	now := d.now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.touched[digest] = now
}

// flusher writes access times, and removes partial files that are too old, until ctx is done.
func (d *Disk) flusher() {
	tick := time.NewTicker(d.flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := d.flush(); err != nil {
				d.log.Error("writing access times", "err", err)
			}
			d.expire()
		case <-d.ctx.Done():
			return
		}
	}
}

// flush writes the access times since the last flush. What it can't write is lost: it is only of use for choosing what to evict.
func (d *Disk) flush() error {
	d.mu.Lock()
	touched := d.touched
	d.touched = make(map[acproxy.Digest]time.Time)
	d.mu.Unlock()
	if len(touched) == 0 {
		return nil
	}
	return d.update(func(tx *bolt.Tx) error {
		for digest, t := range touched {
			ok, err := hasRecord(tx, digest)
			if err == nil && ok {
				err = putTime(tx, bucketUsed, digest[:], t)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}, effect{})
}
