package fetch

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
)

// A Discovery is what a node may be told about a name.
type Discovery struct {
	Status    Status
	Templates []discovery.Template // the publisher's, in its order
	Trace     acproxy.Trace
	Local     bool   // images of the name are published here
	Prefix    string // with Local: that of all names that are
}

// Discover returns the templates that a name's publisher gives for it. What was learned before is answered at once, and refreshed behind when it
// is old; only a name that nothing is known of waits for its publisher.
func (f *Fetcher) Discover(ctx context.Context, name string) (Discovery, error) {
	d, err := f.discovered(ctx, name)
	if ref, invalid := acproxy.NewRef(name, nil); err != nil && invalid == nil {
		f.missed(ref, true, err)
	}
	return d, err
}

func (f *Fetcher) discovered(ctx context.Context, name string) (Discovery, error) {
	if err := acproxy.CheckName(name); err != nil {
		return Discovery{}, err
	}
	if err := f.allowed(name); err != nil {
		return Discovery{}, err
	}
	policy := f.policy(name)
	if policy.Local {
		return Discovery{Status: Hit, Templates: localTemplates(policy.Prefix), Local: true, Prefix: policy.Prefix}, nil
	}
	offline := policy.Offline
	known, ok := f.cfg.Store.Known(name)
	switch {
	case ok && (offline || f.fresh(known)):
		return Discovery{Status: Hit, Templates: learned(known)}, nil
	case ok:
		f.refreshDiscovery(name)
		return Discovery{Status: Stale, Templates: learned(known)}, nil
	case offline:
		return Discovery{}, &acproxy.Error{Kind: acproxy.ErrOffline, Code: "offline", Detail: "nothing is known of " + name + " here, and this proxy is offline"}
	}
	found, err := f.discover(ctx, name)
	if err != nil {
		return Discovery{}, err
	}
	return Discovery{Status: Miss, Templates: found.Templates, Trace: found.Trace}, nil
}

// fresh reports whether what is known of a name is used without its publisher being asked again. What was learned by other rules is not.
func (f *Fetcher) fresh(known cache.Discovered) bool {
	return cache.Age(f.now(), known.When) < f.jittered(f.cfg.DiscoveryTTL, known.Name, known.When) && known.When.After(f.cfg.Discovery.Since())
}

// learned returns the templates that are known of a name.
func learned(known cache.Discovered) []discovery.Template {
	out := make([]discovery.Template, len(known.Templates))
	for i, t := range known.Templates {
		out[i] = discovery.Template(t)
	}
	return out
}

// kept is the other way round.
func kept(found []discovery.Template) []cache.Template {
	out := make([]cache.Template, len(found))
	for i, t := range found {
		out[i] = cache.Template(t)
	}
	return out
}

// discover asks the publisher and keeps what it says. When it returns, what was said is known.
func (f *Fetcher) discover(ctx context.Context, name string) (discovery.Found, error) {
	began := f.now()
	found, err := f.cfg.Discovery.Templates(ctx, name)
	if err == nil {
		f.learn(name, found, began)
	}
	return found, err
}

// learn keeps what the publisher said about a name. It counts from when that was asked for: the rules may be others since.
func (f *Fetcher) learn(name string, found discovery.Found, began time.Time) {
	if err := f.cfg.Store.Learn(cache.Discovered{Name: name, Page: found.Page, Templates: kept(found.Templates), When: began}); err != nil {
		// The answer is good all the same; only a restart will have to ask again.
		f.log.Error("keeping what discovery found", "name", name, "err", err)
	}
}

// refreshDiscovery asks the publisher about a name behind the answer, once at a time.
func (f *Fetcher) refreshDiscovery(name string) {
	f.mu.Lock()
	busy := f.learning[name] || len(f.learning) >= maxRefreshes
	if !busy {
		f.learning[name] = true
	}
	f.mu.Unlock()
	if busy {
		return
	}
	done := func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.learning, name)
	}
	// Ends with the publisher's answer or its timeout; Close cancels it and waits for it.
	started := f.start(func(ctx context.Context) {
		defer done()
		if _, err := f.discover(ctx, name); err != nil && ctx.Err() == nil {
			f.log.Warn("refreshing discovery failed, what is known is still used", "name", name, "err", err)
		}
	})
	if !started {
		done()
	}
}

// maxRefreshes bounds the discoveries that are refreshed at once.
const maxRefreshes = 64

// templates returns where to ask for an image: what the publisher says now, or what was learned before if it can't say. What it says now is kept behind,
// until the returned function returns: nobody has to wait for the disk before the image is asked for.
func (f *Fetcher) templates(ctx context.Context, name string, trace *acproxy.Trace) (templates []discovery.Template, kept func(), err error) {
	kept = func() {}
	known, ok := f.cfg.Store.Known(name)
	if ok && f.fresh(known) {
		return learned(known), kept, nil
	}
	began := f.now()
	found, err := f.cfg.Discovery.Templates(ctx, name)
	if err == nil {
		*trace = append(*trace, found.Trace...)
		keeping := make(chan struct{})
		// Ends with what the store writes; Close waits for it.
		started := f.start(func(context.Context) {
			defer close(keeping)
			f.learn(name, found, began)
		})
		if started {
			kept = func() { <-keeping }
		}
		return found.Templates, kept, nil
	}
	var e *acproxy.Error
	if errors.As(err, &e) {
		*trace = append(*trace, e.Trace...)
	}
	if ok && ctx.Err() == nil {
		*trace = append(*trace, acproxy.Attempt{What: "discovery", URL: known.Page, Note: "known from before"})
		return learned(known), kept, nil
	}
	return nil, kept, err
}

// RefsOf returns the refs that a publisher's own URL may ask for, with the extension, "aci" or "aci.asc", by the templates that were learned or
// configured. The more specific names come first.
func (f *Fetcher) RefsOf(ctx context.Context, url *url.URL) (refs []acproxy.Ref, ext string) {
	if refs, ext = f.refsOf(url); len(refs) == 0 && f.cfg.Store.Ready(ctx) == nil {
		// It may not have known everything yet.
		refs, ext = f.refsOf(url)
	}
	return refs, ext
}

func (f *Fetcher) refsOf(url *url.URL) (refs []acproxy.Ref, ext string) {
	templates := f.cfg.Discovery.Fixed()
	for _, known := range f.cfg.Store.KnownUnderHost(url.Hostname()) {
		templates = append(templates, learned(known)...)
	}
	tried := make(map[discovery.Template]bool)
	for _, template := range templates {
		if tried[template] {
			continue
		}
		tried[template] = true
		for _, m := range template.MatchAll(url.String()) {
			if (ext == "" || m.Ext == ext) && !slices.Contains(refs, m.Ref) {
				ext = m.Ext
				refs = append(refs, m.Ref)
			}
		}
	}
	slices.SortStableFunc(refs, func(a, b acproxy.Ref) int { return len(b.Name()) - len(a.Name()) })
	return refs, ext
}

// Knows reports whether anything is held or known of a name, without asking anybody.
func (f *Fetcher) Knows(name string) bool {
	if held, err := f.cfg.Store.HasName(name); err == nil && held {
		return true
	}
	_, ok := f.cfg.Store.Known(name)
	return ok
}
