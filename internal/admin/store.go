package admin

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/missing"
)

// A Store is what is looked into: an open store, or, through a [Client], that of a running server.
type Store interface {
	// Images returns held images in the order of the filter, at most limit, those after the place that the call before returned ("" begins). The next place is
	// "" at the end.
	Images(filter cache.Filter, after string, limit int) (images []cache.Record, next string, err error)
	// Record returns one image by its digest, or an error matching [acproxy.ErrNotFound].
	Record(digest acproxy.Digest) (cache.Record, error)
	// Manifest returns an image's manifest as it is in the image.
	Manifest(digest acproxy.Digest) ([]byte, error)
	// Signature returns an image's signature as it was published, or an error matching [acproxy.ErrNotFound] if it has none.
	Signature(digest acproxy.Digest) ([]byte, error)
	// Blob opens the bytes of an image as they were published. The caller closes them. It returns an error matching [acproxy.ErrNotFound] if it isn't held.
	Blob(digest acproxy.Digest) (io.ReadSeekCloser, error)
	// Dependencies returns what an image needs, and what that needs, as far as it is held.
	Dependencies(digest acproxy.Digest) ([]Needed, error)
	// ByImageID returns the images whose ID begins with some hex digits.
	ByImageID(digits string) ([]cache.Record, error)
	// Missing returns what nodes asked for and could not get because it isn't held, what was asked for most often first.
	Missing() ([]missing.Missed, error)
	// ForgetMissing forgets all that.
	ForgetMissing() error
	// Refusals returns the images that were refused, the latest first.
	Refusals() ([]cache.Refused, error)
	// Usage returns the space that the store takes.
	Usage() (cache.Usage, error)
	// PlanEviction says what would be evicted to come down to a number of bytes on the disk, and what not and why; less than 0 means the low
	// watermark.
	PlanEviction(ctx context.Context, target int64) (cache.Plan, error)
	// Evict evicts that.
	Evict(ctx context.Context, target int64) (cache.Freed, error)
	// Pin keeps an image from being evicted, or lets it be again. It returns an error matching [acproxy.ErrNotFound] if it isn't held.
	Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error
	// Delete removes an image, pinned or not. It returns an error matching [acproxy.ErrNotFound] if it isn't held.
	Delete(ctx context.Context, digest acproxy.Digest) error
	// Scrub reads all images, and repairs what it can. It returns what it has come to when ctx ends it, too.
	Scrub(ctx context.Context, o cache.ScrubOptions) (cache.Scrubbed, error)
}

var (
	_ Store = Judged{}
	_ Store = (*Client)(nil)
)

// Judged is an open store whose images have the state that keys and policies give them now.
type Judged struct {
	*cache.Disk
	Judge func(cache.Record) cache.Record
	// Did is told of what was done to an image because somebody wanted it. nil means that nobody is.
	Did func(fetch.Decision)
	// Missed is what nodes could not get.
	Missed *missing.Table
	// Knows reports whether anything is known of a name.
	Knows func(name string) bool
}

// Missing implements [Store].
func (j Judged) Missing() ([]missing.Missed, error) {
	var wrong error
	entries := j.Missed.Entries(func(e missing.Missed) bool {
		if e.Name {
			return j.Knows(e.Ref.Name())
		}
		records, err := j.Match(e.Ref)
		if err != nil && !errors.Is(err, acproxy.ErrNotFound) {
			wrong = errors.Join(wrong, err)
		}
		return slices.ContainsFunc(records, func(rec cache.Record) bool { return !rec.Quarantined() })
	})
	return entries, wrong
}

// ForgetMissing implements [Store].
func (j Judged) ForgetMissing() error {
	j.Missed.Clear()
	return j.Missed.Save()
}

// Images is [cache.Disk.Images]. A filter by state goes by the state now.
func (j Judged) Images(filter cache.Filter, after string, limit int) ([]cache.Record, string, error) {
	state := filter.State
	filter.State = ""
	var chosen []cache.Record
	for {
		records, next, err := j.Disk.Images(filter, after, limit)
		if err != nil {
			return nil, "", err
		}
		records = j.judge(records)
		if state != "" {
			records = slices.DeleteFunc(records, func(rec cache.Record) bool { return rec.State != state })
		}
		chosen = append(chosen, records...)
		if next == "" || limit > 0 && len(chosen) > 0 {
			return chosen, next, nil
		}
		after = next
	}
}

// Record is [cache.Disk.Record].
func (j Judged) Record(digest acproxy.Digest) (cache.Record, error) {
	rec, err := j.Disk.Record(digest)
	if err != nil {
		return rec, err
	}
	return j.Judge(rec), nil
}

// Blob implements [Store].
func (j Judged) Blob(digest acproxy.Digest) (io.ReadSeekCloser, error) {
	blob, err := j.OpenBlob(digest)
	if err != nil {
		return nil, err
	}
	return blob, nil
}

// ByImageID is [cache.Disk.ByImageID].
func (j Judged) ByImageID(digits string) ([]cache.Record, error) {
	records, err := j.Disk.ByImageID(digits)
	return j.judge(records), err
}

// Pin implements [Store].
func (j Judged) Pin(ctx context.Context, digest acproxy.Digest, pinned bool) error {
	changed := false
	err := j.Update(ctx, digest, func(rec *cache.Record) error {
		changed = rec.Pinned != pinned
		rec.Pinned = pinned
		return nil
	})
	if err != nil || !changed {
		return err
	}
	event := journal.EventPinned
	if !pinned {
		event = journal.EventUnpinned
	}
	rec, err := j.Disk.Record(digest)
	if err == nil {
		j.did(ctx, event, rec)
	}
	return err
}

// Delete implements [Store].
func (j Judged) Delete(ctx context.Context, digest acproxy.Digest) error {
	rec, err := j.Disk.Record(digest)
	if err != nil {
		return err
	}
	if err := j.Disk.Delete(ctx, digest); err != nil {
		return err
	}
	j.did(ctx, journal.EventDeleted, rec)
	return nil
}

func (j Judged) did(ctx context.Context, event string, rec cache.Record) {
	if j.Did == nil {
		return
	}
	d := fetch.Decision{Time: time.Now().UTC(), Event: event, ImageID: rec.ImageID, Digest: rec.Digest, Source: rec.Source, Policy: rec.Policy, Client: askedBy(ctx)}
	d.Ref, _ = acproxy.NewRef(rec.Name, rec.Labels) // a name and labels that were a ref when the image was committed
	j.Did(d)
}

func (j Judged) judge(records []cache.Record) []cache.Record {
	for i, rec := range records {
		records[i] = j.Judge(rec)
	}
	return records
}

// Needed is another image that an image needs, and what became of it here.
type Needed struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	ImageID acproxy.ImageID   `json:"imageID"`         // zero if the manifest leaves it open
	Size    int64             `json:"size,omitempty"`  // bytes, 0 if the manifest leaves it open
	Held    *cache.Record     `json:"held,omitempty"`  // the image that it is here; null if none is held
	Cycle   bool              `json:"cycle,omitempty"` // it needs, by way of others, itself
	More    bool              `json:"more,omitempty"`  // it needs others, which are beyond what is looked at
	// Dependencies are what the held image needs in turn.
	Dependencies []Needed `json:"dependencies,omitempty"`
}

// Bounds of what is looked at: dependencies come from manifests, which strangers write.
const (
	maxDepth = 16
	maxNodes = 500
)

// Dependencies implements [Store].
func (j Judged) Dependencies(digest acproxy.Digest) ([]Needed, error) {
	rec, err := j.Record(digest)
	if err != nil {
		return nil, err
	}
	nodes := 0
	return j.needs(rec, []acproxy.Digest{digest}, &nodes)
}

func (j Judged) needs(rec cache.Record, path []acproxy.Digest, nodes *int) ([]Needed, error) {
	var out []Needed
	for _, d := range rec.Dependencies {
		*nodes++
		if *nodes > maxNodes {
			return out, nil
		}
		dep := Needed{Name: d.Name, Labels: d.Labels, ImageID: d.ImageID, Size: d.Size}
		held, err := j.fits(d)
		if err != nil {
			return nil, err
		}
		if held != nil {
			dep.Held = held
			switch {
			case slices.Contains(path, held.Digest):
				dep.Cycle = true
			case len(path) == maxDepth || *nodes == maxNodes:
				dep.More = len(held.Dependencies) > 0
			default:
				if dep.Dependencies, err = j.needs(*held, append(slices.Clone(path), held.Digest), nodes); err != nil {
					return nil, err
				}
			}
		}
		out = append(out, dep)
	}
	return out, nil
}

// fits returns the held image that a dependency is, nil if there is none: the one with its ID, else that which was fetched last.
func (j Judged) fits(d cache.Dependency) (*cache.Record, error) {
	ref, err := acproxy.NewRef(d.Name, d.Labels)
	if err != nil {
		// No node can ask for it either.
		return nil, nil
	}
	records, err := j.Match(ref)
	if err != nil && !errors.Is(err, acproxy.ErrNotFound) {
		return nil, err
	}
	records = slices.DeleteFunc(records, func(rec cache.Record) bool { return !d.ImageID.IsZero() && rec.ImageID != d.ImageID })
	if len(records) == 0 {
		return nil, nil
	}
	latest := j.Judge(slices.MaxFunc(records, func(a, b cache.Record) int { return a.Fetched.Compare(b.Fetched) }))
	return &latest, nil
}
