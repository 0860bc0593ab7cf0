// Package trusttest makes keys and signatures for tests and for the demo: good ones, and every kind that a keyring has to refuse.
//
// Keys are made afresh each time and carry no passphrase. Nothing of this package belongs near a real publisher's key.
package trusttest

import (
	"bytes"
	"crypto"
	"crypto/dsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// An Algorithm is the kind of a key.
type Algorithm string

// The algorithms that NewKey knows.
const (
	RSA     Algorithm = "RSA"     // what rkt reads
	DSA     Algorithm = "DSA"     // as old archives used it: 1024 bits, refused unless policy allows it
	ECDSA   Algorithm = "ECDSA"   // over NIST P-256
	EdDSA   Algorithm = "EdDSA"   // Ed25519 as gpg 2 writes it (algorithm 22, RFC 9580 section 5.5.5.5)
	Ed25519 Algorithm = "Ed25519" // Ed25519 as RFC 9580 writes it (algorithm 27)
)

// Options says which key to make. The zero Options make an RSA key of 2048 bits, created an hour ago, that doesn't expire and signs with its primary key.
type Options struct {
	Algorithm Algorithm // "" means RSA
	Bits      int       // of an RSA key; 0 means 2048
	Name      string    // of the user ID; "" means "Test Publisher"
	Email     string    // of the user ID; "" means "publisher@example.com"
	Created   time.Time // the zero time means an hour ago
	Expires   time.Time // the zero time means never

	// SigningSubkey adds a subkey that signs in the primary key's place; SubkeyExpires is its end, the zero time means never.
	SigningSubkey bool
	SubkeyExpires time.Time
}

// A Key is a key pair. It is not safe for concurrent use while it is being revoked; otherwise it is.
type Key struct {
	entity *openpgp.Entity
}

// NewKey makes a key pair.
func NewKey(opts Options) (*Key, error) {
	created := opts.Created
	if created.IsZero() {
		created = time.Now().Add(-time.Hour)
	}
	config := &packet.Config{
		RSABits:         opts.Bits,
		Time:            func() time.Time { return created },
		MinRSABits:      1,
		KeyLifetimeSecs: lifetime(created, opts.Expires),
		DefaultHash:     crypto.SHA512,
		// DSA is refused by default, and these keys exist to be refused.
		RejectPublicKeyAlgorithms: map[packet.PublicKeyAlgorithm]bool{},
	}
	primary, err := newPrimary(opts.Algorithm, created, config)
	if err != nil {
		return nil, fmt.Errorf("making a test key: %w", err)
	}
	entity := &openpgp.Entity{PrimaryKey: &primary.PublicKey, PrivateKey: primary, Identities: make(map[string]*openpgp.Identity)}
	name, email := or(opts.Name, "Test Publisher"), or(opts.Email, "publisher@example.com")
	if err := entity.AddUserId(name, "", email, config); err != nil {
		return nil, fmt.Errorf("making a test key: %w", err)
	}
	if opts.SigningSubkey {
		config.KeyLifetimeSecs = lifetime(created, opts.SubkeyExpires)
		if err := entity.AddSigningSubkey(config); err != nil {
			return nil, fmt.Errorf("making a test key: %w", err)
		}
	}
	return &Key{entity: entity}, nil
}

func newPrimary(algorithm Algorithm, created time.Time, config *packet.Config) (*packet.PrivateKey, error) {
	switch algorithm {
	case RSA, "":
		config.Algorithm = packet.PubKeyAlgoRSA
		priv, err := rsa.GenerateKey(rand.Reader, config.RSAModulusBits())
		if err != nil {
			return nil, err
		}
		return packet.NewRSAPrivateKey(created, priv), nil
	case DSA:
		priv := new(dsa.PrivateKey)
		if err := dsa.GenerateParameters(&priv.Parameters, rand.Reader, dsa.L1024N160); err != nil {
			return nil, err
		}
		if err := dsa.GenerateKey(priv, rand.Reader); err != nil {
			return nil, err
		}
		return packet.NewDSAPrivateKey(created, priv), nil
	case ECDSA:
		config.Algorithm, config.Curve = packet.PubKeyAlgoECDSA, packet.CurveNistP256
	case EdDSA:
		config.Algorithm, config.Curve = packet.PubKeyAlgoEdDSA, packet.Curve25519
	case Ed25519:
		config.Algorithm = packet.PubKeyAlgoEd25519
	default:
		return nil, fmt.Errorf("unknown algorithm %q", algorithm)
	}
	// The library keeps its curves to itself, so that a whole entity has to be made for the sake of its primary key.
	entity, err := openpgp.NewEntity("unused", "", "", config)
	if err != nil {
		return nil, err
	}
	return entity.PrivateKey, nil
}

// Fingerprint returns the primary key's fingerprint in lower-case hex: the name of the key's file.
func (k *Key) Fingerprint() string { return hex.EncodeToString(k.entity.PrimaryKey.Fingerprint) }

// KeyID returns the ID, 16 upper-case hex digits, of the key that signs: the signing subkey's if there is one.
func (k *Key) KeyID() string { return fmt.Sprintf("%016X", k.signer().KeyId) }

// Binary returns the public key without armor.
func (k *Key) Binary() []byte {
	var b bytes.Buffer
	// Serializing can only fail in the writer, and a buffer takes everything.
	_ = k.entity.Serialize(&b)
	return b.Bytes()
}

// Armored returns the public key in ASCII armor, as it is published.
func (k *Key) Armored() []byte { return armored(openpgp.PublicKeyType, k.Binary()) }

// SecretArmored returns the key pair in ASCII armor, which no trust store should take.
func (k *Key) SecretArmored() []byte {
	var b bytes.Buffer
	_ = k.entity.SerializePrivateWithoutSigning(&b, nil)
	return armored(openpgp.PrivateKeyType, b.Bytes())
}

// SignOptions says how to sign. The zero SignOptions make an armored SHA-512 signature, made now, that doesn't expire.
type SignOptions struct {
	Binary     bool          // leave out the armor
	Hash       crypto.Hash   // 0 means SHA-512
	Time       time.Time     // when it claims to be made; the zero time means now
	Lifetime   time.Duration // after which it expires, in whole seconds; 0 means never
	Text       bool          // a signature over text, which means something else than the bytes
	UsePrimary bool          // sign with the primary key although there is a signing subkey
}

// Sign returns a detached signature over everything that signed yields. It asks nothing of the key: one that is expired, revoked or too
// young signs as well, because such signatures are what tests need.
func (k *Key) Sign(signed io.Reader, opts SignOptions) ([]byte, error) {
	signer := k.signer()
	if opts.UsePrimary {
		signer = k.entity.PrivateKey
	}
	sig := &packet.Signature{
		Version: 4, SigType: packet.SigTypeBinary, PubKeyAlgo: signer.PubKeyAlgo, Hash: crypto.SHA512,
		CreationTime: time.Now(), IssuerKeyId: &signer.KeyId,
	}
	if opts.Text {
		sig.SigType = packet.SigTypeText
	}
	if opts.Hash != 0 {
		sig.Hash = opts.Hash
	}
	if !opts.Time.IsZero() {
		sig.CreationTime = opts.Time
	}
	if opts.Lifetime != 0 {
		seconds := uint32(opts.Lifetime / time.Second)
		sig.SigLifetimeSecs = &seconds
	}
	h := sig.Hash.New()
	if _, err := io.Copy(h, signed); err != nil {
		return nil, fmt.Errorf("reading what is to be signed: %w", err)
	}
	config := &packet.Config{NonDeterministicSignaturesViaNotation: packet.BoolPointer(false)}
	if err := sig.Sign(h, signer, config); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	var b bytes.Buffer
	if err := sig.Serialize(&b); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	if opts.Binary {
		return b.Bytes(), nil
	}
	return armored(openpgp.SignatureType, b.Bytes()), nil
}

// Revoke adds a revocation to the public key: from now on Armored and Binary return a revoked key.
func (k *Key) Revoke() error { return k.entity.Revoke(packet.KeyCompromised, "test", nil) }

// RevokeSubkey adds a revocation of the signing subkey to the public key.
func (k *Key) RevokeSubkey() error {
	if len(k.entity.Subkeys) == 0 {
		return fmt.Errorf("key %s has no subkey", k.Fingerprint())
	}
	return k.entity.Subkeys[0].Revoke(packet.KeyCompromised, "test", nil)
}

func (k *Key) signer() *packet.PrivateKey {
	if len(k.entity.Subkeys) > 0 {
		return k.entity.Subkeys[0].PrivateKey
	}
	return k.entity.PrivateKey
}

func armored(blockType string, body []byte) []byte {
	var b bytes.Buffer
	// A buffer takes everything, so neither of the three can fail.
	w, _ := armor.Encode(&b, blockType, nil)
	_, _ = w.Write(body)
	_ = w.Close()
	b.WriteByte('\n')
	return b.Bytes()
}

func lifetime(created, expires time.Time) uint32 {
	if expires.IsZero() {
		return 0
	}
	return uint32(expires.Sub(created) / time.Second)
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
