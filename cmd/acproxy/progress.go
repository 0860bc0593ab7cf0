package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// progress shows how far something has come: as a bar on a terminal, else as a line every now and then. It is for one goroutine.
type progress struct {
	w    io.Writer
	what string

	container *mpb.Progress // nil if there is no terminal
	bar       *mpb.Bar
	last      time.Time
}

// lineEvery is how often there is a line where there is no terminal.
const lineEvery = 10 * time.Second

func newProgress(w io.Writer, what string) *progress {
	p := &progress{w: w, what: what, last: time.Now()}
	if isTerminal(w) {
		p.container = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
		p.bar = p.container.AddBar(0,
			mpb.PrependDecorators(decor.Name(what+"  "), decor.CountersKibiByte("% .1f of % .1f")),
			mpb.AppendDecorators(decor.Percentage(), decor.Name("  "), decor.AverageSpeed(decor.SizeB1024(0), "% .1f"), decor.Name("  "), decor.AverageETA(decor.ET_STYLE_GO)),
		)
	}
	return p
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// set says how many bytes of how many are done.
func (p *progress) set(done, of int64) {
	if p.bar != nil {
		p.bar.SetTotal(max(of, done+1), false) // it would be over otherwise
		p.bar.SetCurrent(done)
		return
	}
	if now := time.Now(); now.Sub(p.last) >= lineEvery {
		p.last = now
		fmt.Fprintf(p.w, "%s: %s of %s\n", p.what, bytesText(done), bytesText(of))
	}
}

// over returns where lines go that belong beside the bar: they would break it otherwise. Where there is none that is w itself.
func (p *progress) over(w io.Writer) io.Writer {
	if p.bar != nil && isTerminal(w) {
		return p.container
	}
	return w
}

// end takes the bar away.
func (p *progress) end() {
	if p.bar != nil {
		p.bar.Abort(true)
		p.container.Wait()
	}
}
