package page

import (
	"fmt"
	"math"
	"time"

	"github.com/acproxy/acproxy/internal/admin"
)

// chart is a picture of bars: two for each point in time, in the units of its viewBox.
type chart struct {
	Width, Height float64
	Left, Bottom  float64 // where the axes are
	Bars          []bar
	Marks         []mark // of the vertical axis
	Times         []mark // of the horizontal one
	Empty         bool
	Summary       string // what it shows, in words
}

type bar struct {
	Class               string
	X, Y, Width, Height float64
	Says                string
}

type mark struct {
	At   float64
	Text string
}

const (
	chartWidth  = 720.0
	chartHeight = 200.0
	chartLeft   = 64.0
	chartBottom = 170.0
	chartTop    = 12.0
)

// trafficChart draws what was served and what was fetched.
func trafficChart(t admin.Traffic) chart {
	c := chart{Width: chartWidth, Height: chartHeight, Left: chartLeft, Bottom: chartBottom}
	var most int64
	for _, p := range t.Points {
		most = max(most, p.Served, p.Fetched)
	}
	c.Empty = most == 0
	c.Summary = fmt.Sprintf("In the last %s %s were served and %s fetched from publishers.", t.Range, bytesText(t.Sum.Served), bytesText(t.Sum.Fetched))
	top, step := scale(most)
	if c.Empty {
		top, step = 1, 2 // the line at 0 alone
	}
	for at := int64(0); at <= top; at += step {
		c.Marks = append(c.Marks, mark{chartBottom - (chartBottom-chartTop)*float64(at)/float64(top), bytesText(at)})
	}
	if len(t.Points) == 0 {
		return c
	}
	slot := (chartWidth - chartLeft) / float64(len(t.Points))
	layout := "15:04"
	if t.Range == "week" {
		layout = "Mon 15:04"
	}
	for i, p := range t.Points {
		x := chartLeft + slot*float64(i)
		for j, b := range []struct {
			class, verb string
			n           int64
		}{{"served", "served", p.Served}, {"fetched", "fetched", p.Fetched}} {
			if b.n == 0 {
				continue
			}
			height := math.Max((chartBottom-chartTop)*float64(b.n)/float64(top), 1)
			c.Bars = append(c.Bars, bar{
				Class: b.class, X: round(x + slot*(.08+.42*float64(j))), Y: round(chartBottom - height), Width: round(slot * .42), Height: round(height),
				Says: fmt.Sprintf("%s UTC: %s %s", p.Time.Format(layout), bytesText(b.n), b.verb),
			})
		}
		if len(t.Points) >= 6 && i%(len(t.Points)/6) == 0 {
			c.Times = append(c.Times, mark{round(x), timeMark(p.Time, t.Range)})
		}
	}
	return c
}

func timeMark(t time.Time, of string) string {
	if of == "week" {
		return t.Format("Mon 2 Jan")
	}
	return t.Format("15:04")
}

func round(x float64) float64 { return math.Round(x*100) / 100 }

// scale returns a round number that is no less than most, and the step of the marks up to it: three to six of them. Numbers of bytes are round in binary.
func scale(most int64) (top, step int64) {
	step = 1
	for most > 5*step {
		step *= 2
	}
	return max((most+step-1)/step, 1) * step, step
}
