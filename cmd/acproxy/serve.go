package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/access"
	"github.com/acproxy/acproxy/internal/acme"
	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/listen"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/internal/page"
	"github.com/acproxy/acproxy/internal/server"
	"github.com/acproxy/acproxy/internal/tracing"
	"github.com/acproxy/acproxy/trust"
)

func newServe(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the server",
		Long: `serve answers nodes until it is told to stop (SIGINT or SIGTERM). Without any configuration it keeps everything under the data directory and
listens on 127.0.0.1:8080, as direct URLs, as HTTP proxy and for hosts that resolve to it.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			log, err := newLogs(cfg.Log, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, log.Close()) }()
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(gcPercent)
			}
			// Before anybody can know that it runs, and would be ended by it.
			again := make(chan os.Signal, 1)
			signal.Notify(again, syscall.SIGHUP)
			defer signal.Stop(again)
			n, err := start(cfg, o.load, log)
			if err != nil {
				return err
			}
			log.Info("serving", "version", buildVersion(), "data_dir", cfg.DataDir, "addresses", n.addresses())
			return errors.Join(n.wait(cmd.Context(), again, log.Logger), n.stop())
		},
	}
}

// wait returns when the server is told to stop, or why it stops by itself. It reads everything again when it is told so.
func (n *running) wait(ctx context.Context, again <-chan os.Signal, log *slog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			log.Info("stopping")
			return nil
		case failed := <-n.failed:
			return failed
		case <-again:
			changes, err := n.reloader.reload()
			if err != nil {
				log.Error("nothing was reloaded", "err", err)
				continue
			}
			for _, c := range changes {
				log.Info("the configuration has changed", "key", c.Key, "before", c.Before, "after", c.After, "restart", c.Restart)
			}
			log.Info("reloaded", "changes", len(changes))
		}
	}
}

// gcPercent lets the heap grow to five times of what is in use before it is collected. That is a few megabytes, which an answer from memory would otherwise
// have collected hundreds of times a second. GOGC in the environment goes before.
const gcPercent = 400

// running is an acproxy that serves.
type running struct {
	parts    *parts
	server   *server.Server
	admin    *admin.Server
	fronts   []front
	sockets  *listen.Sockets
	traces   *tracing.Exporter // nil if none are exported
	bound    []bound
	pages    []string   // the URLs of the page for operators
	failed   chan error // what ends the server although nobody told it to stop
	stopWork context.CancelFunc
	work     sync.WaitGroup
	forget   func()        // ends the telling of changes of the keys
	trusts   chan struct{} // says that something that decides about trust has changed since the held images were judged

	reloader     *reloader
	certificates []preparer
	shown        []func() *tls.Certificate // those of files
	acme         *acme.Client              // nil if no address wants any of its certificates
}

type bound struct {
	scheme string
	net.Listener
}

// String returns the URL of the listener, or of a unix socket its address.
func (b bound) String() string {
	if b.Addr().Network() == "unix" {
		return listen.UnixAddress(b.Addr().String())
	}
	return b.scheme + "://" + b.Addr().String()
}

// start opens everything and listens. It returns once all listeners accept connections. load reads the configuration again.
func start(cfg *config.Config, load func() (*config.Config, error), logs *logs) (*running, error) {
	log, access := logs.Logger, logs.access
	p, err := newParts(cfg, log, false)
	if err != nil {
		return nil, err
	}
	n := &running{parts: p, trusts: make(chan struct{}, 1), failed: make(chan error, len(cfg.Listen)+len(cfg.Admin.Listen)+2)}
	n.reloader = &reloader{load: load, n: n, level: logs.level, cfg: cfg}
	if n.sockets, err = listen.Inherit(); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	if err := n.open(cfg, log, access); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	return n, nil
}

func (n *running) open(cfg *config.Config, log *slog.Logger, access func(server.Access)) error {
	if cfg.OCI.Enabled {
		if err := n.parts.openOCI(filepath.Join(cfg.DataDir, "oci")); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	if cfg.Traces.Endpoint != "" {
		var err error
		n.traces, err = tracing.NewExporter(ctx, tracing.Options{Endpoint: cfg.Traces.Endpoint, Percent: cfg.Traces.Sample, Version: buildVersion(), Log: log})
		if err != nil {
			cancel()
			return err
		}
	}
	if err := n.openACME(cfg, log); err != nil {
		cancel()
		return err
	}
	n.server = server.New(n.serverConfig(cfg, log, access))
	n.parts.metrics.Uploads(n.server.Uploads)
	n.stopWork = cancel
	warnOfKeys(n.parts.keys.Current(), log)
	n.forget = n.parts.keys.OnChange(func(keys *trust.Keyring) {
		n.parts.happened(journal.EventKeysChanged, count(len(keys.All()), "key")+" can be trusted now")
		warnOfKeys(keys, log)
		n.trustChanged()
	})
	// They end when stop cancels ctx; stop waits for them.
	n.work.Go(func() {
		if err := n.parts.fetcher.ResumeDownloads(ctx); err != nil && ctx.Err() == nil {
			log.Error("resuming downloads", "err", err)
		}
	})
	n.work.Go(func() {
		if err := n.parts.fetcher.ResumeInspections(ctx); err != nil && ctx.Err() == nil {
			log.Error("resuming inspections", "err", err)
		}
	})
	n.work.Go(func() { n.rejudge(ctx, log) })
	n.work.Go(func() { n.mend(ctx, log) })
	n.work.Go(func() { n.watch(ctx, log) })
	if err := n.parts.openWarm(filepath.Join(cfg.DataDir, "jobs"), warmLists(cfg)); err != nil {
		return err
	}
	// Ends as the others do.
	n.work.Go(func() { n.parts.warm.Run(ctx) })
	for _, l := range cfg.Listen {
		if err := n.listen(ctx, l, log); err != nil {
			return err
		}
	}
	if err := n.openAdmin(ctx, cfg, log); err != nil {
		return err
	}
	n.parts.metrics.Certificates(n.shownCertificates)
	n.renew(ctx)
	return nil
}

// openAdmin lets operators, Prometheus and acproxy's own commands look in.
func (n *running) openAdmin(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	p := n.parts
	n.admin = admin.New(admin.Options{
		Store: p.judged(), Guard: p.guard, Metrics: p.metrics.Handler(), Flights: p.fetcher.Flights, Publishers: p.web.Hosts, Keyring: p.keys.Current,
		Journal: p.journal, History: p.history, Warm: p.warm, Origin: p.origin(), Destination: p.fetcher, Stall: time.Duration(cfg.Clients.StallTimeout), Ready: p.ready, Version: buildVersion(), Started: time.Now().UTC(), Offline: p.web.Offline, Log: log,
		Discover: func(ctx context.Context, ref acproxy.Ref) (admin.Discovered, error) {
			return admin.Discover(ctx, p.finder, ref)
		},
		Config:     func() ([]byte, error) { return n.reloader.current().YAML() },
		ReloadKeys: func() { p.keys.Reload() },
		Reload:     n.reloader.reload,
		Push:       n.server.PushHandler(), PushPath: server.PushPath,
		Page: func(s *admin.Server) http.Handler { return page.New(s, log) },
	})
	for _, l := range cfg.Admin.Listen {
		err := n.listenForOperators(ctx, l)
		if l.Address == config.DefaultAdminAddress && errors.Is(err, syscall.EADDRINUSE) {
			// Nobody has asked for this one.
			log.Warn("there is no page for operators: its address is taken; set admin.listen to another one", "address", l.Address)
			continue
		}
		if err != nil {
			return err
		}
	}
	if cfg.Admin.Metrics != "" {
		if err := n.listenForMetrics(ctx, cfg.Admin.Metrics); err != nil {
			return err
		}
	}
	// Last: by the socket a reload may come, which looks at what the addresses above have opened.
	if err := n.admin.Listen(cfg.Admin.Socket); errors.Is(err, syscall.EROFS) {
		log.Error("acproxy's own commands can't ask this server: its socket can't be made; admin.socket can be somewhere else", "socket", cfg.Admin.Socket, "err", err)
	} else if err != nil {
		return err
	}
	return n.sockets.Unused()
}

// listenForOperators answers operators at an address.
func (n *running) listenForOperators(ctx context.Context, l config.AdminListen) error {
	front := l.Front()
	listeners, err := n.sockets.Open(ctx, l.Address, fs.FileMode(l.Mode))
	if err != nil {
		return fmt.Errorf("listening for operators: %w", err)
	}
	hs := &http.Server{
		Handler: n.admin.Front(authMethods(l.Auth)), ErrorLog: slog.NewLogLogger(n.parts.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: time.Duration(n.parts.cfg.Clients.HeaderTimeout), IdleTimeout: time.Duration(n.parts.cfg.Clients.IdleTimeout),
	}
	hs.RegisterOnShutdown(n.admin.EndLive)
	scheme := "http"
	if front.TLS != config.TLSNone {
		scheme = "https"
		if err := n.useTLS(hs, front); err != nil {
			return errors.Join(fmt.Errorf("listening on %s: %w", l.Address, err), closeAll(listeners))
		}
	}
	n.fronts = append(n.fronts, hs)
	for _, listener := range listeners {
		if public(listener.Addr()) {
			if len(n.parts.cfg.Access.Rules) == 0 {
				n.parts.log.Warn("this address can be reached from other machines, and whoever reaches it can see what this server does; access.rules say who may", "address", listener.Addr())
			} else if front.TLS == config.TLSNone {
				n.parts.log.Warn("passwords and tokens that operators show at this address cross the network in clear; set tls for it", "address", listener.Addr())
			}
		}
		n.pages = append(n.pages, bound{scheme, listener}.String())
		n.parts.log.Info("serving operators", "address", n.pages[len(n.pages)-1])
		// Ends when stop shuts the server down.
		go func() {
			serve := hs.Serve
			if hs.TLSConfig != nil {
				serve = func(l net.Listener) error { return hs.ServeTLS(l, "", "") }
			}
			if err := serve(listener); !errors.Is(err, http.ErrServerClosed) {
				n.fail(fmt.Errorf("serving operators at %s: %w", l.Address, err))
			}
		}()
	}
	return nil
}

// fail ends the server for what it can't go on with.
func (n *running) fail(err error) {
	select {
	case n.failed <- err:
	default: // somebody else has ended it before
	}
}

func closeAll(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// rejudgeEvery is how often held images are judged again at least: clocks jump, and what comes to be held between two judgements may expire before the next.
const rejudgeEvery = time.Hour

// trustChanged has all held images judged again, now.
func (n *running) trustChanged() {
	select {
	case n.trusts <- struct{}{}:
	default: // a change that nobody has looked at yet stands for this one, too
	}
}

// rejudgeIn returns in how long held images are judged again by themselves: when the first of their keys or signatures expires, or one of the keys that are
// trusted, and after rejudgeEvery at the latest.
func rejudgeIn(now, until time.Time, keys []trust.Key) time.Duration {
	in := rejudgeEvery
	sooner := func(end time.Time) {
		// At the moment itself it is over. Should the clocks disagree about that, not at once again.
		if now.Before(end) {
			in = min(in, max(end.Sub(now), time.Second))
		}
	}
	sooner(until)
	for _, key := range keys {
		sooner(key.Expires)
		for _, sub := range key.Subkeys {
			sooner(sub.Expires)
		}
	}
	return in
}

// rejudge judges all held images at the start, whenever keys or policies have changed, when one of the keys expires, and every now and then. What can't be
// served any more, or can again, is told in the log, the audit and the metrics; serving itself asks the keys with each hit.
func (n *running) rejudge(ctx context.Context, log *slog.Logger) {
	for {
		if err := n.parts.store.Ready(ctx); err != nil {
			return
		}
		keys := n.parts.keys.Current().All()
		found, err := n.parts.fetcher.Rejudge(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Error("judging the held images again", "err", err)
		default:
			n.parts.metrics.Rejudged(found)
			log.Debug("judged the held images again", "images", found.Images, "quarantined", found.Quarantined, "changed", found.Changed)
		}
		timer := time.NewTimer(rejudgeIn(time.Now(), found.Until, keys))
		select {
		case <-n.trusts:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// mendEvery is how often images that are lost are asked for again.
const mendEvery = time.Hour

// mend fetches images again whose bytes are lost: at the start, as soon as one is found, and every now and then those that could not be had. It also inspects those
// again of which that went wrong.
func (n *running) mend(ctx context.Context, log *slog.Logger) {
	ticker := time.NewTicker(mendEvery)
	defer ticker.Stop()
	for {
		if err := n.parts.store.Ready(ctx); err != nil {
			return
		}
		switch done, err := n.parts.fetcher.Mend(ctx); {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Error("fetching lost images again", "err", err)
		case done.Lost > 0:
			log.Info("fetched lost images again", "lost", done.Lost, "mended", done.Mended)
		}
		n.parts.fetcher.InspectAgain(ctx)
		select {
		case <-n.parts.lost:
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// warnOfKeys names the key files that can't be used.
func warnOfKeys(keyring *trust.Keyring, log *slog.Logger) {
	for _, problem := range keyring.Problems() {
		log.Warn("a key file is skipped", "file", problem.File, "why", problem.Detail)
	}
}

func (n *running) serverConfig(cfg *config.Config, log *slog.Logger, access func(server.Access)) server.Config {
	out := server.Config{
		Fetcher: n.parts.fetcher, OCI: n.parts.oci, Keyring: n.parts.keys.Current, Guard: n.parts.guard, Ready: n.parts.ready, MaxAge: time.Duration(cfg.Freshness.MaxAge), TTL: time.Duration(cfg.Freshness.TTL),
		Via: n.parts.via, Tunnel: cfg.Proxy.Tunnel, Dial: n.parts.web.Dial, Access: n.answered(access), Traces: n.traces, Log: log,
		Patience: server.Patience{
			Header: time.Duration(cfg.Clients.HeaderTimeout), Idle: time.Duration(cfg.Clients.IdleTimeout), Stall: time.Duration(cfg.Clients.StallTimeout),
		},
		Limits: server.Limits{
			Rate: cfg.Clients.Rate, Burst: cfg.Clients.Burst,
			MaxConnections: cfg.Clients.MaxConnections, MaxConnectionsPerClient: cfg.Clients.MaxConnectionsPerClient,
		},
		Push: server.Push{
			MaxUploads: cfg.Push.MaxUploads, Timeout: time.Duration(cfg.Push.Timeout), MaxManifest: int64(cfg.Fetch.Limits.MaxManifest), MaxSignature: int64(cfg.Fetch.MaxSignatureSize),
		},
		Pushed: n.parts.metrics.Pushed, Challenge: n.challenged(),
		AllKeys: cfg.Trust.Publish == config.PublishAll, ImageHost: imageHosts(cfg.Proxy.Hosts, n.parts.ca),
	}
	if cfg.PublicURL != "" {
		// It was checked when the configuration was read.
		out.PublicURL, _ = url.Parse(cfg.PublicURL)
	}
	if ca := n.parts.ca; ca != nil {
		out.Certificate, out.CAPEM = ca.GetCertificate, ca.PEM()
	}
	return out
}

// answered returns what is told of each request: the metrics, and access unless it is nil.
func (n *running) answered(access func(server.Access)) func(server.Access) {
	if access == nil {
		return n.parts.metrics.Answered
	}
	return func(a server.Access) {
		n.parts.metrics.Answered(a)
		access(a)
	}
}

// imageHosts returns whether a host is one that the proxy front door answers for: as configured, else what the local CA was made for.
func imageHosts(hosts []string, ca *localca.CA) func(string) bool {
	return func(host string) bool {
		if len(hosts) == 0 {
			return ca != nil && ca.Permits(host)
		}
		return slices.ContainsFunc(hosts, func(pattern string) bool {
			if domain, ok := strings.CutPrefix(pattern, "*"); ok {
				return strings.HasSuffix(host, domain) && len(host) > len(domain)
			}
			return host == pattern
		})
	}
}

// listenForMetrics answers Prometheus, and probes.
func (n *running) listenForMetrics(ctx context.Context, address string) error {
	listeners, err := n.sockets.Open(ctx, address, fs.FileMode(config.DefaultMode))
	if err != nil {
		return fmt.Errorf("listening for metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", n.parts.metrics.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := n.parts.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Duration(n.parts.cfg.Clients.HeaderTimeout), IdleTimeout: time.Duration(n.parts.cfg.Clients.IdleTimeout)}
	n.fronts = append(n.fronts, hs)
	for _, listener := range listeners {
		n.parts.log.Info("serving metrics", "address", listener.Addr().String())
		// Ends when stop shuts the server down.
		go func() {
			if err := hs.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				n.fail(fmt.Errorf("serving metrics at %s: %w", address, err))
			}
		}()
	}
	return nil
}

// front is what serves a listener.
type front interface {
	Shutdown(ctx context.Context) error
	Close() error
}

// listen opens the listeners of one address, of which systemd may have several, and serves them.
func (n *running) listen(ctx context.Context, l config.Listen, log *slog.Logger) error {
	listeners, err := n.sockets.Open(ctx, l.Address, fs.FileMode(l.Mode))
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	for i, listener := range listeners {
		if err := n.serve(l, listener, log); err != nil {
			return errors.Join(fmt.Errorf("listening on %s: %w", l.Address, err), closeAll(listeners[i:]))
		}
	}
	return nil
}

// serve serves a listener as its address is configured.
func (n *running) serve(l config.Listen, listener net.Listener, log *slog.Logger) error {
	hs := n.server.HTTP(server.Front{Proxy: l.Proxy, Auth: authMethods(l.Auth)})
	hs.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	scheme := "http"
	if l.TLS != config.TLSNone {
		scheme = "https"
		if err := n.useTLS(hs, l); err != nil {
			return err
		}
	}
	_, early := listen.SystemdName(l.Address)
	listener, err := n.server.Admit(listener, early)
	if err != nil {
		return err
	}
	if public(listener.Addr()) {
		warnOfAddress(n.parts.cfg, l, listener.Addr(), log)
	}
	n.bound = append(n.bound, bound{scheme, listener})
	var front front = hs
	serve := func() error { return hs.ServeTLS(listener, "", "") }
	if hs.TLSConfig == nil {
		door := n.server.Door(hs)
		front, serve = door, func() error { return door.Serve(listener) }
	}
	n.fronts = append(n.fronts, front)
	// Ends when stop shuts the server down.
	go func() {
		if err := serve(); !errors.Is(err, http.ErrServerClosed) {
			n.fail(fmt.Errorf("serving %s: %w", l.Address, err))
		}
	}()
	return nil
}

// warnOfAddress says what who can reach an address from other machines can do.
func warnOfAddress(cfg *config.Config, l config.Listen, addr net.Addr, log *slog.Logger) {
	if len(cfg.Access.Rules) == 0 && (len(l.Auth) == 0 || slices.Contains(l.Auth, config.AuthAnonymous)) {
		log.Warn("this address can be reached from other machines, and whoever reaches it can read every image; access.rules say who may", "address", addr)
	}
	if shown := authMethods(l.Auth); l.TLS == config.TLSNone && len(cfg.Access.Rules) > 0 && (shown == 0 || shown&(access.Basic|access.Bearer) != 0) {
		log.Warn("passwords and tokens that clients show at this address cross the network in clear; set tls for it, or auth: [anonymous]", "address", addr)
	}
}

// authMethods returns how clients may show who they are, 0 for every way.
func authMethods(words []string) (methods access.Method) {
	for _, word := range words {
		methods |= map[string]access.Method{
			config.AuthAnonymous: access.Anonymous, config.AuthBasic: access.Basic, config.AuthBearer: access.Bearer, config.AuthCertificate: access.Certificate,
		}[word]
	}
	return methods
}

func public(addr net.Addr) bool {
	ap, err := netip.ParseAddrPort(addr.String())
	return err == nil && !ap.Addr().IsLoopback()
}

// useTLS has a server speak TLS as its address is configured.
func (n *running) useTLS(hs *http.Server, l config.Listen) error {
	out := server.TLS()
	hs.TLSConfig = out
	if l.ClientCAFile != "" {
		var err error
		if out.ClientCAs, err = rootsOf(x509.NewCertPool(), l.ClientCAFile); err != nil {
			return err
		}
		out.ClientAuth = tls.VerifyClientCertIfGiven
		if slices.Equal(l.Auth, []string{config.AuthCertificate}) {
			out.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	switch l.TLS {
	case config.TLSACME:
		return n.useACME(hs, l)
	case config.TLSLocalCA:
		if n.parts.ca == nil {
			return errors.New("tls: local-ca needs the local CA, which isn't there; make it with: acproxy ca init --host HOST")
		}
		out.GetCertificate = n.parts.ca.GetCertificate
		return nil
	}
	cert, err := n.certificateFiles(l)
	if err != nil {
		return err
	}
	out.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert.Get(), nil }
	return nil
}

// addresses returns the URLs of the listeners.
func (n *running) addresses() []string {
	var out []string
	for _, b := range n.bound {
		out = append(out, b.String())
	}
	return out
}

// stop ends the server: no new requests, those in progress and the downloads may end within the grace, then everything is closed. What has arrived of
// an image is kept for the next start.
func (n *running) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(n.parts.cfg.StopGrace))
	defer cancel()
	ended := make([]error, len(n.fronts))
	var listeners sync.WaitGroup
	for i, front := range n.fronts {
		// All at once, so that none goes on accepting while another one is waited for. Ends with the grace; waited for below.
		listeners.Go(func() {
			if err := front.Shutdown(ctx); err != nil {
				ended[i] = errors.Join(ignoreDeadline(err), front.Close())
			}
		})
	}
	listeners.Wait()
	errs := []error{errors.Join(ended...)}
	n.parts.fetcher.Drain(ctx)
	if n.admin != nil {
		errs = append(errs, n.admin.Close())
	}
	if n.stopWork != nil {
		n.forget()
		n.stopWork()
		n.work.Wait()
	}
	if n.server != nil {
		errs = append(errs, n.server.Close())
	}
	if n.sockets != nil {
		errs = append(errs, n.sockets.Close())
	}
	errs = append(errs, n.parts.close())
	n.lastTraces()
	return errors.Join(errs...)
}

// lastTraces sends the spans that wait to be sent, or says that it could not.
func (n *running) lastTraces() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := n.traces.Close(ctx); err != nil {
		n.parts.log.Warn("the last traces could not be exported", "err", err)
	}
}

// ignoreDeadline drops the error that says that a request took longer than the grace: its client is cut off, as announced.
func ignoreDeadline(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}
