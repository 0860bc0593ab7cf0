package trust

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const image = "the bytes of an image"

// now is the time of every question in these tests.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB, opts trusttest.Options) *trusttest.Key {
	t.Helper()
	if opts.Created.IsZero() {
		opts.Created = now.Add(-365 * 24 * time.Hour)
	}
	k, err := trusttest.NewKey(opts)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, k *trusttest.Key, opts trusttest.SignOptions) []byte {
	t.Helper()
	if opts.Time.IsZero() {
		opts.Time = now.Add(-24 * time.Hour)
	}
	sig, err := k.Sign(strings.NewReader(image), opts)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

func hashed(t testing.TB, sig []byte, content string) Hashed {
	t.Helper()
	h, err := NewHasher(sig)
	if err != nil {
		// The question needs hashes that are there, and Judge comes to the same refusal first.
		return Hashed{}
	}
	if _, err := io.WriteString(h, content); err != nil {
		t.Fatal(err)
	}
	states, err := h.Hashed()
	if err != nil {
		t.Fatal(err)
	}
	return states
}

// A trusted key is added for a prefix.
type trusted struct {
	prefix string
	key    []byte
}

func ring(t testing.TB, keys ...trusted) *Keyring {
	t.Helper()
	dirs := Dirs{Local: t.TempDir()}
	for _, k := range keys {
		if _, err := Add(dirs, k.prefix, k.key); err != nil {
			t.Fatal(err)
		}
	}
	return load(t, dirs)
}

func load(t testing.TB, dirs Dirs) *Keyring {
	t.Helper()
	k, err := Load(dirs)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// outcome returns what an answer of Judge says.
func outcome(t testing.TB, a Acceptance, err error) Outcome {
	t.Helper()
	var r *Refusal
	switch {
	case err == nil:
		return a.Outcome
	case errors.As(err, &r):
		if !errors.Is(err, acproxy.ErrRefused) {
			t.Errorf("%v does not match ErrRefused", err)
		}
		if r.Detail == "" || r.Code() != r.Outcome.String() {
			t.Errorf("refusal %+v says nothing", r)
		}
		if a.Outcome != 0 || a.Signers != nil {
			t.Errorf("refused with acceptance %+v", a)
		}
		return r.Outcome
	}
	t.Errorf("Judge = %v, want a refusal", err)
	return 0
}

func joinBinary(sigs ...[]byte) []byte {
	return bytes.Join(sigs, nil)
}

func TestJudge(t *testing.T) {
	rsa := newKey(t, trusttest.Options{})
	other := newKey(t, trusttest.Options{Name: "Somebody Else"})
	short := newKey(t, trusttest.Options{Bits: 1024})
	dsa := newKey(t, trusttest.Options{Algorithm: trusttest.DSA})
	ecdsa := newKey(t, trusttest.Options{Algorithm: trusttest.ECDSA})
	eddsa := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	ed25519 := newKey(t, trusttest.Options{Algorithm: trusttest.Ed25519})
	sub := newKey(t, trusttest.Options{SigningSubkey: true})
	expired := newKey(t, trusttest.Options{Expires: now.Add(-time.Hour)})
	expires := newKey(t, trusttest.Options{Expires: now})
	expiresSoon := newKey(t, trusttest.Options{Expires: now.Add(time.Second)})
	subExpired := newKey(t, trusttest.Options{SigningSubkey: true, SubkeyExpires: now.Add(-time.Hour)})
	revoked := newKey(t, trusttest.Options{})
	subRevoked := newKey(t, trusttest.Options{SigningSubkey: true})
	future := newKey(t, trusttest.Options{Created: now.Add(MaxClockSkew + time.Second)})
	skewed := newKey(t, trusttest.Options{Created: now.Add(MaxClockSkew)})
	young := newKey(t, trusttest.Options{Created: now.Add(-time.Hour)})
	revokedSig := sign(t, revoked, trusttest.SignOptions{})
	if err := revoked.Revoke(); err != nil {
		t.Fatal(err)
	}
	if err := subRevoked.RevokeSubkey(); err != nil {
		t.Fatal(err)
	}
	const name = "example.com/app"
	keys := ring(t,
		trusted{name, rsa.Armored()}, trusted{name, short.Armored()}, trusted{name, dsa.Armored()}, trusted{name, ecdsa.Armored()},
		trusted{name, eddsa.Armored()}, trusted{name, ed25519.Armored()}, trusted{name, sub.Armored()}, trusted{name, expired.Armored()}, trusted{name, expires.Armored()},
		trusted{name, expiresSoon.Armored()}, trusted{name, subExpired.Armored()}, trusted{name, revoked.Armored()}, trusted{name, subRevoked.Armored()},
		trusted{name, future.Armored()}, trusted{name, skewed.Armored()}, trusted{name, young.Armored()},
	)
	legacy := Policy{Legacy: true}
	before := Policy{Expired: AcceptIfSignedBefore}
	md5 := bytes.Clone(sign(t, rsa, trusttest.SignOptions{Binary: true}))
	md5[3+3] = 1 // behind a header of three bytes: version, type, key algorithm, hash
	v3 := bytes.Clone(sign(t, rsa, trusttest.SignOptions{Binary: true}))
	v3[3] = 3

	for _, test := range []struct {
		name   string
		sig    []byte
		policy Policy
		of     string // the bytes, image if ""
		want   Outcome
		detail string // part of the refusal's text
	}{
		{name: "RSA", sig: sign(t, rsa, trusttest.SignOptions{}), want: Accepted},
		{name: "RSA without armor", sig: sign(t, rsa, trusttest.SignOptions{Binary: true}), want: Accepted},
		{name: "RSA with SHA-256", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA256}), want: Accepted},
		{name: "RSA with SHA-384", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA384}), want: Accepted},
		{name: "RSA with SHA-224", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA224}), want: Accepted},
		{name: "RSA with SHA3-512", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA3_512}), want: Accepted},
		{name: "ECDSA", sig: sign(t, ecdsa, trusttest.SignOptions{}), want: Accepted},
		{name: "EdDSA", sig: sign(t, eddsa, trusttest.SignOptions{}), want: Accepted},
		{name: "Ed25519", sig: sign(t, ed25519, trusttest.SignOptions{}), want: Accepted},
		{name: "a signing subkey", sig: sign(t, sub, trusttest.SignOptions{}), want: Accepted},
		{name: "the primary key beside a signing subkey", sig: sign(t, sub, trusttest.SignOptions{UsePrimary: true}), want: Accepted},

		{name: "no signature", want: Unsigned},
		{name: "no signature where it is optional", policy: Policy{Signature: Optional}, want: Unsigned},
		{name: "a bad signature where it is optional", sig: sign(t, rsa, trusttest.SignOptions{}), policy: Policy{Signature: Optional}, of: "x", want: BadSignature},
		{name: "a stranger's signature where it is optional", sig: sign(t, other, trusttest.SignOptions{}), policy: Policy{Signature: Optional}, want: UnknownKey},
		{name: "other bytes", sig: sign(t, rsa, trusttest.SignOptions{}), of: "other bytes", want: BadSignature},
		{name: "one more byte", sig: sign(t, rsa, trusttest.SignOptions{}), of: image + "\n", want: BadSignature},
		{name: "a stranger", sig: sign(t, other, trusttest.SignOptions{}), want: UnknownKey, detail: "acproxy trust add --prefix example.com/app --fingerprint " + other.Fingerprint() + " FILE"},

		{name: "an expired key", sig: sign(t, expired, trusttest.SignOptions{}), want: KeyExpired},
		{name: "a key at its last second", sig: sign(t, expiresSoon, trusttest.SignOptions{}), want: Accepted},
		{name: "a key at its end", sig: sign(t, expires, trusttest.SignOptions{}), want: KeyExpired},
		{name: "an expired subkey", sig: sign(t, subExpired, trusttest.SignOptions{}), want: KeyExpired},
		{name: "an expired key that signed before, where policy accepts it", sig: sign(t, expired, trusttest.SignOptions{}), policy: before, want: Accepted},
		{name: "an expired key that signed at its end", sig: sign(t, expired, trusttest.SignOptions{Time: now.Add(-time.Hour)}), policy: before, want: KeyExpired},
		{name: "an expired key that signed after its end", sig: sign(t, expired, trusttest.SignOptions{Time: now.Add(-time.Minute)}), policy: before, want: KeyExpired},
		{name: "an expired subkey that signed before, where policy accepts it", sig: sign(t, subExpired, trusttest.SignOptions{}), policy: before, want: Accepted},
		{name: "an expired key and other bytes", sig: sign(t, expired, trusttest.SignOptions{}), of: "x", want: BadSignature},
		{name: "an expired signature", sig: sign(t, rsa, trusttest.SignOptions{Lifetime: time.Hour}), want: SignatureExpired},
		{name: "a signature at its end", sig: sign(t, rsa, trusttest.SignOptions{Lifetime: 24 * time.Hour}), want: SignatureExpired},
		{name: "a signature at its last second", sig: sign(t, rsa, trusttest.SignOptions{Lifetime: 24*time.Hour + time.Second}), want: Accepted},
		{name: "a signature that has not expired yet", sig: sign(t, rsa, trusttest.SignOptions{Lifetime: 48 * time.Hour}), want: Accepted},
		{name: "a revoked key", sig: revokedSig, want: KeyRevoked},
		{name: "a revoked key under the laxest policy", sig: revokedSig, policy: Policy{Legacy: true, Expired: AcceptIfSignedBefore}, want: KeyRevoked},
		{name: "a revoked subkey", sig: sign(t, subRevoked, trusttest.SignOptions{}), want: KeyRevoked},
		{name: "the primary key of a revoked subkey", sig: sign(t, subRevoked, trusttest.SignOptions{UsePrimary: true}), want: Accepted},
		{name: "a signature from the future", sig: sign(t, rsa, trusttest.SignOptions{Time: now.Add(MaxClockSkew + time.Second)}), want: NotYetValid},
		{name: "a signature from a clock that is ahead", sig: sign(t, rsa, trusttest.SignOptions{Time: now.Add(MaxClockSkew)}), want: Accepted},
		{name: "a key from the future", sig: sign(t, future, trusttest.SignOptions{Time: now}), want: NotYetValid},
		{name: "a key from a clock that is ahead", sig: sign(t, skewed, trusttest.SignOptions{Time: now.Add(MaxClockSkew)}), want: Accepted},
		{name: "a signature older than its key", sig: sign(t, young, trusttest.SignOptions{}), want: NotYetValid},
		{name: "a signature older than its key, legacy", sig: sign(t, young, trusttest.SignOptions{}), policy: legacy, want: Accepted},

		{name: "SHA-1", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA1}), want: WeakAlgorithm, detail: "SHA-1"},
		{name: "SHA-1, legacy", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA1}), policy: legacy, want: Accepted},
		{name: "SHA-1 and other bytes, legacy", sig: sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA1}), policy: legacy, of: "x", want: BadSignature},
		{name: "MD5", sig: md5, want: WeakAlgorithm, detail: "MD5"},
		{name: "MD5, legacy", sig: md5, policy: legacy, want: WeakAlgorithm},
		{name: "a short RSA key", sig: sign(t, short, trusttest.SignOptions{}), want: WeakAlgorithm, detail: "1024 bits"},
		{name: "a short RSA key, legacy", sig: sign(t, short, trusttest.SignOptions{}), policy: legacy, want: Accepted},
		{name: "DSA", sig: sign(t, dsa, trusttest.SignOptions{Hash: crypto.SHA256}), want: WeakAlgorithm, detail: "DSA"},
		{name: "DSA, legacy", sig: sign(t, dsa, trusttest.SignOptions{Hash: crypto.SHA1}), policy: legacy, want: Accepted},
		{name: "an expired key, legacy", sig: sign(t, expired, trusttest.SignOptions{}), policy: legacy, want: KeyExpired},

		{name: "an empty file", sig: []byte{}, want: MalformedSignature},
		{name: "a web page", sig: []byte("<!doctype html><title>Not found</title>"), want: MalformedSignature},
		{name: "binary rubbish", sig: []byte{0xff, 0xff, 0xff}, want: MalformedSignature},
		{name: "half a signature", sig: sign(t, rsa, trusttest.SignOptions{Binary: true})[:100], want: MalformedSignature},
		{name: "armor without end", sig: sign(t, rsa, trusttest.SignOptions{})[:200], want: MalformedSignature},
		{name: "armor of rubbish", sig: []byte("-----BEGIN PGP SIGNATURE-----\n\n!!!!\n-----END PGP SIGNATURE-----\n"), want: MalformedSignature},
		{name: "a signature over text", sig: sign(t, rsa, trusttest.SignOptions{Text: true}), want: UnsupportedSignature, detail: "--textmode"},
		{name: "a version 3 signature", sig: v3, want: UnsupportedSignature, detail: "version 3"},
		{name: "a key", sig: rsa.Armored(), want: UnsupportedSignature, detail: "a key"},
		{name: "a key without armor", sig: rsa.Binary(), want: UnsupportedSignature, detail: "a key"},
		{name: "a signed message", sig: signedMessage(t, false), want: UnsupportedSignature, detail: "signature inside"},
		{name: "a compressed message", sig: signedMessage(t, true), want: UnsupportedSignature, detail: "compressed"},
		{name: "a cleartext-signed text", sig: []byte("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\nhello\n" + string(sign(t, rsa, trusttest.SignOptions{}))), want: UnsupportedSignature, detail: "cleartext"},

		{name: "text before the armor", sig: append([]byte("hello\n\n"), sign(t, rsa, trusttest.SignOptions{})...), want: Accepted},
		{name: "rubbish behind the packet", sig: append(sign(t, rsa, trusttest.SignOptions{Binary: true}), '\n'), want: Accepted},
		{name: "a stranger's signature and then a good one", sig: joinBinary(sign(t, other, trusttest.SignOptions{Binary: true}), sign(t, rsa, trusttest.SignOptions{Binary: true})), want: Accepted},
		{name: "a good signature and then a stranger's", sig: joinBinary(sign(t, rsa, trusttest.SignOptions{Binary: true}), sign(t, other, trusttest.SignOptions{Binary: true})), want: Accepted},
		{name: "two blocks of armor", sig: joinBinary(sign(t, other, trusttest.SignOptions{}), sign(t, rsa, trusttest.SignOptions{})), want: Accepted},
		{name: "a stranger's signature and a revoked key's", sig: joinBinary(sign(t, other, trusttest.SignOptions{}), revokedSig), want: KeyRevoked},
		{name: "two keys where two are asked for", sig: joinBinary(sign(t, ecdsa, trusttest.SignOptions{}), sign(t, rsa, trusttest.SignOptions{})), policy: Policy{Threshold: 2}, want: Accepted},
		{name: "one key where two are asked for", sig: sign(t, rsa, trusttest.SignOptions{}), policy: Policy{Threshold: 2}, want: TooFewSigners},
		{name: "one key twice where two are asked for", sig: joinBinary(sign(t, rsa, trusttest.SignOptions{}), sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA256})), policy: Policy{Threshold: 2}, want: TooFewSigners},
		{name: "a primary key and its subkey where two are asked for", sig: joinBinary(sign(t, sub, trusttest.SignOptions{}), sign(t, sub, trusttest.SignOptions{UsePrimary: true})), policy: Policy{Threshold: 2}, want: TooFewSigners},
		{name: "a good key and an expired one where two are asked for", sig: joinBinary(sign(t, rsa, trusttest.SignOptions{}), sign(t, expired, trusttest.SignOptions{})), policy: Policy{Threshold: 2}, want: TooFewSigners, detail: "expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			of := image
			if test.of != "" {
				of = test.of
			}
			q := Question{Name: name, Signature: test.sig, Hashed: hashed(t, test.sig, of), Policy: test.policy, Now: now}
			a, err := keys.Judge(q)
			if got := outcome(t, a, err); got != test.want {
				t.Fatalf("Judge = %v (%v), want %v", got, err, test.want)
			}
			if err != nil && (!strings.Contains(err.Error(), test.detail) || !strings.HasPrefix(err.Error(), name)) {
				t.Errorf("Judge says %q, want something about %q", err, test.detail)
			}
			if err == nil && a.Provisional {
				t.Error("an acceptance with hashes is provisional")
			}

			// Before the bytes are known the answer is the same, unless it is about the bytes.
			q.Hashed = nil
			a, err = keys.Judge(q)
			got := outcome(t, a, err)
			switch {
			case test.want == BadSignature && got == BadSignature:
				t.Errorf("Judge without hashes = %v", got)
			case test.want != BadSignature && got != test.want:
				t.Errorf("Judge without hashes = %v, want %v", got, test.want)
			case got == Accepted && !a.Provisional:
				t.Error("an acceptance without hashes is not provisional")
			}
		})
	}
}

// signedMessage returns a message with its signature inside.
func signedMessage(t *testing.T, compressed bool) []byte {
	t.Helper()
	e, err := openpgp.NewEntity("Inline", "", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	var body, b bytes.Buffer
	w, err := openpgp.Sign(&body, []*openpgp.Entity{e}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, image)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !compressed {
		return body.Bytes()
	}
	c, err := packet.SerializeCompressed(nopCloser{&b}, packet.CompressionZIP, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Write(body.Bytes())
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func TestAcceptanceSaysWhoSigned(t *testing.T) {
	key := newKey(t, trusttest.Options{SigningSubkey: true, Name: "Carly", Email: "carly@example.com", Expires: now.Add(time.Hour)})
	keys := ring(t, trusted{"example.com", key.Armored()})
	made := now.Add(-time.Minute)
	sig := sign(t, key, trusttest.SignOptions{Time: made, Hash: crypto.SHA256})
	a, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: hashed(t, sig, image), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	want := Signer{Fingerprint: Fingerprint(key.Fingerprint()), KeyID: key.KeyID(), UserID: "Carly <carly@example.com>", Prefix: "example.com", Signed: made, Algorithm: "RSA 2048, SHA-256"}
	if len(a.Signers) != 1 || !a.Signers[0].Signed.Equal(made) {
		t.Fatalf("Signers = %+v, want %+v", a.Signers, want)
	}
	a.Signers[0].Signed = made
	if a.Signers[0] != want {
		t.Errorf("Signers = %+v, want %+v", a.Signers[0], want)
	}
	if !a.Until.Equal(now.Add(time.Hour)) {
		t.Errorf("Until = %v, want the key's end %v", a.Until, now.Add(time.Hour))
	}
	if a.RktWarning != "" {
		t.Errorf("RktWarning = %q", a.RktWarning)
	}
}

func TestUntilIsTheFirstEnd(t *testing.T) {
	key := newKey(t, trusttest.Options{Expires: now.Add(2 * time.Hour)})
	keys := ring(t, trusted{"", key.Armored()})
	sig := sign(t, key, trusttest.SignOptions{Time: now, Lifetime: time.Hour})
	for _, test := range []struct {
		name string
		sig  []byte
		p    Policy
		want time.Time
	}{
		{"the signature ends first", sig, Policy{}, now.Add(time.Hour)},
		{"the key ends", sign(t, key, trusttest.SignOptions{}), Policy{}, now.Add(2 * time.Hour)},
		{"the key's end doesn't matter", sign(t, key, trusttest.SignOptions{}), Policy{Expired: AcceptIfSignedBefore}, time.Time{}},
	} {
		q := Question{Name: "example.com/app", Signature: test.sig, Hashed: hashed(t, test.sig, image), Policy: test.p, Now: now}
		a, err := keys.Judge(q)
		if err != nil || !a.Until.Equal(test.want) {
			t.Errorf("%s: Judge = until %v, %v, want %v", test.name, a.Until, err, test.want)
		}
		if test.want.IsZero() {
			continue
		}
		q.Now = test.want.Add(-time.Second)
		if _, err := keys.Judge(q); err != nil {
			t.Errorf("%s: a second before its end: %v", test.name, err)
		}
		q.Now = test.want
		if _, err := keys.Judge(q); err == nil {
			t.Errorf("%s: accepted at its end", test.name)
		}
	}
}

func TestPrefixes(t *testing.T) {
	app := newKey(t, trusttest.Options{})
	root := newKey(t, trusttest.Options{})
	keys := ring(t, trusted{"example.com/app", app.Armored()}, trusted{"", root.Armored()})
	for _, test := range []struct {
		name string
		key  *trusttest.Key
		want Outcome
	}{
		{"example.com/app", app, Accepted},
		{"example.com/app/web", app, Accepted},
		{"example.com/apple", app, UnknownKey},
		{"example.com/ap", app, UnknownKey},
		{"example.com", app, UnknownKey},
		{"other.example.com/app", app, UnknownKey},
		{"example.com/app", root, Accepted},
		{"anything", root, Accepted},
	} {
		sig := sign(t, test.key, trusttest.SignOptions{})
		a, err := keys.Judge(Question{Name: test.name, Signature: sig, Hashed: hashed(t, sig, image), Now: now})
		if got := outcome(t, a, err); got != test.want {
			t.Errorf("%s: Judge = %v, want %v", test.name, got, test.want)
		}
		var r *Refusal
		if errors.As(err, &r) && (!reflect.DeepEqual(r.TrustedFor, []string{"example.com/app"}) || !strings.Contains(r.Detail, "trusted for example.com/app")) {
			t.Errorf("%s: refusal %q, trusted for %q: want it to say what the key is trusted for", test.name, r.Detail, r.TrustedFor)
		}
	}
}

// What an attacker who holds no trusted key can do with the ID of one: nothing.
func TestTheIssuerIsOnlyAHint(t *testing.T) {
	good, evil := newKey(t, trusttest.Options{}), newKey(t, trusttest.Options{})
	keys := ring(t, trusted{"", good.Armored()})
	sig := sign(t, evil, trusttest.SignOptions{Binary: true})
	goodID, evilID := mustHex(t, good.Fingerprint()), mustHex(t, evil.Fingerprint())
	forged := bytes.ReplaceAll(sig, evilID, goodID)
	forged = bytes.ReplaceAll(forged, evilID[12:], goodID[12:])
	if bytes.Equal(forged, sig) {
		t.Fatal("nothing was forged")
	}
	a, err := keys.Judge(Question{Name: "example.com/app", Signature: forged, Hashed: hashed(t, forged, image), Now: now})
	if got := outcome(t, a, err); got != BadSignature {
		t.Errorf("Judge = %v, want %v", got, BadSignature)
	}
}

func mustHex(t *testing.T, s string) []byte {
	t.Helper()
	var b []byte
	for i := 0; i < len(s); i += 2 {
		b = append(b, unhex(s[i])<<4|unhex(s[i+1]))
	}
	return b
}

func unhex(c byte) byte { return byte(strings.IndexByte("0123456789abcdef", c)) }

func TestASubkeyWithoutBackSignatureDoesNotCount(t *testing.T) {
	// Mallory binds Alice's signing subkey to her own key: without Alice's consent, what Alice signed would be Mallory's.
	alice, mallory := newKey(t, trusttest.Options{SigningSubkey: true}), newKey(t, trusttest.Options{})
	stolen := bytes.Clone(mallory.Binary())
	// The subkey packet and its binding, which are signed by Alice's primary key, stand behind Alice's user ID.
	ab := alice.Binary()
	at := subkeyAt(t, ab)
	keys, err := readCertificates(append(stolen, ab[at:]...))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(keys[0].subkeys[0].claims); n != 0 {
		t.Errorf("a subkey that another key has bound has %d claims, want 0", n)
	}
	dir := t.TempDir()
	if _, err := Add(Dirs{Local: dir}, "", append(stolen, ab[at:]...)); err != nil {
		t.Fatal(err)
	}
	sig := sign(t, alice, trusttest.SignOptions{})
	a, err := load(t, Dirs{Local: dir}).Judge(Question{Name: "example.com/app", Signature: sig, Hashed: hashed(t, sig, image), Now: now})
	if got := outcome(t, a, err); got != NotSigningKey {
		t.Errorf("Judge = %v, want %v", got, NotSigningKey)
	}
}

func subkeyAt(t *testing.T, key []byte) int {
	t.Helper()
	r := bytes.NewReader(key)
	packets := packet.NewOpaqueReader(r)
	for {
		at := len(key) - r.Len()
		p, err := packets.Next()
		if err != nil {
			t.Fatal(err)
		}
		if p.Tag == 14 {
			return at
		}
	}
}

func TestAKeyForEncryptionDoesNotSign(t *testing.T) {
	config := &packet.Config{Time: func() time.Time { return now.Add(-time.Hour) }}
	e, err := openpgp.NewEntity("Enc", "", "", config)
	if err != nil {
		t.Fatal(err)
	}
	var pub bytes.Buffer
	if err := e.Serialize(&pub); err != nil {
		t.Fatal(err)
	}
	encryption := e.Subkeys[0].PrivateKey
	sig := &packet.Signature{Version: 4, SigType: packet.SigTypeBinary, PubKeyAlgo: encryption.PubKeyAlgo, Hash: crypto.SHA256, CreationTime: now.Add(-time.Minute), IssuerKeyId: &encryption.KeyId}
	h := crypto.SHA256.New()
	io.WriteString(h, image)
	if err := sig.Sign(h, encryption, nil); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := sig.Serialize(&b); err != nil {
		t.Fatal(err)
	}
	keys := ring(t, trusted{"", pub.Bytes()})
	a, err := keys.Judge(Question{Name: "example.com/app", Signature: b.Bytes(), Hashed: hashed(t, b.Bytes(), image), Now: now, Policy: Policy{Legacy: true}})
	if got := outcome(t, a, err); got != NotSigningKey {
		t.Errorf("Judge = %v (%v), want %v", got, err, NotSigningKey)
	}
}

func TestARevocationInAnyCopyCounts(t *testing.T) {
	key := newKey(t, trusttest.Options{})
	sig, fresh := sign(t, key, trusttest.SignOptions{}), key.Armored()
	if err := key.Revoke(); err != nil {
		t.Fatal(err)
	}
	keys := ring(t, trusted{"example.com", key.Armored()}, trusted{"other.org/app", fresh})
	a, err := keys.Judge(Question{Name: "other.org/app", Signature: sig, Hashed: hashed(t, sig, image), Now: now})
	if got := outcome(t, a, err); got != KeyRevoked {
		t.Errorf("Judge = %v, want %v", got, KeyRevoked)
	}
	if k := keys.Keys("other.org/app"); len(k) != 1 || !k[0].Revoked {
		t.Errorf("Keys = %+v, want it revoked", k)
	}
}

func TestHashedAreEnough(t *testing.T) {
	key := newKey(t, trusttest.Options{})
	keys := ring(t, trusted{"", key.Armored()})
	first := sign(t, key, trusttest.SignOptions{})
	states := hashed(t, first, image)
	kept, err := json.Marshal(states)
	if err != nil {
		t.Fatal(err)
	}
	var back Hashed
	if err := json.Unmarshal(kept, &back); err != nil {
		t.Fatal(err)
	}
	ask := func(sig []byte, h Hashed) error {
		_, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: h, Now: now})
		return err
	}
	if err := ask(first, back); err != nil {
		t.Errorf("the same signature from stored hashes: %v", err)
	}
	if err := ask(sign(t, key, trusttest.SignOptions{Time: now}), back); err != nil {
		t.Errorf("a new signature with the same hash from stored hashes: %v", err)
	}
	err = ask(sign(t, key, trusttest.SignOptions{Hash: crypto.SHA256}), back)
	if !errors.Is(err, ErrNotHashed) || errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("a new signature with another hash: %v, want ErrNotHashed and no refusal", err)
	}
	back["SHA-512"] = back["SHA-512"][:10]
	if err := ask(first, back); !errors.Is(err, ErrNotHashed) {
		t.Errorf("a damaged state: %v, want ErrNotHashed", err)
	}
	if err := ask(first, Hashed{}); !errors.Is(err, ErrNotHashed) {
		t.Errorf("no state: %v, want ErrNotHashed", err)
	}
}

func TestHasherComputesEachHashOnce(t *testing.T) {
	key := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	a, b := sign(t, key, trusttest.SignOptions{Binary: true}), sign(t, key, trusttest.SignOptions{Binary: true, Hash: crypto.SHA256})
	h, err := NewHasher(joinBinary(a, b, a, b, a))
	if err != nil {
		t.Fatal(err)
	}
	if len(h.hashes) != 2 {
		t.Errorf("%d hashes, want 2", len(h.hashes))
	}
	h.Write([]byte("what is signed"))
	if sum := h.SHA256(); sum == nil || [sha256.Size]byte(sum.Sum(nil)) != sha256.Sum256([]byte("what is signed")) {
		t.Errorf("SHA256 = %v", sum)
	}
	if h, err := NewHasher(a); err != nil || h.SHA256() != nil {
		t.Errorf("SHA256 of a hasher that computes none = %v, %v", h.SHA256(), err)
	}
	if h, err := NewHasher(nil); err != nil || len(h.hashes) != 0 {
		t.Errorf("NewHasher(nil) = %v, %v", h, err)
	}
	if _, err := NewHasher([]byte("rubbish")); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("NewHasher of rubbish = %v, want a refusal", err)
	}
}

func TestLimits(t *testing.T) {
	key := newKey(t, trusttest.Options{})
	keys := ring(t, trusted{"", key.Armored()})
	ask := func(sig []byte) Outcome {
		a, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: hashed(t, sig, image), Now: now})
		return outcome(t, a, err)
	}
	good := sign(t, key, trusttest.SignOptions{})
	full := append(good, bytes.Repeat([]byte("\n"), MaxSignature-len(good))...)
	if got := ask(full); got != Accepted {
		t.Errorf("a signature of MaxSignature bytes: %v", got)
	}
	if got := ask(append(full, '\n')); got != MalformedSignature {
		t.Errorf("a signature of MaxSignature+1 bytes: %v", got)
	}
	stranger := sign(t, newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA}), trusttest.SignOptions{Binary: true})
	binary := sign(t, key, trusttest.SignOptions{Binary: true})
	if got := ask(append(bytes.Repeat(stranger, MaxPackets-1), binary...)); got != Accepted {
		t.Errorf("the signature is packet MaxPackets: %v", got)
	}
	if got := ask(append(bytes.Repeat(stranger, MaxPackets), binary...)); got != UnknownKey {
		t.Errorf("the signature is packet MaxPackets+1: %v", got)
	}
	exact := key.Armored()
	exact = append(exact, bytes.Repeat([]byte("\n"), MaxKeyFile-len(exact))...)
	if _, err := ReadKeys(exact); err != nil {
		t.Errorf("a key file of MaxKeyFile bytes: %v", err)
	}
	if _, err := ReadKeys(append(exact, '\n')); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("a key file of MaxKeyFile+1 bytes: %v", err)
	}
}

func TestAKeyWhoseLifeWasExtendedVouchesForWhatItSignedBefore(t *testing.T) {
	created := now.Add(-300 * 24 * time.Hour)
	config := &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return created }, KeyLifetimeSecs: 24 * 3600}
	e, err := openpgp.NewEntity("Long Lived", "", "", config)
	if err != nil {
		t.Fatal(err)
	}
	var sig bytes.Buffer
	if err := openpgp.DetachSign(&sig, []*openpgp.Entity{e}, strings.NewReader(image), config); err != nil {
		t.Fatal(err)
	}
	ask := func(now time.Time) Outcome {
		var pub bytes.Buffer
		if err := e.Serialize(&pub); err != nil {
			t.Fatal(err)
		}
		a, err := ring(t, trusted{"", pub.Bytes()}).Judge(Question{Name: "example.com/app", Signature: sig.Bytes(), Hashed: hashed(t, sig.Bytes(), image), Now: now})
		return outcome(t, a, err)
	}
	if got := ask(now); got != KeyExpired {
		t.Errorf("before: %v, want %v", got, KeyExpired)
	}
	// As gpg does it: the new self-signature takes the old one's place, and is younger than the signature.
	for _, identity := range e.Identities {
		self := identity.SelfCertifications[0].Packet
		forever := uint32(0)
		self.CreationTime, self.KeyLifetimeSecs = now.Add(-time.Hour), &forever
		if err := self.SignUserId(identity.Name, e.PrimaryKey, e.PrivateKey, config); err != nil {
			t.Fatal(err)
		}
	}
	if got := ask(now); got != Accepted {
		t.Errorf("after: %v, want %v", got, Accepted)
	}
}

func TestJudgeFromManyGoroutines(t *testing.T) {
	key := newKey(t, trusttest.Options{SigningSubkey: true, Expires: now.Add(time.Hour)})
	keys := ring(t, trusted{"example.com", key.Armored()})
	sig := sign(t, key, trusttest.SignOptions{})
	states := hashed(t, sig, image)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 20 {
				// The answers alternate, so that a verdict remembered from another time or policy shows.
				at, want := now, Accepted
				if i%2 == 1 {
					at, want = now.Add(2*time.Hour), KeyExpired
				}
				a, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: states, Now: at})
				if got := outcome(t, a, err); got != want {
					t.Errorf("Judge at %v = %v, want %v", at, got, want)
				}
			}
		})
	}
	wg.Wait()
}

func TestArmorSignature(t *testing.T) {
	key := newKey(t, trusttest.Options{})
	text, binary := sign(t, key, trusttest.SignOptions{}), sign(t, key, trusttest.SignOptions{Binary: true})
	if got, err := ArmorSignature(text); err != nil || !bytes.Equal(got, text) {
		t.Errorf("armored input changed (%v)", err)
	}
	var noChecksum bytes.Buffer
	w, _ := armor.EncodeWithChecksumOption(&noChecksum, "PGP SIGNATURE", nil, false)
	w.Write(binary)
	w.Close()
	for name, in := range map[string][]byte{"binary": binary, "no checksum": noChecksum.Bytes(), "two blocks": joinBinary(text, text)} {
		got, err := ArmorSignature(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !hasChecksum(got) || bytes.Count(got, []byte(armorBegin)) != 1 {
			t.Errorf("%s: ArmorSignature = %s", name, got)
		}
		want, err := readSignatures(in)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := readSignatures(got); err != nil || len(back) != len(want) {
			t.Errorf("%s: %d signatures became %d (%v)", name, len(want), len(back), err)
		}
	}
	if _, err := ArmorSignature(key.Binary()); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("ArmorSignature of a key = %v, want a refusal", err)
	}
}

func TestRktWarning(t *testing.T) {
	rsa := newKey(t, trusttest.Options{SigningSubkey: true})
	eddsa := newKey(t, trusttest.Options{Algorithm: trusttest.EdDSA})
	expired := newKey(t, trusttest.Options{Expires: now.Add(-time.Hour)})
	keys := ring(t, trusted{"", rsa.Armored()}, trusted{"", eddsa.Armored()}, trusted{"", expired.Armored()})
	for _, test := range []struct {
		name   string
		sig    []byte
		policy Policy
		want   string // part of it
	}{
		{"RSA with a subkey", sign(t, rsa, trusttest.SignOptions{}), Policy{}, ""},
		{"without armor, as we armor it for them", sign(t, rsa, trusttest.SignOptions{Binary: true}), Policy{}, ""},
		{"SHA-1", sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA1}), Policy{Legacy: true}, ""},
		{"an expired key", sign(t, expired, trusttest.SignOptions{}), Policy{Expired: AcceptIfSignedBefore}, ""},
		{"Ed25519", sign(t, eddsa, trusttest.SignOptions{}), Policy{}, "refuse it"},
		{"SHA3", sign(t, rsa, trusttest.SignOptions{Hash: crypto.SHA3_256}), Policy{}, "can't be read"},
		{"a stranger's first", joinBinary(sign(t, newKey(t, trusttest.Options{}), trusttest.SignOptions{Binary: true}), sign(t, rsa, trusttest.SignOptions{Binary: true})), Policy{}, "first signature only"},
	} {
		a, err := keys.Judge(Question{Name: "example.com/app", Signature: test.sig, Hashed: hashed(t, test.sig, image), Policy: test.policy, Now: now})
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if (test.want == "") != (a.RktWarning == "") || !strings.Contains(a.RktWarning, test.want) {
			t.Errorf("%s: RktWarning = %q, want something about %q", test.name, a.RktWarning, test.want)
		}
	}
	if err := RktCheckKey(rsa.Armored()); err != nil {
		t.Errorf("RktCheckKey(RSA) = %v", err)
	}
	if err := RktCheckKey(eddsa.Armored()); err == nil {
		t.Error("rkt reads Ed25519 keys")
	}
	if err := RktCheckKey(rsa.Binary()); err == nil {
		t.Error("rkt reads keys without armor")
	}
}

func TestWordsRoundTrip(t *testing.T) {
	for _, o := range append(Outcomes(), 0) {
		text, _ := o.MarshalText()
		var back Outcome
		if err := back.UnmarshalText(text); err != nil || back != o {
			t.Errorf("%v became %v (%v)", o, back, err)
		}
	}
	var o Outcome
	if err := o.UnmarshalText([]byte("fine")); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("UnmarshalText(fine) = %v", err)
	}
	for _, r := range []Requirement{Required, Optional} {
		text, _ := r.MarshalText()
		var back Requirement
		if err := back.UnmarshalText(text); err != nil || back != r {
			t.Errorf("%v became %v (%v)", r, back, err)
		}
	}
	for _, p := range []ExpiredPolicy{RefuseExpired, AcceptIfSignedBefore} {
		text, _ := p.MarshalText()
		var back ExpiredPolicy
		if err := back.UnmarshalText(text); err != nil || back != p {
			t.Errorf("%v became %v (%v)", p, back, err)
		}
	}
}

func BenchmarkJudge(b *testing.B) {
	key := newKey(b, trusttest.Options{SigningSubkey: true})
	keys := ring(b, trusted{"example.com", key.Armored()})
	sig := sign(b, key, trusttest.SignOptions{})
	q := Question{Name: "example.com/app", Signature: sig, Hashed: hashed(b, sig, image), Now: now}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := keys.Judge(q); err != nil {
			b.Fatal(err)
		}
	}
}

func writeFile(t testing.TB, name, content string, perm os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(name[:strings.LastIndexByte(name, '/')], 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, perm); err != nil {
		t.Fatal(err)
	}
}
