package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
)

// coldBenchmarks measure the bringing of what nobody holds.
func coldBenchmarks(o options) []benchmark {
	all := []benchmark{
		{
			name: "cold/limited", what: fmt.Sprintf("an image of %s that isn't held, from a publisher that gives %d bytes a second to each", inBytes(o.size), o.rate),
			groups:  []string{groupPeers, groupVerify},
			metrics: []metric{lastByte, firstByte, cpuSeconds, memory},
			goals: []goal{
				{of: acproxyName, metric: lastByte.name, than: directName, by: 1.02},
				{of: acproxyName, metric: firstByte.name, than: directName, by: 1, plus: 10},
			},
			setUp: func(_ context.Context, o options) (stage, error) {
				return setUpCold(o, arriving{size: o.size, rate: o.rate, clients: 1, again: true})
			},
		},
		{
			name: "cold/unlimited", what: fmt.Sprintf("an image of %s that isn't held, from a publisher without a limit", inBytes(o.size)), groups: []string{groupPeers},
			metrics: []metric{lastByte, firstByte, cpuSeconds, memory},
			goals:   []goal{{of: acproxyName, metric: lastByte.name, than: nginxCache, by: 1}},
			setUp: func(_ context.Context, o options) (stage, error) {
				return setUpCold(o, arriving{size: o.size, clients: 1, again: true})
			},
		},
	}
	for _, n := range o.herds {
		all = append(all, benchmark{
			name: fmt.Sprintf("herd/%d", n), what: fmt.Sprintf("%d clients at once ask for an image of %s that isn't held", n, inBytes(o.herd)), groups: []string{groupPeers},
			metrics: []metric{lastByte, firstByte, firstRead, fetches, memory, cpuSeconds, clientSeconds},
			goals: []goal{
				{of: acproxyName, metric: fetches.name, plus: 1},
				{of: acproxyName, metric: lastByte.name, than: nginxCache, by: 1},
				{of: acproxyName, metric: firstByte.name, plus: 20},
				{of: acproxyName, metric: memory.name, plus: 64},
			},
			setUp: func(_ context.Context, o options) (stage, error) {
				return setUpCold(o, arriving{size: o.herd, clients: n})
			},
		})
	}
	n := slices.Min(o.herds)
	all = append(all, benchmark{
		name:    fmt.Sprintf("crawl/%d", n),
		what:    fmt.Sprintf("%d clients at once ask for an image of %s that isn't held, and as many that read 1 KB a second", n, inBytes(o.herd)),
		groups:  []string{groupPeers},
		metrics: []metric{lastByte, fetches, memory},
		goals: []goal{
			{of: acproxyName, metric: fetches.name, plus: 1},
			{of: acproxyName, metric: lastByte.name, than: acproxyAlone, by: 1.1},
		},
		setUp: func(_ context.Context, o options) (stage, error) {
			return setUpCold(o, arriving{size: o.herd, clients: n, crawling: n})
		},
	})
	return append(all, benchmark{
		name: fmt.Sprintf("slow/%d", o.waiting),
		what: fmt.Sprintf("%d clients at once ask for an image of %s that isn't held, from a publisher that gives %d bytes a second in all; direct is one alone",
			o.waiting, inBytes(o.slow), o.trickle),
		groups: []string{groupPeers}, metrics: []metric{lastByte, firstByte, fetches},
		goals: []goal{{of: acproxyName, metric: lastByte.name, than: directName, by: 1.02}},
		setUp: func(_ context.Context, o options) (stage, error) {
			return setUpCold(o, arriving{size: o.slow, rate: o.trickle, total: true, clients: o.waiting})
		},
	})
}

// arriving is what is asked of those who don't hold an image.
type arriving struct {
	size    int64 // of the image
	rate    int64 // bytes a second of the publisher, 0 for no limit
	total   bool  // the rate is for all connections together
	clients int
	again   bool // check what is held afterwards by its SHA-256

	crawling int // so many more read slowly
}

// acproxyAlone is acproxy without those who read slowly.
const acproxyAlone = "acproxy, nobody crawls"

// setUpCold has everybody who can take part bring an image that they don't hold. For each run the contestant and the publisher are started anew,
// with nothing in their caches.
func setUpCold(o options, a arriving) (stage, error) {
	im, err := o.ground.image(a.size)
	if err != nil {
		return stage{}, err
	}
	o.profileFor = profileCold
	s := stage{close: func() error { return nil }}
	s.contestants = append(s.contestants, contestant{directName, func(ctx context.Context) (measures, error) {
		alone := a
		if a.total {
			alone.clients = 1
		}
		return cold(ctx, o, alone, im, peer{name: directName}, "")
	}})
	for _, p := range peers() {
		if !p.cold || !o.wants(p.name) {
			continue
		}
		if program, ok := p.locate(context.Background(), o); ok {
			s.contestants = append(s.contestants, contestant{p.name, func(ctx context.Context) (measures, error) { return cold(ctx, o, a, im, p, program) }})
			if a.crawling > 0 && p.name == acproxyName {
				alone := a
				alone.crawling = 0
				s.contestants = append(s.contestants, contestant{acproxyAlone, func(ctx context.Context) (measures, error) { return cold(ctx, o, alone, im, p, program) }})
			}
		}
	}
	return s, nil
}

// profileCold is for how many seconds the bringing of a cold image is profiled: nobody knows before how long it takes.
const profileCold = 15

// acquaintance is the size of an image that everybody has served when another one is asked for: it is that one which is cold, not the server.
const acquaintance = 64 << 10

// cold starts a peer, or none for direct downloads, and has the clients ask at once.
func cold(ctx context.Context, o options, a arriving, im *image, p peer, program string) (m measures, err error) {
	dir, err := os.MkdirTemp(o.dir, "cold-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	other, err := o.ground.image(acquaintance)
	if err != nil {
		return nil, err
	}
	upstream, err := o.ground.startPublisher(ctx, dir, a.rate, a.total, im, other)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, upstream.stop()) }()
	t := upstream.target
	if p.start != nil {
		if t, err = p.start(ctx, place{o.ground, dir, upstream.plain}, program); err != nil {
			return nil, fmt.Errorf("starting %s: %w", p.name, err)
		}
		defer func() { err = errors.Join(err, t.stop()) }()
		if err := prime(ctx, t, other); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	l := t.ask(im, whole)
	l.Connections, l.Crawling = a.clients, a.crawling
	before := t.ask(other, whole)
	l.Before = &before
	// Every byte that comes is checked, by a sum that costs the clients next to nothing.
	l.Want.CRC = im.crc
	got, m, err := o.cost(ctx, t, func(ctx context.Context, begin func() error) (loaded, error) { return ask(ctx, l, begin) })
	if err != nil {
		return nil, err
	}
	count, err := upstream.fetched(im)
	if err != nil {
		return nil, err
	}
	slices.Sort(got.FirstByte)
	slices.Sort(got.FirstRead)
	m[firstByte.name], m[firstRead.name] = got.FirstByte[len(got.FirstByte)/2]*1e3, got.FirstRead[len(got.FirstRead)/2]*1e3
	m[lastByte.name], m[fetches.name] = slices.Max(got.LastByte), float64(count)
	if a.again && p.start != nil {
		l.Want.CRC, l.Want.SHA256 = "", im.sha256
		if _, err := ask(ctx, l, nil); err != nil {
			return nil, fmt.Errorf("asking for what was fetched: %w", err)
		}
	}
	return m, nil
}
