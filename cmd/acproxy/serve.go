package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/acproxy/acproxy/internal/admin"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/localca"
	"github.com/acproxy/acproxy/internal/server"
)

func newServe(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the server",
		Long: `serve answers nodes until it is told to stop (SIGINT or SIGTERM). Without any configuration it keeps everything under the data directory and
listens on 127.0.0.1:8080, as direct URLs, as HTTP proxy and for hosts that resolve to it.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.Log, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			n, err := start(cfg, log)
			if err != nil {
				return err
			}
			log.Info("serving", "version", buildVersion(), "data_dir", cfg.DataDir, "addresses", n.addresses())
			var failed error
			select {
			case <-cmd.Context().Done():
				log.Info("stopping")
			case failed = <-n.failed:
			}
			return errors.Join(failed, n.stop())
		},
	}
}

// Limits of the listeners.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 64 << 10
	// stopGrace is how long requests in progress may take to end when the server is told to stop.
	stopGrace = 10 * time.Second
)

// running is an acproxy that serves.
type running struct {
	parts    *parts
	server   *server.Server
	admin    *admin.Server
	http     []*http.Server
	bound    []bound
	failed   chan error // what ends the server although nobody told it to stop
	stopWork context.CancelFunc
	resumed  chan struct{} // closed when the inspections that a restart interrupted are over
}

type bound struct {
	scheme string
	net.Listener
}

// start opens everything and listens. It returns once all listeners accept connections.
func start(cfg *config.Config, log *slog.Logger) (*running, error) {
	p, err := newParts(cfg, log)
	if err != nil {
		return nil, err
	}
	n := &running{parts: p, failed: make(chan error, len(cfg.Listen)+1), resumed: make(chan struct{})}
	if err := n.open(cfg, log); err != nil {
		return nil, errors.Join(err, n.stop())
	}
	return n, nil
}

func (n *running) open(cfg *config.Config, log *slog.Logger) error {
	n.server = server.New(n.serverConfig(cfg, log))
	ctx, cancel := context.WithCancel(context.Background())
	n.stopWork = cancel
	// Ends when all are inspected or stop cancels it; stop waits for it.
	go func() {
		defer close(n.resumed)
		if err := n.parts.fetcher.ResumeInspections(ctx); err != nil && ctx.Err() == nil {
			log.Error("resuming inspections", "err", err)
		}
	}()
	for _, l := range cfg.Listen {
		if err := n.listen(l, log); err != nil {
			return err
		}
	}
	var err error
	n.admin, err = admin.Listen(cfg.Admin.Socket, n.parts.store, log)
	return err
}

func (n *running) serverConfig(cfg *config.Config, log *slog.Logger) server.Config {
	out := server.Config{
		Fetcher: n.parts.fetcher, Keyring: n.parts.keys.Current, MaxAge: time.Duration(cfg.Freshness.MaxAge), TTL: time.Duration(cfg.Freshness.TTL),
		Via: n.parts.via, Tunnel: cfg.Proxy.Tunnel, Dial: n.parts.web.Dial, AccessLog: cfg.Log.Access, Log: log,
		ImageHost: imageHosts(cfg.Proxy.Hosts, n.parts.ca),
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

// listen opens one listener and serves it.
func (n *running) listen(l config.Listen, log *slog.Logger) error {
	hs := &http.Server{
		Handler: n.server.Handler(l.Proxy), ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	scheme := "http"
	if l.TLS != config.TLSNone {
		scheme = "https"
		tlsConfig, err := n.tlsConfig(l)
		if err != nil {
			return fmt.Errorf("listening on %s: %w", l.Address, err)
		}
		hs.TLSConfig = tlsConfig
	}
	listener, err := net.Listen("tcp", l.Address)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	if public(listener.Addr()) {
		log.Warn("this address can be reached from other machines, and whoever reaches it can read every image", "address", listener.Addr())
	}
	n.bound = append(n.bound, bound{scheme, listener})
	n.http = append(n.http, hs)
	// Ends when stop shuts the server down.
	go func() {
		err := error(nil)
		if hs.TLSConfig != nil {
			err = hs.ServeTLS(listener, "", "")
		} else {
			err = hs.Serve(listener)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			n.failed <- fmt.Errorf("serving %s: %w", l.Address, err)
		}
	}()
	return nil
}

func public(addr net.Addr) bool {
	ap, err := netip.ParseAddrPort(addr.String())
	return err == nil && !ap.Addr().IsLoopback()
}

func (n *running) tlsConfig(l config.Listen) (*tls.Config, error) {
	// Old builds of rkt know TLS 1.2 at the most.
	out := &tls.Config{MinVersion: tls.VersionTLS12}
	if l.TLS == config.TLSLocalCA {
		if n.parts.ca == nil {
			return nil, errors.New("tls: local-ca needs the local CA, which isn't there; make it with: acproxy ca init --host HOST")
		}
		out.GetCertificate = n.parts.ca.GetCertificate
		return out, nil
	}
	cert, err := tls.LoadX509KeyPair(l.CertFile, l.KeyFile)
	if err != nil {
		return nil, err
	}
	out.Certificates = []tls.Certificate{cert}
	return out, nil
}

// addresses returns the URLs of the listeners.
func (n *running) addresses() []string {
	var out []string
	for _, b := range n.bound {
		out = append(out, b.scheme+"://"+b.Addr().String())
	}
	return out
}

// stop ends the server: no new requests, those in progress may end within the grace, then everything is closed.
func (n *running) stop() error {
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	for _, hs := range n.http {
		if err := hs.Shutdown(ctx); err != nil {
			errs = append(errs, ignoreDeadline(err), hs.Close())
		}
	}
	if n.admin != nil {
		errs = append(errs, n.admin.Close())
	}
	if n.stopWork != nil {
		n.stopWork()
		<-n.resumed
	}
	if n.server != nil {
		errs = append(errs, n.server.Close())
	}
	errs = append(errs, n.parts.close())
	return errors.Join(errs...)
}

// ignoreDeadline drops the error that says that a request took longer than the grace: its client is cut off, as announced.
func ignoreDeadline(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}
