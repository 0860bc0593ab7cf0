package trust

import (
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy/trust/trusttest"
)

func TestExplain(t *testing.T) {
	made := func(opts trusttest.Options) *trusttest.Key { return newKey(t, opts) }
	ed := trusttest.Options{Algorithm: trusttest.EdDSA}
	expiring := ed
	expiring.Expires = now.Add(time.Hour)
	expired := ed
	expired.Expires = now.Add(-time.Hour)
	subExpired := trusttest.Options{SigningSubkey: true, SubkeyExpires: now.Add(-time.Hour)}
	future := trusttest.Options{Algorithm: trusttest.EdDSA, Created: now.Add(MaxClockSkew + time.Second)}
	keys := map[string]*trusttest.Key{
		"root": made(ed), "host": made(ed), "app": made(expiring), "neighbour": made(ed), "below": made(ed), "elsewhere": made(ed), "masked": made(ed),
		"excepted": made(ed), "broken": made(ed), "revoked": made(ed), "expired": made(expired), "expired subkey": made(subExpired),
		"future": made(future), "short": made(trusttest.Options{Bits: 1024}), "replaced": made(ed),
	}
	if err := keys["revoked"].Revoke(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	dirs := Dirs{System: dir + "/s", Local: dir + "/l"}
	put := func(place, key, content string) {
		t.Helper()
		writeFile(t, dir+"/"+place+"/"+keys[key].Fingerprint(), content, 0o644)
	}
	add := func(place string, names ...string) {
		t.Helper()
		for _, name := range names {
			put(place, name, string(keys[name].Armored()))
		}
	}
	add("l/root.d", "root")
	add("s/root.d", "excepted", "masked")
	add("s/prefix.d/example.com", "host", "broken", "replaced")
	add("l/prefix.d/example.com", "replaced")
	add("l/prefix.d/example.com/app", "app", "revoked", "expired", "expired subkey", "future", "short")
	add("l/prefix.d/example.com/ap", "neighbour")
	add("l/prefix.d/example.com/app/web", "below")
	add("l/prefix.d/other.org", "elsewhere")
	put("l/root.d", "masked", "")
	put("l/prefix.d/example.com/app", "excepted", "")
	put("l/prefix.d/example.com", "broken", "rubbish")

	type want struct {
		outcome Outcome
		reason  string
	}
	wants := map[string][]want{
		"root": {{Accepted, "every name"}}, "host": {{Accepted, "trusted for example.com"}}, "app": {{Accepted, "trusted for example.com/app"}},
		"neighbour": {{UnknownKey, "prefixes match whole segments"}}, "below": {{UnknownKey, "doesn't cover"}}, "elsewhere": nil,
		"masked": {{UnknownKey, "masked by the empty file " + dirs.Local + "/root.d/"}}, "excepted": {{UnknownKey, "masked by the empty file " + dirs.Local + "/prefix.d/example.com/app/"}},
		"broken": {{UnknownKey, "which can't be read"}}, "revoked": {{KeyRevoked, "revoked"}}, "expired": {{KeyExpired, "expired at"}},
		"expired subkey": {{Accepted, "trusted for"}}, "future": {{NotYetValid, "future"}}, "short": {{WeakAlgorithm, "legacy: true"}},
		"replaced": {{Accepted, "trusted for example.com"}, {UnknownKey, "replaced by " + dirs.Local}},
	}
	ring := load(t, dirs)
	all := ring.Explain("example.com/app", Policy{}, now)
	for name, want := range wants {
		var got []Standing
		for _, s := range all {
			if string(s.Key.Fingerprint) == keys[name].Fingerprint() {
				got = append(got, s)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: %d standings, want %d", name, len(got), len(want))
			continue
		}
		for i, s := range got {
			if s.Outcome != want[i].outcome || !strings.Contains(s.Reason, want[i].reason) || s.Counts() != (want[i].outcome == Accepted) {
				t.Errorf("%s: %v, %q, want %v, something about %q", name, s.Outcome, s.Reason, want[i].outcome, want[i].reason)
			}
			if masked := strings.Contains(s.Reason, dir); masked != (s.Mask != "") {
				t.Errorf("%s: mask %q, but the reason is %q", name, s.Mask, s.Reason)
			}
		}
	}
	for i := 1; i < len(all); i++ {
		if standingOrder(all[i]) < standingOrder(all[i-1]) {
			t.Errorf("%v stands behind %v", all[i].Outcome, all[i-1].Outcome)
		}
	}
	for _, s := range all {
		if s.Key.Fingerprint == Fingerprint(keys["app"].Fingerprint()) && !s.Until.Equal(expiring.Expires) {
			t.Errorf("until %v, want %v", s.Until, expiring.Expires)
		}
	}

	// Another policy makes another answer.
	for _, s := range ring.Explain("example.com/app", Policy{Legacy: true, Expired: AcceptIfSignedBefore}, now) {
		switch string(s.Key.Fingerprint) {
		case keys["short"].Fingerprint():
			if !s.Counts() {
				t.Errorf("a legacy policy: %v", s.Outcome)
			}
		case keys["expired"].Fingerprint():
			if s.Counts() || !strings.Contains(s.Reason, "before that is accepted") {
				t.Errorf("accept-if-signed-before: %v, %q", s.Outcome, s.Reason)
			}
		}
	}

	masks := ring.Masks()
	if len(masks) != 3 {
		t.Errorf("Masks = %+v, want three", masks)
	}
	for _, m := range masks {
		if m.Broken != (string(m.Fingerprint) == keys["broken"].Fingerprint()) || m.Origin != Local {
			t.Errorf("Masks has %+v", m)
		}
	}
	if held := ring.Held(Fingerprint(keys["replaced"].Fingerprint())); len(held) != 2 || held[0].Origin != System || held[1].Origin != Local {
		t.Errorf("Held = %+v, want the system's copy and the local one", held)
	}
}

// What Explain says of a key, Judge says of a signature that the key makes.
func TestExplainAgreesWithJudge(t *testing.T) {
	revoked := newKey(t, trusttest.Options{})
	if err := revoked.Revoke(); err != nil {
		t.Fatal(err)
	}
	keys := []*trusttest.Key{
		newKey(t, trusttest.Options{}), newKey(t, trusttest.Options{Algorithm: trusttest.DSA}), newKey(t, trusttest.Options{Bits: 1024}),
		newKey(t, trusttest.Options{Expires: now}), newKey(t, trusttest.Options{Expires: now.Add(time.Second)}), newKey(t, trusttest.Options{SigningSubkey: true}),
		newKey(t, trusttest.Options{Created: now.Add(time.Hour)}), revoked,
	}
	for _, policy := range []Policy{{}, {Legacy: true}, {Expired: AcceptIfSignedBefore}} {
		for i, key := range keys {
			ring := ring(t, trusted{"example.com/app", key.Armored()})
			for _, name := range []string{"example.com/app", "example.com/app/web", "example.com/apple"} {
				sig := sign(t, key, trusttest.SignOptions{Time: now})
				a, err := ring.Judge(Question{Name: name, Signature: sig, Hashed: hashed(t, sig, image), Policy: policy, Now: now})
				judged := outcome(t, a, err)
				if got := ring.Explain(name, policy, now); len(got) != 1 || got[0].Outcome != judged {
					t.Errorf("key %d, %s, %+v: Explain = %+v, Judge = %v", i, name, policy, got, judged)
				}
			}
		}
	}
}

func TestCompare(t *testing.T) {
	key := newKey(t, trusttest.Options{SigningSubkey: true, Expires: now.Add(time.Hour)})
	read := func() Key {
		t.Helper()
		keys, err := ReadKeys(key.Armored())
		if err != nil {
			t.Fatal(err)
		}
		return keys[0]
	}
	plain := read()
	if len(plain.Subkeys) != 1 || !plain.Subkeys[0].Signs || plain.Subkeys[0].KeyID != key.KeyID() || !plain.SignsUntil.Equal(now.Add(time.Hour)) || plain.Changed.IsZero() {
		t.Errorf("ReadKeys = %+v", plain)
	}
	if c := Compare(plain, plain); len(c.Changes) != 0 || c.Older {
		t.Errorf("the same key: %+v", c)
	}
	if err := key.RevokeSubkey(); err != nil {
		t.Fatal(err)
	}
	subRevoked := read()
	if err := key.Revoke(); err != nil {
		t.Fatal(err)
	}
	revoked := read()
	withoutSubkey := subRevoked
	withoutSubkey.Subkeys = nil
	longer := plain
	longer.Expires = time.Time{}
	past := plain
	past.Changed = plain.Changed.Add(-time.Second)
	for _, test := range []struct {
		name        string
		held, other Key
		want        string
		older       bool
	}{
		{"revoked", plain, revoked, "its owner has revoked it", false},
		{"not revoked any more", revoked, plain, "it isn't revoked there", true},
		{"a subkey revoked", plain, subRevoked, "is revoked", false},
		{"a subkey not revoked any more", subRevoked, plain, "isn't revoked there", true},
		{"a revoked subkey left out", subRevoked, withoutSubkey, "has no subkey", true},
		{"a new subkey", withoutSubkey, subRevoked, "a new subkey " + key.KeyID(), false},
		{"a longer life", plain, longer, "expires never instead of at", false},
		{"an older copy", plain, past, "", true},
	} {
		c := Compare(test.held, test.other)
		if c.Older != test.older || !strings.Contains(strings.Join(c.Changes, "\n"), test.want) {
			t.Errorf("%s: Compare = %+v, want something about %q and older %t", test.name, c, test.want, test.older)
		}
	}
}
