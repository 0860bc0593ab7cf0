package cache

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// A Filter chooses images to list, and their order. The zero Filter chooses all, by name and version.
type Filter struct {
	Prefix   string // of names, by segments
	State    State  // "" means any
	Contains string // in what is written of an image: its name with labels, image ID, digest, user IDs and fingerprints of signers; lower-case
	Pinned   bool   // only those that are

	Sort    Sort
	Reverse bool // the other way round; by name there is only one
}

// A Sort is an order of images.
type Sort string

// The orders. Those that aren't by name look at every image for each page, as a filter by what is written of them does.
const (
	ByName    Sort = ""        // and version
	BySize    Sort = "size"    // the smallest first
	ByFetched Sort = "fetched" // the oldest first
	ByUsed    Sort = "used"    // the one that wasn't used for the longest time first
)

// Sorts are the orders that are not by name.
func Sorts() []Sort { return []Sort{BySize, ByFetched, ByUsed} }

// chooses reports whether a filter chooses an image.
func (f Filter) chooses(rec Record) bool {
	return acproxy.HasPrefix(rec.Name, f.Prefix) && (f.State == "" || f.State == rec.State) && (!f.Pinned || rec.Pinned) && (f.Contains == "" || rec.mentions(f.Contains))
}

// mentions reports whether a text is part of what is written of an image.
func (r Record) mentions(text string) bool {
	if strings.Contains(r.Name, text) || strings.HasPrefix(r.ImageID.String(), text) || strings.HasPrefix(r.Digest.String(), text) || strings.HasPrefix(r.Digest.Hex(), text) {
		return true
	}
	if ref, err := acproxy.NewRef(r.Name, r.Labels); err == nil && strings.Contains(ref.String(), text) {
		return true
	}
	return slices.ContainsFunc(r.Signers, func(s Signer) bool {
		return strings.Contains(strings.ToLower(s.UserID), text) || strings.HasPrefix(s.Fingerprint, text) || text != "" && strings.HasSuffix(s.Fingerprint, text)
	})
}

// Images returns up to limit images, 0 for all: those after the place that the call before with the same filter returned, "" for the first call. It returns ""
// as the next place when there are no more.
func (d *Disk) Images(filter Filter, after string, limit int) (records []Record, next string, err error) {
	from, err := hex.DecodeString(after)
	if err != nil {
		return nil, "", acproxy.Invalid("%.64q is not a place in the list of images", after)
	}
	filter.Prefix = strings.TrimSuffix(filter.Prefix, "/")
	filter.Contains = strings.ToLower(filter.Contains)
	switch {
	case filter.Sort == ByName && !filter.Reverse && filter.Contains == "":
		return d.imagesByName(filter, from, limit)
	case filter.Sort == ByName || slices.Contains(Sorts(), filter.Sort):
		return d.imagesSorted(filter, from, limit)
	}
	return nil, "", acproxy.Invalid("images can't be sorted by %.32q", filter.Sort)
}

func (d *Disk) imagesByName(filter Filter, from []byte, limit int) (records []Record, next string, err error) {
	err = d.on(func(ix *index) error {
		records, next = nil, ""
		last := hex.EncodeToString(from)
		return ix.each(bucketNames, []byte(filter.Prefix), from, func(key, _ []byte) error {
			if bytes.Equal(key, from) {
				return nil
			}
			if limit > 0 && len(records) == limit {
				next = last
				return errEnough
			}
			digest, err := digestIn(key)
			if err != nil {
				return err
			}
			// A record that isn't there was removed in between.
			rec, ok, err := ix.named(key, digest)
			if err == nil && ok && filter.chooses(rec) {
				last = hex.EncodeToString(key)
				records = append(records, rec)
			}
			return err
		})
	})
	for i := range records {
		d.useTouched(&records[i])
		records[i] = d.told(records[i])
	}
	return records, next, err
}

// imagesSorted looks at all images, one page of the index after the other, and keeps those that come next.
func (d *Disk) imagesSorted(filter Filter, from []byte, limit int) (records []Record, next string, err error) {
	err = d.on(func(ix *index) error {
		used, err := ix.allUsed(filter.Sort == ByUsed)
		if err != nil {
			return err
		}
		first := &nextImages{limit: limit}
		err = ix.each(bucketRecords, nil, nil, func(key, value []byte) error {
			h, err := decodeRow(bucketRecords, key, value, takeHeld)
			if err != nil {
				return err
			}
			if h.Digest, err = digestIn(key); err != nil || !filter.chooses(h.Record) {
				return err
			}
			if t := used[h.Digest]; t.After(h.Used) {
				h.Used = t
			}
			if filter.Sort == ByUsed {
				d.useTouched(&h.Record)
			}
			if place := filter.place(h.Record); bytes.Compare(place, from) > 0 {
				first.add(placed{place, h.Record})
			}
			return nil
		})
		if err != nil {
			return err
		}
		records, next = first.sorted()
		return nil
	})
	for i := range records {
		if err == nil && filter.Sort != ByUsed {
			// What was removed since keeps what is known of it.
			if rec, err := d.Record(records[i].Digest); err == nil {
				records[i] = rec
			}
		}
		records[i] = d.told(records[i])
	}
	return records, next, err
}

// allUsed returns when each image was last used, as far as that was written by itself; nothing if it isn't wanted.
func (x *index) allUsed(wanted bool) (map[acproxy.Digest]time.Time, error) {
	if !wanted {
		return nil, nil
	}
	used := make(map[acproxy.Digest]time.Time)
	err := x.each(bucketUsed, nil, nil, func(key, value []byte) error {
		digest, err := digestIn(key)
		if t, ok := timeIn(value); ok && err == nil {
			used[digest] = t
		}
		return err
	})
	return used, err
}

// place returns where an image stands in a filter's order: places compare as bytes do.
func (f Filter) place(rec Record) []byte {
	var n int64
	switch f.Sort {
	case BySize:
		n = rec.Size
	case ByFetched:
		n = nanoseconds(rec.Fetched)
	case ByUsed:
		n = nanoseconds(rec.Used)
	}
	place := append(binary.BigEndian.AppendUint64([]byte{1}, uint64(n)), nameKey(rec.Name, rec.Labels[acproxy.LabelVersion], rec.Digest[:])...)
	if f.Reverse {
		// Longer keys go before those that they begin with, for which they end in something that is more than nothing.
		place = append(place, 0)
		for i := range place[1:] {
			place[1+i] = ^place[1+i]
		}
	}
	return place
}

// nanoseconds returns a time as a number, 0 for none.
func nanoseconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(0, t.UnixNano())
}

// placed is an image and its place in an order.
type placed struct {
	place []byte
	Record
}

// nextImages are the images with the first places, so many at most, as a heap with the last of them on top.
type nextImages struct {
	limit int // 0 is all
	kept  []placed
	more  bool // there were others
}

// Len returns how many there are.
func (n *nextImages) Len() int { return len(n.kept) }

// Less reports whether one stands after another.
func (n *nextImages) Less(i, j int) bool { return bytes.Compare(n.kept[i].place, n.kept[j].place) > 0 }

// Swap swaps two.
func (n *nextImages) Swap(i, j int) { n.kept[i], n.kept[j] = n.kept[j], n.kept[i] }

// Push adds one at the end.
func (n *nextImages) Push(x any) { n.kept = append(n.kept, x.(placed)) }

// Pop takes the last one away.
func (n *nextImages) Pop() any {
	last := n.kept[len(n.kept)-1]
	n.kept = n.kept[:len(n.kept)-1]
	return last
}

func (n *nextImages) add(p placed) {
	switch {
	case n.limit == 0 || len(n.kept) < n.limit:
		heap.Push(n, p)
	case bytes.Compare(p.place, n.kept[0].place) < 0:
		n.more = true
		n.kept[0] = p
		heap.Fix(n, 0)
	default:
		n.more = true
	}
}

// sorted returns the images in order, and the place to go on after.
func (n *nextImages) sorted() (records []Record, next string) {
	slices.SortFunc(n.kept, func(a, b placed) int { return bytes.Compare(a.place, b.place) })
	for _, p := range n.kept {
		records = append(records, p.Record)
	}
	if n.more && len(n.kept) > 0 {
		next = hex.EncodeToString(n.kept[len(n.kept)-1].place)
	}
	return records, next
}
