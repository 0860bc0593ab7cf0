// Package missing remembers what nodes asked for and could not get, because it isn't here.
package missing

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// A Missed is something that was asked for and not held.
type Missed struct {
	Ref   acproxy.Ref `json:"ref"`   // of what was asked for by discovery only, a name
	Name  bool        `json:"name"`  // only discovery was asked, so that nothing but the name is known
	Count int64       `json:"count"` // how often
	First time.Time   `json:"first"`
	Last  time.Time   `json:"last"`
	Code  string      `json:"code"`   // why it could not be had the last time, for programs
	Why   string      `json:"detail"` // and for people
}

// Max is how many things are remembered. Beyond that the one that wasn't asked for for the longest time is forgotten.
const Max = 10_000

// walk is within which time a client asks for the pages above a name, one after the other, when there is none for the name itself (appc, "Meta Discovery").
const walk = 5 * time.Second

// A Table is what was asked for and not held. It is safe for concurrent use.
type Table struct {
	mu      sync.Mutex
	entries map[key]*Missed
	changed bool
	file    string // where it is kept; "" is nowhere
}

type key struct {
	ref  acproxy.Ref
	name bool
}

// New returns an empty table.
func New() *Table { return &Table{entries: make(map[key]*Missed)} }

// Note notes that an image was asked for and could not be had.
func (t *Table) Note(ref acproxy.Ref, err error, now time.Time) { t.note(key{ref, false}, err, now) }

// NoteName notes that discovery was asked for a name of which nothing is known. The names above one that was just asked for are those that a client goes on to:
// they are not noted.
func (t *Table) NoteName(name string, err error, now time.Time) {
	ref, invalid := acproxy.NewRef(name, nil)
	if invalid != nil {
		return
	}
	t.mu.Lock()
	for k, e := range t.entries {
		if k.name && k.ref != ref && acproxy.HasPrefix(k.ref.Name(), name) && now.Sub(e.Last) < walk {
			t.mu.Unlock()
			return
		}
	}
	t.mu.Unlock()
	t.note(key{ref, true}, err, now)
}

func (t *Table) note(k key, err error, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[k]
	if !ok {
		if len(t.entries) >= Max {
			t.forgetOldest()
		}
		e = &Missed{Ref: k.ref, Name: k.name, First: now}
		t.entries[k] = e
	}
	e.Count++
	e.Last, e.Code, e.Why = now, acproxy.Code(err), err.Error()
	t.changed = true
}

// forgetOldest makes room for a tenth more, so that it isn't searched for with every newcomer. The caller holds the mutex.
func (t *Table) forgetOldest() {
	all := make([]key, 0, len(t.entries))
	for k := range t.entries {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b key) int { return t.entries[a].Last.Compare(t.entries[b].Last) })
	for _, k := range all[:max(1, Max/10)] {
		delete(t.entries, k)
	}
}

// Entries returns what is missing, what was asked for most often first. What held says is here by now is forgotten.
func (t *Table) Entries(held func(Missed) bool) []Missed {
	t.mu.Lock()
	all := make([]Missed, 0, len(t.entries))
	for _, e := range t.entries {
		all = append(all, *e)
	}
	t.mu.Unlock()
	all = slices.DeleteFunc(all, func(e Missed) bool {
		here := held(e)
		if here {
			t.Forget(e)
		}
		return here
	})
	slices.SortFunc(all, func(a, b Missed) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Ref.String(), b.Ref.String()))
	})
	return all
}

// Forget forgets an entry, unless it was asked for again since.
func (t *Table) Forget(e Missed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := key{e.Ref, e.Name}
	if now, ok := t.entries[k]; ok && now.Last.Equal(e.Last) {
		delete(t.entries, k)
		t.changed = true
	}
}

// Clear forgets everything.
func (t *Table) Clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.entries)
	t.changed = true
}

// Load returns the table in a file, or an empty one if there is no such file. After an error, which is nothing to stop for, too.
func Load(file string) (*Table, error) {
	t := New()
	t.file = file
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	var entries []Missed
	if err == nil {
		err = json.Unmarshal(text, &entries)
	}
	if err == nil && len(entries) > Max {
		err = fmt.Errorf("it has %d entries, and may have %d", len(entries), Max)
	}
	if err != nil {
		return t, fmt.Errorf("reading what was missing in %s: %w", file, err)
	}
	for _, e := range entries {
		t.entries[key{e.Ref, e.Name}] = &e
	}
	return t, nil
}

// Save writes the table into the file that it was loaded from, as a whole or not at all, if it has changed since.
func (t *Table) Save() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.changed || t.file == "" {
		return nil
	}
	all := make([]*Missed, 0, len(t.entries))
	for _, e := range t.entries {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *Missed) int { return a.First.Compare(b.First) })
	text, err := json.Marshal(all)
	if err == nil {
		err = durable.Rewrite(t.file, text, 0o640)
	}
	if err != nil {
		return fmt.Errorf("writing what is missing: %w", err)
	}
	t.changed = false
	return nil
}
