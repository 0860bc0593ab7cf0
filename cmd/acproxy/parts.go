package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/fetch"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/audit"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/credentials"
	"github.com/acproxy/acproxy/internal/history"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/internal/metrics"
	"github.com/acproxy/acproxy/internal/missing"
	"github.com/acproxy/acproxy/internal/oci"
	"github.com/acproxy/acproxy/internal/warm"
	"github.com/acproxy/acproxy/internal/web"
	"github.com/acproxy/acproxy/trust"
)

// newWeb returns the connections to publishers, as webConfig has them.
func newWeb(cfg *config.Config, via string, shown *credentials.Set) (*web.Client, error) {
	out, err := webConfig(cfg, via, shown)
	if err != nil {
		return nil, err
	}
	return web.New(out), nil
}

// webConfig returns how publishers are reached, who are shown what they want to see. via marks requests as this server's.
func webConfig(cfg *config.Config, via string, shown *credentials.Set) (web.Config, error) {
	d := cfg.Dial
	out := web.Config{
		Hosts: d.Hosts, Allow: d.Allow, UserAgent: d.UserAgent, Via: via, Offline: cfg.Offline, Traces: cfg.Traces.Publishers,
		ConnectTimeout: time.Duration(d.ConnectTimeout), Timeout: time.Duration(d.Timeout), StallTimeout: time.Duration(d.StallTimeout),
		MaxRedirects: orNone[int](d.MaxRedirects), Authorize: shown.Authorize,
		Limits: web.Limits{
			MaxConnections: orNone[int](d.MaxConnections), Rate: orNone[int](d.Rate), Burst: d.Burst, MaxRetryAfter: orNone[time.Duration](d.MaxRetryAfter),
			Failures: orNone[int](d.Breaker.Failures), Open: time.Duration(d.Breaker.Open), MaxOpen: time.Duration(d.Breaker.MaxOpen),
		},
	}
	if out.UserAgent == "" {
		out.UserAgent = "acproxy/" + buildVersion()
	}
	if d.Resolver != "" {
		out.Resolver = resolver(d.Resolver)
	}
	for _, p := range cfg.Publishers {
		full := cfg.Inherit(p)
		rule := web.Rule{
			Prefix: p.Prefix, HTTP: p.HTTP, Timeout: time.Duration(*full.Timeout), Allow: full.AllowAddresses, Nobody: full.Publisher == config.PublisherLocal, Offline: *full.Offline,
		}
		if p.CAFile != "" {
			pool, err := rootsWith(p.CAFile)
			if err != nil {
				return out, fmt.Errorf("ca_file of publisher %s: %w", p.Prefix, err)
			}
			rule.RootCAs = pool
		}
		if p.Proxy != "" {
			u, err := url.Parse(p.Proxy)
			if err != nil {
				return out, fmt.Errorf("proxy of publisher %s: %w", p.Prefix, err)
			}
			rule.Proxy = u
		}
		out.Rules = append(out.Rules, rule)
	}
	return out, nil
}

// newCredentials returns what publishers want to see.
func newCredentials(cfg *config.Config, log *slog.Logger) (*credentials.Set, error) {
	var all []credentials.Credential
	for i, h := range cfg.Credentials.Hosts {
		c := credentials.Credential{Host: credentials.NormalHost(h.Host), Prefix: h.Prefix, Type: h.Type, User: h.User, Region: h.Region, Service: h.Service}
		var err error
		if h.SecretFile != "" {
			c.Secret, err = credentials.FromFile(h.SecretFile)
		} else {
			c.Secret, err = credentials.FromEnvironment(h.SecretEnv)
		}
		if err != nil {
			return nil, fmt.Errorf("credentials.hosts[%d], for %s: %w", i, h.Host, err)
		}
		all = append(all, c)
	}
	var dirs []*credentials.Dir
	for _, path := range cfg.Credentials.RktDirs {
		dir, err := credentials.OpenDir(path, log)
		if err != nil {
			return nil, fmt.Errorf("credentials.rkt_dirs: %w", err)
		}
		dirs = append(dirs, dir)
	}
	return credentials.New(all, dirs), nil
}

// resolver asks one DNS server instead of the system's.
func resolver(server string) *net.Resolver {
	if _, _, err := net.SplitHostPort(server); err != nil {
		server = net.JoinHostPort(strings.Trim(server, "[]"), "53")
	}
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, server)
		},
	}
}

// rootsWith returns the system's certificate authorities and those of a file.
func rootsWith(file string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		// A machine without any is one on which only the file's count.
		pool = x509.NewCertPool()
	}
	return rootsOf(pool, file)
}

// rootsOf adds the certificate authorities of a file to a pool.
func rootsOf(pool *x509.CertPool, file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", file)
	}
	return pool, nil
}

func newFinder(cfg *config.Config, client *web.Client) *discovery.Finder {
	d := cfg.Discovery
	return discovery.New(discovery.Config{
		Web: client, Rules: discoveryRules(cfg), PositiveTTL: orNone[time.Duration](d.PositiveTTL), NegativeTTL: orNone[time.Duration](d.NegativeTTL),
		MaxPages: d.MaxPages, MaxPageSize: int64(d.MaxPageSize),
		MaxRequests: d.MaxRequests, MaxQueue: orNone[int](d.MaxQueue), QueueWait: time.Duration(cfg.Fetch.QueueWait),
	})
}

// discoveryRules returns how images are discovered.
func discoveryRules(cfg *config.Config) (rules []discovery.Rule) {
	for _, p := range cfg.Publishers {
		rules = append(rules, discovery.Rule{Prefix: p.Prefix, Templates: p.Templates, Host: p.DiscoveryHost, Simple: p.SimpleDiscovery, HTTP: p.HTTP})
	}
	return rules
}

// orNone turns a configured 0, which means none, into what the parts take for none; their 0 means the default.
func orNone[T int | int64 | time.Duration, C int | config.Duration](configured C) T {
	if configured == 0 {
		return -1
	}
	return T(configured)
}

// fetchSettings returns what of a fetcher may change while it works.
func fetchSettings(cfg *config.Config) fetch.Settings {
	return fetch.Settings{Policies: policies(cfg), Allow: cfg.Allow, Offline: cfg.Offline, Jitter: float64(cfg.Freshness.Jitter) / 100}
}

// policies returns what the operator decided, for everybody first.
func policies(cfg *config.Config) []fetch.Policy {
	of := func(p config.Publisher) fetch.Policy {
		p = cfg.Inherit(p)
		out := fetch.Policy{
			Prefix: p.Prefix, TTL: time.Duration(*p.TTL), MaxStale: time.Duration(*p.MaxStale), Offline: *p.Offline, Listing: p.Listing,
			Trust: trustPolicy(p), Local: p.Publisher == config.PublisherLocal,
		}
		if p.Delivery == config.DeliveryVerifyFirst {
			out.Delivery = fetch.VerifyFirst
		}
		if p.OnChange == config.OnChangeFollow {
			out.OnChange = fetch.FollowChange
		}
		if p.OnFull == config.OnFullStream {
			out.OnFull = fetch.StreamFull
		}
		return out
	}
	out := []fetch.Policy{of(config.Publisher{})}
	for _, p := range cfg.Publishers {
		out = append(out, of(p))
	}
	return out
}

// trustPolicy turns a publisher's settings, all of them filled in, into what trust decides by.
func trustPolicy(p config.Publisher) trust.Policy {
	out := trust.Policy{Legacy: *p.Legacy, Threshold: *p.Threshold}
	if p.Signature == config.SignatureOptional {
		out.Signature = trust.Optional
	}
	if p.Expired == config.ExpiredAcceptIfSignedBefore {
		out.Expired = trust.AcceptIfSignedBefore
	}
	return out
}

// guardConfig returns what decides who may have what, with the files that it names as they are now.
func guardConfig(cfg *config.Config, log *slog.Logger) (out access.Config, err error) {
	if out.Tokens, err = access.OpenTokens(cfg.Access.TokensFile, log); err != nil {
		return out, err
	}
	if file := cfg.Access.UsersFile; file != "" {
		if out.Users, err = access.OpenUsers(file, log); err != nil {
			return out, fmt.Errorf("access.users_file: %w", err)
		}
	}
	for _, rule := range cfg.Access.Rules {
		may := make(map[access.Right][]string)
		for right, names := range rule.Rights() {
			may[access.Right(right)] = names
		}
		out.Rules = append(out.Rules, access.Rule{Prefix: rule.Prefix, May: may})
	}
	return out, nil
}

func trustDirs(cfg *config.Config) trust.Dirs {
	return trust.Dirs{System: cfg.Trust.SystemDir, Local: cfg.Trust.LocalDir}
}

func limits(cfg *config.Config) aci.Limits {
	l := cfg.Fetch.Limits
	return aci.Limits{
		MaxManifest: int64(l.MaxManifest), MaxEntries: l.MaxEntries, MaxUncompressed: int64(l.MaxUncompressed), MaxRatio: float64(l.MaxRatio),
	}
}

// loadCA returns the local CA, nil if none was made.
func loadCA(cfg *config.Config) (*localca.CA, error) {
	ca, err := localca.Load(cfg.CA.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ca, err
}

// parts are what a running acproxy consists of, below HTTP.
type parts struct {
	cfg     *config.Config
	log     *slog.Logger
	via     string
	store   *cache.Disk
	keys    *trust.Store
	web     *web.Client
	finder  *discovery.Finder
	fetcher *fetch.Fetcher
	ca      *localca.CA // nil if there is none
	guard   *access.Guard

	audit   *audit.File
	journal *journal.Journal
	history *history.History
	metrics *metrics.Metrics
	warm    *warm.Jobs  // nil until it is opened
	oci     *oci.Bridge // nil if there is none
	missing *missing.Table
	lost    chan struct{} // says that an image was found to be lost since somebody last looked
}

// judged is the store with the state that the keys give its images now.
func (p *parts) judged() admin.Judged {
	return admin.Judged{Disk: p.store, Judge: p.fetcher.Judged, Did: p.decided, Missed: p.missing, Knows: p.fetcher.Knows}
}

// ready returns why not all of the work can be done, nil if it can. A side that is offline has nothing to write.
func (p *parts) ready() error {
	err := p.store.Working()
	if p.web.Offline() && errors.Is(err, acproxy.ErrNoSpace) {
		return nil
	}
	return err
}

// decided is told every decision about an image.
func (p *parts) decided(d fetch.Decision) {
	p.metrics.Decided(d)
	p.journal.Add(d)
	if err := p.audit.Append(d); err != nil {
		p.log.Error("a decision is missing from the audit", "ref", d.Ref, "event", d.Event, "err", err)
	}
}

// evicted is told of everything that had to go for space.
func (p *parts) evicted(e cache.Eviction) {
	p.metrics.Evicted(e)
	if e.Record != nil {
		p.decided(fetch.Evicted(e, time.Now()))
	}
}

// lostImage is told of every image whose bytes turn out to be lost.
func (p *parts) lostImage(rec cache.Record) {
	p.decided(fetch.Damaged(rec, time.Now()))
	p.askForLost()
}

// askForLost has images that are lost be asked for again, now.
func (p *parts) askForLost() {
	select {
	case p.lost <- struct{}{}:
	default: // one that nobody has looked at yet stands for this one, too
	}
}

// inspector returns what finds out the image ID of what is held already.
func inspector(cfg *config.Config) func(io.Reader) (acproxy.ImageID, error) {
	lim := limits(cfg)
	return func(r io.Reader) (acproxy.ImageID, error) {
		found, err := aci.Inspect(r, lim, nil)
		return found.ID, err
	}
}

// quota returns how much space the store may take.
func quota(cfg *config.Config) cache.Quota {
	c := cfg.Cache
	return cache.Quota{
		MaxSize: int64(c.MaxSize), MinFree: int64(c.MinFree), High: c.High, Low: c.Low, Grace: orNone[time.Duration](c.Grace), LastCopies: c.EvictLastCopies,
	}
}

// newParts opens everything. close closes it. With idle it is to be looked into: nothing is evicted by itself.
func newParts(cfg *config.Config, log *slog.Logger, idle bool) (p *parts, err error) {
	p = &parts{cfg: cfg, log: log, via: "acproxy-" + strings.ToLower(rand.Text()[:12]), metrics: metrics.New(buildVersion()), lost: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
			p = nil
		}
	}()
	if err := os.MkdirAll(cfg.DataDir, 0o750); err != nil {
		return p, err
	}
	if p.ca, err = loadCA(cfg); err != nil {
		return p, err
	}
	guard, err := guardConfig(cfg, log)
	if err != nil {
		return p, err
	}
	p.guard = access.New(guard)
	// On a read-only file system there are no keys to come.
	if err := os.MkdirAll(filepath.Join(cfg.Trust.LocalDir, "prefix.d"), 0o755); err != nil && !errors.Is(err, syscall.EROFS) {
		return p, err
	}
	if p.keys, err = trust.Open(trustDirs(cfg)); err != nil {
		return p, err
	}
	if p.audit, err = audit.Open(cfg.Audit.File, audit.Options{MaxSize: int64(cfg.Audit.MaxSize), MaxFiles: cfg.Audit.MaxFiles}); err != nil {
		return p, err
	}
	p.journal, p.history = journal.New(nil), history.New()
	if p.missing, err = missing.Load(p.missingFile()); err != nil {
		log.Warn("what was missing before is not known", "err", err)
	}
	if !idle {
		p.remember()
	}
	shown, err := newCredentials(cfg, log)
	if err != nil {
		return p, err
	}
	if p.web, err = newWeb(cfg, p.via, shown); err != nil {
		return p, err
	}
	p.metrics.Publishers(p.web.Hosts, p.web.Traffic)
	p.store, err = cache.Open(storeDir(cfg), cache.Options{
		FlushEvery: time.Duration(cfg.Cache.AccessFlush), KeepPartials: orNone[time.Duration](cfg.Cache.KeepPartials), Log: log,
		Quota: quota(cfg), Idle: idle, Evicted: p.evicted, Lost: p.lostImage, Inspect: inspector(cfg),
		Scrub: cache.Schedule{Every: time.Duration(cfg.Scrub.Every), Rate: int64(cfg.Scrub.Rate)},
	})
	if err != nil {
		return p, err
	}
	p.metrics.Watch(p.store)
	p.finder = newFinder(cfg, p.web)
	counts := fetchSettings(cfg)
	p.fetcher = fetch.New(fetch.Config{
		Store: p.store, Discovery: p.finder, Web: p.web, Keyring: p.keys.Current,
		Policies: counts.Policies, Allow: counts.Allow, Offline: counts.Offline, Jitter: counts.Jitter,
		HoldBack: int64(cfg.Fetch.HoldBack), MaxImageSize: int64(cfg.Fetch.MaxImageSize), MaxSignatureSize: int64(cfg.Fetch.MaxSignatureSize),
		SignatureWait: orNone[time.Duration](cfg.Fetch.SignatureWait), NegativeTTL: orNone[time.Duration](cfg.Discovery.NegativeTTL), DiscoveryTTL: orNone[time.Duration](cfg.Discovery.PositiveTTL),
		Retries: orNone[int64](cfg.Fetch.Retries), RetryFor: time.Duration(cfg.Fetch.RetryFor), RetryWait: time.Duration(cfg.Fetch.RetryWait),
		MaxFlights: int64(cfg.Fetch.MaxFlights), MaxQueue: orNone[int64](cfg.Fetch.MaxQueue), QueueWait: time.Duration(cfg.Fetch.QueueWait),
		Limits: limits(cfg), Decided: p.decided, Landed: p.metrics.Landed, Missed: p.missed, Log: log,
	})
	return p, nil
}

// openWarm opens the lists of images that are fetched, which are kept in a directory.
func (p *parts) openWarm(dir string, lists []warm.Listed) (err error) {
	c := p.cfg.Warm
	var platforms []warm.Platform
	for _, platform := range c.Platforms {
		platforms = append(platforms, warm.Platform(platform))
	}
	p.warm, err = warm.Open(warm.Options{
		Fetcher: p.fetcher, Dir: dir, Platforms: platforms, Workers: c.Concurrency, MaxDepth: c.MaxDepth, MaxImages: c.MaxImages, Keep: c.KeepJobs, Lists: lists, Log: p.log,
		Pin: func(ctx context.Context, digest acproxy.Digest) error { return p.judged().Pin(ctx, digest, true) },
		Ended: func(j warm.Job) {
			p.happened(journal.EventWarmed, strings.TrimSpace(j.Name+" ")+": "+warmText(j))
		},
		Result: func(r warm.Result) { p.metrics.Warmed(r.Outcome) },
	})
	return err
}

// openOCI has images be had as OCI images. What was made is written down in a directory.
func (p *parts) openOCI(dir string) (err error) {
	c := p.cfg.OCI
	var platforms []oci.Platform
	for i, text := range c.Platforms {
		platform, err := oci.ParsePlatform(text)
		if err != nil {
			return fmt.Errorf("oci.platforms[%d]: %w", i, err)
		}
		platforms = append(platforms, platform)
	}
	spool := p.store.Spool
	if c.Keep == 0 {
		spool = nil
	}
	p.oci, err = oci.New(oci.Config{
		Fetcher: p.fetcher, Store: p.store, Dir: dir, Platforms: platforms, Wait: time.Duration(c.Wait), Keep: time.Duration(c.Keep), Parallel: c.Parallel, Limits: limits(p.cfg),
		Spool: spool, Suspect: p.store.ScrubImage, Converted: p.metrics.Converted, Log: p.log,
	})
	return err
}

// warmLists returns the lists that are fetched by a schedule.
func warmLists(cfg *config.Config) []warm.Listed {
	var lists []warm.Listed
	for _, l := range cfg.Warm.Lists {
		lists = append(lists, warm.Listed{File: l.File, Groups: l.Groups, Schedule: l.Schedule, Jitter: time.Duration(l.Jitter)})
	}
	return lists
}

// close closes what was opened, in the reverse order.
func (p *parts) close() error {
	var errs []error
	if p.oci != nil {
		errs = append(errs, p.oci.Close())
	}
	if p.fetcher != nil {
		errs = append(errs, p.fetcher.Close())
	}
	if p.finder != nil {
		errs = append(errs, p.finder.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	if p.web != nil {
		p.web.Close()
	}
	if p.keys != nil {
		errs = append(errs, p.keys.Close())
	}
	if p.audit != nil {
		errs = append(errs, p.audit.Close())
	}
	return errors.Join(errs...)
}
