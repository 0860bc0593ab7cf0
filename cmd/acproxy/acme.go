package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/acproxy/acproxy/internal/acme"
	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/journal"
	"github.com/acproxy/acproxy/internal/metrics"
	"github.com/acproxy/acproxy/internal/reread"
)

// openACME opens what has certificates issued, if an address wants any. Nobody is asked before renew.
func (n *running) openACME(cfg *config.Config, log *slog.Logger) error {
	if !cfg.UsesACME() {
		return nil
	}
	a, p := cfg.ACME, n.parts
	directory, err := url.Parse(a.Directory)
	if err != nil {
		return fmt.Errorf("acme.directory: %w", err)
	}
	var roots *x509.CertPool
	if a.CAFile != "" {
		if roots, err = rootsWith(a.CAFile); err != nil {
			return fmt.Errorf("acme.ca_file: %w", err)
		}
	}
	o := acme.Options{
		Directory: a.Directory, Hosts: a.Hosts, Challenges: cfg.Met(), Email: a.Email, Terms: a.AcceptTerms, Dir: a.Dir,
		Transport: p.web.Named(directory, roots), UserAgent: "acproxy/" + buildVersion(), Offline: p.web.Offline, Log: log,
		Happened: func(e acme.Event) {
			p.metrics.Ordered(e.Err == nil)
			if e.Err != nil {
				p.happened(journal.EventNoCertificate, fmt.Sprintf("%s: %v; it is tried again at %s", e.Host, e.Err, e.Again.UTC().Format(time.RFC3339)))
				return
			}
			p.happened(journal.EventCertificate, fmt.Sprintf("%s, until %s", e.Host, e.NotAfter.UTC().Format(time.RFC3339)))
		},
	}
	if a.EABKeyFile != "" {
		text, err := os.ReadFile(a.EABKeyFile)
		if err != nil {
			return fmt.Errorf("acme.eab_key_file: %w", err)
		}
		o.EABKeyID, o.EABKey = a.EABKeyID, config.EABKey(text)
	}
	n.acme = acme.Open(o)
	return nil
}

// renew has certificates issued and renewed from now on, when validators find the listeners open.
func (n *running) renew(ctx context.Context) {
	if n.acme == nil {
		return
	}
	// Ends when stop cancels ctx; stop waits for it.
	n.work.Go(func() { n.acme.Run(ctx) })
}

// challenged returns what validators of the ACME server are told in clear; nil if there are none to come.
func (n *running) challenged() func(path string) (string, bool) {
	if n.acme == nil {
		return nil
	}
	return n.acme.Answer
}

// useACME has a server for TLS show the certificates that were issued, to clients that ask for one of the names that they are for, or for none. To all others, and
// as long as there is none, it shows the certificate of the files if there are any, else what the local CA makes.
func (n *running) useACME(hs *http.Server, l config.Listen) error {
	var files *reread.Files[*tls.Certificate]
	if l.CertFile != "" {
		var err error
		if files, err = n.certificateFiles(l); err != nil {
			return err
		}
	}
	other := func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		switch {
		case files != nil:
			return files.Get(), nil
		case n.parts.ca != nil:
			return n.parts.ca.GetCertificate(hello)
		}
		return nil, errors.New("no certificate is for this name: it is none of acme.hosts, or none was issued for it yet, and there is neither a cert_file nor a local CA")
	}
	n.acme.Server(hs)
	hs.TLSConfig.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		name := hello.ServerName
		if name == "" && files == nil {
			name = n.acme.Hosts()[0] // it has connected to an address, and has to decide by itself
		}
		issued, valid := n.acme.Certificate(name)
		if valid {
			return issued, nil
		}
		cert, err := other(hello)
		if err != nil && issued != nil {
			return issued, nil // one that has ended says more than none
		}
		return cert, err
	}
	return nil
}

// certificateFiles opens the files of a certificate, which are read again when they have changed.
func (n *running) certificateFiles(l config.Listen) (*reread.Files[*tls.Certificate], error) {
	cert, err := reread.Open([]string{l.CertFile, l.KeyFile}, func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(l.CertFile, l.KeyFile)
		return &cert, err
	}, func(err error) {
		n.parts.log.Error("a certificate has changed and can't be read; the one before goes on being used", "cert_file", l.CertFile, "key_file", l.KeyFile, "err", err)
	})
	if err != nil {
		return nil, err
	}
	n.certificates = append(n.certificates, cert)
	n.shown = append(n.shown, cert.Get)
	return cert, nil
}

// shownCertificates returns what clients are shown, for the metrics.
func (n *running) shownCertificates() []metrics.Certificate {
	var all []metrics.Certificate
	if n.acme != nil {
		for _, s := range n.acme.States() {
			all = append(all, metrics.Certificate{Source: config.TLSACME, Name: s.Host, NotAfter: s.NotAfter})
		}
	}
	for _, get := range n.shown {
		if leaf := get().Leaf; leaf != nil {
			name := leaf.Subject.CommonName
			if len(leaf.DNSNames) > 0 {
				name = leaf.DNSNames[0]
			}
			all = append(all, metrics.Certificate{Source: config.TLSFiles, Name: name, NotAfter: leaf.NotAfter})
		}
	}
	if ca := n.parts.ca; ca != nil {
		all = append(all, metrics.Certificate{Source: config.TLSLocalCA, Name: ca.Name(), NotAfter: ca.NotAfter()})
	}
	return all
}
