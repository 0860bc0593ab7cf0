package trust

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	rktopenpgp "golang.org/x/crypto/openpgp" //nolint:staticcheck // what rkt runs

	"github.com/acproxy/acproxy/internal/testtools"
)

// A gnupg is a home directory of the real gpg.
type gnupg struct {
	t    *testing.T
	home string
}

func newGnupg(t *testing.T) *gnupg {
	t.Helper()
	testtools.Need(t, "gpg")
	// The agent's socket needs a short path.
	home, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	g := &gnupg{t: t, home: home}
	t.Cleanup(func() {
		exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	return g
}

func (g *gnupg) command(args ...string) *exec.Cmd {
	cmd := exec.Command("gpg", append([]string{"--batch", "--no-tty", "--yes", "--pinentry-mode", "loopback", "--passphrase", "", "--homedir", g.home}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	return cmd
}

func (g *gnupg) run(args ...string) []byte {
	g.t.Helper()
	var out, errs bytes.Buffer
	cmd := g.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		g.t.Fatalf("gpg %s: %v\n%s", strings.Join(args, " "), err, errs.Bytes())
	}
	return out.Bytes()
}

// generate makes a key and returns its fingerprint.
func (g *gnupg) generate(name, algorithm, usage, expire string, more ...string) string {
	g.t.Helper()
	g.run(append(more, "--quick-generate-key", name+" <"+name+"@example.com>", algorithm, usage, expire)...)
	out := g.run("--with-colons", "--list-keys", name+"@example.com")
	return regexp.MustCompile(`fpr:+([0-9A-F]{40}):`).FindStringSubmatch(string(out))[1]
}

func (g *gnupg) export(fpr string) []byte { g.t.Helper(); return g.run("--armor", "--export", fpr) }

// verdict returns the status words that gpg gives for a signature: the exit code alone doesn't tell revoked and expired keys from good ones.
func (g *gnupg) verdict(sig []byte, file string) string {
	g.t.Helper()
	name := filepath.Join(g.t.TempDir(), "sig")
	if err := os.WriteFile(name, sig, 0o600); err != nil {
		g.t.Fatal(err)
	}
	// The exit code is none of our business here.
	out, _ := g.command("--status-fd", "1", "--verify", name, file).Output()
	var words []string
	for _, m := range regexp.MustCompile(`(?m)^\[GNUPG:\] (GOODSIG|BADSIG|ERRSIG|EXPSIG|EXPKEYSIG|REVKEYSIG|NO_PUBKEY|NODATA|VALIDSIG|UNEXPECTED)\b`).FindAllStringSubmatch(string(out), -1) {
		words = append(words, m[1])
	}
	return strings.Join(words, " ")
}

func TestAgreesWithGpg(t *testing.T) {
	g := newGnupg(t)
	file := filepath.Join(t.TempDir(), "image.aci")
	if err := os.WriteFile(file, []byte(image), 0o600); err != nil {
		t.Fatal(err)
	}
	tampered := file + ".tampered"
	if err := os.WriteFile(tampered, []byte(image+"!"), 0o600); err != nil {
		t.Fatal(err)
	}
	past := []string{"--faked-system-time", "20200101T000000"}
	rsa := g.generate("rsa", "rsa2048", "sign", "never")
	ed := g.generate("ed", "ed25519", "sign", "never")
	p256 := g.generate("nistp", "nistp256", "sign", "never")
	dsa := g.generate("dsa", "dsa1024", "sign", "never", "--enable-dsa2")
	short := g.generate("short", "rsa1024", "sign", "never")
	stranger := g.generate("stranger", "ed25519", "sign", "never")
	expired := g.generate("expired", "rsa2048", "sign", "1y", past...)
	old := g.generate("old", "rsa2048", "sign", "never", past...)
	revoked := g.generate("revoked", "ed25519", "sign", "never")
	sub := g.generate("sub", "rsa2048", "cert", "never")
	g.run("--quick-add-key", sub, "rsa2048", "sign", "never")
	extended := g.generate("extended", "rsa2048", "sign", "1y", past...)

	sign := func(fpr string, more ...string) []byte {
		t.Helper()
		return g.run(append(more, "--local-user", fpr, "--detach-sign", "--output", "-", file)...)
	}
	revokedSig := sign(revoked)
	oldExtended := sign(extended, past...)
	g.run("--quick-set-expire", extended, "0")
	g.revoke(revoked)

	dirs := Dirs{Local: t.TempDir()}
	for _, fpr := range []string{rsa, ed, p256, dsa, short, expired, old, revoked, sub, extended} {
		if _, err := Add(dirs, "example.com/app", g.export(fpr)); err != nil {
			t.Fatalf("adding gpg's key: %v", err)
		}
	}
	keys := load(t, dirs)
	g.run("--delete-secret-keys", stranger)
	strangerRing := newGnupg(t)
	strangerKey := strangerRing.generate("other", "ed25519", "sign", "never")
	strangerSig := strangerRing.run("--local-user", strangerKey, "--detach-sign", "--output", "-", file)

	inline := g.run("--local-user", rsa, "--sign", "--output", "-", file)
	clear := g.run("--local-user", rsa, "--clearsign", "--output", "-", file)
	var table strings.Builder
	table.WriteString("| signature | gpg's status lines | rkt's own check | acproxy | acproxy, `legacy: true` |\n|---|---|---|---|---|\n")
	for _, test := range []struct {
		name   string
		sig    []byte
		file   string
		gpg    string
		want   Outcome
		legacy Outcome
	}{
		{"RSA 2048", sign(rsa), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"RSA 2048, armored", sign(rsa, "--armor"), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"RSA 2048, SHA-256", sign(rsa, "--digest-algo", "SHA256"), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"RSA 2048, SHA-1", sign(rsa, "--digest-algo", "SHA1"), file, "GOODSIG VALIDSIG", WeakAlgorithm, Accepted},
		{"RSA 2048, over text", sign(rsa, "--textmode"), file, "GOODSIG VALIDSIG", UnsupportedSignature, UnsupportedSignature},
		{"RSA signing subkey", sign(sub), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"Ed25519", sign(ed), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"ECDSA P-256", sign(p256), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"DSA 1024", sign(dsa), file, "GOODSIG VALIDSIG", WeakAlgorithm, Accepted},
		{"RSA 1024", sign(short), file, "GOODSIG VALIDSIG", WeakAlgorithm, Accepted},
		{"two keys", append(sign(rsa), sign(ed)...), file, "GOODSIG VALIDSIG GOODSIG VALIDSIG", Accepted, Accepted},
		{"changed bytes", sign(rsa), tampered, "BADSIG", BadSignature, BadSignature},
		{"an unknown key", strangerSig, file, "ERRSIG NO_PUBKEY", UnknownKey, UnknownKey},
		{"an expired key", sign(expired, "--faked-system-time", "20200201T000000"), file, "EXPKEYSIG VALIDSIG", KeyExpired, KeyExpired},
		{"a key whose life was extended since", oldExtended, file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"a revoked key", revokedSig, file, "REVKEYSIG VALIDSIG", KeyRevoked, KeyRevoked},
		{"an expired signature", sign(old, "--default-sig-expire", "1d", "--faked-system-time", "20200201T000000"), file, "EXPSIG VALIDSIG", SignatureExpired, SignatureExpired},
		{"an old signature", sign(old, "--faked-system-time", "20200201T000000"), file, "GOODSIG VALIDSIG", Accepted, Accepted},
		{"a message with its signature inside", inline, file, "", UnsupportedSignature, UnsupportedSignature},
		{"a cleartext-signed text", clear, file, "", UnsupportedSignature, UnsupportedSignature},
		{"a web page", []byte("<html>not found</html>"), file, "NODATA NODATA", MalformedSignature, MalformedSignature},
	} {
		content := mustRead(t, test.file)
		q := Question{Name: "example.com/app", Signature: test.sig, Hashed: hashed(t, test.sig, string(content)), Now: time.Now()}
		a, err := keys.Judge(q)
		got := outcome(t, a, err)
		if got != test.want {
			t.Errorf("%s: Judge = %v (%v), want %v", test.name, got, err, test.want)
		}
		q.Policy.Legacy = true
		b, err := keys.Judge(q)
		legacy := outcome(t, b, err)
		if legacy != test.legacy {
			t.Errorf("%s: Judge by a legacy policy = %v (%v), want %v", test.name, legacy, err, test.legacy)
		}
		status := g.verdict(test.sig, test.file)
		if status != test.gpg {
			t.Errorf("%s: gpg says %q, want %q", test.name, status, test.gpg)
		}
		oracle := rktVerdict(keys, test.sig, content)
		if predicted := b.RktWarning == ""; b.Outcome == Accepted && predicted != (oracle == "accepts") {
			t.Errorf("%s: RktWarning = %q, but rkt's own check %s", test.name, b.RktWarning, oracle)
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %v | %v |\n", test.name, or(status, "none"), oracle, got, legacy)
	}
	document(t, "gpg", table.String())
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// rktVerdict asks the library that rkt runs, as rkt does: for an armored signature, and if there is none, for a binary one.
func rktVerdict(keys *Keyring, sig, content []byte) string {
	var ring rktopenpgp.EntityList
	for _, k := range keys.Keys("example.com/app") {
		if k.cert.rkt.problem == nil {
			ring = append(ring, k.cert.rkt.entity)
		}
	}
	_, err := rktopenpgp.CheckArmoredDetachedSignature(ring, bytes.NewReader(content), bytes.NewReader(sig))
	if err == io.EOF {
		_, err = rktopenpgp.CheckDetachedSignature(ring, bytes.NewReader(content), bytes.NewReader(sig))
	}
	if err != nil {
		return "refuses"
	}
	return "accepts"
}

// revoke takes the revocation that gpg made with the key and imports it.
func (g *gnupg) revoke(fpr string) {
	g.t.Helper()
	cert := mustRead(g.t, filepath.Join(g.home, "openpgp-revocs.d", fpr+".rev"))
	// gpg keeps it from being imported by accident, with a colon before its armor.
	cert = bytes.ReplaceAll(cert, []byte(":-----BEGIN"), []byte("-----BEGIN"))
	name := filepath.Join(g.t.TempDir(), "rev")
	if err := os.WriteFile(name, cert, 0o600); err != nil {
		g.t.Fatal(err)
	}
	g.run("--import", name)
}
