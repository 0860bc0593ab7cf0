package admin

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/warm"
)

// Warm begins to fetch a list of images.
func (v View) Warm(spec warm.Spec) (warm.Job, error) {
	pins := slices.ContainsFunc(spec.Images, func(e warm.Entry) bool { return e.Pin })
	for _, name := range spec.Names() {
		if !v.May(access.Warm, name) {
			return warm.Job{}, v.refuse("have images of " + name + " fetched")
		}
		if pins && !v.May(access.Pin, name) {
			return warm.Job{}, v.refuse("pin images of " + name)
		}
	}
	return v.s.o.Warm.Submit(spec, v.who.name())
}

// seesJob reports whether the client may know of a job: that takes knowing of all the images that its list names.
func (v View) seesJob(id string) bool {
	names, err := v.s.o.Warm.Names(id)
	return err == nil && (v.looks() || !slices.ContainsFunc(names, func(name string) bool { return !v.reads(name) }))
}

// WarmJobs returns the lists of images that are, or were, fetched, the latest first.
func (v View) WarmJobs() []warm.Job {
	return slices.DeleteFunc(v.s.o.Warm.All(), func(j warm.Job) bool { return !v.seesJob(j.ID) })
}

// WarmProgress returns how far a list has come, as [warm.Jobs.Progress] does.
func (v View) WarmProgress(ctx context.Context, id string, after, limit int, wait time.Duration) (warm.Progress, error) {
	if !v.seesJob(id) {
		return warm.Progress{}, noSuchJob(id)
	}
	return v.s.o.Warm.Progress(ctx, id, after, limit, wait)
}

func noSuchJob(id string) error {
	return &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "no-such-job", Detail: "there is no job " + strconv.Quote(id[:min(len(id), 64)])}
}

// MayCancelWarm returns why the client may not end the fetching of a list, nil if it may.
func (v View) MayCancelWarm(id string) error {
	if !v.seesJob(id) {
		return noSuchJob(id)
	}
	names, err := v.s.o.Warm.Names(id)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !v.May(access.Warm, name) {
			return v.refuse("end the fetching of images of " + name)
		}
	}
	return nil
}

// CancelWarm ends the fetching of a list.
func (v View) CancelWarm(id string) (warm.Job, error) {
	if err := v.MayCancelWarm(id); err != nil {
		return warm.Job{}, err
	}
	return v.s.o.Warm.Cancel(id)
}

type jobInput struct {
	ID string `path:"job" doc:"The ID of the job."`
}

type progressInput struct {
	ID    string `path:"job" doc:"The ID of the job."`
	After int    `query:"after" minimum:"0" doc:"Only results from this place on: next of the answer before."`
	Limit int    `query:"limit" minimum:"1" maximum:"10000" default:"1000" doc:"How many results there are at most."`
	Wait  int    `query:"wait" minimum:"0" maximum:"60" doc:"For how many seconds the answer may wait for something new."`
}

// maxWarmBody bounds what a job is begun with, in bytes: the lists that it is made of are bounded by their number of images.
const maxWarmBody = 64 << 20

func (s *Server) describeWarm(a huma.API) {
	register(s, a, huma.Operation{
		OperationID: "list-warm-jobs", Method: http.MethodGet, Path: "warm", Tags: []string{tagWarm}, Summary: "List the lists that are, or were, fetched", Description: "The latest first.",
	}, func(v View, _ context.Context, _ *nothing) ([]warm.Job, error) { return v.WarmJobs(), nil })
	register(s, a, huma.Operation{
		OperationID: "warm", Method: http.MethodPost, Path: "warm", Tags: []string{tagWarm}, Summary: "Fetch a list of images", DefaultStatus: http.StatusAccepted, MaxBodyBytes: maxWarmBody,
		Description: "Images and what they depend on are fetched and checked as for any node. The answer comes at once; the job goes on, also after a restart of the server. Needs the right warm for every name in the list, and pin for what is pinned.",
	}, func(v View, _ context.Context, in *struct{ Body warm.Spec }) (warm.Job, error) {
		return v.Warm(in.Body)
	})
	register(s, a, huma.Operation{
		OperationID: "show-warm-job", Method: http.MethodGet, Path: "warm/{job}", Tags: []string{tagWarm}, Summary: "Show how far a list has come",
		Description: "What became of each image, in the order in which that was known. Once the job is done, and there are fewer results than limit, there are no more.",
	}, func(v View, ctx context.Context, in *progressInput) (warm.Progress, error) {
		ctx, done := s.listening(ctx)
		defer done()
		return v.WarmProgress(ctx, in.ID, in.After, in.Limit, time.Duration(in.Wait)*time.Second)
	})
	register(s, a, huma.Operation{
		OperationID: "cancel-warm-job", Method: http.MethodDelete, Path: "warm/{job}", Tags: []string{tagWarm}, Summary: "End a job",
		Description: "What is arriving goes on arriving, as when a node leaves. Needs the right warm for every name in the list.",
	}, func(v View, _ context.Context, in *jobInput) (warm.Job, error) { return v.CancelWarm(in.ID) })
}

// Warm has the server fetch a list of images.
func (c *Client) Warm(spec warm.Spec) (job warm.Job, err error) {
	err = c.patient().post(context.Background(), "warm", spec, &job)
	return job, err
}

// WarmJobs returns the lists of images that are, or were, fetched, the latest first.
func (c *Client) WarmJobs() (jobs []warm.Job, err error) {
	err = c.get("warm", &jobs)
	return jobs, err
}

// WarmProgress is [warm.Jobs.Progress] of the server. The wait is in whole seconds.
func (c *Client) WarmProgress(ctx context.Context, id string, after, limit int, wait time.Duration) (p warm.Progress, err error) {
	values := url.Values{"after": {strconv.Itoa(after)}, "limit": {strconv.Itoa(limit)}, "wait": {strconv.Itoa(int(wait / time.Second))}}
	err = c.patient().do(ctx, http.MethodGet, "warm/"+url.PathEscape(id)+"?"+values.Encode(), &p)
	return p, err
}

// CancelWarm ends the fetching of a list.
func (c *Client) CancelWarm(id string) (job warm.Job, err error) {
	err = c.do(context.Background(), http.MethodDelete, "warm/"+url.PathEscape(id), &job)
	return job, err
}
