package trust

import (
	"bytes"
	"cmp"
	"crypto/dsa"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"github.com/acproxy/acproxy"
)

// A Fingerprint names a public key: the 40 lower-case hex digits of a version 4 primary key's fingerprint (RFC 9580 section 5.5.4.2).
type Fingerprint string

const fingerprintDigits = 40

// ParseFingerprint reads a fingerprint as people and gpg write it: upper or lower case, with spaces, colons or a leading 0x. It returns an
// error matching [acproxy.ErrInvalid] for anything else, a key ID among them: key IDs can be forged.
func ParseFingerprint(s string) (Fingerprint, error) {
	digits := strings.ToLower(strings.NewReplacer(" ", "", ":", "").Replace(s))
	digits = strings.TrimPrefix(digits, "0x")
	if !isFingerprint(digits) {
		hint := ""
		if len(digits) == 8 || len(digits) == 16 {
			hint = "; a key ID is not enough, as anybody can make a key that has it"
		}
		return "", acproxy.Invalid("fingerprint %q is not %d hex digits%s", clip(s), fingerprintDigits, hint)
	}
	return Fingerprint(digits), nil
}

func isFingerprint(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && len(s) == fingerprintDigits && s == strings.ToLower(s)
}

// An Origin says whose directory a key file lies in.
type Origin int

// The origins. System is the distribution's or configuration management's directory, which acproxy only reads; Local is ours.
const (
	Local Origin = iota
	System
)

// String returns "local" or "system".
func (o Origin) String() string {
	if o == System {
		return "system"
	}
	return "local"
}

// MarshalText returns "local" or "system".
func (o Origin) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// A Key is a public key and, if it comes from a [Keyring], what it is trusted for. Keys are values that share read-only memory.
type Key struct {
	Fingerprint Fingerprint
	KeyID       string   // 16 upper-case hex digits, of the primary key
	SigningIDs  []string // the IDs of the primary key and the subkeys that may sign
	UserIDs     []string // made printable; the primary one first. They are the key's own claims
	Algorithm   string   // of the primary key, as in "RSA 4096" or "Ed25519"
	Created     time.Time
	Changed     time.Time // when its owner last signed something about it: a new subkey, another end, a revocation
	Expires     time.Time // the primary key's end; the zero time means never
	SignsUntil  time.Time // the end of the last of the keys that may sign, primary or subkey; the zero time means never
	Revoked     bool
	Subkeys     []Subkey // those that its owner vouches for

	Prefix string // the image-name prefix that the key is trusted for, "" for every name
	File   string // where it lies
	Origin Origin

	cert *certificate
}

// A Subkey is a key that a primary key has bound to itself, with a signature back by the subkey if it may sign.
type Subkey struct {
	KeyID     string // 16 upper-case hex digits
	Algorithm string
	Created   time.Time
	Expires   time.Time // the zero time means never; a subkey also ends with its primary key
	Revoked   bool
	Signs     bool // it may sign
}

// Armored returns the key alone, in ASCII armor with a checksum, as rkt nodes can be given it.
func (k Key) Armored() []byte {
	if k.cert == nil {
		return nil
	}
	return armored(openpgp.PublicKeyType, k.cert.raw)
}

// RktReadable returns nil if rkt can read the key and the reason if it can't. One key that rkt can't read stops it from reading those after
// it, and in a directory of trusted keys it breaks every image under that prefix: hand such keys to no node.
func (k Key) RktReadable() error {
	if k.cert == nil {
		return acproxy.Invalid("there is no key")
	}
	return k.cert.rkt.problem
}

// A certificate is a primary key with everything that it has said about itself, verified once. It never changes, so that decisions can
// read it from any number of goroutines; the library's own entities remember verdicts that depend on the time of the first question.
type certificate struct {
	raw         []byte // the packets as they were read
	fingerprint Fingerprint
	primary     publicKey
	subkeys     []publicKey
	userIDs     []string
	revoked     bool
	changed     time.Time // the newest self-signature's
	rkt         rktKey
}

// A publicKey is a primary key or a subkey.
type publicKey struct {
	packet  *packet.PublicKey
	id      uint64
	created time.Time
	// claims are what the primary key has signed about this key, newest first; only signatures that verify are here.
	claims []claim
	// direct are such claims made directly on the primary key (RFC 9580 section 5.2.1.10).
	direct  []claim
	revoked bool
}

// A claim is a self-signature's content.
type claim struct {
	made    time.Time
	ends    time.Time // the self-signature's own end, the zero time means never
	expires time.Time // the end that it gives the key, the zero time means never
	flagged bool      // it says what the key is for
	sign    bool      // and that is signing
	main    bool      // its user ID is the primary one
	userID  string
}

// ReadKeys reads public keys from a key file, armored or binary, to show them before they are added. It returns an error matching
// [acproxy.ErrInvalid] if the file is longer than [MaxKeyFile], holds a secret key, something that isn't a key, or a key that can't be
// read: a file counts as a whole or not at all.
func ReadKeys(data []byte) ([]Key, error) {
	certs, err := readCertificates(data)
	if err != nil {
		return nil, err
	}
	keys := make([]Key, len(certs))
	for i, c := range certs {
		keys[i] = c.key()
	}
	return keys, nil
}

func (c *certificate) key() Key {
	k := Key{
		Fingerprint: c.fingerprint,
		KeyID:       keyID(c.primary.id),
		UserIDs:     c.userIDs,
		Algorithm:   algorithm(c.primary.packet),
		Created:     c.primary.created,
		Changed:     c.changed,
		Expires:     c.primary.expires(farFuture),
		Revoked:     c.revoked,
		cert:        c,
	}
	for i, pub := range c.all() {
		said, ok := pub.latest(farFuture)
		end, signs := sooner(k.Expires, pub.expires(farFuture)), ok && (said.sign || !said.flagged && i == 0)
		if ok && i > 0 {
			k.Subkeys = append(k.Subkeys, Subkey{
				KeyID: keyID(pub.id), Algorithm: algorithm(pub.packet), Created: pub.created, Expires: pub.expires(farFuture), Revoked: pub.revoked, Signs: signs,
			})
		}
		if !signs || pub.revoked {
			continue
		}
		if len(k.SigningIDs) == 0 || endOrder(k.SignsUntil, end) < 0 {
			k.SignsUntil = end
		}
		k.SigningIDs = append(k.SigningIDs, keyID(pub.id))
	}
	return k
}

// farFuture asks for the last word on a key, whatever the time.
var farFuture = time.Unix(1<<40, 0)

// all returns the primary key and then the subkeys.
func (c *certificate) all() []*publicKey {
	all := []*publicKey{&c.primary}
	for i := range c.subkeys {
		all = append(all, &c.subkeys[i])
	}
	return all
}

// latest returns the newest claim that is made by now, give or take the clocks, and has not ended. Among the user IDs of a primary key, the primary one's count first.
func (p *publicKey) latest(now time.Time) (claim, bool) {
	for _, onlyMain := range []bool{true, false} {
		for _, said := range p.claims {
			if said.made.After(now.Add(MaxClockSkew)) || over(said.ends, now) && now.Before(farFuture) || onlyMain && !said.main {
				continue
			}
			return said, true
		}
	}
	return claim{}, false
}

// expires returns when the key ends as far as it had said by now; the zero time means never. A direct-key signature may only shorten
// what the user ID's signature grants.
func (p *publicKey) expires(now time.Time) time.Time {
	said, _ := p.latest(now)
	end := said.expires
	for _, d := range p.direct {
		if !d.made.After(now.Add(MaxClockSkew)) && !over(d.ends, now) {
			end = sooner(end, d.expires)
			break
		}
	}
	return end
}

// over reports whether an end has come. The zero time never comes.
func over(end, now time.Time) bool { return !end.IsZero() && !now.Before(end) }

// sooner returns the earlier of two ends, where the zero time never comes.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func readCertificates(data []byte) ([]*certificate, error) {
	if len(data) > MaxKeyFile {
		return nil, acproxy.Invalid("a key file may have %d bytes, this one is longer", MaxKeyFile)
	}
	blocks, err := dearmor(data)
	if err != nil {
		return nil, acproxy.Invalid("not a public key: %v", err)
	}
	var certs []*certificate
	for _, b := range blocks {
		switch b.kind {
		case openpgp.PublicKeyType, "":
		case openpgp.PrivateKeyType:
			return nil, errSecret()
		default:
			return nil, acproxy.Invalid("not a public key but a %s", printable(b.kind))
		}
		split, err := splitKeys(b.body)
		if err != nil {
			return nil, err
		}
		for _, raw := range split {
			c, err := readCertificate(raw)
			if err != nil {
				return nil, err
			}
			if !slices.ContainsFunc(certs, func(o *certificate) bool { return o.fingerprint == c.fingerprint }) {
				certs = append(certs, c)
			}
		}
	}
	if len(certs) == 0 {
		return nil, acproxy.Invalid("there is no public key in it")
	}
	return certs, nil
}

func errSecret() error {
	return acproxy.Invalid("this is a SECRET key: acproxy needs the public key only (gpg --armor --export), and nobody else should ever get this file")
}

// The packet types (RFC 9580 section 5).
const (
	tagSignature    = 2
	tagOnePass      = 4
	tagSecretKey    = 5
	tagPublicKey    = 6
	tagSecretSubkey = 7
	tagCompressed   = 8
	tagMarker       = 10
	tagLiteral      = 11
	tagTrust        = 12
	tagPadding      = 21
)

// splitKeys cuts a sequence of packets before each primary key.
func splitKeys(body []byte) ([][]byte, error) {
	r := bytes.NewReader(body)
	packets := packet.NewOpaqueReader(r)
	var starts []int
	for {
		at := len(body) - r.Len()
		p, err := packets.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, acproxy.Invalid("not a public key: %v", err)
		}
		switch p.Tag {
		case tagPublicKey:
			starts = append(starts, at)
		case tagSecretKey, tagSecretSubkey:
			return nil, errSecret()
		case tagMarker, tagTrust, tagPadding:
		default:
			if len(starts) == 0 {
				return nil, acproxy.Invalid("not a public key: it begins with an OpenPGP packet of type %d", p.Tag)
			}
		}
	}
	var keys [][]byte
	for i, start := range starts {
		end := len(body)
		if i+1 < len(starts) {
			end = starts[i+1]
		}
		keys = append(keys, body[start:end])
	}
	return keys, nil
}

func readCertificate(raw []byte) (*certificate, error) {
	e, err := openpgp.ReadEntity(packet.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, acproxy.Invalid("a key in it can't be read: %v", err)
	}
	if e.PrimaryKey.Version != 4 {
		return nil, acproxy.Invalid("key %x is of version %d: only version 4 keys can sign for appc clients", e.PrimaryKey.Fingerprint, e.PrimaryKey.Version)
	}
	if err := checkEffort(e); err != nil {
		return nil, err
	}
	c := &certificate{
		raw:         raw,
		fingerprint: Fingerprint(hex.EncodeToString(e.PrimaryKey.Fingerprint)),
		primary:     publicKey{packet: e.PrimaryKey, id: e.PrimaryKey.KeyId, created: e.PrimaryKey.CreationTime},
	}
	for _, r := range e.Revocations {
		if e.PrimaryKey.VerifyRevocationSignature(r.Packet) == nil {
			c.revoked, c.changed = true, later(c.changed, r.Packet.CreationTime)
		}
	}
	c.readDirect(e)
	if err := c.readUserIDs(e); err != nil {
		return nil, err
	}
	for i := range e.Subkeys {
		c.readSubkey(&e.Subkeys[i])
	}
	for _, pub := range c.all() {
		for _, said := range append(pub.claims[:len(pub.claims):len(pub.claims)], pub.direct...) {
			c.changed = later(c.changed, said.made)
		}
	}
	c.rkt = readRktKey(armored(openpgp.PublicKeyType, raw), c.fingerprint)
	return c, nil
}

// Limits on the work that a stranger's key can make: verifying takes time with the square of a key's length and more.
const (
	maxKeyBits        = 16384 // of an RSA modulus or a DSA prime
	maxSubgroupBits   = 512   // of a DSA subgroup
	maxSelfSignatures = 512   // of one primary key with all its subkeys
)

// checkEffort returns an error if a key would take unreasonably long to verify.
func checkEffort(e *openpgp.Entity) error {
	pubs := []*packet.PublicKey{e.PrimaryKey}
	signatures := len(e.Revocations) + len(e.DirectSignatures)
	for _, identity := range e.Identities {
		signatures += len(identity.SelfCertifications) + len(identity.Revocations)
	}
	for _, s := range e.Subkeys {
		pubs = append(pubs, s.PublicKey)
		signatures += len(s.Bindings) + len(s.Revocations)
	}
	for _, pub := range pubs {
		bits, _ := pub.BitLength()
		if bits > maxKeyBits {
			return acproxy.Invalid("key %X has %d bits, the limit is %d", pub.Fingerprint, bits, maxKeyBits)
		}
		if d, ok := pub.PublicKey.(*dsa.PublicKey); ok && d.Q.BitLen() > maxSubgroupBits {
			return acproxy.Invalid("key %X has a subgroup of %d bits, the limit is %d", pub.Fingerprint, d.Q.BitLen(), maxSubgroupBits)
		}
	}
	if signatures > maxSelfSignatures {
		return acproxy.Invalid("key %X has %d self-signatures, the limit is %d: export it with --export-options export-clean", e.PrimaryKey.Fingerprint, signatures, maxSelfSignatures)
	}
	return nil
}

func (c *certificate) readDirect(e *openpgp.Entity) {
	for _, s := range e.DirectSignatures {
		if understood(s.Packet) && e.PrimaryKey.VerifyDirectKeySignature(s.Packet) == nil {
			c.primary.direct = append(c.primary.direct, newClaim(s.Packet, c.primary.created))
		}
	}
	newestFirst(c.primary.direct)
}

func (c *certificate) readUserIDs(e *openpgp.Entity) error {
	pub := e.PrimaryKey
	withdrawn := false
	for name, identity := range e.Identities {
		// A revocation ends the user ID's self-signatures that are not newer than it; a newer one takes the name up again.
		var revoked time.Time
		for _, r := range identity.Revocations {
			if r.Packet.CreationTime.After(revoked) && pub.VerifyUserIdSignature(name, pub, r.Packet) == nil {
				revoked = r.Packet.CreationTime
				c.changed = later(c.changed, revoked)
			}
		}
		for _, s := range identity.SelfCertifications {
			if !understood(s.Packet) || pub.VerifyUserIdSignature(name, pub, s.Packet) != nil {
				continue
			}
			if !s.Packet.CreationTime.After(revoked) {
				withdrawn = true
				continue
			}
			said := newClaim(s.Packet, c.primary.created)
			said.userID = name
			c.primary.claims = append(c.primary.claims, said)
		}
	}
	newestFirst(c.primary.claims)
	switch {
	case len(c.primary.claims) > 0:
	case withdrawn:
		c.revoked = true
	default:
		return acproxy.Invalid("key %s has no user ID that it has signed itself", c.fingerprint)
	}
	for _, onlyMain := range []bool{true, false} {
		for _, said := range c.primary.claims {
			if shown := printable(said.userID); said.main == onlyMain && !slices.Contains(c.userIDs, shown) {
				c.userIDs = append(c.userIDs, shown)
			}
		}
	}
	return nil
}

func (c *certificate) readSubkey(s *openpgp.Subkey) {
	sub := publicKey{packet: s.PublicKey, id: s.PublicKey.KeyId, created: s.PublicKey.CreationTime}
	if s.PublicKey.Version != 4 {
		return
	}
	for _, r := range s.Revocations {
		if c.primary.packet.VerifySubkeyRevocationSignature(r.Packet, s.PublicKey) == nil {
			sub.revoked, c.changed = true, later(c.changed, r.Packet.CreationTime)
		}
	}
	for _, b := range s.Bindings {
		// This verifies the signature that the subkey has to have made back over the primary key too, if the subkey may sign: without it
		// anybody could claim another's subkey (RFC 9580 section 5.2.1.9).
		if !understood(b.Packet) || c.primary.packet.VerifyKeySignature(s.PublicKey, b.Packet) != nil {
			continue
		}
		said := newClaim(b.Packet, sub.created)
		if back := b.Packet.EmbeddedSignature; said.sign && back != nil {
			said.ends = sooner(said.ends, signatureEnd(back))
		}
		sub.claims = append(sub.claims, said)
	}
	newestFirst(sub.claims)
	c.subkeys = append(c.subkeys, sub)
}

// understood reports whether a self-signature asks for nothing that isn't known here (RFC 9580 section 5.2.3.24, critical notations).
func understood(sig *packet.Signature) bool {
	return sig.Version == 4 && !slices.ContainsFunc(sig.Notations, func(n *packet.Notation) bool { return n.IsCritical })
}

func newClaim(sig *packet.Signature, created time.Time) claim {
	said := claim{made: sig.CreationTime, ends: signatureEnd(sig), flagged: sig.FlagsValid, sign: sig.FlagsValid && sig.FlagSign}
	said.main = sig.IsPrimaryId != nil && *sig.IsPrimaryId
	if sig.KeyLifetimeSecs != nil && *sig.KeyLifetimeSecs != 0 {
		said.expires = created.Add(time.Duration(*sig.KeyLifetimeSecs) * time.Second)
	}
	return said
}

// signatureEnd returns when a signature expires by itself, the zero time if never.
func signatureEnd(sig *packet.Signature) time.Time {
	if sig.SigLifetimeSecs == nil || *sig.SigLifetimeSecs == 0 {
		return time.Time{}
	}
	return sig.CreationTime.Add(time.Duration(*sig.SigLifetimeSecs) * time.Second)
}

// newestFirst sorts claims so that the order depends on nothing but them.
func newestFirst(claims []claim) {
	slices.SortStableFunc(claims, func(a, b claim) int {
		// Of two made in the same second, the one that ends the key sooner counts.
		return cmp.Or(b.made.Compare(a.made), endOrder(a.expires, b.expires), cmp.Compare(a.userID, b.userID))
	})
}

func endOrder(a, b time.Time) int {
	switch {
	case a.Equal(b):
		return 0
	case sooner(a, b).Equal(a):
		return -1
	}
	return 1
}

// algorithm describes a key as in "RSA 4096", "ECDSA P-256" or "Ed25519".
func algorithm(pub *packet.PublicKey) string {
	bits, _ := pub.BitLength()
	curve, _ := pub.Curve()
	switch pub.PubKeyAlgo {
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly, packet.PubKeyAlgoRSAEncryptOnly:
		return fmt.Sprintf("RSA %d", bits)
	case packet.PubKeyAlgoDSA:
		return fmt.Sprintf("DSA %d", bits)
	case packet.PubKeyAlgoECDSA:
		return "ECDSA " + curveName(curve)
	case packet.PubKeyAlgoEdDSA, packet.PubKeyAlgoEd25519, packet.PubKeyAlgoEd448:
		if curve == packet.Curve448 {
			return "Ed448"
		}
		return "Ed25519"
	}
	return fmt.Sprintf("algorithm %d", pub.PubKeyAlgo)
}

func curveName(curve packet.Curve) string {
	switch curve {
	case packet.CurveNistP256, packet.CurveNistP384, packet.CurveNistP521:
		return "P-" + strings.TrimPrefix(string(curve), "P")
	}
	return string(curve)
}

func keyID(id uint64) string { return fmt.Sprintf("%016X", id) }

// armored wraps packets in ASCII armor with a checksum, which old readers insist on.
func armored(kind string, body []byte) []byte {
	var b bytes.Buffer
	// None of the three can fail: a buffer takes everything.
	w, _ := armor.Encode(&b, kind, nil)
	_, _ = w.Write(body)
	_ = w.Close()
	b.WriteByte('\n')
	return b.Bytes()
}
