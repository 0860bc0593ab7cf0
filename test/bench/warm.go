package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// zotToNginx is how many small pages zot 0.22 served for each of nginx's from a file, measured once on a quiet machine: Debian has no zot to
// measure beside.
const zotToNginx = 0.22

// What the benchmarks of servers measure.
var (
	requestRate = metric{"requests", "/s", true}
	p99         = metric{"99 % within", "ms", false}
	perRequest  = metric{"CPU of the server", "µs each", false}
	byClients   = metric{"of the clients", "µs each", false}

	throughput = metric{"throughput", "MB/s", true}
	perGB      = metric{"CPU of the server", "s/GB", false}
	clientGB   = metric{"of the clients", "s/GB", false}

	firstByte     = metric{"first byte", "ms", false} // of the body, until it has come to the client's socket; the median of the clients
	firstRead     = metric{"read", "ms", false}       // until the client has had its turn to read it, which is the same but for what the clients' own machine makes of it
	lastByte      = metric{"last byte", "s", false}   // of the last client
	fetches       = metric{"fetched", "times", false}
	memory        = metric{"memory", "MB", false} // the most, of what stands for no file
	cpuSeconds    = metric{"CPU of the server", "s", false}
	clientSeconds = metric{"of the clients", "s", false}
)

// warmBenchmarks measure the serving of what is held.
func warmBenchmarks(o options) []benchmark {
	var all []benchmark
	small := []struct {
		name, what string
		goals      []goal
		ask        func(*target, *image) (load, error)
	}{
		{"page", "a discovery page of 1 KiB (acproxy: its own)", []goal{
			{of: acproxyName, metric: requestRate.name, than: nginxCache, by: 0.9},
			{of: acproxyName, metric: requestRate.name, than: nginxStatic, by: 3 * zotToNginx, why: "stands for 3 × zot"},
		}, func(t *target, im *image) (load, error) { return t.ask(im, page), nil }},
		{"signature", "a signature of 500 bytes", []goal{
			{of: acproxyName, metric: requestRate.name, than: nginxCache, by: 0.9},
			{of: acproxyName, metric: requestRate.name, than: nginxStatic, by: 3 * zotToNginx, why: "stands for 3 × zot"},
		}, func(t *target, im *image) (load, error) { return t.ask(im, signature), nil }},
		{"not-modified", "304 for an image that the client has", []goal{
			{of: acproxyName, metric: requestRate.name, than: nginxCache, by: 0.8},
		}, notModified},
		{"range", "1 KiB out of the small image", nil, func(t *target, im *image) (load, error) {
			l := t.ask(im, whole)
			from := im.size / 2
			l.Header["Range"] = fmt.Sprintf("bytes=%d-%d", from, from+1023)
			l.Want = answer{Status: http.StatusPartialContent, Size: 1024}
			return l, nil
		}},
	}
	for _, s := range small {
		for _, n := range o.connections {
			all = append(all, benchmark{
				name: fmt.Sprintf("%s/%d", s.name, n), what: fmt.Sprintf("%s, held, %d connections", s.what, n), groups: []string{groupPeers},
				metrics: []metric{requestRate, p99, perRequest, byClients}, goals: s.goals,
				setUp: func(ctx context.Context, o options) (stage, error) {
					return setUpWarm(ctx, o, holding{size: o.small, ask: func(t *target, im *image) (load, error) {
						l, err := s.ask(t, im)
						l.Connections = n
						return l, err
					}})
				},
			})
		}
	}
	for _, secure := range []bool{false, true} {
		for _, size := range []int64{o.small, o.size} {
			for _, n := range o.clients {
				all = append(all, imageBenchmark(secure, size, n))
			}
		}
	}
	return all
}

// imageBenchmark is the download of a held image by some clients. One client alone has no goal.
func imageBenchmark(secure bool, size int64, clients int) benchmark {
	scheme := "http"
	if secure {
		scheme = "https"
	}
	b := benchmark{
		name: fmt.Sprintf("image/%s/%s/%d", scheme, inBytes(size), clients), what: fmt.Sprintf("an image of %s, held, over %s, %d clients", inBytes(size), scheme, clients),
		groups: []string{groupPeers}, metrics: []metric{throughput, perGB, clientGB},
		setUp: func(ctx context.Context, o options) (stage, error) {
			return setUpWarm(ctx, o, holding{size: size, bulk: true, secure: secure, ask: func(t *target, im *image) (load, error) {
				l := t.ask(im, whole)
				l.Connections = clients
				if secure {
					l.URL = "https://" + t.secure + strings.TrimPrefix(l.URL, "http://"+t.plain)
					l.CA = o.ground.cert
				}
				return l, nil
			}})
		},
	}
	switch {
	case clients == 1:
	case secure:
		b.goals = []goal{{of: acproxyName, metric: throughput.name, than: nginxCache, by: 0.9}}
	default:
		b.goals = []goal{
			{of: acproxyName, metric: throughput.name, than: nginxCache, by: 1},
			{of: acproxyName, metric: perGB.name, than: nginxCache, by: 1},
		}
	}
	return b
}

// inBytes writes a size in whole units.
func inBytes(n int64) string {
	for _, unit := range []struct {
		size int64
		name string
	}{{1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= unit.size && n%unit.size == 0 {
			return fmt.Sprintf("%d%s", n/unit.size, unit.name)
		}
	}
	return fmt.Sprintf("%dB", n)
}

// notModified asks for an image with the ETag that the target gave it.
func notModified(t *target, im *image) (load, error) {
	l := t.ask(im, whole)
	header, err := head(l)
	if err != nil {
		return load{}, err
	}
	etag := header.Get("ETag")
	if etag == "" {
		return load{}, fmt.Errorf("%s has no ETag", l.URL)
	}
	l.Header["If-None-Match"] = etag
	l.Want = answer{Status: http.StatusNotModified}
	return l, nil
}

// head returns the header of what a load asks for.
func head(l load) (http.Header, error) {
	req, err := http.NewRequest(http.MethodHead, l.URL, nil)
	if err != nil {
		return nil, err
	}
	for name, value := range l.Header {
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s to HEAD", l.URL, resp.Status)
	}
	return resp.Header, nil
}

// holding is what is asked of those who hold an image.
type holding struct {
	size   int64 // of the image
	bulk   bool  // bytes count, not answers
	secure bool  // over https
	ask    func(*target, *image) (load, error)
}

// setUpWarm starts everybody who can take part, has each of them hold an image, and measures what a load does to each.
func setUpWarm(ctx context.Context, o options, h holding) (s stage, err error) {
	im, err := o.ground.image(h.size)
	if err != nil {
		return stage{}, err
	}
	dir, err := os.MkdirTemp(o.dir, "warm-")
	if err != nil {
		return stage{}, err
	}
	var started []*target
	s.close = func() error {
		var errs []error
		for _, t := range slices.Backward(started) {
			errs = append(errs, t.stop())
		}
		return errors.Join(append(errs, os.RemoveAll(dir))...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	upstream, err := o.ground.startPublisher(ctx, dir, 0, false, im)
	if err != nil {
		return s, err
	}
	started = append(started, upstream.target)
	for i, p := range peers() {
		if !p.warm || h.secure && !p.secure || !o.wants(p.name) {
			continue
		}
		program, ok := p.locate(ctx, o)
		if !ok {
			continue
		}
		own := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(own, 0o755); err != nil {
			return s, err
		}
		t, err := p.start(ctx, place{o.ground, own, upstream.plain}, program)
		if err != nil {
			return s, fmt.Errorf("starting %s: %w", p.name, err)
		}
		started = append(started, t)
		if err := prime(ctx, t, im); err != nil {
			return s, fmt.Errorf("%s: %w", p.name, err)
		}
		l, err := h.ask(t, im)
		if err != nil {
			return s, fmt.Errorf("%s: %w", p.name, err)
		}
		if l.Want.Size < 0 {
			// Whatever it is, it stays that.
			got, err := ask(ctx, l, nil)
			if err != nil {
				return s, err
			}
			l.Want.Size = got.Bytes / int64(l.Connections)
		}
		l.Seconds = o.seconds
		s.contestants = append(s.contestants, contestant{t.name, func(ctx context.Context) (measures, error) { return warm(ctx, o, h, t, l) }})
	}
	if h.secure {
		o.note("over https only nginx and acproxy take part")
	}
	o.note("zot is not in Debian: where its ratio counts, the one measured once stands for it, %.2f × nginx static", zotToNginx)
	return s, nil
}

// prime has a target hold everything of an image, and checks the image.
func prime(ctx context.Context, t *target, im *image) error {
	for _, o := range []object{page, signature, whole} {
		l := t.ask(im, o)
		if o == whole {
			l.Want.SHA256 = im.sha256
		}
		if _, err := ask(ctx, l, nil); err != nil {
			return err
		}
	}
	if t.admin == "" {
		return nil
	}
	// The rest of the tar is read behind, which isn't what is to be measured. The image ID tells that it is over.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		header, err := head(t.ask(im, whole))
		if err != nil || header.Get("X-Appc-Image-Id") != "" {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the image's inspection: %w", ctx.Err())
		}
	}
}

// warm has clients ask for a while and counts.
func warm(ctx context.Context, o options, h holding, t *target, l load) (measures, error) {
	ask := ask
	if o.wrk && !h.bulk {
		if wrk, err := installed(ctx, o, "wrk", "wrk"); err != nil {
			o.note("our own clients ask for small answers, which costs more than wrk does: %v", err)
		} else {
			ask = func(ctx context.Context, l load, begin func() error) (loaded, error) {
				if err := begin(); err != nil {
					return loaded{}, err
				}
				return askWithWrk(ctx, wrk, o.dir, l)
			}
		}
	}
	got, m, err := o.cost(ctx, t, func(ctx context.Context, begin func() error) (loaded, error) { return ask(ctx, l, begin) })
	switch {
	case err != nil:
		return nil, err
	case h.bulk && got.Bytes == 0 || !h.bulk && got.Requests == 0:
		return nil, fmt.Errorf("nothing was answered within %g s", l.Seconds)
	case h.bulk:
		gb := float64(got.Bytes) / 1e9
		m[throughput.name], m[perGB.name], m[clientGB.name] = gb*1e3/got.Seconds, m[cpuSeconds.name]/gb, m[clientSeconds.name]/gb
	default:
		million := float64(got.Requests) / 1e6
		m[requestRate.name], m[p99.name] = float64(got.Requests)/got.Seconds, got.P99*1e3
		m[perRequest.name], m[byClients.name] = m[cpuSeconds.name]/million, m[clientSeconds.name]/million
	}
	return m, nil
}

// cost runs a load and counts what it costs its target. ask calls begin when it begins with what counts.
func (o options) cost(ctx context.Context, t *target, ask func(ctx context.Context, begin func() error) (loaded, error)) (loaded, measures, error) {
	var before, put float64
	profiled, peak := func() error { return nil }, func() int64 { return 0 }
	got, err := ask(ctx, func() (err error) {
		// Nobody else's packets are about: one contestant runs at a time.
		put = deferred()
		if o.profile != "" && t.admin != "" {
			profiled = o.startProfile(ctx, t)
		}
		if before, err = t.cpu(); err != nil {
			return err
		}
		stop, err := t.watchMemory()
		if err == nil {
			peak = stop
		}
		return err
	})
	most := peak()
	if err := errors.Join(err, profiled()); err != nil {
		return loaded{}, nil, err
	}
	after, err := t.cpu()
	after += deferred() - put
	return got, measures{cpuSeconds.name: after - before, clientSeconds.name: got.CPU, memory.name: float64(most) / 1e6}, err
}

// startProfile profiles a target for as long as a load takes. The returned function waits for the end.
func (o options) startProfile(ctx context.Context, t *target) (wait func() error) {
	done := make(chan error, 1)
	// Ends with the profile; wait waits for it.
	go func() {
		err := os.MkdirAll(o.profile, 0o755)
		if err == nil {
			err = t.saveProfile(ctx, filepath.Join(o.profile, strings.ReplaceAll(o.benchmark, "/", "-")+".pprof"), max(1, int(o.seconds+0.5), o.profileFor))
		}
		done <- err
	}()
	return func() error { return <-done }
}
