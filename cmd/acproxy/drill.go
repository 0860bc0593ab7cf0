package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/test/node"
)

func newDrill() *cobra.Command {
	var asJSON, keep bool
	var only []string
	cmd := &cobra.Command{
		Use:   "drill",
		Short: "Rehearse what can go wrong: publisher down, offline, damaged image, full disk, expired key",
		Long: `drill runs this very binary as acproxy serve on a scratch store, with a publisher of its own, and puts it for real into each of these situations:

  publisher-down  the publisher is stopped, and comes back
  offline         the server is started with offline: true
  corrupt-blob    a byte of a held image is changed on the disk, and scrub looks for it
  full-disk       the file system of the store is full (a small one in a namespace of its own where the kernel lets users make them, else
                  cache.min_free is more than there is)
  expired-key     the only trusted key comes to its end

For each it prints what was done, what a node got, what an operator sees (commands, log, metrics, and which alert of deploy/prometheus would fire), and
whether that is what acproxy promises; it exits with 1 if something is not. It takes about ten seconds, needs no root, no network and no configuration,
touches no other store, and leaves nothing behind.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, name := range only {
				if !slices.ContainsFunc(scenarios(), func(s scenario) bool { return s.name == name }) {
					return usagef("--only %s: there is no such scenario; there are %s", name, strings.Join(scenarioNames(), ", "))
				}
			}
			d := &drill{out: newDrillPrinter(cmd.OutOrStdout(), asJSON), only: only, keep: keep}
			return d.run(cmd.Context(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object for each scenario")
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the scratch directory, with stores, configurations and logs, where it is")
	cmd.Flags().StringSliceVar(&only, "only", nil, "only these scenarios, such as full-disk,offline")
	return cmd
}

// drill is a rehearsal: a scene, on which one scenario after the other is played, each with a server and a store of its own.
type drill struct {
	*scene
	out  *drillPrinter
	only []string
	keep bool
	// meddle, if it isn't nil, is called when the situation of a scenario has been brought about, to break what is promised. It is for tests.
	meddle func(scenario, dataDir string) error
}

// run plays the scenarios. What isn't a scenario's own output goes to stderr.
func (d *drill) run(ctx context.Context, stderr io.Writer) (err error) {
	// The servers end with the thread that has started them, so that not even a kill of the drill leaves one behind.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer outliveReader()()
	dir, err := os.MkdirTemp("", "acproxy-drill-")
	if err != nil {
		return err
	}
	defer func() {
		if d.keep {
			fmt.Fprintf(stderr, "everything is kept in %s\n", dir)
			return
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	d.scene = &scene{dir: dir}
	if err := d.scene.start(); err != nil {
		return errors.Join(err, d.scene.close())
	}
	defer func() { err = errors.Join(err, d.scene.close()) }()
	if err := d.publishForDrill(); err != nil {
		return err
	}
	d.out.begin(dir)
	failed := 0
	for _, s := range scenarios() {
		if len(d.only) > 0 && !slices.Contains(d.only, s.name) {
			continue
		}
		if d.out.err != nil {
			break
		}
		r, err := d.play(ctx, s)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if !r.OK {
			failed++
		}
	}
	d.out.end()
	if d.out.err != nil {
		return d.out.err
	}
	if failed > 0 {
		return silent(errors.New("a promise is broken"))
	}
	return nil
}

// outliveReader lets writing fail when whoever reads it has read enough, as head has: that would otherwise end the process on the spot, with all that it
// leaves behind. The function that it returns ends that.
func outliveReader() func() {
	closed := make(chan os.Signal, 1)
	signal.Notify(closed, syscall.SIGPIPE)
	return func() { signal.Stop(closed) }
}

// play plays one scenario, and prints what happens as it happens.
func (d *drill) play(ctx context.Context, s scenario) (rehearsal, error) {
	dir := filepath.Join(d.dir, s.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return rehearsal{}, err
	}
	if err := d.publisher.Resume(); err != nil {
		return rehearsal{}, err
	}
	a := &act{drill: d, scenario: s, dir: dir, dataDir: filepath.Join(dir, "data"), node: node.New(node.Options{Resolve: func(hostport string) (string, bool) { return hostport, true }})}
	a.report = rehearsal{Scenario: s.name, Title: s.title, OK: true}
	defer a.node.Close()
	d.out.scenario(a.report)
	started := time.Now()
	err := s.play(ctx, a)
	a.report.Seconds = time.Since(started).Seconds()
	// It has to end in good order, whatever happened to it.
	if stopped := a.stop(); err == nil {
		err = stopped
	}
	if err == nil {
		d.out.over(a.report)
	}
	return a.report, err
}

// rehearsal is what came of a scenario.
type rehearsal struct {
	Scenario string  `json:"scenario"`
	Title    string  `json:"title"`
	OK       bool    `json:"ok"` // everything is as promised
	Promises int     `json:"promises"`
	Broken   int     `json:"broken"`
	Seconds  float64 `json:"seconds"`
	Steps    []event `json:"steps"`
}

// event is one thing that was done or seen. One of its fields is set; OK and Wrong belong to answers, promises and alerts.
type event struct {
	Did     string         `json:"did,omitempty"`
	Answer  *drillAnswer   `json:"answer,omitempty"`
	Command *drillCommand  `json:"command,omitempty"`
	Log     []string       `json:"log,omitempty"`
	Metrics []metricChange `json:"metrics,omitempty"`
	Alert   *drillAlert    `json:"alert,omitempty"`
	Promise string         `json:"promise,omitempty"`

	OK    *bool    `json:"ok,omitempty"`
	Wrong []string `json:"wrong,omitempty"`
}

// drillAnswer is what a node got.
type drillAnswer struct {
	Image       string  `json:"image"` // what was asked for
	URL         string  `json:"url"`
	Status      int     `json:"status"` // 0 if there was no answer
	Problem     string  `json:"problem,omitempty"`
	Detail      string  `json:"detail,omitempty"`
	CacheStatus string  `json:"cacheStatus,omitempty"`
	RetryAfter  string  `json:"retryAfter,omitempty"`
	Seconds     float64 `json:"seconds"`
}

// drillCommand is what a command printed.
type drillCommand struct {
	Command string `json:"command"` // without what leads it to the scratch store
	Exit    int    `json:"exit"`
	Output  string `json:"output"`
}

// metricChange is a metric that is another one than before.
type metricChange struct {
	Metric string `json:"metric"` // with its labels
	Before string `json:"before"` // "" if it wasn't there
	After  string `json:"after"`
}

// drillAlert is an alert of deploy/prometheus that would fire.
type drillAlert struct {
	Name     string `json:"name"`
	Severity string `json:"severity"`
	After    string `json:"after,omitempty"` // how long it has to last; "" is at once
	Metric   string `json:"metric"`          // which has moved
}
