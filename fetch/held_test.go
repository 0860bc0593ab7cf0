package fetch

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// brokenBehind is an image whose manifest is good and whose end breaks a rule.
func brokenBehind(version string) acitest.Spec {
	sp := spec(version, badSize)
	sp.Extra = []acitest.Entry{acitest.File("etc/passwd", "")}
	return sp
}

func TestALaggingInspectionQuarantines(t *testing.T) {
	s := newScene(t)
	blob := s.publish(brokenBehind("1.0"))
	s.want(s.app("1.0"), blob, Miss) // it is signed
	s.await("the quarantine", func(d Decision) bool { return d.Event == EventQuarantined && d.Outcome == aci.RuleOutsideRootfs })
	s.eventually("the quarantine is noted", func() bool { return s.record(s.app("1.0")).Quarantined() })
	s.idle()
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "quarantined")
	_, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
	wantError(t, err, acproxy.ErrRefused, "quarantined")
	s.wantRequests(1, 1)

	// Nor is it served by another ref: the bytes come again, and are known.
	latest := s.app("")
	got, _, err := s.get(latest)
	wantError(t, err, acproxy.ErrRefused, "quarantined")
	if len(got) > len(blob)-DefaultHoldBack {
		t.Errorf("%d bytes were delivered", len(got))
	}
	s.idle()
	s.wantError(latest, acproxy.ErrRefused, "quarantined")
	s.pub.Stop()
	s.clock.advance(time.Hour)
	if _, _, err := s.get(s.ref("example.com/app", nil)); err == nil {
		t.Error("it was served as a fallback")
	}
	s.restart()
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "quarantined")
}

// forgetful is a store that can't note that an image is quarantined.
type forgetful struct{ cache.Store }

func (forgetful) Quarantine(context.Context, acproxy.Digest, string, string) error {
	return errors.New("the disk is broken")
}

// TestAQuarantineThatCanNotBeNotedHolds: what broke a rule isn't served although the store doesn't know of it, by no ref and in no way.
func TestAQuarantineThatCanNotBeNotedHolds(t *testing.T) {
	s := newScene(t, func(c *Config) { c.Store = forgetful{c.Store} })
	blob := s.publish(brokenBehind("1.0"))
	s.want(s.app("1.0"), blob, Miss) // it is signed
	s.await("the quarantine", func(d Decision) bool { return d.Event == EventQuarantined && d.Outcome == aci.RuleOutsideRootfs })
	s.idle()
	if s.f.Grounds().barred == 0 {
		t.Error("what answers rest on is what it was: those from before would be given again")
	}
	s.eventually("the inspection is over", func() bool { return s.f.acceptable(s.record(s.app("1.0"))) != nil })
	if s.record(s.app("1.0")).Quarantined() {
		t.Fatal("the store has noted it")
	}
	s.wantError(s.app("1.0"), acproxy.ErrRefused, "quarantined")
	_, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
	wantError(t, err, acproxy.ErrRefused, "quarantined")
	got, _, err := s.get(s.app(""))
	wantError(t, err, acproxy.ErrRefused, "quarantined")
	if len(got) > len(blob)-DefaultHoldBack {
		t.Errorf("%d bytes were delivered by another ref", len(got))
	}
	if rec := s.f.Judged(s.record(s.app("1.0"))); !rec.Quarantined() {
		t.Error("whoever lists the images is not told")
	}
}

func TestInspectedWaitsForTheInspection(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", badSize))
	bad := s.publish(brokenBehind("2.0"))
	for range 2 { // arriving, then held
		im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
		if err != nil {
			t.Fatal(err)
		}
		want, err := acitest.ID(blob)
		if err != nil {
			t.Fatal(err)
		}
		if err := im.Inspected(t.Context()); err != nil || im.Record == nil || im.Record.ImageID != want || im.Record.Compression != "none" {
			t.Errorf("Inspected: %v, record %+v", err, im.Record)
		}
		_ = im.Close()
	}
	im, err := s.f.Image(t.Context(), Request{Ref: s.app("2.0")})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if err := im.Inspected(t.Context()); !errors.Is(err, acproxy.ErrRefused) && !errors.Is(err, acproxy.ErrPublisher) {
		t.Errorf("Inspected of %d bytes that break a rule: %v", len(bad), err)
	}
}

func TestInspectionsAreResumedAfterARestart(t *testing.T) {
	s := newScene(t)
	for _, version := range []string{"1.0", "2.0"} {
		sp := spec(version, 1000)
		if version == "2.0" {
			sp = brokenBehind(version)
		}
		blob := s.publish(sp)
		s.want(s.app(version), blob, Miss)
		s.await("the inspection", func(d Decision) bool { return d.Ref == s.app(version) && d.Event != EventAccepted })
		s.eventually("the inspection is noted", func() bool { r := s.record(s.app(version)); return r.Inspected || r.Quarantined() })
	}
	for _, version := range []string{"1.0", "2.0"} {
		// As a kill right after the commit would have left them.
		if err := s.store.Update(t.Context(), s.record(s.app(version)).Digest, func(r *cache.Record) error {
			r.Inspected, r.ImageID, r.Compression, r.State, r.Code, r.Reason = false, acproxy.ImageID{}, "", cache.OK, "", ""
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	s.restart()
	if err := s.f.ResumeInspections(ended()); !errors.Is(err, context.Canceled) {
		t.Errorf("ResumeInspections of an ended context: %v", err)
	}
	if rec := s.record(s.app("1.0")); rec.Inspected || rec.Quarantined() {
		t.Errorf("after that: %+v", rec)
	}
	if err := s.f.ResumeInspections(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rec := s.record(s.app("1.0")); !rec.Inspected || rec.ImageID.IsZero() {
		t.Errorf("the good one: %+v", rec)
	}
	s.wantError(s.app("2.0"), acproxy.ErrRefused, "quarantined")
}

func idOf(t *testing.T, blob []byte) acproxy.ImageID {
	t.Helper()
	id, err := acitest.ID(blob)
	if err != nil {
		t.Error(err)
	}
	return id
}

func TestByImageID(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	s.want(s.app("1.0"), blob, Miss)
	s.await("the inspection", func(d Decision) bool { return d.Event == EventInspected })
	s.eventually("the inspection is noted", func() bool { return s.record(s.app("1.0")).Inspected })
	rec := s.record(s.app("1.0"))
	digits := rec.ImageID.String()[len("sha512-"):]
	get := func(digits string) ([]byte, error) {
		im, err := s.f.ByImageID(t.Context(), digits, everyName)
		if err != nil {
			return nil, err
		}
		defer im.Close()
		return deliver(t.Context(), im)
	}
	for _, n := range []int{12, 13, 128} {
		if got, err := get(digits[:n]); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("%d digits: %d bytes, %v", n, len(got), err)
		}
	}
	if _, err := get("0123456789ab"); !errors.Is(err, acproxy.ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	// The same tar in another blob is the same image.
	sp := spec("1.0", 1000)
	sp.Compression = acitest.Gzip
	s.publish(sp)
	s.clock.advance(time.Minute)
	s.get(s.app(""))
	s.idle()
	if _, err := get(digits); err != nil {
		t.Errorf("two blobs of one image: %v", err)
	}
	// Two images with the same beginning of their IDs.
	other := s.publish(spec("2.0", 1000))
	s.want(s.app("2.0"), other, Miss)
	s.idle()
	s.eventually("the inspection is noted", func() bool { return s.record(s.app("2.0")).Inspected })
	twin := rec.ImageID
	twin[63] ^= 1
	digest2 := s.record(s.app("2.0")).Digest
	if err := s.store.Update(t.Context(), digest2, func(r *cache.Record) error { r.ImageID = twin; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := get(digits[:12]); !errors.Is(err, acproxy.ErrInvalid) {
		t.Errorf("ambiguous: %v", err)
	}
	if got, err := get(digits); err != nil || idOf(t, got) != rec.ImageID {
		t.Errorf("whole: %d bytes, %v", len(got), err)
	}
	// One that isn't served doesn't make the other one ambiguous.
	if err := s.store.Quarantine(t.Context(), digest2, "test", "for the test"); err != nil {
		t.Fatal(err)
	}
	if got, err := get(digits[:12]); err != nil || idOf(t, got) != rec.ImageID {
		t.Errorf("ambiguous with one quarantined: %d bytes, %v", len(got), err)
	}
	_, err := get(twin.String()[len("sha512-"):])
	wantError(t, err, acproxy.ErrRefused, "quarantined")
	s.distrust(goodKey())
	_, err = get(digits)
	wantError(t, err, acproxy.ErrRefused, "unknown-key")
	s.f.Change(Settings{Policies: []Policy{signedOnly}, Allow: []string{"example.org"}})
	_, err = get(digits)
	wantError(t, err, acproxy.ErrRefused, "name-not-allowed")
}

// TestAKeyThatGoesAndComes is promise 7 of the design.
func TestAKeyThatGoesAndComes(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	for range 3 {
		s.want(s.app("1.0"), blob, Hit)
		s.distrust(goodKey())
		s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
		_, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
		wantError(t, err, acproxy.ErrRefused, "unknown-key")
		if rec := s.f.Judged(s.record(s.app("1.0"))); !rec.Quarantined() || rec.Code != "unknown-key" {
			t.Errorf("Judged = %+v", rec)
		}
		if counted, err := s.f.Rejudge(t.Context()); err != nil || counted != (Rejudged{Images: 1, Quarantined: 1, Changed: 1}) {
			t.Errorf("Rejudge = %+v, %v", counted, err)
		}
		s.trust("example.com", goodKey())
		if counted, err := s.f.Rejudge(t.Context()); err != nil || counted != (Rejudged{Images: 1, Changed: 1}) {
			t.Errorf("Rejudge = %+v, %v", counted, err)
		}
	}
	s.want(s.app("1.0"), blob, Hit)
	if images, _ := s.requests(); images != 1 {
		t.Errorf("the image was fetched %d times", images)
	}
}

// TestADistrustedImageIsRefusedEvenIfItsPublisherHasNoOther keeps the reason.
func TestADistrustedImageThatIsGoneUpstream(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusServiceUnavailable} {
		s := newScene(t)
		blob := s.publish(spec("1.0", 1000))
		s.want(s.app("1.0"), blob, Miss)
		s.idle()
		s.distrust(goodKey())
		s.pub.Misbehave(publisher.URL("storage.*"), publisher.Fault{Status: status})
		s.wantError(s.app("1.0"), acproxy.ErrRefused, "unknown-key")
	}
}

// TestSignedAnew: the publisher signs the same bytes again with a key that is trusted.
func TestSignedAnew(t *testing.T) {
	s := newScene(t)
	key := mustKey(trusttest.Options{Algorithm: trusttest.EdDSA})
	blob := acitest.Must(t, spec("1.0", badSize))
	s.trust("example.com", key)
	s.publishAs("example.com/app", labels("1.0"), blob, key)
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	stale := s.record(s.app("1.0"))
	s.distrust(key)
	signature, err := goodKey().Sign(bytes.NewReader(blob), trusttest.SignOptions{Hash: crypto.SHA256}) // the other one was SHA-512
	if err == nil {
		_, err = s.pub.Add(publisher.Image{Name: "example.com/app", Labels: labels("1.0"), ACI: blob, Signature: signature})
	}
	if err != nil {
		t.Fatal(err)
	}
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	rec := s.record(s.app("1.0"))
	if rec.Digest != stale.Digest || rec.SignatureDigest == stale.SignatureDigest || rec.Signers[0].Fingerprint != goodKey().Fingerprint() {
		t.Errorf("record = %+v", rec)
	}
	// Somebody who read the record before judges by what is there now.
	if err := s.f.acceptable(stale); err != nil {
		t.Errorf("by the old record: %v", err)
	}
}

func TestAVerdictLastsNoLongerThanItsKey(t *testing.T) {
	for _, test := range []struct {
		name string
		sign func(now time.Time) (trusttest.Options, trusttest.SignOptions)
		code string
	}{
		{"key", func(now time.Time) (trusttest.Options, trusttest.SignOptions) {
			return trusttest.Options{Algorithm: trusttest.EdDSA, Created: now.Add(-time.Hour), Expires: now.Add(30 * time.Second)}, trusttest.SignOptions{}
		}, "key-expired"},
		{"signature", func(now time.Time) (trusttest.Options, trusttest.SignOptions) {
			return trusttest.Options{Algorithm: trusttest.EdDSA}, trusttest.SignOptions{Time: now, Lifetime: 30 * time.Second}
		}, "signature-expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			opts, sign := test.sign(s.clock.Now())
			signedBy(opts, sign, nil)(s)
			if _, _, err := s.get(s.app("1.0")); err != nil {
				t.Fatal(err)
			}
			s.idle()
			s.clock.advance(28 * time.Second)
			if _, status, err := s.get(s.app("1.0")); err != nil || status != Hit {
				t.Errorf("before its time: %v, %v", status, err)
			}
			// Well within the minute for which a verdict is used again.
			s.clock.advance(4 * time.Second)
			s.wantError(s.app("1.0"), acproxy.ErrRefused, test.code)
		})
	}
}

// TestAVerdictIsNotRememberedUnderOtherKeys: the keys change while a verdict is made, and change back.
func TestAVerdictIsNotRememberedUnderOtherKeys(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	with := s.keys.Current()
	s.distrust(goodKey())
	without := s.keys.Current()
	rings := []*trust.Keyring{without, with, without}
	calls := 0
	s.f.cfg.Keyring = func() *trust.Keyring {
		ring := rings[min(calls, len(rings)-1)]
		calls++
		return ring
	}
	_ = s.f.acceptable(s.record(s.app("1.0")))
	rings = []*trust.Keyring{without}
	if err := s.f.acceptable(s.record(s.app("1.0"))); !errors.Is(err, acproxy.ErrRefused) {
		t.Errorf("by keys without the one that signed: %v", err)
	}
}

// TestWhatCouldNotBeDecidedIsDecidedAgain: an error that is no verdict isn't remembered.
func TestWhatCouldNotBeDecidedIsDecidedAgain(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	rec := s.record(s.app("1.0"))
	broken := rec
	broken.Hashed = cache.HashesOf(map[string][]byte{"SHA-512": []byte("damaged")})
	if err := s.f.acceptable(broken); err == nil || errors.Is(err, acproxy.ErrRefused) {
		t.Fatalf("a damaged hash: %v", err)
	}
	if err := s.f.acceptable(rec); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// TestLostBytesAreFetchedAgain, and the one who notices is none the worse for it.
func TestLostBytesAreFetchedAgain(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	s.want(s.app("1.0"), blob, Miss)
	s.await("the inspection", func(d Decision) bool { return d.Event == EventInspected })
	s.eventually("the inspection is noted", func() bool { return s.record(s.app("1.0")).Inspected })
	rec := s.record(s.app("1.0"))
	path := filepath.Join(s.dir, "blobs", rec.Digest.Hex()[:2], rec.Digest.Hex())
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	if err := os.Truncate(path, 10); err != nil {
		t.Fatal(err)
	}
	s.pub.Stop()
	s.wantError(s.app("1.0"), acproxy.ErrPublisher, "publisher-unreachable")
	_, err := s.f.ByImageID(t.Context(), rec.ImageID.String()[len("sha512-"):], everyName)
	wantError(t, err, acproxy.ErrNotFound, "blob-gone")
}

// TestWhatIsRemovedInTheMomentIsNotAbsent: that the store lost it in between is not the publisher's word.
func TestWhatIsRemovedInTheMomentIsNotAbsent(t *testing.T) {
	s := newScene(t)
	s.want(s.app("1.0"), s.publish(spec("1.0", 100)), Miss)
	s.idle()
	digest := s.record(s.app("1.0")).Digest
	if err := s.store.Delete(t.Context(), digest); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.f.alsoAnswers(t.Context(), s.app(""), digest, ""), acproxy.ErrBusy, "removed")
}

func TestRejudgeIsNotStoppedByADeletion(t *testing.T) {
	s := newScene(t)
	var records []cache.Record
	for _, version := range []string{"1.0", "2.0"} {
		s.want(s.app(version), s.publish(spec(version, 100)), Miss)
		s.idle()
		records = append(records, s.record(s.app(version)))
	}
	if err := s.store.Delete(t.Context(), records[0].Digest); err != nil {
		t.Fatal(err)
	}
	if outcomes, _, err := s.f.judgeAll(t.Context(), records); err != nil || outcomes[0] != nil || outcomes[1] != nil {
		t.Errorf("judgeAll = %v, %v", outcomes, err)
	}
}

func TestDecisionsAreTold(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 1000))
	if _, _, err := s.getFor(Request{Ref: s.app("1.0"), Client: "10.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	said := s.await("the acceptance", func(d Decision) bool { return d.Event == EventAccepted })
	if said.Outcome != "accepted" || said.Ref != s.app("1.0") || said.Client != "10.0.0.1" || len(said.Signers) != 1 || said.Source == "" || said.Policy == "" || said.Digest.IsZero() {
		t.Errorf("told %+v of %d bytes", said, len(blob))
	}
	inspected := s.await("the inspection", func(d Decision) bool { return d.Event == EventInspected })
	if id, err := acitest.ID(blob); err != nil || inspected.ImageID != id {
		t.Errorf("told %+v, %v", inspected, err)
	}
	s.publishAs("example.com/app", labels("2.0"), acitest.Must(t, spec("2.0", 10)), strangerKey())
	s.wantError(s.app("2.0"), acproxy.ErrRefused, "unknown-key")
	if refused := s.await("the refusal", func(d Decision) bool { return d.Event == EventRefused }); refused.Outcome != "unknown-key" || refused.Detail == "" {
		t.Errorf("told %+v", refused)
	}
}

// TestWhoHasTheImageGetsNoFile: there is nothing to send, so nothing is opened; and nobody is told "you have it" of what must not be served.
func TestWhoHasTheImageGetsNoFile(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0", 0))
	s.want(s.app("1.0"), blob, Miss)
	s.idle()
	ask := func(has string) *Image {
		t.Helper()
		im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0"), Has: has})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = im.Close() })
		return im
	}
	whole := ask("")
	if whole.File() == nil {
		t.Fatal("who has nothing got no file")
	}
	if im := ask(whole.ETag); im.File() != nil || im.Arriving() || im.ETag != whole.ETag || im.Size != int64(len(blob)) || im.Record == nil {
		t.Errorf("who has it got %+v with the file %v", im, im.File())
	}
	for _, other := range []string{`"another"`, "W/" + whole.ETag, "*"} {
		if ask(other).File() == nil {
			t.Errorf("who has %s got no file", other)
		}
	}
	if err := s.store.Quarantine(t.Context(), whole.Record.Digest, "outside-rootfs", "it was found out"); err != nil {
		t.Fatal(err)
	}
	_, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0"), Has: whole.ETag})
	wantError(t, err, acproxy.ErrRefused, "quarantined")
}

func everyName(string) bool { return true }

// TestEveryHitIsAUse: who answers with what is held says so, however it was found.
func TestEveryHitIsAUse(t *testing.T) {
	for _, test := range []struct {
		name string
		find func(s *scene, blob []byte)
	}{
		{"held", func(s *scene, blob []byte) { s.want(s.app("1.0.0"), blob, Hit) }},
		{"latest, whose signature shows that it is held", func(s *scene, blob []byte) { s.want(s.app(""), blob, Hit) }},
		{"by the only one that fits", func(s *scene, blob []byte) {
			s.pub.Stop()
			s.want(s.app(""), blob, Stale)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0.0", 1000))
			s.want(s.app("1.0.0"), blob, Miss)
			s.idle()
			s.clock.advance(time.Hour)
			test.find(s, blob)
			if rec, err := s.store.Record(s.record(s.app("1.0.0")).Digest); err != nil || rec.Used.Before(s.clock.Now()) {
				t.Errorf("Record says that it was used at %v, %v; want %v", rec.Used, err, s.clock.Now())
			}
		})
	}
}

// ailing is a store that can note nothing while it is ill.
type ailing struct {
	cache.Store
	ill atomic.Bool
}

func (a *ailing) Update(ctx context.Context, digest acproxy.Digest, change func(*cache.Record) error) error {
	if a.ill.Load() {
		return errors.New("the disk is broken")
	}
	return a.Store.Update(ctx, digest, change)
}

// TestInspectionsThatCanNotBeNotedAreMadeAgain, without a restart.
func TestInspectionsThatCanNotBeNotedAreMadeAgain(t *testing.T) {
	var store ailing
	store.ill.Store(true)
	s := newScene(t, func(c *Config) { store.Store, c.Store = c.Store, &store })
	s.want(s.app("1.0"), s.publish(spec("1.0", 1000)), Miss)
	owed := func() int {
		s.f.mu.Lock()
		defer s.f.mu.Unlock()
		return len(s.f.owed)
	}
	s.eventually("the inspection has gone wrong", func() bool { return owed() == 1 })
	s.f.InspectAgain(t.Context())
	if rec := s.record(s.app("1.0")); rec.Inspected || owed() != 1 {
		t.Errorf("it could not be noted, and the record is %+v", rec)
	}
	store.ill.Store(false)
	s.f.InspectAgain(t.Context())
	if rec := s.record(s.app("1.0")); !rec.Inspected || rec.ImageID.IsZero() || owed() != 0 {
		t.Errorf("the record is %+v", rec)
	}
	// What is gone is owed to nobody.
	store.ill.Store(true)
	s.want(s.app("2.0"), s.publish(spec("2.0", 1000)), Miss)
	s.eventually("the inspection has gone wrong", func() bool { return owed() == 1 })
	if err := s.store.Delete(t.Context(), s.record(s.app("2.0")).Digest); err != nil {
		t.Fatal(err)
	}
	s.f.InspectAgain(t.Context())
	if owed() != 0 {
		t.Error("an image that is gone is still to be inspected")
	}
}
