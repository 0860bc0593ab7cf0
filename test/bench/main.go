// Command bench measures acproxy side by side with its peers: every round runs each of them once, one after the other, so that a noisy machine is
// noisy to all; what counts is the ratio of the medians.
//
//	go run ./test/bench [flags] [BENCHMARK…]
//
// Who takes part in the benchmarks of servers is a process of its own on the loopback interface, as are the publisher that they fetch from and the
// clients that ask them, so that what each of them costs can be told apart.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	rounds  int
	seconds float64 // how long one run of requests takes
	size    int64   // bytes of the large image
	small   int64   // bytes of the small image
	herd    int64   // bytes of the image that a herd asks for
	slow    int64   // bytes of the image at the slow publisher
	rate    int64   // bytes a second that a limited publisher gives to each connection
	trickle int64   // bytes a second that the slow publisher gives in all
	images  int     // held images to judge again
	held    int     // images of the store that is looked into
	store   string  // where that store is kept, "" for nowhere

	connections numbers // how many connections ask for small answers
	clients     numbers // how many clients download images
	herds       numbers // how many clients ask for a cold image at once
	waiting     int     // how many clients ask for the image of a slow publisher

	install bool   // install peers that are missing
	wrk     bool   // ask for small answers with wrk where it is installed
	profile string // the directory for profiles of acproxy, "" for none
	only    string

	benchmark  string // the one that runs
	profileFor int    // seconds that it is profiled for at least
	dir        string // where files are put
	ground     *ground
	note       func(format string, args ...any) // tells what was left out, and why
}

// wants reports whether a contestant takes part.
func (o options) wants(name string) bool {
	for part := range strings.SplitSeq(o.only, ",") {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// numbers is a flag of several numbers, with commas between.
type numbers []int

// String is [flag.Value]'s.
func (n *numbers) String() string {
	var out []string
	for _, v := range *n {
		out = append(out, strconv.Itoa(v))
	}
	return strings.Join(out, ",")
}

// Set is [flag.Value]'s.
func (n *numbers) Set(s string) error {
	*n = nil
	for part := range strings.SplitSeq(s, ",") {
		v, err := strconv.Atoi(part)
		if err != nil || v < 1 {
			return fmt.Errorf("%q is not a number above 0", part)
		}
		*n = append(*n, v)
	}
	return nil
}

// The groups of benchmarks.
const (
	groupVerify = "verify" // what it costs to verify
	groupPeers  = "peers"  // serving, side by side with other servers
	groupStore  = "store"  // a store of very many images
	groupAirgap = "airgap" // carrying images over an air gap
)

// A benchmark measures some contestants, the first of which the others are compared with.
type benchmark struct {
	name, what string
	groups     []string
	metrics    []metric // the first one is what it is about
	goals      []goal
	setUp      func(context.Context, options) (stage, error)
}

// A metric is a number that each run gives.
type metric struct {
	name, unit string
	more       bool // more is better
}

// A goal is what the median of a metric should be for one contestant: at most, or if more of it is better at least, by times that of another
// contestant, plus something.
type goal struct {
	of, metric string
	than       string // "" means that plus is all
	by, plus   float64
	why        string // what it stands for, if that isn't plain
}

// stage is a benchmark that was set up.
type stage struct {
	contestants []contestant
	close       func() error
}

type contestant struct {
	name string
	run  func(context.Context) (measures, error)
}

// measures is what one run gave, by metric.
type measures map[string]float64

func main() {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(play(role, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	o := options{connections: numbers{16, 128}, clients: numbers{1, 16, 128}, herds: numbers{64, 256}}
	var jsonFile, chartFile, group string
	var list bool
	flags.IntVar(&o.rounds, "rounds", 5, "how often each contestant runs")
	flags.Float64Var(&o.seconds, "seconds", 3, "how long one run of requests takes")
	flags.Int64Var(&o.size, "size", 500<<20, "bytes of the large image")
	flags.Int64Var(&o.small, "small", 10<<20, "bytes of the small image")
	flags.Int64Var(&o.herd, "herd-size", 100<<20, "bytes of the image that a herd asks for")
	flags.Int64Var(&o.slow, "slow-size", 5<<20, "bytes of the image at the slow publisher")
	flags.Int64Var(&o.rate, "rate", 200_000_000, "bytes a second that a limited publisher gives to each connection")
	flags.Int64Var(&o.trickle, "slow-rate", 1_000_000, "bytes a second that the slow publisher gives in all")
	flags.IntVar(&o.images, "images", 100_000, "held images to judge again")
	flags.IntVar(&o.held, "held", 1_000_000, "images of the store that is looked into")
	flags.StringVar(&o.store, "store", "", "keep that store in this directory from one run to the next: it takes minutes to make, and 9 GB for a million images")
	flags.Var(&o.connections, "connections", "how many connections ask for small answers")
	flags.Var(&o.clients, "clients", "how many clients download images")
	flags.Var(&o.herds, "herd", "how many clients ask for a cold image at once")
	flags.IntVar(&o.waiting, "waiting", 8, "how many clients ask for the image of a slow publisher")
	flags.BoolVar(&o.install, "install", true, "install peers that are missing, with apt-get")
	flags.BoolVar(&o.wrk, "wrk", true, "ask for small answers with wrk, which costs less than our own client")
	flags.StringVar(&o.profile, "profile", "", "also write CPU profiles of acproxy to this directory; its figures then include the profiling")
	flags.StringVar(&o.only, "only", "", "run only contestants whose name holds this, or one of these with commas between")
	flags.StringVar(&group, "group", "", "run only the benchmarks of this group: verify, airgap, peers or store")
	flags.StringVar(&jsonFile, "json", "", "also write the results to this file")
	flags.StringVar(&chartFile, "svg", "", "also draw the goals and what was reached of them to this file")
	flags.BoolVar(&list, "list", false, "list the benchmarks")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	complain := func(err error) int {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	chosen, err := choose(benchmarks(o), group, flags.Args())
	if err != nil {
		return complain(err)
	}
	if list {
		for _, b := range chosen {
			fmt.Fprintf(stdout, "%s: %s\n", b.name, b.what)
		}
		return 0
	}
	if o.dir, err = os.MkdirTemp("", "acproxy-bench-"); err != nil {
		return complain(err)
	}
	defer os.RemoveAll(o.dir)
	r := report{Command: "go run ./test/bench " + strings.Join(args, " ")}
	o.note = func(format string, args ...any) {
		if text := fmt.Sprintf(format, args...); !slices.Contains(r.Notes, text) {
			r.Notes = append(r.Notes, text)
			fmt.Fprintln(stdout, "note:", text)
		}
	}
	o.ground = &ground{o: o}
	code := 0
	for _, b := range chosen {
		fmt.Fprintf(stdout, "\n%s: %s\n", b.name, b.what)
		found, err := measure(ctx, b, o, stderr)
		if err != nil {
			code = complain(fmt.Errorf("%s: %w", b.name, err))
		}
		if ctx.Err() != nil {
			return code
		}
		verdicts := judge(b, found)
		printResults(stdout, b, found, verdicts)
		r.Results = append(r.Results, found...)
		r.Goals = append(r.Goals, verdicts...)
		// Written after each benchmark: a run takes long, and what is known by then shouldn't be lost with it.
		if err := r.write(jsonFile, chartFile); err != nil {
			return complain(err)
		}
	}
	printGoals(stdout, r.Goals)
	return code
}

// choose returns the benchmarks of a group, if one is named, whose names begin with one of the given, by segments.
func choose(all []benchmark, group string, names []string) ([]benchmark, error) {
	var chosen []benchmark
	used := make(map[string]bool)
	for _, b := range all {
		if group != "" && !slices.Contains(b.groups, group) {
			continue
		}
		wanted := len(names) == 0
		for _, name := range names {
			if b.name == name || strings.HasPrefix(b.name, name+"/") {
				wanted, used[name] = true, true
			}
		}
		if wanted {
			chosen = append(chosen, b)
		}
	}
	for _, name := range names {
		if !used[name] {
			return nil, fmt.Errorf("there is no benchmark called %s; -list lists them", name)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("there is no group %q", group)
	}
	return chosen, nil
}

// benchmarks returns all of them, in the order in which they run.
func benchmarks(o options) []benchmark {
	return slices.Concat(verifyBenchmarks(), airgapBenchmarks(), warmBenchmarks(o), coldBenchmarks(o), millionBenchmarks(o))
}

// measure runs the contestants in turn. One that fails is left out of what it returns, beside the error.
func measure(ctx context.Context, b benchmark, o options, progress io.Writer) (results []result, err error) {
	o.benchmark = b.name
	s, err := b.setUp(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	contestants := slices.DeleteFunc(slices.Clone(s.contestants), func(c contestant) bool { return !o.wants(c.name) })
	runs := make(map[string][]measures)
	// The first round warms caches and isn't counted.
	for round := range o.rounds + 1 {
		for _, c := range slices.Clone(contestants) {
			got, failed := c.run(ctx)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if failed != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", c.name, failed))
				contestants = slices.DeleteFunc(contestants, func(other contestant) bool { return other.name == c.name })
				continue
			}
			fmt.Fprintf(progress, "%s round %d: %s: %s %s\n", b.name, round, c.name, figure(got[b.metrics[0].name]), b.metrics[0].unit)
			if round > 0 {
				runs[c.name] = append(runs[c.name], got)
			}
		}
	}
	for _, m := range b.metrics {
		var first *result
		for _, c := range contestants {
			r := result{Benchmark: b.name, Contestant: c.name, Metric: m.name, Unit: m.unit}
			for _, got := range runs[c.name] {
				if v, ok := got[m.name]; ok {
					r.Runs = append(r.Runs, v)
				}
			}
			if len(r.Runs) == 0 {
				continue
			}
			r.summarize(first)
			results = append(results, r)
			if first == nil {
				first = &r
			}
		}
	}
	return results, err
}

// timed returns how many seconds do took.
func timed(do func() error) (float64, error) {
	started := time.Now()
	err := do()
	return time.Since(started).Seconds(), err
}
