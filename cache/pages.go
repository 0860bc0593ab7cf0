package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/bits"

	"github.com/acproxy/acproxy"
)

// This file reads the pages of a bbolt file without bbolt, to find out whether bbolt can be let near them. bbolt takes its pages for granted:
// a pointer to an ancestor makes it recurse until the stack, and with it the process, ends; a wild count makes it ask for all memory; a pointer
// past the end is a bus error. None of these can be recovered from, so a broken file has to be recognized first.
//
// The format, of bbolt's file version 2, in the machine's byte order:
//
//	page      id u64 · flags u16 · count u16 · overflow u32 · then by flags
//	meta      magic u32 · version u32 · page size u32 · flags u32 · root page u64 · sequence u64 · freelist page u64 · high water u64 · txid u64 · FNV-1a u64
//	branch    count × (pos u32 · key size u32 · page u64), keys
//	leaf      count × (flags u32 · pos u32 · key size u32 · value size u32), keys and values; flags 1 is a bucket: root page u64 · sequence u64 · inline page
//	freelist  count × u64, or if count is 0xFFFF the count as u64 before them

const (
	boltMagic    = 0xED0CDAED
	boltVersion  = 2
	pageHeader   = 16
	elementSize  = 16
	metaSize     = 64
	bucketHeader = 16
	branchPage   = 0x01
	leafPage     = 0x02
	metaPage     = 0x04
	freelistPage = 0x10
	bucketFlag   = 0x01

	// maxDepth is more levels than a tree of 2⁶⁴ pages has.
	maxDepth = 64
	// maxPageBytes bounds a page with its overflow: no key and value of ours come near.
	maxPageBytes = 64 << 20
)

var order = binary.NativeEndian

// errPages is matched by every error about the content of the pages, as opposed to one of reading them.
var errPages = errors.New("the index is broken")

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errPages, fmt.Sprintf(format, args...))
}

// brokenBy makes an error of opening or reading the file one that matches errPages, if it won't go away by itself: a disk that can't read the index any more is
// no better than one that has lost it.
func brokenBy(err error) error {
	if beyondHope(err) {
		return broken("%v", err)
	}
	return err
}

// unusable is brokenBy for a file that has to be read before it is used, or to go on: any error counts as one about what is in it, but one that says nothing of it.
func unusable(err error) error {
	if err == nil || acproxy.Shortage(err) || errors.Is(err, errPages) {
		return err
	}
	return broken("%v", err)
}

// meta is the head of a tree of pages.
type meta struct {
	pageSize  int64
	root      uint64
	freelist  uint64
	highWater uint64 // pages from here on are not in use
	txid      uint64
}

// readMetas returns both meta pages, the newer first. A file in which one of them is not valid is broken: bbolt would silently fall back to the
// state before its last transaction.
func readMetas(r io.ReaderAt, size int64) (newer, older meta, err error) {
	first, err := readMeta(r, 0)
	if err != nil {
		return meta{}, meta{}, err
	}
	second, err := readMeta(r, first.pageSize)
	if err != nil {
		return meta{}, meta{}, err
	}
	newer, older = first, second
	if older.txid > newer.txid {
		newer, older = older, newer
	}
	switch {
	case newer.txid != older.txid+1:
		return meta{}, meta{}, broken("the meta pages are of transactions %d and %d", older.txid, newer.txid)
	case newer.pageSize != older.pageSize:
		return meta{}, meta{}, broken("the meta pages disagree on the size of a page")
	case newer.highWater > uint64(size/newer.pageSize) || older.highWater > uint64(size/newer.pageSize):
		return meta{}, meta{}, broken("the file is cut short: %d bytes for %d pages of %d", size, max(newer.highWater, older.highWater), newer.pageSize)
	}
	return newer, older, nil
}

func readMeta(r io.ReaderAt, offset int64) (meta, error) {
	var b [pageHeader + metaSize]byte
	if n, err := r.ReadAt(b[:], offset); n < len(b) {
		if err == io.EOF {
			return meta{}, broken("the file ends in a meta page")
		}
		return meta{}, err
	}
	body := b[pageHeader:]
	sum := fnv.New64a()
	sum.Write(body[:56])
	m := meta{
		pageSize: int64(order.Uint32(body[8:])), root: order.Uint64(body[16:]), freelist: order.Uint64(body[32:]),
		highWater: order.Uint64(body[40:]), txid: order.Uint64(body[48:]),
	}
	switch {
	case order.Uint32(body) != boltMagic, order.Uint32(body[4:]) != boltVersion:
		return meta{}, broken("the meta page at %d is not one", offset)
	case order.Uint64(body[56:]) != sum.Sum64():
		return meta{}, broken("the meta page at %d has a wrong checksum", offset)
	case order.Uint16(b[8:]) != metaPage:
		return meta{}, broken("the meta page at %d says that it is another kind of page", offset)
	case m.pageSize < 1024 || m.pageSize > 1<<20 || bits.OnesCount64(uint64(m.pageSize)) != 1:
		return meta{}, broken("a page can't have %d bytes", m.pageSize)
	case m.root >= m.highWater || m.freelist >= m.highWater || m.root < 2 || m.freelist < 2:
		return meta{}, broken("the meta page at %d points at page %d and %d of %d", offset, m.root, m.freelist, m.highWater)
	}
	return m, nil
}

// pages reads one tree of pages and counts how often each is used.
type pages struct {
	r    io.ReaderAt
	meta meta
	seen []uint64 // a bit per page
	buf  [maxDepth + 1][]byte
	head [pageHeader]byte
	read int // pages, to look at the context now and then
}

func newPages(r io.ReaderAt, m meta) *pages {
	return &pages{r: r, meta: m, seen: make([]uint64, m.highWater/64+1)}
}

// claim notes that a page and its overflow pages are used, once and for one thing.
func (p *pages) claim(id uint64, overflow uint32) error {
	if id < 2 || id >= p.meta.highWater || uint64(overflow) >= p.meta.highWater-id {
		return broken("page %d with %d more is not among the %d there are", id, overflow, p.meta.highWater)
	}
	for i := id; i <= id+uint64(overflow); i++ {
		if p.seen[i/64]&(1<<(i%64)) != 0 {
			return broken("page %d is used twice", i)
		}
		p.seen[i/64] |= 1 << (i % 64)
	}
	return nil
}

// page reads a page whole, into the buffer of its depth in the tree.
func (p *pages) page(ctx context.Context, id uint64, depth int) ([]byte, error) {
	if p.read++; p.read%256 == 0 && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if depth > maxDepth {
		return nil, broken("page %d is %d levels deep", id, depth)
	}
	if id < 2 || id >= p.meta.highWater {
		return nil, broken("page %d is not among the %d there are", id, p.meta.highWater)
	}
	offset := int64(id) * p.meta.pageSize
	if err := p.readAt(p.head[:], offset); err != nil {
		return nil, err
	}
	if got := order.Uint64(p.head[:]); got != id {
		return nil, broken("page %d says that it is page %d", id, got)
	}
	overflow := order.Uint32(p.head[12:])
	if err := p.claim(id, overflow); err != nil {
		return nil, err
	}
	n := (int64(overflow) + 1) * p.meta.pageSize
	if n > maxPageBytes && order.Uint16(p.head[8:]) != freelistPage {
		return nil, broken("page %d has %d bytes", id, n)
	}
	if int64(cap(p.buf[depth])) < n {
		p.buf[depth] = make([]byte, n)
	}
	b := p.buf[depth][:n]
	return b, p.readAt(b, offset)
}

func (p *pages) readAt(b []byte, offset int64) error {
	if n, err := p.r.ReadAt(b, offset); n < len(b) {
		if err == io.EOF {
			return broken("the file ends at a page that is in use")
		}
		return err
	}
	return nil
}

// row is called for every key and value of a bucket. They may not be kept.
type row func(bucket string, key, value []byte) error

// walk goes through all buckets. With a nil row it reads branch pages only, which is what there is to fear: their shape decides whether a
// look-up ends.
func (p *pages) walk(ctx context.Context, fn row) error {
	// The pages of a bucket are read while one that names it is still looked at: they have buffers of their own.
	inner := &pages{r: p.r, meta: p.meta, seen: p.seen}
	return p.tree(ctx, p.meta.root, 0, nil, nil, func(flags uint32, key, value []byte) error {
		if flags != bucketFlag || len(value) < bucketHeader {
			return broken("%q is not a bucket", key)
		}
		name := string(key)
		leaf := func(flags uint32, key, value []byte) error {
			if flags != 0 {
				return broken("bucket %s holds something with flags %x", name, flags)
			}
			if fn == nil {
				return nil
			}
			return fn(name, key, value)
		}
		root := order.Uint64(value)
		if root == 0 {
			return elements(value[bucketHeader:], leafPage, nil, nil, leaf)
		}
		if fn == nil {
			return inner.shape(ctx, root, 0)
		}
		return inner.tree(ctx, root, 0, nil, nil, leaf)
	})
}

// tree walks a tree of pages whose keys lie in [low, high).
func (p *pages) tree(ctx context.Context, id uint64, depth int, low, high []byte, leaf func(flags uint32, key, value []byte) error) error {
	b, err := p.page(ctx, id, depth)
	if err != nil {
		return err
	}
	switch flags := order.Uint16(b[8:]); flags {
	case leafPage:
		return elements(b, leafPage, low, high, leaf)
	case branchPage:
		// A child's keys end where the next child's begin, so each is walked when its successor is known.
		var child uint64
		var from []byte
		err := elements(b, branchPage, low, high, func(_ uint32, key, value []byte) error {
			if from != nil {
				if err := p.tree(ctx, child, depth+1, from, key, leaf); err != nil {
					return err
				}
			}
			child, from = order.Uint64(value), key
			return nil
		})
		if err != nil {
			return err
		}
		if from == nil {
			return broken("branch page %d is empty", id)
		}
		return p.tree(ctx, child, depth+1, from, high, leaf)
	default:
		return broken("page %d has flags %x", id, flags)
	}
}

// shape walks the branch pages of a tree. Its leaves are all on one level, which one path shows; they are claimed and not read.
func (p *pages) shape(ctx context.Context, id uint64, depth int) error {
	levels, err := p.levels(id)
	if err != nil {
		return err
	}
	return p.branches(ctx, id, depth, levels)
}

func (p *pages) levels(id uint64) (int, error) {
	for n := 0; n < maxDepth; n++ {
		var b [pageHeader + elementSize]byte
		if id < 2 || id >= p.meta.highWater {
			return 0, broken("page %d is not among the %d there are", id, p.meta.highWater)
		}
		if err := p.readAt(b[:], int64(id)*p.meta.pageSize); err != nil {
			return 0, err
		}
		switch order.Uint16(b[8:]) {
		case leafPage:
			return n, nil
		case branchPage:
			id = order.Uint64(b[pageHeader+8:])
		default:
			return 0, broken("page %d has flags %x", id, order.Uint16(b[8:]))
		}
	}
	return 0, broken("the tree does not end")
}

func (p *pages) branches(ctx context.Context, id uint64, depth, levels int) error {
	if levels == 0 {
		return p.claim(id, 0)
	}
	b, err := p.page(ctx, id, depth)
	if err != nil {
		return err
	}
	if flags := order.Uint16(b[8:]); flags != branchPage {
		return broken("page %d has flags %x and not those of a branch", id, flags)
	}
	return elements(b, branchPage, nil, nil, func(_ uint32, _, value []byte) error {
		return p.branches(ctx, order.Uint64(value), depth+1, levels-1)
	})
}

// elements calls fn for the elements of a page, which must be in order, in [low, high), and next to each other as bbolt writes them. The value
// of a branch's element is the page it points at.
func elements(b []byte, kind uint16, low, high []byte, fn func(flags uint32, key, value []byte) error) error {
	if len(b) < pageHeader || order.Uint16(b[8:]) != kind {
		return broken("a page inside another is not one")
	}
	id, count := order.Uint64(b), int(order.Uint16(b[10:]))
	// What follows is laid out without gaps, so that where the next one has to be is known: a count that lost a bit shows at once.
	next := pageHeader + count*elementSize
	if next > len(b) {
		return broken("page %d has %d elements in %d bytes", id, count, len(b))
	}
	var last []byte
	for i := range count {
		at := pageHeader + i*elementSize
		e := b[at : at+elementSize]
		var flags uint32
		var pos, ksize, vsize int
		var value []byte
		if kind == branchPage {
			pos, ksize, value = int(order.Uint32(e)), int(order.Uint32(e[4:])), e[8:16]
		} else {
			flags, pos, ksize, vsize = order.Uint32(e), int(order.Uint32(e[4:])), int(order.Uint32(e[8:])), int(order.Uint32(e[12:]))
		}
		if at+pos != next || ksize == 0 || ksize > len(b)-next || vsize > len(b)-next-ksize {
			return broken("element %d of page %d lies outside of it", i, id)
		}
		key := b[next : next+ksize]
		if kind == leafPage {
			value = b[next+ksize : next+ksize+vsize]
		}
		next += ksize + vsize
		if last != nil && bytes.Compare(last, key) >= 0 || low != nil && bytes.Compare(key, low) < 0 || high != nil && bytes.Compare(key, high) >= 0 {
			return broken("the keys of page %d are out of order", id)
		}
		last = key
		if err := fn(flags, key, value); err != nil {
			return err
		}
	}
	return nil
}

// freelist reads the list of unused pages and claims them.
func (p *pages) freelist(ctx context.Context) error {
	b, err := p.page(ctx, p.meta.freelist, 0)
	if err != nil {
		return err
	}
	if flags := order.Uint16(b[8:]); flags != freelistPage {
		return broken("page %d has flags %x and not those of the list of free pages", p.meta.freelist, flags)
	}
	count, ids := uint64(order.Uint16(b[10:])), b[pageHeader:]
	if count == 0xFFFF {
		count, ids = order.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return broken("the list of free pages has %d in %d bytes", count, len(ids))
	}
	for ; count > 0; count-- {
		if err := p.claim(order.Uint64(ids), 0); err != nil {
			return err
		}
		ids = ids[8:]
	}
	return nil
}

// complete reports, as nil, that every page below the high water mark was claimed.
func (p *pages) complete() error {
	n := uint64(2) // the meta pages
	for _, word := range p.seen {
		n += uint64(bits.OnesCount64(word))
	}
	if n != p.meta.highWater {
		return broken("%d of %d pages belong to nothing", p.meta.highWater-n, p.meta.highWater)
	}
	return nil
}
