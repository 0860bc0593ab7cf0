package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// The table of refs says which image each ref answered when it was last written. It is of use only while the index is being made: what is asked
// for by its digest is found without an index, and with the table so is what is asked for by a ref. Nobody believes it: the image's sidecar has
// to say the same. So it may be old, or missing, and is written now and then.
//
// It is a row of blocks of the same size:
//
//	CRC-32C of the rest u32 · number of refs u16 · each ref: its length as a varint, itself, digest · zeros
//
// All refs are in order, so that one is found by reading a few blocks.

const (
	refTableFile = "refs"
	refBlock     = 8 << 10
	refBlockHead = 6
	// maxTableRef is how long a ref in the table can be. A longer one does without.
	maxTableRef = refBlock / 2
	// keepRefsEvery is how often the table is written if refs have changed.
	keepRefsEvery = time.Hour
	// maxKeepRefs is how long Close may take to write it.
	maxKeepRefs = time.Second
)

// appendRef appends a ref to a block and reports whether there was room.
func appendRef(block []byte, ref []byte, digest []byte) ([]byte, bool) {
	if len(block)+binary.MaxVarintLen16+len(ref)+len(digest) > refBlock {
		return block, false
	}
	return append(appendString(block, ref), digest...), true
}

// sealBlock makes a block of n refs whole.
func sealBlock(block []byte, n int) []byte {
	block = append(block, make([]byte, refBlock-len(block))...)
	binary.LittleEndian.PutUint16(block[4:], uint16(n))
	binary.LittleEndian.PutUint32(block, crc32.Checksum(block[4:], castagnoli))
	return block
}

// refsIn calls fn for the refs of a block until it returns false. A block that is not one has none.
func refsIn(block []byte, fn func(ref string, digest acproxy.Digest) bool) {
	if len(block) != refBlock || binary.LittleEndian.Uint32(block) != crc32.Checksum(block[4:], castagnoli) {
		return
	}
	d := decoder{left: string(block[refBlockHead:])}
	for range binary.LittleEndian.Uint16(block[4:]) {
		ref := d.string()
		var digest acproxy.Digest
		d.array(digest[:])
		if d.bad || !fn(ref, digest) {
			return
		}
	}
}

// findInTable returns the image that a ref answered when the table of refs was written. No table and a broken one answer nothing.
func findInTable(f interface {
	ReadAt(b []byte, at int64) (int, error)
}, size int64, ref string) (digest acproxy.Digest, ok bool) {
	block := make([]byte, refBlock)
	read := func(i int64) bool {
		n, _ := f.ReadAt(block, i*refBlock)
		return n == len(block)
	}
	// The block to look into is the last one that begins at or before ref.
	low, high := int64(0), size/refBlock
	for low < high {
		middle := (low + high) / 2
		first, some := "", false
		if read(middle) {
			refsIn(block, func(ref string, _ acproxy.Digest) bool {
				first, some = ref, true
				return false
			})
		}
		switch {
		case !some:
			return digest, false
		case first <= ref:
			low = middle + 1
		default:
			high = middle
		}
	}
	if low == 0 || !read(low-1) {
		return digest, false
	}
	refsIn(block, func(at string, answer acproxy.Digest) bool {
		if ok = at == ref; ok {
			digest = answer
		}
		return at < ref
	})
	return digest, ok
}

// hinted returns what a ref answers that the index doesn't name yet: what the sidecar of the image says that the table of refs names. It is nil
// if either doesn't.
func (d *Disk) hinted(ref acproxy.Ref) *answer {
	f, err := os.Open(d.path(refTableFile))
	if err != nil {
		return nil
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil
	}
	digest, ok := findInTable(f, fi.Size(), ref.String())
	if !ok {
		return nil
	}
	img, err := d.beside(digest)
	if err != nil || d.told(img.Record).lost() {
		return nil
	}
	for _, r := range img.Refs {
		if r.Ref == ref {
			return &answer{r, img.Record, true}
		}
	}
	return nil
}

// keepRefs writes the table of refs if any may have changed since it was written last. Without it, or with an old one, nothing is wrong.
func (d *Disk) keepRefs(ctx context.Context, ix *index) {
	d.keeping.Lock()
	defer d.keeping.Unlock()
	changes := d.memory.refChanges.Load()
	if changes == d.kept || d.readOnly {
		return
	}
	err := d.writeRefs(ctx, ix)
	switch {
	case err == nil:
		d.kept = changes
	case ctx.Err() == nil && !errors.Is(err, errClosed):
		d.log.Warn("writing the table of refs", "err", noSpace(err))
	}
}

// writeRefs writes the table of refs.
//
//	create ─▶ write ─▶ fsync ─▶ close ─▶ rename ─▶ fsync directory
func (d *Disk) writeRefs(ctx context.Context, ix *index) (err error) {
	temp := d.temp()
	f, err := d.fsys.Create(temp, filePerm)
	if err != nil {
		return err
	}
	table := &tableFile{File: f, ctx: ctx, space: d.space}
	defer func() { d.space.release(table.promised) }()
	if err = fillRefs(ctx, ix, table); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.placeRefs(temp, table.written)
	}
	if err != nil {
		return errors.Join(err, d.removeIfThere(temp))
	}
	return d.fsys.SyncDir(d.dir)
}

// placeRefs gives the table its name, and has it counted in the place of the one before.
func (d *Disk) placeRefs(temp string, written int64) error {
	d.measuring.RLock()
	defer d.measuring.RUnlock()
	before := int64(0)
	if fi, err := os.Lstat(d.path(refTableFile)); err == nil {
		before = diskBytes(fi)
	}
	if err := d.fsys.Rename(temp, d.path(refTableFile)); err != nil {
		return err
	}
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	d.space.aside += blocks(written) - before
	return nil
}

// tableFile is a file that asks for the space that it takes before it takes it.
type tableFile struct {
	durable.File
	ctx               context.Context
	space             *space
	promised, written int64
}

// tableStep is how much space is asked for at once.
const tableStep = 256 << 10

// Write is the file's, if there is space for it.
func (t *tableFile) Write(b []byte) (int, error) {
	if t.written+int64(len(b)) > t.promised {
		if err := t.space.promise(t.ctx, tableStep, "the table of refs"); err != nil {
			return 0, err
		}
		t.promised += tableStep
	}
	n, err := t.File.Write(b)
	t.written += int64(n)
	return n, err
}

func fillRefs(ctx context.Context, ix *index, f durable.File) error {
	block, n := make([]byte, refBlockHead, refBlock), 0
	flush := func() error {
		_, err := f.Write(sealBlock(block, n))
		block, n = block[:refBlockHead], 0
		return err
	}
	err := ix.each(bucketRefs, nil, nil, func(key, value []byte) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if len(key) > maxTableRef || len(value) < len(acproxy.Digest{}) {
			return nil
		}
		// A resolution begins with its digest.
		digest := value[:len(acproxy.Digest{})]
		fuller, ok := appendRef(block, key, digest)
		if !ok {
			if err := flush(); err != nil {
				return err
			}
			fuller, _ = appendRef(block, key, digest)
		}
		block = fuller
		n++
		return nil
	})
	if err == nil && n > 0 {
		err = flush()
	}
	return err
}

// hasRefTable reports whether there is a table of refs.
func (d *Disk) hasRefTable() bool {
	_, err := os.Lstat(d.path(refTableFile))
	return !errors.Is(err, fs.ErrNotExist)
}
