package cache

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// found is what a shard's directory holds for a digest.
type found struct{ blob, sidecar bool }

// maxAdopted is how many sidecars are read for one transaction.
const maxAdopted = 512

// sweep compares the files with the index and makes them agree. With trust the index is known to have been complete when the store was last
// open: what it doesn't name was then on its way in or out, and nobody had been told that it was in.
//
//	in the index │ sidecar │ blob │
//	yes          │ yes     │ yes  │ nothing to do
//	yes          │ no      │      │ the sidecar is written again
//	yes          │         │ no   │ the image is quarantined as missing, so that it is fetched again
//	yes, as lost │         │ yes  │ if they are the image's bytes, it is whole again; else they are moved to the quarantine directory
//	no           │ yes     │ yes  │ adopted: everything about it was durable before its blob got its name
//	no           │ yes     │ no   │ with trust the sidecar is removed; without, it is moved to the quarantine directory
//	no           │ no      │ yes  │ no crash leaves this: the blob is moved to the quarantine directory
//
// A sidecar that can't be read counts as none, and is moved to the quarantine directory, as is a shard's directory that can't be listed. What this process may not
// open is left where it is, and the next start looks at it again: a change of owners must not empty the store. A sidecar without a blob must not be adopted: it may be of a
// commit that never came to be, and its refs would take the answers of images that are held away from them.
func (d *Disk) sweep(ix *index, trust bool) error {
	if err := d.sweepNames(ix); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(d.ctx)
	defer cancel(nil)
	shards := make(chan string)
	var wg sync.WaitGroup
	// Twice as many as there are processors: while some wait for a file or for the index to be written, others read. Each ends when shards is
	// closed; waited for below.
	for range 2 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for name := range shards {
				if err := d.sweepShard(ctx, ix, name, trust); err != nil {
					cancel(err)
				}
				d.announce(ix, trust, false)
			}
		})
	}
	for i := range 256 {
		if ctx.Err() != nil {
			break
		}
		shards <- fmt.Sprintf("%02x", i)
	}
	close(shards)
	wg.Wait()
	return context.Cause(ctx)
}

func (d *Disk) sweepShard(ctx context.Context, ix *index, name string, trust bool) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	files, err := d.list(name)
	if err != nil {
		return err
	}
	var odd, fresh []acproxy.Digest
	prefix, _ := hex.DecodeString(name)
	indexed := make(map[acproxy.Digest]bool, len(files))
	err = ix.each(bucketRecords, prefix, nil, func(key, _ []byte) error {
		digest, err := digestIn(key)
		if f := files[digest]; err == nil && (!f.blob || !f.sidecar) {
			odd = append(odd, digest)
		}
		indexed[digest] = true
		return err
	})
	if err != nil {
		return err
	}
	// Those that are marked as lost, and have bytes all the same.
	err = ix.view(func(tx *bolt.Tx) error {
		return scan(tx, bucketQuarantined, prefix, nil, func(key, _ []byte) error {
			digest, err := digestIn(key)
			if f := files[digest]; err == nil && f.blob && f.sidecar {
				odd = append(odd, digest)
			}
			return err
		})
	})
	if err != nil {
		return err
	}
	for digest, f := range files {
		switch {
		case indexed[digest]:
		case f.blob && f.sidecar:
			fresh = append(fresh, digest)
		default:
			odd = append(odd, digest)
		}
	}
	slices.SortFunc(fresh, compareDigests)
	for together := range slices.Chunk(fresh, maxAdopted) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		left, displaced, err := d.adopt(ix, together)
		if err != nil {
			return err
		}
		d.rewrite(displaced)
		odd = append(odd, left...)
	}
	for _, digest := range odd {
		if err := d.reconcile(ix, digest, trust); err != nil {
			return err
		}
	}
	return nil
}

func compareDigests(a, b acproxy.Digest) int { return bytes.Compare(a[:], b[:]) }

// list returns what a shard's directory holds. What doesn't belong there is moved to the quarantine directory.
func (d *Disk) list(name string) (map[acproxy.Digest]found, error) {
	path := d.path(blobDir, name)
	names, err := namesIn(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case forbidden(err):
		d.leaveAlone(path, err)
		return nil, nil
	case beyondHope(err):
		return nil, d.setShardAside(name, err)
	case err != nil:
		return nil, err
	}
	files := make(map[acproxy.Digest]found, len(names)/2)
	for _, file := range names {
		digest, isSidecar, ok := shardFile(name, file)
		if !ok {
			if err := d.setAside(d.path(blobDir, name, file), "nothing of this name belongs here"); err != nil {
				return nil, err
			}
			continue
		}
		f := files[digest]
		f.sidecar = f.sidecar || isSidecar
		f.blob = f.blob || !isSidecar
		files[digest] = f
	}
	return files, nil
}

// namesIn lists a directory.
func namesIn(path string) ([]string, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// setShardAside moves a shard's directory to the quarantine directory that can't be listed.
func (d *Disk) setShardAside(name string, cause error) error {
	d.mu.Lock()
	delete(d.shards, name)
	d.mu.Unlock()
	return d.setAside(d.path(blobDir, name), fmt.Sprintf("it can't be listed: %v", cause))
}

// shardFile reads the name of a file in a shard's directory. It reports false if there is no such file in a store.
func shardFile(shard, file string) (digest acproxy.Digest, isSidecar, ok bool) {
	digits, isSidecar := strings.CutSuffix(file, sidecarExt)
	digest, err := acproxy.ParseDigest("sha256:" + digits)
	return digest, isSidecar, err == nil && digits[:2] == shard
}

// adopt takes images of one shard into the index whose blobs and sidecars are there. It returns those whose sidecars can't be read, or say that the bytes are lost,
// and those whose sidecars are no longer right about their refs; see rewrite.
//
//	fsync directory ─▶ index transaction (shared), fsync
//
// Who gave the files their names may have been killed before he had these synced, and the index names nothing that a loss of power may take.
func (d *Disk) adopt(ix *index, digests []acproxy.Digest) (left, displaced []acproxy.Digest, err error) {
	// Locked in order, and nobody else waits for a second lock while holding one.
	unlock := make([]func(), len(digests))
	for i, digest := range digests {
		unlock[i] = d.locks.lock(digest)
	}
	defer func() {
		for _, u := range unlock {
			u()
		}
	}()
	images := make([]*image, len(digests))
	for i, digest := range digests {
		images[i], err = d.readSidecar(digest)
		switch {
		case err == nil && images[i].Record.lost():
			// There are bytes, and so it may not be.
			images[i], left = nil, append(left, digest)
		case err == nil:
		case unreadable(err), errors.Is(err, fs.ErrNotExist):
			left = append(left, digest)
		default:
			return nil, nil, err
		}
	}
	if err := d.fsys.SyncDir(filepath.Dir(d.blobPath(digests[0]))); err != nil {
		return nil, nil, err
	}
	err = ix.update(func(tx *bolt.Tx) error {
		displaced = nil
		// They come in the order of their digests, and hardly any comes later: pages need no room.
		if err := dense(tx, bucketRecords, bucketManifests, bucketSignatures, bucketHeld); err != nil {
			return err
		}
		var sum totals
		for _, img := range images {
			if img == nil {
				continue
			}
			if ok, err := hasRecord(tx, img.Record.Digest); ok || err != nil {
				if err != nil {
					return err
				}
				continue
			}
			losers, err := putRows(tx, img, &sum)
			if err != nil {
				return err
			}
			displaced = append(displaced, losers...)
		}
		return addTotals(tx, sum)
	})
	for _, img := range images {
		if img != nil {
			d.raise(img.Refs)
		}
	}
	return left, displaced, err
}

// readSidecar reads a sidecar. The error matches errUnreadable if trying again won't help.
func (d *Disk) readSidecar(digest acproxy.Digest) (img *image, err error) {
	err = readSealed("the sidecar of "+digest.String(), d.sidecarPath(digest), func(file []byte) error {
		img, err = parseSidecar(file, digest)
		return err
	})
	return img, err
}

// reconcile makes the index and the files agree about one image, as sweep says.
func (d *Disk) reconcile(ix *index, digest acproxy.Digest, trust bool) error {
	defer d.locks.lock(digest)()
	var known *image
	err := ix.view(func(tx *bolt.Tx) (err error) {
		known, err = getImage(tx, digest)
		return err
	})
	if err != nil {
		return err
	}
	fi, err := os.Lstat(d.blobPath(digest))
	switch {
	case forbidden(err):
		// So is the whole directory, which was said. Who asks for the image is told that it is lost.
		return nil
	case beyondHope(err) && known == nil:
		d.leaveAlone(d.blobPath(digest), err)
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist) && !beyondHope(err):
		return err
	}
	blob := err == nil && fi.Mode().IsRegular()
	beside, err := d.readSidecar(digest)
	switch {
	case forbidden(err) && known == nil:
		d.leaveAlone(d.sidecarPath(digest), err)
		return nil
	case unreadable(err):
		if err := d.setAside(d.sidecarPath(digest), err.Error()); err != nil {
			return err
		}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	switch {
	case known != nil && known.Record.lost() && blob:
		return d.regain(ix, known, beside)
	case known != nil:
		if !blob {
			lose(&known.Record, CodeMissing)
		}
		if blob && beside != nil {
			return nil
		}
		d.log.Warn("repairing what is known of an image", "digest", digest, "blob", blob, "sidecar", beside != nil)
		_, err := d.save(ix, known)
		return err
	case beside != nil && (blob || beside.Record.lost()):
		d.log.Warn("taking an image into the index", "digest", digest, "name", beside.Record.Name, "blob", blob)
		d.raise(beside.Refs)
		if _, err := d.save(ix, beside); err != nil || !blob || !beside.Record.lost() {
			return err
		}
		return d.regain(ix, beside, nil)
	case beside != nil && !trust:
		return d.setAside(d.sidecarPath(digest), "its blob is gone, or never came")
	case beside != nil:
		d.log.Info("removing what an interrupted commit or removal left", "digest", digest)
		if err := d.fsys.Remove(d.sidecarPath(digest)); err != nil {
			return err
		}
		return d.fsys.SyncDir(filepath.Dir(d.sidecarPath(digest)))
	case fi != nil:
		return d.setAside(d.blobPath(digest), "it has no sidecar that can be read, so that nothing is known of it")
	}
	return nil
}

// regain looks at bytes that are there of an image that is marked as lost: a commit that was interrupted has brought them back, or somebody has. Its sidecar may say so
// already. The caller holds the lock of the image.
func (d *Disk) regain(ix *index, known, beside *image) error {
	digest := known.Record.Digest
	v, err := d.examine(d.ctx, known.Record, new(pacer), func(int) error { return nil })
	switch {
	case err != nil && !errors.Is(err, errGone):
		return err
	case err != nil, v.code == CodeMissing, v.code == CodeUnstable:
		return nil
	case v.code == CodeForbidden:
		d.leaveAlone(d.blobPath(digest), errors.New(v.detail))
		return nil
	case v.code != "":
		if err := d.setAside(d.blobPath(digest), "the image is marked as lost, and these are not its bytes: "+v.detail); err != nil || known.Record.Code != CodeForbidden {
			return err
		}
		// They don't count as its bytes any more.
		lose(&known.Record, v.code)
		_, err := d.save(ix, known)
		return err
	}
	img := known
	if beside != nil && !beside.Record.lost() {
		img = beside
	} else {
		img.Record.State, img.Record.Code, img.Record.Reason = OK, "", ""
	}
	d.log.Warn("the bytes of an image that was lost are there again", "digest", digest, "name", img.Record.Name)
	d.raise(img.Refs)
	_, err = d.save(ix, img)
	return err
}

// regainIfThere is regain for an image of which there may be bytes.
func (d *Disk) regainIfThere(digest acproxy.Digest) (there bool, err error) {
	if !d.mayRead(digest) {
		return false, nil
	}
	return true, d.on(func(ix *index) error { return d.reconcile(ix, digest, true) })
}

// mayRead reports whether there is a file in the place of an image's bytes that this process may read.
func (d *Disk) mayRead(digest acproxy.Digest) bool {
	return unix.Access(d.blobPath(digest), unix.R_OK) == nil
}

// lose marks an image as one whose bytes are gone.
func lose(rec *Record, code string) {
	if rec.lost() && rec.Code != CodeForbidden {
		return
	}
	rec.State, rec.Code = Quarantined, code
	rec.Reason = map[string]string{
		CodeMissing: "the file with its bytes is gone from the store",
		CodeDamaged: "the file with its bytes had another size than it should have; it was set aside",
		CodeCorrupt: "the file with its bytes had others than it should have, or could not be read; it was set aside",

		CodeForbidden: "this process may not open the file with its bytes, which was left where it is: " + allow,
	}[code]
}

// setAside moves a broken file to the quarantine directory, with the reason beside it.
//
//	write reason ─▶ rename ─▶ fsync both directories
func (d *Disk) setAside(path, reason string) error {
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	n, err := d.moveAside(path, reason)
	if err == nil {
		d.countAside(n)
	}
	return err
}

// moveAside is setAside without counting: it returns what there is to count. The caller holds measuring until it is counted.
func (d *Disk) moveAside(path, reason string) (int64, error) {
	aside := d.path(quarantineDir, safeName(filepath.Base(path))+"-"+rand.Text()[:8])
	d.log.Error("setting a file aside", "file", path, "kept", aside, "reason", reason)
	note := fmt.Sprintf("%s\nfrom %s\n%s\n", d.now().UTC().Format("2006-01-02T15:04:05Z"), path, reason)
	if err := durable.Replace(d.fsys, d.temp(), aside+reasonExt, []byte(note), filePerm); err != nil {
		return 0, err
	}
	if err := d.fsys.Rename(path, aside); err != nil {
		return 0, errors.Join(err, d.removeIfThere(aside+reasonExt))
	}
	return weigh(aside) + weigh(aside+reasonExt), errors.Join(d.fsys.SyncDir(d.path(quarantineDir)), d.fsys.SyncDir(filepath.Dir(path)))
}

// countAside counts what has come to the quarantine directory.
func (d *Disk) countAside(n int64) {
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.quarantine += n
}

// safeName cuts a name that somebody may have put into the directory by hand.
func safeName(name string) string { return name[:min(len(name), 100)] }

// sweepNames takes what is kept of discovery into the index, and writes again what only the index has.
func (d *Disk) sweepNames(ix *index) error {
	entries, err := os.ReadDir(d.path(nameDir))
	switch {
	case beyondHope(err):
		// Names are found out again.
		d.leaveAlone(d.path(nameDir), err)
	case err != nil:
		return err
	}
	for together := range slices.Chunk(entries, maxAdopted) {
		if d.ctx.Err() != nil {
			return context.Cause(d.ctx)
		}
		var known []Discovered
		for _, entry := range together {
			k, ok, err := d.readName(d.path(nameDir, entry.Name()))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if ok {
				known = append(known, k)
			}
		}
		// As in adopt.
		if err := d.fsys.SyncDir(d.path(nameDir)); err != nil {
			return err
		}
		err := ix.update(func(tx *bolt.Tx) error {
			for _, k := range known {
				before, ok, err := getKnown(tx, []byte(k.Name))
				if err == nil && (!ok || before.When.Before(k.When)) {
					err = putKnown(tx, k)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	var missing []string
	err = ix.each(bucketKnown, nil, nil, func(name, _ []byte) error {
		if _, err := os.Stat(d.namePath(string(name))); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, string(name))
		}
		return nil
	})
	for _, name := range missing {
		if err == nil {
			err = d.restoreName(ix, name)
		}
	}
	return err
}

// restoreName writes the file of a name again that has none, if the index still knows it.
func (d *Disk) restoreName(ix *index, name string) error {
	defer d.locks.lock(nameDigest(name))()
	var k Discovered
	known := false
	err := ix.view(func(tx *bolt.Tx) (err error) {
		k, known, err = getKnown(tx, []byte(name))
		return err
	})
	if !known || err != nil {
		return err
	}
	d.log.Warn("repairing what is known of a name", "name", name)
	file, err := seal(k)
	if err != nil {
		return err
	}
	return d.writeName(name, file)
}

// readName reads what is kept of discovery about one name. What can't be read is moved to the quarantine directory, but for what may not be.
func (d *Disk) readName(path string) (k Discovered, ok bool, err error) {
	k, err = d.parseName(path)
	switch {
	case err == nil:
		return k, true, nil
	case forbidden(err):
		d.leaveAlone(path, err)
		return k, false, nil
	case unreadable(err):
		return k, false, d.setAside(path, err.Error())
	}
	return k, false, err
}

// parseName reads what is kept of discovery about one name. The error matches errUnreadable if trying again won't help.
func (d *Disk) parseName(path string) (k Discovered, err error) {
	err = readSealed("it", path, func(file []byte) error {
		if err := unseal(file, &k); err != nil {
			return err
		}
		if d.namePath(k.Name) != path {
			return fmt.Errorf("it is about %q", k.Name)
		}
		return nil
	})
	return k, err
}
