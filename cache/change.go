package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
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
	return d.saveAnd(ix, img, nil)
}

// saveAnd is save with a function, nil for none, that is called in the moment in which the index has it, with the mutex of the space held.
func (d *Disk) saveAnd(ix *index, img *image, then func()) (displaced []acproxy.Digest, err error) {
	file, err := img.seal()
	if err != nil {
		return nil, err
	}
	if err := ix.mark(); err != nil {
		return nil, err
	}
	defer func() { _ = d.fsys.note(err) }()
	// It stands beside the old one for a moment. Nobody is asked for the space: who holds a lock can't wait for an eviction.
	beside := blocks(img.sidecar)
	d.space.add(beside)
	if err = d.writeSidecar(img, file); err != nil {
		d.space.release(beside)
		return nil, err
	}
	w := &write{loose: -beside, then: then, effects: []effect{{img.Record.Digest, img.Refs}}, change: func(tx *bolt.Tx) (err error) {
		displaced, err = putImage(tx, img)
		return err
	}}
	if err = ix.commit(w); err != nil {
		d.space.release(beside)
	}
	d.space.loosen()
	return displaced, err
}

// seal returns the sidecar of an image and notes its size.
func (img *image) seal() ([]byte, error) {
	file, err := seal(img)
	img.sidecar = int64(len(file))
	return file, err
}

func (d *Disk) writeSidecar(img *image, file []byte) error {
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
	if err != nil && d.relief(d.ctx, err, blockSize) {
		displaced, err = d.changeLocked(digest, edit)
	}
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
	return r
}

// Point implements [Store].
func (d *Disk) Point(ctx context.Context, resolutions ...Resolution) error {
	// Everybody can add refs by asking, so that these have to have room.
	if err := d.space.promise(ctx, pointAllowance, "another ref"); err != nil {
		return err
	}
	defer d.space.release(pointAllowance)
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
			before, _, err := getRow(tx, bucketRefs, []byte(r.Ref.String()), takeAnswered)
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
	d.leases.leave(digest, true)
	known := false
	_, err := d.removeImages(func(tx *bolt.Tx, drop func(h held, used time.Time) error) error {
		h, ok, err := getRecord(tx, digest)
		known = ok
		if !ok || err != nil {
			return err
		}
		return drop(h, time.Time{})
	}, []victim{{digest: digest}})
	if err == nil && !known {
		// Files that the index doesn't know of, or not yet, go too.
		err = d.removeFiles(digest)
	}
	// While the index is made, what files say counts as well.
	d.memory.changes.Add(1)
	return err
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

// Learn implements [Store]. It writes down what is known of names of which images are held, the rest is remembered for a while, and written down once one is.
func (d *Disk) Learn(found Discovered) error {
	if err := acproxy.CheckName(found.Name); err != nil {
		return err
	}
	// Remembered before it is asked whether an image is held: who commits one asks the other way round.
	if d.heard.put(found) {
		d.memory.changes.Add(1)
	}
	if held, err := d.HasName(found.Name); !held || err != nil {
		return err
	}
	file, err := seal(found)
	if err != nil {
		return err
	}
	// Before the name is locked, for which an eviction would wait in turn.
	promised := pointAllowance + blocks(int64(len(file)))
	if err := d.space.promise(d.ctx, promised, "what discovery found out about "+found.Name); err != nil {
		return err
	}
	defer d.space.release(promised)
	return d.writeHeard(found.Name)
}

// writeHeard writes down what was heard of a name last.
func (d *Disk) writeHeard(name string) error {
	defer d.locks.lock(nameDigest(name))()
	found, ok := d.heard.get(name)
	if !ok {
		return nil // somebody else has just done so
	}
	before, known := d.written(name)
	when := before.When
	before.When = found.When
	if !known || !reflect.DeepEqual(before, found) || found.When.Sub(when) > keptEvery {
		file, err := seal(found)
		if err != nil {
			return err
		}
		if err := d.on((*index).mark); err != nil {
			return err
		}
		if err := d.writeName(name, file); err != nil {
			return err
		}
	}
	if err := d.update(func(tx *bolt.Tx) error { return putKnown(tx, found) }, effect{}); err != nil {
		return err
	}
	d.heard.written(found)
	return nil
}

// writeName writes the file of a name. The caller has space for it, and holds the lock of the name, unless it is alone.
func (d *Disk) writeName(name string, file []byte) error {
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	before := int64(0)
	if fi, err := os.Lstat(d.namePath(name)); err == nil {
		before = diskBytes(fi)
	}
	if err := durable.Replace(d.fsys, d.temp(), d.namePath(name), file, filePerm); err != nil {
		return noSpace(err)
	}
	d.space.mu.Lock()
	d.space.names += blocks(int64(len(file))) - before
	d.space.mu.Unlock()
	d.measureDir(nameDir)
	return nil
}

// keptEvery is how old the time of an otherwise unchanged finding may become outside of the index.
const keptEvery = 24 * time.Hour

// Refuse implements [Store].
func (d *Disk) Refuse(refused Refused) error {
	return d.update(func(tx *bolt.Tx) error {
		var last uint64
		if err := getJSON(tx, bucketState, []byte(stateRefused), &last); err != nil {
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

// flusher writes access times and, now and then, the table of refs, and removes partial files that are too old, until ctx is done.
func (d *Disk) flusher() {
	tick, tock := time.NewTicker(d.flushEvery), time.NewTicker(keepRefsEvery)
	defer tick.Stop()
	defer tock.Stop()
	for {
		select {
		case <-tock.C:
			if k := d.knowledge(); k.settled && !d.readOnly {
				d.keepRefs(d.ctx, k.ix)
			}
		case <-tick.C:
			if err := d.flush(); err != nil {
				d.log.Error("writing access times", "err", err)
			}
			d.expire()
			d.measureDirs()
			d.measureAgain()
			d.wake()
		case <-d.ctx.Done():
			return
		}
	}
}

// maxTogetherTouched is how many access times are written in one transaction: each is on a page of its own in the order of eviction, which is let go of only
// afterwards, and all of these have to fit into half of what is promised to housekeeping. In the other rows neighbours share pages.
const maxTogetherTouched = 100

// flush writes the access times since the last flush. What it can't write it tries again the next time. Those for which there is no room are forgotten: they are not
// worth an image, and none that was used may be kept from being evicted for ever because that can't be noted.
func (d *Disk) flush() error {
	d.flushing.Lock()
	defer d.flushing.Unlock()
	d.mu.Lock()
	touched := d.touched
	d.touched, d.beingFlushed = make(map[acproxy.Digest]time.Time), touched
	d.mu.Unlock()
	if len(touched) == 0 || d.readOnly {
		return nil
	}
	var err error
	for together := range slices.Chunk(slices.SortedFunc(maps.Keys(touched), compareDigests), maxTogetherTouched) {
		if !d.space.spares() {
			d.log.Debug("there is no room to write access times")
			break
		}
		err = d.update(func(tx *bolt.Tx) error {
			for _, digest := range together {
				h, ok, err := getRecord(tx, digest)
				if err == nil && ok {
					err = touch(tx, h.Record, touched[digest])
				}
				if err != nil {
					return err
				}
			}
			return nil
		}, effect{})
		if err != nil {
			break
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.beingFlushed = nil
	if err == nil {
		return nil
	}
	for digest, t := range touched {
		if d.touched[digest].Before(t) {
			d.touched[digest] = t
		}
	}
	return err
}
