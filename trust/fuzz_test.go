package trust

import (
	"bytes"
	"crypto"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// FuzzJudge gives Judge signatures that were tampered with, for bytes that it may also have been tampered with. What it accepts the library
// has to accept too, in one pass over the bytes and with a key that was read afresh; and what a hash state says, the bytes say.
func FuzzJudge(f *testing.F) {
	rsa := newKey(f, trusttest.Options{SigningSubkey: true})
	eddsa := newKey(f, trusttest.Options{Algorithm: trusttest.EdDSA})
	expired := newKey(f, trusttest.Options{Algorithm: trusttest.ECDSA, Expires: now.Add(-time.Hour)})
	dsa := newKey(f, trusttest.Options{Algorithm: trusttest.DSA})
	stranger := newKey(f, trusttest.Options{Algorithm: trusttest.EdDSA})
	files := [][]byte{rsa.Binary(), eddsa.Binary(), expired.Binary(), dsa.Binary()}
	keys := ring(f, trusted{"", files[0]}, trusted{"", files[1]}, trusted{"", files[2]}, trusted{"", files[3]})
	for _, k := range []*trusttest.Key{rsa, eddsa, expired, dsa, stranger} {
		for _, opts := range []trusttest.SignOptions{{}, {Binary: true}, {Binary: true, Hash: crypto.SHA256}, {Hash: crypto.SHA1}, {Text: true}, {Lifetime: time.Hour}} {
			f.Add(sign(f, k, opts), image)
		}
	}
	f.Add(joinBinary(sign(f, stranger, trusttest.SignOptions{}), sign(f, rsa, trusttest.SignOptions{})), image)
	f.Add([]byte("-----BEGIN PGP SIGNED MESSAGE-----\n"), "")
	f.Fuzz(func(t *testing.T, sig []byte, content string) {
		h, err := NewHasher(sig)
		var refusal *Refusal
		if err != nil {
			if sig != nil && !errors.As(err, &refusal) {
				t.Fatalf("NewHasher = %v, want a refusal", err)
			}
			return
		}
		if _, err := io.Copy(h, iotestReader(content)); err != nil {
			t.Fatal(err)
		}
		states, err := h.Hashed()
		if err != nil {
			t.Fatal(err)
		}
		a, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: states, Now: now})
		if err != nil && !errors.As(err, &refusal) {
			t.Fatalf("Judge = %v, want a refusal", err)
		}
		if _, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Now: now}); err != nil && a.Outcome == Accepted {
			t.Fatalf("Judge accepts with hashes, and without them says %v", err)
		}
		if _, err := keys.Judge(Question{Name: "example.com/app", Signature: sig, Hashed: states, Now: now, Policy: Policy{Legacy: true, Expired: AcceptIfSignedBefore}}); err != nil && a.Outcome == Accepted {
			t.Fatalf("a laxer policy refuses: %v", err)
		}
		if a.Outcome != Accepted {
			return
		}
		if _, err := ArmorSignature(sig); err != nil {
			t.Fatalf("ArmorSignature of an accepted signature = %v", err)
		}
		// The library looks at one signature packet here: those it can't read would make it refuse the good ones.
		config := &packet.Config{Time: func() time.Time { return now.Add(MaxClockSkew) }}
		sigs, err := readSignatures(sig)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sigs {
			if s.packet == nil {
				continue
			}
			var one bytes.Buffer
			if err := s.packet.Serialize(&one); err != nil {
				continue
			}
			var entities openpgp.EntityList
			for _, file := range files {
				e, err := openpgp.ReadKeyRing(bytes.NewReader(file))
				if err != nil {
					t.Fatal(err)
				}
				entities = append(entities, e...)
			}
			if _, _, err := openpgp.VerifyDetachedSignature(entities, strings.NewReader(content), &one, config); err == nil {
				return
			}
		}
		t.Errorf("Judge accepts %+v, and the library none of the signatures", a.Signers)
	})
}

// iotestReader returns a reader that yields a few bytes at a time, so that hash states are taken across blocks.
func iotestReader(s string) io.Reader {
	return struct{ io.Reader }{&fewBytes{r: strings.NewReader(s)}}
}

type fewBytes struct {
	r io.Reader
	n int
}

func (f *fewBytes) Read(p []byte) (int, error) {
	f.n = f.n%7 + 1
	return f.r.Read(p[:min(f.n, len(p))])
}

// FuzzReadKeys gives ReadKeys files that are nearly key files. What it reads has to be what it writes.
func FuzzReadKeys(f *testing.F) {
	for _, opts := range []trusttest.Options{{}, {SigningSubkey: true}, {Algorithm: trusttest.DSA}, {Algorithm: trusttest.ECDSA}, {Algorithm: trusttest.EdDSA, SigningSubkey: true}, {Algorithm: trusttest.Ed25519}} {
		k := newKey(f, opts)
		f.Add(k.Armored())
		f.Add(k.Binary())
		f.Add(k.SecretArmored())
		if err := k.Revoke(); err != nil {
			f.Fatal(err)
		}
		f.Add(k.Binary())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := ReadKeys(data)
		if err != nil {
			if !errors.Is(err, acproxy.ErrInvalid) {
				t.Fatalf("ReadKeys = %v, want ErrInvalid", err)
			}
			return
		}
		for _, k := range keys {
			if !isFingerprint(string(k.Fingerprint)) {
				t.Fatalf("fingerprint %q", k.Fingerprint)
			}
			if bytes.Contains(k.Armored(), []byte("PRIVATE")) {
				t.Fatal("a secret key was read")
			}
			again, err := ReadKeys(k.Armored())
			if err != nil || len(again) != 1 || again[0].Fingerprint != k.Fingerprint || again[0].Revoked != k.Revoked || !again[0].Expires.Equal(k.Expires) {
				t.Fatalf("%+v became %+v (%v)", k, again, err)
			}
		}
	})
}
