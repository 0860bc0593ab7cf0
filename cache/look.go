package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
)

// This file looks single rows up without bbolt. bbolt reads through a memory map, and each page that a random look-up touches then counts as
// memory of the process, and costs a page fault that brings its neighbours along. Here the branch pages of the buckets that are asked most, a
// hundredth of the file, are kept in memory, and the one leaf page that a look-up needs is read.
//
// bbolt never writes over a page that the last committed transaction uses, or it could not survive a crash in the next one. So what a
// transaction left can be read without a lock until the second one after it begins, and whoever was too slow for that looks again.

// looked are the buckets that can be looked into.
var looked = []string{bucketRefs, bucketRecords, bucketSignatures, bucketNames, bucketUsed, bucketKnown}

// A snapshot is the state that one transaction left.
type snapshot struct {
	generation uint64
	turn       uint64 // how many transactions had begun
	pageSize   int64
	size       int64 // bytes that are in use
	trees      map[string]*tree
}

// tree is one bucket: root if it has branch pages, else the leaf page that it consists of, or that leaf itself if it stands in its parent's page.
type tree struct {
	root   *branch
	leaf   uint64
	inline []byte
}

// branch is what a branch page says that was found in order: half as long as the page, and laid out for find, most of which is waiting for memory that no
// processor has in its cache. Branches don't change, and are shared by the snapshots that they belong to.
type branch struct {
	heads    []uint64  // the eight bytes of each key after those that all of them begin with
	shared   int       // how many bytes all keys begin with
	begin    [40]byte  // of these, as many as there is room for
	ids      []uint64  // the pages below
	children []*branch // these pages, nil if they are leaf pages
	prefix   []byte    // what all keys begin with, if begin is too short for it
	tails    []byte    // the keys without it, one after the other
	ends     []uint32  // where each of these ends
	id       uint64
}

// newBranch takes over the keys of a page and the pages that they stand for, which are in order.
func newBranch(id uint64, keys [][]byte, ids []uint64) *branch {
	n := len(keys)
	numbers := make([]uint64, 2*n)
	b := &branch{id: id, heads: numbers[:n:n], ids: numbers[n:], ends: make([]uint32, n)}
	copy(b.ids, ids)
	first, last := keys[0], keys[n-1]
	for b.shared < min(len(first), len(last)) && first[b.shared] == last[b.shared] {
		b.shared++
	}
	if copy(b.begin[:], first[:b.shared]) < b.shared {
		b.prefix = bytes.Clone(first[:b.shared])
	}
	size := 0
	for i, key := range keys {
		size += len(key) - b.shared
		b.ends[i] = uint32(size)
	}
	b.tails = make([]byte, 0, size)
	for i, key := range keys {
		b.heads[i] = firstEight(key[b.shared:])
		b.tails = append(b.tails, key[b.shared:]...)
	}
	return b
}

// start returns the bytes that all keys begin with.
func (b *branch) start() []byte {
	if b.prefix != nil {
		return b.prefix
	}
	return b.begin[:b.shared]
}

// tail returns a key without the bytes that all of them begin with.
func (b *branch) tail(i int) []byte {
	if i == 0 {
		return b.tails[:b.ends[0]]
	}
	return b.tails[b.ends[i-1]:b.ends[i]]
}

// bound is a key of a branch that bounds others; the zero value is none.
type bound struct {
	b *branch
	i int
}

// key returns the key, nil if it is none.
func (at bound) key() []byte {
	if at.b == nil {
		return nil
	}
	return slices.Concat(at.b.start(), at.b.tail(at.i))
}

// firstEight returns the first eight bytes of a key as a number that is not larger than that of any key after it.
func firstEight(key []byte) uint64 {
	if len(key) >= 8 {
		return binary.BigEndian.Uint64(key)
	}
	var b [8]byte
	copy(b[:], key)
	return binary.BigEndian.Uint64(b[:])
}

// find returns the last child whose keys begin at or before key, the first one if there is none; with before, at keys that are before it.
func (b *branch) find(key []byte, before bool) int {
	low, high := 0, len(b.heads)
	begins := min(b.shared, len(key))
	switch c := bytes.Compare(key[:begins], b.start()); {
	case c < 0:
		return 0
	case c > 0:
		return high - 1
	}
	at := firstEight(key[begins:])
	for low < high {
		middle := int(uint(low+high) / 2)
		switch {
		case b.heads[middle] < at:
			low = middle + 1
			continue
		case b.heads[middle] == at:
			if c := bytes.Compare(b.tail(middle), key[begins:]); c < 0 || c == 0 && !before {
				low = middle + 1
				continue
			}
		}
		high = middle
	}
	return max(low-1, 0)
}

// snapshots reads a file of bbolt as its last transactions left it.
type snapshots struct {
	f     *os.File
	last  atomic.Pointer[snapshot]
	begun atomic.Uint64 // transactions, counted before they begin
	lost  atomic.Bool   // what the last one left could not be read, so that there will be no further snapshot
	looks sync.Pool     // of *look
	same  *same         // is shared by the rows that are looked up; nil means nothing is
}

// take makes what is in the file now the last snapshot. No transaction may be open for writing.
func (s *snapshots) take(generation uint64) error {
	fi, err := s.f.Stat()
	if err != nil {
		return err
	}
	m, _, err := readMetas(s.f, fi.Size())
	if err != nil {
		return err
	}
	next := &snapshot{generation: generation, turn: s.begun.Load(), pageSize: m.pageSize, size: m.pageSize * int64(m.highWater), trees: make(map[string]*tree)}
	before := s.last.Load()
	if before == nil {
		before = &snapshot{}
	}
	roots := make(map[string][]byte)
	l := look{f: s.f, snapshot: next}
	err = l.rows(m.root, 0, func(flags uint32, key, value []byte) error {
		if flags != bucketFlag || len(value) < bucketHeader {
			return broken("%q is not a bucket", key)
		}
		if slices.Contains(looked, string(key)) {
			roots[string(key)] = bytes.Clone(value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	trees, errs := make([]*tree, len(looked)), make([]error, len(looked))
	var wg sync.WaitGroup
	for i, bucket := range looked {
		read := func() {
			if root := roots[bucket]; root != nil {
				trees[i], errs[i] = (&look{f: s.f, snapshot: next}).tree(root, before.trees[bucket])
			}
		}
		if before.trees == nil {
			// The first time all of them are read, which somebody waits for. Ends with its work; waited for below.
			wg.Go(read)
		} else {
			read()
		}
	}
	wg.Wait()
	for i, bucket := range looked {
		if trees[i] != nil {
			next.trees[bucket] = trees[i]
		}
	}
	if err = errors.Join(errs...); err == nil {
		s.last.Store(next)
	}
	return err
}

// size returns how many bytes of the file the last snapshot uses.
func (s *snapshots) size() int64 {
	if last := s.last.Load(); last != nil {
		return last.size
	}
	return 0
}

// look lets a function look rows up, all of them in one state of the index. The function may be called more than once.
func (s *snapshots) look(do func(*look) error) error {
	l, ok := s.looks.Get().(*look)
	if !ok {
		l = &look{f: s.f, decoder: decoder{same: s.same}}
	}
	defer s.looks.Put(l)
	for {
		l.snapshot = s.last.Load()
		err := do(l)
		if s.begun.Load() <= l.snapshot.turn+1 {
			return err
		}
		if s.lost.Load() {
			return broken("what the last transaction left can't be read")
		}
	}
}

// A look is one visit to a snapshot.
type look struct {
	f        *os.File
	snapshot *snapshot
	buf      []byte
	key      []byte // for whoever puts a key together
	ready    readyReader
	decoder  decoder
	keys     [][]byte // for whoever takes a branch page apart
	ids      []uint64
	bottom   int // the depth of the leaves of the tree whose branch pages are read, 0 while it isn't known
}

// read reads a page whole. It is valid until the next one is read.
func (l *look) read(id uint64, kind uint16) ([]byte, error) {
	size := l.snapshot.pageSize
	for {
		if int64(cap(l.buf)) < size {
			l.buf = make([]byte, size)
		}
		b := l.buf[:size]
		n, err := l.ready.read(l.f, b, int64(id)*l.snapshot.pageSize)
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil, errClosed
		case n < len(b):
			// A disk that can't read the index any more is no better than one that has lost it.
			return nil, unusable(fmt.Errorf("reading page %d: %w", id, err))
		case order.Uint64(b) != id:
			return nil, broken("page %d says that it is page %d", id, order.Uint64(b))
		case kind != 0 && order.Uint16(b[8:]) != kind:
			return nil, broken("page %d has flags %x and not %x", id, order.Uint16(b[8:]), kind)
		}
		whole := (int64(order.Uint32(b[12:])) + 1) * l.snapshot.pageSize
		if whole > maxPageBytes {
			return nil, broken("page %d has %d bytes", id, whole)
		}
		if whole <= size {
			return b[:whole], nil
		}
		size = whole
	}
}

// get returns a value, nil if there is none. It is valid until the next look at something.
func (l *look) get(bucket string, key []byte) ([]byte, error) {
	t := l.snapshot.trees[bucket]
	if t == nil {
		return nil, broken("the bucket %s is missing", bucket)
	}
	b, _, _, err := l.leaf(t, key)
	if err != nil {
		return nil, err
	}
	stored, err := inLeaf(b, key)
	if stored == nil || err != nil {
		return nil, err
	}
	return opened(bucket, key, stored)
}

// leaf returns the leaf page on which a key is, if it is anywhere, and between what its keys have to be.
func (l *look) leaf(t *tree, key []byte) (page []byte, low, high bound, err error) {
	id := t.leaf
	switch {
	case t.inline != nil:
		return t.inline, low, high, nil
	case t.root != nil:
		id, low, high = t.root.leaf(key, false)
	}
	page, err = l.read(id, leafPage)
	return page, low, high, err
}

// leaf returns the leaf page whose keys begin at or before key, or with before, before it; and between what its keys have to be.
func (b *branch) leaf(key []byte, before bool) (id uint64, low, high bound) {
	for {
		i := b.find(key, before)
		if i > 0 {
			low = bound{b, i}
		}
		if i+1 < len(b.ids) {
			high = bound{b, i + 1}
		}
		if b.children == nil {
			return b.ids[i], low, high
		}
		b = b.children[i]
	}
}

// inLeaf returns the value of a key on a leaf page, nil if it is not there. It believes nothing that the page says of itself.
func inLeaf(b, key []byte) ([]byte, error) {
	if len(b) < pageHeader || order.Uint16(b[8:]) != leafPage {
		return nil, broken("a page inside another is not one")
	}
	low, high := 0, int(order.Uint16(b[10:]))
	if pageHeader+high*elementSize > len(b) {
		return nil, broken("page %d has %d elements in %d bytes", order.Uint64(b), high, len(b))
	}
	for low < high {
		middle := (low + high) / 2
		at := pageHeader + middle*elementSize
		from, ksize, vsize := at+int(order.Uint32(b[at+4:])), int(order.Uint32(b[at+8:])), int(order.Uint32(b[at+12:]))
		if from > len(b) || ksize > len(b)-from || vsize > len(b)-from-ksize {
			return nil, broken("element %d of page %d lies outside of it", middle, order.Uint64(b))
		}
		switch c := bytes.Compare(b[from:from+ksize], key); {
		case c < 0:
			low = middle + 1
		case c > 0:
			high = middle
		default:
			return b[from+ksize : from+ksize+vsize : from+ksize+vsize], nil
		}
	}
	return nil, nil
}

// confirm returns an error if something is wrong where a key that get didn't find would be. Every row carries a checksum of its key, so that
// one whose key was changed by accident shows; and if a key on a branch page was, then rows of the leaf page or of one of its neighbours are
// not between the keys that they should be.
func (l *look) confirm(bucket string, key []byte) error {
	t := l.snapshot.trees[bucket]
	row := func(_ uint32, key, stored []byte) error {
		_, err := opened(bucket, key, stored)
		return err
	}
	switch {
	case t == nil:
		return broken("the bucket %s is missing", bucket)
	case t.inline != nil:
		return elements(t.inline, leafPage, nil, nil, row)
	case t.root == nil:
		b, err := l.read(t.leaf, leafPage)
		if err != nil {
			return err
		}
		return elements(b, leafPage, nil, nil, row)
	}
	check := func(key []byte, before bool) (low, high []byte, err error) {
		id, from, to := t.root.leaf(key, before)
		low, high = from.key(), to.key()
		b, err := l.read(id, leafPage)
		if err == nil {
			err = elements(b, leafPage, low, high, row)
		}
		return low, high, err
	}
	low, high, err := check(key, false)
	if err == nil && low != nil {
		_, _, err = check(low, true)
	}
	if err == nil && high != nil {
		_, _, err = check(high, false)
	}
	return err
}

// each calls fn for the rows of a bucket whose keys begin with prefix and are not before from, in order, until fn returns an error; errEnough is
// none. It reads one page after the other and keeps nothing from being written in between: what changes meanwhile is seen or isn't.
func (x *index) each(bucket string, prefix, from []byte, fn func(key, value []byte) error) error {
	at := prefix
	if bytes.Compare(from, prefix) > 0 {
		at = from
	}
	var page []byte
	for {
		var low, high []byte
		err := x.look(func(l *look) error {
			t := l.snapshot.trees[bucket]
			if t == nil {
				return broken("the bucket %s is missing", bucket)
			}
			b, l0, h0, err := l.leaf(t, at)
			page, low, high = append(page[:0], b...), l0.key(), h0.key()
			return err
		})
		if err != nil {
			return err
		}
		err = elements(page, leafPage, low, high, func(_ uint32, key, stored []byte) error {
			if bytes.Compare(key, at) < 0 {
				return nil
			}
			if !bytes.HasPrefix(key, prefix) {
				return errEnough
			}
			value, err := opened(bucket, key, stored)
			if err != nil {
				return err
			}
			return fn(key, value)
		})
		if err == errEnough {
			return nil
		}
		if errors.Is(err, errPages) {
			x.dead.Store(true)
		}
		if err != nil || high == nil {
			return err
		}
		if bytes.Compare(high, at) <= 0 {
			x.dead.Store(true)
			return broken("the pages of %s are out of order", bucket)
		}
		at = high
	}
}

// rows calls fn for the rows of a small tree.
func (l *look) rows(id uint64, depth int, fn func(flags uint32, key, value []byte) error) error {
	b, err := l.read(id, 0)
	if err != nil {
		return err
	}
	switch flags := order.Uint16(b[8:]); {
	case flags == leafPage:
		return elements(b, leafPage, nil, nil, fn)
	case flags != branchPage || depth == maxDepth:
		return broken("page %d has flags %x, %d levels deep", id, flags, depth)
	}
	b = bytes.Clone(b)
	return elements(b, branchPage, nil, nil, func(_ uint32, _, child []byte) error {
		return l.rows(order.Uint64(child), depth+1, fn)
	})
}

// tree reads the branch pages of a bucket, but for those that it had before.
func (l *look) tree(value []byte, before *tree) (*tree, error) {
	root := order.Uint64(value)
	if root == 0 {
		return &tree{inline: bytes.Clone(value[bucketHeader:])}, nil
	}
	if before == nil {
		before = &tree{}
	}
	l.bottom = 0
	b, err := l.branch(root, 0, before.root)
	if err != nil || b != nil {
		return &tree{root: b}, err
	}
	return &tree{leaf: root}, nil
}

// branch reads a branch page and those below it; near is a page that was at about this place before. A leaf page is nil.
func (l *look) branch(id uint64, depth int, near *branch) (*branch, error) {
	if near != nil && near.id == id {
		// A page that two successive transactions use has not changed in between.
		return near, nil
	}
	b, err := l.read(id, 0)
	if err != nil {
		return nil, err
	}
	switch flags := order.Uint16(b[8:]); {
	case flags == leafPage:
		l.bottom = depth
		return nil, nil
	case flags != branchPage || depth == maxDepth:
		return nil, broken("page %d has flags %x, %d levels deep", id, flags, depth)
	}
	keys, ids := l.keys[:0], l.ids[:0]
	err = elements(b, branchPage, nil, nil, func(_ uint32, key, child []byte) error {
		keys, ids = append(keys, key), append(ids, order.Uint64(child))
		return nil
	})
	l.keys, l.ids = keys, ids
	if err != nil {
		return nil, err
	}
	n := len(ids)
	if n == 0 {
		return nil, broken("branch page %d is empty", id)
	}
	page := newBranch(id, keys, ids)
	if depth+1 == l.bottom {
		// All leaves are on one level, which one of them has shown. If one isn't, who reads what is there in its place finds that out.
		return page, nil
	}
	first, err := l.branch(page.ids[0], depth+1, near.at(0))
	if first == nil || err != nil {
		return page, err
	}
	page.children = make([]*branch, n)
	page.children[0] = first
	// Most children are those from before, in the same order, with some in between that are new.
	from := 0
	for i := range n {
		at := from
		for near.at(at) != nil && near.at(at).id != page.ids[i] {
			at++
		}
		if near.at(at) == nil {
			at = from
		}
		if page.children[i], err = l.branch(page.ids[i], depth+1, near.at(at)); err != nil {
			return nil, err
		}
		if page.children[i] == nil {
			return nil, broken("branch page %d has leaves and branches below it", id)
		}
		from = at + 1
	}
	return page, nil
}

// at returns a child that is a branch, nil if there is none.
func (b *branch) at(i int) *branch {
	if b == nil || i >= len(b.children) {
		return nil
	}
	return b.children[i]
}
