package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
)

// drillPrinter prints a drill for people, within the width of their terminal, or as JSON.
type drillPrinter struct {
	*printer
	json  bool
	width int
	all   []rehearsal
}

// Widths of what is printed where there is no terminal that tells, and at least.
const (
	defaultWidth = 100
	leastWidth   = 60
)

func newDrillPrinter(w io.Writer, asJSON bool) *drillPrinter {
	return &drillPrinter{printer: newPrinter(w), json: asJSON, width: max(leastWidth, widthOf(w))}
}

// widthOf returns how many characters a line may have: as COLUMNS says, else as the terminal does.
func widthOf(w io.Writer) int {
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		return n
	}
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return n
		}
	}
	return defaultWidth
}

// begin says what is to come.
func (p *drillPrinter) begin(dir string) {
	if !p.json {
		p.wrapped("", "", "acproxy drill: this binary as a server on a scratch store, in situations that nobody wants, everything under "+dir)
	}
}

func (p *drillPrinter) scenario(r rehearsal) {
	if !p.json {
		p.printf("\n%s\n", strings.Repeat("─", p.width))
		p.wrapped(r.Scenario+"  ", strings.Repeat(" ", len(r.Scenario)+2), r.Title)
		p.printf("\n")
	}
}

// mark stands before what is held against a promise.
func (e event) mark() string {
	switch {
	case e.OK == nil:
		return " "
	case *e.OK:
		return "✓"
	}
	return "✗"
}

// event prints one thing that was done or seen.
func (p *drillPrinter) event(e event) {
	if p.json {
		return
	}
	head := "  " + e.mark() + " "
	switch {
	case e.Did != "":
		p.printf("\n")
		p.wrapped("  ", "  ", e.Did)
		p.printf("\n")
	case e.Answer != nil:
		p.answer(head, e.Answer)
	case e.Command != nil:
		p.printf("%s$ %s\n", head, e.Command.Command)
		p.output(e.Command.Output)
	case e.Log != nil:
		p.printf("%sthe log says\n", head)
		for _, line := range e.Log {
			p.wrapped("      ", "          ", withoutTime(line))
		}
	case e.Metrics != nil:
		p.printf("    metrics that moved\n")
		for _, c := range e.Metrics {
			p.wrapped("      ", "          ", c.Metric+"  "+orDash(c.Before)+" → "+c.After)
		}
	case e.Alert != nil:
		after := "at the next evaluation"
		if e.Alert.After != "" {
			after = "when it has lasted for " + e.Alert.After
		}
		p.wrapped(head, "      ", fmt.Sprintf("the alert %s (%s) fires %s", e.Alert.Name, e.Alert.Severity, after))
	case e.Promise != "":
		p.wrapped(head, "      ", e.Promise)
	}
	for _, w := range e.Wrong {
		p.wrapped("      ✗ ", "        ", "BROKEN PROMISE: "+w)
	}
}

// answer prints what a node got.
func (p *drillPrinter) answer(head string, a *drillAnswer) {
	got := strconv.Itoa(a.Status)
	if a.Status == 0 {
		got = "no answer"
	}
	got = joinNonEmpty("  ", got, a.Problem, strings.TrimPrefix(a.CacheStatus, "acproxy; "))
	if a.RetryAfter != "" {
		got += "  Retry-After: " + a.RetryAfter
	}
	p.printf("%s%-38s  %s\n", head, a.Image, got)
	if a.Detail != "" {
		p.wrapped("      ", "      ", a.Detail)
	}
}

// padding is what stands between the columns of a table.
var padding = regexp.MustCompile(` {3,}`)

// output prints what a command has printed. A table that is too wide loses its columns, not its cells.
func (p *drillPrinter) output(text string) {
	lines := strings.Split(text, "\n")
	wide := slices.ContainsFunc(lines, func(line string) bool { return utf8.RuneCountInString(line)+6 > p.width })
	for _, line := range lines {
		indent := line[:len(line)-len(strings.TrimLeft(line, " "))]
		if line = line[len(indent):]; wide {
			line = padding.ReplaceAllString(line, "  ")
		}
		if line != "" {
			p.wrapped("      "+indent, "          "+indent, line)
		}
	}
}

// over ends a scenario.
func (p *drillPrinter) over(r rehearsal) {
	p.all = append(p.all, r)
	if p.json {
		if p.err == nil {
			p.err = json.NewEncoder(p.w).Encode(r)
		}
		return
	}
	p.printf("\n  %s, in %.1fs\n", r.result(), r.Seconds)
}

// result says in a line what came of it.
func (r rehearsal) result() string {
	if r.OK {
		return "as promised: " + strconv.Itoa(r.Promises) + " of " + strconv.Itoa(r.Promises)
	}
	return fmt.Sprintf("NOT AS PROMISED: %d of %d promises are broken", r.Broken, r.Promises)
}

// end sums up.
func (p *drillPrinter) end() {
	if p.json {
		return
	}
	p.printf("\n%s\n", strings.Repeat("─", p.width))
	took := 0.0
	for _, r := range p.all {
		ok := r.OK
		p.printf("%s %-16s %5.1fs  %s\n", event{OK: &ok}.mark(), r.Scenario, r.Seconds, r.result())
		took += r.Seconds
	}
	p.printf("%s in %.1fs\n", count(len(p.all), "scenario"), took)
}

// wrapped prints text in lines that fit: the first after one string, the others after another.
func (p *drillPrinter) wrapped(first, others, text string) {
	line, empty := first, true
	for word := range strings.SplitSeq(text, " ") {
		if !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > p.width {
			p.printf("%s\n", strings.TrimRight(line, " "))
			line, empty = others, true
			if word == "" {
				continue
			}
		}
		if !empty {
			line += " "
		}
		line += word
		empty = false
	}
	p.printf("%s\n", strings.TrimRight(line, " "))
}

// withoutTime leaves out of a line of the log when it was written, which is now.
func withoutTime(line string) string {
	if _, rest, ok := strings.Cut(line, " "); ok && strings.HasPrefix(line, "time=") {
		return rest
	}
	return line
}

func orDash(s string) string {
	if s == "" {
		return "–"
	}
	return s
}
