package warm

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
)

// A Spec is what a job is to do.
type Spec struct {
	Name      string     `json:"name,omitempty" doc:"What it is called, for people" example:"rollout"`
	Images    []Entry    `json:"images" doc:"The images that are wanted"`
	Platforms []Platform `json:"platforms,omitempty" doc:"Platforms, as os/arch in appc's words, for images whose labels don't say; none means those of the configuration (warm.platforms). \"none\" asks for nothing but what the list says" example:"[\"linux/amd64\"]"`
	DryRun    bool       `json:"dryRun,omitempty" doc:"Fetch nothing, and say what would be"`
}

// The states of a job.
const (
	Waiting   = "waiting"   // it hasn't begun
	Running   = "running"   //
	Done      = "done"      // all of its images were tried
	Cancelled = "cancelled" // somebody has ended it
)

// A Job is a list of images on its way.
type Job struct {
	ID      string    `json:"id"`
	Name    string    `json:"name,omitempty"`
	By      string    `json:"by,omitempty"` // who wants it: a client, or a schedule
	State   string    `json:"state" enum:"waiting,running,done,cancelled"`
	DryRun  bool      `json:"dryRun,omitempty"`
	Created time.Time `json:"created"`
	Ended   time.Time `json:"ended"`             // zero while it hasn't
	Resumed int       `json:"resumed,omitempty"` // how often it was begun again after a restart

	Total   int    `json:"total"` // images known of so far, with those that others depend on
	Held    int    `json:"held"`
	Fetched int    `json:"fetched"`
	Would   int    `json:"would"`
	Failed  int    `json:"failed"`
	Bytes   int64  `json:"bytes"`           // of those that were, or would be, fetched
	Error   string `json:"error,omitempty"` // why nothing could be tried
}

// Finished reports whether nothing more happens to a job.
func (j Job) Finished() bool { return j.State == Done || j.State == Cancelled }

// Good reports whether all images are there.
func (j Job) Good() bool { return j.State == Done && j.Failed == 0 && j.Error == "" }

func (j *Job) count(r Result) {
	switch r.Outcome {
	case Held:
		j.Held++
	case Fetched:
		j.Fetched++
		j.Bytes += max(r.Size, 0)
	case Would:
		j.Would++
		j.Bytes += max(r.Size, 0)
	case Failed:
		j.Failed++
	}
}

// A Listed is a list that is fetched by a schedule.
type Listed struct {
	File     string
	Groups   []string // none means all
	Schedule string   // in cron's syntax; "" leaves it to the schedules that the list gives its groups
	Jitter   time.Duration
}

// Options is what Jobs work with. Fetcher, Pin and Dir have to be set.
type Options struct {
	Fetcher   Fetcher
	Pin       func(ctx context.Context, digest acproxy.Digest) error
	Dir       string        // where jobs are kept
	Platforms []Platform    // for jobs that don't say
	Workers   int           // images that are asked for at once by all jobs together; 0 means DefaultConcurrency
	MaxDepth  int           // 0 means DefaultMaxDepth
	MaxImages int           // 0 means DefaultMaxImages
	Keep      int           // finished jobs that are kept; 0 means DefaultKeep
	Lists     []Listed      // what is fetched by a schedule
	Ended     func(Job)     // is told of every job that has ended; nil means that nobody is
	Result    func(Result)  // is told of every result; nil means that nobody is
	FS        durable.FS    // nil means the operating system's
	Log       *slog.Logger  // nil means slog.Default
	SaveEvery time.Duration // how often a running job's results are written down; 0 means DefaultSaveEvery
}

// Defaults of [Options].
const (
	DefaultKeep      = 100
	DefaultSaveEvery = 10 * time.Second
)

// Jobs are lists of images on their way. They are safe for concurrent use.
type Jobs struct {
	o     Options
	slots chan struct{}

	mu      sync.Mutex
	jobs    map[string]*job
	ctx     context.Context // that of Run; nil while it doesn't run
	running sync.WaitGroup
	closed  bool
}

// job is a Job with what only we need to know.
type job struct {
	mu      sync.Mutex
	job     Job
	spec    Spec
	results []Result
	active  map[string]bool // refs that are asked for at this moment
	changed chan struct{}   // closed when something of this has changed
	cancel  context.CancelCauseFunc
	before  map[string]Result // what had come of it before a restart, by image
}

// kept is a job as it is in its file.
type kept struct {
	Job     Job      `json:"job"`
	Spec    Spec     `json:"spec"`
	Results []Result `json:"results"`
}

// Open returns the jobs that are kept in a directory. Those that weren't finished go on with Run. Files that can't be read are left alone, and told of in the log.
func Open(o Options) (*Jobs, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	o.Workers, o.Keep, o.SaveEvery = cmp.Or(o.Workers, DefaultConcurrency), cmp.Or(o.Keep, DefaultKeep), cmp.Or(o.SaveEvery, DefaultSaveEvery)
	o.MaxImages = cmp.Or(o.MaxImages, DefaultMaxImages)
	j := &Jobs{o: o, slots: make(chan struct{}, o.Workers), jobs: make(map[string]*job)}
	entries, err := os.ReadDir(o.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the jobs: %w", err)
	}
	for _, entry := range entries {
		path := filepath.Join(o.Dir, entry.Name())
		id, ok := strings.CutSuffix(entry.Name(), ".json")
		if !ok {
			if strings.HasPrefix(entry.Name(), durable.TempPrefix) {
				// What a killed server was writing. What can't be removed is there for the next one to try.
				_ = os.Remove(path)
			}
			continue
		}
		var k kept
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &k)
		}
		if err != nil || k.Job.ID != id {
			o.Log.Error("a job is not taken up again: its file can't be read", "file", path, "err", err)
			continue
		}
		one := &job{job: k.Job, spec: k.Spec, results: k.Results, active: make(map[string]bool), changed: make(chan struct{})}
		if !k.Job.Finished() {
			one.before = make(map[string]Result)
			for _, r := range k.Results {
				one.before[r.Image] = r
			}
			one.job = Job{ID: k.Job.ID, Name: k.Job.Name, By: k.Job.By, State: Waiting, DryRun: k.Job.DryRun, Created: k.Job.Created, Resumed: k.Job.Resumed}
			if k.Job.State == Running {
				one.job.Resumed++
			}
			one.results = nil
		}
		j.jobs[id] = one
	}
	return j, nil
}

// Run works on the jobs until ctx is done, and returns once all work has ended. What isn't finished then goes on after the next start.
func (j *Jobs) Run(ctx context.Context) {
	j.mu.Lock()
	j.ctx = ctx
	var waiting []*job
	for _, one := range j.jobs {
		if !one.job.Finished() {
			waiting = append(waiting, one)
		}
	}
	slices.SortFunc(waiting, func(a, b *job) int { return a.job.Created.Compare(b.job.Created) })
	for _, one := range waiting {
		j.start(one)
	}
	j.mu.Unlock()
	for _, l := range j.o.Lists {
		// Ends with ctx; waited for below.
		j.running.Go(func() { j.onSchedule(ctx, l) })
	}
	<-ctx.Done()
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.running.Wait()
}

var (
	errCancelled = errors.New("the job was cancelled")
	errClosed    = &acproxy.Error{Kind: acproxy.ErrBusy, Code: "shutting-down", Detail: "this proxy is shutting down"}
)

// Submit begins a job. Errors match [acproxy.ErrInvalid] for what is wrong with the spec.
func (j *Jobs) Submit(spec Spec, by string) (Job, error) {
	if err := j.check(spec); err != nil {
		return Job{}, err
	}
	one := newJob(spec, by)
	if err := j.save(one); err != nil {
		return Job{}, err
	}
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return Job{}, errors.Join(errClosed, j.remove(one.job.ID))
	}
	j.jobs[one.job.ID] = one
	if j.ctx != nil {
		j.start(one)
	}
	j.mu.Unlock()
	j.tidy()
	return one.state(), nil
}

func newJob(spec Spec, by string) *job {
	return &job{
		job:  Job{ID: strings.ToLower(rand.Text()[:12]), Name: spec.Name, By: by, State: Waiting, DryRun: spec.DryRun, Created: time.Now().UTC()},
		spec: spec, active: make(map[string]bool), changed: make(chan struct{}),
	}
}

// check returns what is wrong with a spec.
func (j *Jobs) check(spec Spec) error {
	switch {
	case len(spec.Images) == 0:
		return acproxy.Invalid("the list names no image")
	case len(spec.Images) > j.o.MaxImages:
		return acproxy.Invalid("the list names %d images, the limit is %d (warm.max_images)", len(spec.Images), j.o.MaxImages)
	}
	var wrong []error
	for _, e := range spec.Images {
		if err := e.check(); err != nil {
			wrong = append(wrong, at(e.Where, err))
		}
	}
	for _, p := range spec.Platforms {
		_, err := ParsePlatform(string(p))
		wrong = append(wrong, err)
	}
	return errors.Join(wrong...)
}

// start has a job be worked on. The caller holds the mutex, and Run has begun.
func (j *Jobs) start(one *job) {
	ctx, cancel := context.WithCancelCause(j.ctx)
	one.mu.Lock()
	one.cancel = cancel
	one.mu.Unlock()
	// Ends when the job does, or with Run's ctx; Run waits for it.
	j.running.Go(func() {
		defer cancel(nil)
		j.work(ctx, one)
	})
}

func (j *Jobs) work(ctx context.Context, one *job) {
	one.set(func(job *Job) { job.State = Running })
	j.note(one)
	saved := time.Now()
	run := Run{
		Fetcher: j.o.Fetcher, Pin: j.o.Pin, Platforms: one.spec.Platforms, DryRun: one.spec.DryRun, Workers: j.o.Workers, Slots: j.slots, MaxDepth: j.o.MaxDepth, MaxImages: j.o.MaxImages,
		Began: func(ref acproxy.Ref, total int) {
			one.mu.Lock()
			defer one.mu.Unlock()
			one.active[ref.String()] = true
			one.job.Total = total
			one.tell()
		},
		Done: func(r Result, total int) {
			one.done(r, total)
			if j.o.Result != nil {
				j.o.Result(r)
			}
			if time.Since(saved) >= j.o.SaveEvery {
				saved = time.Now()
				j.note(one)
			}
		},
	}
	if len(run.Platforms) == 0 {
		run.Platforms = j.o.Platforms
	}
	err := run.All(ctx, one.spec.Images)
	switch {
	case errors.Is(err, errCancelled):
		one.end(Cancelled)
	case err != nil:
		// This server ends. The next one goes on.
		j.note(one)
		return
	default:
		one.end(Done)
	}
	j.note(one)
	j.ended(one.state())
}

func (j *Jobs) ended(job Job) {
	j.o.Log.Info("a list of images was fetched", "job", job.ID, "name", job.Name, "by", job.By, "state", job.State, "held", job.Held, "fetched", job.Fetched, "failed", job.Failed, "err", job.Error)
	if j.o.Ended != nil {
		j.o.Ended(job)
	}
}

// note writes a job down. If that fails there is only less to know of it after a restart.
func (j *Jobs) note(one *job) {
	if err := j.save(one); err != nil {
		j.o.Log.Error("writing a job down", "job", one.state().ID, "err", err)
	}
}

func (j *Jobs) file(id string) string { return filepath.Join(j.o.Dir, id+".json") }

func (j *Jobs) save(one *job) error {
	one.mu.Lock()
	text, err := json.Marshal(kept{one.job, one.spec, one.results})
	id := one.job.ID
	one.mu.Unlock()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(j.o.Dir, 0o750); err != nil {
		return err
	}
	return durable.WriteFile(j.o.FS, j.file(id), text, 0o640)
}

func (j *Jobs) remove(id string) error {
	if err := os.Remove(j.file(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tidy forgets finished jobs beyond those that are kept, the oldest first.
func (j *Jobs) tidy() {
	j.mu.Lock()
	defer j.mu.Unlock()
	var finished []Job
	for _, one := range j.jobs {
		if s := one.state(); s.Finished() {
			finished = append(finished, s)
		}
	}
	slices.SortFunc(finished, func(a, b Job) int { return a.Ended.Compare(b.Ended) })
	for _, old := range finished[:max(0, len(finished)-j.o.Keep)] {
		if err := j.remove(old.ID); err != nil {
			j.o.Log.Error("removing an old job", "job", old.ID, "err", err)
		}
		delete(j.jobs, old.ID)
	}
}

// All returns the jobs, the latest first.
func (j *Jobs) All() []Job {
	j.mu.Lock()
	defer j.mu.Unlock()
	all := make([]Job, 0, len(j.jobs))
	for _, one := range j.jobs {
		all = append(all, one.state())
	}
	slices.SortFunc(all, func(a, b Job) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return all
}

// A Progress is how far a job has come.
type Progress struct {
	Job     Job      `json:"job"`
	Results []Result `json:"results"` // from the place on that was asked for, in the order in which they came
	Next    int      `json:"next"`    // the place of the next one
	Active  []string `json:"active"`  // refs that are asked for at this moment
}

// Progress returns how far a job has come: results from a place on, the first being 0, at most limit. With wait it returns as soon as there is something new
// since, at the latest when the time is over; the error of ctx is returned with what there is.
func (j *Jobs) Progress(ctx context.Context, id string, after, limit int, wait time.Duration) (Progress, error) {
	one, err := j.find(id)
	if err != nil {
		return Progress{}, err
	}
	timeout := time.After(wait)
	for {
		p, changed := one.progress(after, limit)
		if wait <= 0 || p.Job.Finished() || len(p.Results) > 0 {
			return p, nil
		}
		select {
		case <-changed:
		case <-timeout:
			wait = 0
		case <-ctx.Done():
			return p, ctx.Err()
		}
	}
}

func (j *Jobs) find(id string) (*job, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	one, ok := j.jobs[id]
	if !ok {
		return nil, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-job", Detail: fmt.Sprintf("there is no job %.64q", id)}
	}
	return one, nil
}

// Names returns the names of the images that a job's list names.
func (j *Jobs) Names(id string) ([]string, error) {
	one, err := j.find(id)
	if err != nil {
		return nil, err
	}
	return one.spec.Names(), nil
}

// Names returns the names of the images of a list.
func (s Spec) Names() []string {
	var names []string
	for _, e := range s.Images {
		if ref, _, err := e.ref(); err == nil && !slices.Contains(names, ref.Name()) {
			names = append(names, ref.Name())
		}
	}
	return names
}

// Cancel ends a job. What its images' flights have in progress goes on: somebody else may want it. One that has ended stays as it is.
func (j *Jobs) Cancel(id string) (Job, error) {
	one, err := j.find(id)
	if err != nil {
		return Job{}, err
	}
	one.mu.Lock()
	cancel := one.cancel
	one.mu.Unlock()
	if cancel != nil {
		cancel(errCancelled)
	}
	for {
		p, changed := one.progress(0, 0)
		if p.Job.Finished() || cancel == nil {
			return p.Job, nil
		}
		<-changed
	}
}

// onSchedule fetches a list whenever it is due, until ctx is done. The list is read each time.
func (j *Jobs) onSchedule(ctx context.Context, l Listed) {
	last := make(map[string]string) // the job before, by group
	for from := time.Now(); ; {
		due, at := j.due(l, from)
		// A list that can't be read, or says nothing, may say something later.
		look := from.Add(rereadEvery)
		if at.IsZero() || at.After(look) {
			due, at = nil, look
		}
		from = at
		if due != nil && l.Jitter > 0 {
			at = at.Add(mathrand.N(l.Jitter))
		}
		select {
		case <-time.After(time.Until(at)):
		case <-ctx.Done():
			return
		}
		for _, group := range due {
			j.scheduled(l, group, last)
		}
	}
}

// rereadEvery is how often it is looked whether a list's schedules have changed.
const rereadEvery = time.Minute

// due returns which groups of a list are to be fetched next, and when: "" stands for those that the list is for as a whole.
func (j *Jobs) due(l Listed, from time.Time) (groups []string, at time.Time) {
	consider := func(group, when string) {
		schedule, err := ParseSchedule(when)
		if err != nil {
			return
		}
		switch next := schedule.Next(from); {
		case next.IsZero():
		case at.IsZero() || next.Before(at):
			groups, at = []string{group}, next
		case next.Equal(at):
			groups = append(groups, group)
		}
	}
	if l.Schedule != "" {
		consider("", l.Schedule)
		return groups, at
	}
	list, err := ReadFile(l.File)
	if err != nil {
		j.o.Log.Warn("a list of images is not fetched: it can't be read", "file", l.File, "err", err)
		return nil, at
	}
	for _, g := range list.Groups {
		if g.Schedule != "" && (len(l.Groups) == 0 || slices.Contains(l.Groups, g.Name)) {
			consider(g.Name, g.Schedule)
		}
	}
	return groups, at
}

// ReadFile reads the list in a file.
func ReadFile(file string) (List, error) {
	f, err := os.Open(file)
	if err != nil {
		return List{}, err
	}
	defer f.Close()
	return ReadList(f, file)
}

// scheduled begins a job for a group of a list, unless the one before still goes on.
func (j *Jobs) scheduled(l Listed, group string, last map[string]string) {
	name, groups := filepath.Base(l.File), l.Groups
	if group != "" {
		name, groups = name+" "+group, []string{group}
	}
	if before, err := j.find(last[group]); err == nil && !before.state().Finished() {
		j.o.Log.Warn("a list of images is due, and not fetched: the last time hasn't ended", "file", l.File, "group", group, "job", last[group])
		return
	}
	list, err := ReadFile(l.File)
	var images []Entry
	if err == nil {
		images, err = list.Images(groups...)
	}
	var begun Job
	if err == nil {
		begun, err = j.Submit(Spec{Name: name, Images: images}, "schedule")
	}
	if err != nil {
		// It is there to be seen among the jobs.
		one := newJob(Spec{Name: name}, "schedule")
		one.job.State, one.job.Ended, one.job.Error = Done, time.Now().UTC(), err.Error()
		j.note(one)
		j.mu.Lock()
		j.jobs[one.job.ID] = one
		j.mu.Unlock()
		j.ended(one.state())
		return
	}
	last[group] = begun.ID
}

// tell says that something has changed. The caller holds the mutex.
func (o *job) tell() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *job) set(change func(*Job)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change(&o.job)
	o.tell()
}

func (o *job) state() Job {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.job
}

func (o *job) end(state string) {
	o.set(func(job *Job) { job.State, job.Ended = state, time.Now().UTC() })
}

// done adds a result.
func (o *job) done(r Result, total int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if before, ok := o.before[r.Image]; ok && before.Outcome == Fetched && r.Outcome == Held && before.Digest == r.Digest {
		// This job has fetched it, before the restart.
		r.Outcome, r.Took = Fetched, before.Took
	}
	delete(o.active, r.Image)
	o.results = append(o.results, r)
	o.job.Total = total
	o.job.count(r)
	o.tell()
}

// progress returns results from a place on, and what is closed when there is more.
func (o *job) progress(after, limit int) (Progress, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := Progress{Job: o.job, Next: max(after, 0), Active: []string{}, Results: []Result{}}
	for ref := range o.active {
		p.Active = append(p.Active, ref)
	}
	slices.Sort(p.Active)
	if after < len(o.results) {
		p.Results = slices.Clone(o.results[max(after, 0):min(len(o.results), max(after, 0)+limit)])
		p.Next += len(p.Results)
	}
	return p, o.changed
}
