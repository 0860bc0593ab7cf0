package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// report is everything that a run of this program found.
type report struct {
	Command string    `json:"command"`
	Notes   []string  `json:"notes,omitempty"` // what was left out, and why
	Results []result  `json:"results"`
	Goals   []verdict `json:"goals,omitempty"`
}

// result is what one contestant achieved by one metric.
type result struct {
	Benchmark  string    `json:"benchmark"`
	Contestant string    `json:"contestant"`
	Metric     string    `json:"metric"`
	Unit       string    `json:"unit"`
	Runs       []float64 `json:"runs"`
	Median     float64   `json:"median"`
	Spread     float64   `json:"spread"` // (max-min)/median
	Ratio      float64   `json:"ratio"`  // of the median to the first contestant's; 0 if there is none
}

// summarize fills in what follows from the runs. first is the first contestant's result, nil for its own.
func (r *result) summarize(first *result) {
	sorted := slices.Sorted(slices.Values(r.Runs))
	r.Median = sorted[len(sorted)/2]
	if r.Median != 0 {
		r.Spread = (sorted[len(sorted)-1] - sorted[0]) / r.Median
	}
	if first == nil {
		first = r
	}
	if first.Median != 0 {
		r.Ratio = r.Median / first.Median
	}
}

// verdict is what became of a goal.
type verdict struct {
	Benchmark string  `json:"benchmark"`
	Goal      string  `json:"goal"` // in words
	Metric    string  `json:"metric"`
	Unit      string  `json:"unit"`
	More      bool    `json:"more"`   // more is better
	Wanted    float64 `json:"wanted"` // at most, or at least
	Got       float64 `json:"got"`
	Of        string  `json:"of"`
	Than      string  `json:"than,omitempty"`
	Ratio     float64 `json:"ratio,omitempty"` // of the medians, if the goal names a peer
	Reached   bool    `json:"reached"`
}

// find returns one contestant's result by one metric.
func find(results []result, benchmark, contestant, metric string) (result, bool) {
	i := slices.IndexFunc(results, func(r result) bool {
		return r.Benchmark == benchmark && r.Contestant == contestant && r.Metric == metric
	})
	if i < 0 {
		return result{}, false
	}
	return results[i], true
}

// judge holds results against the goals of their benchmark. A goal for which somebody is missing has no verdict.
func judge(b benchmark, results []result) []verdict {
	var verdicts []verdict
	for _, g := range b.goals {
		m := b.metrics[slices.IndexFunc(b.metrics, func(m metric) bool { return m.name == g.metric })]
		got, ok := find(results, b.name, g.of, g.metric)
		if !ok {
			continue
		}
		v := verdict{Benchmark: b.name, Metric: m.name, Unit: m.unit, More: m.more, Wanted: g.plus, Got: got.Median, Of: g.of, Than: g.than}
		if g.than != "" {
			than, ok := find(results, b.name, g.than, g.metric)
			if !ok {
				continue
			}
			v.Wanted += g.by * than.Median
			if than.Median != 0 {
				v.Ratio = got.Median / than.Median
			}
		}
		v.Reached = got.Median <= v.Wanted
		if m.more {
			v.Reached = got.Median >= v.Wanted
		}
		v.Goal = g.words(m)
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// words says what is wanted.
func (g goal) words(m metric) string {
	sign := "≤"
	if m.more {
		sign = "≥"
	}
	var terms []string
	if g.than != "" {
		terms = append(terms, fmt.Sprintf("%.2f × %s", g.by, g.than))
	}
	if g.plus != 0 || g.than == "" {
		terms = append(terms, strings.TrimSpace(figure(g.plus)+" "+m.unit))
	}
	text := fmt.Sprintf("%s of %s %s %s", m.name, g.of, sign, strings.Join(terms, " + "))
	if g.why != "" {
		text += " (" + g.why + ")"
	}
	return text
}

// outcome says what became of a goal, with the figures.
func (v verdict) outcome() string {
	got := strings.TrimSpace(figure(v.Got) + " " + v.Unit)
	if v.Ratio != 0 {
		got = fmt.Sprintf("%.2f × (%s)", v.Ratio, got)
	}
	return got + map[bool]string{true: ", reached", false: ", missed"}[v.Reached]
}

// figure writes a number with as many digits as mean something.
func figure(v float64) string {
	if math.Abs(v) >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// printResults prints a line for each contestant: the first metric with spread and ratio, then the others with their ratios.
func printResults(w io.Writer, b benchmark, results []result, verdicts []verdict) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for i, m := range b.metrics {
		fmt.Fprintf(t, "\t%s %s", m.name, m.unit)
		if i == 0 {
			fmt.Fprint(t, "\tspread")
		}
		fmt.Fprint(t, "\t×")
	}
	fmt.Fprintln(t, "\t")
	var names []string
	for _, r := range results {
		if !slices.Contains(names, r.Contestant) {
			names = append(names, r.Contestant)
		}
	}
	for _, name := range names {
		fmt.Fprint(t, name)
		for i, m := range b.metrics {
			r, ok := find(results, b.name, name, m.name)
			cells := []string{"–", "–"}
			if ok {
				cells = []string{figure(r.Median), fmt.Sprintf("%.2f", r.Ratio)}
			}
			if i == 0 {
				cells = slices.Insert(cells, 1, fmt.Sprintf("%.0f %%", r.Spread*100))
			}
			fmt.Fprint(t, "\t", strings.Join(cells, "\t"))
		}
		fmt.Fprintln(t, "\t")
	}
	t.Flush() // to a terminal or a file that the next print will complain about
	for _, v := range verdicts {
		fmt.Fprintf(w, "goal: %s: %s\n", v.Goal, v.outcome())
	}
}

// printGoals prints all goals once more, together.
func printGoals(w io.Writer, verdicts []verdict) {
	if len(verdicts) == 0 {
		return
	}
	fmt.Fprintln(w, "\nGoals:")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range verdicts {
		fmt.Fprintf(t, "%s\t%s\t%s\n", v.Benchmark, v.Goal, v.outcome())
	}
	t.Flush()
}

// write writes the files that were asked for; "" is none.
func (r report) write(jsonFile, chartFile string) error {
	if jsonFile != "" {
		data, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(jsonFile, append(data, '\n'), 0o644); err != nil {
			return err
		}
	}
	if chartFile != "" {
		return os.WriteFile(chartFile, chart(r), 0o644)
	}
	return nil
}
