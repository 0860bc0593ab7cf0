package fetch

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// refresh asks for what is stale, and waits until it has been refreshed behind the answer.
func (s *scene) refresh(ref acproxy.Ref, blob []byte, status Status) {
	s.t.Helper()
	s.want(ref, blob, status)
	s.idle()
}

func TestLatestIsRefreshedBehindTheAnswer(t *testing.T) {
	s := newScene(t) // fresh for a minute, stale for an hour
	old := s.publish(spec("1.0", 10))
	latest := s.app("")
	s.want(latest, old, Miss)
	s.idle()
	s.clock.advance(time.Minute - 1)
	s.want(latest, old, Hit)
	s.wantRequests(1, 1)

	s.clock.advance(1)
	s.refresh(latest, old, Stale)
	s.wantRequests(1, 2)
	s.want(latest, old, Hit)

	next := s.publish(spec("2.0", 20))
	s.clock.advance(time.Minute)
	s.refresh(latest, old, Stale)
	s.wantRequests(2, 3)
	s.want(latest, next, Hit)
	s.want(s.app("1.0"), old, Hit)
	s.wantRequests(2, 3)
}

// TestTheClockWasAhead learns what is latest, and of discovery, while the clock is a year ahead. Once it is right the publisher is asked at once. That the clock is set
// back a little, as happens, costs nothing.
func TestTheClockWasAhead(t *testing.T) {
	const year = 365 * 24 * time.Hour
	s := newScene(t)
	s.clock.advance(year)
	old, latest := s.publish(spec("1.0", 10)), s.app("")
	s.want(latest, old, Miss)
	s.idle()
	s.clock.advance(-30 * time.Second)
	s.want(latest, old, Hit)
	s.wantRequests(1, 1)

	s.clock.advance(time.Hour - year)
	next := s.publish(spec("2.0", 20))
	if found, err := s.f.Discover(t.Context(), "example.com/app"); err != nil || found.Status != Stale {
		t.Errorf("Discover = %v, %v, want Stale", found.Status, err)
	}
	s.want(latest, next, Miss)
	s.idle()
	s.want(latest, next, Hit)
	s.eventually("the refresh of discovery", func() bool {
		found, err := s.f.Discover(t.Context(), "example.com/app")
		return err == nil && found.Status == Hit
	})
}

// TestTheClockWasAheadOfAnOutage has the publisher be away once the clock is right.
func TestTheClockWasAheadOfAnOutage(t *testing.T) {
	s := newScene(t)
	s.clock.advance(365 * 24 * time.Hour)
	blob := s.publish(spec("1.0", 10))
	s.want(s.app(""), blob, Miss)
	s.idle()
	s.clock.advance(-365 * 24 * time.Hour)
	s.pub.Stop()
	s.want(s.app(""), blob, Stale)
}

func TestAVersionIsNeverAskedForAgain(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 10))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.pub.ClearRequests()
	s.noDial = true
	s.clock.advance(10 * 365 * 24 * time.Hour)
	s.want(s.app("1.0"), blob, Hit)
	s.wantRequests(0, 0)
}

func TestBeyondMaxStaleTheNodeWaits(t *testing.T) {
	s := newScene(t)
	old := s.publish(spec("1.0", 10))
	latest := s.app("")
	s.want(latest, old, Miss)
	s.idle()
	s.clock.advance(time.Minute + time.Hour - 1)
	s.refresh(latest, old, Stale)

	s.clock.advance(time.Minute + time.Hour)
	s.refresh(latest, old, Revalidated)

	next := s.publish(spec("2.0", 20))
	s.clock.advance(time.Minute + time.Hour)
	s.refresh(latest, next, Miss)

	s.pub.Stop()
	s.clock.advance(time.Minute + time.Hour)
	s.refresh(latest, next, Stale)
}

// TestWhoWaitsTogetherIsSaidToHaveJoined: a stale ref is no exception.
func TestWhoWaitsTogetherIsSaidToHaveJoined(t *testing.T) {
	s := newScene(t, policies(Policy{}))
	s.want(s.app(""), s.publish(spec("1.0", 10)), Miss)
	s.idle()
	next := s.publish(spec("2.0", 20))
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(0)})
	first, err := s.f.Signature(t.Context(), Request{Ref: s.app("")})
	if err != nil || first.Status != Miss {
		t.Errorf("the first one: %v, %v, want Miss", first.Status, err)
	}
	second, err := s.f.Signature(t.Context(), Request{Ref: s.app("")})
	if err != nil || second.Status != Joined {
		t.Errorf("the second one: %v, %v, want Joined", second.Status, err)
	}
	stall.Release()
	s.want(s.app("1.0"), acitest.Must(t, spec("1.0", 10)), Hit)
	s.idle()
	s.want(s.app("2.0"), next, Hit)
}

func TestGoneUpstreamIsKept(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 10))
	latest := s.app("")
	s.want(latest, blob, Miss)
	s.idle()
	gone := s.pub.Misbehave(publisher.URL("storage.*"), publisher.Fault{Status: http.StatusNotFound})
	s.clock.advance(time.Minute)
	s.refresh(latest, blob, Stale)
	s.want(latest, blob, Gone)
	s.restart()
	s.want(latest, blob, Gone)

	gone.End()
	s.clock.advance(time.Minute)
	s.refresh(latest, blob, Gone)
	s.want(latest, blob, Hit)
	if images, _ := s.requests(); images > 2 { // one of them a HEAD, to tell what isn't there from what isn't signed
		t.Errorf("the image was fetched again: %v", s.pub.Requests())
	}
}

// TestTimesToLiveAreShortenedAtRandom: what was learned in the same moment isn't asked for again in the same moment, a time to live is never
// longer than it was set, and a restart changes nothing about it.
func TestTimesToLiveAreShortenedAtRandom(t *testing.T) {
	s := newScene(t, func(c *Config) { c.Jitter = 0.5 })
	now := s.clock.Now()
	var ttls []time.Duration
	for i := range 1000 {
		ttl := s.f.jittered(time.Hour, fmt.Sprint("example.com/app", i), now)
		if ttl > time.Hour || ttl <= 30*time.Minute {
			t.Errorf("the time to live is %v of an hour", ttl)
		}
		ttls = append(ttls, ttl)
	}
	slices.Sort(ttls)
	for i, want := range []time.Duration{30 * time.Minute, 45 * time.Minute, time.Hour} {
		if got := ttls[i*(len(ttls)-1)/2]; (got - want).Abs() > 3*time.Minute {
			t.Errorf("the %d. of three in order is %v, want about %v", i+1, got, want)
		}
	}
	blob := s.publish(spec("1.0", 10))
	s.want(s.app(""), blob, Miss)
	s.idle()
	resolved, _, err := s.store.Resolve(t.Context(), s.app(""))
	if err != nil {
		t.Fatal(err)
	}
	ttl := s.f.jittered(time.Minute, s.app("").String(), resolved.Validated)
	s.restart()
	s.clock.advance(ttl - 1)
	s.want(s.app(""), blob, Hit)
	s.clock.advance(1)
	s.want(s.app(""), blob, Stale)
}

func TestGoneBeyondMaxStaleIsSaidAtOnce(t *testing.T) {
	s := newScene(t, policies(Policy{}))
	blob := s.publish(spec("1.0", 10))
	s.want(s.app(""), blob, Miss)
	s.idle()
	s.pub.Misbehave(publisher.URL("storage.*"), publisher.Fault{Status: http.StatusNotFound})
	s.want(s.app(""), blob, Gone)
}

func TestAFailedRefreshPauses(t *testing.T) {
	for _, test := range []struct {
		name  string
		setUp func(s *scene)
	}{
		{"the signature can't be had", func(s *scene) {
			s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusServiceUnavailable})
		}},
		{"the image can't be had", func(s *scene) {
			s.publish(spec("2.0", 20))
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{Status: http.StatusServiceUnavailable})
		}},
		{"the image arrives in part", func(s *scene) {
			s.publish(spec("2.0", badSize))
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{TruncateAfter: publisher.At(1000)})
		}},
		{"the image is another one", func(s *scene) {
			s.publish(spec("2.0", badSize))
			s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{FlipBitAt: publisher.At(10_000)})
		}},
	} {
		for _, stale := range []time.Duration{time.Hour, 0} {
			t.Run(test.name+", to be waited for after "+stale.String(), func(t *testing.T) {
				s := newScene(t, policies(Policy{TTL: time.Minute, MaxStale: stale}))
				blob := s.publish(spec("1.0", 10))
				latest := s.app("")
				s.want(latest, blob, Miss)
				s.idle()
				test.setUp(s)
				s.clock.advance(time.Minute)
				if _, _, err := s.get(latest); err != nil && stale > 0 {
					t.Error(err)
				}
				s.idle()
				s.pub.ClearRequests()
				for range 5 {
					s.refresh(latest, blob, Stale)
				}
				s.wantRequests(0, 0)
				s.clock.advance(DefaultNegativeTTL)
				_, _, _ = s.get(latest)
				s.idle()
				if _, signatures := s.requests(); signatures == 0 {
					t.Error("the publisher isn't asked again after the pause")
				}
				s.pub.Behave()
				s.clock.advance(DefaultNegativeTTL)
				_, _, _ = s.get(latest)
				s.idle()
				if _, status, err := s.get(latest); err != nil || status != Hit {
					t.Errorf("after all: %v, %v", status, err)
				}
			})
		}
	}
}

// TestAClientIsGivenTheImageOfItsSignature: rkt asks for the signature and then for the image, and the ref may move on in between.
func TestAClientIsGivenTheImageOfItsSignature(t *testing.T) {
	s := newScene(t)
	old := s.publish(spec("1.0", 10))
	latest, node, other := s.app(""), Request{Ref: s.app(""), Client: "10.0.0.1"}, Request{Ref: s.app(""), Client: "10.0.0.2"}
	s.want(latest, old, Miss)
	s.idle()
	signatureOf := func(req Request) []byte {
		t.Helper()
		sig, err := s.f.Signature(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return sig.Bytes
	}
	before := signatureOf(node)
	next := s.publish(spec("2.0", 20))
	s.clock.advance(time.Minute)
	s.refresh(latest, old, Stale)
	if got, status, err := s.getFor(node); err != nil || !bytes.Equal(got, old) || status != Stale {
		t.Errorf("the node that has the old signature got %d bytes, %v, %v; want the old image", len(got), status, err)
	}
	if got, _, err := s.getFor(other); err != nil || !bytes.Equal(got, next) {
		t.Errorf("another node got %d bytes, %v; want the new image", len(got), err)
	}
	// Who asks for a signature again is told the new one, however short a time has passed.
	if bytes.Equal(signatureOf(node), before) {
		t.Error("the node is given the old signature again")
	}
	if got, _, err := s.getFor(node); err != nil || !bytes.Equal(got, next) {
		t.Errorf("after that it got %d bytes, %v; want the new image", len(got), err)
	}
}

func TestAClientIsNotGivenTheOldImageForEver(t *testing.T) {
	s := newScene(t, policies(Policy{TTL: time.Second, MaxStale: time.Hour}))
	old := s.publish(spec("1.0", 10))
	node := Request{Ref: s.app(""), Client: "10.0.0.1"}
	s.want(node.Ref, old, Miss)
	s.idle()
	if _, err := s.f.Signature(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	next := s.publish(spec("2.0", 20))
	s.clock.advance(time.Second)
	s.refresh(node.Ref, old, Stale)
	s.clock.advance(stickyFor)
	s.refresh(node.Ref, next, Stale)
	if got, _, err := s.getFor(node); err != nil || !bytes.Equal(got, next) {
		t.Errorf("after %v the node got %d bytes, %v; want the new image", stickyFor, len(got), err)
	}
}

// TestADistrustedImageIsNotGivenByItsSignature: what a client was given before counts only while it is trusted.
func TestADistrustedImageIsNotGivenByItsSignature(t *testing.T) {
	s := newScene(t)
	key := mustKey(trusttest.Options{Algorithm: trusttest.EdDSA})
	s.trust("example.com", key)
	old := acitest.Must(t, spec("1.0", 10))
	s.publishAs("example.com/app", labels("1.0"), old, key)
	node := Request{Ref: s.app(""), Client: "10.0.0.1"}
	s.want(node.Ref, old, Miss)
	s.idle()
	if _, err := s.f.Signature(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	next := s.publish(spec("2.0", 20))
	s.clock.advance(time.Minute)
	s.refresh(node.Ref, old, Stale)
	s.distrust(key)
	if got, _, err := s.getFor(node); err != nil || !bytes.Equal(got, next) {
		t.Errorf("the node got %d bytes (the old image: %v), %v; want the new image", len(got), bytes.Equal(got, old), err)
	}
}

// TestLastModifiedNeverGoesBack: rkt takes other bytes under the same URL only with a later Last-Modified.
func TestLastModifiedNeverGoesBack(t *testing.T) {
	s := newScene(t, policies(Policy{}))
	var before time.Time
	for i, modified := range []time.Time{
		time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2020, 1, 1, 0, 0, 1, 0, time.UTC), time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		sp := spec("", int64(i))
		if _, err := s.pub.AddSigned(publisher.Image{Name: sp.Name, Labels: sp.Labels, ACI: acitest.Must(t, sp), LastModified: modified}, goodKey()); err != nil {
			t.Fatal(err)
		}
		sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("")})
		if err != nil {
			t.Fatal(err)
		}
		arriving, err := s.f.Image(t.Context(), Request{Ref: s.app("")})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := deliver(t.Context(), arriving); err != nil {
			t.Fatal(err)
		}
		_ = arriving.Close()
		s.idle()
		held, err := s.f.Image(t.Context(), Request{Ref: s.app("")})
		if err != nil {
			t.Fatal(err)
		}
		_ = held.Close()
		if !sig.Modified.Equal(arriving.Modified) || !arriving.Modified.Equal(held.Modified) {
			t.Errorf("image %d: Last-Modified is %v, %v while it arrives, %v when it is held", i, sig.Modified, arriving.Modified, held.Modified)
		}
		if !held.Modified.After(before) {
			t.Errorf("image %d: Last-Modified goes from %v to %v", i, before, held.Modified)
		}
		before = held.Modified
	}
	if want := time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC); !before.Equal(want) {
		t.Errorf("Last-Modified = %v, want the publisher's %v where nothing speaks against it", before, want)
	}
}

// TestLastModifiedOfARefThatJoins: two refs share a download, and one of them answered something younger before.
func TestLastModifiedOfARefThatJoins(t *testing.T) {
	s := newScene(t, policies(Policy{}))
	young := spec("9.0", 5)
	if _, err := s.pub.AddSigned(publisher.Image{Name: young.Name, Labels: young.Labels, ACI: acitest.Must(t, young), LastModified: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}, goodKey()); err != nil {
		t.Fatal(err)
	}
	s.want(s.app(""), acitest.Must(t, young), Miss)
	s.idle()
	blob := s.publish(spec("10.0", badSize))
	stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(0)})
	first, err := s.f.Image(t.Context(), Request{Ref: s.app("10.0")})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	joined, err := s.f.Image(t.Context(), Request{Ref: s.app("")})
	if err != nil {
		t.Fatal(err)
	}
	defer joined.Close()
	if joined.Status != Joined || joined.Modified.Year() != 2030 || first.Modified.Year() != 2016 {
		t.Errorf("joined: %v, %v; first: %v", joined.Status, joined.Modified, first.Modified)
	}
	stall.Release()
	for _, im := range []*Image{first, joined} {
		if got, err := deliver(t.Context(), im); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	s.idle()
	resolved, _, err := s.store.Resolve(t.Context(), s.app(""))
	if err != nil || !resolved.Modified.Equal(joined.Modified) {
		t.Errorf("held: %v, %v; while it arrived: %v", resolved.Modified, err, joined.Modified)
	}
}

func TestAVersionThatChanges(t *testing.T) {
	for _, test := range []struct {
		name   string
		policy OnChange
		change func(*acitest.Spec)
		kept   string
	}{
		{"refused", RefuseChange, func(sp *acitest.Spec) { sp.Seed = 1 }, "old"},
		{"followed", FollowChange, func(sp *acitest.Spec) { sp.Seed = 1 }, "new"},
		{"compressed in another way", RefuseChange, func(sp *acitest.Spec) { sp.Compression = acitest.XZ }, "new"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, policies(Policy{OnChange: test.policy, TTL: time.Minute, MaxStale: time.Hour}))
			first := spec("1.0", 10_000)
			old := s.publish(first)
			s.want(s.app(""), old, Miss)
			s.idle()
			second := first
			test.change(&second)
			changed := s.publish(second)
			s.clock.advance(time.Minute)
			s.refresh(s.app(""), old, Stale)
			want := map[string][]byte{"old": old, "new": changed}[test.kept]
			_, _, _ = s.get(s.app(""))
			for _, ref := range []acproxy.Ref{s.app(""), s.app("1.0")} {
				if got, _, err := s.get(ref); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v is not the %s image: %d bytes, %v", ref, test.kept, len(got), err)
				}
			}
			s.idle()
			s.restart()
			s.want(s.app("1.0"), want, Hit)
			refusals, err := s.store.Refusals()
			if err != nil || (len(refusals) > 0) != (test.policy == RefuseChange && test.kept == "old") {
				t.Errorf("Refusals = %+v, %v", refusals, err)
			}
		})
	}
}

// TestAVersionThatChangesBeforeItWasInspected: that the image ID of what is held isn't known yet is no reason to take another image.
func TestAVersionThatChangesBeforeItWasInspected(t *testing.T) {
	s := newScene(t)
	old := s.publish(spec("1.0", 10_000))
	s.want(s.app(""), old, Miss)
	s.idle()
	digest := s.record(s.app("")).Digest
	s.await("the inspection", func(d Decision) bool { return d.Event == EventInspected })
	s.eventually("the inspection is noted", func() bool { return s.record(s.app("")).Inspected })
	if err := s.store.Update(t.Context(), digest, func(r *cache.Record) error {
		r.Inspected, r.ImageID = false, acproxy.ImageID{}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	sp := spec("1.0", 10_000)
	sp.Seed = 1
	s.publish(sp)
	s.clock.advance(time.Minute)
	s.refresh(s.app(""), old, Stale)
	s.refresh(s.app(""), old, Stale)
	s.want(s.app("1.0"), old, Hit)
}

func TestUnsignedImageIsRefreshedByItsValidators(t *testing.T) {
	s := newScene(t, policies(Policy{Trust: trust.Policy{Signature: trust.Optional}, TTL: time.Minute, MaxStale: time.Hour}))
	blob := acitest.Must(t, spec("1.0", 10))
	s.publishAs("example.com/app", labels("1.0"), blob, nil)
	latest := s.app("")
	s.want(latest, blob, Miss)
	s.idle()
	s.clock.advance(time.Minute)
	s.refresh(latest, blob, Stale)
	requests := s.pub.Requests()
	last := requests[len(requests)-1]
	if last.Status != http.StatusNotModified || last.Header.Get("If-None-Match") == "" {
		t.Errorf("the refresh was %v", last)
	}
	s.want(latest, blob, Hit)
	s.clock.advance(time.Minute)
	s.refresh(latest, blob, Stale) // what a 304 left of the validators
	if requests = s.pub.Requests(); requests[len(requests)-1].Status != http.StatusNotModified {
		t.Errorf("the second refresh was %v", requests[len(requests)-1])
	}
	next := acitest.Must(t, spec("2.0", 20))
	s.publishAs("example.com/app", labels("2.0"), next, nil)
	s.clock.advance(time.Minute)
	s.refresh(latest, blob, Stale)
	s.want(latest, next, Hit)
}

// TestValidatorsBelongToTheirURL: what one URL said must not be asked of another, which may use the same words for something else.
func TestValidatorsBelongToTheirURL(t *testing.T) {
	s := newScene(t, policies(Policy{Trust: trust.Policy{Signature: trust.Optional}, TTL: time.Minute, MaxStale: time.Hour}))
	add := func(version string, size int64) []byte {
		blob := acitest.Must(t, spec(version, size))
		if _, err := s.pub.Add(publisher.Image{Name: "example.com/app", Labels: labels(version), ACI: blob, ETag: `"1"`}); err != nil {
			t.Fatal(err)
		}
		return blob
	}
	old := add("1.0", 10)
	s.want(s.app("1.0"), old, Miss)
	s.want(s.app(""), old, Miss)
	s.idle()
	next := add("2.0", 20)
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{
		{Prefix: "example.com/app", URL: "https://storage.example.com/{name}/2.0/linux/amd64/image.{ext}"},
	}})
	s.clock.advance(DefaultDiscoveryTTL + time.Minute)
	s.refresh(s.app(""), old, Stale)
	s.want(s.app(""), next, Hit)
}

func TestNegativeAnswers(t *testing.T) {
	for _, test := range []struct {
		name       string
		at         string
		fault      publisher.Fault
		kind       error
		remembered bool
	}{
		{"404 is", "storage.*", publisher.Fault{Status: http.StatusNotFound}, acproxy.ErrNotFound, true},
		{"no discovery page is", "example.com/app", publisher.Fault{Status: http.StatusNotFound}, acproxy.ErrNotFound, true},
		{"401 isn't", "storage.*", publisher.Fault{Status: http.StatusUnauthorized}, acproxy.ErrPublisher, false},
		{"403 isn't", "storage.*", publisher.Fault{Status: http.StatusForbidden}, acproxy.ErrPublisher, false},
		{"429 isn't", "storage.*", publisher.Fault{Status: http.StatusTooManyRequests}, acproxy.ErrPublisher, false},
		{"503 isn't", "storage.*", publisher.Fault{Status: http.StatusServiceUnavailable}, acproxy.ErrPublisher, false},
		{"401 for the page isn't", "example.com/app", publisher.Fault{Status: http.StatusUnauthorized}, acproxy.ErrNotFound, false},
		{"403 for the page isn't", "example.com/app", publisher.Fault{Status: http.StatusForbidden}, acproxy.ErrNotFound, false},
		{"a cut image isn't", "*.aci", publisher.Fault{TruncateAfter: publisher.At(10)}, acproxy.ErrPublisher, false},
		{"a bad image is", "*.aci", publisher.Fault{FlipBitAt: publisher.At(200_000)}, acproxy.ErrRefused, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			trouble := s.pub.Misbehave(publisher.URL(test.at), test.fault)
			ask := func() {
				t.Helper()
				if _, _, err := s.get(s.app("1.0")); !errors.Is(err, test.kind) {
					t.Errorf("error = %v, want kind %v", err, test.kind)
				}
				s.idle()
			}
			ask()
			trouble.End()
			s.pub.ClearRequests()
			if !test.remembered {
				s.want(s.app("1.0"), blob, Miss)
				return
			}
			s.clock.advance(DefaultNegativeTTL - 1)
			ask()
			if asked := s.pub.Requests(); len(asked) > 0 {
				t.Errorf("the publisher was asked: %v", asked)
			}
			s.clock.advance(1)
			s.want(s.app("1.0"), blob, Miss)
		})
	}
}

func TestNegativeTTLBelowZeroRemembersNothing(t *testing.T) {
	s := newScene(t, func(c *Config) { c.NegativeTTL = -1 })
	blob := s.publish(spec("1.0", badSize))
	for _, f := range []publisher.Fault{{Status: http.StatusNotFound}, {FlipBitAt: publisher.At(200_000)}} {
		trouble := s.pub.Misbehave(publisher.URL("*.aci"), f)
		if _, _, err := s.get(s.app("1.0")); err == nil {
			t.Error("no error")
		}
		s.idle()
		trouble.End()
	}
	s.want(s.app("1.0"), blob, Miss)
}

func TestARefusalIsNotRememberedPastAKeyChange(t *testing.T) {
	s := newScene(t)
	key := mustKey(trusttest.Options{Algorithm: trusttest.EdDSA})
	blob := acitest.Must(t, spec("1.0", badSize))
	s.publishAs("example.com/app", labels("1.0"), blob, key)
	for range 3 {
		s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
	}
	s.wantRequests(0, 1)
	s.trust("example.com", key)
	s.want(s.app("1.0"), blob, Miss)
}

// TestARefusalByKeysThatChangedMeanwhile: it was decided by the keys of before and must not be remembered for those of now.
func TestARefusalByKeysThatChangedMeanwhile(t *testing.T) {
	s := newScene(t)
	key := mustKey(trusttest.Options{Algorithm: trusttest.EdDSA})
	blob := acitest.Must(t, spec("1.0", badSize))
	s.publishAs("example.com/app", labels("1.0"), blob, key)
	// The key comes between the decision and its being remembered: Decided is told in between.
	s.f.cfg.Decided = func(d Decision) {
		if d.Event == EventRefused {
			s.trust("example.com", key)
		}
	}
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
	s.want(s.app("1.0"), blob, Miss)
}

func TestOfflineDialsNobody(t *testing.T) {
	for name, offline := range map[string]func(*Config){
		"everything": func(c *Config) { c.Offline = true },
		"one prefix": func(c *Config) {
			c.Policies = append(c.Policies, Policy{Prefix: "example.com", Offline: true, TTL: time.Minute, MaxStale: time.Hour})
		},
	} {
		t.Run(name, func(t *testing.T) { offlineDialsNobody(t, offline) })
	}
}

func offlineDialsNobody(t *testing.T, offline func(*Config)) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 10))
	s.want(s.app("1.0"), blob, Miss)
	s.want(s.app(""), blob, Hit)
	s.idle()
	s.change = append(s.change, offline)
	s.restart()
	s.pub.ClearRequests()
	s.noDial = true
	s.clock.advance(100 * 24 * time.Hour)
	s.want(s.app("1.0"), blob, Hit)
	s.want(s.app(""), blob, Hit)
	s.want(s.ref("example.com/app", map[string]string{"os": "linux"}), blob, Stale)
	s.wantError(s.app("2.0"), acproxy.ErrOffline, "offline")
	s.wantError(s.ref("example.com/other", nil), acproxy.ErrOffline, "offline")
	if found, err := s.f.Discover(t.Context(), "example.com/app"); err != nil || len(found.Templates) == 0 {
		t.Errorf("Discover = %+v, %v", found, err)
	}
	if _, err := s.f.Discover(t.Context(), "example.com/other"); !errors.Is(err, acproxy.ErrOffline) {
		t.Errorf("Discover of what is not known: %v", err)
	}
	s.distrust(goodKey())
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
	if asked := s.pub.Requests(); len(asked) > 0 {
		t.Errorf("the publisher was asked: %v", asked)
	}
}

func TestFallbackForARefThatWasNeverAskedFor(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 10))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.pub.Stop()
	s.want(s.app(""), blob, Stale)
	s.wantError(s.app("2.0"), acproxy.ErrPublisher, "publisher-unreachable")
	s.wantError(s.ref("example.com/app", map[string]string{"os": "darwin", "arch": "amd64"}), acproxy.ErrPublisher, "publisher-unreachable")
	// Where no template has a use for the ref, the publisher being down changes nothing.
	s.wantError(s.ref("example.com/app", nil), acproxy.ErrNotFound, "no-template")

	// With two that fit nobody can say which one is meant.
	if err := s.pub.Resume(); err != nil {
		t.Fatal(err)
	}
	next := s.publish(spec("2.0", 10))
	s.want(s.app("2.0"), next, Miss)
	s.idle()
	s.pub.Stop()
	s.client.Close()
	s.wantError(s.app(""), acproxy.ErrPublisher, "publisher-unreachable")
	if err := s.store.Quarantine(t.Context(), s.record(s.app("2.0")).Digest, "test", "for the test"); err != nil {
		t.Fatal(err)
	}
	s.want(s.app(""), blob, Stale)
	s.distrust(goodKey())
	s.wantError(s.app(""), acproxy.ErrPublisher, "publisher-unreachable")
}

func TestDiscoveryOutageWithLearnedTemplates(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault publisher.Fault
	}{
		{"503", publisher.Fault{Status: http.StatusServiceUnavailable}}, {"404", publisher.Fault{Status: http.StatusNotFound}},
		{"hangs up", publisher.Fault{CloseConnection: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			s.publish(spec("1.0", 10))
			s.want(s.app("1.0"), acitest.Must(t, spec("1.0", 10)), Miss)
			s.idle()
			s.restart()
			s.clock.advance(DefaultDiscoveryTTL)
			s.pub.Misbehave(publisher.URL("example.com/*"), test.fault)
			s.want(s.app("2.0"), s.publish(spec("2.0", 20)), Miss)
		})
	}
}

// TestDiscoverySurvivesARestart: that of a name of which an image is held.
func TestDiscoverySurvivesARestart(t *testing.T) {
	s := newScene(t)
	image := s.publish(spec("1.0", 10))
	first, err := s.f.Discover(t.Context(), "example.com/app")
	if err != nil || first.Status != Miss || len(first.Templates) != 1 || len(first.Trace) == 0 {
		t.Fatalf("Discover = %+v, %v", first, err)
	}
	if _, err := s.f.Discover(t.Context(), "example.com/app/other"); err != nil {
		t.Fatal(err)
	}
	s.want(s.app("1.0"), image, Miss)
	s.pub.Stop()
	s.restart()
	for _, test := range []struct {
		advance time.Duration
		want    Status
	}{{DefaultDiscoveryTTL - 1, Hit}, {1, Stale}} {
		s.clock.advance(test.advance)
		again, err := s.f.Discover(t.Context(), "example.com/app")
		if err != nil || again.Status != test.want || len(again.Templates) != 1 || again.Templates[0] != first.Templates[0] {
			t.Errorf("Discover = %+v, %v, want %v", again, err, test.want)
		}
	}
	if !s.f.Knows("example.com/app") || s.f.Knows("example.com/app/other") {
		t.Error("Knows is wrong")
	}
	u, err := url.Parse("https://storage.example.com/example.com/app/1.0/linux/amd64/image.aci.asc")
	if err != nil {
		t.Fatal(err)
	}
	if refs, ext := s.f.RefsOf(t.Context(), u); len(refs) == 0 || refs[0] != s.app("1.0") || ext != "aci.asc" {
		t.Errorf("RefsOf = %v, %q", refs, ext)
	}
	u.Host = "elsewhere.example.com"
	if refs, _ := s.f.RefsOf(t.Context(), u); len(refs) != 0 {
		t.Errorf("RefsOf another host = %v", refs)
	}
}

func TestDiscoveryIsRefreshedBehindTheAnswer(t *testing.T) {
	s := newScene(t)
	s.publish(spec("1.0", 10))
	if _, err := s.f.Discover(t.Context(), "example.com/app"); err != nil {
		t.Fatal(err)
	}
	s.pub.SetPage(publisher.Page{Path: "example.com/app", Templates: []publisher.Tag{{Prefix: "example.com/app", URL: "https://one.example.com/{version}.{ext}"}}})
	s.clock.advance(DefaultDiscoveryTTL)
	if again, err := s.f.Discover(t.Context(), "example.com/app"); err != nil || again.Status != Stale {
		t.Errorf("Discover = %+v, %v", again, err)
	}
	s.eventually("the refresh", func() bool {
		known, _ := s.store.Known("example.com/app")
		return len(known.Templates) == 1 && known.Templates[0].URL == "https://one.example.com/{version}.{ext}"
	})
}
