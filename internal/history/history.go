// Package history remembers how much was served and fetched, by the minute and by the hour.
package history

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/acproxy/acproxy/internal/durable"
)

// How long what is remembered: a day by the minute, a week and a day by the hour.
const (
	Minutes = 24 * 60
	Hours   = 8 * 24
)

// Totals are counts since the start of the server.
type Totals struct {
	Requests int64 `json:"requests"` // for images, signatures and pages
	Hits     int64 `json:"hits"`     // how many of them were answered from the store
	Misses   int64 `json:"misses"`   // how many of them waited for a publisher
	Refused  int64 `json:"refused"`  // how many of them were answered with 403
	Served   int64 `json:"served"`   // bytes to clients
	Fetched  int64 `json:"fetched"`  // bytes from publishers
}

func (t *Totals) add(o Totals) {
	t.Requests += o.Requests
	t.Hits += o.Hits
	t.Misses += o.Misses
	t.Refused += o.Refused
	t.Served += o.Served
	t.Fetched += o.Fetched
}

// since returns what was counted since an earlier time.
func (t Totals) since(o Totals) Totals {
	return Totals{t.Requests - o.Requests, t.Hits - o.Hits, t.Misses - o.Misses, t.Refused - o.Refused, t.Served - o.Served, t.Fetched - o.Fetched}
}

// A Point is what was counted in a span of time that begins then.
type Point struct {
	Time time.Time `json:"time"`
	Totals
}

// A History is what was counted. It is safe for concurrent use.
type History struct {
	mu      sync.Mutex
	minutes []Point // without those in which nothing was counted, the oldest first
	hours   []Point
	last    Totals
}

// New returns a History without a past.
func New() *History { return new(History) }

// Note notes what was counted up to now. It is for the minute that now is in.
func (h *History) Note(now time.Time, totals Totals) {
	h.mu.Lock()
	defer h.mu.Unlock()
	counted := totals.since(h.last)
	h.last = totals
	if counted == (Totals{}) {
		return
	}
	h.minutes = note(h.minutes, now.UTC().Truncate(time.Minute), counted, Minutes*time.Minute)
	h.hours = note(h.hours, now.UTC().Truncate(time.Hour), counted, Hours*time.Hour)
}

func note(points []Point, at time.Time, counted Totals, keep time.Duration) []Point {
	if n := len(points); n > 0 && !points[n-1].Time.Before(at) {
		// A clock that was set back doesn't make a second past.
		points[n-1].add(counted)
		return points
	}
	drop := 0
	for drop < len(points) && !points[drop].Time.After(at.Add(-keep)) {
		drop++
	}
	return append(points[drop:len(points):len(points)], Point{at, counted})
}

// A Range is a span of time up to now, in parts of the same length.
type Range struct {
	Name string
	Span time.Duration
	Part time.Duration
}

// Ranges are what can be asked for.
func Ranges() []Range {
	return []Range{{"hour", time.Hour, time.Minute}, {"day", 24 * time.Hour, 15 * time.Minute}, {"week", 7 * 24 * time.Hour, time.Hour}}
}

// Points returns what was counted in a range that ends now: a point for each of its parts, the oldest first, and the sum of them.
func (h *History) Points(r Range, now time.Time) (points []Point, sum Totals) {
	h.mu.Lock()
	defer h.mu.Unlock()
	from := h.minutes
	if r.Part >= time.Hour {
		from = h.hours
	}
	end := now.UTC().Truncate(r.Part).Add(r.Part)
	begin := end.Add(-r.Span)
	points = make([]Point, int(r.Span/r.Part))
	for i := range points {
		points[i].Time = begin.Add(time.Duration(i) * r.Part)
	}
	for _, p := range from {
		if i := int(p.Time.Sub(begin) / r.Part); !p.Time.Before(begin) && i < len(points) {
			points[i].add(p.Totals)
			sum.add(p.Totals)
		}
	}
	return points, sum
}

// kept is a history as it is in its file.
type kept struct {
	Minutes []Point `json:"minutes"`
	Hours   []Point `json:"hours"`
}

// Load returns the history that a file has, or one without a past if there is no such file. After an error, which is nothing to stop for, too.
func Load(file string) (*History, error) {
	h := New()
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	var k kept
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil {
		return h, fmt.Errorf("reading the history in %s: %w", file, err)
	}
	ordered := func(points []Point) bool {
		for i := 1; i < len(points); i++ {
			if !points[i].Time.After(points[i-1].Time) {
				return false
			}
		}
		return true
	}
	if !ordered(k.Minutes) || !ordered(k.Hours) || len(k.Minutes) > 2*Minutes || len(k.Hours) > 2*Hours {
		return h, fmt.Errorf("reading the history in %s: its times are out of order", file)
	}
	h.minutes, h.hours = k.Minutes, k.Hours
	return h, nil
}

// Save writes the history into a file, as a whole or not at all.
func (h *History) Save(file string) error {
	h.mu.Lock()
	text, err := json.Marshal(kept{h.minutes, h.hours})
	h.mu.Unlock()
	if err == nil {
		err = durable.Rewrite(file, text, 0o640)
	}
	if err != nil {
		return fmt.Errorf("writing the history: %w", err)
	}
	return nil
}
