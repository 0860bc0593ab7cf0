package cache

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// The kinds of what is evicted, in the order in which they go.
const (
	EvictSpool       = "spool"       // what can be made again from an image, such as an OCI layer
	EvictPartial     = "partial"     // what has arrived of an image and nobody takes up again
	EvictSetAside    = "set-aside"   // a blob in the quarantine directory
	EvictQuarantined = "quarantined" // an image that must not be served, with its bytes
	EvictImage       = "image"
)

// The reasons for evicting.
const (
	ReasonNeeded   = "needed"         // something is arriving that needs the space
	ReasonHigh     = "high-watermark" // more is taken than the high watermark allows
	ReasonDiskFull = "disk-full"      // the disk was full although the quota was not exhausted
	ReasonAsked    = "asked"          // an operator asked for it
)

// An Eviction is something that was evicted, or would be.
type Eviction struct {
	Kind   string    `json:"kind"`
	Reason string    `json:"reason"`
	Bytes  int64     `json:"bytes"`           // of whole blocks, the sidecar's included
	Record *Record   `json:"image,omitempty"` // if it is an image
	Ref    string    `json:"ref,omitempty"`   // a ref that a partial was for
	File   string    `json:"file,omitempty"`  // the name of a file in the quarantine directory, or what a spool was of
	Used   time.Time `json:"used,omitzero"`   // when it was last used, written or set aside
}

// The reasons for keeping an image. An image is asked about them in this order.
const (
	KeptPinned   = "pinned"
	KeptInUse    = "in-use"
	KeptGrace    = "grace"     // it is younger than the grace since it was fetched or last used
	KeptLastCopy = "last-copy" // its publisher has it no more
	KeptNeeded   = "needed"    // an image that is kept, or was used later, depends on it
)

// A Kept is an image that is not evicted, and why.
type Kept struct {
	Why    string    `json:"why"`
	Bytes  int64     `json:"bytes"`
	Record Record    `json:"image"`
	Used   time.Time `json:"used,omitzero"`
	By     string    `json:"by,omitempty"` // name and version of the image that needs it
}

// MaxKept bounds the images that a [Plan] names as kept. The sums count all.
const MaxKept = 1000

// A Plan says what would be evicted to come down to a size, and what wouldn't.
type Plan struct {
	Taken  int64            `json:"taken"`  // bytes on the disk now
	Target int64            `json:"target"` // bytes that there are to be
	Frees  int64            `json:"frees"`  // bytes that the evictions free
	Enough bool             `json:"enough"` // whether that is enough
	Evict  []Eviction       `json:"evict,omitempty"`
	Kept   []Kept           `json:"kept,omitempty"`      // of what would have been evicted otherwise, at most MaxKept; images that are pinned among them
	Sums   map[string]int64 `json:"keptBytes,omitempty"` // bytes by the reason for keeping them, those that weren't looked at left out
}

// MaxTold bounds the evictions that a [Freed] names. The sums count all.
const MaxTold = 10_000

// Freed is what an eviction has come to.
type Freed struct {
	Bytes   int64      `json:"bytes"`
	Count   int        `json:"count"`
	Evicted []Eviction `json:"evicted,omitempty"` // at most MaxTold of them
}

func (f *Freed) add(evicted ...Eviction) {
	for _, e := range evicted {
		f.Bytes += e.Bytes
		f.Count++
		if len(f.Evicted) < MaxTold {
			f.Evicted = append(f.Evicted, e)
		}
	}
}

// demand is what somebody asks of the evictor beside space that is promised: a number of bytes, as many as can be had.
type demand struct {
	why   string
	bytes int64
	done  chan freedOrError
}

type freedOrError struct {
	freed Freed
	err   error
}

// maxTogetherEvicted is how many images are evicted in one transaction.
const maxTogetherEvicted = 32

// evictor is the one that evicts. Everybody else asks it, so that a store that is full sees one deletion after the other instead of all at once.
func (d *Disk) evictor() {
	defer d.space.close()
	var later <-chan time.Time
	for {
		select {
		case <-d.wakeups:
			later = d.makeRoom()
		case <-later:
			later = d.makeRoom()
		case q := <-d.demands:
			freed, err := d.evictFor(q)
			q.done <- freedOrError{freed, err}
		case <-d.ctx.Done():
			return
		}
	}
}

// wake tells the evictor that there is something to do.
func (d *Disk) wake() {
	select {
	case d.wakeups <- struct{}{}:
	default: // it has been told already, and hasn't looked yet
	}
}

// ask demands something of the evictor and waits until it is done.
func (d *Disk) ask(ctx context.Context, q demand) (Freed, error) {
	q.done = make(chan freedOrError, 1)
	select {
	case d.demands <- q:
	case <-ctx.Done():
		return Freed{}, context.Cause(ctx)
	case <-d.ctx.Done():
		return Freed{}, errClosed
	}
	select {
	case r := <-q.done:
		return r.freed, r.err
	case <-ctx.Done():
		return Freed{}, context.Cause(ctx)
	case <-d.ctx.Done():
		return Freed{}, errClosed
	}
}

// defaultEvictAgain is when it is looked again for what can be evicted when that wasn't enough: images leave their grace without anybody telling.
const defaultEvictAgain = time.Minute

// makeRoom gives those who wait for space their answer, and then goes down to the low watermark if more is taken than the high one allows. It returns when to
// do so again, nil unless more is taken still.
func (d *Disk) makeRoom() (later <-chan time.Time) {
	lowering := false
	for d.ctx.Err() == nil {
		if p := d.space.next(); p != nil {
			d.space.settle(p, d.roomFor(p))
			continue
		}
		if d.idle || d.readOnly {
			return nil
		}
		d.space.mu.Lock()
		known := d.space.unknown == 0
		above, missing := d.space.above(d.space.quota().High), d.space.above(d.space.quota().Low)
		d.space.mu.Unlock()
		if !known || above <= 0 && !lowering || missing <= 0 {
			return nil
		}
		lowering = true
		// A batch at a time: somebody may have begun to wait for space.
		plan, err := d.plan(missing, maxTogetherEvicted, false)
		if err != nil {
			d.log.Error("looking for what to evict", "err", err)
			return time.After(d.evictAgain)
		}
		freed, err := d.evict(plan.victims, ReasonHigh)
		if err != nil {
			d.log.Error("evicting", "err", err)
			return time.After(d.evictAgain)
		}
		if freed.Bytes == 0 {
			return time.After(d.evictAgain)
		}
	}
	return nil
}

// maxRounds is how often something is chosen anew because what was chosen had changed when it was its turn.
const maxRounds = 5

// roomFor evicts what stands in the way of a promise. If that can't be enough, nothing is evicted.
func (d *Disk) roomFor(p *promise) error {
	for round := 0; ; round++ {
		d.space.mu.Lock()
		room, limit := d.space.room()
		d.space.mu.Unlock()
		missing := p.n - room
		if missing <= 0 {
			return nil
		}
		plan, err := d.plan(missing, 0, false)
		if err != nil {
			return fmt.Errorf("looking for what to evict: %w", err)
		}
		if plan.sum < missing || round == maxRounds {
			plan.forgo()
			return d.noRoom(p, room, limit, plan)
		}
		freed, err := d.evict(plan.victims, ReasonNeeded)
		if err != nil {
			return err
		}
		if limit == codeFree && freed.Bytes >= missing {
			// Some file systems say late that something was freed. What was missing is there now.
			return nil
		}
	}
}

// noRoom says why there is no room, and what holds it.
func (d *Disk) noRoom(p *promise, room int64, limit string, plan *planner) error {
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	s := d.space
	by := fmt.Sprintf("cache.max_size (%s)", size(s.quota().MaxSize))
	if limit == codeFree {
		by = fmt.Sprintf("cache.min_free (%s)", size(s.quota().MinFree))
	}
	images := s.totals.Blobs + s.totals.Sidecars
	rest := images - s.totals.Pinned - plan.sum
	var holds []string
	hold := func(n int64, what string) {
		if n > 0 {
			holds = append(holds, size(n)+" "+what)
		}
	}
	hold(s.totals.Pinned, "are pinned")
	for _, k := range []struct{ why, text string }{
		{KeptInUse, "are being read"}, {KeptLastCopy, "are last copies, which their publishers have no more (cache.evict_last_copies)"},
		{KeptNeeded, "are dependencies of images that are kept"},
	} {
		hold(plan.kept[k.why], k.text)
		rest -= plan.kept[k.why]
	}
	hold(rest, "were fetched or used less than cache.grace ago")
	hold(s.loose, "are promised to what is arriving")
	detail := fmt.Sprintf("%s needs %s, and there is room for %s within %s", p.what, size(p.n), size(max(0, room)), by)
	if plan.sum > 0 {
		detail += fmt.Sprintf("; no more than %s could be evicted, so nothing was", size(plan.sum))
	} else {
		detail += "; nothing can be evicted"
	}
	if len(holds) > 0 {
		detail += ": " + strings.Join(holds, ", ")
	}
	return &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: limit, Detail: detail}
}

// evictFor does what was demanded, as far as it can be done.
func (d *Disk) evictFor(q demand) (Freed, error) {
	var all Freed
	for d.ctx.Err() == nil && all.Bytes < q.bytes {
		plan, err := d.plan(q.bytes-all.Bytes, maxTogetherEvicted, false)
		if err != nil {
			return all, err
		}
		freed, err := d.evict(plan.victims, q.why)
		all.add(freed.Evicted...)
		if err != nil {
			return all, err
		}
		if freed.Bytes == 0 {
			break
		}
	}
	return all, nil
}

// missing returns how many bytes have to go to come down to a target, given in bytes on the disk; less than 0 means the low watermark.
func (d *Disk) missing(target int64) (taken, to, missing int64) {
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	taken = d.space.taken() - d.space.unwritten()
	if target >= 0 {
		return taken, target, taken - target
	}
	missing = max(0, d.space.above(d.space.quota().Low))
	return taken, taken - missing, missing
}

// PlanEviction says what would be evicted to come down to a number of bytes on the disk, the least recently used first, and what would be kept and
// why; less than 0 means the low watermark. Nothing is evicted.
func (d *Disk) PlanEviction(ctx context.Context, target int64) (Plan, error) {
	if err := d.Ready(ctx); err != nil {
		return Plan{}, err
	}
	taken, to, missing := d.missing(target)
	out := Plan{Taken: taken, Target: to, Enough: true}
	if missing > 0 {
		plan, err := d.plan(missing, 0, true)
		if err != nil {
			return out, err
		}
		out.Frees, out.Enough, out.Evict, out.Kept, out.Sums = plan.sum, plan.sum >= missing, plan.said, plan.list, plan.kept
		for i := range out.Evict {
			out.Evict[i].Reason = ReasonAsked
		}
	}
	return out, nil
}

// Evict evicts what [Disk.PlanEviction] says. It is no error if that isn't enough.
func (d *Disk) Evict(ctx context.Context, target int64) (Freed, error) {
	if err := d.Ready(ctx); err != nil {
		return Freed{}, err
	}
	_, _, missing := d.missing(target)
	if missing <= 0 {
		return Freed{}, nil
	}
	return d.ask(ctx, demand{why: ReasonAsked, bytes: missing})
}
