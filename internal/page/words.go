package page

import (
	"fmt"
	"html/template"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/warm"
	"github.com/acproxy/acproxy/internal/web"
)

// functions are what templates may call.
func (p *Page) functions() template.FuncMap {
	return template.FuncMap{
		"bytes":  bytesText,
		"ref":    func(rec cache.Record) template.HTML { return breakable(refText(rec)) },
		"wrap":   func(v any) template.HTML { return breakable(fmt.Sprint(v)) },
		"labels": labelsText,
		"ago":    func(t time.Time) string { return ago(p.now(), t) },
		"iso":    func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"date":   func(t time.Time) string { return t.UTC().Format(time.DateOnly) },
		"clock":  func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
		"took":   func(d time.Duration) string { return d.Round(100 * time.Microsecond).String() },
		"seconds": func(s float64) string {
			return time.Duration(s * float64(time.Second)).Round(100 * time.Microsecond).String()
		},
		"percent": percent,
		"state":   stateOf,
		"job":     jobText,
		"jobDone": func(j warm.Job) int { return j.Held + j.Fetched + j.Would + j.Failed },
		"breaker": breakerText,
		"has":     slices.Contains[[]string],
		"kind":    kindOf,
		"saved":   func(served, fetched int64) int64 { return max(0, served-fetched) },
		"since":   func(t time.Time) string { return p.now().Sub(t).Round(time.Second).String() },
		"nested":  func(depth int) string { return strings.Repeat("· ", depth) },
		"count":   func(n any, one, many string) string { return count(reflect.ValueOf(n).Int(), one, many) },
	}
}

// breakable escapes a text and lets browsers break it after what separates the parts of a name: in no other place is it as easy to read.
func breakable(text string) template.HTML {
	var b strings.Builder
	for part := range strings.SplitAfterSeq(text, "") {
		b.WriteString(template.HTMLEscapeString(part))
		if strings.ContainsAny(part, "/:,") {
			b.WriteString("<wbr>")
		}
	}
	return template.HTML(b.String())
}

// count writes a number of things.
func count(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// bytesText writes a number of bytes with three digits or so, in binary units.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), -1
	for value >= 1000 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	if value >= 100 || value == float64(int64(value)) {
		return fmt.Sprintf("%.0f %ciB", value, units[unit])
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}

// percent writes a part of a whole, "–" of nothing.
func percent(part, whole int64) string {
	if whole <= 0 {
		return "–"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(part)/float64(whole))
}

func labelsText(labels map[string]string) string {
	var out []string
	for _, label := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, label+"="+labels[label])
	}
	return strings.Join(out, ",")
}

// state says how an image is: in a word for its colour, and in words for people.
type state struct{ Class, Text string }

func stateOf(rec cache.Record) state {
	switch {
	case rec.Lost():
		return state{"bad", "lost"}
	case rec.Quarantined():
		return state{"bad", "quarantined"}
	case !rec.Inspected:
		return state{"new", "being inspected"}
	case rec.RktWarning != "":
		return state{"warn", "not for rkt"}
	}
	return state{"good", "ok"}
}

// jobText says how far a list has come.
func jobText(j warm.Job) state {
	switch {
	case !j.Finished():
		return state{"new", j.State}
	case j.State == warm.Cancelled:
		return state{"warn", j.State}
	case !j.Good():
		return state{"bad", "not all there"}
	case j.DryRun:
		return state{"good", "could be had"}
	}
	return state{"good", "all there"}
}

// kindOf says how good or bad a kind of event is, in a word for its colour.
func kindOf(event string) string {
	switch event {
	case "accepted", "restored", "publisher-up":
		return "good"
	case "refused", "quarantined", "damaged", "publisher-down", "reload-failed":
		return "bad"
	case "evicted", "deleted", "passed":
		return "warn"
	}
	return "new"
}

// breakerText says how things are with a host.
func breakerText(h web.HostState) []state {
	var out []state
	if !h.RestingUntil.IsZero() {
		out = append(out, state{"warn", "left alone until " + h.RestingUntil.UTC().Format(time.TimeOnly) + ", as it wants: it answered " + h.RestingWhy})
	}
	for _, b := range h.Breakers {
		of := ""
		if b.Prefix != "" {
			of = "for " + b.Prefix + ": "
		}
		switch b.State {
		case web.BreakerOpen:
			out = append(out, state{"bad", of + "down since " + b.Since.UTC().Format(time.TimeOnly) + ", asked again at " + b.Until.UTC().Format(time.TimeOnly) + ": " + b.LastError})
		case web.BreakerHalfOpen:
			out = append(out, state{"bad", of + "down since " + b.Since.UTC().Format(time.TimeOnly) + ", the next request finds out whether it is back: " + b.LastError})
		default:
			out = append(out, state{"warn", fmt.Sprintf("%s%s in a row: %s", of, count(int64(b.Failures), "failure", "failures"), b.LastError)})
		}
	}
	if len(out) == 0 {
		out = append(out, state{"good", "ok"})
	}
	return out
}
