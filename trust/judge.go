package trust

import (
	"cmp"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// A Question is all that a decision depends on beside the keyring.
type Question struct {
	Name      string // the image name that was asked for, or the manifest's
	Signature []byte // the signature file as it was published, armored or binary; nil if there is none
	Hashed    Hashed // what a [Hasher] made of the image's bytes; nil if they are not known yet
	Policy    Policy
	Now       time.Time

	// NoRktWarning leaves out the acceptance's RktWarning, which costs as much as the decision.
	NoRktWarning bool
}

// Judge decides whether a signature makes an image acceptable. It depends on nothing but the keyring and the question, touches neither disk
// nor network, and gives the same answer to the same question always.
//
// Any signature packet that a trusted key made over the bytes suffices; a threshold asks for so many different primary keys. The key has
// to be trusted for the name, and the key that signed, primary or subkey, has to be made for signing, valid now, and not revoked; a
// revocation in any copy of a key counts wherever else the key lies. What a key says about itself is taken from its newest self-signature,
// as gpg does, so that a key whose life was extended keeps vouching for what it signed before. A SHA-1 self-signature is accepted, a SHA-1
// signature over an image only by a legacy policy. Revocation by a designated revoker is not supported.
//
// If the question comes without hashes, everything but the bytes is judged, so that a signature that can't become acceptable is refused
// before the first byte is asked for; the acceptance is then provisional.
//
// The error is a *[Refusal], which matches [acproxy.ErrRefused], or matches [ErrNotHashed], which is no verdict.
func (k *Keyring) Judge(q Question) (Acceptance, error) {
	if q.Signature == nil {
		if q.Policy.Signature == Optional {
			return Acceptance{Outcome: Unsigned, RktWarning: "rkt nodes will refuse it: it has no signature"}, nil
		}
		r := refuse(Unsigned, "it has no signature, and its prefix needs one: ask its publisher for the .aci.asc, or set signature: optional for the prefix")
		r.Name = q.Name
		return Acceptance{}, r
	}
	sigs, err := readSignatures(q.Signature)
	if err != nil {
		return Acceptance{}, named(err, q.Name)
	}
	answer := Acceptance{Outcome: Accepted, Provisional: q.Hashed == nil}
	var worst *Refusal
	var missing error
	for _, s := range sigs {
		signer, until, err := k.judge(q, s)
		var refusal *Refusal
		switch {
		case errors.As(err, &refusal):
			if worst == nil || tells(refusal.Outcome) > tells(worst.Outcome) {
				worst = refusal
			}
		case err != nil:
			missing = err
		case !slices.ContainsFunc(answer.Signers, func(o Signer) bool { return o.Fingerprint == signer.Fingerprint }):
			answer.Signers = append(answer.Signers, signer)
			answer.Until = sooner(answer.Until, until)
		}
	}
	switch got := len(answer.Signers); {
	case got >= q.Policy.threshold():
		if !q.NoRktWarning {
			answer.RktWarning = rktWarning(k.Keys(q.Name), q.Signature, q.Hashed)
		}
		return answer, nil
	case missing != nil:
		return Acceptance{}, fmt.Errorf("%s: %w", q.Name, missing)
	case got > 0:
		worst = tooFew(q, answer.Signers, worst)
	}
	return Acceptance{}, named(worst, q.Name)
}

func named(err error, name string) error {
	var r *Refusal
	if errors.As(err, &r) {
		r.Name = name
	}
	return err
}

func tooFew(q Question, signers []Signer, other *Refusal) *Refusal {
	var who []string
	for _, s := range signers {
		who = append(who, string(s.Fingerprint))
	}
	r := refuse(TooFewSigners, "%d trusted keys have to sign it, and %d did: %s", q.Policy.threshold(), len(signers), strings.Join(who, ", "))
	if other != nil {
		r.Detail += "; another signature doesn't count: " + other.Detail
	}
	r.KeyID, r.Fingerprint = signers[0].KeyID, signers[0].Fingerprint
	return r
}

// tells ranks refusals by how much they tell about what went wrong, for a file with several signatures.
func tells(o Outcome) int {
	return slices.Index([]Outcome{MalformedSignature, UnsupportedSignature, UnknownKey, NotSigningKey, WeakAlgorithm, NotYetValid, SignatureExpired, KeyExpired, KeyRevoked, BadSignature}, o)
}

// judge decides about one signature packet, and returns when time may change the decision.
func (k *Keyring) judge(q Question, s signature) (Signer, time.Time, error) {
	if s.problem != 0 {
		return Signer{}, time.Time{}, refuse(s.problem, "%s", s.detail)
	}
	candidates := k.candidates(q.Name, s.packet)
	if len(candidates) == 0 {
		return Signer{}, time.Time{}, k.unknown(q.Name, s.packet)
	}
	// More than one key can have the same ID; it takes the bytes to tell which of them it was.
	var best error
	for _, c := range candidates {
		until, err := k.check(q, s.packet, c)
		if err == nil {
			return Signer{
				Fingerprint: c.cert.fingerprint, KeyID: keyID(c.pub.id), UserID: firstOf(c.cert.userIDs), Prefix: c.file.place.prefix,
				Signed: s.packet.CreationTime, Algorithm: algorithm(c.pub.packet) + ", " + s.packet.Hash.String(),
			}, until, nil
		}
		var now, before *Refusal
		if !errors.As(err, &now) || best == nil || errors.As(best, &before) && tells(now.Outcome) > tells(before.Outcome) {
			best = err
		}
	}
	return Signer{}, time.Time{}, best
}

// candidates returns the keys that are trusted for a name and that a signature may be by, those of the longest prefix first. The ID in the
// signature only says where to look; the bytes decide.
func (k *Keyring) candidates(name string, sig *packet.Signature) []candidate {
	var found []candidate
	for _, c := range k.byKeyID[*sig.IssuerKeyId] {
		if sig.CheckKeyIdOrFingerprint(c.pub.packet) && k.counts(c.file, c.cert, name) {
			found = append(found, c)
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int { return cmp.Compare(b.file.place.depth, a.file.place.depth) })
	return found
}

// unknown explains why no key for a signature is trusted for a name.
func (k *Keyring) unknown(name string, sig *packet.Signature) *Refusal {
	id := keyID(*sig.IssuerKeyId)
	var claimed Fingerprint
	if sig.IssuerKeyVersion == 4 {
		claimed = Fingerprint(fmt.Sprintf("%x", sig.IssuerFingerprint))
	}
	r := refuse(UnknownKey, "it is signed by key %s, which is not trusted", id)
	r.KeyID, r.Fingerprint, r.TrustedFor = id, claimed, k.prefixesOf(*sig.IssuerKeyId)
	command := addCommand(name, claimed)
	for _, c := range k.byKeyID[*sig.IssuerKeyId] {
		// The signature may name a subkey; what is trusted is the primary key.
		r.Fingerprint, command = c.cert.fingerprint, addCommand(name, c.cert.fingerprint)
		if later := k.maskedBy(c.file, c.cert, name); later != nil && len(r.TrustedFor) == 0 {
			r.Detail = fmt.Sprintf("it is signed by key %s, which %s switches off", id, later.path)
			return r
		}
	}
	if len(r.TrustedFor) > 0 {
		r.Detail = fmt.Sprintf("it is signed by key %s, which is trusted for %s and not for this name", id, strings.Join(spell(r.TrustedFor), ", "))
	}
	r.Detail += "; if you have made sure that it is the publisher's: " + command
	return r
}

func spell(prefixes []string) []string {
	spelled := slices.Clone(prefixes)
	for i, p := range spelled {
		if p == "" {
			spelled[i] = "every other name"
		}
	}
	return spelled
}

// check decides whether a signature by one key counts, and until when.
func (k *Keyring) check(q Question, sig *packet.Signature, c candidate) (time.Time, error) {
	refused := func(outcome Outcome, format string, args ...any) (time.Time, error) {
		r := refuse(outcome, format, args...)
		r.KeyID, r.Fingerprint = keyID(c.pub.id), c.cert.fingerprint
		return time.Time{}, r
	}
	id, soon := keyID(c.pub.id), q.Now.Add(MaxClockSkew)
	if sig.PubKeyAlgo != c.pub.packet.PubKeyAlgo {
		return refused(BadSignature, "the signature names key %s, which is of another kind: the signature was changed", id)
	}
	if q.Hashed != nil {
		h, err := q.Hashed.resume(sig.Hash)
		if err != nil {
			return time.Time{}, err
		}
		if c.pub.packet.VerifySignature(h, sig) != nil {
			return refused(BadSignature, "the signature by key %s is not over these bytes: the image or its signature was changed, or one of them belongs to another version", id)
		}
	}
	if k.revoked[c.cert.fingerprint] || c.pub.revoked {
		return refused(KeyRevoked, "it is signed by key %s, which its owner has revoked: ask the publisher for a new signature", id)
	}
	if c.pub.created.After(soon) || c.cert.primary.created.After(soon) {
		return refused(NotYetValid, "it is signed by key %s, which will be made at %s: check this machine's clock", id, stamp(c.pub.created))
	}
	if sig.CreationTime.After(soon) {
		return refused(NotYetValid, "it will be signed at %s: check this machine's clock", stamp(sig.CreationTime))
	}
	said, end, outcome := c.standing(q.Now)
	if outcome != 0 {
		return refused(outcome, "it is signed by key %s, which has nothing to say for itself at this time: get the publisher's key anew", id)
	}
	if over(end, q.Now) && (q.Policy.Expired != AcceptIfSignedBefore || !sig.CreationTime.Before(end)) {
		return refused(KeyExpired, "it is signed by key %s, which expired at %s: get the publisher's key anew, as its life may have been extended; expired: accept-if-signed-before accepts what was signed earlier", id, stamp(end))
	}
	if e := signatureEnd(sig); over(e, q.Now) {
		return refused(SignatureExpired, "the signature by key %s expired at %s: ask the publisher for a new one", id, stamp(e))
	}
	if made := later(c.pub.created, c.cert.primary.created); sig.CreationTime.Before(made) && !q.Policy.Legacy {
		return refused(NotYetValid, "it was signed at %s, before key %s was made at %s; legacy: true accepts it", stamp(sig.CreationTime), id, stamp(made))
	}
	if !said.sign && (said.flagged || c.pub != &c.cert.primary || !q.Policy.Legacy) {
		return refused(NotSigningKey, "it is signed by key %s, which is not made for signing", id)
	}
	if weak := c.weakness(sig); weak != "" && !q.Policy.Legacy {
		return refused(WeakAlgorithm, "the signature by key %s uses %s; legacy: true accepts it", id, weak)
	}
	until := signatureEnd(sig)
	if !over(end, q.Now) && q.Policy.Expired == RefuseExpired {
		until = sooner(until, end)
	}
	return until, nil
}

// standing returns what a key says about itself and when it ends, by its and its primary key's newest claims. The outcome is 0 if both say
// anything.
func (c candidate) standing(now time.Time) (said claim, end time.Time, problem Outcome) {
	primary := &c.cert.primary
	for _, pub := range []*publicKey{primary, c.pub} {
		var ok bool
		said, ok = pub.latest(now)
		if !ok {
			switch {
			case len(pub.claims) == 0:
				return said, end, NotSigningKey
			case !slices.ContainsFunc(pub.claims, func(s claim) bool { return !s.made.After(now.Add(MaxClockSkew)) }):
				return said, end, NotYetValid
			}
			return said, end, KeyExpired
		}
		end = sooner(end, pub.expires(now))
		end = sooner(end, said.ends)
	}
	return said, end, 0
}

// weakness returns what makes a signature by this key weak, "" if nothing does.
func (c candidate) weakness(sig *packet.Signature) string {
	if sig.Hash == crypto.SHA1 {
		return "SHA-1"
	}
	for _, pub := range []*packet.PublicKey{c.pub.packet, c.cert.primary.packet} {
		switch pub.PubKeyAlgo {
		case packet.PubKeyAlgoDSA:
			return "a DSA key"
		case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly:
			if bits, err := pub.BitLength(); err != nil || bits < 2048 {
				return fmt.Sprintf("an RSA key of %d bits", bits)
			}
		case packet.PubKeyAlgoECDSA:
			if curve, err := pub.Curve(); err != nil || curve == packet.CurveSecP256k1 {
				return "a key over an unusual curve"
			}
		}
	}
	return ""
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func firstOf(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}
