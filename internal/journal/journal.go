// Package journal remembers what has happened lately, for those who look at a running server.
package journal

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/acproxy/acproxy/fetch"
)

// Capacity is how many events are remembered.
const Capacity = 5000

// Events beside those of package fetch: about the server as a whole, and what operators did.
const (
	EventStarted       = "started"            // the server
	EventReloaded      = "reloaded"           // the configuration, and all that it names
	EventReloadFailed  = "reload-failed"      // it could not be, and what was before counts
	EventKeysChanged   = "keys-changed"       // the trusted keys are others
	EventPublisherDown = "publisher-down"     // a host isn't asked for a while
	EventWarmed        = "warmed"             // a list of images was fetched, or could not be
	EventPublisherUp   = "publisher-up"       // a host that was down answers again
	EventPinned        = "pinned"             // an image isn't evicted any more
	EventCertificate   = "certificate-issued" // by an ACME server, for one of the server's own names
	EventNoCertificate = "certificate-failed" // none was issued, and it is tried again
	EventUnpinned      = "unpinned"           // an image may be evicted again
	EventDeleted       = "deleted"            // an image was removed because somebody wanted it
)

// An Event is something that has happened.
type Event struct {
	ID int64 `json:"id"` // rises with each event; those of one start of the server begin with 1
	fetch.Decision
}

// A Journal is the last events. It is safe for concurrent use.
type Journal struct {
	mu      sync.Mutex
	events  []Event // the oldest first
	last    int64
	changed chan struct{} // closed, and replaced, with every event
}

// New returns a Journal that begins with what was decided before.
func New(before []fetch.Decision) *Journal {
	j := &Journal{changed: make(chan struct{})}
	for _, d := range before[max(0, len(before)-Capacity):] {
		j.last++
		j.events = append(j.events, Event{j.last, d})
	}
	return j
}

// Add adds what has happened.
func (j *Journal) Add(d fetch.Decision) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.events) == Capacity {
		// Not one by one, which would move all of them with every event.
		j.events = slices.Delete(j.events, 0, Capacity/10)
	}
	j.last++
	j.events = append(j.events, Event{j.last, d})
	close(j.changed)
	j.changed = make(chan struct{})
}

// Before returns the last events that are chosen and have smaller IDs, the latest first, at most limit. With 0 it begins with the latest of all.
func (j *Journal) Before(id int64, limit int, chosen func(Event) bool) []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := []Event{}
	for i := len(j.events) - 1; i >= 0 && len(out) < limit; i-- {
		if e := j.events[i]; (id == 0 || e.ID < id) && chosen(e) {
			out = append(out, e)
		}
	}
	return out
}

// After waits until there are events with greater IDs, and returns them, the oldest first. The error is ctx's.
func (j *Journal) After(ctx context.Context, id int64) ([]Event, error) {
	for {
		j.mu.Lock()
		from, _ := slices.BinarySearchFunc(j.events, id+1, func(e Event, id int64) int { return int(e.ID - id) })
		out, changed := slices.Clone(j.events[from:]), j.changed
		j.mu.Unlock()
		if len(out) > 0 {
			return out, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Last returns the ID of the latest event, 0 if there was none.
func (j *Journal) Last() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.last
}

// tailSize is how much of an audit is read: more than the events that are remembered take.
const tailSize = 4 << 20

// Tail returns the last decisions of an audit file, in its order. Lines that are no decisions are skipped; a file that isn't there has none.
func Tail(file string) ([]fetch.Decision, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the end of the audit: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(max(0, size-tailSize), io.SeekStart)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the end of the audit: %w", err)
	}
	var out []fetch.Decision
	r := bufio.NewReader(io.LimitReader(f, tailSize))
	if size > tailSize {
		// The first line is the rest of one.
		if _, err := r.ReadBytes('\n'); err != nil {
			return nil, nil
		}
	}
	for {
		line, err := r.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			var d fetch.Decision
			if json.Unmarshal(line, &d) == nil && d.Event != "" && !d.Time.IsZero() {
				out = append(out, d)
			}
		}
		if errors.Is(err, io.EOF) {
			return out[max(0, len(out)-Capacity):], nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the end of the audit: %w", err)
		}
	}
}
