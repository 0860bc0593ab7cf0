package warm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for how long a test waits for what has to happen.
const patience = time.Minute

var goodKey = sync.OnceValue(func() *trusttest.Key {
	key, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		panic(err)
	}
	return key
})

// A scene is a fetcher between a real store and a real publisher.
type scene struct {
	t     *testing.T
	pub   *publisher.Publisher
	store *cache.Disk
	f     *fetch.Fetcher
	jobs  string // directory
}

func newScene(t *testing.T) *scene {
	t.Helper()
	pub, err := publisher.Start(publisher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pub.Close() })
	s := &scene{t: t, pub: pub, jobs: filepath.Join(t.TempDir(), "jobs")}
	dirs := trust.Dirs{Local: t.TempDir()}
	if _, err := trust.Add(dirs, "example.com", goodKey().Armored()); err != nil {
		t.Fatal(err)
	}
	keyring, err := trust.Load(dirs)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if s.store, err = cache.Open(t.TempDir(), cache.Options{Log: log}); err != nil {
		t.Fatal(err)
	}
	client := web.New(web.Config{
		Rules: []web.Rule{{RootCAs: pub.CAPool()}}, Hosts: map[string]string{"example.com": pub.Addr(), "storage.example.com": pub.Addr()},
		Environment: func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	finder := discovery.New(discovery.Config{Web: client})
	s.f = fetch.New(fetch.Config{
		Store: s.store, Discovery: finder, Web: client, Keyring: func() *trust.Keyring { return keyring }, Log: log, RetryWait: time.Millisecond,
		Policies: []fetch.Policy{{TTL: time.Hour, Listing: "https://example.com/versions/{name}"}},
	})
	t.Cleanup(func() {
		if err := errors.Join(s.f.Close(), finder.Close(), s.store.Close()); err != nil {
			t.Error(err)
		}
		client.Close()
	})
	return s
}

// publish has the publisher publish an image, and returns how another one names it that needs it.
func (s *scene) publish(name, version string, labels map[string]string, needs ...acitest.Dependency) acitest.Dependency {
	s.t.Helper()
	all := map[string]string{"version": version, "os": "linux", "arch": "amd64"}
	for label, value := range labels {
		all[label] = value
	}
	blob, err := acitest.Build(acitest.Spec{Name: name, Labels: all, Dependencies: needs, Files: map[string]string{"version": version}})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.pub.AddSigned(publisher.Image{Name: name, Labels: all, ACI: blob}, goodKey()); err != nil {
		s.t.Fatal(err)
	}
	found, err := aci.Inspect(bytes.NewReader(blob), aci.Limits{}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return acitest.Dependency{Name: name, Labels: map[string]string{"version": version}, ImageID: found.ID, Size: int64(len(blob))}
}

func (s *scene) pin(ctx context.Context, digest acproxy.Digest) error {
	return s.store.Update(ctx, digest, func(rec *cache.Record) error {
		rec.Pinned = true
		return nil
	})
}

// run fetches a list and returns what became of its images, in words.
func (s *scene) run(r *Run, entries ...Entry) []string {
	s.t.Helper()
	var said []string
	totals := 0
	r.Fetcher, r.Pin = s.f, s.pin
	r.Done = func(res Result, total int) {
		text := res.Outcome + " " + res.Image
		if res.Code != "" {
			text += " " + res.Code
		}
		if res.Needed != "" {
			text += " for " + res.Needed
		}
		if res.Pinned {
			text += " pinned"
		}
		if (res.Outcome == Fetched || res.Outcome == Would) && res.Size <= 0 {
			s.t.Errorf("%s has size %d", text, res.Size)
		}
		said, totals = append(said, text), total
	}
	if err := r.All(s.t.Context(), entries); err != nil {
		s.t.Error(err)
	}
	if totals != len(said) {
		s.t.Errorf("there were %d images, and %d results", totals, len(said))
	}
	slices.Sort(said)
	return said
}

func wantLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

const amd64 = ",arch=amd64,os=linux"

func TestDependencies(t *testing.T) {
	s := newScene(t)
	base := s.publish("example.com/base", "1", nil, acitest.Dependency{Name: "example.com/app", Labels: map[string]string{"version": "1"}}) // a circle
	s.publish("example.com/base", "2", nil)
	s.publish("example.com/arm", "1", map[string]string{"arch": "aarch64"}, acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "1"}})
	s.publish("example.com/base", "1", map[string]string{"arch": "aarch64"})
	s.publish("example.com/app", "1", nil,
		base,
		acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "2"}, ImageID: base.ImageID},
		acitest.Dependency{Name: "example.com/absent"})
	s.publish("example.com/other", "1", nil, acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "1"}, Size: base.Size + 1})

	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app:1", Alone: true}), "fetched example.com/app:1"+amd64)
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app:1", Pin: true}),
		"held example.com/app:1"+amd64+" pinned",
		"fetched example.com/base:1"+amd64+" for example.com/app:1"+amd64,
		"failed example.com/base:2"+amd64+" another-image-needed for example.com/app:1"+amd64,
		"failed example.com/absent"+amd64+" not-discovered for example.com/app:1"+amd64)
	// One that two need, and one of them needs to be another; found out whichever comes first.
	for range 2 {
		got := strings.Join(s.run(&Run{}, Entry{Image: "example.com/other:1"}, Entry{Image: "example.com/base:1"}), "\n")
		if !strings.Contains(got, "failed example.com/base:1"+amd64+" another-image-needed") {
			t.Errorf("got\n%s", got)
		}
	}
	// For the platform of what needs it.
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/arm:1", Platforms: []Platform{"linux/aarch64"}}),
		"fetched example.com/arm:1,arch=aarch64,os=linux", "fetched example.com/base:1,arch=aarch64,os=linux for example.com/arm:1,arch=aarch64,os=linux")
}

// TestNeededAfterAll has a list want an image without what it depends on, and another image need it: that is fetched after all, whichever is done first.
func TestNeededAfterAll(t *testing.T) {
	for workers := range 3 {
		s := newScene(t)
		s.publish("example.com/leaf", "1", nil)
		s.publish("example.com/base", "1", nil, acitest.Dependency{Name: "example.com/leaf", Labels: map[string]string{"version": "1"}})
		s.publish("example.com/app", "1", nil, acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "1"}})
		wantLines(t, s.run(&Run{Workers: workers + 1}, Entry{Image: "example.com/base:1", Alone: true, Pin: true}, Entry{Image: "example.com/app:1"}),
			"fetched example.com/base:1"+amd64+" pinned", "fetched example.com/app:1"+amd64, "fetched example.com/leaf:1"+amd64+" for example.com/base:1"+amd64)
	}
}

func TestDepthAndNumberAreBounded(t *testing.T) {
	s := newScene(t)
	for i := range 5 {
		var needs []acitest.Dependency
		if i < 4 {
			needs = append(needs, acitest.Dependency{Name: fmt.Sprintf("example.com/a%d", i+1), Labels: map[string]string{"version": "1"}})
		}
		s.publish(fmt.Sprintf("example.com/a%d", i), "1", nil, needs...)
	}
	got := s.run(&Run{MaxDepth: 2}, Entry{Image: "example.com/a0:1"})
	wantLines(t, got, "fetched example.com/a0:1"+amd64, "fetched example.com/a1:1"+amd64+" for example.com/a0:1"+amd64, "fetched example.com/a2:1"+amd64+" for example.com/a1:1"+amd64,
		"failed example.com/a3 too-deep for example.com/a2:1"+amd64)
	got = s.run(&Run{MaxImages: 4, Workers: 1}, Entry{Image: "example.com/a0:1"})
	wantLines(t, got, "held example.com/a0:1"+amd64, "held example.com/a1:1"+amd64+" for example.com/a0:1"+amd64, "held example.com/a2:1"+amd64+" for example.com/a1:1"+amd64,
		"fetched example.com/a3:1"+amd64+" for example.com/a2:1"+amd64, "failed example.com/a4:1"+amd64+" too-many-images for example.com/a3:1"+amd64)
	got = s.run(&Run{MaxImages: 5, Workers: 1}, Entry{Image: "example.com/a0:1"})
	if len(got) != 5 || strings.Contains(strings.Join(got, "\n"), "failed") {
		t.Errorf("at the limit: %q", got)
	}
}

func TestPatterns(t *testing.T) {
	s := newScene(t)
	for _, v := range []string{"1.0", "1.1", "2.0"} {
		s.publish("example.com/app", v, nil)
	}
	for _, tt := range []struct{ what, contentType, body string }{
		{"tags of a repository", "application/json", `{"name":"app","tags":["1.0","1.1","2.0","1.1"]}`},
		{"an array", "application/json", ` ["1.0","1.1","2.0"]`},
		{"text", "text/plain; charset=utf-8", "# versions\n1.0\n\n1.1 \r\n2.0\n"},
	} {
		s.pub.Serve("example.com/versions/example.com/app", tt.contentType, []byte(tt.body))
		t.Run(tt.what, func(t *testing.T) {
			wantLines(t, s.run(&Run{DryRun: true}, Entry{Image: "example.com/app:1.*"}), "would example.com/app:1.0"+amd64, "would example.com/app:1.1"+amd64)
		})
	}
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app:[2-9].*"}), "fetched example.com/app:2.0"+amd64)
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app:7.*"}), "failed example.com/app:7.* no-version-fits")
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/none:7.*"}), "failed example.com/none:7.* publisher-status")
	for _, page := range []string{"<!DOCTYPE html>", `{"tags":1}`, `[1]`} {
		s.pub.Serve("example.com/versions/example.com/app", "text/html", []byte(page))
		wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app:1.*"}), "failed example.com/app:1.* listing-unreadable")
	}
}

func TestDryRunFetchesNothing(t *testing.T) {
	s := newScene(t)
	s.publish("example.com/app", "1", nil, acitest.Dependency{Name: "example.com/base", Labels: map[string]string{"version": "1"}})
	s.publish("example.com/base", "1", nil)
	other, err := trusttest.NewKey(trusttest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{"version": "1", "os": "linux", "arch": "amd64"}
	blob, err := acitest.Build(acitest.Spec{Name: "example.com/evil", Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.pub.AddSigned(publisher.Image{Name: "example.com/evil", Labels: labels, ACI: blob}, other); err != nil {
		t.Fatal(err)
	}
	wantLines(t, s.run(&Run{DryRun: true}, Entry{Image: "example.com/app:1", Pin: true}, Entry{Image: "example.com/evil:1"}, Entry{Image: "example.com/app:2"}),
		"would example.com/app:1"+amd64, "failed example.com/evil:1"+amd64+" unknown-key", "failed example.com/app:2"+amd64+" no-image-found")
	for _, r := range s.pub.Requests() {
		if strings.HasSuffix(r.Path, ".aci") && r.Method != "HEAD" {
			t.Errorf("%s %s%s", r.Method, r.Host, r.Path)
		}
	}
	s.run(&Run{}, Entry{Image: "example.com/app:1", Alone: true})
	// What is held says what it needs.
	wantLines(t, s.run(&Run{DryRun: true}, Entry{Image: "example.com/app:1"}), "held example.com/app:1"+amd64, "would example.com/base:1"+amd64+" for example.com/app:1"+amd64)
}

// A ref without a version is asked for again, however fresh what is held is.
func TestLatestIsAskedForAgain(t *testing.T) {
	s := newScene(t)
	s.publish("example.com/app", "1", nil)
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app"}), "fetched example.com/app"+amd64)
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app"}), "held example.com/app"+amd64)
	s.publish("example.com/app", "2", nil)
	s.pub.SetLatest("example.com/app", "2")
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app"}), "fetched example.com/app"+amd64)
	s.pub.Stop()
	wantLines(t, s.run(&Run{}, Entry{Image: "example.com/app"}), "held example.com/app"+amd64)
}

// open opens the scene's jobs and runs them until the returned function is called.
func (s *scene) open(change func(*Options)) (*Jobs, func()) {
	s.t.Helper()
	o := Options{Fetcher: s.f, Pin: s.pin, Dir: s.jobs, Log: slog.New(slog.DiscardHandler), SaveEvery: time.Nanosecond}
	if change != nil {
		change(&o)
	}
	j, err := Open(o)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	// Ends with cancel; stop waits for it.
	go func() {
		defer close(ended)
		j.Run(ctx)
	}()
	stop := sync.OnceFunc(func() {
		cancel()
		<-ended
	})
	s.t.Cleanup(stop)
	return j, stop
}

// end waits until a job has ended, and returns it with all its results.
func (s *scene) end(j *Jobs, id string) Progress {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	var all []Result
	for {
		p, err := j.Progress(ctx, id, len(all), 2, time.Second)
		if err != nil {
			s.t.Fatalf("%v, and it is %+v", err, p)
		}
		all = append(all, p.Results...)
		if p.Next != len(all) {
			s.t.Fatalf("the next result is number %d after %d", p.Next, len(all))
		}
		if p.Job.Finished() && len(p.Results) < 2 {
			p.Results = all
			return p
		}
	}
}

func TestJobGoesOnAfterARestart(t *testing.T) {
	s := newScene(t)
	s.publish("example.com/one", "1", nil)
	s.publish("example.com/two", "1", nil)
	stall := s.pub.Misbehave(publisher.URL("*two*.aci"), publisher.Fault{StallAfter: publisher.At(10)})
	j, stop := s.open(func(o *Options) { o.Workers = 1 })
	job, err := j.Submit(Spec{Name: "both", Images: []Entry{{Image: "example.com/one:1"}, {Image: "example.com/two:1"}}}, "me")
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-stall.Stalled():
	case <-time.After(patience):
		t.Fatal("the second image isn't asked for")
	}
	p, err := j.Progress(t.Context(), job.ID, 0, 10, 0)
	if err != nil || p.Job.State != Running || p.Job.Fetched != 1 || !slices.Equal(p.Active, []string{"example.com/two:1" + amd64}) {
		t.Errorf("in between it is %+v, %v", p, err)
	}
	stop()
	if _, err := j.Submit(Spec{Images: []Entry{{Image: "example.com/one:1"}}}, ""); !errors.Is(err, acproxy.ErrBusy) {
		t.Errorf("Submit after the end = %v", err)
	}
	stall.End()
	var ended []Job
	j, stop = s.open(func(o *Options) { o.Ended = func(job Job) { ended = append(ended, job) } })
	got := s.end(j, job.ID)
	// The second image goes on arriving without the job, and may be held by the time it is asked for again.
	if got.Job.State != Done || got.Job.Fetched+got.Job.Held != 2 || got.Job.Fetched < 1 || got.Job.Failed != 0 || got.Job.Resumed != 1 || got.Job.By != "me" || got.Job.Name != "both" || !got.Job.Good() {
		t.Errorf("after the restart it is %+v", got.Job)
	}
	stop()
	if len(ended) != 1 || ended[0].ID != job.ID {
		t.Errorf("%+v ended", ended)
	}
	// What has ended isn't done again.
	s.pub.ClearRequests()
	j, stop = s.open(nil)
	if all := j.All(); len(all) != 1 || all[0] != got.Job {
		t.Errorf("after another restart there is %+v, want %+v", all, got.Job)
	}
	stop()
	if n := len(s.pub.Requests()); n > 0 {
		t.Errorf("%d requests for a job that had ended", n)
	}
}

func TestCancel(t *testing.T) {
	s := newScene(t)
	s.publish("example.com/one", "1", nil)
	stall := s.pub.Misbehave(publisher.URL("*one*.aci"), publisher.Fault{StallAfter: publisher.At(10)})
	defer stall.End()
	j, _ := s.open(nil)
	job, err := j.Submit(Spec{Images: []Entry{{Image: "example.com/one:1"}, {Image: "example.com/none:1"}}}, "")
	if err != nil {
		t.Fatal(err)
	}
	<-stall.Stalled()
	got, err := j.Cancel(job.ID)
	if err != nil || got.State != Cancelled || got.Good() || got.Ended.IsZero() {
		t.Errorf("Cancel = %+v, %v", got, err)
	}
	if again, err := j.Cancel(job.ID); err != nil || again != got {
		t.Errorf("Cancel again = %+v, %v, want %+v", again, err, got)
	}
	if _, err := j.Cancel("nonsense"); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("Cancel of nothing = %v", err)
	}
}

func TestSubmitRefuses(t *testing.T) {
	s := newScene(t)
	j, _ := s.open(func(o *Options) { o.MaxImages = 2 })
	for _, tt := range []struct {
		spec Spec
		want string
	}{
		{Spec{}, "names no image"},
		{Spec{Images: make([]Entry, 3)}, "names 3 images, the limit is 2"},
		{Spec{Images: []Entry{{Image: "Example", Where: "list:1"}}}, "list:1: "},
		{Spec{Images: []Entry{{Image: "example.com/app:["}}}, "is no pattern"},
		{Spec{Images: []Entry{{Image: "example.com/app", Platforms: []Platform{"amd64"}}}}, "is no platform"},
		{Spec{Images: []Entry{{Image: "example.com/app"}}, Platforms: []Platform{"a/b/c"}}, "is no platform"},
	} {
		if _, err := j.Submit(tt.spec, ""); !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.spec, err, tt.want)
		}
	}
	if len(j.All()) != 0 {
		t.Errorf("there are %+v", j.All())
	}
}

func TestOldJobsAreForgotten(t *testing.T) {
	s := newScene(t)
	j, stop := s.open(func(o *Options) { o.Keep = 2 })
	var ids []string
	for range 4 {
		job, err := j.Submit(Spec{Images: []Entry{{Image: "example.com/none:1"}}}, "")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, job.ID)
		if p := s.end(j, job.ID); p.Job.Failed != 1 {
			t.Errorf("%+v", p.Job)
		}
	}
	stop()
	// What stands in the directory is what there is; nonsense in it does no harm.
	for name, text := range map[string]string{"nonsense.json": "{", "other.json": `{"job":{"id":"another"}}`, ".tmp-left": "", "README": ""} {
		if err := os.WriteFile(filepath.Join(s.jobs, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	j, _ = s.open(nil)
	var left []string
	for _, job := range j.All() {
		left = append(left, job.ID)
	}
	// The last one had not ended when there was one too many.
	if want := []string{ids[3], ids[2], ids[1]}; !slices.Equal(left, want) {
		t.Errorf("left are %q of %q", left, ids)
	}
	if _, err := os.Stat(filepath.Join(s.jobs, ".tmp-left")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a killed server left: %v", err)
	}
}

func TestSchedules(t *testing.T) {
	s := newScene(t)
	s.publish("example.com/one", "1", nil)
	list := filepath.Join(t.TempDir(), "list.yaml")
	if err := os.WriteFile(list, []byte("groups:\n  - {name: often, schedule: '@every 1s', images: ['example.com/one:1']}\n  - {name: never, images: ['example.com/two:1']}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, stop := s.open(func(o *Options) {
		o.Lists = []Listed{{File: list, Jitter: time.Millisecond}, {File: list + ".missing", Schedule: "@every 1s"}}
	})
	named := func(name string) (jobs []Job) {
		for _, job := range j.All() {
			if job.Name == name && job.Finished() {
				jobs = append(jobs, job)
			}
		}
		return jobs
	}
	for end := time.Now().Add(patience); len(named("list.yaml often")) < 2 || len(named("list.yaml.missing")) < 1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("there are %+v", j.All())
		}
	}
	stop()
	jobs := named("list.yaml often")
	if first := jobs[len(jobs)-1]; first.Fetched != 1 || first.By != "schedule" || !first.Good() {
		t.Errorf("the first time: %+v", first)
	}
	if job := named("list.yaml.missing")[0]; job.Good() || !strings.Contains(job.Error, "no such file") {
		t.Errorf("a list that isn't there: %+v", job)
	}
	for _, job := range j.All() {
		if job.Name != "list.yaml often" && job.Name != "list.yaml.missing" {
			t.Errorf("there is %+v", job)
		}
	}
}

func TestReadList(t *testing.T) {
	for _, tt := range []struct {
		what, file, text string
		want             string // images, or
		wrong            []string
	}{
		{what: "text", file: "l.txt", text: "# all\n\nexample.com/a:1,x=a%20b # one\n\texample.com/b#1 pin\nexample.com/c pin no-deps#\n", wrong: []string{"l.txt:4: ", `l.txt:5: "no-deps#" is no option`}},
		{what: "good text", file: "l.txt", text: "example.com/a:1,x=a%20b # one\r\n example.com/c\tpin  no-deps", want: "example.com/a:1,x=a%20b at l.txt:1; example.com/c at l.txt:2 pinned alone"},
		{what: "nothing", file: "l.txt"},
		{what: "nothing in YAML", file: "l.yaml"},
		{what: "images in YAML", file: "l.yml", text: "pin: true\nimages: [example.com/a, {image: example.com/b, pin: false, dependencies: false, platforms: [linux/aarch64]}]",
			want: "example.com/a at l.yml: images[0] pinned; example.com/b at l.yml: images[1] alone for [linux/aarch64]"},
		{what: "groups", file: "l.yaml", text: "platforms: [linux/amd64]\ngroups:\n  - {name: a, platforms: [none], images: [example.com/a]}\n  - {name: b, schedule: '5 4 * * *', dependencies: false, images: [example.com/b]}",
			want: "example.com/a at l.yaml: groups[0].images[0] for [none]; example.com/b at l.yaml: groups[1].images[0] alone for [linux/amd64]"},
		{what: "mistakes", file: "l.yaml", text: "groups:\n  - {images: [EXAMPLE]}\n  - {name: b, schedule: sometimes}\n  - {name: b, platforms: [x], images: [example.com/b]}",
			wrong: []string{"groups[0] has no name", "groups[0].images[0]: ", `"sometimes" is no schedule`, `groups[2]: there is another group "b"`, `groups[2].images[0]: "x" is no platform`}},
		{what: "an unknown key", file: "l.yaml", text: "a: 1\nimagse: []", wrong: []string{"l.yaml: ", "unknown field"}},
		{what: "no mapping", file: "l.yaml", text: "- example.com/a", wrong: []string{"l.yaml: "}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			l, err := ReadList(strings.NewReader(tt.text), tt.file)
			for _, want := range tt.wrong {
				if !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), want) {
					t.Errorf("%v, want %q", err, want)
				}
			}
			if len(tt.wrong) > 0 {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			images, err := l.Images()
			if err != nil {
				t.Fatal(err)
			}
			var said []string
			for _, e := range images {
				text := e.Image + " at " + e.Where
				if e.Pin {
					text += " pinned"
				}
				if e.Alone {
					text += " alone"
				}
				if e.Platforms != nil {
					text += fmt.Sprintf(" for %v", e.Platforms)
				}
				said = append(said, text)
			}
			if got := strings.Join(said, "; "); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	if _, err := ReadList(strings.NewReader(strings.Repeat("#", maxList+1)), "l.txt"); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("too long: %v", err)
	}
	if l, err := ReadList(strings.NewReader(strings.Repeat("#", maxList)), "l.txt"); err != nil || len(l.Groups[0].Images) != 0 {
		t.Errorf("as long as it may be: %v", err)
	}
}
