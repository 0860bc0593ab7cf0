package localca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/durable"
	"github.com/acproxy/acproxy/internal/testtools"
)

func newCA(t *testing.T, opts Options, hosts ...string) *CA {
	t.Helper()
	c, err := Init(filepath.Join(t.TempDir(), "ca"), hosts, opts)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data", "ca")
	c, err := Init(dir, []string{"example.com", "storage.example.net"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{".": fs.ModeDir | 0o700, CertFile: 0o644, KeyFile: 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != want {
			t.Errorf("mode of %s = %v, want %v", name, st.Mode(), want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, durable.TempPrefix+"*")); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
	if want := []string{"example.com", "storage.example.net"}; !slices.Equal(c.Hosts(), want) {
		t.Errorf("Hosts = %v, want %v", c.Hosts(), want)
	}
	if got := time.Until(c.NotAfter()); got < 3649*24*time.Hour || got > 3651*24*time.Hour {
		t.Errorf("the CA ends in %v, want ten years", got)
	}
	cert := c.cert
	if !cert.IsCA || cert.MaxPathLen != 0 || !cert.MaxPathLenZero || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		t.Errorf("IsCA %v, MaxPathLen %d, MaxPathLenZero %v, KeyUsage %b", cert.IsCA, cert.MaxPathLen, cert.MaxPathLenZero, cert.KeyUsage)
	}
	again, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.PEM(), c.PEM()) || again.Fingerprint() != c.Fingerprint() {
		t.Error("Load returns another certificate than Init")
	}
}

func TestInitKeepsWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	first, err := Init(dir, []string{"example.com"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Init(dir, []string{"example.com"}, Options{})
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "move the directory away") {
		t.Errorf("Init over a CA = %v, want one that matches ErrExist and says what to do", err)
	}
	if err := os.Remove(filepath.Join(dir, CertFile)); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Init(dir, []string{"example.com"}, Options{})
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("Init over a lone key = %v, want one that matches ErrExist and says what to do", err)
	}
	if now, _ := os.ReadFile(filepath.Join(dir, KeyFile)); !bytes.Equal(now, key) {
		t.Error("Init has overwritten the key")
	}
	if err := os.WriteFile(filepath.Join(dir, CertFile), first.PEM(), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err != nil {
		t.Errorf("after the certificate is restored, Load = %v", err)
	}
}

// failing is a file system whose nth call fails, done or not.
type failing struct {
	durable.OS
	n    int
	done bool
}

var errInjected = errors.New("injected")

func (f *failing) call(do func() error) error {
	f.n--
	if f.n != 0 {
		return do()
	}
	if f.done {
		if err := do(); err != nil {
			return err
		}
	}
	return errInjected
}

func (f *failing) MkdirAll(dir string, perm fs.FileMode) error {
	return f.call(func() error { return f.OS.MkdirAll(dir, perm) })
}

func (f *failing) Create(name string, perm fs.FileMode) (file durable.File, err error) {
	err = f.call(func() error { file, err = f.OS.Create(name, perm); return err })
	if err != nil && file != nil {
		file.Close()
	}
	return file, err
}

func (f *failing) Rename(from, to string) error {
	return f.call(func() error { return f.OS.Rename(from, to) })
}

func (f *failing) SyncDir(dir string) error { return f.call(func() error { return f.OS.SyncDir(dir) }) }

func TestInitFailsAtEachCall(t *testing.T) {
	const calls = 8 // mkdir, sync parent, and twice create, rename, sync
	for _, done := range []bool{false, true} {
		for n := 1; n <= calls+1; n++ {
			t.Run(fmt.Sprintf("call %d, done %v", n, done), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "ca")
				_, err := Init(dir, []string{"example.com"}, Options{FS: &failing{n: n, done: done}})
				if n > calls {
					if err != nil {
						t.Fatalf("Init made more than %d calls: %v", calls, err)
					}
					return
				}
				if !errors.Is(err, errInjected) {
					t.Fatalf("Init = %v, want the injected error", err)
				}
				// What is there afterwards is a whole CA, or none that can be loaded.
				if _, err := Load(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("Load = %v, want a CA or ErrNotExist", err)
				}
			})
		}
	}
}

func TestInitHosts(t *testing.T) {
	long := strings.Repeat("a", 63)
	many := make([]string, maxHosts+1)
	for i := range many {
		many[i] = fmt.Sprintf("h%d.example.com", i)
	}
	for _, tt := range []struct {
		name  string
		hosts []string
		want  []string
		err   string // in the error
	}{
		{name: "one host", hosts: []string{"example.com"}, want: []string{"example.com"}},
		{name: "capitals and a trailing dot", hosts: []string{"Example.COM."}, want: []string{"example.com"}},
		{name: "a wildcard is its domain", hosts: []string{"*.example.com"}, want: []string{"example.com"}},
		{name: "twice, and one under another", hosts: []string{"a.example.com", "example.com", "example.com"}, want: []string{"example.com"}},
		{name: "a neighbour is not under it", hosts: []string{"example.com", "an-example.com"}, want: []string{"example.com", "an-example.com"}},
		{name: "a name inside a cluster", hosts: []string{"registry", "images.cluster.local"}, want: []string{"registry", "images.cluster.local"}},
		{name: "addresses", hosts: []string{"10.0.0.5", "[FD00::1]", "::ffff:10.0.0.5"}, want: []string{"10.0.0.5", "fd00::1"}},
		{name: "the longest label", hosts: []string{long + ".example.com"}, want: []string{long + ".example.com"}},
		{name: "the most hosts", hosts: many[:maxHosts], want: many[:maxHosts]},
		{name: "a host of a shared domain", hosts: []string{"app.github.io"}, want: []string{"app.github.io"}},
		{name: "none", err: "needs the hosts"},
		{name: "one too many", hosts: many, err: "too wide"},
		{name: "empty", hosts: []string{""}, err: "is empty"},
		{name: "a URL", hosts: []string{"https://example.com/"}, err: "without scheme"},
		{name: "a port", hosts: []string{"example.com:443"}, err: "without the port"},
		{name: "a wildcard in the middle", hosts: []string{"a.*.example.com"}, err: "wildcard"},
		{name: "another script", hosts: []string{"bücher.example"}, err: "xn--"},
		{name: "an empty label", hosts: []string{"example..com"}, err: "1 to 63"},
		{name: "a label too long", hosts: []string{long + "a.example.com"}, err: "1 to 63"},
		{name: "a name too long", hosts: []string{strings.Repeat(long+".", 4) + "example.com"}, err: "253"},
		{name: "a hyphen first", hosts: []string{"-a.example.com"}, err: "hyphen"},
		{name: "a top-level domain", hosts: []string{"com"}, err: "public suffix"},
		{name: "a second-level suffix", hosts: []string{"co.uk"}, err: "public suffix"},
		{name: "nearly an address", hosts: []string{"10.0.0"}, err: "number"},
		{name: "a zone", hosts: []string{"fe80::1%eth0"}, err: "zone"},
		{name: "the reserved domain", hosts: []string{"invalid"}, err: "reserved"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Init(filepath.Join(t.TempDir(), "ca"), tt.hosts, Options{})
			if tt.err != "" {
				if !errors.Is(err, acproxy.ErrInvalid) || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("Init = %v, want one that matches ErrInvalid and says %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(c.Hosts(), tt.want) {
				t.Errorf("Hosts = %v, want %v", c.Hosts(), tt.want)
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	write := func(t *testing.T, path string, content []byte, perm fs.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, content, perm); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, perm); err != nil {
			t.Fatal(err)
		}
	}
	own := func(t *testing.T, dir string, template *x509.Certificate) {
		t.Helper()
		template.SerialNumber, template.Subject = big.NewInt(1), pkix.Name{CommonName: "theirs"}
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		template.BasicConstraintsValid = true
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		ec, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, CertFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
		write(t, filepath.Join(dir, KeyFile), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ec}), 0o600)
	}
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		err   string // in the error, "" for none
		later time.Duration
	}{
		{name: "nothing is wrong", spoil: func(*testing.T, string) {}},
		{name: "a key that the group can read", err: "mode 0640", spoil: func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, KeyFile), 0o640); err != nil {
				t.Fatal(err)
			}
		}},
		// Only where another user, root, owns it.
		{name: "a key of one's own that the group can read", err: "mode 0440", spoil: func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, KeyFile), 0o440); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a key that others can write", err: "chmod 600", spoil: func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, KeyFile), 0o602); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a key that its owner alone can read", spoil: func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, KeyFile), 0o400); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "no key", err: "but not its key", spoil: func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, KeyFile)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "another CA's key", err: "does not belong", spoil: func(t *testing.T, dir string) {
			other := filepath.Join(t.TempDir(), "ca")
			if _, err := Init(other, []string{"example.com"}, Options{}); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(other, KeyFile), filepath.Join(dir, KeyFile)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "no PEM in the key", err: "no private key", spoil: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, KeyFile), []byte("hello"), 0o600)
		}},
		{name: "no PEM in the certificate", err: "no certificate", spoil: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, CertFile), []byte("hello"), 0o644)
		}},
		{name: "a file too large", err: "at most", spoil: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, CertFile), make([]byte, maxFileSize+1), 0o644)
		}},
		{name: "its last moment", later: 10*365*24*time.Hour - time.Minute, spoil: func(*testing.T, string) {}},
		{name: "expired", later: 10*365*24*time.Hour + time.Minute, err: "expired on", spoil: func(*testing.T, string) {}},
		{name: "the certificate of a server", err: "not the certificate of a CA", spoil: func(t *testing.T, dir string) {
			own(t, dir, &x509.Certificate{PermittedDNSDomains: []string{"example.com"}})
		}},
		{name: "a CA for the whole internet", err: "not constrained", spoil: func(t *testing.T, dir string) {
			own(t, dir, &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign})
		}},
		{name: "a CA made elsewhere", spoil: func(t *testing.T, dir string) {
			own(t, dir, &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, PermittedDNSDomains: []string{"example.com"}})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if _, err := Init(dir, []string{"example.com"}, Options{}); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, dir)
			c, err := load(dir, func() time.Time { return time.Now().Add(tt.later) })
			switch {
			case tt.err == "" && err != nil:
				t.Errorf("Load = %v, want a CA", err)
			case tt.err == "":
				if _, err := c.Certificate("example.com"); err != nil {
					t.Errorf("Certificate = %v", err)
				}
			case err == nil || !strings.Contains(err.Error(), tt.err):
				t.Errorf("Load = %v, want an error that says %q", err, tt.err)
			case errors.Is(err, fs.ErrNotExist):
				t.Errorf("%v matches ErrNotExist: the caller would say that a CA has to be made", err)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load without a CA = %v, want ErrNotExist", err)
	}
}

// What Permits says is what nodes' verifiers find, and the constraints hold without our help.
func TestVerifiersAgree(t *testing.T) {
	for _, critical := range []bool{false, true} {
		t.Run(fmt.Sprintf("critical %v", critical), func(t *testing.T) {
			mixed := newCA(t, Options{Critical: critical}, "example.com", "10.0.0.5", "fd00::5")
			names := newCA(t, Options{Critical: critical}, "example.com", "registry")
			addrs := newCA(t, Options{Critical: critical}, "10.0.0.5")
			for _, tt := range []struct {
				name string
				ca   *CA
				host string
				good bool
			}{
				{"the host", names, "example.com", true},
				{"a subdomain", names, "a.b.example.com", true},
				{"a name without dots", names, "registry", true},
				{"a neighbour", names, "an-example.com", false},
				{"another host", names, "example.org", false},
				{"the domain above", names, "com", false},
				{"an address of a CA for names", names, "10.0.0.5", false},
				{"an IPv6 address of a CA for names", names, "fd00::5", false},
				{"the address", mixed, "10.0.0.5", true},
				{"the IPv6 address", mixed, "fd00::5", true},
				{"the next address", mixed, "10.0.0.6", false},
				{"the next IPv6 address", mixed, "fd00::6", false},
				{"a name of a CA for both", mixed, "example.com", true},
				{"another name of a CA for both", mixed, "example.org", false},
				{"the address of a CA for addresses", addrs, "10.0.0.5", true},
				{"an IPv6 address of a CA for IPv4", addrs, "fd00::5", false},
				{"a name of a CA for addresses", addrs, "example.com", false},
			} {
				t.Run(tt.name, func(t *testing.T) {
					if got := tt.ca.Permits(tt.host); got != tt.good {
						t.Errorf("Permits = %v, want %v", got, tt.good)
					}
					// The leaf is minted past our own refusal: it is what a thief of the key would make.
					l, err := tt.ca.mint(tt.host)
					if err != nil {
						t.Fatal(err)
					}
					if err := verifyGo(tt.ca, l.cert.Leaf, tt.host); (err == nil) != tt.good {
						t.Errorf("crypto/x509 says %v, want good = %v", err, tt.good)
					}
					t.Run("openssl", func(t *testing.T) {
						testtools.Need(t, "openssl")
						if out, err := verifyOpenSSL(t, tt.ca, l.cert.Leaf, tt.host); (err == nil) != tt.good {
							t.Errorf("openssl verify says %v, want good = %v\n%s", err, tt.good, out)
						}
					})
					t.Run("certtool", func(t *testing.T) {
						testtools.Need(t, "certtool")
						if out, err := verifyGnuTLS(t, tt.ca, l.cert.Leaf); (err == nil) != tt.good {
							t.Errorf("certtool --verify says %v, want good = %v\n%s", err, tt.good, out)
						}
					})
				})
			}
		})
	}
}

func verifyGo(c *CA, leaf *x509.Certificate, host string) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.PEM())
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host})
	return err
}

func writeChain(t *testing.T, c *CA, leaf *x509.Certificate) (ca, cert string) {
	t.Helper()
	dir := t.TempDir()
	ca, cert = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "leaf.pem")
	for path, content := range map[string][]byte{ca: c.PEM(), cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ca, cert
}

func verifyOpenSSL(t *testing.T, c *CA, leaf *x509.Certificate, host string) ([]byte, error) {
	t.Helper()
	ca, cert := writeChain(t, c, leaf)
	flag := "-verify_hostname"
	if net.ParseIP(host) != nil {
		flag = "-verify_ip"
	}
	return exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-no-CApath", "-CAfile", ca, flag, host, cert).CombinedOutput()
}

func verifyGnuTLS(t *testing.T, c *CA, leaf *x509.Certificate) ([]byte, error) {
	t.Helper()
	ca, cert := writeChain(t, c, leaf)
	return exec.CommandContext(t.Context(), "certtool", "--verify", "--load-ca-certificate", ca, "--infile", cert).CombinedOutput()
}

// Before Go 1.10 crypto/x509 read name constraints into these types, and dropped a certificate with a critical constraint that it could
// not put there.
type (
	oldConstraints struct {
		Permitted []oldSubtree `asn1:"optional,tag:0"`
		Excluded  []oldSubtree `asn1:"optional,tag:1"`
	}
	oldSubtree struct {
		Name string `asn1:"tag:2,optional,ia5"`
	}
)

func TestOldGoReadsTheConstraints(t *testing.T) {
	for _, hosts := range [][]string{{"example.com", "registry"}, {"example.com", "10.0.0.5"}} {
		c := newCA(t, Options{}, hosts...)
		i := slices.IndexFunc(c.cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 30}) })
		if i < 0 {
			t.Fatal("the certificate has no name constraints")
		}
		var old oldConstraints
		if rest, err := asn1.Unmarshal(c.cert.Extensions[i].Value, &old); err != nil || len(rest) > 0 {
			t.Fatalf("old Go can't read the constraints: %v, %d bytes left", err, len(rest))
		}
		if c.cert.Extensions[i].Critical {
			t.Error("the constraints are critical: old Go drops the certificate")
		}
		var permitted []string
		for _, s := range old.Permitted {
			if s.Name != "" {
				permitted = append(permitted, s.Name)
			}
		}
		if !slices.Equal(permitted, c.hosts.domains) {
			t.Errorf("old Go reads %v, want %v", permitted, c.hosts.domains)
		}
	}
}

func TestCertificate(t *testing.T) {
	now := time.Now().Truncate(time.Second) // certificates know no fractions
	c := newCA(t, Options{ValidFor: 120 * 24 * time.Hour, Now: func() time.Time { return now }}, "example.com")
	get := func(host string) *tls.Certificate {
		t.Helper()
		cert, err := c.Certificate(host)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	const day = 24 * time.Hour
	first := get("example.com")
	if got := first.Leaf.NotAfter.Sub(now).Round(time.Second); got != 90*day {
		t.Errorf("the first leaf is valid for %v, want 90 days", got)
	}
	if got := now.Sub(first.Leaf.NotBefore).Round(time.Second); got != time.Hour {
		t.Errorf("it is valid since %v, want an hour", got)
	}
	if want := []string{"example.com"}; !slices.Equal(first.Leaf.DNSNames, want) || len(first.Leaf.IPAddresses) > 0 {
		t.Errorf("it is for %v and %v, want %v", first.Leaf.DNSNames, first.Leaf.IPAddresses, want)
	}
	if want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}; !slices.Equal(first.Leaf.ExtKeyUsage, want) || first.Leaf.IsCA {
		t.Errorf("its usage is %v, CA %v, want %v alone", first.Leaf.ExtKeyUsage, first.Leaf.IsCA, want)
	}
	if len(first.Certificate) != 1 {
		t.Errorf("the chain has %d certificates, want the leaf alone", len(first.Certificate))
	}
	if get("EXAMPLE.com.") != first {
		t.Error("the same host in capitals has another certificate")
	}
	if get("a.example.com") == first {
		t.Error("another host has the same certificate")
	}
	now = now.Add(60*day - time.Second)
	if get("example.com") != first {
		t.Error("it is minted again before two thirds of its time are over")
	}
	now = now.Add(time.Second)
	second := get("example.com")
	if second == first {
		t.Error("it is not minted again when two thirds of its time are over")
	}
	if !second.Leaf.NotAfter.Equal(c.NotAfter()) {
		t.Errorf("the second leaf ends %v, want the CA's end %v", second.Leaf.NotAfter, c.NotAfter())
	}
	now = c.NotAfter().Add(-time.Second)
	if get("example.com") != second {
		t.Error("the last leaf is minted again, though another would end at the same moment")
	}
	now = c.NotAfter().Add(time.Second)
	if _, err := c.Certificate("example.com"); err == nil || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("after the CA's end, Certificate = %v, want an error that says so", err)
	}
}

func TestCertificateRefused(t *testing.T) {
	c := newCA(t, Options{}, "example.com", "10.0.0.5")
	for _, host := range []string{"example.org", "an-example.com", "example.com.evil.org", "10.0.0.6", "::1", "", "*.example.com", "a b.example.com", "a/.example.com", strings.Repeat("a", 10_000) + ".example.com"} {
		_, err := c.Certificate(host)
		if !errors.Is(err, acproxy.ErrRefused) || !strings.Contains(err.Error(), "example.com, 10.0.0.5") || len(err.Error()) > 500 {
			t.Errorf("Certificate(%.40q) = %v, want one that matches ErrRefused and names the hosts permitted", host, err)
		}
	}
	if _, err := c.GetCertificate(&tls.ClientHelloInfo{}); !errors.Is(err, acproxy.ErrRefused) || !strings.Contains(err.Error(), "no SNI") {
		t.Errorf("GetCertificate without a name = %v, want one that says so", err)
	}
}

func TestCertificateIsMintedOnceAtATime(t *testing.T) {
	c := newCA(t, Options{}, "example.com")
	const n = 64
	got := make([]*tls.Certificate, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			cert, err := c.Certificate("example.com")
			if err != nil {
				t.Error(err)
			}
			got[i] = cert
		})
	}
	close(start)
	wg.Wait()
	for i := range got {
		if got[i] != got[0] {
			t.Fatal("asked at once, two callers got different certificates")
		}
	}
}

func TestCertificatesAreBounded(t *testing.T) {
	c := newCA(t, Options{}, "example.com")
	host := func(i int) string { return fmt.Sprintf("h%d.example.com", i) }
	kept := make([]*tls.Certificate, maxLeaves+1)
	for i := range kept {
		cert, err := c.Certificate(host(i))
		if err != nil {
			t.Fatal(err)
		}
		kept[i] = cert
		if i == maxLeaves-1 {
			// The oldest is used again, so that the second oldest has to go.
			if again, _ := c.Certificate(host(0)); again != kept[0] {
				t.Fatal("at the limit, the oldest is gone")
			}
		}
	}
	if n := len(c.leaves); n != maxLeaves || c.recent.Len() != n {
		t.Errorf("%d and %d certificates are kept, want %d", n, c.recent.Len(), maxLeaves)
	}
	if again, _ := c.Certificate(host(0)); again != kept[0] {
		t.Error("the one last used was dropped")
	}
	if again, _ := c.Certificate(host(1)); again == kept[1] {
		t.Error("the one not used for longest was kept")
	}
}

func TestServing(t *testing.T) {
	c := newCA(t, Options{}, "example.com", "127.0.0.1")
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	srv.TLS = &tls.Config{GetCertificate: c.GetCertificate}
	// httptest has a certificate of its own, which would win.
	srv.Listener = tls.NewListener(srv.Listener, srv.TLS)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // the refused handshake below
	srv.Start()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.PEM())
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "images.example.com", MaxVersion: version})
		if err != nil {
			t.Fatalf("%s: %v", tls.VersionName(version), err)
		}
		conn.Close()
	}
	if conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "example.org"}); err == nil {
		conn.Close()
		t.Error("a host that is not permitted was served")
	}
}

func TestFingerprint(t *testing.T) {
	testtools.Need(t, "openssl")
	c := newCA(t, Options{}, "example.com")
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, c.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, want, _ := strings.Cut(strings.TrimSpace(string(out)), "="); c.Fingerprint() != want {
		t.Errorf("Fingerprint = %s, openssl says %s", c.Fingerprint(), want)
	}
}

func FuzzHosts(f *testing.F) {
	for _, host := range []string{"example.com", "*.example.com", "10.0.0.5", "[::1]", "a..b", "xn--bcher-kva.example", ".", "invalid"} {
		f.Add(host)
	}
	f.Fuzz(func(t *testing.T, host string) {
		set, err := newHostSet([]string{host})
		if err != nil {
			if !errors.Is(err, acproxy.ErrInvalid) {
				t.Errorf("newHostSet(%q) = %v, want ErrInvalid", host, err)
			}
			return
		}
		for _, name := range set.names() {
			if again, err := newHostSet([]string{name}); err != nil || !slices.Equal(again.names(), []string{name}) {
				t.Errorf("newHostSet(%q) gives %q, and that gives %v, %v", host, name, again.names(), err)
			}
			if !set.permits(name) {
				t.Errorf("a CA for %q does not permit it", name)
			}
			if set.permits("x"+name) && set.permits("other.test") {
				t.Errorf("a CA for %q permits its neighbours", name)
			}
		}
	})
}
