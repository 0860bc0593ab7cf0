package fetch

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acproxy/acproxy"
	"github.com/acproxy/acproxy/internal/aci"
	"github.com/acproxy/acproxy/internal/aci/acitest"
	"github.com/acproxy/acproxy/test/publisher"
	"github.com/acproxy/acproxy/trust"
	"github.com/acproxy/acproxy/trust/trusttest"
)

// A badImage is an image that must never complete.
type badImage struct {
	name  string
	setUp func(s *scene)
	kind  error
	code  string
	asked bool // for the image: it takes its bytes to see what is wrong
}

const (
	badSize  = 400 << 10
	badBytes = badSize + 6*512 // as a tar: the headers, the manifest, the end
)

// cut publishes a good image whose publisher breaks off, in a scene in which it is not asked again.
func cut(f publisher.Fault) func(s *scene) {
	return func(s *scene) {
		s.f.cfg.Retries = -1
		fault(f)(s)
	}
}

// fault publishes a good image that comes with a fault.
func fault(f publisher.Fault) func(s *scene) {
	return func(s *scene) {
		s.publish(spec("1.0", badSize))
		s.pub.Misbehave(publisher.URL("*.aci"), f)
	}
}

// signedBy publishes an image signed by a key that is trusted for it.
func signedBy(opts trusttest.Options, sign trusttest.SignOptions, then func(*trusttest.Key) error) func(s *scene) {
	return func(s *scene) {
		s.t.Helper()
		key := mustKey(opts)
		blob := acitest.Must(s.t, spec("1.0", badSize))
		signature, err := key.Sign(bytes.NewReader(blob), sign)
		if err == nil && then != nil {
			err = then(key)
		}
		if err == nil {
			_, err = s.pub.Add(publisher.Image{Name: "example.com/app", Labels: labels("1.0"), ACI: blob, Signature: signature})
		}
		if err != nil {
			s.t.Fatal(err)
		}
		s.trust("example.com", key)
	}
}

// content publishes bytes as example.com/app:1.0, signed well.
func content(make func(s *scene) []byte) func(s *scene) {
	return func(s *scene) { s.publishAs("example.com/app", labels("1.0"), make(s), goodKey()) }
}

func image(change func(*acitest.Spec)) func(s *scene) {
	return content(func(s *scene) []byte {
		sp := spec("1.0", badSize)
		change(&sp)
		return acitest.Must(s.t, sp)
	})
}

func signature(data string) func(s *scene) {
	return func(s *scene) {
		if _, err := s.pub.Add(publisher.Image{
			Name: "example.com/app", Labels: labels("1.0"), ACI: acitest.Must(s.t, spec("1.0", badSize)), Signature: []byte(data),
		}); err != nil {
			s.t.Fatal(err)
		}
	}
}

func badImages() []badImage {
	edDSA := trusttest.Options{Algorithm: trusttest.EdDSA}
	return []badImage{
		{"a bit in the middle flipped", fault(publisher.Fault{FlipBitAt: publisher.At(badSize / 2)}), acproxy.ErrRefused, "bad-signature", true},
		{"a bit of the last byte flipped", fault(publisher.Fault{FlipBitAt: publisher.At(badBytes - 1)}), acproxy.ErrRefused, "bad-signature", true},
		{"cut before the length that was claimed", cut(publisher.Fault{TruncateAfter: publisher.At(badSize / 2)}), acproxy.ErrPublisher, "", true},
		{"cut one byte before the end", cut(publisher.Fault{TruncateAfter: publisher.At(badBytes - 1), NoContentLength: true}), acproxy.ErrPublisher, "", true},
		{"reset", cut(publisher.Fault{ResetAfter: publisher.At(badSize / 2)}), acproxy.ErrPublisher, "", true},
		{"another image under the signature", fault(publisher.Fault{Body: acitest.Must(fatal{}, acitest.Spec{
			Name: "example.com/app", Labels: labels("1.0"), RootfsSize: badSize, Compression: acitest.None, Seed: 1,
		})}), acproxy.ErrRefused, "bad-signature", true},
		{"spaces without end after the image", func(s *scene) {
			s.f.cfg.MaxImageSize = 1 << 20
			fault(publisher.Fault{EndlessBody: true})(s)
		}, acproxy.ErrRefused, "image-too-large", true},
		{"Content-Encoding", fault(publisher.Fault{Header: http.Header{"Content-Encoding": {"gzip"}}}), acproxy.ErrPublisher, "content-encoding", true},
		{"202 for the image", fault(publisher.Fault{Status: http.StatusAccepted}), acproxy.ErrPublisher, "publisher-status", true},
		{"500 for the image", fault(publisher.Fault{Status: http.StatusInternalServerError}), acproxy.ErrPublisher, "publisher-status", true},
		{"206 for the image", fault(publisher.Fault{Status: http.StatusPartialContent, Body: []byte("part")}), acproxy.ErrPublisher, "publisher-status", true},
		{"304 to a request without conditions", fault(publisher.Fault{Status: http.StatusNotModified}), acproxy.ErrPublisher, "publisher-status", true},
		{"404 for the image", fault(publisher.Fault{Status: http.StatusNotFound}), acproxy.ErrNotFound, "no-image-found", true},

		{"signed by a stranger", func(s *scene) {
			s.publishAs("example.com/app", labels("1.0"), acitest.Must(s.t, spec("1.0", badSize)), strangerKey())
		}, acproxy.ErrRefused, "unknown-key", false},
		{"signed by the key of a neighbour", func(s *scene) {
			key := mustKey(edDSA)
			s.trust("example.com/apple", key)
			s.publishAs("example.com/app", labels("1.0"), acitest.Must(s.t, spec("1.0", badSize)), key)
		}, acproxy.ErrRefused, "unknown-key", false},
		{"the signature of another image", func(s *scene) {
			other, err := goodKey().Sign(bytes.NewReader([]byte("another image")), trusttest.SignOptions{})
			if err != nil {
				s.t.Fatal(err)
			}
			signature(string(other))(s)
		}, acproxy.ErrRefused, "bad-signature", true},
		{"an expired key", signedBy(trusttest.Options{Algorithm: trusttest.EdDSA, Created: time.Now().Add(-48 * time.Hour), Expires: time.Now().Add(-time.Hour)},
			trusttest.SignOptions{Time: time.Now().Add(-24 * time.Hour)}, nil), acproxy.ErrRefused, "key-expired", false},
		{"an expired signature", signedBy(edDSA, trusttest.SignOptions{Time: time.Now().Add(-time.Minute), Lifetime: time.Second}, nil),
			acproxy.ErrRefused, "signature-expired", false},
		{"a revoked key", signedBy(edDSA, trusttest.SignOptions{}, (*trusttest.Key).Revoke), acproxy.ErrRefused, "key-revoked", false},
		{"a SHA-1 signature", signedBy(edDSA, trusttest.SignOptions{Hash: crypto.SHA1}, nil), acproxy.ErrRefused, "weak-algorithm", false},
		{"an empty signature", signature("\n"), acproxy.ErrRefused, "malformed-signature", false},
		{"no signature", func(s *scene) {
			s.publishAs("example.com/app", labels("1.0"), acitest.Must(s.t, spec("1.0", badSize)), nil)
		}, acproxy.ErrRefused, "unsigned", false},
		{"a signature without end", func(s *scene) {
			s.publish(spec("1.0", badSize))
			s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{EndlessBody: true})
		}, acproxy.ErrPublisher, "signature-too-large", false},

		{"another name in the manifest", image(func(sp *acitest.Spec) { sp.Name = "example.com/apple" }), acproxy.ErrPublisher, "wrong-name", true},
		{"another version in the manifest", image(func(sp *acitest.Spec) { sp.Labels = labels("2.0") }), acproxy.ErrPublisher, "wrong-labels", true},
		{"no os in the manifest", image(func(sp *acitest.Spec) { sp.Labels = map[string]string{"version": "1.0", "arch": "amd64"} }),
			acproxy.ErrPublisher, "wrong-labels", true},
		{"another name in a manifest that comes last", image(func(sp *acitest.Spec) { sp.Name, sp.ManifestLast = "example.com/apple", true }),
			acproxy.ErrPublisher, "wrong-name", true},
		{"no manifest", image(func(sp *acitest.Spec) { sp.NoManifest = true }), acproxy.ErrPublisher, aci.RuleNoManifest, true},
		{"an entry outside of rootfs before the manifest", image(func(sp *acitest.Spec) { sp.Before = []acitest.Entry{acitest.File("etc/passwd", "")} }),
			acproxy.ErrPublisher, aci.RuleOutsideRootfs, true},
		{"no image at all", content(func(*scene) []byte { return bytes.Repeat([]byte("nothing"), 50_000) }), acproxy.ErrPublisher, aci.RuleNotAnImage, true},
		{"nothing at all", content(func(*scene) []byte { return []byte{} }), acproxy.ErrPublisher, aci.RuleTruncated, true},
	}
}

// fatal lets test material be made before there is a test.
type fatal struct{}

func (fatal) Helper()               {}
func (fatal) Fatalf(string, ...any) { panic("test material can't be made") }

// TestNoUnverifiedByteCompletes is promise 1 of the design.
func TestNoUnverifiedByteCompletes(t *testing.T) {
	for _, delivery := range []Delivery{CutThrough, VerifyFirst} {
		for _, test := range badImages() {
			t.Run([]string{"cut-through: ", "verify-first: "}[delivery]+test.name, func(t *testing.T) {
				s := newScene(t, policies(Policy{Delivery: delivery}))
				test.setUp(s)
				ref := s.app("1.0")
				got, _, err := s.get(ref)
				if delivery == VerifyFirst && acproxy.Code(err) == aci.RuleTrailingBytes {
					// The inspection runs beside the download then, and may be first to see that it doesn't end.
					test.kind, test.code = acproxy.ErrPublisher, ""
				}
				if test.code == "" {
					test.code = acproxy.Code(err)
				}
				wantError(t, err, test.kind, test.code)
				// One of them has an entry more.
				endless := test.code == "image-too-large" || test.code == aci.RuleTrailingBytes
				if most := badBytes + 512 - DefaultHoldBack; !endless && len(got) > most {
					t.Errorf("%d bytes were delivered, want at most %d", len(got), most)
				}
				if delivery == VerifyFirst && len(got) > 0 {
					t.Errorf("%d bytes were delivered, want none", len(got))
				}
				if images := slices.DeleteFunc(s.pub.Requests(), func(r publisher.Request) bool { return r.Method == http.MethodHead || !publisherImage(r) }); len(images) > 0 != test.asked {
					t.Errorf("the image was asked for: %v, want %v", images, test.asked)
				}
				s.idle()
				if strings.HasPrefix(test.name, "cut") || test.name == "reset" {
					// The rest may still come.
					s.wantNothingHeld()
				} else {
					s.wantNothingKept()
				}
				refusals, err := s.store.Refusals()
				if refused := test.kind == acproxy.ErrRefused; err != nil || refused && (len(refusals) != 1 || refusals[0].Code != test.code || refusals[0].Ref != ref) {
					t.Errorf("Refusals = %+v, %v, want one for %q", refusals, err, test.code)
				}
			})
		}
	}
}

func publisherImage(r publisher.Request) bool {
	return len(r.Path) > 4 && r.Path[len(r.Path)-4:] == ".aci"
}

// TestWhatIsWrongIsSaidWheneverItIsFound: a small image has arrived before its inspection has found out what is wrong with it, or in the same
// moment, and the reason must not get lost between the two.
func TestWhatIsWrongIsSaidWheneverItIsFound(t *testing.T) {
	s := newScene(t, func(c *Config) { c.NegativeTTL = -1 })
	blob := acitest.Must(t, acitest.Spec{Name: "example.com/apple", Labels: labels("1.0")})
	s.publishAs("example.com/app", labels("1.0"), blob, goodKey())
	for range 150 {
		s.wantError(s.app("1.0"), acproxy.ErrPublisher, "wrong-name")
	}
}

func TestSizeLimitAtItsEdge(t *testing.T) {
	size := int64(len(acitest.Must(t, spec("1.0", badSize))))
	for _, test := range []struct {
		name  string
		limit int64
		fault publisher.Fault
		good  bool
	}{
		{"the limit, claimed", size, publisher.Fault{}, true},
		{"the limit, not claimed", size, publisher.Fault{NoContentLength: true}, true},
		{"one byte more, claimed", size - 1, publisher.Fault{}, false},
		{"one byte more, not claimed", size - 1, publisher.Fault{NoContentLength: true}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, func(c *Config) { c.MaxImageSize = test.limit })
			blob := s.publish(spec("1.0", badSize))
			s.pub.Misbehave(publisher.URL("*.aci"), test.fault)
			if test.good {
				s.want(s.app("1.0"), blob, Miss)
				return
			}
			s.wantError(s.app("1.0"), acproxy.ErrRefused, "image-too-large")
			s.idle()
			s.wantNothingKept()
		})
	}
}

func TestSignatureLimitAtItsEdge(t *testing.T) {
	for _, test := range []struct {
		name string
		less int64
		good bool
	}{{"the limit", 0, true}, {"one byte more", 1, false}} {
		t.Run(test.name, func(t *testing.T) {
			blob := acitest.Must(t, spec("1.0", 0))
			signature, err := goodKey().Sign(bytes.NewReader(blob), trusttest.SignOptions{})
			if err != nil {
				t.Fatal(err)
			}
			s := newScene(t, func(c *Config) { c.MaxSignatureSize = int64(len(signature)) - test.less })
			if _, err := s.pub.Add(publisher.Image{Name: "example.com/app", Labels: labels("1.0"), ACI: blob, Signature: signature}); err != nil {
				t.Fatal(err)
			}
			if test.good {
				s.want(s.app("1.0"), blob, Miss)
				return
			}
			s.wantError(s.app("1.0"), acproxy.ErrPublisher, "signature-too-large")
		})
	}
}

// TestTheEndIsHeldBack stops the publisher at every place that matters, and asks for more than may be had.
func TestTheEndIsHeldBack(t *testing.T) {
	size := int64(len(acitest.Must(t, spec("1.0", badSize))))
	for _, test := range []struct {
		name    string
		unknown bool // how long it is
		at, may int64
	}{
		{"nothing", false, 0, 0},
		{"a byte", false, 1, 1},
		{"half of it", false, size / 2, size / 2},
		{"all but what is held back", false, size - DefaultHoldBack, size - DefaultHoldBack},
		{"one byte more", false, size - DefaultHoldBack + 1, size - DefaultHoldBack},
		{"all but the last byte", false, size - 1, size - DefaultHoldBack},
		{"of unknown length, less than is held back", true, DefaultHoldBack - 1, 0},
		{"of unknown length, what is held back", true, DefaultHoldBack, 0},
		{"of unknown length, one byte more", true, DefaultHoldBack + 1, 1},
		{"of unknown length, half of it", true, size / 2, size/2 - DefaultHoldBack},
		{"of unknown length, all but the last byte", true, size - 1, size - 1 - DefaultHoldBack},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			blob := s.publish(spec("1.0", badSize))
			stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(test.at), NoContentLength: test.unknown})
			im, err := s.f.Image(t.Context(), Request{Ref: s.app("1.0")})
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			s.received(im.download, test.at)
			may := test.may
			for _, offset := range []int64{0, max(may-1, 0), may, max(test.at-1, 0), test.at} {
				got, err := im.Await(ended(), offset)
				switch {
				case offset < may && (err != nil || got != may):
					t.Errorf("Await(%d) = %d, %v, want %d", offset, got, err, may)
				case offset >= may && !errors.Is(err, context.Canceled):
					t.Errorf("Await(%d) = %d, %v, want nothing yet", offset, got, err)
				}
			}
			want := size
			if test.unknown {
				want = -1
			}
			if !im.Arriving() || im.File() != nil || im.Size != want {
				t.Errorf("Arriving, File, Size = %v, %v, %d", im.Arriving(), im.File(), im.Size)
			}
			stall.Release()
			if got, err := deliver(t.Context(), im); err != nil || !bytes.Equal(got, blob) {
				t.Errorf("after all: %d bytes, %v", len(got), err)
			}
			if im.Arriving() || im.File() == nil {
				t.Error("it is still arriving")
			}
		})
	}
}

// TestNothingBeforeTheVerdict: where the signature isn't known, or policy says so, not even the first byte may leave early.
func TestNothingBeforeTheVerdict(t *testing.T) {
	for _, test := range []struct {
		name   string
		policy Policy
		setUp  func(s *scene)
	}{
		{"verify-first", Policy{Delivery: VerifyFirst}, func(*scene) {}},
		{"unsigned", Policy{Trust: trust.Policy{Signature: trust.Optional}}, func(s *scene) {
			s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusNotFound})
		}},
		{"signature later", Policy{}, func(s *scene) {
			s.pub.Misbehave(publisher.URL("*.asc"), publisher.Fault{Status: http.StatusAccepted, Times: 1})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, policies(test.policy))
			blob := s.publish(spec("1.0", badSize))
			test.setUp(s)
			stall := s.pub.Misbehave(publisher.URL("*.aci"), publisher.Fault{StallAfter: publisher.At(int64(len(blob)) - 1)})
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.want(s.app("1.0"), blob, Miss)
			}()
			s.wait("the last byte", stall.Stalled())
			// The image is there up to its last byte, and still nobody is given it.
			ctx, cancel := context.WithCancel(t.Context())
			a, err := s.f.answer(ctx, Request{Ref: s.app("1.0")})
			if err != nil {
				t.Fatal(err)
			}
			s.received(a.download, int64(len(blob))-1)
			cancel()
			if im, err := s.f.Image(ctx, Request{Ref: s.app("1.0")}); !errors.Is(err, context.Canceled) {
				t.Errorf("Image = %v, %v before the verdict", im, err)
			}
			select {
			case <-done:
				t.Error("the image was delivered before its last byte was there")
			default:
			}
			stall.Release()
			s.wait("the image", done)
		})
	}
}

func TestUnsignedImageWherePolicyAcceptsIt(t *testing.T) {
	s := newScene(t, policies(Policy{Trust: trust.Policy{Signature: trust.Optional}, TTL: time.Minute}))
	blob := acitest.Must(t, spec("1.0", badSize))
	s.publishAs("example.com/app", labels("1.0"), blob, nil)
	_, err := s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
	wantError(t, err, acproxy.ErrNotFound, "unsigned")
	s.idle()
	s.want(s.app("1.0"), blob, Hit)
	_, err = s.f.Signature(t.Context(), Request{Ref: s.app("1.0")})
	wantError(t, err, acproxy.ErrNotFound, "unsigned")
	if rec := s.record(s.app("1.0")); rec.Signed || !rec.Inspected || rec.ImageID.IsZero() {
		t.Errorf("record = %+v, want it unsigned and inspected", rec)
	}
	s.wantRequests(1, 1)
	// A signature that is there is never excused.
	s.publishAs("example.com/app", labels("2.0"), acitest.Must(t, spec("2.0", 10)), strangerKey())
	s.wantError(s.app("2.0"), acproxy.ErrRefused, "unknown-key")
}

func TestUnsignedImageThatBreaksARuleIsNotKept(t *testing.T) {
	s := newScene(t, policies(Policy{Trust: trust.Policy{Signature: trust.Optional}}))
	sp := spec("1.0", badSize)
	sp.Extra = []acitest.Entry{acitest.File("etc/passwd", "")}
	s.publishAs("example.com/app", labels("1.0"), acitest.Must(t, sp), nil)
	s.wantError(s.app("1.0"), acproxy.ErrPublisher, aci.RuleOutsideRootfs)
	s.idle()
	s.wantNothingKept()
}
