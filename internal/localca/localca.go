// Package localca is the certificate authority of one acproxy: it vouches for image hosts towards the nodes that trust it.
package localca

import (
	"bytes"
	"container/list"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
	"golang.org/x/sync/singleflight"
)

// The files of a CA, inside its directory.
const (
	CertFile = "ca.pem"     // the certificate that nodes install, readable by everybody
	KeyFile  = "ca-key.pem" // its private key in PKCS #8, readable by its owner alone
)

const (
	defaultValidFor = 10 * 365 * 24 * time.Hour
	leafValidFor    = 90 * 24 * time.Hour
	// backdate is how far the clock of a node may lag behind ours.
	backdate  = time.Hour
	maxLeaves = 1000
	// maxCommonName is ub-common-name of RFC 5280. Verifiers read the alternative names; the common name is for people.
	maxCommonName = 64
	maxFileSize   = 1 << 20 // bytes of a file that Load reads
)

// Options says how Init makes a CA. The zero Options are good.
type Options struct {
	CommonName string           // the name that people see in a list of certificates; "" means "acproxy CA (first host)"
	ValidFor   time.Duration    // 0 means ten years
	Now        func() time.Time // nil means time.Now
	FS         durable.FS       // nil means durable.OS

	// Critical marks the name constraints as critical, as RFC 5280 (section 4.2.1.10) asks. Whoever understands name constraints keeps to
	// them either way: Go, OpenSSL, GnuTLS and NSS do. The difference is to whoever does not understand all of them. Go before 1.10, with
	// which rkt's releases were built, knows only permitted DNS names and drops a certificate with any other critical constraint, so that
	// such a node trusts nothing we show it ("certificate signed by unknown authority"); a constraint that isn't critical it obeys as far
	// as DNS names go. Set Critical where no such node is left.
	Critical bool
}

// A CA is a certificate authority for a few hosts and their subdomains. It is safe for concurrent use.
type CA struct {
	cert    *x509.Certificate
	key     crypto.Signer
	pem     []byte
	hosts   hostSet
	now     func() time.Time
	leafKey *ecdsa.PrivateKey // of every leaf of this process: it is never written down
	minting singleflight.Group

	mu     sync.Mutex
	leaves map[string]*list.Element // of recent, by host
	recent *list.List               // of *leaf, the last used first
}

// A leaf is a certificate that was minted for a host.
type leaf struct {
	host    string
	cert    *tls.Certificate
	renewAt time.Time
}

// Init makes a CA for hosts in dir: an ECDSA P-256 key and a certificate that permits those hosts, signs no other CA and serves for TLS
// servers only. A host covers its subdomains: a name constraint of RFC 5280 (section 4.2.1.10) can't leave them out. "*.example.com" is
// taken as example.com, because the verifiers in use disagree about constraints that leave the domain itself out. IP addresses may be
// given as well; all others are excluded.
//
// It writes [CertFile] (0644) and [KeyFile] (0600) and makes dir (0700) if it isn't there. It returns an error matching
// [acproxy.ErrInvalid] for hosts that can't be meant, and one matching [fs.ErrExist] if dir holds a CA already: nodes trust that one, so it
// is not overwritten.
//
//	mkdir dir ─▶ fsync parent ─▶ key (write, fsync, rename, fsync dir) ─▶ certificate (the same)
//
// The key comes first: a certificate without a key could never be used, nor be told from one whose key was lost.
func Init(dir string, hosts []string, opts Options) (*CA, error) {
	set, err := newHostSet(hosts)
	if err != nil {
		return nil, err
	}
	fsys, now, validFor := opts.FS, opts.Now, opts.ValidFor
	if fsys == nil {
		fsys = durable.OS{}
	}
	if now == nil {
		now = time.Now
	}
	switch {
	case validFor == 0:
		validFor = defaultValidFor
	case validFor < time.Hour:
		return nil, acproxy.Invalid("a CA that is valid for %v ends before anybody has installed it: give at least an hour", validFor)
	}
	if err := checkAbsent(dir); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := selfSign(key, set, opts, now(), validFor)
	if err != nil {
		return nil, fmt.Errorf("making a CA certificate for %s: %w", set, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := fsys.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := fsys.SyncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
		return nil, err
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	if err := durable.WriteFile(fsys, filepath.Join(dir, KeyFile), keyPEM, 0o600); err != nil {
		return nil, fmt.Errorf("writing the CA's key: %w", err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := durable.WriteFile(fsys, filepath.Join(dir, CertFile), certPEM, 0o644); err != nil {
		return nil, fmt.Errorf("writing the CA's certificate: %w", err)
	}
	return load(dir, now)
}

// Load reads the CA in dir. It returns an error matching [fs.ErrNotExist] if there is none, so that the caller can say how one is made, and
// other errors if it can't be used: the key belongs to another certificate or may be read by others than its owner, the certificate has
// expired, is not a CA's, or is not constrained to any hosts. A key that root owns may be read by its group, which is how Kubernetes mounts a Secret for a
// pod with a user of its own (fsGroup).
func Load(dir string) (*CA, error) { return load(dir, time.Now) }

func load(dir string, now func() time.Time) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)
	certPEM, _, err := readFile(certPath)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s holds no certificate in PEM", certPath)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", certPath, err)
	}
	keyPEM, keyFile, err := readFile(keyPath)
	if errors.Is(err, fs.ErrNotExist) {
		// This is not the same as no CA at all: making another one would not bring it back.
		return nil, fmt.Errorf("%s is there, but not its key %s: restore the key, or move the certificate away and make a new CA", certPath, keyPath)
	}
	if err != nil {
		return nil, err
	}
	if mode := keyFile.Mode().Perm(); mode&0o077 != 0 && !(mode&0o077 == 0o040 && ownedByRoot(keyFile) && os.Geteuid() != 0) {
		return nil, fmt.Errorf("the CA's key %s has mode %04o: whoever can read it can pose as every host of this CA; run: chmod 600 %s", keyPath, mode, keyPath)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", keyPath, err)
	}
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("the key %s does not belong to the certificate %s: restore the one that does", keyPath, certPath)
	}
	if !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("%s is not the certificate of a CA: it may not sign others", certPath)
	}
	hosts := constrainedTo(cert)
	if len(hosts.domains)+len(hosts.addrs) == 0 {
		return nil, fmt.Errorf("%s is not constrained to any hosts: it could vouch for the whole internet; make one with: acproxy ca init", certPath)
	}
	if end := cert.NotAfter; now().After(end) {
		return nil, fmt.Errorf("%s expired on %s: move %s away, make a new CA with: acproxy ca init, and install it on the nodes", certPath, end.Format(time.DateOnly), dir)
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return &CA{
		cert: cert, key: key, pem: pem.EncodeToMemory(block), hosts: hosts, now: now, leafKey: leafKey,
		leaves: make(map[string]*list.Element), recent: list.New(),
	}, nil
}

// Certificate returns a certificate for a host or an IP address, signed by the CA: ECDSA P-256, for TLS servers, valid from an hour ago for
// 90 days or until the CA ends. It is minted when first asked for and again when two thirds of its time are over; up to 1000 are
// kept. The chain is the leaf alone: a node that trusts the CA has it, for others it would not help.
//
// It returns an error matching [acproxy.ErrRefused] for a host that the CA does not permit.
func (c *CA) Certificate(host string) (*tls.Certificate, error) {
	host = canonicalHost(host)
	if !c.hosts.permits(host) {
		return nil, &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "host-not-permitted",
			Detail: fmt.Sprintf("the local CA has no certificate for %q: it was made for %s and their subdomains; a CA for other hosts is made with: acproxy ca init", clip(host), c.hosts),
		}
	}
	if cert := c.kept(host); cert != nil {
		return cert, nil
	}
	cert, err, _ := c.minting.Do(host, func() (any, error) {
		// Another flight may have landed between looking and taking off.
		if cert := c.kept(host); cert != nil {
			return cert, nil
		}
		l, err := c.mint(host)
		if err != nil {
			return nil, fmt.Errorf("minting a certificate for %s: %w", host, err)
		}
		c.keep(l)
		return l.cert, nil
	})
	if err != nil {
		return nil, err
	}
	return cert.(*tls.Certificate), nil
}

// GetCertificate is Certificate for the host that a client names in its greeting; it fits [tls.Config]. A client that names none, because
// it connects to an IP address or is very old, gets an error that says so.
func (c *CA) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if hello.ServerName == "" {
		return nil, &acproxy.Error{
			Kind: acproxy.ErrRefused, Code: "no-server-name",
			Detail: "the client named no host (no SNI), as it does when it connects to an IP address: certificates are made for one of " + c.hosts.String(),
		}
	}
	return c.Certificate(hello.ServerName)
}

// PEM returns the CA's certificate as nodes install it.
func (c *CA) PEM() []byte { return bytes.Clone(c.pem) }

// Hosts returns the hosts and IP addresses that the CA permits. Each host covers its subdomains.
func (c *CA) Hosts() []string { return c.hosts.names() }

// Permits reports whether the CA may vouch for a host or IP address.
func (c *CA) Permits(host string) bool { return c.hosts.permits(canonicalHost(host)) }

// Name returns what people see in a list of certificates.
func (c *CA) Name() string { return c.cert.Subject.CommonName }

// NotAfter returns when the CA ends.
func (c *CA) NotAfter() time.Time { return c.cert.NotAfter }

// Fingerprint returns the SHA-256 of the CA's certificate as openssl prints it: hex digits in pairs, with colons between.
func (c *CA) Fingerprint() string {
	sum := sha256.Sum256(c.cert.Raw)
	return strings.ReplaceAll(fmt.Sprintf("% X", sum[:]), " ", ":")
}

// kept returns the certificate for a host if there is one that need not be renewed yet.
func (c *CA) kept(host string) *tls.Certificate {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.leaves[host]
	if !ok || !now.Before(e.Value.(*leaf).renewAt) {
		return nil
	}
	c.recent.MoveToFront(e)
	return e.Value.(*leaf).cert
}

func (c *CA) keep(l *leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.leaves[l.host]; ok {
		e.Value = l
		c.recent.MoveToFront(e)
		return
	}
	c.leaves[l.host] = c.recent.PushFront(l)
	if c.recent.Len() > maxLeaves {
		oldest := c.recent.Remove(c.recent.Back()).(*leaf)
		delete(c.leaves, oldest.host)
	}
}

func (c *CA) mint(host string) (*leaf, error) {
	now := c.now()
	if now.After(c.cert.NotAfter) {
		return nil, fmt.Errorf("the local CA expired on %s: make a new one with: acproxy ca init, and install it on the nodes", c.cert.NotAfter.Format(time.DateOnly))
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    later(now.Add(-backdate), c.cert.NotBefore),
		NotAfter:     now.Add(leafValidFor),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		// crypto/x509 and OpenSSL ask for it on everything but a self-signed root.
		AuthorityKeyId:        c.cert.SubjectKeyId,
		BasicConstraintsValid: true,
	}
	template.Subject = pkix.Name{Organization: []string{"acproxy"}}
	if addr, err := netip.ParseAddr(host); err == nil {
		// No common name goes beside an address: OpenSSL and GnuTLS would take it for a DNS name and find it not permitted.
		template.IPAddresses = []net.IP{addr.AsSlice()}
	} else {
		template.DNSNames = []string{host}
		if len(host) <= maxCommonName {
			template.Subject.CommonName = host
		}
	}
	renewAt := now.Add(leafValidFor * 2 / 3)
	if !template.NotAfter.Before(c.cert.NotAfter) {
		// The last one: another would end at the same moment.
		template.NotAfter = c.cert.NotAfter
		renewAt = c.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, c.leafKey.Public(), c.key)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &leaf{host: host, renewAt: renewAt, cert: &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: c.leafKey, Leaf: parsed}}, nil
}

// selfSign returns the certificate of a new CA in DER.
func selfSign(key *ecdsa.PrivateKey, hosts hostSet, opts Options, now time.Time, validFor time.Duration) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	name := opts.CommonName
	if name == "" {
		name = fmt.Sprintf("acproxy CA (%s)", hosts.names()[0])
	}
	if len(name) > maxCommonName {
		name = strings.ToValidUTF8(name[:maxCommonName], "")
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validFor),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                  true,
		MaxPathLenZero:        true,
		BasicConstraintsValid: true,

		PermittedDNSDomainsCritical: opts.Critical,
	}
	hosts.constrain(template)
	return x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
}

// checkAbsent returns an error matching fs.ErrExist if a file of a CA is in dir.
func checkAbsent(dir string) error {
	for _, name := range []string{CertFile, KeyFile} {
		path := filepath.Join(dir, name)
		switch _, err := os.Lstat(path); {
		case err == nil && name == KeyFile:
			return fmt.Errorf("%s is there without its certificate: if making a CA was interrupted, remove it and try again; else restore %s: %w", path, CertFile, fs.ErrExist)
		case err == nil:
			return fmt.Errorf("%s is there already, and nodes may trust it: to replace that CA, move the directory away and install the new certificate on every node: %w", path, fs.ErrExist)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	return nil
}

// readFile returns a file's content and mode, both of the same file even if the name changes hands meanwhile.
func readFile(path string) ([]byte, fs.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFileSize {
		return nil, nil, fmt.Errorf("%s is not a file of at most %d bytes", path, maxFileSize)
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFileSize))
	return content, st, err
}

// parseKey reads a private key in PKCS #8, or in the older form that openssl ecparam writes.
func parseKey(text []byte) (crypto.Signer, error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			if signer, ok := key.(crypto.Signer); ok {
				return signer, nil
			}
			return nil, fmt.Errorf("a %T can't sign", key)
		case "EC PRIVATE KEY":
			return x509.ParseECPrivateKey(block.Bytes)
		}
	}
	return nil, errors.New("no private key in PEM")
}

func newSerial() (*big.Int, error) {
	// 127 random bits: positive and at most 20 bytes, as RFC 5280 (section 4.1.2.2) asks.
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// clip cuts a stranger's text to a length fit for an error message.
func clip(s string) string {
	const most = 96
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
