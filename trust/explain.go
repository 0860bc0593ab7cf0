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

	"github.com/acproxy/acproxy"
)

// A Standing is what one trusted key counts for an image name, at one time and by one policy.
type Standing struct {
	Key Key
	// Outcome is what becomes of a signature that the key makes over the right bytes now, with SHA-512: Accepted if the key counts,
	// UnknownKey if it isn't trusted for the name.
	Outcome Outcome
	Until   time.Time // when a key that counts ends; the zero time means never
	Reason  string    // a clause: why it counts or doesn't
	Mask    string    // the file that switches the key off for this name, "" if none does
}

// Counts reports whether the key may sign images of the name now.
func (s Standing) Counts() bool { return s.Outcome == Accepted }

// Explain returns the standing for an image name of every key that might have something to do with it: those trusted for every name, those
// under a prefix that covers it and, because people mistake them, those under other prefixes of the same host. The keys that count come
// first, then those that can't sign, then those that aren't trusted for the name; among them, longer prefixes come first. It decides by the
// same code as [Keyring.Judge].
func (k *Keyring) Explain(name string, policy Policy, now time.Time) []Standing {
	host, _, _ := strings.Cut(name, "/")
	var all []Standing
	for _, f := range k.files {
		if f.place.prefix != "" && !acproxy.HasPrefix(f.place.prefix, host) {
			continue
		}
		for _, c := range f.certs {
			all = append(all, k.standing(f, c, Question{Name: name, Policy: policy, Now: now}))
		}
	}
	slices.SortStableFunc(all, func(a, b Standing) int {
		return cmp.Or(
			cmp.Compare(standingOrder(a), standingOrder(b)), cmp.Compare(len(b.Key.Prefix), len(a.Key.Prefix)),
			cmp.Compare(a.Key.Prefix, b.Key.Prefix), cmp.Compare(a.Key.Fingerprint, b.Key.Fingerprint),
		)
	})
	return all
}

func standingOrder(s Standing) int {
	switch s.Outcome {
	case Accepted:
		return 0
	case UnknownKey:
		return 2
	}
	return 1
}

func (k *Keyring) standing(f *keyFile, c *certificate, q Question) Standing {
	s := Standing{Key: k.key(f, c), Outcome: UnknownKey}
	if !acproxy.HasPrefix(q.Name, f.place.prefix) {
		s.Reason = f.place.prefix + " doesn't cover " + q.Name
		if strings.HasPrefix(q.Name, f.place.prefix) {
			s.Reason += ": prefixes match whole segments"
		}
		return s
	}
	if later := k.maskedBy(f, c, q.Name); later != nil {
		s.Mask = later.path
		switch {
		case later.closed:
			s.Reason = "switched off, because " + later.path + " can't be trusted"
		case later.broken:
			s.Reason = "switched off by " + later.path + ", which can't be read"
		case len(later.certs) == 0:
			s.Reason = "masked by the empty file " + later.path
		default:
			s.Reason = "replaced by " + later.path
		}
		return s
	}
	for _, pub := range c.all() {
		// What a signature made at this moment would come to, as far as it doesn't depend on the bytes.
		made := &packet.Signature{Hash: crypto.SHA512, PubKeyAlgo: pub.packet.PubKeyAlgo, CreationTime: q.Now}
		until, err := k.check(q, made, candidate{file: f, cert: c, pub: pub})
		var r *Refusal
		switch {
		case err == nil && (s.Outcome != Accepted || endOrder(s.Until, until) < 0):
			s.Outcome, s.Until = Accepted, until
		case s.Outcome != Accepted && errors.As(err, &r) && tells(r.Outcome) > tells(s.Outcome):
			s.Outcome = r.Outcome
		}
	}
	s.Reason = s.reason(c, q.Policy)
	return s
}

// reason says in a clause what an outcome means for the key itself.
func (s Standing) reason(c *certificate, policy Policy) string {
	switch s.Outcome {
	case Accepted:
		if s.Key.Prefix == "" {
			return "trusted for every name"
		}
		return "trusted for " + s.Key.Prefix
	case KeyRevoked:
		return "revoked by its owner"
	case KeyExpired:
		end := s.Key.Expires
		if end.IsZero() {
			end = s.Key.SignsUntil
		}
		text := "expired at " + stamp(end)
		if policy.Expired == AcceptIfSignedBefore {
			text += "; what it signed before that is accepted"
		}
		return text
	case NotYetValid:
		return "made at " + stamp(c.primary.created) + ", which is in the future"
	case NotSigningKey:
		return "not made for signing"
	case WeakAlgorithm:
		return fmt.Sprintf("%s: accepted only with legacy: true", s.Key.Algorithm)
	}
	return s.Outcome.String()
}

// A MaskFile is a file that switches a key off.
type MaskFile struct {
	Prefix      string // for which image names, "" for every name that no prefix key is for
	Fingerprint Fingerprint
	File        string
	Origin      Origin
	Broken      bool // it was not meant to: it can't be read, as [Keyring.Problems] says
}

// Masks returns the files that switch keys off, whether there is such a key or not, by prefix and fingerprint.
func (k *Keyring) Masks() []MaskFile {
	var masks []MaskFile
	for _, f := range k.files {
		if len(f.certs) == 0 && !f.closed {
			masks = append(masks, MaskFile{Prefix: f.place.prefix, Fingerprint: Fingerprint(f.name), File: f.path, Origin: f.place.origin(), Broken: f.broken})
		}
	}
	slices.SortStableFunc(masks, func(a, b MaskFile) int {
		return cmp.Or(cmp.Compare(a.Prefix, b.Prefix), cmp.Compare(a.Fingerprint, b.Fingerprint))
	})
	return masks
}

// Held returns every copy of a key that lies among the trusted keys, whether it counts there or is masked, by prefix.
func (k *Keyring) Held(fpr Fingerprint) []Key {
	var keys []Key
	for _, f := range k.byFile[string(fpr)] {
		for _, c := range f.certs {
			if c.fingerprint == fpr {
				keys = append(keys, k.key(f, c))
			}
		}
	}
	slices.SortStableFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(a.Prefix, b.Prefix), cmp.Compare(b.Origin, a.Origin))
	})
	return keys
}

// A Comparison is what is different between a key that is held and another copy of it.
type Comparison struct {
	Changes []string // clauses, as in "it expires at … instead of never"; none if nothing that matters is different
	// Older means that the other copy knows less: it lacks a revocation that the held one has, or its owner's last word in it is older. It
	// must not take the held one's place.
	Older bool
}

// Compare compares a held key with another copy of it, as its publisher hands it out now.
func Compare(held, other Key) Comparison {
	var c Comparison
	note := func(format string, args ...any) { c.Changes = append(c.Changes, fmt.Sprintf(format, args...)) }
	switch {
	case other.Revoked && !held.Revoked:
		note("its owner has revoked it")
	case held.Revoked && !other.Revoked:
		note("it isn't revoked there")
		c.Older = true
	}
	if !held.Expires.Equal(other.Expires) {
		note("it expires %s instead of %s", endText(other.Expires), endText(held.Expires))
	}
	for _, sub := range other.Subkeys {
		i := slices.IndexFunc(held.Subkeys, func(s Subkey) bool { return s.KeyID == sub.KeyID })
		switch {
		case i < 0:
			note("it has a new subkey %s (%s)", sub.KeyID, sub.Algorithm)
		case sub.Revoked && !held.Subkeys[i].Revoked:
			note("its subkey %s is revoked", sub.KeyID)
		case held.Subkeys[i].Revoked && !sub.Revoked:
			note("its subkey %s isn't revoked there", sub.KeyID)
			c.Older = true
		case !sub.Expires.Equal(held.Subkeys[i].Expires):
			note("its subkey %s expires %s instead of %s", sub.KeyID, endText(sub.Expires), endText(held.Subkeys[i].Expires))
		}
	}
	for _, sub := range held.Subkeys {
		if !slices.ContainsFunc(other.Subkeys, func(s Subkey) bool { return s.KeyID == sub.KeyID }) {
			note("it has no subkey %s there", sub.KeyID)
			// Leaving out a revoked subkey must not be a way to be rid of the revocation later.
			c.Older = c.Older || sub.Revoked
		}
	}
	for _, id := range other.UserIDs {
		if !slices.Contains(held.UserIDs, id) {
			note("it has a new user ID %q", id)
		}
	}
	c.Older = c.Older || other.Changed.Before(held.Changed)
	return c
}

func endText(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return "at " + stamp(t)
}
