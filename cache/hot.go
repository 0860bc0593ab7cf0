package cache

import (
	"encoding/binary"
	"hash/maphash"
	"sync/atomic"

	"github.com/acproxy/acproxy"
)

// hotSlots bounds what is remembered of the index in the form in which it is asked for: some kilobytes each.
const hotSlots = 8192

// hot remembers answers, each in the one slot that its key has. An answer is true of a generation of the index and of those after it until a
// change affects it, which is noted in the slot: an older answer that somebody puts there late is as worthless as one that was there. It is safe
// for concurrent use, and nobody waits.
type hot[K comparable, V any] struct {
	slot  func(K) uint64
	since atomic.Uint64 // the generation of the last change that affected everything
	slots [hotSlots]hotSlot[K, V]
}

type hotSlot[K comparable, V any] struct {
	asked  atomic.Uint64 // what slot said of the key that was asked for last, and not remembered
	since  atomic.Uint64 // the generation of the last change that affected what belongs here
	answer atomic.Pointer[hotAnswer[K, V]]
}

type hotAnswer[K comparable, V any] struct {
	generation uint64
	slot       uint64 // what slot says of the key
	key        K
	v          V
}

// get returns an answer and the generation in which it was found. slot is what slot says of the key.
func (h *hot[K, V]) get(slot uint64, key K) (v V, generation uint64, ok bool) {
	a := h.slots[slot%hotSlots].answer.Load()
	if a == nil || a.slot != slot || a.key != key || !h.fresh(slot, a.generation) {
		return v, 0, false
	}
	return a.v, a.generation, true
}

// wants reports whether an answer is worth being remembered: nothing else that belongs in its slot was asked for since the key was last. Most of what is
// asked for once is not asked for again soon, and it must not take the place of what is.
func (h *hot[K, V]) wants(slot uint64) bool {
	s := &h.slots[slot%hotSlots]
	if s.asked.Load() == slot {
		return true
	}
	s.asked.Store(slot)
	return false
}

// put remembers an answer that was found in a generation.
func (h *hot[K, V]) put(generation, slot uint64, key K, v V) {
	h.slots[slot%hotSlots].answer.Store(&hotAnswer[K, V]{generation, slot, key, v})
}

// fresh reports whether what was said in a generation of a key with a slot is still true.
func (h *hot[K, V]) fresh(slot, generation uint64) bool {
	return generation >= h.since.Load() && generation >= h.slots[slot%hotSlots].since.Load()
}

// forget is called with the generation that a change begins, when the index can be seen to be changed and before anybody is told.
func (h *hot[K, V]) forget(generation uint64, key K) {
	raise(&h.slots[h.slot(key)%hotSlots].since, generation)
}

func (h *hot[K, V]) forgetAll(generation uint64) { raise(&h.since, generation) }

func raise(v *atomic.Uint64, to uint64) {
	for {
		now := v.Load()
		if now >= to || v.CompareAndSwap(now, to) {
			return
		}
	}
}

// effect is what a change changes of the answers that are remembered: those about an image, and those of refs. The zero effect is none.
type effect struct {
	digest acproxy.Digest
	refs   []Resolution
}

// memory is the answers that a store remembers. An answer of a ref holds the record of the image, and is true as long as both are.
type memory struct {
	generation atomic.Uint64 // goes up with every change of the index
	refChanges atomic.Uint64 // goes up with every change that may be one of refs
	changes    atomic.Uint64 // goes up with every change, when everybody can see it
	refs       hot[acproxy.Ref, *answer]
	records    hot[acproxy.Digest, *Record]
}

func newMemory() *memory {
	seed := maphash.MakeSeed()
	m := &memory{}
	m.refs.slot = func(ref acproxy.Ref) uint64 { return maphash.Comparable(seed, ref) }
	m.records.slot = func(digest acproxy.Digest) uint64 { return binary.NativeEndian.Uint64(digest[:]) }
	return m
}

// resolve returns what is remembered of a ref, whose slot among refs is given.
func (m *memory) resolve(slot uint64, ref acproxy.Ref) (*answer, bool) {
	a, generation, ok := m.refs.get(slot, ref)
	return a, ok && m.records.fresh(m.records.slot(a.to.Digest), generation)
}

// forget is forget of what a change affects; without effects that is everything.
func (m *memory) forget(generation uint64, effects []effect) {
	if len(effects) == 0 {
		m.refChanges.Add(1)
		m.refs.forgetAll(generation)
		m.records.forgetAll(generation)
	}
	for _, e := range effects {
		if !e.digest.IsZero() {
			m.records.forget(generation, e.digest)
		}
		for _, r := range e.refs {
			m.refChanges.Add(1)
			m.refs.forget(generation, r.Ref)
		}
	}
	m.changes.Add(1)
}
