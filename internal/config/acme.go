package config

import (
	"encoding/base64"
	"fmt"
	"net/mail"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// maxACMEHosts bounds the names that certificates are had for: each is an order of its own, and ACME servers count them.
const maxACMEHosts = 100

// Met returns the ways in which the ACME server is shown that a name is ours, those of the configuration or else those that there are addresses for.
func (c *Config) Met() []string {
	if len(c.ACME.Challenges) > 0 {
		return slices.Clone(c.ACME.Challenges)
	}
	if c.plain() {
		return []string{ChallengeTLSALPN01, ChallengeHTTP01}
	}
	return []string{ChallengeTLSALPN01}
}

// plain reports whether an address of nodes is one without TLS.
func (c *Config) plain() bool {
	return slices.ContainsFunc(c.Listen, func(l Listen) bool { return l.TLS == TLSNone })
}

// UsesACME reports whether an address has certificates of an ACME server.
func (c *Config) UsesACME() bool {
	return slices.ContainsFunc(c.listeners(), func(l listener) bool { return l.TLS == TLSACME })
}

// checkACME checks how certificates are had from an ACME server, and whether they are wanted.
func (c *Config) checkACME(r *report) {
	a := c.ACME
	if problem := checkDirectory(a.Directory); problem != "" && !r.broken("acme.directory") {
		r.value("acme.directory", "%s", problem)
	}
	if a.Email != "" {
		if parsed, err := mail.ParseAddress(a.Email); err != nil || parsed.Address != a.Email {
			r.value("acme.email", "%q is no e-mail address: write one as in ops@example.com", clip(a.Email))
		}
	}
	c.checkACMEHosts(r)
	for i, challenge := range a.Challenges {
		switch path := index("acme.challenges", i); {
		case slices.Contains(a.Challenges[:i], challenge):
			r.value(path, "%s stands here twice: remove one", challenge)
		case challenge == ChallengeHTTP01 && !c.plain() && !r.broken("listen"):
			r.value(path, "http-01 is answered in clear, and no address of listen has tls: none: add one that is reached at port 80, or remove this")
		}
	}
	switch {
	case a.EABKeyID != "" && a.EABKeyFile == "":
		r.key("acme.eab_key_id", "there is an eab_key_id without an eab_key_file: name the file with the key that belongs to it")
	case a.EABKeyID == "" && a.EABKeyFile != "":
		r.key("acme.eab_key_file", "there is an eab_key_file without an eab_key_id: add the ID that the key belongs to")
	}
	if r.broken("listen") || r.broken("admin") {
		return
	}
	if !c.UsesACME() {
		if len(a.Hosts) > 0 {
			r.key("acme.hosts", "no address has tls: acme, so this does nothing: write that at one of listen, or remove this")
		}
		return
	}
	for _, l := range c.listeners() {
		if l.TLS != TLSACME {
			continue
		}
		switch {
		case len(a.Hosts) == 0 && !r.broken("acme.hosts"):
			r.value(l.path+".tls", "tls: acme needs the names that certificates are for: list this server's own as acme.hosts")
		case !a.AcceptTerms && !r.broken("acme.accept_terms"):
			r.value(l.path+".tls", "tls: acme needs you to agree to the terms of service of %s: read them, and write acme.accept_terms: true", clip(a.Directory))
		}
		return
	}
}

// checkACMEHosts checks the names that certificates are for.
func (c *Config) checkACMEHosts(r *report) {
	if n := len(c.ACME.Hosts); n > maxACMEHosts {
		r.value("acme.hosts", "%d names are too many, %d are the limit: list those by which this server itself is reached", n, maxACMEHosts)
	}
	for i, host := range c.ACME.Hosts {
		path := index("acme.hosts", i)
		if r.broken(path) {
			continue
		}
		_, err := netip.ParseAddr(host)
		switch problem := checkHost(host); {
		case err == nil:
			r.value(path, "%s is an address: certificates are had for names alone", host)
		case strings.Contains(host, "*"):
			r.value(path, "%q has a wildcard, for which DNS would have to be changed: list each name", clip(host))
		case problem != "":
			r.value(path, "%s", problem)
		case slices.Contains(c.ACME.Hosts[:i], host):
			r.value(path, "%s stands here twice: remove one", host)
		}
	}
}

// checkDirectory says what is wrong with the URL of an ACME server's directory, "" if nothing is.
func checkDirectory(text string) string {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return fmt.Sprintf("%q is not the URL of a directory: write one as in https://acme-v02.api.letsencrypt.org/directory", clip(text))
	case u.Scheme == "http":
		return fmt.Sprintf("%q is plain http, which no ACME server is spoken to by (RFC 8555, section 6.1): write https, and ca_file if its certificate is one of your own", clip(text))
	case u.User != nil || u.Fragment != "":
		return "the URL of a directory has neither user nor fragment: an account elsewhere is shown by eab_key_id and eab_key_file"
	}
	return checkHostPort(u.Host)
}

// checkACMEFiles notes files that can't be used.
func (c *Config) checkACMEFiles(r *report) {
	checkCAFile(r, "acme.ca_file", c.ACME.CAFile)
	if c.ACME.EABKeyFile == "" || r.broken("acme.eab_key_file") {
		return
	}
	text, err := readPEM(c.ACME.EABKeyFile)
	if err != nil {
		r.value("acme.eab_key_file", "%v", err)
		return
	}
	// What stands in it is not told.
	if key, err := base64.RawURLEncoding.DecodeString(EABKey(text)); err != nil || len(key) == 0 {
		r.value("acme.eab_key_file", "%s holds no key in base64url: put the key there alone, as the server's owner gives it", c.ACME.EABKeyFile)
	}
}

// EABKey returns the key of an account elsewhere from the content of its file, without the padding and the line break that may be there.
func EABKey(text []byte) string { return strings.TrimRight(strings.TrimSpace(string(text)), "=") }
