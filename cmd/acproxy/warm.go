package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/warm"
)

// Exit codes of acproxy warm, which scripts of a rollout go by.
const (
	exitWarmUsage    = 1 // the list, or the command line, could not be understood
	exitWarmFailed   = 2 // some of the images are not there; the rest is
	exitWarmNoServer = 3 // no server answers
)

const (
	// warmWait is for how long an answer about a job may wait for something new, and warmResults how many results it has at most.
	warmWait    = 2 * time.Second
	warmResults = 1000
	// warmRedraw is how often bars are drawn, and maxWarmBars how many there are beside the one for all.
	warmRedraw  = 300 * time.Millisecond
	maxWarmBars = 8
)

// exitError ends a command with a code of its own.
type exitError struct {
	error
	code int
}

// Unwrap returns the cause.
func (e *exitError) Unwrap() error { return e.error }

// warmed turns what a command of the warm family ends with into its exit codes.
func warmed(err error) error {
	var usage *usageError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &usage), errors.Is(err, acproxy.ErrInvalid):
		return &exitError{err, exitWarmUsage}
	case acproxy.Code(err) == "no-server":
		return &exitError{err, exitWarmNoServer}
	}
	return &exitError{err, exitWarmFailed}
}

// warmArgs is args for commands of the warm family.
func warmArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, words []string) error {
		if err := check(cmd, words); err != nil {
			return warmed(&usageError{err})
		}
		return nil
	}
}

// warmer is where lists of images are fetched: a running server, or this process.
type warmer interface {
	Warm(spec warm.Spec) (warm.Job, error)
	WarmProgress(ctx context.Context, id string, after, limit int, wait time.Duration) (warm.Progress, error)
	CancelWarm(id string) (warm.Job, error)
	Flights() ([]fetch.FlightState, error)
	Record(digest acproxy.Digest) (cache.Record, error)
	Blob(digest acproxy.Digest) (io.ReadSeekCloser, error)
	Signature(digest acproxy.Digest) ([]byte, error)
}

var (
	_ warmer = (*admin.Client)(nil)
	_ warmer = here{}
)

// here is this process, whose store no server has open.
type here struct {
	admin.Judged
	p *parts
}

// Warm implements warmer.
func (h here) Warm(spec warm.Spec) (warm.Job, error) { return h.p.warm.Submit(spec, "command") }

// WarmProgress implements warmer.
func (h here) WarmProgress(ctx context.Context, id string, after, limit int, wait time.Duration) (warm.Progress, error) {
	return h.p.warm.Progress(ctx, id, after, limit, wait)
}

// CancelWarm implements warmer.
func (h here) CancelWarm(id string) (warm.Job, error) { return h.p.warm.Cancel(id) }

// Flights implements warmer.
func (h here) Flights() ([]fetch.FlightState, error) { return h.p.fetcher.Flights(), nil }

// withWarmer runs do with a warmer: a running server, else this process if it may.
func (o *options) withWarmer(ctx context.Context, may bool, do func(w warmer) error) error {
	cfg, err := o.load()
	if err != nil {
		return err
	}
	client, err := admin.Dial(cfg.Admin.Socket)
	if err == nil {
		return do(client)
	}
	if !errors.Is(err, acproxy.ErrNotFound) || !may {
		return err
	}
	p, err := newParts(cfg, slog.New(slog.DiscardHandler), true)
	if err != nil {
		return err
	}
	return errors.Join(p.warmHere(ctx, do), p.close())
}

// warmHere runs do with this process as the warmer. Nothing of its jobs is kept.
func (p *parts) warmHere(ctx context.Context, do func(w warmer) error) (err error) {
	dir, err := os.MkdirTemp("", "acproxy-warm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := p.store.Ready(ctx); err != nil {
		return err
	}
	if err := p.openWarm(dir, nil); err != nil {
		return err
	}
	// What do has cancelled has ended before this one does.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	// Ends with cancel, below, where it is waited for.
	go func() {
		defer close(ended)
		p.warm.Run(ctx)
	}()
	err = do(here{p.judged(), p})
	cancel()
	<-ended
	return err
}

// warming is one run of acproxy warm.
type warming struct {
	cmd *cobra.Command

	files     []string
	groups    []string
	platforms []string
	name      string
	pin       bool
	alone     bool
	dryRun    bool
	detach    bool
	here      bool
	asJSON    bool
}

func newWarm(o *options) *cobra.Command {
	w := new(warming)
	cmd := &cobra.Command{
		Use:   "warm [IMAGE…]",
		Short: "Fetch lists of images before anybody asks for them",
		Long: `warm has the running server fetch images, and all that they depend on, and check them as for any node. What is held already is left as it is; of images
without a version the publisher is asked whether they are still the ones.

IMAGE is a name with labels, as name[:version][,label=value…]. The version may be a pattern such as "1.*", which stands for those that the publisher lists, where
listing in the configuration says where. --file names lists: text with an image on each line, behind it pin or no-deps, and comments that begin with #; or, if the name
ends with .yaml, groups with settings of their own (docs/warming.md).

On a terminal there is a bar for each image on its way and one for all of them; else a line for each image that is done.

The job is the server's: it goes on after a restart, and with --detach without this command. Ctrl-C cancels it.

The exit code is 0 if all images are there, 1 if the list or the command line could not be understood, 2 if some are not there (each with its reason; the rest is), and
3 if no server answers.`,
		Args: warmArgs(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			w.cmd = cmd
			spec, err := w.spec(args)
			if err != nil {
				return warmed(err)
			}
			return warmed(o.withWarmer(cmd.Context(), w.here, func(to warmer) error { return w.run(to, spec) }))
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return warmed(&usageError{err}) })
	flags := cmd.Flags()
	flags.StringArrayVarP(&w.files, "file", "f", nil, "file with a list, - for standard input; may be given more than once")
	flags.StringArrayVar(&w.groups, "group", nil, "only this group of the lists; may be given more than once")
	flags.StringArrayVar(&w.platforms, "platform", nil, "platform for images that don't say, as os/arch in appc's words, or none; may be given more than once (default: warm.platforms of the configuration)")
	flags.StringVar(&w.name, "name", "", "what the job is called, for people")
	flags.BoolVar(&w.pin, "pin", false, "pin all images of the list")
	flags.BoolVar(&w.alone, "no-deps", false, "leave out what they depend on")
	flags.BoolVar(&w.dryRun, "dry-run", false, "fetch nothing, and say what would be fetched, and how large it is")
	flags.BoolVar(&w.detach, "detach", false, "don't wait: print the job's ID")
	flags.BoolVar(&w.here, "no-server", false, "fetch into the store without a server, if none runs")
	flags.BoolVar(&w.asJSON, "json", false, "print one JSON object per line: each image, then the job")
	cmd.AddCommand(newWarmJobs(o), newWarmWait(o), newWarmCancel(o))
	return cmd
}

// spec reads what is wanted.
func (w *warming) spec(args []string) (warm.Spec, error) {
	spec := warm.Spec{Name: w.name, DryRun: w.dryRun}
	if len(args) == 0 && len(w.files) == 0 {
		return spec, usagef("which images? Name them, or lists of them with --file")
	}
	if len(w.groups) > 0 && len(w.files) == 0 {
		return spec, usagef("--group is for lists: name one with --file")
	}
	if w.detach && w.here {
		return spec, usagef("--detach leaves the job to a server, and --no-server is for when there is none")
	}
	for _, arg := range args {
		spec.Images = append(spec.Images, warm.Entry{Image: arg})
	}
	for _, file := range w.files {
		list, err := w.list(file)
		if err != nil {
			return spec, err
		}
		images, err := list.Images(w.groups...)
		if err != nil {
			return spec, fmt.Errorf("%s: %w", file, err)
		}
		spec.Images = append(spec.Images, images...)
	}
	for _, platform := range w.platforms {
		p, err := warm.ParsePlatform(platform)
		if err != nil {
			return spec, usagef("--platform: %w", err)
		}
		spec.Platforms = append(spec.Platforms, p)
	}
	for i := range spec.Images {
		spec.Images[i].Pin = spec.Images[i].Pin || w.pin
		spec.Images[i].Alone = spec.Images[i].Alone || w.alone
	}
	if spec.Name == "" && len(w.files) == 1 && w.files[0] != "-" {
		spec.Name = filepath.Base(w.files[0])
	}
	return spec, nil
}

func (w *warming) list(file string) (warm.List, error) {
	if file == "-" {
		return warm.ReadList(w.cmd.InOrStdin(), "standard input")
	}
	list, err := warm.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		err = usagef("there is no list %s", file)
	}
	return list, err
}

func (w *warming) run(to warmer, spec warm.Spec) error {
	job, err := to.Warm(spec)
	if err != nil {
		return err
	}
	if w.detach {
		if w.asJSON {
			return json.NewEncoder(w.cmd.OutOrStdout()).Encode(map[string]warm.Job{"job": job})
		}
		_, err := fmt.Fprintln(w.cmd.OutOrStdout(), job.ID)
		return err
	}
	out := &warmReport{w: w.cmd.OutOrStdout(), asJSON: w.asJSON}
	ended, err := follow(w.cmd.Context(), to, job.ID, out, w.cmd.ErrOrStderr())
	if w.cmd.Context().Err() != nil {
		if ended, err = to.CancelWarm(job.ID); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	out.sum(ended)
	return errors.Join(out.err, verdictOf(ended))
}

// verdictOf returns the error that a command ends with whose output has said the rest.
func verdictOf(j warm.Job) error {
	switch {
	case j.Good():
		return nil
	case j.State == warm.Cancelled:
		return silent(errors.New("the job was cancelled"))
	}
	return silent(errors.New("not all images are there"))
}

// follow shows how a job gets on, until it has ended or ctx is done.
func follow(ctx context.Context, from warmer, id string, out *warmReport, terminal io.Writer) (warm.Job, error) {
	bars := newWarmBars(terminal)
	defer bars.end()
	out.over = bars.over
	wait := warmWait
	if bars.container != nil {
		wait = 0
	}
	for next := 0; ; {
		p, err := from.WarmProgress(ctx, id, next, warmResults, wait)
		if err != nil {
			return p.Job, err
		}
		next = p.Next
		for _, r := range p.Results {
			out.result(r)
		}
		if p.Job.Finished() && len(p.Results) < warmResults {
			return p.Job, out.err
		}
		if bars.container == nil || len(p.Results) == warmResults {
			continue
		}
		flights, err := from.Flights()
		if err != nil {
			return p.Job, err
		}
		bars.show(p, flights)
		select {
		case <-time.After(warmRedraw):
		case <-ctx.Done():
			return p.Job, context.Cause(ctx)
		}
	}
}

// warmReport prints what became of images.
type warmReport struct {
	w      io.Writer
	over   func(io.Writer) io.Writer // where lines go that belong beside bars
	each   func(warm.Result) bool    // is told of each, and says whether it is printed; nil prints all
	asJSON bool
	err    error
}

func (r *warmReport) print(value any, text string) {
	w := r.w
	if r.over != nil {
		w = r.over(w)
	}
	switch {
	case r.err != nil:
	case r.asJSON:
		r.err = json.NewEncoder(w).Encode(value)
	default:
		_, r.err = io.WriteString(w, text)
	}
}

func (r *warmReport) result(res warm.Result) {
	if r.each != nil && !r.each(res) {
		return
	}
	size := ""
	if res.Size >= 0 {
		size = bytesText(res.Size)
	} else if res.Outcome == warm.Would {
		size = "size unknown"
	}
	id, needed, pinned := "", "", ""
	if !res.ImageID.IsZero() {
		id = res.ImageID.Short()
	}
	if res.Needed != "" {
		needed = "for " + res.Needed
	}
	if res.Pinned {
		pinned = "pinned"
	}
	if res.Outcome == warm.Failed {
		id, size = "", ""
	}
	text := joinNonEmpty("  ", fmt.Sprintf("%-8s %s", res.Outcome, res.Image), id, size, pinned, needed) + "\n"
	if res.Outcome == warm.Failed {
		if res.Where != "" {
			text += "         " + res.Where + "\n"
		}
		text += "         " + strings.ReplaceAll(res.Detail, "\n", "\n         ") + "\n"
		for i, a := range res.Trace {
			text += fmt.Sprintf("         %2d. %v\n", i+1, a)
		}
	}
	r.print(map[string]warm.Result{"image": res}, text)
}

func (r *warmReport) sum(j warm.Job) {
	r.over = nil
	text := warmText(j)
	if j.State == warm.Cancelled {
		text = "cancelled: " + text
	}
	r.print(map[string]warm.Job{"job": j}, text+"\n")
}

// warmText says what a job came to.
func warmText(j warm.Job) string {
	var parts []string
	for _, n := range []struct {
		n    int
		what string
	}{{j.Held, "held"}, {j.Fetched, "fetched"}, {j.Would, "to be fetched"}, {j.Failed, "failed"}, {j.Total - j.Held - j.Fetched - j.Would - j.Failed, "not tried"}} {
		if n.n > 0 {
			parts = append(parts, strconv.Itoa(n.n)+" "+n.what)
		}
	}
	text := count(j.Total, "image")
	if len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	if j.Bytes > 0 {
		text += "; " + bytesText(j.Bytes)
	}
	if j.Error != "" {
		text = j.Error
	}
	return text
}

// warmBars are a bar for each image on its way and one for all, on a terminal.
type warmBars struct {
	container *mpb.Progress // nil if there is no terminal
	total     *mpb.Bar
	rate      float64 // bytes a second
	received  int64   // bytes up to the last look
	done      int64   // bytes of images that have ended
	looked    time.Time
	bars      map[string]*mpb.Bar
	last      map[string]int64 // bytes that had come of each
}

func newWarmBars(w io.Writer) *warmBars {
	b := &warmBars{bars: make(map[string]*mpb.Bar), last: make(map[string]int64), looked: time.Now()}
	if !isTerminal(w) {
		return b
	}
	b.container = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	b.total = b.container.AddBar(0,
		mpb.BarPriority(1<<30), // below the others
		mpb.PrependDecorators(decor.Name("all  "), decor.CountersNoUnit("%d of %d images")),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return bytesText(int64(b.rate)) + "/s" }), decor.Name("  "), decor.AverageETA(decor.ET_STYLE_GO)),
	)
	return b
}

// show brings the bars up to date. It is for one goroutine.
func (b *warmBars) show(p warm.Progress, flights []fetch.FlightState) {
	wanted := make(map[string]bool)
	for _, ref := range p.Active {
		wanted[ref] = true
	}
	received, seen := int64(0), make(map[string]bool)
	for _, fl := range flights {
		ref := fl.Ref.String()
		if !wanted[ref] {
			continue
		}
		received += fl.Received
		seen[ref] = true
		b.last[ref] = fl.Received
		bar, ok := b.bars[ref]
		if !ok {
			if len(b.bars) == maxWarmBars || fl.Phase == fetch.PhaseWaiting {
				continue
			}
			bar = b.container.AddBar(0, mpb.BarRemoveOnComplete(),
				mpb.PrependDecorators(decor.Name(ref+"  "), decor.CountersKibiByte("% .1f of % .1f")), mpb.AppendDecorators(decor.Percentage()))
			b.bars[ref] = bar
		}
		bar.SetTotal(max(fl.Size, fl.Received+1), false)
		bar.SetCurrent(fl.Received)
	}
	for ref, bytes := range b.last {
		if !seen[ref] {
			b.done += bytes
			delete(b.last, ref)
		}
	}
	for ref, bar := range b.bars {
		if !seen[ref] {
			bar.Abort(true)
			delete(b.bars, ref)
		}
	}
	if now := time.Now(); now.Sub(b.looked) >= time.Second {
		b.rate = float64(b.done+received-b.received) / now.Sub(b.looked).Seconds()
		b.received, b.looked = b.done+received, now
	}
	ended := p.Job.Held + p.Job.Fetched + p.Job.Would + p.Job.Failed
	b.total.SetTotal(int64(max(p.Job.Total, ended+1)), false)
	b.total.SetCurrent(int64(ended))
}

// over returns where lines go that belong beside the bars.
func (b *warmBars) over(w io.Writer) io.Writer {
	if b.container != nil && isTerminal(w) {
		return b.container
	}
	return w
}

func (b *warmBars) end() {
	if b.container == nil {
		return
	}
	for _, bar := range b.bars {
		bar.Abort(true)
	}
	b.total.Abort(true)
	b.container.Wait()
}

func newWarmJobs(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "jobs",
		Short: "List the jobs that fetch, or fetched, lists of images",
		Args:  warmArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := o.server("only a running server has jobs")
			if err != nil {
				return warmed(err)
			}
			jobs, err := client.WarmJobs()
			if err != nil {
				return warmed(err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), jobs)
			}
			p := newPrinter(cmd.OutOrStdout())
			t := p.table("JOB", "NAME", "BEGUN", "BY", "STATE", "RESULT")
			for _, j := range jobs {
				t.row(j.ID, cmp.Or(j.Name, "-"), j.Created.Local().Format(time.DateTime), cmp.Or(j.By, "-"), j.State, warmText(j))
			}
			t.flush()
			p.printf("%s\n", count(len(jobs), "job"))
			return p.err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newWarmWait(o *options) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "wait JOB",
		Short: "Show what became of a job's images, and wait until it has ended",
		Long:  "wait prints what became of a job's images so far, and what becomes of the rest. It ends with the job, with its exit code. Ctrl-C ends the waiting and leaves the job alone.",
		Args:  warmArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := o.server("only a running server has jobs")
			if err != nil {
				return warmed(err)
			}
			out := &warmReport{w: cmd.OutOrStdout(), asJSON: asJSON}
			ended, err := follow(cmd.Context(), client, args[0], out, cmd.ErrOrStderr())
			if err != nil {
				return warmed(err)
			}
			out.sum(ended)
			return warmed(errors.Join(out.err, verdictOf(ended)))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object per line: each image, then the job")
	return cmd
}

func newWarmCancel(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel JOB",
		Short: "End a job",
		Long:  "cancel ends a job. The images that it has brought stay, and what is arriving goes on arriving, as when a node leaves.",
		Args:  warmArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := o.server("only a running server has jobs")
			if err != nil {
				return warmed(err)
			}
			job, err := client.CancelWarm(args[0])
			if err != nil {
				return warmed(err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", job.State, warmText(job))
			return warmed(err)
		},
	}
}
