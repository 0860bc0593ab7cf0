package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/web"
)

// How often it is looked at how things are with publishers, how much was served, and how often that is written down.
const (
	watchEvery = time.Second
	noteEvery  = 10 * time.Second
	saveEvery  = 10 * time.Minute
)

func (p *parts) historyFile() string { return filepath.Join(p.cfg.DataDir, "history.json") }

func (p *parts) missingFile() string { return filepath.Join(p.cfg.DataDir, "missing.json") }

// missed is told of what nodes could not get.
func (p *parts) missed(ref acproxy.Ref, discovery bool, err error) {
	if discovery {
		p.missing.NoteName(ref.Name(), err, time.Now().UTC())
		return
	}
	p.missing.Note(ref, err, time.Now().UTC())
}

// remember takes up what was remembered when the server last ran. What can't be read is no reason not to run.
func (p *parts) remember() {
	before, err := journal.Tail(p.cfg.Audit.File)
	if err != nil {
		p.log.Warn("the events from before this start are not known", "err", err)
	}
	p.journal = journal.New(before)
	if p.history, err = history.Load(p.historyFile()); err != nil {
		p.log.Warn("how much was served before this start is not known", "err", err)
	}
}

// happened tells of something that is not about an image.
func (p *parts) happened(event, detail string) {
	p.journal.Add(fetch.Decision{Time: time.Now().UTC(), Event: event, Detail: detail})
}

// watch tells of publishers that go down and come back, and counts what is served and fetched, until ctx is done.
func (n *running) watch(ctx context.Context, log *slog.Logger) {
	p := n.parts
	p.happened(journal.EventStarted, "acproxy "+buildVersion())
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	down := make(map[string]string) // hosts, with why
	noted, saved := time.Now(), time.Now()
	for {
		select {
		case now := <-ticker.C:
			down = p.tellOfPublishers(down, p.web.Hosts())
			if now.Sub(noted) >= noteEvery {
				noted = now
				p.noteTraffic(now)
			}
			if now.Sub(saved) >= saveEvery {
				saved = now
				p.saveHistory(log)
			}
		case <-ctx.Done():
			p.noteTraffic(time.Now())
			p.saveHistory(log)
			return
		}
	}
}

// tellOfPublishers tells which hosts have gone down or come back, and returns those that are down.
func (p *parts) tellOfPublishers(before map[string]string, hosts []web.HostState) map[string]string {
	down := make(map[string]string)
	for _, h := range hosts {
		for _, b := range h.Breakers {
			if b.State == web.BreakerClosed {
				continue
			}
			which := h.Host
			if b.Prefix != "" {
				which += " for " + b.Prefix
			}
			down[which] = b.LastError
			if _, known := before[which]; !known {
				p.happened(journal.EventPublisherDown, fmt.Sprintf("%s is down, after %s in a row: %s", which, count(b.Failures, "failure"), b.LastError))
			}
		}
	}
	for which := range before {
		if _, still := down[which]; !still {
			p.happened(journal.EventPublisherUp, which+" is not down any more")
		}
	}
	return down
}

func (p *parts) noteTraffic(now time.Time) {
	totals := p.metrics.Totals()
	for _, t := range p.web.Traffic() {
		totals.Fetched += t.Bytes
	}
	p.history.Note(now, totals)
}

func (p *parts) saveHistory(log *slog.Logger) {
	if err := p.history.Save(p.historyFile()); err != nil && !errors.Is(err, syscall.EROFS) {
		log.Warn("how much was served is not kept over a restart", "err", err)
	}
	if err := p.missing.Save(); err != nil && !errors.Is(err, syscall.EROFS) {
		log.Warn("what is missing is not kept over a restart", "err", err)
	}
}
