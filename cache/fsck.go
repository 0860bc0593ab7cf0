package cache

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// The codes of what [Check] finds beside that which a scrub finds.
const (
	CodeVersion           = "version"            // the file VERSION is missing, or says nothing that makes sense
	CodeLayout            = "layout"             // something else stands where a directory of the store should
	CodeStray             = "stray"              // a file that the store doesn't know
	CodeIndexMissing      = "index-missing"      // there is no index
	CodeIndexBroken       = "index-broken"       // the index is damaged
	CodeIndexInconsistent = "index-inconsistent" // the index contradicts itself
	CodeIndexAside        = "index-set-aside"    // a broken index that is kept
	CodeIndexOld          = "index-old"          // the index is of another version, or was being made
	CodeNotIndexed        = "not-indexed"        // an image that the index doesn't know
	CodeLeftover          = "leftover"           // part of an image that is not held
	CodeOrphan            = "orphan-blob"        // bytes of which nobody knows anything
	CodeLost              = "lost"               // an image whose bytes are known to be lost
	CodeNameMissing       = "name-missing"       // what discovery found out is in the index only
	CodeNameUnreadable    = "name-unreadable"    // what discovery found out can't be read
	CodePartial           = "partial"            // an image that has arrived in part
	CodeSetAside          = "set-aside"          // a file in the quarantine directory
)

// CheckOptions say how to check a store.
type CheckOptions struct {
	Repair   bool            // whether what is found is repaired
	Progress func(Scrubbed)  // is told how far it has come; nil means nobody is told
	Found    func(Finding)   // is told what is found, as it is found, before anything is repaired; nil means nobody is told
	Repaired func(f Finding) // is told what was repaired, or could not be; nil means nobody is told
}

// Checked is what checking a store has come to.
type Checked struct {
	Scrubbed          // what was read; Problems counts what was found
	Notes    int64    `json:"notes"`    // findings that are worth knowing, where nothing is wrong
	Repaired int64    `json:"repaired"` // problems that were repaired
	Left     int64    `json:"left"`     // problems that weren't
	Failures []string `json:"failures,omitempty"`
}

// Check checks the store in a directory that nobody has open: every file and every row of the index, the bytes of every blob. It changes nothing unless
// it is to repair what it finds; then too nothing is deleted: what can't be used is moved to the quarantine directory. A directory that holds no store,
// that another process has open, or that a newer version of acproxy has written, is an error.
func Check(ctx context.Context, dir string, opts Options, o CheckOptions) (Checked, error) {
	opts.Idle = true
	c := &checker{d: newDisk(dir, opts), o: o, opts: opts}
	defer c.d.cancel()
	began := c.d.now()
	err := c.check(ctx)
	c.sum.Took = c.d.now().Sub(began)
	c.sum.Left = c.sum.Problems - c.sum.Repaired
	if err != nil {
		err = fmt.Errorf("checking the store in %s: %w", dir, err)
	}
	return c.sum, err
}

// checker checks a store. It reads everything first, and repairs afterwards.
type checker struct {
	d    *Disk // not open: it knows the paths, and reads the index
	o    CheckOptions
	opts Options
	sum  Checked

	unmade  bool // the store was being made when it was last open: there is nothing in it yet, and what isn't there is none that is missing
	indexed bool // the index can be read, and names all that is held
	unclean bool // the store was not closed properly: something may have been on its way in or out
	// before are done before the store is opened for repairs, after are done then.
	before, after []repair
}

// repair is a problem and what is done about it.
type repair struct {
	Finding
	do func(d *Disk) error
}

func (c *checker) check(ctx context.Context) (err error) {
	d := c.d
	if fi, err := os.Stat(d.dir); err != nil || !fi.IsDir() {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-store", Detail: "there is no directory " + d.dir, Err: err}
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == blobDir || e.Name() == versionFile }) {
		return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-store", Detail: "the directory holds no store"}
	}
	if err := d.lockDir(); err != nil {
		return err
	}
	locked := true
	defer func() {
		if locked {
			err = errors.Join(err, d.lock.Close())
		}
	}()
	if err := c.read(ctx, entries); err != nil {
		return err
	}
	if !c.o.Repair || len(c.before)+len(c.after) == 0 {
		return nil
	}
	locked = false
	return c.repair(ctx)
}

// read looks at everything.
func (c *checker) read(ctx context.Context, entries []fs.DirEntry) (err error) {
	d := c.d
	c.unmade = unmade(d, entries)
	if err := c.version(); err != nil {
		return err
	}
	if err := c.layout(entries); err != nil {
		return err
	}
	ix, err := c.index(ctx)
	if err != nil {
		return err
	}
	if ix != nil {
		d.learn(func(k *knowledge) { k.ix = ix })
		defer func() { err = errors.Join(err, ix.close()) }()
	}
	c.count()
	for _, step := range []func(context.Context) error{c.names, c.partials, c.quarantine, c.blobs} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// unmade reports whether there is nothing in a store but what its first start makes before the index, which comes last.
func unmade(d *Disk, entries []fs.DirEntry) bool {
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, indexFile) || name == refTableFile {
			return false
		}
	}
	for _, dir := range []string{blobDir, nameDir, quarantineDir} {
		if entries, err := os.ReadDir(d.path(dir)); len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

// toMake notes something that isn't there because the first start was interrupted.
func (c *checker) toMake(code, path string) {
	c.note(code, path, "it is not there: the store was being made when it was last open", "the next start makes it")
}

// found notes a finding. do, if it isn't nil, repairs it.
func (c *checker) found(f Finding, do func(d *Disk) error) {
	if f.Note {
		c.sum.Notes++
	} else {
		c.sum.Problems++
	}
	if c.o.Found != nil {
		c.o.Found(f)
	}
	if do != nil {
		c.after = append(c.after, repair{f, do})
	}
}

// note notes what is worth knowing.
func (c *checker) note(code, path, detail, next string) {
	c.found(Finding{Code: code, Path: c.d.relative(path), Detail: detail, Repair: next, Note: true}, nil)
}

// first notes a problem that has to be repaired before the store can be opened.
func (c *checker) first(f Finding, do func(d *Disk) error) {
	c.found(f, nil)
	c.before = append(c.before, repair{f, do})
}

// aside is the repair of what has no place where it is.
func (c *checker) aside(code, path, detail string) {
	c.found(Finding{Code: code, Path: c.d.relative(path), Detail: detail, Repair: "it is moved to the quarantine directory"}, func(d *Disk) error {
		return ifThere(path, func() error { return d.setAside(path, detail) })
	})
}

// forbidden notes a problem that somebody else has to repair: something that this process may not open.
func (c *checker) forbidden(code, path string, err error) {
	c.found(Finding{Code: code, Path: c.d.relative(path), Detail: fmt.Sprintf("it may not be opened: %v", err), Repair: "nothing is done about it: " + allow}, nil)
}

// list lists a directory as far as it can be listed. That it isn't there, or is none, the layout has found.
func (c *checker) list(dir string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return entries, nil
	case forbidden(err):
		c.forbidden(CodeLayout, dir, err)
		return nil, nil
	}
	return nil, err
}

// ifThere does something about a file that is still there.
func ifThere(path string, do func() error) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return do()
}

func (c *checker) version() error {
	path := c.d.path(versionFile)
	b, err := readSmall(path, 64)
	version, notNumber := strconv.Atoi(strings.TrimSpace(string(b)))
	f := Finding{Code: CodeVersion, Path: versionFile, Repair: fmt.Sprintf("it is written again, with version %d", Version)}
	switch {
	case errors.Is(err, fs.ErrNotExist) && c.unmade:
		c.toMake(CodeVersion, path)
		return nil
	case errors.Is(err, fs.ErrNotExist):
		f.Detail = "it is not there"
	case acproxy.Shortage(err):
		return err
	case err != nil:
		f.Detail = err.Error()
	case notNumber != nil || version < 1:
		f.Detail = fmt.Sprintf("it holds %.20q, which is not the version of a store", b)
	case version > Version:
		return fmt.Errorf("it was written by a newer acproxy: it has version %d, this one reads up to %d; use the newer one", version, Version)
	default:
		return nil
	}
	c.first(f, func(d *Disk) error {
		if err := replaceable(d, path, err == nil); err != nil {
			return err
		}
		return durable.WriteFile(d.fsys, path, []byte(strconv.Itoa(Version)+"\n"), filePerm)
	})
	return nil
}

// replaceable moves what can't be read, or isn't a file, out of the way of one, beside it: the quarantine directory may not be there yet.
func replaceable(d *Disk, path string, read bool) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && read && fi.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		return err
	}
	return d.fsys.Rename(path, asideName(d, path))
}

// asideName is where something is kept that is in the way of the store's own layout, for now.
func asideName(d *Disk, path string) string { return path + ".aside-" + filepath.Base(d.temp())[:6] }

// layout looks at what lies in the directory itself.
func (c *checker) layout(entries []fs.DirEntry) error {
	d := c.d
	there := make(map[string]fs.DirEntry)
	for _, e := range entries {
		there[e.Name()] = e
	}
	for _, dir := range []string{blobDir, nameDir, partialDir, quarantineDir} {
		e, ok := there[dir]
		if ok && e.IsDir() {
			continue
		}
		path := d.path(dir)
		if !ok && c.unmade {
			c.toMake(CodeLayout, path)
			continue
		}
		f := Finding{Code: CodeLayout, Path: dir, Detail: "the directory is not there", Repair: "it is made"}
		if ok {
			f.Detail, f.Repair = "it is not a directory", "it is moved out of the way, and the directory is made"
		}
		c.first(f, func(d *Disk) error {
			if ok {
				if err := d.fsys.Rename(path, asideName(d, path)); err != nil {
					return err
				}
			}
			return d.fsys.MkdirAll(path, dirPerm)
		})
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case slices.Contains([]string{versionFile, lockFile, indexFile, indexFile + olderExt, refTableFile, blobDir, nameDir, partialDir, quarantineDir, "lost+found"}, name):
		case strings.HasPrefix(name, indexFile+".broken-"):
			c.note(CodeIndexAside, d.path(name), "it was broken, and is kept", "remove it when it is of no use any more")
		default:
			c.aside(CodeStray, d.path(name), "nothing of this name belongs here")
		}
	}
	return nil
}

// index opens the index if it is good.
func (c *checker) index(ctx context.Context) (*index, error) {
	path := c.d.path(indexFile)
	anew := func(code, detail string) {
		c.first(Finding{Code: code, Path: indexFile, Detail: detail, Repair: "it is set aside and made again from the sidecars"}, func(d *Disk) error {
			return ifThere(path, func() error { return d.fsys.Rename(path, brokenName(path, d.now())) })
		})
	}
	ix, err := readIndex(ctx, path)
	old := false
	if err == nil {
		if err = ix.verify(ctx); err == nil {
			old, err = c.consistent(ix)
		}
		if err != nil || old {
			err = errors.Join(err, ix.close())
		}
	}
	if err != nil {
		c.indexed = false
	}
	var inconsistent *inconsistency
	switch {
	case ctx.Err() != nil:
		if err == nil && !old {
			err = ix.close()
		}
		return nil, errors.Join(context.Cause(ctx), err)
	case errors.Is(err, fs.ErrNotExist) && c.unmade:
		c.toMake(CodeIndexMissing, path)
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		anew(CodeIndexMissing, "it is not there")
		return nil, nil
	case errors.As(err, &inconsistent):
		anew(CodeIndexInconsistent, inconsistent.Error())
		return nil, nil
	case acproxy.Shortage(err), errors.Is(err, bolterrors.ErrTimeout):
		// It says nothing of the index.
		return nil, err
	case err != nil:
		anew(CodeIndexBroken, err.Error())
		return nil, nil
	case old:
		c.unclean = true
		c.note(CodeIndexOld, path, "it is of another version than this one reads", "the next start makes it again from the sidecars")
		return nil, nil
	}
	return ix, nil
}

// inconsistency is what an index says that it contradicts itself.
type inconsistency struct{ what string }

// Error returns what is contradictory.
func (i *inconsistency) Error() string { return i.what }

func inconsistent(format string, args ...any) error {
	return &inconsistency{fmt.Sprintf(format, args...)}
}

// consistent looks whether the rows of an index agree with each other, and what it says of itself. It reports whether it is of another version, so that
// nothing more can be said.
func (c *checker) consistent(ix *index) (old bool, err error) {
	err = ix.view(func(tx *bolt.Tx) error {
		err := fits(tx, schema)
		if old = errors.Is(err, errOlder); old {
			return nil
		}
		if err != nil {
			return err
		}
		if c.indexed, err = isState(tx, stateComplete); err != nil {
			return err
		}
		if c.unclean, err = isState(tx, stateOpen); err != nil {
			return err
		}
		return consistentRows(tx)
	})
	if err == nil && !old && !c.indexed {
		c.unclean = true
		c.note(CodeIndexOld, ix.path, "it was being made when the store was last open", "the next start goes on with it")
	}
	return old, err
}

// consistentRows compares the rows that are derived from records and refs with these.
func consistentRows(tx *bolt.Tx) error {
	var sum totals
	want := make(map[string]int)
	err := scan(tx, bucketRecords, nil, nil, func(key, _ []byte) error {
		digest, err := digestIn(key)
		if err != nil {
			return err
		}
		h, ok, err := getRecord(tx, digest)
		if err != nil || !ok {
			return err
		}
		sum.add(h, 1)
		keys := keysOf(h.Record)
		used, err := orderTime(tx, h.Record)
		if err != nil {
			return err
		}
		if !h.Pinned {
			keys = append(keys, bucketKey{bucketOrder, orderKey(h.Record, used)})
		}
		keys = append(keys, bucketKey{bucketManifests, digest[:]})
		if h.Signed {
			keys = append(keys, bucketKey{bucketSignatures, digest[:]})
		}
		for _, k := range keys {
			want[k.bucket]++
			if b, err := get(tx, k.bucket, k.key); b == nil || err != nil {
				if err == nil {
					err = inconsistent("the image %v is not among %s", digest, k.bucket)
				}
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = scan(tx, bucketRefs, nil, nil, func(key, value []byte) error {
		r, _, err := getResolution(tx, key)
		if err != nil {
			return err
		}
		want[bucketHeld]++
		for bucket, key := range map[string][]byte{bucketRecords: r.Digest[:], bucketHeld: append(r.Digest[:], key...)} {
			b, err := get(tx, bucket, key)
			if err != nil {
				return err
			}
			if b == nil {
				return inconsistent("the ref %v answers %v, which is not among %s", r.Ref, r.Digest, bucket)
			}
			if bucket == bucketRecords && !bytes.Equal(value, answerRow(r, b)) && !bytes.Equal(value, answerRow(r, nil)) {
				return inconsistent("the ref %v has a record of %v beside it that is not the one among %s", r.Ref, r.Digest, bucket)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, bucket := range []string{
		bucketManifests, bucketSignatures, bucketHeld, bucketIDs, bucketSigned, bucketNames, bucketUninspected, bucketQuarantined, bucketPinned, bucketOrder, bucketDependents,
	} {
		n := 0
		if err := scan(tx, bucket, nil, nil, func(_, _ []byte) error { n++; return nil }); err != nil {
			return err
		}
		if n != want[bucket] {
			return inconsistent("%s has %d rows, and there should be %d", bucket, n, want[bucket])
		}
	}
	t, err := getTotals(tx)
	if err == nil && t != sum {
		err = inconsistent("the sums are %+v, and should be %+v", t, sum)
	}
	return err
}

// count finds out how much there is to read.
func (c *checker) count() {
	if c.indexed {
		err := c.d.view(func(tx *bolt.Tx) error {
			t, err := getTotals(tx)
			c.sum.OfImages, c.sum.OfBytes = t.Images, t.Blobs
			return err
		})
		if err == nil {
			return
		}
	}
	// What can't be listed here is found later.
	_ = filepath.WalkDir(c.d.path(blobDir), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && !strings.HasSuffix(e.Name(), sidecarExt) {
			if fi, err := e.Info(); err == nil {
				c.sum.OfImages++
				c.sum.OfBytes += blocks(fi.Size())
			}
		}
		return nil
	})
}

// names looks at what is kept of discovery.
func (c *checker) names(ctx context.Context) error {
	d := c.d
	there := make(map[string]bool)
	entries, err := c.list(d.path(nameDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		path := d.path(nameDir, e.Name())
		switch _, err := d.parseName(path); {
		case err == nil:
			there[path] = true
		case forbidden(err):
			there[path] = true
			c.forbidden(CodeNameUnreadable, path, err)
		case unreadable(err):
			c.aside(CodeNameUnreadable, path, err.Error())
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	if d.index() == nil {
		return nil
	}
	return d.view(func(tx *bolt.Tx) error {
		return scan(tx, bucketKnown, nil, nil, func(key, _ []byte) error {
			k, _, err := getKnown(tx, key)
			if err != nil {
				return err
			}
			if path := d.namePath(k.Name); !there[path] {
				c.found(Finding{Code: CodeNameMissing, Path: d.relative(path), Detail: "what discovery found out about " + k.Name + " is in the index only", Repair: "it is written again from the index"},
					func(d *Disk) error {
						file, err := seal(k)
						if err == nil {
							err = d.writeName(k.Name, file)
						}
						return err
					})
			}
			return nil
		})
	})
}

// partials looks at what has arrived in part.
func (c *checker) partials(context.Context) error {
	d := c.d
	entries, err := c.list(d.path(partialDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := d.path(partialDir, e.Name())
		partial, isNote := strings.CutSuffix(path, sidecarExt)
		if isNote {
			if _, err := os.Lstat(partial); err == nil {
				continue
			}
		}
		if arrival, fi, err := d.partialNote(path); err == nil {
			c.note(CodePartial, path, fmt.Sprintf("%s of %v have arrived", size(fi.Size()), arrival.Ref), "it is taken up where it was left, or removed after a while")
			continue
		}
		c.note(CodePartial, path, "it was not finished when the store was last open, and can't be taken up", "the next start removes it")
	}
	return nil
}

// quarantine lists what was set aside.
func (c *checker) quarantine(context.Context) error {
	d := c.d
	entries, err := c.list(d.path(quarantineDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), reasonExt) {
			continue
		}
		path := d.path(quarantineDir, e.Name())
		why, err := readSmall(path+reasonExt, 64<<10)
		if err != nil {
			why = []byte("nobody has noted why")
		}
		c.note(CodeSetAside, path, strings.Join(strings.Fields(string(why)), " "), "remove it when it is of no use any more")
	}
	return nil
}

// blobs looks at the images.
func (c *checker) blobs(ctx context.Context) error {
	d := c.d
	entries, err := c.list(d.path(blobDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if b, err := hex.DecodeString(e.Name()); err != nil || len(b) != 1 || e.Name() != hex.EncodeToString(b) {
			c.aside(CodeStray, d.path(blobDir, e.Name()), "nothing of this name belongs here")
		}
	}
	for i := range 256 {
		if err := c.shard(ctx, fmt.Sprintf("%02x", i)); err != nil {
			return err
		}
	}
	return nil
}

// shard looks at the images in one directory.
func (c *checker) shard(ctx context.Context, name string) error {
	d := c.d
	files := make(map[acproxy.Digest]found)
	path := d.path(blobDir, name)
	names, err := namesIn(path)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
	case forbidden(err):
		c.forbidden(CodeLayout, path, err)
		return nil
	case beyondHope(err):
		f := Finding{Code: CodeLayout, Path: d.relative(path), Detail: fmt.Sprintf("it can't be listed: %v", err), Repair: "it is moved to the quarantine directory"}
		c.found(f, func(d *Disk) error {
			// The start may have made another one in its place.
			if _, err := namesIn(path); beyondHope(err) {
				return d.setShardAside(name, err)
			}
			return nil
		})
	default:
		return err
	}
	for _, file := range names {
		digest, isSidecar, ok := shardFile(name, file)
		if !ok {
			c.aside(CodeStray, d.path(blobDir, name, file), "nothing of this name belongs here")
			continue
		}
		f := files[digest]
		f.sidecar = f.sidecar || isSidecar
		f.blob = f.blob || !isSidecar
		files[digest] = f
	}
	if d.index() != nil {
		prefix, _ := hex.DecodeString(name)
		err := d.view(func(tx *bolt.Tx) error {
			return scan(tx, bucketRecords, prefix, nil, func(key, _ []byte) error {
				digest, err := digestIn(key)
				if _, there := files[digest]; err == nil && !there {
					files[digest] = found{}
				}
				return err
			})
		})
		if err != nil {
			return err
		}
	}
	digests := make([]acproxy.Digest, 0, len(files))
	for digest := range files {
		digests = append(digests, digest)
	}
	slices.SortFunc(digests, compareDigests)
	for _, digest := range digests {
		if err := c.image(ctx, digest, files[digest]); err != nil {
			return err
		}
	}
	return nil
}

// image looks at one image: its row, its sidecar, its blob.
func (c *checker) image(ctx context.Context, digest acproxy.Digest, f found) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	d := c.d
	var known *image
	if d.index() != nil {
		err := d.view(func(tx *bolt.Tx) (err error) {
			known, err = getImage(tx, digest)
			return err
		})
		if err != nil {
			return err
		}
	}
	if known != nil {
		if known.Record.lost() && f.blob && d.mayRead(digest) {
			nf := d.finding(known.Record, CodeFound, d.blobPath(digest), "the image is marked as lost, and there are bytes of it")
			nf.Repair, nf.Note = regained, c.unclean
			c.sum.Known++
			c.found(nf, func(d *Disk) error {
				_, err := d.regainIfThere(digest)
				return err
			})
			return nil
		}
		return c.known(ctx, known)
	}
	beside, err := d.readSidecar(digest)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !unreadable(err) {
		return err
	}
	sidecarPath, blobPath := d.sidecarPath(digest), d.blobPath(digest)
	switch {
	case beside == nil && f.sidecar && forbidden(err):
		c.forbidden(CodeSidecarUnreadable, sidecarPath, err)
	case beside == nil && f.sidecar:
		c.aside(CodeSidecarUnreadable, sidecarPath, err.Error())
		if f.blob {
			c.aside(CodeOrphan, blobPath, "nothing is known of these bytes: they have no sidecar that can be read")
		}
	case beside == nil:
		c.aside(CodeOrphan, blobPath, "nothing is known of these bytes: they have no sidecar")
	case beside.Record.lost() && !f.blob:
		c.lost(beside.Record)
	case !f.blob:
		c.leftover(beside.Record, sidecarPath)
	default:
		if c.indexed {
			nf := d.finding(beside.Record, CodeNotIndexed, sidecarPath, "the index doesn't know the image")
			nf.Repair, nf.Note = "it is taken into the index", c.unclean
			c.found(nf, func(d *Disk) (err error) {
				var displaced []acproxy.Digest
				err = d.on(func(ix *index) error {
					_, displaced, err = d.adopt(ix, []acproxy.Digest{digest})
					return err
				})
				d.rewrite(displaced)
				return err
			})
		}
		return c.blob(ctx, beside.Record)
	}
	return nil
}

// leftover notes a sidecar without a blob, of an image that the index doesn't know.
func (c *checker) leftover(rec Record, path string) {
	f := c.d.finding(rec, CodeLeftover, path, "it is what a commit or a removal has left that was interrupted: the image's bytes are not there")
	f.Repair = "it is moved to the quarantine directory"
	if f.Note = c.unclean && c.indexed; f.Note {
		f.Repair = "the next start removes it"
		c.found(f, nil)
		return
	}
	c.found(f, func(d *Disk) error { return ifThere(path, func() error { return d.setAside(path, f.Detail) }) })
}

func (c *checker) lost(rec Record) {
	f := c.d.finding(rec, CodeLost, c.d.blobPath(rec.Digest), "the image's bytes are lost: "+rec.Reason)
	f.Note, f.Repair = true, "it is fetched again"
	c.sum.Known++
	c.found(f, nil)
}

// known looks at an image that the index knows.
func (c *checker) known(ctx context.Context, img *image) error {
	d := c.d
	digest := img.Record.Digest
	f, ok, err := d.sidecarFinding(img)
	if err != nil {
		return err
	}
	if !ok {
		f.Repair = "it is written again from the index"
		c.found(f, func(d *Disk) error {
			defer d.locks.lock(digest)()
			img, err := d.imageLocked(digest)
			if err != nil || img == nil {
				return err
			}
			f, ok, err := d.sidecarFinding(img)
			if ok || err != nil {
				return err
			}
			return d.rewriteSidecar(img, f)
		})
	}
	if img.Record.lost() {
		c.lost(img.Record)
		return nil
	}
	return c.blob(ctx, img.Record)
}

// blob reads the bytes of an image.
func (c *checker) blob(ctx context.Context, rec Record) error {
	d := c.d
	v, err := d.examine(ctx, rec, new(pacer), func(n int) error {
		c.sum.Bytes += int64(n)
		if c.o.Progress != nil {
			c.o.Progress(c.sum.Scrubbed)
		}
		return nil
	})
	if err != nil {
		return err
	}
	f := d.finding(rec, v.code, d.blobPath(rec.Digest), v.detail)
	switch v.code {
	case "":
		c.sum.Images++
	case CodeUnstable:
		f.Repair = unstable
		c.found(f, nil)
	case CodeImageIDDiffers:
		f.Repair = "the image is quarantined"
		c.found(f, func(d *Disk) error { return d.Quarantine(ctx, rec.Digest, v.code, v.detail) })
	default:
		f.Repair = condemned(v.code)
		c.found(f, func(d *Disk) error {
			_, err := d.condemn(rec.Digest, v)
			return err
		})
	}
	return nil
}

// repair repairs what was found. The store is opened for it, which does some of it by itself.
func (c *checker) repair(ctx context.Context) error {
	for _, r := range c.before {
		c.repaired(r, r.do(c.d))
	}
	if c.sum.Repaired < int64(len(c.before)) {
		// What is left in the way would keep the store from being opened.
		return errors.Join(errors.New("not all of it could be repaired"), c.d.lock.Close())
	}
	d := newDisk(c.d.dir, c.opts)
	d.lock = c.d.lock
	if err := d.open(); err != nil {
		d.cancel()
		return errors.Join(err, d.lock.Close())
	}
	err := d.ready(ctx, false)
	if err == nil {
		err = c.asides(d)
	}
	if err == nil {
		for _, r := range c.after {
			if err = context.Cause(ctx); err != nil {
				break
			}
			c.repaired(r, r.do(d))
		}
	}
	return errors.Join(err, d.Close())
}

// asides moves what was put out of the way to the quarantine directory, now that there is one.
func (c *checker) asides(d *Disk) error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), ".aside-") {
			if err := d.setAside(d.path(e.Name()), "it stood in the way of the store's own files"); err != nil {
				return err
			}
		}
	}
	return nil
}

// repaired notes how a repair went.
func (c *checker) repaired(r repair, err error) {
	f := r.Finding
	f.Repaired = err == nil
	switch {
	case err != nil:
		f.Detail += fmt.Sprintf("; it could not be repaired: %v", err)
		c.sum.Failures = append(c.sum.Failures, fmt.Sprintf("%s: %v", f.Path, err))
	case !f.Note:
		c.sum.Repaired++
	}
	if c.o.Repaired != nil {
		c.o.Repaired(f)
	}
}
