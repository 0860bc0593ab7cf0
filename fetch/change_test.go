package fetch

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/discovery"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

var (
	unsignedToo = Policy{TTL: time.Minute, MaxStale: time.Hour, Trust: trust.Policy{Signature: trust.Optional}}
	signedOnly  = Policy{TTL: time.Minute, MaxStale: time.Hour}
)

func by(p ...Policy) Settings { return Settings{Policies: p} }

// TestChangedTrust: what is held is judged by the policies of the moment, with the next request.
func TestChangedTrust(t *testing.T) {
	s := newScene(t, policies(unsignedToo))
	blob := acitest.Must(t, spec("1.0", 100))
	s.publishAs("example.com/app", labels("1.0"), blob, nil)
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	rejudged := func(quarantined, changed int) {
		t.Helper()
		found, err := s.f.Rejudge(t.Context())
		if err != nil || found.Images != 1 || found.Quarantined != quarantined || found.Changed != changed {
			t.Errorf("Rejudge = %+v, %v; want %d quarantined, %d changed", found, err, quarantined, changed)
		}
	}
	rejudged(0, 0)
	s.f.Change(by(signedOnly))
	// It is asked for at its publisher, which hasn't signed it since.
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "unsigned")
	if rec := s.f.Judged(s.record(s.app("1.0"))); !rec.Quarantined() {
		t.Errorf("Judged = %+v", rec)
	}
	rejudged(1, 1)
	s.f.Change(by(unsignedToo))
	s.want(s.app("1.0"), blob, Hit)
	rejudged(0, 1)
	// For other names it says nothing.
	other := signedOnly
	other.Prefix = "example.com/other"
	s.f.Change(by(unsignedToo, other))
	s.want(s.app("1.0"), blob, Hit)
}

// TestARefusalIsNotRememberedUnderOtherPolicies: who made a policy wider does not wait for the memory of the one before.
func TestARefusalIsNotRememberedUnderOtherPolicies(t *testing.T) {
	s := newScene(t)
	blob := acitest.Must(t, spec("1.0", 100))
	s.publishAs("example.com/app", labels("1.0"), blob, nil)
	for range 2 {
		s.wantError(s.app("1.0"), acproxy.ErrRefused, "unsigned")
	}
	s.f.Change(by(unsignedToo))
	s.want(s.app("1.0"), blob, Miss)
}

// TestTheVerdictIsByThePolicyOfItsMoment: an image that is arriving when the policy becomes stricter is not kept by the one before.
func TestTheVerdictIsByThePolicyOfItsMoment(t *testing.T) {
	s := newScene(t, policies(unsignedToo))
	s.publishAs("example.com/app", labels("1.0"), acitest.Must(t, spec("1.0", 100<<10)), nil)
	trouble := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(50 << 10)})
	failed := make(chan error, 1)
	go func() {
		_, _, err := s.get(s.app("1.0"))
		failed <- err
	}()
	s.wait("the publisher to stall", trouble.Stalled())
	s.f.Change(by(signedOnly))
	trouble.Release()
	if err := <-failed; !errors.Is(err, acproxy.ErrRefused) || acproxy.Code(err) != "unsigned" {
		t.Errorf("error = %v (%s)", err, acproxy.Code(err))
	}
	s.idle()
	s.wantNothingKept()
}

// TestRejudgeSaysUntilWhen: the one who asks knows when to ask again.
func TestRejudgeSaysUntilWhen(t *testing.T) {
	s := newScene(t)
	now := s.clock.Now()
	for version, life := range map[string]time.Duration{"1.0": 0, "2.0": 2 * time.Hour, "3.0": time.Hour} {
		opts := trusttest.Options{Algorithm: trusttest.EdDSA, Created: now.Add(-time.Hour)}
		if life > 0 {
			opts.Expires = now.Add(life)
		}
		key := mustKey(opts)
		s.trust("example.com", key)
		blob := acitest.Must(t, spec(version, 100))
		s.publishAs("example.com/app", labels(version), blob, key)
		s.want(s.app(version), blob, Miss)
		s.idle()
	}
	until := func(want time.Duration, quarantined int) {
		t.Helper()
		found, err := s.f.Rejudge(t.Context())
		if err != nil || found.Quarantined != quarantined || want == 0 != found.Until.IsZero() || want != 0 && found.Until.Sub(now.Add(want)).Abs() > time.Second {
			t.Errorf("Rejudge = %+v, %v; want %d quarantined, until %v", found, err, quarantined, now.Add(want))
		}
	}
	until(time.Hour, 0)
	s.clock.advance(time.Hour)
	until(2*time.Hour, 1)
	s.clock.advance(time.Hour)
	until(0, 2)
	// What was signed in its time counts again.
	s.f.Change(by(Policy{TTL: time.Minute, Trust: trust.Policy{Expired: trust.AcceptIfSignedBefore}}))
	until(0, 0)
}

// TestChangedToOffline: once it is offline nobody is dialled, and what is held is served; and the other way round.
func TestChangedToOffline(t *testing.T) {
	s := newScene(t, policies(signedOnly))
	held, latest := s.publish(spec("1.0", 100)), s.app("")
	s.want(s.app("1.0"), held, Miss)
	s.want(latest, held, Hit)
	s.idle()
	noDial := func(no bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.noDial = no
	}
	here := signedOnly
	here.Prefix, here.Offline = "example.com/app", true
	absent := s.publish(spec("2.0", 100))
	s.client.Close()
	for _, off := range []Settings{{Policies: []Policy{signedOnly}, Offline: true}, by(signedOnly, here)} {
		s.f.Change(off)
		noDial(true)
		s.clock.advance(10 * time.Hour)
		s.want(s.app("1.0"), held, Hit)
		s.want(latest, held, Hit)
		s.wantError(s.app("2.0"), acproxy.ErrOffline, "offline")
		if _, err := s.f.Discover(t.Context(), "example.com/app/unknown"); !errors.Is(err, acproxy.ErrOffline) {
			t.Errorf("Discover: %v", err)
		}
		s.idle()
		noDial(false)
	}
	s.f.Change(by(signedOnly))
	s.want(s.app("2.0"), absent, Miss)
}

// TestChangedAllow: names that may not be asked for any more are not answered, held or not.
func TestChangedAllow(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 100))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.f.Change(Settings{Policies: []Policy{signedOnly}, Allow: []string{"example.com/other"}})
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "name-not-allowed")
	s.f.Change(Settings{Policies: []Policy{signedOnly}, Allow: []string{"example.com"}})
	s.want(s.app("1.0"), blob, Hit)
}

// TestChangedFreshness: how long an answer is good is decided when it is given.
func TestChangedFreshness(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 100))
	s.want(s.app(""), blob, Miss)
	s.idle()
	s.clock.advance(30 * time.Second)
	s.want(s.app(""), blob, Hit)
	s.f.Change(by(Policy{TTL: 10 * time.Second, MaxStale: time.Hour}))
	s.want(s.app(""), blob, Stale)
	s.idle()
	s.f.Change(by(Policy{TTL: time.Hour}))
	s.clock.advance(59 * time.Minute)
	s.want(s.app(""), blob, Hit)
	s.f.Change(Settings{Policies: []Policy{{TTL: time.Hour}}, Jitter: 1})
	if ttl := s.f.jittered(time.Hour, "example.com/app", s.clock.Now()); ttl >= time.Hour {
		t.Errorf("with jitter the time to live is %v", ttl)
	}
}

// TestARefreshIsTriedAgainAfterAChange: what a publisher could not be asked for a moment ago may be had now.
func TestARefreshIsTriedAgainAfterAChange(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 100))
	s.want(s.app(""), blob, Miss)
	s.idle()
	s.clock.advance(2 * time.Minute)
	s.pub.Stop()
	s.want(s.app(""), blob, Stale)
	s.eventually("the pause", func() bool { return s.f.pausing(s.app("")) })
	s.idle()
	if err := s.pub.Resume(); err != nil {
		t.Fatal(err)
	}
	s.f.Change(by(signedOnly))
	s.want(s.app(""), blob, Stale)
	s.idle()
	s.want(s.app(""), blob, Hit)
}

// TestWhatOtherRulesFoundIsAskedForAgain: what was learned of a name by other rules leads nowhere any more.
func TestWhatOtherRulesFoundIsAskedForAgain(t *testing.T) {
	s := newScene(t)
	first := s.publish(spec("1.0", 100))
	s.want(s.app("1.0"), first, Miss)
	s.idle()
	second := s.publish(spec("2.0", 100))
	s.finder.SetRules([]discovery.Rule{{Prefix: "example.com", Templates: []string{"https://one.example.com/{name}-{version}.{ext}"}}})
	s.clock.advance(time.Second)
	err := s.wantError(s.app("2.0"), acproxy.ErrNotFound, "no-signature-found")
	var e *acproxy.Error
	if !errors.As(err, &e) || !slices.ContainsFunc(e.Trace, func(a acproxy.Attempt) bool { return a.URL == "https://one.example.com/example.com/app-2.0.aci.asc" }) {
		t.Errorf("asked for %+v", e)
	}
	s.finder.SetRules(nil)
	s.f.Change(by(signedOnly))
	s.clock.advance(time.Second)
	s.want(s.app("2.0"), second, Miss)
}

// TestChangesBesideHits has settings change while images are served: after a change to a stricter policy nothing is served that it refuses, and no
// reader of what both accept ever sees anything of it.
func TestChangesBesideHits(t *testing.T) {
	s := newScene(t, policies(unsignedToo))
	signed, bare := s.publish(spec("1.0", 100)), acitest.Must(t, spec("2.0", 100))
	s.publishAs("example.com/app", labels("2.0"), bare, nil)
	s.want(s.app("1.0"), signed, Miss)
	s.want(s.app("2.0"), bare, Miss)
	s.idle()
	s.pub.Stop()
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 3 {
		// They end when stop is closed; waited for below.
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, status, err := s.get(s.app("1.0")); err != nil || status != Hit {
					t.Errorf("the signed image: %v, %v", status, err)
					return
				}
				_ = s.f.acceptable(s.record(s.app("2.0"))) // and have the verdict remembered
			}
		})
	}
	rec := s.record(s.app("2.0"))
	for i := range 500 {
		s.f.Change(by(signedOnly))
		if err := s.f.acceptable(rec); !errors.Is(err, acproxy.ErrRefused) {
			t.Fatalf("change %d: by a policy that asks for a signature: %v", i, err)
		}
		s.f.Change(by(unsignedToo))
		if err := s.f.acceptable(rec); err != nil {
			t.Fatalf("change %d: by a policy that asks for none: %v", i, err)
		}
	}
	close(stop)
	readers.Wait()
}

// TestWhatWasFoundByOldRules has the rules change while a publisher is being asked: what it then says is not what the new ones lead to.
func TestWhatWasFoundByOldRules(t *testing.T) {
	s := newScene(t)
	began := s.clock.Now()
	s.clock.advance(time.Second)
	s.finder.SetRules([]discovery.Rule{{Prefix: "example.com", Templates: []string{"https://new.example.com/{name}-{version}.{ext}"}}})
	s.clock.advance(time.Second)
	s.f.learn("example.com/app", discovery.Found{Templates: []discovery.Template{{Prefix: "example.com", URL: "https://old.example.com/{name}-{version}.{ext}"}}}, began)
	known, ok := s.store.Known("example.com/app")
	if !ok || s.f.fresh(known) {
		t.Errorf("what the old rules led to is known: %v, and taken for fresh: %v", ok, s.f.fresh(known))
	}
	templates, _, err := s.f.templates(t.Context(), "example.com/app", new(acproxy.Trace))
	if err != nil || len(templates) != 1 || !strings.HasPrefix(templates[0].URL, "https://new.") {
		t.Errorf("an image is asked for at %v, %v", templates, err)
	}
}
