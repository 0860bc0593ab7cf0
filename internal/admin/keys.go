package admin

import (
	"fmt"
	"time"

	"github.com/acproxy/acproxy/trust"
)

// A Key is a trusted key.
type Key struct {
	Prefix      string            `json:"prefix"` // "" is every name
	Fingerprint trust.Fingerprint `json:"fingerprint"`
	UserIDs     []string          `json:"userIDs"`
	Algorithm   string            `json:"algorithm"`
	Created     time.Time         `json:"created"`
	Expires     time.Time         `json:"expires,omitzero"`
	SignsUntil  time.Time         `json:"signsUntil,omitzero"` // when the last of its keys that may sign ends
	Warning     string            `json:"warning,omitempty"`   // that it has expired, or will soon
	Revoked     bool              `json:"revoked"`
	RktReadable bool              `json:"rktReadable"`
	Origin      string            `json:"origin"` // system or local
	File        string            `json:"file"`
}

// A Mask is a file that switches a key off.
type Mask struct {
	Prefix      string            `json:"prefix"`
	Fingerprint trust.Fingerprint `json:"fingerprint"`
	Origin      string            `json:"origin"` // system or local
	File        string            `json:"file"`
	Broken      bool              `json:"broken"` // it masks because it can't be read
}

// A KeyProblem is a file among the keys that was skipped, and why.
type KeyProblem struct {
	File   string `json:"file"`
	Detail string `json:"detail"`
}

// Keys are what is trusted, and what isn't although it lies there.
type Keys struct {
	Keys     []Key        `json:"keys"`
	Masks    []Mask       `json:"masks"`
	Problems []KeyProblem `json:"problems"`
}

// ListKeys returns what a keyring holds.
func ListKeys(keyring *trust.Keyring, now time.Time) Keys {
	out := Keys{Keys: []Key{}, Masks: []Mask{}, Problems: []KeyProblem{}}
	for _, k := range keyring.All() {
		out.Keys = append(out.Keys, KeyOf(k, now))
	}
	for _, m := range keyring.Masks() {
		out.Masks = append(out.Masks, Mask{Prefix: m.Prefix, Fingerprint: m.Fingerprint, Origin: m.Origin.String(), File: m.File, Broken: m.Broken})
	}
	for _, p := range keyring.Problems() {
		out.Problems = append(out.Problems, KeyProblem{p.File, p.Detail})
	}
	return out
}

// KeyOf returns what there is to say of a key.
func KeyOf(k trust.Key, now time.Time) Key {
	return Key{
		Prefix: k.Prefix, Fingerprint: k.Fingerprint, UserIDs: append([]string{}, k.UserIDs...), Algorithm: k.Algorithm, Created: k.Created, Expires: k.Expires,
		SignsUntil: k.SignsUntil, Warning: ExpiryWarning(k.SignsUntil, now), Revoked: k.Revoked, RktReadable: k.RktReadable() == nil, Origin: k.Origin.String(), File: k.File,
	}
}

// expiresSoon is how long before a key's end people are warned.
const expiresSoon = 30 * 24 * time.Hour

// ExpiryWarning says that something has expired, or will within 30 days; "" otherwise. The zero time is never.
func ExpiryWarning(end, now time.Time) string {
	switch left := end.Sub(now); {
	case end.IsZero() || left >= expiresSoon:
		return ""
	case left <= 0:
		return "EXPIRED"
	case left < 48*time.Hour && left >= 24*time.Hour:
		return "in 1 day"
	default:
		return fmt.Sprintf("in %d days", int(left.Hours()/24))
	}
}
