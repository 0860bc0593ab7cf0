package trusttest_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestKeysAreGoodOpenPGP(t *testing.T) {
	const signed = "hello"
	for _, test := range []struct {
		name string
		opts trusttest.Options
	}{
		{"RSA", trusttest.Options{}},
		{"RSA with a signing subkey", trusttest.Options{SigningSubkey: true}},
		{"DSA", trusttest.Options{Algorithm: trusttest.DSA}},
		{"ECDSA", trusttest.Options{Algorithm: trusttest.ECDSA}},
		{"EdDSA with a signing subkey", trusttest.Options{Algorithm: trusttest.EdDSA, SigningSubkey: true}},
		{"Ed25519", trusttest.Options{Algorithm: trusttest.Ed25519}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.opts.Expires = time.Now().Add(time.Hour)
			key, err := trusttest.NewKey(test.opts)
			if err != nil {
				t.Fatal(err)
			}
			entities, err := openpgp.ReadArmoredKeyRing(bytes.NewReader(key.Armored()))
			if err != nil || len(entities) != 1 || hex.EncodeToString(entities[0].PrimaryKey.Fingerprint) != key.Fingerprint() {
				t.Fatalf("reading the key back: %d keys, %v", len(entities), err)
			}
			sig, err := key.Sign(strings.NewReader(signed), trusttest.SignOptions{})
			if err != nil {
				t.Fatal(err)
			}
			config := &packet.Config{RejectPublicKeyAlgorithms: map[packet.PublicKeyAlgorithm]bool{}}
			check := func(content string, ring openpgp.EntityList) error {
				_, _, err := openpgp.VerifyArmoredDetachedSignature(ring, strings.NewReader(content), bytes.NewReader(sig), config)
				return err
			}
			if err := check(signed, entities); err != nil {
				t.Errorf("its signature: %v", err)
			}
			if check(signed+"!", entities) == nil {
				t.Error("its signature is good for other bytes")
			}
			if err := key.Revoke(); err != nil {
				t.Fatal(err)
			}
			revoked, err := openpgp.ReadKeyRing(bytes.NewReader(key.Binary()))
			if err != nil {
				t.Fatal(err)
			}
			if check(signed, revoked) == nil {
				t.Error("its signature is good although it is revoked")
			}
		})
	}
}
