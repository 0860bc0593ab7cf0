package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
)

// Measures of the chart, in pixels. It has two columns of panels; in a panel, one bar for each contestant.
const (
	chartColumns = 2
	panelWidth   = 520
	barsLeft     = 190 // names stand before the bars
	barsWidth    = 230 // figures stand after them
	lineHeight   = 15
	barHeight    = 9
	panelTop     = 34
	panelGap     = 22
	chartTop     = 96
	chartMargin  = 16

	// octaves is how many doublings the bars reach to either side of the peer. What is further away is cut.
	octaves = 3
)

// panel is one metric of one benchmark that has goals.
type panel struct {
	title    string
	more     bool
	base     float64 // what the bars are relative to
	baseName string
	results  []result
	goals    []verdict
}

// panels returns what there is to draw: what each goal names, once.
func (r report) panels() []panel {
	var all []panel
	for _, v := range r.Goals {
		title := v.Benchmark + ": " + v.Metric + ", " + v.Unit
		if i := slices.IndexFunc(all, func(p panel) bool { return p.title == title }); i >= 0 {
			all[i].goals = append(all[i].goals, v)
			continue
		}
		p := panel{title: title, more: v.More, base: v.Wanted, baseName: "the goal", goals: []verdict{v}}
		for _, res := range r.Results {
			if res.Benchmark == v.Benchmark && res.Metric == v.Metric {
				p.results = append(p.results, res)
				if res.Contestant == v.Than && res.Median > 0 {
					p.base, p.baseName = res.Median, v.Than
				}
			}
		}
		all = append(all, p)
	}
	return all
}

func (p panel) height() int { return panelTop + lineHeight*len(p.results) + panelGap }

// place returns how far from the left a value is drawn, so that what is better is further to the right.
func (p panel) place(v float64) float64 {
	ratio := p.base / v
	if p.more {
		ratio = v / p.base
	}
	doublings := min(max(math.Log2(ratio), -octaves), octaves)
	return barsLeft + barsWidth/2*(1+doublings/octaves)
}

// chartStyle has no variables, which not every program that shows SVG knows.
const chartStyle = `<style>
text { font: 11px system-ui, sans-serif; fill: #1d2430 } .faint { fill: #6a7280 }
.title { font-weight: 600; font-size: 12px } .head { font-weight: 600; font-size: 16px } .end { text-anchor: end } .middle { text-anchor: middle }
.paper { fill: #ffffff } .peer { fill: #9aa5b4 } .good { fill: #2e8b57 } .bad { fill: #c2553d }
.one { stroke: #c9ced6; stroke-width: 1 } .goal { stroke: #7a3fb0; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e8ee } .faint { fill: #98a1ae }
  .paper { fill: #14181d } .peer { fill: #6d7887 } .good { fill: #4dba7f } .bad { fill: #e07a62 }
  .one { stroke: #3c4450 } .goal { stroke: #c59af0 }
}
</style>
`

// chart draws what became of the goals: how each contestant compares with the peer that a goal names.
func chart(r report) []byte {
	panels := r.panels()
	var heights [chartColumns]int
	at := make([][2]int, len(panels))
	for i, p := range panels {
		column := 0
		for c := range heights {
			if heights[c] < heights[column] {
				column = c
			}
		}
		at[i] = [2]int{chartMargin + column*panelWidth, chartTop + heights[column]}
		heights[column] += p.height()
	}
	width, height := 2*chartMargin+chartColumns*panelWidth, chartTop+slices.Max(heights[:])+chartMargin
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="acproxy beside its peers">`+"\n", width, height, width, height)
	b.WriteString(chartStyle)
	fmt.Fprintf(&b, `<rect class="paper" width="%d" height="%d"/>`+"\n", width, height)
	write := func(x, y float64, class, text string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" class="%s">%s</text>`+"\n", x, y, class, html.EscapeString(text))
	}
	write(chartMargin, 26, "head", "acproxy beside its peers")
	write(chartMargin, 46, "faint", r.Command)
	write(chartMargin, 62, "faint", fmt.Sprintf("Medians. A bar reaches from the peer that the goal names to the contestant, to the right if it is better; each side is %d doublings wide.", octaves))
	write(chartMargin, 78, "faint", "The upright line is the goal; acproxy's bar is green where it is reached.")
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)">`+"\n", at[i][0], at[i][1])
		p.draw(&b, write)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func (p panel) draw(b *bytes.Buffer, write func(x, y float64, class, text string)) {
	write(0, 12, "title", p.title)
	one, bottom := p.place(p.base), float64(panelTop+lineHeight*len(p.results))
	write(one, panelTop-6, "faint middle", p.baseName)
	fmt.Fprintf(b, `<line class="one" x1="%.1f" y1="%d" x2="%.1f" y2="%.1f"/>`+"\n", one, panelTop-2, one, bottom)
	reached := true
	for _, g := range p.goals {
		x := p.place(g.Wanted)
		fmt.Fprintf(b, `<line class="goal" x1="%.1f" y1="%d" x2="%.1f" y2="%.1f"><title>%s</title></line>`+"\n", x, panelTop-2, x, bottom, html.EscapeString(g.Goal))
		reached = reached && g.Reached
	}
	for i, r := range p.results {
		y := float64(panelTop + lineHeight*i)
		text := y + barHeight
		write(barsLeft-8, text, "end", r.Contestant)
		write(barsLeft+barsWidth+8, text, "faint", fmt.Sprintf("%.2f × (%s %s)", r.Median/p.base, figure(r.Median), r.Unit))
		if r.Median <= 0 {
			continue
		}
		class := "peer"
		if r.Contestant == p.goals[0].Of {
			class = map[bool]string{true: "good", false: "bad"}[reached]
		}
		x := p.place(r.Median)
		fmt.Fprintf(b, `<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%d"/>`+"\n", class, min(x, one), y, max(math.Abs(x-one), 1), barHeight)
	}
}
