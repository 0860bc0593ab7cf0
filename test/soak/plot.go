package main

import (
	"fmt"
	"html"
	"strings"
	"time"
)

const (
	plotWidth  = 960
	panel      = 150
	plotMargin = 60
)

// plot draws what was seen over time: memory, descriptors and the store, with what was done as marks above.
func plot(samples []sample, maxSize int64, began time.Time) string {
	var b strings.Builder
	height := 3*(panel+50) + plotMargin
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="system-ui, sans-serif" font-size="12">`+"\n", plotWidth, height)
	b.WriteString(`<style>
.a { fill: none; stroke: #2563eb; stroke-width: 1.5 } .l { stroke: #dc2626; stroke-dasharray: 4 3 } .x { stroke: #8888 } .m { stroke: #8886 }
text { fill: #222 } rect.bg { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } rect.bg { fill: #111 } .a { stroke: #60a5fa } }
</style>
`)
	fmt.Fprintf(&b, `<rect class="bg" width="%d" height="%d"/>`+"\n", plotWidth, height)
	if len(samples) == 0 {
		return b.String() + "</svg>\n"
	}
	total := max(samples[len(samples)-1].at.Sub(began).Seconds(), 1)
	x := func(at time.Time) float64 {
		return plotMargin + at.Sub(began).Seconds()/total*(plotWidth-2*plotMargin)
	}
	panels := []struct {
		title string
		value func(sample) float64
		limit float64
	}{
		{"memory (RssAnon), MB", func(s sample) float64 { return float64(s.anon) / 1e6 }, 0},
		{"descriptors", func(s sample) float64 { return float64(s.descriptors) }, 0},
		{"store, MB; its quota in red", func(s sample) float64 { return float64(s.cache) / 1e6 }, float64(maxSize) / 1e6},
	}
	for i, p := range panels {
		top := float64(plotMargin + i*(panel+50))
		most := p.limit
		for _, s := range samples {
			most = max(most, p.value(s))
		}
		most = max(most*1.1, 1)
		y := func(v float64) float64 { return top + panel - v/most*panel }
		fmt.Fprintf(&b, `<text x="%d" y="%.0f">%s</text>`+"\n", plotMargin, top-8, html.EscapeString(p.title))
		fmt.Fprintf(&b, `<line class="x" x1="%d" y1="%.0f" x2="%d" y2="%.0f"/>`+"\n", plotMargin, top+panel, plotWidth-plotMargin, top+panel)
		fmt.Fprintf(&b, `<text x="%d" y="%.0f" text-anchor="end">%.0f</text><text x="%d" y="%.0f" text-anchor="end">0</text>`+"\n", plotMargin-6, top+10, most, plotMargin-6, top+panel)
		for _, s := range samples {
			if strings.HasPrefix(s.note, "kill") || strings.HasPrefix(s.note, "stop") {
				fmt.Fprintf(&b, `<line class="m" x1="%.1f" y1="%.0f" x2="%.1f" y2="%.0f"><title>%s</title></line>`+"\n", x(s.at), top, x(s.at), top+panel, html.EscapeString(s.note))
			}
		}
		if p.limit > 0 {
			fmt.Fprintf(&b, `<line class="l" x1="%d" y1="%.1f" x2="%d" y2="%.1f"/>`+"\n", plotMargin, y(p.limit), plotWidth-plotMargin, y(p.limit))
		}
		b.WriteString(`<polyline class="a" points="`)
		for _, s := range samples {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(s.at), y(p.value(s)))
		}
		b.WriteString("\"/>\n")
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%.0f s; gray: the server was killed or stopped</text>`+"\n", plotWidth-plotMargin, height-12, total)
	return b.String() + "</svg>\n"
}
