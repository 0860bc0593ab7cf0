package cache

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/acproxy/acproxy"
)

// victim is something that may go.
type victim struct {
	bytes  int64
	digest acproxy.Digest // of an image
	place  []byte         // of an image, in the order
	key    string         // of what has arrived of an image
	file   string         // in the quarantine directory
	spool  *Spool
}

// planner chooses what to evict.
type planner struct {
	d       *Disk
	now     time.Time
	need    int64 // bytes to find
	most    int   // victims to find, 0 for any number
	explain bool  // whether said and list are filled

	victims []victim
	sum     int64      // of their bytes
	said    []Eviction // the same as victims
	list    []Kept
	gone    map[acproxy.Digest]bool // the victims among images

	*survey
}

// survey is how far a planner has come, and what it has passed by on the way. It holds until something may have become evictable.
type survey struct {
	loosened uint64
	ix       *index
	next     []byte // the place in the order where to go on
	over     bool   // there was nothing more but what is in its grace
	stale    bool   // something was left out that may be evictable later
	kept     map[string]int64
	chosen   []victim // images that were chosen, and stayed because they would not have been enough
	// needed are images that were passed by because another needs them, by name. They are looked at again when one that may be it is evicted.
	needed map[string][]passed
}

type passed struct {
	place []byte
	bytes int64
}

// plan chooses what to evict to free some bytes, at most so many victims at once; 0 means any number.
func (d *Disk) plan(need int64, most int, explain bool) (*planner, error) {
	// So that the order is by what was used until now. If it fails, what was used since is passed by all the same.
	if err := d.flush(); err != nil {
		d.log.Error("writing access times", "err", err)
	}
	p := &planner{d: d, now: d.now(), need: need, most: most, explain: explain, gone: make(map[acproxy.Digest]bool)}
	d.space.mu.Lock()
	loosened := d.space.loosened
	d.space.mu.Unlock()
	fresh := &survey{loosened: loosened, ix: d.index(), kept: make(map[string]int64), needed: make(map[string][]passed)}
	p.survey = fresh
	if !explain {
		// Only the evictor plans in earnest, one plan after the other.
		if s := d.surveyed; s != nil && s.loosened == loosened && s.ix == fresh.ix && !s.stale {
			s.over = false
			p.survey = s
		}
		d.surveyed = p.survey
	}
	p.spools()
	if err := p.partials(); err != nil {
		return nil, err
	}
	if err := p.setAside(); err != nil {
		return nil, err
	}
	for !p.enough() && len(p.survey.chosen) > 0 {
		v := p.survey.chosen[0]
		p.survey.chosen = p.survey.chosen[1:]
		p.gone[v.digest] = true
		p.victims = append(p.victims, v)
		p.sum += v.bytes
	}
	if explain {
		if err := p.pinned(); err != nil {
			return nil, err
		}
	}
	for !p.enough() && !p.over {
		if err := d.view(p.look); err != nil {
			return nil, err
		}
	}
	p.list = slices.DeleteFunc(p.list, func(k Kept) bool { return p.gone[k.Record.Digest] })
	return p, nil
}

// forgo is called when what was chosen isn't evicted.
func (p *planner) forgo() {
	images := slices.DeleteFunc(p.victims, func(v victim) bool { return v.digest.IsZero() })
	p.survey.chosen = append(images, p.survey.chosen...)
}

func (p *planner) enough() bool {
	return p.sum >= p.need || p.most > 0 && len(p.victims) >= p.most
}

func (p *planner) choose(v victim, said func() Eviction) {
	p.victims = append(p.victims, v)
	p.sum += v.bytes
	if p.explain {
		p.said = append(p.said, said())
	}
}

// partials chooses from what has arrived of images that nobody takes up.
func (p *planner) partials() error {
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(d.suspended), func(a, b string) int { return d.suspended[a].since.Compare(d.suspended[b].since) })
	for _, key := range keys {
		if s := d.suspended[key]; !p.enough() && !d.leases.busy(s.lease) {
			p.choose(victim{bytes: s.bytes(), key: key}, s.eviction)
		}
	}
	return nil
}

func (s suspended) eviction() Eviction {
	return Eviction{Kind: EvictPartial, Bytes: s.bytes(), Ref: s.arrival.Ref.String(), Used: s.since}
}

// setAside chooses from the blobs in the quarantine directory. What can't be read there, and what nobody knows the meaning of, stays.
func (p *planner) setAside() error {
	files, err := p.d.setAsideBlobs()
	if err != nil {
		return err
	}
	for _, f := range files {
		if !p.enough() {
			p.choose(victim{bytes: f.bytes, file: f.name}, f.eviction)
		}
	}
	return nil
}

// asideBlob is a blob in the quarantine directory.
type asideBlob struct {
	name  string
	bytes int64
	since time.Time
}

func (f asideBlob) eviction() Eviction {
	return Eviction{Kind: EvictSetAside, Bytes: f.bytes, File: f.name, Used: f.since}
}

// setAsideBlobs returns the blobs in the quarantine directory, the oldest first.
func (d *Disk) setAsideBlobs() ([]asideBlob, error) {
	entries, err := os.ReadDir(d.path(quarantineDir))
	if err != nil {
		return nil, err
	}
	var files []asideBlob
	for _, entry := range entries {
		digits, _, ok := strings.Cut(entry.Name(), "-")
		if !ok || strings.HasSuffix(entry.Name(), reasonExt) {
			continue
		}
		if _, err := acproxy.ParseDigest("sha256:" + digits); err != nil {
			continue
		}
		fi, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return nil, err
		}
		f := asideBlob{name: entry.Name(), bytes: diskBytes(fi), since: fi.ModTime()}
		if reason, err := os.Lstat(d.path(quarantineDir, entry.Name()+reasonExt)); err == nil {
			f.bytes += diskBytes(reason)
			f.since = reason.ModTime()
		}
		files = append(files, f)
	}
	slices.SortFunc(files, func(a, b asideBlob) int { return a.since.Compare(b.since) })
	return files, nil
}

// pinned lists the pinned images, which have no place in the order.
func (p *planner) pinned() error {
	p.d.space.mu.Lock()
	p.kept[KeptPinned] = p.d.space.totals.Pinned
	p.d.space.mu.Unlock()
	return p.d.view(func(tx *bolt.Tx) error {
		p.list = nil
		return scan(tx, bucketPinned, nil, nil, func(key, _ []byte) error {
			if len(p.list) >= MaxKept {
				return errEnough
			}
			digest, err := digestIn(key)
			if err != nil {
				return err
			}
			h, ok, err := getRecord(tx, digest)
			if err == nil && ok {
				var used time.Time
				used, err = orderTime(tx, h.Record)
				p.list = append(p.list, Kept{Why: KeptPinned, Bytes: h.bytes(), Record: h.Record, Used: used})
			}
			return err
		})
	})
}

// maxLook is how many images are looked at in one transaction, so that none is open for long.
const maxLook = 256

// look goes on in the order of eviction.
func (p *planner) look(tx *bolt.Tx) error {
	looked, next, over := 0, p.next, true
	err := scan(tx, bucketOrder, nil, next, func(key, _ []byte) error {
		if len(key) != orderKeySize {
			return broken("the place %x in the order is none", key)
		}
		if bytes.Equal(key, next) {
			return nil
		}
		if looked++; looked > maxLook || p.enough() || len(p.list) >= MaxKept {
			over = len(p.list) >= MaxKept
			return errEnough
		}
		x, err := p.examine(tx, key)
		if err != nil {
			return err
		}
		if x.why == KeptGrace && !p.explain {
			// So is everything after it in its class, but for what is noted as used in a time that is yet to come.
			from := orderAhead(key[0], p.now)
			more := false
			if err := scan(tx, bucketOrder, nil, from, func(_, _ []byte) error { more = true; return errEnough }); err != nil {
				return err
			}
			if more {
				next, over, p.stale = from, false, true
			}
			return errEnough
		}
		next = x.place
		if x.why == "" {
			return p.take(tx, x)
		}
		p.pass(x)
		return nil
	})
	if err != nil {
		return err
	}
	p.next, p.over = next, over
	return nil
}

// take chooses an image, and then those that were only kept because it needed them.
func (p *planner) take(tx *bolt.Tx, x examined) error {
	p.chooseImage(x)
	names := dependencyNames(x.h.Record)
	for ; len(names) > 0; names = names[1:] {
		var still []passed
		for _, before := range p.needed[names[0]] {
			if p.enough() {
				still = append(still, before)
				continue
			}
			x, err := p.examine(tx, before.place)
			if err != nil {
				return err
			}
			if x.why != "" {
				still = append(still, before)
				continue
			}
			p.kept[KeptNeeded] -= before.bytes
			p.chooseImage(x)
			names = append(names, dependencyNames(x.h.Record)...)
		}
		p.needed[names[0]] = still
	}
	return nil
}

func (p *planner) chooseImage(x examined) {
	p.gone[x.h.Digest] = true
	p.choose(victim{bytes: x.h.bytes(), digest: x.h.Digest, place: x.place}, func() Eviction { return x.h.eviction(x.used) })
}

func (h held) eviction(used time.Time) Eviction {
	kind := EvictImage
	if h.Quarantined() {
		kind = EvictQuarantined
	}
	return Eviction{Kind: kind, Bytes: h.bytes(), Record: &h.Record, Used: used}
}

// pass notes that an image is kept.
func (p *planner) pass(x examined) {
	p.kept[x.why] += x.h.bytes()
	if x.why == KeptNeeded {
		p.needed[x.h.Name] = append(p.needed[x.h.Name], passed{x.place, x.h.bytes()})
	}
	if p.explain {
		p.list = append(p.list, Kept{Why: x.why, Bytes: x.h.bytes(), Record: x.h.Record, Used: x.used, By: x.by})
	}
}

// examined is an image at its place in the order, and why it is kept.
type examined struct {
	place []byte
	h     held
	used  time.Time
	why   string // "" if it may be evicted
	by    string // with KeptNeeded, by which image
}

// examine finds out whether an image may be evicted.
func (p *planner) examine(tx *bolt.Tx, place []byte) (examined, error) {
	x := examined{place: bytes.Clone(place), used: orderUsed(place)}
	digest, err := digestIn(place)
	if err != nil {
		return x, err
	}
	var ok bool
	if x.h, ok, err = getRecord(tx, digest); err != nil {
		return x, err
	}
	switch {
	case !ok, x.h.Pinned:
		return x, broken("the place %x in the order has no image that could be evicted", place)
	case p.d.leases.inUse(digest), p.d.touchedSince(digest), p.gone[digest]:
		// The last case is one that was chosen at the place that it had before it was used again.
		x.why = KeptInUse
	case Age(p.now, x.used) < p.d.space.quota().Grace:
		x.why = KeptGrace
	case x.h.Quarantined():
		// It serves nobody.
	default:
		last, err := p.lastCopy(tx, digest)
		if err != nil {
			return x, err
		}
		if last {
			x.why = KeptLastCopy
			break
		}
		by, err := p.neededBy(tx, x)
		if err != nil {
			return x, err
		}
		if by != nil {
			x.why, x.by = KeptNeeded, by.Name+" "+by.Labels[acproxy.LabelVersion]
		}
	}
	return x, nil
}

// touchedSince reports whether an image was used and the index doesn't know of it yet.
func (d *Disk) touchedSince(digest acproxy.Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, now := d.touched[digest]
	_, before := d.beingFlushed[digest]
	return now || before
}

// lastCopy reports whether an image is protected as one that its publisher has no more: a ref that it answers is gone there, and since then no other was found to be
// there. One with a version is asked for only once, so that its silence says nothing.
func (p *planner) lastCopy(tx *bolt.Tx, digest acproxy.Digest) (bool, error) {
	if p.d.space.quota().LastCopies {
		return false, nil
	}
	var gone, there time.Time
	err := scan(tx, bucketHeld, digest[:], nil, func(key, _ []byte) error {
		r, ok, err := getResolution(tx, key[len(digest):])
		switch {
		case !ok || r.Digest != digest:
		case r.Gone.After(gone):
			gone = r.Gone
		case r.Gone.IsZero() && r.Ref.Version() == "" && r.Validated.After(there):
			there = r.Validated
		}
		return err
	})
	return !gone.IsZero() && !there.After(gone), err
}
