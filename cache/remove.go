package cache

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// evict removes what was chosen, but for what has changed since so that it is to be kept.
func (d *Disk) evict(victims []victim, reason string) (Freed, error) {
	var all Freed
	tell := func(evicted ...Eviction) {
		for _, e := range evicted {
			e.Reason = reason
			all.add(e)
			d.evicted(e)
		}
	}
	var images []victim
	for _, v := range victims {
		var e Eviction
		var err error
		switch {
		case v.spool != nil:
			e, err = d.evictSpool(v.spool)
		case v.key != "":
			e, err = d.evictPartial(v.key)
		case v.file != "":
			e, err = d.evictAside(v)
		default:
			images = append(images, v)
			continue
		}
		if err != nil {
			return all, err
		}
		if e.Kind != "" {
			tell(e)
		}
	}
	for batch := range slices.Chunk(images, maxTogetherEvicted) {
		if d.ctx.Err() != nil {
			return all, errClosed
		}
		evicted, err := d.evictImages(batch)
		tell(evicted...)
		if err != nil {
			return all, err
		}
	}
	return all, nil
}

// evicted tells of an eviction.
func (d *Disk) evicted(e Eviction) {
	log := d.log.With("kind", e.Kind, "bytes", e.Bytes, "reason", e.Reason, "last_used", e.Used)
	switch {
	case e.Record != nil:
		log.Info("evicted", "name", e.Record.Name, "version", e.Record.Labels[acproxy.LabelVersion], "digest", e.Record.Digest)
	case e.File != "":
		log.Info("evicted", "file", e.File)
	default:
		log.Info("evicted", "ref", e.Ref)
	}
	if d.tellEvicted != nil {
		d.tellEvicted(e)
	}
}

// evictPartial removes what has arrived of an image, unless somebody has taken it up.
func (d *Disk) evictPartial(key string) (Eviction, error) {
	d.mu.Lock()
	s, ok := d.suspended[key]
	if ok = ok && !d.leases.busy(s.lease); ok {
		delete(d.suspended, key)
	}
	d.mu.Unlock()
	if !ok {
		return Eviction{}, nil
	}
	return s.eviction(), d.removeSuspended(s)
}

// evictAside removes a file from the quarantine directory. Its reason goes last: without it the file would be one that nobody knows anything of.
func (d *Disk) evictAside(v victim) (Eviction, error) {
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	path := d.path(quarantineDir, v.file)
	err := errors.Join(d.removeIfThere(path), d.removeIfThere(path+reasonExt), d.fsys.SyncDir(d.path(quarantineDir)))
	if err != nil {
		return Eviction{}, err
	}
	d.space.mu.Lock()
	d.space.quarantine = max(0, d.space.quarantine-v.bytes)
	d.space.mu.Unlock()
	return Eviction{Kind: EvictSetAside, Bytes: v.bytes, File: v.file}, nil
}

// evictImages removes images in one transaction.
func (d *Disk) evictImages(batch []victim) ([]Eviction, error) {
	sorted := slices.SortedFunc(slices.Values(batch), func(a, b victim) int { return compareDigests(a.digest, b.digest) })
	leaving := make(map[acproxy.Digest]bool)
	for _, v := range sorted {
		// Locked in order, and nobody else waits for a second lock while holding one.
		defer d.locks.lock(v.digest)()
		leaving[v.digest] = d.leases.leave(v.digest, false)
	}
	// In the order of the plan, in which what needs something goes before what it needs.
	return d.removeImages(func(tx *bolt.Tx, drop func(h held, used time.Time) error) error {
		p := &planner{d: d, now: d.now()}
		for _, v := range batch {
			if !leaving[v.digest] {
				continue
			}
			if there, err := get(tx, bucketOrder, v.place); err != nil || there == nil {
				if err != nil {
					return err
				}
				continue
			}
			x, err := p.examine(tx, v.place)
			if err == nil && x.why == "" {
				err = drop(x.h, x.used)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}, slices.DeleteFunc(sorted, func(v victim) bool { return !leaving[v.digest] }))
}

// removeImages removes the images that choose drops, in one transaction, and then their files. The caller holds the locks of the victims, and has said
// that they leave.
//
//	index transaction ─▶ remove blobs ─▶ fsync directories ─▶ remove sidecars ─▶ fsync directories
//
// What is known of names goes with their last images, and is remembered for a while.
//
// A crash in between leaves both files of an image, and it is there again, or the sidecar, which the next start removes.
func (d *Disk) removeImages(choose func(tx *bolt.Tx, drop func(h held, used time.Time) error) error, victims []victim) ([]Eviction, error) {
	var evicted []Eviction
	var names []Discovered
	dropped := make(map[acproxy.Digest]held)
	w := new(write)
	for _, v := range victims {
		w.effects = append(w.effects, effect{digest: v.digest})
	}
	w.change = func(tx *bolt.Tx) error {
		evicted, names, w.loose = nil, nil, 0
		clear(dropped)
		return choose(tx, func(h held, used time.Time) error {
			evicted = append(evicted, h.eviction(used))
			dropped[h.Digest] = h
			// Until the files are gone, they count for themselves.
			w.loose += h.bytes()
			if err := dropImage(tx, h.Digest); err != nil {
				return err
			}
			k, last, err := dropKnown(tx, h.Name)
			if last {
				names = append(names, k)
			}
			return err
		})
	}
	err := d.commit(w)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		// The transaction that would make room needs some itself. Without its bytes an image counts as lost, which is as good as evicted.
		d.log.Warn("the disk is too full to write what is evicted: the bytes go first", "images", len(victims))
		err = d.removeBlobsFirst(choose)
		if err == nil {
			err = d.commit(w)
		}
	}
	d.space.loosen()
	if err != nil {
		for _, v := range victims {
			d.leases.stays(v.digest)
		}
		return nil, err
	}
	d.mu.Lock()
	for digest := range dropped {
		delete(d.touched, digest)
	}
	d.mu.Unlock()
	for digest := range dropped {
		d.bar(digest, "")
	}
	for _, v := range victims {
		if _, ok := dropped[v.digest]; !ok {
			d.leases.stays(v.digest)
		}
	}
	for _, k := range names {
		if _, newer := d.heard.get(k.Name); !newer {
			d.heard.put(k)
		}
	}
	err = errors.Join(d.removeFilesOf(dropped), d.removeNames(names))
	// While the index is made, what files say counts as well.
	d.memory.changes.Add(1)
	return evicted, err
}

// removeBlobsFirst removes the bytes of the images that choose drops, and leaves the rest.
func (d *Disk) removeBlobsFirst(choose func(tx *bolt.Tx, drop func(h held, used time.Time) error) error) error {
	var blobs []string
	err := d.view(func(tx *bolt.Tx) error {
		blobs = nil
		return choose(tx, func(h held, _ time.Time) error {
			blobs = append(blobs, d.blobPath(h.Digest))
			return nil
		})
	})
	for _, path := range blobs {
		err = errors.Join(err, d.removeIfThere(path))
	}
	return err
}

// removeFilesOf removes the files of images that are in the index no more. What can't be removed goes on being counted; the next start sees to it.
func (d *Disk) removeFilesOf(dropped map[acproxy.Digest]held) error {
	var errs []error
	kept := make(map[acproxy.Digest]bool)
	step := func(path func(acproxy.Digest) string, removed func(held) int64) {
		dirs := make(map[string][]held)
		for digest, h := range dropped {
			if kept[digest] {
				continue
			}
			if err := d.removeIfThere(path(digest)); err != nil {
				errs = append(errs, err)
				kept[digest] = true
				continue
			}
			dirs[filepath.Dir(path(digest))] = append(dirs[filepath.Dir(path(digest))], h)
		}
		for dir, of := range dirs {
			err := d.fsys.SyncDir(dir)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			for _, h := range of {
				d.space.release(removed(h))
				if err != nil {
					kept[h.Digest] = true
				}
			}
		}
	}
	step(d.blobPath, func(h held) int64 { return d.leases.gone(h.Digest, h.blobBytes()) })
	step(d.sidecarPath, func(h held) int64 { return blocks(h.Sidecar) })
	for digest := range dropped {
		// Those whose blob could not be removed.
		d.leases.stays(digest)
	}
	return errors.Join(errs...)
}
