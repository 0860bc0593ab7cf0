package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// Resolve implements [Store].
func (d *Disk) Resolve(ctx context.Context, ref acproxy.Ref) (Resolution, Record, error) {
	for {
		// Asked before looking: what becomes known in between is then waited for in vain, and seen at the next turn.
		k := d.knowledge()
		a, ok, err := d.resolve(ref, k)
		a.rec = d.told(a.rec)
		switch {
		case err != nil:
			return Resolution{}, Record{}, fmt.Errorf("looking up %v: %w", ref, err)
		case ok && a.rec.lost():
			return a.to, a.rec, notFound("blob-gone", fmt.Sprintf("%v was held, but %s", ref, a.rec.Reason))
		case ok:
			return a.to, a.rec, nil
		case d.complete(k):
			return Resolution{}, Record{}, notFound("not-held", ref.String()+" is not held")
		}
		if k.names {
			// The index was replaced in between.
			continue
		}
		if a := d.hinted(ref); a != nil {
			return a.to, a.rec, nil
		}
		if k.failed != nil {
			return Resolution{}, Record{}, fmt.Errorf("looking up %v, which the index doesn't name, and may have to: %w", ref, k.failed)
		}
		if err := d.await(ctx, k.changed); err != nil {
			return Resolution{}, Record{}, fmt.Errorf("looking up %v: %w", ref, err)
		}
	}
}

// Changes implements [Store].
func (d *Disk) Changes() uint64 { return d.memory.changes.Load() }

// resolve returns what a ref answers, and reports whether that is known.
func (d *Disk) resolve(ref acproxy.Ref, k knowledge) (a answer, ok bool, err error) {
	slot := d.memory.refs.slot(ref)
	if a, ok := d.memory.resolve(slot, ref); ok {
		return *a, true, nil
	}
	var generation uint64
	err = d.look(func(l *look) error {
		generation = l.snapshot.generation
		l.key, _ = ref.AppendText(l.key[:0])
		if a, ok, err = lookUp(l, bucketRefs, l.key, takeAnswer); err == nil && !ok && k.unsure() {
			err = l.confirm(bucketRefs, l.key)
		}
		a.to.Ref = ref
		if !ok || err != nil || a.whole {
			return err
		}
		// The record is too long to be beside the ref.
		var named bool
		if a.rec, named, err = l.record(a.to.Digest); err == nil && !named {
			err = broken("no record for %v", a.to.Digest)
		}
		return err
	})
	if !ok || err != nil {
		return answer{}, false, err
	}
	if d.memory.refs.wants(slot) {
		kept := a
		d.memory.refs.put(generation, slot, ref, &kept)
	}
	return a, true, nil
}

// lookUp looks a row up with what takes it apart, and reports whether there is one.
func lookUp[T any](l *look, bucket string, key []byte, take func(*decoder) T) (v T, ok bool, err error) {
	b, err := l.get(bucket, key)
	if b == nil || err != nil {
		return v, false, err
	}
	v, err = decodeWith(&l.decoder, bucket, key, b, take)
	return v, err == nil, err
}

func (l *look) record(digest acproxy.Digest) (Record, bool, error) {
	h, ok, err := lookUp(l, bucketRecords, digest[:], takeHeld)
	h.Digest = digest
	return h.Record, ok, err
}

// Record implements [Store].
func (d *Disk) Record(digest acproxy.Digest) (Record, error) {
	rec, err := d.record(digest)
	if err != nil {
		return Record{}, err
	}
	err = d.look(func(l *look) error {
		used, err := l.get(bucketUsed, digest[:])
		if t, ok := timeIn(used); ok && t.After(rec.Used) {
			rec.Used = t
		}
		return err
	})
	d.useTouched(&rec)
	return d.told(rec), err
}

// record is Record without the time of the last use, and as the index has it.
func (d *Disk) record(digest acproxy.Digest) (Record, error) {
	slot := d.memory.records.slot(digest)
	if rec, _, ok := d.memory.records.get(slot, digest); ok {
		return *rec, nil
	}
	for {
		k := d.knowledge()
		var rec Record
		var ok bool
		var generation uint64
		err := d.look(func(l *look) (err error) {
			generation = l.snapshot.generation
			if rec, ok, err = l.record(digest); err == nil && !ok && k.unsure() {
				err = l.confirm(bucketRecords, digest[:])
			}
			return err
		})
		switch {
		case err != nil:
			return Record{}, fmt.Errorf("looking up %v: %w", digest, err)
		case ok:
			if d.memory.records.wants(slot) {
				kept := rec
				d.memory.records.put(generation, slot, digest, &kept)
			}
			return rec, nil
		case d.complete(k):
			return Record{}, notHeld(digest)
		case k.names:
			// The index was replaced in between.
			continue
		}
		img, err := d.beside(digest)
		if err != nil {
			return Record{}, err
		}
		return img.Record, nil
	}
}

// beside returns everything about an image that the index doesn't name yet, from its sidecar.
func (d *Disk) beside(digest acproxy.Digest) (*image, error) {
	_, err := os.Lstat(d.blobPath(digest))
	gone := errors.Is(err, fs.ErrNotExist) || forbidden(err)
	if err != nil && !gone {
		return nil, err
	}
	img, err := d.readSidecar(digest)
	switch {
	case errors.Is(err, fs.ErrNotExist) || unreadable(err):
		return nil, notHeld(digest)
	case err != nil:
		return nil, err
	case gone && !img.Record.lost():
		// A sidecar alone may be of a commit that never came to be, unless it says itself that the blob was there and is lost.
		return nil, notHeld(digest)
	}
	return img, nil
}

// imageLocked returns everything about an image whose lock the caller holds, nil if it is not held.
func (d *Disk) imageLocked(digest acproxy.Digest) (*image, error) {
	var img *image
	err := d.view(func(tx *bolt.Tx) (err error) {
		img, err = getImage(tx, digest)
		return err
	})
	// If there is a sidecar, the index can't become complete without this lock: what is said of it here still holds.
	if err != nil || img != nil || !d.Rebuilding() {
		return img, err
	}
	img, err = d.readSidecar(digest)
	switch {
	case err == nil:
		d.raise(img.Refs)
	case errors.Is(err, fs.ErrNotExist), forbidden(err):
		return nil, nil
	case unreadable(err):
		return nil, d.setAside(d.sidecarPath(digest), err.Error())
	}
	return img, err
}

// useTouched brings the time of the last use up to what hasn't been written yet.
func (d *Disk) useTouched(rec *Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, touched := range []map[acproxy.Digest]time.Time{d.beingFlushed, d.touched} {
		if t := touched[rec.Digest]; t.After(rec.Used) {
			rec.Used = t
		}
	}
}

// Manifest implements [Store].
func (d *Disk) Manifest(digest acproxy.Digest) ([]byte, error) {
	// Few ask for manifests: they go by the memory map.
	return d.published(digest, bucketManifests, func(read func(getter) error) error {
		return d.view(func(tx *bolt.Tx) error {
			return read(func(bucket string, key []byte) ([]byte, error) { return get(tx, bucket, key) })
		})
	})
}

// Signature implements [Store].
func (d *Disk) Signature(digest acproxy.Digest) ([]byte, error) {
	return d.published(digest, bucketSignatures, func(read func(getter) error) error {
		return d.look(func(l *look) error { return read(l.get) })
	})
}

// getter gets a value, nil if there is none.
type getter func(bucket string, key []byte) ([]byte, error)

// published returns what came with an image. in lets a function read from the index.
func (d *Disk) published(digest acproxy.Digest, bucket string, in func(func(getter) error) error) ([]byte, error) {
	for {
		k := d.knowledge()
		var b []byte
		held := false
		err := in(func(get getter) error {
			stored, err := get(bucket, digest[:])
			b, held = bytes.Clone(stored), stored != nil
			if held || err != nil {
				return err
			}
			row, err := get(bucketRecords, digest[:])
			if row == nil || err != nil {
				return err
			}
			held = true
			h, err := decodeRow(bucketRecords, digest[:], row, takeHeld)
			if err == nil && (bucket == bucketManifests || h.Signed) {
				err = broken("no row of %s for %v", bucket, digest)
			}
			return err
		})
		switch {
		case err != nil:
			return nil, fmt.Errorf("looking up %v: %w", digest, err)
		case b != nil:
			return b, nil
		case held:
			return nil, notFound("unsigned", fmt.Sprintf("the image %v has no signature", digest))
		case d.complete(k):
			return nil, notHeld(digest)
		case k.names:
			// The index was replaced in between.
			continue
		}
		img, err := d.beside(digest)
		switch {
		case err != nil:
			return nil, err
		case bucket == bucketManifests:
			return img.Manifest, nil
		case len(img.Signature) == 0:
			return nil, notFound("unsigned", fmt.Sprintf("the image %v has no signature", digest))
		}
		return img.Signature, nil
	}
}

// OpenBlob implements [Store].
func (d *Disk) OpenBlob(digest acproxy.Digest) (*Blob, error) {
	for {
		rec, err := d.record(digest)
		if err != nil {
			return nil, err
		}
		if d.barred.code(digest) != "" {
			return nil, blobGone(digest)
		}
		l := d.leases.take(digest, false)
		if l == nil {
			// It is just losing its place. Who takes it away holds the lock.
			d.locks.lock(digest)()
			continue
		}
		f, err := d.openWhole(rec)
		switch {
		case err == nil && d.leases.stands(l):
			return d.leases.blob(f, l), nil
		case err == nil:
			// It may be the file of before, or the one after it.
			err = f.Close()
			d.leases.give(l, false)
			if err != nil {
				return nil, err
			}
			continue
		}
		d.leases.give(l, false)
		if errors.Is(err, errNotWhole) {
			// Somebody may just have put it right, or have taken it away.
			return d.openOrLose(digest)
		}
		return nil, err
	}
}

// errNotWhole is matched by the error of opening a blob that isn't there, or isn't all there.
var errNotWhole = errors.New("not whole")

func (d *Disk) openWhole(rec Record) (*os.File, error) {
	f, err := durable.Open(d.blobPath(rec.Digest))
	if errors.Is(err, fs.ErrNotExist) || forbidden(err) {
		return nil, fmt.Errorf("%w: %w", errNotWhole, err)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && (fi.Size() != rec.Size || !fi.Mode().IsRegular()) {
		err = fmt.Errorf("%w: it has %d bytes of %d", errNotWhole, fi.Size(), rec.Size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openOrLose opens a blob, or sees to it that its image counts as lost.
func (d *Disk) openOrLose(digest acproxy.Digest) (*Blob, error) {
	blob, unnoted, err := d.openOrLoseLocked(digest)
	if unnoted != nil {
		// It is barred: that it is gone is as true. No other image goes for the note.
		d.log.Error("an image that is lost could not be noted as such", "digest", digest, "err", unnoted)
	}
	return blob, err
}

// openOrLoseLocked is openOrLose once. unnoted is why it could not be noted that the image is lost.
func (d *Disk) openOrLoseLocked(digest acproxy.Digest) (blob *Blob, unnoted, err error) {
	defer d.locks.lock(digest)()
	img, err := d.imageLocked(digest)
	if err != nil {
		return nil, nil, err
	}
	if img == nil {
		return nil, nil, notHeld(digest)
	}
	l := d.leases.take(digest, false)
	f, err := d.openWhole(img.Record)
	if err == nil {
		return d.leases.blob(f, l), nil, nil
	}
	d.leases.give(l, false)
	if !errors.Is(err, errNotWhole) {
		return nil, nil, err
	}
	if !img.Record.lost() {
		code := CodeDamaged
		switch {
		case errors.Is(err, fs.ErrNotExist):
			code = CodeMissing
		case forbidden(err):
			code = CodeForbidden
		}
		unnoted = d.loseLocked(img, code, err.Error())
	}
	return nil, unnoted, blobGone(digest)
}

func blobGone(digest acproxy.Digest) error {
	return notFound("blob-gone", fmt.Sprintf("the bytes of %v are not whole any more; it has to be fetched again", digest))
}

// loseLocked marks an image as one whose bytes are lost, and moves what is there in their place to the quarantine directory. If that fails, the image is barred,
// and soon read again. The caller holds the lock of its digest.
func (d *Disk) loseLocked(img *image, code, why string) error {
	digest, barred := img.Record.Digest, code
	err := d.noteLost(img, code, why)
	if err == nil {
		barred = ""
	}
	before := d.bar(digest, barred)
	d.scrub.again(digest, d.now(), err)
	// Once is enough.
	if d.tellLost != nil && before == "" {
		d.tellLost(d.told(img.Record))
	}
	return err
}

// noteLost is loseLocked without what is kept in memory.
func (d *Disk) noteLost(img *image, code, why string) error {
	digest := img.Record.Digest
	if err := d.on((*index).mark); err != nil {
		return err
	}
	aside := int64(0)
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	switch code {
	case CodeMissing:
	case CodeForbidden:
		d.leaveAlone(d.blobPath(digest), errors.New(why))
	default:
		var err error
		if aside, err = d.moveAside(d.blobPath(digest), why); err != nil {
			return fmt.Errorf("setting aside what is left of %v: %w", digest, noSpace(err))
		}
	}
	lose(&img.Record, code)
	d.log.Error("an image's bytes are lost", "digest", digest, "name", img.Record.Name, "code", code, "why", why)
	err := d.on(func(ix *index) error {
		// Until the index knows, it counts what is in the quarantine directory by now.
		_, err := d.saveAnd(ix, img, func() {
			d.space.quarantine += aside
			aside = 0
		})
		return err
	})
	if aside > 0 {
		d.countAside(aside)
	}
	if err != nil {
		return fmt.Errorf("noting that the bytes of %v are lost: %w", digest, err)
	}
	return nil
}

// Lost implements [Store].
func (d *Disk) Lost() ([]Record, error) {
	barred := d.barred.all()
	return d.records(0, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		for _, digest := range barred {
			ok, err := hasRecord(tx, digest)
			if err == nil && ok {
				err = found(digest)
			}
			if err != nil {
				return err
			}
		}
		return scan(tx, bucketQuarantined, nil, nil, keyed(func(digest acproxy.Digest) error {
			if slices.Contains(barred, digest) {
				return nil
			}
			return found(digest)
		}))
	}, Record.lost)
}

// maxByImageID bounds what ByImageID returns.
const maxByImageID = 100

// ByImageID implements [Store].
func (d *Disk) ByImageID(hexPrefix string) ([]Record, error) {
	if len(hexPrefix) > 2*len(acproxy.ImageID{}) || strings.Trim(hexPrefix, "0123456789abcdef") != "" {
		return nil, acproxy.Invalid("image ID prefix %.140q is not lower-case hex", hexPrefix)
	}
	whole, err := hex.DecodeString(hexPrefix[:len(hexPrefix)&^1])
	if err != nil {
		return nil, err
	}
	return d.records(maxByImageID, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		return scan(tx, bucketIDs, whole, nil, func(key, _ []byte) error {
			if !strings.HasPrefix(hex.EncodeToString(key[:len(whole)+1]), hexPrefix) {
				return nil
			}
			digest, err := digestIn(key)
			if err != nil {
				return err
			}
			return found(digest)
		})
	}, nil)
}

// records returns the records that a look-up finds and keep wants, nil meaning all, up to a limit if there is one.
func (d *Disk) records(limit int, look func(tx *bolt.Tx, found func(acproxy.Digest) error) error, keep func(Record) bool) ([]Record, error) {
	var records []Record
	err := d.view(func(tx *bolt.Tx) error {
		records = nil
		err := look(tx, func(digest acproxy.Digest) error {
			h, ok, err := getRecord(tx, digest)
			switch {
			case err != nil:
				return err
			case !ok:
				return broken("no record for %v", digest)
			}
			if rec := d.told(h.Record); keep == nil || keep(rec) {
				records = append(records, rec)
			}
			if limit > 0 && len(records) >= limit {
				return errEnough
			}
			return nil
		})
		if err == errEnough {
			return nil
		}
		return err
	})
	return records, err
}

// BySignature implements [Store].
func (d *Disk) BySignature(signature acproxy.Digest) (acproxy.Digest, bool) {
	if signature.IsZero() {
		return acproxy.Digest{}, false
	}
	records, err := d.records(1, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		return scan(tx, bucketSigned, signature[:], nil, keyed(found))
	}, func(r Record) bool { return !r.Quarantined() })
	if err != nil {
		d.log.Error("looking up a signature", "err", err)
	}
	if len(records) == 0 {
		return acproxy.Digest{}, false
	}
	return records[0].Digest, true
}

// keyed hands on the digest at the end of each key.
func keyed(found func(acproxy.Digest) error) func(key, value []byte) error {
	return func(key, _ []byte) error {
		digest, err := digestIn(key)
		if err != nil {
			return err
		}
		return found(digest)
	}
}

// Match implements [Store].
func (d *Disk) Match(ref acproxy.Ref) ([]Record, error) {
	prefix := append([]byte(ref.Name()), 0)
	if v := ref.Version(); v != "" {
		prefix = append(append(prefix, v...), 0)
	}
	return d.records(0, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		return scan(tx, bucketNames, prefix, nil, keyed(found))
	}, func(r Record) bool { return !r.Quarantined() && ref.Matches(r.Name, r.Labels) == nil })
}

// ByName returns all images with a name, quarantined ones too, by version.
func (d *Disk) ByName(name string) ([]Record, error) {
	return d.records(0, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		return scan(tx, bucketNames, append([]byte(name), 0), nil, keyed(found))
	}, nil)
}

// HasName implements [Store].
func (d *Disk) HasName(name string) (bool, error) {
	has := false
	err := d.view(func(tx *bolt.Tx) error {
		has = false
		return scan(tx, bucketNames, append([]byte(name), 0), nil, func(_, _ []byte) error {
			has = true
			return errEnough
		})
	})
	return has, err
}

// Uninspected implements [Store].
func (d *Disk) Uninspected() ([]Record, error) {
	return d.records(0, func(tx *bolt.Tx, found func(acproxy.Digest) error) error {
		return scan(tx, bucketUninspected, nil, nil, keyed(found))
	}, func(r Record) bool { return !r.Quarantined() })
}

// named returns the record that a row of names stands for, with the time of its last use as it was last written.
func (x *index) named(key []byte, digest acproxy.Digest) (rec Record, ok bool, err error) {
	err = x.look(func(l *look) (err error) {
		if rec, ok, err = l.record(digest); err != nil {
			return err
		}
		if !ok {
			if row, err := l.get(bucketNames, key); row != nil || err != nil {
				return errors.Join(err, broken("no record for %v", digest))
			}
			return nil
		}
		used, err := l.get(bucketUsed, digest[:])
		if t, ok := timeIn(used); ok && t.After(rec.Used) {
			rec.Used = t
		}
		return err
	})
	return rec, ok, err
}

// Known implements [Store].
func (d *Disk) Known(name string) (Discovered, bool) {
	if k, ok := d.heard.get(name); ok {
		return k, true
	}
	return d.written(name)
}

// written returns what is written down of a name.
func (d *Disk) written(name string) (Discovered, bool) {
	var k Discovered
	ok := false
	before := d.knowledge()
	err := d.look(func(l *look) (err error) {
		k, ok, err = lookUp(l, bucketKnown, []byte(name), takeKnown)
		return err
	})
	k.Name = name
	if err == nil && !ok && (before.unsure() || !d.complete(before)) {
		// The index is being made, or has not been verified; the name's own file knows.
		if k, ok, err = d.readName(d.namePath(name)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		d.log.Error("looking up what is known of a name", "name", name, "err", err)
	}
	return k, ok && err == nil
}

// KnownUnderHost implements [Store].
func (d *Disk) KnownUnderHost(host string) []Discovered {
	host = strings.ToLower(host)
	heard := d.heard.under(host, anyHost)
	var known []Discovered
	err := d.view(func(tx *bolt.Tx) error {
		known = slices.Clone(heard)
		seen := make(map[string]bool, len(heard))
		for _, k := range heard {
			seen[k.Name] = true
		}
		add := func(name []byte) error {
			if seen[string(name)] {
				return nil
			}
			seen[string(name)] = true
			k, ok, err := getKnown(tx, name)
			if ok {
				known = append(known, k)
			}
			return err
		}
		if err := add([]byte(host)); err != nil {
			return err
		}
		if err := scan(tx, bucketKnown, []byte(host+"/"), nil, func(key, _ []byte) error { return add(key) }); err != nil {
			return err
		}
		for _, at := range []string{host, anyHost} {
			err := scan(tx, bucketHosts, hostKey(at, ""), nil, func(key, _ []byte) error { return add(key[len(at)+1:]) })
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		d.log.Error("looking up what is known of a host", "host", host, "err", err)
	}
	return known
}

// Refusals implements [Store].
func (d *Disk) Refusals() ([]Refused, error) {
	var refusals []Refused
	err := d.view(func(tx *bolt.Tx) (err error) {
		refusals, err = getRefusals(tx)
		return err
	})
	slices.Reverse(refusals)
	return refusals, err
}

// getRefusals returns the refusals, the latest last.
func getRefusals(tx *bolt.Tx) (refusals []Refused, err error) {
	err = scan(tx, bucketRefused, nil, nil, func(key, _ []byte) error {
		var r Refused
		err := getJSON(tx, bucketRefused, key, &r)
		refusals = append(refusals, r)
		return err
	})
	return refusals, err
}

// Usage returns the space that the store takes now.
func (d *Disk) Usage() (Usage, error) {
	d.space.mu.Lock()
	known := d.space.unknown == 0
	d.space.mu.Unlock()
	u := d.space.usage()
	if free, err := d.space.free(); err == nil {
		u.Room.Free = free
	}
	if d.idle {
		// Nobody else has read it.
		if _, err := d.loadScrub(); err != nil {
			return u, err
		}
	}
	u.Scrub = d.Scrubbing()
	if known {
		return u, nil
	}
	// Some of it isn't counted yet.
	err := d.view(func(tx *bolt.Tx) error {
		t, err := getTotals(tx)
		u.Blobs, u.Sidecars, u.Images, u.Quarantined, u.Pinned = t.Blobs, t.Sidecars, t.Images, t.Quarantined, t.Pinned
		return err
	})
	if err != nil {
		return u, err
	}
	for _, part := range []struct {
		bytes *int64
		dir   string
		want  func(string) bool
	}{
		{&u.Index, "", func(name string) bool { return strings.HasPrefix(name, indexFile) || name == refTableFile }}, {&u.Quarantine, quarantineDir, nil}, {&u.Names, nameDir, nil},
	} {
		if *part.bytes, err = sizes(d.path(part.dir), part.want); err != nil {
			return u, err
		}
	}
	return u, nil
}

// sizes adds up the files in a directory that want wants; nil means all.
func sizes(dir string, want func(name string) bool) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, entry := range entries {
		if want != nil && !want(entry.Name()) {
			continue
		}
		fi, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if fi.Mode().IsRegular() {
			sum += diskBytes(fi)
		}
	}
	return sum, nil
}

// namePath returns where what is known of a name is kept.
func (d *Disk) namePath(name string) string {
	return d.path(nameDir, nameDigest(name).Hex()+sidecarExt)
}

func nameDigest(name string) acproxy.Digest { return sha256.Sum256([]byte(name)) }

// Answers returns what an image answers, in no order, or an error matching [acproxy.ErrNotFound] if it is not held.
func (d *Disk) Answers(digest acproxy.Digest) ([]Resolution, error) {
	defer d.locks.lock(digest)()
	img, err := d.imageLocked(digest)
	if err != nil {
		return nil, err
	}
	if img == nil {
		return nil, notHeld(digest)
	}
	return img.Refs, nil
}
