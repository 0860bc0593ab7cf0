package cache

import (
	"bytes"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// The classes of images in the order of eviction.
const (
	classQuarantined byte = iota
	classGood
)

// orderKey is an image's place in the order of eviction: its class, when it was last used, its digest. A pinned one has none.
func orderKey(rec Record, used time.Time) []byte {
	class := classGood
	if rec.Quarantined() {
		class = classQuarantined
	}
	return slices.Concat([]byte{class}, refusalKey(uint64(max(0, used.UnixNano()))), rec.Digest[:])
}

// orderAhead is where in the order what is noted as used in a time that is yet to come begins in a class.
func orderAhead(class byte, now time.Time) []byte {
	return append([]byte{class}, refusalKey(uint64(now.Add(maxSkew).UnixNano()+1))...)
}

const orderKeySize = 1 + 8 + len(acproxy.Digest{})

// orderUsed returns the time in a place in the order.
func orderUsed(key []byte) time.Time {
	var n uint64
	for _, b := range key[1:9] {
		n = n<<8 | uint64(b)
	}
	return time.Unix(0, int64(n)).UTC()
}

// putOrder gives an image its place in the order of eviction.
func putOrder(tx *bolt.Tx, rec Record) error {
	used, err := orderTime(tx, rec)
	if err != nil || rec.Pinned {
		return err
	}
	return put(tx, bucketOrder, orderKey(rec, used), nil)
}

// dropOrder takes an image out of the order of eviction.
func dropOrder(tx *bolt.Tx, rec Record) error {
	used, err := orderTime(tx, rec)
	if err != nil || rec.Pinned {
		return err
	}
	return remove(tx, bucketOrder, orderKey(rec, used))
}

// touch writes that an image was used, and gives it its new place in the order.
func touch(tx *bolt.Tx, rec Record, used time.Time) error {
	before, err := orderTime(tx, rec)
	if err != nil || !used.After(before) {
		return err
	}
	if err := dropOrder(tx, rec); err != nil {
		return err
	}
	if err := putTime(tx, bucketUsed, rec.Digest[:], used); err != nil {
		return err
	}
	return putOrder(tx, rec)
}

// orderTime is the time that an image's place in the order goes by: of its last use, be that written with its record or later.
func orderTime(tx *bolt.Tx, rec Record) (time.Time, error) {
	used, err := getTime(tx, bucketUsed, rec.Digest[:])
	if last := lastUse(rec); last.After(used) {
		used = last
	}
	return used, err
}

// lastUse is when an image was last used or fetched, as far as its record knows.
func lastUse(rec Record) time.Time {
	if rec.Used.After(rec.Fetched) {
		return rec.Used
	}
	return rec.Fetched
}

// maxTangle bounds the images that are looked at to find out whether another one is needed. Beyond it the answer is no: an image may go that
// something needs after all, but none stays for ever because of a tangle.
const maxTangle = 4096

// neededBy returns an image that keeps another one because it depends on it, itself or by way of others: one that isn't evicted now, or was used
// later, so that it is evicted after it. It returns nil if there is none. Images that depend on one another in a circle keep each other until the
// last of them that was used is the next to go.
func (p *planner) neededBy(tx *bolt.Tx, x examined) (*Record, error) {
	seen := map[acproxy.Digest]bool{x.h.Digest: true}
	var by *Record
	for todo := []Record{x.h.Record}; len(todo) > 0 && by == nil && len(seen) < maxTangle; todo = todo[1:] {
		on := todo[0]
		err := scan(tx, bucketDependents, dependentKey(on.Name, nil), nil, func(key, _ []byte) error {
			digest, err := digestIn(key)
			if err != nil || seen[digest] || p.gone[digest] {
				return err
			}
			h, ok, err := getRecord(tx, digest)
			if err != nil || !ok || h.Quarantined() && !h.Pinned {
				return err
			}
			if needs, err := p.needs(tx, h.Record, on); err != nil || !needs {
				return err
			}
			seen[digest] = true
			stays, err := p.staysLonger(tx, h.Record, x.place)
			if err != nil {
				return err
			}
			if stays {
				by = &h.Record
				return errEnough
			}
			todo = append(todo, h.Record)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return by, nil
}

// staysLonger reports whether an image stays longer than the one at a place, as far as it is asked itself.
func (p *planner) staysLonger(tx *bolt.Tx, rec Record, than []byte) (bool, error) {
	if rec.Pinned || p.d.leases.inUse(rec.Digest) || p.d.touchedSince(rec.Digest) {
		return true, nil
	}
	used, err := orderTime(tx, rec)
	if err != nil {
		return false, err
	}
	if bytes.Compare(orderKey(rec, used), than) > 0 {
		return true, nil
	}
	return p.lastCopy(tx, rec.Digest)
}

// needs reports whether one of an image's dependencies is another image: it fits the dependency, and no other one of the same operating system and
// architecture that fits it was fetched later. That would be the one that is used.
func (p *planner) needs(tx *bolt.Tx, rec, on Record) (bool, error) {
	for _, dep := range rec.Dependencies {
		if !dep.fits(on) {
			continue
		}
		later := false
		if dep.ImageID.IsZero() {
			prefix := append([]byte(on.Name), 0)
			if v := dep.Labels[acproxy.LabelVersion]; v != "" {
				// With it the image has exactly this version, else it would not fit.
				prefix = nameKey(on.Name, on.Labels[acproxy.LabelVersion], nil)
			}
			err := scan(tx, bucketNames, prefix, nil, func(key, _ []byte) error {
				digest, err := digestIn(key)
				if err != nil || digest == on.Digest || p.gone[digest] {
					return err
				}
				h, ok, err := getRecord(tx, digest)
				if err != nil || !ok || h.Quarantined() || !dep.fits(h.Record) {
					return err
				}
				if h.Labels[acproxy.LabelOS] == on.Labels[acproxy.LabelOS] && h.Labels[acproxy.LabelArch] == on.Labels[acproxy.LabelArch] && h.Fetched.After(on.Fetched) {
					later = true
					return errEnough
				}
				return nil
			})
			if err != nil {
				return false, err
			}
		}
		if !later {
			return true, nil
		}
	}
	return false, nil
}

// fits reports whether an image is one that a dependency may be met by.
func (dep Dependency) fits(rec Record) bool {
	if dep.Name != rec.Name || !dep.ImageID.IsZero() && !rec.ImageID.IsZero() && dep.ImageID != rec.ImageID {
		return false
	}
	ref, err := acproxy.NewRef(dep.Name, dep.Labels)
	// One that is no ref can't be asked for.
	return err == nil && ref.Matches(rec.Name, rec.Labels) == nil
}

// dependencyNames returns the names of what an image depends on, each once.
func dependencyNames(rec Record) []string {
	var names []string
	for _, dep := range rec.Dependencies {
		if !slices.Contains(names, dep.Name) {
			names = append(names, dep.Name)
		}
	}
	return names
}
