package fetch

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
)

// spoil changes a bit of an image's bytes behind the store's back and has it notice.
func (s *scene) spoil(ref acproxy.Ref) cache.Record {
	s.t.Helper()
	rec := s.record(ref)
	digits := rec.Digest.Hex()
	path := filepath.Join(s.dir, "blobs", digits[:2], digits)
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	// In its place: the inspection, which may not be over yet, must not find a file without bytes.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	at := len(b) / 2
	_, err = f.WriteAt([]byte{b[at] ^ 1}, int64(at))
	if err = errors.Join(err, f.Close()); err != nil {
		s.t.Fatal(err)
	}
	sum, err := s.store.Scrub(s.t.Context(), cache.ScrubOptions{})
	if err != nil || sum.Problems != 1 {
		s.t.Fatalf("Scrub = %+v, %v, want one problem", sum, err)
	}
	if rec, err = s.store.Record(rec.Digest); err != nil || !rec.Lost() {
		s.t.Fatalf("after the scrub the record is %v %v, %v", rec.State, rec.Code, err)
	}
	return rec
}

// wantMended checks what Mend comes to.
func (s *scene) wantMended(lost, mended int) {
	s.t.Helper()
	if got, err := s.f.Mend(s.t.Context()); err != nil || got != (Mended{Lost: lost, Mended: mended}) {
		s.t.Errorf("Mend = %+v, %v, want %d lost and %d mended", got, err, lost, mended)
	}
}

func TestLostImagesAreFetchedAgain(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0.0", 200_000))
	ref := s.app("1.0.0")
	s.want(ref, blob, Miss)
	s.idle()
	s.wantMended(0, 0)
	rec := s.record(ref)
	if err := s.store.Update(t.Context(), rec.Digest, func(r *cache.Record) error { r.Pinned = true; return nil }); err != nil {
		t.Fatal(err)
	}
	s.spoil(ref)
	s.wantMended(1, 1)
	s.want(ref, blob, Hit)
	if rec := s.record(ref); !rec.Pinned || rec.Quarantined() {
		t.Errorf("the record is pinned %v, %v", rec.Pinned, rec.State)
	}
	s.wantRequests(2, 2)
	s.wantMended(0, 0)
}

// TestLostImagesStayWhileOffline wants nobody to be dialled.
func TestLostImagesStayWhileOffline(t *testing.T) {
	for name, offline := range map[string]func(*Config){
		"altogether":   func(c *Config) { c.Offline = true },
		"for a prefix": policies(Policy{}, Policy{Prefix: "example.com", Offline: true}),
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0.0", 100_000))
			ref := s.app("1.0.0")
			s.want(ref, blob, Miss)
			s.idle()
			s.spoil(ref)
			s.change = append(s.change, offline)
			s.restart()
			s.mu.Lock()
			s.noDial = true
			s.mu.Unlock()
			s.wantMended(1, 0)
			s.mu.Lock()
			s.noDial = false
			s.mu.Unlock()
			s.change = nil
			s.restart()
			s.wantMended(1, 1)
			s.want(ref, blob, Hit)
		})
	}
}

func TestLostImageThatIsGone(t *testing.T) {
	s := newScene(t)
	blob := s.publish(spec("1.0.0", 100_000))
	ref := s.app("1.0.0")
	s.want(ref, blob, Miss)
	s.idle()
	rec := s.spoil(ref)
	s.pub.Stop()
	s.wantMended(1, 0)
	if now, err := s.store.Record(rec.Digest); err != nil || !now.Lost() {
		t.Errorf("Record = %v %v, %v, want it lost as before", now.State, now.Code, err)
	}
}

// TestLostImageThatHasChanged: that the disk has lost a version makes no room for another image with its name, unless policy follows or the operator forgets
// the one that was lost.
func TestLostImageThatHasChanged(t *testing.T) {
	for _, test := range []struct {
		name   string
		policy OnChange
		known  bool // the image ID of what was lost
		change func(*acitest.Spec)
		taken  bool
	}{
		{"refused", RefuseChange, true, func(sp *acitest.Spec) { sp.Seed = 1 }, false},
		{"refused, lost before it was inspected", RefuseChange, false, func(sp *acitest.Spec) { sp.Seed = 1 }, false},
		{"followed", FollowChange, true, func(sp *acitest.Spec) { sp.Seed = 1 }, true},
		{"the same image, compressed in another way", RefuseChange, true, func(sp *acitest.Spec) { sp.Compression = acitest.XZ }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, policies(Policy{OnChange: test.policy, TTL: time.Minute, MaxStale: time.Hour}))
			sp, ref := spec("1.0.0", 100_000), s.app("1.0.0")
			s.want(ref, s.publish(sp), Miss)
			s.idle()
			s.eventually("the inspection is noted", func() bool { return s.record(ref).Inspected })
			rec := s.spoil(ref)
			if !test.known {
				err := s.store.Update(t.Context(), rec.Digest, func(r *cache.Record) error { r.Inspected, r.ImageID = false, acproxy.ImageID{}; return nil })
				if err != nil {
					t.Fatal(err)
				}
			}
			test.change(&sp)
			other := s.publish(sp)
			err := s.f.Refetch(t.Context(), rec)
			if now, err := s.store.Record(rec.Digest); err != nil || !now.Lost() {
				t.Errorf("Record = %v %v, %v, want it lost as before", now.State, now.Code, err)
			}
			if test.taken {
				wantError(t, err, acproxy.ErrNotFound, codeBlobGone)
				s.want(ref, other, Hit)
				return
			}
			wantError(t, err, acproxy.ErrRefused, "changed-upstream")
			if !strings.Contains(err.Error(), "acproxy images delete "+rec.Digest.String()) || !strings.Contains(err.Error(), "on_change: follow") {
				t.Errorf("the refusal doesn't say what can be done: %v", err)
			}
			s.await("the refusal", func(d Decision) bool {
				return d.Event == EventRefused && d.Outcome == "changed-upstream" && d.Ref == ref
			})
			s.idle()
			s.clock.advance(time.Hour)
			for _, ref := range []acproxy.Ref{ref, s.app("")} {
				if got, _, err := s.get(ref); acproxy.Code(err) != "changed-upstream" || len(got) > len(other)-DefaultHoldBack {
					t.Errorf("%v = %d bytes, %v", ref, len(got), err)
				}
				s.idle()
			}
			var hours []int
			for hour := range 80 {
				before, _ := s.requests()
				s.wantMended(1, 0)
				s.idle()
				if now, _ := s.requests(); now > before {
					hours = append(hours, hour)
				}
				s.clock.advance(time.Hour)
			}
			// The first time it is told what is remembered.
			if want := []int{2, 6, 14, 30, 54, 78}; !slices.Equal(hours, want) {
				t.Errorf("Mend asks for it after %v hours, want %v", hours, want)
			}
			if err := s.store.Delete(t.Context(), rec.Digest); err != nil {
				t.Fatal(err)
			}
			s.clock.advance(time.Hour)
			s.want(ref, other, Miss)
		})
	}
}

// TestCarriedInPlaceOfALostVersion is the same for an image that somebody brings, and for one that is held under another ref.
func TestCarriedInPlaceOfALostVersion(t *testing.T) {
	s := newIsolated(t)
	now := s.clock.Now()
	first, firstBlob := s.carry(spec("1", 100), goodKey(), now.Add(-50*time.Minute))
	s.take(first, firstBlob)
	if err := s.store.Quarantine(t.Context(), first.Digest, cache.CodeCorrupt, "a test says so"); err != nil {
		t.Fatal(err)
	}
	sp := spec("1", 100)
	sp.Seed = 7
	other, otherBlob := s.carry(sp, goodKey(), now.Add(-10*time.Minute))
	_, err := s.f.Take(t.Context(), other, from(otherBlob))
	wantError(t, err, acproxy.ErrRefused, "changed-upstream")
	s.f.Change(by(Policy{OnChange: FollowChange}))
	s.take(other, otherBlob)
	if err := s.store.Point(t.Context(), cache.Resolution{Ref: s.app("1"), Digest: first.Digest}); err != nil {
		t.Fatal(err)
	}
	s.f.Change(by(Policy{}))
	_, err = s.f.Take(t.Context(), other, s.unread)
	wantError(t, err, acproxy.ErrRefused, "changed-upstream")
}

// TestLostImagesWaitForFewOthers has images mended while others stall, as many as may be under way at once, and no more.
func TestLostImagesWaitForFewOthers(t *testing.T) {
	for _, stalled := range []int{mendAtOnce - 1, mendAtOnce} {
		t.Run(fmt.Sprintf("%d stall", stalled), func(t *testing.T) {
			s := newScene(t)
			for i := range stalled + 1 {
				ref := s.app(fmt.Sprintf("%d.0", i))
				s.want(ref, s.publish(spec(ref.Version(), 100_000)), Miss)
				s.idle()
				s.eventually("the inspection is noted", func() bool { return s.record(ref).Inspected })
				rec := s.spoil(ref)
				// Those that are pinned come first.
				if err := s.store.Update(t.Context(), rec.Digest, func(r *cache.Record) error { r.Pinned = i < stalled; return nil }); err != nil {
					t.Fatal(err)
				}
			}
			last := s.app(fmt.Sprintf("%d.0", stalled))
			trouble := s.pub.Misbehave(func(r *http.Request) bool {
				return strings.HasSuffix(r.URL.Path, ".aci") && !strings.Contains(r.URL.Path, "/"+last.Version()+"/")
			}, publisher.Fault{StallAfter: publisher.At(50_000)})
			ended := make(chan Mended, 1)
			// Ends with Mend; waited for below.
			go func() {
				got, err := s.f.Mend(t.Context())
				if err != nil {
					t.Error(err)
				}
				ended <- got
			}()
			s.eventually("the stall of those that come first", func() bool { return trouble.Applied() == stalled })
			if stalled < mendAtOnce {
				s.eventually("the mending of the last one", func() bool { _, _, err := s.store.Resolve(t.Context(), last); return err == nil })
			} else if flights := s.f.Flights(); len(flights) != stalled {
				t.Errorf("under way are %+v, want those that stall", flights)
			}
			trouble.Release()
			if got := <-ended; got != (Mended{Lost: stalled + 1, Mended: stalled + 1}) {
				t.Errorf("Mend = %+v", got)
			}
		})
	}
}
