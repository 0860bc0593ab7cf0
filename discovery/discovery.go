// Package discovery finds where an image's publisher keeps it, by appc meta-discovery.
package discovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/queue"
	"github.com/acproxy/acproxy/internal/tracing"
	"github.com/acproxy/acproxy/internal/web"
)

// Defaults of a [Config].
const (
	DefaultPositiveTTL = 10 * time.Minute
	DefaultNegativeTTL = 30 * time.Second
	DefaultMaxPages    = 10_000
	DefaultMaxPageSize = 1 << 20
	DefaultMaxRequests = 256
	DefaultMaxQueue    = 1000
	DefaultQueueWait   = time.Minute
)

// pageTimeout bounds one page as a whole. The client's own timeouts don't: a page may come a byte at a time.
const pageTimeout = 2 * time.Minute

// simpleTemplate is the URL of the old simple discovery.
const simpleTemplate = "https://{name}-{version}-{os}-{arch}.{ext}"

// A Rule changes how the images of some names are discovered.
type Rule struct {
	// Prefix is the image-name prefix, by segments, that the rule is for; "" matches every name. The longest matching prefix wins.
	Prefix string
	// Templates are the URLs of fixed templates. With them no discovery page is asked for at all, for keys neither.
	Templates []string
	// Host is another host, or host:port, that is asked instead of the name's own.
	Host string
	// Simple tries the old simple discovery, https://{name}-{version}-{os}-{arch}.{ext}, for names of which no page knows a template.
	Simple bool
	// HTTP asks for a page by http when nobody can be connected to by https; never when https answered, whatever it said. The web client's
	// rule for the name has to allow http too.
	HTTP bool
}

// Config says how a Finder works. Its fields may not change after New.
type Config struct {
	Web   *web.Client
	Rules []Rule // until [Finder.SetRules]

	PositiveTTL time.Duration // how long a page with tags is remembered; 0 means DefaultPositiveTTL, less than 0 not at all
	NegativeTTL time.Duration // how long a page without tags, or a 4xx, is remembered; 0 means DefaultNegativeTTL, less than 0 not at all
	MaxPages    int           // pages remembered; 0 means DefaultMaxPages
	MaxPageSize int64         // bytes of a page; 0 means DefaultMaxPageSize

	MaxRequests int           // pages that publishers are asked for at once; 0 means DefaultMaxRequests
	MaxQueue    int           // pages that wait for their turn beyond that; 0 means DefaultMaxQueue, less than 0 none
	QueueWait   time.Duration // for how long they wait; 0 means DefaultQueueWait

	Now func() time.Time // nil means time.Now
}

// A Finder walks up discovery pages and remembers them. It is safe for concurrent use.
type Finder struct {
	cfg   Config
	rules atomic.Pointer[rules]
	pages *pages
	queue *queue.Queue

	// ctx is the life of the requests in progress, which don't end with the client that asked first, but with the last one that waits.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	asks       map[string]*asking // pages that are being asked for, by key
	generation int                // counts calls of Forget and SetRules: what was asked for before one must not be remembered after it
}

// rules are the rules that count until others take their place. They don't change.
type rules struct {
	all    []Rule    // by prefix, longest first; the last one matches every name
	number int       // how often others were there before
	since  time.Time // since when; zero for the first ones
}

// Found is what discovery gave for a name: the templates, or the keys, of the first page that has any.
type Found struct {
	Templates []Template    `json:"templates,omitempty"` // in the page's order; not all of them need be usable for every ref
	Keys      []string      `json:"keys,omitempty"`      // URLs of public keys, in the page's order
	KeyTags   []Template    `json:"-"`                   // the tags that Keys are the URLs of, with the prefixes that the page says the keys are for
	Page      string        `json:"page,omitempty"`      // the URL of the page, "" if no page had a part in it
	Level     string        `json:"-"`                   // the name whose page it is: the one asked for, or what is above it
	Trace     acproxy.Trace `json:"trace,omitempty"`
}

// New returns a Finder. Close ends what it has in progress.
func New(cfg Config) *Finder {
	cfg.PositiveTTL = orDefault(cfg.PositiveTTL, DefaultPositiveTTL)
	cfg.NegativeTTL = orDefault(cfg.NegativeTTL, DefaultNegativeTTL)
	cfg.MaxPages = orDefault(cfg.MaxPages, DefaultMaxPages)
	cfg.MaxPageSize = orDefault(cfg.MaxPageSize, DefaultMaxPageSize)
	cfg.MaxRequests = orDefault(cfg.MaxRequests, DefaultMaxRequests)
	cfg.MaxQueue = orDefault(cfg.MaxQueue, DefaultMaxQueue)
	cfg.QueueWait = orDefault(cfg.QueueWait, DefaultQueueWait)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	f := &Finder{cfg: cfg, pages: newPages(cfg.MaxPages, cfg.Now), asks: make(map[string]*asking)}
	f.queue = queue.New(queue.Config{
		Places: cfg.MaxRequests, Length: max(cfg.MaxQueue, 0), Patience: cfg.QueueWait,
		Doing: "discovery pages are being asked for", PlacesName: "discovery.max_requests", LengthName: "discovery.max_queue", PatienceName: "fetch.queue_wait",
	})
	f.rules.Store(&rules{all: inOrder(cfg.Rules)})
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

// inOrder returns the rules by prefix, longest first, with one that matches every name at the end.
func inOrder(given []Rule) []Rule {
	all := append(slices.Clone(given), Rule{})
	for i := range all {
		all[i].Prefix = strings.TrimSuffix(all[i].Prefix, "/")
	}
	slices.SortStableFunc(all, func(a, b Rule) int { return len(b.Prefix) - len(a.Prefix) })
	return all
}

// SetRules puts others in the place of [Config.Rules], from the next walk on. All pages are forgotten: they may have come from somewhere else, or by a way
// that is not allowed any more. It is called after [web.Client.Change], where both change.
func (f *Finder) SetRules(given []Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.generation++
	f.rules.Store(&rules{all: inOrder(given), number: f.generation, since: f.cfg.Now()})
	f.pages.clear()
}

// Since returns since when the rules count, zero if they always did: what was found before was found by others.
func (f *Finder) Since() time.Time { return f.rules.Load().since }

func orDefault[T comparable](v, fallback T) T {
	var zero T
	if v == zero {
		return fallback
	}
	return v
}

// Close ends the requests in progress and waits for them. The Finder can't be used after it.
func (f *Finder) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.cancel()
	f.wg.Wait()
	return nil
}

// Templates returns the templates for an image name. It asks for the page of the name itself and climbs to the parents, down to the host
// alone, as long as a page answers with a 4xx or has no template for the name that an http client could use (specification, "Discovery
// URL"). A publisher that is down, answers with 408, 425, 429 or 5xx or can't be understood ends the walk: who climbs on an outage may
// land on somebody else's template.
//
// The error matches [acproxy.ErrNotFound], with the code "not-discovered", if no page has a template; [acproxy.ErrInvalid] if name is no
// image name; otherwise it is as [web.Client.Get] gives it. Found and the error carry the trace of the walk.
func (f *Finder) Templates(ctx context.Context, name string) (Found, error) {
	if err := acproxy.CheckName(name); err != nil {
		return Found{}, err
	}
	by := f.ruleOf(name)
	rule := by.Rule
	if len(rule.Templates) > 0 {
		return fixed(rule, name), nil
	}
	found, err := f.walk(ctx, name, by, func(tags Tags, found *Found) bool {
		found.Templates = tags.Templates
		return len(found.Templates) > 0
	})
	if rule.Simple && errors.Is(err, acproxy.ErrNotFound) {
		found.Templates = []Template{{Prefix: name, URL: simpleTemplate}}
		found.Trace = append(found.Trace, acproxy.Attempt{What: "discovery", URL: simpleTemplate, Note: "simple discovery, as configured"})
		return found, nil
	}
	return found, err
}

// Keys returns the URLs of the public keys for an image name. It walks by itself, as Templates does: keys may be published on another
// page than templates are. Its errors are those of Templates.
func (f *Finder) Keys(ctx context.Context, name string) (Found, error) {
	if err := acproxy.CheckName(name); err != nil {
		return Found{}, err
	}
	by := f.ruleOf(name)
	if len(by.Templates) > 0 {
		detail := "the templates of " + name + " are fixed in the configuration, so that no page is asked for its keys: add them by file or URL"
		return Found{}, &acproxy.Error{Kind: acproxy.ErrNotFound, Code: "not-discovered", Detail: detail}
	}
	return f.walk(ctx, name, by, func(tags Tags, found *Found) bool {
		for _, key := range tags.Keys {
			found.Keys, found.KeyTags = append(found.Keys, key.URL), append(found.KeyTags, key)
		}
		return len(found.Keys) > 0
	})
}

// Forget drops what is remembered of the pages that a walk for the name looks at: its own and those of its parents.
func (f *Finder) Forget(name string) {
	rule := f.ruleOf(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.generation++
	for level := name; level != ""; level = parent(level) {
		key := f.key(name, rule, level)
		delete(f.asks, key)
		f.pages.forget(key)
	}
}

// A ruling is the rule that a walk goes by to its end, and its place among the rules that counted when it began.
type ruling struct {
	Rule
	place string
}

func (f *Finder) ruleOf(name string) ruling {
	r := f.rules.Load()
	i := slices.IndexFunc(r.all, func(r Rule) bool { return acproxy.HasPrefix(name, r.Prefix) })
	return ruling{r.all[i], strconv.Itoa(r.number) + "." + strconv.Itoa(i)}
}

// parent returns the name a segment shorter, "" for a host alone.
func parent(name string) string {
	return name[:max(strings.LastIndexByte(name, '/'), 0)]
}

func fixed(rule Rule, name string) Found {
	prefix := rule.Prefix
	if prefix == "" {
		prefix, _, _ = strings.Cut(name, "/")
	}
	var found Found
	for _, template := range rule.Templates {
		found.Templates = append(found.Templates, Template{Prefix: prefix, URL: template})
		found.Trace = append(found.Trace, acproxy.Attempt{What: "discovery", URL: web.Redacted(template), Note: "fixed by the configuration"})
	}
	return found
}

// Fixed returns the templates that rules fix, so that a URL can be taken back to what it asks for.
func (f *Finder) Fixed() []Template {
	var out []Template
	for _, rule := range f.rules.Load().all {
		for _, template := range rule.Templates {
			out = append(out, Template{Prefix: rule.Prefix, URL: template})
		}
	}
	return out
}

// walk climbs from a name's page to the host's until choose finds what it wants among the tags for the name.
func (f *Finder) walk(ctx context.Context, name string, rule ruling, choose func(Tags, *Found) bool) (Found, error) {
	var found Found
	for level := name; level != ""; level = parent(level) {
		p, err := f.page(ctx, name, rule, level)
		if err != nil {
			var e *acproxy.Error
			if !errors.As(err, &e) {
				return found, err
			}
			found.Trace = append(found.Trace, e.Trace...)
			with := *e
			with.Trace = slices.Clone(found.Trace)
			return found, &with
		}
		tags := p.tags.For(name)
		all := len(tags.Templates)
		tags.Templates = slices.DeleteFunc(tags.Templates, func(t Template) bool { return !t.usable() })
		found.Trace = append(found.Trace, p.attempts(tags, all, name)...)
		if choose(tags, &found) {
			found.Page, found.Level = p.url, level
			return found, nil
		}
	}
	return found, &acproxy.Error{
		Kind: acproxy.ErrNotFound, Code: "not-discovered", Trace: slices.Clone(found.Trace),
		Detail: fmt.Sprintf("no discovery page of %s, nor of what is above it, has a tag for that name", name),
	}
}

// clientKey is under which a context says who asks.
type clientKey struct{}

// For returns a context for what is asked on behalf of a client. Clients take turns where too much is asked for; what has none in its context takes them as
// one client more. It is for those whose turn came already, and for what is done behind answers.
func For(ctx context.Context, client string) context.Context {
	return context.WithValue(ctx, clientKey{}, client)
}

func clientOf(ctx context.Context) string {
	client, _ := ctx.Value(clientKey{}).(string)
	return client
}

// A page is what a discovery page said. It is shared and never changed.
type page struct {
	url    string // as it was asked for
	tags   Tags
	status int
	trace  acproxy.Trace
	cached bool
}

// attempts returns the trace of asking for the page, with a note of what it gave for the name.
func (p *page) attempts(tags Tags, all int, name string) acproxy.Trace {
	trace := slices.Clone(p.trace)
	if p.cached {
		trace = acproxy.Trace{{What: "discovery", URL: p.url, Status: p.status}}
	}
	last := &trace[len(trace)-1]
	var notes []string
	switch {
	case p.cached:
		notes = append(notes, "cached")
	case last.Note != "":
		notes = append(notes, last.Note)
	}
	switch {
	case p.status/100 == 4:
	case p.tags.none():
		notes = append(notes, "no discovery tags")
	default:
		notes = append(notes, fmt.Sprintf("%s and %s for %s", count(len(tags.Templates), "template"), count(len(tags.Keys), "key"), name))
		if skipped := all - len(tags.Templates); skipped > 0 {
			notes = append(notes, count(skipped, "template")+" not usable")
		}
	}
	last.Note = strings.Join(notes, ", ")
	return trace
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

// key names a page among those remembered. The rules are part of it: a page that one name may be discovered from by http, by another
// authority's certificate or at another host says nothing about a name for which that is forbidden.
func (f *Finder) key(name string, rule ruling, level string) string {
	return rule.place + " " + f.cfg.Web.Rule(name).Prefix + " " + level
}

// An asking is the asking of a publisher for one page, on behalf of everybody who wants it. Nobody who comes later is given what became of one that was called
// off.
type asking struct {
	cancel  context.CancelFunc
	waiting int // how many do; the Finder's mutex guards it

	done chan struct{} // closed once the fields below are set
	page *page
	err  error
}

// page returns a page, remembered or asked for now. Those who want the same page at once share one request, which does not end with any of
// them, but with the last.
func (f *Finder) page(ctx context.Context, name string, rule ruling, level string) (*page, error) {
	key := f.key(name, rule, level)
	f.mu.Lock()
	if p := f.pages.get(key); p != nil {
		f.mu.Unlock()
		again := *p
		again.cached = true
		return &again, nil
	}
	a := f.asks[key]
	if a == nil {
		if f.closed {
			f.mu.Unlock()
			return nil, closing(name, nil)
		}
		life, cancel := context.WithCancel(tracing.Carry(f.ctx, ctx))
		a = &asking{cancel: cancel, done: make(chan struct{})}
		f.asks[key] = a
		client, generation := clientOf(ctx), f.generation
		// Ends with the publisher's answer, or when nobody waits for that any more; Close cancels it and waits for it.
		f.wg.Go(func() {
			defer cancel()
			a.page, a.err = f.ask(life, client, name, rule, level)
			f.ended(a, key, generation)
		})
	}
	a.waiting++
	f.mu.Unlock()
	select {
	case <-a.done:
		return a.page, a.err
	case <-ctx.Done():
		f.leave(a, key)
		return nil, fmt.Errorf("discovering %s: %w", name, ctx.Err())
	}
}

// leave has one less wait for a page, and calls the asking off if it was the last.
func (f *Finder) leave(a *asking, key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a.waiting--; a.waiting == 0 {
		f.forget(a, key)
		a.cancel()
	}
}

// ended tells those who wait what became of an asking. A page that came is remembered, although everybody may have left in that moment.
func (f *Finder) ended(a *asking, key string, generation int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forget(a, key)
	if a.err == nil && generation == f.generation {
		if ttl := f.ttl(a.page); ttl > 0 {
			f.pages.keep(key, a.page, ttl, !a.page.tags.none())
		}
	}
	close(a.done)
}

// forget has nobody join an asking any more. The caller holds mu.
func (f *Finder) forget(a *asking, key string) {
	if f.asks[key] == a {
		delete(f.asks, key)
	}
}

func closing(name string, cause error) error {
	return &acproxy.Error{Kind: acproxy.ErrBusy, Code: "shutting-down", Detail: "discovery of " + name + ": the server is shutting down", Err: cause}
}

// ask gets a page from its publisher, when its turn has come. life ends with the Finder, and when nobody waits for the page any more.
func (f *Finder) ask(life context.Context, client, name string, rule ruling, level string) (*page, error) {
	host, _, _ := strings.Cut(name, "/")
	leave, err := f.queue.Enter(life, client, host)
	if err != nil {
		if f.ctx.Err() != nil {
			err = closing(name, err)
		}
		return nil, err
	}
	defer leave()
	ctx, cancel := context.WithTimeout(life, pageTimeout)
	defer cancel()
	p, err := f.fetch(ctx, name, rule.Rule, level)
	switch {
	case err != nil && f.ctx.Err() != nil:
		return nil, closing(name, err)
	case err != nil && ctx.Err() != nil && !errors.Is(err, acproxy.ErrTimeout):
		detail := fmt.Sprintf("the discovery page of %s did not arrive within %v", level, pageTimeout)
		attempt := acproxy.Attempt{What: "discovery", URL: pageURL("https", rule.Rule, level), Err: detail}
		return nil, &acproxy.Error{Kind: acproxy.ErrTimeout, Code: "publisher-timeout", Detail: detail, Trace: acproxy.Trace{attempt}}
	}
	return p, err
}

// ttl returns how long a page is remembered. Refusals are not: whether somebody is let in changes from one moment to the next.
func (f *Finder) ttl(p *page) time.Duration {
	switch {
	case !p.tags.none():
		return f.cfg.PositiveTTL
	case p.status == http.StatusUnauthorized, p.status == http.StatusForbidden:
		return 0
	}
	return f.cfg.NegativeTTL
}

func pageURL(scheme string, rule Rule, level string) string {
	host, path, nested := strings.Cut(level, "/")
	if rule.Host != "" {
		host = rule.Host
	}
	if nested {
		path = "/" + path
	}
	return scheme + "://" + host + path + "?ac-discovery=1"
}

// fetch gets a page by https or, if nobody is there and the rule allows it, by http.
func (f *Finder) fetch(ctx context.Context, name string, rule Rule, level string) (*page, error) {
	p, err := f.fetchFrom(ctx, name, pageURL("https", rule, level))
	if err == nil || !rule.HTTP || !web.Unreachable(err) {
		return p, err
	}
	var tried *acproxy.Error
	errors.As(err, &tried)
	p, err = f.fetchFrom(ctx, name, pageURL("http", rule, level))
	if err != nil {
		var e *acproxy.Error
		if errors.As(err, &e) {
			e.Trace = slices.Concat(tried.Trace, e.Trace)
		}
		return nil, err
	}
	p.trace = slices.Concat(tried.Trace, p.trace)
	return p, nil
}

func (f *Finder) fetchFrom(ctx context.Context, name, url string) (*page, error) {
	resp, trace, err := f.cfg.Web.Get(ctx, name, "discovery", url, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	p := &page{url: url, status: resp.StatusCode, trace: trace}
	fail := func(code, detail string, cause error) error {
		kind := acproxy.ErrPublisher
		var e *acproxy.Error
		if errors.As(cause, &e) {
			kind, code = e.Kind, e.Code
		}
		last := &trace[len(trace)-1]
		last.Err = detail
		if cause != nil {
			last.Err += ": " + cause.Error()
		}
		return &acproxy.Error{Kind: kind, Code: code, Detail: "the discovery page " + url + " " + detail, Trace: trace, RetryAfter: web.RetryAfter(resp, f.cfg.Now()), Err: cause}
	}
	switch status := resp.StatusCode; {
	case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests:
		return nil, fail("publisher-status", fmt.Sprintf("answers %s, which may pass", statusText(status)), nil)
	case status/100 == 4:
		return p, nil
	case status/100 != 2, status == http.StatusPartialContent:
		return nil, fail("publisher-status", "answers "+statusText(status), nil)
	}
	limited := &limitReader{r: resp.Body, left: f.cfg.MaxPageSize}
	p.tags, err = Parse(limited)
	switch {
	case errors.Is(err, errPageTooLarge):
		return nil, fail("page-too-large", fmt.Sprintf("is larger than %d bytes", f.cfg.MaxPageSize), nil)
	case err != nil:
		return nil, fail("page-unreadable", "can't be read", err)
	}
	return p, nil
}

func statusText(status int) string {
	if text := http.StatusText(status); text != "" {
		return strconv.Itoa(status) + " " + text
	}
	return strconv.Itoa(status)
}

var errPageTooLarge = errors.New("the page is too large")

// A limitReader fails, where io.LimitReader would end as if the page did.
type limitReader struct {
	r    io.Reader
	left int64
}

// Read reads up to the limit, and fails with errPageTooLarge if there is more.
func (l *limitReader) Read(p []byte) (int, error) {
	if l.left == 0 {
		var one [1]byte
		n, err := io.ReadFull(l.r, one[:])
		if n > 0 {
			return 0, errPageTooLarge
		}
		return 0, err
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// usable reports whether an http client could use the template for some image.
func (t Template) usable() bool {
	values := make(map[string]string)
	for _, v := range t.Variables() {
		if v != variableName && v != variableExt && checkVariable(v) != nil {
			return false
		}
		values[v] = "x"
	}
	expanded, err := t.expand(values)
	return err == nil && checkURL(expanded) == nil
}

// checkVariable returns an error if no ref can have a label of this name.
func checkVariable(name string) error {
	_, err := acproxy.NewRef("x", map[string]string{name: "x"})
	return err
}
