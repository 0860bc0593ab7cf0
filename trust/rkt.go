package trust

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	rktopenpgp "golang.org/x/crypto/openpgp"       //nolint:staticcheck // deprecated as unsafe: it is what rkt runs, and only predicts what rkt says
	rktarmor "golang.org/x/crypto/openpgp/armor"   //nolint:staticcheck // as above
	rktpacket "golang.org/x/crypto/openpgp/packet" //nolint:staticcheck // as above

	"github.com/acproxy/acproxy"
)

// A rktKey is a key as the library that rkt runs reads it.
type rktKey struct {
	entity  *rktopenpgp.Entity
	problem error // why rkt can't read it
}

// RktCheckKey returns nil if rkt can read a key file, and the reason if it can't. rkt reads armored keys only, and only the first of a file.
func RktCheckKey(key []byte) error {
	certs, err := readCertificates(key)
	if err != nil {
		return err
	}
	if !bytes.Contains(key, []byte(armorBegin)) {
		return acproxy.Invalid("it is not armored, and rkt reads armored keys only")
	}
	return readRktKey(key, certs[0].fingerprint).problem
}

func readRktKey(key []byte, fpr Fingerprint) rktKey {
	entities, err := rktopenpgp.ReadArmoredKeyRing(bytes.NewReader(key))
	switch {
	case err != nil:
		return rktKey{problem: fmt.Errorf("rkt can't read key %s: %s", fpr, plain(err))}
	case len(entities) == 0 || hex.EncodeToString(entities[0].PrimaryKey.Fingerprint[:]) != string(fpr):
		return rktKey{problem: fmt.Errorf("rkt can't read key %s", fpr)}
	case usesECDSA(entities[0]):
		// The library has learned it since; rkt 1.30 was seen to refuse such keys and what they sign.
		return rktKey{problem: fmt.Errorf("rkt can't read key %s: it is an ECDSA key", fpr)}
	}
	return rktKey{entity: entities[0]}
}

func usesECDSA(e *rktopenpgp.Entity) bool {
	return e.PrimaryKey.PubKeyAlgo == rktpacket.PubKeyAlgoECDSA || slices.ContainsFunc(e.Subkeys, func(s rktopenpgp.Subkey) bool {
		return s.PublicKey.PubKeyAlgo == rktpacket.PubKeyAlgoECDSA
	})
}

// rktWarning predicts what a rkt node will say that trusts the same keys: "" if it will accept the signature too. It reads the signature as
// rkt does, the first packet only, and verifies with rkt's own library on the hash state; without hashes it can only tell what doesn't
// depend on the bytes. rkt minds neither expired keys nor expired signatures.
func rktWarning(keys []Key, published []byte, hashed Hashed) string {
	reason := rktRefuses(keys, published, hashed)
	if reason == "" {
		return ""
	}
	return "rkt nodes will refuse it: " + reason
}

func rktRefuses(keys []Key, published []byte, hashed Hashed) string {
	text, err := ArmorSignature(published)
	if err != nil {
		return err.Error()
	}
	block, err := rktarmor.Decode(bytes.NewReader(text))
	if err != nil {
		return "the signature's armor can't be read"
	}
	p, err := rktpacket.NewReader(block.Body).Next()
	if err != nil {
		return "the first signature can't be read: " + plain(err)
	}
	sig, ok := p.(*rktpacket.Signature)
	if !ok || sig.IssuerKeyId == nil {
		return "the first packet is not a signature that names its key"
	}
	var ring rktopenpgp.EntityList
	var unreadable string
	for _, k := range keys {
		if k.cert.rkt.problem == nil {
			ring = append(ring, k.cert.rkt.entity)
			continue
		}
		for _, pub := range k.cert.all() {
			if pub.id == *sig.IssuerKeyId {
				unreadable = fmt.Sprintf("its key is %s: %v", algorithm(pub.packet), k.cert.rkt.problem)
			}
		}
	}
	signers := ring.KeysByIdUsage(*sig.IssuerKeyId, rktpacket.KeyFlagSign)
	if len(signers) == 0 {
		if unreadable != "" {
			return unreadable
		}
		return fmt.Sprintf("they read the first signature only, and don't trust its key %s for signing", keyID(*sig.IssuerKeyId))
	}
	if hashed == nil {
		return ""
	}
	for _, signer := range signers {
		h, err := hashed.resume(sig.Hash)
		if err != nil {
			return ""
		}
		if signer.PublicKey.VerifySignature(h, sig) == nil {
			return ""
		}
	}
	return "the first signature, the only one they read, is not good"
}

// plain returns a library's error without its prefix, on one line.
func plain(err error) string {
	return strings.TrimPrefix(printable(err.Error()), "openpgp: ")
}
