// Command bench measures acproxy side by side with its peers: every round runs each of them once, one after the other, so that a noisy machine is
// noisy to all; what counts is the ratio of the medians.
//
//	go run ./test/bench [flags] [BENCHMARK…]
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// options are the flags.
type options struct {
	rounds int
	size   int64  // bytes of the large image
	rate   int64  // bytes a second that a limited publisher gives
	images int    // held images to judge again
	dir    string // where files are put
}

// A benchmark measures some contestants, the first of which the others are compared with.
type benchmark struct {
	name, what string
	// unit is what a run's number means; more is better if more is set.
	unit string
	more bool
	// goal is what the ratio of the contestant called goalOf to the first one should be.
	goalOf string
	goal   float64
	setUp  func(options) (stage, error)
}

// stage is a benchmark that was set up.
type stage struct {
	contestants []contestant
	close       func() error
}

type contestant struct {
	name string
	run  func() (float64, error)
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	var jsonFile, only string
	flags.IntVar(&o.rounds, "rounds", 5, "how often each contestant runs")
	flags.Int64Var(&o.size, "size", 500<<20, "bytes of the large image")
	flags.Int64Var(&o.rate, "rate", 200_000_000, "bytes a second that a limited publisher gives")
	flags.IntVar(&o.images, "images", 100_000, "held images to judge again")
	flags.StringVar(&jsonFile, "json", "", "also write the results to this file")
	flags.StringVar(&only, "only", "", "run only contestants whose name holds this")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	dir, err := os.MkdirTemp("", "acproxy-bench-")
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	o.dir = dir
	var results []result
	for _, b := range benchmarks {
		if flags.NArg() > 0 && !slices.Contains(flags.Args(), b.name) {
			continue
		}
		fmt.Fprintf(stdout, "\n%s: %s\n", b.name, b.what)
		found, err := measure(b, o, only)
		if err != nil {
			fmt.Fprintf(stderr, "bench: %s: %v\n", b.name, err)
			return 1
		}
		printResults(stdout, b, found)
		results = append(results, found...)
	}
	if jsonFile != "" {
		data, err := json.MarshalIndent(results, "", "  ")
		if err == nil {
			err = os.WriteFile(jsonFile, append(data, '\n'), 0o644)
		}
		if err != nil {
			fmt.Fprintln(stderr, "bench:", err)
			return 1
		}
	}
	return 0
}

// result is what one contestant achieved.
type result struct {
	Benchmark  string    `json:"benchmark"`
	Contestant string    `json:"contestant"`
	Unit       string    `json:"unit"`
	Runs       []float64 `json:"runs"`
	Median     float64   `json:"median"`
	Spread     float64   `json:"spread"` // (max-min)/median
	Ratio      float64   `json:"ratio"`  // of the median to the first contestant's
}

func measure(b benchmark, o options, only string) (results []result, err error) {
	s, err := b.setUp(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if closed := s.close(); err == nil {
			err = closed
		}
	}()
	for _, c := range s.contestants {
		if strings.Contains(c.name, only) {
			results = append(results, result{Benchmark: b.name, Contestant: c.name, Unit: b.unit})
		}
	}
	// The first round warms caches and isn't counted.
	for round := range o.rounds + 1 {
		for i := range results {
			c := s.contestants[slices.IndexFunc(s.contestants, func(c contestant) bool { return c.name == results[i].Contestant })]
			got, err := c.run()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			if round > 0 {
				results[i].Runs = append(results[i].Runs, got)
			}
		}
	}
	for i := range results {
		r := &results[i]
		sorted := slices.Sorted(slices.Values(r.Runs))
		r.Median = sorted[len(sorted)/2]
		r.Spread = (sorted[len(sorted)-1] - sorted[0]) / r.Median
		r.Ratio = r.Median / results[0].Median
	}
	return results, nil
}

func printResults(w io.Writer, b benchmark, results []result) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "\t%s\tspread\tratio\t\t\n", b.unit)
	for _, r := range results {
		verdict := ""
		if r.Contestant == b.goalOf {
			reached := r.Ratio <= b.goal
			sign := "≤"
			if b.more {
				reached, sign = r.Ratio >= b.goal, "≥"
			}
			verdict = fmt.Sprintf("goal %s %.2f: %s", sign, b.goal, map[bool]string{true: "reached", false: "missed"}[reached])
		}
		fmt.Fprintf(t, "%s\t%.4g\t%.0f %%\t%.2f\t%s\t\n", r.Contestant, r.Median, r.Spread*100, r.Ratio, verdict)
	}
	t.Flush() // to a terminal or a file that the next print will complain about
}

// timed returns how many seconds do took.
func timed(do func() error) (float64, error) {
	started := time.Now()
	err := do()
	return time.Since(started).Seconds(), err
}
