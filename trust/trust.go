// Package trust decides whether a signature makes an image acceptable.
//
// A [Keyring] holds the public keys that are trusted, each for the image names under a prefix, as rkt keeps them on disk. Its method
// [Keyring.Judge] is the one place where a decision is made: a pure function of the image's name, the signature as it was published, what
// was hashed of the image's bytes, the policy and the time.
//
// OpenPGP is RFC 9580 (and RFC 4880 before it), done by github.com/ProtonMail/go-crypto. The library golang.org/x/crypto/openpgp is what rkt
// itself verifies with; here it only predicts whether rkt nodes will agree, and no decision rests on it.
package trust

import (
	"fmt"
	"strings"
	"time"

	"github.com/acproxy/acproxy"
)

// Limits on what is read from strangers. Everything is cut before a parser sees it.
const (
	MaxSignature = 1 << 20 // bytes of a signature file, armor included
	MaxKeyFile   = 1 << 20 // bytes of a key file, armor included

	// MaxPackets is how many packets of a signature file are looked at. What stands behind them doesn't count.
	MaxPackets = 64
)

// MaxClockSkew is how far in the future a signature or a key may seem to be made: clocks differ, and images are fetched as soon as they
// are signed.
const MaxClockSkew = 5 * time.Minute

// An Outcome says how a decision went. The zero Outcome is no decision.
type Outcome int

// The outcomes. Only the first two come without an error.
const (
	Accepted             Outcome = iota + 1 // enough trusted keys signed exactly these bytes
	Unsigned                                // there is no signature; acceptable only where policy says that signatures are optional
	UnknownKey                              // no key that is trusted for this name made the signature
	BadSignature                            // the signature names a trusted key, but isn't that key's signature over these bytes
	KeyExpired                              // the key's time is over
	SignatureExpired                        // the signature's own time is over
	KeyRevoked                              // the key's owner has revoked it
	WeakAlgorithm                           // MD5; or SHA-1, DSA or a short RSA key where policy doesn't allow them
	NotYetValid                             // the key or the signature is from the future, or the signature is older than its key
	NotSigningKey                           // the key is trusted but not made for signing
	TooFewSigners                           // fewer different trusted keys signed than the policy's threshold
	MalformedSignature                      // not an OpenPGP signature, or a broken one, or more than [MaxSignature] bytes
	UnsupportedSignature                    // OpenPGP, but not a detached version 4 signature over a file
)

var outcomeWords = [...]string{
	Accepted: "accepted", Unsigned: "unsigned", UnknownKey: "unknown-key", BadSignature: "bad-signature", KeyExpired: "key-expired",
	SignatureExpired: "signature-expired", KeyRevoked: "key-revoked", WeakAlgorithm: "weak-algorithm", NotYetValid: "not-yet-valid",
	NotSigningKey: "not-a-signing-key", TooFewSigners: "too-few-signers", MalformedSignature: "malformed-signature",
	UnsupportedSignature: "unsupported-signature",
}

// Outcomes returns every outcome, for metrics and documentation.
func Outcomes() []Outcome {
	all := make([]Outcome, 0, len(outcomeWords)-1)
	for o := Accepted; int(o) < len(outcomeWords); o++ {
		all = append(all, o)
	}
	return all
}

// String returns the outcome's word, as in unknown-key; programs may rely on it.
func (o Outcome) String() string {
	if o <= 0 || int(o) >= len(outcomeWords) {
		return "undecided"
	}
	return outcomeWords[o]
}

// MarshalText returns the outcome's word.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText reads an outcome's word. It returns an error matching [acproxy.ErrInvalid] for anything else.
func (o *Outcome) UnmarshalText(text []byte) error {
	for i, word := range outcomeWords {
		if word != "" && word == string(text) {
			*o = Outcome(i)
			return nil
		}
	}
	if string(text) == Outcome(0).String() {
		*o = 0
		return nil
	}
	return acproxy.Invalid("%q is not an outcome of verifying", clip(string(text)))
}

// A Requirement says whether an image needs a signature.
type Requirement int

// The requirements. A signature that is there always has to be acceptable: Optional excuses only its absence.
const (
	Required Requirement = iota
	Optional
)

// String returns the requirement as configuration writes it.
func (r Requirement) String() string {
	if r == Optional {
		return "optional"
	}
	return "required"
}

// MarshalText returns the requirement as configuration writes it.
func (r Requirement) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads "required" or "optional". It returns an error matching [acproxy.ErrInvalid] for anything else.
func (r *Requirement) UnmarshalText(text []byte) error {
	switch string(text) {
	case "required":
		*r = Required
	case "optional":
		*r = Optional
	default:
		return acproxy.Invalid("signature: %q: write required or optional", clip(string(text)))
	}
	return nil
}

// An ExpiredPolicy says what becomes of signatures by keys that have expired since.
type ExpiredPolicy int

// The policies for expired keys. AcceptIfSignedBefore takes the signature's word for when it was made: whoever holds the expired key can
// date a new signature back.
const (
	RefuseExpired ExpiredPolicy = iota
	AcceptIfSignedBefore
)

// String returns the policy as configuration writes it.
func (p ExpiredPolicy) String() string {
	if p == AcceptIfSignedBefore {
		return "accept-if-signed-before"
	}
	return "refuse"
}

// MarshalText returns the policy as configuration writes it.
func (p ExpiredPolicy) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads "refuse" or "accept-if-signed-before". It returns an error matching [acproxy.ErrInvalid] for anything else.
func (p *ExpiredPolicy) UnmarshalText(text []byte) error {
	switch string(text) {
	case "refuse":
		*p = RefuseExpired
	case "accept-if-signed-before":
		*p = AcceptIfSignedBefore
	default:
		return acproxy.Invalid("expired: %q: write refuse or accept-if-signed-before", clip(string(text)))
	}
	return nil
}

// A Policy says what a name prefix asks of signatures. The zero Policy is the strict one. Policies are comparable.
type Policy struct {
	Signature Requirement
	Expired   ExpiredPolicy

	// Legacy accepts what archives of appc's time hold: SHA-1, DSA, RSA keys under 2048 bits, keys that don't say what they are for, and
	// signatures that are older than their key. MD5 is never accepted, whatever the policy.
	Legacy bool

	// Threshold is how many different trusted primary keys have to have signed. 0 means 1.
	Threshold int
}

// threshold returns the number of signers that the policy asks for.
func (p Policy) threshold() int { return max(p.Threshold, 1) }

// An Acceptance is why an image is acceptable.
type Acceptance struct {
	Outcome Outcome  // Accepted, or Unsigned where policy says optional
	Signers []Signer // the trusted keys that signed, in the signature's order, each primary key once; none if unsigned

	// Provisional says that the question came without hashes: the image will be accepted if its bytes turn out to be those that were
	// signed. It is no reason to hand the image to anybody.
	Provisional bool

	// Until is the first moment at which the passing of time alone may change the decision, because a key or the signature expires. The
	// zero time means that it never will.
	Until time.Time

	// RktWarning says why rkt nodes will refuse the image, "" if they are expected to accept it too.
	RktWarning string
}

// A Signer is one trusted key that signed an image.
type Signer struct {
	Fingerprint Fingerprint // the primary key's
	KeyID       string      // 16 upper-case hex digits, of the key that signed: the primary key or a subkey
	UserID      string      // the key's first user ID; its own claim about whose it is
	Prefix      string      // the image-name prefix that the key is trusted for, "" if it is trusted for every name
	Signed      time.Time   // when it was signed, by the signature's own word
	Algorithm   string      // as in "RSA 4096, SHA-512"
}

// A Refusal is why an image is not acceptable. It matches [acproxy.ErrRefused].
type Refusal struct {
	Outcome     Outcome
	Name        string      // the image name that was asked about
	KeyID       string      // 16 upper-case hex digits, as the signature names its key; "" if it names none
	Fingerprint Fingerprint // of the trusted primary key concerned, or as the signature claims; "" if it isn't known
	TrustedFor  []string    // the prefixes that the key is trusted for, when this name isn't under one of them
	Detail      string      // a sentence or two: what was wrong and what to do
}

// Error returns the image's name and the detail.
func (r *Refusal) Error() string {
	if r.Name == "" {
		return r.Detail
	}
	return r.Name + ": " + r.Detail
}

// Is reports whether target is [acproxy.ErrRefused].
func (r *Refusal) Is(target error) bool { return target == acproxy.ErrRefused }

// Code returns the outcome's word, which ends the problem type of RFC 9457.
func (r *Refusal) Code() string { return r.Outcome.String() }

// addCommand returns the command that trusts a key for a name.
func addCommand(name string, fpr Fingerprint) string {
	shown := string(fpr)
	if shown == "" {
		shown = "FINGERPRINT"
	}
	return fmt.Sprintf("acproxy trust add --prefix %s --fingerprint %s FILE", name, shown)
}

// printable cuts a stranger's text to a length fit for a log line and leaves out what could play tricks on a terminal.
func printable(s string) string {
	return clip(strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 || c >= 0x202a && c <= 0x202e || c >= 0x2066 && c <= 0x2069 {
			return '\uFFFD'
		}
		return c
	}, strings.ToValidUTF8(s, "\uFFFD")))
}

func clip(s string) string {
	const most = 160
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
