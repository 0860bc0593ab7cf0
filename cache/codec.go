package cache

import (
	"encoding/binary"
	"maps"
	"slices"
	"time"
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
