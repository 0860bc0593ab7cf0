package cache

import "sync"

// maxHot bounds what is remembered of the index in the form in which it is asked for: some kilobytes each.
const maxHot = 8192

// hot remembers answers of one generation of the index: every change of the index begins another, in which all are forgotten. That is coarse,
// and needs no thought about what a change affects. It is safe for concurrent use.
type hot[K comparable, V any] struct {
	mu         sync.RWMutex
	generation uint64
	answers    map[K]V
}

func (h *hot[K, V]) get(generation uint64, key K) (V, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.generation != generation {
		var none V
		return none, false
	}
	v, ok := h.answers[key]
	return v, ok
}

// put remembers an answer that was found in a generation, or a later one.
func (h *hot[K, V]) put(generation uint64, key K, v V) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.answers == nil || generation > h.generation || len(h.answers) >= maxHot {
		h.answers = make(map[K]V)
		h.generation = max(generation, h.generation)
	}
	if generation == h.generation {
		h.answers[key] = v
	}
}
