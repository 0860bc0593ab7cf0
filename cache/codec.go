package cache

import (
	"encoding/binary"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/acproxy/acproxy"
)

// This file has what most rows of the index are made of. A row is its fields one after the other, in an order that only the schema's number
// tells: numbers as varints (package encoding/binary), text as its length and its bytes, a map sorted by its keys. It is read several times as
// fast as JSON and is a third as long. What it can't tell apart are a nil and an empty map or slice, which both come back as nil.

func appendString[S ~string | ~[]byte](b []byte, s S) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendTime keeps the moment, to the nanosecond, and not the time zone.
func appendTime(b []byte, t time.Time) []byte {
	if t.IsZero() {
		return append(b, 0)
	}
	b = binary.AppendUvarint(b, uint64(t.Nanosecond())+1)
	return binary.AppendVarint(b, t.Unix())
}

func appendStringMap(b []byte, m map[string]string) []byte {
	b = binary.AppendUvarint(b, uint64(len(m)))
	for _, key := range slices.Sorted(maps.Keys(m)) {
		b = appendString(appendString(b, key), m[key])
	}
	return b
}

// appendBytesMap keeps nil and empty values apart, as JSON does.
func appendBytesMap(b []byte, m map[string][]byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(m)))
	for _, key := range slices.Sorted(maps.Keys(m)) {
		b = appendString(b, key)
		if v := m[key]; v != nil {
			b = append(binary.AppendUvarint(b, uint64(len(v))+1), v...)
		} else {
			b = append(b, 0)
		}
	}
	return b
}

// A decoder takes a row apart. It is a string, so that all the text in it is copied at once. After something that doesn't fit it gives zero
// values only, so that ok needs to be asked just once, at the end.
type decoder struct {
	left string
	bad  bool
	same *same // nil means that nothing is shared with other rows
}

// ok reports whether the row was all that was taken from it, and no more.
func (d *decoder) ok() bool { return !d.bad && d.left == "" }

func (d *decoder) fail() {
	d.bad, d.left = true, ""
}

func (d *decoder) uvarint() uint64 {
	var v uint64
	for i := range min(len(d.left), binary.MaxVarintLen64) {
		c := d.left[i]
		v |= uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			d.left = d.left[i+1:]
			return v
		}
	}
	d.fail()
	return 0
}

func (d *decoder) varint() int64 {
	u := d.uvarint()
	return int64(u>>1) ^ -int64(u&1)
}

// count reads how many there are of what takes at least size bytes each, so that nobody makes room for more than there can be.
func (d *decoder) count(size int) int {
	n := d.uvarint()
	if n > uint64(len(d.left)/size) {
		d.fail()
		return 0
	}
	return int(n)
}

// bytes returns the next n bytes.
func (d *decoder) bytes(n int) string {
	if n > len(d.left) {
		d.fail()
		return ""
	}
	s := d.left[:n]
	d.left = d.left[n:]
	return s
}

func (d *decoder) string() string { return d.bytes(d.count(1)) }

// array fills b, which is what a digest or an image ID is.
func (d *decoder) array(b []byte) { copy(b, d.bytes(len(b))) }

func (d *decoder) time() time.Time {
	n := d.uvarint()
	if n == 0 {
		return time.Time{}
	}
	seconds := d.varint()
	if n > 1e9 {
		d.fail()
		return time.Time{}
	}
	return time.Unix(seconds, int64(n-1)).UTC()
}

func (d *decoder) stringMap() map[string]string {
	n := d.count(2)
	if n == 0 {
		return nil
	}
	m := make(map[string]string, n)
	for range n {
		key := d.string()
		m[key] = d.string()
	}
	return m
}

func (d *decoder) bytesMap() map[string][]byte {
	n := d.count(2)
	if n == 0 {
		return nil
	}
	m := make(map[string][]byte, n)
	for range n {
		key := d.string()
		var v []byte
		if size := d.uvarint(); size > uint64(len(d.left))+1 {
			d.fail()
		} else if size > 0 {
			v = []byte(d.bytes(int(size - 1)))
		}
		m[key] = v
	}
	return m
}

// decoded reads a list of what takes at least size bytes each.
func decoded[T any](d *decoder, size int, one func(*decoder) T) []T {
	n := d.count(size)
	if n == 0 {
		return nil
	}
	list := make([]T, n)
	for i := range list {
		list[i] = one(d)
	}
	return list
}

// same has what many rows say in the same words in the form in which it is asked for: the labels and the dependencies of images are made once, and not
// for each look-up. What was made last stays, each in the one slot that its bytes have. It is safe for concurrent use.
type same struct {
	seed         maphash.Seed
	labels       [sameSlots]sameSlot[map[string]string]
	dependencies [sameSlots]sameSlot[[]Dependency]
}

const (
	sameSlots = 4096
	// maxSame bounds the bytes of what is shared, maxSameItems how many labels or dependencies these stand for.
	maxSame      = 512
	maxSameItems = 16
)

type sameSlot[T any] struct {
	asked atomic.Uint64 // the hash of what was asked for last, and is not here
	made  atomic.Pointer[made[T]]
}

type made[T any] struct {
	from string
	v    T
}

func newSame() *same { return &same{seed: maphash.MakeSeed()} }

// share returns what take takes from d, which is as long as skip skips: what was made before from the same bytes, if it is still in its slot. It is
// kept there when it is asked for twice in a row.
func share[T any](d *decoder, slots *[sameSlots]sameSlot[T], skip func(*decoder), take func(*decoder) T) T {
	before := *d
	skip(d)
	after := *d
	*d = before
	n := len(before.left) - len(after.left)
	many := *d
	if after.bad || n <= 1 || n > maxSame || many.uvarint() > maxSameItems {
		return take(d)
	}
	from := d.left[:n]
	hash := maphash.String(d.same.seed, from)
	slot := &slots[hash%sameSlots]
	m := slot.made.Load()
	switch {
	case m != nil && m.from == from:
	case slot.asked.Load() != hash:
		slot.asked.Store(hash)
		return take(d)
	default:
		// A row that it is part of must not be kept for it.
		m = &made[T]{from: strings.Clone(from)}
		m.v = take(&decoder{left: m.from})
		slot.made.Store(m)
	}
	*d = after
	return m.v
}

func (d *decoder) labels() map[string]string {
	if d.same == nil {
		return d.stringMap()
	}
	return share(d, &d.same.labels, (*decoder).skipStringMap, (*decoder).stringMap)
}

func (d *decoder) skipStringMap() {
	for range 2 * d.count(2) {
		d.string()
	}
}

func (d *decoder) dependencies() []Dependency {
	if d.same == nil {
		return takeDependencies(d)
	}
	return share(d, &d.same.dependencies, func(d *decoder) {
		for range d.count(4) {
			d.string()
			d.skipStringMap()
			d.varint()
			if d.uvarint() != 0 {
				d.bytes(len(acproxy.ImageID{}))
			}
		}
	}, takeDependencies)
}

func takeDependencies(d *decoder) []Dependency {
	return decoded(d, 4, func(d *decoder) Dependency {
		dep := Dependency{Name: d.string(), Labels: d.stringMap(), Size: d.varint()}
		if d.uvarint() != 0 {
			d.array(dep.ImageID[:])
		}
		return dep
	})
}
