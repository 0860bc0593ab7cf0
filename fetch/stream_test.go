package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/cache"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
)

// fullStore is a store without room for another image.
type fullStore struct{ cache.Store }

func (fullStore) Begin(context.Context, cache.Arrival) (*cache.Partial, error) {
	return nil, &acproxy.Error{Kind: acproxy.ErrNoSpace, Code: "quota", Detail: "there is no room"}
}

func full(c *Config) { c.Store = fullStore{c.Store} }

// pass reads an image that is passed on.
func (s *scene) pass(ref acproxy.Ref) (got []byte, status Status, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	im, err := s.f.Image(ctx, Request{Ref: ref, Client: "somebody"})
	if err != nil {
		return nil, 0, err
	}
	defer im.Close()
	if im.Passage() == nil {
		return nil, im.Status, errors.New("it is not passed on")
	}
	got, err = io.ReadAll(im.Passage())
	return got, im.Status, err
}

func TestWithoutRoomAnImageIsPassedOn(t *testing.T) {
	for _, compression := range []string{acitest.None, acitest.Gzip} {
		s := newScene(t, policies(Policy{OnFull: StreamFull}), full)
		sp := spec("1.0", badSize)
		sp.Compression = compression
		blob := s.publish(sp)
		sig, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0"), Client: "somebody"})
		if err != nil || sig.Status != Uncached || len(sig.Bytes) == 0 {
			t.Errorf("Signature = %v with %d bytes, %v", sig.Status, len(sig.Bytes), err)
		}
		for range 2 {
			got, status, err := s.pass(s.app("1.0"))
			if err != nil || status != Uncached || !bytes.Equal(got, blob) {
				t.Errorf("%d bytes (right: %v), %v, %v", len(got), bytes.Equal(got, blob), status, err)
			}
		}
		s.await("the passing", func(d Decision) bool {
			return d.Event == EventPassed && d.Ref == s.app("1.0") && len(d.Signers) == 1 && d.ImageID == idOf(t, blob) && d.Digest == sha256.Sum256(blob)
		})
		s.idle()
		s.wantNothingKept()
	}
}

// TestNoUnverifiedBytePassesWhole is promise 1 of the design for images that aren't kept.
func TestNoUnverifiedBytePassesWhole(t *testing.T) {
	for _, test := range badImages() {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, policies(Policy{OnFull: StreamFull}), full)
			test.setUp(s)
			got, _, err := s.pass(s.app("1.0"))
			if err == nil || acproxy.KindOf(err) == nil || errors.Is(err, acproxy.ErrNoSpace) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			// The inspection goes along here, and may see first what the signature would tell at the end.
			first := test.code == "bad-signature" && isViolation(err)
			if test.code != "" && test.code != "image-too-large" && acproxy.Code(err) != test.code && !first {
				t.Errorf("the error is %v (code %q), want %q", err, acproxy.Code(err), test.code)
			}
			if most := badBytes + 512 - DefaultHoldBack; test.code != "image-too-large" && len(got) > most {
				t.Errorf("%d bytes were delivered, want at most %d", len(got), most)
			}
			s.idle()
			s.wantNothingKept()
		})
	}
}

// TestAChangedVersionIsNotPassedOn: what would not be kept is not passed on either.
func TestAChangedVersionIsNotPassedOn(t *testing.T) {
	for _, policy := range []OnChange{RefuseChange, FollowChange} {
		s := newScene(t, policies(Policy{OnFull: StreamFull, OnChange: policy}))
		sp, ref := spec("1.0", badSize), s.app("1.0")
		s.want(ref, s.publish(sp), Miss)
		s.idle()
		s.spoil(ref)
		s.change = append(s.change, full)
		s.restart()
		sp.Seed = 1
		other := s.publish(sp)
		got, _, err := s.pass(ref)
		if policy == FollowChange {
			if err != nil || !bytes.Equal(got, other) {
				t.Errorf("followed: %d bytes, %v", len(got), err)
			}
			continue
		}
		wantError(t, err, acproxy.ErrRefused, "changed-upstream")
		if len(got) > len(other)-DefaultHoldBack {
			t.Errorf("%d bytes were delivered of %d", len(got), len(other))
		}
		s.await("the refusal", func(d Decision) bool { return d.Event == EventRefused && d.Outcome == "changed-upstream" })
	}
}

func TestWhatIsNotPassedOn(t *testing.T) {
	for name, test := range map[string]struct {
		policy Policy
		signed bool
		code   string
	}{
		"policy refuses":              {Policy{}, true, "quota"},
		"what is to be checked first": {Policy{OnFull: StreamFull, Delivery: VerifyFirst}, true, "quota"},
		"what has no signature":       {Policy{OnFull: StreamFull, Trust: trust.Policy{Signature: trust.Optional}}, false, "no-room-to-check"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, policies(test.policy), full)
			blob := acitest.Must(t, spec("1.0", badSize))
			key := goodKey()
			if !test.signed {
				key = nil
			}
			s.publishAs("example.com/app", labels("1.0"), blob, key)
			s.wantError(s.app("1.0"), acproxy.ErrNoSpace, test.code)
		})
	}
}

// TestPassagesWaitForTheirTurn: what is passed on counts as a flight, for as long as it goes on.
func TestPassagesWaitForTheirTurn(t *testing.T) {
	s := newScene(t, policies(Policy{OnFull: StreamFull}), full, func(c *Config) { c.MaxFlights, c.MaxQueue = 1, -1 })
	blob := s.publish(spec("1.0", badSize))
	s.publish(spec("2.0", badSize))
	s.pub.Misbehave(publisher.URL("*2.0*.aci"), publisher.Fault{})
	im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	s.wantError(s.app("2.0"), acproxy.ErrBusy, "queue-full")
	if got, err := io.ReadAll(im.Passage()); err != nil || !bytes.Equal(got, blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := im.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
	if got, _, err := s.pass(s.app("2.0")); err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// Who leaves midway gives the place back too.
	im, err = s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, im.Passage(), 1000); err != nil {
		t.Error(err)
	}
	if err := im.Inspected(t.Context()); !errors.Is(err, acproxy.ErrNoSpace) || fmt.Sprint(acproxy.Code(err)) != "no-room-to-check" {
		t.Errorf("Inspected = %v", err)
	}
	_ = im.Close()
	if _, _, err := s.pass(s.app("2.0")); err != nil {
		t.Error(err)
	}
}
