package warm

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
)

// Fetcher is what images are asked of.
type Fetcher interface {
	// Image returns the image that a ref asks for.
	Image(ctx context.Context, req fetch.Request) (*fetch.Image, error)
	// Estimate says what fetching it would come to.
	Estimate(ctx context.Context, ref acproxy.Ref) (fetch.Estimate, error)
	// Versions returns the versions of an image that its publisher lists.
	Versions(ctx context.Context, name string) ([]string, error)
}

var _ Fetcher = (*fetch.Fetcher)(nil)

// What became of an image.
const (
	Held    = "held"    // it was here, and is the answer still
	Fetched = "fetched" // it is here now
	Would   = "would"   // it would be fetched: nothing was, because nothing should be
	Failed  = "failed"  // it isn't here, or isn't what was wanted
)

// A Result is what became of an image.
type Result struct {
	Image   string          `json:"image"` // the ref; of what no refs could be made of, what the list says
	Outcome string          `json:"outcome" enum:"held,fetched,would,failed"`
	Where   string          `json:"where,omitempty"`  // where the list says so
	Needed  string          `json:"needed,omitempty"` // by which other image; "" if a list wants it
	Digest  acproxy.Digest  `json:"digest"`
	ImageID acproxy.ImageID `json:"imageID"`
	Size    int64           `json:"size"` // bytes; -1 if it isn't known
	Pinned  bool            `json:"pinned,omitempty"`
	Source  string          `json:"source,omitempty"` // the URL that it would be fetched from
	Code    string          `json:"code,omitempty"`   // why it failed, for programs
	Detail  string          `json:"detail,omitempty"` // and for people
	Trace   acproxy.Trace   `json:"trace,omitempty"`  // what was tried
	Took    time.Duration   `json:"took"`             // nanoseconds
}

// Bounds of dependencies: manifests name them, which strangers write.
const (
	// DefaultMaxDepth is how many images deep dependencies are followed.
	DefaultMaxDepth = 16
	// DefaultMaxImages is how many images a job may come to.
	DefaultMaxImages = 100_000
	// DefaultConcurrency is how many images are asked for at once.
	DefaultConcurrency = 4
)

// A Run fetches images. Its fields may not change once All is called.
type Run struct {
	Fetcher   Fetcher
	Pin       func(ctx context.Context, digest acproxy.Digest) error
	Platforms []Platform // for images that don't say; none means DefaultPlatform
	DryRun    bool
	Workers   int           // images that are asked for at once; 0 means DefaultConcurrency
	Slots     chan struct{} // has room for as many as may be asked for at once by all runs together; nil sets no limit
	MaxDepth  int           // 0 means DefaultMaxDepth
	MaxImages int           // 0 means DefaultMaxImages
	// Began and Done are told of each image that is asked for, and what became of it, by any goroutine, one at a time. total is how many images are known of
	// so far, those that are done included.
	Began func(ref acproxy.Ref, total int)
	Done  func(r Result, total int)

	mu      sync.Mutex
	changed *sync.Cond
	waiting []*task
	busy    int
	known   map[acproxy.Ref]*task
	order   int  // images known of, and entries that none could be made of
	full    bool // there are more than may be
	stopped bool
}

// task is an image that is wanted.
type task struct {
	ref      acproxy.Ref
	where    string
	needed   string // by which other image
	depth    int
	pin      bool
	alone    bool
	platform Platform
	wants    []want
	result   *Result       // nil until it is done
	rec      *cache.Record // of the image, once it is done; nil if nothing is known of what it depends on
}

// want is what another image's manifest says of one that it depends on.
type want struct {
	by      string
	imageID acproxy.ImageID // zero if it leaves that open
	size    int64           // bytes, 0 if it leaves that open
}

// All fetches the images of a list, and what they depend on. It returns when all is done, or ctx is: then the error is its cause, and those that weren't
// done have no result.
func (r *Run) All(ctx context.Context, entries []Entry) error {
	if r.Workers <= 0 {
		r.Workers = DefaultConcurrency
	}
	if r.MaxDepth <= 0 {
		r.MaxDepth = DefaultMaxDepth
	}
	if r.MaxImages <= 0 {
		r.MaxImages = DefaultMaxImages
	}
	if len(r.Platforms) == 0 {
		r.Platforms = []Platform{DefaultPlatform}
	}
	r.changed, r.known = sync.NewCond(&r.mu), make(map[acproxy.Ref]*task)
	for _, e := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r.expand(ctx, e)
	}
	stop := context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.stopped = true
		r.changed.Broadcast()
	})
	defer stop()
	var workers sync.WaitGroup
	for range r.Workers {
		// Each ends when nothing is left to do, or with ctx; waited for below.
		workers.Go(func() { r.work(ctx) })
	}
	workers.Wait()
	return context.Cause(ctx)
}

// expand makes refs of an entry.
func (r *Run) expand(ctx context.Context, e Entry) {
	refs, err := r.refs(ctx, e)
	if err != nil {
		r.impossible(e, err)
		return
	}
	platforms := e.Platforms
	if len(platforms) == 0 {
		platforms = r.Platforms
	}
	for _, ref := range refs {
		for _, p := range platforms {
			on, err := p.apply(ref)
			if err != nil {
				r.impossible(e, err)
				return
			}
			r.add(&task{ref: on, where: e.Where, pin: e.Pin, alone: e.Alone, platform: p})
		}
	}
}

// impossible tells of an entry that no refs can be made of.
func (r *Run) impossible(e Entry, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.order++
	r.told(failure(Result{Image: e.Image, Where: e.Where, Size: -1}, err))
}

// refs returns what an entry stands for, without platforms.
func (r *Run) refs(ctx context.Context, e Entry) ([]acproxy.Ref, error) {
	ref, pattern, err := e.ref()
	if err != nil || pattern == "" {
		return []acproxy.Ref{ref}, err
	}
	versions, err := r.Fetcher.Versions(ctx, ref.Name())
	if err != nil {
		return nil, err
	}
	var refs []acproxy.Ref
	for _, v := range versions {
		// The pattern was found to be one.
		if ok, _ := path.Match(pattern, v); !ok {
			continue
		}
		one, err := withLabels(ref, map[string]string{acproxy.LabelVersion: v})
		if err != nil {
			return nil, fmt.Errorf("the publisher lists a version of %s that is none: %w", ref.Name(), err)
		}
		refs = append(refs, one)
	}
	if len(refs) == 0 {
		return nil, &acproxy.Error{
			Kind: acproxy.ErrNotFound, Code: "no-version-fits", Detail: fmt.Sprintf("none of the %d versions of %s that its publisher lists fits %s", len(versions), ref.Name(), pattern),
		}
	}
	return refs, nil
}

// add has an image be fetched, unless it is known of already.
func (r *Run) add(t *task) {
	if before := r.enter(t); before != nil {
		r.addDependencies(before, *before.rec)
	}
}

// enter notes an image that is to be fetched. If it was fetched already, without what it depends on, and that is wanted only now, it returns it.
func (r *Run) enter(t *task) (before *task) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before, ok := r.known[t.ref]
	switch {
	case ok && before.result == nil:
		before.pin, before.alone = before.pin || t.pin, before.alone && t.alone
		before.wants = append(before.wants, t.wants...)
		return nil
	case ok:
		// What it turned out to be may not be what this one needs.
		if err := mismatch(t.wants, *before.result); err != nil {
			r.order++
			again := *before.result
			again.Needed, again.Where, again.Took = t.needed, "", 0
			r.told(failure(again, err))
		}
		if before.alone && !t.alone && before.rec != nil {
			before.alone = false
			return before
		}
		return nil
	case r.order >= r.MaxImages:
		if !r.full {
			r.full = true
			r.order++
			r.told(failure(Result{Image: t.ref.String(), Where: t.where, Needed: t.needed, Size: -1}, &acproxy.Error{
				Kind: acproxy.ErrInvalid, Code: "too-many-images", Detail: fmt.Sprintf("there are more than %d images: what is left of them is left out (warm.max_images)", r.MaxImages),
			}))
		}
		return nil
	}
	r.order++
	r.known[t.ref] = t
	r.waiting = append(r.waiting, t)
	if r.changed != nil {
		r.changed.Signal()
	}
	return nil
}

// told tells of a result. The caller holds the mutex.
func (r *Run) told(res Result) {
	if r.Done != nil {
		r.Done(res, r.order)
	}
}

// next returns the next image to fetch, once there is one; false when there will be none.
func (r *Run) next() (*task, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.waiting) == 0 && r.busy > 0 && !r.stopped {
		r.changed.Wait()
	}
	if r.stopped || len(r.waiting) == 0 {
		r.changed.Broadcast()
		return nil, false
	}
	t := r.waiting[0]
	r.waiting = r.waiting[1:]
	r.busy++
	return t, true
}

func (r *Run) work(ctx context.Context) {
	for {
		t, ok := r.next()
		if !ok {
			return
		}
		if r.Slots != nil {
			select {
			case r.Slots <- struct{}{}:
			case <-ctx.Done():
				r.left()
				return
			}
		}
		r.do(ctx, t)
		if r.Slots != nil {
			<-r.Slots
		}
	}
}

// left gives up an image because the run was ended.
func (r *Run) left() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.busy--
}

// do fetches one image, and has those be fetched that it depends on.
func (r *Run) do(ctx context.Context, t *task) {
	began := time.Now()
	if r.Began != nil {
		r.mu.Lock()
		r.Began(t.ref, r.order)
		r.mu.Unlock()
	}
	res, rec, err := r.one(ctx, t)
	if ctx.Err() != nil {
		// That it was ended says nothing about the image.
		r.left()
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// Who needs it, too, may say so at any time until its result is there.
	for pinned, added := r.DryRun || err != nil || res.Pinned, rec == nil; ; {
		switch {
		case t.pin && !pinned:
			pinned = true
			err = r.aside(func() error { return r.Pin(ctx, rec.Digest) })
			if res.Pinned = err == nil; err != nil {
				err = fmt.Errorf("pinning it: %w", err)
			}
			continue
		case !t.alone && !added:
			added = true
			_ = r.aside(func() error { r.addDependencies(t, *rec); return nil })
			continue
		}
		break
	}
	if err != nil {
		res = failure(res, err)
	}
	res.Took = time.Since(began)
	t.rec = rec
	if err := mismatch(t.wants, res); err != nil && res.Outcome != Failed {
		res = failure(res, err)
	}
	t.result = &res
	r.busy--
	r.told(res)
	r.changed.Broadcast()
}

// aside does something without the mutex, which the caller holds.
func (r *Run) aside(do func() error) error {
	r.mu.Unlock()
	defer r.mu.Lock()
	return do()
}

// one fetches one image. rec is nil if nothing is known of what it depends on.
func (r *Run) one(ctx context.Context, t *task) (res Result, rec *cache.Record, err error) {
	res = Result{Image: t.ref.String(), Where: t.where, Needed: t.needed, Size: -1}
	if r.DryRun {
		e, err := r.Fetcher.Estimate(ctx, t.ref)
		if err != nil {
			return res, nil, err
		}
		res.Outcome, res.Size, res.Source = Would, e.Size, e.Source
		if e.Held != nil {
			res.Outcome, res.Digest, res.ImageID, res.Pinned = Held, e.Held.Digest, e.Held.ImageID, e.Held.Pinned
		}
		return res, e.Held, nil
	}
	res.Outcome, rec, err = r.fetched(ctx, t.ref)
	if err != nil {
		return res, nil, err
	}
	res.Digest, res.ImageID, res.Size, res.Pinned = rec.Digest, rec.ImageID, rec.Size, rec.Pinned
	return res, rec, nil
}

// Who waits for a place in the queue of publishers tries again, as a node would.
const (
	maxTries  = 60
	tryEvery  = time.Second
	longestIn = 30 * time.Second
)

// fetched asks for an image until all of it is here and was looked into.
func (r *Run) fetched(ctx context.Context, ref acproxy.Ref) (outcome string, rec *cache.Record, err error) {
	for try := 1; ; try++ {
		outcome, rec, err = r.ask(ctx, ref)
		if !errors.Is(err, acproxy.ErrBusy) || try == maxTries {
			return outcome, rec, err
		}
		pause := tryEvery
		var e *acproxy.Error
		if errors.As(err, &e) && e.RetryAfter > 0 {
			pause = min(e.RetryAfter, longestIn)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return "", nil, context.Cause(ctx)
		}
	}
}

func (r *Run) ask(ctx context.Context, ref acproxy.Ref) (outcome string, rec *cache.Record, err error) {
	im, err := r.Fetcher.Image(ctx, fetch.Request{Ref: ref, Fresh: true})
	if err != nil {
		return "", nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	outcome = Held
	if im.Arriving() {
		outcome = Fetched
	}
	if err := im.Inspected(ctx); err != nil {
		return "", nil, err
	}
	// The image keeps its record to itself once it is closed.
	found := *im.Record
	return outcome, &found, nil
}

// addDependencies has the images be fetched that one depends on, for the platform that it is for: a node that renders it asks for them so.
func (r *Run) addDependencies(t *task, rec cache.Record) {
	for _, d := range rec.Dependencies {
		ref, err := acproxy.NewRef(d.Name, d.Labels)
		if err == nil && t.platform != AsWritten {
			ref, err = platformOf(t, rec).apply(ref)
		}
		if err == nil && t.depth == r.MaxDepth {
			err = &acproxy.Error{
				Kind: acproxy.ErrInvalid, Code: "too-deep", Detail: fmt.Sprintf("%s is needed by images that are needed by others, more than %d deep: it is left out (warm.max_depth)", ref, r.MaxDepth),
			}
		}
		if err != nil {
			r.mu.Lock()
			r.order++
			r.told(failure(Result{Image: d.Name, Needed: t.ref.String(), Size: -1}, err))
			r.mu.Unlock()
			continue
		}
		by := t.ref.String()
		r.add(&task{ref: ref, needed: by, depth: t.depth + 1, platform: t.platform, wants: []want{{by, d.ImageID, d.Size}}})
	}
}

// platformOf returns what an image is for: what it says itself, else what it was asked for as.
func platformOf(t *task, rec cache.Record) Platform {
	os, arch, _ := strings.Cut(string(t.platform), "/")
	if said := rec.Labels[acproxy.LabelOS]; said != "" {
		os = said
	}
	if said := rec.Labels[acproxy.LabelArch]; said != "" {
		arch = said
	}
	return Platform(os + "/" + arch)
}

// mismatch returns how an image differs from what others need it to be, nil if it doesn't.
func mismatch(wants []want, res Result) error {
	if res.Outcome == Failed || res.Digest.IsZero() {
		return nil
	}
	for _, w := range wants {
		switch {
		case !w.imageID.IsZero() && !res.ImageID.IsZero() && w.imageID != res.ImageID:
			return &acproxy.Error{
				Kind: acproxy.ErrRefused, Code: "another-image-needed", Detail: fmt.Sprintf("%s needs the image %s, and this is %s", w.by, w.imageID.Short(), res.ImageID.Short()),
			}
		case w.size > 0 && res.Size >= 0 && w.size != res.Size:
			return &acproxy.Error{
				Kind: acproxy.ErrRefused, Code: "another-image-needed", Detail: fmt.Sprintf("%s needs an image of %d bytes, and this has %d", w.by, w.size, res.Size),
			}
		}
	}
	return nil
}

// failure returns a result that says what went wrong.
func failure(res Result, err error) Result {
	res.Outcome, res.Code, res.Detail = Failed, acproxy.Code(err), err.Error()
	if res.Code == "" {
		res.Code = "internal"
	}
	var e *acproxy.Error
	if errors.As(err, &e) {
		res.Trace = e.Trace
	}
	return res
}
