// Package memo remembers what was made before, in bounds.
package memo

import "sync"

// A Memo remembers values by their keys, up to a number of them; when it is full it begins anew. That is coarse, and what is asked for all the time is back
// at once. It is safe for concurrent use.
type Memo[K comparable, V any] struct {
	most int

	mu   sync.RWMutex
	made map[K]V
}

// New returns an empty Memo of at most so many values.
func New[K comparable, V any](most int) *Memo[K, V] {
	return &Memo[K, V]{most: most, made: make(map[K]V)}
}

// Get returns what was put under a key, unless it was forgotten since.
func (m *Memo[K, V]) Get(key K) (V, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, ok := m.made[key]
	return v, ok
}

// Put remembers a value under a key, in the place of the one that is there.
func (m *Memo[K, V]) Put(key K, v V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.made[key]; !ok && len(m.made) >= m.most {
		clear(m.made)
	}
	m.made[key] = v
}
