package fetch

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
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
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o640); err != nil {
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

// TestLostImageThatHasChanged wants the image that was lost to stay so if its publisher has another one in its place.
func TestLostImageThatHasChanged(t *testing.T) {
	s := newScene(t)
	ref := s.app("1.0.0")
	s.want(ref, s.publish(spec("1.0.0", 100_000)), Miss)
	s.idle()
	rec := s.spoil(ref)
	other := s.publish(spec("1.0.0", 120_000))
	err := s.f.Refetch(t.Context(), rec)
	wantError(t, err, acproxy.ErrNotFound, "blob-gone")
	s.want(ref, other, Hit)
	if now, err := s.store.Record(rec.Digest); err != nil || !now.Lost() {
		t.Errorf("Record = %v %v, %v, want it lost as before", now.State, now.Code, err)
	}
}
